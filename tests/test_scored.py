from __future__ import annotations

import math
import unicodedata
from dataclasses import replace

import pytest
import torch

from mechedit import generation, models, moments, weights
from mechedit.benchmarks import benchmark, metrics
from mechedit.benchmarks.benchmark import BenchmarkError
from mechedit.benchmarks.counterfact import COUNTERFACT
from mechedit.benchmarks.health import health, unedited
from mechedit.benchmarks.texts import References, Tfidf, consistency, words
from mechedit.benchmarks.zsre import Question
from mechedit.facts import Fact, FactError
from mechedit.generation import complete, continuations
from mechedit.runs import estimating
from mechedit.runs.checks import check_records
from mechedit.runs.evaluating import evaluate
from mechedit.runs.scored import Details, measure
from mechedit.settings import FineTuningSettings, MomentSettings
from mechedit.weights import Weight
from tests.conftest import FACT, widen_bands
from tests.three_facts import CITY, FACTS, PLAIN, QUICK, made_ready

pytestmark = pytest.mark.anywhere


@pytest.fixture
def moment(model, monkeypatch):
    widen_bands(monkeypatch)
    return moments.estimate(model, 1, settings=MomentSettings(tokens=600, context=32))


@pytest.fixture
def ready(model, moment):
    return made_ready(model, QUICK, moment)


@pytest.mark.both
def test_generated_text_is_measured(model, ready, tmp_path):
    references = References.of({("city", "Q90"): (("", "The Eiffel Tower is located in the city of Paris."),)})
    settings = replace(PLAIN, generate=True, tokens=24, top_k=3, seed=7)
    kept = Details()
    found = measure(model, FACTS[0], COUNTERFACT, settings, references=references, details=kept)
    written = continuations(model, FACTS[0].generations, 24, top_k=3, seed=7)
    assert [text for _, text in kept.texts[1:]] == written
    assert written != continuations(model, FACTS[0].generations, 24, top_k=5, seed=7)
    assert written != continuations(model, FACTS[0].generations, 24, top_k=3, seed=0)
    assert found["GE"] == metrics.fluency([words(text) for text in written])
    assert found["RS"] == consistency(references.tfidf, written, ["The Eiffel Tower is located in the city of Paris."])
    assert found["exact_match"] == float(complete(model, FACTS[0].prompt, 8).strip().lower().startswith("paris"))
    assert math.isnan(measure(model, FACTS[1], COUNTERFACT, settings, references=references)["RS"]), (
        "nothing is known about its target"
    )
    assert "RS" not in measure(model, FACTS[0], COUNTERFACT, settings)
    table = evaluate(model, FACTS, tmp_path, settings, "rome", QUICK, ready, references=references).table("after")
    assert table["GE"].n == 1
    assert table["exact_match"].n == 3


@pytest.mark.parametrize(("rule", "right"), [("sentence", 1.0), ("published", 0.0)])
def test_an_answer_is_cut_and_compared_by_the_rule_that_is_set(rule, right, model, monkeypatch):
    """The published rule ends it at its first full stop."""
    monkeypatch.setattr(generation, "completions", lambda *args, **named: [" St. Louis. It is large."])
    fact = replace(FACTS[0], target_new="St. Louis")
    assert measure(model, fact, COUNTERFACT, replace(PLAIN, answers=True, answer_rule=rule))["answer"] == right


@pytest.mark.both
def test_essence_is_of_texts_about_the_subject_itself(model):
    subject = unicodedata.normalize("NFD", FACTS[0].subject)
    about = ((subject, "The tower stands."), ("Another", "Bells ring in the night."), (subject, "It is tall."))
    references = References.of({("city", "Q90"): about})
    settings = replace(PLAIN, generate=True, tokens=24)
    found = measure(model, FACTS[0], COUNTERFACT, settings, references=references)["essence"]
    ids = model.to_tokens("The tower stands. It is tall.")[0][:24]
    with torch.no_grad():
        log_p = model(ids[None]).log_softmax(-1)[0, :-1].gather(1, ids[1:, None])
    assert found == pytest.approx(math.exp(-float(log_p.sum()) / len(ids)), rel=1e-4)
    others = References.of({("city", "Q90"): about[1:2]})
    assert math.isnan(measure(model, FACTS[0], COUNTERFACT, settings, references=others)["essence"])


def test_texts_are_scored_by_the_statistics_they_are_given_with(model, tmp_path):
    texts = {("city", "Q90"): (("", "The Eiffel Tower is in Paris."),)}
    one, other = References.of(texts), References.of(texts, Tfidf.fit(["Paris is a city", "The tower"]))
    assert one.key != other.key
    wanted = replace(PLAIN, generate=True, tokens=20)
    rows = [
        evaluate(model, FACTS[:1], tmp_path / each.key, wanted, None, references=each).rows["before"][0]["RS"]
        for each in (one, other)
    ]
    assert rows[0] != rows[1]


def test_a_record_that_cannot_be_scored_is_in_the_table_with_the_reason(model, ready, tmp_path):
    long = replace(FACTS[2], paraphrases=("a city and " * 60 + "Rome is",))
    found = evaluate(model, [*FACTS[:2], long], tmp_path, PLAIN, "rome", QUICK, ready)
    assert "must fit the context" in found.facts[2]["reason"]
    assert math.isnan(found.rows["before"][2]["ES"])
    assert found.table("after")["ES"].n == 2


