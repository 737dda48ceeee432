"""Every knob of the method, with its default and the reason for it.

Python, the command line and the experiments share these frozen dataclasses; a result carries the ones that made it. This
module imports nothing heavy, so that `mechedit --help` answers at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from mechedit.errors import MecheditError

__all__ = [
    "CONSTANTS",
    "CONTROLS",
    "EDITORS",
    "FACT_TOKENS",
    "GUARDS",
    "KINDS",
    "KNOWN_KINDS",
    "MODES",
    "POLICIES",
    "PREFIXES",
    "PRESETS",
    "EvaluateSettings",
    "MomentSettings",
    "Preset",
    "RomeSettings",
    "SettingsError",
    "SweepSettings",
    "TraceSettings",
    "TuneSettings",
    "knobs",
]

KINDS = ("resid", "mlp", "attn")
KNOWN_KINDS = ("resid", "resid_pre", "resid_mid", "mlp", "attn")
POLICIES = ("averaged", "prompt", "published")
FACT_TOKENS = ("subject_last", "subject_first", "after_first", "last")
GUARDS = ("refuse", "warn", "rollback")
CONSTANTS: dict[str, dict[str, float]] = {  # of v*: what the published code has, and what the paper's text says
    "published": {"clamp": 4.0, "steps": 20, "learning_rate": 0.5, "weight_decay": 0.5, "kl": 0.0625, "stop_at": 0.05},
    "paper": {"clamp": 4.0, "steps": 20, "learning_rate": 0.5, "weight_decay": 1.5e-3, "kl": 100.0, "stop_at": 0.05},
}
PREFIXES: dict[str, tuple[tuple[int, int], ...]] = {  # (tokens, how many)
    "default": ((5, 10), (10, 10)),  # the paper's appendix E.5
    "published": ((4, 10), (9, 10)),  # the published code, whose lengths of 5 and 10 count the token it starts from
    "paper": (*((length, 6) for length in range(2, 7)), *((length, 5) for length in range(7, 11))),  # 50, section 3.1
    "none": (),
}
ROLE_TITLES = {
    "before": "before the subject",
    "subject_first": "first subject token",
    "subject_middle": "middle subject tokens",
    "subject_last": "last subject token",
    "after_first": "first token after",
    "after_further": "further tokens",
    "last": "last token",
}
ROLES = tuple(ROLE_TITLES)
SEVERED_TITLES = {"ordinary": "nothing severed", "mlp": "MLPs severed", "attn": "attention severed"}
CENTRES = ("code", "paper")
CORRUPTIONS = (
    "gaussian",
    "uniform",
    "multivariate",
    "multivariate_published",
    "student_t",
    "student_t_published",
    "tokens",
)
SCALES = ("sigma", "absolute")
MEASURES = ("p", "p_answer", "log_p", "logit_difference")
PRECISIONS = ("model", "bfloat16")
EDITORS = ("rome", "none")
MODES = ("independent", "batch", "sequential")
CONTROLS = ("none", "identity", "random_layer", "random_key")


class SettingsError(MecheditError, ValueError):
    """A setting that cannot be meant."""


def knob(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with the sentence that documents it here and on the command line, and what it, or each of it, may be."""
    return field(default=default, metadata={"help": help, "choices": choices})


def knobs(settings: type) -> list[tuple[str, Any, str]]:
    """Name, default and help sentence of each field, in order."""
    return [(each.name, each.default, each.metadata["help"]) for each in fields(settings)]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise SettingsError(message)


def _check_each(settings: Any) -> None:
    """Raise where a field holds another type than its default does, or none of its choices."""
    for each in fields(settings):
        value = getattr(settings, each.name)
        wanted: Any = type(each.default)
        if each.default is None or wanted is bool:
            holds, name = value is None or isinstance(value, bool), "True, False or None"
        elif wanted in (int, float):
            numbers = (int, float) if wanted is float else (int,)
            holds, name = isinstance(value, numbers) and not isinstance(value, bool), wanted.__name__
        else:
            holds, name = isinstance(value, wanted), wanted.__name__
        _require(holds, f"{each.name} must be of type {name}; found {value!r}.")
        for own in value if isinstance(value, tuple) else (value,):
            _require(not isinstance(own, float) or math.isfinite(own), f"{each.name} must be finite; found {own}.")
        _require(each.name != "seed" or value >= 0, f"seed must be 0 or more; found {value}.")
        if choices := each.metadata["choices"]:
            for own in value if isinstance(value, tuple) else (value,):
                _require(own in choices, f"{each.name} must be one of {', '.join(choices)}; found {own!r}.")


