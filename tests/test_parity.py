"""A model that is loaded is Hugging Face's, or is refused: families and options that change a forward pass, one at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mechedit import models, prompts, scoring
from mechedit.models import ModelError, checking
from mechedit.settings import TraceSettings
from mechedit.tracing import baseline, trace, tracer
from tests.conftest import COMMON, FACT, GEMMA_LIKE, LLAMA_LIKE, make_folder

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
    "opt narrow embeddings": lambda: transformers.OPTConfig(
        **COMMON, **(OPT | {"word_embed_proj_dim": 16}), max_position_embeddings=128, init_std=0.25
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


REFUSED = {
    "gpt2 tanh": "activation_function=tanh",
    "llama mlp_bias": "mlp_bias=True",
    "gemma3 both ways": "use_bidirectional_attention=True",
    "phi grouped": "num_key_value_heads=2",
    "phi qk_layernorm": "qk_layernorm=True",
    "opt norm after": "do_layer_norm_before=False",
    "opt narrow embeddings": "word_embed_proj_dim=16",
    "bloom norm after": "apply_residual_connection_post_layernorm=True",
    "olmo2 grouped": "num_key_value_heads=2",
    **dict.fromkeys(("falcon", "stablelm", "granite", "cohere", "starcoder2"), "does not know the architecture"),
}
REFUSED_BY_BRIDGES = {
    "gpt2 unscaled": "scale_attn_weights=False",
    "phi qk_layernorm": "qk_layernorm=True",
    "opt norm after": "do_layer_norm_before=False",
}
IDS = torch.randint(
    2, 400, (2, 90), generator=torch.Generator().manual_seed(7)
)  # longer than any window, and than the check's ids


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_is_computed_as_by_hugging_face_or_refused_in_one_line(name, tmp_path, tokenizer):
    folder = write(tmp_path / "m", CONFIGS[name](), tokenizer)
    bridges = find_spec("transformer_lens.HookedTransformer") is None
    if (why := (REFUSED_BY_BRIDGES if bridges else REFUSED).get(name)) is not None:
        with pytest.raises(ModelError, match=why) as refused:
            models.load(str(folder), device="cpu")
        assert "\n" not in str(refused.value)
        return
    model = models.load(str(folder), device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), plain_logits(folder, IDS), atol=1e-4, rtol=0)


def test_a_verdict_is_kept_for_the_same_configuration_and_not_for_another(tmp_path, tokenizer, monkeypatch):
    calls = []
    own = checking.expected
    monkeypatch.setattr(checking, "expected", lambda *given: calls.append(1) or own(*given))
    first = write(tmp_path / "a", CONFIGS["llama"](), tokenizer)
    for _ in range(2):
        models.load(str(first), device="cpu")
    assert len(calls) == 1
    models.load(str(write(tmp_path / "b", CONFIGS["llama eps"](), tokenizer)), device="cpu")
    assert len(calls) == 2
    models.load(str(first), device="cpu", dtype=torch.bfloat16)
    assert len(calls) == 3
    plain = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]())  # norms of ones: they show nothing
    plain.save_pretrained(first)
    models.load(str(first), device="cpu")
    assert len(calls) == 4


def test_a_model_with_a_short_original_context_is_the_same_in_its_first_load_and_its_second(tmp_path, tokenizer):
    """Longer texts than the original context turn Hugging Face's angles by other factors."""
    short = {"original_max_position_embeddings": 40}
    config = transformers.Phi3Config(
        **LLAMA, **short, **rope("longrope", **short, short_factor=[1.5] * 4, long_factor=[3.0] * 4)
    )
    folder = write(tmp_path / "m", config, tokenizer)
    for _ in range(2):
        model = models.load(str(folder), device="cpu")
        with torch.no_grad():
            torch.testing.assert_close(model(IDS[:, :20]), plain_logits(folder, IDS[:, :20]), atol=1e-4, rtol=0)
        assert model.cfg.n_ctx == 40


def test_a_model_that_differs_is_refused_each_time_and_named(tmp_path, tokenizer, monkeypatch):
    folder = write(tmp_path / "m", CONFIGS["llama theta"](), tokenizer)
    own = checking.expected
    monkeypatch.setattr(checking, "expected", lambda *given: own(*given) + 0.01)
    for _ in range(2):
        with pytest.raises(ModelError, match="rope_parameters=.*300.*differ by 0.01, 0.0001 is allowed"):
            models.load(str(folder), device="cpu")


