"""How fast is C summed?  python -m experiments.benchmark_moments   -> figures/MODEL/benchmark_moments.json

Keys a second of C's sums, and of the bare forward pass to its layer over the same batches, in turn; the median of
`repeats` such pairs' ratios.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from experiments.common import parse, say, write
from mechedit import models, moments
from mechedit.editors import rome
from mechedit.moments.corpus import BATCH_TOKENS
from mechedit.settings import MomentSettings


@dataclass(frozen=True)
class BenchmarkMoments:
    """Settings of the benchmark."""

    model: str = "gemma-3-270m"
    keys: int = 8192
    repeats: int = 15
    threads: int = 2


def main(settings: BenchmarkMoments) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    layer = rome.resolve(model).layer
    wanted = MomentSettings(tokens=settings.keys, prepend_bos=True)
    rows, keys = BATCH_TOKENS // wanted.context, wanted.context - 1
    ids = torch.randint(int(model.cfg.d_vocab), (rows, wanted.context), generator=torch.Generator().manual_seed(0))
    batches = [(rows * keys, lambda: ids)] * (settings.keys // (rows * keys))
    rates: dict[str, list[float]] = {"moments": [], "bare": []}
    for repeat in range(-1, settings.repeats):  # the first warms up
        for way, found in rates.items():
            began = time.perf_counter()
            if way == "moments":
                moments.accumulate(model, [layer], iter(batches), wanted)
            else:
                with torch.no_grad():
                    for _, make in batches:
                        model(make(), stop_at_layer=layer + 1)
            if repeat >= 0:
                found.append(len(batches) * rows * keys / (time.perf_counter() - began))
    ratio = statistics.median(mine / bare for mine, bare in zip(rates["moments"], rates["bare"], strict=True))
    result = {"layer": layer, "keys_a_second": rates, "moments_over_bare": ratio}
    say(f"C of layer {layer}: {ratio:.2f} of a bare forward pass's rate")
    say(f"wrote {write('benchmark_moments', model, settings, result)}")


if __name__ == "__main__":
    main(parse(BenchmarkMoments))
