"""Who of a cluster's workers is kept, let go and replaced, with a cluster that is made up: its nodes fail as they are told."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

from mechedit.runs.engines import Cluster, Done, EngineError, _Crew

pytestmark = pytest.mark.anywhere


class Lost(Exception):
    """A worker that is gone."""


class MadeUp:
    """What of Ray the crew uses. `nodes` gives a behaviour to each worker slot: good, unable, other, lost, or bad at units."""

    def __init__(self, *slots):
        self.slots, self.hired, self.killed, self.ran, self.refs = list(slots), 0, [], [], {}
        self.exceptions = SimpleNamespace(RayError=Lost, RayTaskError=type("Raised", (Lost,), {}))

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 1}} for _ in self.slots]

    def put(self, task):
        return task

    def kill(self, worker):
        self.killed.append(worker.name)

    def remote(self, made):
        return SimpleNamespace(options=lambda **named: SimpleNamespace(remote=lambda *args: self.worker()))

    def worker(self):
        kind, name = self.slots[self.hired % len(self.slots)], f"w{self.hired}"
        self.hired += 1
        said = {"unable": ("", name, "OSError: gone"), "other": ("another", name, "")}.get(kind, ("same", name, ""))
        ready = SimpleNamespace(remote=lambda: self.ref(Lost("crashed") if kind == "lost" else said))

        def run(unit, *own):
            self.ran.append((name, unit, *own))
            return self.ref(Done(unit, None, 0.0, "bad") if kind == "bad" else Done(unit, unit.upper(), 0.0))

        take = SimpleNamespace(remote=lambda task: None)
        return SimpleNamespace(name=name, ready=ready, run=SimpleNamespace(remote=run), take=take)

    def ref(self, value):
        self.refs[len(self.refs)] = value
        return len(self.refs) - 1

    def wait(self, refs, num_returns, timeout):
        return [min(refs)], []

    def get(self, ref):
        if isinstance(self.refs[ref], Exception):
            raise self.refs[ref]
        return self.refs[ref]


def done(ray, units="abcdef", own=None):
    cluster = Cluster("MODEL", "same")
    found = list(_Crew(ray, cluster).work(lambda model, unit: unit, list(units), own))
    return cluster, {each.unit: each.result or each.error for each in found}


WHOLE = {unit: unit.upper() for unit in "abcdef"}


@pytest.mark.parametrize(("kind", "note"), [("unable", "cannot load MODEL: OSError: gone"), ("other", "has another model under the name MODEL")])  # fmt: skip
def test_a_worker_that_is_of_no_use_is_let_go_and_the_others_go_on(kind, note):
    ray = MadeUp(kind, "good")
    cluster, found = done(ray)
    assert found == WHOLE
    assert ray.killed == ["w0"]
    assert len(cluster.notes) == 1
    assert note in cluster.notes[0]
    assert ray.hired == 2, "none is hired in its place, which would come to the same node"


def test_where_none_is_of_use_that_is_said():
    with pytest.raises(EngineError, match=r"no worker is left: .*w0 cannot load.*; .*w1 has another model"):
        done(MadeUp("unable", "other"))


def test_workers_that_are_lost_are_replaced_so_often_and_no_more():
    ray = MadeUp("lost", "lost", "lost", "good")
    assert done(ray)[1] == WHOLE, "three that are lost do not end a run"
    ray = MadeUp("lost", "lost")
    with pytest.raises(EngineError, match="no worker is left: a worker was lost before it had loaded MODEL"):
        done(ray)
    assert ray.hired == 2 + 2 + 2, "two slots, two tries more and one for each slot"


def test_a_unit_that_fails_goes_to_other_nodes_and_a_bad_one_fails_none_for_good():
    ray = MadeUp("bad", "good")
    assert done(ray)[1] == WHOLE
    twice = [pair for pair, times in Counter(ray.ran).items() if times > 1]
    assert twice == [], "no unit comes to a node twice where there is another"


def test_a_unit_that_fails_everywhere_is_reported_after_its_tries():
    ray = MadeUp("bad", "bad")
    assert done(ray, "ab")[1] == {"a": "bad", "b": "bad"}
    assert Counter(unit for _, unit in ray.ran) == {"a": 3, "b": 3}


def test_each_unit_comes_with_its_own_alone():
    ray = MadeUp("good")
    done(ray, "abc", lambda unit: unit * 2)
    assert sorted(ray.ran) == [("w0", "a", "aa"), ("w0", "b", "bb"), ("w0", "c", "cc")]
