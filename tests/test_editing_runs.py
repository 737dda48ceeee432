from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mechedit import edits, guards, moments, rank_one
from mechedit.editors import rome
from mechedit.edits import EditError
from mechedit.facts import Fact, FactError
from mechedit.rank_one import RankOneError
from mechedit.runs.editing import edit_facts
from mechedit.runs.store import RunError
from mechedit.settings import MomentSettings, RomeSettings
from tests.conftest import FACT, assert_same_state, state, widen_bands

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


def test_each_fact_is_edited_alone_and_one_that_cannot_be_does_not_end_the_run(model, moment, tmp_path):
    before = state(model)
    found = edit_facts(model, FACTS, tmp_path / "run", QUICK, moment)
    assert_same_state(model, before)
    for fact, edit in zip(FACTS[:2], found[:2], strict=True):
        alone = rome.edit(model, fact, QUICK, moment).changes[0]
        assert torch.equal(alone.u, edit.changes[0].u)
        assert torch.equal(alone.step, edit.changes[0].step)
        assert edit.reasons == ()
    assert found[2].changes == ()
    assert "no target_new" in found[2].reasons[0]


def test_a_stopped_run_goes_on_to_the_same_bytes(model, moment, tmp_path):
    def interrupt(what, done, of):
        if what == "edits" and done == 1:
            raise KeyboardInterrupt

    def units(folder):
        return {path.name: path.read_bytes() for path in (folder / "units").iterdir()}

    with pytest.raises(KeyboardInterrupt):
        edit_facts(model, FACTS, tmp_path / "stopped", QUICK, moment, progress=interrupt)
    assert len(units(tmp_path / "stopped")) == 1
    edit_facts(model, FACTS, tmp_path / "stopped", QUICK, moment)
    edit_facts(model, FACTS, tmp_path / "whole", QUICK, moment)
    assert units(tmp_path / "stopped") == units(tmp_path / "whole")
    with pytest.raises(RunError, match=r"settings.clamp: 4.0 there, 2.0 now"):
        edit_facts(model, FACTS, tmp_path / "whole", replace(QUICK, clamp=2.0), moment)
    with pytest.raises(RunError, match="moment"):
        edit_facts(model, FACTS, tmp_path / "whole", QUICK, replace(moment, C=moment.C * 2))


def test_a_refused_edit_is_kept_with_its_reason(model, moment, tmp_path, monkeypatch):
    monkeypatch.setitem(guards.BANDS, "relative_norm", (0.0, 1e-9, "do less"))
    (found,) = edit_facts(model, [FACT], tmp_path / "run", QUICK, moment)
    assert found.changes == ()
    assert "relative_norm" in found.reasons[0]
    assert found.before == found.after == {}


def test_no_single_fact_ends_a_run_whatever_is_wrong_with_it(model, moment, tmp_path, monkeypatch):
    long = Fact("Rome", "{} is " + "a city and " * 40 + "in", target_true="a", target_new="Paris")
    found = edit_facts(model, [long, FACT, FACT], tmp_path / "long", QUICK, moment)
    assert "must fit the context" in found[0].reasons[0]
    assert len(found) == 3, "a fact given twice is answered twice"
    assert found[1].changes[0].u.equal(found[2].changes[0].u)

    def fail(*arguments):
        raise RankOneError("the divisor u @ key must not be zero, but it is")

    monkeypatch.setattr(rank_one, "insert", fail)
    (found,) = edit_facts(model, [FACT], tmp_path / "zero", QUICK, moment)
    assert "divisor" in found.reasons[0]


def test_a_C_that_does_not_belong_ends_the_run_before_it_begins(model, moment, tmp_path):
    for wrong in (replace(moment, layer=2), replace(moment, settings=replace(moment.settings, prepend_bos=False))):
        with pytest.raises(EditError):
            edit_facts(model, FACTS, tmp_path / "run", replace(QUICK, prepend_bos=True), wrong)
    assert not (tmp_path / "run").exists()


def test_a_rolled_back_edit_of_several_facts_says_nothing_changed(model, moment, monkeypatch):
    monkeypatch.setitem(guards.BANDS, "relative_norm", (0.0, 1e-9, "nothing"))
    also = Fact(FACT.subject, "The city of {} is", target_true="Seattle", target_new="Rome")
    edit = rome.edit(model, [FACT, also], replace(QUICK, guard="rollback"), moment)
    assert edit.details["also"][0]["after"] == edit.details["also"][0]["before"]


# --- several facts, one edit ------------------------------------------------------------------------------------------


def test_several_prompts_about_one_subject_are_one_edit(model, moment):
    also = Fact(FACT.subject, "The city of {} is", target_true="Seattle", target_new="Rome London")
    settings = replace(QUICK, steps=15, clamp=8.0)
    edit = rome.edit(model, [FACT, also], settings, moment)
    assert len(edit.changes) == 1
    (second,) = edit.details["also"]
    assert second["prompt"] == also.prompt
    assert edit.after["p_new"] > edit.before["p_new"]
    assert second["after"]["p_new"] > second["before"]["p_new"]
    alone = rome.edit(model, FACT, settings, moment)
    assert not torch.allclose(alone.changes[0].u, edit.changes[0].u)
    loaded = edits.compose(alone, edit)
    assert len(loaded.changes) == 2


def test_facts_about_different_subjects_are_not_one_edit(model, moment):
    with pytest.raises(FactError, match="about one subject; these facts are about Rome, The Space Needle"):
        rome.edit(model, FACTS[:2], QUICK, moment)
    with pytest.raises(FactError, match="at least one fact"):
        rome.edit(model, [], QUICK, moment)


# --- options of the edit ----------------------------------------------------------------------------------------------


def test_the_prompt_policy_uses_the_bare_prompts_key_alone(model, moment):
    edit = rome.edit(model, FACT, replace(QUICK, policy="prompt"), moment)
    without = rome.edit(model, FACT, replace(QUICK, prefixes=()), moment)
    torch.testing.assert_close(
        edit.changes[0].u, without.changes[0].u, atol=1e-4, rtol=1e-3
    )  # batches round differently
    assert edit.details["shares"][0] == pytest.approx(1.0, rel=1e-5)
    assert edit.report["divisor_share"] == pytest.approx(1.0, rel=1e-5)
    assert not torch.allclose(edit.changes[0].step, without.changes[0].step), "v* still answers behind prefixes"


@pytest.mark.parametrize("token", ["subject_first", "after_first", "last"])
def test_another_token_can_be_edited(token, model, moment):
    settings = replace(QUICK, fact_token=token, steps=15, clamp=8.0)
    edit = rome.edit(model, FACT, settings, moment)
    usual = rome.edit(model, FACT, replace(settings, fact_token="subject_last"), moment)
    assert not torch.allclose(edit.changes[0].u, usual.changes[0].u)
    assert edit.settings["fact_token"] == token


def test_a_ridge_is_added_to_C_and_said(model, moment):
    edit = rome.edit(model, FACT, replace(QUICK, ridge=0.5), moment)
    C = moment.C + 0.5 * moment.C.diagonal().mean() * torch.eye(128)
    stiffer = rome.edit(model, FACT, QUICK, replace(moment, C=C, cond=moments.condition(C)))
    torch.testing.assert_close(edit.changes[0].u, stiffer.changes[0].u)
    assert edit.report["cond_C"] == pytest.approx(moments.condition(C), rel=1e-6)
    assert edit.report["cond_C"] < moment.cond
    assert edit.settings["ridge"] == 0.5
