"""The options of editors of many facts, with the constants that have names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mechedit.settings.base import knob, require
from mechedit.settings.editor import GUARDS
from mechedit.settings.rome import CONSTANTS, POLICIES, SEARCHES, STOPS, RomeSettings

__all__ = [
    "AVERAGES",
    "MANY_CONSTANTS",
    "MANY_POLICIES",
    "MEASURED",
    "SOUGHT_IN",
    "SPREADS",
    "AlphaEditSettings",
    "EmmetSettings",
    "MemitSettings",
    "PmetSettings",
    "SequentialSettings",
]

SPREADS = ("left", "sqrt", "own")
SOUGHT_IN = ("mlp", "stream", "both")
MEASURED = ("stream", "mlp")
AVERAGES = ("even", "published")
_PUBLISHED: dict[str, Any] = {
    "direction": "averaged", "inserted": "averaged", "shares": "whole", "average": "published", "prefixes": ((10, 5),),
}  # fmt: skip
MANY_POLICIES: dict[str, dict[str, Any]] = {  # beside ROME's
    "memit": _PUBLISHED | {"sought_in": "stream", "measured": "stream", "spread": "left", "stop": "published"},
    "pmet": _PUBLISHED | {"sought_in": "both", "measured": "mlp", "spread": "sqrt", "stop": "top"},
}
MANY_CONSTANTS: dict[str, dict[str, float]] = {  # of v*, and C's weight, as published for GPT-J
    "memit": {"clamp": 0.75, "steps": 25, "learning_rate": 0.5, "weight_decay": 0.5, "kl": 0.0625, "stop_at": 0.05, "a": 15000.0},
    "pmet": {"clamp": 0.75, "steps": 30, "learning_rate": 0.2, "weight_decay": 0.5, "kl": 1.0, "stop_at": 0.05, "a": 6000.0},
}  # fmt: skip


@dataclass(frozen=True)
class MemitSettings(RomeSettings):
    """How keys and values are found, as ROME's, what their one solve weighs a change by (`mechedit.closed_form`), and over which blocks it is
    spread (`mechedit.editors.spread`)."""

    layers: tuple[int, ...] = knob(
        (),
        "blocks that the change is spread over, from the lowest; v* is sought at the last. Empty: the one block `layer`",
    )
    spread: str = knob(
        "left",
        "share of what is still wanted that a block writes: one over the number of blocks left (left), over its root (sqrt), or all of it (own)",
        SPREADS,
    )
    portions: tuple[float, ...] = knob(
        (),
        "in place of spread, a number for each block, which writes its part of the sum of its own and those above it",
    )
    sought_in: str = knob(
        "mlp",
        "what is changed while v* is sought: what the last block's MLP gives (mlp), the residual stream behind that block (stream), or its MLP "
        "and its attention, of which the MLP's change alone is written (both)",
        SOUGHT_IN,
    )
    measured: str = knob(
        "stream",
        "where what is still wanted is read, of the last block: in the residual stream behind it (stream), or at its MLP's output (mlp)",
        MEASURED,
    )
    average: str = knob(
        "even",
        "even: keys, and what is still wanted, are means over the bare prompt and the prefixes; published: in keys the bare prompt counts half, "
        "and what is still wanted is read on it alone",
        AVERAGES,
    )
    a: float = knob(15000.0, "weight of C: so many ordinary keys hold against the facts")
    b: float = knob(0.0, "weight of each key that an earlier edit of the sequence wrote")
    c: float = knob(0.0, "weight of the identity")
    slack: float = knob(1.0, "how loosely residuals are met; 0: exactly")
    loose: float = knob(0.0, "more slack, in means of k M^-1 k over the keys that are written")
    null: float = knob(
        0.0, "eigenvalue of C below which directions belong to its null space, where the change stays; 0: anywhere"
    )
    entries: float = knob(
        1.0, "share of the change's entries that stay, those that are largest beside the weight's own (RECT); 1: all"
    )
    spectrum_base: float = knob(
        0.0,
        "all change since the weight was unedited: its singular values above the weight's largest become logarithms to this base beyond it, after "
        "each edit (PRUNE has 1.2); 0: they stay",
    )
    longest: float = knob(0.0, "longest change of a block's W_out, in lengths of W_out (Frobenius); 0: any")
    least_met: float = knob(
        0.25, "an edit that writes less than this share of what its facts want is told as one that writes too little"
    )

    bundles: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "policy": POLICIES | MANY_POLICIES,
        "constants": CONSTANTS | MANY_CONSTANTS,
        "search": SEARCHES,
    }

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that are written, from the lowest."""
        return self.layers or (self.layer,)

    @property
    def parts(self) -> tuple[str, ...]:
        """What is changed while v* is sought; the last is what is written."""
        return {"mlp": ("mlp",), "stream": ("stream",), "both": ("attn", "mlp")}[self.sought_in]

    @property
    def is_shaped(self) -> bool:
        """Whether anything is done to a change after its solve (`mechedit.editors.shaping`)."""
        return self.entries < 1 or self.spectrum_base > 0 or self.longest > 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            list(self.layers) == sorted({*self.layers}) and all(layer >= 0 for layer in self.layers),
            f"layers must be different blocks, from 0, the lowest first; found {self.layers}.",
        )
        require(
            not self.portions
            or (len(self.portions) == len(self.layers) and min(self.portions) >= 0 < self.portions[-1]),
            f"portions must be a number of 0 or more for each of layers {self.layers}, the last above 0; found {self.portions}.",
        )
        require(
            self.direction == self.inserted,
            f"one solve writes along the keys that return the values: direction and inserted must be the same; found {self.direction} and {self.inserted}.",
        )
        require(
            self.inserted == "averaged" or not self.layers[1:],
            f"over several layers keys are averages: inserted must be averaged; found {self.inserted}.",
        )
        for name in ("a", "b", "c", "slack", "null", "loose", "longest"):
            value = getattr(self, name)
            require(0 <= value < float("inf"), f"{name} must be 0 or more; found {value}.")
        require(
            not self.fisher or self.sought_in == "mlp",
            f"fisher is of what the MLP gives, and needs sought_in = mlp; found {self.sought_in}. Give fisher = 0, or seek v* in the mlp.",
        )
        require(0 < self.entries <= 1, f"entries must be above 0, and 1 at most; found {self.entries}.")
        require(
            self.spectrum_base == 0 or self.spectrum_base > 1,
            f"spectrum_base must be 0 (off) or above 1; found {self.spectrum_base}.",
        )
        require(0 <= self.least_met <= 1, f"least_met must be from 0 to 1; found {self.least_met}.")
        self._check_weights()

    def _check_weights(self) -> None:
        require(self.a > 0 or self.c > 0, "a or c must be above 0, as nothing else weighs every direction; both are 0.")


