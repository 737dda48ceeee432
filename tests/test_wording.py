from __future__ import annotations

import sys
import unicodedata

import pytest

from mechedit.errors import ManyMistakes
from mechedit.wording import meant, visible

pytestmark = pytest.mark.anywhere

BIDIRECTIONAL = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]  # UAX 9, section 2
LINE_ENDS = [0x0A, 0x0B, 0x0C, 0x0D, 0x85, 0x2028, 0x2029]  # UAX 14, mandatory breaks


def test_nothing_that_a_terminal_obeys_or_a_reader_cannot_see_is_left():
    for code in [*range(0x20), *range(0x7F, 0xA0), *BIDIRECTIONAL, *LINE_ENDS, 0xFEFF, 0x200B, 0xAD, 0xE0041, 0xDC80]:
        shown = visible(f"a{chr(code)}b")
        assert chr(code) not in shown, hex(code)
        assert shown.isascii(), hex(code)
        assert len(shown.splitlines()) == 1
        assert shown.encode().decode("unicode_escape").encode("utf-8", "surrogatepass") == f"a{chr(code)}b".encode(
            "utf-8", "surrogatepass"
        ), "it is written out, so that it can be read"


def test_everything_else_stays_as_it_is():
    texts = [
        "The Space Needle",
        r"a\b",
        "São Paulo",
        "法国的首都是",
        "مرحبا",
        "می‌خواهم",
        "👩‍🚀",
        "[/b] [red]",
        "a  b",
        "\u3000",
        "",
    ]
    for text in texts:
        assert visible(text) == text
    kept = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] in "LMNPS"]
    assert visible("".join(kept)) == "".join(kept)


def test_a_line_of_many_mistakes_begins_with_none_of_theirs():
    error = ManyMistakes(["two records:", "record 0\nmechedit: all is well", "record 1"])
    assert str(error).split("\n") == ["two records:", r"record 0\nmechedit: all is well", "record 1"]


def test_the_nearest_word_is_named_and_a_far_one_is_not():
    assert meant("--clampp", ["--clamp", "--layer"]) == " (did you mean --clamp?)"
    assert meant("--zebra", ["--clamp", "--layer"]) == ""
