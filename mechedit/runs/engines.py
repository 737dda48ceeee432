"""Who computes a run's units: this process, one after the other, or the workers of a Ray cluster.

An engine maps a task over units. A task is called as `task(model, unit)`, with the model of whoever computes; it may not hold
a model itself, so that it can travel. Both engines give the same results; what a unit gives depends on the unit alone.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch

from mechedit import models
from mechedit.errors import MecheditError
from mechedit.models import HookedModel

__all__ = ["Cluster", "Done", "Engine", "EngineError", "Local", "Task"]

Result = TypeVar("Result")
PATIENCE = 30.0  # seconds without news after which the nodes are looked at
Task = Callable[[HookedModel, str], Result]


class EngineError(MecheditError, RuntimeError):
    """An engine that cannot start."""


@dataclass(frozen=True)
class Done(Generic[Result]):
    """A unit that was tried: its result, or what went wrong."""

    unit: str
    result: Result | None
    seconds: float
    error: str = ""


@runtime_checkable
class Engine(Protocol):
    """Maps a task over units, in any order; each unit comes back once."""

    def open(self) -> AbstractContextManager[object]:
        """What is got ready once for all maps in the body; `map` alone gets it ready for itself."""
        ...

    def map(self, task: Task[Result], units: Sequence[str]) -> Iterator[Done[Result]]:
        """What each unit gives, as soon as it is there."""
        ...


@dataclass(frozen=True)
class Local:
    """This process and the model it has loaded, unit after unit."""

    model: HookedModel

    def open(self) -> AbstractContextManager[object]:
        """Nothing to get ready."""
        return nullcontext()

    def map(self, task: Task[Result], units: Sequence[str]) -> Iterator[Done[Result]]:
        """What each unit gives, in order; an error is the unit's, not the run's."""
        for unit in units:
            yield _timed(task, self.model, unit)


def _timed(task: Task[Result], model: HookedModel, unit: str) -> Done[Result]:
    began = time.perf_counter()
    try:
        result = task(model, unit)
    except Exception as error:
        return Done(unit, None, time.perf_counter() - began, f"{type(error).__name__}: {error}")
    return Done(unit, result, time.perf_counter() - began)


@dataclass
class Cluster:
    """The workers of a Ray cluster, each with a model of its own, loaded once a map, or once while `open`.

    `model` is what `models.load` takes, and every node must be able to load it; one of another identity
    (`models.identity(model).whole`) is refused. Without `address` a cluster is started on this machine. A worker that is lost is replaced,
    and what it was at is given to another; a unit that takes its worker down `retries` times more is reported, and left out.
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

    def map(self, task: Task[Result], units: Sequence[str]) -> Iterator[Done[Result]]:
        """What each unit gives, as workers finish.

        Raises:
            EngineError: Ray is missing, the cluster cannot be reached or has no room, or a worker's weights are others.
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
            yield from self._crew.work(task, units)

    def _end(self) -> None:
        if self._crew is not None:
            self._crew.dismiss()
            self._crew = None
        if self._is_own:
            _ray().shutdown()
            self._is_own = False


class _Crew:
    """Workers of one map: who is coming, who is free, and who is at which unit. Each holds one unit at a time."""

    def __init__(self, ray: Any, cluster: Cluster) -> None:
        self.ray, self.cluster = ray, cluster
        self.coming: dict[Any, Any] = {}  # reference to a worker's first word -> worker
        self.free: list[Any] = []
        self.busy: dict[Any, tuple[str, Any]] = {}  # reference to a result -> unit, worker
        self.lost = 0  # workers, since one was ready
        self.task: Any = None  # a reference to it
        room = self.room()
        for _ in range(min(cluster.workers or room, room)):
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

    def work(self, task: Task[Any], units: Sequence[str]) -> Iterator[Done[Any]]:
        self.task = self.ray.put(task)
        for worker in self.free:
            worker.take.remote(self.task)
        try:
            yield from self._work(units)
        finally:
            for _, worker in self.busy.values():  # of a map that was broken off
                self.ray.kill(worker)
                self.hire()
            self.busy = {}

    def _work(self, units: Sequence[str]) -> Iterator[Done[Any]]:
        waiting, tries = deque(units), dict.fromkeys(units, 0)
        while waiting or self.busy:
            while waiting and self.free:
                unit, worker = waiting.popleft(), self.free.pop()
                self.busy[worker.run.remote(unit)] = (unit, worker)
            news, _ = self.ray.wait([*self.busy, *self.coming], num_returns=1, timeout=PATIENCE)
            if not news:
                self.room()  # nodes may have been lost, and workers may be waiting for one in vain
                continue
            (first,) = news
            if first in self.coming:
                self.welcome(first)
                continue
            unit, worker = self.busy.pop(first)
            try:
                done = self.ray.get(first)
                self.free.append(worker)
            except self.ray.exceptions.RayTaskError as error:  # the worker lives
                done = Done(unit, None, 0.0, f"{type(error.cause).__name__}: {error.cause}")
                self.free.append(worker)
            except self.ray.exceptions.RayError as error:
                self.hire()
                done = Done(unit, None, 0.0, f"its worker was lost ({str(error).splitlines()[0]})")
            if done.error and tries[unit] < self.cluster.retries:
                tries[unit] += 1
                waiting.append(unit)
            else:
                yield done

    def welcome(self, reference: Any) -> None:
        cluster, worker = self.cluster, self.coming.pop(reference)
        try:
            identity, node = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise EngineError(f"a worker cannot load {cluster.model}: {error.cause}") from error
        except self.ray.exceptions.RayError as error:
            self.lost += 1
            if self.lost > cluster.retries:
                raise EngineError(
                    f"{self.lost} workers were lost before they had loaded {cluster.model}: {error}"
                ) from error
            self.hire()
            return
        if identity != cluster.identity:
            raise EngineError(
                f"a worker on node {node} has another model under the name {cluster.model} ({identity[:12]}…) than this "
                f"machine ({cluster.identity[:12]}…). Put the same model, and the same versions, on every node."
            )
        self.lost = 0
        cluster.started.append(node)
        worker.take.remote(self.task)
        self.free.append(worker)

    def dismiss(self) -> None:
        for worker in [*self.free, *self.coming.values(), *(worker for _, worker in self.busy.values())]:
            self.ray.kill(worker)


class _Worker:
    """Loads the model once, then computes units."""

    def __init__(self, model: str, dtype: torch.dtype, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self.load = partial(models.load, model, device=device, dtype=dtype)

    def ready(self) -> tuple[str, str]:
        """Load; the weights it has, and the node it is on."""
        self.model = self.load()
        return models.identity(self.model).whole, str(_ray().get_runtime_context().get_node_id())

    def take(self, task: Task[Any]) -> None:
        """What units are for from now on; it may be large, so it comes once."""
        self.task = task

    def run(self, unit: str) -> Done[Any]:
        """What a unit gives."""
        return _timed(self.task, self.model, unit)


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
