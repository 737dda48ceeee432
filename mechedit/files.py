"""Results as files: tensors and a JSON record in one safetensors file, written whole or not at all, read with care."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from mechedit.cache import WriteError, atomic_write
from mechedit.errors import MecheditError
from mechedit.parsing import from_text

__all__ = ["Blob", "FileError", "described", "digest", "kind", "names", "read", "write"]

FORMATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
"""Of the numbers in files."""
MOST_NAMED = 8  # files of a folder
FORMAT = 1  # of a kind of file that has had one form only


class FileError(MecheditError, ValueError):
    """A file that is not what it should be."""


class Blob:
    """The bytes of a file that is kept within another. It stands in a path's place wherever `read` and `write` take one."""

    def __init__(self, name: str, data: bytes = b"") -> None:
        self.name, self.data = name, data

    def __str__(self) -> str:
        return self.name


def kind(path: str | Path | Blob) -> str:
    """What kind of mechedit file this is: edit, trace, moment.

    Raises:
        FileError: it is none.
    """
    _, header = _open(path)
    if not isinstance(header.get("kind"), str):
        raise FileError(f"{path} is a safetensors file, but none of mechedit's.")
    return str(header["kind"])


def names(folder: Path, kinds: Collection[str]) -> str:
    """The files of these kinds in a folder, by name, the first of many; empty where there is none."""
    found: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        with suppress(FileError):
            if kind(path) in kinds:
                found.append(path.name)
        if len(found) > MOST_NAMED:
            return ", ".join([*found[:MOST_NAMED], "…"])
    return ", ".join(found)


def described(path: str | Path, what: str) -> tuple[str, dict[str, Any]]:
    """The hash that a file names for its contents, and its record, without reading the tensors.

    Raises:
        FileError: missing, truncated, or another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    _check_file(Path(path))
    try:
        with safe_open(path, framework="pt") as file:
            header = from_text((file.metadata() or {}).get("mechedit", "{}"), unique=True)
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"{path} is truncated or no safetensors file that can be read ({error}).") from error
    if not isinstance(header, dict) or header.get("kind") != what or not isinstance(header.get("record"), dict):
        raise FileError(f"{path} is not a mechedit {what}.")
    return str(header.get("sha256")), header["record"]


def write(
    path: str | Path | Blob,
    what: str,
    tensors: Mapping[str, Shaped[Tensor, ...]],
    record: dict[str, Any],
    form: int = FORMAT,
) -> Path:
    """Save tensors and a record as `path`, in the `form`th format of its kind. Nothing in it can be executed."""
    from safetensors import SafetensorError
    from safetensors.torch import save, save_file

    plain = _apart(tensors)
    header = {"kind": what, "format": form, "sha256": digest(plain, record), "record": record}
    # one entry, because safetensors writes several in an order that changes from file to file
    text = json.dumps(header, ensure_ascii=False, default=_number)
    metadata = {
        "mechedit": text.encode("utf-8", "backslashreplace").decode()
    }  # half a surrogate pair is JSON's own \\ud800
    if isinstance(path, Blob):
        path.data = save(plain, metadata)
        return Path(path.name)
    path = Path(path)
    with atomic_write(path) as temporary:
        try:
            save_file(plain, temporary, metadata)
        except SafetensorError as error:
            raise WriteError(f"{path} cannot be written: {error}. What was there before is as it was.") from error
    return path


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each with memory of its own, as the format wants it."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        plain[name] = own.clone() if place in seen else own
        seen.add(place)
    return plain


def _number(value: Any) -> Any:
    """A number or array of NumPy or torch as JSON has it."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is nothing that JSON has")


def digest(tensors: Mapping[str, Shaped[Tensor, ...]], record: dict[str, Any]) -> str:
    """SHA-256 of the record and of every tensor's name and bytes."""
    found = hashlib.sha256(json.dumps(record, sort_keys=True, default=_number).encode())
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def read(path: str | Path | Blob, what: str, form: int = FORMAT) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the record of a file that `write` made, in a format up to `form`.

    Raises:
        FileError: missing, truncated, another kind of file, or a newer format than this version knows.
    """
    tensors, header = _open(path)
    found = header.get("kind")
    if found != what:
        raise FileError(
            f"{path} is not a mechedit {what}: it is {f'a mechedit {found}' if found else 'a safetensors file of another kind'}."
        )
    if type(header.get("format")) is not int or not isinstance(header.get("record"), dict):
        raise FileError(f"{path} is a mechedit {what} whose record cannot be read.")
    if header["format"] > form:
        raise FileError(
            f"{path} has format {header['format']}; this version of mechedit knows up to {form}. Update mechedit."
        )
    if header.get("sha256") != digest(tensors, header["record"]):
        raise FileError(f"{path} was changed after it was written: its contents do not have the hash it names.")
    return tensors, header["record"]


def _open(path: str | Path | Blob) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and what `write` said of them; empty if it did not write this."""
    from safetensors import SafetensorError

    if not isinstance(path, Blob):
        _check_file(Path(path))
    try:
        tensors, text = _held(path.data) if isinstance(path, Blob) else _in_file(Path(path))
        header = from_text(text, unique=True)
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError) as error:  # formats torch lacks
        raise FileError(f"{path} is truncated or no safetensors file that can be read ({error}).") from error
    if strange := sorted({str(tensor.dtype) for tensor in tensors.values()} - {str(each) for each in FORMATS}):
        raise FileError(f"{path} has tensors of {', '.join(strange)}, which mechedit writes nowhere.")
    return tensors, header if isinstance(header, dict) else {}


def _check_file(path: Path) -> None:
    try:
        is_file = path.is_file()
    except OSError as error:  # its name is too long, or its links go in a circle
        raise FileError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not is_file:
        raise FileError(f"{path} does not exist or is no file; give the path of a file that mechedit wrote.")
    if path.suffix == ".json":
        raise FileError(f"{path} is a JSON file, for people to read; what mechedit reads again ends in .safetensors.")


def _in_file(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors, and the text that `write` put beside them."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        return tensors, (file.metadata() or {}).get("mechedit", "{}")


def _held(data: bytes) -> tuple[dict[str, Tensor], str]:
    """The same of bytes: the first eight say how long the JSON is that they begin with."""
    from safetensors.torch import load

    tensors = load(data)
    said = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, said.get("__metadata__", {}).get("mechedit", "{}")
