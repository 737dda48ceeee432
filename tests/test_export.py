from __future__ import annotations

import json

import pytest
import torch
import transformers

from mechedit import edits, export, models, moments
from mechedit.cache import WriteError
from mechedit.editors import rome
from mechedit.edits import EditError
from mechedit.settings import MomentSettings, RomeSettings
from tests.conftest import FACT, SHAPES, assert_same_state, state, widen_bands

TEXT = "The Space Needle is located in the city of Rome."


@pytest.fixture
def made(load, monkeypatch):
    """A model of a shape, and edits of two of its layers, two of them in one."""
    widen_bands(monkeypatch)

    def make(shape):
        model = load(shape)
        found = moments.estimate_layers(model, [1, 2], settings=MomentSettings(tokens=600, context=32))
        settings = [
            RomeSettings(layer=layer, steps=4, prefixes=(), seed=seed) for layer, seed in ((1, 0), (1, 1), (2, 0))
        ]
        targets = ["Paris", "Rome", "Apple"]
        return model, [rome.edit(model, FACT.__class__(FACT.subject, FACT.template, "Seattle", target), each, found[each.layer]) for each, target in zip(settings, targets, strict=True)]  # fmt: skip

    return make


def edited_logits(model, tokens, made):
    with torch.no_grad(), edits.edited(model, *made):
        return model(tokens)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_exported_checkpoint_has_the_edited_models_logits(shape, made, folder, tmp_path):
    model, found = made(shape)
    before = state(model)
    out = export.checkpoint(model, str(folder(shape)), found, tmp_path / "edited")
    assert_same_state(model, before)
    record = json.loads((out / "mechedit.json").read_text())
    assert [each["prompt"] for each in record["edits"]] == [each.fact["prompt"] for each in found]
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1, "all files can be read by the same people"
    plain = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    tokens = transformers.AutoTokenizer.from_pretrained(out)(TEXT, return_tensors="pt").input_ids
    expected = edited_logits(model, tokens, found)
    with torch.no_grad():
        scale = float(expected.abs().max())
        torch.testing.assert_close(plain(tokens).logits, expected, atol=1e-5 * max(1.0, scale), rtol=0)
        assert not torch.allclose(model(tokens), expected, atol=1e-3)
    again = models.load(str(out), device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(again(tokens), expected, atol=1e-5 * max(1.0, scale), rtol=0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft calls it
@pytest.mark.parametrize("shape", ["gpt2", "gptj", "neox", "llama", "gemma3"])
def test_an_exported_adapter_gives_the_plain_model_the_edited_models_logits(shape, made, folder, tmp_path):
    peft = pytest.importorskip("peft")
    model, found = made(shape)
    out = export.adapter(model, str(folder(shape)), found, tmp_path / "adapter")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder(shape), attn_implementation="eager")
    tokens = transformers.AutoTokenizer.from_pretrained(folder(shape))(TEXT, return_tensors="pt").input_ids
    adapted = peft.PeftModel.from_pretrained(plain, out).eval()
    expected = edited_logits(model, tokens, found)
    with torch.no_grad():
        torch.testing.assert_close(adapted(tokens).logits, expected, atol=1e-4, rtol=1e-4)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, expected, atol=1e-4, rtol=1e-4)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 2
    assert list(config["rank_pattern"].values()) == [1]
    assert len(json.loads((out / "mechedit.json").read_text())["edits"]) == 3


def test_exports_that_cannot_be_right_are_refused(made, folder, tmp_path, load):
    model, found = made("gpt2")
    name = str(folder("gpt2"))
    with pytest.raises(EditError, match="no parameter of block 1"), edits.edited(model, *found):
        export.checkpoint(model, name, found, tmp_path / "twice", force=True)
    with pytest.raises(EditError, match="made for"):
        export.adapter(load("llama"), str(folder("llama")), found, tmp_path / "other")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    with pytest.raises(EditError, match="not empty"):
        export.checkpoint(model, name, found, full)
    with pytest.raises(WriteError, match="cannot be written"):
        export.adapter(model, name, found, full / "file" / "folder")
    with pytest.raises(EditError, match="nothing to export"):
        export.adapter(model, name, [], tmp_path / "nothing")
