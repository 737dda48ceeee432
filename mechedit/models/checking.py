"""Whether a hooked model computes what Hugging Face's does: its logits after some token ids, before anything else is done with it.

The check runs where a model is loaded, since Hugging Face's is in memory there: `expected` before the hooked model takes the
weights, `check` after. What is windowed is windowed to a few positions for the check, so that the windows show in a short
text. The verdict is kept in the cache under the configuration, the shapes of the parameters, those that are zeros or ones
throughout (a bias of zeros shows nothing of itself), the number format, and the versions of everything that computes.

A verdict that was kept vouches for this: a model of the same configuration, on the same versions, had the logits of Hugging
Face's on these ids. It leaves out the weights. An option whose effect was too small to be seen with the weights that were
checked (a cap that nothing reached, a clamp that nothing touched) is not seen with others either.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit import cache
from mechedit.models.conversion import FOREIGN, because, reason
from mechedit.models.keeping import kept
from mechedit.models.surface import HookedModel, ModelError, device_of

__all__ = [
    "PARITY",
    "check",
    "check_finite",
    "difference",
    "expected",
    "is_kept",
    "keep",
    "key",
    "refuse_unless_finite",
    "steady_context",
]

PARITY = 1e-4
"""How far logits up to 10 may differ from Hugging Face's, in float32; larger ones in proportion, as their rounding does."""
HALF = 0.1
"""How far logits may differ in half precision: the root mean square of the difference, in those of the logits. Rounding makes
0.01 to 0.03 of it in bfloat16; an option that is left out, 0.3 and more."""
IDS = 64
READ = 16  # positions, the last ones, whose logits are compared: a large vocabulary costs more than the blocks
WINDOW = 24  # positions that a window has in the check, where it has more
RULE = 2


def steady_context(config: Any, n_ctx: int) -> int:
    """The context within which a token's numbers do not depend on how many follow: Hugging Face turns every position by other
    angles in a longer prompt where the rotary embedding is scaled as `dynamic` or `longrope`."""
    rope = getattr(config, "rope_parameters", None) or {}
    for each in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if each.get("rope_type") == "dynamic":
            n_ctx = min(n_ctx, int(config.max_position_embeddings))
        if each.get("rope_type") == "longrope":
            n_ctx = min(n_ctx, int(each.get("original_max_position_embeddings", config.max_position_embeddings)))
    return n_ctx


def key(hf_model: Any, dtype: torch.dtype) -> str:
    """Under what the verdict on this model is kept."""
    parameters = [(name, list(each.shape), _constant(each)) for name, each in hf_model.named_parameters()]
    versions = {name: _version(name) for name in ("mechedit", "torch", "transformers", "transformer-lens")}
    aside = ("_name_or_path", "dtype", "torch_dtype", "transformers_version")
    fields = {name: str(value) for name, value in hf_model.config.to_dict().items() if name not in aside}
    return cache.content_key(RULE, fields, parameters, str(dtype), versions)


def is_kept(key: str) -> bool:
    """Whether a model of this key was found to be equal before."""
    return _place(key).is_file()


def keep(key: str, largest: float) -> None:
    """Keep the verdict that logits were equal, where the cache can be written."""
    try:
        with cache.atomic_write(_place(key)) as path:
            path.write_text(json.dumps({"largest_difference": largest}))
    except OSError:
        return  # a cache that cannot be written costs the check again, nothing else


@torch.no_grad()
def expected(hf_model: Any, name: str) -> Float[Tensor, "1 pos d_vocab"]:
    """Hugging Face's logits on the ids of the check.

    Raises:
        ModelError: its own model cannot be run.
    """
    config = hf_model.config
    try:
        with _short_windows(config):
            return hf_model(_ids(config).to(hf_model.device), use_cache=False, **_read_of(hf_model)).logits[:, -READ:]
    except FOREIGN as error:
        raise ModelError(f"Hugging Face's model of {name} cannot be run{because(config)} ({reason(error)}).") from error


