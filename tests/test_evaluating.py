from __future__ import annotations

import inspect
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from mechedit import applying, edits, models, moments, provenance, rank_one, scoring, weights
from mechedit.benchmarks import counterfact, metrics
from mechedit.benchmarks.health import health, unedited
from mechedit.editors import EditorError, rome
from mechedit.facts import Fact, FactError
from mechedit.runs import scored, units
from mechedit.runs.editing import edit_facts
from mechedit.runs.engines import Local
from mechedit.runs.evaluating import evaluate
from mechedit.runs.shards import Shards
from mechedit.runs.store import RunError
from mechedit.settings import EvaluateSettings, FineTuningSettings, MomentSettings, SettingsError
from mechedit.weights import Weight
from tests.conftest import assert_same_state, state, widen_bands
from tests.three_facts import CITY, FACTS, PLAIN, QUICK, made_ready, same

pytestmark = pytest.mark.anywhere


@pytest.fixture
def moment(model, monkeypatch):
    widen_bands(monkeypatch)
    return moments.estimate(model, 1, settings=MomentSettings(tokens=600, context=32))


@pytest.fixture
def ready(model, moment):
    return made_ready(model, QUICK, moment)


def kept(folder):
    """The edits of an evaluation, in order."""
    return [edits.load(unit) for unit in units.read_all(folder / "edits")]


@pytest.mark.both
def test_independent_edits_are_scored_one_by_one(model, moment, ready, tmp_path):
    before = state(model)
    found = evaluate(model, FACTS, tmp_path, replace(PLAIN, health=True), "rome", QUICK, ready)
    assert_same_state(model, before)
    same(found.rows["before"], counterfact.scores(model, FACTS))
    healthy = unedited(model)
    for fact, row in zip(FACTS, found.rows["after"], strict=True):
        with applying.edited(model, rome.edit(model, fact, QUICK, moment)):
            (alone,) = counterfact.scores(model, [fact])
            well = health(model, healthy)
        assert {name: row[name] for name in alone} == pytest.approx(alone, abs=1e-6)
        assert {name: row[name] for name in well} == pytest.approx(well, rel=1e-5)
        assert row["edited"] == 1.0
    table = found.table("after")
    assert found.what["prepared"] == ready.key, "a digest of C and of the prefixes"
    assert table["ES"].mean == pytest.approx(np.mean([row["ES"] for row in found.rows["after"]]))
    assert table["S"].mean == pytest.approx(metrics.harmonic(*(table[name].mean for name in metrics.SUCCESSES)))


def test_edits_and_scores_of_independent_records_are_the_engines_work(model, ready, tmp_path):
    given = []

    class Watched(Local):
        def map(self, task, units, own=None):
            given.append(len(units))
            return super().map(task, units, own)

    evaluate(model, FACTS, tmp_path, PLAIN, "rome", QUICK, ready, engine=Watched(model))
    assert given == [3, 3, 3]  # before, the edits, after


@pytest.mark.both
def test_a_batch_is_one_edit_of_all_facts(model, moment, ready, tmp_path):
    found = evaluate(model, FACTS, tmp_path, replace(PLAIN, mode="batch"), "rome", QUICK, ready)
    (edit,) = kept(tmp_path)
    assert [each.fact["prompt"] for each in edit.facts] == [fact.prompt for fact in FACTS]
    with applying.edited(model, rome.edit(model, FACTS, QUICK, moment)):
        together = counterfact.scores(model, FACTS)
    same([{name: row[name] for name in together[0]} for row in found.rows["after"]], together)
    keys, values = (edit.vectors[name].double() for name in ("k*", "v*"))
    now = models.W_out(model, 1).detach().double() + sum(change.dense() for change in edit.changes)
    assert torch.allclose(keys @ now + models.b_out(model, 1).detach().double(), values, atol=1e-4)


