"""C, the second moment of an MLP's keys: which directions ordinary text uses, so that an edit can avoid them.

    C = E[k k^T]        over the keys k (post-activations, [d_mlp]) of one block on text

Text comes from files, or from a dataset of the Hugging Face hub, piece by piece, or is sampled from the model itself where the user
has none (the offline default). It is one stream, cut into windows of equal length, so nothing is padded. Keys of BOS are left
out: every text has the same one, and it is far from all others. Each batch's product is float32, the sum of batches float64.

A result is cached under a key that holds everything it depends on: weights, layer, text, settings. A job that is killed goes
on from its last checkpoint and ends with the same bits; jobs on several machines take parts of the text, and `merge` puts them
together.
"""

from __future__ import annotations

import hashlib
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit import cache, files, provenance
from mechedit.corruption import generator
from mechedit.errors import MecheditError
from mechedit.generation import sample
from mechedit.interventions import intervened, read
from mechedit.models import HookedModel, W_out, device_of, fingerprint
from mechedit.progress import Progress, silent
from mechedit.prompts import encode, resolve_bos
from mechedit.settings import MomentSettings

__all__ = [
    "Corpus",
    "Moment",
    "MomentError",
    "Sums",
    "accumulate",
    "estimate",
    "estimate_layers",
    "merge",
    "read_published",
]

BATCH_TOKENS = 4096
SAMPLED = "sampled from the model"
CHECKPOINT_SECONDS = 60.0
GRAM_BLOCKS = 8  # of rows: more save multiplications, and make products less square
RULE = "one stream in windows, BOS not counted"  # of what is a key; part of the cache's key


class MomentError(MecheditError, ValueError):
    """A second moment that cannot be estimated, or cannot be used."""


@dataclass(frozen=True)
class Corpus:
    """A dataset of the Hugging Face hub, or a folder in its formats: which rows' `column` is the text."""

    name: str
    config: str | None = None
    split: str = "train"
    column: str = "text"
    revision: str | None = None


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

    @property
    def notes(self) -> tuple[str, ...]:
        """What makes this less than was asked for: a text that ended before."""
        if self.settings.parts == 1 and self.keys < self.settings.tokens:
            return (f"the text gave {self.keys} keys of the {self.settings.tokens} that were wanted",)
        return ()

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


Text = str | Path | Corpus


def estimate(
    model: HookedModel,
    layer: int,
    texts: Sequence[Text] = (),
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
    texts: Sequence[Text] = (),
    settings: MomentSettings | None = None,
    *,
    progress: Progress = silent,
) -> dict[int, Moment]:
    """C of several blocks from one pass over the text; errors as in `estimate`."""
    settings = _resolved(model, layers, settings or MomentSettings())
    source, origin = _source(texts), provenance.origin(model)
    rest = (fingerprint(model), source, settings, RULE)
    places = {layer: cache.root() / "moments" / f"{cache.content_key(layer, *rest)}.safetensors" for layer in layers}
    found = {layer: moment for layer, path in places.items() if (moment := _cached(path)) is not None}
    wanted = [layer for layer in layers if layer not in found]
    if wanted:
        checkpoint = cache.root() / "moments" / f"{cache.content_key(wanted, *rest)}.part.safetensors"
        sums = accumulate(model, wanted, _batches(model, texts, settings, progress), settings, checkpoint, progress)
        if not sums.keys:
            raise MomentError(
                f"{_what(texts)} is shorter than one window of {settings.context} tokens; add text or lower the context."
                if settings.parts == 1
                else f"{_what(texts)} has fewer than {settings.parts} batches of {BATCH_TOKENS} tokens; take fewer parts."
            )
        for layer, total in sums.totals.items():
            C = total / sums.keys
            if not bool(C.isfinite().all()):
                raise MomentError(
                    f"keys of block {layer} hold NaN or infinity: in float16, load the model in float32; else its weights are damaged."
                )
            if settings.parts == 1 and sums.keys <= len(C):
                raise MomentError(
                    f"C needs more keys than d_mlp = {len(C)} to be invertible; {_what(texts)} gave {sums.keys}. Add text, or leave "
                    "it out to sample from the model."
                )
            cond = condition(C)
            found[layer] = Moment(layer, C, sums.keys, cond, source, settings, origin, provenance.versions())
            found[layer].save(places[layer])
        checkpoint.unlink(missing_ok=True)
    return {layer: found[layer] for layer in layers}


