from __future__ import annotations

from dataclasses import replace
from math import isnan

import jaxtyping
import pytest
import torch

from mechedit import applying, changes, edits, models, provenance, weights
from mechedit.edits import EditError, Measured
from mechedit.facts import Fact
from mechedit.models import ModelError
from mechedit.rank_one import RankOneEdit
from mechedit.settings import RomeSettings, SettingsError
from mechedit.tracing import trace
from mechedit.weights import Weight, as_matrix, value
from tests.conftest import FACT, assert_same_state, state
from tests.hand_made import dense, edit_of, low_rank, rank_one, some_rows

OTHER = Fact("Rome", "The city of {} is", target_true="Seattle", target_new="London")
PLACES = [Weight(0, "attn.W_Q"), Weight(1, "mlp.W_out"), Weight(2, "mlp.W_in"), Weight(3, "mlp.b_in")]


@pytest.fixture
def pair(model):
    """Two edits of one layer and one of another."""
    found = [rank_one(model, 1, seed=1), rank_one(model, 1, seed=2), rank_one(model, 2, seed=3)]
    return [edit_of(model, change, fact=fact) for change, fact in zip(found, (FACT, OTHER, FACT), strict=True)]


@pytest.fixture
def wide(model):
    """One edit of several weights, with every kind of change."""
    return edit_of(
        model,
        low_rank(model, 0, "attn.W_Q", seed=1),
        rank_one(model, 1, seed=2),
        dense(model, 2, "mlp.W_in", seed=3),
        some_rows(model, 3, "mlp.b_in", (0,), seed=4),
        some_rows(model, 1, "mlp.W_out", seed=5),
    )


def outs(model):
    return [models.W_out(model, layer).detach().clone() for layer in range(4)]


def now(model):
    return {weight: as_matrix(weight, value(model, weight)).detach().clone() for weight in PLACES}


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- written and undone -----------------------------------------------------------------------------------------------


def test_changes_of_a_weight_are_summed_in_float64_and_rounded_once(model, wide):
    before, first = state(model), now(model)
    query, one, whole, bias, rows = wide.changes
    expected = {
        query.weight: query.left.double().T @ query.right.double(),
        one.weight: torch.outer(one.u.double(), one.step.double()),
        whole.weight: whole.delta.double(),
        bias.weight: bias.values.double(),
    }
    for row, values in zip(rows.index.tolist(), rows.values.double(), strict=True):
        expected[one.weight][row] += values
    with applying.edited(model, wide):
        for weight, found in now(model).items():
            assert torch.equal(found, (first[weight].double() + expected[weight]).float()), weight
    assert_same_state(model, before)


def test_edits_one_after_another_are_rounded_once_too(model):
    small = [edit_of(model, RankOneEdit(1, torch.full((128,), 1e-4), torch.full((32,), 1e-4))) for _ in range(50)]
    first = models.W_out(model, 1).detach().clone()
    applied = [applying.apply(model, edit, force=True) for edit in small]
    step = float(torch.tensor(1e-4).double()) ** 2
    assert torch.equal(models.W_out(model, 1), (first.double() + 50 * step).float())
    one_by_one = first
    for _ in range(50):
        one_by_one = one_by_one + torch.tensor(step, dtype=torch.float32)
    assert not torch.equal(models.W_out(model, 1), one_by_one), "as rounding each time would leave it"
    for each in reversed(applied):
        each.undo()
    assert torch.equal(models.W_out(model, 1), first)


def test_a_hundred_edits_undone_leave_every_bit(model, pair):
    before = state(model)
    for round_ in range(100):
        applying.apply(model, pair[round_ % 3]).undo()
    assert_same_state(model, before)


def test_what_came_later_is_undone_first(model, pair, wide):
    before = state(model)
    first = applying.apply(model, pair[0])
    between = outs(model)
    second = applying.apply(model, pair[1], force=True)
    written = outs(model)
    with pytest.raises(EditError, match="mlp.W_out of block 1 changed after this edit was applied; undo the later"):
        first.undo()
    assert same(outs(model), written), "nothing was written"
    second.undo()
    assert same(outs(model), between)
    first.undo()
    assert_same_state(model, before)
    first.undo()  # a second time, there is nothing to do
    assert_same_state(model, before)