def test_a_batch_is_of_the_records_that_can_be_edited_and_the_others_say_why(model, ready, tmp_path, monkeypatch):
    real = scoring.score

    def score(model, pairs, **named):
        said = [pair[:2] == (FACTS[1].prompt, "London") for pair in pairs]
        return [replace(each, first=(True,)) if own else each for own, each in zip(said, real(model, pairs, **named), strict=True)]  # fmt: skip

    monkeypatch.setattr(scoring, "score", score)
    long = Fact("Paris", "{} is " + "a city and " * 40 + "in", "Seattle", "Berlin")
    found = evaluate(model, [*FACTS, long], tmp_path, replace(PLAIN, mode="batch"), "rome", QUICK, ready)
    (edit,) = kept(tmp_path)
    assert [each.fact["subject"] for each in edit.facts] == ["The Space Needle", "Rome"]
    assert [row["edited"] for row in found.rows["after"]] == [1.0, 0.0, 1.0, 0.0]
    assert "already says" in found.facts[1]["reason"]
    assert "must fit the context" in found.facts[3]["reason"]
    assert [("already" in each["reason"], "fit" in each["reason"]) for each in found.facts[::2]] == [(False, False)] * 2
    with applying.edited(model, edit):
        (alone,) = counterfact.scores(model, FACTS[1:2])
    assert {name: found.rows["after"][1][name] for name in alone} == pytest.approx(alone, abs=1e-6), "the others' edit is in the model"  # fmt: skip
    assert found.rows["before"][1] != pytest.approx(alone, abs=1e-6)


def test_a_batch_that_cannot_be_found_leaves_every_record_as_it_was(model, ready, tmp_path):
    records = [FACTS[0], replace(FACTS[0], target_new="Berlin"), FACTS[1]]
    found = evaluate(model, records, tmp_path, replace(PLAIN, mode="batch"), "rome", QUICK, ready)
    assert all("contradict each other" in each["reason"] for each in found.facts)
    same(found.rows["before"], [{name: row[name] for name in found.rows["before"][0]} for row in found.rows["after"]])


@pytest.mark.both
def test_sequential_edits_build_on_each_other_and_are_scored_twice(model, moment, ready, tmp_path):
    before = state(model)
    found = evaluate(model, FACTS, tmp_path, replace(PLAIN, mode="sequential"), "rome", QUICK, ready)
    assert_same_state(model, before)
    after = []
    with weights.restored(model, Weight(1, "mlp.W_out")):
        for fact in FACTS:  # C holds: an edit of a block's W_out leaves the block's keys as they were
            rank_one.write_(model, *rome.edit(model, fact, QUICK, moment).changes)
            after += counterfact.scores(model, [fact])
        end = counterfact.scores(model, FACTS)
    same([{name: row[name] for name in after[0]} for row in found.rows["after"]], after)
    same(found.rows["at the end"], end)
    assert_same_state(model, before)


def test_a_sequence_may_go_in_batches_each_scored_right_after_it(model, moment, ready, tmp_path):
    before = state(model)
    gone = Fact("Paris", "{} is " + "a city and " * 40 + "in", "Seattle", "Berlin")  # longer than the context
    records, settings = [FACTS[0], gone, FACTS[1], FACTS[2]], replace(PLAIN, mode="sequential", together=3)
    found = evaluate(model, records, tmp_path, settings, "rome", QUICK, ready)
    with weights.restored(model, Weight(1, "mlp.W_out")):
        rank_one.write_(model, *rome.edit(model, [FACTS[0], FACTS[1]], QUICK, moment).changes)
        after = counterfact.scores(model, FACTS[:2])
        rank_one.write_(model, *rome.edit(model, FACTS[2], QUICK, moment).changes)
        after += counterfact.scores(model, FACTS[2:])
        end = counterfact.scores(model, FACTS)
    fit = [0, 2, 3]
    same([{name: found.rows["after"][index][name] for name in after[0]} for index in fit], after)
    same([found.rows["at the end"][index] for index in fit], end)
    assert [row["edited"] for row in found.rows["after"]] == [1.0, 0.0, 1.0, 1.0]
    assert "must fit the context" in found.facts[1]["reason"]
    assert "fit" not in found.facts[0]["reason"]
    assert [len(each.facts) for each in kept(tmp_path)] == [2, 1]
    again = evaluate(model, records, tmp_path, settings, "rome", QUICK, ready)
    same(again.rows["after"], found.rows["after"])
    assert_same_state(model, before)
    with pytest.raises(SettingsError, match="together is for mode sequential"):
        EvaluateSettings(together=2)


