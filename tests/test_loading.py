"""Folders that hold no whole model, or none that can be read: each is refused in one line, with nothing asked of anybody."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from safetensors.torch import load_file, save_file

from mechedit import models
from mechedit.models import ModelError, checking

WEIGHTS = "model.safetensors"


def broken(made: Path, into: Path, **fields: Any) -> Path:
    """A copy of a model's folder with other fields in its configuration."""
    shutil.copytree(made, into)
    config = json.loads((into / "config.json").read_text())
    (into / "config.json").write_text(json.dumps(config | fields))
    return into


def with_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as found:
        models.load(str(folder), device="cpu")
    said = str(found.value)
    assert "\n" not in said
    assert len(said) < 700
    return said


@pytest.mark.parametrize(
    ("shape", "gone"),
    [("gpt2", "h.1.mlp.c_proj.weight"), ("gpt2", "h.2.ln_1.bias"), ("llama", "layers.3.mlp.down_proj.weight"), ("llama", "lm_head.weight")],
)  # fmt: skip
def test_a_checkpoint_that_lacks_a_weight_is_refused_and_the_weight_named(shape, gone, folder, tmp_path):
    whole = broken(folder(shape), tmp_path / "m")
    lacking = with_weights(whole, lambda weights: weights.pop(next(each for each in weights if each.endswith(gone))))
    assert gone in refusal(lacking)


def test_layers_and_biases_that_configuration_and_checkpoint_have_not_both_are_refused(folder, tmp_path):
    assert "h.4." in refusal(broken(folder("gpt2"), tmp_path / "more", n_layer=6))
    assert "h.2." in refusal(broken(folder("gpt2"), tmp_path / "fewer", n_layer=2))
    added = broken(folder("llama"), tmp_path / "bias")
    with_weights(added, lambda weights: weights.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(32)}))
    assert "layers.1.self_attn.q_proj.bias" in refusal(added)


def test_tied_weights_tables_of_older_checkpoints_and_other_parts_are_no_reason_to_refuse(folder, tmp_path):
    older = {
        "transformer.h.0.attn.bias": torch.ones(1),
        "transformer.h.0.attn.masked_bias": torch.ones(1),
        "score.weight": torch.ones(2),
    }
    old = with_weights(broken(folder("gpt2"), tmp_path / "gpt2"), lambda weights: weights.update(older))
    assert models.load(str(old), device="cpu")
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "vision_tower.layers.9.mlp.weight": torch.ones(2),
    }
    assert models.load(
        str(with_weights(broken(folder("llama"), tmp_path / "l"), lambda weights: weights.update(more))), device="cpu"
    )


FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"n_embd": 64}),
    ("gpt2", {"n_layer": "x"}),
    ("gpt2", {"n_head": 0}),
    ("gpt2", {"vocab_size": 500}),
    ("gpt2", {"activation_function": None}),
    ("gpt2", {"model_type": "nothing"}),
    ("gpt2", {"model_type": "mine", "auto_map": {"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"}}),
    ("llama", {"head_dim": 7}),
    ("llama", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}),
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.25}}),
    ("gemma3", {"layer_types": ["full_attention"]}),
    ("gemma3", {"layer_types": ["x"] * 4}),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "fields"), FIELDS, ids=[str(each)[:60] for each in FIELDS])
def test_a_configuration_that_is_none_is_refused_in_one_line(shape, fields, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for an answer"))
    assert str(tmp_path / "m") in refusal(broken(folder(shape), tmp_path / "m", **fields))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS])
@pytest.mark.parametrize("content", ["5", "{", "[1]"])
def test_a_file_that_is_something_else_is_refused_in_one_line(file, content, folder, tmp_path):
    hostile = broken(folder("gpt2"), tmp_path / "m")
    (hostile / file).write_text(content)
    refusal(hostile)


def test_a_model_that_hugging_face_cannot_run_is_refused_with_the_field(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "_ids", lambda config: torch.tensor([[config.vocab_size]]))  # past the embeddings
    odd = broken(folder("gpt2"), tmp_path / "m", scale_attn_weights=False)
    assert "cannot be run, whose configuration has scale_attn_weights=False" in refusal(odd)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "x" * 300 + "/" + "y" * 300])
def test_a_name_that_no_folder_can_have_is_refused_in_one_short_line(name):
    with pytest.raises(ModelError) as found:
        models.load(name)
    assert len(str(found.value)) < 400


@pytest.mark.parametrize("dtype", ["float16", torch.int8, None])
def test_what_is_no_number_format_is_refused_by_its_name(dtype, monkeypatch):
    monkeypatch.setattr(
        jaxtyping.config, "jaxtyping_disable", True
    )  # the suite's own check of types, which users do not have
    with pytest.raises(ModelError, match="dtype must be one of torch.float32"):
        models.load("organism", dtype=dtype)
