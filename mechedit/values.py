"""v*, the value to store: the MLP output at the subject's last token that makes the model say the new target.

    loss(d) = -mean_j log p(target | x_j + p, d) + kl * KL(p(. | essence, d) || p(. | essence)) + decay * |d| / |v|^2

after Meng et al. 2022, eq. 4, with the form and constants of the published code (the paper's text has others). d is
optimised by Adam and kept within `clamp` lengths of v. The essence prompt is "{subject} is a", read at the subject's last
token, as the code does. Only d changes: no parameter needs a gradient.

A rank-one write that gives the key k* the value v + d gives another key k the share (k @ u) / (k* @ u) of d. Each row is
optimised with the share that its own key will get (`shares`), so that what is optimised is what will be written; the
published code adds the whole of d to every row, and its averaged edit can then miss the very prompt it was made for.

What d cannot change is computed once: everything below the edited block, and every position before the first that d is
added at, whose keys and values all steps share. Rows that add d at nearby positions run together.

v is W_out's own output. Where a norm follows the MLP (Gemma 2 and 3) that is before the norm. Other `parts` of the block can be changed
in its place or with it, each by a d of its own that is kept within `clamp` lengths of what the part gives now: what the attention adds to
the residual stream (`attn`), and the stream that leaves the block (`stream`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mechedit.interventions import Activation, Change, intervened, mlp_outputs
from mechedit.keys import Context
from mechedit.models import Blocks, HookedModel, KeyValues, check_layer, check_plain, device_of, frozen
from mechedit.progress import Progress, silent
from mechedit.prompts import pad
from mechedit.settings import RomeSettings

__all__ = ["HOOKS", "Value", "optimise"]

HOOKS = {"attn": "blocks.{}.hook_attn_out", "stream": "blocks.{}.hook_resid_post"}
"""Where parts of a block are changed, `mlp` aside, which is `interventions.mlp_outputs`."""

TOP_WEIGHT, TOP_KL = (
    0.1,
    0.01,
)  # of PMET's stop: once the target is first everywhere, its loss's weight, and the KL term to reach
GROUP_COST = 24  # what running one more group costs, in positions of a row: the weights are read once for each


@dataclass(frozen=True, eq=False)
class Value:
    """v* in float32, one for each part where `initial` had several, and a row for each step of the optimisation: target, KL and decay
    terms of the loss."""

    value: Float[Tensor, "*parts d_model"]
    losses: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, eq=False)
class _Group:
    """Rows that run together, from the first position that d is added at in any of them."""

    entering: Float[Tensor, "rows pos d_model"]  # the edited block
    past: tuple[KeyValues | None, ...]  # of the edited block and those above, for the positions before
    lookup: Int[Tensor, " rows"]  # where each row adds d, and how much of it
    shares: Float[Tensor, " rows"]
    read_rows: Int[Tensor, " reads"]
    read_positions: Int[Tensor, " reads"]
    order: tuple[int, ...]  # where each read belongs among all reads


def optimise(
    model: HookedModel,
    rows: Sequence[Context],
    essence: Context,
    targets: Sequence[Sequence[int]],
    initial: Float[Tensor, "*parts d_model"],
    shares: Float[Tensor, " rows_and_essence"],
    layer: int,
    settings: RomeSettings,
    parts: Sequence[str] = ("mlp",),
    *,
    progress: Progress = silent,
) -> Value:
    """Find v* near `initial` (v above) for the contexts `rows`, each of which shall be answered by its ids in `targets`.

    Of several `parts`, `initial` has a row for each, and so has v*.
    """
    check_layer(model, layer)
    check_plain(model)
    blocks = Blocks(model)
    shape = initial.shape
    initial = initial.to(device_of(model)).float().view(len(parts), -1)
    with frozen(model):
        with torch.no_grad():
            groups = _prepare(model, blocks, rows, essence, targets, shares, layer)
        wanted = torch.tensor([token for target in targets for token in target], device=initial.device)
        each = [1 / (len(rows) * len(target)) for target in targets for _ in target]  # rows count alike
        weights = torch.tensor(each, device=initial.device)
        delta = torch.zeros_like(initial, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=settings.learning_rate)
        sizes = initial.norm(dim=1)
        before: Tensor | None = None
        losses: list[tuple[float, float, float]] = []
        for step in range(settings.steps):
            progress("finding v*", step, settings.steps)
            with torch.enable_grad():
                # a split's gradient is put together by one copy, a slice's by filling the whole with zeros
                of_rows, of_essence = _predict(model, blocks, groups, layer, parts, delta).split([len(wanted), 1])
                before = of_essence.detach().clone() if before is None else before  # d is still zero in the first step
                nll = -(of_rows.gather(1, wanted[:, None])[:, 0] * weights).sum()
                is_top = settings.stop == "top" and bool((of_rows.argmax(1) == wanted).all())
                nll = TOP_WEIGHT * nll if is_top else nll
                kl = settings.kl * F.kl_div(before, of_essence, log_target=True, reduction="batchmean")
                decay = settings.weight_decay * (delta.norm(dim=1) / sizes**2).sum()
                (delta.grad,) = torch.autograd.grad(nll + kl + decay, [delta])
            losses.append((nll.item(), kl.item(), decay.item()))
            if _done(losses, settings, is_top):
                break
            adam.step()
            with torch.no_grad():
                delta.mul_((settings.clamp * sizes / delta.norm(dim=1)).clamp(max=1.0)[:, None])
        progress("finding v*", settings.steps, settings.steps)
    return Value((initial + delta.detach()).view(shape).cpu(), tuple(losses))


def _done(losses: list[tuple[float, float, float]], settings: RomeSettings, is_top: bool = False) -> bool:
    """Whether the target is learnt. The published code judges the sum, penalties and all, and takes no last step; PMET's asks for little
    KL where the target is first everywhere."""
    if settings.stop == "top":
        return losses[-1][1] <= TOP_KL if is_top else sum(losses[-1]) < settings.stop_at
    if settings.stop == "published":
        return sum(losses[-1]) < settings.stop_at or len(losses) == settings.steps
    return losses[-1][0] < settings.stop_at


def _prepare(
    model: HookedModel,
    blocks: Blocks,
    rows: Sequence[Context],
    essence: Context,
    targets: Sequence[Sequence[int]],
    shares: Float[Tensor, " rows_and_essence"],
    layer: int,
) -> list[_Group]:
    """Run every row once without d, and keep what d leaves as it is. Reads are the targets' in order, then the essence's."""
    ids = [[*row.ids, *target[:-1]] for row, target in zip(rows, targets, strict=True)] + [list(essence.ids)]
    lookups = [row.lookup for row in (*rows, essence)]
    reads = [(index, row.last + step) for index, row in enumerate(rows) for step in range(len(targets[index]))]
    reads.append((len(rows), essence.lookup))
    groups = []
    for members in _together(lookups, [len(row) for row in ids]):
        begin = min(lookups[index] for index in members)
        resid = blocks.embed(pad(model, [ids[index] for index in members]))
        past: list[KeyValues | None] = []
        for block in range(int(model.cfg.n_layers)):
            if block == layer:
                entering = resid[:, begin:]
            resid, present = blocks.run(block, resid)
            if block >= layer:
                past.append(present.before(begin) if begin else None)
        own = [
            (order, members.index(row), position - begin)
            for order, (row, position) in enumerate(reads)
            if row in members
        ]
        order, read_rows, read_positions = zip(*own, strict=True)
        places = ([lookups[index] - begin for index in members], read_rows, read_positions)
        lookup, row, position = (torch.tensor(each, device=resid.device) for each in places)
        share = shares[members].to(resid.device).float()
        groups.append(_Group(entering, tuple(past), lookup, share, row, position, order))
    return groups


def _together(lookups: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Which rows to run together, so that few positions are computed for nothing and few groups are made.

    A group computes, for each of its rows, the positions from its first lookup to its longest row's end. Rows in order of
    lookup are cut where that costs least, found from the end backwards.
    """
    rows = sorted(range(len(lookups)), key=lambda index: (lookups[index], lengths[index]))
    # for each row, what it and those after it cost at best, and where the first of their groups ends
    best: list[tuple[float, int]] = [(0.0, 0)] * (len(rows) + 1)
    for begin in reversed(range(len(rows))):
        options = []
        longest = 0
        for end in range(begin + 1, len(rows) + 1):
            longest = max(longest, lengths[rows[end - 1]])
            positions = (end - begin) * (longest - lookups[rows[begin]])
            options.append((GROUP_COST + positions + best[end][0], end))
        best[begin] = min(options)
    groups, begin = [], 0
    while begin < len(rows):
        groups.append(rows[begin : best[begin][1]])
        begin = best[begin][1]
    return groups


