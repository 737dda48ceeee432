"""Temporary changes of activations: `with` blocks that put everything back, and that say when nothing happened.

    with intervened(model, add_noise(noise, 1, 4), restore("blocks.5.hook_resid_post", state, 3)):
        logits = model(tokens)

A change names a hook point and says what becomes of its activation. Names are checked before anything is hooked. A change
that no forward pass reached is an error, because an experiment would go on without it and look like a null result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.errors import MecheditError
from mechedit.models import HookedModel, alone, mlp_module

__all__ = ["Activation", "Change", "InterventionError", "add_noise", "intervened", "mlp_outputs", "read", "restore"]


Activation = Float[Tensor, "rows pos *width"]


class InterventionError(MecheditError, RuntimeError):
    """An intervention that names no hook point, does not fit, or did not happen."""


@dataclass(frozen=True)
class Change:
    """`apply(activation)` becomes the activation at the hook point `name`; None leaves it."""

    name: str
    apply: Callable[[Activation], Activation | None]


def add_noise(noise: Float[Tensor, "batch subject d_model"], begin: int) -> Change:
    """Add noise to the token embeddings from position `begin` on, row by row."""

    def apply(activation: Tensor) -> Tensor:
        _check_fit("hook_embed", activation, rows=len(noise), position=begin + noise.shape[1] - 1)
        noisy = activation.clone()
        noisy[:, begin : begin + noise.shape[1]] += noise.to(activation)
        return noisy

    return Change("hook_embed", apply)


def restore(name: str, value: Float[Tensor, "*rows width"], position: int) -> Change:
    """Replace the activation at one position by `value`, one for all rows or one a row."""

    def apply(activation: Tensor) -> Tensor:
        _check_fit(name, activation, rows=len(value) if value.ndim > 1 else None, position=position)
        restored = activation.clone()
        restored[:, position] = value.to(activation)
        return restored

    return Change(name, apply)


def read(name: str, into: Callable[[Activation], None]) -> Change:
    """Hand the activation to `into` and leave it as it is."""
    return Change(name, into)


def _check_fit(name: str, activation: Tensor, rows: int | None, position: int) -> None:
    if rows is not None and rows != len(activation):
        raise InterventionError(
            f"{name}: the intervention has {rows} rows, the forward pass {len(activation)}; they must be equal."
        )
    if position >= activation.shape[1]:
        raise InterventionError(
            f"{name}: position {position} lies beyond the {activation.shape[1]} positions of this forward pass."
        )


@contextmanager
def intervened(model: HookedModel, *changes: Change) -> Iterator[None]:
    """Apply the changes to every forward pass of the body; afterwards no hook of theirs is left.

    Raises:
        InterventionError: a name that is no hook point (before the body runs), or a change that was never reached.
    """
    unknown = sorted({change.name for change in changes} - set(model.hook_dict))
    if unknown:
        raise InterventionError(
            f"{unknown} are no hook points of {model.cfg.model_name}. `model.hook_dict` has the names."
        )
    fired: set[int] = set()

    def hook(index: int, change: Change) -> Callable[..., Tensor | None]:
        def apply(activation: Tensor, hook: Any) -> Tensor | None:
            fired.add(index)
            return change.apply(activation)

        return apply

    with (
        alone(model),
        model.hooks(fwd_hooks=[(change.name, hook(index, change)) for index, change in enumerate(changes)]),
    ):
        yield
    missed = sorted({change.name for index, change in enumerate(changes) if index not in fired})
    if missed:
        raise InterventionError(f"no forward pass reached {missed}, so nothing was changed there.")


@contextmanager
def mlp_outputs(model: HookedModel, layer: int, apply: Callable[[Activation], Activation | None]) -> Iterator[None]:
    """Let `apply` change what a block's `W_out` writes, before any norm that follows the MLP.

    Where a norm follows (Gemma 2 and 3) no hook point of a HookedTransformer stands there, so the MLP module is hooked.

    Raises:
        InterventionError: no forward pass ran this MLP.
    """
    fired = False

    def hook(module: torch.nn.Module, args: Any, output: Tensor) -> Tensor | None:
        nonlocal fired
        fired = True
        return apply(output)

    with alone(model):
        handle = mlp_module(model, layer).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
    if not fired:
        raise InterventionError(f"no forward pass ran the MLP of block {layer}, so nothing was changed there.")
