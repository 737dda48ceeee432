from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mechedit import applying, guards, keys, models, moments, rank_one
from mechedit.editors import edit, rome
from mechedit.edits import EditError
from mechedit.facts import Fact, FactError
from mechedit.rank_one import RankOneError
from mechedit.runs.editing import edit_facts
from mechedit.runs.store import RunError
from mechedit.settings import POLICIES, FineTuningSettings, MomentSettings, RomeSettings
from tests.conftest import FACT, assert_same_state, kept_units, state, widen_bands

pytestmark = pytest.mark.anywhere

QUICK = RomeSettings(layer=1, steps=4, prefixes=((3, 1),))
FACTS = [
    FACT,
    Fact("Rome", "The city of {} is", target_true="Seattle", target_new="London"),
    Fact("Paris", "The city of {} is"),  # nothing new to say
]


@pytest.fixture
def moment(model, monkeypatch):
    widen_bands(monkeypatch)
    return moments.estimate(model, 1, settings=MomentSettings(tokens=600, context=32))


@pytest.fixture
def ready(model, moment):
    return rome.prepare(model, rome.resolve(model, QUICK), moment)


@pytest.mark.both
def test_each_fact_is_edited_alone_and_one_that_cannot_be_does_not_end_the_run(model, moment, ready, tmp_path):
    before = state(model)
    found = edit_facts(model, FACTS, tmp_path / "run", "rome", QUICK, ready)
    assert_same_state(model, before)
    for fact, each in zip(FACTS[:2], found[:2], strict=True):
        alone = rome.edit(model, fact, QUICK, moment).changes[0]
        assert torch.equal(alone.u, each.changes[0].u)
        assert torch.equal(alone.step, each.changes[0].step)
        assert each.reasons == ()
    assert found[2].changes == ()
    assert "no target_new" in found[2].reasons[0]


def test_a_stopped_run_goes_on_to_the_same_bytes(model, moment, ready, tmp_path):
    def interrupt(what, done, of):
        if what == "edits" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit_facts(model, FACTS, tmp_path / "stopped", "rome", QUICK, ready, progress=interrupt)
    assert len(kept_units(tmp_path / "stopped")) == 1
    edit_facts(model, FACTS, tmp_path / "stopped", "rome", QUICK, ready)
    edit_facts(model, FACTS, tmp_path / "whole", "rome", QUICK, ready)
    assert kept_units(tmp_path / "stopped") == kept_units(tmp_path / "whole")
    with pytest.raises(RunError, match=r"edit.clamp: 4.0 there, 2.0 now"):
        edit_facts(model, FACTS, tmp_path / "whole", "rome", replace(QUICK, clamp=2.0), ready)
    other = rome.prepare(model, rome.resolve(model, QUICK), replace(moment, C=moment.C * 2))
    for prepared in (other, replace(ready, prefixes=("",))):
        with pytest.raises(RunError, match=r"\(prepared: .* there, .* now\)"):
            edit_facts(model, FACTS, tmp_path / "whole", "rome", QUICK, prepared)
    with pytest.raises(RunError, match="editor: 'rome' there, 'rome-random-key' now"):
        edit_facts(model, FACTS, tmp_path / "whole", "rome-random-key", QUICK, ready)


def test_a_refused_edit_is_kept_with_its_reason(model, ready, tmp_path, monkeypatch):
    monkeypatch.setitem(guards.BANDS, "relative_norm", (0.0, 1e-9, "do less"))
    (found,) = edit_facts(model, [FACT], tmp_path / "run", "rome", QUICK, ready)
    assert found.changes == ()
    assert "relative_norm" in found.reasons[0]
    assert found.before == found.after == {}


def test_no_single_fact_ends_a_run_whatever_is_wrong_with_it(model, ready, tmp_path, monkeypatch):
    long = Fact("Rome", "{} is " + "a city and " * 40 + "in", target_true="a", target_new="Paris")
    found = edit_facts(model, [long, FACT, FACT], tmp_path / "long", "rome", QUICK, ready)
    assert "must fit the context" in found[0].reasons[0]
    assert len(found) == 3, "a fact given twice is answered twice"
    assert found[1].changes[0].u.equal(found[2].changes[0].u)

    def fail(*arguments):
        raise RankOneError("the divisor u @ key must not be zero, but it is")

    monkeypatch.setattr(rank_one, "insert", fail)
    (found,) = edit_facts(model, [FACT], tmp_path / "zero", "rome", QUICK, ready)
    assert "divisor" in found.reasons[0]


def test_a_C_that_does_not_belong_ends_the_run_before_it_begins(model, moment, ready, tmp_path):
    with_bos = replace(moment, settings=replace(moment.settings, prepend_bos=True))
    for wrong in (replace(moment, layer=2), with_bos):
        with pytest.raises(EditError):
            edit_facts(model, FACTS, tmp_path / "run", "rome", replace(QUICK, prepend_bos=False), replace(ready, estimated=wrong))  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.both
def test_a_run_makes_ready_itself_and_gives_what_the_harness_gives(model, monkeypatch, tmp_path):
    widen_bands(monkeypatch)
    settings = FineTuningSettings(layer=2, steps=3)
    (found,) = edit_facts(model, [FACT], tmp_path, "ft", settings)
    alone = edit(model, FACT, "ft", settings)
    assert found.digest == alone.digest
    assert found.editor == "ft"


class Scaled(rome.Rome):
    """Of which one name has many."""

    def __init__(self, times):
        self.times, self.asked = times, 0

    def find(self, *given, **more):
        self.asked += 1
        found = super().find(*given, **more)
        return replace(found, changes=tuple(replace(each, step=self.times * each.step) for each in found.changes))


class Else(Scaled):
    pass


