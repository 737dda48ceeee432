from __future__ import annotations

import pytest
import torch
import transformers

from mechedit import models, weights
from mechedit.huggingface import place
from mechedit.models import NAMES, ModelError
from mechedit.weights import Weight, as_matrix, as_stored, matrix_shape, restored, there, value, write_
from tests.conftest import SHAPES, assert_same_state, state

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.mark.parametrize("shape", SHAPES)
def test_writing_a_weight_does_to_logits_what_writing_hugging_faces_does(shape, load, folder):
    """Every weight that Hugging Face's model has: the same number is added to it there and here."""
    model = load(shape)
    before = state(model)
    names = there(model, 1)
    for name in names:
        plain = transformers.AutoModelForCausalLM.from_pretrained(
            folder(shape), dtype=torch.float32, attn_implementation="eager"
        )
        weight = Weight(1, name)
        if not value(
            model, weight
        ).any():  # a bias that this class has and Hugging Face's has not, or that is zero there
            continue
        own = place(plain, model, weight)
        change = 0.1 * torch.randn(matrix_shape(model, weight), generator=torch.Generator().manual_seed(0))
        with restored(model, weight) as originals, torch.no_grad():
            write_(model, weight, originals[weight], change.double())
            own.write_(as_matrix(weight, value(model, weight)))
            ours, theirs = model(TOKENS), plain(TOKENS).logits
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)
        if name not in ("attn.b_K", "attn.W_K", "attn.W_Q", "attn.b_Q"):  # which softmax may hide
            assert not torch.allclose(model(TOKENS), ours, atol=1e-4), f"{name} of {shape} does nothing"
    assert {"mlp.W_in", "mlp.W_out", "attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O"} <= set(names)
    assert_same_state(model, before)


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_is_the_map_that_the_weight_is_and_comes_back_in_its_shape(name, load):
    for shape in ("gpt2", "gemma3"):
        model = load(shape)
        if name not in there(model, 0):
            continue
        weight = Weight(0, name)
        stored = value(model, weight).detach()
        matrix = as_matrix(weight, stored)
        assert torch.equal(as_stored(weight, matrix, stored), stored)
        heads = [matrix[:, each * 8 : (each + 1) * 8] for each in range(len(stored))]
        if name in ("attn.W_Q", "attn.W_K", "attn.W_V"):
            assert all(torch.equal(stored[index], head) for index, head in enumerate(heads))
        if name == "attn.W_O":
            assert all(torch.equal(stored[index], matrix[index * 8 : (index + 1) * 8]) for index in range(len(stored)))
        if name.split(".")[1].startswith("b"):
            assert matrix.shape == (1, stored.numel())


def test_with_grouped_queries_keys_are_those_of_the_key_value_heads(load):
    model = load("llama")
    assert value(model, Weight(0, "attn.W_K")).shape == (2, 32, 8)
    assert value(model, Weight(0, "attn.W_Q")).shape == (4, 32, 8)


def test_a_sum_is_rounded_once(load):
    model, weight = load("gpt2"), Weight(2, "attn.W_V")
    shape = matrix_shape(model, weight)
    change = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with restored(model, weight) as originals:
        write_(model, weight, originals[weight], change)
        expected = (as_matrix(weight, originals[weight]).double() + change).float()
        assert torch.equal(as_matrix(weight, value(model, weight)), expected)


def test_large_weights_are_written_in_parts_and_wholly(load, monkeypatch):
    model, weight = load("gpt2"), Weight(0, "mlp.W_out")
    change = torch.randn(matrix_shape(model, weight), dtype=torch.float64)
    with restored(model, weight) as originals:
        write_(model, weight, originals[weight], change)
        whole = value(model, weight).detach().clone()
    monkeypatch.setattr(weights, "WRITE_PART", 100)
    with restored(model, weight) as originals:
        write_(model, weight, originals[weight], change)
        assert torch.equal(value(model, weight), whole)


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_weights_are_put_back_whatever_happens(stop, model):
    before = state(model)
    wanted = [Weight(0, "mlp.W_in"), Weight(1, "attn.W_O"), Weight(3, "mlp.b_out")]
    with pytest.raises(stop), restored(model, *wanted), torch.no_grad():
        for weight in wanted:
            value(model, weight).fill_(float("nan"))
        raise stop
    assert_same_state(model, before)


def test_what_is_no_weight_is_told(model, load):
    with pytest.raises(ModelError, match="a weight is one of mlp.W_in, .* found 'W_out'"):
        Weight(0, "W_out")
    with pytest.raises(ModelError, match="from 0 to 3"):
        value(model, Weight(7, "mlp.W_out"))
    with pytest.raises(ModelError, match="has no mlp.W_gate of block 0; it has mlp.W_in"):
        value(model, Weight(0, "mlp.W_gate"))
    with pytest.raises(
        ModelError, match=r"of shape \[3, 4\], but that of block 0 .* is \[128, 32\]. It was made for another"
    ):
        write_(model, Weight(0, "mlp.W_out"), value(model, Weight(0, "mlp.W_out")), torch.zeros(3, 4))


def test_nothing_that_stood_in_a_model_stands_when_it_is_forgotten(model):
    first = models.identity(model)
    models.forget(model)
    assert models.kept(model).watch is None
    assert models.identity(model) == first
