"""Many small results in few files that only grow: shards with the bytes, and an index that says where each result is.

A line of `index` is a check of the line, the result's name, its shard, place, length and SHA-256, and a note of it in JSON. It is
written after the bytes it speaks of, so a result is there whole or not at all, wherever a process was killed; what was cut off
is cut away by the next one that writes. Nothing that is there is ever overwritten, which is safe on network file systems and in
folders that cannot be written, where a database's locks and journals are not; and a loss of power costs the last results, not all.
Results that are computed in the same order give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from mechedit.cache import WriteError

__all__ = ["INDEX", "Shards", "Writer"]

INDEX = "index"
LARGEST = 1 << 30  # bytes after which a new shard begins
SAFE_SECONDS = 60.0  # between times at which the disk is asked to have written all
GONE = "-"  # in a shard's place: the result is not there, whatever an earlier line says


class _Entry(NamedTuple):
    """Where a result is, and the SHA-256 of its bytes."""

    shard: str
    at: int
    size: int
    sha256: str
    note: str


class Shards:
    """The results in `folder`, by name, read as they are asked for; none where there is no such folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines: dict[str, bytes] = {}  # by name, the rest of a line, looked at when it is needed
        self._seen = 0  # bytes of the index that were read
        self.refresh()

    def refresh(self) -> None:
        """See what was added since, by this process or another."""
        try:
            with (self.folder / INDEX).open("rb") as file:
                file.seek(self._seen)
                added = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return
        whole = added[: added.rfind(b"\n") + 1]
        self._seen += len(whole)
        check = zlib.crc32
        for line in whole.split(b"\n"):
            said, _, rest = line.partition(b" ")
            if said == b"%08x" % check(rest):
                text, _, where = rest.partition(b" ")
                self._lines[text.decode()] = where
        for gone in [each for each, where in self._lines.items() if where.startswith(GONE.encode())]:
            del self._lines[gone]

    def __contains__(self, name: str) -> bool:
        return name in self._lines

    def __len__(self) -> int:
        return len(self._lines)

    def names(self) -> list[str]:
        """Of all results, in the order in which they came."""
        return list(self._lines)

    def size(self, names: Iterable[str]) -> int:
        """Bytes of these results together."""
        return sum(self._entry(name).size for name in names)

    def note(self, name: str) -> Any:
        """What was noted of a result."""
        return json.loads(self._entry(name).note)

    def get(self, name: str) -> bytes | None:
        """The bytes of a result; None where it is not there, or was changed after it was written."""
        return next(self.read([name]))

    def read(self, names: Iterable[str]) -> Iterator[bytes | None]:
        """The bytes of each, as `get` gives them."""
        with ExitStack() as stack:
            shards: dict[str, FileIO] = {}
            for name in names:
                if name not in self._lines:
                    yield None
                    continue
                entry = self._entry(name)
                if entry.shard not in shards:
                    try:
                        shards[entry.shard] = stack.enter_context((self.folder / entry.shard).open("rb", buffering=0))
                    except OSError:
                        yield None
                        continue
                data = _bytes(shards[entry.shard], entry)
                yield data if hashlib.sha256(data).hexdigest() == entry.sha256 else None

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """Add results in the body. The caller sees to it that no other process does.

        Raises:
            WriteError: the folder cannot be written.
        """
        with _told(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.refresh()
            self._cut()
            writer = Writer(self)
        try:
            yield writer
        finally:
            with _told(self.folder):
                writer.close()
            self.refresh()

    def forget(self, name: str) -> None:
        """Let a damaged result count as not there; nothing is said where that cannot be noted."""
        with suppress(OSError), (self.folder / INDEX).open("ab") as index:
            index.write(_line(name, GONE))
        self._lines.pop(name, None)

    def _entry(self, name: str) -> _Entry:
        shard, at, size, sha256, note = self._lines[name].decode().split(" ", 4)
        return _Entry(shard, int(at), int(size), sha256, note)

    def _cut(self) -> None:
        """Cut away what a process that was killed left half written."""
        index = self.folder / INDEX
        if index.is_file() and index.stat().st_size > self._seen:
            os.truncate(index, self._seen)
        ends: dict[str, int] = {}
        for name in self._lines:
            entry = self._entry(name)
            ends[entry.shard] = max(ends.get(entry.shard, 0), entry.at + entry.size)
        for path in self.folder.glob("*.shard"):
            if path.stat().st_size > ends.get(path.name, 0):
                os.truncate(path, ends.get(path.name, 0))


class Writer:
    """Appends results to the latest shard."""

    def __init__(self, shards: Shards) -> None:
        self._folder = shards.folder
        self._index = (self._folder / INDEX).open("ab", buffering=0)
        self._number = max((int(path.stem) for path in self._folder.glob("*.shard") if path.stem.isdigit()), default=0)
        self._shard = self._opened()
        self._safe = time.monotonic()

    def add(self, name: str, data: bytes, note: Any = None) -> None:
        """Add a result; it is there when this returns.

        Raises:
            WriteError: the disk is full, say; what was there before is as it was.
        """
        assert name.isalnum() or re.fullmatch(r"[\w.-]+", name), f"{name!r} is no name of a result"
        with _told(self._folder):
            if self._shard.tell() and self._shard.tell() + len(data) > LARGEST:
                self._safely()
                self._shard.close()
                self._number += 1
                self._shard = self._opened()
            at = self._shard.tell()
            said = json.dumps(note, separators=(",", ":"), sort_keys=True)
            entry = _Entry(Path(self._shard.name).name, at, len(data), hashlib.sha256(data).hexdigest(), said)
            _append(self._shard, data)
            _append(self._index, _line(name, *entry))
            if time.monotonic() - self._safe > SAFE_SECONDS:
                self._safely()

    def close(self) -> None:
        """Have the disk write all, and let the files go."""
        try:
            self._safely()
        finally:
            self._shard.close()
            self._index.close()

    def _opened(self) -> Any:
        return (self._folder / f"{self._number:04d}.shard").open("ab", buffering=0)

    def _safely(self) -> None:
        os.fsync(self._shard.fileno())  # first what the index speaks of
        os.fsync(self._index.fileno())
        self._safe = time.monotonic()


def _line(name: str, *where: object) -> bytes:
    rest = " ".join([name, *map(str, where)]).encode()
    return b"%08x %s\n" % (zlib.crc32(rest), rest)


def _bytes(file: FileIO, entry: _Entry) -> bytes:
    file.seek(entry.at)
    data: bytes = file.read(entry.size) or b""
    while len(data) < entry.size and (more := file.read(entry.size - len(data))):  # a system reads 2 GB at a time
        data += more
    return data


def _append(file: Any, data: bytes) -> None:
    """Write all of it, or nothing."""
    at, left = file.seek(0, os.SEEK_END), memoryview(data)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError:
        os.ftruncate(file.fileno(), at)
        raise


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Let what the disk refuses say so."""
    try:
        yield
    except OSError as error:
        if isinstance(error, WriteError):
            raise
        raise WriteError(
            f"{folder} cannot be written: {error.strerror or error}. What was there before is as it was."
        ) from error