@dataclass(frozen=True)
class TraceSettings:
    """How a causal trace corrupts and restores (Meng et al. 2022, section 2.1 and appendix B)."""

    kinds: tuple[str, ...] = knob(
        KINDS, "what is restored: resid, resid_pre, resid_mid (one state), mlp, attn (windows of outputs)"
    )
    window: int = knob(0, "layers in a window of mlp or attn outputs; 0: the model's preset, else ten")
    centre: str = knob(
        "code",
        "code: layer l restores [l - w//2, l + ceil(w/2) - 1] as published; paper: even windows one block higher",
        CENTRES,
    )
    roles: tuple[str, ...] = knob((), "token roles whose positions are restored; empty means every position", ROLES)
    draws: int = knob(10, "noise draws that are averaged")
    corruption: str = knob("gaussian", "how the subject is corrupted", CORRUPTIONS)
    noise: float = knob(3.0, "scale of the noise, in units of `scale`")
    scale: str = knob(
        "sigma", "sigma: standard deviations of embeddings (the vocabulary's by default); absolute: 1", SCALES
    )
    degrees: float = knob(3.0, "degrees of freedom of Student-t noise")
    replace: bool = knob(False, "noise takes the embeddings' place instead of being added to them")
    extra: int = knob(0, "tokens after the subject that are corrupted with it")
    measure: str = knob("p", "what of the answer is measured", MEASURES)
    precision: str = knob("model", "model: the model's own number format; bfloat16: quicker, and not exact", PRECISIONS)
    memory: float = knob(2.0, "gigabytes that a trace may take beside the model")
    seed: int = knob(0, "noise depends on this seed and the fact alone")
    prepend_bos: bool | None = knob(
        None, "put the beginning-of-sequence token first; by default what the model was made for"
    )

    def __post_init__(self) -> None:
        _check_each(self)
        _require(bool(self.kinds), f"kinds must name at least one of {', '.join(KINDS)}; it is empty.")
        _require(len(set(self.kinds)) == len(self.kinds), f"kinds must differ from each other; found {self.kinds}.")
        _require(self.window >= 0, f"window must be 0 (the preset's) or more layers; found {self.window}.")
        _require(self.draws >= 1, f"draws must be at least 1; found {self.draws}.")
        _require(self.noise > 0, f"noise must be a positive number; found {self.noise}.")
        _require(self.degrees > 0, f"degrees must be positive; found {self.degrees}.")
        _require(self.extra >= 0, f"extra must be 0 or more tokens; found {self.extra}.")
        _require(self.memory > 0, f"memory must be a positive number of gigabytes; found {self.memory}.")

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> TraceSettings:
        """The settings whose `dataclasses.asdict` this is, through JSON or not."""
        fields_: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in record.items()
        }
        return cls(**fields_)


@dataclass(frozen=True)
class MomentSettings:
    """What text the second moment C is estimated on."""

    tokens: int = knob(0, "keys to average over; 0 means ten times d_mlp")
    context: int = knob(64, "tokens in a text window, BOS included; each position of a window after BOS gives a key")
    seed: int = knob(0, "seed of the text, where it is sampled from the model itself")
    prepend_bos: bool | None = knob(
        None, "put the beginning-of-sequence token first; by default what the model was made for"
    )
    part: int = knob(0, "which of `parts` shares of the text this is, from 0; `mechedit merge` puts them together")
    parts: int = knob(1, "into how many shares the text is dealt, so that several machines can share the work")

    def __post_init__(self) -> None:
        _check_each(self)
        _require(
            0 <= self.part < self.parts, f"part must be from 0 to parts - 1 = {self.parts - 1}; found {self.part}."
        )
        _require(self.tokens >= 0, f"tokens must be positive, or 0 for ten times d_mlp; found {self.tokens}.")
        _require(self.context >= 2, f"context must be at least 2 tokens; found {self.context}.")


