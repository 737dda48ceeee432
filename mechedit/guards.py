"""Is an edit within the bands of edits that work? What is measured, the bands, and the reasons when one is left.

    divisor_share       u @ key over what the averaged key gives: near zero, the published policy's two keys disagree
    relative_norm       |change| over |W_out|
    essence_kl          KL(edited || original) of what follows "{subject} is a", in nats
    perplexity_ratio    edited over original, on `held_out_text`

The published policy can break a model by one edit ("disabling edits", Gupta et al. 2024); the first and the last number show it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.models import Blocks, HookedModel
from mechedit.prompts import check_length, encode, pad, resolve_bos
from mechedit.scoring import mean_log_p

__all__ = ["BANDS", "Health", "drift", "held_out_text", "measure", "reasons"]

HELD_OUT_TOKENS = 128  # enough to see damage, and a small part of an edit's time
BANDS: dict[str, tuple[float, float, str]] = {
    "cond_C": (0.0, 1e12, "C^-1 k* would be noise; estimate C from more keys, or add a ridge"),
    "divisor_share": (
        0.05,
        float("inf"),
        "the two keys of the published policy disagree, and such an edit breaks the model; use policy='averaged'",
    ),
    "relative_norm": (0.0, 1.0, "so large a change damages much else; lower the clamp, or edit another layer"),
    "essence_kl": (0.0, 16.0, "the subject has become something else; lower the clamp, or raise kl"),
    "perplexity_ratio": (
        0.0,
        1.5,
        "text that has nothing to do with the fact is damaged; lower the clamp, or edit another layer",
    ),
}


@dataclass(frozen=True)
class Health:
    """What an unharmed model says: log-probabilities after "{subject} is a", and its mean log P on held-out text."""

    essence: Float[Tensor, " d_vocab"]
    text: float


@torch.no_grad()
def measure(model: HookedModel, subject: str, *, prepend_bos: bool | None = None) -> Health:
    """The model's health as it is now, for a subject."""
    ids, _ = encode(model, f"{subject} is a", prepend_bos=resolve_bos(model, prepend_bos))
    check_length(model, len(ids))
    blocks = Blocks(model)
    essence = blocks.logits(blocks.final(pad(model, [ids]))[:, -1])[0].float().log_softmax(-1)
    text = mean_log_p(model, held_out_text(model), HELD_OUT_TOKENS, prepend_bos=prepend_bos)
    return Health(essence.cpu(), text)


def held_out_text(model: HookedModel) -> str:
    """Text that no one fact has to do with: prose that ships with mechedit; of an organism that ships, sentences of its world."""
    data = resources.files("mechedit").joinpath("data")
    own = data.joinpath(str(model.cfg.model_name), "held_out.txt")
    return (own if own.is_file() else data.joinpath("held_out.txt")).read_text(encoding="utf-8")


def drift(before: Health, after: Health) -> dict[str, float]:
    """`essence_kl` and `perplexity_ratio` between two healths."""
    kl = float((after.essence.exp() * (after.essence - before.essence)).sum())
    return {"essence_kl": max(kl, 0.0), "perplexity_ratio": float(torch.tensor(before.text - after.text).exp())}


def reasons(report: dict[str, float]) -> list[str]:
    """A sentence for each number that is not within its band; NaN never is."""
    found = []
    for name, (low, high, advice) in BANDS.items():
        value = report[name]
        if not low <= value <= high:
            edge = f"below {low:g}" if value < low else f"above {high:g}" if value > high else "no number"
            found.append(f"{name} = {value:.3g} is {edge}: {advice}.")
    return found