def _added(change: Float[Tensor, "rows d_model"], lookup: Int[Tensor, " rows"], output: Tensor) -> Tensor:
    rows = torch.arange(len(output), device=output.device)
    return output.index_put((rows, lookup), change.to(output.dtype), accumulate=True)


def _changed(
    model: HookedModel, layer: int, part: str, apply: Callable[[Activation], Activation | None]
) -> AbstractContextManager[None]:
    """Within the block `apply` changes what the part gives."""
    if part == "mlp":
        return mlp_outputs(model, layer, apply)
    return intervened(model, Change(HOOKS[part].format(layer), apply))


def _predict(
    model: HookedModel,
    blocks: Blocks,
    groups: list[_Group],
    layer: int,
    parts: Sequence[str],
    delta: Float[Tensor, "parts d_model"],
) -> Float[Tensor, "reads d_vocab"]:
    """Log-probabilities in float32 at every read position, each row with its share of d added to its value, part by part."""
    final: list[Tensor] = []
    order: list[int] = []
    for group in groups:
        resid = group.entering
        with ExitStack() as stack:
            for part, own in zip(parts, delta, strict=True):
                change = partial(_added, group.shares[:, None] * own, group.lookup)
                stack.enter_context(_changed(model, layer, part, change))
            for block, past in enumerate(group.past, layer):
                resid, _ = blocks.run(block, resid, past)
        final.append(resid[group.read_rows, group.read_positions])
        order += group.order
    back = torch.tensor(order, device=delta.device).argsort()
    return blocks.logits(torch.cat(final)[back]).float().log_softmax(-1)
