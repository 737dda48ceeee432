"""A fact made ready to run: its tokens, its answer, the embeddings of its corrupted runs, and what is read in each run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor

from mechedit import corruption, models, prompts
from mechedit.corruption import Family, Statistics
from mechedit.facts import Fact, FactError, check_fact
from mechedit.models import HookedModel, device_of
from mechedit.prompts import Prompt
from mechedit.settings import TraceSettings
from mechedit.tracing import measures
from mechedit.tracing.baseline import Job, Read
from mechedit.tracing.cells import Cell

__all__ = ["Prepared", "blanks_of", "check", "instead", "prepare"]

MOST_BLANKS = 4  # tokens of an answer of the model's own, where it begins with blanks


def check(model: HookedModel, fact: Fact, settings: TraceSettings) -> Prompt:
    """The fact's prompt, where a trace with these settings has something to measure; the model is not run.

    Raises:
        FactError: the prompt does not fit the model, or the measure not the fact.
    """
    check_fact(fact)
    prompt, measure = prompts.prepare(model, fact, prepend_bos=settings.prepend_bos), measures.of(settings)
    if fact.target_true:
        answer = tuple(prompts.continuation(model, fact.prompt, fact.target_true, fact.join))
        prompts.check_length(model, len(prompt.ids) + len(measure.given(answer, blanks_of(model, answer))))
        if measure.against:
            _other_answer(model, fact, answer)
    elif measure.against and not fact.target_new:
        _other_answer(model, fact, ())  # raises
    return prompt


@dataclass(frozen=True, eq=False)
class Prepared:
    """A fact made ready to run: its tokens, answer, the embeddings of its corrupted runs, and what is read."""

    fact: Fact
    prompt: Prompt
    answer_ids: tuple[int, ...]
    ids: tuple[int, ...]
    corrupted: Float[Tensor, "draws pos d_model"]
    noise_std: float
    corrupted_by: str
    reads: tuple[Read, ...]
    settings: TraceSettings
    blanks: int = 0  # tokens at the answer's beginning that are passed over
    asked: int | None = None  # the position after which what the model says first is compared with a given answer

    def job(self, cells: Sequence[Cell], held_shift: int = 0) -> Job:
        """A sweep of these cells."""
        return Job(self.ids, self.corrupted, self.reads, tuple(cells), held_shift, asked=self.asked)

    def instead(self, model: HookedModel, first: tuple[int, float] | None) -> tuple[str, float] | None:
        """What the clean run says first in place of a given answer, and its P; None where it says that answer."""
        if self.asked is None or first is None or first[0] == self.answer_ids[self.asked - len(self.prompt.ids) + 1]:
            return None
        return prompts.decoded(model, [first[0]]), first[1]


def prepare(
    model: HookedModel,
    fact: Fact,
    settings: TraceSettings,
    *,
    family: Family | None = None,
    statistics: Statistics | None = None,
    other: str | None = None,
) -> Prepared:
    """The fact as tokens and corrupted embeddings, with the reads that `settings.measure` needs.

    Raises:
        FactError: the prompt does not fit the model, or the measure not the fact.
        CorruptionError: a corruption that cannot be made.
    """
    prompt, measure = check(model, fact, settings), measures.of(settings)
    answer = _answer(model, fact, prompt)
    blanks = 0 if measure.whole else blanks_of(model, answer)
    second = _other_answer(model, fact, answer) if measure.against else ()
    statistics = statistics or corruption.needed(model, settings)
    corrupted, _ = corruption.corrupt(model, fact, prompt, settings, statistics=statistics, family=family, other=other)
    std = corruption.drawn_std(model, prompt, settings, corrupted, statistics=statistics, family=family)
    by = corruption.describe(settings, statistics, family, other)
    if given := measure.given(answer, blanks):
        corrupted = _followed(model, corrupted, given)
    reads = measure.reads(len(prompt.ids) - 1, answer, second, blanks)
    asked = len(prompt.ids) - 1 + blanks_of(model, answer) if fact.target_true else None
    return Prepared(fact, prompt, answer, (*prompt.ids, *given), corrupted, std, by, reads, settings, blanks, asked)


def blanks_of(model: HookedModel, answer: Sequence[int]) -> int:
    """How many tokens at an answer's beginning are white space and nothing else; none where all are."""
    solid = (place for place, token in enumerate(answer) if str(model.tokenizer.decode([token])).strip())
    return next(solid, 0)