def test_zsre_questions_are_evaluated(model, ready, tmp_path):
    questions = [Question(fact, "The Eiffel Tower is in the city of?", "Paris") for fact in FACTS]
    found = evaluate(model, questions, tmp_path, PLAIN, "rome", QUICK, ready)
    assert {"efficacy", "paraphrase", "specificity"} <= found.rows["after"][0].keys()
    assert "S" not in found.names
    with pytest.raises(BenchmarkError, match="takes records of Fact and Question together; name the benchmark"):
        evaluate(model, [*questions, FACT], tmp_path / "other", PLAIN, "rome", QUICK, ready)
    with pytest.raises(FactError, match="1 of these 4 records are none of zsre"):
        evaluate(model, [*questions, FACT], tmp_path / "other", PLAIN, "rome", QUICK, ready, benchmark="zsre")


def test_every_record_that_cannot_be_scored_is_named():
    with pytest.raises(FactError, match="record 8, about 'Rome', lacks"):
        check_records([FACTS[0], Fact("Rome", CITY, "Paris", id="8")])
    with pytest.raises(FactError, match=r"and 5 more"):
        check_records([Fact(f"Rome {index}", CITY) for index in range(25)])
    assert check_records(FACTS) == benchmark.named("counterfact")


@pytest.mark.both
def test_health_sees_damage_and_nothing_where_nothing_was_done(model):
    before = unedited(model)
    well = health(model, before)
    assert well["perplexity_ratio"] == 1.0
    assert well["next_token_kl"] == pytest.approx(0.0, abs=1e-6)
    assert well["next_token_same"] == well["weight_norm_ratio"] == 1.0
    with weights.restored(model, Weight(2, "mlp.W_out")), torch.no_grad():
        models.W_out(model, 2).mul_(3.0)
        ill = health(model, before)
    assert ill["weight_norm_ratio"] == pytest.approx(3.0)
    assert ill["next_token_kl"] > 0.01
    assert ill["next_token_same"] < 1.0
    assert well["broken"] == ill["broken"] == 0.0
    with weights.restored(model, Weight(2, "mlp.W_out")), torch.no_grad():
        models.W_out(model, 2).fill_(math.nan)
        dead = health(model, before)
    assert dead["broken"] == 1.0
    assert math.isnan(dead["weight_norm_ratio"])
    with weights.restored(model, Weight(2, "mlp.W_out")), torch.no_grad():
        models.W_out(model, 2).mul_(1e30)
        wild = health(model, before)
    assert not any(map(math.isinf, wild.values())), "means are of finite numbers"
    ids = before.row[0]
    log_p = model(before.row)[0].log_softmax(-1)[:-1].gather(1, ids[1:, None]).double().mean()
    assert well["perplexity"] == pytest.approx(float((-log_p.detach()).exp()), rel=1e-5)


def test_what_greedy_text_begins_with_is_an_exact_match_in_the_table(model, tmp_path, monkeypatch):
    monkeypatch.setattr("mechedit.generation.complete", lambda *args, **kwargs: " New York, of course")
    facts = [replace(FACTS[0], target_new="New York"), replace(FACTS[1], target_new="York")]
    found = evaluate(model, facts, tmp_path, replace(PLAIN, generate=True, tokens=24), None)
    assert [row["exact_match"] for row in found.rows["before"]] == [1.0, 0.0]


def test_damage_is_the_divergence_of_the_edited_from_the_unedited_and_the_norm_that_changed_most(model):
    before = unedited(model)
    places = torch.linspace(1, before.row.shape[1] - 1, min(32, before.row.shape[1] - 1)).long()
    with torch.no_grad():
        was = model(before.row)[0, places].double().log_softmax(-1)
    with weights.restored(model, Weight(1, "mlp.W_out"), Weight(2, "mlp.W_out")), torch.no_grad():
        models.W_out(model, 1).mul_(4.0)
        models.W_out(model, 2).mul_(0.1)
        ill = health(model, before)
        now = model(before.row)[0, places].double().log_softmax(-1)
    forward, backward = ((p.exp() * (p - q)).sum(-1).mean().item() for p, q in ((now, was), (was, now)))
    assert abs(forward - backward) > 0.005 * forward, "the two differ"
    assert ill["next_token_kl"] == pytest.approx(forward, rel=1e-3)
    assert ill["next_token_same"] == pytest.approx(float((now.argmax(-1) == was.argmax(-1)).float().mean()))
    assert ill["weight_norm_ratio"] == pytest.approx(0.1), "a tenth is a greater change than four times"


def test_an_estimate_counts_workers(model, moment, monkeypatch):
    one = estimating.estimate(model, FACTS, PLAIN, None, load=2.0)
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
    assert estimating.estimate(model, FACTS, PLAIN, "rome", QUICK).edit > 0
    assert estimating.estimate(model, FACTS, PLAIN, "ft", FineTuningSettings(layer=1, steps=2)).edit > 0
