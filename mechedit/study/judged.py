"""What was judged, once the key is applied: for each page its fact, its rater, each editor's rank and place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mechedit.study.forms import ITEMS, QUESTIONS
from mechedit.study.making import Study, StudyError
from mechedit.study.responses import Response

__all__ = ["Judged", "judged", "long_form"]


@dataclass(frozen=True, eq=False)
class Judged:
    """Finished pages: `facts` and `raters` [page]; `ranks` [page, editor], 0 the best, of each question; `places` [page, editor], 0 the
    first; `seconds` [page]."""

    editors: tuple[str, ...]
    facts: np.ndarray
    raters: np.ndarray
    ranks: dict[str, np.ndarray]
    places: np.ndarray
    seconds: np.ndarray

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The editors two by two, by number."""
        return list(combinations(range(len(self.editors)), 2))

    def wins(self, question: str) -> np.ndarray:
        """[page, pair]: whether the pair's first is ranked better."""
        ranks = self.ranks[question]
        return np.stack([ranks[:, a] < ranks[:, b] for a, b in self.pairs], 1).astype(float)

    def best(self, question: str) -> np.ndarray:
        """[page, editor]: whether the text is ranked best."""
        return (self.ranks[question] == 0).astype(float)


def judged(study: Study, responses: Sequence[Response]) -> Judged:
    """The finished pages of these responses.

    Raises:
        StudyError: there is none.
    """
    forms = {form.name: (number, form) for number, form in enumerate(study.forms)}
    rows = []
    for each in responses:
        rater, form = forms[each.form]
        for (fact, order), page in zip(form.pages, each.pages, strict=True):
            if any(len(page[question]) < len(order) for question in QUESTIONS):
                continue
            places = [order.index(editor) for editor in study.editors]
            ranks = {name: [page[name].index(study.letters[place]) for place in places] for name in QUESTIONS}
            rows.append((fact, rater, ranks, places, float(page["seconds"])))
    if not rows:
        raise StudyError("no page was judged. A report needs at least one accepted response.")
    facts, raters, ranked, places, seconds = zip(*rows, strict=True)
    return Judged(
        study.editors,
        np.array(facts),
        np.array(raters),
        {name: np.array([each[name] for each in ranked]) for name in QUESTIONS},
        np.array(places),
        np.array(seconds),
    )


def long_form(study: Study, responses: Sequence[Response]) -> dict[str, np.ndarray]:
    """By item, the mean mark [fact, editor] over its raters; nan where nobody gave one. Empty where the study has no such pages."""
    forms = {form.name: form for form in study.forms}
    given: dict[tuple[str, int, int], list[int]] = {}
    for each in responses:
        for (fact, editor), page in zip(forms[each.form].long_form, each.long_form, strict=True):
            for item, mark in page["items"].items():
                given.setdefault((item, fact, study.editors.index(editor)), []).append(mark)
    if not given:
        return {}
    found = {item: np.full((study.settings.scenarios, len(study.editors)), np.nan) for item in ITEMS}
    for (item, fact, column), marks in given.items():
        found[item][fact, column] = np.mean(marks)
    return found
