from __future__ import annotations

import json
import resource
from dataclasses import replace

import pytest
import torch
import transformers

from mechedit import applying, export, models, moments
from mechedit.cache import WriteError
from mechedit.changes import LowRank
from mechedit.editors import rome
from mechedit.edits import EditError
from mechedit.settings import MomentSettings, RomeSettings
from mechedit.weights import there
from tests import hand_made
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
    with torch.no_grad(), applying.edited(model, *made):
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
    with pytest.raises(EditError, match="no parameter of block 1"), applying.edited(model, *found):
        export.checkpoint(model, name, found, tmp_path / "twice", force=True)
    with pytest.raises(EditError, match="made for"):
        export.adapter(load("llama"), str(folder("llama")), found, tmp_path / "other")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    with pytest.raises(EditError, match="not empty"):
        export.checkpoint(model, name, found, full)
    with pytest.raises(EditError, match="not empty"):
        export.checkpoint(model, name, found, full / "new" / ".." / ".." / full.name)
    with pytest.raises(WriteError, match="cannot be written"):
        export.adapter(model, name, found, full / "file" / "folder")
    with pytest.raises(EditError, match="nothing to export"):
        export.adapter(model, name, [], tmp_path / "nothing")
    with pytest.raises(EditError, match="nothing to export"):
        export.checkpoint(model, name, [hand_made.edit_of(model, reasons=("too large",))], tmp_path / "nothing")


# --- changes of every kind, in every weight ---------------------------------------------------------------------------


def every_kind(model):
    """Edits of queries, values, an MLP's reading and writing weights, and all biases that there are."""
    low, rows, dense = hand_made.low_rank, hand_made.some_rows, hand_made.dense
    found = [
        low(model, 0, "attn.W_Q", seed=1),
        low(model, 1, "attn.W_V", seed=2),
        low(model, 1, "attn.W_K", rank=1, seed=3),
        low(model, 2, "attn.W_O", rank=3, seed=4),
        rows(model, 1, "mlp.W_out", seed=5),
        dense(model, 2, "mlp.W_in", seed=6),
        dense(model, 0, "mlp.W_out", seed=7),
    ]
    if model.cfg.gated_mlp:
        found.append(dense(model, 3, "mlp.W_gate", seed=8))
    return found


def assert_same_logits(found, expected):
    """To 1e-5 of the largest."""
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def exported_logits(out):
    tokens = transformers.AutoTokenizer.from_pretrained(out)(TEXT, return_tensors="pt").input_ids
    plain = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    with torch.no_grad():
        return tokens, plain(tokens).logits


@pytest.mark.parametrize("shape", ["gpt2", "neox", "llama", "gemma3"])
def test_a_checkpoint_has_every_kind_of_change_in_every_weight(shape, load, folder, tmp_path):
    model = load(shape)
    before = state(model)
    for index, changes in enumerate([[each] for each in every_kind(model)] + [every_kind(model)]):
        edit = hand_made.edit_of(model, *changes)
        out = export.checkpoint(model, str(folder(shape)), [edit], tmp_path / str(index))
        tokens, found = exported_logits(out)
        assert_same_logits(found, edited_logits(model, tokens, [edit]))
        with torch.no_grad():
            assert not torch.allclose(found, model(tokens), atol=1e-3), f"{changes} does nothing"
    assert_same_state(model, before)


