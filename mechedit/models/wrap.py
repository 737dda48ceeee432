"""The hooked model around a Hugging Face model, its weights unprocessed, so that its logits are Hugging Face's.

TransformerLens 3.9 has `HookedTransformer`, 4.x has `TransformerBridge`; this file finds out which one is installed.
Nothing is folded or centred, so that an edit of `W_out` can be written back to the checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mechedit.models.conversion import FOREIGN, because, convert, give_zero_biases, reason
from mechedit.models.surface import HookedModel, ModelError

__all__ = ["quiet", "settle_vector_math", "wrap"]


def wrap(hf_model: Any, tokenizer: Any, folder: Path, device: str, dtype: torch.dtype) -> HookedModel:
    """The hooked model around a Hugging Face model, whose weights it takes: a bridge where TransformerLens has no HookedTransformer.

    Raises:
        ModelError: an architecture that TransformerLens does not know, or a configuration that it cannot compute.
    """
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        from transformer_lens.model_bridge import TransformerBridge

        give_zero_biases(hf_model)
        options = {"hf_model": hf_model.to(device), "tokenizer": tokenizer, "device": device, "dtype": dtype}
        try:
            return TransformerBridge.boot_transformers(str(folder), **options)
        except (*FOREIGN, NotImplementedError) as error:
            raise ModelError(
                f"TransformerBridge does not take {hf_model.config.architectures} of {folder}{because(hf_model.config)} ({reason(error)})."
            ) from error
    return convert(hf_model.to(device), tokenizer, str(folder), device, dtype)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep a loading model's side effects in: what other libraries say, and what they draw from the global random stream."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger().setLevel(level)


def settle_vector_math() -> None:
    """Call each function of MKL's vector mathematics once, from one thread.

    MKL before 2025.0 picks a function's kernel in its first call. Where several threads make that call together, one of
    them can get a kernel of low precision (pytorch/pytorch#188792): the rotary embedding of a process's first prompt was off
    by 1.5e-4, and Gemma's logits by 2e-3, now and then. One element is computed by one thread.
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        for function in (torch.acos, torch.asin, torch.atan, torch.cos, torch.cosh, torch.erf, torch.erfc, torch.erfinv,
                         torch.exp, torch.expm1, torch.log, torch.log10, torch.log1p, torch.log2, torch.rsqrt, torch.sin,
                         torch.sinh, torch.sqrt, torch.tan, torch.tanh, torch.lgamma):  # fmt: skip
            function(one)
