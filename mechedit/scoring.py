"""How probable a model finds given continuations of given prompts: many at once, unembedding only what is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mechedit.models import Blocks, HookedModel
from mechedit.prompts import check_length, continuation, encode, pad, resolve_bos

__all__ = ["Score", "mean_log_p", "score", "top"]

ROW_TOKENS = 4096


@dataclass(frozen=True)
class Score:
    """Log-probabilities of a target's tokens, each given the prompt and the tokens before it (natural logarithm), and whether
    the token is the most probable one there."""

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
def score(model: HookedModel, pairs: Sequence[tuple[str, str]], *, prepend_bos: bool | None = None) -> list[Score]:
    """A score for each (prompt, target), in order.

    Raises:
        FactError: an empty target, or a text that does not fit the context.
    """
    bos = resolve_bos(model, prepend_bos)
    rows = []
    for prompt, target in pairs:
        ids, _ = encode(model, prompt, prepend_bos=bos)
        rows.append((ids, continuation(model, prompt, target)))
        check_length(model, len(ids) + len(rows[-1][1]))
    found: list[Score | None] = [None] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index][0]) + len(rows[index][1]))
    while by_length:
        widest = len(rows[by_length[-1]][0]) + len(rows[by_length[-1]][1])
        batch, by_length = by_length[-max(1, ROW_TOKENS // widest) :], by_length[: -max(1, ROW_TOKENS // widest)]
        for index, each in zip(batch, _batch(model, [rows[index] for index in batch]), strict=True):
            found[index] = each
    return [each for each in found if each is not None]


def _batch(model: HookedModel, rows: list[tuple[list[int], list[int]]]) -> list[Score]:
    blocks = Blocks(model)
    resid = blocks.final(pad(model, [ids + target[:-1] for ids, target in rows]))
    row = torch.tensor([index for index, (_, target) in enumerate(rows) for _ in target], device=resid.device)
    position = torch.tensor(
        [len(ids) - 1 + step for ids, target in rows for step in range(len(target))], device=resid.device
    )
    wanted = torch.tensor([[token] for _, target in rows for token in target], device=resid.device)
    log_p, highest = blocks.log_p_and_highest(resid[row, position], wanted)
    values, first = log_p[:, 0].tolist(), (log_p[:, 0] == highest).tolist()
    scores, at = [], 0
    for _, target in rows:
        own = slice(at, at + len(target))
        scores.append(Score(tuple(values[own]), tuple(first[own])))
        at = own.stop
    return scores


@torch.no_grad()
def mean_log_p(model: HookedModel, text: str, tokens: int = 512, *, prepend_bos: bool | None = None) -> float:
    """The mean log-probability of a text's first `tokens` tokens (or as many as fit), each after those before it.

    exp(-mean_log_p) is the perplexity.
    """
    ids, _ = encode(model, text, prepend_bos=resolve_bos(model, prepend_bos))
    row = pad(model, [ids[: min(tokens, int(model.cfg.n_ctx))]])
    blocks = Blocks(model)
    return float(blocks.log_p(blocks.final(row)[0, :-1], row[0, 1:, None]).double().mean())


@torch.no_grad()
def top(
    model: HookedModel, prompt: str, k: int = 5, *, prepend_bos: bool | None = None
) -> list[tuple[str, int, float]]:
    """The k most probable next tokens: text, id and probability."""
    ids, _ = encode(model, prompt, prepend_bos=resolve_bos(model, prepend_bos))
    check_length(model, len(ids))
    blocks = Blocks(model)
    values, tokens = blocks.logits(blocks.final(pad(model, [ids]))[:, -1]).float().softmax(-1)[0].topk(k)
    return [
        (str(model.tokenizer.decode([token])), token, value)
        for token, value in zip(tokens.tolist(), values.tolist(), strict=True)
    ]
