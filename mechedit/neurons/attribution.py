"""Integrated gradients of an answer's probability by neurons, for many prompts and steps at once.

    Attr = w / m * sum_k dP(answer)/dw at (k/m) w, k = 1..m

All steps and all prompts of one length run as rows of one batch: at one position, and in no block but w's own and those above. What lies
below and before is computed once, and shared.

Where a norm follows the MLP (Gemma 2 and 3) what is written does not depend on the length of w: on the way from 0 all is the same from the
first step on, and the attributions of a block would add up to nothing. So the norm's denominator is held at what it is in the prompt's own
run, and they add up to P(w) - P(0) there too; `norm` "moving" lets it follow w.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from mechedit import prompts
from mechedit.interventions import Change, intervened, read
from mechedit.models import (
    Blocks,
    HookedModel,
    KeyValues,
    Sharing,
    check_finite,
    check_layer,
    check_plain,
    device_of,
    frozen,
    norm_after_mlp,
)
from mechedit.progress import Progress, silent
from mechedit.settings import KnowledgeNeuronsSettings

__all__ = ["attributions", "layers_of"]

ROWS = 256  # that run together
PART = 64  # rows whose logits are held at once


def attributions(
    model: HookedModel,
    rows: Sequence[Sequence[int]],
    answer: Sequence[int],
    settings: KnowledgeNeuronsSettings,
    *,
    most_rows: int = ROWS,
    progress: Progress = silent,
) -> tuple[Float[Tensor, "prompt layer neuron"], list[float]]:
    """Attr of every neuron at each prompt's last token, block by block (all, or those of the settings), and P(answer) after each prompt.

    `rows` are the prompts' ids, `answer` those of the answer. `most_rows` of a prompt at a step run together.

    Raises:
        FactError: a prompt and the answer do not fit the context.
    """
    check_plain(model)
    prompts.check_length(model, max(map(len, rows)) + len(answer) - 1)  # the last is not read
    layers = layers_of(model, settings)
    result: list[list[Tensor]] = [[] for _ in rows]
    p_answer = [math.nan] * len(rows)
    with frozen(model):
        groups = _groups(model, rows, answer, settings, most_rows)
        for row, layer in enumerate(layers):
            progress("attributions", row, len(layers))
            for group in groups:
                for member, own in zip(group.members, group.attributed(layer, settings, most_rows), strict=True):
                    result[member].append(own.cpu())
    for group in groups:
        for member, p in zip(group.members, group.p.tolist(), strict=True):
            p_answer[member] = p
    progress("attributions", len(layers), len(layers))
    return torch.stack([torch.stack(each) for each in result]), p_answer


@dataclass(frozen=True, eq=False)
class _Group:
    """Prompts of one length, from their last token on: what no step changes.

    With an answer of several tokens there are as many positions, of the prompt's last token and of those of the answer but its own last.
    """

    blocks: Blocks
    members: list[int]
    answer: tuple[int, ...]
    whole: bool
    entering: list[Tensor]  # each block, [prompt, new, d_model]
    past: list[KeyValues]  # each block's, of the positions before
    w: list[Tensor]  # of each block, [prompt, neuron], in float32
    scales: dict[int, Tensor]  # of blocks with a norm after the MLP that is held, its denominator [prompt, new, 1]
    p: Tensor  # [prompt]

    def attributed(
        self, layer: int, settings: KnowledgeNeuronsSettings, most_rows: int
    ) -> Float[Tensor, "prompt neuron"]:
        """Attr of one block's neurons, a prompt each."""
        w, total = self.w[layer], torch.zeros_like(self.w[layer])
        for alphas in _alphas(settings).to(w.device).split(max(1, most_rows // len(w))):
            scaled = rearrange(einsum(alphas, w, "step, prompt neuron -> step prompt neuron"), "step prompt neuron -> (step prompt) neuron")  # fmt: skip
            with torch.enable_grad():
                final = self._final(layer, scaled.requires_grad_(), settings)
                (gradient,) = torch.autograd.grad(final, [scaled], self._slope(final.detach()))
            total += rearrange(gradient, "(step prompt) neuron -> step prompt neuron", prompt=len(w)).sum(0)
        return w * total / settings.steps

    def _final(
        self, layer: int, scaled: Float[Tensor, "rows neuron"], settings: KnowledgeNeuronsSettings
    ) -> Float[Tensor, "rows new d_model"]:
        """The states that leave the last block, with these activations at the first of the positions."""

        def put(activation: Tensor) -> Tensor:
            return torch.cat([scaled[:, None].to(activation), activation[:, 1:]], 1)

        sharing = [Sharing(slice(None), 0, len(self.members))]
        resid = self.entering[layer].repeat(len(scaled) // len(self.members), 1, 1)
        with intervened(self.blocks.model, Change(_hook(layer, settings), put)), self._held(layer):
            for block in range(layer, len(self.entering)):
                resid = self.blocks.run_sharing(block, resid, self.past[block], sharing)
        return resid

    @contextmanager
    def _held(self, layer: int) -> Iterator[None]:
        """Within the block the norm after this MLP divides by what it divides by in the prompt's own run."""
        norm = norm_after_mlp(self.blocks.model, layer)
        if norm is None or layer not in self.scales:
            yield
            return

        def hold(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            now, own = _scale(self.blocks.model, args[0]), self.scales[layer]
            return output * (now / own.repeat(len(now) // len(own), 1, 1)).to(output)

        handle = norm.register_forward_hook(hold)
        try:
            yield
        finally:
            handle.remove()

    def _slope(self, final: Float[Tensor, "rows new d_model"]) -> Float[Tensor, "rows new d_model"]:
        """dP(answer) by the last states. Rows are independent, and few are unembedded at once."""
        slopes = []
        for part in final.split(PART):
            states = part.detach().requires_grad_()
            (slope,) = torch.autograd.grad(_probability(self.blocks, states, self.answer, whole=self.whole).sum(), [states])  # fmt: skip
            slopes.append(slope)
        return torch.cat(slopes)


def _probability(
    blocks: Blocks, states: Float[Tensor, "rows new d_model"], answer: Sequence[int], *, whole: bool
) -> Float[Tensor, " rows"]:
    """P of the whole answer; or, as published, the mean over its tokens of P of each at the prompt's end."""
    log_p = blocks.logits(rearrange(states, "rows new d_model -> (rows new) d_model")).float().log_softmax(-1)
    if not whole:
        return log_p[:, list(answer)].exp().mean(-1)
    log_p = rearrange(log_p, "(rows new) d_vocab -> rows new d_vocab", rows=len(states))
    wanted = torch.tensor(list(answer), device=log_p.device).expand(len(states), -1)
    return log_p.gather(2, wanted[..., None])[..., 0].sum(-1).exp()


@torch.no_grad()
def _groups(
    model: HookedModel,
    rows: Sequence[Sequence[int]],
    answer: Sequence[int],
    settings: KnowledgeNeuronsSettings,
    most_rows: int,
) -> list[_Group]:
    """The prompts, those of one length together, each run once."""
    blocks, groups = Blocks(model), []
    for length in sorted({len(row) for row in rows}):
        every = [index for index, row in enumerate(rows) if len(row) == length]
        for begin in range(0, len(every), most_rows):
            members = every[begin : begin + most_rows]
            groups.append(_group(blocks, members, [rows[index] for index in members], answer, settings))
    return groups


def _group(
    blocks: Blocks,
    members: list[int],
    rows: Sequence[Sequence[int]],
    answer: Sequence[int],
    settings: KnowledgeNeuronsSettings,
) -> _Group:
    """Run each of the prompts once, and keep what its steps share."""
    model, last, whole = blocks.model, len(rows[0]) - 1, settings.answer == "whole"
    n_layers = int(model.cfg.n_layers)
    kept: list[Tensor] = []
    presents: list[KeyValues] = []
    states = [blocks.embed(torch.tensor([[*row, *(answer[:-1] if whole else ())] for row in rows], device=device_of(model)))]  # fmt: skip
    scales: dict[int, Tensor] = {}
    with intervened(model, *(read(_hook(layer, settings), kept.append) for layer in range(n_layers))):
        for layer in range(n_layers):
            with _norm_read(model, layer, scales if settings.norm == "held" else {}):
                after, present = blocks.run(layer, states[-1])
            states.append(after)
            presents.append(present)
    for layer, present in enumerate(
        presents
    ):  # on one row: whether the block run by its parts gives what it gives whole
        one = replace(present, keys=present.keys[:1], values=present.values[:1])
        blocks.compare_parts(layer, states[layer][:1], one, states[layer + 1][:1])
    p = _probability(blocks, states[-1][:, last:], answer, whole=whole)
    check_finite(model, p)
    entering, past = [state[:, last:] for state in states[:-1]], [present.before(last) for present in presents]
    held = {layer: scale[:, last:] for layer, scale in scales.items()}
    return _Group(blocks, members, tuple(answer), whole, entering, past, [each[:, last].float() for each in kept], held, p.cpu())  # fmt: skip


@contextmanager
def _norm_read(model: HookedModel, layer: int, into: dict[int, Tensor]) -> Iterator[None]:
    """Within the block the denominator of the norm after this MLP, if there is one, is put into the dictionary."""
    norm = norm_after_mlp(model, layer)
    handle = (
        norm.register_forward_hook(lambda module, args, output: into.update({layer: _scale(model, args[0])}))
        if norm
        else None
    )
    try:
        yield
    finally:
        if handle:
            handle.remove()


def _scale(model: HookedModel, activation: Float[Tensor, "rows pos d_model"]) -> Float[Tensor, "rows pos 1"]:
    """What an RMS norm divides by."""
    return (activation.float().square().mean(-1, keepdim=True) + float(model.cfg.eps)).sqrt()


def _alphas(settings: KnowledgeNeuronsSettings) -> Float[Tensor, " step"]:
    """The shares of w at which gradients are taken."""
    if settings.points == "both ends":
        return torch.linspace(0, 1, settings.steps)
    return torch.arange(1, settings.steps + 1) / settings.steps


def layers_of(model: HookedModel, settings: KnowledgeNeuronsSettings) -> tuple[int, ...]:
    """The blocks that are looked at.

    Raises:
        ModelError: the model has no such block.
    """
    return tuple(check_layer(model, layer) for layer in settings.layers or range(int(model.cfg.n_layers)))


def _hook(layer: int, settings: KnowledgeNeuronsSettings) -> str:
    return f"blocks.{layer}.mlp.hook_{settings.activation}"
