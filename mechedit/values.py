"""v*, the value to store: the MLP output at the subject's last token that makes the model say the new target.

    loss(d) = -mean_j log p(target | x_j + p, d) + kl * KL(p(. | essence, d) || p(. | essence)) + decay * |d| / |v|^2

after Meng et al. 2022, eq. 4, with the form and constants of the published code (the paper's text has others). d is
optimised by Adam and kept within `clamp` lengths of v. The essence prompt is "{subject} is a", read at the subject's last
token, as the code does. Only d changes: no parameter needs a gradient, and what lies below the edited block is computed once.

A rank-one write that gives the key k* the value v + d gives another key k the share (k @ u) / (k* @ u) of d. Each row is
optimised with the share that its own key will get (`shares`), so that what is optimised is what will be written; the
published code adds the whole of d to every row, and its averaged edit can then miss the very prompt it was made for.

v is W_out's own output. Where a norm follows the MLP (Gemma 2 and 3) that is before the norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mechedit.interventions import mlp_outputs
from mechedit.keys import Context
from mechedit.models import Blocks, HookedModel, check_layer, device_of, frozen
from mechedit.progress import Progress, silent
from mechedit.prompts import pad
from mechedit.settings import RomeSettings

__all__ = ["Value", "optimise"]


@dataclass(frozen=True)
class Value:
    """v* [d_model] in float32, and a row for each step of the optimisation: target, KL and decay terms of the loss."""

    value: Float[Tensor, " d_model"]
    losses: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class _Problem:
    """The prompts of the optimisation: target rows first, the essence row last."""

    resid: Float[Tensor, "rows pos d_model"]  # entering the edited block
    lookup: Int[Tensor, " rows"]  # where d is added
    shares: Float[Tensor, " rows"]  # and how much of it
    read_rows: Int[Tensor, " reads"]  # which row and position each needed prediction is read at, essence last
    read_positions: Int[Tensor, " reads"]
    targets: Int[Tensor, " target_reads"]


def optimise(
    model: HookedModel,
    rows: tuple[Context, ...],
    essence: Context,
    target: list[int],
    initial: Float[Tensor, " d_model"],
    shares: Float[Tensor, " rows_and_essence"],
    layer: int,
    settings: RomeSettings,
    *,
    progress: Progress = silent,
) -> Value:
    """Find v* near `initial` (v above) for the contexts `rows`, whose answer becomes the ids `target`."""
    check_layer(model, layer)
    blocks = Blocks(model)
    initial = initial.to(device_of(model)).float()
    with frozen(model):
        with torch.no_grad():
            problem = _prepare(model, blocks, rows, essence, target, shares, layer)
            before = _predict(model, blocks, problem, layer, torch.zeros_like(initial))[-1:]
        delta = torch.zeros_like(initial, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=settings.learning_rate)
        limit = settings.clamp * float(initial.norm())
        losses: list[tuple[float, float, float]] = []
        for step in range(settings.steps):
            progress("finding v*", step, settings.steps)
            with torch.enable_grad():
                log_p = _predict(model, blocks, problem, layer, delta)
                nll = F.nll_loss(log_p[:-1], problem.targets)
                kl = settings.kl * F.kl_div(before, log_p[-1:], log_target=True, reduction="batchmean")
                decay = settings.weight_decay * delta.norm() / initial.norm() ** 2
                (delta.grad,) = torch.autograd.grad(nll + kl + decay, [delta])
            losses.append((nll.item(), kl.item(), decay.item()))
            if losses[-1][0] < settings.stop_at:
                break
            adam.step()
            with torch.no_grad():
                delta.mul_((limit / delta.norm()).clamp(max=1.0))
        progress("finding v*", settings.steps, settings.steps)
    return Value((initial + delta.detach()).cpu(), tuple(losses))


def _prepare(
    model: HookedModel,
    blocks: Blocks,
    rows: tuple[Context, ...],
    essence: Context,
    target: list[int],
    shares: Float[Tensor, " rows_and_essence"],
    layer: int,
) -> _Problem:
    """Put target and essence rows together, and run them up to the edited block."""
    tokens = pad(model, [[*row.ids, *target[:-1]] for row in rows] + [list(essence.ids)])
    resid = blocks.embed(tokens)
    for below in range(layer):
        resid, _ = blocks.run(below, resid)
    reads = [(index, row.last + step) for index, row in enumerate(rows) for step in range(len(target))]
    reads.append((len(rows), essence.subject))
    as_tensor = lambda values: torch.tensor(values, device=resid.device)  # noqa: E731
    return _Problem(
        resid=resid,
        lookup=as_tensor([row.subject for row in (*rows, essence)]),
        shares=shares.to(resid.device).float(),
        read_rows=as_tensor([row for row, _ in reads]),
        read_positions=as_tensor([position for _, position in reads]),
        targets=as_tensor(target * len(rows)),
    )


def _predict(
    model: HookedModel, blocks: Blocks, problem: _Problem, layer: int, delta: Float[Tensor, " d_model"]
) -> Float[Tensor, "reads d_vocab"]:
    """Log-probabilities in float32 at every read position, each row with its share of d added to its value."""

    def add(output: Tensor) -> Tensor:
        index = torch.arange(len(output), device=output.device)
        return output.index_put(
            (index, problem.lookup), (problem.shares[:, None] * delta).to(output.dtype), accumulate=True
        )

    resid = problem.resid
    with mlp_outputs(model, layer, add):
        for above in range(layer, int(model.cfg.n_layers)):
            resid, _ = blocks.run(above, resid)
    return blocks.logits(resid[problem.read_rows, problem.read_positions]).float().log_softmax(-1)
