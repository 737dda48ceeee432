from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mechedit import edits, keys, moments, provenance, rank_one
from mechedit.benchmarks import counterfact, metrics
from mechedit.benchmarks.health import health, unedited
from mechedit.benchmarks.texts import References, Tfidf, consistency, words
from mechedit.benchmarks.zsre import Question
from mechedit.corruption import generator
from mechedit.editors import controls, rome
from mechedit.facts import Fact, FactError
from mechedit.generation import complete, continuations
from mechedit.runs import evaluating
from mechedit.runs.editing import edit_facts
from mechedit.runs.evaluating import check_records, evaluate, measure
from mechedit.runs.results import Evaluation
from mechedit.runs.store import RunError, status
from mechedit.settings import EvaluateSettings, MomentSettings, RomeSettings, SettingsError
from tests.conftest import FACT, assert_same_state, state, widen_bands

QUICK = RomeSettings(layer=1, steps=4, prefixes=((3, 1),), guard="rollback")
PLAIN = EvaluateSettings(health=False)
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


@pytest.fixture
def moment(model, monkeypatch):
    widen_bands(monkeypatch)
    return moments.estimate(model, 1, settings=MomentSettings(tokens=600, context=32))


def same(rows, others):
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, other in zip(rows, others, strict=True):
        assert list(row.values()) == pytest.approx(list(other.values()), nan_ok=True, abs=1e-6)


def test_independent_edits_are_scored_one_by_one(model, moment, tmp_path):
    before = state(model)
    found = evaluate(model, FACTS, tmp_path, EvaluateSettings(), QUICK, moment)
    assert_same_state(model, before)
    same(found.rows["before"], counterfact.scores(model, FACTS))
    healthy = unedited(model)
    for fact, row in zip(FACTS, found.rows["after"], strict=True):
        with edits.edited(model, rome.edit(model, fact, QUICK, moment)):
            (alone,) = counterfact.scores(model, [fact])
            well = health(model, healthy)
        assert {name: row[name] for name in alone} == pytest.approx(alone, abs=1e-6)
        assert {name: row[name] for name in well} == pytest.approx(well, rel=1e-5)
        assert row["edited"] == 1.0
    table = found.table("after")
    assert table["ES"].mean == pytest.approx(np.mean([row["ES"] for row in found.rows["after"]]))
    assert table["S"].mean == pytest.approx(metrics.harmonic(*(table[name].mean for name in metrics.SUCCESSES)))


def test_edits_in_one_batch_are_written_together(model, moment, tmp_path):
    found = evaluate(model, FACTS, tmp_path, replace(PLAIN, mode="batch"), QUICK, moment)
    made = [rome.edit(model, fact, QUICK, moment) for fact in FACTS]
    with edits.edited(model, *made):
        together = counterfact.scores(model, FACTS)
    same([{name: row[name] for name in together[0]} for row in found.rows["after"]], together)


def test_sequential_edits_build_on_each_other_and_are_scored_twice(model, moment, tmp_path):
    before = state(model)
    found = evaluate(model, FACTS, tmp_path, replace(PLAIN, mode="sequential"), QUICK, moment)
    assert_same_state(model, before)
    after = []
    with edits.restored(model, 1):
        for fact in FACTS:
            own = replace(moment, origin=moment.origin | {"weight_hash": edits.models.weight_hash(model)})
            for change in rome.edit(model, fact, QUICK, own).changes:
                rank_one.write_(model, change)
            after += counterfact.scores(model, [fact])
        end = counterfact.scores(model, FACTS)
    same([{name: row[name] for name in after[0]} for row in found.rows["after"]], after)
    same(found.rows["at the end"], end)
    assert_same_state(model, before)


