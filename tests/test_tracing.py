from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from mechedit import models, prompts
from mechedit.facts import Fact, FactError
from mechedit.settings import SettingsError, TraceSettings
from mechedit.tracing import prepare, restore, trace, trace_all
from mechedit.tracing.attribution import attribution_patching, integrated_gradients
from mechedit.tracing.cells import ATTN_OUT, MLP_OUT, RESID_PRE, Component, Z, single, window
from mechedit.tracing.severing import severed
from tests.conftest import FACT
from tests.slow_trace import loop

SMALL = TraceSettings(draws=3, window=2)


def test_a_whole_batch_of_facts_gives_the_traces_of_each(model, fact):
    facts = [fact, Fact("Paris", "The city of {} is in", "Seattle"), Fact("Megan Rapinoe", "{} plays the", "soccer")]
    together = list(trace_all(model, facts, SMALL, batch=3))
    for one, many in zip(facts, together, strict=True):
        alone = trace(model, one, SMALL)
        assert many.prompt == one.prompt
        for kind in SMALL.kinds:
            torch.testing.assert_close(many.draws[kind], alone.draws[kind], atol=1e-6, rtol=1e-4)


def test_whole_answers_of_several_lengths_ride_in_one_batch(model, fact):
    """They read different numbers of tokens; each trace is the one that the fact has alone."""
    wanted = replace(SMALL, measure="p_answer", kinds=("mlp",))
    facts = [
        replace(fact, target_true=answer) for answer in ("Seattle", "Seattle piano", "piano", "Seattle piano violin")
    ]
    assert len({len(prepare(model, each, wanted).reads) for each in facts}) == 3
    together = list(trace_all(model, facts, wanted, batch=4))
    for one, many in zip(facts, together, strict=True):
        alone = trace(model, one, wanted)
        assert many.answer_ids == alone.answer_ids
        torch.testing.assert_close(many.draws["mlp"], alone.draws["mlp"], atol=1e-6, rtol=1e-4)


def test_what_would_be_passed_over_is_refused_before_the_model_runs(model, fact, monkeypatch):
    queries = Component("queries", "blocks.{layer}.attn.hook_q")
    both = replace(SMALL, kinds=("mlp", "queries"))
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    for given, settings, message in (
        ({"components": [queries]}, SMALL, "the component 'queries' is not among kinds"),
        ({"components": [queries, queries]}, both, "'queries' is a kind already, or twice there"),
        ({"components": [Component("mlp", "blocks.{layer}.hook_attn_out")]}, SMALL, "'mlp' is a kind already"),
        ({"batch": 0}, SMALL, "batch must be at least 1 fact; found 0"),
        ({"others": ["Paris", None]}, SMALL, "for each of 1 facts; it has 2"),
    ):
        with pytest.raises(SettingsError, match=message):
            trace_all(model, [fact], settings, **given)


def test_a_model_whose_logits_are_not_finite_is_refused(load, folder, fact):
    """float16 overflows: there before anything is swept; elsewhere by what the clean run gave."""
    half = models.load(str(folder("gpt2")), device="cpu", dtype=torch.float16)
    with torch.no_grad():
        half.blocks[1].mlp.W_out.mul_(60000.0)
    with pytest.raises(
        models.ModelError, match=r"clean run of .* in float16 gives logits that are not finite.*dtype float32"
    ):
        trace(half, fact, SMALL)
    broken = models.load(str(folder("gpt2")), device="cpu")
    with torch.no_grad():
        broken.blocks[1].mlp.W_out[0, 0] = torch.nan
    for traced in (trace, severed, attribution_patching, integrated_gradients):
        with pytest.raises(models.ModelError, match="in float32 gives logits that are not finite"):
            traced(broken, fact, SMALL)


