from __future__ import annotations

import json
import os

import pytest

from mechedit.parsing import ParseError, check, from_file, from_text, number, text_of

pytestmark = pytest.mark.anywhere


@pytest.mark.parametrize("text", ["", "{", "nothing", "[" * 200_000, "[" * 200_000 + "]" * 200_000, '{"a":' * 300 + "1" + "}" * 300, "1" * 5000, b"\xff\xfe"])  # fmt: skip
def test_what_is_no_json_or_too_deep_is_one_kind_of_error(text):
    with pytest.raises(ParseError) as found:
        from_text(text)
    assert len(str(found.value).splitlines()) == 1


def test_json_is_read_with_a_byte_order_mark_and_as_deep_as_people_write():
    value = {"a": [1, 2.5, None, True, "é"], "b": {"c": [[[{}]]]}}
    assert from_text("\ufeff" + json.dumps(value)) == value
    assert from_text(json.dumps(value).encode("utf-8-sig")) == value
    deep = "[" * 300 + "]" * 300
    assert from_text(deep, shallow=False) == json.loads(deep)
    assert from_text('{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(ParseError, match="a name twice"):
        from_text('{"b": {"a": 1, "a": 2}}', unique=True)


def test_only_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # which nobody writes to: reading it would last for ever
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "circle", tmp_path / "none", "/dev/zero", "a\0b", "a" * 300):
        for read in (from_file, text_of):
            with pytest.raises(ParseError):
                read(path)
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    with pytest.raises(ParseError, match="UTF-8"):
        text_of(tmp_path / "latin")
    (tmp_path / "marked").write_bytes("é".encode("utf-8-sig"))
    assert text_of(tmp_path / "marked") == "é"


def test_a_form_holds_or_names_the_place():
    form = {"name": str, "p": {str: number}, "ids": [int], "more": (None, {"a": bool}), "rest": object}
    good = {"name": "a", "p": {"x": 1, "y": float("nan")}, "ids": [], "more": None, "rest": [1], "unknown": 1}
    check(good, form)
    check(good | {"more": {"a": True}}, form)
    for wrong, message in (
        ({"name": 1}, "name must be a text; found 1"),
        ({"p": []}, "p must be an object"),
        ({"p": {"x": True}}, "p.x must be a number; found True"),
        ({"p": {"x": 10**400}}, "p.x must be a number"),
        ({"ids": [1, 2.0]}, r"ids\[1\] must be a whole number; found 2.0"),
        ({"ids": [True]}, r"ids\[0\] must be a whole number"),
        ({"more": {"a": 1}}, "more must be null or an object"),
    ):
        with pytest.raises(ParseError, match=message):
            check(good | wrong, form)
    with pytest.raises(ParseError, match="it lacks name"):
        check({}, form)