def test_edits_of_different_weights_are_undone_in_any_order(model, pair):
    before = state(model)
    here, there = applying.apply(model, pair[0]), applying.apply(model, pair[2], force=True)
    here.undo()
    assert provenance.lineage(model).edits == (pair[2].digest,)
    there.undo()
    assert_same_state(model, before)


def test_edits_that_are_added_are_undone_with_those_before(model, pair):
    before = state(model)
    with applying.edited(model, *pair, force=True):
        together = outs(model)
    applied = applying.apply(model, pair[0])
    applied.add(pair[1], pair[2], force=True)
    assert same(outs(model), together)
    assert applied.digests == provenance.lineage(model).edits == tuple(edit.digest for edit in pair)
    applied.undo()
    assert_same_state(model, before)


def test_edits_are_added_only_to_what_was_applied_last(model, pair):
    before = state(model)
    first = applying.apply(model, pair[0])
    second = applying.apply(model, pair[1], force=True)
    written = outs(model)
    with pytest.raises(EditError, match="added to what was applied last"):
        first.add(pair[2], force=True)
    assert same(outs(model), written)
    second.undo()
    first.undo()
    with pytest.raises(EditError, match="added to what was applied last"):
        first.add(pair[2], force=True)
    assert_same_state(model, before)


def test_an_edit_without_changes_writes_nothing(model):
    before = state(model)
    nothing = edit_of(model, reasons=("too large",))
    applied = applying.apply(model, nothing)
    assert_same_state(model, before)
    applied.undo()
    assert applying.diff(nothing, nothing) == []


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_weights_are_put_back_when_the_body_or_the_writing_is_stopped(stop, model, wide, monkeypatch):
    before = state(model)
    with pytest.raises(stop), applying.edited(model, wide):
        raise stop
    assert_same_state(model, before)
    real, calls = weights.write_, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 3:
            raise stop
        real(*args)

    monkeypatch.setattr(weights, "write_", stopped)
    with pytest.raises(stop):
        applying.apply(model, wide)
    assert len(calls) == 3
    assert_same_state(model, before)
    assert provenance.lineage(model).edits == ()


def test_an_edit_of_other_shapes_or_layers_is_refused_by_the_model_and_nothing_is_written(model, pair):
    before = state(model)
    unfit = {
        "another model": rank_one(model, 2).__class__(2, torch.ones(7), torch.ones(32)),
        "of shape .* made for another model": replace(dense(model, 3, "attn.W_K"), delta=torch.zeros(3, 4)),
        "from 0 to 3": replace(pair[0].changes[0], layer=40),
        "has no mlp.W_gate of block 0": replace(dense(model, 0, "mlp.W_in"), weight=Weight(0, "mlp.W_gate")),
    }
    for message, change in unfit.items():
        with pytest.raises(ModelError, match=message):
            applying.apply(model, pair[0], edit_of(model, change))
        assert_same_state(model, before)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e38])
def test_a_change_that_would_destroy_the_model_is_refused(number, model):
    before = state(model)
    large = RankOneEdit(1, torch.ones(128), torch.full((32,), number))
    assert not large.norm < float(torch.finfo(torch.float32).max), "what is no number is not small"
    assert not changes.norm([large]) < float(torch.finfo(torch.float32).max)
    with pytest.raises(EditError, match="would destroy the model"):
        applying.apply(model, edit_of(model, rank_one(model, 0)), edit_of(model, large))
    assert_same_state(model, before)


# --- which model an edit belongs to -----------------------------------------------------------------------------------


def test_a_second_edit_on_top_of_one_that_is_in_the_model_says_what_to_do(model, pair):
    with (
        applying.edited(model, pair[0]),
        pytest.raises(EditError, match="give edits that belong together in one call"),
        applying.edited(model, pair[1]),
    ):
        pass