@pytest.mark.parametrize("editor", ["rome", "ft"])
def test_sequential_edits_know_their_parents_and_compose_to_the_model_at_the_end(editor, model, ready, tmp_path):
    settings = {"rome": QUICK, "ft": FineTuningSettings(layer=2, steps=5, learning_rate=5e-3)}[editor]
    own = {"rome": ready, "ft": None}[editor]
    before = state(model)
    found = evaluate(model, FACTS, tmp_path, replace(PLAIN, mode="sequential"), editor, settings, own)
    made = kept(tmp_path)
    digests = tuple(each.digest for each in made)
    assert [each.parents for each in made] == [digests[:index] for index in range(3)]
    assert {each.base for each in made} == {models.identity(model).weights}
    whole = applying.compose(*made)
    assert [each.fact["subject"] for each in whole.facts] == [fact.subject for fact in FACTS]
    standing = applying.apply(model)
    for each in made:
        standing.add(each)
    in_order, end = state(model)[0], counterfact.scores(model, FACTS)
    standing.undo()
    assert_same_state(model, before)
    same(found.rows["at the end"], end)
    for given in ([whole], made):
        with applying.edited(model, *given):
            assert all(torch.equal(in_order[name], now) for name, now in model.named_parameters())
    with applying.edited(model, *made[:2]):
        scores = counterfact.scores(model, FACTS[1:2])
    same([{name: found.rows["after"][1][name] for name in scores[0]}], scores)


@pytest.mark.parametrize("mode", ["independent", "batch", "sequential"])
def test_a_stopped_evaluation_ends_in_the_same_bytes(model, ready, tmp_path, mode):
    settings = EvaluateSettings(mode=mode)

    def results(folder):
        return {path.name: path.read_bytes() for path in evaluate(model, FACTS, folder, settings, "rome", QUICK, ready).save(folder)}  # fmt: skip

    before = state(model)
    stops = [("records after", 1), ("edits", 0 if mode == "batch" else 1)]  # a batch is one edit
    for noun, stop in stops:

        def interrupt(what, done, of, noun=noun, stop=stop):
            if what == noun and done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            evaluate(model, FACTS, tmp_path / f"cut{stop}{noun}", settings, "rome", QUICK, ready, progress=interrupt)
        assert_same_state(model, before)
    whole = results(tmp_path / "whole")
    tables = {
        "results.parquet",
        "prompts.parquet",
        "texts.parquet",
        "summary.json",
        "summary.csv",
        "summary.md",
        "summary.tex",
    }
    assert set(whole) == tables
    for noun, stop in stops:
        assert results(tmp_path / f"cut{stop}{noun}") == whole


def test_a_run_of_other_settings_is_refused(model, ready, tmp_path):
    evaluate(model, FACTS, tmp_path, PLAIN, "rome", QUICK, ready)
    with pytest.raises(RunError, match="clamp: 4.0 there, 2.0 now"):
        evaluate(model, FACTS, tmp_path, PLAIN, "rome", replace(QUICK, clamp=2.0), ready)
    with pytest.raises(RunError, match="settings.health"):
        evaluate(model, FACTS, tmp_path, EvaluateSettings(), "rome", QUICK, ready)
    with pytest.raises(RunError):
        evaluate(model, FACTS, tmp_path, replace(PLAIN, mode="sequential"), "rome", QUICK, ready)


