"""How often intervals hold the truth: every kind of number that tables have, drawn again and again.  python -m experiments.coverage

Successes; shares of 2 paraphrases and 10 neighbours whose chance differs from fact to fact (beta-binomial, `alike` is the correlation of
one fact's prompts); magnitudes as they are seen, most near 1 and some facts that fail, or most near 0; numbers without bounds, skewed and
heavy-tailed; differences of two conditions over the same facts; S, and its difference. Says the share of samples whose interval holds
the mean they were drawn with, and the mean width. -> figures/coverage.json

With `--records FOLDER`, of an evaluation: samples are drawn with replacement from its records' numbers without bounds, which have heavier
tails than any of these, and whose truth is then the mean of all records. -> figures/coverage_records.json
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import FIGURES, parse, say
from mechedit import cache, provenance, statistics
from mechedit.benchmarks.metrics import harmonic
from mechedit.runs.results import Evaluation
from mechedit.statistics import UNBOUNDED, Mean, Support

RECORDS = ("drift", "drift_log_p", "essence_kl")
SHARE, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)
Sample = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]  # [fact, sample]


@dataclass(frozen=True)
class Coverage:
    """Settings of the experiment."""

    n: tuple[int, ...] = (10, 20, 60, 150, 1000)
    largest: int = 21_919  # all of COUNTERFACT
    samples: int = 3000  # fewer of many facts
    samples_of_s: int = 1000
    draws: int = 2000  # of weights, in each sample; tables have 10,000
    p: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
    seed: int = 0
    records: Path = Path()  # of `mechedit evaluate`
    of_records: tuple[int, ...] = (20, 40, 120)


@dataclass(frozen=True)
class Number:
    """A kind of number: how samples of it are drawn, their true mean, and what bounds it."""

    name: str
    draw: Sample
    truth: float
    support: Support | None


def success(p: float) -> Sample:
    """0 or 1 a fact."""
    return lambda random, shape: random.binomial(1, p, shape).astype(float)


def share(p: float, prompts: int, alike: float) -> Sample:
    """Of a fact's prompts, whose chance is the fact's own."""
    whole = 1 / alike - 1
    return lambda random, shape: random.binomial(prompts, random.beta(p * whole, (1 - p) * whole, shape)) / prompts


def near_one(fails: float) -> Sample:
    """P(new) - P(true) of a good edit: near 1, but for the facts that fail."""

    def draw(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        return np.where(random.random(shape) < fails, random.uniform(-0.6, 0.2, shape), random.beta(8, 0.4, shape))

    return draw


def numbers(settings: Coverage) -> Iterator[Number]:
    """Every kind of number."""
    for p in settings.p:
        yield Number(f"successes, p = {p}", success(p), p, SHARE)
        for prompts, alike in ((2, 0.3), (10, 0.05), (10, 0.3), (10, 0.7)):
            yield Number(f"shares of {prompts}, p = {p}, alike {alike}", share(p, prompts, alike), p, SHARE)
    for fails in (0.02, 0.1, 0.3):
        truth = fails * -0.2 + (1 - fails) * 8 / 8.4
        yield Number(f"magnitudes near 1, {fails} fail", near_one(fails), truth, DIFFERENCE)
    yield Number("magnitudes near 0", lambda random, shape: random.beta(0.3, 3, shape) - random.beta(0.2, 6, shape), 0.3 / 3.3 - 0.2 / 6.2, DIFFERENCE)  # fmt: skip
    yield Number("normal", lambda random, shape: random.normal(1, 1, shape), 1.0, UNBOUNDED)
    yield Number("exponential", lambda random, shape: random.exponential(1, shape), 1.0, UNBOUNDED)
    yield Number("gamma of shape 0.25", lambda random, shape: random.gamma(0.25, 1, shape), 0.25, UNBOUNDED)
    for sigma in (0.5, 1.0):
        yield Number(f"log-normal, sigma {sigma}", lambda random, shape, sigma=sigma: random.lognormal(0, sigma, shape), float(np.exp(sigma**2 / 2)), UNBOUNDED)  # type: ignore[misc]  # fmt: skip
    yield Number("Student's t of 5", lambda random, shape: random.standard_t(5, shape), 0.0, UNBOUNDED)


def pairs(settings: Coverage) -> Iterator[tuple[Number, Number]]:
    """Two conditions of the same facts; the second is drawn from the first's chance of each."""
    for before, after in ((0.8, 0.8), (0.98, 0.95), (0.1, 0.98), (0.99, 0.99)):
        yield Number(f"successes, {before} to {after}", success(before), before, SHARE), Number("", success(after), after, SHARE)  # fmt: skip
        yield Number(f"shares of 10, {before} to {after}", share(before, 10, 0.3), before, SHARE), Number("", share(after, 10, 0.3), after, SHARE)  # fmt: skip


