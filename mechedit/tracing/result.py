"""The result of a causal trace, and its file: grids of what each cell restores, with all that made them.

No model is needed to load, save or draw one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mechedit import files
from mechedit.parsing import check, number
from mechedit.settings import TraceSettings, from_json
from mechedit.tracing import measures
from mechedit.tracing.roles import roles

__all__ = ["Trace", "not_first"]


_FORM = {
    "prompt": str,
    "tokens": [str],
    "subject": str,
    "subject_range": [int],
    "relation": (str, None),
    "answer": str,
    "answer_ids": [int],
    "corrupted_by": str,
    "p_clean": number,
    "p_corrupted": number,
    "noise_std": number,
    "settings": dict,
    "origin": {"name": str},
    "versions": {str: str},
}  # of the record in its file


def _check_grids(draws: dict[str, Tensor], subject: list[int], tokens: int) -> None:
    if len(subject) != 2 or not 0 <= subject[0] < subject[1] <= tokens:
        raise ValueError(f"subject_range must lie in its {tokens} tokens; found {subject}")
    for kind, grid in draws.items():
        if not grid.is_floating_point() or grid.ndim != 3 or grid.shape[1] != tokens or 0 in grid.shape:
            raise ValueError(
                f"draws.{kind} must be numbers [layer, {tokens}, draw]; found {list(grid.shape)} of {grid.dtype}"
            )


def not_first(answer: str, said: tuple[str, float]) -> str:
    """A sentence on an answer where the model says something else first."""
    return f"the model's first answer is not {answer.strip()!r}, but {said[0]!r} with P = {said[1]:.3f}."


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """A causal trace of one fact.

    `effects[kind]` is [layer, position]: the mean over draws of what is measured (P of the answer's first token, unless
    `settings.measure` says otherwise) with that state, or the window of outputs around that layer, restored at that
    position; nan where `settings.roles` left a position out. `draws[kind]` is [layer, position, draw]. `p_clean` and
    `p_corrupted` are the same measure of the other two runs. `corrupted_by` says what the settings do not: a family of noise
    of one's own, whose sigma it is, the subject that took the subject's place. `blanks` are tokens at the answer's beginning that
    the measure passed over, because they are white space alone. `said` is what the model says first in the clean run, and its P,
    where that is not the answer; files of earlier versions do not have it.
    """

    prompt: str
    tokens: tuple[str, ...]
    subject: str
    subject_range: tuple[int, int]
    relation: str | None
    answer: str
    answer_ids: tuple[int, ...]
    corrupted_by: str
    p_clean: float
    p_corrupted: float
    effects: dict[str, Float[Tensor, "layer position"]]
    draws: dict[str, Float[Tensor, "layer position draw"]]
    noise_std: float
    settings: TraceSettings
    origin: dict[str, Any]
    versions: dict[str, str]
    seconds: float = math.nan
    blanks: int = 0
    said: tuple[str, float] | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """The token role of each position."""
        return roles(len(self.tokens), self.subject_range)

    @property
    def label(self) -> str:
        """What was measured, in a few words: P(Seattle)."""
        return measures.of(self.settings).label(self.answer.strip(), len(self.answer_ids), self.blanks)

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know of the answer before numbers are read."""
        found = [not_first(self.answer, self.said)] if self.said else []
        if self.blanks:
            found.append(
                "the answer begins with a blank token, which is passed over (measure p_answer: all of it is read)."
            )
        return tuple(found)

    def __repr__(self) -> str:
        kinds = ", ".join(self.effects)
        return f"Trace({self.prompt!r}: {self.label} = {self.p_clean:.3f} clean, {self.p_corrupted:.3f} corrupted; {kinds})"

    def to_json(self) -> dict[str, Any]:
        """What `mechedit trace --json` writes."""
        return self._record() | {
            "effects": {
                kind: [[None if value != value else value for value in row] for row in grid.tolist()]
                for kind, grid in self.effects.items()
            },
            "seconds": self.seconds,
        }

    def _record(self) -> dict[str, Any]:
        return {
            "model": self.origin["name"],
            "prompt": self.prompt,
            "tokens": list(self.tokens),
            "subject": self.subject,
            "subject_range": list(self.subject_range),
            "relation": self.relation,
            "answer": self.answer,
            "answer_ids": list(self.answer_ids),
            "blanks": self.blanks,
            "said": self.said and list(self.said),
            "corrupted_by": self.corrupted_by,
            "p_clean": self.p_clean,
            "p_corrupted": self.p_corrupted,
            "noise_std": self.noise_std,
            "settings": asdict(self.settings),
            "origin": self.origin,
            "versions": self.versions,
        }

    def save(self, path: str | Path | files.Blob) -> Path:
        """Write the trace, draws included, as one safetensors file. The same trace gives the same bytes."""
        return files.write(path, "trace", {f"draws.{kind}": grid for kind, grid in self.draws.items()}, self._record())

    @staticmethod
    def load(path: str | Path | files.Blob) -> Trace:
        """Read a trace that `save` wrote.

        Raises:
            FileError: the file is missing, damaged, or something else.
        """
        tensors, record = files.read(path, "trace")
        try:
            check(record, _FORM)
            settings = from_json(TraceSettings, record["settings"])
            draws = {kind: tensors[f"draws.{kind}"] for kind in settings.kinds}
            _check_grids(draws, record["subject_range"], len(record["tokens"]))
            return Trace(
                prompt=record["prompt"],
                tokens=tuple(record["tokens"]),
                subject=record["subject"],
                subject_range=(record["subject_range"][0], record["subject_range"][1]),
                relation=record["relation"],
                answer=record["answer"],
                answer_ids=tuple(record["answer_ids"]),
                corrupted_by=record["corrupted_by"],
                p_clean=record["p_clean"],
                p_corrupted=record["p_corrupted"],
                effects={kind: grid.mean(-1) for kind, grid in draws.items()},
                draws=draws,
                noise_std=record["noise_std"],
                settings=settings,
                origin=record["origin"],
                versions=record["versions"],
                blanks=record.get("blanks", 0),
                said=(str(said[0]), float(said[1])) if (said := record.get("said")) else None,
            )
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            raise files.FileError(
                f"{path} is a trace that lacks something, or has what is not known: {error}."
            ) from error