@pytest.mark.parametrize("mode", ["independent", "batch", "sequential"])
def test_a_stopped_evaluation_ends_in_the_same_bytes(model, moment, tmp_path, mode):
    settings = EvaluateSettings(mode=mode)

    def results(folder):
        return {path.name: path.read_bytes() for path in evaluate(model, FACTS, folder, settings, QUICK, moment).save(folder)}  # fmt: skip

    before = state(model)
    for stop in (0, 1, 2):
        for noun in ("edits", "records after"):

            def interrupt(what, done, of, noun=noun, stop=stop):
                if what == noun and done == stop:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                evaluate(model, FACTS, tmp_path / f"cut{stop}{noun}", settings, QUICK, moment, progress=interrupt)
            assert_same_state(model, before)
    whole = results(tmp_path / "whole")
    assert set(whole) == {"results.parquet", "summary.json", "summary.csv", "summary.md", "summary.tex"}
    for stop in (0, 1, 2):
        for noun in ("edits", "records after"):
            assert results(tmp_path / f"cut{stop}{noun}") == whole


def test_a_run_of_other_settings_is_refused(model, moment, tmp_path):
    evaluate(model, FACTS, tmp_path, PLAIN, QUICK, moment)
    with pytest.raises(RunError, match="clamp: 4.0 there, 2.0 now"):
        evaluate(model, FACTS, tmp_path, PLAIN, replace(QUICK, clamp=2.0), moment)
    with pytest.raises(RunError, match="settings.health"):
        evaluate(model, FACTS, tmp_path, EvaluateSettings(), QUICK, moment)
    with pytest.raises(RunError):
        evaluate(model, FACTS, tmp_path, replace(PLAIN, mode="sequential"), QUICK, moment)


def test_what_the_unedited_model_scores_is_computed_once(model, moment, tmp_path, monkeypatch):
    measured = []
    real = evaluating.measure
    monkeypatch.setattr(evaluating, "measure", lambda *args, **named: measured.append(1) or real(*args, **named))
    none = replace(PLAIN, editor="none")
    first = evaluate(model, FACTS, tmp_path / "a", none)
    assert len(measured) == 3
    again = evaluate(model, FACTS, tmp_path / "b", PLAIN, QUICK, moment)
    assert len(measured) == 6
    assert again.rows["before"] == first.rows["before"]
    assert set(first.rows) == {"before"}


def test_a_record_that_cannot_be_edited_is_scored_as_it_was_and_says_why(model, moment, tmp_path, monkeypatch):
    real = rome.edit

    def edit(model, fact, *rest, **named):
        if fact.subject == "Rome":
            raise rank_one.RankOneError("u is NaN")
        return real(model, fact, *rest, **named)

    monkeypatch.setattr(rome, "edit", edit)
    for mode in ("independent", "batch", "sequential"):
        found = evaluate(model, FACTS, tmp_path / mode, replace(PLAIN, mode=mode), QUICK, moment)
        assert ["NaN" in fact["reason"] for fact in found.facts] == [False, False, True]
        assert found.facts[2]["reason"] == "u is NaN"
        assert found.rows["after"][2]["edited"] == 0.0
        assert math.isnan(found.rows["after"][2]["relative_norm"])
    alone = evaluate(model, FACTS, tmp_path / "independent", PLAIN, QUICK, moment)
    same([found.rows["before"][2]], [{name: alone.rows["after"][2][name] for name in found.rows["before"][2]}])


def test_a_record_that_cannot_be_scored_is_in_the_table_with_the_reason(model, moment, tmp_path):
    long = replace(FACTS[2], paraphrases=("a city and " * 60 + "Rome is",))
    found = evaluate(model, [*FACTS[:2], long], tmp_path, PLAIN, QUICK, moment)
    assert "must fit the context" in found.facts[2]["reason"]
    assert math.isnan(found.rows["before"][2]["ES"])
    assert found.table("after")["ES"].n == 2


