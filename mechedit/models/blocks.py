"""Run single blocks of a model on rows of residual states, on either class of TransformerLens.

A sweep starts where its restoration does: `Blocks.run(layer, resid, past)` computes one block on states [rows, pos, d_model]
whose earlier positions are given as keys and values, so rows share what lies before them. `Blocks.log_p` ends a sweep
without ever holding a row of logits [d_vocab]. A HookedTransformer's block is called as its own forward pass calls it. A
bridge's is called as Hugging Face's model calls it, with arguments recorded in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit.models import parts, vocabulary
from mechedit.models.locks import alone
from mechedit.models.surface import HookedModel, device_of, is_bridge, without_forward_hooks

__all__ = ["Blocks", "KeyValues", "Sharing", "Stepper"]

UNEMBED_ROWS = 128  # rows of logits held at once, where they are held
VOCABULARY_PART = 1024  # columns of the unembedding multiplied at once: what is done to their logits stays in the cache

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class KeyValues:
    """Keys and values of one block for positions 0 to `length`-1; the layout is the model class's own.

    `rows` and `axis` say which dimension counts rows (always the first) and which counts positions.
    """

    keys: Tensor
    values: Tensor
    axis: int

    @property
    def length(self) -> int:
        return self.keys.shape[self.axis]

    def before(self, position: int) -> KeyValues:
        """Those of the positions before `position`."""
        return KeyValues(
            self.keys.narrow(self.axis, 0, position), self.values.narrow(self.axis, 0, position), self.axis
        )

    def rows(self, index: slice | Int[Tensor, " rows"]) -> KeyValues:
        """Those of the given rows, in that order, repeats allowed."""
        return KeyValues(self.keys[index], self.values[index], self.axis)


@dataclass(frozen=True, eq=False)
class Sharing:
    """Which rows of a batch share which past: `rows`, c times n of them, each n in turn that of `first` to `end`-1."""

    rows: slice | Tensor
    first: int
    end: int

    def of(self, past: KeyValues) -> tuple[Tensor, Tensor]:
        """Their keys and values, as views."""
        return past.keys[self.first : self.end], past.values[self.first : self.end]


class Blocks:
    """Runs single blocks of a model on rows of residual states, hooks included.

    `run(layer, resid, past)` computes block `layer` on positions that follow those of `past`; hooks of the block fire as in
    a whole forward pass. This is what makes a sweep start where a restoration does and lets rows share what lies before.
    """

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._is_bridge = is_bridge(model)

    def embed(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream that enters block 0, positions included; `hook_embed` fires."""
        return self.model(tokens, stop_at_layer=0)

    def final(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream that leaves the last block."""
        with alone(self.model):
            resid = self.embed(tokens)
            for layer in range(int(self.model.cfg.n_layers)):
                resid, _ = self.run(layer, resid)
        return resid

    def run(
        self, layer: int, resid: Float[Tensor, "rows pos d_model"], past: KeyValues | None = None
    ) -> tuple[Float[Tensor, "rows pos d_model"], KeyValues]:
        """The residual stream after block `layer`, and its keys and values so far (those of `past` included)."""
        return self._run_bridge(layer, resid, past) if self._is_bridge else self._run_hooked(layer, resid, past)

    def run_sharing(
        self,
        layer: int,
        resid: Float[Tensor, "rows pos d_model"],
        past: KeyValues,
        sharing: list[Sharing],
        begin: int = 0,
        *,
        whole: bool = False,
    ) -> Float[Tensor, "rows late d_model"]:
        """The residual stream after block `layer`, at positions from `begin` on of those given, of rows that share `past`.

        Where the block's parts can be run one by one (and `whole` does not forbid it), nothing of the past is copied, and
        positions before `begin` give keys and values alone.
        """
        if self.by_parts[layer] and not whole:
            earlier = [(each.rows, parts.Earlier(*each.of(past))) for each in sharing]
            return parts.run(self.model.blocks[layer], resid, earlier, begin)
        if not past.length:
            return self.run(layer, resid)[0][:, begin:]
        source = torch.empty(len(resid), dtype=torch.long, device=resid.device)
        for each in sharing:
            n = each.end - each.first
            here = torch.arange(each.first, each.end, device=resid.device)
            source[each.rows] = here.repeat(len(source[each.rows]) // n)
        return self.run(layer, resid, past.rows(source))[0][:, begin:]

    def run_on(
        self, layer: int, resid: Float[Tensor, "rows pos d_model"], pasts: Sequence[KeyValues]
    ) -> Float[Tensor, "rows pos d_model"]:
        """The residual stream after block `layer`, of rows that go on from pasts of their own: a past for the first rows, one for the next,
        and so on; of different lengths only where the block's parts can be run one by one."""
        if not self.by_parts[layer]:
            (past,) = pasts
            return self.run(layer, resid, past if past.length else None)[0]
        ends = torch.tensor([len(past.keys) for past in pasts]).cumsum(0).tolist()
        earlier = [
            (slice(end - len(past.keys), end), parts.Earlier(past.keys, past.values))
            for end, past in zip(ends, pasts, strict=True)
        ]
        return parts.run(self.model.blocks[layer], resid, earlier, 0)

    @cached_property
    def by_parts(self) -> list[bool]:
        """Which blocks' parts are run one by one: those of a kind that is known; `compare_parts` looks whether it is so."""
        return [not self._is_bridge and parts.fits(block) for block in self.model.blocks]

    @torch.no_grad()
    def compare_parts(
        self,
        layer: int,
        resid: Float[Tensor, "rows pos d_model"],
        past: KeyValues,
        after: Float[Tensor, "rows pos d_model"],
    ) -> None:
        """Run a block by parts on the last positions of some rows whose `after` is known; let it be whole if that differs."""
        at, begin = resid.shape[1] // 2, resid.shape[1] - resid.shape[1] // 2
        if not self.by_parts[layer] or not at:
            return
        found = self.run_sharing(
            layer, resid[:, at:], past.before(at), [Sharing(slice(None), 0, len(resid))], begin - at
        )
        expected = after[:, begin:].float()
        close = 1e-4 if resid.dtype == torch.float32 else 0.05
        self.by_parts[layer] = bool((found.float() - expected).abs().max() <= close * expected.abs().max())

    @torch.no_grad()
    def logits_of(
        self, resid: Float[Tensor, "rows d_model"], targets: Int[Tensor, "rows targets"]
    ) -> Float[Tensor, "rows targets"]:
        """The logits of each row's targets alone, in float32, from final residual states."""
        if not self._streams:
            return torch.cat(
                [
                    self.logits(part).float().gather(1, wanted)
                    for part, wanted in zip(resid.split(UNEMBED_ROWS), targets.split(UNEMBED_ROWS), strict=True)
                ]
            )
        W_U, b_U = self.model.unembed.W_U.detach(), self.model.unembed.b_U.detach()
        ids, place = targets.unique(return_inverse=True)
        return self._capped(torch.addmm(b_U[ids], self._normed(resid), W_U[:, ids])).float().gather(1, place)

    def logits(self, resid: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_vocab"]:
        """Next-token logits from final residual states, one unembedding row each."""
        if not self._is_bridge:
            return self._capped(self.model.unembed(self._normed(resid)[:, None])[:, 0])
        if self._streams:
            return self._capped(torch.addmm(self.model.unembed.b_U, self._normed(resid), self.model.unembed.W_U))
        return self._logits_of_a_pass(resid)

    def said(
        self,
        final: Float[Tensor, "reads d_model"],
        tokens: Int[Tensor, " reads"],
        apart: Int[Tensor, " compared"],
        q: Float[Tensor, "compared d_vocab"],
    ) -> tuple[Float[Tensor, " reads"], Float[Tensor, " compared"], Float[Tensor, " reads"]]:
        """`vocabulary.said` of final residual states, with slopes for them."""
        if self._streams and final.dtype == q.dtype:
            W_U, b_U = self.model.unembed.W_U.detach(), self.model.unembed.b_U.detach()
            cap = float(getattr(self.model.cfg, "output_logits_soft_cap", 0.0) or 0.0)
            return vocabulary.said(self._normed(final), W_U, b_U, cap, tokens, apart, q)
        logits = self.logits(final).to(q.dtype)
        log_p, own = logits.log_softmax(-1), logits.detach().gather(1, tokens[:, None])[:, 0]
        kl = (log_p[apart].exp() * (log_p[apart] - q)).sum(1)
        return log_p.gather(1, tokens[:, None])[:, 0], kl, logits.detach().amax(1) - own

    def _logits_of_a_pass(self, resid: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_vocab"]:
        """A bridge's own logits, by a forward pass whose last state is replaced."""
        last = f"blocks.{int(self.model.cfg.n_layers) - 1}.hook_resid_post"
        token = torch.zeros(1, 1, dtype=torch.long, device=resid.device)
        with self.model.hooks(fwd_hooks=[(last, lambda activation, hook: resid[:, None])]):
            return self.model(token)[:, 0]

    @torch.no_grad()
    def log_p(
        self, resid: Float[Tensor, "rows d_model"], targets: Int[Tensor, "rows targets"]
    ) -> Float[Tensor, "rows targets"]:
        """log P of each row's targets from final residual states, in float32, without ever holding a row of logits whole."""
        if not self._streams:
            return self._log_p_by_rows(resid, targets)[0]
        return self._log_p_by_parts(resid, targets, tops=False)[0]

    @torch.no_grad()
    def log_p_and_top(
        self, resid: Float[Tensor, "rows d_model"], targets: Int[Tensor, "rows targets"]
    ) -> tuple[Float[Tensor, "rows targets"], Int[Tensor, " rows"]]:
        """log P of each row's targets, and its most probable token: the one that greedy decoding takes, of equal ones the first; -1
        where logits are no numbers.

        The vocabulary is passed over in parts, in one buffer that is used again, where the unembedding is a product with
        one matrix, a bias and a soft cap; a bridge's is checked to be that, once, on one row.
        """
        return self._log_p_by_parts(resid, targets) if self._streams else self._log_p_by_rows(resid, targets)

    def _log_p_by_rows(
        self, resid: Float[Tensor, "rows d_model"], targets: Int[Tensor, "rows targets"]
    ) -> tuple[Float[Tensor, "rows targets"], Int[Tensor, " rows"]]:
        """By whole rows of logits, a few at a time."""
        rows = []
        for part, wanted in zip(resid.split(UNEMBED_ROWS), targets.split(UNEMBED_ROWS), strict=True):
            logits = self.logits(part).float()
            top = logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1)
            rows.append((logits.log_softmax(-1).gather(1, wanted), top))
        return torch.cat([log_p for log_p, _ in rows]), torch.cat([top for _, top in rows])

    def _log_p_by_parts(
        self, resid: Float[Tensor, "rows d_model"], targets: Int[Tensor, "rows targets"], *, tops: bool = True
    ) -> tuple[Float[Tensor, "rows targets"], Int[Tensor, " rows"]]:
        """By parts of the vocabulary: the highest logit so far, its token, and a sum of exponentials relative to it."""
        normed = self._normed(resid)
        W_U, b_U = self.model.unembed.W_U.detach(), self.model.unembed.b_U.detach()
        buffer = torch.empty(len(resid), min(VOCABULARY_PART, W_U.shape[1]), dtype=W_U.dtype, device=resid.device)
        highest = torch.full((len(resid),), -torch.inf, dtype=torch.float32, device=resid.device)
        top = torch.full((len(resid),), -1, device=resid.device)
        total, found = torch.zeros_like(highest), torch.empty(targets.shape, dtype=torch.float32, device=resid.device)
        order = targets.flatten().argsort()
        bounds = torch.arange(0, W_U.shape[1] + VOCABULARY_PART, VOCABULARY_PART, device=resid.device)
        cuts = torch.searchsorted(targets.flatten()[order], bounds).tolist()
        for number, begin in enumerate(range(0, W_U.shape[1], VOCABULARY_PART)):
            part = slice(begin, min(begin + VOCABULARY_PART, W_U.shape[1]))
            logits = torch.addmm(b_U[part], normed, W_U[:, part], out=buffer[:, : part.stop - begin])
            logits = self._capped(logits).float()
            if cuts[number + 1] > cuts[number]:
                here = order[cuts[number] : cuts[number + 1]]
                row, column = here // targets.shape[1], here % targets.shape[1]
                found[row, column] = logits[row, targets[row, column] - begin]
            # without tops the first part's highest will do, unless another lies so far above it that sums run over
            higher = torch.maximum(highest, logits.amax(-1)) if tops or not begin else highest
            if tops:
                risen = (higher > highest).nonzero()[:, 0]
                top[risen] = begin + logits[risen].argmax(-1)
            # exp(-80) adds nothing to a sum above 1, and what lies below would be denormal numbers, which are slow
            total = total * (highest - higher).exp() + logits.sub_(higher[:, None]).clamp_(min=-80.0).exp_().sum(-1)
            highest = higher
        if not tops and not bool((total < 1e30).all()):
            return self._log_p_by_parts(resid, targets)
        normaliser = highest + total.log()
        return found - normaliser[:, None], top.masked_fill(highest.isnan(), -1)

    @cached_property
    @torch.no_grad()
    def _streams(self) -> bool:
        """Whether logits are one product with a matrix, a bias and a cap, checked on one row."""
        if not self._is_bridge:
            return True
        W_U, b_U = (getattr(getattr(self.model, "unembed", None), name, None) for name in ("W_U", "b_U"))
        if not isinstance(W_U, Tensor) or not isinstance(b_U, Tensor):
            return False
        generator = torch.Generator().manual_seed(0)
        state = torch.randn(1, int(self.model.cfg.d_model), generator=generator).to(W_U)
        whole = self._logits_of_a_pass(state).float()
        parts = self._capped(torch.addmm(b_U, self._normed(state), W_U)).float()
        return bool(torch.allclose(whole, parts, atol=1e-4 * float(whole.abs().max())))

    def _normed(self, resid: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        if not self._is_bridge and self.model.cfg.normalization_type is None:
            return resid
        return self.model.ln_final(resid[:, None])[:, 0]

    def _capped(self, logits: Float[Tensor, "rows part"]) -> Float[Tensor, "rows part"]:
        cap = float(getattr(self.model.cfg, "output_logits_soft_cap", 0.0) or 0.0)
        return torch.tanh(logits / cap) * cap if cap > 0 else logits

    def _run_hooked(self, layer: int, resid: Tensor, past: KeyValues | None) -> tuple[Tensor, KeyValues]:
        from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry as Entry

        if past is None:
            entry = Entry.init_cache_entry(self.model.cfg, resid.device, len(resid))
        else:
            entry = Entry(past.keys, past.values)
        after = self.model.blocks[layer](resid, past_kv_cache_entry=entry)
        return after, KeyValues(entry.past_keys, entry.past_values, axis=1)

    def _run_bridge(self, layer: int, resid: Tensor, past: KeyValues | None) -> tuple[Tensor, KeyValues]:
        from transformers import Cache, DynamicCache

        args, kwargs = self._block_calls(past.length if past else 0, resid.shape[1])[layer]
        cache_now = DynamicCache()
        if past is not None:
            cache_now.update(past.keys, past.values, layer)

        def filled(value: Any, key: str | int) -> Any:
            if key in (0, "hidden_states"):
                return resid
            return cache_now if isinstance(value, Cache) else value

        after = self.model.blocks[layer](
            *(filled(value, index) for index, value in enumerate(args)),
            **{key: filled(value, key) for key, value in kwargs.items()},
        )
        present = cache_now.layers[layer]
        return after[0] if isinstance(after, tuple) else after, KeyValues(present.keys, present.values, axis=2)

    def _block_calls(self, n_past: int, n_new: int) -> list[Call]:
        """How Hugging Face's model calls each block for one row of `n_new` positions after `n_past` others.

        Rotary angles and masks of one row broadcast over any number of rows, so one recorded pass serves them all.
        """
        if (n_past, n_new) in self._calls:
            return self._calls[n_past, n_new]
        from transformers import DynamicCache

        past, device = DynamicCache(), device_of(self.model)
        with without_forward_hooks(self.model), _recorded(self.model) as calls, torch.no_grad():
            if n_past:
                self.model(torch.zeros(1, n_past, dtype=torch.long, device=device), past_key_values=past)
                calls.clear()
            self.model(torch.zeros(1, n_new, dtype=torch.long, device=device), past_key_values=past)
        self._calls[n_past, n_new] = calls
        return calls


class Stepper:
    """Reads tokens a few at a time and remembers keys and values, for generation. Rows have no padding."""

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        self._past: Any = None

    def next_logits(self, tokens: Int[Tensor, "rows new"]) -> Float[Tensor, "rows d_vocab"]:
        """Logits of what follows after all tokens given so far."""
        with alone(self.model):
            return self._next_logits(tokens)

    def _next_logits(self, tokens: Int[Tensor, "rows new"]) -> Float[Tensor, "rows d_vocab"]:
        if is_bridge(self.model):
            from transformers import DynamicCache

            self._past = self._past or DynamicCache()
            return self.model(tokens, past_key_values=self._past)[:, -1]
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        self._past = self._past or TransformerLensKeyValueCache.init_cache(self.model.cfg, tokens.device, len(tokens))
        mask, top = torch.ones_like(tokens), int(self.model.cfg.n_layers)
        resid = self.model(tokens, past_kv_cache=self._past, attention_mask=mask, stop_at_layer=top)
        return Blocks(self.model).logits(resid[:, -1])  # of the last position alone


@contextmanager
def _recorded(model: HookedModel) -> Iterator[list[Call]]:
    """Within the block a bridge's calls of Hugging Face's blocks are collected in the list."""
    calls: list[Call] = []
    handles: list[Any] = []
    try:
        for block in model.blocks:
            handles.append(
                block.original_component.register_forward_pre_hook(
                    lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
                )
            )
        yield calls
    finally:
        for handle in handles:
            handle.remove()
