"""Scoring records: mechedit against one prompt at a time with full logits.  python -m experiments.benchmark_scoring

COUNTERFACT's scores of built-in facts (prompt, paraphrases, neighbours, both targets) on the model as it is: one forward pass of
the hooked model for each prompt with each target, all logits made and log-softmaxed, as a plain script does; and
`counterfact.scores`. Both give the same numbers, which is checked. Peak memory is measured with few and with many records, each in
a process of its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from experiments.common import parse, say, write
from mechedit import models, sources
from mechedit.benchmarks import counterfact
from mechedit.benchmarks.metrics import Pair, rewrite_scores
from mechedit.facts import Fact


@dataclass(frozen=True)
class BenchmarkScoring:
    """Settings of the experiment."""

    model: str = "gemma-3-270m"
    records: int = 20
    times: int = 3
    many: int = 10  # times as many records, for memory
    threads: int = 2
    way: str = ""  # of a process that measures memory


@torch.no_grad()
def plainly(model: models.HookedModel, fact: Fact) -> dict[str, float]:
    """The scores by one forward pass a prompt and target."""

    def mean_log_p(prompt: str, target: str) -> float:
        ids, whole = model.to_tokens(prompt), model.to_tokens(f"{prompt} {target}")
        log_p = model(whole).log_softmax(-1)[0, :-1].gather(1, whole[0, 1:, None])[:, 0]
        return float(log_p[ids.shape[1] - 1 :].mean())

    asked = (fact.prompt, *fact.paraphrases, *fact.neighbours)
    pairs = [Pair(mean_log_p(each, str(fact.target_new)), mean_log_p(each, str(fact.target_true))) for each in asked]
    n = 1 + len(fact.paraphrases)
    return rewrite_scores(pairs[0], pairs[1:n], pairs[n:])


def peak(settings: BenchmarkScoring, records: int) -> float:
    """Gigabytes that a process holds at most which scores so many records."""
    command = [
        sys.executable,
        "-m",
        "experiments.benchmark_scoring",
        "--model",
        settings.model,
        "--records",
        str(records),
    ]
    done = subprocess.run([*command, "--threads", str(settings.threads), "--way", "memory"], capture_output=True, text=True, check=True)  # fmt: skip
    return float(json.loads(done.stdout.splitlines()[-1])["gigabytes"])


def main(settings: BenchmarkScoring) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    every = sources.named("organism" if settings.model == "organism" else "built-in")
    chosen = [each for each in every if each.paraphrases and each.neighbours and each.target_new][: settings.records]
    if settings.way == "memory":
        counterfact.scores(model, chosen)
        unit = 1 if sys.platform == "darwin" else 1024
        sys.stdout.write(
            json.dumps({"gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}) + "\n"
        )
        return
    counterfact.scores(model, chosen[:1])
    seconds: dict[str, list[float]] = {"plain": [], "mechedit": []}
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(settings.times):
        began = time.perf_counter()
        found["plain"] = [plainly(model, fact) for fact in chosen]
        seconds["plain"].append(time.perf_counter() - began)
        began = time.perf_counter()
        found["mechedit"] = counterfact.scores(model, chosen)
        seconds["mechedit"].append(time.perf_counter() - began)
    differences = [abs(one[name] - other[name]) for one, other in zip(found["plain"], found["mechedit"], strict=True) for name in one]  # fmt: skip
    median = {way: float(np.median(each)) for way, each in seconds.items()}
    result: dict[str, Any] = {
        "prompts": sum(2 * (1 + len(each.paraphrases) + len(each.neighbours)) for each in chosen),
        "seconds": seconds,
        "median": median,
        "times_as_quick": median["plain"] / median["mechedit"],
        "largest_difference": max(differences),
        "peak_gigabytes": {str(n): peak(settings, n) for n in (settings.records, settings.many * settings.records)},
    }
    say(json.dumps({name: value for name, value in result.items() if name != "seconds"}))
    say(f"wrote {write('benchmark_scoring', model, settings, result)}")


if __name__ == "__main__":
    main(parse(BenchmarkScoring))