def test_scores_belong_to_their_edits_statistics_and_model(model, load, moment, tmp_path):
    first = edit_facts(model, FACTS, tmp_path / "a", QUICK, moment)
    edit_facts(model, FACTS, tmp_path / "b", replace(QUICK, clamp=0.01), moment)
    plain = evaluate(model, FACTS, tmp_path / "run", PLAIN, QUICK, moment, edits_in=tmp_path / "a")
    assert plain.rows["after"][0]["relative_norm"] == first[0].report["relative_norm"]
    with pytest.raises(RunError, match="clamp"):
        evaluate(model, FACTS, tmp_path / "run", PLAIN, QUICK, moment, edits_in=tmp_path / "b")
    with pytest.raises(RunError, match="edit"):
        evaluate(model, FACTS, tmp_path / "run", replace(PLAIN, editor="none"))
    texts = {("city", "Q90"): (("", "The Eiffel Tower is in Paris."),)}
    one, other = References.of(texts), References.of(texts, Tfidf.fit(["Paris is a city", "The tower"]))
    assert one.key != other.key
    wanted = replace(PLAIN, editor="none", generate=True, tokens=20)
    rows = [
        evaluate(model, FACTS[:1], tmp_path / each.key, wanted, references=each).rows["before"][0]["RS"]
        for each in (one, other)
    ]
    assert rows[0] != rows[1]
    with edits.restored(model, 0), torch.no_grad():
        before = provenance.identity(model)
        weight = model.blocks[0].attn.W_V
        kept = weight.detach().clone()
        weight.data.mul_(2.0)
        assert provenance.identity(model) != before, "attention counts too"
        weight.data.copy_(kept)
        assert provenance.identity(model) == before


def test_a_unit_that_fails_is_reported_and_nothing_finished_is_lost(model, moment, tmp_path, monkeypatch):
    real = evaluating.measure

    def measured(model, record, *rest, **named):
        if record is FACTS[1]:
            raise RuntimeError("out of luck")
        return real(model, record, *rest, **named)

    monkeypatch.setattr(evaluating, "measure", measured)
    with pytest.raises(RunError, match=r"(?s)1 of 3 units .* 2 are finished and kept.*out of luck"):
        evaluate(model, FACTS, tmp_path, replace(PLAIN, editor="none"))
    monkeypatch.setattr(evaluating, "measure", real)
    assert len(evaluate(model, FACTS, tmp_path, replace(PLAIN, editor="none")).rows["before"]) == 3


def test_controls_change_what_they_say(model, moment, tmp_path, monkeypatch):
    def written(control):
        found = {}
        real = evaluating._Run.scores
        monkeypatch.setattr(evaluating._Run, "scores", lambda self, made: found.setdefault("made", made) and real(self, made))  # fmt: skip
        evaluate(model, FACTS, tmp_path / control, replace(PLAIN, control=control), QUICK, moment)
        monkeypatch.setattr(evaluating._Run, "scores", real)
        return found["made"]

    plain = written("none")
    key = edit_facts(model, FACTS, tmp_path / "key", QUICK, moment)[0].changes[0]
    assert torch.equal(plain[0].changes[0].u, key.u)
    identity = written("identity")[0].changes[0]
    assert abs(float(torch.nn.functional.cosine_similarity(identity.u, key.u, 0))) < 0.999
    at_random = written("random_key")
    for edit, other in zip(at_random, plain, strict=True):
        assert edit.changes[0].layer == 1
        assert set(edit.report) == {"update_norm", "relative_norm"}
        assert edit.report["relative_norm"] != other.report["relative_norm"]
        assert abs(float(torch.nn.functional.cosine_similarity(edit.changes[0].u, other.changes[0].u, 0))) < 0.9
    real = moments.estimate_layers
    few = MomentSettings(tokens=600, context=32)
    monkeypatch.setattr(
        moments, "estimate_layers", lambda model, layers, settings, progress: real(model, layers, settings=few)
    )
    layers = [edit.layer for edit in written("random_layer")]
    assert layers == [controls.random_layer(model, fact, 1, 0) for fact in FACTS]
    assert {controls.random_layer(model, fact, 1, seed) for fact in FACTS for seed in range(9)} == {0, 2, 3}


