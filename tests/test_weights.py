from __future__ import annotations

import jaxtyping
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


@pytest.mark.parametrize(
    ("more", "change"),
    [(0.0, float("nan")), (float("nan"), 0.0), (0.0, float("inf")), (0.0, -3.5e38), (2e38, 2e38), (2e38, -2e38), (-2e38, -2e38)],
)  # fmt: skip
def test_what_no_weight_can_hold_is_not_written(more, change, model):
    """Float32 ends at 3.4e38."""
    before, weight = state(model), Weight(1, "mlp.W_out")
    base, added = value(model, weight).detach() + more, torch.full((128, 32), change, dtype=torch.float64)
    with pytest.raises(ModelError, match="must be numbers below 3.4e.38, but in mlp.W_out of block 1 a change"):
        write_(model, weight, base, added)
    assert_same_state(model, before)


@pytest.mark.parametrize(("more", "change"), [(0.0, 3.3e38), (-3.3e38, 0.0), (1.6e38, 1.6e38), (0.0, 0.0)])
def test_what_a_weight_can_hold_is_written(more, change, model):
    weight = Weight(1, "mlp.W_out")
    base, added = value(model, weight).detach() + more, torch.full((128, 32), change, dtype=torch.float64)
    with restored(model, weight):
        write_(model, weight, base, added)
        assert torch.equal(value(model, weight), (base.double() + added).float())


def test_a_bias_of_zeros_is_used_where_hugging_faces_model_has_it(load):
    """Of a model that was not loaded here, where it is not zero."""
    model, other = load("gpt2"), load("llama")
    assert all(weights.is_used(model, Weight(1, name)) for name in there(model, 1))
    assert not any(weights.is_used(other, Weight(1, name)) for name in NAMES if ".b_" in name)
    zero, one = Weight(1, "mlp.b_out"), Weight(1, "attn.b_O")
    with restored(model, one), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.cfg.loaded, "biases", ())
        value(model, one)[3] = 0.5
        assert not weights.is_used(model, zero)
        assert weights.is_used(model, one)
    assert weights.is_used(model, Weight(1, "mlp.W_out"))
    with restored(model, Weight(1, "mlp.W_out")), torch.no_grad():
        value(model, Weight(1, "mlp.W_out")).zero_()
        assert weights.is_used(model, Weight(1, "mlp.W_out")), "it is no bias"
    assert not weights.is_used(model, Weight(1, "mlp.W_gate"))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_weights_part_of_its_parameters_gradient_is_the_change_of_the_loss(shape, load):
    """The gradient of one number of each weight against the difference of two forward passes."""
    model = load(shape)
    before = state(model)

    def loss():
        return model(TOKENS).double().square().mean()

    for name in there(model, 1):
        weight = Weight(1, name)
        parameter, stored = weights.parameter_of(model, weight), value(model, weight).detach()
        (gradient,) = torch.autograd.grad(loss(), [parameter])
        own = as_matrix(weight, weights.part_of(gradient, parameter, stored))
        assert own.shape == matrix_shape(model, weight)
        step = torch.zeros(own.shape, dtype=torch.float64)
        at = divmod(int(own.abs().argmax()), own.shape[1])
        step[at] = 1e-3
        with restored(model, weight) as originals, torch.no_grad():
            write_(model, weight, originals[weight], step)
            more = float(loss())
            write_(model, weight, originals[weight], -step)
            less = float(loss())
        assert (more - less) / 2e-3 == pytest.approx(float(own[at]), rel=0.05, abs=1e-4), name
    assert_same_state(model, before)


def test_of_parameters_in_one_memory_the_weight_is_its_own():
    memory = torch.arange(24.0)
    first, second = memory[:12].view(3, 4), memory[12:].view(3, 4)
    assert weights._overlaps(first, memory[11:12])
    assert not weights._overlaps(first, second)
    assert weights._overlaps(second, memory[12:13])
    assert not weights._overlaps(second, memory[11:12])
    assert not weights._overlaps(first, torch.arange(12.0))
    turned = torch.empty_strided((4, 3), (1, 4)).copy_(first.T)
    own = weights.part_of(first.clone(), turned.T, first[1])
    assert torch.equal(own, first[1])
    other = weights.part_of(second.contiguous(), second, second[1:, 2])  # which begins in the middle of its memory
    assert other.tolist() == [18.0, 22.0]
    assert weights.part_of(second.T.contiguous().T, second, second[1:, 2]).tolist() == [18.0, 22.0]


def test_a_weight_is_named_by_its_place(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own checks, which users do not have
    assert str(Weight(3, "attn.W_Q")) == "attn.W_Q of block 3"
    assert Weight(3, "attn.W_Q").part == "3.attn.W_Q"
    for layer in (True, 1.0, "1"):
        with pytest.raises(ModelError, match="a weight is one of"):
            Weight(layer, "attn.W_Q")