def counted(name: str, n: int, truth: float, means: list[Mean]) -> dict[str, Any]:
    """How many intervals hold the truth, of those there are."""
    low, high = (np.array([getattr(each, end) for each in means]) for end in ("low", "high"))
    there = ~np.isnan(low)
    inside = (low[there] <= truth + 1e-9) & (truth - 1e-9 <= high[there])
    width = float((high - low)[there].mean()) if there.any() else None
    return {"number": name, "n": n, "truth": truth, "intervals": int(there.sum()), "of": len(means), "coverage": float(inside.mean()) if there.any() else None, "width": width}  # fmt: skip


def of_means(settings: Coverage, n: int, samples: int, every: bool) -> Iterator[dict[str, Any]]:
    """Of each kind of number, and of differences. Of the most facts, not every kind."""
    random = np.random.default_rng([settings.seed, n])
    for number in numbers(settings) if every else list(numbers(settings))[1::7]:
        values = number.draw(random, (n, samples))
        yield counted(number.name, n, number.truth, statistics.summaries(values, [number.support] * samples, settings.seed, settings.draws))  # fmt: skip
    for first, second in pairs(settings) if every else list(pairs(settings))[:3]:
        same = random.random((n, samples)) < 0.7  # facts that do not change where the two are alike
        before, after = first.draw(random, (n, samples)), second.draw(random, (n, samples))
        after = np.where(same & (first.truth == second.truth), before, after)
        found = statistics.summaries(after - before, [DIFFERENCE] * samples, settings.seed, settings.draws)
        yield counted(f"difference of {first.name}", n, second.truth - first.truth, found)


def of_harmonic_means(settings: Coverage, n: int, samples: int) -> Iterator[dict[str, Any]]:
    """Of S, and of its difference to an unedited model's."""
    random = np.random.default_rng([settings.seed, n, 1])
    before = (0.2, 0.25, 0.8)
    for edited in ((0.9, 0.8, 0.75), (0.99, 0.98, 0.98), (0.95, 0.5, 0.99)):
        s, more = [], []
        for _ in range(samples):
            after, was = (np.concatenate([success(p[0])(random, (n, 1)), share(p[1], 2, 0.3)(random, (n, 1)), share(p[2], 10, 0.3)(random, (n, 1))], 1) for p in (edited, before))  # fmt: skip
            s.append(statistics.statistic(after, harmonic, settings.seed, draws=settings.draws))
            more.append(
                statistics.statistic(
                    np.concatenate([after, was], 1), gain, settings.seed, falling=(3, 4, 5), draws=settings.draws
                )
            )
        yield counted(f"S of {edited}", n, harmonic(*edited), s)
        yield counted(f"S of {edited} less S of {before}", n, harmonic(*edited) - harmonic(*before), more)


def gain(*means: Any) -> Any:
    """S of the first three less S of the others."""
    return harmonic(*means[:3]) - harmonic(*means[3:])


def drawn_again(settings: Coverage) -> list[dict[str, Any]]:
    """Of numbers without bounds of an evaluation's records, drawn with replacement."""
    evaluation, found = Evaluation.load(settings.records), []
    for name in RECORDS:
        every = np.array([row[name] for row in evaluation.rows["after"] if name in row])
        for n in settings.of_records:
            random = np.random.default_rng([settings.seed, n])
            values = random.choice(every, (n, settings.samples))
            means = statistics.summaries(values, [UNBOUNDED] * settings.samples, settings.seed, settings.draws)
            found.append(counted(name, n, float(every.mean()), means) | {"records": len(every)})
    return found


def main(settings: Coverage) -> None:
    found: list[dict[str, Any]] = []
    if settings.records != Path():
        found = drawn_again(settings)
        written(settings, found, "coverage_records")
        return
    for n in settings.n:
        found += of_means(settings, n, settings.samples if n < 1000 else settings.samples // 2, every=True)
        found += of_harmonic_means(settings, n, settings.samples_of_s if n < 1000 else settings.samples_of_s // 4)
        say(f"n = {n}: {len(found)} kinds, lowest coverage {lowest(found)}")
    if settings.largest:
        found += of_means(settings, settings.largest, settings.samples // 3, every=False)
    written(settings, found, "coverage")


def written(settings: Coverage, found: list[dict[str, Any]], name: str) -> None:
    """Write what was found under figures/."""
    plain = asdict(settings) | {"records": settings.records.name}
    record = {"settings": plain, "versions": provenance.versions(), "lowest": lowest(found), "kinds": found}
    path = FIGURES / f"{name}.json"
    with cache.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    say(f"lowest coverage {lowest(found)}; wrote {path}")


def lowest(found: list[dict[str, Any]]) -> float:
    """Of all kinds."""
    return min(each["coverage"] for each in found if each["coverage"] is not None)


if __name__ == "__main__":
    main(parse(Coverage))
