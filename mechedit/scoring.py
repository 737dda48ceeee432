"""How probable a model finds given continuations of given prompts: many at once, unembedding only what is asked."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.errors import check_list
from mechedit.facts import FactError
from mechedit.models import Blocks, HookedModel, check_finite, device_of
from mechedit.prompts import check_length, check_read, decoded, encode, joined, own_tokens, pad, resolve_bos

__all__ = ["Score", "kl", "log_p", "mean_log_p", "score", "score_and_states", "top"]

ROW_TOKENS = 4096
KL_ROWS = 4  # whose whole distributions are held at once


@dataclass(frozen=True)
class Score:
    """Log-probabilities of a target's tokens, each given the prompt and the tokens before it (natural logarithm), and whether
    the token is the one that greedy decoding takes there (of equally probable ones the first).

    A model that is broken, whose logits are no numbers, gives every token the probability 0."""

    log_p: tuple[float, ...]
    first: tuple[bool, ...]

    @property
    def p(self) -> float:
        """The probability of the whole target."""
        return float(torch.tensor(self.log_p, dtype=torch.float64).sum().exp())

    @property
    def mean_log_p(self) -> float:
        """The mean over tokens, by which COUNTERFACT compares targets of different lengths."""
        return sum(self.log_p) / len(self.log_p)


@torch.no_grad()
def score(model: HookedModel, pairs: Sequence[tuple[str, ...]], *, prepend_bos: bool | None = None) -> list[Score]:
    """A score for each (prompt, target), in order; joined by `writing.seam`, otherwise where a third text says so (`Fact.join`).

    Raises:
        FactError: an empty target, no prompt and no BOS either, or a text that does not fit the context.
    """
    return _score(model, pairs, prepend_bos)


@torch.no_grad()
def score_and_states(
    model: HookedModel, pairs: Sequence[tuple[str, ...]], *, prepend_bos: bool | None = None
) -> tuple[list[Score], Float[Tensor, "pairs d_model"]]:
    """`score`, and for each pair the residual stream that leaves the last block at the prompt's last token, on the CPU."""
    states: dict[int, Tensor] = {}
    scores = _score(model, pairs, prepend_bos, states)
    return scores, torch.stack([states[index] for index in range(len(pairs))])


@torch.no_grad()
def kl(
    model: HookedModel, states: Float[Tensor, "rows d_model"], others: Float[Tensor, "rows d_model"]
) -> Float[Tensor, " rows"]:
    """KL(P || Q) in nats of next-token distributions, P of `states` and Q of `others`, residual streams that leave the last block."""
    blocks, device, found = Blocks(model), device_of(model), []
    for part, other in zip(states.split(KL_ROWS), others.split(KL_ROWS), strict=True):
        P, Q = (blocks.logits(each.to(device)).float().log_softmax(-1) for each in (part, other))
        found.append((P.exp() * (P - Q)).sum(-1))
    return torch.cat(found)


