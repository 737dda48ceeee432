"""How long a run of many small units takes to open, to count and to read again, beside a file a unit.

    python -m experiments.benchmark_store   -> figures/benchmark_store.json

Units are scores of a few numbers, as an evaluation keeps them; no model runs. What is timed is what a user waits for: opening the
run, `status`, and running it again when it is finished, with every unit decoded and without.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.common import FIGURES, parse, say
from mechedit import cache, provenance
from mechedit.runs.engines import Local
from mechedit.runs.scored import Scored, score_store
from mechedit.runs.status import status
from mechedit.runs.store import Store


@dataclass(frozen=True)
class StoreCosts:
    """Settings of the benchmark."""

    units: int = 200_000  # ten editors on COUNTERFACT have 219,190 of each stage
    small: int = 1_000  # written one by one, as in an evaluation


def score(model: Any, unit: str) -> Scored:
    """Numbers like those of a record, which depend on the unit's name."""
    at = int(unit, 16) % 1000 / 1000
    return Scored(dict.fromkeys(("ES", "EM", "PS", "PM", "NS", "NM", "rewrite_acc", "rephrase_acc", "p_new"), at))


def timed(work: Callable[[], Any]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def costs(folder: Path, n: int) -> dict[str, float]:
    """Seconds for a run of `n` units in an empty folder, and for what comes after."""
    units, engine = [f"{index:020x}" for index in range(n)], Local(torch.nn.Identity())  # type: ignore[arg-type]

    def opened() -> Store[Scored]:
        return score_store(folder, {"units": n}, "units")

    def again() -> None:
        opened().run(units, score, engine)

    found = {"first run": timed(again), "opening": timed(opened), "status": timed(lambda: status(folder))}
    found["finished run again"] = timed(again)
    found["finished run again, every unit decoded"] = timed(lambda: list(opened().run(units, score, engine)))
    files = [path for path in folder.rglob("*") if path.is_file()]
    return found | {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}


def main(settings: StoreCosts) -> None:
    with tempfile.TemporaryDirectory() as root:
        found = {str(n): costs(Path(root) / str(n), n) for n in (settings.small, settings.units)}
        files = Path(root) / "files"
        texts = [json.dumps(asdict(score(None, f"{index:020x}"))) for index in range(settings.small)]

        def one_by_one() -> None:
            for index, text in enumerate(texts):
                with cache.atomic_write(files / f"{index}.json") as temporary:
                    temporary.write_text(text)

        found["a file a unit"] = {"units": settings.small, "writing": timed(one_by_one)}
    for name, each in found.items():
        say(f"{name}: {', '.join(f'{what} {value:.3g}' for what, value in each.items())}")
    record = {"settings": asdict(settings), "seconds": found, "versions": provenance.versions()}
    with cache.atomic_write(FIGURES / "benchmark_store.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(parse(StoreCosts))