def test_a_blank_first_token_is_passed_over_and_the_label_says_so(model, monkeypatch):
    """A tokenizer that puts the joining space into a token of its own, as Gemma's does before a number."""
    from mechedit.tracing import preparation

    (blank,), digits = (model.tokenizer.encode(each, add_special_tokens=False) for each in (" ", "16"))
    assert len(digits) == 2
    year = Fact("The Space Needle", "{} is from the year", "1666", target_new="1912")
    answers = {
        "1666": [blank, *digits],
        "1912": [blank, 9, 9],
        "Paris": [9],
        "16": [blank, digits[0]],
        "its own": [blank],
    }
    monkeypatch.setattr(prompts, "continuation", lambda model, prompt, target, join=None: answers[target])
    with torch.no_grad():
        logits = model(torch.tensor([[*prompts.prepare(model, year).ids, blank, *digits]]))[0, -4:]
    log_p = logits.log_softmax(-1)
    only = replace(SMALL, kinds=("mlp",))
    first, whole, logs, difference = (
        trace(model, year, replace(only, measure=name)) for name in ("p", "p_answer", "log_p", "logit_difference")
    )
    assert first.p_clean == pytest.approx(float(log_p[1, digits[0]].exp()), rel=1e-3)
    assert first.label == "P(first token of 16, after a blank)"
    assert logs.p_clean == pytest.approx(float(log_p[1, digits[0]]), rel=1e-3)
    assert difference.p_clean == pytest.approx(float(logits[1, digits[0]] - logits[1, 9]), abs=1e-4)
    by_hand = sum(float(log_p[step, token]) for step, token in enumerate((blank, *digits)))
    assert whole.p_clean == pytest.approx(math.exp(by_hand), rel=1e-3)
    assert whole.label == "P(16)"
    assert trace(model, replace(year, target_true="16"), only).label == "P(1, after a blank)"
    assert trace(model, replace(year, target_true="Paris"), only).blanks == 0
    assert len(first.tokens) == len(prompts.prepare(model, year).ids), "the grid is the prompt's"
    own = int(logits[1].argmax())
    answers["its own"].append(own)
    for found in (first, whole):
        assert found.said == (prompts.decoded(model, [own]), pytest.approx(float(log_p[1, own].exp()), rel=1e-3))
    assert trace(model, replace(year, target_true="its own"), only).said is None
    slow = loop(model, (*prompts.prepare(model, year).ids, blank), prepare(model, year, only).corrupted, digits[0], [single(MLP_OUT, window(1, 2, 4), 3)])  # fmt: skip
    torch.testing.assert_close(first.draws["mlp"][1, 3], slow[0], atol=1e-6, rtol=1e-3)
    with pytest.raises(FactError, match="do not begin alike after .* p_answer"):
        trace(model, replace(year, target_new="Paris"), replace(only, measure="logit_difference"))
    said = iter([blank, blank, digits[0]])
    monkeypatch.setattr(preparation, "_first", lambda model, ids: (next(said), 1.0))
    assert trace(model, replace(year, target_true=None), only).answer_ids == (blank, blank, digits[0])


