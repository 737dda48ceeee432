"""The table in the package's docstring, held against what each step does."""

from __future__ import annotations

import ast
import re
import statistics
from dataclasses import replace
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import mechedit
from mechedit import (
    above,
    applying,
    cache,
    calibration,
    changes,
    editing,
    export,
    guards,
    keys,
    models,
    moments,
    neurons,
    prompts,
    rank_one,
    scoring,
    study,
    tracing,
    tuning,
    values,
    weights,
)
from mechedit.benchmarks import counterfact
from mechedit.closed_form import Metric, Terms
from mechedit.editors import named, rome
from mechedit.editors.attention_edit import AttentionEdit
from mechedit.editors.fine_tuning import FineTuning
from mechedit.editors.knowledge_neurons import KnowledgeNeurons, Prefixes
from mechedit.editors.told import Told
from mechedit.editors.trained.editor import MendEditor
from mechedit.facts import Fact
from mechedit.recursive import Sums, least_squares
from mechedit.runs import tracing as runs
from mechedit.runs.editing import edit_facts
from mechedit.runs.evaluating import evaluate
from mechedit.runs.extending import run_sequence
from mechedit.runs.sweeping import sweep
from mechedit.settings import (
    AttentionEditSettings,
    CalibrateSettings,
    EvaluateSettings,
    FineTuningSettings,
    KnowledgeNeuronsSettings,
    MendSettings,
    MomentSettings,
    RomeSettings,
    SequentialSettings,
    StudySettings,
    SweepSettings,
    ToldSettings,
    TraceSettings,
    TuneSettings,
)
from mechedit.tracing import attribution, severing
from mechedit.weights import Weight
from tests.conftest import FACT, state, widen_bands
from tests.trained import by_hand

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
    resolved = rome.resolve(model, SETTINGS)
    ready = rome.prepare(model, resolved, moment)
    edit = editing.edit(model, FACT, named("rome"), resolved, prepared=ready)
    tuned = FineTuning().resolve(model, FineTuningSettings(layer=LAYER, steps=2))
    attention = AttentionEdit().resolve(model, AttentionEditSettings(layer=LAYER, steps=2))
    monkeypatch.setattr(runs, "known", lambda model, facts, **options: list(facts))  # it knows nothing

    def within(block) -> None:
        with block:
            pass

    def first_load():
        """In a cache that has no verdict on it yet: whether `model` was loaded in this test depends on the tests before."""
        with monkeypatch.context() as patch:
            patch.setenv("MECHEDIT_CACHE", str(tmp_path / "first"))
            return models.load(str(folder("gpt2")), device="cpu")

    def few():
        facts = [replace(FACT, target_new=new) for new in ("Paris", "Rome", "London", "Berlin")]
        wanted = CalibrateSettings(facts=4, strengths=(1.0,), times=(2.0,))
        with pytest.raises(calibration.CalibrationError):  # four edits are too few
            calibration.calibrate(model, facts, tmp_path / "bands", wanted, "rome", replace(SETTINGS, seed=6))

    return {
        "models.load": first_load,
        "prompts.audit": lambda: prompts.audit(model, FACT),
        "tracing.trace": lambda: tracing.trace(model, FACT, TraceSettings(draws=1)),
        "tracing.severed": lambda: severing.severed(model, FACT, TraceSettings(draws=1)),
        "tracing.attribution": lambda: attribution.attribution_patching(model, FACT, TraceSettings(draws=1)),
        "runs.trace_facts": lambda: runs.trace_facts(model, [FACT], tmp_path / "run", TraceSettings(draws=1)),
        "moments.estimate": lambda: moments.estimate(model, LAYER, settings=MomentSettings(tokens=310, context=16)),
        "keys": lambda: keys.subject_keys(
            model, LAYER, keys.contexts(model, FACT, keys.prefixes(model, replace(SETTINGS, seed=9)))
        ),
        "above.prepare": lambda: above.prepare(model, models.Blocks(model), [above.Row((1, 2, 3), 1, (2,))], LAYER),
        "values.optimise": lambda: values.optimise(
            model, rows, essence, [[40]] * len(rows), value, torch.ones(3), LAYER, SETTINGS
        ),
        "neurons.find": lambda: neurons.find(model, FACT, KnowledgeNeuronsSettings(steps=2, seed=5)),
        "rank_one.solve": lambda: rank_one.solve(LAYER, weight, bias, key, value, C),
        "closed_form.Metric": lambda: Metric(Terms(), C).solve(LAYER, key[None], value[None]),
        "recursive.least_squares": lambda: least_squares(Metric(Terms(b=1.0), C), Sums.none(*weight.shape)),
        "rank_one.edited": lambda: within(rank_one.edited(model, change)),
        "models.identity": lambda: models.identity(model),
        "weights.restored": lambda: within(weights.restored(model, Weight(LAYER, "attn.W_Q"))),
        "changes.total": lambda: changes.total([change, change]),
        "editing.make_ready": lambda: editing.make_ready(model, named("rome"), replace(SETTINGS, seed=8)),
        "editing.edit": lambda: editing.edit(model, FACT, named("rome"), replace(SETTINGS, seed=7)),
        "editors.fine_tuning": lambda: FineTuning().find(model, [FACT], tuned, None, {}),
        "editors.attention_edit": lambda: AttentionEdit().find(model, [FACT], attention, None, {}),
        "editors.told": lambda: Told().find(model, [FACT], ToldSettings(), None, {}),
        "editors.knowledge_neurons": lambda: KnowledgeNeurons().find(
            model, [FACT], KnowledgeNeuronsSettings(prepend_bos=True), Prefixes(("", "Rome. ", "Paris. ")), {}
        ),
        "editors.trained": lambda: MendEditor().find(
            model, [FACT], MendSettings(prepend_bos=True), by_hand(model, "mend"), {}
        ),
        "guards.measure": lambda: guards.measure(model, [FACT.subject]),
        "runs.edit_facts": lambda: edit_facts(model, [FACT], tmp_path / "edits", "rome", SETTINGS, ready),
        "tuning.tune": lambda: tuning.tune(
            model,
            [replace(FACT, target_new=new) for new in ("Paris", "Rome", "London")],
            tmp_path / "tune",
            TuneSettings(2, 1, 0, (("clamp", (1.0,)),), draws=1),
            "rome",
            SETTINGS,
        ),
        "calibration.calibrate": few,
        "export.checkpoint": lambda: export.checkpoint(model, str(folder("gpt2")), [edit], tmp_path / "edited"),
        "applying.apply": lambda: applying.apply(model, edit),
        "applying.edited": lambda: within(applying.edited(model, edit)),
        "applying.compose": lambda: applying.compose(edit, replace(edit, changes=(change,))),
        "scoring.score": lambda: scoring.score(model, [("A", "b")]),
        "counterfact.scores": lambda: counterfact.scores(model, [FACT]),
        "runs.evaluate": lambda: evaluate(
            model, [FACT], tmp_path / "scores", EvaluateSettings(), "rome", SETTINGS, ready
        ),
        "runs.sequence": lambda: run_sequence(
            model,
            [FACT],
            tmp_path / "sequence",
            None,
            "sequential",
            SequentialSettings(layer=LAYER, steps=2, prefixes=((3, 1),), seed=11),
        ),
        "runs.sweep": lambda: sweep(
            model,
            [FACT],
            tmp_path / "sweep",
            SweepSettings(layers=(LAYER + 1,), tokens=("last",), draws=1),
            "rome",
            SETTINGS,
        ),
        "study.write_scenarios": lambda: study.write_scenarios(
            model,
            [FACT],
            tmp_path / "texts",
            StudySettings(scenarios=1, raters=1, pages=1, editors=("rome", "unedited"), tokens=12),
            {"rome": replace(SETTINGS, seed=4)},
        ),
    }


