"""Results as files: tensors and a JSON record in one safetensors file, written whole or not at all, read with care."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from mechedit.cache import WriteError, atomic_write
from mechedit.errors import MecheditError

__all__ = ["FileError", "kind", "read", "write"]

FORMAT = 1  # of a kind of file that has had one form only


class FileError(MecheditError, ValueError):
    """A file that is not what it should be."""


def kind(path: str | Path) -> str:
    """What kind of mechedit file this is: edit, trace, moment.

    Raises:
        FileError: it is none.
    """
    _, header = _open(Path(path))
    if not header:
        raise FileError(f"{path} is a safetensors file, but none of mechedit's.")
    return str(header["kind"])


def write(
    path: str | Path, what: str, tensors: Mapping[str, Shaped[Tensor, ...]], record: dict[str, Any], form: int = FORMAT
) -> Path:
    """Save tensors and a record as `path`, in the `form`th format of its kind. Nothing in it can be executed."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"kind": what, "format": form, "sha256": _digest(plain, record), "record": record}
    # one entry, because safetensors writes several in an order that changes from file to file
    metadata = {"mechedit": json.dumps(header, ensure_ascii=False)}
    with atomic_write(path) as temporary:
        try:
            save_file(plain, temporary, metadata)
        except SafetensorError as error:
            raise WriteError(f"{path} cannot be written: {error}. What was there before is as it was.") from error
    return path


def _digest(tensors: dict[str, Tensor], record: dict[str, Any]) -> str:
    """SHA-256 of the record and of every tensor's name and bytes."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read(path: str | Path, what: str, form: int = FORMAT) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the record of a file that `write` made, in a format up to `form`.

    Raises:
        FileError: missing, truncated, another kind of file, or a newer format than this version knows.
    """
    tensors, header = _open(Path(path))
    found = header.get("kind")
    if found != what:
        raise FileError(
            f"{path} is not a mechedit {what}: it is {f'a mechedit {found}' if found else 'a safetensors file of another kind'}."
        )
    if not isinstance(header.get("format"), int) or not isinstance(header.get("record"), dict):
        raise FileError(f"{path} is a mechedit {what} whose record cannot be read.")
    if header["format"] > form:
        raise FileError(
            f"{path} has format {header['format']}; this version of mechedit knows up to {form}. Update mechedit."
        )
    if header.get("sha256") != _digest(tensors, header["record"]):
        raise FileError(f"{path} was changed after it was written: its contents do not have the hash it names.")
    return tensors, header["record"]


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and what `write` said of them; empty if it did not write this."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileError(f"{path} does not exist or is no file.")
    if path.suffix == ".json":
        raise FileError(f"{path} is a JSON file, for people to read; what mechedit reads again ends in .safetensors.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            header = json.loads((file.metadata() or {}).get("mechedit", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"{path} is truncated or no safetensors file ({error}).") from error
    return tensors, header if isinstance(header, dict) else {}