def test_a_run_of_another_version_configuration_or_editor_is_refused(model, ready, tmp_path, monkeypatch):
    evaluate(model, FACTS, tmp_path, PLAIN, "rome", QUICK, ready)
    with pytest.raises(RunError, match=r"edit\.clamp: 4.0 there, None now"):
        evaluate(model, FACTS, tmp_path, PLAIN, None)
    with monkeypatch.context() as other:
        now = provenance.versions()
        other.setattr(provenance, "versions", lambda: now | {"torch": "0.4"})
        with pytest.raises(RunError, match=r"versions\.torch: .* there, '0\.4' now"):
            evaluate(model, FACTS, tmp_path, PLAIN, "rome", QUICK, ready)
        with pytest.raises(RunError, match=r"versions\.torch"):
            edit_facts(model, FACTS, tmp_path / "edits", "rome", QUICK, ready)
        other.setattr(provenance, "versions", lambda: now | {"python": "2.7"})
        evaluate(model, FACTS, tmp_path, PLAIN, "rome", QUICK, ready)  # on which no number depends
    evaluate(model, FACTS, tmp_path, PLAIN, "rome", QUICK, ready)
    tuned = FineTuningSettings(layer=1, steps=2, guard="rollback")
    evaluate(model, FACTS, tmp_path / "ft", PLAIN, "ft", tuned)
    with monkeypatch.context() as other:
        other.setattr(model.cfg, "eps", 2 * model.cfg.eps)
        with pytest.raises(RunError, match=r"\(model\.identity: [^,]* there, [^,]* now\)"):
            evaluate(model, FACTS, tmp_path / "ft", PLAIN, "ft", tuned)


def test_what_the_unedited_model_scores_is_computed_once(model, ready, tmp_path, monkeypatch):
    measured = []
    real = scored.measure
    monkeypatch.setattr(scored, "measure", lambda *args, **named: measured.append(1) or real(*args, **named))
    first = evaluate(model, FACTS, tmp_path / "a", PLAIN, None)
    assert len(measured) == 3
    again = evaluate(model, FACTS, tmp_path / "b", PLAIN, "rome", QUICK, ready)
    assert len(measured) == 6
    assert again.rows["before"] == first.rows["before"]
    assert set(first.rows) == {"before"}


def test_a_record_that_cannot_be_edited_is_scored_as_it_was_and_says_why(model, ready, tmp_path, monkeypatch):
    real = rome.Rome.find

    def find(self, model, facts, *rest, **named):
        if facts[0].subject == "Rome":
            raise rank_one.RankOneError("u is NaN")
        return real(self, model, facts, *rest, **named)

    monkeypatch.setattr(rome.Rome, "find", find)
    for mode in ("independent", "sequential"):
        found = evaluate(model, FACTS, tmp_path / mode, replace(PLAIN, mode=mode), "rome", QUICK, ready)
        assert [each["reason"] for each in found.facts] == [*[each["reason"] for each in found.facts[:2]], "u is NaN"]
        assert not any("NaN" in each["reason"] for each in found.facts[:2])
        assert found.rows["after"][2]["edited"] == 0.0
        assert math.isnan(found.rows["after"][2]["relative_norm"])
    alone = evaluate(model, FACTS, tmp_path / "independent", PLAIN, "rome", QUICK, ready)
    same([alone.rows["before"][2]], [{name: alone.rows["after"][2][name] for name in alone.rows["before"][2]}])
    with applying.edited(model, *kept(tmp_path / "sequential")[:2]):
        scores = counterfact.scores(model, FACTS[2:])
    same([{name: found.rows["after"][2][name] for name in scores[0]}], scores)


def test_scores_belong_to_their_edits(model, ready, tmp_path):
    first = edit_facts(model, FACTS, tmp_path / "a", "rome", QUICK, ready)
    edit_facts(model, FACTS, tmp_path / "b", "rome", replace(QUICK, clamp=0.01), ready)
    found = evaluate(model, FACTS, tmp_path / "run", PLAIN, "rome", QUICK, ready, edits_in=tmp_path / "a")
    assert found.rows["after"][0]["relative_norm"] == first[0].report["relative_norm"]
    with pytest.raises(RunError, match="clamp"):
        evaluate(model, FACTS, tmp_path / "run", PLAIN, "rome", QUICK, ready, edits_in=tmp_path / "b")


