"""Where mechedit keeps what is costly to make: converted models, sampled text, second moments.

The folder is `MECHEDIT_CACHE` if set, else the platform's cache folder. Everything in it can be deleted at any time. Each
entry appears whole or not at all: it is written beside its place and renamed, under a lock, so that two processes that
need the same entry make it once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from mechedit.errors import MecheditError

__all__ = ["WriteError", "atomic_write", "check_writable", "content_key", "file_hash", "once", "plain", "root"]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WriteError(MecheditError, OSError):
    """A place that cannot be written."""


def root() -> Path:
    """The cache folder, which need not exist yet."""
    import platformdirs

    return Path(os.environ.get("MECHEDIT_CACHE") or platformdirs.user_cache_dir("mechedit")).expanduser()


def file_hash(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def content_key(*parts: Any) -> str:
    """Twenty hexadecimal digits that change when any of `parts` (JSON values or dataclasses of them) changes."""
    plain = [asdict(part) if is_dataclass(part) and not isinstance(part, type) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:20]


def plain(value: Any) -> Any:
    """The value with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what the body writes there becomes `path` if it ends without an error.

    Raises:
        WriteError: the folder cannot be written, which is raised before the body runs; or the disk is full.
    """
    temporary = _beside(path)
    try:
        try:
            yield temporary
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise WriteError(
                f"{path} cannot be written: {error.strerror}. What was there before is as it was."
            ) from error
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes private files; results are shared like any other file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise where `path` could not be written, before anything expensive is computed for it.

    Raises:
        WriteError: its folder cannot be made or written, or `path` is a folder.
    """
    if path.is_dir():
        raise WriteError(f"{path} is a folder; name a file in it.")
    made = [folder for folder in path.parents if not folder.exists()]
    _beside(path).unlink()
    for folder in made:  # nothing is left of a command that goes on to fail
        folder.rmdir()


def _beside(path: Path) -> Path:
    """A new empty file in the folder of `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    except OSError as error:
        raise WriteError(
            f"{path} cannot be written: {error.strerror or error}. Name a folder that you may write to."
        ) from error
    os.close(handle)
    return Path(name)


def once(folder: Path, build: Callable[[Path], None], is_whole: Callable[[Path], bool]) -> Path:
    """`folder`, built by `build(temporary_folder)` unless `is_whole(folder)` already; one process builds, others wait."""
    import filelock

    if is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_name(folder.name + ".lock")):
        if is_whole(folder):
            return folder
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            build(temporary)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder
