"""Who computes a run's units: this process, one after the other, or the workers of a Ray cluster.

An engine maps a task over units. A task is called as `task(model, unit)`, with the model of whoever computes; it may not hold
a model itself, so that it can travel. What only one unit needs travels with that unit: `own(unit)` makes it, and the task is called
as `task(model, unit, own(unit))`. Both engines give the same results; what a unit gives depends on the unit alone.

Whatever a unit raises is that unit's: it is told with its traceback, and the others are computed.
"""

from __future__ import annotations

import socket
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch

from mechedit import models
from mechedit.errors import MecheditError
from mechedit.models import HookedModel

__all__ = ["Cluster", "Done", "Engine", "EngineError", "Local", "Own", "Task", "told"]

Result = TypeVar("Result")
PATIENCE = 30.0  # seconds without news after which the nodes are looked at
Task = Callable[..., Result]
Own = Callable[[str], Any]


class EngineError(MecheditError, RuntimeError):
    """An engine that cannot start."""


@dataclass(frozen=True)
class Done(Generic[Result]):
    """A unit that was tried: its result, or what went wrong, in a line and as a traceback."""

    unit: str
    result: Result | None
    seconds: float
    error: str = ""
    trace: str = ""


@runtime_checkable
class Engine(Protocol):
    """Maps a task over units, in any order; each unit comes back once."""

    def open(self) -> AbstractContextManager[object]:
        """What is got ready once for all maps in the body; `map` alone gets it ready for itself."""
        ...

    def map(self, task: Task[Result], units: Sequence[str], own: Own | None = None) -> Iterator[Done[Result]]:
        """What each unit gives, as soon as it is there."""
        ...


@dataclass(frozen=True)
class Local:
    """This process and the model it has loaded, unit after unit."""

    model: HookedModel

    def open(self) -> AbstractContextManager[object]:
        """Nothing to get ready."""
        return nullcontext()

    def map(self, task: Task[Result], units: Sequence[str], own: Own | None = None) -> Iterator[Done[Result]]:
        """What each unit gives, in order; an error is the unit's, not the run's.

        A task that has `batch` above 1 is asked for so many units at a time (`task.many(model, units)`); where that fails,
        for each alone.
        """
        size = getattr(task, "batch", 1)
        for begin in range(0, len(units), size):
            group = units[begin : begin + size]
            together = _together(task, self.model, group) if len(group) > 1 else None
            yield from together or (_timed(task, self.model, unit, *_carried(own, unit)) for unit in group)


def _together(task: Any, model: HookedModel, group: Sequence[str]) -> list[Done[Any]] | None:
    """What units give together, each with its share of the time; None where one of them cannot."""
    began = time.perf_counter()
    try:
        results = task.many(model, group)
    except Exception:  # whose error it is, each alone tells
        return None
    share = (time.perf_counter() - began) / len(group)
    return [Done(unit, result, share) for unit, result in zip(group, results, strict=True)]


def _carried(own: Own | None, unit: str) -> tuple[Any, ...]:
    return () if own is None else (own(unit),)


def _timed(task: Task[Result], model: HookedModel, unit: str, *own: Any) -> Done[Result]:
    began = time.perf_counter()
    try:
        result = task(model, unit, *own)
    except (
        Exception
    ) as error:  # whatever it is: a run of thousands does not end for one (Ctrl-C and exit are no Exception)
        return Done(unit, None, time.perf_counter() - began, *told(error))
    return Done(unit, result, time.perf_counter() - began)


def told(error: BaseException) -> tuple[str, str]:
    """An error in a line, and its traceback, both of characters that can be written."""
    line, trace = f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
    safe = [text.encode("utf-8", "backslashreplace").decode() for text in (line, trace)]
    return " ".join(safe[0].split()), safe[1]