@pytest.mark.parametrize("size", [0.2, 0.0])
@pytest.mark.parametrize("shape", ["gpt2", "neox"])
def test_a_checkpoint_has_changed_biases(shape, size, load, folder, tmp_path):
    """Those of a new model are zero, and cannot be told from one another by their numbers."""
    name = str(tmp_path / "biased")
    config = transformers.AutoModelForCausalLM.from_pretrained(folder(shape))
    torch.manual_seed(1)
    with torch.no_grad():
        for own, parameter in config.named_parameters():
            if own.endswith("bias"):
                parameter.normal_(std=size)
    config.save_pretrained(name)
    transformers.AutoTokenizer.from_pretrained(folder(shape)).save_pretrained(name)
    model = models.load(name, device="cpu")
    biases = [each for each in there(model, 1) if each.split(".")[1].startswith("b")]
    assert {"attn.b_Q", "attn.b_V", "attn.b_O", "mlp.b_in", "mlp.b_out"} <= set(biases)
    for each in biases:
        edit = hand_made.edit_of(model, hand_made.dense(model, 1, each))
        tokens, found = exported_logits(export.checkpoint(model, name, [edit], tmp_path / each))
        assert_same_logits(found, edited_logits(model, tokens, [edit]))
        with torch.no_grad():
            assert each == "attn.b_K" or not torch.allclose(found, model(tokens), atol=1e-3), f"{each} does nothing"
        with pytest.raises(EditError, match=f"no place for a bias, and these edits change {each} of block 1"):
            export.adapter(model, name, [edit], tmp_path / "adapter")


