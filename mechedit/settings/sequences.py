"""What a long run of edits does with its facts, and what it watches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mechedit.settings.base import Settings, check_each, knob, require

__all__ = ["ON_COLLAPSE", "WRITTEN", "SequenceSettings"]

ON_COLLAPSE = ("go on", "stop", "roll back")
WRITTEN = ("together", "shared", "sought", "rehearsed", "again", "rounds", "gentle", "settle", "conflicts")
"""Settings that decide what is written, and stay as they are for as long as a sequence goes on; the others only watch."""


@dataclass(frozen=True)
class SequenceSettings(Settings):
    """How `mechedit edit --sequence` goes through facts, and when it calls the model broken."""

    together: int = knob(1, "facts that are written at once")
    shared: bool = knob(
        True, "facts of one subject share one value, found anew with each of them; for editors that can take edits out"
    )
    sought: str = knob(
        "current",
        "where values are sought: on what the earlier edits left (current); or on the model without edits (unedited), so that they do not depend "
        "on those before, for editors that can take edits out, with loose = 0 and slack = 1/b",
        ("current", "unedited"),
    )
    rehearsed: int = knob(
        10,
        "earlier facts that are asked again, drawn anew, for each new one, which is asked too: what the model does not say is learnt again. For "
        "sequential, with shared values that are sought on the current model",
    )
    again: int = knob(2, "facts at most that are learnt again, at once, for each new one")
    rounds: int = knob(4, "times that facts are asked and learnt again after each batch; 0: never")
    gentle: float = knob(
        6.0,
        "slack with which batches are written, in means of k M^-1 k, where as many keys stand as the layer is wide, and in proportion less where fewer "
        "do; the editor's own (loose) where that is more. Small steps that add up change less of all else than large ones",
    )
    settle: float = knob(
        0.5,
        "growth, as a share, after which the values of all facts are found anew together, by one loss in which the whole change is weighed; 0: never. "
        "Where facts are learnt again (rehearsed), for editors that weigh G (fisher)",
    )
    conflicts: str = knob(
        "later",
        "of facts with one subject and relation but two targets, the later wins (later), or is refused (refuse)",
        ("later", "refuse"),
    )
    every: int = knob(100, "edits between two looks at the model's health; 0: only at the end")
    sampled: int = knob(128, "earlier edits, and facts never edited, that are looked at each time, at most")
    keep: int = knob(25, "edits after which the state is written again, at least")
    on_collapse: str = knob("go on", "what is done where a measure leaves its band", ON_COLLAPSE)
    least_success: float = knob(0.5, "band: least share of earlier edits that still stand")
    least_others: float = knob(0.5, "band: least share of facts never edited that the model still says")
    most_perplexity: float = knob(1.5, "band: perplexity of held-out text, edited over unedited")
    most_kl: float = knob(1.0, "band: KL of next tokens of held-out text, in nats")
    most_spectrum: float = knob(10.0, "band: largest singular value of an edited weight, edited over unedited")

    @property
    def writing(self) -> dict[str, Any]:
        """Those that decide what is written."""
        return {name: getattr(self, name) for name in WRITTEN}

    def __post_init__(self) -> None:
        check_each(self)
        for name in ("together", "sampled", "keep", "again"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1; found {getattr(self, name)}.")
        for name in ("every", "rehearsed", "rounds"):
            require(getattr(self, name) >= 0, f"{name} must be 0 or more edits; found {getattr(self, name)}.")
        require(
            self.settle == 0 or 0.01 <= self.settle < float("inf"),
            f"settle must be 0 (never), or a growth of at least 0.01; found {self.settle}.",
        )
        for name in ("least_success", "least_others"):
            require(0 <= getattr(self, name) <= 1, f"{name} must be from 0 to 1; found {getattr(self, name)}.")
        for name in ("gentle", "most_perplexity", "most_kl", "most_spectrum"):
            require(getattr(self, name) > 0, f"{name} must be above 0; found {getattr(self, name)}.")