def merge(moments: Sequence[Moment]) -> Moment:
    """One C from all parts of a text, or from different texts: each counts as much as it has keys.

    Raises:
        MomentError: another model, layer or window among them, the same text twice, or a part that is missing.
    """
    if not moments:
        raise MomentError("there is nothing to merge.")
    first = moments[0]
    for each in moments:
        for what, mine, theirs in (
            ("layer", first.layer, each.layer),
            ("weights", first.origin["weight_hash"], each.origin["weight_hash"]),
            ("window", first.settings.context, each.settings.context),
            ("BOS rule", first.settings.prepend_bos, each.settings.prepend_bos),
        ):
            if mine != theirs:
                raise MomentError(f"moments that are merged must have one {what}; found {mine} and {theirs}.")
    texts: dict[str, list[Moment]] = {}
    for each in moments:
        texts.setdefault(_text(each), []).append(each)
    for text, same in texts.items():
        if len({cache.content_key(replace(each.settings, part=0)) for each in same}) > 1:
            raise MomentError(f"the same text would count twice, in different numbers of keys or parts: {text}.")
        parts = sorted(each.settings.part for each in same)
        if parts != list(range(same[0].settings.parts)):
            raise MomentError(
                f"each of the {same[0].settings.parts} parts of a text must be there exactly once; found {parts} (counted from 0)."
            )
    names = [name for text in texts for name in _names(text)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise MomentError(f"the same text would count twice, as a part of several: {', '.join(twice)}.")
    keys = sum(each.keys for each in moments)
    C = sum((each.C * each.keys for each in moments), torch.zeros_like(first.C)) / keys
    source = first.source if len(texts) == 1 else "merged: " + "; ".join(sorted(texts))
    settings = replace(first.settings, part=0, parts=1, tokens=keys)
    return Moment(first.layer, C, keys, condition(C), source, settings, first.origin, provenance.versions())


def _text(moment: Moment) -> str:
    """Which text a moment is of: its source, with the seed where that makes the text."""
    return f"{moment.source} with seed {moment.settings.seed}" if moment.source == SAMPLED else moment.source


def _names(text: str) -> list[str]:
    """The single files, datasets or samples of which a text consists."""
    whole = text.removeprefix("merged: ").split("; ")
    return [name for part in whole for name in (part.split()[1:] if part.startswith("texts ") else [part])]


def read_published(path: str | Path, model: HookedModel, layer: int) -> Moment:
    """C of a layer from a `.npz` of the published code, which holds the sum of k k^T and the number of keys.

    The file does not say which model or text it is of; that is the reader's word.

    Raises:
        MomentError: no such file, or not what the published code writes for a model of this width.
    """
    d_mlp = W_out(model, layer).shape[0]
    try:
        with np.load(path, allow_pickle=False) as file:
            total, keys = file["mom2.mom2"], int(file["mom2.count"])
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise MomentError(f"{path} is no .npz of second moments with mom2.mom2 and mom2.count ({error}).") from error
    if total.shape != (d_mlp, d_mlp) or keys < 1 or not np.isfinite(total).all():
        raise MomentError(
            f"{path} must hold a finite sum [{d_mlp}, {d_mlp}] over one or more keys; it has {list(total.shape)} over {keys}."
        )
    C = torch.from_numpy(total.astype(np.float64)) / keys
    settings = MomentSettings(tokens=keys, context=int(model.cfg.n_ctx), prepend_bos=False)
    source = f"published file {cache.file_hash(Path(path))}"
    return Moment(layer, C, keys, condition(C), source, settings, provenance.origin(model), provenance.versions())


def _resolved(model: HookedModel, layers: Sequence[int], settings: MomentSettings) -> MomentSettings:
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
        path.unlink()
    return None


def condition(C: Float[Tensor, "d_mlp d_mlp"]) -> float:
    """The ratio of C's largest to its smallest eigenvalue; infinite where C is not positive definite."""
    eigenvalues = torch.linalg.eigvalsh(C.double())
    return float(eigenvalues[-1] / eigenvalues[0]) if eigenvalues[0] > 0 else float("inf")


def _source(texts: Sequence[Text]) -> str:
    """What the text is, by content: hashes of files, fingerprints of datasets."""
    if not texts:
        return SAMPLED
    try:
        names = [
            f"{each.name}/{each.config}/{each.split}/{each.column}/{_dataset(each)._fingerprint}".replace(" ", "_")
            if isinstance(each, Corpus)
            else cache.file_hash(Path(each))
            for each in texts
        ]
    except OSError as error:
        raise MomentError(f"{error.filename} cannot be read: {error.strerror}.") from error
    return "texts " + " ".join(names)


def _what(texts: Sequence[Text]) -> str:
    """The text, as messages name it."""
    names = [each.name if isinstance(each, Corpus) else str(each) for each in texts]
    return f"the text of {', '.join(names)}" if names else "the sampled text"


def _dataset(corpus: Corpus) -> Any:
    """The rows of a corpus."""
    import datasets  # type: ignore[import-untyped]

    try:
        rows = datasets.load_dataset(corpus.name, corpus.config, split=corpus.split, revision=corpus.revision)
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise MomentError(f"the dataset {corpus.name!r} cannot be loaded: {error}") from error
    if corpus.column not in rows.column_names:
        raise MomentError(
            f"the dataset {corpus.name!r} has no column {corpus.column!r}; it has {', '.join(rows.column_names)}."
        )
    return rows


def _batches(
    model: HookedModel, texts: Sequence[Text], settings: MomentSettings, progress: Progress
) -> Iterator[tuple[int, Callable[[], Int[Tensor, "rows pos"]]]]:
    """Batches of text windows of equal length: how many keys each has, and its tokens, BOS first where the settings say so."""
    body = settings.context - bool(settings.prepend_bos)
    rows = max(1, BATCH_TOKENS // settings.context)

    def windows(ids: Int[Tensor, "rows pos"]) -> Int[Tensor, "rows pos2"]:
        bos = ids.new_full((len(ids), 1), int(model.tokenizer.bos_token_id or 0))
        return torch.cat([bos, ids], dim=1) if settings.prepend_bos else ids

    if not texts:
        begins = range(0, settings.tokens, rows * body)

        def sampled(index: int, some: int) -> Int[Tensor, "rows pos"]:
            def report(what: str, done: int, of: int) -> None:
                progress(what, index * of + done, len(begins) * of)

            return windows(_sampled(model, some, body, (settings.seed, "moment text", str(index)), report))

        for index, begin in enumerate(begins):
            some = min(rows, -(-(settings.tokens - begin) // body))
            yield some * body, partial(sampled, index, some)
        return
    pending: list[int] = []
    for text in texts:
        for ids in _encoded(model, text):
            pending += ids
            while len(pending) >= rows * body:
                batch = torch.tensor(pending[: rows * body]).view(rows, body)
                del pending[: rows * body]
                yield batch.numel(), partial(windows, batch)
    if whole := len(pending) // body * body:
        batch = torch.tensor(pending[:whole]).view(-1, body)
        yield whole, partial(windows, batch)


def _sampled(
    model: HookedModel, rows: int, length: int, seed: tuple[int, str, str], progress: Progress
) -> Int[Tensor, "rows length"]:
    """Text sampled from the model, from the cache if it is there: the next layer's C needs no more than to read it."""
    path = (
        cache.root() / "moments" / f"{cache.content_key(fingerprint(model), rows, length, seed, RULE)}.text.safetensors"
    )
    with suppress(files.FileError):
        return files.read(path, "moment-text")[0]["tokens"]
    tokens = sample(model, rows, length, generator(*seed), progress=progress)
    files.write(path, "moment-text", {"tokens": tokens}, {"rows": rows, "seed": seed})
    return tokens


def _encoded(model: HookedModel, text: Text) -> Iterator[list[int]]:
    """The tokens of a text, in pieces that end with a line, or of a dataset, row by row."""
    if isinstance(text, Corpus):
        for row in _dataset(text):
            if row[text.column]:
                yield encode(model, str(row[text.column]), prepend_bos=False)[0]
        return
    try:
        with Path(text).open(encoding="utf-8") as file:
            while lines := file.readlines(1 << 16):
                yield encode(model, "".join(lines), prepend_bos=False)[0]
    except UnicodeDecodeError as error:
        raise MomentError(f"{text} is no UTF-8 text ({error.reason} at byte {error.start}).") from error


@dataclass(frozen=True)
class Sums:
    """The sum of k k^T of each layer in float64, over so many keys, and how many batches of the text are done."""

    totals: dict[int, Float[Tensor, "d_mlp d_mlp"]]
    keys: int = 0
    batches: int = 0

    def save(self, path: Path) -> None:
        tensors = {str(layer): total for layer, total in self.totals.items()}
        files.write(path, "moment-part", tensors, {"keys": self.keys, "batches": self.batches})

    @staticmethod
    def load(path: Path) -> Sums:
        tensors, record = files.read(path, "moment-part")
        return Sums({int(name): total for name, total in tensors.items()}, record["keys"], record["batches"])


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
    sums = Sums({layer: torch.zeros(2 * W_out(model, layer).shape[:1], dtype=torch.float64) for layer in layers})
    if checkpoint:
        with suppress(files.FileError):
            sums = Sums.load(checkpoint)
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
                sums = _with(sums, kept, take, index, skip=int(bool(settings.prepend_bos)))
                progress("second moment", min(position, settings.tokens), settings.tokens)
                if checkpoint and time.monotonic() - saved > CHECKPOINT_SECONDS:
                    sums.save(checkpoint)
                    saved = time.monotonic()
            if position >= settings.tokens:
                break
    except BaseException:  # Ctrl-C too: what is done stays done
        if checkpoint and sums.batches:
            sums.save(checkpoint)
        raise
    progress("second moment", settings.tokens, settings.tokens)
    return sums


def _with(sums: Sums, kept: dict[int, Tensor], take: int, index: int, skip: int) -> Sums:
    """The sums with one batch's keys, the first `take` of them."""
    totals = {}
    for layer, total in sums.totals.items():
        keys = kept[layer][:, skip:].flatten(0, 1)[:take].float()
        totals[layer] = total + _gram(keys).cpu().double()
    return Sums(totals, sums.keys + take, index + 1)


def _gram(keys: Float[Tensor, "keys d_mlp"]) -> Float[Tensor, "d_mlp d_mlp"]:
    """The sum of k k^T over keys. It is symmetric: only blocks from the diagonal on are multiplied, the others are copies."""
    gram = keys.new_empty(2 * keys.shape[1:])
    ends = torch.arange(keys.shape[1]).tensor_split(GRAM_BLOCKS)
    for block in (slice(int(some[0]), int(some[-1]) + 1) for some in ends if len(some)):
        torch.mm(keys[:, block].T, keys[:, block.start :], out=gram[block, block.start :])
        gram[block.stop :, block] = gram[block, block.stop :].T
    return gram