@dataclass(frozen=True)
class EmmetSettings(MemitSettings):
    """How keys and values are found, as ROME's; residuals are met exactly."""

    a: float = knob(1.0, "weight of C")
    slack: float = knob(0.0, "how loosely residuals are met; 0: exactly")


@dataclass(frozen=True)
class AlphaEditSettings(MemitSettings):
    """How keys and values are found, as ROME's; the change stays in the null space of C."""

    a: float = knob(0.0, "weight of C")
    b: float = knob(1.0, "weight of each key that an earlier edit of the sequence wrote")
    c: float = knob(10.0, "weight of the identity")
    null: float = knob(
        0.02, "eigenvalue of C below which directions belong to its null space, where the change stays; 0: anywhere"
    )


@dataclass(frozen=True)
class PmetSettings(MemitSettings):
    """How keys and values are found, the attention changed with the MLP, and what is spread over the blocks (constants of GPT-J's)."""

    a: float = knob(6000.0, "weight of C: so many ordinary keys hold against the facts")
    spread: str = knob(
        "sqrt",
        "share of what is still wanted that a block writes: one over the number of blocks left (left), over its root (sqrt), or all of it (own)",
        SPREADS,
    )
    sought_in: str = knob(
        "both",
        "what is changed while v* is sought: what the last block's MLP gives (mlp), the residual stream behind that block (stream), or its MLP "
        "and its attention, of which the MLP's change alone is written (both)",
        SOUGHT_IN,
    )
    measured: str = knob(
        "mlp",
        "where what is still wanted is read, of the last block: in the residual stream behind it (stream), or at its MLP's output (mlp)",
        MEASURED,
    )
    clamp: float = knob(0.75, "longest allowed change of the value, in lengths of the original value")
    steps: int = knob(30, "Adam steps on v*")
    learning_rate: float = knob(0.2, "Adam's learning rate")
    kl: float = knob(1.0, "weight of the essence term: KL of what '{subject} is a' predicts, at the subject")
    stop: str = knob(
        "top",
        "target: the loss of the target decides; published: the whole loss, and the last step is not taken; top: as PMET, where the target is "
        "first everywhere its loss weighs a tenth and the KL term's 0.01 decides, else the whole loss",
        STOPS,
    )


@dataclass(frozen=True)
class SequentialSettings(MemitSettings):
    """How keys and values are found, as ROME's, but clear of what ordinary text depends on; earlier edits weigh as much as new ones, and C holds
    on to all else."""

    guard: str = knob(
        "warn",
        "an edit out of its bands is an error (refuse), a warning (warn), or empty, with the reason (rollback); a sequence is watched as a whole",
        GUARDS,
    )
    a: float = knob(
        0.0, "weight of C: so many ordinary keys hold against the facts; 0: 5 d_mlp, or none where c is given"
    )
    b: float = knob(1.0, "weight of each key that an earlier edit of the sequence wrote")
    fisher: float = knob(
        4.0,
        "weight, in the loss, of the KL that the change d of the value costs where it is added to ordinary text (mechedit.moments.curvature), in that of "
        "a random d as long as what W_out gives there: v* keeps clear of what such text depends on; 0: off",
    )
    steps: int = knob(10, "steps on v*, one that is taken back counted too")
    slack: float = knob(0.0, "how loosely residuals are met; 0: exactly")
    loose: float = knob(0.2, "more slack, in means of k M^-1 k over the keys that are written")

    def _check_weights(self) -> None:
        """None that cannot be: what is 0 is filled in for the model."""
