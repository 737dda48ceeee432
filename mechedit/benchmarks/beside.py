"""What an edit does beside the fact, whatever the benchmark: at neighbours behind the new fact, at the subject's other relations, and
to the next token at neighbours.

N+, NM+       NS and NM after "<prompt> <new target>. <neighbour>" (CounterFact+, Hoelscher-Obermaier et al. 2023; DNS of "Over-Attention",
              arXiv 2502.14838, puts the same sentence before the same prompt)
SR            of facts with the same subject and another relation, the share whose own answer is more probable than the new target
              (RS there); those whose answer is the new target are left out
drift         mean over neighbours of KL(P_after || P_before) = sum_t P_after(t) (log P_after(t) - log P_before(t)) of the next token
drift_log_p   mean over neighbours of log P_after(answer) - log P_before(answer), of the neighbour's whole own answer

An edit changes weights of blocks alone, so what the unedited model says is kept as its last residual states [neighbours, d_model].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mechedit import writing
from mechedit.benchmarks.benchmark import Said
from mechedit.benchmarks.metrics import Pair, magnitude, success
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.scoring import kl, score, score_and_states

__all__ = ["Near", "beside", "drift", "near", "stated"]


@dataclass(frozen=True, eq=False)
class Near:
    """What a model says at a fact's neighbours: the last residual state at the end of each prompt, and log P of its own answer."""

    states: Float[Tensor, "neighbours d_model"]
    log_p: tuple[float, ...]


def near(model: HookedModel, fact: Fact, *, prepend_bos: bool | None = None) -> Near | None:
    """Of the model as it is now; None where the fact has no neighbours with answers.

    Raises:
        FactError: a neighbour that does not fit the context.
    """
    pairs = [(prompt, own, fact.join) for prompt, own in fact.neighbourhood if own]
    if not pairs:
        return None
    scores, states = score_and_states(model, pairs, prepend_bos=prepend_bos)
    return Near(states, tuple(sum(each.log_p) for each in scores))


def drift(model: HookedModel, fact: Fact, before: Near, *, prepend_bos: bool | None = None) -> dict[str, float]:
    """drift and drift_log_p of the model as it is now, from what it was before; nan where it is broken."""
    now = near(model, fact, prepend_bos=prepend_bos)
    assert now is not None
    found = kl(model, now.states, before.states).clamp(min=0.0).mean()  # rounding apart it is never negative
    moved = [after - was for after, was in zip(now.log_p, before.log_p, strict=True)]
    numbers = {"drift": float(found), "drift_log_p": sum(moved) / len(moved)}
    return {name: value if math.isfinite(value) else math.nan for name, value in numbers.items()}


def stated(fact: Fact, target: str) -> str:
    """A fact as a sentence, with its full stop."""
    said = "".join(writing.seam(fact.prompt, target, fact.join))
    if said[-1] in ".!?。！？":
        return said
    return said + ("。" if writing.is_spaceless(said[-1]) else ".")


def beside(
    model: HookedModel, fact: Fact, *, prepend_bos: bool | None = None
) -> tuple[dict[str, float], tuple[Said, ...]]:
    """N+, NM+ and SR of the model as it is now, those that the fact has prompts for, and what they are made of.

    Raises:
        FactError: a prompt that does not fit the context.
    """
    new = str(fact.target_new)
    sentence = stated(fact, new)
    asked = [("behind the new fact", "".join(writing.seam(sentence, prompt)), own) for prompt, own in fact.neighbourhood if own]  # fmt: skip
    others = zip(fact.same_subject, fact.same_subject_answers, strict=True)
    asked += [("same subject", prompt, own) for prompt, own in others if not writing.same(own, new)]
    found: dict[str, list[Pair]] = {}
    said: list[Said] = []
    for kind in dict.fromkeys(kind for kind, *_ in asked):  # rows of a kind are about as long
        own = [(prompt, answer) for other, prompt, answer in asked if other == kind]
        pairs, each = _scored(model, kind, own, new, fact.join, prepend_bos)
        found[kind] = pairs
        said += each
    numbers: dict[str, float] = {}
    if near := found.get("behind the new fact"):
        numbers |= {"N+": success(near), "NM+": magnitude(near)}
    if same := found.get("same subject"):
        numbers["SR"] = success(same)
    return numbers, tuple(said)


def _scored(
    model: HookedModel, kind: str, asked: Sequence[tuple[str, str]], new: str, join: str, bos: bool | None
) -> tuple[list[Pair], list[Said]]:
    """After each prompt the new target's log-probability a token in the true one's place, and that of its own answer."""
    pairs = [(prompt, target, join) for prompt, own in asked for target in (new, own)]
    scores = score(model, pairs, prepend_bos=bos)
    said = [Said(kind, prompt, target, each.log_p, each.first) for (prompt, target, _), each in zip(pairs, scores, strict=True)]  # fmt: skip
    own = zip(scores[::2], scores[1::2], strict=True)
    return [Pair(new=true.mean_log_p, true=target.mean_log_p) for target, true in own], said
