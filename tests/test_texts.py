from __future__ import annotations

import json
import math
import sys
from collections import Counter

import numpy as np
import pytest

from mechedit.benchmarks import metrics
from mechedit.benchmarks.texts import TextError, Tfidf, consistency, words

pytestmark = pytest.mark.anywhere

TEXTS = ["the tower stands in the city", "the city has a river", "bells ring in the tower of the city"]


def test_words_are_those_of_the_treebank():
    text = 'He isn\'t here. She said "no way" (really). It costs $3.50.'
    assert " ".join(words(text)) == "He is n't here . She said `` no way '' ( really ) . It costs $ 3.50 ."
    assert words("") == []
    assert metrics.fluency([words("One. Two.")]) > 0


def by_hand(text, texts):
    """Smoothed inverse document frequencies, times counts, of length 1: what scikit-learn documents."""
    counts = Counter(word for word in text.split() if len(word) > 1)
    known = {word for each in texts for word in each.split() if len(word) > 1}
    weights = {
        word: n * (math.log((1 + len(texts)) / (1 + sum(word in each.split() for each in texts))) + 1)
        for word, n in counts.items()
        if word in known
    }
    length = math.sqrt(sum(value**2 for value in weights.values()))
    return {word: value / length for word, value in weights.items()}


def test_the_cosine_is_that_of_vectors_made_by_hand(tmp_path):
    first, second = "the tower rings in the night", "a city tower and the river"
    a, b = by_hand(first, TEXTS), by_hand(second, TEXTS)
    expected = sum(a[word] * b.get(word, 0.0) for word in a)
    tfidf = Tfidf.fit(TEXTS)
    assert tfidf.cosine(first, second) == pytest.approx(expected)
    assert tfidf.cosine(first, first) == pytest.approx(1.0)
    assert tfidf.cosine(first, "zebra") == 0.0
    assert consistency(tfidf, ["the tower", "rings in the night"], ["a city tower", "and the river"]) == pytest.approx(
        expected
    )
    assert math.isnan(consistency(tfidf, [], [second]))

    np.save(tmp_path / "idf.npy", tfidf.vectoriser.idf_)
    (tmp_path / "vocab.json").write_text(
        json.dumps({word: int(at) for word, at in tfidf.vectoriser.vocabulary_.items()})
    )
    again = Tfidf.read(tmp_path / "idf.npy", tmp_path / "vocab.json")
    assert again.cosine(first, second) == pytest.approx(expected)
    other = Tfidf.fit(["the night", "a river"])
    assert other.cosine(first, second) != pytest.approx(expected), "statistics are each object's own"
    assert again.cosine(first, second) == pytest.approx(expected)


def test_statistics_that_cannot_be_used_are_errors(tmp_path):
    idf, vocabulary = tmp_path / "idf.npy", tmp_path / "vocab.json"
    with pytest.raises(TextError, match="cannot be read as TF-IDF statistics"):
        Tfidf.read(idf, vocabulary)
    np.save(idf, np.ones(3))
    vocabulary.write_text(json.dumps({"a": 0, "b": 1}))
    with pytest.raises(TextError, match="number the words from 0 to 2"):
        Tfidf.read(idf, vocabulary)
    vocabulary.write_text("{")
    with pytest.raises(TextError, match="cannot be read as TF-IDF statistics"):
        Tfidf.read(idf, vocabulary)
    vocabulary.write_text(json.dumps({"a": 0, "b": "1", "c": 2}))
    with pytest.raises(TextError, match="number the words from 0 to 2"):
        Tfidf.read(idf, vocabulary)
    vocabulary.write_text(json.dumps({"a": 0, "b": 1}))
    np.save(idf, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(TextError, match="cannot be read"):
        Tfidf.read(idf, vocabulary)
    for wrong in (b"", b"PK\x03\x04 no zip"):
        idf.write_bytes(wrong)
        with pytest.raises(TextError, match="cannot be read"):
            Tfidf.read(idf, vocabulary)
    for array in (np.array([1.0, np.nan]), np.array([1, 2])):
        np.save(idf, array)
        with pytest.raises(TextError, match="one array of finite frequencies"):
            Tfidf.read(idf, vocabulary)
    with pytest.raises(TextError, match="texts that hold words"):
        Tfidf.fit([""])


@pytest.mark.parametrize(("module", "call"), [("nltk.tokenize", lambda: words("a")), ("sklearn.feature_extraction.text", lambda: Tfidf.fit(["ab"]))])  # fmt: skip
def test_a_missing_extra_is_named(module, call, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TextError, match=r"pip install 'mechedit\[evaluate\]'"):
        call()