def test_a_cache_that_cannot_be_written_costs_the_check_and_nothing_else(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MECHEDIT_CACHE", str(tmp_path / "file"))
    assert models.load(str(write(tmp_path / "m", CONFIGS["gpt2"](), tokenizer)), device="cpu")


def test_logits_that_are_not_finite_are_refused_at_load_with_the_format_to_take(tmp_path, tokenizer):
    config = CONFIGS["gemma3"]()
    folder = write(tmp_path / "m", config, tokenizer)
    large = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        large.model.embed_tokens.weight *= 1e5  # past 65504, the largest number of float16
    large.save_pretrained(folder)
    with pytest.raises(ModelError, match="in float16 are not finite.* load it with dtype bfloat16 or float32"):
        models.load(str(folder), device="cpu", dtype=torch.float16)
    assert models.load(str(folder), device="cpu", dtype=torch.bfloat16)


def test_a_score_that_is_not_finite_is_an_error_while_the_model_is_as_it_was_loaded(tmp_path, tokenizer):
    model = models.load(str(write(tmp_path / "m", CONFIGS["gpt2"](), tokenizer)), device="cpu")
    with torch.no_grad():
        models.W_out(model, 1)[0, 0] = float("nan")
    with pytest.raises(ModelError, match="in float32 are not finite.*weights are damaged"):
        scoring.score(model, [("The city of", "Paris")], prepend_bos=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_its_bound_of_hugging_faces_and_another_model_is_not(dtype, tmp_path, tokenizer):
    for shape in ("gpt2", "llama", "gemma3", "neox"):
        folder = write(tmp_path / shape, CONFIGS[shape](), tokenizer)
        theirs = plain_logits(folder, IDS, dtype)
        with torch.no_grad():
            found, bound = checking.difference(models.load(str(folder), device="cpu", dtype=dtype)(IDS), theirs)
        assert found < bound / 2
        other = write(tmp_path / "other", CONFIGS[f"{shape} {OTHER[shape]}"](), tokenizer)
        found, bound = checking.difference(plain_logits(other, IDS, dtype), theirs)
        assert found > bound


OTHER = {"llama": "linear", "gpt2": "unscaled", "gemma3": "scale", "neox": "rotary share"}


def test_after_a_cast_with_a_longer_prompt_the_model_is_bit_for_bit_what_it_was(tmp_path, tokenizer, monkeypatch):
    model = models.load(str(write(tmp_path / "m", CONFIGS["gemma3"](), tokenizer)), device="cpu")
    for block in model.blocks:  # as if the tables were shorter than the prompt, which 2,048 positions make slow
        if hasattr(block.attn, "rotary_sin"):
            block.attn.rotary_sin, block.attn.rotary_cos = block.attn.rotary_sin[:16], block.attn.rotary_cos[:16]
    with torch.no_grad():
        before = model(IDS[:, :10])
        with models.cast(model, torch.bfloat16):
            model(IDS)
            inside = {name: buffer.dtype for name, buffer in model.named_buffers() if "inv_freq" in name}
        assert torch.equal(model(IDS[:, :10]), before)
        torch.testing.assert_close(model(IDS), plain_logits(tmp_path / "m", IDS), atol=1e-4, rtol=0)
    assert set(inside.values()) <= {torch.float32}


@pytest.mark.parametrize("shape", ["gpt2", "gemma3"])
def test_in_bfloat16_clean_and_corrupted_runs_are_equal_before_the_subject(shape, load):
    model = load(shape)
    jobs = []
    own = tracer.sweep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tracer,
            "sweep",
            lambda model, part, *a, **k: jobs.append(baseline.Runs.of(model, part)) or own(model, part, *a, **k),
        )
        trace(model, FACT, TraceSettings(draws=2, precision="bfloat16", kinds=("resid",)))
    (runs,) = jobs
    begin = runs.begins[0]
    assert begin == prompts.prepare(model, FACT).subject[0] > 0
    for clean, corrupted in zip(runs.clean_states, runs.states, strict=True):
        assert torch.equal(corrupted[:, :begin], clean[:, :begin].expand_as(corrupted[:, :begin]))


def test_loading_holds_one_copy_of_the_weights_at_a_time(tmp_path, tokenizer):
    """Peak over what a process that has loaded a tiny model holds, in sizes of the loaded model (160 MB); with the check, then without."""
    wide = {"vocab_size": 400, "hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12}
    own = transformers.LlamaConfig(**wide, intermediate_size=2048, num_key_value_heads=12, tie_word_embeddings=False)
    gpt2 = transformers.GPT2Config(vocab_size=400, n_embd=768, n_layer=6, n_head=12, n_positions=128)
    small = write(tmp_path / "small", CONFIGS["llama"](), tokenizer)
    for name, config in (("llama", own), ("gpt2", gpt2)):
        folder = write(tmp_path / name, config, tokenizer)
        for _ in range(2):
            command = [sys.executable, "-c", PEAK, str(small), str(folder)]
            found = subprocess.run(
                command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            peak, size = json.loads(found.stdout.splitlines()[-1])
            assert peak < 1.3 * size, (name, peak / size)


PEAK = """
import json, sys
from mechedit import models
def held(kind):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(kind))
models.load(sys.argv[1], device="cpu")
before = held("VmRSS")
model = models.load(sys.argv[2], device="cpu")
print(json.dumps([held("VmHWM") - before, sum(each.numel() * each.element_size() for each in model.parameters())]))
"""
