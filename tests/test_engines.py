"""A real Ray cluster on this machine: two nodes, one of which is killed."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from mechedit import files, models, moments
from mechedit.editors import named, rome
from mechedit.runs.editing import edit_facts
from mechedit.runs.engines import Cluster, EngineError, Local
from mechedit.runs.evaluating import evaluate
from mechedit.runs.store import RunError, Store
from mechedit.runs.tracing import trace_facts
from mechedit.settings import EvaluateSettings, MomentSettings, RomeSettings, TraceSettings
from tests.conftest import kept_units, widen_bands
from tests.test_contract import EDITORS
from tests.three_facts import FACTS, made_ready


@dataclass(frozen=True)
class Dangerous:
    """Notes each try; fails on unit b, and takes its worker down on unit c."""

    folder: Path

    def __call__(self, model, unit):
        with (self.folder / f"tried-{unit}").open("a") as log:
            log.write("x")
        if unit == "b":
            raise ValueError("poison")
        if unit == "c":
            os._exit(1)
        return {"text": unit}


def slow(model, unit):
    time.sleep(0.25)
    return {"text": f"{unit} {float(next(model.parameters()).sum()):.4f}"}


def plain(model, unit):
    return unit


ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.anywhere, pytest.mark.filterwarnings("ignore")]  # Ray's own

QUICK = RomeSettings(layer=1, steps=3, prefixes=(), guard="warn")


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each."""
    from ray.cluster_utils import Cluster as Nodes

    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path, path])
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.second = nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    yield nodes
    ray.shutdown()
    nodes.shutdown()
    os.environ["PYTHONPATH"] = path


@pytest.fixture
def engine(cluster, model, folder):
    return Cluster(str(folder("gpt2")), models.identity(model).whole)


def read(path):
    return files.read(path, "text")[1]


def write(result, path):
    files.write(path, "text", {}, result)


@pytest.mark.both
def test_results_are_those_of_this_process(engine, model, tmp_path, monkeypatch):
    widen_bands(monkeypatch)
    moment = moments.estimate(model, 1, settings=MomentSettings(tokens=600, context=32))
    ready = made_ready(model, QUICK, moment)
    settings = EvaluateSettings()
    here = evaluate(model, FACTS, tmp_path / "here", settings, "rome", QUICK, ready)
    there = evaluate(model, FACTS, tmp_path / "there", settings, "rome", QUICK, ready, engine=engine)
    for name, row in here.table("after").items():
        assert there.table("after")[name].mean == pytest.approx(row.mean, rel=1e-4, abs=1e-6, nan_ok=True)
    edits = [edit_facts(model, FACTS, tmp_path / each / "edits", "rome", QUICK, ready) for each in ("here", "there")]
    for one, other in zip(*edits, strict=True):
        assert torch.allclose(one.changes[0].step, other.changes[0].step, rtol=1e-4, atol=1e-6)
    traces = TraceSettings(draws=2, window=2)
    for one, other in zip(
        trace_facts(model, FACTS, tmp_path / "t1", traces),
        trace_facts(model, FACTS, tmp_path / "t2", traces, engine=engine),
        strict=True,
    ):
        assert all(torch.allclose(one.draws[kind], other.draws[kind], atol=1e-5) for kind in one.draws)
    assert len(set(engine.started)) == 2, "both nodes worked"


def test_a_unit_that_always_fails_is_tried_again_then_reported_and_the_rest_is_kept(engine, tmp_path):
    task = Dangerous(tmp_path)
    store = Store(tmp_path / "run", {"a": 1}, read, write)
    with pytest.raises(RunError, match=r"2 of 5 units in .* failed, 3 are finished"):
        store.run(list("abcde"), task, engine)
    assert set(kept_units(tmp_path / "run")) == {"a", "d", "e"}
    tried = {unit: len((tmp_path / f"tried-{unit}").read_text()) for unit in "abcde"}
    assert tried == {"a": 1, "b": 3, "c": 3, "d": 1, "e": 1}
    assert [each["text"] for each in store.run(list("ade"), task, engine)] == ["a", "d", "e"]


def test_a_node_that_is_killed_costs_nothing_but_time(cluster, engine, tmp_path):
    units = [f"{index:03d}" for index in range(40)]

    def kill(what, done, of):
        if done == 6 and cluster.second is not None:
            cluster.remove_node(cluster.second, allow_graceful=False)
            cluster.second = None

    found = Store(tmp_path / "run", {}, read, write).run(units, slow, engine, kill)
    assert cluster.second is None
    assert [each["text"].split()[0] for each in found] == units
    assert len({each["text"].split()[1] for each in found}) == 1
    cluster.second = cluster.add_node(num_cpus=1)


def test_what_cannot_work_is_said_at_once(cluster, engine, folder):
    with pytest.raises(EngineError, match="no worker is left: .* has another model under the name"):
        list(replace(engine, identity="0" * 32).map(plain, ["a"]))
    with pytest.raises(EngineError, match="no room for one"):
        list(replace(engine, cpus=64.0).map(plain, ["a"]))
    with pytest.raises(EngineError, match="cannot load"):
        list(replace(engine, model=str(folder("gpt2") / "nothing")).map(plain, ["a"]))
    assert list(engine.map(plain, [])) == []


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999", "nowhere.invalid:6379"])
def test_an_address_where_nothing_listens_is_told_at_once(address, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # this module's cluster is none of it
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr("ray.init", lambda **named: pytest.fail("Ray was asked"))
    with pytest.raises(EngineError, match=f"no Ray cluster answers at {address}: .* `ray start --head` starts one"):
        list(Cluster("M", "", address).map(plain, ["a"]))


def test_without_ray_the_message_says_how_to_get_it(monkeypatch, engine):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match=r"pip install 'mechedit\[ray\]'"):
        list(engine.map(plain, ["a"]))


def test_this_process_reports_a_failing_unit_and_goes_on(model):
    def task(model, unit):
        if unit == "b":
            raise ValueError("no")
        return unit

    found = list(Local(model).map(task, ["a", "b", "c"]))
    assert [each.result for each in found] == ["a", None, "c"]
    assert found[1].error == "ValueError: no"


@pytest.mark.parametrize("name", ["rome", "tests.outside_editor:LogitEditor"])
def test_every_kind_of_editor_travels_to_workers(name, engine, model, tmp_path, monkeypatch):
    """What was prepared here, and an editor from outside the package, give the same edits there."""
    widen_bands(monkeypatch)
    editor, settings = named(name), replace(EDITORS[name], guard="warn")  # workers have the bands of trained models
    ready = None
    if name == "rome":
        moment = moments.estimate(model, 1, settings=MomentSettings(tokens=600, context=32))
        ready = rome.prepare(model, rome.resolve(model, settings), moment)
    here = edit_facts(model, FACTS, tmp_path / "here", editor, settings, ready)
    there = edit_facts(model, FACTS, tmp_path / "there", editor, settings, ready, engine=engine)
    assert all(edit.changes for edit in here)
    for mine, theirs in zip(here, there, strict=True):
        for a, b in zip(mine.changes, theirs.changes, strict=True):
            torch.testing.assert_close(b.dense(), a.dense(), atol=1e-6, rtol=1e-4)


@dataclass(frozen=True)
class Here:
    """Says which node it ran on, and how many threads it has; fails on one of the nodes."""

    bad: str = ""

    def __call__(self, model, unit, own=""):
        node = str(ray.get_runtime_context().get_node_id())
        if node == self.bad:
            raise RuntimeError("this node is bad")
        return {"text": f"{unit}{own} {torch.get_num_threads()}"}


def test_a_unit_that_fails_on_one_node_is_done_on_another(cluster, engine):
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    with engine.open():
        while len(set(engine.started)) < 2:  # both have loaded
            assert all(not done.error for done in engine.map(slow, list("abcd")))
        found = list(engine.map(Here(nodes[0]), [f"{index}" for index in range(12)]))
    assert [done.error for done in found] == [""] * 12


def test_workers_have_the_threads_of_their_cpus_and_what_a_unit_needs_travels_with_it(cluster, engine):
    (one,) = engine.map(Here(), ["a"], lambda unit: unit * 2)
    assert one.result == {"text": "aaa 1"}
    node = cluster.add_node(num_cpus=3)
    (three,) = replace(engine, cpus=3.0).map(Here(), ["a"])
    cluster.remove_node(node)
    assert three.result == {"text": "a 3"}