def test_every_step_touches_what_the_table_says_and_no_more(model, steps, monkeypatch):
    assert table().keys() == steps.keys()
    backward = []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: backward.append(1) or real(*args, **kwargs))
    kind = type(model.blocks[0])
    run = kind.forward
    for name, step in steps.items():
        row, forward = table()[name], []
        backward.clear()
        before, files, stream = state(model), set(_files(cache.root())), torch.get_rng_state()
        with monkeypatch.context() as patch:  # a hook would not do: with hooks on it, steps refuse the model
            patch.setattr(
                kind, "forward", lambda *args, forward=forward, **named: forward.append(1) or run(*args, **named)
            )
            result = step()
        assert bool(forward) == (row["forward"] == "yes"), name
        assert bool(backward) == (row["backward"] == "yes"), name
        if name != "models.load":  # which keeps its verdict on a configuration once
            assert (set(_files(cache.root())) != files) == ("cache" in row["disk"]), name
        assert torch.equal(torch.get_rng_state(), stream), f"{name} touched the global random stream"
        after = state(model)
        changed = [weight for weight in before[0] if not torch.equal(before[0][weight], after[0][weight])]
        assert bool(changed) == (row["weights"] == "yes, until undone"), name
        assert after[1:] == before[1:], name
        if isinstance(result, applying.Applied):
            result.undo()


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_version_is_that_of_the_installed_package():
    from importlib.metadata import version

    assert version("mechedit") == mechedit.__version__