def adapted_logits(folder, out):
    peft = pytest.importorskip("peft")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    adapted = peft.PeftModel.from_pretrained(plain, out).eval()
    with torch.no_grad():
        found = adapted(tokens).logits
        torch.testing.assert_close(adapted.merge_and_unload()(tokens).logits, found, atol=1e-4, rtol=1e-4)
    return tokens, found


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft calls it
@pytest.mark.parametrize("shape", ["gpt2", "neox", "llama", "gemma3"])
def test_an_adapter_has_changes_of_low_rank_of_attention_where_weights_are_fused_too(shape, load, folder, tmp_path):
    model = load(shape)
    edits = [
        hand_made.edit_of(model, hand_made.low_rank(model, 1, "attn.W_Q", seed=1), hand_made.low_rank(model, 2, "attn.W_O", seed=2)),
        hand_made.edit_of(model, hand_made.low_rank(model, 1, "attn.W_V", rank=1, seed=3)),
        hand_made.edit_of(model, hand_made.low_rank(model, 1, "attn.W_K", seed=4)),
        hand_made.edit_of(model, hand_made.low_rank(model, 1, "attn.W_V", seed=5), hand_made.some_rows(model, 0, "mlp.W_out", seed=6)),
    ]  # fmt: skip
    out = export.adapter(model, str(folder(shape)), edits, tmp_path / "adapter")
    tokens, found = adapted_logits(folder(shape), out)
    torch.testing.assert_close(found, edited_logits(model, tokens, edits), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(found, model(tokens), atol=1e-3)
    config = json.loads((out / "adapter_config.json").read_text())
    ranks = {name: config["rank_pattern"].get(name, config["r"]) for name in config["target_modules"]}
    fused = sorted(ranks.values())
    assert fused == ([2, 3, 7] if shape in ("gpt2", "neox") else [2, 2, 2, 3, 3])
    assert "errors" not in json.loads((out / "mechedit.json").read_text())


def spectrum(model, layer, name, sizes):
    """A dense change with these singular values."""
    change = hand_made.dense(model, layer, name, seed=3)
    U, _, V = torch.linalg.svd(change.delta.double(), full_matrices=False)
    n = len(sizes)
    return replace(change, delta=(U[:, :n] * torch.tensor(sizes, dtype=torch.float64)) @ V[:n])


def test_a_change_that_is_as_large_in_factors_is_no_adapter_and_the_message_says_its_rank(load, folder, tmp_path):
    """30 directions of a [32, 128] are more numbers than the matrix; what one direction leaves is sqrt(29 / 54) of the norm."""
    model = load("gpt2")
    dense = spectrum(model, 1, "mlp.W_in", [5.0] + [1.0] * 29)
    U, S, V = torch.linalg.svd(dense.delta, full_matrices=False)
    thin = LowRank(dense.weight, (U * S)[:, :30].T, V[:30])
    for change in (dense, thin):
        with pytest.raises(
            EditError,
            match=r"mlp.W_in of block 1 has rank 30 \(of at most 32\), .* rank 1 would leave 73%, 8 would leave 64%",
        ):
            export.adapter(model, str(folder("gpt2")), [hand_made.edit_of(model, change)], tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft calls it
def test_a_dense_change_of_low_rank_is_an_exact_adapter(load, folder, tmp_path):
    model = load("gpt2")
    edit = hand_made.edit_of(model, spectrum(model, 1, "mlp.W_in", [4.0, 2.0, 2.0, 1.0]))
    out = export.adapter(model, str(folder("gpt2")), [edit], tmp_path / "adapter")
    tokens, found = adapted_logits(folder("gpt2"), out)
    assert_same_logits(found, edited_logits(model, tokens, [edit]))
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft calls it
def test_a_change_is_approximated_by_its_largest_directions_and_the_error_is_recorded(load, folder, tmp_path):
    model = load("gpt2")
    whole = spectrum(model, 1, "mlp.W_in", [4.0, 2.0, 2.0, 1.0])
    small = hand_made.low_rank(model, 2, "attn.W_Q", rank=3)
    edit = hand_made.edit_of(model, whole, small)
    out = export.adapter(model, str(folder("gpt2")), [edit], tmp_path / "adapter", rank=3)
    errors = json.loads((out / "mechedit.json").read_text())["errors"]
    assert errors == {"mlp.W_in of block 1": pytest.approx(1 / 5, abs=1e-6)}, "what is left: 1 of sqrt(16 + 4 + 4 + 1)"
    U, S, V = torch.linalg.svd(whole.delta, full_matrices=False)
    nearest = replace(whole, delta=(U[:, :3] * S[:3]) @ V[:3])
    tokens, found = adapted_logits(folder("gpt2"), out)
    expected = edited_logits(model, tokens, [hand_made.edit_of(model, nearest, small)])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, edited_logits(model, tokens, [edit]), atol=1e-3)
    exact = export.adapter(model, str(folder("gpt2")), [edit], tmp_path / "exact", rank=8)
    assert "errors" not in json.loads((exact / "mechedit.json").read_text())


@pytest.mark.parametrize("limit", [100, 5_000, 60_000, 200_000])
def test_a_full_disk_leaves_nothing_of_an_export(limit, model, folder, tmp_path, monkeypatch):
    """Whichever file the disk has no room for. A limit on files' sizes stands for the disk's."""
    edit = hand_made.edit_of(model, hand_made.rank_one(model))
    (tmp_path / "there").mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in (export.checkpoint, export.adapter):
        if write is export.adapter and limit > 100:
            continue
        for place in ("new/below", "there", "new/../there"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            try:
                with pytest.raises(WriteError, match="Nothing is left of it") as found:
                    write(model, str(folder("gpt2")), [edit], tmp_path / place)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert len(str(found.value).splitlines()) == 1
            assert [each.name for each in tmp_path.rglob("*")] == ["there"]


def test_an_export_goes_into_an_empty_folder_that_stays_the_same_one(model, folder, tmp_path, monkeypatch):
    edit = hand_made.edit_of(model, hand_made.rank_one(model))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    number = (tmp_path / "real").stat().st_ino
    monkeypatch.chdir(tmp_path / "real")
    export.adapter(model, str(folder("gpt2")), [edit], ".")
    assert sorted(each.name for each in (tmp_path / "link").iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "mechedit.json"]  # fmt: skip
    assert (tmp_path / "real").stat().st_ino == number
    for each in (tmp_path / "real").iterdir():
        each.unlink()
    export.adapter(model, str(folder("gpt2")), [edit], tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(EditError, match="is no folder"):
        export.adapter(model, str(folder("gpt2")), [edit], tmp_path / "file")
