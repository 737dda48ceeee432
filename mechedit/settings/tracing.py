"""How a causal trace corrupts, restores and measures."""

from __future__ import annotations

from dataclasses import dataclass

from mechedit.settings.base import Settings, check_each, knob, require

__all__ = [
    "CENTRES",
    "CORRUPTIONS",
    "FACT_TOKENS",
    "KINDS",
    "KNOWN_KINDS",
    "MEASURES",
    "PRECISIONS",
    "ROLES",
    "ROLE_TITLES",
    "SCALES",
    "SEVERED_TITLES",
    "STATE_KINDS",
    "TraceSettings",
]

KINDS = ("resid", "mlp", "attn")
STATE_KINDS = ("resid", "resid_pre", "resid_mid")  # one state each; others are windows of outputs
KNOWN_KINDS = (*STATE_KINDS, "mlp", "attn")
FACT_TOKENS = ("subject_last", "subject_first", "after_first", "last")
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


@dataclass(frozen=True)
class TraceSettings(Settings):
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
        check_each(self)
        require(bool(self.kinds), f"kinds must name at least one of {', '.join(KINDS)}; it is empty.")
        require(len(set(self.kinds)) == len(self.kinds), f"kinds must differ from each other; found {self.kinds}.")
        require(self.window >= 0, f"window must be 0 (the preset's) or more layers; found {self.window}.")
        require(self.draws >= 1, f"draws must be at least 1; found {self.draws}.")
        require(self.noise > 0, f"noise must be a positive number; found {self.noise}.")
        require(self.degrees > 0, f"degrees must be positive; found {self.degrees}.")
        require(self.extra >= 0, f"extra must be 0 or more tokens; found {self.extra}.")
        require(self.memory > 0, f"memory must be a positive number of gigabytes; found {self.memory}.")
