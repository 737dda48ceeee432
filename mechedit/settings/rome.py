"""The options of ROME, with the constants that have names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mechedit.settings.base import knob, require
from mechedit.settings.editor import PREFIXES, EditSettings, check_prefixes
from mechedit.settings.tracing import FACT_TOKENS

__all__ = ["CONSTANTS", "POLICIES", "SEARCHES", "SHARES", "STOPS", "WHOSE_KEY", "RomeSettings"]

WHOSE_KEY = ("averaged", "prompt")
SHARES = ("own", "whole")
STOPS = ("target", "published", "top")
POLICIES: dict[str, dict[str, Any]] = {  # whose keys, whose shares, which stop; by the names of their authors
    "averaged": {"direction": "averaged", "inserted": "averaged", "shares": "own", "stop": "target"},
    "prompt": {"direction": "prompt", "inserted": "prompt", "shares": "own", "stop": "target"},
    "published": {"direction": "averaged", "inserted": "prompt", "shares": "whole", "stop": "published"},
    "r-rome": {"direction": "averaged", "inserted": "averaged", "shares": "whole", "stop": "published"},
    "p-rome": {"direction": "prompt", "inserted": "prompt", "shares": "whole", "stop": "published"},
}
CONSTANTS: dict[str, dict[str, float]] = {  # of v*: what the published code has, and what the paper's text says
    "published": {"clamp": 4.0, "steps": 20, "learning_rate": 0.5, "weight_decay": 0.5, "kl": 0.0625, "stop_at": 0.05},
    "paper": {"clamp": 4.0, "steps": 20, "learning_rate": 0.5, "weight_decay": 1.5e-3, "kl": 100.0, "stop_at": 0.05},
}

SEARCHES: dict[str, dict[str, Any]] = {  # of v*: with which prompts
    "whole": {"sought_with": 0, "leave_learnt": False},
    "quick": {"sought_with": 11, "leave_learnt": True},
    "few": {"sought_with": 5, "leave_learnt": True},
}


@dataclass(frozen=True)
class RomeSettings(EditSettings):
    """How ROME finds k* and v* (section 3.1; constants as published unless a preset says otherwise)."""

    layer: int = knob(-1, "block whose W_out is edited, from 0; -1 means the model's preset")
    clamp: float = knob(4.0, "longest allowed change of the value, in lengths of the original value")
    steps: int = knob(20, "steps on v*, one that is taken back counted too")
    learning_rate: float = knob(0.5, "Adam's learning rate; L-BFGS has none")
    weight_decay: float = knob(0.5, "weight of |delta| / |value|^2 in the loss")
    fisher: float = knob(
        0.0,
        "weight, in the loss, of the KL that the change d of the value costs where it is added to ordinary text (mechedit.moments.curvature), in that of "
        "a random d as long as what W_out gives there: v* keeps clear of what such text depends on, and is sought by L-BFGS in place of Adam; 0: off, as published",
    )
    kl: float = knob(0.0625, "weight of the essence term: KL of what '{subject} is a' predicts, at the subject")
    stop_at: float = knob(0.05, "stop once the target's own loss, -log p, averaged over prefixes, is below this")
    prefixes: tuple[tuple[int, int], ...] = knob(
        PREFIXES["default"],
        f"sampled prefixes as (tokens, how many), or {', '.join(PREFIXES)}; the bare prompt is added",
    )
    fact_token: str = knob("subject_last", "token whose key is edited", FACT_TOKENS)
    direction: str = knob(
        "averaged",
        "whose key gives the direction of the change: that averaged over prefixes, or the prompt's",
        WHOSE_KEY,
    )
    inserted: str = knob("averaged", "whose key returns v* after the edit", WHOSE_KEY)
    shares: str = knob(
        "own",
        "own: while v* is sought, each prefix sees the share of it that its key will get; whole: all of it, as published",
        SHARES,
    )
    stop: str = knob(
        "target",
        "target: the loss of the target decides; published: the whole loss, and the last step is not taken; top: as PMET, where the target is "
        "first everywhere its loss weighs a tenth and the KL term's 0.01 decides, else the whole loss",
        STOPS,
    )
    sought_with: int = knob(
        0,
        "prompts of each fact that v* is sought with, evenly taken from those behind prefixes, the bare prompt first; 0: all",
    )
    leave_learnt: bool = knob(False, "while v* is sought, leave a prompt out as soon as its own loss is below stop_at")
    ridge: float = knob(0.0, "this share of C's mean diagonal is added to its diagonal")

    bundles: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "policy": POLICIES,
        "constants": CONSTANTS,
        "search": SEARCHES,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_prefixes(self.prefixes)
        require(0 <= self.fisher < float("inf"), f"fisher must be 0 or more; found {self.fisher}.")
        require(self.sought_with >= 0, f"sought_with must be 0 (all prompts) or more; found {self.sought_with}.")
