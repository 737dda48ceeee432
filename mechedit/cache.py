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
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from mechedit.errors import MecheditError

__all__ = [
    "CacheWarning",
    "WriteError",
    "alone",
    "atomic_write",
    "check_writable",
    "content_key",
    "file_hash",
    "keep",
    "keeping",
    "once",
    "plain",
    "root",
    "straight",
    "unless_kept",
]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CacheWarning(UserWarning):
    """Something could not be kept in the cache."""


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
    """Yield a temporary name; what the body writes there becomes `path` if it ends without an error.

    A link is written through to what it names, whose permissions stay. What is no file but there (a device, a pipe, standard output) is
    opened and written to; it is never replaced.

    Raises:
        WriteError: the place cannot be written, which is raised before the body runs; or the disk is full.
    """
    path = Path(path)
    streams = _is_stream(path)
    target = path if streams else straight(path)
    temporary = _empty(Path(tempfile.gettempdir()) / f"mechedit{path.suffix}" if streams else target, path)
    try:
        try:
            yield temporary
            if streams:
                _pour(temporary, path)
            else:
                temporary.chmod(_mode(target))  # mkstemp makes private files; results are shared like any other file
                temporary.replace(target)
        except OSError as error:
            if isinstance(error, MecheditError) or not (streams or error.errno in FULL):
                raise
            kept = "" if streams else " What was there before is as it was."
            raise WriteError(f"{path} cannot be written: {error.strerror or error}.{kept}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _is_stream(path: Path) -> bool:
    """Whether the path names what can be written to, and is no file: a device, a pipe, an open stream of this process."""
    if _descriptor(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _descriptor(path: Path) -> int | None:
    """The number of the open stream that a path such as /dev/stdout or /dev/fd/3 names."""
    names = {"/dev/stdout": 1, "/dev/stderr": 2}
    if str(path) in names:
        return names[str(path)]
    own = path.parent in (Path("/dev/fd"), Path("/proc/self/fd"))
    return int(path.name) if own and path.name.isascii() and path.name.isdigit() else None


def _pour(temporary: Path, path: Path) -> None:
    """Write a file's bytes to what is no file."""
    number = _descriptor(path)
    if number in (1, 2):
        (sys.stdout if number == 1 else sys.stderr).flush()
    with temporary.open("rb") as source, open(path if number is None else os.dup(number), "wb") as into:
        shutil.copyfileobj(source, into)


def straight(path: Path) -> Path:
    """Where a path leads: without links, and without `..`, which else counts folders that are there as yet to be made."""
    try:
        return path.resolve()
    except RuntimeError as error:  # of Python before 3.13
        raise WriteError(f"{path} cannot be written: its links go in a circle.") from error
    except (OSError, ValueError) as error:  # too long, with a NUL in it
        raise _refused(path, error) from error


def _mode(target: Path) -> int:
    """The permissions that a file has, or that a new one gets."""
    if target.is_file():
        return stat.S_IMODE(target.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def check_writable(path: Path) -> None:
    """Raise where `path` could not be written, before anything expensive is computed for it.

    Raises:
        WriteError: its folder cannot be made or written, or `path` is a folder.
    """
    path = Path(path)
    if _is_stream(path):
        if _descriptor(path) is None and not os.access(path, os.W_OK):
            raise WriteError(f"{path} cannot be written: you may not write to it.")
        return
    target = straight(path)
    try:
        if target.is_dir():
            raise WriteError(f"{path} is a folder; name a file in it.")
        with unless_kept(target.parent):
            _empty(target, path).unlink()
    except (OSError, ValueError) as error:  # too long, or with a NUL in it
        if isinstance(error, WriteError):
            raise
        raise _refused(path, error) from error


@contextmanager
def unless_kept(folder: Path) -> Iterator[Callable[[], None]]:
    """Make a folder and those that it stands in; those that this made are gone afterwards if nothing is in them, unless the body calls
    what it is given. No folder that was there before is touched.

    Raises:
        OSError: it cannot be made.
    """
    made: list[Path] = []
    kept: list[bool] = []
    try:
        for each in reversed((folder.resolve(), *folder.resolve().parents)):
            if not each.exists():
                with suppress(FileExistsError):  # of another process, whose it is then
                    each.mkdir()
                    made.insert(0, each)
        yield lambda: kept.append(True)
    finally:
        for each in () if kept else made:
            with suppress(OSError):  # something was put there
                each.rmdir()


def _empty(target: Path, path: Path) -> Path:
    """A new empty file beside `target`; errors speak of `path`."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem[:40]}-", suffix=target.suffix[:40])
    except (OSError, ValueError) as error:
        raise _refused(path, error) from error
    os.close(handle)
    return Path(name)


def _refused(path: Path, error: OSError | ValueError) -> WriteError:
    why = getattr(error, "strerror", None) or error
    return WriteError(f"{path} cannot be written: {why}. Name a folder that you may write to.")


@contextmanager
def keeping() -> Iterator[None]:
    """Let the body write what another run would have to make again; where the cache cannot be written, say so and go on."""
    try:
        yield
    except WriteError as error:
        said = f"the cache cannot be written, so that work will be done again: {error}"
        warnings.warn(said, CacheWarning, stacklevel=3)


def keep(path: Path, content: str) -> None:
    """Write a text that another run would have to make again, as `keeping` does."""
    with keeping(), atomic_write(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Let one process at a time run the body: that which holds the lock at `path`. Where none can be made, it runs all the same."""
    import filelock

    lock = filelock.FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError):  # a cache that cannot be written, or a file system without locks
        yield
        return
    try:
        yield
    finally:
        lock.release()


def once(folder: Path, build: Callable[[Path], None], is_whole: Callable[[Path], bool]) -> Path:
    """`folder`, built by `build(temporary_folder)` unless `is_whole(folder)` already; one process builds, others wait."""
    import filelock

    if is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(folder, error) from error
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