def test_an_edit_that_is_applied_already_is_told_so_and_not_that_it_is_of_another_model(model, pair):
    before, both = state(model), applying.compose(*pair[:2])
    applied = applying.apply(model, pair[0])
    for again in (pair[0], both):
        with pytest.raises(EditError, match=f"'The Space Needle' is applied to {model.cfg.model_name} already"):
            applying.apply(model, again)
    with pytest.raises(EditError, match="was made for .* with weights"):
        applying.check(model, [pair[1]])
    applied.undo()
    applied.undo()
    assert_same_state(model, before)
    with pytest.raises(EditError, match="an edit is written once; that of 'The Space Needle' is given twice"):
        applying.apply(model, pair[0], pair[0])
    assert_same_state(model, before)


def test_an_edit_is_refused_by_a_model_that_differs_in_any_weight(model, pair):
    for name, parameter in model.named_parameters():
        if ".qkv." in name:  # which a bridge keeps, and does not compute with
            continue
        original, somewhere = parameter.detach().clone(), (0,) * (parameter.ndim - 1) + (1,)
        with torch.no_grad():
            parameter[somewhere] += 0.5
        with pytest.raises(EditError, match="was made for .* with weights"):
            applying.check(model, [pair[0]])
        with torch.no_grad():
            parameter.copy_(original)
    applying.check(model, pair)


def test_force_writes_an_edit_into_whatever_fits(model, load, pair):
    other = load("gptj")
    before, first = state(other), models.W_out(other, 1).detach().clone()
    with pytest.raises(EditError, match="was made for"):
        applying.apply(other, pair[0])
    with applying.edited(other, pair[0], force=True):
        change = torch.outer(pair[0].changes[0].u.double(), pair[0].changes[0].step.double())
        assert torch.equal(models.W_out(other, 1), (first.double() + change).float())
    assert_same_state(other, before)


def test_a_model_that_is_changed_otherwise_is_its_own_beginning(model, pair):
    before = state(model)
    applied = applying.apply(model, pair[0])
    assert provenance.lineage(model).edits == (pair[0].digest,)
    with torch.no_grad():
        original = models.W_out(model, 3).detach().clone()
        models.W_out(model, 3).mul_(2.0)
    assert provenance.lineage(model) == provenance.Lineage(models.identity(model).weights, ())
    later = edit_of(model, rank_one(model, 1, seed=9))
    assert later.parents == ()
    with applying.edited(model, later):
        assert provenance.lineage(model).edits == (later.digest,)
    with torch.no_grad():
        models.W_out(model, 3).copy_(original)
    applied.undo()
    assert_same_state(model, before)


def test_underneath_is_the_model_without_the_edits_that_stand_in_it(model, pair, wide):
    before = state(model)
    applied = [applying.apply(model, pair[0]), applying.apply(model, wide, force=True)]
    after, line = now(model), provenance.lineage(model)
    with applying.underneath(model):
        assert_same_state(model, before)
        assert provenance.lineage(model).edits == ()
    assert all(torch.equal(each, after[weight]) for weight, each in now(model).items())
    assert provenance.lineage(model) == line
    for each in reversed(applied):
        each.undo()


def test_changes_are_written_for_a_while_on_top_of_what_stands(model, pair):
    applied = applying.apply(model, pair[0])
    standing = outs(model)
    with applying.edited(model, pair[1], force=True):
        expected = outs(model)
    with applying.written(model, pair[1].changes):
        assert same(outs(model), expected)
    assert same(outs(model), standing)
    assert provenance.lineage(model).edits == (pair[0].digest,)
    applied.undo()


# --- taken out, put together, compared --------------------------------------------------------------------------------


def test_reverting_takes_an_edit_out_of_a_model_that_came_with_it(model, pair, wide):
    before = outs(model)
    with applying.edited(model, *pair):
        unfit = replace(pair[0], changes=(RankOneEdit(1, torch.ones(3), torch.ones(32)),))
        edited = outs(model)
        with pytest.raises(ModelError, match="another model"):
            applying.revert(model, pair[0], unfit)
        assert same(outs(model), edited), "all or none"
        applying.revert(model, *pair)
        for found, original in zip(outs(model), before, strict=True):
            torch.testing.assert_close(found, original, atol=1e-5, rtol=1e-5)
        assert provenance.lineage(model).edits == ()
    first = now(model)
    with applying.edited(model, wide):
        applying.revert(model, wide)
        for weight, found in now(model).items():
            torch.testing.assert_close(found, first[weight], atol=1e-5, rtol=1e-5)