@dataclass(frozen=True)
class RomeSettings:
    """How ROME finds k* and v* (section 3.1; constants as published unless a preset says otherwise)."""

    layer: int = knob(-1, "block whose W_out is edited, from 0; -1 means the model's preset")
    clamp: float = knob(4.0, "longest allowed change of the value, in lengths of the original value")
    steps: int = knob(20, "Adam steps on v*")
    learning_rate: float = knob(0.5, "Adam's learning rate")
    weight_decay: float = knob(0.5, "weight of |delta| / |value|^2 in the loss")
    kl: float = knob(0.0625, "weight of the essence term: KL of what '{subject} is a' predicts, at the subject")
    stop_at: float = knob(0.05, "stop once the target's own loss, -log p, averaged over prefixes, is below this")
    prefixes: tuple[tuple[int, int], ...] = knob(
        PREFIXES["default"],
        f"sampled prefixes as (tokens, how many), or {', '.join(PREFIXES)}; the bare prompt is added",
    )
    fact_token: str = knob("subject_last", "token whose key is edited", FACT_TOKENS)
    policy: str = knob(
        "averaged",
        "averaged: one key everywhere; prompt: the bare prompt's alone; published: the averaged key in u, the bare prompt's in "
        "the divisor, and the published code's stop",
        POLICIES,
    )
    ridge: float = knob(0.0, "this share of C's mean diagonal is added to its diagonal")
    guard: str = knob(
        "refuse",
        "an edit out of its bands is an error (refuse), a warning (warn), or empty, with the reason (rollback)",
        GUARDS,
    )
    seed: int = knob(0, "seed of the sampled prefixes")
    prepend_bos: bool | None = knob(
        None, "put the beginning-of-sequence token first; by default what the model was made for"
    )

    def __post_init__(self) -> None:
        _check_each(self)
        _require(self.layer >= -1, f"layer must be a block, from 0, or -1 for the preset's; found {self.layer}.")
        _require(self.ridge >= 0, f"ridge must be 0 or more; found {self.ridge}.")
        _require(self.clamp > 0, f"clamp must be positive; found {self.clamp}.")
        _require(self.steps >= 0, f"steps must be 0 or more; found {self.steps}.")
        _require(self.learning_rate > 0, f"learning_rate must be positive; found {self.learning_rate}.")
        _require(self.weight_decay >= 0, f"weight_decay must be 0 or more; found {self.weight_decay}.")
        _require(self.kl >= 0, f"kl must be 0 or more; found {self.kl}.")
        for each in self.prefixes:
            _require(
                len(each) == 2 and each[0] >= 1 and each[1] >= 1,
                f"prefixes must be pairs of positive (tokens, how many); found {each}.",
            )