def test_a_random_key_carries_the_same_value(model, moment):
    edit = rome.edit(model, FACTS[0], QUICK, moment)
    other = controls.at_random_key(model, edit, FACTS[0], moment, 3)
    (change,) = other.changes
    assert torch.equal(other.changes[0].u, controls.at_random_key(model, edit, FACTS[0], moment, 3).changes[0].u)
    assert not torch.equal(change.u, controls.at_random_key(model, edit, FACTS[0], moment, 4).changes[0].u)
    last = replace(QUICK, fact_token="last", policy="prompt", ridge=0.1)
    edit = rome.edit(model, FACTS[0], last, moment)
    other = controls.at_random_key(model, edit, FACTS[0], moment, 3).changes[0]
    (row,) = keys.contexts(model, FACTS[0], ("",), "last")
    key = keys.subject_keys(model, 1, (row,))[0].double()
    random = torch.randn(len(key), generator=generator(3, "random key", FACTS[0].prompt), dtype=torch.float64)
    random *= key.norm() / random.norm()
    moved = edit.changes[0].step * float(edit.changes[0].u @ key)
    now = edits.models.W_out(model, 1).detach().double()
    assert torch.allclose(random @ now + other.step * float(other.u @ random) - random @ now, key @ now + moved - random @ now, atol=1e-4)  # fmt: skip
    empty = replace(edit, changes=())
    assert controls.at_random_key(model, empty, FACTS[0], moment, 3) is empty


def test_generated_text_longer_than_the_context_is_refused_before_anything_is_edited(model, tmp_path):
    settings = replace(PLAIN, generate=True, tokens=int(model.cfg.n_ctx))
    with pytest.raises(SettingsError, match=r"must fit the context of \d+ tokens of .*--tokens"):
        evaluate(model, FACTS, tmp_path / "run", settings)
    assert not (tmp_path / "run").exists()


def test_generated_text_is_measured(model, moment, tmp_path):
    references = References.of({("city", "Q90"): (("", "The Eiffel Tower is located in the city of Paris."),)})
    settings = replace(PLAIN, generate=True, tokens=24)
    found = measure(model, FACTS[0], settings, references=references)
    written = continuations(model, FACTS[0].generations, 24, top_k=5, seed=0)
    assert found["GE"] == metrics.fluency([words(text) for text in written])
    assert found["RS"] == consistency(references.tfidf, written, ["The Eiffel Tower is located in the city of Paris."])
    assert found["exact_match"] == float(complete(model, FACTS[0].prompt, 8).strip().lower().startswith("paris"))
    assert math.isnan(measure(model, FACTS[1], settings, references=references)["RS"]), (
        "nothing is known about its target"
    )
    assert "RS" not in measure(model, FACTS[0], settings)
    table = evaluate(model, FACTS, tmp_path, settings, QUICK, moment, references=references).table("after")
    assert table["GE"].n == 1
    assert table["exact_match"].n == 3


def test_bos_is_the_edits_everywhere(model, moment, tmp_path):
    windows = MomentSettings(tokens=600, context=32, prepend_bos=False)
    without = moments.estimate(model, 1, settings=windows)
    settings = replace(QUICK, prepend_bos=False)
    found = evaluate(model, FACTS, tmp_path, PLAIN, settings, without)
    same(found.rows["before"], counterfact.scores(model, FACTS, prepend_bos=False))
    with edits.edited(model, rome.edit(model, FACTS[0], settings, without)):
        (alone,) = counterfact.scores(model, FACTS[:1], prepend_bos=False)
    assert {name: found.rows["after"][0][name] for name in alone} == pytest.approx(alone, abs=1e-6)
    assert found.rows["before"] != evaluate(model, FACTS, tmp_path / "bos", PLAIN, QUICK, moment).rows["before"]


