"""FT, FT+L: the steps against a plain implementation on Hugging Face's own model, every option, and gradients by differences."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from mechedit import editing, models, prompts, weights
from mechedit.editors import descent, fine_tuning, named
from mechedit.huggingface import place
from mechedit.progress import silent
from mechedit.settings import (
    DESCENT_POLICIES,
    PRESETS,
    BoundedSettings,
    DescentSettings,
    EditSettings,
    FineTuningSettings,
    SettingsError,
)
from mechedit.weights import Weight, as_matrix
from tests.conftest import FACT, SHAPES, assert_same_state, state, widen_bands
from tests.descending import assert_gradients_are_finite_differences

LAYER = 1
FACTS = [
    FACT,
    replace(FACT, subject="The Eiffel Tower", target_new="London Berlin"),
    replace(FACT, subject="Rome", target_new="piano"),
]
RATE = {"layer": LAYER, "steps": 4, "learning_rate": 5e-3, "prepend_bos": False}


def plain_descent(plain, rows, parameters, settings, bound=None):
    """The published loop on Hugging Face's model: Adam on its own parameters, gradients through all of it, one fact after another.

    `rows` has each fact's ids of prompt and target; `parameters` are (parameter, mask or None). The parameters after it.
    """
    originals = [parameter.detach().clone() for parameter, _ in parameters]
    for each in plain.parameters():
        each.requires_grad_(False)
    for parameter, _ in parameters:
        parameter.requires_grad_(True)
    adam = torch.optim.Adam([parameter for parameter, _ in parameters], lr=settings.learning_rate)
    size = settings.batch or len(rows)
    for _ in range(settings.steps):
        seen = []
        for begin in range(0, len(rows), size):
            losses = []
            for prompt, target in rows[begin : begin + size]:
                if settings.loss == "masked":
                    logits = plain(torch.tensor([prompt + target[:-1]])).logits[0, len(prompt) - 1 :]
                    log_p = [logits[i].log_softmax(-1)[token] for i, token in enumerate(target)]
                else:
                    last = plain(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
                    log_p = [last[token] for token in target]
                losses.append(-sum(log_p) / len(log_p))
            loss = sum(losses) / len(losses)
            seen += [loss.item()] * len(losses)
            if loss.item() >= settings.stop_at:
                adam.zero_grad()
                loss.backward()
                for parameter, mask in parameters:
                    if mask is not None:
                        parameter.grad *= mask
                adam.step()
                with torch.no_grad():
                    for (parameter, _), original in zip(parameters, originals, strict=True):
                        if bound is not None:
                            parameter.copy_(torch.minimum(torch.maximum(parameter, original - bound), original + bound))
        if sum(seen) / len(seen) < settings.stop_at:
            break
    return seen


def hugging_face(folder, shape, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder(shape), dtype=dtype, attn_implementation="eager")


def rows_of(model, facts):
    return [
        (
            prompts.encode(model, fact.prompt, prepend_bos=False)[0],
            prompts.continuation(model, fact.prompt, fact.target_new, fact.join),
        )
        for fact in facts
    ]


def assert_equals_plain(model, plain, found, chosen, facts, settings, masks=None):
    """That the changes found are what the plain loop does to Hugging Face's parameters, to 1e-5 of the weights' size."""
    bound = getattr(settings, "norm_bound", None)
    places = {weight: place(plain, model, weight) for weight in chosen}
    parameters = list({each.name: each.parameter for each in places.values()}.values())
    allowed = {each.name: torch.zeros_like(each.parameter) for each in places.values()}
    for weight, each in places.items():  # a weight may be some columns of a parameter, whose others stay
        own = (masks or {}).get(weight, torch.ones(weights.matrix_shape(model, weight)))
        replace(each, parameter=allowed[each.name]).write_(own)
    originals = {weight: as_matrix(weight, weights.value(model, weight)).detach().clone() for weight in chosen}
    plain_descent(plain, rows_of(model, facts), list(zip(parameters, allowed.values(), strict=True)), settings, bound)
    assert [change.weight for change in found.changes] == list(chosen)
    for change in found.changes:
        each = places[change.weight]
        expected = each._matrix.detach() if each.columns is None else each._matrix.detach()[:, each.columns]
        ours = originals[change.weight] + change.delta
        assert (ours - expected).norm() <= 1e-5 * expected.norm(), str(change.weight)
        assert change.norm > 0
        if bound is not None:
            assert change.delta.abs().max() <= bound * (1 + 1e-6)


OPTIONS = {
    "masked": FineTuningSettings(**RATE),
    "last": FineTuningSettings(**RATE, loss="last"),
    "bias": FineTuningSettings(**RATE, bias=True),
    "batches, of which one is done": FineTuningSettings(**{**RATE, "steps": 12}, batch=1, stop_at=1.5),
    "ended early": FineTuningSettings(**{**RATE, "steps": 20, "learning_rate": 0.02}, stop_at=2.0),
    "bound": BoundedSettings(**RATE, norm_bound=8e-3),
    "published": FineTuningSettings(**{**RATE, **DESCENT_POLICIES["published"], "steps": 6}),
    "published, bound": BoundedSettings(**{**RATE, **DESCENT_POLICIES["published"], "steps": 6}, norm_bound=8e-3),
}


@pytest.fixture
def biased(model):
    """The tiny GPT-2 with an output bias that is not zero."""
    weight = Weight(LAYER, "mlp.b_out")
    own = torch.linspace(-0.1, 0.1, 32, dtype=torch.float64)[None]
    with weights.restored(model, weight) as originals:
        weights.write_(model, weight, originals[weight], own)
        yield model, own


@pytest.mark.parametrize("name", OPTIONS)
def test_weights_after_the_edit_are_those_of_a_plain_loop_on_hugging_faces_model(name, biased, folder):
    (model, bias), settings = biased, OPTIONS[name]
    plain = hugging_face(folder, "gpt2")
    with torch.no_grad():
        plain.transformer.h[LAYER].mlp.c_proj.bias.copy_(bias[0])
    editor = fine_tuning.FineTuning() if type(settings) is FineTuningSettings else fine_tuning.Bounded()
    chosen = [Weight(LAYER, "mlp.W_out")] + [Weight(LAYER, "mlp.b_out")] * settings.bias
    found = editor.find(model, FACTS, settings, None, {})
    assert_equals_plain(model, plain, found, chosen, FACTS, settings)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_so_in_every_shape(shape, load, folder):
    model, settings = load(shape), BoundedSettings(**RATE, norm_bound=1e-2)
    before = state(model)
    found = fine_tuning.Bounded().find(model, FACTS[:2], settings, None, {})
    assert_same_state(model, before)
    assert_equals_plain(model, hugging_face(folder, shape), found, [Weight(LAYER, "mlp.W_out")], FACTS[:2], settings)


@pytest.mark.parametrize("loss", ["masked", "last"])
def test_gradients_are_those_of_finite_differences(loss, load):
    model, settings = load("gpt2"), FineTuningSettings(layer=LAYER, loss=loss, prepend_bos=False)
    assert_gradients_are_finite_differences(model, Weight(LAYER, "mlp.W_out"), FACTS, settings, directions=4)


def test_losses_are_kept_from_before_the_first_step_to_the_end(model):
    found = fine_tuning.FineTuning().find(model, FACTS[:1], replace(OPTIONS["masked"], stop_at=0.0), None, {})
    losses = found.details["losses"]
    assert (len(losses), losses[-1]) == (5, found.report["loss"])
    ((prompt, target),) = rows_of(model, FACTS[:1])
    with torch.no_grad():
        log_p = model(torch.tensor([prompt + target]))[0].log_softmax(-1)
    expected = -sum(float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(target)) / len(target)
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    none = fine_tuning.FineTuning().find(model, FACTS[:1], replace(OPTIONS["masked"], stop_at=100.0), None, {})
    assert none.details["losses"] == losses[:1], "nothing is done where the loss is below the threshold"
    assert none.changes[0].norm == 0


def test_what_lies_below_the_edited_block_is_computed_once(model, monkeypatch):
    ran, kind = [], type(model.blocks[0])
    run = kind.forward

    def forward(block, *args, **named):
        ran.append(next(index for index, each in enumerate(model.blocks) if each is block))
        return run(block, *args, **named)

    monkeypatch.setattr(kind, "forward", forward)
    counts = []
    for steps in (3, 6):
        ran.clear()
        settings = FineTuningSettings(layer=2, steps=steps, stop_at=0.0, prepend_bos=False)
        fine_tuning.FineTuning().find(model, FACTS, settings, None, {})
        assert ran[-2 * (steps + 1) :] == [2, 3] * (steps + 1), "before each step, and at the end"
        counts.append((ran.count(0), ran.count(1)))
    assert counts[0] == counts[1], "and no step runs what lies below"


@pytest.mark.parametrize("where", ["loss", "step"])
def test_an_error_on_the_way_leaves_the_model_as_it_was(where, model, monkeypatch):
    before, calls = state(model), []

    def fail(*args, **named):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **named)

    place, name = {"loss": (descent.Rows, "loss"), "step": (descent, "_step")}[where]
    real = getattr(place, name)
    monkeypatch.setattr(place, name, fail)
    with pytest.raises(KeyboardInterrupt):
        descent.descend(model, FACTS, {Weight(LAYER, "mlp.W_out"): None}, OPTIONS["masked"], silent)
    assert_same_state(model, before)


@pytest.mark.parametrize("shape", ["gptj", "llama"])
def test_as_published_a_bias_is_tuned_where_hugging_faces_model_has_one_zero_or_not(shape, load, folder):
    """Tiny models' biases are zero, where they have any."""
    model, plain = load(shape), hugging_face(folder, shape)
    has_bias = {"gpt2", "gptj", "neox"}
    chosen = [Weight(LAYER, "mlp.W_out")] + [Weight(LAYER, "mlp.b_out")] * (shape in has_bias)
    settings = FineTuningSettings(**{**RATE, **DESCENT_POLICIES["published"], "steps": 4})
    found = fine_tuning.FineTuning().find(model, FACTS[:2], settings, None, {})
    assert_equals_plain(model, plain, found, chosen, FACTS[:2], settings)


