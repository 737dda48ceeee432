from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mechedit import figures, prompts, settings
from mechedit.facts import Fact, FactError
from mechedit.settings import TraceSettings
from mechedit.tracing import prepare, trace
from mechedit.tracing.cells import window
from mechedit.tracing.measures import MEASURES

SMALL = TraceSettings(draws=3, window=2)


def test_the_measures_are_those_that_settings_can_name():
    assert tuple(MEASURES) == settings.MEASURES
    assert all(MEASURES[name].name == name for name in settings.MEASURES)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_a_measure_that_is_a_share_lies_between_0_and_1(measure):
    log_p = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    value = measure.value(log_p)
    assert value.shape == (50,)
    assert measure.share == bool(((value >= 0) & (value <= 1)).all())


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_every_token_that_is_read_follows_one_that_a_run_has(measure):
    answer, other = (5, 6, 7), (8, 9)
    reads = measure.reads(3, answer, other)
    assert reads[0].position == 3
    assert reads[-1].position == 3 + len(measure.given(answer))
    assert len({len(read.targets) for read in reads}) == 1
    assert reads[0].targets == ((5, 8) if measure.name == "logit_difference" else (5,))


@pytest.mark.parametrize(
    ("measure", "ids", "label"),
    [
        ("p", (1,), "P(Seattle)"),
        ("p", (1, 2), "P(first token of Seattle)"),
        ("p_answer", (1, 2), "P(Seattle)"),
        ("log_p", (1,), "log P(Seattle)"),
        ("logit_difference", (1, 2), "logit(Seattle) less the other's"),
    ],
)
def test_a_trace_says_what_was_measured(model, fact, measure, ids, label):
    found = trace(model, fact, replace(SMALL, kinds=("mlp",), draws=1))
    found = replace(found, answer=" Seattle", answer_ids=ids, settings=replace(found.settings, measure=measure))
    assert found.label == label
    assert (
        repr(found)
        == f"Trace({fact.prompt!r}: {label} = {found.p_clean:.3f} clean, {found.p_corrupted:.3f} corrupted; mlp)"
    )
    assert figures.heat_map(found, "mlp").axes[1].get_ylabel().removesuffix("   (line: the clean run)") == label


def test_measures_are_what_they_are_called(model):
    fact = Fact("The Space Needle", "{} is located in the city of", "Seattle piano", target_new="Paris")
    found = {
        measure: trace(model, fact, replace(SMALL, measure=measure, kinds=("mlp",)))
        for measure in ("p", "log_p", "p_answer", "logit_difference")
    }
    torch.testing.assert_close(found["p"].draws["mlp"].log(), found["log_p"].draws["mlp"], atol=1e-5, rtol=1e-5)
    prompt = prompts.prepare(model, fact)
    answer, second = found["p"].answer_ids, prompts.continuation(model, fact.prompt, "Paris")
    assert len(answer) > 1
    tokens = torch.tensor([[*prompt.ids, *answer[:-1]]])
    with torch.no_grad():
        logits = model(tokens)[0]
    log_p = logits.log_softmax(-1)
    at = len(prompt.ids) - 1
    whole = sum(float(log_p[at + step, token]) for step, token in enumerate(answer))
    assert found["p_answer"].p_clean == pytest.approx(math.exp(whole), rel=1e-3)
    assert found["logit_difference"].p_clean == pytest.approx(
        float(logits[at, answer[0]] - logits[at, second[0]]), abs=1e-4
    )
    # the whole answer, in a restored run, by hand
    prepared = prepare(model, fact, replace(SMALL, measure="p_answer"))
    position = prompt.last_subject
    _, clean = model.run_with_cache(tokens)
    hooks = [("hook_embed", lambda activation, hook: prepared.corrupted.to(activation))]
    for layer in window(1, 2, 4):

        def restoring(activation, hook, layer=layer):
            activation[:, position] = clean[f"blocks.{layer}.hook_mlp_out"][0, position]
            return activation

        hooks.append((f"blocks.{layer}.hook_mlp_out", restoring))
    with torch.no_grad():
        log_p = model.run_with_hooks(tokens.expand(3, -1), fwd_hooks=hooks).log_softmax(-1)
    by_hand = sum(log_p[:, at + step, token] for step, token in enumerate(answer)).exp()
    torch.testing.assert_close(found["p_answer"].draws["mlp"][1, position], by_hand, atol=1e-6, rtol=1e-3)


def test_a_logit_difference_needs_two_answers_that_differ(model):
    chosen = replace(SMALL, measure="logit_difference")
    with pytest.raises(FactError, match="needs a second answer"):
        trace(model, Fact("Paris", "{} is in", "Seattle"), chosen)
    with pytest.raises(FactError, match="begin with the same token"):
        trace(model, Fact("Paris", "{} is in", "Seattle", target_new="Seattle Needle"), chosen)
