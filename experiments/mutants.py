"""Would a wrong line be noticed?  make mutants   -> figures/mutants.json

Lines of the core are made wrong, one at a time, and the tests of that module are run until one fails. Which lines, is drawn by a seed, some of each module first,
from all places where an operator, a constant, a condition, an argument or a statement can be made wrong; the eighteen wrong lines in
`mutants_known.json`, which no test noticed once, are always tried. A process that has everything heavy imported forks for each mutant, so
that one takes seconds: mutmut and Cosmic Ray, which start a process or read the whole suite's coverage first, need hours here.

What survives is listed, with its reason where `mutants_survivors.json` gives one (a change that changes nothing that is promised).
"""

from __future__ import annotations

import ast
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from queue import Queue
from typing import Any

from experiments.common import FIGURES, parse, say

ROOT = Path(__file__).parents[1]
TESTS = {
    "rank_one": ("rank_one", "rome"),
    "keys": ("keys", "rome"),
    "values": ("values", "rome"),
    "losses": ("values", "rome"),
    "moments/moment": ("moments",),
    "moments/estimation": ("moments", "packaged_text"),
    "moments/corpus": ("moments", "packaged_text"),
    "moments/merging": ("moments",),
    "weights": ("weights", "applying"),
    "changes": ("changes", "applying"),
    "edits": ("edits",),
    "corruption": ("corruption", "tracing"),
    "tracing/engine": ("tracing_engine", "tracing"),
    "tracing/severing": ("severing",),
    "benchmarks/metrics": ("metrics",),
    "statistics": ("statistics",),
    "scoring": ("metrics", "scored", "generation", "told"),
    "editing": ("editing", "contract", "guards"),
    "runs/evaluating": ("evaluating", "beside"),
    "runs/scored": ("scored", "evaluating", "beside"),
    "runs/shards": ("shards",),
    "runs/store": ("store", "shards"),
}
"""Each module that is mutated, and the tests that answer for it, in the order in which they are run."""

LEAST = 3  # mutants of each module
ARITHMETIC = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "/", ast.Pow: "*", ast.Mod: "*"}
COMPARISON = {ast.Lt: ">=", ast.GtE: "<", ast.Gt: "<=", ast.LtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.In: "not in", ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is"}  # fmt: skip
BOUNDARY = {ast.Lt: "<=", ast.GtE: ">", ast.Gt: ">=", ast.LtE: "<"}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "mean": "sum", "sum": "mean", "argmax": "argmin", "amax": "amin", "sorted": "list", "exp": "abs", "log": "exp"}  # fmt: skip


@dataclass(frozen=True)
class Mutants:
    """Settings of the experiment."""

    n: int = 200  # mutants drawn, besides the known ones
    seed: int = 0
    workers: int = 2
    minutes: float = 40.0  # after which no more are begun
    only: tuple[str, ...] = ("all",)  # or modules of TESTS, and "known"
    name: str = "mutants"  # of the file


@dataclass(frozen=True)
class Mutant:
    """A wrong line: in `module`, the text from `begin` to `end`, in a line that is `text` as a whole, becomes `new`."""

    module: str
    line: int
    kind: str
    old: str
    new: str
    begin: int
    end: int
    text: str
    tests: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What it is, without the line's number, which other changes move."""
        return f"{self.module}: {self.old} -> {self.new}, in {self.text}"


def sites(module: str, source: str) -> Iterator[Mutant]:
    """Every mutant of a module."""
    starts, lines = [0], source.splitlines()
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def mutant(node: Any, kind: str, new: str) -> Mutant:
        begin, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        old = source.encode()[begin:end].decode()
        return Mutant(module, node.lineno, kind, old, new, begin, end, lines[node.lineno - 1].strip())

    for node in _code(ast.parse(source)):
        for kind, new in _changed(node):
            yield mutant(node, kind, new)


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """What is computed: not annotations, decorators, messages, assertions (`strict=True` is one), representations."""
    if isinstance(node, (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr)):
        return
    if isinstance(node, ast.keyword) and node.arg == "strict":
        return
    if isinstance(node, ast.FunctionDef) and node.name in ("__repr__", "__str__"):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "args") and not isinstance(node, ast.Call):
            continue
        if isinstance(node, ast.ClassDef) and name in ("bases", "keywords"):
            continue
        if (
            isinstance(node, ast.AnnAssign)
            and name == "value"
            and value
            and ast.unparse(value).startswith(("field(", "knob("))
        ):
            continue
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, ast.AST):
                yield from _code(each)