def _score(
    model: HookedModel,
    pairs: Sequence[tuple[str, ...]],
    prepend_bos: bool | None,
    states: dict[int, Tensor] | None = None,
) -> list[Score]:
    """Of `score`; the state at the end of each pair's prompt is put into `states`, where there is such."""
    check_list("pairs", pairs)
    bos = resolve_bos(model, prepend_bos)
    pairs_of_ids, known = [], dict[str, list[int]]()
    for prompt, answer, *how in pairs:
        pairs_of_ids.append(joined(model, prompt, answer, *how, prepend_bos=bos, known=known))
        if not pairs_of_ids[-1][0]:
            raise FactError(f"a prompt must have a token for {answer!r} to follow; without BOS, {prompt!r} has none.")
        check_length(model, sum(map(len, pairs_of_ids[-1])) - 1)  # the last is not read
    # a row is what the model reads; many need but the beginning of another's, under causal attention the same thing
    needed = sorted({(*ids, *target[:-1]) for ids, target in pairs_of_ids})
    kept = [row for row, after in zip(needed, [*needed[1:], ()], strict=False) if after[: len(row)] != row]
    asked: dict[tuple[int, ...], list[int]] = {}
    for index, (ids, target) in enumerate(pairs_of_ids):
        asked.setdefault(kept[bisect_left(kept, (*ids, *target[:-1]))], []).append(index)
    found: dict[int, Score] = {}
    by_length = sorted(asked, key=len)
    while by_length:
        size = max(1, ROW_TOKENS // len(by_length[-1]))
        batch, by_length = by_length[-size:], by_length[:-size]
        found |= _batch(
            model,
            batch,
            [(row, index, *pairs_of_ids[index]) for row, text in enumerate(batch) for index in asked[text]],
            states,
        )
    return [found[index] for index in range(len(pairs))]


def _batch(
    model: HookedModel,
    texts: list[tuple[int, ...]],
    pairs: list[tuple[int, int, list[int], list[int]]],
    states: dict[int, Tensor] | None = None,
) -> dict[int, Score]:
    """Scores by index of the pairs (row of `texts`, index, prompt's ids, target's ids). Each position is unembedded once."""
    blocks = Blocks(model)
    resid = blocks.final(pad(model, [list(text) for text in texts]))
    if states is not None:
        states.update({index: resid[row, len(ids) - 1].to("cpu", copy=True) for row, index, ids, _ in pairs})
    reads: dict[tuple[int, int], list[int]] = {}  # row and position: the tokens that are asked for there
    for row, _, ids, target in pairs:
        for step, token in enumerate(target):
            reads.setdefault((row, len(ids) - 1 + step), []).append(token)
    places = torch.tensor(list(reads), device=resid.device)
    width = max(map(len, reads.values()))
    wanted = torch.tensor(
        [tokens + tokens[:1] * (width - len(tokens)) for tokens in reads.values()], device=resid.device
    )
    log_p, first = blocks.log_p_and_top(resid[places[:, 0], places[:, 1]], wanted)
    check_finite(model, log_p)
    at = {
        (place, token): (own, token == top)
        for place, tokens, row_p, top in zip(
            reads, reads.values(), _numbers(log_p).tolist(), first.tolist(), strict=True
        )
        for token, own in zip(tokens, row_p, strict=False)
    }
    scores = {}
    for row, index, ids, target in pairs:
        values = [at[(row, len(ids) - 1 + step), token] for step, token in enumerate(target)]
        scores[index] = Score(tuple(p for p, _ in values), tuple(first for _, first in values))
    return scores


def _numbers(log_p: Float[Tensor, "places targets"]) -> Float[Tensor, "places targets"]:
    return log_p.masked_fill(log_p.isnan(), -torch.inf)


@torch.no_grad()
def mean_log_p(model: HookedModel, text: str, tokens: int = 512, *, prepend_bos: bool | None = None) -> float:
    """The mean of `log_p`; exp(-mean_log_p) is the perplexity."""
    return float(torch.tensor(log_p(model, text, tokens, prepend_bos=prepend_bos), dtype=torch.float64).mean())


@torch.no_grad()
def log_p(model: HookedModel, text: str, tokens: int = 512, *, prepend_bos: bool | None = None) -> list[float]:
    """Log-probabilities of a text's first `tokens` tokens (or as many as fit) but the first, each after those before it.

    What the model is told (`Edit.told`) is read before them, and has none itself.

    Raises:
        FactError: the text has fewer than two tokens (BOS counted), or does not fit behind what the model is told.
    """
    ids, told = own_tokens(model, text, prepend_bos=resolve_bos(model, prepend_bos))
    if len(ids) < told + 2:
        raise FactError(f"a text must have two tokens or more, as the first has no log-probability; found {text!r}.")
    check_length(model, told + 2)
    row = pad(model, [ids[: min(tokens + told, int(model.cfg.n_ctx))]])
    blocks = Blocks(model)
    return blocks.log_p(blocks.final(row)[0, told:-1], row[0, told + 1 :, None])[:, 0].tolist()


@torch.no_grad()
def top(
    model: HookedModel, prompt: str, k: int = 5, *, prepend_bos: bool | None = None
) -> list[tuple[str, int, float]]:
    """The k most probable next tokens: text, id and probability."""
    ids, _ = encode(model, prompt, prepend_bos=resolve_bos(model, prepend_bos))
    check_read(model, prompt, ids)
    blocks = Blocks(model)
    values, tokens = blocks.logits(blocks.final(pad(model, [ids]))[:, -1]).float().softmax(-1)[0].topk(k)
    return [
        (decoded(model, [token]), token, value) for token, value in zip(tokens.tolist(), values.tolist(), strict=True)
    ]