@pytest.mark.both
def test_scores_belong_to_their_model_attention_and_all(model, tmp_path):
    before = evaluate(model, FACTS, tmp_path / "a", PLAIN, None).rows["before"]
    weight = Weight(0, "attn.W_V")
    with weights.restored(model, weight), torch.no_grad():
        weights.value(model, weight).mul_(2.0)
        assert evaluate(model, FACTS, tmp_path / "b", PLAIN, None).rows["before"] != before
        with pytest.raises(RunError, match=r"model\.identity"):
            evaluate(model, FACTS, tmp_path / "a", PLAIN, None)
    assert evaluate(model, FACTS, tmp_path / "c", PLAIN, None).rows["before"] == before


def test_a_record_that_raises_whatever_it_is_is_in_the_table_and_tried_again_by_the_next_run(
    model, tmp_path, monkeypatch
):
    real = scored.measure

    def measured(model, record, *rest, **named):
        if record is FACTS[1]:
            raise RuntimeError("out of luck")
        return real(model, record, *rest, **named)

    monkeypatch.setattr(scored, "measure", measured)
    found = evaluate(model, FACTS, tmp_path, PLAIN, None)
    assert [each["reason"] for each in found.facts] == ["", "RuntimeError: out of luck", ""]
    assert [math.isnan(row["ES"]) for row in found.rows["before"]] == [False, True, False]
    monkeypatch.setattr(scored, "measure", real)
    again = evaluate(model, FACTS, tmp_path, PLAIN, None)
    assert [each["reason"] for each in again.facts] == ["", "", ""]
    same(again.rows["before"], counterfact.scores(model, FACTS))


@pytest.mark.parametrize(("wrong", "said"), [({"tokens": 65}, r"must fit the context of 64 tokens of .*--tokens"), ({"top_k": 10_000}, r"top_k must be from 1 to the \d+ tokens of .*--top-k")])  # fmt: skip
def test_text_that_cannot_be_generated_is_refused_before_anything_is_edited(model, tmp_path, wrong, said):
    with pytest.raises(SettingsError, match=said):
        evaluate(model, FACTS, tmp_path / "run", replace(PLAIN, generate=True, **wrong))
    assert not (tmp_path / "run").exists()


@pytest.mark.both
def test_bos_is_the_edits_everywhere(model, ready, tmp_path):
    windows = MomentSettings(tokens=600, context=32, prepend_bos=False)
    without = moments.estimate(model, 1, settings=windows)
    settings = replace(QUICK, prepend_bos=False)
    found = evaluate(model, FACTS, tmp_path, PLAIN, "rome", settings, made_ready(model, settings, without))
    same(found.rows["before"], counterfact.scores(model, FACTS, prepend_bos=False))
    with applying.edited(model, rome.edit(model, FACTS[0], settings, without)):
        (alone,) = counterfact.scores(model, FACTS[:1], prepend_bos=False)
    assert {name: found.rows["after"][0][name] for name in alone} == pytest.approx(alone, abs=1e-6)
    assert found.rows["before"] != evaluate(model, FACTS, tmp_path / "bos", PLAIN, "rome", QUICK, ready).rows["before"]


def test_mistakes_are_found_before_the_expensive_part(model, tmp_path):
    with pytest.raises(FactError, match="one or more records"):
        evaluate(model, [], tmp_path)
    with pytest.raises(
        FactError, match=r"(?s)record 1, about 'Rome', lacks.*record .* says what record .* says; give each once"
    ):
        evaluate(model, [FACTS[0], Fact("Rome", CITY, "Paris"), FACTS[1], replace(FACTS[0], id="7")], tmp_path)
    with pytest.raises(EditorError, match="no editor is called 'luck'"):
        evaluate(model, FACTS, tmp_path, PLAIN, "luck")
    with pytest.raises(SettingsError, match="the editor ft takes FineTuningSettings; found RomeSettings"):
        evaluate(model, FACTS, tmp_path, PLAIN, "ft", QUICK)
    for wrong in ({"mode": "at once"}, {"tokens": 0}, {"top_k": 0}):
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            EvaluateSettings(**wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.both
def test_a_model_with_hooks_is_not_evaluated(model, ready, tmp_path):
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda resid, hook: 2 * resid)]):
        for editor in ("rome", None):
            with pytest.raises(RunError, match="there are hooks on"):
                evaluate(model, FACTS, tmp_path / "run", PLAIN, editor, QUICK if editor else None)
    assert not (tmp_path / "run").exists()


