"""The two factors of a weight's gradient, token by token, and low-rank terms added to weights while the model runs.

    x W       what a token's x becomes at a weight W [d_in, d_out]
    u         x, as the weight read it
    delta     the gradient of the loss at x W; sum_t outer(u_t, delta_t) is the gradient of W
    x W + (x left^T) right        what a term adds: W + left^T right, which is never made

Every row of a batch may have another edit's term, and a term may be differentiated. Nothing of the model is changed: activations are.
Names of hook points are the same on both classes of TransformerLens:

    W_in    reads the MLP's input, writes mlp.hook_pre (mlp.hook_pre_linear where the MLP is gated)
    W_gate  reads the MLP's input, writes mlp.hook_pre
    W_out   reads mlp.hook_post, writes the MLP's output, before any norm that follows
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechedit import models
from mechedit.editors.trained.rows import Rows
from mechedit.interventions import Change, intervened, mlp_outputs, read
from mechedit.models import HookedModel, ModelError
from mechedit.weights import Weight, there

__all__ = ["Factors", "Term", "Terms", "added", "edited_weights", "factors"]

MATRICES = ("mlp.W_in", "mlp.W_gate", "mlp.W_out")
Write = Callable[[Tensor, Tensor], Tensor]  # what a weight read, and what it wrote; what it is to have written


@dataclass(frozen=True, eq=False)
class Factors:
    """Of one weight: u and delta of each edit's tokens, and which of them count: those where neither is all zeros."""

    u: Float[Tensor, "edits pos d_in"]
    delta: Float[Tensor, "edits pos d_out"]

    @property
    def count(self) -> Bool[Tensor, "edits pos"]:
        """Which tokens count."""
        return (self.u != 0).any(-1) & (self.delta != 0).any(-1)


@dataclass(frozen=True, eq=False)
class Term:
    """What each edit adds to a weight: left^T right."""

    left: Float[Tensor, "edits rank d_in"]
    right: Float[Tensor, "edits rank d_out"]


Terms = Mapping[Weight, Term]


def edited_weights(model: HookedModel, layers: Sequence[int] = ()) -> tuple[Weight, ...]:
    """The matrices of these blocks' MLPs (of the last three), in order.

    Raises:
        ModelError: no such block, or its MLP is none of matrices.
    """
    n = int(model.cfg.n_layers)
    found = []
    for layer in sorted(layers) or range(max(0, n - 3), n):
        models.mlp_module(model, layer)
        own = [name for name in MATRICES if name in there(model, layer)]
        if missing := [each for each in _points(layer, "mlp.W_gate" in own) if each not in model.hook_dict]:
            raise ModelError(f"block {layer} of {model.cfg.model_name} has no {', '.join(missing)}, at which an MLP's weights are edited.")  # fmt: skip
        found += [Weight(layer, name) for name in own]
    return tuple(found)


def _points(layer: int, gated: bool) -> list[str]:
    names = ("hook_pre", "hook_post", *(["hook_pre_linear"] if gated else []))
    return [f"blocks.{layer}.mlp.{name}" for name in names]


def factors(rows: Rows, weights: Sequence[Weight]) -> tuple[dict[Weight, Factors], Float[Tensor, " rows"]]:
    """Of each weight, for each row alone, and the rows' loss: -log p of its target, the mean over its tokens. One pass each way."""
    model, reads, probes = rows.blocks.model, {}, {}

    def probe(weight: Weight) -> Write:
        def write(x: Tensor, written: Tensor) -> Tensor:
            reads[weight] = x.detach()
            probes[weight] = torch.zeros_like(written, requires_grad=True)
            return written + probes[weight]

        return write

    models.check_plain(model)
    with models.frozen(model), torch.enable_grad():
        with _writing(model, {weight: probe(weight) for weight in weights}):
            final = rows.final()
        loss = rows.nll(rows.log_p(final))
        gradients = torch.autograd.grad(loss.sum(), [probes[weight] for weight in weights])
    found = {
        weight: Factors(_single(reads[weight]), _single(each)) for weight, each in zip(weights, gradients, strict=True)
    }
    return found, loss.detach()


def _single(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def added(model: HookedModel, terms: Terms, edit_of: Int[Tensor, " rows"]) -> Iterator[None]:
    """Run the body, of passes of as many rows, with the terms of each row's edit added to the weights."""

    def add(term: Term) -> Write:
        def write(x: Tensor, written: Tensor) -> Tensor:
            left, right = term.left[edit_of], term.right[edit_of]
            along = einsum(x.to(left), left, "row pos d_in, row rank d_in -> row pos rank")
            return written + einsum(along, right, "row pos rank, row rank d_out -> row pos d_out").to(written)

        return write

    with _writing(model, {weight: add(term) for weight, term in terms.items()}):
        yield


@contextmanager
def _writing(model: HookedModel, writes: Mapping[Weight, Write]) -> Iterator[None]:
    """Let each weight's `write` change what the weight writes, in every pass of the body."""
    held: dict[tuple[int, str], Tensor] = {}

    def point(layer: int, name: str, write: Write, of: str) -> Change:
        return Change(f"blocks.{layer}.mlp.{name}", lambda written: write(held[layer, of], written))

    with ExitStack() as stack:
        changes = []
        for layer in sorted({weight.layer for weight in writes}):
            own = {weight.name: write for weight, write in writes.items() if weight.layer == layer}
            stack.enter_context(_inputs(model, layer, held))
            gated = "mlp.W_gate" in there(model, layer)
            for name, at in (("mlp.W_gate", "hook_pre"), ("mlp.W_in", "hook_pre_linear" if gated else "hook_pre")):
                if name in own:
                    changes.append(point(layer, at, own[name], "input"))
            if "mlp.W_out" in own:
                changes.append(read(f"blocks.{layer}.mlp.hook_post", _keeper(held, layer)))
                stack.enter_context(mlp_outputs(model, layer, _out(held, layer, own["mlp.W_out"])))
        stack.enter_context(intervened(model, *changes))
        yield


def _keeper(held: dict[tuple[int, str], Tensor], layer: int) -> Callable[[Tensor], None]:
    return lambda post: held.update({(layer, "post"): post})


def _out(held: dict[tuple[int, str], Tensor], layer: int, write: Write) -> Callable[[Tensor], Tensor]:
    return lambda output: write(held[layer, "post"], output)


@contextmanager
def _inputs(model: HookedModel, layer: int, held: dict[tuple[int, str], Tensor]) -> Iterator[None]:
    """Within the block, what enters the MLP is held under its layer."""

    def keep(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        held[layer, "input"] = args[0]

    with models.alone(model):
        handle = models.mlp_module(model, layer).register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()
