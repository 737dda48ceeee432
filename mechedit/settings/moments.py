"""What text the second moment of keys is estimated on."""

from __future__ import annotations

from dataclasses import dataclass

from mechedit.settings.base import Settings, check_each, knob, require

__all__ = ["MomentSettings"]


@dataclass(frozen=True)
class MomentSettings(Settings):
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
        check_each(self)
        require(0 <= self.part < self.parts, f"part must be from 0 to parts - 1 = {self.parts - 1}; found {self.part}.")
        require(self.tokens >= 0, f"tokens must be positive, or 0 for ten times d_mlp; found {self.tokens}.")
        require(self.context >= 2, f"context must be at least 2 tokens; found {self.context}.")