def test_records_that_look_wrong_and_edits_that_hardly_took_have_a_note(model, ready, tmp_path):
    odd = Fact("Pari", "{}s is located in the city of", "Seattle", "Berlin")
    first, second = evaluate(model, [odd, FACTS[1]], tmp_path, PLAIN, "rome", replace(QUICK, steps=0), ready).facts
    assert "the subject 'Pari' stands inside a longer word, 'Paris'" in first["reason"]
    assert second["reason"].startswith("it hardly took: P(new) = ")
    unedited_rows = evaluate(model, [FACTS[1]], tmp_path / "none", PLAIN, None).facts
    assert unedited_rows[0]["reason"] == ""


def test_a_summary_says_the_condition_of_C(model, moment, ready, tmp_path):
    found = evaluate(model, FACTS[:1], tmp_path, PLAIN, "rome", QUICK, ready)
    assert found.to_json()["cond_C"] == {"1": moment.cond}


def test_other_records_in_one_batch_and_a_moment_of_another_layer_are_refused_at_once(model, ready, tmp_path, monkeypatch):  # fmt: skip
    batch = replace(PLAIN, mode="batch")
    evaluate(model, FACTS[:2], tmp_path, batch, "rome", QUICK, ready)
    monkeypatch.setattr(scored, "measure", lambda *args, **named: pytest.fail("measured"))
    with pytest.raises(RunError, match="holds a run of other settings .records"):
        evaluate(model, FACTS, tmp_path, batch, "rome", QUICK, ready)
    with pytest.raises(edits.EditError, match="layer"):
        evaluate(model, FACTS, tmp_path / "other", PLAIN, "rome", replace(QUICK, layer=2), ready)


@pytest.mark.parametrize("mode", ["sequential", "independent"])
def test_records_that_contradict_each_other_are_named(mode, model, ready, tmp_path):
    facts = [replace(FACTS[0], id="a"), FACTS[1], replace(FACTS[0], target_new="Berlin", id="b")]
    found = evaluate(model, facts, tmp_path, replace(PLAIN, mode=mode), "rome", QUICK, ready)
    reasons = [fact["reason"] for fact in found.facts]
    prompt = "'The Space Needle is located in the city of'"
    said = [f"it contradicts record {other}, by which {prompt} is to become '{target}'" for other, target in (("b", "Berlin"), ("a", "Paris"))]  # fmt: skip
    together = mode != "independent"
    assert [said[0] in reasons[0], said[1] in reasons[2]] == [together, together]
    assert "contradicts" not in reasons[1]
    edited = [row["edited"] for row in found.rows["after"]]
    assert edited == [1, 1, 1], "in sequence the last is kept"


def test_the_prefixes_of_a_sequence_are_those_of_the_model_before_any_edit(model, ready, tmp_path, monkeypatch):
    monkeypatch.setattr("mechedit.keys.sample", lambda *args, **named: pytest.fail("sampled from an edited model"))
    evaluate(model, FACTS, tmp_path, replace(PLAIN, mode="sequential"), "rome", QUICK, ready)
    used = {tuple(edits.load(blob).details["prefixes"]) for blob in units.read_all(tmp_path / "edits")}
    assert used == {ready.prefixes}


