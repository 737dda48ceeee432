"""What an evaluation looks at before it computes anything: its records, its settings, its folder's stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mechedit import prompts
from mechedit.benchmarks import texts
from mechedit.benchmarks.benchmark import Benchmark, of
from mechedit.errors import ManyMistakes
from mechedit.facts import Fact, FactError
from mechedit.generation import check_top_k
from mechedit.models import HookedModel
from mechedit.records import listed
from mechedit.runs.scored import record_unit
from mechedit.runs.store import PLAN, plan
from mechedit.settings import EvaluateSettings, SettingsError

__all__ = ["about", "announce", "check_generation", "check_records", "check_sampled", "contradictions", "doubts"]


def check_records(records: Sequence[Any], benchmark: Benchmark | None = None) -> Benchmark:
    """The benchmark of these records (theirs, where none is named), if they can be evaluated. All mistakes are named.

    Raises:
        FactError: no records, records of another benchmark, two that are the same, or some that lack what scores need.
    """
    if not records:
        raise FactError("an evaluation needs one or more records.")
    benchmark = benchmark or of(records)
    if strange := [record for record in records if not benchmark.takes(record)]:
        raise FactError(
            f"{len(strange)} of these {len(records)} records are none of {benchmark.name}; the first: {strange[0]!r}."
        )
    names = [f"record {benchmark.fact(record).id or index}" for index, record in enumerate(records)]
    seen: dict[str, int] = {}
    wrong = []
    for index, (name, record) in enumerate(zip(names, records, strict=True)):
        if missing := benchmark.lacks(record):
            wrong.append(f"{name}, about {benchmark.fact(record).subject!r}, lacks {missing}.")
        if (first := seen.setdefault(record_unit(record, benchmark), index)) != index:
            wrong.append(f"{name} says what {names[first]} says; give each once.")
    if wrong:
        raise ManyMistakes(listed(wrong))
    return benchmark


def check_generation(model: HookedModel, settings: EvaluateSettings) -> None:
    """Raise where texts cannot be generated, or not be measured."""
    if not settings.generate:
        return
    texts.words("")  # needs the extra `evaluate`
    check_sampled(model, settings.tokens, settings.top_k)


def check_sampled(model: HookedModel, tokens: int, top_k: int) -> None:
    """Raise where texts of so many tokens do not fit the model's context, or it has fewer tokens to choose among at each step."""
    check_top_k(model, top_k)
    if tokens > (limit := int(model.cfg.n_ctx)):
        raise SettingsError(
            f"generated texts must fit the context of {limit} tokens of {model.cfg.model_name}; found {tokens}. Give fewer tokens (--tokens)."
        )


def announce(records: Sequence[Any], benchmark: Benchmark, *stages: Path) -> None:
    """Note folders of stages to come, so that `status` counts them before they begin."""
    for place in stages:
        if not (place / PLAN).exists():
            plan(place, place, [record_unit(record, benchmark) for record in records])


def doubts(model: HookedModel, fact: Fact, bos: bool) -> list[str]:
    """What may be a mistake in a record; of one that cannot be read by the model its scores say why, whatever that is."""
    try:
        return prompts.doubts(model, fact, prepend_bos=bos)
    except Exception:  # whatever it is, one record ends no run
        return []


def contradictions(facts: Sequence[Fact]) -> list[list[str]]:
    """Of each fact, which others give its prompt another new target: edited together or in sequence, not all can be kept."""
    by_prompt: dict[str, dict[str, list[str]]] = {}
    for index, fact in enumerate(facts):
        by_prompt.setdefault(fact.prompt, {}).setdefault(str(fact.target_new), []).append(fact.id or str(index))
    return [
        [
            f"it contradicts record {', '.join(names)}, by which {fact.prompt!r} is to become {target!r}"
            for target, names in by_prompt[fact.prompt].items()
            if target != str(fact.target_new)
        ]
        for fact in facts
    ]


def about(fact: Fact, index: int, reason: str) -> dict[str, Any]:
    """Whom a row of results is about."""
    return {
        "id": fact.id or str(index),
        "subject": fact.subject,
        "prompt": fact.prompt,
        "target_true": fact.target_true,
        "target_new": fact.target_new,
        "relation": fact.relation,
        "reason": reason,
    }
