"""Is an edit within the bands of edits that work? What is measured, the bands, and the reasons when one is left.

    relative_norm       |change| over |weights that are changed|
    essence_kl          KL(edited || original) of what follows "{subject} is a", in nats; the largest of several subjects
    perplexity_ratio    edited over original, on `held_out_text`

These bands are for every editor; an editor adds bands for numbers of its own. One edit can break a model ("disabling edits", Gupta
et al. 2024); the numbers show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.errors import check_list
from mechedit.models import Blocks, HookedModel, identity, remembered
from mechedit.prompts import check_length, encode, pad, resolve_bos
from mechedit.scoring import log_p
from mechedit.settings import Bands, SettingsError

__all__ = ["BANDS", "Band", "Health", "drift", "held_out_text", "limits", "measure", "of_unedited", "reasons"]

Band = tuple[float, float, str]
"""From, to, and what to do about a number that is outside."""

HELD_OUT_TOKENS = 128  # enough to see damage, and a small part of an edit's time
SUBJECTS = 16  # whose essence is looked at in an edit of many facts
BANDS: dict[str, Band] = {
    "relative_norm": (0.0, 1.0, "so large a change damages much else; lower the clamp, or edit another layer"),
    "essence_kl": (0.0, 16.0, "the subject has become something else; lower the clamp, or raise kl"),
    "perplexity_ratio": (
        0.0,
        1.5,
        "text that has nothing to do with the fact is damaged; lower the clamp, or edit another layer",
    ),
}


@dataclass(frozen=True, eq=False)
class Health:
    """What an unharmed model says: log-probabilities after "{subject} is a", by subject, and those of the tokens of held-out text."""

    essence: dict[str, Float[Tensor, " d_vocab"]]
    text: tuple[float, ...]


def of_unedited(model: HookedModel, subjects: Sequence[str], *, prepend_bos: bool | None = None) -> Health:
    """`measure` of the model as it is, before an edit; kept with it, so that the next edit need not measure it again."""
    check_list("subjects", subjects)
    bos, now = resolve_bos(model, prepend_bos), identity(model).whole
    text = remembered(model, ("held-out text", now, bos), lambda: _text(model, bos))
    some = dict.fromkeys(subjects[:SUBJECTS])
    essence = {
        subject: remembered(model, ("essence", now, bos, subject), partial(_essence, model, subject, bos))
        for subject in some
    }
    return Health(essence, text)


def measure(model: HookedModel, subjects: Sequence[str], *, prepend_bos: bool | None = None) -> Health:
    """The model's health as it is now: for a subject or several, of which the first 16 are looked at."""
    check_list("subjects", subjects)
    bos = resolve_bos(model, prepend_bos)
    essence = {subject: _essence(model, subject, bos) for subject in dict.fromkeys(subjects[:SUBJECTS])}
    return Health(essence, _text(model, bos))


@torch.no_grad()
def _essence(model: HookedModel, subject: str, bos: bool) -> Float[Tensor, " d_vocab"]:
    ids, _ = encode(model, f"{subject} is a", prepend_bos=bos)
    check_length(model, len(ids))
    blocks = Blocks(model)
    return blocks.logits(blocks.final(pad(model, [ids]))[:, -1])[0].float().log_softmax(-1).cpu()


def _text(model: HookedModel, bos: bool) -> tuple[float, ...]:
    return tuple(log_p(model, held_out_text(model), HELD_OUT_TOKENS, prepend_bos=bos))


def held_out_text(model: HookedModel) -> str:
    """Text that no one fact has to do with: prose that ships with mechedit; of an organism that ships, sentences of its world."""
    data = resources.files("mechedit").joinpath("data")
    own = data.joinpath(str(model.cfg.model_name), "held_out.txt")
    return (own if own.is_file() else data.joinpath("held_out.txt")).read_text(encoding="utf-8")


def drift(before: Health, after: Health) -> dict[str, float]:
    """`essence_kl` and `perplexity_ratio` between two healths of the same subjects; of the text as much as both have, because what
    a model is told before it takes room in the context."""
    kl = [_kl(after.essence[subject], was) for subject, was in before.essence.items()]
    n = min(len(before.text), len(after.text))
    was, now = (torch.tensor(each.text[:n], dtype=torch.float64).mean() for each in (before, after))
    ratio = float((was - now).exp())
    return {"essence_kl": max(kl) if all(each == each for each in kl) else float("nan"), "perplexity_ratio": ratio}


def _kl(log_p: Float[Tensor, " d_vocab"], log_q: Float[Tensor, " d_vocab"]) -> float:
    """KL(p || q) in nats, not below zero."""
    found = float((log_p.exp() * (log_p - log_q)).sum())
    return max(found, 0.0) if found == found else found


def limits(bands: Mapping[str, Band], own: Bands) -> dict[str, Band]:
    """The editor's bands, with the model's or the user's own edges in place of theirs.

    Raises:
        SettingsError: a band of a number that the editor does not have.
    """
    if unknown := [name for name, _, _ in own if name not in bands]:
        raise SettingsError(f"the editor has no number {unknown[0]!r} to hold in a band; it has {', '.join(bands)}.")
    return dict(bands) | {name: (low, high, bands[name][2]) for name, low, high in own}


def reasons(report: Mapping[str, float], bands: Mapping[str, Band] = BANDS) -> list[str]:
    """A sentence for each number that is not within its band; NaN never is."""
    found = []
    for name, (low, high, advice) in bands.items():
        value = report[name]
        if not low <= value <= high:
            edge = f"below {low:g}" if value < low else f"above {high:g}" if value > high else "no number"
            found.append(f"{name} = {value:.3g} is {edge}: {advice}.")
    return found