def test_zsre_questions_are_evaluated(model, moment, tmp_path):
    questions = [Question(fact, "The Eiffel Tower is in the city of?", "Paris") for fact in FACTS]
    found = evaluate(model, questions, tmp_path, PLAIN, QUICK, moment)
    assert {"efficacy", "paraphrase", "specificity"} <= found.rows["after"][0].keys()
    assert "S" not in found.names
    with pytest.raises(FactError, match="not both"):
        evaluate(model, [*questions, FACT], tmp_path / "other", PLAIN, QUICK, moment)


def test_mistakes_are_found_before_the_expensive_part(model, tmp_path):
    with pytest.raises(FactError, match="one or more records"):
        evaluate(model, [], tmp_path)
    with pytest.raises(
        FactError, match=r"(?s)record 1, about 'Rome', lacks.*record .* says what record .* says; give each once"
    ):
        evaluate(model, [FACTS[0], Fact("Rome", CITY, "Paris"), FACTS[1], replace(FACTS[0], id="7")], tmp_path)
    with pytest.raises(FactError, match="record 8, about 'Rome', lacks"):
        check_records([FACTS[0], Fact("Rome", CITY, "Paris", id="8")])
    with pytest.raises(FactError, match=r"and 5 more"):
        check_records([Fact(f"Rome {index}", CITY) for index in range(25)])
    for wrong in ({"editor": "ft"}, {"mode": "at once"}, {"control": "luck"}, {"tokens": 0}, {"control": "identity", "editor": "none"}):  # fmt: skip
        with pytest.raises(SettingsError):
            EvaluateSettings(**wrong)


def test_health_sees_damage_and_nothing_where_nothing_was_done(model):
    before = unedited(model)
    well = health(model, before)
    assert well["perplexity_ratio"] == 1.0
    assert well["next_token_kl"] == pytest.approx(0.0, abs=1e-6)
    assert well["next_token_same"] == well["weight_norm_ratio"] == 1.0
    with edits.restored(model, 2), torch.no_grad():
        edits.models.W_out(model, 2).mul_(3.0)
        ill = health(model, before)
    assert ill["weight_norm_ratio"] == pytest.approx(3.0)
    assert ill["next_token_kl"] > 0.01
    assert ill["next_token_same"] < 1.0
    assert well["broken"] == ill["broken"] == 0.0
    with edits.restored(model, 2), torch.no_grad():
        edits.models.W_out(model, 2).fill_(math.nan)
        dead = health(model, before)
    assert dead["broken"] == 1.0
    assert math.isnan(dead["weight_norm_ratio"])
    with edits.restored(model, 2), torch.no_grad():
        edits.models.W_out(model, 2).mul_(1e30)
        wild = health(model, before)
    assert not any(map(math.isinf, wild.values())), "means are of finite numbers"
    ids = before.row[0]
    log_p = model(before.row)[0].log_softmax(-1)[:-1].gather(1, ids[1:, None]).double().mean()
    assert well["perplexity"] == pytest.approx(float((-log_p.detach()).exp()), rel=1e-5)


