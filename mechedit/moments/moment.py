"""C of one block, with what says where it comes from, its factor, and its file."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechedit import cache, files, provenance, rank_one
from mechedit.errors import MecheditError
from mechedit.models import HookedModel, W_out, identity, weight_hash
from mechedit.parsing import check, number
from mechedit.settings import MomentSettings, from_json

__all__ = ["RULE", "SAMPLED", "Moment", "MomentError", "condition", "read_published"]

_FORM = {
    "layer": int,
    "keys": int,
    "cond": number,
    "source": str,
    "settings": dict,
    "origin": {"name": str},
    "versions": {str: str},
}  # of the record in its file
RULE = "one stream in windows, BOS not counted"  # of what is a key; part of the cache's key
SAMPLED = "sampled from the model"


class MomentError(MecheditError, ValueError):
    """A second moment that cannot be estimated, or cannot be used."""


@dataclass(frozen=True, eq=False)
class Moment:
    """C [d_mlp, d_mlp] of one layer in float64, from `keys` keys; `cond` is its condition number."""

    layer: int
    C: Float[Tensor, "d_mlp d_mlp"]
    keys: int
    cond: float
    source: str
    settings: MomentSettings
    origin: dict[str, Any]
    versions: dict[str, str]

    @classmethod
    def of(
        cls,
        model: HookedModel,
        layer: int,
        C: Float[Tensor, "d_mlp d_mlp"],
        keys: int,
        source: str,
        settings: MomentSettings,
    ) -> Moment:
        """C of a block of this model, with all that says so."""
        origin = provenance.origin(model) | {"keys": identity(model).keys(layer)}
        return cls(layer, C, keys, condition(C), source, settings, origin, provenance.versions())

    def is_of(self, model: HookedModel) -> bool:
        """Whether the block's keys are now as they were when C was estimated."""
        if "keys" not in self.origin:  # of version 0.1.0
            return bool(self.origin.get("weight_hash") == weight_hash(model))
        return bool(self.origin["keys"] == identity(model).keys(self.layer))

    @cached_property
    def factor(self) -> Float[Tensor, "d_mlp d_mlp"]:
        """The lower Cholesky factor of C, in float64 on the CPU; computed once, and saved with C.

        Raises:
            RankOneError: C is not positive definite, or holds NaN or infinity.
        """
        return rank_one.factor(self.C)

    def solve(self, keys: Float[Tensor, "n d_mlp"]) -> Float[Tensor, "n d_mlp"]:
        """K C^-1, in float64; errors as in `factor`."""
        return rank_one.whitened(keys, self.factor)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of C, which says by which C an edit was made."""
        return hashlib.sha256(self.C.cpu().double().contiguous().numpy().tobytes()).hexdigest()

    @property
    def notes(self) -> tuple[str, ...]:
        """What makes this less than was asked for: a text that ended before."""
        if self.settings.parts == 1 and self.keys < self.settings.tokens:
            return (f"the text gave {self.keys} keys of the {self.settings.tokens} that were wanted",)
        return ()

    def to_json(self) -> dict[str, Any]:
        """Everything but C itself."""
        record = {"layer": self.layer, "keys": self.keys, "cond": self.cond, "source": self.source}
        return record | {"settings": asdict(self.settings), "origin": self.origin, "versions": self.versions}

    def save(self, path: str | Path) -> Path:
        """Write as one safetensors file, with the factor where it was computed."""
        tensors: dict[str, Tensor] = {name: vars(self)[name] for name in ("C", "factor") if name in vars(self)}
        return files.write(path, "moment", tensors, self.to_json())

    @staticmethod
    def load(path: str | Path) -> Moment:
        """Read a moment that `save` wrote.

        Raises:
            FileError: the file is missing, damaged, or something else.
        """
        tensors, record = files.read(path, "moment")
        try:
            check(record, _FORM)
            settings = from_json(MomentSettings, record["settings"])
            rest = (record["keys"], record["cond"], record["source"], settings, record["origin"], record["versions"])
            found = Moment(record["layer"], tensors["C"], *rest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise files.FileError(
                f"{path} is a moment that lacks something, or has what is not known: {error}."
            ) from error
        if wrong := _no_moment(found.C):
            raise files.FileError(f"{path} is a moment whose C is {wrong}.")
        if found.keys < 1 or found.layer < 0:
            raise files.FileError(f"{path} is a moment of {found.keys} keys of block {found.layer}, which cannot be.")
        factor = tensors.get("factor")
        if factor is not None and _is_factor(factor, found.C):
            vars(found)["factor"] = factor  # as if it had been computed: a cached_property is kept there
        return found


def _no_moment(C: Tensor) -> str:
    """Why a matrix is no second moment; empty where it can be one."""
    if C.ndim != 2 or C.shape[0] != C.shape[1]:
        return f"no square matrix: {list(C.shape)}"
    if not C.is_floating_point() or not bool(C.isfinite().all()):
        return "not finite"
    if float((C - C.T).abs().max()) > rank_one.SYMMETRIC * float(C.abs().max()):
        return "not symmetric"
    return ""


def _is_factor(factor: Tensor, C: Float[Tensor, "d_mlp d_mlp"]) -> bool:
    """Whether L L^T is C, seen by what both do to one vector; a factor that is not is computed again."""
    if factor.shape != C.shape or factor.dtype != torch.float64 or not bool(factor.isfinite().all()):
        return False
    probe = torch.linspace(-1.0, 1.0, len(C), dtype=torch.float64)
    found, wanted = factor @ (factor.T @ probe), C.double() @ probe
    return float((found - wanted).norm()) <= 1e-8 * float(wanted.norm()) and not bool(factor.triu(1).any())


def read_published(path: str | Path, model: HookedModel, layer: int) -> Moment:
    """C of a layer from a `.npz` of the published code, which holds the sum of k k^T and the number of keys.

    The file does not say which model or text it is of, nor whether BOS was there; that is the reader's word.

    Raises:
        MomentError: no such file, or not what the published code writes for a model of this width.
    """
    d_mlp = W_out(model, layer).shape[0]
    try:
        # numpy leaves a file that it opened itself open where that is no archive
        with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            total, keys = file["mom2.mom2"], int(file["mom2.count"])
    except (OSError, EOFError, KeyError, TypeError, ValueError, MemoryError, zipfile.BadZipFile) as error:
        raise MomentError(f"{path} is no .npz of second moments with mom2.mom2 and mom2.count ({error}).") from error
    if not isinstance(total, np.ndarray) or total.dtype.kind not in "fiu":
        raise MomentError(f"{path} holds no numbers under mom2.mom2.")
    if total.shape != (d_mlp, d_mlp) or keys < 1 or (wrong := _no_moment(torch.from_numpy(total))):
        found = (
            f"it has {list(total.shape)} over {keys}" if total.shape != (d_mlp, d_mlp) or keys < 1 else f"it is {wrong}"
        )
        raise MomentError(
            f"{path} must hold a finite, symmetric sum [{d_mlp}, {d_mlp}] over one or more keys; {found}."
        )
    C = torch.from_numpy(total.astype(np.float64)) / keys
    settings = MomentSettings(tokens=keys, context=int(model.cfg.n_ctx))
    return Moment.of(model, layer, C, keys, f"published file {cache.file_hash(Path(path))}", settings)


def condition(C: Float[Tensor, "d_mlp d_mlp"]) -> float:
    """The ratio of C's largest to its smallest eigenvalue; infinite where C is not positive definite."""
    eigenvalues = torch.linalg.eigvalsh(C.double())
    return float(eigenvalues[-1] / eigenvalues[0]) if eigenvalues[0] > 0 else float("inf")
