"""Generated texts as the paper measures them: their words, and how near they are to reference texts (GE and RS).

Needs the extra `evaluate` (nltk, scikit-learn). Nothing is downloaded: sentences are found by Punkt's rules without its
trained list of abbreviations, which the published code fetches; words are then NLTK's.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mechedit.cache import content_key
from mechedit.errors import MecheditError, check_list
from mechedit.parsing import ParseError, from_file

__all__ = ["References", "TextError", "Tfidf", "consistency", "words"]


class TextError(MecheditError, ValueError):
    """Texts, or statistics of texts, that cannot be used."""


def words(text: str) -> list[str]:
    """The words and punctuation marks of a text, for n-grams."""
    try:
        from nltk.tokenize import NLTKWordTokenizer
        from nltk.tokenize.punkt import PunktSentenceTokenizer
    except ImportError as error:
        raise TextError("words of texts are found by nltk: pip install 'mechedit[evaluate]'.") from error
    tokenizer = NLTKWordTokenizer()
    return [word for sentence in PunktSentenceTokenizer().tokenize(text) for word in tokenizer.tokenize(sentence)]


@dataclass(frozen=True)
class Tfidf:
    """TF-IDF vectors over a fixed vocabulary: scikit-learn's, with its default rules for words and lengths."""

    vectoriser: Any

    @classmethod
    def fit(cls, texts: Sequence[str]) -> Tfidf:
        """Vocabulary and inverse document frequencies of these texts.

        Raises:
            TextError: they hold no word, or scikit-learn is missing.
        """
        check_list("texts", texts)
        vectoriser = _vectoriser()
        try:
            return cls(vectoriser.fit(texts))
        except ValueError as error:
            raise TextError(f"TF-IDF needs texts that hold words: {error}.") from error

    @classmethod
    def read(cls, idf: str | Path, vocabulary: str | Path) -> Tfidf:
        """The published statistics of Wikipedia: `idf.npy` and `tfidf_vocab.json`.

        Raises:
            TextError: a file is missing, no such file, or the two do not belong together.
        """
        try:
            with Path(idf).open(
                "rb"
            ) as file:  # numpy leaves a file that it opened itself open where that is no archive
                frequencies = np.load(file, allow_pickle=False)
            places = from_file(vocabulary)
        except (OSError, EOFError, ValueError, MemoryError, zipfile.BadZipFile) as error:
            raise TextError(f"{idf} and {vocabulary} cannot be read as TF-IDF statistics: {error}.") from error
        if (
            not isinstance(frequencies, np.ndarray)
            or frequencies.dtype.kind != "f"
            or not np.isfinite(frequencies).all()
        ):
            raise TextError(f"{idf} must hold one array of finite frequencies.")
        numbers = list(places.values()) if isinstance(places, dict) else []
        if not all(isinstance(each, int) for each in numbers) or sorted(numbers) != list(range(frequencies.size)):
            raise TextError(
                f"{vocabulary} must number the words from 0 to {frequencies.size - 1}, as many as {idf} has frequencies."
            )
        vectoriser = _vectoriser(vocabulary=places)
        vectoriser.idf_ = frequencies.reshape(-1)  # of this one, not of the class as in the published code
        return cls(vectoriser)

    def cosine(self, first: str, second: str) -> float:
        """The cosine of two texts' vectors; 0 where one has no known word."""
        a, b = self.vectoriser.transform([first, second])
        return float((a @ b.T).sum())


@dataclass(frozen=True)
class References:
    """Texts about what a subject would be if the new target were true, by relation and target, with the names they are about."""

    texts: dict[tuple[str, str], tuple[tuple[str, str], ...]]  # (relation, target): (name, text)
    tfidf: Tfidf

    @classmethod
    def of(cls, texts: dict[tuple[str, str], tuple[tuple[str, str], ...]], tfidf: Tfidf | None = None) -> References:
        """With TF-IDF statistics of the texts themselves where no others are given."""
        return cls(texts, tfidf or Tfidf.fit([text for own in texts.values() for _, text in own]))

    @classmethod
    def read(cls, path: str | Path, tfidf: Tfidf | None = None) -> References:
        """The published `attribute_snippets.json` (relation_id, target_id, samples), or {relation: {target: [text, ...]}}.

        Raises:
            TextError: the file is missing, or is neither.
        """
        try:
            found = from_file(path)
            if isinstance(found, list):
                texts = {
                    (str(each["relation_id"]), str(each["target_id"])): tuple(
                        (str(sample.get("name", "")), str(sample["text"])) for sample in each["samples"]
                    )
                    for each in found
                }
            else:
                texts = {
                    (relation, target): tuple(("", str(text)) for text in own)
                    for relation, targets in found.items()
                    for target, own in targets.items()
                }
        except ParseError as error:
            raise TextError(f"{path} cannot be read: {error}.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TextError(
                f"{path} holds no reference texts ({type(error).__name__}: {error}): it must be attribute_snippets.json as "
                "published, or {relation: {target: [text, ...]}}."
            ) from error
        return cls.of(texts, tfidf)

    @property
    def key(self) -> str:
        """A hash of the texts and of the statistics."""
        vectoriser = self.tfidf.vectoriser
        places = sorted((word, int(place)) for word, place in vectoriser.vocabulary_.items())
        return content_key(
            [[*name, *map(list, own)] for name, own in self.texts.items()], places, vectoriser.idf_.tolist()
        )

    def about(self, relation: str | None, target: str | None) -> tuple[tuple[str, str], ...]:
        """(name, text) of each text about a target; none where there is none."""
        return self.texts.get((str(relation), str(target)), ())


def consistency(tfidf: Tfidf, generated: Sequence[str], references: Sequence[str]) -> float:
    """RS, over 100: the cosine of all generated texts, joined, with all reference texts, joined; nan where there are none."""
    check_list("generated", generated)
    check_list("references", references)
    if not generated or not references:
        return float("nan")
    return tfidf.cosine(" ".join(generated), " ".join(references))


def _vectoriser(**options: Any) -> Any:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise TextError("TF-IDF vectors are scikit-learn's: pip install 'mechedit[evaluate]'.") from error
    return TfidfVectorizer(**options)