ORDER = [
    "wording",
    "errors",
    "progress",
    "statistics",
    "shipped",
    "parsing",
    "cache",
    "settings",
    "writing",
    "records",
    "facts",
    "files",
    "models",
    "interventions",
    "prompts",
    "provenance",
    "weights",
    "corruption",
    "scoring",
    "changes",
    "generation",
    "tracing",
    "guards",
    "organism",
    "rank_one",
    "closed_form",
    "recursive",
    "keys",
    "neurons",
    "sites",
    "figures",
    "sources",
    "edits",
    "moments",
    "threads",
    "above",
    "losses",
    "optimisers",
    "values",
    "benchmarks",
    "huggingface",
    "applying",
    "export",
    "editing",
    "editors",
    "runs",
    "tuning",
    "calibration",
    "study",
    "viewer",
    "notebook",
    "cli",
]
"""Each imports only from those before it, in its functions too; packages among them are one step."""


def _modules() -> dict[str, Path]:
    root = Path(mechedit.__file__).parent
    paths = {".".join(("mechedit", *path.relative_to(root).with_suffix("").parts)): path for path in root.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in paths.items()}


def _imported(name: str, path: Path, every: dict[str, Path]) -> set[str]:
    """The modules of mechedit that one imports, anywhere in it."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    own = [node for node in nodes if (node.module or "").split(".")[0] == "mechedit"]
    names = {(node.module, alias.name) for node in own for alias in node.names}
    found = {f"{module}.{part}" if f"{module}.{part}" in every else str(module) for module, part in names}
    return found - {name, "mechedit"}


def test_imports_point_one_way_and_never_in_a_circle():
    every = _modules()
    graph = {name: _imported(name, path, every) for name, path in every.items()}
    list(TopologicalSorter(graph).static_order())  # raises where there is a circle
    assert {name.split(".")[1] for name in every if "." in name} == set(ORDER)
    for name, found in graph.items():
        step = name.split(".")[1] if "." in name else None
        for other in (each.split(".")[1] for each in found if step):
            assert other == step or ORDER.index(other) < ORDER.index(step), (
                f"{name} imports {other}, which stands below it"
            )


def test_the_harness_knows_no_editor_and_a_picture_no_model():
    every = _modules()
    assert not any("editors" in each for each in _imported("mechedit.editing", every["mechedit.editing"], every))
    assert not any("models" in each for each in _imported("mechedit.figures", every["mechedit.figures"], every))
    text = every["mechedit.rank_one"].read_text()
    assert "prompts" not in text
    assert "facts" not in {
        each.split(".")[1] for each in _imported("mechedit.rank_one", every["mechedit.rank_one"], every)
    }


def test_rooms_fit():
    """No module is longer than can be read in one sitting, and the middle function is short."""
    lengths = []
    for path in _modules().values():
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                lengths.append(node.body[-1].end_lineno - body[0].lineno + 1 if body else 0)
    assert statistics.median(lengths) <= 8


def test_every_tensor_argument_of_a_public_function_has_a_shape():
    """A public function is one of a module or of a class that is public; callables that take activations have shapes too."""
    for name, path in _modules().items():
        tree = ast.parse(path.read_text())
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        for node in [*tree.body, *(each for own in classes for each in own.body)]:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            for argument in [*node.args.args, *node.args.kwonlyargs]:
                said = ast.unparse(argument.annotation) if argument.annotation else ""
                bare = re.sub(r"(Float|Int|Bool|Shaped)\[Tensor", "", said)
                assert not re.search(r"\bTensor\b", bare), f"{name}.{node.name}: {argument.arg}: {said}"