def test_a_sequence_of_which_one_edit_was_lost_ends_as_it_did(model, ready, tmp_path):
    """The first is found again, and those after it are written though they are kept."""
    settings = replace(PLAIN, mode="sequential")
    first = evaluate(model, FACTS, tmp_path, settings, "rome", QUICK, ready)
    there = Shards(tmp_path / "edits" / "units")
    there.forget(there.names()[0])
    for folder in tmp_path.glob("scores*"):
        shutil.rmtree(folder)
    again = evaluate(model, FACTS, tmp_path, settings, "rome", QUICK, ready)
    same(again.rows["at the end"], first.rows["at the end"])


@pytest.mark.parametrize("mode", ["independent", "batch", "sequential"])
def test_a_finished_evaluation_is_put_together_again_without_reading_an_edit(model, ready, tmp_path, mode, monkeypatch):
    settings = replace(PLAIN, mode=mode)
    first = evaluate(model, FACTS, tmp_path, settings, "rome", QUICK, ready)
    # as it is without the tests' checks of types, which look at an element of what comes back
    monkeypatch.setattr("mechedit.runs.evaluating.edit_facts", inspect.unwrap(edit_facts))
    for name in ("edits.load", "runs.scored.measure", "weights.write_", "applying.Applied.add"):
        monkeypatch.setattr(f"mechedit.{name}", lambda *args, **named: pytest.fail("read, or computed again"))
    assert evaluate(model, FACTS, tmp_path, settings, "rome", QUICK, ready) == first


class Odd(Exception):
    """Nothing that anyone foresaw."""


@pytest.mark.parametrize("mode", ["independent", "batch", "sequential"])
@pytest.mark.parametrize("where", ["find", "measure", "check"])
def test_whatever_one_record_raises_the_table_has_all_of_them(model, ready, tmp_path, monkeypatch, mode, where):
    """In the editor, in scoring, in what is looked at before: the others' rows are as without it, and it has its reason."""
    if (mode, where) == ("batch", "find"):
        pytest.skip("a batch is one edit: what it raises is every record's reason")
    others = evaluate(model, FACTS[::2], tmp_path / "others", replace(PLAIN, mode=mode), "rome", QUICK, ready)
    real_find, real_measure, real_check = rome.Rome.find, scored.measure, rome.Rome.check
    bad = FACTS[1].subject

    def find(self, model, facts, *rest, **named):
        if any(fact.subject == bad for fact in facts):
            raise Odd("in find")
        return real_find(self, model, facts, *rest, **named)

    def measure(model, record, *rest, **named):
        if record.subject == bad:
            raise Odd("in measure")
        return real_measure(model, record, *rest, **named)

    def check(self, model, facts, *rest, **named):
        if len(facts) == 1 and facts[0].subject == bad:
            raise Odd("in check")
        return real_check(self, model, facts, *rest, **named)

    target, name, own = {"find": (rome.Rome, "find", find), "measure": (scored, "measure", measure), "check": (rome.Rome, "check", check)}[where]  # fmt: skip
    monkeypatch.setattr(target, name, own)
    found = evaluate(model, FACTS, tmp_path / "run", replace(PLAIN, mode=mode), "rome", QUICK, ready)
    assert f"Odd: in {where}" in found.facts[1]["reason"]
    assert not any("Odd" in each["reason"] for each in found.facts[::2])
    if where != "measure" or mode == "independent":
        same(found.rows["after"][::2], others.rows["after"])
    if where == "measure":
        assert math.isnan(found.rows["before"][1]["ES"])
    else:
        assert found.rows["after"][1]["edited"] == 0.0
        assert not math.isnan(found.rows["after"][1]["ES"])


def test_a_learning_rate_that_no_weight_survives_is_every_records_reason(model, tmp_path):
    wild = FineTuningSettings(layer=1, steps=2, learning_rate=1e300)
    found = evaluate(model, FACTS, tmp_path, PLAIN, "ft", wild)
    assert all(each["reason"] for each in found.facts)
    assert found.nothing.startswith("no record of 3 was edited: ")


