"""v*, the value to store: the MLP output at the subject's last token that makes the model say the new target.

    loss(d) = -mean_j log p(target | x_j + p, v + d) + kl * KL(p_d(. | essence) || p(. | essence)) + decay * |d| / |v|^2

after Meng et al. 2022, eq. 4, with the form and constants of the published code (the paper's text has |d|^2 and others). d
is optimised by Adam and kept within `clamp` lengths of v, the value the bare prompt has. The essence prompt is "{subject}
is a", read at the subject's last token, as the code does. Only d changes: no parameter needs a gradient, and what lies
below the edited block is computed once.

v is W_out's own output. Where a norm follows the MLP (Gemma 2 and 3) that is before the norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mechedit.facts import Fact
from mechedit.interventions import mlp_outputs
from mechedit.keys import Context, contexts
from mechedit.models import Blocks, HookedModel, check_layer, frozen
from mechedit.progress import Progress, silent
from mechedit.prompts import pad
from mechedit.settings import RomeSettings

__all__ = ["Value", "optimise"]


@dataclass(frozen=True)
class Value:
    """v* [d_model] in float32; `initial` is the bare prompt's own value. `losses` has a row a step: target, KL, decay."""

    value: Float[Tensor, " d_model"]
    initial: Float[Tensor, " d_model"]
    losses: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class _Problem:
    """The prompts of the optimisation: target rows first, the essence row last."""

    resid: Float[Tensor, "rows pos d_model"]  # entering the edited block
    lookup: Int[Tensor, " rows"]  # where d is added
    read_rows: Int[Tensor, " reads"]  # which row and position each needed prediction is read at, essence last
    read_positions: Int[Tensor, " reads"]
    targets: Int[Tensor, " target_reads"]


def optimise(
    model: HookedModel, fact: Fact, target: list[int], rows: tuple[Context, ...], layer: int, settings: RomeSettings, *, progress: Progress = silent
) -> Value:
    """Find v* for a fact whose contexts are `rows` (the bare prompt first) and whose new target has ids `target`."""
    check_layer(model, layer)
    blocks = Blocks(model)
    with frozen(model):
        with torch.no_grad():
            problem = _prepare(model, blocks, fact, target, rows, layer, settings)
            initial, essence = _unchanged(model, blocks, problem, layer)
        delta = torch.zeros_like(initial, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=settings.learning_rate)
        limit = settings.clamp * float(initial.norm())
        losses: list[tuple[float, float, float]] = []
        for step in range(settings.steps):
            progress("finding v*", step, settings.steps)
            with torch.enable_grad():
                log_p = _predict(model, blocks, problem, layer, initial, delta)
                nll = F.nll_loss(log_p[:-1], problem.targets)
                kl = settings.kl * F.kl_div(essence, log_p[-1:], log_target=True, reduction="batchmean")
                decay = settings.weight_decay * delta.norm() / initial.norm() ** 2
                (delta.grad,) = torch.autograd.grad(nll + kl + decay, [delta])
            losses.append((nll.item(), kl.item(), decay.item()))
            if losses[-1][0] < settings.stop_at:
                break
            adam.step()
            with torch.no_grad():
                delta.mul_((limit / delta.norm()).clamp(max=1.0))
        progress("finding v*", settings.steps, settings.steps)
    return Value((initial + delta.detach()).float().cpu(), initial.float().cpu(), tuple(losses))


def _prepare(
    model: HookedModel, blocks: Blocks, fact: Fact, target: list[int], rows: tuple[Context, ...], layer: int, settings: RomeSettings
) -> _Problem:
    """Tokenise target and essence rows, and run them up to the edited block."""
    essence_fact = Fact(fact.subject, "{} is a")
    essence = contexts(model, essence_fact, ("",), prepend_bos=settings.prepend_bos)[0]
    tokens = pad(model, [[*row.ids, *target[:-1]] for row in rows] + [list(essence.ids)])
    resid = blocks.embed(tokens)
    for below in range(layer):
        resid, _ = blocks.run(below, resid)
    reads = [(index, row.last + step) for index, row in enumerate(rows) for step in range(len(target))]
    reads.append((len(rows), essence.subject))
    as_tensor = lambda values: torch.tensor(values, device=resid.device)  # noqa: E731
    return _Problem(
        resid=resid,
        lookup=as_tensor([row.subject for row in rows] + [essence.subject]),
        read_rows=as_tensor([row for row, _ in reads]),
        read_positions=as_tensor([position for _, position in reads]),
        targets=as_tensor(target * len(rows)),
    )


def _unchanged(model: HookedModel, blocks: Blocks, problem: _Problem, layer: int) -> tuple[Tensor, Tensor]:
    """The bare prompt's value, and the essence row's log-probabilities, of the model as it is."""
    kept: list[Tensor] = []

    def keep(output: Tensor) -> None:
        kept.append(output[0, problem.lookup[0]].float())

    with mlp_outputs(model, layer, keep):
        log_p = _finish(blocks, problem, layer)
    return kept[0], log_p[-1:]


def _predict(model: HookedModel, blocks: Blocks, problem: _Problem, layer: int, initial: Tensor, delta: Tensor) -> Tensor:
    """Log-probabilities at every read position with d added to the value at the lookup positions."""

    def add(output: Tensor) -> Tensor:
        index = torch.arange(len(output), device=output.device)
        return output.index_put((index, problem.lookup), delta.to(output.dtype).expand(len(output), -1), accumulate=True)

    with mlp_outputs(model, layer, add):
        return _finish(blocks, problem, layer)


def _finish(blocks: Blocks, problem: _Problem, layer: int) -> Float[Tensor, "reads d_vocab"]:
    """From the edited block to log-probabilities in float32, unembedding only what is read."""
    resid = problem.resid
    for above in range(layer, int(blocks.model.cfg.n_layers)):
        resid, _ = blocks.run(above, resid)
    return blocks.logits(resid[problem.read_rows, problem.read_positions]).float().log_softmax(-1)
