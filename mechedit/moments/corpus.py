"""The text that keys are taken from: files, datasets, or samples of the model itself, as one stream cut into windows."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechedit import cache, files
from mechedit.corruption import generator
from mechedit.generation import sample
from mechedit.models import HookedModel, hooked, identity
from mechedit.moments import packaged
from mechedit.moments.moment import RULE, SAMPLED, MomentError
from mechedit.progress import Progress
from mechedit.prompts import bare
from mechedit.settings import MomentSettings

__all__ = ["BATCH_TOKENS", "PURPOSE", "Corpus", "Text", "batches", "described", "source_of"]

BATCH_TOKENS = 4096
PIECE = 1 << 16  # characters of text that are tokenized at once
PURPOSE = "moment text"  # what sampled text is for, a part of its seed


@dataclass(frozen=True)
class Corpus:
    """A dataset of the Hugging Face hub, or a folder in its formats: which rows' `column` is the text."""

    name: str
    config: str | None = None
    split: str = "train"
    column: str = "text"
    revision: str | None = None


Text = str | Path | Corpus


def source_of(texts: Sequence[Text]) -> str:
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
    except (TypeError, ValueError) as error:  # of no path: a number, half of a pair of surrogates
        raise MomentError(f"texts must be paths or a Corpus; found {texts!r:.60} ({error}).") from error
    return "texts " + " ".join(names)


def described(texts: Sequence[Text]) -> str:
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


def batches(
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

            return windows(_sampled(model, some, body, (settings.seed, PURPOSE, str(index)), report))

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
        cache.root()
        / "moments"
        / f"{cache.content_key(identity(model).whole, rows, length, seed, RULE)}.text.safetensors"
    )
    if hooked(model):  # what it says now is not what its parameters say
        return sample(model, rows, length, generator(*seed), progress=progress)
    if (shipped := packaged.read(model, rows, length, seed)) is not None:
        return shipped
    with suppress(files.FileError):
        return files.read(path, "moment-text")[0]["tokens"]
    tokens = sample(model, rows, length, generator(*seed), progress=progress)
    with cache.keeping():
        files.write(path, "moment-text", {"tokens": tokens}, {"rows": rows, "seed": seed})
    return tokens


def _encoded(model: HookedModel, text: Text) -> Iterator[list[int]]:
    """The tokens of a text, piece by piece, or of a dataset, row by row, and pieces of rows that are longer than one."""
    if isinstance(text, Corpus):
        for row in _dataset(text):
            for piece in _pieces(io.StringIO(str(row[text.column] or ""), newline="\n")):
                yield bare(model, piece, prepend_bos=False)[0]
        return
    try:
        with Path(text).open(encoding="utf-8") as file:
            for piece in _pieces(file):
                yield bare(model, piece, prepend_bos=False)[0]
    except UnicodeDecodeError as error:
        raise MomentError(f"{text} is no UTF-8 text ({error.reason} at byte {error.start}).") from error


def _pieces(file: io.TextIOBase) -> Iterator[str]:
    """Lines, as many as have more than 65,536 characters together. A line that is longer itself is cut, before one of its spaces,
    so that words and their tokens stay whole; in the middle where it has none in so many characters."""
    held, size, rest = list[str](), 0, ""
    while chunk := file.readline(PIECE):
        chunk, rest = rest + chunk, ""
        if len(chunk) >= PIECE and not chunk.endswith("\n"):
            gap = _last_gap(chunk)
            chunk, rest = chunk[:gap], chunk[gap:]
        held.append(chunk)
        size += len(chunk)
        if size > PIECE or rest:
            yield "".join(held)
            held, size = [], 0
    if held or rest:
        yield "".join([*held, rest])


def _last_gap(text: str) -> int:
    """Where the last space that stands alone between words begins; the end, where there is none."""
    at = text.rfind(" ", 0, len(text) - 1)
    while at > 0 and (text[at - 1].isspace() or text[at + 1].isspace()):
        at = text.rfind(" ", 0, at)
    return at if at > 0 else len(text)
