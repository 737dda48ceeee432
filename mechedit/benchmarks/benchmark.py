"""What a benchmark is: records, the fact that each writes, its scores, and what a row of a table is about.

One from outside is an object of this protocol, named `package.module:object`, or by an entry point in the group
`mechedit.benchmarks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from mechedit.errors import MecheditError
from mechedit.facts import Fact
from mechedit.models import HookedModel

__all__ = ["BUILT_IN", "GROUP", "Benchmark", "BenchmarkError", "Detailed", "Measured", "Said", "named", "of"]

GROUP = "mechedit.benchmarks"
BUILT_IN = {
    "counterfact": "mechedit.benchmarks.counterfact:COUNTERFACT",
    "zsre": "mechedit.benchmarks.zsre:ZSRE",
}


class BenchmarkError(MecheditError, ValueError):
    """A name that is no benchmark's, or records that are none of its."""


class Said(NamedTuple):
    """How probable a target is after one prompt of a record, as JSON values: log-probabilities of its tokens (natural logarithm),
    and whether each is the most probable token there. `kind` says what the prompt is to the record: paraphrase, say."""

    kind: str
    prompt: str
    target: str
    log_p: tuple[float, ...]
    first: tuple[bool, ...]


class Measured(NamedTuple):
    """The numbers of a record, and what they were made of."""

    scores: dict[str, float]
    said: tuple[Said, ...]


@runtime_checkable
class Benchmark(Protocol):
    """A set of records, and how one is scored. Records are dataclasses of JSON values, by which results are kept; of a class from outside also by
    the class's place and, where it has one, its `key`: change that when its scores change."""

    name: str

    def read(self, source: str | Path) -> Sequence[Any]:
        """The records of a file, or of a set that has a name; mistakes in them are errors."""
        ...

    def takes(self, record: Any) -> bool:
        """Whether this is a record of the benchmark."""
        ...

    def fact(self, record: Any) -> Fact:
        """The fact that a record writes."""
        ...

    def lacks(self, record: Any) -> str:
        """What a record lacks that its scores need, in words; empty where it lacks nothing."""
        ...

    def named(self, record: Any, name: str) -> Any:
        """The record with another id, which its scores do not depend on."""
        ...

    def scores(
        self, model: HookedModel, records: Sequence[Any], *, prepend_bos: bool | None = None
    ) -> list[dict[str, float]]:
        """The numbers of each record on the model as it is; every record has the same ones, nan where it has none."""
        ...


@runtime_checkable
class Detailed(Protocol):
    """A benchmark that also tells what its scores are made of, which is kept with them."""

    def measured(
        self, model: HookedModel, records: Sequence[Any], *, prepend_bos: bool | None = None
    ) -> list[Measured]:
        """What `scores` gives, with every prompt's log-probabilities."""
        ...


def named(benchmark: str | Benchmark) -> Benchmark:
    """The benchmark of this name, `package.module:object` among them; a benchmark itself as it is.

    Raises:
        BenchmarkError: there is none, or what there is is no benchmark.
    """
    found: Any = benchmark
    if isinstance(benchmark, str):
        brought = {each.name: each.value for each in entry_points(group=GROUP)}
        module, colon, attribute = (BUILT_IN | brought).get(benchmark, benchmark).partition(":")
        if not colon:
            there = ", ".join([*BUILT_IN, *sorted(brought)])
            raise BenchmarkError(f"no benchmark is called {benchmark!r}; there are {there}, and package.module:object.")
        try:
            found = getattr(import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise BenchmarkError(f"the benchmark {benchmark} cannot be imported: {error}.") from error
    if not isinstance(found, Benchmark):
        raise BenchmarkError(
            f"{benchmark} is no benchmark: it lacks a part of mechedit.benchmarks.benchmark.Benchmark."
        )
    return found


def of(records: Sequence[Any]) -> Benchmark:
    """The built-in benchmark that takes such records; COUNTERFACT where there are none.

    Raises:
        BenchmarkError: none takes all of them.
    """
    for name in BUILT_IN:
        if all((found := named(name)).takes(record) for record in records):
            return found
    kinds = sorted({type(record).__name__ for record in records})
    raise BenchmarkError(
        f"no benchmark of mechedit takes records of {' and '.join(kinds)} together; name the benchmark."
    )
