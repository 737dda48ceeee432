"""C from text: the sum of k k^T over its keys, on the model's device, in place, resumable; then its factor, and the cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit import cache, files, rank_one
from mechedit.errors import check_list
from mechedit.interventions import intervened, read
from mechedit.models import HookedModel, W_out, check_layer, device_of, hooked, identity, plainly
from mechedit.moments.corpus import BATCH_TOKENS, Text, batches, described, source_of
from mechedit.moments.moment import RULE, SAMPLED, Moment, MomentError
from mechedit.progress import Progress, silent
from mechedit.prompts import resolve_bos
from mechedit.settings import MomentSettings

__all__ = ["Sums", "accumulate", "estimate", "estimate_layers", "resolved"]

CHECKPOINT_SECONDS = 60.0
GRAM_BLOCKS = 8  # of rows: more save multiplications, and make products less square


def estimate(
    model: HookedModel,
    layer: int,
    texts: Sequence[Text] | None = None,
    settings: MomentSettings | None = None,
    *,
    progress: Progress = silent,
) -> Moment:
    """C of block `layer`, from texts or, without any, from text sampled from the model; from the cache if it is there.

    Raises:
        MomentError: a text that cannot be read, or fewer keys than d_mlp, with which C cannot be inverted.
        ModelError: no such layer, or a block without `W_out`.
    """
    return estimate_layers(model, [layer], texts, settings, progress=progress)[layer]


def estimate_layers(
    model: HookedModel,
    layers: Sequence[int],
    texts: Sequence[Text] | None = None,
    settings: MomentSettings | None = None,
    *,
    progress: Progress = silent,
) -> dict[int, Moment]:
    """C of several blocks from one pass over the text; errors as in `estimate`."""
    check_list("texts", texts)
    if texts is not None and not texts:
        raise MomentError(
            "texts must name at least one text; found none. Leave texts out to estimate C of text sampled from the model."
        )
    texts = texts or ()
    for layer in layers:
        check_layer(model, layer)
    settings = resolved(model, layers, settings or MomentSettings())
    source = source_of(texts)
    now, keep = identity(model), not hooked(model)  # with hooks on it, the model's keys are not those of its parameters
    of_text = now.whole if source == SAMPLED else ""  # who wrote it
    rest = (source, of_text, settings, RULE)
    places = {
        layer: cache.root() / "moments" / f"{cache.content_key(now.keys(layer), *rest)}.safetensors" for layer in layers
    }
    found = _kept(places) if keep else {}
    if len(found) < len(places):
        mutex = cache.root() / "moments" / f"{cache.content_key(now.whole, *rest)}.lock"
        with cache.alone(mutex) if keep else nullcontext():
            found = _kept(places) if keep else {}  # by another process meanwhile
            wanted = {layer: path for layer, path in places.items() if layer not in found}
            if wanted:
                part = cache.root() / "moments" / f"{cache.content_key([now.keys(layer) for layer in wanted], *rest)}.part.safetensors"  # fmt: skip
                found |= _made(model, wanted, texts, settings, part, progress, keep=keep)
    return {layer: found[layer] for layer in layers}


def _kept(places: dict[int, Path]) -> dict[int, Moment]:
    """The moments that the cache has."""
    return {layer: moment for layer, path in places.items() if (moment := _cached(path)) is not None}


def _made(
    model: HookedModel,
    places: dict[int, Path],
    texts: Sequence[Text],
    settings: MomentSettings,
    checkpoint: Path,
    progress: Progress,
    *,
    keep: bool,
) -> dict[int, Moment]:
    """The moments of layers from one pass over the text, kept at their places."""
    found, source = {}, source_of(texts)
    whole = batches(model, texts, settings, progress)
    with plainly(model):
        sums = accumulate(model, list(places), whole, settings, checkpoint if keep else None, progress)
    if not sums.keys:
        raise MomentError(
            f"{described(texts)} is shorter than one window of {settings.context} tokens; add text or lower the context."
            if settings.parts == 1
            else f"{described(texts)} has fewer than {settings.parts} batches of {BATCH_TOKENS} tokens; take fewer parts."
        )
    for layer, total in sums.totals.items():
        C = (total / sums.keys).cpu()
        if not bool(C.isfinite().all()):
            raise MomentError(
                f"keys of block {layer} hold NaN or infinity: in float16, load the model in float32; else its weights are damaged."
            )
        if settings.parts == 1 and sums.keys <= len(C):
            raise MomentError(
                f"C needs more keys than d_mlp = {len(C)} to be invertible; {described(texts)} gave {sums.keys}. Add text, or leave "
                "it out to sample from the model."
            )
        found[layer] = Moment.of(model, layer, C, sums.keys, source, settings)
        if keep:
            with suppress(rank_one.RankOneError):  # an edit will say so
                _ = found[layer].factor  # made once, and kept with C
            with cache.keeping():
                found[layer].save(places[layer])
    with suppress(OSError):  # of a cache that cannot be written
        checkpoint.unlink()
    return found


def resolved(model: HookedModel, layers: Sequence[int], settings: MomentSettings) -> MomentSettings:
    """The settings with the number of keys and BOS filled in, if they can be meant."""
    d_mlp = max(W_out(model, layer).shape[0] for layer in layers)
    bos = resolve_bos(model, settings.prepend_bos)
    settings = replace(settings, tokens=settings.tokens or 10 * d_mlp, prepend_bos=bos)
    if settings.tokens <= d_mlp:
        raise MomentError(
            f"C needs more keys than d_mlp = {d_mlp} to be invertible; {settings.tokens} were asked for. Ten times d_mlp is a good number."
        )
    if settings.context > int(model.cfg.n_ctx):
        raise MomentError(f"context must fit the model's {model.cfg.n_ctx} tokens; found {settings.context}.")
    return settings


def _cached(path: Path) -> Moment | None:
    """The moment at `path`; a damaged one is made again."""
    if path.is_file():
        with suppress(files.FileError):
            return Moment.load(path)
        with suppress(OSError):
            path.unlink()
    return None


@dataclass(eq=False)
class Sums:
    """The sum of k k^T of each layer in float64, over so many keys, and how many batches of the text are done."""

    totals: dict[int, Float[Tensor, "d_mlp d_mlp"]]
    keys: int = 0
    batches: int = 0
    is_whole: bool = True

    def add_(self, grams: dict[int, Float[Tensor, "d_mlp d_mlp"]], keys: int, batches: int) -> None:
        """Add the products of one batch to all layers, in place; `batches` are done then."""
        self.is_whole = False
        for layer, total in self.totals.items():
            total.add_(grams[layer].to(total.device))
        self.keys, self.batches = self.keys + keys, batches
        self.is_whole = True

    def save(self, path: Path) -> None:
        tensors = {str(layer): total for layer, total in self.totals.items()}
        files.write(path, "moment-part", tensors, {"keys": self.keys, "batches": self.batches})

    @staticmethod
    def load(path: Path, device: torch.device) -> Sums:
        tensors, record = files.read(path, "moment-part")
        return Sums({int(name): total.to(device) for name, total in tensors.items()}, record["keys"], record["batches"])


@torch.no_grad()
def accumulate(
    model: HookedModel,
    layers: Sequence[int],
    batches: Iterator[tuple[int, Callable[[], Int[Tensor, "rows pos"]]]],
    settings: MomentSettings,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> Sums:
    """Sums over the first `settings.tokens` keys of batches of text, or this part's of them.

    A batch is how many keys it has and a function that makes its tokens, BOS first where the settings say so. With a
    checkpoint, batches that it has are passed over, and what is done by an interruption is kept there.
    """
    device = torch.device("cpu") if device_of(model).type == "mps" else device_of(model)  # which has no float64
    sums = Sums(
        {layer: torch.zeros(2 * W_out(model, layer).shape[:1], dtype=torch.float64, device=device) for layer in layers}
    )
    if checkpoint:
        with suppress(files.FileError):
            sums = Sums.load(checkpoint, device)
    kept: dict[int, Tensor] = {}
    reads = [read(f"blocks.{layer}.mlp.hook_post", partial(kept.__setitem__, layer)) for layer in layers]
    position, saved = 0, time.monotonic()
    try:
        for index, (size, tokens) in enumerate(batches):
            take, position = min(size, settings.tokens - position), position + size
            if index >= sums.batches and index % settings.parts == settings.part:
                batch = tokens().to(device_of(model))
                with intervened(model, *reads):
                    model(batch, stop_at_layer=max(layers) + 1)
                skip = int(bool(settings.prepend_bos))
                grams = {layer: _gram(kept[layer][:, skip:].flatten(0, 1)[:take].float()) for layer in sums.totals}
                sums.add_(grams, take, index + 1)
                progress("second moment", min(position, settings.tokens), settings.tokens)
                if checkpoint and time.monotonic() - saved > CHECKPOINT_SECONDS:
                    with cache.keeping():
                        sums.save(checkpoint)
                    saved = time.monotonic()
            if position >= settings.tokens:
                break
    except BaseException:  # Ctrl-C too: what is done stays done
        if checkpoint and sums.batches and sums.is_whole:  # else the checkpoint before it stays
            with cache.keeping():
                sums.save(checkpoint)
        raise
    progress("second moment", settings.tokens, settings.tokens)
    return sums


def _gram(keys: Float[Tensor, "keys d_mlp"]) -> Float[Tensor, "d_mlp d_mlp"]:
    """The sum of k k^T over keys. It is symmetric: only blocks from the diagonal on are multiplied, the others are copies."""
    gram = keys.new_empty(2 * keys.shape[1:])
    ends = torch.arange(keys.shape[1]).tensor_split(GRAM_BLOCKS)
    for block in (slice(int(some[0]), int(some[-1]) + 1) for some in ends if len(some)):
        torch.mm(keys[:, block].T, keys[:, block.start :], out=gram[block, block.start :])
        gram[block.stop :, block] = gram[block, block.stop :].T
    return gram
