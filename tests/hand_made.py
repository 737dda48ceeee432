"""Edits written by hand: what is applied, exported or saved need not come from an editor."""

from __future__ import annotations

import torch

from mechedit import editing, provenance
from mechedit.changes import Change, Dense, LowRank, Rows
from mechedit.edits import Edit, Measured
from mechedit.models import HookedModel
from mechedit.rank_one import RankOneEdit
from mechedit.weights import Weight, matrix_shape
from tests.conftest import FACT

SIZE = 0.1  # of each number of a change, beside weights of about 0.25


def edit_of(model: HookedModel, *changes: Change, fact=FACT, **named) -> Edit:
    """An edit with these changes, as if it had been found on the model as it is now."""
    measured = Measured(editing.described(fact), {"p_new": 0.01, "p_true": 0.9}, {"p_new": 0.8, "p_true": 0.1})
    parts = {
        "editor": "by hand",
        "changes": changes,
        "facts": (measured,),
        "report": {"update_norm": 1.0, "relative_norm": 0.1, "essence_kl": 0.1, "perplexity_ratio": 1.0},
        "origin": provenance.origin(model),
        "settings": {"layer": 1, "seed": 3},
        "versions": provenance.versions(),
        "seconds": 1.5,
    }
    return Edit(**(parts | named))


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers of the size of a change."""
    return SIZE * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rank_one(model: HookedModel, layer: int = 1, seed: int = 0) -> RankOneEdit:
    rows, columns = matrix_shape(model, Weight(layer, "mlp.W_out"))
    return RankOneEdit(layer, numbers(rows, seed=seed), numbers(columns, seed=seed + 1000) / SIZE, 0.5)


def low_rank(model: HookedModel, layer: int, name: str, rank: int = 2, seed: int = 0) -> LowRank:
    rows, columns = matrix_shape(model, Weight(layer, name))
    return LowRank(Weight(layer, name), numbers(rank, rows, seed=seed), numbers(rank, columns, seed=seed + 1000) / SIZE)


def some_rows(model: HookedModel, layer: int, name: str, index: tuple[int, ...] = (3, 0, 17), seed: int = 0) -> Rows:
    rows, columns = matrix_shape(model, Weight(layer, name))
    return Rows(Weight(layer, name), torch.tensor(index), numbers(len(index), columns, seed=seed), rows)


def dense(model: HookedModel, layer: int, name: str, seed: int = 0) -> Dense:
    return Dense(Weight(layer, name), numbers(*matrix_shape(model, Weight(layer, name)), seed=seed))
