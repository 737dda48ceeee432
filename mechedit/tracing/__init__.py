"""Where does the model recall a fact? Causal tracing of one fact (Meng et al. 2022, section 2.1).

Three kinds of run give an answer's probability: clean; corrupted, with noise on the subject's embeddings; and corrupted
with some clean activations put back at one position. What raises the probability there carries the fact.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit import corruption, files, prompts, provenance
from mechedit.facts import Fact
from mechedit.models import HookedModel, device_of, embedding_std
from mechedit.progress import Progress, silent
from mechedit.settings import TraceSettings
from mechedit.tracing.engine import Cell, sweep, window

__all__ = ["Trace", "TraceSettings", "trace"]


@dataclass(frozen=True)
class Trace:
    """A causal trace of one fact.

    `effects[kind]` is [layer, position]: the mean over draws of P(answer) with that state (or the window of outputs around
    that layer) restored at that position. `draws[kind]` is [layer, position, draw]. Probabilities are of the answer's first
    token. The window of layer l is [l - w//2, l + ceil(w/2) - 1], as in the published code.
    """

    prompt: str
    tokens: tuple[str, ...]
    subject_range: tuple[int, int]
    answer: str
    answer_ids: tuple[int, ...]
    p_clean: float
    p_corrupted: float
    effects: dict[str, Float[Tensor, "layer position"]]
    draws: dict[str, Float[Tensor, "layer position draw"]]
    noise_std: float
    settings: TraceSettings
    origin: dict[str, Any]
    versions: dict[str, str]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """What `mechedit trace --json` writes."""
        return {
            "model": self.origin["name"],
            "prompt": self.prompt,
            "tokens": list(self.tokens),
            "subject_range": list(self.subject_range),
            "answer": self.answer,
            "answer_ids": list(self.answer_ids),
            "p_clean": self.p_clean,
            "p_corrupted": self.p_corrupted,
            "effects": {kind: grid.tolist() for kind, grid in self.effects.items()},
            "noise_std": self.noise_std,
            "settings": asdict(self.settings),
            "origin": self.origin,
            "versions": self.versions,
            "seconds": self.seconds,
        }

    def save(self, path: str | Path) -> Path:
        """Write the trace, draws included, as one safetensors file."""
        record = self.to_json()
        del record["effects"]
        return files.write(path, "trace", {f"draws.{kind}": grid for kind, grid in self.draws.items()}, record)

    @staticmethod
    def load(path: str | Path) -> Trace:
        """Read a trace that `save` wrote.

        Raises:
            FileError: the file is missing, damaged, or something else.
        """
        tensors, record = files.read(path, "trace")
        try:
            settings = dict(record["settings"], kinds=tuple(record["settings"]["kinds"]))
            draws = {kind: tensors[f"draws.{kind}"] for kind in settings["kinds"]}
            return Trace(
                prompt=record["prompt"],
                tokens=tuple(record["tokens"]),
                subject_range=(record["subject_range"][0], record["subject_range"][1]),
                answer=record["answer"],
                answer_ids=tuple(record["answer_ids"]),
                p_clean=record["p_clean"],
                p_corrupted=record["p_corrupted"],
                effects={kind: grid.mean(-1) for kind, grid in draws.items()},
                draws=draws,
                noise_std=record["noise_std"],
                settings=TraceSettings(**settings),
                origin=record["origin"],
                versions=record["versions"],
                seconds=record["seconds"],
            )
        except (KeyError, TypeError, IndexError) as error:
            raise files.FileError(f"{path} is a trace that lacks {error}.") from error


def trace(
    model: HookedModel, fact: Fact, settings: TraceSettings | None = None, *, progress: Progress = silent
) -> Trace:
    """Trace one fact through every layer and token, exactly.

    The answer is the fact's `target_true`, or what the model itself says next where the fact has none.

    Raises:
        FactError: the prompt does not fit the model.
        SettingsError: settings that cannot be meant.
    """
    began = time.perf_counter()
    settings = settings or TraceSettings()
    settings = replace(settings, prepend_bos=prompts.resolve_bos(model, settings.prepend_bos))
    prompt = prompts.prepare(model, fact, prepend_bos=settings.prepend_bos)
    answer_ids = (
        prompts.continuation(model, fact.prompt, fact.target_true) if fact.target_true else [_top(model, prompt.ids)]
    )
    begin, end = prompt.subject
    scale = settings.noise * embedding_std(model)
    noise = corruption.gaussian(
        fact, draws=settings.draws, tokens=end - begin, d_model=int(model.cfg.d_model), scale=scale, seed=settings.seed
    )
    cells = _grid(settings, int(model.cfg.n_layers), len(prompt.ids))
    swept = sweep(model, prompt.ids, noise.to(device_of(model)), begin, answer_ids[0], cells, progress)
    grids = swept.cells.view(len(settings.kinds), int(model.cfg.n_layers), len(prompt.ids), settings.draws)
    return Trace(
        prompt=prompt.text,
        tokens=prompt.tokens,
        subject_range=prompt.subject,
        answer=str(model.tokenizer.decode(answer_ids)),
        answer_ids=tuple(answer_ids),
        p_clean=swept.clean,
        p_corrupted=float(swept.corrupted.mean()),
        effects={kind: grid.mean(-1) for kind, grid in zip(settings.kinds, grids, strict=True)},
        draws=dict(zip(settings.kinds, grids, strict=True)),
        noise_std=scale,
        settings=settings,
        origin=provenance.origin(model),
        versions=provenance.versions(),
        seconds=time.perf_counter() - began,
    )


def _grid(settings: TraceSettings, n_layers: int, n_positions: int) -> list[Cell]:
    """Every cell of every kind: kinds first, then layers, then positions."""
    return [
        Cell(kind, range(layer, layer + 1) if kind == "resid" else window(layer, settings.window, n_layers), position)
        for kind in settings.kinds
        for layer in range(n_layers)
        for position in range(n_positions)
    ]


@torch.no_grad()
def _top(model: HookedModel, ids: tuple[int, ...]) -> int:
    """The token the model finds most probable next."""
    tokens: Int[Tensor, "1 pos"] = torch.tensor([list(ids)], device=device_of(model))
    return int(model(tokens)[0, -1].argmax())