@pytest.mark.parametrize(
    ("settings", "wrong", "message"),
    [
        (BoundedSettings, {"norm_bound": 0.0}, r"norm_bound must be positive \(the editor ft has none\); found 0"),
        (FineTuningSettings, {"norm_bound": 1e-3}, "FineTuningSettings has no field 'norm_bound'"),
        (FineTuningSettings, {"loss": "first"}, "loss must be one of masked, last; found 'first'"),
        (FineTuningSettings, {"batch": -1}, "batch must be 0 .* or more; found -1"),
        (FineTuningSettings, {"learning_rate": 0.0}, "learning_rate must be positive"),
    ],
)
def test_settings_that_cannot_be_meant_are_an_error(settings, wrong, message):
    with pytest.raises(SettingsError, match=message):
        settings(**wrong)


def test_an_editor_takes_its_own_settings_alone(model):
    for name, other in (("ft", BoundedSettings()), ("ft-l", FineTuningSettings()), ("ft-l", EditSettings())):
        with pytest.raises(SettingsError, match=f"the editor {name} takes"):
            named(name).resolve(model, other)


def test_hooks_on_the_model_are_refused(model):
    handle = model.blocks[0].register_forward_hook(lambda *args: None)
    try:
        with pytest.raises(models.ModelError, match="there are hooks on"):
            fine_tuning.FineTuning().find(model, FACTS, OPTIONS["masked"], None, {})
    finally:
        handle.remove()


