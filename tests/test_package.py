"""The table in the package's docstring, held against what each step does."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mechedit
from mechedit import (
    cache,
    edits,
    export,
    guards,
    keys,
    models,
    moments,
    prompts,
    rank_one,
    scoring,
    tracing,
    tuning,
    values,
)
from mechedit.benchmarks import counterfact
from mechedit.editors import rome
from mechedit.facts import Fact
from mechedit.runs import tracing as runs
from mechedit.runs.editing import edit_facts
from mechedit.runs.evaluating import evaluate
from mechedit.runs.sweeping import sweep
from mechedit.settings import EvaluateSettings, MomentSettings, RomeSettings, SweepSettings, TraceSettings, TuneSettings
from mechedit.tracing import attribution, severing
from tests.conftest import FACT, state, widen_bands

LAYER = 1
SETTINGS = RomeSettings(layer=LAYER, steps=2, prefixes=((3, 1),), prepend_bos=True)


def table() -> dict[str, dict[str, str]]:
    """The docstring's rows by step: column -> what it says."""
    lines = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in mechedit.__doc__.splitlines()
        if line.startswith("|")
    ]
    header, _, *rows = lines
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


@pytest.fixture
def steps(model, folder, tmp_path, monkeypatch):
    """A call for each step of the table, what it needs prepared beforehand."""
    widen_bands(monkeypatch)
    C = torch.eye(128, dtype=torch.float64)
    rows = keys.contexts(model, FACT, ("", "Rome. "), prepend_bos=True)
    (essence,) = keys.contexts(model, Fact(FACT.subject, "{} is a"), ("",), prepend_bos=True)
    weight, bias = models.W_out(model, LAYER), models.b_out(model, LAYER)
    key, value = torch.randn(128), torch.randn(32)
    change = rank_one.solve(LAYER, weight, bias, key, value, C)
    moment = moments.estimate(model, LAYER, settings=MomentSettings(tokens=300, context=16))
    edit = rome.edit(model, FACT, SETTINGS, moment)
    monkeypatch.setattr(runs, "known", lambda model, facts, **options: list(facts))  # it knows nothing

    def in_edited() -> None:
        with rank_one.edited(model, change):
            pass

    return {
        "models.load": lambda: models.load(str(folder("gpt2")), device="cpu"),
        "prompts.audit": lambda: prompts.audit(model, FACT),
        "tracing.trace": lambda: tracing.trace(model, FACT, TraceSettings(draws=1)),
        "tracing.severed": lambda: severing.severed(model, FACT, TraceSettings(draws=1)),
        "tracing.attribution": lambda: attribution.attribution_patching(model, FACT, TraceSettings(draws=1)),
        "runs.trace_facts": lambda: runs.trace_facts(model, [FACT], tmp_path / "run", TraceSettings(draws=1)),
        "moments.estimate": lambda: moments.estimate(model, LAYER, settings=MomentSettings(tokens=310, context=16)),
        "keys": lambda: keys.subject_keys(
            model, LAYER, keys.contexts(model, FACT, keys.prefixes(model, replace(SETTINGS, seed=9)))
        ),
        "values.optimise": lambda: values.optimise(
            model, rows, essence, [[40]] * len(rows), value, torch.ones(3), LAYER, SETTINGS
        ),
        "rank_one.solve": lambda: rank_one.solve(LAYER, weight, bias, key, value, C),
        "rank_one.edited": in_edited,
        "editors.rome.edit": lambda: rome.edit(model, FACT, SETTINGS),
        "guards.measure": lambda: guards.measure(model, FACT.subject),
        "runs.edit_facts": lambda: edit_facts(model, [FACT], tmp_path / "edits", SETTINGS, moment),
        "tuning.tune": lambda: tuning.tune(
            model,
            [replace(FACT, target_new=new) for new in ("Paris", "Rome", "London")],
            tmp_path / "tune",
            TuneSettings(2, 1, 0, (1.0,), draws=1),
            SETTINGS,
        ),
        "export.checkpoint": lambda: export.checkpoint(model, str(folder("gpt2")), [edit], tmp_path / "edited"),
        "edits.apply": lambda: edits.apply(model, edit),
        "scoring.score": lambda: scoring.score(model, [("A", "b")]),
        "counterfact.scores": lambda: counterfact.scores(model, [FACT]),
        "runs.evaluate": lambda: evaluate(model, [FACT], tmp_path / "scores", EvaluateSettings(), SETTINGS, moment),
        "runs.sweep": lambda: sweep(
            model, [FACT], tmp_path / "sweep", SweepSettings(layers=(LAYER + 1,), tokens=("last",), draws=1), SETTINGS
        ),
    }


def test_every_step_touches_what_the_table_says_and_no_more(model, steps, monkeypatch):
    assert table().keys() == steps.keys()
    backward = []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: backward.append(1) or real(*args, **kwargs))
    for name, step in steps.items():
        row, forward = table()[name], []
        backward.clear()
        watched = model.blocks[0].register_forward_pre_hook(lambda module, args, forward=forward: forward.append(1))
        before, files, stream = state(model), set(_files(cache.root())), torch.get_rng_state()
        result = step()
        watched.remove()
        assert bool(forward) == (row["forward"] == "yes"), name
        assert bool(backward) == (row["backward"] == "yes"), name
        assert (set(_files(cache.root())) != files) == ("cache" in row["disk"] and name != "models.load"), name
        assert torch.equal(torch.get_rng_state(), stream), f"{name} touched the global random stream"
        after = state(model)
        changed = [weight for weight in before[0] if not torch.equal(before[0][weight], after[0][weight])]
        assert bool(changed) == (row["weights"] == "yes, until undone"), name
        assert after[1:] == before[1:], name
        if isinstance(result, edits.Applied):
            result.undo()


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_version_is_that_of_the_installed_package():
    from importlib.metadata import version

    assert version("mechedit") == mechedit.__version__


def test_imports_point_one_way():
    order = [
        "errors",
        "settings",
        "progress",
        "statistics",
        "cache",
        "models",
        "records",
        "facts",
        "prompts",
        "provenance",
        "files",
        "corruption",
        "interventions",
        "generation",
    ]
    order += [
        "tracing",
        "sites",
        "moments",
        "keys",
        "values",
        "rank_one",
        "scoring",
        "guards",
        "benchmarks",
        "edits",
        "export",
        "editors",
        "figures",
        "runs",
        "tuning",
        "organism",
        "cli",
    ]
    root = Path(mechedit.__file__).parent
    for path in root.rglob("*.py"):
        own = path.relative_to(root).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        above = set(order[: order.index(own) + 1])
        assert _imported(path) <= above, f"{own} imports what stands below it"


def _imported(path: Path) -> set[str]:
    """The modules of mechedit that a file imports when it is loaded."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module == "mechedit":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mechedit."):
            found.add(str(node.module).split(".")[1])
    return found - {"__version__"}