@dataclass(frozen=True)
class TuneSettings:
    """What `mechedit tune` tries on a model."""

    traced: int = knob(30, "facts that are traced, of those the model knows")
    edited: int = knob(20, "facts that are edited with every combination")
    around: int = knob(1, "layers tried on each side of the traced one")
    clamps: tuple[float, ...] = knob((0.5, 0.75, 1.0, 2.0, 4.0), "clamps tried")
    learning_rates: tuple[float, ...] = knob((0.5,), "learning rates tried")
    draws: int = knob(4, "noise draws of each trace")
    seed: int = knob(0, "seed of the noise")

    def __post_init__(self) -> None:
        _check_each(self)
        _require(self.traced >= 2, f"traced must be at least 2 facts; found {self.traced}.")
        for name in ("edited", "draws"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1; found {getattr(self, name)}.")
        _require(self.around >= 0, f"around must be 0 or more layers; found {self.around}.")
        for name in ("clamps", "learning_rates"):
            given = getattr(self, name)
            _require(bool(given) and min(given) > 0, f"{name} must be one or more positive numbers; found {given}.")


@dataclass(frozen=True)
class SweepSettings:
    """Where `mechedit sweep` edits, and how it traces."""

    layers: tuple[int, ...] = knob((), "layers that are edited; empty means every layer")
    tokens: tuple[str, ...] = knob(FACT_TOKENS, "tokens whose key is edited", FACT_TOKENS)
    window: int = knob(0, "layers in a window of mlp outputs of the traces; 0: the model's preset, else ten")
    draws: int = knob(4, "noise draws of each trace")
    seed: int = knob(0, "seed of the noise and of the interval")

    def __post_init__(self) -> None:
        _check_each(self)
        _require(bool(self.tokens), f"tokens must name at least one of {', '.join(FACT_TOKENS)}; it is empty.")
        _require(self.window >= 0, f"window must be 0 (the preset's) or more layers; found {self.window}.")
        _require(self.draws >= 1, f"draws must be at least 1; found {self.draws}.")


@dataclass(frozen=True)
class EvaluateSettings:
    """What `mechedit evaluate` does with each record, and what it measures."""

    editor: str = knob("rome", "what edits each record", EDITORS)
    mode: str = knob(
        "independent",
        "independent: each fact on the model as it was; batch: all edits, found so, written together; sequential: each on what "
        "the ones before it left, scored right after it and again at the end",
        MODES,
    )
    control: str = knob(
        "none",
        "what takes the place of a part of the method: C = 1; another layer for each fact; a random key",
        CONTROLS,
    )
    generate: bool = knob(False, "also generate text: entropy, consistency with --references, exact match")
    tokens: int = knob(100, "tokens of each generated text, its prompt's included")
    top_k: int = knob(5, "tokens that generation chooses among at each step")
    health: bool = knob(True, "also measure what an edit does to text that has nothing to do with it")
    seed: int = knob(0, "seed of controls, generated text and intervals; on the command line of ROME's prefixes too")

    def __post_init__(self) -> None:
        _check_each(self)
        for name in ("tokens", "top_k"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1; found {getattr(self, name)}.")
        _require(
            self.control == "none" or (self.editor == "rome" and self.mode == "independent"),
            f"a control changes ROME's independent edits; found editor {self.editor!r} and mode {self.mode!r}.",
        )


@dataclass(frozen=True)
class Preset:
    """Editing constants for one model of so many layers, where they come from, and how many layers a window of a trace has."""

    rome: RomeSettings
    prepend_bos: bool
    source: str
    n_layers: int
    window: int = 10


_PAPER = "published code of Meng et al. 2022, hparams/ROME"
_TUNED = "tuned here; see experiments/README.md"


def _organism(layer: int, clamp: float) -> Preset:
    return Preset(
        RomeSettings(layer=layer, clamp=clamp, prefixes=((5, 5),)),
        prepend_bos=True,
        source=_TUNED,
        n_layers=8,
        window=3,
    )


PRESETS: dict[str, Preset] = {
    "gemma-3-270m": Preset(
        RomeSettings(layer=3, clamp=0.75),
        prepend_bos=True,
        source=_TUNED,
        n_layers=18,
    ),
    "organism": _organism(layer=0, clamp=1.0),
    "organism-gptj": _organism(layer=0, clamp=1.0),
    "organism-llama": _organism(layer=2, clamp=4.0),
    "gpt2": Preset(
        RomeSettings(layer=4, clamp=3.0),
        prepend_bos=False,
        source="not published: layer at gpt2-medium's share of depth, clamp as there; not tuned",
        n_layers=12,
    ),
    "gpt2-medium": Preset(RomeSettings(layer=8, clamp=3.0), prepend_bos=False, source=_PAPER, n_layers=24),
    "gpt2-large": Preset(RomeSettings(layer=12), prepend_bos=False, source=_PAPER, n_layers=36),
    "gpt2-xl": Preset(RomeSettings(layer=17), prepend_bos=False, source=_PAPER, n_layers=48),
    "gpt-j-6b": Preset(RomeSettings(layer=5), prepend_bos=False, source=_PAPER, n_layers=28),
    "gpt-neox-20b": Preset(
        RomeSettings(layer=15),
        prepend_bos=False,
        source="published code of Meng et al. 2023 (MEMIT), hparams/ROME",
        n_layers=44,
    ),
}
