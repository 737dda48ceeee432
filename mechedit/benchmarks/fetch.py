"""Download the published data of Meng et al. 2022 from its official address, for who has the network.

A download that breaks off goes on where it stopped. What comes must look like the file that was asked for: a page that asks to log in does
not. The authors publish no checksums, so SHA-256 of the first whole download is written to `hashes.json` beside the file, and what is
fetched again must have it; a hash from elsewhere can be demanded at once. Links that somebody put where a download goes are not followed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import IO

import filelock

from mechedit import cache
from mechedit.errors import MecheditError
from mechedit.parsing import ParseError, check, from_file
from mechedit.progress import Progress, silent

__all__ = ["ADDRESS", "FILES", "FetchError", "fetch"]

ADDRESS = "https://rome.baulab.info/data/dsets"
FILES = {
    "counterfact": "counterfact.json",
    "zsre": "zsre_mend_eval.json",
    "known": "known_1000.json",
    "snippets": "attribute_snippets.json",
    "idf": "idf.npy",
    "vocabulary": "tfidf_vocab.json",
}
"""Names of the data sets, and of their files."""
HASHES = "hashes.json"
BEGINS = {".npy": (b"\x93NUMPY", b""), ".json": (b"[", b"]")}  # and ends
OBJECT = (b"{", b"}")


class FetchError(MecheditError, RuntimeError):
    """A download that did not come about, or is not what it was."""


def fetch(
    name: str, folder: str | Path, *, sha256: str | None = None, address: str | None = None, progress: Progress = silent
) -> Path:
    """The file of a data set, downloaded (from `address`, the official one by default) unless it is there with its hash.

    Raises:
        FetchError: no such name, no network, a download that is not whole, or one with another hash.
        WriteError: the folder cannot be written.
    """
    if name not in FILES:
        raise FetchError(f"{name!r} is no data set; there are {', '.join(FILES)}.")
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise FetchError(f"a SHA-256 has 64 hexadecimal digits; found {sha256!r}.")
    path = Path(folder) / FILES[name]
    cache.check_writable(path)
    wanted = (sha256 or _hashes(path.parent).get(path.name) or "").lower() or None
    if path.is_file() and wanted in (None, cache.file_hash(path)):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise FetchError(f"{path} is no file, and is not replaced; remove it.")
    partial = path.with_name(path.name + ".part")
    lock = partial.with_name(partial.name + ".lock")
    for each in (partial, _mark(partial), lock):
        if each.is_symlink() or (each.exists() and (not each.is_file() or each.stat().st_nlink > 1)):
            raise FetchError(f"{each} is no file of its own, and a download does not write into others; remove it.")
    try:
        with filelock.FileLock(lock):
            return _bring(path, partial, f"{address or ADDRESS}/{path.name}", wanted, progress)
    except OSError as error:
        if isinstance(error, MecheditError):
            raise
        raise cache.WriteError(f"{path} cannot be written: {error.strerror or error}.") from error


def _bring(path: Path, partial: Path, address: str, wanted: str | None, progress: Progress) -> Path:
    """Download, check, and put in its place."""
    _download(address, partial, progress)
    if wrong := _strange(partial, path):
        partial.unlink()
        raise FetchError(
            f"{address} sent {wrong} in place of {path.name}. Nothing is kept; fetch it by hand, or give another address."
        )
    found, hashes = cache.file_hash(partial), _hashes(path.parent)
    if wanted not in (None, found):
        partial.unlink()
        raise FetchError(
            f"{path.name} has SHA-256 {found}, {wanted} expected: it was changed at its source. Nothing is kept."
        )
    shutil.move(partial, path.resolve() if path.is_symlink() else path)
    with cache.atomic_write(path.parent / HASHES) as temporary:
        temporary.write_text(json.dumps(hashes | {path.name: found}, indent=1) + "\n")
    return path


def _mark(partial: Path) -> Path:
    """Where it is kept by what the source knows the file that was begun."""
    return partial.with_name(partial.name + ".etag")


def _strange(partial: Path, path: Path) -> str:
    """What a download is, where it is not what its name says; empty where it can be."""
    with partial.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(max(0, partial.stat().st_size - 4096))
        tail = file.read().rstrip()
    begin, end = OBJECT if path.name == FILES["vocabulary"] else BEGINS[path.suffix]
    if head.startswith(begin) and tail.endswith(end):
        return ""
    return "a web page" if head[:1] == b"<" else "something else"


def _hashes(folder: Path) -> dict[str, str]:
    path = folder / HASHES
    if not path.exists():
        return {}
    try:
        found: dict[str, str] = from_file(path)
        check(found, {str: str})
    except ParseError as error:
        raise FetchError(f"{path} is damaged ({error}); delete it to trust what is downloaded next.") from error
    return found


def _download(address: str, partial: Path, progress: Progress) -> None:
    """Bring `partial` to its whole length; what is there is kept if the source says that it is still the same file."""
    import httpx

    mark = _mark(partial)
    is_begun = partial.is_file() and mark.is_file()
    have = partial.stat().st_size if is_begun else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": mark.read_text()}
    try:
        with httpx.stream("GET", address, headers=headers, follow_redirects=True, timeout=60) as answer:
            if answer.status_code == 416:  # nothing is left to send
                is_whole = answer.headers.get("Content-Range") == f"bytes */{have}"
                mark.unlink()
                return None if is_whole else _download(address, partial, progress)
            answer.raise_for_status()
            have = have if answer.status_code == 206 else 0
            whole = have + int(answer.headers.get("Content-Length", 0))
            if tag := answer.headers.get("ETag", answer.headers.get("Last-Modified")):
                with _opened(mark, "wb") as file:
                    file.write(tag.encode())
            with _opened(partial, "ab" if have else "wb") as file:
                for block in answer.iter_raw():
                    file.write(block)
                    have += len(block)
                    progress(f"fetching {partial.stem}, in MB", have >> 20, whole >> 20)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        kept = f"{have >> 10} KB came and are kept, and the same call goes on from there" if have else "Nothing came"
        raise FetchError(
            f"{address} cannot be fetched: {error or type(error).__name__}. {kept}; without a network, copy the file from a machine "
            "that has one."
        ) from error
    if whole and have != whole:
        raise FetchError(f"{address} broke off at {have} of {whole} bytes; the same call goes on from there.")
    mark.unlink(missing_ok=True)
    return None


def _opened(path: Path, how: str) -> IO[bytes]:
    """A file of its own, open; a link that was put there meanwhile is an error."""
    nowhere_else = getattr(os, "O_NOFOLLOW", 0)
    return open(path, how, opener=lambda name, flags: os.open(name, flags | nowhere_else, 0o666))