def test_a_composition_writes_what_its_parts_write_in_order(model, pair, tmp_path):
    with applying.edited(model, pair[0]), applying.edited(model, *pair[1:], force=True):
        expected = outs(model)
    whole = edits.load(edits.save(applying.compose(*pair), tmp_path / "whole.safetensors"))
    with applying.edited(model, whole):
        assert same(outs(model), expected)
    assert [change.layer for change in whole.changes] == [1, 1, 2]
    assert [part["prompt"] for part in whole.details["parts"]] == [FACT.prompt, OTHER.prompt, FACT.prompt]
    assert [each.fact["prompt"] for each in whole.facts] == [FACT.prompt, OTHER.prompt, FACT.prompt]
    change = torch.stack(expected) - torch.stack(outs(model))
    assert whole.report["update_norm"] == pytest.approx(float(change.norm()), rel=1e-3)
    assert [part["prompt"] for part in whole.to_json()["parts"]] == [FACT.prompt, OTHER.prompt, FACT.prompt]
    assert whole.seconds == pytest.approx(sum(edit.seconds for edit in pair))
    gone = replace(pair[0], changes=(replace(pair[0].changes[0], step=-pair[0].changes[0].step),))
    assert applying.compose(pair[0], gone).report["update_norm"] == pytest.approx(0, abs=1e-6)


def test_a_composition_can_be_composed_further_and_names_every_part_once(model, pair):
    whole = applying.compose(applying.compose(pair[0], pair[1]), pair[2])
    assert len(whole.changes) == 3
    assert whole.parts == tuple(edit.digest for edit in pair)
    assert [part["prompt"] for part in whole.details["parts"]] == [FACT.prompt, OTHER.prompt, FACT.prompt]
    with applying.edited(model, whole):
        found = outs(model)
    with applying.edited(model, *pair):
        assert same(outs(model), found)
    for twice in ((pair[0], pair[0]), (whole, pair[1]), (pair[2], whole)):
        with pytest.raises(EditError, match="an edit is written once; .* is given twice"):
            applying.compose(*twice)


def test_a_composition_of_every_kind_of_change_is_all_of_them(model, wide, pair):
    whole = applying.compose(wide, pair[2])
    with applying.edited(model, wide, pair[2]):
        expected = now(model)
    with applying.edited(model, whole):
        assert all(torch.equal(each, expected[weight]) for weight, each in now(model).items())


def test_edits_of_different_weights_are_not_composed(pair):
    strange = replace(pair[1], origin={**pair[1].origin, "weights": "0" * 32})
    with pytest.raises(EditError, match="made for the same weights"):
        applying.compose(pair[0], strange)
    with pytest.raises(EditError, match="two edits or more; found 1"):
        applying.compose(pair[0])


def test_edits_in_sequence_are_composed_and_applied_in_their_order_only(model, pair):
    before = state(model)
    first = applying.apply(model, pair[0])
    second = edit_of(model, rank_one(model, 1, seed=7), fact=OTHER)
    assert (second.parents, second.base) == ((pair[0].digest,), pair[0].base)
    second_in = applying.apply(model, second)
    third = edit_of(model, low_rank(model, 3, "attn.W_O", seed=8))
    assert third.parents == (pair[0].digest, second.digest)
    second_in.undo()
    with pytest.raises(EditError, match="in the order in which they were found"):
        applying.apply(model, third)
    first.undo()
    for wrong in ((second, third), (third, second), (second, pair[0], third)):
        with pytest.raises(EditError, match="in the order in which they were found"):
            applying.apply(model, *wrong)
    for wrong in ((second, pair[0]), (pair[0], third)):
        with pytest.raises(EditError, match="each on top of those before it"):
            applying.compose(*wrong)
    with applying.edited(model, applying.compose(pair[0], second), third):
        expected = outs(model)
    with applying.edited(model, pair[0], second, third):
        assert same(outs(model), expected)
    assert_same_state(model, before)


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