def test_editors_of_one_name_are_told_apart_by_their_class_and_what_they_are_made_with(model, ready, tmp_path):
    (once,) = edit_facts(model, FACTS[:1], tmp_path, Scaled(1.0), QUICK, ready)
    for other in (Scaled(0.5), Else(1.0), "rome"):
        with pytest.raises(RunError, match="holds a run of other settings"):
            edit_facts(model, FACTS[:1], tmp_path, other, QUICK, ready)
    same = Scaled(1.0)
    assert edit_facts(model, FACTS[:1], tmp_path, same, QUICK, ready)[0].digest == once.digest
    assert same.asked == 0, "it is kept"
    (half,) = edit_facts(model, FACTS[:1], tmp_path / "half", Scaled(0.5), QUICK, ready)
    assert half.report["update_norm"] == pytest.approx(once.report["update_norm"] / 2)


@pytest.mark.both
def test_a_model_with_hooks_is_not_edited_in_a_run(model, ready, tmp_path):
    with (
        model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda resid, hook: 2 * resid)]),
        pytest.raises(RunError, match="there are hooks on"),
    ):
        edit_facts(model, FACTS, tmp_path / "run", "rome", QUICK, ready)
    assert not (tmp_path / "run").exists()


def test_a_rolled_back_edit_of_several_facts_says_nothing_changed(model, moment, monkeypatch):
    monkeypatch.setitem(guards.BANDS, "relative_norm", (0.0, 1e-9, "nothing"))
    also = Fact(FACT.subject, "The city of {} is", target_true="Seattle", target_new="Rome")
    found = rome.edit(model, [FACT, also], replace(QUICK, guard="rollback"), moment)
    assert [each.after for each in found.facts] == [each.before for each in found.facts]
    assert found.changes == ()


# --- several facts, one edit ------------------------------------------------------------------------------------------


def test_several_prompts_about_one_subject_are_one_edit(model, moment):
    also = Fact(FACT.subject, "The city of {} is", target_true="Seattle", target_new="Rome London")
    settings = replace(QUICK, steps=15, clamp=8.0)
    found = rome.edit(model, [FACT, also], settings, moment)
    assert len(found.changes) == 1
    assert [each.fact["prompt"] for each in found.facts] == [FACT.prompt, also.prompt]
    assert all(each.after["p_new"] > each.before["p_new"] for each in found.facts)
    alone = rome.edit(model, FACT, settings, moment)
    assert not torch.allclose(alone.changes[0].u, found.changes[0].u)
    whole = applying.compose(alone, found)
    assert len(whole.changes) == 2


def test_facts_about_different_subjects_are_one_edit_of_a_key_each(model, moment):
    settings = replace(QUICK, steps=15, clamp=8.0)
    found = rome.edit(model, FACTS[:2], settings, moment)
    assert [each.fact["subject"] for each in found.facts] == ["The Space Needle", "Rome"]
    assert all(each.after["p_new"] > each.before["p_new"] for each in found.facts)
    before = keys.prefixes(model, settings)
    own = [keys.subject_keys(model, 1, keys.contexts(model, fact, before)).double().mean(0) for fact in FACTS[:2]]
    W_out, b_out = models.W_out(model, 1).detach().double(), models.b_out(model, 1).detach().double()
    now = W_out + sum(change.dense() for change in found.changes)
    torch.testing.assert_close(torch.stack(own) @ now + b_out, found.vectors["v*"].double(), atol=1e-4, rtol=1e-4)


def test_facts_that_contradict_each_other_are_no_edit(model, moment):
    with pytest.raises(FactError, match="contradict each other: .* is to become 'Paris' and 'Rome'"):
        rome.edit(model, [FACT, replace(FACT, target_new="Rome")], QUICK, moment)
    with pytest.raises(FactError, match="at least one fact"):
        rome.edit(model, [], QUICK, moment)


# --- options of the edit ----------------------------------------------------------------------------------------------


def test_the_prompt_policy_uses_the_bare_prompts_key_alone(model, moment):
    found = rome.edit(model, FACT, replace(QUICK, **POLICIES["prompt"]), moment)
    without = rome.edit(model, FACT, replace(QUICK, prefixes=()), moment)
    torch.testing.assert_close(
        found.changes[0].u, without.changes[0].u, atol=1e-4, rtol=1e-3
    )  # batches round differently
    assert found.details["shares"][0] == pytest.approx(1.0, rel=1e-5)
    assert found.report["divisor_share"] == pytest.approx(1.0, rel=1e-5)
    assert not torch.allclose(found.changes[0].step, without.changes[0].step), "v* still answers behind prefixes"


@pytest.mark.parametrize("token", ["subject_first", "after_first", "last"])
def test_another_token_can_be_edited(token, model, moment):
    settings = replace(QUICK, fact_token=token, steps=15, clamp=8.0)
    found = rome.edit(model, FACT, settings, moment)
    usual = rome.edit(model, FACT, replace(settings, fact_token="subject_last"), moment)
    assert not torch.allclose(found.changes[0].u, usual.changes[0].u)
    assert found.settings["fact_token"] == token


def test_a_ridge_is_added_to_C_and_said(model, moment):
    found = rome.edit(model, FACT, replace(QUICK, ridge=0.5), moment)
    C = moment.C + 0.5 * moment.C.diagonal().mean() * torch.eye(128)
    stiffer = rome.edit(model, FACT, QUICK, replace(moment, C=C, cond=moments.condition(C)))
    torch.testing.assert_close(found.changes[0].u, stiffer.changes[0].u)
    assert found.report["cond_C"] == pytest.approx(moments.condition(C), rel=1e-6)
    assert found.report["cond_C"] < moment.cond
    assert found.settings["ridge"] == 0.5