def test_results_are_written_in_every_form(tmp_path):
    rows = [{"ES": 1.0, "PS": 0.5, "NS": 1.0, "RS": math.nan}, {"ES": 0.0, "PS": 1.0, "NS": 1.0, "RS": math.nan}]
    rows = [row | {"next_token_kl": 3.3e-5} for row in rows]
    facts = tuple({"id": str(index), "subject": "A_b", "reason": ""} for index in range(2))
    what = {
        "settings": {"editor": "rome", "mode": "independent", "control": "none"},
        "model": {"name": "M"},
        "benchmark": "counterfact",
    }
    result = Evaluation(facts, {"before": rows[::-1], "after": rows}, what)
    assert repr(result).startswith("Evaluation(M, counterfact, rome, independent: means over records (n = 2)")
    with pytest.raises(RunError, match="stages of this evaluation are before, after; found 'end'"):
        result.table("end")
    assert "3.3e-05 [3.3e-05, 3.3e-05]" in result.cells()[1][0], "a small number is not told as 0"
    result.save(tmp_path)
    from pyarrow import parquet

    read = parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert [line["stage"] for line in read] == ["before", "before", "after", "after"]
    assert [line["ES"] for line in read] == [0.0, 1.0, 1.0, 0.0]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["stages"]["after"]["S"]["mean"] == pytest.approx(metrics.harmonic(0.5, 0.75, 1.0))
    assert summary["stages"]["after"]["RS"]["mean"] is None
    assert (tmp_path / "summary.csv").read_text().splitlines()[1].startswith("before,ES,0.5,")
    assert (tmp_path / "summary.md").read_text().startswith("| 2 records | ES | PS | NS | S |")
    assert (
        "M, counterfact, rome, independent: means over records (n = 2) with 95 % intervals"
        in (tmp_path / "summary.md").read_text()
    )
    partly = replace(result, rows={"after": [rows[0], rows[1] | {"PS": math.nan}]}, _tables={})
    assert "50.0 [50.0, 50.0], n = 1" in partly.cells()[1][0]
    assert partly.table("after")["S"].n == 1
    unedited = replace(result, what=what | {"settings": what["settings"] | {"editor": "none"}})
    assert unedited.caption.startswith("M, counterfact, not edited: means")
    controlled = replace(result, what=what | {"settings": what["settings"] | {"control": "identity"}})
    assert controlled.caption.startswith("M, counterfact, rome, independent, identity: means")
    latex = (tmp_path / "summary.tex").read_text()
    assert r"\begin{tabular}{lrrrrrr}" in latex
    assert "50.0 [0.0, 100.0]" in latex


def test_status_says_how_far_a_run_is(model, moment, tmp_path):
    def interrupt(what, done, of):
        if what == "records after" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, FACTS, tmp_path, PLAIN, QUICK, moment, progress=interrupt)
    found = {each.folder: each for each in status(tmp_path)}
    assert set(found) == {"before", "edits", "scores"}
    assert (found["edits"].finished, found["edits"].units, found["edits"].left) == (3, 3, 0.0)
    assert (found["scores"].finished, found["scores"].units) == (2, 3)
    log = tmp_path / "scores" / "seconds.jsonl"
    log.write_text(log.read_text() + '{"unit": "cut o')
    assert [each.units for each in status(tmp_path)] == [3, 3, 3], "the unedited model's scores too"
    assert found["scores"].left == found["scores"].seconds > 0
    with pytest.raises(RunError, match="holds no run"):
        status(tmp_path / "edits" / "units")


def test_status_counts_stages_that_have_not_begun(model, moment, tmp_path):
    def interrupt(what, done, of):
        if what == "edits" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, FACTS, tmp_path, PLAIN, QUICK, moment, progress=interrupt)
    assert [(each.folder, each.finished, each.units) for each in status(tmp_path)] == [
        ("before", 3, 3),
        ("edits", 1, 3),
        ("scores", 0, 3),
    ]
    evaluate(model, FACTS, tmp_path, PLAIN, QUICK, moment)
    assert [each.finished for each in status(tmp_path)] == [3, 3, 3]


def test_records_that_look_wrong_and_edits_that_hardly_took_have_a_note(model, moment, tmp_path):
    odd = Fact("Pari", "{}s is located in the city of", "Seattle", "Berlin")
    first, second = evaluate(model, [odd, FACTS[1]], tmp_path, PLAIN, replace(QUICK, steps=0), moment).facts
    assert "the subject 'Pari' stands inside a longer word, 'Paris'" in first["reason"]
    assert second["reason"].startswith("it hardly took: P(new) = ")
    unedited_rows = evaluate(model, [FACTS[1]], tmp_path / "none", replace(PLAIN, editor="none")).facts
    assert unedited_rows[0]["reason"] == ""


def test_a_summary_says_the_condition_of_C(model, moment, tmp_path):
    found = evaluate(model, FACTS[:1], tmp_path, PLAIN, QUICK, moment)
    assert found.to_json()["cond_C"] == {"1": moment.cond}


