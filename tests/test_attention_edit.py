"""The attention edit: against a plain loop on Hugging Face's own model, of all heads and of some, in every shape."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mechedit import applying, changes, editing, models, sites, tuning, weights
from mechedit.changes import Dense
from mechedit.editors import named
from mechedit.editors.attention_edit import AttentionEdit, tuned
from mechedit.edits import EditError
from mechedit.settings import DESCENT_POLICIES, AttentionEditSettings, SettingsError, TuneSettings
from mechedit.weights import Weight, as_matrix
from tests.conftest import FACT, SHAPES, assert_same_state, state, widen_bands
from tests.descending import assert_gradients_are_finite_differences
from tests.test_fine_tuning import FACTS, LAYER, assert_equals_plain, hugging_face

OWN = AttentionEditSettings(layer=LAYER, steps=4, learning_rate=5e-3, norm_bound=8e-3, prepend_bos=False)
ALL = ("W_Q", "W_K", "W_V", "W_O")


def chosen_of(*names):
    return [Weight(LAYER, f"attn.{name}") for name in names]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss", ["masked", "last"])
def test_weights_after_the_edit_are_those_of_a_plain_loop_on_hugging_faces_model(loss, shape, load, folder):
    model, settings = load(shape), replace(OWN, loss=loss, bias=False)
    before = state(model)
    found = AttentionEdit().find(model, FACTS[:2], settings, None, {})
    assert_same_state(model, before)
    assert_equals_plain(model, hugging_face(folder, shape), found, chosen_of("W_Q", "W_K", "W_V"), FACTS[:2], settings)


@pytest.mark.parametrize(
    ("shape", "biases"),
    [("gpt2", ("b_Q", "b_V")), ("neox", ("b_Q", "b_K", "b_V")), ("qwen2", ("b_Q", "b_K", "b_V")), ("gptj", ())],
)
def test_as_published_biases_are_tuned_where_hugging_faces_model_has_them_zero_or_not(shape, biases, load, folder):
    """Tiny models' biases are zero. Of GPT-2's, softmax does not see that of keys."""
    model, settings = load(shape), replace(OWN, **{**DESCENT_POLICIES["published"], "steps": 4, "learning_rate": 5e-3})
    found = AttentionEdit().find(model, FACTS[:2], settings, None, {})
    chosen, masks = chosen_of("W_Q", "W_K", "W_V", *biases), {}
    if (
        shape == "neox"
    ):  # two numbers of a head's eight are rotated; softmax does not see what the others add to every key
        masks = {chosen[4]: (torch.arange(32) % 8 < 2).float()[None]}
    assert_equals_plain(model, hugging_face(folder, shape), found, chosen, FACTS[:2], settings, masks)


@pytest.mark.parametrize("shape", ["gpt2", "llama", "gemma3"])
def test_of_some_heads_the_others_stay_bit_for_bit_and_these_change_as_in_the_plain_loop(shape, load, folder):
    model, settings = load(shape), replace(OWN, weights=ALL, heads=(1,), bias=False)
    chosen, masks = chosen_of(*ALL), {}
    group = 4 // len(weights.value(model, chosen[1]))
    for weight in chosen:  # heads lie side by side, 8 numbers each: by columns, and by rows in W_O
        head = 1 // group if weight.name in ("attn.W_K", "attn.W_V") else 1
        masks[weight] = torch.zeros(weights.matrix_shape(model, weight))
        own = slice(8 * head, 8 * head + 8)
        masks[weight][(own, slice(None)) if weight.name == "attn.W_O" else (slice(None), own)] = 1
    found = AttentionEdit().find(model, FACTS[:1], settings, None, {})
    for change in found.changes:
        assert torch.equal(change.delta != 0, (change.delta != 0) & masks[change.weight].bool())
    with applying.written(model, found.changes):
        now = {weight: as_matrix(weight, weights.value(model, weight)).detach().clone() for weight in chosen}
    for weight in chosen:
        was = as_matrix(weight, weights.value(model, weight)).detach()
        outside = masks[weight] == 0
        assert torch.equal(now[weight][outside], was[outside])
        assert not torch.equal(now[weight], was)
    assert_equals_plain(model, hugging_face(folder, shape), found, chosen, FACTS[:1], settings, masks)


@pytest.fixture
def biased(model):
    """The tiny GPT-2 with biases that are not zero."""
    names = [Weight(LAYER, f"attn.{name}") for name in ("b_Q", "b_K", "b_V", "b_O")]
    own = torch.linspace(-0.3, 0.2, 32, dtype=torch.float64)[None]
    with weights.restored(model, *names) as originals:
        for weight in names:
            weights.write_(model, weight, originals[weight], own)
        yield model, own


def test_biases_are_tuned_too_where_there_are_any(biased, folder):
    (model, own), plain = biased, hugging_face(folder, "gpt2")
    with torch.no_grad():
        plain.transformer.h[LAYER].attn.c_attn.bias.copy_(own[0].repeat(3))
        plain.transformer.h[LAYER].attn.c_proj.bias.copy_(own[0])
    settings = replace(OWN, **DESCENT_POLICIES["published"], weights=("W_V", "W_O"))
    found = AttentionEdit().find(model, FACTS, replace(settings, steps=4), None, {})
    names = [str(change.weight.name) for change in found.changes]
    assert names == ["attn.W_V", "attn.W_O", "attn.b_V", "attn.b_O"]
    value, output = found.changes[2], found.changes[3]
    assert value.shape == output.shape == (1, 32)
    keys = AttentionEdit().find(model, FACTS, replace(settings, weights=("W_Q", "W_K"), steps=1), None, {})
    assert [change.weight.name for change in keys.changes] == ["attn.W_Q", "attn.W_K", "attn.b_Q"], (
        "softmax sees no b_K"
    )
    bare = AttentionEdit().find(model, FACTS, replace(settings, bias=False, steps=1), None, {})
    assert [change.weight.name for change in bare.changes] == ["attn.W_V", "attn.W_O"]
    some = AttentionEdit().find(model, FACTS, replace(settings, heads=(0, 3), steps=1), None, {})
    assert [change.weight.name for change in some.changes] == ["attn.W_V", "attn.W_O", "attn.b_V"], "b_O is no head's"
    assert some.changes[2].delta.view(4, 8).abs().amax(1).gt(0).tolist() == [True, False, False, True]


def test_a_bias_of_rotated_keys_is_tuned(load):
    model = load("qwen2")
    biases = [Weight(LAYER, f"attn.{name}") for name in ("b_Q", "b_K", "b_V")]
    with weights.restored(model, *biases) as originals:
        for weight in biases:
            weights.write_(model, weight, originals[weight], torch.ones(weights.matrix_shape(model, weight)).double())
        assert [weight for weight in tuned(model, OWN) if ".b_" in weight.name] == biases


def test_keys_that_a_group_shares_are_tuned_where_a_chosen_head_reads_them(load):
    model = load("llama")  # four query heads, two of keys and values
    found = tuned(model, replace(OWN, heads=(3,)))
    heads = {weight.name: which.tolist() for weight, which in found.items()}
    assert heads == {"attn.W_Q": [False, False, False, True], "attn.W_K": [False, True], "attn.W_V": [False, True]}
    assert set(tuned(model, OWN).values()) == {None}


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_those_of_finite_differences(name, load):
    assert_gradients_are_finite_differences(load("gpt2"), Weight(LAYER, f"attn.{name}"), FACTS, OWN)


def test_the_parts_of_heads_are_taken_out_of_a_change_and_what_is_left_is_an_edit(model, monkeypatch):
    widen_bands(monkeypatch)
    edit = editing.edit(model, FACT, named("attention-edit"), replace(OWN, steps=8))
    left = []
    for change in edit.changes:
        delta = change.delta.clone()
        delta[:, 8:16] = 0
        left.append(Dense(change.weight, delta))
    ablated = replace(edit, changes=tuple(left))
    assert changes.norm(ablated.changes) < changes.norm(edit.changes)
    with applying.edited(model, edit):
        whole = weights.value(model, edit.changes[0].weight).detach().clone()
    with applying.edited(model, ablated):
        part = weights.value(model, edit.changes[0].weight).detach().clone()
    stored = weights.value(model, edit.changes[0].weight).detach()
    assert torch.equal(part[1], stored[1])
    assert torch.equal(part[[0, 2, 3]], whole[[0, 2, 3]])


def test_its_layer_is_looked_for_where_attention_restores_the_prompts_last_token(model, tmp_path, monkeypatch):
    widen_bands(monkeypatch)
    monkeypatch.setattr(tuning.runs, "known", lambda model, facts, **options: list(facts))
    asked, real = [], tuning.runs.trace_facts
    monkeypatch.setattr(tuning.runs, "trace_facts", lambda model, facts, folder, settings, **named: asked.append(settings) or real(model, facts, folder, settings, **named))  # fmt: skip
    facts = [replace(FACT, target_new=new) for new in ("Paris", "Rome", "London")]
    wanted = TuneSettings(traced=2, edited=1, around=0, draws=2, grid=(("norm_bound", (1e-2,)),))
    found = tuning.tune(model, facts, tmp_path, wanted, "attention-edit", replace(OWN, layer=-1))
    assert (asked[0].kinds, asked[0].roles) == (("attn",), ("last",))
    assert (found.site.kind, found.site.role) == ("attn", "last")
    assert [row.layer for row in found.rows] == [found.site.layer] == [found.settings.layer]
    assert named("ft").site == "early"
    assert sites.early is tuning.SITES["early"][2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weights": ()}, "weights must name at least one of W_Q, W_K, W_V, W_O; it is empty"),
        ({"weights": ("W_X",)}, "weights must be one of W_Q, W_K, W_V, W_O; found 'W_X'"),
        ({"norm_bound": 0.0}, "norm_bound must be positive"),
    ],
)
def test_settings_that_cannot_be_meant_are_an_error(wrong, message):
    with pytest.raises(SettingsError, match=message):
        AttentionEditSettings(**wrong)


def test_what_the_model_has_not_is_an_error_before_anything_runs(model):
    for heads in ((4,), (-1,)):
        with pytest.raises(SettingsError, match=r"heads must be from 0 to 3 .*, which has 4; found"):
            AttentionEdit().resolve(model, replace(OWN, heads=heads))
    with pytest.raises(EditError, match="edit where restoring attention outputs at the prompt's last token helps most"):
        AttentionEdit().resolve(model, AttentionEditSettings())
    with pytest.raises(models.ModelError, match="layer must be from 0 to 3"):
        AttentionEdit().resolve(model, AttentionEditSettings(layer=9))
