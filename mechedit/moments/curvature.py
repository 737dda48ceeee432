"""G of one block: how much what the model says depends on what the block's `W_out` gives.

    G = E[J^T F J]      over tokens of ordinary text; J is the slope, by what W_out gives at a token, of the logits of all that is said from there on,
                        and F = diag(p) - p p^T of what is said

It is the Fisher information: d [d_model], added at an ordinary token, costs d G d / 2 nats of KL of all that follows, to second order. A rank-one
change of W_out adds to an ordinary token with key k the share (k u) / (k* u) of d, and E[k k^T] is C: so the change is taken to cost
(d G d)(u C u) / (2 (k* u)^2) a token. Slopes and keys count as independent there, as in the Kronecker-factored curvature of Martens and
Grosse 2015 (arXiv 1503.05671). C decides where an edit is read, G what it may write.

J^T F J is g g^T on average, where g = J^T (sqrt(p) * e - p (sqrt(p) . e)) and e has normal numbers: one pass back gives a g for every token of a
window. The text is that of C, in its windows, as much as gives five times d_model tokens; what lies behind a window's end is not seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit import cache, files, provenance
from mechedit.corruption import generator
from mechedit.interventions import mlp_outputs
from mechedit.models import Blocks, HookedModel, W_out, check_layer, device_of, frozen, hooked, identity
from mechedit.moments.corpus import batches
from mechedit.moments.estimation import resolved
from mechedit.moments.moment import MomentError
from mechedit.parsing import check, number
from mechedit.progress import Progress, silent
from mechedit.settings import MomentSettings, from_json

__all__ = ["Fisher", "fisher", "seeded", "slopes_of"]

TIMES = 5  # d_model tokens, at least
NUMBERS = 2**25  # of logits that are held at once, or those of one window
RULE = "what is said from a token to its window's end"  # whose KL it is; part of the cache's key
PURPOSE = "seeds of slopes"  # of normal numbers, a part of their seed
_FORM = {
    "layer": int,
    "square": number,
    "tokens": int,
    "settings": dict,
    "origin": {"name": str, "around": str},
    "versions": {str: str},
}


@dataclass(frozen=True, eq=False)
class Fisher:
    """G [d_model, d_model] of one block in float64, from `tokens` tokens, and the mean square length of what W_out gives at them."""

    layer: int
    G: Float[Tensor, "d_model d_model"]
    square: float
    tokens: int
    settings: MomentSettings
    origin: dict[str, Any]
    versions: dict[str, str]

    def is_of(self, model: HookedModel) -> bool:
        """Whether all but the block's own W_out is now as it was when G was estimated."""
        return bool(self.origin["around"] == identity(model).around(self.layer))

    @cached_property
    def hash(self) -> str:
        """SHA-256 of G, which says by which G an edit was made."""
        return hashlib.sha256(self.G.contiguous().numpy().tobytes()).hexdigest()

    @property
    def relative(self) -> Float[Tensor, "d_model d_model"]:
        """G in such units that, of all d as long as what W_out gives on ordinary text, d G d / 2 is 1 on average."""
        return self.G * (2 * len(self.G) / float(self.G.trace()) / self.square)

    def to_json(self) -> dict[str, Any]:
        """Everything but G itself."""
        record = {"layer": self.layer, "square": self.square, "tokens": self.tokens, "settings": asdict(self.settings)}
        return record | {"origin": self.origin, "versions": self.versions}

    def save(self, path: str | Path) -> Path:
        """Write as one safetensors file."""
        return files.write(path, "fisher", {"G": self.G}, self.to_json())

    @staticmethod
    def load(path: str | Path) -> Fisher:
        """Read what `save` wrote.

        Raises:
            FileError: the file is missing, damaged, or something else.
        """
        tensors, record = files.read(path, "fisher")
        try:
            check(record, _FORM)
            settings, G = from_json(MomentSettings, record["settings"]), tensors["G"]
        except (KeyError, TypeError, ValueError) as error:
            raise files.FileError(f"{path} is a G that lacks something, or has what is not known: {error}.") from error
        if G.ndim != 2 or G.shape[0] != G.shape[1] or G.dtype != torch.float64 or not bool(G.isfinite().all()):
            raise files.FileError(f"{path} is a G that is no finite square matrix in float64.")
        rest = (record["square"], record["tokens"], settings, record["origin"], record["versions"])
        return Fisher(record["layer"], G, *rest)