def test_status_is_the_same_from_any_folder_and_of_a_run_that_was_moved(model, moment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluate(model, FACTS, "run", PLAIN, QUICK, moment)
    monkeypatch.chdir("/")
    assert [each.finished for each in status(tmp_path / "run")] == [3, 3, 3]
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "moved" / "deeper").mkdir()
    (tmp_path / "moved" / "deeper" / "plan.json").write_text("[1]")  # another program's
    assert [each.finished for each in status(tmp_path / "moved")] == [3, 3, 3]


def test_other_records_in_one_batch_and_a_moment_of_another_layer_are_refused_at_once(model, moment, tmp_path, monkeypatch):  # fmt: skip
    batch = replace(PLAIN, mode="batch")
    evaluate(model, FACTS[:2], tmp_path, batch, QUICK, moment)
    monkeypatch.setattr(evaluating, "measure", lambda *args, **named: pytest.fail("measured"))
    with pytest.raises(RunError, match="holds a run of other settings .records"):
        evaluate(model, FACTS, tmp_path, batch, QUICK, moment)
    with pytest.raises(edits.EditError, match="layer"):
        evaluate(model, FACTS, tmp_path / "other", PLAIN, replace(QUICK, layer=2), moment)


def test_an_estimate_counts_workers(model, moment, monkeypatch):
    one = evaluating.estimate(model, FACTS, replace(PLAIN, editor="none"), load=2.0)
    assert one.edit == 0.0
    assert 2.0 < one.once < 4.0
    assert one.total == one.once + 3 * one.score
    both = replace(one, workers=2, edit=1.0, score=0.25)
    assert both.total == both.once + 2 * 1.5
    assert replace(both, mode="batch").total == both.once + 2 * 1.25 + 3 * 0.25
    assert replace(both, mode="sequential").total == both.once + 2 * 0.25 + 3 * 1.5
    assert "3 records, independent, 1.00 s an edit and 0.25 s a scoring, on 2 workers" in str(both)
    assert "worker hours" in str(both)
    assert one.memory > 0.1

    monkeypatch.setattr(moments, "estimate", lambda *args, **named: moment)
    assert evaluating.estimate(model, FACTS, PLAIN, QUICK).edit > 0


def test_damage_a_full_disk_and_a_second_run_are_noticed_and_nothing_finished_is_lost(model, moment, tmp_path, monkeypatch):  # fmt: skip
    import errno

    from safetensors import torch as stored

    from mechedit.cache import WriteError

    def results(folder):
        return {
            path.name: path.read_bytes() for path in evaluate(model, FACTS, folder, PLAIN, QUICK, moment).save(folder)
        }

    whole = results(tmp_path / "whole")
    unit = next((tmp_path / "whole" / "scores" / "units").iterdir())
    unit.write_bytes(unit.read_bytes()[:-3])
    assert results(tmp_path / "whole") == whole, "a damaged unit is done again"

    real, written = stored.save_file, []

    def full(tensors, path, metadata):
        written.append(path)
        if len(written) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(stored, "save_file", full)
    with pytest.raises(WriteError, match="No space left on device. What was there before is as it was"):
        evaluate(model, FACTS, tmp_path / "full", PLAIN, QUICK, moment)
    monkeypatch.setattr(stored, "save_file", real)
    assert len(list((tmp_path / "full" / "scores" / "units").iterdir())) == 2
    assert results(tmp_path / "full") == whole
    with pytest.raises(WriteError):
        evaluate(model, FACTS, unit, PLAIN, QUICK, moment)

    def again(what, done, of):
        if what == "records after":
            with pytest.raises(RunError, match="another process is at work"):
                evaluate(model, FACTS, tmp_path / "two", PLAIN, QUICK, moment)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, FACTS, tmp_path / "two", PLAIN, QUICK, moment, progress=again)
