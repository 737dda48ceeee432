from __future__ import annotations

import io
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechedit import corruption, facts, generation, guards, moments
from mechedit.errors import ListError
from mechedit.moments import corpus
from tests.conftest import WORDS


@given(st.text("ab \n", max_size=60), st.integers(3, 12))
def test_pieces_are_the_text_and_no_longer_than_they_must_be(text, length):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE", length)
        pieces = list(corpus._pieces(io.StringIO(text, newline="\n")))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 3 * length for piece in pieces)


def test_lines_that_fit_are_cut_as_whole_lines(monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 20)
    text = "one two three\nfour five\n\nsix seven eight\nnine\n"
    file, expected = io.StringIO(text), []
    while lines := file.readlines(20):
        expected.append("".join(lines))
    assert list(corpus._pieces(io.StringIO(text))) == expected


def test_a_line_without_end_has_the_tokens_that_it_has_as_a_whole(model, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 100)
    path = tmp_path / "text.txt"
    text = WORDS.strip().replace(". ", ".  ") * 30
    path.write_text(text)
    pieces = list(corpus._encoded(model, path))
    assert len(pieces) > 50
    assert list(chain(*pieces)) == model.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_one_text_is_no_list_of_texts(model, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(WORDS)
    calls = {
        "texts": lambda: moments.estimate(model, 0, str(path)),
        "prompts": lambda: generation.continuations(model, "Rome is"),
        "subjects": lambda: guards.measure(model, "Rome"),
        "need": lambda: facts.read(path, "target_true"),
    }
    for name, call in calls.items():
        with pytest.raises(ListError, match=rf"{name} must be a list; found '.*'. Give \['.*'\] for a list of one"):
            call()
    with pytest.raises(ListError, match="texts must be a list; found 'Rome'"):
        corruption.statistics(model, "Rome")
    with pytest.raises(ListError, match="texts must be a list; found"):
        moments.estimate_layers(model, [0], "file")
