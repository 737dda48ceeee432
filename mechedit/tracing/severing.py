"""Which modules carry a restored state on? Severed causal tracing (Meng et al. 2022, section 2.3 and figure 3).

One state is restored in the corrupted run; then again while the MLP outputs at that position are held at their corrupted
values in every block, and again with the attention outputs held. What is lost went through what was held. Both passes share
one draw of noise; the published code mixes two, which is `shared_draws=False`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mechedit import corruption, files, provenance
from mechedit.corruption import Statistics
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.parsing import check, number
from mechedit.progress import Progress, silent
from mechedit.prompts import decoded
from mechedit.settings import SettingsError, TraceSettings, from_json
from mechedit.tracing.cells import ATTN_OUT, MLP_OUT, RESID_POST, Cell, Patch, resolve
from mechedit.tracing.measures import measured
from mechedit.tracing.preparation import prepare
from mechedit.tracing.roles import positions
from mechedit.tracing.tracer import run_jobs

__all__ = ["CURVES", "Severed", "severed"]

_FORM = {
    "prompt": str,
    "subject": str,
    "answer": str,
    "position": int,
    "role": str,
    "p_clean": number,
    "p_corrupted": number,
    "settings": dict,
    "shared_draws": bool,
    "corrupted_by": str,
    "origin": {"name": str},
    "versions": {str: str},
}  # of the record in its file
CURVES = {"ordinary": (), "mlp": (MLP_OUT,), "attn": (ATTN_OUT,)}


@dataclass(frozen=True, eq=False, repr=False)
class Severed:
    """`curves[name]` is [layer, draw]: the measure with the state after that block restored at `position`, while nothing
    ("ordinary"), the MLP outputs ("mlp") or the attention outputs ("attn") are held there at their corrupted values."""

    prompt: str
    subject: str
    answer: str
    position: int
    role: str
    p_clean: float
    p_corrupted: float
    curves: dict[str, Float[Tensor, "layer draw"]]
    settings: TraceSettings
    shared_draws: bool
    corrupted_by: str
    origin: dict[str, Any]
    versions: dict[str, str]

    def __repr__(self) -> str:
        return f"Severed({self.prompt!r}: {self.p_clean:.3f} clean, {self.p_corrupted:.3f} corrupted; {', '.join(self.curves)})"

    def to_json(self) -> dict[str, Any]:
        """What `mechedit sever --json` writes: curves as means over draws."""
        return self._record() | {"curves": {name: curve.mean(-1).tolist() for name, curve in self.curves.items()}}

    def _record(self) -> dict[str, Any]:
        fields = {name: value for name, value in vars(self).items() if name != "curves"}
        return fields | {"settings": asdict(self.settings)}

    def save(self, path: str | Path | files.Blob) -> Path:
        """Write it as one safetensors file. The same curves give the same bytes."""
        return files.write(path, "severed", self.curves, self._record())

    @staticmethod
    def load(path: str | Path | files.Blob) -> Severed:
        """Read what `save` wrote.

        Raises:
            FileError: the file is missing, damaged, or something else.
        """
        curves, record = files.read(path, "severed")
        try:
            check(record, _FORM)
            for name in CURVES:
                if not curves[name].is_floating_point() or curves[name].ndim != 2 or 0 in curves[name].shape:
                    raise ValueError(f"{name} must be numbers [layer, draw]; found {list(curves[name].shape)}")
            settings = from_json(TraceSettings, record["settings"])
            fields: dict[str, Any] = record | {"curves": curves, "settings": settings}
            return Severed(**fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise files.FileError(f"{path} lacks something, or has what is not known: {error}.") from error


def severed(
    model: HookedModel,
    fact: Fact,
    settings: TraceSettings | None = None,
    *,
    role: str = "subject_last",
    shared_draws: bool = True,
    statistics: Statistics | None = None,
    other: str | None = None,
    progress: Progress = silent,
) -> Severed:
    """The three curves of one fact, restoring the (first) position that has a token role. `kinds` and windows play no part."""
    settings = resolve(model, settings)
    draws = 1 if settings.corruption == "tokens" else settings.draws
    if not shared_draws and draws < 2:
        raise SettingsError("held values of another draw need at least 2 draws; there is 1.")
    statistics = statistics or corruption.needed(model, settings)
    prepared = prepare(model, fact, settings, statistics=statistics, other=other)
    found = positions(role, len(prepared.prompt.ids), prepared.prompt.subject)
    if not found:
        raise SettingsError(f"no token of {fact.prompt!r} has the role {role}.")
    at, n_layers = found[0], int(model.cfg.n_layers)
    cells = [
        Cell(
            (Patch(RESID_POST, layer, at),),
            tuple(Patch(component, each, at) for component in held for each in range(n_layers)),
        )
        for held in CURVES.values()
        for layer in range(n_layers)
    ]
    job = prepared.job(cells, held_shift=0 if shared_draws else 1)
    (log_p,) = run_jobs(model, [job], settings, progress)
    values = rearrange(measured(settings, log_p.cells), "(curve layer) draw -> curve layer draw", layer=n_layers)
    return Severed(
        prompt=fact.prompt,
        subject=fact.subject,
        answer=decoded(model, prepared.answer_ids),
        position=at,
        role=role,
        p_clean=float(measured(settings, log_p.clean)),
        p_corrupted=float(measured(settings, log_p.corrupted).mean()),
        curves=dict(zip(CURVES, values, strict=True)),
        settings=settings,
        shared_draws=shared_draws,
        corrupted_by=prepared.corrupted_by,
        origin=provenance.origin(model),
        versions=provenance.versions(),
    )
