"""How editors that are trained are trained, with the constants that have names.

The defaults are those that trained the organism's in minutes; the papers', for GPT-2 XL, are policies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mechedit.settings.base import Settings, check_each, knob, require

__all__ = ["FORMS", "KE_POLICIES", "MEND_POLICIES", "TRAINING", "KeTraining", "MendTraining", "TrainingSettings"]

FORMS = ("paper", "published")
MEND_POLICIES: dict[str, dict[str, Any]] = {
    "paper": {  # Mitchell et al. 2022, text
        "form": "paper",
        "rank": 1920,
        "learning_rate": 1e-6,
        "rate_learning_rate": 1e-4,
        "edit_rate": 1e-4,
        "batch": 10,
        "warmup": 0,
        "steps": 500_000,
        "validate_every": 5000,
        "patience": 20_000,
        "validation": 500,
    },
    "published": {  # their code, which the tables of Meng et al. 2022 are by
        "form": "published",
        "rank": 1920,
        "learning_rate": 1e-6,
        "rate_learning_rate": 1e-4,
        "edit_rate": 1e-4,
        "batch": 10,
        "warmup": 0,
        "steps": 100_000,  # of 10 edits each: a million edits
        "validate_every": 500,
        "patience": 2000,
        "validation": 500,
    },
}
KE_POLICIES: dict[str, dict[str, Any]] = {
    "paper": {  # De Cao et al. 2021 and their code
        "form": "paper",
        "lstm": 128,
        "condition": 1024,
        "hidden": 128,
        "embeddings": "trained",
        "learning_rate": 3e-4,
        "batch": 64,
        "warmup": 1000,
        "steps": 200_000,
    },
    "published": {  # the re-implementation that the tables of Meng et al. 2022 are by
        "form": "published",
        "lstm": 512,
        "condition": 768,
        "hidden": 512,
        "embeddings": "trained",
        "learning_rate": 1e-5,
        "batch": 10,
        "warmup": 0,
        "steps": 100_000,
        "validate_every": 500,
        "patience": 2000,
        "validation": 500,
    },
}


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """What the training of every editor has."""

    layers: tuple[int, ...] = knob((), "blocks whose MLP's matrices are edited; by default the last three")
    form: str = knob(
        "paper", "the network and its loss are those of the authors' paper, or of the published code", FORMS
    )
    seed: int = knob(0, "seed of all that is drawn")
    steps: int = knob(600, "steps at most")
    batch: int = knob(10, "edits of a step")
    together: int = knob(0, "edits that run at once, the gradients of a step being added up; 0: all of the batch")
    learning_rate: float = knob(1e-3, "learning rate of the network")
    warmup: int = knob(
        50, "steps in which the learning rates rise; then they fall, linearly, to 0 at the last; 0: they stay"
    )
    clip: float = knob(100.0, "longest gradient of a step, of all parameters together")
    edit_weight: float = knob(0.1, "weight of -log p of the target after equivalent prompts")
    locality_weight: float = knob(1.0, "weight of the KL divergence on unrelated text")
    locality: str = knob(
        "others",
        "unrelated are facts of another subject and relation (others), or facts of another subject, and of the same relation and answer (near)",
        ("others", "near"),
    )
    evaluation: int = knob(500, "the first facts are left out, with all facts of their subjects, to report on")
    validation: int = knob(100, "the next ones, likewise, tell when to stop")
    validate_every: int = knob(50, "steps between validations")
    patience: int = knob(600, "stop when no validation of so many steps was better; what is kept is the best")
    checkpoint_every: int = knob(50, "steps between checkpoints, from which a run that was stopped goes on")
    text_tokens: int = knob(10, "tokens of the model's own continuation of a text, where there are no facts")
    text_targets: str = knob(
        "own",
        "the target of a text is the model's continuation of it (own), or that of another text, which it does not expect (others)",
        ("own", "others"),
    )
    text_context: int = knob(48, "tokens of a text, the continuation among them")
    texts: int = knob(2000, "texts sampled, where there are no facts")
    precision: str = knob(
        "auto",
        "number format of the model's products: bfloat16 where a GPU has it (auto), or as named",
        ("auto", "float32", "bfloat16"),
    )
    prepend_bos: bool | None = knob(
        None, "put the beginning-of-sequence token first; by default what the model was made for"
    )

    bundles: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {}

    def __post_init__(self) -> None:
        check_each(self)
        for name in ("steps", "batch", "validate_every", "patience", "checkpoint_every", "text_tokens", "texts"):
            require(getattr(self, name) >= 1, f"{name} must be 1 or more; found {getattr(self, name)}.")
        for name in ("together", "warmup", "evaluation", "edit_weight", "locality_weight"):
            require(getattr(self, name) >= 0, f"{name} must be 0 or more; found {getattr(self, name)}.")
        for name in ("learning_rate", "clip"):
            require(getattr(self, name) > 0, f"{name} must be positive; found {getattr(self, name)}.")
        require(self.validation >= 1, f"validation must be 1 or more; found {self.validation}.")
        require(len(set(self.layers)) == len(self.layers), f"layers must be different blocks; found {self.layers}.")
        require(
            self.text_context > 2 * self.text_tokens,
            f"text_context must be more than twice text_tokens; found {self.text_context} and {self.text_tokens}.",
        )


@dataclass(frozen=True)
class MendTraining(TrainingSettings):
    """How MEND's network is made and trained (Mitchell et al. 2022)."""

    rank: int = knob(64, "of both layers; no more than a weight's rows and columns together")
    edit_rate: float = knob(1e-2, "each weight's edit rate, as it begins")
    rate_learning_rate: float = knob(1e-2, "learning rate of the edit rates")

    bundles: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {"policy": MEND_POLICIES}

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank >= 1, f"rank must be 1 or more; found {self.rank}.")
        require(self.rate_learning_rate > 0, f"rate_learning_rate must be positive; found {self.rate_learning_rate}.")


@dataclass(frozen=True)
class KeTraining(TrainingSettings):
    """How KE's network is made and trained (De Cao et al. 2021)."""

    lstm: int = knob(128, "width of the LSTM, each way")
    condition: int = knob(256, "width of what it makes of the condition")
    hidden: int = knob(64, "width of the layer before the factors")
    max_scale: float = knob(1.0, "how much of the change there is at most")
    embeddings: str = knob(
        "held",
        "the LSTM reads the model's embeddings as they are (held), or its own, which begin as the model's (trained)",
        ("held", "trained"),
    )
    alpha_learning_rate: float = knob(0.1, "learning rate of the multiplier of the KL divergence beyond the margin")
    smoothing: float = knob(0.1, "of the targets' labels")
    margin: float = knob(1e-3, "KL divergence that is allowed, at first")
    least_margin: float = knob(1e-5, "and at last")
    margin_factor: float = knob(0.8, "the margin shrinks so when a validation has more than 90 % success")

    bundles: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {"policy": KE_POLICIES}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lstm", "condition", "hidden"):
            require(getattr(self, name) >= 1, f"{name} must be 1 or more; found {getattr(self, name)}.")
        for name in ("max_scale", "alpha_learning_rate", "margin", "least_margin", "margin_factor"):
            require(getattr(self, name) > 0, f"{name} must be positive; found {getattr(self, name)}.")
        require(0 <= self.smoothing < 1, f"smoothing must be from 0 to below 1; found {self.smoothing}.")


TRAINING: dict[str, type[TrainingSettings]] = {"mend": MendTraining, "ke": KeTraining}
"""Of each editor that is trained."""
