"""Download the published data of Meng et al. 2022 from its official address, for who has the network.

A download that breaks off goes on where it stopped. The authors publish no checksums, so SHA-256 of the first whole download is
written to `hashes.json` beside the file, and what is fetched again must have it; a hash from elsewhere can be demanded at once.
"""

from __future__ import annotations

import json
from pathlib import Path

import filelock

from mechedit import cache
from mechedit.errors import MecheditError
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
    path = Path(folder) / FILES[name]
    cache.check_writable(path)
    wanted = sha256 or _hashes(path.parent).get(path.name)
    if path.is_file() and wanted in (None, cache.file_hash(path)):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    with filelock.FileLock(partial.with_name(partial.name + ".lock")):
        return _bring(path, partial, f"{address or ADDRESS}/{path.name}", wanted, progress)


def _bring(path: Path, partial: Path, address: str, wanted: str | None, progress: Progress) -> Path:
    """Download, check, and put in its place."""
    _download(address, partial, progress)
    found, hashes = cache.file_hash(partial), _hashes(path.parent)
    if wanted not in (None, found):
        partial.unlink()
        raise FetchError(
            f"{path.name} has SHA-256 {found}, {wanted} expected: it was changed at its source. Nothing is kept."
        )
    partial.replace(path)
    with cache.atomic_write(path.parent / HASHES) as temporary:
        temporary.write_text(json.dumps(hashes | {path.name: found}, indent=1) + "\n")
    return path


def _hashes(folder: Path) -> dict[str, str]:
    path = folder / HASHES
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except ValueError as error:
        raise FetchError(f"{path} is damaged ({error}); delete it to trust what is downloaded next.") from error


def _download(address: str, partial: Path, progress: Progress) -> None:
    """Bring `partial` to its whole length; what is there is kept if the source says that it is still the same file."""
    import httpx

    mark = partial.with_name(partial.name + ".etag")  # by which the source knows the file that was begun
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
                mark.write_text(tag)
            with partial.open("ab" if have else "wb") as file:
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
