"""Three facts that can be edited and scored on the tiny models, and quick settings; evaluations, sweeps and engines share them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mechedit.editors import rome
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.moments import Moment
from mechedit.settings import EvaluateSettings, RomeSettings
from tests.conftest import FACT

QUICK = RomeSettings(layer=1, steps=4, prefixes=((3, 1),), guard="rollback")
PLAIN = EvaluateSettings(health=False, answers=False, beside=False)
CITY = "{} is located in the city of"
FACTS = [
    replace(FACT, generations=("The Space Needle is",), relation="city", target_new_id="Q90"),
    Fact(
        "The Eiffel Tower",
        CITY,
        "Paris",
        "London",
        ("The city of The Eiffel Tower is",),
        ("The Space Needle is located in the city of",),
    ),
    Fact("Rome", CITY, "Seattle", "Berlin", ("The city of Rome is",), ("Paris is located in the city of",)),
]


def made_ready(model: HookedModel, settings: RomeSettings, moment: Moment) -> rome.Prepared:
    """What edits by ROME share, with a C of one's own."""
    return rome.prepare(model, rome.resolve(model, settings), moment)


def same(rows, others):
    """Two tables have the same columns, and the same numbers up to rounding."""
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, other in zip(rows, others, strict=True):
        assert list(row.values()) == pytest.approx(list(other.values()), nan_ok=True, abs=1e-6)