@pytest.mark.both
def test_the_unedited_scores_of_one_model_are_not_anothers(load, tmp_path):
    found = [evaluate(load(name), FACTS, tmp_path / name, PLAIN, None).rows["before"] for name in ("gpt2", "llama")]
    same(found[1], counterfact.scores(load("llama"), FACTS))
    assert found[0] != found[1]


def test_a_C_that_does_not_belong_to_the_layer_is_refused_in_a_sequence_too(model, ready, tmp_path):
    for mode in ("independent", "batch", "sequential"):
        with pytest.raises(edits.EditError, match="layer"):
            evaluate(model, FACTS, tmp_path / mode, replace(PLAIN, mode=mode), "rome", replace(QUICK, layer=2), ready)


def test_scores_in_a_batch_are_those_of_its_own_edit(model, ready, tmp_path):
    """Two batches of other settings, whose scores are in one folder, one after the other."""
    batch = replace(PLAIN, mode="batch")
    evaluate(model, FACTS, tmp_path / "a", batch, "rome", QUICK, ready)
    weak = replace(QUICK, clamp=0.01)
    first = evaluate(model, FACTS, tmp_path / "b", batch, "rome", weak, ready)
    shutil.rmtree(tmp_path / "b" / "scores")
    shutil.copytree(tmp_path / "a" / "scores", tmp_path / "b" / "scores")
    assert evaluate(model, FACTS, tmp_path / "b", batch, "rome", weak, ready) == first


def test_a_batch_whose_edit_failed_is_tried_again(model, ready, tmp_path, monkeypatch):
    batch = replace(PLAIN, mode="batch")
    whole = evaluate(model, FACTS, tmp_path / "whole", batch, "rome", QUICK, ready)

    def find(*given, **named):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(rome.Rome, "find", find)
        for _ in range(2):
            failed = evaluate(model, FACTS, tmp_path / "run", batch, "rome", QUICK, ready)
            assert [(row["edited"], row["p_new"]) for row in failed.rows["after"]] == [
                (0.0, row["p_new"]) for row in failed.rows["before"]
            ]
            assert all("MemoryError: no room" in each["reason"] for each in failed.facts)
    assert evaluate(model, FACTS, tmp_path / "run", batch, "rome", QUICK, ready) == whole


def test_a_benchmark_of_ones_own_has_scores_of_its_own_though_its_name_is_another_s(model, ready, tmp_path):
    def constant(value):
        scores = lambda self, model, records, *, prepend_bos=None: [{"ES": value} for _ in records]  # noqa: E731
        return type(f"Own{value:g}", (type(counterfact.COUNTERFACT),), {"scores": scores})()

    tables = []
    for number, benchmark in enumerate((counterfact.COUNTERFACT, constant(2), constant(3), constant(2))):
        found = evaluate(model, FACTS, tmp_path / str(number), PLAIN, "rome", QUICK, ready, benchmark=benchmark)
        tables.append([row["ES"] for row in found.rows["before"]])
    assert tables[1:] == [[2.0] * 3, [3.0] * 3, [2.0] * 3]
    assert set(tables[0]) <= {0.0, 1.0}


def test_what_cannot_be_written_in_a_sequence_is_refused_and_those_after_it_are_found_without_it(
    model, ready, tmp_path, monkeypatch
):
    before, real = state(model), applying.Applied.add

    def add(self, edit):
        if edit.fact["subject"] == FACTS[1].subject and edit.changes:
            raise MemoryError("no room for the sum")
        real(self, edit)

    plain = replace(PLAIN, mode="sequential")
    expected = evaluate(model, FACTS[::2], tmp_path / "two", plain, "rome", QUICK, ready).rows["after"]
    monkeypatch.setattr(applying.Applied, "add", add)
    found = evaluate(model, FACTS, tmp_path / "three", plain, "rome", QUICK, ready)
    assert_same_state(model, before)
    assert [row["edited"] for row in found.rows["after"]] == [1.0, 0.0, 1.0]
    assert "no room for the sum" in found.facts[1]["reason"]
    same(found.rows["after"][::2], expected)
