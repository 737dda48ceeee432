"""The options of editors that are no closed form (`rome`, `many`), with the constants that have names; and those of every editor by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mechedit.settings.base import knob, require
from mechedit.settings.editor import PREFIXES, EditSettings, check_prefixes
from mechedit.settings.many import AlphaEditSettings, EmmetSettings, MemitSettings, PmetSettings, SequentialSettings
from mechedit.settings.rome import RomeSettings

__all__ = [
    "ATTENTION_WEIGHTS",
    "DESCENT_POLICIES",
    "EDITOR_SETTINGS",
    "LOSSES",
    "NEURON_ACTIONS",
    "NEURON_POLICIES",
    "AttentionEditSettings",
    "BoundedSettings",
    "DescentSettings",
    "FineTuningSettings",
    "KeSettings",
    "KnowledgeNeuronsSettings",
    "MendSettings",
    "ToldSettings",
    "TrainedSettings",
]

LOSSES = ("masked", "last")
ATTENTION_WEIGHTS = ("W_Q", "W_K", "W_V", "W_O")
DESCENT_POLICIES: dict[str, dict[str, Any]] = {  # of gradient steps: the published code's
    "published": {"loss": "last", "bias": True, "batch": 128, "steps": 25, "stop_at": 0.01},
}
NEURON_ACTIONS = ("update", "erase", "suppress", "amplify")
NEURON_POLICIES: dict[str, dict[str, Any]] = {
    "published": {  # the code behind the table of Meng et al. 2022
        "activation": "pre",
        "points": "both ends",
        "norm": "moving",
        "prefixes": (),
        "answer": "published",
        "old": "greedy",
        "direction": "unembedding",  # that of GPT-2, the embedding too
        "scale": "none",
        "l1": 2.0,
        "l2": 1.0,
    }
}


@dataclass(frozen=True)
class DescentSettings(EditSettings):
    """What editors share that take gradient steps on weights until the model says the new targets."""

    layer: int = knob(-1, "block that is tuned, from 0; -1 means the model's preset")
    steps: int = knob(25, "Adam steps")
    learning_rate: float = knob(5e-4, "Adam's learning rate")
    stop_at: float = knob(0.01, "stop once the loss, -log p of the targets, is below this")
    loss: str = knob(
        "masked",
        "masked: each token of a target where it is predicted; last: all of them at the prompt's last token, as published",
        LOSSES,
    )
    batch: int = knob(
        0, "facts of one Adam step, left out while their own loss is below stop_at; 0: all of an edit together"
    )
    bias: bool = knob(False, "tune the bias too, where the model has one")

    bundles: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {"policy": DESCENT_POLICIES}

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch >= 0, f"batch must be 0 (all facts) or more; found {self.batch}.")
        bound = getattr(self, "norm_bound", 1.0)
        require(bound > 0, f"norm_bound must be positive (the editor ft has none); found {bound}.")


@dataclass(frozen=True)
class FineTuningSettings(DescentSettings):
    """How one `W_out` is fine-tuned (FT)."""


@dataclass(frozen=True)
class BoundedSettings(DescentSettings):
    """How one `W_out` is fine-tuned within a bound (FT+L)."""

    norm_bound: float = knob(5e-4, "farthest that any number of the weight may move")


@dataclass(frozen=True)
class AttentionEditSettings(DescentSettings):
    """How the attention of one block is fine-tuned within a bound (appendix I)."""

    learning_rate: float = knob(1e-3, "Adam's learning rate")
    norm_bound: float = knob(1e-3, "farthest that any number of the weights may move")
    bias: bool = knob(True, "tune the biases of these weights too, where the model has them")
    weights: tuple[str, ...] = knob(("W_Q", "W_K", "W_V"), "weights that are tuned", ATTENTION_WEIGHTS)
    heads: tuple[int, ...] = knob((), "query heads whose parts are tuned, from 0; empty: all of them")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.weights), f"weights must name at least one of {', '.join(ATTENTION_WEIGHTS)}; it is empty.")


@dataclass(frozen=True)
class ToldSettings(EditSettings):
    """In which words a model is told a fact."""

    sentence: str = knob("Imagine that {fact}. ", "what stands before every prompt, with the fact in place of {fact}")
    question: str = knob("{fact}. ", "the same where the fact is a question with its answer behind it")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sentence", "question"):
            words = getattr(self, name)
            require(words.count("{fact}") == 1, f"{name} must have {{fact}} in it once; found {words!r}.")


@dataclass(frozen=True)
class KnowledgeNeuronsSettings(EditSettings):
    """Which neurons carry the true answer, and what becomes of their value rows (Dai et al. 2022; constants theirs)."""

    action: str = knob(
        "update",
        "what becomes of the neurons' value rows: the old answer's direction taken out and the new one's put in (update), nothing (erase, of "
        "the 20 most frequent among the facts' neurons; suppress, of all), twice what they are (amplify)",
        NEURON_ACTIONS,
    )
    l1: float = knob(1.0, "how much of the old answer's direction is taken out")
    l2: float = knob(8.0, "how much of the new answer's direction is put in")
    layers: tuple[int, ...] = knob((), "blocks whose neurons are looked at; by default all")
    threshold: float = knob(0.2, "coarse are neurons with this share of a prompt's largest attribution, or more")
    p: float = knob(0.7, "and refined those of this share of the prompts, or more")
    fewest: int = knob(2, "p is lowered, by 0.05 up to 6 times, while fewer neurons are left")
    most: int = knob(5, "and raised while more are")
    steps: int = knob(20, "points of the path from no activation to the prompt's, at which gradients are taken")
    prefixes: tuple[tuple[int, int], ...] = knob(
        ((5, 4), (10, 4)),  # with the bare prompt nine, as many as the paper's facts have on average (8.6)
        f"sampled prefixes as (tokens, how many), or {', '.join(PREFIXES)}; the bare prompt is added",
    )
    activation: str = knob("post", "w is after the nonlinearity (post), or before it (pre)", ("post", "pre"))
    points: str = knob(
        "right",
        "the path's points: k/m for k = 1..m (right), or from 0 to 1, both with the weight 1/m (both ends)",
        ("right", "both ends"),
    )
    answer: str = knob(
        "whole",
        "P(answer) is that of the whole answer (whole), or the mean over its tokens of P at the prompt's end, without the space before it, and "
        "all tokens' directions are put in (published)",
        ("whole", "published"),
    )
    norm: str = knob(
        "held",
        "where a norm follows the MLP, as in Gemma 2 and 3, its denominator stays what it is in the prompt's own run (held), or follows w (moving)",
        ("held", "moving"),
    )
    old: str = knob(
        "true", "the old answer: the true target, or the model's own next token (greedy)", ("true", "greedy")
    )
    direction: str = knob(
        "unembedding",
        "an answer's direction: its token's in the unembedding, or in the embedding",
        ("unembedding", "embedding"),
    )
    scale: str = knob(
        "row",
        "directions are scaled to the length of the row that they change (row), or left as they are (none)",
        ("row", "none"),
    )

    bundles: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {"policy": NEURON_POLICIES}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_prefixes(self.prefixes)
        require(self.steps >= 1, f"steps must be 1 or more; found {self.steps}.")
        require(
            self.points != "both ends" or self.steps >= 2,
            f"a path with both ends has 2 steps or more; found {self.steps}.",
        )
        require(0 < self.threshold <= 1, f"threshold must be above 0, and 1 at most; found {self.threshold}.")
        require(0 < self.p <= 1, f"p must be above 0, and 1 at most; found {self.p}.")
        require(
            1 <= self.fewest <= self.most,
            f"fewest must be 1 or more, and most no less; found {self.fewest} and {self.most}.",
        )
        require(len(set(self.layers)) == len(self.layers), f"layers must be different blocks; found {self.layers}.")


@dataclass(frozen=True)
class TrainedSettings(EditSettings):
    """Which trained network edits, and how hard."""

    checkpoint: str = knob(
        "",
        "what `mechedit train-editor` made, a file or its folder; or the name of one that ships for the model (by default the first)",
    )
    digest: str = knob("", "what it must be; by default what it is, which is then a part of the edit's settings")
    form: str = knob(
        "any", "what it must be: of the paper's form, of the published code's, or any", ("any", "paper", "published")
    )
    scale: float = knob(1.0, "the change is multiplied by this")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.scale > 0, f"scale must be positive; found {self.scale}.")


@dataclass(frozen=True)
class MendSettings(TrainedSettings):
    """Which network of MEND's edits (Mitchell et al. 2022)."""


@dataclass(frozen=True)
class KeSettings(TrainedSettings):
    """Which network of KE's edits (De Cao et al. 2021)."""

    repeats: int = knob(1, "the change is made up to so many times, until the model says the target")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.repeats >= 1, f"repeats must be 1 or more; found {self.repeats}.")


EDITOR_SETTINGS: dict[str, type[EditSettings]] = {
    **dict.fromkeys(("rome", "rome-identity", "rome-random-layer", "rome-random-key"), RomeSettings),
    "ft": FineTuningSettings,
    "ft-l": BoundedSettings,
    "attention-edit": AttentionEditSettings,
    "memit": MemitSettings,
    "pmet": PmetSettings,
    "emmet": EmmetSettings,
    "alphaedit": AlphaEditSettings,
    "sequential": SequentialSettings,
    "told": ToldSettings,
    "kn": KnowledgeNeuronsSettings,
    "mend": MendSettings,
    "ke": KeSettings,
}
"""The settings of the editors that come with mechedit, for who needs no more than those."""
