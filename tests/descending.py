"""What tests of gradient steps share."""

from __future__ import annotations

import pytest
import torch

from mechedit import models, weights
from mechedit.editors import descent
from mechedit.weights import as_matrix


def assert_gradients_are_finite_differences(model, weight, facts, settings, directions=1):
    """The gradient that a step takes, against the loss a little to both sides along random directions, in float64."""
    with models.cast(model, torch.float64), weights.restored(model, weight) as originals, models.frozen(model):
        rows = descent.Rows(model, facts, settings)
        one = descent._Tuned(model, weight, originals[weight], None)
        descent._gradients(rows, [one], 0.0)
        gradient = as_matrix(weight, one.delta.grad)
        generator = torch.Generator().manual_seed(0)
        for _ in range(directions):
            direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
            ends = []
            for step in (1e-5, -1e-5):
                weights.write_(model, weight, originals[weight], step * direction)
                with torch.no_grad():
                    ends.append(rows.loss().item())
            assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float((gradient * direction).sum()), rel=1e-6)
