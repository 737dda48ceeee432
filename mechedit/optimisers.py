"""How changes d of values go down their loss: Adam, as published, or L-BFGS by the curvature that is known beforehand.

Adam's first steps move every coordinate by the learning rate, whatever it matters. Where the loss weighs G (`mechedit.moments.curvature`) they
cost ordinary text more than the target gains, and what follows is spent on taking them back. L-BFGS (Nocedal 1980) seeks z = L^T d in d's
place, with L L^T = fisher * G and a little of the identity: what the loss holds against d is then |z|^2 / 2, round in all directions, and only what
the target adds has to be learnt from slopes. A step that does not lower the loss enough (Armijo 1966) is shortened.

Many facts go down at once, each by itself, and keep each part of their d within `clamp` lengths of the value's own (`descent`); or the values
of all rows of a sequence go down one loss (`mechedit.runs.settling`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechedit.settings import RomeSettings

__all__ = ["Adam", "ByPart", "ByRow", "Coordinates", "Descent", "Lbfgs", "descent", "root"]

MOMENTS = (0.9, 0.999, 1e-8)  # of Adam: how much of both averages of slopes stays, and what is added to the divisor
PAIRS = 10  # of steps and differences of slopes that L-BFGS remembers
ENOUGH = 1e-4  # of what the slope promises, a step's gain
SHORTER = (0.1, 0.5)  # least and most share of a step that was too long
ROUND = 0.1  # of the mean curvature, in all directions


class Descent(ABC):
    """Where the loss of each fact is to be taken next, `delta`, from 0 on, of which no part is to be longer than `longest`; the latest that was
    an improvement, `best`."""

    def __init__(
        self, initial: Float[Tensor, "facts parts d_model"], longest: Float[Tensor, "facts parts 1"] | None = None
    ) -> None:
        self.delta, self.longest = torch.zeros_like(initial), longest

    @property
    def best(self) -> Float[Tensor, "facts parts d_model"]:
        return self.delta

    @abstractmethod
    def judge(
        self, loss: Float[Tensor, " facts"], slope: Float[Tensor, "facts parts d_model"]
    ) -> Bool[Tensor, " facts"]:
        """Take the loss and its slope at `delta`; says whose is good enough to go on from."""
        ...

    @abstractmethod
    def go(self, done: Bool[Tensor, " facts"]) -> None:
        """Move `delta` of each fact that is not done."""
        ...

    def within(self, delta: Float[Tensor, "facts parts d_model"]) -> Float[Tensor, "facts parts 1"]:
        """The share of each part that is not too long."""
        lengths = delta.norm(dim=2, keepdim=True)
        return torch.ones_like(lengths) if self.longest is None else (self.longest / lengths).clamp(max=1.0)


class Adam(Descent):
    """As published; it does not go back."""

    def __init__(
        self,
        initial: Float[Tensor, "facts parts d_model"],
        learning_rate: float,
        longest: Float[Tensor, "facts parts 1"] | None = None,
    ) -> None:
        super().__init__(initial, longest)
        self.learning_rate = learning_rate
        self.mean, self.square = torch.zeros_like(initial), torch.zeros_like(initial)
        self.steps = 0

    def judge(
        self, loss: Float[Tensor, " facts"], slope: Float[Tensor, "facts parts d_model"]
    ) -> Bool[Tensor, " facts"]:
        first, second, _ = MOMENTS
        self.steps += 1
        self.mean.lerp_(slope, 1 - first)
        self.square.mul_(second).addcmul_(slope, slope, value=1 - second)
        return torch.ones_like(loss, dtype=torch.bool)

    def go(self, done: Bool[Tensor, " facts"]) -> None:
        first, second, least = MOMENTS
        divisor = (self.square / (1 - second**self.steps)).sqrt() + least
        new = self.delta - self.learning_rate / (1 - first**self.steps) * self.mean / divisor
        self.delta = torch.where(done[:, None, None], self.delta, new * self.within(new))


@runtime_checkable
class Coordinates(Protocol):
    """In which L-BFGS seeks d: z."""

    def of(self, z: Float[Tensor, "facts parts d_model"]) -> Float[Tensor, "facts parts d_model"]:
        """d of z."""
        ...

    def slope_of(self, slope: Float[Tensor, "facts parts d_model"]) -> Float[Tensor, "facts parts d_model"]:
        """The slope by z of the slope by d."""
        ...


@dataclass(frozen=True, eq=False)
class ByPart:
    """z = L^T d of the last part, whose curvature L L^T is known; d in lengths of the longest of the others."""

    L: Float[Tensor, "d_model d_model"]
    longest: Float[Tensor, "facts parts 1"]

    def of(self, z: Float[Tensor, "facts parts d_model"]) -> Float[Tensor, "facts parts d_model"]:
        delta = z * self.longest
        delta[:, -1] = torch.linalg.solve_triangular(self.L.T, z[:, -1].T, upper=True).T
        return delta

    def slope_of(self, slope: Float[Tensor, "facts parts d_model"]) -> Float[Tensor, "facts parts d_model"]:
        found = slope * self.longest
        found[:, -1] = torch.linalg.solve_triangular(self.L, slope[:, -1].T, upper=False).T
        return found


@dataclass(frozen=True, eq=False)
class ByRow:
    """z = A^T d L of d [rows, d_model] whose curvature is the Kronecker product of A A^T and L L^T."""

    A: Float[Tensor, "rows rows"]
    L: Float[Tensor, "d_model d_model"]

    def of(self, z: Float[Tensor, "one rows d_model"]) -> Float[Tensor, "one rows d_model"]:
        right = torch.linalg.solve_triangular(self.L, z[0], upper=False, left=False)
        return torch.linalg.solve_triangular(self.A.T, right, upper=True)[None]

    def slope_of(self, slope: Float[Tensor, "one rows d_model"]) -> Float[Tensor, "one rows d_model"]:
        right = torch.linalg.solve_triangular(self.L.T, slope[0], upper=True, left=False)
        return torch.linalg.solve_triangular(self.A, right, upper=False)[None]


class Lbfgs(Descent):
    """In the coordinates z, in float64 on the CPU, as not every device has it."""

    def __init__(
        self,
        initial: Float[Tensor, "facts parts d_model"],
        coordinates: Coordinates,
        longest: Float[Tensor, "facts parts 1"] | None = None,
    ) -> None:
        super().__init__(initial, longest)
        self.coordinates = coordinates
        zero = torch.zeros(initial.shape, dtype=torch.float64)
        self.tried, self.at, self.slope, self.way = zero, zero, zero, zero  # z
        self.loss = zero.new_full((len(zero),), torch.inf)  # there
        self.share = torch.ones_like(self.loss)  # of the way that is tried
        self.steps = self.bends = zero.new_zeros(PAIRS, *zero.shape)  # the latest last; bends are differences of slopes
        self.curved = zero.new_zeros(PAIRS, len(zero))  # the products of both

    @property
    def best(self) -> Float[Tensor, "facts parts d_model"]:
        return self._as_given(self.coordinates.of(self.at))

    def judge(
        self, loss: Float[Tensor, " facts"], slope: Float[Tensor, "facts parts d_model"]
    ) -> Bool[Tensor, " facts"]:
        loss, slope, step = loss.cpu().double(), self.coordinates.slope_of(slope.cpu().double()), self.tried - self.at
        promised, bend = _product(self.slope, step), slope - self.slope
        is_better = loss <= self.loss + ENOUGH * promised
        better, curved = is_better[:, None, None], _product(step, bend)
        is_known = is_better & (curved > 0)
        for name, new in (("steps", step), ("bends", bend), ("curved", curved)):
            old = getattr(self, name)
            known = is_known.view(-1, *[1] * (new.ndim - 1))
            setattr(self, name, torch.where(known, torch.cat([old[1:], new[None]]), old))
        shorter = (-promised / (2 * (loss - self.loss - promised))).nan_to_num(0.0).clamp(*SHORTER)
        self.share = torch.where(is_better, 1.0, self.share * shorter)
        self.loss = torch.where(is_better, loss, self.loss)
        self.at, self.slope = torch.where(better, self.tried, self.at), torch.where(better, slope, self.slope)
        self.way = torch.where(better, self._way(), self.way)
        return is_better.to(self.delta.device)

    def go(self, done: Bool[Tensor, " facts"]) -> None:
        z = torch.where(done.cpu()[:, None, None], self.at, self.at + self.share[:, None, None] * self.way)
        delta = self.coordinates.of(z)
        within = self.within(delta)
        self.tried, self.delta = z * within, self._as_given(delta * within)

    def _as_given(self, delta: Float[Tensor, "facts parts d_model"]) -> Float[Tensor, "facts parts d_model"]:
        """In the number format and on the device of the values."""
        return delta.to(self.delta.dtype).to(self.delta.device)

    def _way(self) -> Float[Tensor, "facts parts d_model"]:
        """Down, by what the pairs say of the curvature; without any, a step of length 1."""
        way, weights = -self.slope, []
        for step, bend, curved in zip(self.steps.flip(0), self.bends.flip(0), self.curved.flip(0), strict=True):
            weights.append(torch.where(curved > 0, _product(step, way) / curved, 0.0)[:, None, None])
            way = way - weights[-1] * bend
        first = 1 / self.slope.flatten(1).norm(dim=1)
        known = self.curved[-1] / _product(self.bends[-1], self.bends[-1])
        way = way * torch.where(self.curved[-1] > 0, known, first)[:, None, None]
        for step, bend, curved, weight in zip(self.steps, self.bends, self.curved, reversed(weights), strict=True):
            back = torch.where(curved > 0, _product(bend, way) / curved, 0.0)[:, None, None]
            way = way + (weight - back) * step
        return way


def _product(a: Tensor, b: Tensor) -> Float[Tensor, " facts"]:
    return (a * b).sum((1, 2))


def root(curvature: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """L with L L^T the curvature and a little of the identity, in float64 on the CPU."""
    known = curvature.cpu().double()
    little = ROUND * float(known.diagonal().mean()) or 1.0
    return torch.linalg.cholesky(known + little * torch.eye(len(known)).to(known))


def descent(
    initial: Float[Tensor, "facts parts d_model"],
    settings: RomeSettings,
    curvature: Float[Tensor, "d_model d_model"] | None,
) -> Descent:
    """Of values whose own are `initial`: L-BFGS where some curvature, of the last part, is known, else Adam."""
    longest = settings.clamp * initial.norm(dim=2, keepdim=True)
    if curvature is None:
        return Adam(initial, settings.learning_rate, longest)
    return Lbfgs(initial, ByPart(root(curvature), longest.cpu()), longest.cpu())