def _changed(node: ast.AST) -> Iterator[tuple[str, str]]:
    """The kinds of wrong that a node can be, and its text then."""
    text = ast.unparse
    if isinstance(node, ast.BinOp) and (other := ARITHMETIC.get(type(node.op))) and not _is_text(node):
        yield "arithmetic", f"({text(node.left)} {other} {text(node.right)})"
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        left, right, op = text(node.left), text(node.comparators[0]), type(node.ops[0])
        yield "comparison", f"({left} {COMPARISON[op]} {right})"
        if op in BOUNDARY and any(isinstance(side, ast.Constant) and type(side.value) is int for side in (node.left, *node.comparators)):  # fmt: skip
            yield "boundary", f"({left} {BOUNDARY[op]} {right})"
    elif isinstance(node, ast.BoolOp):
        other = " or " if isinstance(node.op, ast.And) else " and "
        yield "boolean", f"({other.join(f'({text(each)})' for each in node.values)})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield "sign", f"({text(node.operand)})"
    elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        value = node.value
        yield "constant", repr(not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else 2 * value + 1)  # fmt: skip
    elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and "progress" not in text(node.value.func)):  # fmt: skip
        yield "statement", "pass"
    elif isinstance(node, ast.Call):
        yield from _calls(node)


def _calls(node: ast.Call) -> Iterator[tuple[str, str]]:
    """A call with a neighbour's name, without an argument, or with two exchanged."""

    def call(function: str, args: list[ast.expr], keywords: list[ast.keyword]) -> str:
        return f"{function}({', '.join([*map(ast.unparse, args), *(ast.unparse(each) for each in keywords)])})"

    function = ast.unparse(node.func)
    last = function.rsplit(".", 1)[-1]
    if last in NAMES:
        yield "name", call(function[: len(function) - len(last)] + NAMES[last], node.args, node.keywords)
    for keyword in node.keywords:
        if keyword.arg not in ("progress", "strict", "encoding", "key", "device", None):  # tests run on the CPU
            yield "argument", call(function, node.args, [each for each in node.keywords if each is not keyword])
    named = len(node.args) == 2 and all(isinstance(each, (ast.Name, ast.Attribute)) for each in node.args)
    if named and last not in ("isinstance", "issubclass"):
        yield "exchange", call(function, node.args[::-1], node.keywords)


def _is_text(node: ast.BinOp) -> bool:
    return any(isinstance(each, (ast.JoinedStr, ast.Constant)) and not isinstance(getattr(each, "value", None), (int, float)) for each in (node.left, node.right))  # fmt: skip


def known() -> list[Mutant]:
    """The wrong lines of `mutants_known.json`.

    Raises:
        SystemExit: a line that should be made wrong is no longer there, or there twice.
    """
    found = []
    for each in json.loads(Path(__file__).with_name("mutants_known.json").read_text()):
        source = (ROOT / "mechedit" / f"{each['module']}.py").read_text()
        if source.count(each["old"]) != 1:
            raise SystemExit(f"{each['module']}: {each['old']!r} is there {source.count(each['old'])} times; mend mutants_known.json.")  # fmt: skip
        begin = len(source[: source.index(each["old"])].encode())
        line = source[: source.index(each["old"])].count("\n") + 1
        end = begin + len(each["old"].encode())
        text = source.splitlines()[line - 1].strip()
        found.append(Mutant(each["module"], line, "known", each["old"], each["new"], begin, end, text, tuple(each["tests"])))  # fmt: skip
    return found


def drawn(settings: Mutants) -> list[Mutant]:
    """`n` mutants of all modules, or of the one that is named: some of each first, then of all places alike."""
    stream = random.Random(settings.seed)  # noqa: S311 (a sample)
    every = {
        module: list(sites(module, (ROOT / "mechedit" / f"{module}.py").read_text()))
        for module in TESTS
        if "all" in settings.only or module in settings.only
    }
    first = [each for own in every.values() for each in stream.sample(own, min(LEAST, len(own)))][: settings.n]
    rest = [each for own in every.values() for each in own if each not in first]
    return first + stream.sample(rest, min(settings.n - len(first), len(rest)))


def outcome(mutant: Mutant, copy: Path, seconds: float) -> str:
    """`killed`, `survived` or `too long`: what the module's tests say of it, in a copy of the project."""
    path = copy / "mechedit" / f"{mutant.module}.py"
    source = path.read_bytes()
    path.write_bytes(source[: mutant.begin] + mutant.new.encode() + source[mutant.end :])
    try:
        status = _forked(copy, mutant.tests or TESTS[mutant.module], seconds)
    finally:
        path.write_bytes(source)
    return {0: "survived", None: "too long"}.get(status, "killed")


def _forked(copy: Path, tests: tuple[str, ...], seconds: float) -> int | None:
    """pytest's exit status of these tests in a fork of this process; None where it took too long and was stopped: more than
    `seconds` of the processor's time, whatever else the machine does, or ten times as long by the clock."""
    child = os.fork()
    if child == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds)))
        os._exit(_run(copy, tests))
    until = time.monotonic() + 10 * seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return None if code in (-signal.SIGXCPU, -signal.SIGKILL) else code
        time.sleep(0.05)
    os.killpg(child, 9)
    os.waitpid(child, 0)
    return None