def test_all_heads_together_are_the_attention_output_and_some_are_not(model, fact):
    def cells(prompt):
        at = prompt.last_subject
        return [
            single(Z, [2], at),
            single(ATTN_OUT, [2], at),
            single(Z, 2, at, (0, 1, 2, 3)),  # one block is that block, as one position is
            *(single(Z, [2], at, (head,)) for head in range(4)),
        ]

    values, _, corrupted = restore(model, fact, cells, SMALL)
    torch.testing.assert_close(values[0], values[1], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(values[0], values[2], atol=1e-6, rtol=1e-4)
    assert all((value - corrupted).abs().max() > 1e-6 for value in values[3:])
    assert len({tuple(value.tolist()) for value in values}) >= 5


def test_restoring_everything_at_once_is_the_clean_run(model, fact):
    values, clean, corrupted = restore(
        model, fact, lambda prompt: [single(RESID_PRE, [0], range(*prompt.subject))], SMALL
    )
    torch.testing.assert_close(values, torch.full_like(values, clean), atol=1e-6, rtol=1e-4)
    assert (corrupted - clean).abs().min() > 1e-5


def test_a_parallel_model_has_no_state_between_attention_and_mlp(load):
    with pytest.raises(models.ModelError, match=r"has no resid_mid: there is no hook point blocks.0.hook_resid_mid"):
        trace(load("gptj"), FACT, replace(SMALL, kinds=("resid_mid",)))


def test_a_component_of_ones_own_is_a_kind(model, fact):
    queries = Component("queries", "blocks.{layer}.attn.hook_q")
    found = trace(model, fact, replace(SMALL, kinds=("queries", "attn")), components=[queries])
    prepared = prepare(model, fact, SMALL)
    cells = [single(queries, window(layer, 2, 4), len(prepared.ids) - 1) for layer in range(4)]
    slow = loop(model, prepared.ids, prepared.corrupted, prepared.answer_ids[0], cells)
    torch.testing.assert_close(found.draws["queries"][:, -1], slow, atol=1e-5, rtol=1e-3)
    assert not torch.equal(found.draws["queries"], found.draws["attn"])
    with pytest.raises(SettingsError, match="'queries' is not"):
        trace(model, fact, replace(SMALL, kinds=("queries",)))


def test_only_the_roles_asked_for_are_computed(model, fact):
    whole, part = trace(model, fact, SMALL), trace(model, fact, replace(SMALL, roles=("subject_last", "last")))
    chosen = [index for index, role in enumerate(part.roles) if role in {"subject_last", "last"}]
    assert len(chosen) == 2
    for kind in SMALL.kinds:
        torch.testing.assert_close(part.draws[kind][:, chosen], whole.draws[kind][:, chosen], atol=1e-6, rtol=1e-4)
        assert int(part.effects[kind].isnan().sum()) == 4 * (len(part.tokens) - 2)
    assert json.loads(json.dumps(part.to_json()))["effects"]["resid"][0][0] is None
    with pytest.raises(SettingsError, match="has a role among before"):
        trace(model, Fact("The", "{} city"), replace(SMALL, roles=("before",), prepend_bos=False))


def test_cells_before_the_subject_are_the_corrupted_run_and_the_last_state_restores_everything(model):
    found = trace(model, Fact("Paris", "The city of {} is in", "Seattle"), SMALL)
    begin, _ = found.subject_range
    assert begin > 0
    for grid in found.effects.values():
        torch.testing.assert_close(grid[:, :begin], torch.full_like(grid[:, :begin], found.p_corrupted))
    assert float(found.effects["resid"][-1, -1]) == pytest.approx(found.p_clean, rel=1e-4)


def test_the_same_seed_gives_the_same_trace_and_another_does_not(model, fact):
    first, again, other = (trace(model, fact, replace(SMALL, seed=seed)) for seed in (0, 0, 1))
    for kind in SMALL.kinds:
        assert torch.equal(first.draws[kind], again.draws[kind])
        assert not torch.equal(first.draws[kind], other.draws[kind])


def test_noise_and_bos_and_kinds_are_obeyed(model, fact):
    weak, strong = (trace(model, fact, replace(SMALL, noise=noise)) for noise in (0.01, 10.0))
    assert abs(weak.p_corrupted - weak.p_clean) < abs(strong.p_corrupted - strong.p_clean)
    assert strong.noise_std == pytest.approx(10 * models.embedding_std(model))
    without = trace(model, fact, replace(SMALL, prepend_bos=False, kinds=("mlp",)))
    assert len(without.tokens) == len(weak.tokens) - 1
    assert list(without.effects) == ["mlp"]
    assert without.settings.prepend_bos is False
    assert weak.settings.prepend_bos is True


def test_without_an_answer_the_models_own_is_traced(model):
    found = trace(model, Fact("Paris", "{} is in"), SMALL)
    tokens = torch.tensor([list(prompts.prepare(model, Fact("Paris", "{} is in")).ids)])
    with torch.no_grad():
        p = model(tokens)[0, -1].softmax(-1)
    assert found.answer_ids == (int(p.argmax()),)
    assert found.p_clean == pytest.approx(float(p.max()), rel=1e-4)


def test_a_prompt_longer_than_the_context_is_refused_before_the_model_runs(model, monkeypatch):
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    with pytest.raises(FactError, match="must fit the context"):
        trace(model, Fact("A", "{} " + "xq " * 80))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kinds": ()}, "at least one"),
        ({"kinds": ("mlp", "mlp")}, "differ"),
        ({"window": -1}, "or more layers"),
        ({"draws": 0}, "at least 1"),
        ({"noise": 0.0}, "positive"),
        ({"noise": float("nan")}, "noise must be finite; found nan"),
        ({"centre": "middle"}, "centre must be one of code, paper; found 'middle'"),
        ({"corruption": "salt"}, "corruption must be one of"),
        ({"scale": "large"}, "scale must be one of"),
        ({"measure": "loss"}, "measure must be one of"),
        ({"precision": "int4"}, "precision must be one of"),
        ({"roles": ("verb",)}, "roles must be one of"),
        ({"degrees": 0.0}, "degrees must be positive"),
        ({"extra": -1}, "0 or more tokens"),
        ({"memory": 0.0}, "positive number of gigabytes"),
    ],
)
def test_settings_that_cannot_be_meant_are_errors(given, message):
    with pytest.raises(SettingsError, match=message):
        TraceSettings(**given)


def test_settings_of_another_type_are_errors():
    """In a process of its own, because the type checks of the tests would come first."""
    given = [{"draws": "2"}, {"draws": True}, {"noise": "3"}, {"kinds": "mlp"}, {"replace": 1}, {"noise": 3}]
    code = f"""
from mechedit.settings import SettingsError, TraceSettings
for given in {given}:
    try:
        print(TraceSettings(**given).noise)
    except SettingsError as error:
        print(error)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    ) == [
        "draws must be of type int; found '2'.",
        "draws must be of type int; found True.",
        "noise must be of type float; found '3'.",
        "kinds must be of type tuple; found 'mlp'.",
        "replace must be of type True, False or None; found 1.",
        "3.0",
        "",
    ]


@pytest.mark.parametrize("shape", ["gpt2", "gemma3"])
def test_in_bfloat16_the_trace_is_near_the_one_in_float32(shape, load, folder):
    half = models.load(str(folder(shape)), device="cpu", dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16
    found, exact = (trace(each, FACT, SMALL) for each in (half, load(shape)))
    assert found.origin["dtype"] == "bfloat16"
    for kind in SMALL.kinds:
        assert found.effects[kind].dtype == torch.float32
        torch.testing.assert_close(found.effects[kind], exact.effects[kind], atol=0.02, rtol=0.3)
