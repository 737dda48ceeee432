"""Text from the model: seeded sampling for prefixes, second moments and metrics, greedy completion for people to read.

Both step through the tokens with cached keys and values. Sampling inverts the distribution function with numbers from a
generator of its own, so that a seed gives the same text whatever else was drawn, on any device and model class (rounding
of the logits aside).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit.corruption import generator
from mechedit.errors import check_list
from mechedit.models import HookedModel, ModelError, Stepper, device_of
from mechedit.progress import Progress, silent
from mechedit.prompts import check_length, check_read, decoded, encode, resolve_bos, told_tokens
from mechedit.settings import SettingsError

__all__ = ["check_top_k", "complete", "completions", "continuations", "extended", "sample"]

GENERATED_ROWS = 64  # continuations that are sampled together
DRAW_ROWS = 16  # a softmax over so few rows stays in memory that is reused


def check_top_k(model: HookedModel, top_k: int | None) -> None:
    """Raise unless the model has so many tokens to choose among.

    Raises:
        SettingsError: it has not.
    """
    there = int(model.cfg.d_vocab)
    if top_k is not None and not 1 <= top_k <= there:
        raise SettingsError(
            f"top_k must be from 1 to the {there} tokens of {model.cfg.model_name}; found {top_k}. Choose among fewer (--top-k)."
        )


@torch.no_grad()
def sample(
    model: HookedModel,
    rows: int,
    length: int,
    generator: torch.Generator,
    *,
    top_k: int | None = None,
    progress: Progress = silent,
) -> Int[Tensor, "rows length"]:
    """`rows` texts of `length` tokens, sampled at temperature 1 after BOS, which is not part of them.

    Raises:
        SettingsError: `top_k` tokens are more than there are.
        ModelError: the tokenizer has no token to begin with.
    """
    check_top_k(model, top_k)
    stepper = Stepper(model)
    device = device_of(model)
    start = model.tokenizer.bos_token_id if model.tokenizer.bos_token_id is not None else model.tokenizer.eos_token_id
    if start is None:
        raise ModelError(
            f"the tokenizer of {model.cfg.model_name} has neither a BOS nor an EOS token, with which sampled text begins. Set its bos_token."
        )
    token = torch.full((rows, 1), start, device=device)
    text = []
    for done in range(length):
        progress("sampling text", done, length)
        logits = stepper.next_logits(token)
        uniform = torch.rand(rows, 1, generator=generator).to(device)
        parts = zip(logits.split(DRAW_ROWS), uniform.split(DRAW_ROWS), strict=True)
        token = torch.cat([_draw(part.float(), numbers, top_k) for part, numbers in parts])
        text.append(token)
    progress("sampling text", length, length)
    return torch.cat(text, dim=1)


def _draw(
    logits: Float[Tensor, "rows d_vocab"], uniform: Float[Tensor, "rows 1"], top_k: int | None
) -> Int[Tensor, "rows 1"]:
    """One token a row: the first whose cumulative probability passes the uniform number."""
    if top_k is not None:
        values, tokens = logits.topk(top_k)
        return tokens.gather(-1, _invert(values.softmax(-1), uniform)[0])
    # Two stages, groups of tokens first: one cumulative sum over a large vocabulary would take longer than the model.
    size = max(each for each in range(1, int(logits.shape[-1] ** 0.5) + 1) if logits.shape[-1] % each == 0)
    p = logits.softmax(-1).unflatten(-1, (-1, size))
    group, within = _invert(p.sum(-1), uniform)
    token, _ = _invert(p.gather(1, group[..., None].expand(-1, -1, size))[:, 0], within)
    return (group * size + token).clamp_(max=logits.shape[-1] - 1)


def _invert(
    p: Float[Tensor, "rows choices"], uniform: Float[Tensor, "rows 1"]
) -> tuple[Int[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:
    """The choice where the cumulative share of `p` passes the uniform number, and how far into that choice it lies."""
    total = p.cumsum(-1)
    target = uniform * total[:, -1:]
    choice = torch.searchsorted(total, target).clamp_(max=p.shape[-1] - 1)
    own = p.gather(-1, choice)
    return choice, ((target - total.gather(-1, choice) + own) / own).clamp(0.0, 1.0)


def complete(model: HookedModel, prompt: str, tokens: int = 20, *, prepend_bos: bool | None = None) -> str:
    """The greedy continuation of a prompt, up to `tokens` tokens, the end of the text or that of the context.

    Raises:
        FactError: the prompt has no token, BOS counted, or does not fit the context.
    """
    return completions(model, [prompt], tokens, prepend_bos=prepend_bos)[0]


@torch.no_grad()
def completions(
    model: HookedModel,
    prompts: Sequence[str],
    tokens: int = 20,
    *,
    until: Callable[[str], bool] | None = None,
    prepend_bos: bool | None = None,
) -> list[str]:
    """`complete` of each prompt; those of one length run together. A text of which `until` holds is long enough."""
    check_list("prompts", prompts)
    bos = resolve_bos(model, prepend_bos)
    encoded = [encode(model, prompt, prepend_bos=bos)[0] for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        check_read(model, prompt, ids)
    texts = [""] * len(prompts)
    for length in sorted({len(ids) for ids in encoded}):
        rows = [index for index, ids in enumerate(encoded) if len(ids) == length]
        for begin in range(0, len(rows), GENERATED_ROWS):
            part = rows[begin : begin + GENERATED_ROWS]
            own = [encoded[index] for index in part]
            said = _complete(model, own, min(tokens, int(model.cfg.n_ctx) + 1 - length), until)
            for index, text in zip(part, said, strict=True):
                texts[index] = text
    return texts


def _complete(model: HookedModel, rows: list[list[int]], n: int, until: Callable[[str], bool] | None) -> list[str]:
    """The greedy texts behind rows of one length, each to its end; nothing is computed once all have ended."""
    stepper, end = Stepper(model), model.tokenizer.eos_token_id
    said: list[list[int]] = [[] for _ in rows]
    going = set(range(len(rows)))
    token: Int[Tensor, "rows new"] = torch.tensor(rows, device=device_of(model))
    for _ in range(n):
        token = stepper.next_logits(token).argmax(-1, keepdim=True)
        for row in sorted(going):
            if (found := int(token[row])) == end:
                going.discard(row)
                continue
            said[row].append(found)
            if until is not None and until(decoded(model, said[row], rows[row])):
                going.discard(row)
        if not going:
            break
    return [decoded(model, ids, row) for ids, row in zip(said, rows, strict=True)]


@torch.no_grad()
def continuations(
    model: HookedModel,
    prompts: Sequence[str],
    tokens: int = 100,
    *,
    top_k: int | None = 5,
    seed: int = 0,
    prepend_bos: bool | None = None,
    progress: Progress = silent,
) -> list[str]:
    """Each prompt and a sampled continuation, `tokens` tokens with the prompt's own, or up to the end of the text. What the model is
    told before its prompts is no part of either.

    So the published code generates for GE and RS, unseeded (`top_k` 5, 100 tokens). Prompts of one length run together; what a
    prompt draws depends on the seed and its text alone.

    Raises:
        FactError: a prompt has no token, BOS counted, or it or `tokens` do not fit the context.
        SettingsError: `top_k` tokens are more than there are.
    """
    check_list("prompts", prompts)
    check_top_k(model, top_k)
    bos = resolve_bos(model, prepend_bos)
    read = [encode(model, prompt, prepend_bos=bos) for prompt in prompts]
    encoded, told = [ids for ids, _ in read], [told_tokens(offsets) for _, offsets in read]
    for prompt, ids in zip(prompts, encoded, strict=True):
        check_read(model, prompt, ids)
    check_length(model, max(told, default=0) + tokens + int(bos) - 1)  # the last is not read
    sizes = [(len(ids), before) for ids, before in zip(encoded, told, strict=True)]
    texts, done = list(prompts), 0
    for length, before in sorted(set(sizes)):
        rows = [index for index, size in enumerate(sizes) if size == (length, before)]
        for begin in range(0, len(rows), GENERATED_ROWS):
            progress("generating", done, len(prompts))
            part = rows[begin : begin + GENERATED_ROWS]
            streams = [generator(seed, "continuation", prompts[index]) for index in part]
            said = extended(
                model, [encoded[index] for index in part], before + tokens + int(bos) - length, streams, top_k
            )
            for index, ids in zip(part, said, strict=True):
                texts[index] += decoded(model, ids, encoded[index])
            done += len(part)
    progress("generating", done, len(prompts))
    return texts


@torch.no_grad()
def extended(
    model: HookedModel, rows: list[list[int]], n: int, streams: list[torch.Generator], top_k: int | None
) -> list[list[int]]:
    """The next `n` tokens of rows of ids, of one length, sampled by a generator each; cut at the end of a row's text."""
    stepper, device = Stepper(model), device_of(model)
    token: Int[Tensor, "rows new"] = torch.tensor(rows, device=device)
    said = []
    for _ in range(n):
        uniform = torch.cat([torch.rand(1, 1, generator=stream) for stream in streams]).to(device)
        logits = stepper.next_logits(token)
        parts = zip(logits.split(DRAW_ROWS), uniform.split(DRAW_ROWS), strict=True)
        token = torch.cat([_draw(part.float(), numbers, top_k) for part, numbers in parts])
        said.append(token)
    if not said:
        return [[] for _ in rows]
    end = model.tokenizer.eos_token_id
    whole = torch.cat(said, 1).tolist()
    return [ids[: ids.index(end)] if end in ids else ids for ids in whole]