def _run(copy: Path, tests: tuple[str, ...]) -> int:
    """Run tests of the copy in this process, in silence."""
    import pytest

    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os.chdir(copy)
    for name in [name for name in sys.modules if name.split(".")[0] in ("mechedit", "experiments", "tests")]:
        del sys.modules[name]
    sys.path.insert(0, str(copy))
    files = [f"tests/test_{test}.py" for test in tests]
    known = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # plugins that were imported with what is heavy
    return int(pytest.main([*files, *known, "-x", "-q", "-m", "not slow and not real", "-p", "no:cacheprovider"]))


def main(settings: Mutants) -> Path:
    """Try the mutants, and write what became of them."""
    _check(settings)
    sys.dont_write_bytecode = True
    for heavy in ("torch", "transformers", "transformer_lens", "pytest", "scipy.stats", "matplotlib.figure", "datasets"):  # fmt: skip
        import_module(heavy)
    import torch

    torch.set_num_threads(1)
    wanted = [*(known() if {"all", "known"} & {*settings.only} else []), *drawn(settings)]
    begin, found = time.monotonic(), dict[Mutant, str]()
    with tempfile.TemporaryDirectory() as place:
        copies: Queue[Path] = Queue()
        for worker in range(settings.workers):
            copies.put(_copied(Path(place) / str(worker)))
        with ThreadPoolExecutor(settings.workers) as pool:
            every = sorted({each.tests or TESTS[each.module] for each in wanted})
            limits = dict(zip(every, pool.map(partial(_limit, copies), every), strict=True))

        def attempt(mutant: Mutant) -> None:
            if time.monotonic() - begin > 60 * settings.minutes:
                return
            copy = copies.get()
            try:
                found[mutant] = outcome(mutant, copy, limits[mutant.tests or TESTS[mutant.module]])
            finally:
                copies.put(copy)
            say(f"{len(found)} of {len(wanted)}: {found[mutant]:9} {mutant.name[:100]!r}")

        with ThreadPoolExecutor(settings.workers) as pool:
            list(pool.map(attempt, wanted))
    return _write(settings, wanted, found, (time.monotonic() - begin) / 60)


def _check(settings: Mutants) -> None:
    """Raise, before anything runs, where tests are named that are not there, or modules that have none."""
    if unknown := [each for each in settings.only if each not in ("all", "known", *TESTS)]:
        raise SystemExit(f"--only must be of all, known, {', '.join(TESTS)}; found {', '.join(unknown)}.")
    named = {test for tests in TESTS.values() for test in tests}
    if missing := sorted(test for test in named if not (ROOT / "tests" / f"test_{test}.py").is_file()):
        raise SystemExit(f"there is no test_{missing[0]}.py in tests; mend TESTS.")


def _copied(place: Path) -> Path:
    """A copy of the project that may be made wrong."""
    ignore = shutil.ignore_patterns(".*", "__pycache__", "figures", "out")
    return Path(shutil.copytree(ROOT, place, ignore=ignore))


def _limit(copies: Queue[Path], tests: tuple[str, ...]) -> float:
    """How many seconds of the processor a set of tests may take: three times what it takes by the clock where nothing is wrong.

    Raises:
        SystemExit: tests fail where nothing is wrong.
    """
    copy, begin = copies.get(), time.monotonic()
    try:
        if status := _forked(copy, tests, 600.0):
            raise SystemExit(
                f"the tests of {', '.join(tests)} end with {status} where nothing is wrong; mend them first."
            )
    finally:
        copies.put(copy)
    return 20 + 3 * (time.monotonic() - begin)


def _write(settings: Mutants, wanted: list[Mutant], found: dict[Mutant, str], minutes: float) -> Path:
    reasons = json.loads(Path(__file__).with_name("mutants_survivors.json").read_text())
    counted = partial(_score, found, reasons)
    result = {
        "settings": asdict(settings),
        "minutes": round(minutes, 1),
        "drawn": counted([each for each in found if each.kind != "known"]),
        "known": counted([each for each in found if each.kind == "known"]),
        "not_tried": len(wanted) - len(found),
        "by_module": {module: counted([each for each in found if each.module == module]) for module in TESTS},
        "survivors": [
            {"module": each.module, "line": each.line, "kind": each.kind, "old": each.old, "new": each.new, "reason": reasons.get(each.name, "")}
            for each, what in found.items()
            if what == "survived"
        ],
    }  # fmt: skip
    path = FIGURES / f"{settings.name}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    say(f"{result['drawn']} of the drawn, {result['known']} of the known; {path}")
    return path


def _score(found: dict[Mutant, str], reasons: dict[str, str], some: list[Mutant]) -> dict[str, float]:
    """How many of some mutants are killed, and their share: of all, and of those without a reason to survive."""
    killed = sum(found[each] != "survived" for each in some)
    excused = sum(found[each] == "survived" and each.name in reasons for each in some)
    shares = {name: round(killed / of, 3) if of else 0.0 for name, of in (("share", len(some)), ("share_of_unexcused", len(some) - excused))}  # fmt: skip
    return {"killed": killed, "of": len(some), "excused": excused} | shares


if __name__ == "__main__":
    main(parse(Mutants))
