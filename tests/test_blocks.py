from __future__ import annotations

import pytest
import torch

from mechedit.models import Blocks, Sharing, Stepper, is_bridge, parts, vocabulary
from mechedit.models import blocks as blocks_module
from tests.conftest import SHAPES, assert_same_state, state

SHAPE = pytest.mark.parametrize("shape", SHAPES)
TOKENS = torch.tensor([[0, 40, 50, 60, 70, 80, 90, 100], [0, 45, 55, 65, 75, 85, 95, 105]])


@SHAPE
def test_blocks_one_by_one_equal_the_forward_pass(shape, load):
    model = load(shape)
    before = state(model)
    with torch.no_grad():
        expected = model(TOKENS)[:, -1]
        blocks = Blocks(model)
        resid = blocks.embed(TOKENS)
        for layer in range(model.cfg.n_layers):
            resid, _ = blocks.run(layer, resid)
        torch.testing.assert_close(blocks.logits(resid[:, -1]), expected, atol=1e-4, rtol=1e-4)
    assert_same_state(model, before)


@SHAPE
@pytest.mark.parametrize("position", [1, 5, 7])
def test_blocks_with_the_past_given_equal_blocks_on_everything(shape, position, load):
    model = load(shape)
    rows = torch.tensor([1, 0, 1])
    with torch.no_grad():
        blocks = Blocks(model)
        resid = blocks.embed(TOKENS)
        for layer in range(model.cfg.n_layers):
            after, present = blocks.run(layer, resid)
            assert present.length == TOKENS.shape[1]
            part, _ = blocks.run(layer, resid[rows][:, position:], present.before(position).rows(rows))
            torch.testing.assert_close(part, after[rows][:, position:], atol=1e-4, rtol=1e-4)
            resid = after


@SHAPE
@pytest.mark.parametrize("position", [0, 1, 5])
@pytest.mark.parametrize("begin", [0, 1, 2])
def test_rows_that_share_what_lies_before_equal_the_forward_pass(shape, position, begin, load):
    """Two copies of rows 0 and 1, the second of which go on as each other do: each is compared with a pass of its own."""
    model = load(shape)
    n_layers = model.cfg.n_layers
    mixed = torch.cat([TOKENS, TOKENS.flip(0)])
    mixed[:, :position] = TOKENS[[0, 1, 0, 1]][:, :position]
    with torch.no_grad():
        blocks = Blocks(model)
        assert blocks.by_parts == [not is_bridge(model)] * n_layers
        whole, resid = blocks.embed(mixed), blocks.embed(TOKENS)
        for layer in range(n_layers):
            after, _ = blocks.run(layer, whole)
            following, past = blocks.run(layer, resid)
            sharing = [Sharing(slice(None), 0, 2)]
            found = blocks.run_sharing(layer, whole[:, position:], past.before(position), sharing, begin)
            torch.testing.assert_close(found, after[:, position + begin :], atol=1e-4, rtol=1e-4)
            rows = [Sharing(torch.tensor([0, 2]), 0, 1), Sharing(torch.tensor([1, 3]), 1, 2)]
            found = blocks.run_sharing(layer, whole[:, position:], past.before(position), rows, begin)
            torch.testing.assert_close(found, after[:, position + begin :], atol=1e-4, rtol=1e-4)
            blocks.compare_parts(layer, resid, past, following)
            whole, resid = after, following
        assert blocks.by_parts == [not is_bridge(model)] * n_layers


def test_a_block_whose_parts_do_not_give_what_it_gives_is_run_whole(load, monkeypatch):
    model = load("llama")
    if is_bridge(model):
        pytest.skip("a bridge's blocks are run whole")
    blocks, run = Blocks(model), parts.run
    monkeypatch.setattr(
        parts, "run", lambda block, *rest: run(block, *rest) * (1.01 if block is model.blocks[1] else 1)
    )
    with torch.no_grad():
        resid = blocks.embed(TOKENS)
        for layer in range(2):
            after, past = blocks.run(layer, resid)
            blocks.compare_parts(layer, resid, past, after)
            resid = after
    assert blocks.by_parts == [True, False, True, True]


@SHAPE
def test_logits_of_some_tokens_are_the_models(shape, load):
    model = load(shape)
    targets = torch.tensor([[5, 399, 5], [7, 0, 300]])
    with torch.no_grad():
        blocks, expected = Blocks(model), model(TOKENS)[:, -1]
        found = blocks.logits_of(blocks.final(TOKENS)[:, -1], targets)
    torch.testing.assert_close(found, expected.gather(1, targets), atol=1e-4, rtol=1e-4)


def test_log_p_holds_however_high_a_later_part_of_the_vocabulary_is(load, monkeypatch):
    """The first part's highest logit is what exponentials are taken relative to; others may lie far above it."""
    model = load("gpt2")
    if is_bridge(model):
        pytest.skip("a bridge's unembedding is its own")
    monkeypatch.setattr(blocks_module, "VOCABULARY_PART", 100)
    targets = torch.tensor([[5, 399], [7, 250]])
    with torch.no_grad():
        resid = Blocks(model).final(TOKENS)[:, -1]
        for scale in (1.0, 1e4):
            model.unembed.b_U[150] += scale
            expected = model.unembed(model.ln_final(resid)[:, None])[:, 0].double().log_softmax(-1).gather(1, targets)
            found = Blocks(model).log_p(resid, targets)
            model.unembed.b_U[150] -= scale
            torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)


@SHAPE
def test_tokens_step_by_step_equal_the_forward_pass(shape, load):
    model = load(shape)
    stepper = Stepper(model)
    with torch.no_grad():
        stepper.next_logits(TOKENS[:, :5])
        stepper.next_logits(TOKENS[:, 5:7])
        torch.testing.assert_close(stepper.next_logits(TOKENS[:, 7:]), model(TOKENS)[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", ["gpt2", "gemma2"])
@pytest.mark.parametrize("whole", [False, True])
def test_what_states_say_of_tokens_and_how_far_that_is_from_others_has_the_slopes_of_whole_rows(
    shape, whole, load, monkeypatch
):
    monkeypatch.setattr(vocabulary, "PART", 37)
    model = load(shape)
    blocks = Blocks(model)
    if whole:
        blocks._streams = False
    generator = torch.Generator().manual_seed(3)
    states = (4 * torch.randn(6, int(model.cfg.d_model), generator=generator)).requires_grad_()
    tokens, apart = torch.tensor([5, 399, 36, 37, 0, 200]), torch.tensor([4, 1])
    q = torch.randn(2, 400, generator=generator).log_softmax(-1)
    weigh = torch.randn(8, generator=generator)
    log_p = blocks.logits(states).log_softmax(-1)
    kl = torch.stack([(log_p[i].exp() * (log_p[i] - own)).sum() for i, own in zip(apart.tolist(), q, strict=True)])
    own = log_p[torch.arange(6), tokens]
    (slope,) = torch.autograd.grad((torch.cat([own, kl]) * weigh).sum(), [states])
    found, found_kl, below = blocks.said(states, tokens, apart, q)
    (found_slope,) = torch.autograd.grad((torch.cat([found, found_kl]) * weigh).sum(), [states])
    torch.testing.assert_close(found, own, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found_kl, kl, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(below, log_p.max(1).values - own, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found_slope, slope, atol=1e-4 * float(slope.abs().max()), rtol=1e-3)
