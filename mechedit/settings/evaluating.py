"""What evaluations, sweeps and tuning do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mechedit.settings.base import Settings, check_each, knob, require
from mechedit.settings.tracing import FACT_TOKENS

__all__ = ["MODES", "CalibrateSettings", "EvaluateSettings", "SweepSettings", "TuneSettings"]

MODES = ("independent", "batch", "sequential")


@dataclass(frozen=True)
class TuneSettings(Settings):
    """What `mechedit tune` tries on a model."""

    traced: int = knob(30, "facts that are traced, of those the model knows")
    edited: int = knob(20, "facts that are edited with every combination")
    around: int = knob(1, "layers tried on each side of the traced one")
    grid: tuple[tuple[str, tuple[Any, ...]], ...] = knob(
        (), "options of the editor that are tried, each with its values (default: the editor's own)"
    )
    draws: int = knob(4, "noise draws of each trace")
    seed: int = knob(0, "seed of the noise")

    def __post_init__(self) -> None:
        check_each(self)
        require(self.traced >= 2, f"traced must be at least 2 facts; found {self.traced}.")
        for name in ("edited", "draws"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1; found {getattr(self, name)}.")
        require(self.around >= 0, f"around must be 0 or more layers; found {self.around}.")
        for each in self.grid:
            holds = isinstance(each, tuple) and len(each) == 2 and isinstance(each[1], tuple) and each[1]
            require(bool(holds), f"grid must be pairs of an option and one or more values; found {each!r}.")


@dataclass(frozen=True)
class CalibrateSettings(Settings):
    """Which edits `mechedit calibrate` makes of a model."""

    facts: int = knob(20, "facts that are edited, each in every way")
    layers: tuple[int, ...] = knob((), "layers that are edited; empty means the editor's own")
    strengths: tuple[float, ...] = knob(
        (1.0, 2.0, 4.0),
        "by how much the editor's own measure of strength (ROME's clamp) is multiplied, in edits that may be sound",
    )
    times: tuple[float, ...] = knob((2.0, 5.0, 20.0), "by how much finished edits are multiplied, to break the model")
    seed: int = knob(0, "seed of random changes and of intervals")

    def __post_init__(self) -> None:
        check_each(self)
        require(
            self.facts >= 4,
            f"facts must be at least 4, so that each half can judge the other's bands; found {self.facts}.",
        )
        for name in ("strengths", "times"):
            for each in getattr(self, name):
                require(each > 0, f"{name} must be positive; found {each}.")
        require(bool(self.strengths), "strengths must have a number; it is empty.")


@dataclass(frozen=True)
class SweepSettings(Settings):
    """Where `mechedit sweep` edits, and how it traces."""

    layers: tuple[int, ...] = knob((), "layers that are edited; empty means every layer")
    tokens: tuple[str, ...] = knob(FACT_TOKENS, "tokens whose key is edited", FACT_TOKENS)
    window: int = knob(0, "layers in a window of mlp outputs of the traces; 0: the model's preset, else ten")
    tuned: int = knob(
        4,
        "facts on which the editor's strength (ROME's clamp) is chosen at each layer and token, for the other half of the facts; "
        "0: one strength for all, which compares layers by what suits one of them",
    )
    strengths: tuple[float, ...] = knob((0.5, 1.0, 2.0, 4.0), "strengths that are tried, in those of the settings")
    draws: int = knob(4, "noise draws of each trace")
    seed: int = knob(0, "seed of the noise and of the interval")

    def __post_init__(self) -> None:
        check_each(self)
        require(self.tuned >= 0, f"tuned must be 0 or more facts; found {self.tuned}.")
        require(
            bool(self.strengths) and min(self.strengths) > 0, f"strengths must be positive; found {self.strengths}."
        )
        require(bool(self.tokens), f"tokens must name at least one of {', '.join(FACT_TOKENS)}; it is empty.")
        require(self.window >= 0, f"window must be 0 (the preset's) or more layers; found {self.window}.")
        require(self.draws >= 1, f"draws must be at least 1; found {self.draws}.")


@dataclass(frozen=True)
class EvaluateSettings(Settings):
    """What `mechedit evaluate` does with each record, and what it measures."""

    mode: str = knob(
        "independent",
        "independent: each fact on the model as it was; batch: one edit for all facts; sequential: each on what "
        "the ones before it left, scored right after it and again at the end",
        MODES,
    )
    together: int = knob(1, "sequential: records whose facts are written at once, before the next ones")
    generate: bool = knob(False, "also generate text: entropy, consistency with --references, exact match")
    tokens: int = knob(100, "tokens of each generated text, its prompt's included")
    top_k: int = knob(5, "tokens that generation chooses among at each step")
    health: bool = knob(True, "also measure what an edit does to text that has nothing to do with it")
    answers: bool = knob(True, "also ask the question alone, and look for the new target in what the model says")
    answer_rule: str = knob(
        "sentence",
        "what counts as the answer: the first sentence, which must hold the target; published: text before the first full stop, which must be it",
        ("sentence", "published"),
    )
    beside: bool = knob(
        True, "also measure neighbours behind the new fact, the subject's other relations, and drift at neighbours"
    )
    seed: int = knob(0, "seed of generated text and intervals; on the command line of the editor too")

    def __post_init__(self) -> None:
        check_each(self)
        for name in ("tokens", "top_k", "together"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1; found {getattr(self, name)}.")
        require(
            self.together == 1 or self.mode == "sequential",
            f"together is for mode sequential; found {self.together} with mode {self.mode}.",
        )
