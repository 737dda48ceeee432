"""MEND's network: the factors of a gradient become those of an edit (Mitchell et al. 2022).

    z  = [u; delta]             a token's factors at one weight, D = d_in + d_out numbers
    n  = (z - mean) / (std + 1e-7)                             statistics of tokens of the edit set
    c1 = max(0, s1 * (U1 V1 n + b1) + o1)                      s, o of the layer; U, V, b of all weights of a shape
    c2 = max(0, s2 * (U2 V2 (n + c1) + b2) + o2)               paper: without b2
    [u~; delta~] = n + c1 + c2      published, which begins with the normalised factors; statistics follow the training
                 = z + std (c1 + c2)  paper, which begins with the gradient itself; statistics are made before
    W +=  rate sum_t outer(u~_t, delta~_t)      published: the sign is learnt
    W -=  rate sum_t outer(u~_t, delta~_t)      paper

The paper has the input normalised and the beginning be the gradient itself; both hold where corrections are made in normalised numbers and
put back to the scale of the factors, which is what `paper` does here. At 0 the gradient of max(0, x) is 1, as the published code has it:
with relu's, 0, nothing would ever be learnt, because U begins as zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from mechedit.editors.trained.factors import Factors, Term
from mechedit.settings import MendTraining
from mechedit.weights import Weight

__all__ = ["Mend", "Transform"]

EPSILON = 1e-7


class Transform(nn.Module):
    """The network of all weights of one shape, `modes` of them."""

    seen: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, width: int, modes: int, settings: MendTraining, generator: torch.Generator) -> None:
        super().__init__()
        rank, self.paper = min(settings.rank, width), settings.form == "paper"
        for number in (1, 2):
            V = torch.randn(rank, width, generator=generator)
            if self.paper:  # Xavier, uniform
                V = (torch.rand(rank, width, generator=generator) * 2 - 1) * (6 / (rank + width)) ** 0.5
            self.register_parameter(f"U{number}", nn.Parameter(torch.zeros(width, rank)))
            self.register_parameter(f"V{number}", nn.Parameter(V))
            self.register_parameter(f"scale{number}", nn.Parameter(torch.ones(modes, width)))
            self.register_parameter(f"offset{number}", nn.Parameter(torch.zeros(modes, width)))
            if number == 1 or not self.paper:
                self.register_parameter(f"bias{number}", nn.Parameter(torch.zeros(width)))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(width, dtype=torch.float64))

    @torch.no_grad()
    def observe(self, z: Float[Tensor, "tokens width"]) -> None:
        """Let the statistics be of these tokens too: their mean, and the sum of squares around it (Welford, Chan)."""
        if not len(z):
            return
        z, mean = z.double(), z.double().mean(0)
        total = self.seen + len(z)
        apart = mean - self.mean
        self.squares += (z - mean).square().sum(0) + apart.square() * (self.seen * len(z) / total)
        self.mean += apart * (len(z) / total)
        self.seen += len(z)

    @property
    def deviation(self) -> Float[Tensor, " width"]:
        """The standard deviation of each number, and a little; 1 before any token was seen."""
        if self.seen < 2:
            return torch.ones_like(self.mean)
        return (self.squares / (self.seen - 1)).sqrt() + EPSILON

    def forward(self, z: Float[Tensor, "tokens width"], mode: int) -> Float[Tensor, "tokens width"]:
        """The factors of an edit, of tokens of the weight `mode`."""
        n = (z - self.mean.to(z)) / self.deviation.to(z)
        first = self._correction(n, 1, mode)
        both = first + self._correction(n + first, 2, mode)
        return z + self.deviation.to(z) * both if self.paper else n + both

    def _correction(self, h: Tensor, number: int, mode: int) -> Tensor:
        U, V, scale, offset = (getattr(self, f"{name}{number}") for name in ("U", "V", "scale", "offset"))
        inner = einsum(h, V, "tokens width, rank width -> tokens rank")
        outer = einsum(inner, U, "tokens rank, width rank -> tokens width")
        if (bias := getattr(self, f"bias{number}", None)) is not None:
            outer = outer + bias
        return (scale[mode] * outer + offset[mode]).clamp(min=0)


class Mend(nn.Module):
    """The networks of all edited weights, and their edit rates."""

    def __init__(self, shapes: Mapping[Weight, tuple[int, int]], settings: MendTraining) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(settings.seed)
        self.shapes, self.sign = dict(shapes), -1.0 if settings.form == "paper" else 1.0
        self.modes = {weight: self._alike(weight).index(weight) for weight in self.shapes}
        self.networks = nn.ModuleDict()
        for weight, shape in self.shapes.items():
            if self.modes[weight] == 0:
                self.networks[_named(shape)] = Transform(sum(shape), len(self._alike(weight)), settings, generator)
        self.rates = nn.Parameter(torch.full((len(self.shapes),), settings.edit_rate))

    def _alike(self, weight: Weight) -> list[Weight]:
        """The weights of its shape."""
        return [each for each in self.shapes if self.shapes[each] == self.shapes[weight]]

    def network(self, weight: Weight) -> Transform:
        """The network of this weight's shape."""
        found = self.networks[_named(self.shapes[weight])]
        assert isinstance(found, Transform)
        return found

    def observe(self, factors: Mapping[Weight, Factors]) -> None:
        """Let the statistics be of these factors too."""
        for weight, own in factors.items():
            self.network(weight).observe(torch.cat([own.u, own.delta], -1)[own.count])

    def terms(self, factors: Mapping[Weight, Factors], conditions: Sequence[Any] = ()) -> dict[Weight, Term]:
        """What each edit adds to each weight. Conditions are another editor's."""
        found = {}
        for number, (weight, own) in enumerate(factors.items()):
            z, count = torch.cat([own.u, own.delta], -1), own.count
            changed = torch.zeros_like(z).masked_scatter(count[..., None], self.network(weight)(z[count], self.modes[weight]))  # fmt: skip
            left, right = changed.split(self.shapes[weight], -1)
            found[weight] = Term(left, right * (self.sign * self.rates[number]))
        return found


def _named(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"
