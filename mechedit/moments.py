"""C, the second moment of an MLP's keys: which directions ordinary text uses, so that an edit can avoid them.

    C = E[k k^T]        over the keys k (post-activations, [d_mlp]) of one block on text

Text comes from files, streamed, or is sampled from the model itself where the user has none (the offline default). Keys of
BOS are left out: every text has the same one, and it is far from all others. Sums are float64. A result is cached under a
key that holds everything it depends on: weights, layer, text, settings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit import cache, files, provenance
from mechedit.corruption import generator
from mechedit.errors import MecheditError
from mechedit.generation import sample
from mechedit.interventions import intervened, read
from mechedit.models import HookedModel, W_out, device_of
from mechedit.progress import Progress, silent
from mechedit.prompts import encode, resolve_bos
from mechedit.settings import MomentSettings

__all__ = ["Moment", "MomentError", "estimate"]

BATCH_TOKENS = 4096


class MomentError(MecheditError, ValueError):
    """A second moment that cannot be estimated, or cannot be used."""


@dataclass(frozen=True)
class Moment:
    """C [d_mlp, d_mlp] of one layer in float64, from `keys` keys; `cond` is its condition number."""

    layer: int
    C: Float[Tensor, "d_mlp d_mlp"]
    keys: int
    cond: float
    source: str
    settings: MomentSettings
    origin: dict[str, Any]
    versions: dict[str, str]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of C, which says by which C an edit was made."""
        return hashlib.sha256(self.C.double().cpu().contiguous().numpy().tobytes()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Everything but C itself."""
        record = {"layer": self.layer, "keys": self.keys, "cond": self.cond, "source": self.source}
        return record | {"settings": asdict(self.settings), "origin": self.origin, "versions": self.versions}

    def save(self, path: str | Path) -> Path:
        """Write as one safetensors file."""
        return files.write(path, "moment", {"C": self.C}, self.to_json())

    @staticmethod
    def load(path: str | Path) -> Moment:
        """Read a moment that `save` wrote.

        Raises:
            FileError: the file is missing, damaged, or something else.
        """
        tensors, record = files.read(path, "moment")
        try:
            settings = MomentSettings(**record["settings"])
            return Moment(
                record["layer"],
                tensors["C"],
                record["keys"],
                record["cond"],
                record["source"],
                settings,
                record["origin"],
                record["versions"],
            )
        except (KeyError, TypeError) as error:
            raise files.FileError(f"{path} is a moment that lacks {error}.") from error


def estimate(
    model: HookedModel,
    layer: int,
    texts: Sequence[str | Path] = (),
    settings: MomentSettings | None = None,
    *,
    progress: Progress = silent,
) -> Moment:
    """C of block `layer`, from text files or, without any, from text sampled from the model; from the cache if it is there.

    Raises:
        MomentError: a text file that cannot be read, or fewer keys than d_mlp, with which C cannot be inverted.
        ModelError: no such layer, or a block without `W_out`.
    """
    d_mlp = W_out(model, layer).shape[0]
    settings = settings or MomentSettings()
    settings = replace(
        settings, tokens=settings.tokens or 10 * d_mlp, prepend_bos=resolve_bos(model, settings.prepend_bos)
    )
    if settings.tokens <= d_mlp:
        raise MomentError(
            f"C needs more keys than d_mlp = {d_mlp} to be invertible; {settings.tokens} were asked for. Ten times d_mlp is a good number."
        )
    if settings.context > int(model.cfg.n_ctx):
        raise MomentError(f"context must fit the model's {model.cfg.n_ctx} tokens; found {settings.context}.")
    source = _source(texts)
    origin = provenance.origin(model)
    key = cache.content_key(origin["weight_hash"], layer, source, settings, origin["dtype"])
    path = cache.root() / "moments" / f"{key}.safetensors"
    if path.is_file():
        try:
            return Moment.load(path)
        except files.FileError:
            path.unlink()  # damaged: made again below
    C, n = _accumulate(model, layer, _windows(model, texts, settings, progress), settings, progress)
    if n <= d_mlp:
        raise MomentError(
            f"C needs more keys than d_mlp = {d_mlp} to be invertible; the text gave {n}. Add text, or leave it out to sample from the model."
        )
    moment = Moment(layer, C / n, n, condition(C), source, settings, origin, provenance.versions())
    moment.save(path)
    return moment


def condition(C: Float[Tensor, "d_mlp d_mlp"]) -> float:
    """The ratio of C's largest to its smallest eigenvalue; infinite where C is not positive definite."""
    eigenvalues = torch.linalg.eigvalsh(C.double())
    return float(eigenvalues[-1] / eigenvalues[0]) if eigenvalues[0] > 0 else float("inf")


def _source(texts: Sequence[str | Path]) -> str:
    """What the text is, by content."""
    if not texts:
        return "sampled from the model"
    try:
        return "files " + " ".join(cache.file_hash(Path(path)) for path in texts)
    except OSError as error:
        raise MomentError(f"{error.filename} cannot be read: {error.strerror}.") from error


def _windows(
    model: HookedModel, texts: Sequence[str | Path], settings: MomentSettings, progress: Progress
) -> Iterator[Int[Tensor, "rows pos"]]:
    """Batches of text windows of equal length, BOS first where the settings say so."""
    body = settings.context - bool(settings.prepend_bos)
    rows = max(1, BATCH_TOKENS // settings.context)
    if not texts:
        needed = -(-settings.tokens // body)
        sampled = sample(model, needed, body, generator(settings.seed, "moment text"), progress=progress)
        for batch in sampled.cpu().split(rows):
            yield _with_bos(model, batch, settings)
        return
    pending: list[int] = []
    for path in texts:
        for ids in _encoded(model, Path(path)):
            pending += ids
            while len(pending) >= rows * body:
                yield _with_bos(model, torch.tensor(pending[: rows * body]).view(rows, body), settings)
                del pending[: rows * body]
    whole = len(pending) // body * body
    if whole:
        yield _with_bos(model, torch.tensor(pending[:whole]).view(-1, body), settings)


def _encoded(model: HookedModel, path: Path) -> Iterator[list[int]]:
    """The tokens of a text file, in pieces that end with a line."""
    try:
        with path.open(encoding="utf-8") as file:
            while lines := file.readlines(1 << 16):
                yield encode(model, "".join(lines), prepend_bos=False)[0]
    except UnicodeDecodeError as error:
        raise MomentError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}).") from error


def _with_bos(model: HookedModel, ids: Int[Tensor, "rows pos"], settings: MomentSettings) -> Int[Tensor, "rows pos2"]:
    return (
        torch.cat([ids.new_full((len(ids), 1), model.tokenizer.bos_token_id), ids], dim=1)
        if settings.prepend_bos
        else ids
    )


@torch.no_grad()
def _accumulate(
    model: HookedModel, layer: int, batches: Iterator[Tensor], settings: MomentSettings, progress: Progress
) -> tuple[Float[Tensor, "d_mlp d_mlp"], int]:
    """The sum of k k^T over the first `settings.tokens` keys, and how many there were."""
    d_mlp = W_out(model, layer).shape[0]
    total, n = torch.zeros(d_mlp, d_mlp, dtype=torch.float64), 0
    kept: list[Tensor] = []
    with intervened(model, read(f"blocks.{layer}.mlp.hook_post", kept.append)):
        for batch in batches:
            progress("second moment", n, settings.tokens)
            model(batch.to(device_of(model)), stop_at_layer=layer + 1)
            keys = kept.pop()[:, int(bool(settings.prepend_bos)) :].flatten(0, 1)[: settings.tokens - n].double()
            total += (keys.T @ keys).cpu()
            n += len(keys)
            if n >= settings.tokens:
                break
        else:
            if n == 0:
                raise MomentError("the text is shorter than one window; add text or lower the context.")
    progress("second moment", n, n)
    return total, n