@dataclass
class Cluster:
    """The workers of a Ray cluster, each with a model of its own, loaded once a map, or once while `open`.

    `model` is what `models.load` takes; without `address` a cluster is started on this machine. A worker that cannot load it, or has
    one of another identity (`models.identity(model).whole`), is let go, and `notes` says so; the others go on. A worker that is lost is
    replaced, a bounded number of times. A unit that fails is tried `retries` times more, on other nodes where there are any, then
    reported, and left out.
    """

    model: str
    identity: str
    address: str | None = None
    workers: int = 0  # 0: as many as the cluster has room for
    cpus: float = 1.0  # of each worker, and its threads
    gpus: float = 0.0
    dtype: torch.dtype = torch.float32
    retries: int = 2
    started: list[str] = field(default_factory=list, compare=False)  # node of each worker, in the order they came up
    notes: list[str] = field(default_factory=list, compare=False)  # on workers that were of no use
    _crew: _Crew | None = field(default=None, init=False, repr=False, compare=False)
    _is_open: bool = field(default=False, init=False, repr=False, compare=False)
    _is_own: bool = field(default=False, init=False, repr=False, compare=False)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Keep the workers that the first map needs until the body ends."""
        outermost, self._is_open = not self._is_open, True
        try:
            yield
        finally:
            if outermost:
                self._is_open = False
                self._end()

    def map(self, task: Task[Result], units: Sequence[str], own: Own | None = None) -> Iterator[Done[Result]]:
        """What each unit gives, as workers finish.

        Raises:
            EngineError: Ray is missing, the cluster cannot be reached or has no room, or no worker is left that can compute.
        """
        if not units:
            return
        with self.open():
            if self._crew is None:
                ray = _ray()
                self._is_own = not ray.is_initialized()
                if self._is_own:
                    _connect(ray, self.address)
                self._crew = _Crew(ray, self)
            yield from self._crew.work(task, units, own)

    def _end(self) -> None:
        if self._crew is not None:
            self._crew.dismiss()
            self._crew = None
        if self._is_own:
            _ray().shutdown()
            self._is_own = False


class _Hand(NamedTuple):
    """A worker, and the node it is on."""

    worker: Any
    node: str


class _Crew:
    """Workers of one map: who is coming, who is free, and who is at which unit. Each holds one unit at a time."""

    def __init__(self, ray: Any, cluster: Cluster) -> None:
        self.ray, self.cluster = ray, cluster
        self.coming: dict[Any, Any] = {}  # reference to a worker's first word -> worker
        self.free: list[_Hand] = []
        self.busy: dict[Any, tuple[str, _Hand]] = {}  # reference to a result -> unit, who is at it
        self.task: Any = None  # a reference to it
        room = self.room()
        wanted = min(cluster.workers or room, room)
        self.spare = cluster.retries + wanted  # so many that are lost before they have loaded are replaced
        for _ in range(wanted):
            self.hire()

    def room(self) -> int:
        """For how many workers the nodes that live have resources, used or not.

        Raises:
            EngineError: for none.
        """
        needed = {"CPU": self.cluster.cpus, "GPU": self.cluster.gpus}
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        fits = [min(int(node.get(name, 0) / each) for name, each in needed.items() if each) for node in nodes]
        if sum(fits) < 1:
            shown = "; ".join(f"{node.get('CPU', 0):g} and {node.get('GPU', 0):g}" for node in nodes)
            raise EngineError(
                f"a worker needs {needed['CPU']:g} CPUs and {needed['GPU']:g} GPUs of one node; no room for one in the cluster, whose "
                f"nodes have {shown or 'nothing'}."
            )
        return sum(fits)

    def hire(self) -> None:
        cluster = self.cluster
        made = self.ray.remote(_Worker).options(num_cpus=cluster.cpus, num_gpus=cluster.gpus)
        device = "cuda" if cluster.gpus else "cpu"
        worker = made.remote(cluster.model, cluster.dtype, max(1, int(cluster.cpus)), device)
        self.coming[worker.ready.remote()] = worker

    def work(self, task: Task[Any], units: Sequence[str], own: Own | None) -> Iterator[Done[Any]]:
        self.task = self.ray.put(task)
        for hand in self.free:
            hand.worker.take.remote(self.task)
        try:
            yield from self._work(units, own)
        finally:
            for _, hand in self.busy.values():  # of a map that was broken off
                self.ray.kill(hand.worker)
                self.hire()
            self.busy = {}

    def _work(self, units: Sequence[str], own: Own | None) -> Iterator[Done[Any]]:
        waiting, tried = deque(units), {unit: list[str]() for unit in units}  # the nodes on which it failed
        while waiting or self.busy:
            for hand in list(self.free):
                if (unit := self.next_for(hand, waiting, tried)) is not None:
                    self.free.remove(hand)
                    self.busy[hand.worker.run.remote(unit, *_carried(own, unit))] = (unit, hand)
            if not (self.busy or self.coming):
                raise EngineError(f"no worker is left: {'; '.join(dict.fromkeys(self.cluster.notes[-3:]))}")
            news, _ = self.ray.wait([*self.busy, *self.coming], num_returns=1, timeout=PATIENCE)
            if not news:
                self.room()  # nodes may have been lost, and workers may be waiting for one in vain
                continue
            (first,) = news
            if first in self.coming:
                self.welcome(first)
                continue
            node, done = self.finished(first)
            if done.error and len(tried[done.unit]) < self.cluster.retries:
                tried[done.unit].append(node)
                waiting.append(done.unit)
            else:
                yield done

    def next_for(self, hand: _Hand, waiting: deque[str], tried: dict[str, list[str]]) -> str | None:
        """The first unit that did not fail on this worker's node, unless it failed on every node that there is."""
        nodes = {each.node for each in [*self.free, *(each for _, each in self.busy.values())]}
        for unit in waiting:
            if hand.node not in tried[unit] or nodes <= set(tried[unit]):
                waiting.remove(unit)
                return unit
        return None

    def finished(self, reference: Any) -> tuple[str, Done[Any]]:
        """What came of a unit, and on which node."""
        unit, hand = self.busy.pop(reference)
        try:
            done: Done[Any] = self.ray.get(reference)
            self.free.append(hand)
        except self.ray.exceptions.RayTaskError as error:  # the worker lives
            done = Done(unit, None, 0.0, *told(error.cause))
            self.free.append(hand)
        except self.ray.exceptions.RayError as error:
            self.hire()
            done = Done(unit, None, 0.0, f"its worker was lost ({str(error).splitlines()[0]})", str(error))
        return hand.node, done

    def welcome(self, reference: Any) -> None:
        """Take on a worker that has loaded its model; let one go that is of no use."""
        cluster, worker = self.cluster, self.coming.pop(reference)
        try:
            identity, node, wrong = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            cluster.notes.append(
                f"a worker was lost before it had loaded {cluster.model}: {str(error).splitlines()[0]}"
            )
            if self.spare:
                self.spare -= 1
                self.hire()
            return
        if wrong:
            cluster.notes.append(f"a worker on node {node} cannot load {cluster.model}: {wrong}")
        elif identity != cluster.identity:
            cluster.notes.append(
                f"a worker on node {node} has another model under the name {cluster.model} ({identity[:12]}…) than this "
                f"machine ({cluster.identity[:12]}…). Put the same model, and the same versions, on every node."
            )
        else:
            cluster.started.append(node)
            worker.take.remote(self.task)
            self.free.append(_Hand(worker, node))
            return
        self.ray.kill(worker)

    def dismiss(self) -> None:
        hands = [*self.free, *(hand for _, hand in self.busy.values())]
        for worker in [*(hand.worker for hand in hands), *self.coming.values()]:
            self.ray.kill(worker)


