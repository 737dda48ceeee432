"""G of one block: how much what the model says depends on what the block's `W_out` gives.

    G = E[J^T F J]      over tokens of ordinary text; J is the slope, by what W_out gives at a token, of the logits of all that is said from there on,
                        and F = diag(p) - p p^T of what is said

It is the Fisher information: d [d_model], added at an ordinary token, costs d G d / 2 nats of KL of all that follows, to second order. A rank-one
change of W_out adds to an ordinary token with key k the share (k u) / (k* u) of d, and E[k k^T] is C: so the change is taken to cost
(d G d)(u C u) / (2 (k* u)^2) a token. Slopes and keys count as independent there, as in the Kronecker-factored curvature of Martens and
Grosse 2015 (arXiv 1503.05671). C decides where an edit is read, G what it may write.

J^T F J is g g^T on average, where g = J^T (sqrt(p) * e - p (sqrt(p) . e)) and e has normal numbers: one pass back gives a g for every token of a
window. The text is given, or sampled from the model as that of C is, in the windows of C, as much as gives ten times d_model tokens; what lies
behind a window's end is not seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit import cache, files, provenance
from mechedit.corruption import generator
from mechedit.errors import check_list
from mechedit.interventions import mlp_outputs
from mechedit.models import Blocks, HookedModel, W_out, check_layer, device_of, frozen, hooked, identity, plainly
from mechedit.moments.corpus import Text, batches, described, source_of
from mechedit.moments.estimation import resolved
from mechedit.moments.merging import joined, text_of
from mechedit.moments.moment import MomentError
from mechedit.parsing import check, number
from mechedit.progress import Progress, silent
from mechedit.settings import MomentSettings, from_json

__all__ = ["Fisher", "fisher", "seeded", "slopes_of"]

TIMES = 10  # d_model tokens, at least
NUMBERS = 2**25  # of logits that are held at once, or those of one window
RULE = "what is said from a token to its window's end"  # whose KL it is; part of the cache's key
PURPOSE = "seeds of slopes"  # of normal numbers, a part of their seed
_FORM = {
    "layer": int,
    "square": number,
    "tokens": int,
    "source": str,
    "settings": dict,
    "origin": {"name": str, "around": str},
    "versions": {str: str},
}


@dataclass(frozen=True, eq=False)
class Fisher:
    """G [d_model, d_model] of one block in float64, from `tokens` tokens of `source`, and the mean square length of what W_out gives at them."""

    layer: int
    G: Float[Tensor, "d_model d_model"]
    square: float
    tokens: int
    source: str
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

    def merged(self, other: Fisher) -> Fisher:
        """G of the text of both, each as much as it has tokens.

        Raises:
            MomentError: the other is of another block, model or window, or of the same text.
        """
        for what, mine, theirs in (
            ("block", self.layer, other.layer),
            ("model", self.origin["around"], other.origin["around"]),
            ("window", self.settings.context, other.settings.context),
            ("BOS rule", self.settings.prepend_bos, other.settings.prepend_bos),
        ):
            if mine != theirs:
                raise MomentError(f"both G must be of one {what}; found {mine} and {theirs}.")
        source = joined([text_of(each.source, each.settings) for each in (self, other)])
        tokens = self.tokens + other.tokens
        share = other.tokens / tokens
        G = (1 - share) * self.G + share * other.G
        square = (1 - share) * self.square + share * other.square
        return replace(self, G=G, square=square, tokens=tokens, source=source)

    def to_json(self) -> dict[str, Any]:
        """Everything but G itself."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "G"} | {
            "settings": asdict(self.settings)
        }

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
            found = Fisher(**record | {"settings": from_json(MomentSettings, record["settings"]), "G": tensors["G"]})
        except (KeyError, TypeError, ValueError) as error:
            raise files.FileError(f"{path} is a G that lacks something, or has what is not known: {error}.") from error
        G = found.G
        if G.ndim != 2 or G.shape[0] != G.shape[1] or G.dtype != torch.float64 or not bool(G.isfinite().all()):
            raise files.FileError(f"{path} is a G that is no finite square matrix in float64.")
        return found


def fisher(
    model: HookedModel,
    layer: int,
    texts: Sequence[Text] | None = None,
    settings: MomentSettings | None = None,
    *,
    progress: Progress = silent,
) -> Fisher:
    """G of block `layer`, from texts or, without any, from text sampled from the model, in the windows of `settings`; from the cache if it is
    there. The model is left as it is.

    Raises:
        MomentError: a text that cannot be read, or is too short; slopes that are NaN or infinity, or all zero.
        ModelError: no such layer, or a block without `W_out`.
    """
    check_layer(model, layer)
    settings = resolved(model, [layer], settings or MomentSettings())
    check_list("texts", texts)
    source = source_of(texts or ())
    now, keep = identity(model), not hooked(model)
    path = cache.root() / "moments" / f"{cache.content_key(now.whole, layer, source, settings, TIMES, RULE)}.fisher.safetensors"  # fmt: skip
    if keep and path.is_file():
        with suppress(files.FileError):
            return Fisher.load(path)
    with frozen(model), plainly(model):
        total, squares, tokens = torch.zeros(2 * W_out(model, layer).shape[1:], dtype=torch.float64), 0.0, 0
        enough = TIMES * len(total)
        for outputs, slopes in _slopes(model, layer, texts or (), settings, progress):
            total += (slopes.T @ slopes).cpu().double()
            squares += float(outputs.square().sum())
            tokens += len(slopes)
            progress("slopes of text", min(tokens, enough), enough)
            if tokens >= enough:
                break
    if tokens < len(total):
        raise MomentError(f"G of a block needs {len(total)} tokens, and better {enough}; {described(texts or ())} has {tokens}.")  # fmt: skip
    if not bool(total.isfinite().all()):
        raise MomentError(f"slopes at block {layer} hold NaN or infinity: load the model in float32; else its weights are damaged.")  # fmt: skip
    if not float(total.trace()) > 0:
        raise MomentError(f"nothing that the model says depends on what block {layer} gives, so that G is zero; choose another layer.")  # fmt: skip
    origin = provenance.origin(model) | {"around": now.around(layer)}
    found = Fisher(layer, total / tokens, squares / tokens, tokens, source, settings, origin, provenance.versions())
    if keep:
        with cache.keeping():
            found.save(path)
    return found


def _slopes(
    model: HookedModel, layer: int, texts: Sequence[Text], settings: MomentSettings, progress: Progress
) -> Iterator[tuple[Float[Tensor, "tokens d_model"], Float[Tensor, "tokens d_model"]]]:
    """What W_out gives and g, at each token of windows of text but BOS, some windows at a time."""
    blocks, skip = Blocks(model), int(bool(settings.prepend_bos))
    at_once = max(1, NUMBERS // (settings.context * int(model.cfg.d_vocab)))
    stream = generator(settings.seed, PURPOSE)
    for _, tokens in batches(model, texts, settings, progress):
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
