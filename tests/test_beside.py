from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mechedit import applying, editing, facts, weights
from mechedit.benchmarks import beside, metrics
from mechedit.benchmarks.zsre import Question
from mechedit.editors import named
from mechedit.facts import Fact
from mechedit.prompts import continuation, encode
from mechedit.runs.evaluating import evaluate
from mechedit.settings import EvaluateSettings, FineTuningSettings
from mechedit.weights import Weight
from tests.three_facts import CITY, FACTS

FACT = replace(
    FACTS[0],
    neighbours=("The Eiffel Tower is located in the city of", "Rome is in", "Steve Jobs was the founder of"),
    neighbour_answers=("Seattle", "the city of London", "Apple"),
    same_subject=("The Space Needle plays the sport of", "The Space Needle was the founder of", "The Space Needle is"),
    same_subject_answers=("soccer", "the violin", "Paris"),
)


def log_p(model, prompt, target):
    """Of each of a target's tokens, by whole forward passes."""
    ids, _ = encode(model, prompt, prepend_bos=bool(model.cfg.default_prepend_bos))
    own = continuation(model, prompt, target)
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *own]]))[0].double().log_softmax(-1)
    return [float(logits[len(ids) - 1 + step, token]) for step, token in enumerate(own)]


def next_token(model, prompt):
    ids, _ = encode(model, prompt, prepend_bos=bool(model.cfg.default_prepend_bos))
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1].double().log_softmax(-1)


def test_neighbours_behind_the_new_fact_and_other_relations_are_plain_comparisons(model):
    found, said = beside.beside(model, FACT)
    plus = [
        (np.mean(log_p(model, f"{FACT.prompt} Paris. {prompt}", own)), np.mean(log_p(model, f"{FACT.prompt} Paris. {prompt}", "Paris")))
        for prompt, own in FACT.neighbourhood
    ]  # fmt: skip
    others = [
        (np.mean(log_p(model, prompt, own)), np.mean(log_p(model, prompt, "Paris")))
        for prompt, own in list(zip(FACT.same_subject, FACT.same_subject_answers, strict=True))[:2]
    ]  # the third one's own answer is the new target
    assert found["N+"] == np.mean([own > new for own, new in plus])
    assert found["NM+"] == pytest.approx(np.mean([math.exp(own) - math.exp(new) for own, new in plus]), abs=1e-6)
    assert found["SR"] == np.mean([own > new for own, new in others])
    assert [each.kind for each in said] == ["behind the new fact"] * 6 + ["same subject"] * 4
    bare, nothing = beside.beside(model, replace(FACT, neighbours=(), neighbour_answers=(), same_subject=(), same_subject_answers=()))  # fmt: skip
    assert (bare, nothing) == ({}, ())


def test_drift_is_the_divergence_from_what_the_model_said_before(model):
    before = beside.near(model, FACT)
    old = [next_token(model, prompt) for prompt in FACT.neighbours]
    own = [sum(log_p(model, *each)) for each in FACT.neighbourhood]
    assert beside.drift(model, FACT, before) == {"drift": 0.0, "drift_log_p": 0.0}
    with weights.restored(model, Weight(2, "mlp.W_out")):
        own_weight = weights.value(model, Weight(2, "mlp.W_out")).detach().clone()
        weights.write_(model, Weight(2, "mlp.W_out"), own_weight, own_weight / 2)
        found = beside.drift(model, FACT, before)
        new = [next_token(model, prompt) for prompt in FACT.neighbours]
        moved = np.mean([sum(log_p(model, *each)) for each in FACT.neighbourhood]) - np.mean(own)
    kl = [float((after.exp() * (after - was)).sum()) for after, was in zip(new, old, strict=True)]
    assert found["drift"] == pytest.approx(np.mean(kl), rel=1e-3)
    assert found["drift"] > 0
    assert found["drift_log_p"] == pytest.approx(moved, abs=1e-5)
    published = torch.nn.functional.kl_div(old[0], new[0], log_target=True, reduction="batchmean")
    assert metrics.nkl_published(kl[0], len(old[0])) == pytest.approx(float(published))


@pytest.mark.anywhere
def test_the_new_fact_is_stated_as_its_writing_has_it():
    assert beside.stated(FACTS[0], "Paris") == "The Space Needle is located in the city of Paris."
    assert beside.stated(FACTS[0], "Apple Inc.").endswith("of Apple Inc.")
    assert beside.stated(Fact("东京塔", "{}位于", "东京", "巴黎"), "巴黎") == "东京塔位于巴黎。"


@pytest.mark.anywhere
def test_facts_of_one_subject_know_each_others_relations():
    some = [
        Fact("Rome", "{} is in", "Italy", "Spain", relation="in"),
        Fact("Rome", "{} speaks", "Italian", relation="says"),
    ]
    some += [Fact("Rome", "{} lies in", "Italy", relation="in"), Fact("Paris", CITY, "France", relation="in")]
    found = facts.linked(some)
    assert (found[0].same_subject, found[0].same_subject_answers) == (("Rome speaks",), ("Italian",))
    assert found[1].same_subject == ("Rome is in", "Rome lies in")
    assert found[3].same_subject == ()
    twins = [
        Fact("Rome", "{} is a twin city of", "Paris", "Oslo"),
        Fact("Rome", "The twin city of {} is", "Seoul", "Bern", relation="twin"),
    ]
    assert [each.same_subject for each in facts.linked(twins)] == [(), ()], "who knows whether they ask the same?"


@pytest.mark.parametrize("mode", ["independent", "batch", "sequential"])
def test_an_evaluation_measures_drift_from_the_model_without_its_edits(mode, model, tmp_path):
    settings = EvaluateSettings(mode=mode, health=False, answers=False)
    tuning = replace(FineTuningSettings(layer=2, steps=3, learning_rate=5e-3), guard="warn")
    found = evaluate(model, FACTS, tmp_path, settings, "ft", tuning)
    assert "drift" not in found.rows["before"][0]
    whole = found.rows["at the end" if mode == "sequential" else "after"]
    assert all(row["drift"] > 0 for row in whole)
    if mode == "independent":
        edit = editing.edit(model, FACTS[0], named("ft"), tuning)
        before = beside.near(model, FACTS[0])
        with applying.edited(model, edit, force=True):
            assert whole[0]["drift"] == pytest.approx(beside.drift(model, FACTS[0], before)["drift"], rel=1e-4)


def test_zsre_drifts_at_the_unrelated_question(model, tmp_path):
    question = Question(FACTS[0], "The violin is", "in Rome")
    settings = EvaluateSettings(health=False, answers=False)
    tuning = FineTuningSettings(layer=2, steps=3, learning_rate=5e-3, guard="warn")
    (found,) = evaluate(model, [question], tmp_path, settings, "ft", tuning).rows["after"]
    old, own = next_token(model, question.unrelated), sum(log_p(model, question.unrelated, question.answer))
    with applying.edited(model, editing.edit(model, FACTS[0], named("ft"), tuning), force=True):
        new, moved = next_token(model, question.unrelated), sum(log_p(model, question.unrelated, question.answer))
    assert found["drift"] == pytest.approx(float((new.exp() * (new - old)).sum()), rel=1e-3)
    assert found["drift_log_p"] == pytest.approx(moved - own, abs=1e-4)
    assert "N+" in found