class _Worker:
    """Loads the model once, then computes units."""

    def __init__(self, model: str, dtype: torch.dtype, threads: int, device: str) -> None:
        self.threads = threads
        torch.set_num_threads(threads)
        self.load = partial(models.load, model, device=device, dtype=dtype)

    def ready(self) -> tuple[str, str, str]:
        """Load; the weights it has, the node it is on, and why it is of no use."""
        node = str(_ray().get_runtime_context().get_node_id())
        try:
            self.model = self.load()
        except Exception as error:  # of this node, where others may do
            return "", node, told(error)[0]
        return models.identity(self.model).whole, node, ""

    def take(self, task: Task[Any]) -> None:
        """What units are for from now on; it may be large, so it comes once."""
        self.task = task
        torch.set_num_threads(self.threads)  # whatever the task's own modules set when they were imported

    def run(self, unit: str, *own: Any) -> Done[Any]:
        """What a unit gives."""
        return _timed(self.task, self.model, unit, *own)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise EngineError("the engine `ray` needs Ray: pip install 'mechedit[ray]'.") from error
    return ray


def _connect(ray: Any, address: str | None) -> None:
    host, _, port = (address or "").rpartition("://")[2].rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself tries for minutes, and fills the screen
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", include_dashboard=False if address is None else None)  # fmt: skip
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        what = f"no Ray cluster answers at {address}" if address else "no Ray cluster could be started here"
        raise EngineError(f"{what}: {error}. `ray start --head` starts one.") from error
