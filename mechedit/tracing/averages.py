"""Causal effects over many facts, by layer and token role, with honest intervals (Meng et al. 2022, section 2.2).

The unit is the fact. Within a fact, tokens of one role are averaged; then facts are, over those that have the role. The
total effect is clean less corrupted; the indirect effect of a site is restored less corrupted; what is left of the total,
clean less restored, is the direct one. Intervals are over facts (`statistics`). (The published notebook clips negative
effects to zero in pictures, pools tokens as if they were independent, and divides by another sample's n.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.corruption import has_fixed_std
from mechedit.errors import MecheditError
from mechedit.parsing import check, number
from mechedit.settings import TraceSettings, from_json
from mechedit.statistics import FEWEST, UNBOUNDED, Mean, interval, summary
from mechedit.tracing import measures
from mechedit.tracing.result import Trace
from mechedit.tracing.roles import ROLES

__all__ = ["Average", "AverageError", "average", "compare"]


class AverageError(MecheditError, ValueError):
    """Traces that cannot be averaged."""


@dataclass(frozen=True, eq=False, repr=False)
class Average:
    """Effects over `n` facts. Grids are [layer, role], roles in the order of `roles.ROLES`, nan where no fact has the role.

    `indirect[kind]` is the average indirect effect, `low` and `high` its interval, `direct[kind]` the average direct effect;
    `restored[kind]` the mean measure itself. `n_role` counts the facts with each role. `exceptions` are the subjects whose
    decisive token is not the subject's last: where, of all positions but the prompt's last, the best layer of `decided_by`
    restores most. `behind[kind]` is the upper bound of the interval of how a layer differs from the best one of its role, fact
    by fact: where it is not below zero, these facts do not tell the two apart; it is nan where there is no interval.
    """

    settings: TraceSettings
    n: int
    n_role: tuple[int, ...]
    clean: Mean
    corrupted: Mean
    total: Mean
    restored: dict[str, Float[Tensor, "layer role"]]
    indirect: dict[str, Float[Tensor, "layer role"]]
    direct: dict[str, Float[Tensor, "layer role"]]
    low: dict[str, Float[Tensor, "layer role"]]
    high: dict[str, Float[Tensor, "layer role"]]
    behind: dict[str, Float[Tensor, "layer role"]]
    best: dict[str, Float[Tensor, " role"]]
    decided_by: str
    exceptions: tuple[tuple[str, str], ...]

    def __repr__(self) -> str:
        return f"Average({self.n} facts: total effect {self.total}; {', '.join(self.indirect)})"

    def at(self, kind: str, layer: int, role: str) -> Mean:
        """The average indirect effect of one site."""
        place = layer, ROLES.index(role)
        return Mean(
            float(self.indirect[kind][place]),
            float(self.low[kind][place]),
            float(self.high[kind][place]),
            self.n_role[place[1]],
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, nan as null."""

        def plain(grids: dict[str, Tensor]) -> dict[str, Any]:
            return {kind: _nulls(grid.tolist()) for kind, grid in grids.items()}

        return {
            "trace_settings": asdict(self.settings),
            "n": self.n,
            "roles": list(ROLES),
            "n_role": list(self.n_role),
            "clean": self.clean.to_json(),
            "corrupted": self.corrupted.to_json(),
            "total_effect": self.total.to_json(),
            "restored": plain(self.restored),
            "indirect_effect": plain(self.indirect),
            "direct_effect": plain(self.direct),
            "low": plain(self.low),
            "high": plain(self.high),
            "behind_best_layer_high": plain(self.behind),
            "mean_of_best_layer": plain(self.best),
            "decided_by": self.decided_by,
            "exceptions": [list(each) for each in self.exceptions],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Average:
        """What `to_json` gave, and version 0.1.0's.

        Raises:
            ParseError, KeyError, TypeError, ValueError: it is not.
        """
        check(record, _FORM)
        grids = {field: {kind: _grid(rows) for kind, rows in record[name].items()} for field, name in _GRIDS.items() if name in record}  # fmt: skip
        shape, roles = {grid.shape for each in grids.values() for grid in each.values()}, len(ROLES)
        if len(shape) != 1 or {len(each) for each in shape} != {2} or next(iter(shape))[1] != roles or len(record["n_role"]) != roles:  # fmt: skip
            raise ValueError(f"its grids must be of one size, with {roles} roles, and so many counts in n_role")
        if len({frozenset(each) for each in grids.values()}) != 1 or record["decided_by"] not in grids["indirect"]:
            raise ValueError("its grids must be of the same kinds, decided_by among them")
        nothing = {kind: torch.full_like(grid, torch.nan) for kind, grid in grids["indirect"].items()}
        runs = {name: Mean.from_json(record[name]) for name in ("clean", "corrupted", "total_effect")}
        fields: dict[str, Any] = {"behind": nothing} | grids
        return cls(
            settings=from_json(TraceSettings, record["trace_settings"]),
            n=record["n"],
            n_role=tuple(record["n_role"]),
            clean=runs["clean"],
            corrupted=runs["corrupted"],
            total=runs["total_effect"],
            best={kind: _grid(row) for kind, row in record["mean_of_best_layer"].items()},
            decided_by=record["decided_by"],
            exceptions=tuple((subject, role) for subject, role in record["exceptions"]),
            **fields,
        )


def average(traces: Sequence[Trace], *, seed: int = 0) -> Average:
    """Average effects of traces that share model and settings.

    Raises:
        AverageError: fewer than two traces, or traces that differ in more than the fact.
    """
    _check(traces)
    kinds = traces[0].settings.kinds
    clean = np.array([each.p_clean for each in traces])
    corrupted = np.array([each.p_corrupted for each in traces])
    by_fact = {kind: np.stack([_by_role(each, kind) for each in traces]) for kind in kinds}
    effects = {kind: values - corrupted[:, None, None] for kind, values in by_fact.items()}
    bounds = {kind: interval(values, seed, UNBOUNDED) for kind, values in effects.items()}
    bounds_of_p = (0.0, 1.0) if measures.of(traces[0].settings).share else UNBOUNDED
    decided_by = "mlp" if "mlp" in kinds else kinds[0]
    decisive = [_decisive(each, decided_by) for each in traces]

    def grids(values: dict[str, np.ndarray]) -> dict[str, Tensor]:
        return {kind: torch.tensor(_mean(each), dtype=torch.float32) for kind, each in values.items()}

    return Average(
        settings=traces[0].settings,
        n=len(traces),
        n_role=tuple(int(each) for each in (~np.isnan(by_fact[kinds[0]][:, 0])).sum(0)),
        clean=summary(clean, seed, bounds_of_p),
        corrupted=summary(corrupted, seed, bounds_of_p),
        total=summary(clean - corrupted, seed, UNBOUNDED),
        restored=grids(by_fact),
        indirect=grids(effects),
        direct=grids({kind: clean[:, None, None] - values for kind, values in by_fact.items()}),
        low={kind: torch.tensor(low, dtype=torch.float32) for kind, (low, _) in bounds.items()},
        high={kind: torch.tensor(high, dtype=torch.float32) for kind, (_, high) in bounds.items()},
        behind={kind: torch.tensor(_behind(values, seed), dtype=torch.float32) for kind, values in by_fact.items()},
        best=grids({kind: values.max(1) for kind, values in by_fact.items()}),
        decided_by=decided_by,
        exceptions=tuple(
            (each.subject, role) for each, role in zip(traces, decisive, strict=True) if role != "subject_last"
        ),
    )


def compare(
    first: Sequence[Trace], second: Sequence[Trace], kind: str, layer: int, role: str, *, seed: int = 0
) -> Mean:
    """The paired difference, second less first, of one site's indirect effect over facts traced in two conditions.

    Raises:
        AverageError: the traces are not of the same facts and answers in the same order, or have no such site.
    """
    if role not in ROLES or not all(
        kind in each.effects and 0 <= layer < len(each.effects[kind]) for each in (*first, *second)
    ):
        raise AverageError(
            f"a site must have a role among {', '.join(ROLES)} and a kind and a layer that were traced; found {role}, {kind}, {layer}."
        )
    if [(each.prompt, each.answer_ids) for each in first] != [(each.prompt, each.answer_ids) for each in second]:
        raise AverageError(
            "a paired comparison needs the same facts, with the same answers, in the same order in both conditions."
        )
    column = ROLES.index(role)
    effects = [
        np.array([_by_role(each, kind)[layer, column] - each.p_corrupted for each in traces])
        for traces in (first, second)
    ]
    return summary(effects[1] - effects[0], seed, UNBOUNDED)


def _by_role(trace: Trace, kind: str) -> np.ndarray:
    """[layer, role]: the mean over the tokens of each role."""
    grid, names = trace.effects[kind].double().numpy(), trace.roles
    columns = [[index for index, name in enumerate(names) if name == role] for role in ROLES]
    nothing = np.full(len(grid), np.nan)
    return np.stack([grid[:, column].mean(1) if column else nothing for column in columns], 1)


def _behind(values: np.ndarray, seed: int) -> np.ndarray:
    """[layer, role] of [fact, layer, role]: the upper bound of each layer less the one of its role that is best on average."""
    best = np.nan_to_num(_mean(values), nan=-np.inf).argmax(0)
    differences = values - np.take_along_axis(values, best[None, None], 1)
    high = interval(differences, seed, UNBOUNDED)[1]
    alike = (np.nan_to_num(differences) == 0).all(0) & ((~np.isnan(differences)).sum(0) >= FEWEST)
    return np.where(alike, 0.0, high)  # the best one itself, and what is always equal to it


def _decisive(trace: Trace, kind: str) -> str:
    """The role of the position, but for the prompt's last token, where the best layer restores most; the subject's last token where that was
    not traced, as nothing is known of it then."""
    best = trace.effects[kind].nan_to_num(-torch.inf).amax(0)
    here = [index for index, role in enumerate(trace.roles) if role != "last"]
    if not any(bool(best[index].isfinite()) for index in here if trace.roles[index] == "subject_last"):
        return "subject_last"
    return trace.roles[here[int(best[here].argmax())]]


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean over facts, nans left out; nan where there is nothing else."""
    present = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(present, values, 0.0).sum(0) / present.sum(0)


def _check(traces: Sequence[Trace]) -> None:
    if len(traces) < 2:
        raise AverageError(f"an average needs at least 2 traces; found {len(traces)}.")
    for each in traces:
        if differing := [what for what, of in _CONDITIONS.items() if of(each) != of(traces[0])]:
            raise AverageError(
                f"traces of one average must share settings, model and corruption; {each.prompt!r} differs from {traces[0].prompt!r} "
                f"in its {differing[0]}."
            )


def _grid(rows: Any) -> Tensor:
    """Numbers in lists, null for nan, as a tensor."""
    return torch.tensor(np.array(rows, dtype=np.float32))


def _nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_nulls(each) for each in value]
    return None if value != value else value


_GRIDS = {
    "restored": "restored",
    "indirect": "indirect_effect",
    "direct": "direct_effect",
    "low": "low",
    "high": "high",
    "behind": "behind_best_layer_high",
}
"""Fields that are grids, and what `to_json` calls them."""

_FORM = {
    "trace_settings": dict,
    "n": int,
    "n_role": [int],
    **{name: {"mean": (number, None), "n": int} for name in ("clean", "corrupted", "total_effect")},
    **dict.fromkeys(("restored", "indirect_effect", "direct_effect", "low", "high", "mean_of_best_layer"), dict),
    "decided_by": str,
    "exceptions": [[str]],
}  # of what `to_json` gives

_CONDITIONS: dict[str, Callable[[Trace], Any]] = {
    "settings": lambda trace: replace(trace.settings, memory=1.0),  # on which no number depends
    "weights": lambda trace: trace.origin.get("weights") or trace.origin.get("weight_hash"),
    "configuration": lambda trace: trace.origin.get("configuration"),
    "corruption": lambda trace: _corruption(trace),
}
"""What traces of one average share."""


def _corruption(trace: Trace) -> tuple[str, float]:
    """How a fact was corrupted, less what is its own: the subject that took its subject's place, the spread of a draw."""
    if trace.settings.corruption == "tokens" and trace.noise_std == 0:
        return "", 0.0
    fixed = has_fixed_std(trace.settings, trace.corrupted_by)
    return trace.corrupted_by, trace.noise_std if fixed else 0.0