def _answer(model: HookedModel, fact: Fact, prompt: Prompt) -> tuple[int, ...]:
    """The tokens of the fact's answer; where it has none, the token that the model finds most probable.

    Where that token is blank the model's next ones belong to it, up to the first that is not.
    """
    if fact.target_true:
        return tuple(prompts.continuation(model, fact.prompt, fact.target_true, fact.join))
    said: list[int] = []
    while len(said) < MOST_BLANKS and not str(model.tokenizer.decode(said)).strip():
        said.append(_first(model, (*prompt.ids, *said))[0])
    return tuple(said)


def instead(model: HookedModel, fact: Fact, *, prepend_bos: bool | None = None) -> tuple[str, float] | None:
    """What the model says first where the answer's first token that is not blank would be, and its P; None where that is what it says."""
    if not fact.target_true:
        return None
    prompt = prompts.prepare(model, fact, prepend_bos=prepend_bos)
    answer = prompts.continuation(model, fact.prompt, fact.target_true, fact.join)
    blanks = blanks_of(model, answer)
    first, p = _first(model, (*prompt.ids, *answer[:blanks]))
    return None if first == answer[blanks] else (prompts.decoded(model, [first]), p)


def _other_answer(model: HookedModel, fact: Fact, answer: Sequence[int]) -> tuple[int, ...]:
    """The tokens of the answer that the fact's own is measured against, without those blank ones that both begin with."""
    if not fact.target_new:
        raise FactError("a logit difference needs a second answer: give the fact a `target_new` (--against).")
    other = tuple(prompts.continuation(model, fact.prompt, fact.target_new, fact.join))
    blanks = blanks_of(model, answer)
    own = fact.target_true or str(model.tokenizer.decode(list(answer))).strip()
    if other[:blanks] != tuple(answer[:blanks]) or blanks_of(model, other) != blanks:
        raise FactError(
            f"{own!r} and {fact.target_new!r} do not begin alike after {fact.prompt!r}: a blank token comes first in one of them, so "
            "no one token tells them apart. Take measure p_answer (--measure p_answer) of each."
        )
    if other[blanks] == answer[blanks]:
        raise FactError(f"{own!r} and {fact.target_new!r} begin with the same token, so their logits do not differ.")
    return other[blanks:]


def _followed(
    model: HookedModel, corrupted: Float[Tensor, "draws pos d_model"], ids: Sequence[int]
) -> Float[Tensor, "draws longer d_model"]:
    """The corrupted runs with the clean embeddings of more tokens after them."""
    prompts.check_length(model, corrupted.shape[1] + len(ids))
    tail = models.embed(model, torch.tensor([list(ids)], device=device_of(model))).float().cpu()
    return torch.cat([corrupted, repeat(tail, "1 pos d_model -> draw pos d_model", draw=len(corrupted))], 1)


@torch.no_grad()
def _first(model: HookedModel, ids: tuple[int, ...]) -> tuple[int, float]:
    """The token the model finds most probable next, and its P."""
    tokens: Int[Tensor, "1 pos"] = torch.tensor([list(ids)], device=device_of(model))
    blocks = models.Blocks(model)
    with models.alone(model):
        logits = blocks.logits(blocks.final(tokens)[:, -1])[0].float()
    first = int(logits.argmax())
    return first, float(logits.softmax(-1)[first])
