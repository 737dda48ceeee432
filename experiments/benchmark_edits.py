"""What writing an edit costs beside the write itself, at GPT-2 XL's shape.  python -m experiments.benchmark_edits

The write itself: save W_out, add one outer product in float64, round, write, and put the saved values back. Beside it, in the same run
and in turn: `applying.edited`, which also checks that the edit was found on exactly these weights, and keeps the model's identity; and
what an identity costs the first time, and every time after. The weights are random.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.common import parse, say, write
from mechedit import applying, models, provenance, weights
from mechedit.edits import Edit, Measured
from mechedit.rank_one import RankOneEdit
from mechedit.weights import Weight
from tests.conftest import make_random_gpt2


@dataclass(frozen=True)
class BenchmarkEdits:
    """Settings of the experiment."""

    layers: int = 48
    heads: int = 25
    width: int = 1600
    layer: int = 17
    repeats: int = 30
    threads: int = 2


def timed(body: Callable[[], object]) -> float:
    """Milliseconds that the body takes."""
    began = time.perf_counter()
    body()
    return 1000 * (time.perf_counter() - began)


def main(settings: BenchmarkEdits) -> None:
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = models.load(
            str(make_random_gpt2(Path(folder) / "random-gpt2-xl", settings.layers, settings.heads, settings.width))
        )
    first = timed(lambda: models.identity(model))
    weight = Weight(settings.layer, "mlp.W_out")
    rows, columns = weights.matrix_shape(model, weight)
    stream = torch.Generator().manual_seed(0)
    change = RankOneEdit(settings.layer, *(0.01 * torch.randn(n, generator=stream).double() for n in (rows, columns)))
    fact = Measured({"subject": "", "prompt": ""}, {}, {})
    edit = Edit("none", (change,), (fact,), {}, provenance.origin(model), {}, {}, 0.0)

    def plainly() -> None:
        with weights.restored(model, weight) as saved:
            weights.write_(model, weight, saved[weight], change.dense())

    def edited() -> None:
        with applying.edited(model, edit):
            pass

    ways = {"the write itself": plainly, "with edited(...)": edited, "identity, known": lambda: models.identity(model)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(settings.repeats + 3):
        for name, body in ways.items():
            spent = timed(body)
            if repeat >= 3:
                times[name].append(spent)
    median = {name: statistics.median(each) for name, each in times.items()}
    beside = statistics.median(b - a for a, b in zip(times["the write itself"], times["with edited(...)"], strict=True))
    result = {"milliseconds": median, "identity, first": first, "edited beside the write": beside}
    say(", ".join(f"{name} {each:.2f} ms" for name, each in median.items()) + f"; identity the first time {first:.0f} ms; edited beside the write {beside:.2f} ms")  # fmt: skip
    say(f"wrote {write('benchmark_edits', model, settings, result)}")


if __name__ == "__main__":
    main(parse(BenchmarkEdits))