def test_overlaps_are_the_cosines_of_the_factors_and_of_the_whole_changes(model, pair):
    first, second, elsewhere = pair
    (found,) = applying.diff(first, second)
    a, b = (torch.outer(edit.changes[0].u, edit.changes[0].step).flatten() for edit in (first, second))
    assert (found.layer, found.weight) == (1, Weight(1, "mlp.W_out"))
    assert found.u == pytest.approx(cosine(first.changes[0].u, second.changes[0].u), abs=1e-6)
    assert found.step == pytest.approx(cosine(first.changes[0].step, second.changes[0].step), abs=1e-6)
    assert found.change == pytest.approx(cosine(a, b), abs=1e-6)
    assert found.change == pytest.approx(found.u * found.step, abs=1e-6)
    assert found.ratio == pytest.approx(float(b.norm() / a.norm()), rel=1e-6)
    (same,) = applying.diff(first, first)
    assert (same.u, same.step, same.change, same.ratio) == pytest.approx((1, 1, 1, 1))
    assert applying.diff(first, elsewhere) == []
    whole = applying.compose(*pair)
    both, alone = applying.diff(whole, elsewhere), applying.diff(elsewhere, whole)
    assert both[0].change == pytest.approx(1)
    assert alone[0].ratio == pytest.approx(1)
    (several,) = applying.diff(applying.compose(first, second), first)
    assert isnan(several.u), "there are two"
    assert several.change == pytest.approx(cosine(a + b, a), abs=1e-6)
    nothing = replace(first, changes=(replace(first.changes[0], step=torch.zeros(32)),))
    assert isnan(applying.diff(nothing, first)[0].ratio)
    assert found.to_json() == {"layer": 1, "weight": "mlp.W_out", "u": found.u, "step": found.step, "change": found.change, "ratio": found.ratio}  # fmt: skip


def test_overlaps_are_told_weight_by_weight_whatever_the_kind_of_change(model, wide):
    other = edit_of(
        model,
        dense(model, 2, "mlp.W_in", seed=11),
        low_rank(model, 0, "attn.W_Q", rank=1, seed=12),
        dense(model, 1, "mlp.W_out", seed=13),
        dense(model, 1, "mlp.W_in", seed=14),
    )
    found = {each.weight: each for each in applying.diff(wide, other)}
    assert list(found) == [Weight(0, "attn.W_Q"), Weight(1, "mlp.W_out"), Weight(2, "mlp.W_in")]
    query, one, whole, _, rows = wide.changes
    mine = torch.outer(one.u, one.step).index_add(0, rows.index, rows.values)
    assert found[one.weight].change == pytest.approx(cosine(mine, other.changes[2].delta), abs=1e-6)
    assert found[one.weight].ratio == pytest.approx(float(other.changes[2].delta.norm() / mine.norm()), rel=1e-5)
    assert found[whole.weight].change == pytest.approx(cosine(whole.delta, other.changes[0].delta), abs=1e-6)
    mine, theirs = (each.left.T @ each.right for each in (query, other.changes[1]))
    assert found[query.weight].change == pytest.approx(cosine(mine, theirs), abs=1e-6)
    assert all(isnan(each.u) and isnan(each.step) for each in found.values()), "none is of one product in both"


def test_what_was_measured_of_every_fact_stays_with_it_in_a_composition(model, pair):
    second = replace(pair[1], facts=(Measured(pair[1].fact, {"p_new": 0.2}, {"p_new": 0.6}), *pair[2].facts))
    whole = applying.compose(pair[0], second)
    assert whole.facts == (*pair[0].facts, *second.facts)
    assert (whole.fact, whole.before, whole.after) == (pair[0].fact, pair[0].before, pair[0].after)


@pytest.mark.parametrize("what", ["x", None])
def test_what_is_no_edit_is_refused_and_says_how_to_read_one(what, model, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which users do not have
    with pytest.raises(EditError, match="must be an Edit; found .* edits.load"):
        applying.apply(model, what)


def test_a_trace_refuses_settings_of_an_edit(model, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which users do not have
    with pytest.raises(SettingsError, match="takes TraceSettings; found RomeSettings"):
        trace(model, FACT, RomeSettings())
