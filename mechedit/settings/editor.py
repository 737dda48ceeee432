"""What the options of every editor are, and of those that sample text before the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mechedit.settings.base import Settings, check_each, knob, require

__all__ = ["GUARDS", "PREFIXES", "EditSettings", "check_prefixes"]

GUARDS = ("refuse", "warn", "rollback")
PREFIXES: dict[str, tuple[tuple[int, int], ...]] = {  # (tokens, how many)
    "default": ((5, 10), (10, 10)),  # the paper's appendix E.5
    "published": ((4, 10), (9, 10)),  # the published code, whose lengths of 5 and 10 count the token it starts from
    "paper": (*((length, 6) for length in range(2, 7)), *((length, 5) for length in range(7, 11))),  # 50, section 3.1
    "none": (),
}


def check_prefixes(prefixes: tuple[tuple[int, int], ...]) -> None:
    """Raise unless these are prefixes' lengths and numbers.

    Raises:
        SettingsError: they are not.
    """
    for each in prefixes:
        require(
            len(each) == 2 and each[0] >= 1 and each[1] >= 1,
            f"prefixes must be pairs of positive (tokens, how many); found {each}.",
        )


@dataclass(frozen=True)
class EditSettings(Settings):
    """What every editor has. An editor's own settings derive from it."""

    guard: str = knob(
        "refuse",
        "an edit out of its bands is an error (refuse), a warning (warn), or empty, with the reason (rollback)",
        GUARDS,
    )
    bands: tuple[tuple[str, float, float], ...] = knob(
        (),
        "where the numbers of a sound edit lie, from a file of `mechedit calibrate` (default: the model's own, else the editor's)",
    )
    strengthen: bool = knob(
        False, "also edit a fact whose new target the model says already, so that it is surer of it"
    )
    seed: int = knob(
        0, "seed of what is drawn for edits; the text that C and G sample has a seed of its own (MomentSettings)"
    )
    prepend_bos: bool | None = knob(
        None, "put the beginning-of-sequence token first; by default what the model was made for"
    )

    bundles: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {}
    """Options of the command line that stand for several fields: name of the option, its choices, the fields of each."""

    def __post_init__(self) -> None:
        check_each(self)
        for each in self.bands:
            holds = len(each) == 3 and isinstance(each[0], str) and all(type(edge) in (int, float) for edge in each[1:])
            require(holds and each[1] < each[2], f"bands must be (name, from, to), from below to; found {each!r}.")
        if hasattr(self, "layer"):
            require(self.layer >= -1, f"layer must be a block, from 0, or -1 for the preset's; found {self.layer}.")
        for name in ("clamp", "learning_rate"):
            value = getattr(self, name, 1.0)
            require(value > 0, f"{name} must be positive; found {value}.")
        for name in ("ridge", "steps", "weight_decay", "kl", "norm_bound"):
            value = getattr(self, name, 0)
            require(value >= 0, f"{name} must be 0 or more; found {value}.")
