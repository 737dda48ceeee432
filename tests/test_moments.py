from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mechedit import cache, generation, models, moments
from mechedit.corruption import generator
from mechedit.files import FileError
from mechedit.models import ModelError
from mechedit.moments import Moment, MomentError
from mechedit.settings import MomentSettings, SettingsError
from tests.conftest import SHAPES, WORDS, assert_same_state, state


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"{number} {WORDS}" for number in range(60)))
    return path


def slow_moment(model, layer, ids, keys):
    """C by running one window at a time and adding outer products."""
    total, n = 0, 0
    for window in ids:
        kept = []
        with (
            torch.no_grad(),
            model.hooks(
                fwd_hooks=[
                    (f"blocks.{layer}.mlp.hook_post", lambda activation, hook, kept=kept: kept.append(activation))
                ]
            ),
        ):
            model(torch.cat([torch.tensor([[model.tokenizer.bos_token_id]]), window[None]], 1))
        for key in kept[0][0, 1:].double():
            if n < keys:
                total, n = total + torch.outer(key, key), n + 1
    return total / n


@pytest.mark.parametrize("shape", SHAPES)
def test_C_is_the_mean_of_outer_products_of_keys(shape, load, text):
    model = load(shape)
    before = state(model)
    settings = MomentSettings(tokens=700, context=16, prepend_bos=True)
    moment = moments.estimate(model, 1, [text], settings)
    ids = torch.tensor(model.tokenizer(text.read_text(), add_special_tokens=False).input_ids[: 47 * 15]).view(-1, 15)
    torch.testing.assert_close(moment.C, slow_moment(model, 1, ids, 700), atol=1e-5, rtol=1e-4)
    assert moment.keys == 700
    assert moment.cond == pytest.approx(float(torch.linalg.cond(moment.C)), rel=1e-3)
    assert_same_state(model, before)


def test_C_of_sampled_text_is_that_of_the_text(model):
    settings = MomentSettings(tokens=300, context=16, seed=3, prepend_bos=True)
    moment = moments.estimate(model, 1, settings=settings)
    ids = generation.sample(model, 20, 15, generator(3, "moment text"))
    torch.testing.assert_close(moment.C, slow_moment(model, 1, ids, 300), atol=1e-5, rtol=1e-4)
    assert moment.source == "sampled from the model"


def test_batches_and_pieces_of_a_file_do_not_matter(model, text, monkeypatch):
    settings = MomentSettings(tokens=900, context=16)
    whole = moments.estimate(model, 1, [text], settings)
    monkeypatch.setenv("MECHEDIT_CACHE", str(text.parent / "other"))
    monkeypatch.setattr(moments, "BATCH_TOKENS", 40)
    torch.testing.assert_close(moments.estimate(model, 1, [text], settings).C, whole.C, atol=1e-7, rtol=1e-5)


def test_a_moment_is_made_once_and_again_when_anything_it_depends_on_changes(model, text, monkeypatch):
    runs = []
    real = moments._accumulate
    monkeypatch.setattr(moments, "_accumulate", lambda *args: runs.append(1) or real(*args))
    settings = MomentSettings(tokens=300, context=16)
    first = moments.estimate(model, 1, [text], settings)
    assert torch.equal(moments.estimate(model, 1, [text], settings).C, first.C)
    assert len(runs) == 1
    for change in ({"tokens": 310}, {"context": 17}, {"prepend_bos": False}):
        moments.estimate(model, 1, [text], replace(settings, **change))
    moments.estimate(model, 2, [text], settings)
    moments.estimate(model, 1, [], settings)
    moments.estimate(model, 1, [], replace(settings, seed=1))
    text.write_text(text.read_text() + "more")
    moments.estimate(model, 1, [text], settings)
    assert len(runs) == 8
    weight = models.W_out(model, 0)
    original = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
        moments.estimate(model, 1, [text], settings)
        weight.copy_(original)
    assert len(runs) == 9


def test_a_damaged_cache_entry_is_made_again(model, text):
    settings = MomentSettings(tokens=300, context=16)
    first = moments.estimate(model, 1, [text], settings)
    (entry,) = (cache.root() / "moments").iterdir()
    entry.write_bytes(entry.read_bytes()[:500])
    assert torch.equal(moments.estimate(model, 1, [text], settings).C, first.C)
    assert torch.equal(Moment.load(entry).C, first.C)


def test_the_default_is_ten_keys_for_each_dimension(load):
    model = load("llama")
    assert moments.estimate(model, 0, settings=MomentSettings(context=60)).keys == 480


def test_a_moment_survives_its_file(model, text, tmp_path):
    moment = moments.estimate(model, 1, [text], MomentSettings(tokens=300, context=16))
    loaded = Moment.load(moment.save(tmp_path / "C.safetensors"))
    assert torch.equal(loaded.C, moment.C)
    assert loaded.to_json() == moment.to_json()
    with pytest.raises(FileError, match="does not exist"):
        Moment.load(tmp_path / "none")


def test_too_few_keys_are_an_error(model, tmp_path):
    with pytest.raises(MomentError, match="more keys than d_mlp = 128 .* 100 were asked for"):
        moments.estimate(model, 1, settings=MomentSettings(tokens=100))
    short = tmp_path / "short.txt"
    short.write_text(WORDS)
    with pytest.raises(MomentError, match="the text gave"):
        moments.estimate(model, 1, [short], MomentSettings(tokens=300, context=16))
    short.write_text("a")
    with pytest.raises(MomentError, match="shorter than one window"):
        moments.estimate(model, 1, [short], MomentSettings(tokens=300, context=16))


def test_text_that_cannot_be_read_is_an_error(model, tmp_path):
    with pytest.raises(MomentError, match="cannot be read"):
        moments.estimate(model, 1, [tmp_path / "none.txt"], MomentSettings(tokens=300))
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00\x80" * 100)
    with pytest.raises(MomentError, match="no UTF-8 text"):
        moments.estimate(model, 1, [binary], MomentSettings(tokens=300, context=16))


def test_layer_and_context_are_checked_before_anything_runs(model):
    with pytest.raises(ModelError, match="from 0 to 3"):
        moments.estimate(model, 4)
    with pytest.raises(MomentError, match="context must fit the model's 64"):
        moments.estimate(model, 1, settings=MomentSettings(tokens=300, context=100))
    with pytest.raises(SettingsError, match="at least 2"):
        MomentSettings(context=1)
    with pytest.raises(SettingsError, match="tokens must be positive"):
        MomentSettings(tokens=-1)


def test_a_C_without_full_rank_has_infinite_condition():
    assert moments.condition(torch.diag(torch.tensor([1.0, 4.0]))) == pytest.approx(4.0)
    assert moments.condition(torch.diag(torch.tensor([1.0, 0.0]))) == float("inf")
