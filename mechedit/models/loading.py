"""Load a model by its name: the hooked one, or Hugging Face's own, and how far their logits differ."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from mechedit.models import checking
from mechedit.models.checking import PARITY
from mechedit.models.completeness import check_whole
from mechedit.models.conversion import reason
from mechedit.models.gemma import GEMMA
from mechedit.models.identities import note_loaded
from mechedit.models.names import biases_of
from mechedit.models.resolve import preset, resolve
from mechedit.models.surface import HookedModel, ModelError
from mechedit.models.wrap import quiet, settle_vector_math, wrap

__all__ = ["PARITY", "hugging_face", "load", "parity"]

FORMATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load(name: str = GEMMA, *, device: str | None = None, dtype: torch.dtype = torch.float32) -> HookedModel:
    """The hooked model called `name`, with unprocessed weights, in evaluation mode.

    `name` is tried as a local folder in Hugging Face's format, then as a packaged model (`gemma-3-270m`, `organism`), then
    as a repository on the Hugging Face hub. `device` is CUDA where there is one, else the CPU.

    Its logits are compared with those of Hugging Face's model on some token ids, once for a configuration, number format and
    set of versions (`mechedit.models.checking` says what that vouches for).

    Raises:
        ModelError: nothing by that name, an architecture TransformerLens does not know, a hub that cannot be reached; a model that
            is not computed as Hugging Face computes it, or whose logits are not finite in `dtype`.
    """
    name = str(name)
    if dtype not in FORMATS:
        raise ModelError(f"dtype must be one of {', '.join(map(str, FORMATS))}; found {dtype!r}.")
    device = _device(device)
    folder = resolve(name)
    with quiet():
        hf_model, tokenizer = _hugging_face(folder, name, dtype)
        config, key, biases = hf_model.config, checking.key(hf_model, dtype), biases_of(hf_model)
        theirs = None if checking.is_kept(key) else checking.expected(hf_model.to(device), name)
        model = wrap(hf_model, tokenizer, folder, device, dtype).eval()
        del hf_model  # its weights are the hooked model's now
        if theirs is not None:
            checking.keep(key, checking.check(model, config, theirs, name))
        model.cfg.n_ctx = checking.steady_context(config, int(model.cfg.n_ctx))
    model.cfg.model_name = _called(Path(name)) if Path(name).is_dir() else name
    if (own := preset(model)) is not None:
        model.cfg.default_prepend_bos = own.prepend_bos
    files = [path for path in sorted(folder.glob("*token*")) if path.suffix in (".json", ".model", ".txt")]
    note_loaded(model, config, b"".join(path.read_bytes() for path in files), biases)
    return model


def _called(folder: Path) -> str:
    """What a folder's model is called: as the folder, or as the repository whose snapshot it is in Hugging Face's cache."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name


def hugging_face(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Hugging Face's own model and tokenizer of what `load` calls `name`, on the CPU.

    Raises:
        ModelError: as in `load`.
    """
    with quiet():
        return _hugging_face(resolve(str(name)), str(name), dtype)


@torch.no_grad()
def parity(name: str, text: str = "The Space Needle is located in the city of") -> float:
    """The largest difference between the hooked model's logits and Hugging Face's on `text`, in float32."""
    folder = resolve(name)
    with quiet():
        hf_model, tokenizer = _hugging_face(folder, name, torch.float32)
        tokens = tokenizer(text, return_tensors="pt").input_ids
        expected = hf_model(tokens).logits
        model = wrap(hf_model, tokenizer, folder, "cpu", torch.float32).eval()
    return float((model(tokens) - expected).abs().max())


def _hugging_face(folder: Path, name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Hugging Face's model and tokenizer of a folder; `name` is what errors call it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settle_vector_math()  # every model comes through here, before its first prompt
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    of_weights = {"attn_implementation": "eager", "use_safetensors": True, "output_loading_info": True}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options, **of_weights)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:
        # A configuration, tokenizer or weights that do not fit fail wherever in transformers they are first used, with whatever error
        # that place has: of any kind, some known to no other library (StrictDataclassFieldValidationError), some of many lines.
        raise ModelError(
            f"{name} cannot be read as a causal language model from {folder} ({reason(error, most=300)})"
        ) from error
    check_whole(model, found, name)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{name} has no fast tokenizer; subject positions are found by a fast tokenizer's offsets.")
    return model.eval(), tokenizer


def _device(name: str | None) -> str:
    """A device that is here: the one asked for, or CUDA where there is one, else the CPU."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of names that torch had once
            torch.zeros(1, device=name).item()  # which one without numbers, meta, has not
    except (RuntimeError, AssertionError, ImportError) as error:  # torch without CUDA asserts
        here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        raise ModelError(f"there is no device {name!r} here; there is {' and '.join(here)}.") from error
    return name