def test_published_constants_are_those_of_the_published_files():
    """hparams/FT of the published code: layer, learning rate, norm constraint."""
    published = {
        ("gpt2-xl", "ft"): (1, 5e-4, None),
        ("gpt2-xl", "ft-l"): (0, 5e-4, 5e-4),
        ("gpt-j-6b", "ft"): (21, 5e-4, None),
        ("gpt-j-6b", "ft-l"): (0, 5e-4, 5e-5),
        ("gpt2-medium", "ft-l"): (0, 5e-4, 2e-3),
        ("gpt2-large", "ft-l"): (0, 5e-4, 1e-3),
        ("gpt2-xl", "attention-edit"): (33, 1e-3, 1e-3),
    }
    for (model, editor), expected in published.items():
        own = PRESETS[model].settings[editor]
        assert isinstance(own, DescentSettings)
        assert (own.layer, own.learning_rate, getattr(own, "norm_bound", None)) == expected
        assert (own.steps, own.stop_at) == (25, 0.01)
        assert "hparams/FT" in PRESETS[model].sources[editor]


def test_facts_are_learnt_by_the_published_policy_through_the_harness(model, monkeypatch):
    widen_bands(monkeypatch)
    settings = FineTuningSettings(layer=LAYER, learning_rate=5e-3, **DESCENT_POLICIES["published"])
    found = editing.edit(model, FACTS, named("ft"), settings)
    assert all(each.after["p_new"] > each.before["p_new"] for each in found.facts)


def test_presets_that_were_tuned_are_the_best_of_what_was_tried():
    """Each with its evidence: figures/MODEL/tuned_EDITOR.json, as `mechedit tune` writes it."""
    figures = Path(__file__).parents[1] / "figures"
    for model, preset in PRESETS.items():
        for editor, own in preset.settings.items():
            if editor == "rome" or "tuned here" not in preset.sources[editor]:
                continue
            found = json.loads((figures / model / f"tuned_{editor.replace('-', '_')}.json").read_text())
            best = max(found["rows"], key=lambda row: (row["within"] >= 0.9, round(row["S"], 6), -row["relative_norm"]))
            assert getattr(own, "layer", -1) == best["layer"], (model, editor)
            assert best["n"] >= 8, (model, editor)
            assert {name: getattr(own, name) for name in best["tried"]} == best["tried"], (model, editor)
            assert best["S"] > found["unedited"]["S"]
