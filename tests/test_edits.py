from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mechedit import edits, files, models, moments, rank_one
from mechedit.cache import WriteError
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
    assert [part["prompt"] for part in whole.to_json()["parts"]] == [FACT.prompt, OTHER.prompt, FACT.prompt]
    gone = replace(pair[0], changes=(replace(pair[0].changes[0], step=-pair[0].changes[0].step),))
    assert edits.compose(pair[0], gone).report["update_norm"] == pytest.approx(0, abs=1e-6)
    nothing = replace(pair[0], changes=(replace(pair[0].changes[0], step=torch.zeros(32)),))
    assert edits.diff(nothing, pair[0])[0].ratio != edits.diff(nothing, pair[0])[0].ratio, "nan"
    again = edits.compose(whole, pair[0])
    assert len(again.changes) == 4


def test_an_edit_says_when_it_hardly_took(pair):
    took = replace(pair[0], after={"p_new": 0.6, "p_true": 0.1})
    assert took.notes == ()
    assert took.to_json()["notes"] == []
    for after in ({"p_new": 0.005, "p_true": 0.001}, {"p_new": 0.3, "p_true": 0.4}):
        (note,) = replace(took, after=after).notes
        assert note == f"it hardly took: P(new) = {after['p_new']:.2g} and P(true) = {after['p_true']:.2g} after it"
    assert replace(took, changes=(), reasons=("too large",)).notes == ("it has no changes, and writes nothing",)
    assert edits.compose(*pair).notes == (), "its parts have their own"


def test_an_edit_is_not_saved_as_a_folder(pair, tmp_path):
    with pytest.raises(WriteError, match="is a folder; name a file in it"):
        edits.save(pair[0], tmp_path)


def test_a_second_edit_on_top_of_one_that_is_in_the_model_says_what_to_do(model, pair):
    with (
        edits.edited(model, pair[0]),
        pytest.raises(EditError, match="give edits that belong together in one call"),
        edits.edited(model, pair[1]),
    ):
        pass


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
        unfit = replace(pair[0], changes=(rank_one.RankOneEdit(1, torch.ones(3), torch.ones(32)),))
        edited = weights(model)
        with pytest.raises(rank_one.RankOneError, match="another model"):
            edits.revert(model, pair[0], unfit)
        assert all(torch.equal(a, b) for a, b in zip(weights(model), edited, strict=True)), "all or none"
        edits.revert(model, *pair)
        for found, original in zip(weights(model), before, strict=True):
            torch.testing.assert_close(found, original, atol=1e-5, rtol=1e-5)


def test_a_thousand_edits_undone_leave_every_bit(model, pair):
    before = state(model)
    for round_ in range(1000):
        edits.apply(model, pair[round_ % 3]).undo()
    assert_same_state(model, before)


# --- what can be wrong with a file ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(load, tmp_path_factory):
    """An edit, found once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MECHEDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        widen_bands(patch)
        model = load("gpt2")
        C = moments.estimate(model, 1, settings=MomentSettings(tokens=600, context=32))
        return rome.edit(model, FACT, QUICK, C)


@pytest.mark.parametrize("share", [number / 40 for number in range(40)])
def test_a_file_cut_short_anywhere_is_refused(share, one, tmp_path):
    path = edits.save(one, tmp_path / "edit.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(files.FileError, match="truncated or no safetensors"):
        edits.load(path)


@pytest.mark.parametrize("at", [number / 20 for number in range(20)])
def test_a_file_with_one_byte_changed_is_refused_or_says_the_same(at, one, tmp_path):
    path = edits.save(one, tmp_path / "edit.safetensors")
    whole = bytearray(path.read_bytes())
    whole[int(at * len(whole))] ^= 0x11
    path.write_bytes(bytes(whole))
    with pytest.raises(files.FileError):
        edits.load(path)


def nan(tensors, record):
    tensors["0.step"][0] = float("nan")


def infinite(tensors, record):
    tensors["0.u"][-1] = float("inf")


SPOILT = {
    "nan": (nan, "NaN or infinity"),
    "infinity": (infinite, "NaN or infinity"),
    "matrix": (lambda tensors, record: tensors.update({"0.u": torch.zeros(4, 4)}), "no vectors"),
    "scalar": (lambda tensors, record: tensors.update({"0.u": torch.tensor(1.0)}), "no vectors"),
    "no u": (lambda tensors, record: tensors.pop("0.u"), "not whole"),
    "no step": (lambda tensors, record: tensors.pop("0.step"), "not whole"),
    "no changes": (lambda tensors, record: record.update(changes=[]), "without changes"),
    "changes no list": (lambda tensors, record: record.update(changes=3), "not whole"),
    "change without layer": (lambda tensors, record: record["changes"][0].pop("layer"), "not whole"),
    "layer no number": (lambda tensors, record: record["changes"][0].update(layer="../../etc"), "not whole"),
    "divisor no number": (lambda tensors, record: record["changes"][0].update(divisor=None), "not whole"),
    "more changes than tensors": (
        lambda tensors, record: record["changes"].append({"layer": 1, "divisor": 1.0}),
        "not whole",
    ),
    "fact no object": (lambda tensors, record: record.update(fact="../../fact"), "not whole"),
    "no prompt": (lambda tensors, record: record["fact"].pop("prompt"), "not whole"),
    "no weight hash": (lambda tensors, record: record["origin"].pop("weight_hash"), "not whole"),
    "weight hash null": (lambda tensors, record: record["origin"].update(weight_hash=None), "not whole"),
    "no norm": (lambda tensors, record: record["report"].pop("update_norm"), "not whole"),
    "nothing measured": (lambda tensors, record: record.update(before={}), "not whole"),
    "no reasons": (lambda tensors, record: record.pop("reasons"), "not whole"),
    "no settings": (lambda tensors, record: record.pop("settings"), "not whole"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_file_that_holds_what_no_edit_holds_is_refused(name, one, tmp_path):
    spoil, message = SPOILT[name]
    path = edits.save(one, tmp_path / "edit.safetensors")
    tensors, record = files.read(path, "edit")
    spoil(tensors, record)
    with pytest.raises(files.FileError, match=message):
        edits.load(files.write(path, "edit", tensors, record))


def test_an_edit_of_other_shapes_or_layers_is_refused_by_the_model(model, one):
    before = state(model)
    long = replace(one, changes=(replace(one.changes[0], u=torch.ones(7)),))
    with pytest.raises(rank_one.RankOneError, match="another model"):
        edits.apply(model, long)
    deep = replace(one, changes=(replace(one.changes[0], layer=40),))
    with pytest.raises(models.ModelError, match="from 0 to 3"):
        edits.apply(model, deep)
    assert_same_state(model, before)
