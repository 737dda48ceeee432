"""Results as files: tensors and a JSON record in one safetensors file, written whole or not at all, read with care."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from mechedit.cache import atomic_write
from mechedit.errors import MecheditError

__all__ = ["FileError", "kind", "read", "write"]

_FORMAT = 1


class FileError(MecheditError, ValueError):
    """A file that is not what it should be."""


def kind(path: str | Path) -> str:
    """What kind of mechedit file this is: edit, trace, moment.

    Raises:
        FileError: it is none.
    """
    _, metadata = _open(Path(path))
    if "mechedit" not in metadata:
        raise FileError(f"{path} is a safetensors file, but none of mechedit's.")
    return metadata["mechedit"]


def write(path: str | Path, what: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> Path:
    """Save tensors and a record as `path`. Only JSON and raw numbers are stored; nothing in it can be executed."""
    from safetensors.torch import save_file

    path = Path(path)
    metadata = {"mechedit": what, "format": str(_FORMAT), "record": json.dumps(record, ensure_ascii=False)}
    with atomic_write(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    return path


def read(path: str | Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the record of a file that `write` made.

    Raises:
        FileError: missing, truncated, another kind of file, or a newer format than this version knows.
    """
    tensors, metadata = _open(Path(path))
    if metadata.get("mechedit") != what:
        found = metadata.get("mechedit")
        raise FileError(
            f"{path} is not a mechedit {what}: it is {f'a mechedit {found}' if found else 'a safetensors file of another kind'}."
        )
    try:
        format_number, record = int(metadata["format"]), json.loads(metadata["record"])
    except (KeyError, ValueError) as error:
        raise FileError(
            f"{path} is a mechedit {what} whose record cannot be read ({type(error).__name__} {error})."
        ) from error
    if format_number > _FORMAT:
        raise FileError(
            f"{path} has format {format_number}; this version of mechedit knows up to {_FORMAT}. Update mechedit."
        )
    return tensors, record


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileError(f"{path} does not exist or is no file.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"{path} is truncated or no safetensors file ({error}).") from error