def fisher(
    model: HookedModel, layer: int, settings: MomentSettings | None = None, *, progress: Progress = silent
) -> Fisher:
    """G of block `layer`, for the settings of the C that goes with it; from the cache if it is there. The model is left as it is.

    Raises:
        MomentError: slopes that are NaN or infinity, or all zero.
        ModelError: no such layer, or a block without `W_out`.
    """
    check_layer(model, layer)
    settings = resolved(model, [layer], settings or MomentSettings())
    now, keep = identity(model), not hooked(model)
    path = cache.root() / "moments" / f"{cache.content_key(now.whole, layer, settings, RULE)}.fisher.safetensors"
    if keep and path.is_file():
        with suppress(files.FileError):
            return Fisher.load(path)
    total, squares, tokens = torch.zeros(2 * W_out(model, layer).shape[1:], dtype=torch.float64), 0.0, 0
    enough = TIMES * len(total)
    with frozen(model):
        for outputs, slopes in _slopes(model, layer, settings, progress):
            total += (slopes.T @ slopes).double().cpu()
            squares += float(outputs.square().sum())
            tokens += len(slopes)
            progress("slopes of text", min(tokens, enough), enough)
            if tokens >= enough:
                break
    if not bool(total.isfinite().all()):
        raise MomentError(f"slopes at block {layer} hold NaN or infinity: load the model in float32; else its weights are damaged.")  # fmt: skip
    if not float(total.trace()) > 0:
        raise MomentError(f"nothing that the model says depends on what block {layer} gives, so that G is zero; choose another layer.")  # fmt: skip
    origin = provenance.origin(model) | {"around": now.around(layer)}
    found = Fisher(layer, total / tokens, squares / tokens, tokens, settings, origin, provenance.versions())
    if keep:
        with cache.keeping():
            found.save(path)
    return found


def _slopes(
    model: HookedModel, layer: int, settings: MomentSettings, progress: Progress
) -> Iterator[tuple[Float[Tensor, "tokens d_model"], Float[Tensor, "tokens d_model"]]]:
    """What W_out gives and g, at each token of windows of text but BOS, some windows at a time."""
    blocks, skip = Blocks(model), int(bool(settings.prepend_bos))
    at_once = max(1, NUMBERS // (settings.context * int(model.cfg.d_vocab)))
    stream = generator(settings.seed, PURPOSE)
    for _, tokens in batches(model, (), settings, progress):
        for windows in tokens().to(device_of(model)).split(at_once):
            normal = torch.randn(windows.numel(), int(model.cfg.d_vocab), generator=stream)
            found = slopes_of(model, blocks, layer, windows, normal.to(windows.device))
            outputs, slopes = (each[:, skip:].flatten(0, 1) for each in found)
            yield outputs, slopes


def slopes_of(
    model: HookedModel,
    blocks: Blocks,
    layer: int,
    windows: Int[Tensor, "rows pos"],
    normal: Float[Tensor, "rows_pos d_vocab"],
) -> tuple[Float[Tensor, "rows pos d_model"], Float[Tensor, "rows pos d_model"]]:
    """At each token of windows what W_out gives and, for normal numbers, g: the slope of the logits' sum from there on, each weighed by its seed."""
    outputs: list[Tensor] = []

    def watched(output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[0]

    with torch.enable_grad():
        with mlp_outputs(model, layer, watched):
            final = blocks.final(windows)
        logits = blocks.logits(final.flatten(0, 1))
        seeds = seeded(logits.detach().float().softmax(-1), normal)
        (slopes,) = torch.autograd.grad(logits, outputs[0], seeds.to(logits.dtype))
    wide = torch.promote_types(slopes.dtype, torch.float32)
    return outputs[0].detach().to(wide), slopes.to(wide)


def seeded(p: Float[Tensor, "rows d_vocab"], normal: Float[Tensor, "rows d_vocab"]) -> Float[Tensor, "rows d_vocab"]:
    """Numbers whose products are diag(p) - p p^T on average, from normal ones."""
    root = p.sqrt() * normal
    return root - p * root.sum(-1, keepdim=True)
