"""A model that is loaded is Hugging Face's, or is refused: families and options that change a forward pass, one at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mechedit import models
from mechedit.models import ModelError, checking, loading
from tests.conftest import COMMON, GEMMA_LIKE, LLAMA_LIKE, SHAPES, make_folder

WIDE = {"initializer_range": 0.25, "tie_word_embeddings": False}
GPT2 = COMMON | {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "initializer_range": 0.25}
LLAMA = LLAMA_LIKE | {"max_position_embeddings": 128}
GEMMA = GEMMA_LIKE | {"max_position_embeddings": 128, "sliding_window": 40}
NEOX = COMMON | WIDE | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
LAYERS = ["sliding_attention", "full_attention"] * 2
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "word_embed_proj_dim": 32}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0} | more}


YARN = rope("yarn", original_max_position_embeddings=32)
LLAMA3 = rope("llama3", original_max_position_embeddings=32, low_freq_factor=1.0, high_freq_factor=4.0)
LONG = rope("longrope", original_max_position_embeddings=100, short_factor=[1.5] * 4, long_factor=[3.0] * 4)
GLOBAL = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "gpt2 n_inner": lambda: transformers.GPT2Config(**GPT2, n_inner=80),
    "gpt2 relu": lambda: transformers.GPT2Config(**GPT2, activation_function="relu"),
    "gpt2 tanh": lambda: transformers.GPT2Config(**GPT2, activation_function="tanh"),
    "gpt2 eps": lambda: transformers.GPT2Config(**GPT2, layer_norm_epsilon=0.1),
    "gpt2 inverse layers": lambda: transformers.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True),
    "gpt2 upcast": lambda: transformers.GPT2Config(**GPT2, reorder_and_upcast_attn=True),
    "gpt2 unscaled": lambda: transformers.GPT2Config(**GPT2, scale_attn_weights=False),
    "gpt2 untied": lambda: transformers.GPT2Config(**GPT2, tie_word_embeddings=False),
    "gptj": lambda: transformers.GPTJConfig(**GPT2, rotary_dim=4, tie_word_embeddings=False),
    "gptj n_inner": lambda: transformers.GPTJConfig(**GPT2, rotary_dim=4, n_inner=80, tie_word_embeddings=False),
    "gptj eps": lambda: transformers.GPTJConfig(**GPT2, rotary_dim=4, layer_norm_epsilon=0.1),
    "gptj all rotary": lambda: transformers.GPTJConfig(**GPT2, rotary_dim=8, tie_word_embeddings=False),
    "gptneo": lambda: transformers.GPTNeoConfig(
        **COMMON, **WIDE, hidden_size=32, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]],
        window_size=8, max_position_embeddings=128, intermediate_size=80,
    ),
    "neox": lambda: transformers.GPTNeoXConfig(**NEOX),
    "neox no biases": lambda: transformers.GPTNeoXConfig(**NEOX, attention_bias=False),
    "neox sequential": lambda: transformers.GPTNeoXConfig(**NEOX, use_parallel_residual=False),
    "neox rotary share": lambda: transformers.GPTNeoXConfig(
        **NEOX, rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    ),
    "neox linear": lambda: transformers.GPTNeoXConfig(**NEOX, **rope("linear")),
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "llama head_dim": lambda: transformers.LlamaConfig(**LLAMA, head_dim=16),
    "llama attention_bias": lambda: transformers.LlamaConfig(**LLAMA, attention_bias=True),
    "llama mlp_bias": lambda: transformers.LlamaConfig(**LLAMA, mlp_bias=True),
    "llama linear": lambda: transformers.LlamaConfig(**LLAMA, **rope("linear")),
    "llama yarn": lambda: transformers.LlamaConfig(**LLAMA, **YARN),
    "llama llama3": lambda: transformers.LlamaConfig(**LLAMA, **LLAMA3),
    "llama dynamic": lambda: transformers.LlamaConfig(**LLAMA, **rope("dynamic")),
    "llama theta": lambda: transformers.LlamaConfig(
        **LLAMA, rope_parameters={"rope_type": "default", "rope_theta": 300.0}
    ),
    "llama tied": lambda: transformers.LlamaConfig(**(LLAMA | {"tie_word_embeddings": True})),
    "llama gelu": lambda: transformers.LlamaConfig(**LLAMA, hidden_act="gelu"),
    "llama eps": lambda: transformers.LlamaConfig(**LLAMA, rms_norm_eps=0.1),
    "llama all heads": lambda: transformers.LlamaConfig(**(LLAMA | {"num_key_value_heads": 4})),
    "mistral": lambda: transformers.MistralConfig(**LLAMA, sliding_window=None),
    "mistral window": lambda: transformers.MistralConfig(**LLAMA, sliding_window=40),
    "mistral head_dim": lambda: transformers.MistralConfig(**LLAMA, head_dim=16),
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA),
    "qwen2 window": lambda: transformers.Qwen2Config(
        **LLAMA, use_sliding_window=True, sliding_window=40, max_window_layers=2
    ),
    "qwen2 layer_types": lambda: transformers.Qwen2Config(
        **LLAMA, use_sliding_window=True, sliding_window=8, layer_types=LAYERS
    ),
    "qwen2 yarn": lambda: transformers.Qwen2Config(**LLAMA, **YARN),
    "qwen3": lambda: transformers.Qwen3Config(**LLAMA, head_dim=16),
    "qwen3 attention_bias": lambda: transformers.Qwen3Config(**LLAMA, head_dim=8, attention_bias=True),
    "qwen3 window": lambda: transformers.Qwen3Config(
        **LLAMA, head_dim=8, use_sliding_window=True, sliding_window=40, max_window_layers=1
    ),
    "gemma": lambda: transformers.GemmaConfig(**LLAMA, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**GEMMA),
    "gemma2 caps": lambda: transformers.Gemma2Config(
        **GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma2 no caps": lambda: transformers.Gemma2Config(
        **GEMMA, attn_logit_softcapping=None, final_logit_softcapping=None
    ),
    "gemma2 bias": lambda: transformers.Gemma2Config(**GEMMA, attention_bias=True),
    "gemma2 relu": lambda: transformers.Gemma2Config(**GEMMA, hidden_activation="relu"),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GEMMA),
    "gemma3 scale": lambda: transformers.Gemma3TextConfig(**(GEMMA | {"query_pre_attn_scalar": 32})),
    "gemma3 linear": lambda: transformers.Gemma3TextConfig(**GEMMA, rope_parameters=GLOBAL),
    "gemma3 both ways": lambda: transformers.Gemma3TextConfig(**GEMMA, use_bidirectional_attention=True),
    "phi": lambda: transformers.PhiConfig(**(LLAMA | {"num_key_value_heads": 4})),
    "phi rotary share": lambda: transformers.PhiConfig(
        **(LLAMA | {"num_key_value_heads": 4}),
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    ),
    "phi grouped": lambda: transformers.PhiConfig(**LLAMA),
    "phi qk_layernorm": lambda: transformers.PhiConfig(**(LLAMA | {"num_key_value_heads": 4}), qk_layernorm=True),
    "phi3": lambda: transformers.Phi3Config(**LLAMA, sliding_window=40),
    "phi3 longrope": lambda: transformers.Phi3Config(**LLAMA, original_max_position_embeddings=100, **LONG),
    "opt": lambda: transformers.OPTConfig(**COMMON, **OPT, max_position_embeddings=128, init_std=0.25),
    "opt no biases": lambda: transformers.OPTConfig(
        **COMMON, **OPT, max_position_embeddings=128, init_std=0.25, enable_bias=False
    ),
    "opt norm after": lambda: transformers.OPTConfig(
        **COMMON, **OPT, max_position_embeddings=128, init_std=0.25, do_layer_norm_before=False
    ),
    "bloom": lambda: transformers.BloomConfig(**COMMON, hidden_size=32, n_layer=4, n_head=4, initializer_range=0.25),
    "bloom norm after": lambda: transformers.BloomConfig(
        **COMMON, hidden_size=32, n_layer=4, n_head=4, initializer_range=0.25,
        apply_residual_connection_post_layernorm=True,
    ),
    "olmo": lambda: transformers.OlmoConfig(**(LLAMA | {"num_key_value_heads": 4})),
    "olmo clip": lambda: transformers.OlmoConfig(**(LLAMA | {"num_key_value_heads": 4}), clip_qkv=0.5),
    "olmo2": lambda: transformers.Olmo2Config(**(LLAMA | {"num_key_value_heads": 4})),
    "olmo2 grouped": lambda: transformers.Olmo2Config(**LLAMA),
    "olmo3": lambda: transformers.Olmo3Config(**LLAMA, sliding_window=40, layer_types=LAYERS),
    "falcon": lambda: transformers.FalconConfig(**COMMON, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "stablelm": lambda: transformers.StableLmConfig(**LLAMA),
    "granite": lambda: transformers.GraniteConfig(**LLAMA, logits_scaling=2.0, residual_multiplier=0.5),
    "cohere": lambda: transformers.CohereConfig(**LLAMA, logit_scale=0.5),
    "starcoder2": lambda: transformers.Starcoder2Config(**LLAMA, sliding_window=40),
    "mixtral": lambda: transformers.MixtralConfig(**LLAMA, num_local_experts=4),
}  # fmt: skip


def shake(hf_model: Any) -> None:
    """Let no parameter be trivial: biases that are zero and norms that are one hide whether they are used."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in hf_model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return transformers.AutoTokenizer.from_pretrained(make_folder(tmp_path_factory.mktemp("words"), "gpt2"))


def write(folder: Path, config: Any, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    hf_model = transformers.AutoModelForCausalLM.from_config(config)
    shake(hf_model)
    hf_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def plain_logits(folder: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Hugging Face's own, of a model read afresh."""
    own = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return own.eval()(ids).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_is_computed_as_by_hugging_face_or_refused_in_one_line(name, tmp_path, tokenizer):
    folder = write(tmp_path / "m", CONFIGS[name](), tokenizer)
    ids = torch.randint(2, 400, (2, 90), generator=torch.Generator().manual_seed(7))
    try:
        model = models.load(str(folder), device="cpu")
    except ModelError as error:
        assert "\n" not in str(error)
        print("REFUSED", name, error)
        return
    with torch.no_grad():
        found = float((model(ids) - plain_logits(folder, ids)).abs().max())
    print("EQUAL", name, found)
    assert found < 1e-4
