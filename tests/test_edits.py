from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mechedit import edits, models, moments
from mechedit.editors import rome
from mechedit.edits import EditError
from mechedit.facts import Fact
from mechedit.settings import MomentSettings, RomeSettings
from tests.conftest import FACT, assert_same_state, state, widen_bands

QUICK = RomeSettings(layer=1, steps=4, prefixes=((3, 1),))
OTHER = Fact("Rome", "The city of {} is", target_true="Seattle", target_new="London")


@pytest.fixture
def pair(model, monkeypatch):
    """Two edits of one layer and one of another."""
    widen_bands(monkeypatch)
    found = moments.estimate_layers(model, [1, 2], settings=MomentSettings(tokens=600, context=32))
    here = [rome.edit(model, fact, QUICK, found[1]) for fact in (FACT, OTHER)]
    return (*here, rome.edit(model, FACT, replace(QUICK, layer=2), found[2]))


def weights(model):
    return [models.W_out(model, layer).detach().clone() for layer in range(4)]


def test_a_composition_writes_what_its_parts_write_in_order(model, pair, tmp_path):
    with edits.edited(model, pair[0]), edits.edited(model, *pair[1:], force=True):
        expected = weights(model)
    whole = edits.load(edits.save(edits.compose(*pair), tmp_path / "whole.safetensors"))
    with edits.edited(model, whole):
        assert all(torch.equal(a, b) for a, b in zip(weights(model), expected, strict=True))
    assert [change.layer for change in whole.changes] == [1, 1, 2]
    assert [part["prompt"] for part in whole.details["parts"]] == [FACT.prompt, OTHER.prompt, FACT.prompt]
    change = torch.stack(expected) - torch.stack(weights(model))
    assert whole.report["update_norm"] == pytest.approx(float(change.norm()), rel=1e-3)
    again = edits.compose(whole, pair[0])
    assert len(again.changes) == 4


def test_edits_of_different_weights_are_not_composed(pair):
    strange = replace(pair[1], origin={**pair[1].origin, "weight_hash": "0" * 64})
    with pytest.raises(EditError, match="made for the same weights"):
        edits.compose(pair[0], strange)
    with pytest.raises(EditError, match="two edits or more; found 1"):
        edits.compose(pair[0])


def test_overlaps_are_the_cosines_of_the_factors_and_of_the_whole_changes(model, pair):
    first, second, elsewhere = pair
    (found,) = edits.diff(first, second)
    a, b = (torch.outer(edit.changes[0].u, edit.changes[0].step).flatten() for edit in (first, second))
    assert found.layer == 1
    assert found.change == pytest.approx(float(torch.nn.functional.cosine_similarity(a, b, dim=0)), abs=1e-6)
    assert found.change == pytest.approx(found.u * found.step, abs=1e-6)
    assert found.ratio == pytest.approx(float(b.norm() / a.norm()), rel=1e-6)
    (same,) = edits.diff(first, first)
    assert (same.u, same.step, same.change, same.ratio) == pytest.approx((1, 1, 1, 1))
    assert edits.diff(first, elsewhere) == []
    both, alone = edits.diff(edits.compose(*pair), elsewhere), edits.diff(elsewhere, edits.compose(*pair))
    assert both[0].change == pytest.approx(1)
    assert alone[0].ratio == pytest.approx(1)
    (several,) = edits.diff(edits.compose(first, second), first)
    assert several.u != several.u, "nan: there are two"
    assert several.change == pytest.approx(float(torch.nn.functional.cosine_similarity(a + b, a, dim=0)), abs=1e-6)


def test_reverting_takes_an_edit_out_of_a_model_that_came_with_it(model, pair):
    before = weights(model)
    with edits.edited(model, *pair):
        edits.revert(model, *pair)
        for found, original in zip(weights(model), before, strict=True):
            torch.testing.assert_close(found, original, atol=1e-5, rtol=1e-5)


def test_a_thousand_edits_undone_leave_every_bit(model, pair):
    before = state(model)
    for round_ in range(1000):
        edits.apply(model, pair[round_ % 3]).undo()
    assert_same_state(model, before)
