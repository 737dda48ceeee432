"""Who computes a run's units: this process, one after the other, or the workers of a Ray cluster.

An engine maps a task over units. A task is called as `task(model, unit)`, with the model of whoever computes; it may not hold
a model itself, so that it can travel. Both engines give the same results; what a unit gives depends on the unit alone.
"""

from __future__ import annotations

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

    `model` is what `models.load` takes, and every node must be able to load it; weights that differ from `weight_hash` are
    refused. Without `address` a cluster is started on this machine. A worker that is lost is replaced, and what it was at is
    given to another; a unit that takes its worker down `retries` times more is reported, and left out.
    """

    model: str
    weight_hash: str
    address: str | None = None
    workers: int = 0  # 0: as many as the cluster has room for
    cpus: float = 1.0  # of each worker, and its threads
    gpus: float = 0.0
    dtype: torch.dtype = torch.float32
    retries: int = 2
    started: list[str] = field(default_factory=list, compare=False)  # node of each worker, in the order they came up
    _crew: _Crew | None = field(default=None, init=False, repr=False, compare=False)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Connect, and have workers until the body ends.

        Raises:
            EngineError: as in `map`.
        """
        if self._crew is not None:  # open already
            yield
            return
        ray = _ray()
        own = not ray.is_initialized()
        if own:
            _connect(ray, self.address)
        try:
            self._crew = _Crew(ray, self)
            yield
        finally:
            if self._crew is not None:
                self._crew.dismiss()
                self._crew = None
            if own:
                ray.shutdown()

    def map(self, task: Task[Result], units: Sequence[str]) -> Iterator[Done[Result]]:
        """What each unit gives, as workers finish.

        Raises:
            EngineError: Ray is missing, the cluster cannot be reached or has no room, or a worker's weights are others.
        """
        if not units:
            return
        with self.open():
            assert self._crew is not None
            yield from self._crew.work(task, units)


class _Crew:
    """Workers of one map: who is coming, who is free, and who is at which unit. Each holds one unit at a time."""

    def __init__(self, ray: Any, cluster: Cluster) -> None:
        self.ray, self.cluster = ray, cluster
        self.coming: dict[Any, Any] = {}  # reference to a worker's first word -> worker
        self.free: list[Any] = []
        self.busy: dict[Any, tuple[str, Any]] = {}  # reference to a result -> unit, worker
        self.lost = 0  # workers, since one was ready
        room = int(min(_room(ray, "CPU", cluster.cpus), _room(ray, "GPU", cluster.gpus)))
        if room < 1:
            raise EngineError(
                f"a worker needs {cluster.cpus:g} CPUs and {cluster.gpus:g} GPUs; no room for one in the cluster, which has "
                f"{ray.cluster_resources().get('CPU', 0):g} and {ray.cluster_resources().get('GPU', 0):g}."
            )
        for _ in range(min(cluster.workers or room, room)):
            self.hire()

    def hire(self) -> None:
        cluster = self.cluster
        made = self.ray.remote(_Worker).options(num_cpus=cluster.cpus, num_gpus=cluster.gpus)
        device = "cuda" if cluster.gpus else "cpu"
        worker = made.remote(cluster.model, cluster.dtype, max(1, int(cluster.cpus)), device)
        self.coming[worker.ready.remote()] = worker

    def work(self, task: Task[Any], units: Sequence[str]) -> Iterator[Done[Any]]:
        try:
            yield from self._work(self.ray.put(task), units)
        finally:
            for _, worker in self.busy.values():  # of a map that was broken off
                self.ray.kill(worker)
                self.hire()
            self.busy = {}

    def _work(self, task: Any, units: Sequence[str]) -> Iterator[Done[Any]]:
        waiting, tries = deque(units), dict.fromkeys(units, 0)
        while waiting or self.busy:
            while waiting and self.free:
                unit, worker = waiting.popleft(), self.free.pop()
                self.busy[worker.run.remote(task, unit)] = (unit, worker)
            (first,), _ = self.ray.wait([*self.busy, *self.coming], num_returns=1)
            if first in self.coming:
                self.welcome(first)
                continue
            unit, worker = self.busy.pop(first)
            try:
                done = self.ray.get(first)
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
            weight_hash, node = self.ray.get(reference)
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
        if weight_hash != cluster.weight_hash:
            raise EngineError(
                f"a worker on node {node} has other weights under the name {cluster.model} ({weight_hash[:12]}…) than this "
                f"machine ({cluster.weight_hash[:12]}…). Put the same model on every node."
            )
        self.lost = 0
        cluster.started.append(node)
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
        return models.weight_hash(self.model), str(_ray().get_runtime_context().get_node_id())

    def run(self, task: Task[Any], unit: str) -> Done[Any]:
        """What a unit gives."""
        return _timed(task, self.model, unit)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise EngineError("the engine `ray` needs Ray: pip install 'mechedit[ray]'.") from error
    return ray


def _connect(ray: Any, address: str | None) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", include_dashboard=False if address is None else None)  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise EngineError(f"no Ray cluster answers at {address}: {error}. `ray start --head` starts one.") from error


def _room(ray: Any, resource: str, each: float) -> float:
    """How many workers the cluster's resource suffices for."""
    return ray.cluster_resources().get(resource, 0) / each if each else float("inf")
