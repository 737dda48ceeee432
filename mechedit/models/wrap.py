"""The hooked model around a Hugging Face model, its weights unprocessed, so that its logits are Hugging Face's.

TransformerLens 3.9 has `HookedTransformer`, 4.x has `TransformerBridge`; this file finds out which one is installed.
Nothing is folded or centred, so that an edit of `W_out` can be written back to the checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from einops import rearrange

from mechedit.models.surface import HookedModel, ModelError

__all__ = ["quiet", "settle_vector_math", "wrap"]

_GEMMA_SHAPES = {"Gemma3ForCausalLM": "google/gemma-3-270m", "Gemma2ForCausalLM": "google/gemma-2-2b"}


def wrap(hf_model: Any, tokenizer: Any, folder: Path, device: str, dtype: torch.dtype) -> HookedModel:
    """The hooked model around a Hugging Face model: a bridge where TransformerLens has no HookedTransformer any more."""
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        from transformer_lens.model_bridge import TransformerBridge

        options = {"hf_model": hf_model.to(device), "tokenizer": tokenizer, "device": device, "dtype": dtype}
        try:
            return TransformerBridge.boot_transformers(str(folder), **options)
        except (ValueError, NotImplementedError) as error:
            raise ModelError(
                f"TransformerBridge does not take the architecture {hf_model.config.architectures} of {folder}: {error}"
            ) from error
    return _hooked_transformer(hf_model, tokenizer, folder, device, dtype)


def _hooked_transformer(hf_model: Any, tokenizer: Any, folder: Path, device: str, dtype: torch.dtype) -> HookedModel:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import get_pretrained_state_dict

    fields = _hooked_config(hf_model.config, folder)
    fields |= {
        "device": device,
        "dtype": dtype,
        "init_weights": False,
        "tokenizer_name": None,
        "model_name": folder.name,
    }
    if fields["act_fn"] == "gelu_new":
        fields["act_fn"] = "gelu_pytorch_tanh"  # the same function, in one kernel instead of seven
    cfg = HookedTransformerConfig.from_dict(fields)
    state = get_pretrained_state_dict(str(folder), cfg, hf_model, dtype=dtype)
    model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    _lay_out(model)
    return model.to(device, print_details=False)


def _lay_out(model: HookedModel) -> None:
    """Store each matrix the way TransformerLens multiplies by it. Shapes and values stay; strides change.

    HookedTransformer transposes and copies its weights in every forward pass (`W.T.contiguous()`), which costs more than the
    arithmetic on few rows: the copy of Gemma's unembedding alone takes half a second. Stored transposed, they need no copy.
    """
    stored = dict.fromkeys(("W_in", "W_gate", "W_out", "W_U"), ("read written", "written read"))
    stored |= dict.fromkeys(("W_Q", "W_K", "W_V", "_W_K", "_W_V"), ("head d_model d_head", "head d_head d_model"))
    stored["W_O"] = ("head d_head d_model", "d_model head d_head")
    for name, weight in model.named_parameters():
        seen, kept = stored.get(name.rsplit(".", 1)[-1], ("", ""))
        if seen and weight.ndim == len(seen.split()):
            data = rearrange(weight.data, f"{seen} -> {kept}").contiguous()
            weight.data = rearrange(data, f"{kept} -> {seen}")


def _hooked_config(config: Any, folder: Path) -> dict[str, Any]:
    """TransformerLens's configuration fields for a folder, decided by its config.json and never by its name."""
    from transformer_lens.loading_from_pretrained import convert_hf_model_config

    architecture = (config.architectures or ["no architecture"])[0]
    if architecture in _GEMMA_SHAPES:
        return _gemma_config(config, architecture)
    fields = json.loads((folder / "config.json").read_text())
    if "n_positions" in fields:  # older GPT-2 files have n_ctx too, and TransformerLens reads that
        fields.setdefault("n_ctx", fields["n_positions"])
    with tempfile.TemporaryDirectory(prefix="m") as neutral:  # TransformerLens guesses from words in the path
        (Path(neutral) / "config.json").write_text(json.dumps(fields))
        try:
            return convert_hf_model_config(neutral)
        except NotImplementedError as error:
            raise ModelError(f"HookedTransformer does not know the architecture {architecture} of {folder}.") from error


def _gemma_config(config: Any, architecture: str) -> dict[str, Any]:
    """A Gemma folder's fields: TransformerLens has them for named sizes only, so one size is taken and resized."""
    from transformer_lens.loading_from_pretrained import convert_hf_model_config

    fields = convert_hf_model_config(_GEMMA_SHAPES[architecture])
    fields |= {
        "d_model": config.hidden_size,
        "d_head": config.head_dim,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": config.num_key_value_heads,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": min(config.max_position_embeddings, 8192),
        "eps": config.rms_norm_eps,
        "d_vocab": config.vocab_size,
        "window_size": config.sliding_window,
        "attn_types": ["local" if kind == "sliding_attention" else "global" for kind in config.layer_types],
        "attn_scale": float(config.query_pre_attn_scalar) ** 0.5,
        "attn_scores_soft_cap": config.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": config.final_logit_softcapping or -1.0,
    }
    rope = config.rope_parameters
    if architecture == "Gemma2ForCausalLM":
        return fields | {"rotary_base": rope["rope_theta"]}
    return fields | {
        "rotary_base": int(rope["full_attention"]["rope_theta"]),
        "rotary_base_local": int(rope["sliding_attention"]["rope_theta"]),
    }


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