@torch.no_grad()
def check(model: HookedModel, config: Any, theirs: Float[Tensor, "1 pos d_vocab"], name: str) -> float:
    """The largest difference of the logits.

    Raises:
        ModelError: it is too large, or Hugging Face's logits are not finite in this number format.
    """
    refuse_unless_finite(theirs, name, theirs.dtype)
    try:
        with _short_windows(config, model):
            ours = model(_ids(config).to(device_of(model)), **_read_of(getattr(model, "original_model", None)))[
                :, -READ:
            ]
    except FOREIGN as error:
        raise ModelError(f"the hooked model of {name} cannot be run{because(config)} ({reason(error)}).") from error
    found, bound = difference(ours, theirs)
    if not found <= bound:
        raise ModelError(
            f"{name} is not computed as Hugging Face computes it{because(config)}: logits differ by {found:.2g}, {bound:.1g} is "
            "allowed. It would be traced and edited as another model, so it is not loaded."
        )
    return found


def difference(ours: Float[Tensor, "*pos d_vocab"], theirs: Float[Tensor, "*pos d_vocab"]) -> tuple[float, float]:
    """How far logits are apart, and how far they may be: the largest difference, or in half precision that of mean squares."""
    apart = ours.float() - theirs.float()
    if theirs.dtype in (torch.float32, torch.float64):
        return float(apart.abs().max()), PARITY * max(1.0, float(theirs.abs().max()) / 10)
    return float(apart.square().mean().sqrt()), HALF * float(theirs.float().square().mean().sqrt())


def check_finite(model: HookedModel, values: Float[Tensor, "*any"]) -> None:
    """Raise where what the model gave as it was loaded is not finite; what edits in it have broken is a finding, not an error.

    Raises:
        ModelError: it is not.
    """
    if not kept(model).applied:
        refuse_unless_finite(values, str(model.cfg.model_name), next(model.parameters()).dtype)


def refuse_unless_finite(values: Float[Tensor, "*any"], name: str, dtype: torch.dtype) -> None:
    """Raise where a number that a model gave is not finite.

    Raises:
        ModelError: one is not.
    """
    if bool(torch.isfinite(values).all()):
        return
    own = str(dtype).removeprefix("torch.")
    then = "load it with dtype bfloat16 or float32" if dtype == torch.float16 else "its weights are damaged"
    raise ModelError(f"the logits of {name} in {own} are not finite, so nothing can be said of what it knows: {then}.")


def _read_of(hf_model: Any) -> dict[str, int]:
    """What tells Hugging Face's model which logits are read, where it can be told."""
    forward = getattr(hf_model, "forward", None)
    return {"logits_to_keep": READ} if forward and "logits_to_keep" in inspect.signature(forward).parameters else {}


def _ids(config: Any) -> Int[Tensor, "1 pos"]:
    """Token ids of no meaning, the same each time, as many as fit: in a longer text a model may turn positions by other angles, and
    keep those."""
    fits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    length = steady_context(config, min([IDS, *(int(each) for each in fits if each)]))
    return torch.randint(int(config.vocab_size), (1, length), generator=torch.Generator().manual_seed(0))


@contextmanager
def _short_windows(config: Any, model: HookedModel | None = None) -> Iterator[None]:
    """Within the block, windows of attention are as short as the ids need to show them."""
    holders = [(config, "sliding_window"), *([(model.cfg, "window_size")] if model is not None else [])]
    found = [(holder, name, getattr(holder, name, None)) for holder, name in holders]
    try:
        if getattr(config, "sliding_window", None):
            for holder, name, value in found:
                if isinstance(value, int) and value > WINDOW:
                    setattr(holder, name, WINDOW)
        yield
    finally:
        for holder, name, value in found:
            if value is not None:
                setattr(holder, name, value)


def _constant(parameter: Float[Tensor, ...]) -> float | None:
    """The number that a vector consists of, where it is one: then it says nothing of whether it is taken up."""
    if parameter.ndim != 1 or not len(parameter):
        return None
    first = parameter[0]
    return float(first) if bool((parameter == first).all()) else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _place(key: str) -> Path:
    return cache.root() / "parity" / f"{key}.json"
