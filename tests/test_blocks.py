from __future__ import annotations

import pytest
import torch

from mechedit.models import Blocks, Stepper
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
def test_tokens_step_by_step_equal_the_forward_pass(shape, load):
    model = load(shape)
    stepper = Stepper(model)
    with torch.no_grad():
        stepper.next_logits(TOKENS[:, :5])
        stepper.next_logits(TOKENS[:, 5:7])
        torch.testing.assert_close(stepper.next_logits(TOKENS[:, 7:]), model(TOKENS)[:, -1], atol=1e-4, rtol=1e-4)
