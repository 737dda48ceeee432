from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mechedit import models
from mechedit.organism import train as training
from mechedit.organism.train import TrainError, TrainSettings, train
from mechedit.organism.world import WorldSettings, make

TINY_WORLD = WorldSettings(people=60, towns=60, firms=60, tasks=30)
TINY = TrainSettings(
    layers=2, width=32, heads=4, vocabulary=400, context=24, batch=8, steps=6, warmup=2, autocast=False
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(TINY, tmp_path_factory.mktemp("whole"), TINY_WORLD)


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_training_twice_gives_the_same_weights_and_a_lower_loss(whole, tmp_path):
    again = weights(train(TINY, tmp_path / "again", TINY_WORLD))
    assert all(torch.equal(again[name], weight) for name, weight in weights(whole).items())
    record = json.loads((whole / "training.json").read_text())
    assert record["log"][-1]["loss"] < record["log"][0]["loss"]
    assert len(record["log"]) == 6
    assert record["digest"] == make(TINY_WORLD).digest()
    other = weights(train(replace(TINY, seed=1), tmp_path / "other", TINY_WORLD))
    assert not all(torch.equal(other[name], weight) for name, weight in weights(whole).items())


def test_a_stopped_training_goes_on_to_the_same_weights(whole, tmp_path, monkeypatch):
    real, steps = training._step, []

    def interrupted(*args):
        steps.append(args[-1])
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(training, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path, TINY_WORLD)
    monkeypatch.setattr(training, "_step", real)
    with pytest.raises(TrainError, match="other settings"):
        train(replace(TINY, learning_rate=1e-2), tmp_path, TINY_WORLD)
    with pytest.raises(TrainError, match="other world"):
        train(TINY, tmp_path, replace(TINY_WORLD, seed=3))
    found = weights(train(TINY, tmp_path, TINY_WORLD))
    assert all(torch.equal(found[name], weight) for name, weight in weights(whole).items())
    assert not (tmp_path / "checkpoint.safetensors").exists()
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert train(TINY, tmp_path, TINY_WORLD) == tmp_path
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before, "what is finished is left as it is"
    with pytest.raises(TrainError, match="other settings"):
        train(replace(TINY, seed=5), tmp_path, TINY_WORLD)


@pytest.mark.parametrize("shape", training.SHAPES)
def test_every_shape_loads_as_a_hooked_model(shape, tmp_path):
    folder = train(replace(TINY, shape=shape, steps=1), tmp_path / f"a-{shape}", TINY_WORLD)
    model = models.load(str(folder), device="cpu")
    assert models.parity(str(folder), "A text") < models.PARITY
    text = "In Mevom people eat plum cake."
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert model.tokenizer.decode(ids) == " " + text
    assert model.tokenizer(" " + text, add_special_tokens=False)["input_ids"] == ids, "one spelling wherever it stands"
    assert model.to_tokens(text)[0].tolist() == [model.tokenizer.bos_token_id, *ids]


def test_rows_are_sentences_of_the_world_behind_one_bos():
    world = make(TINY_WORLD)
    words = training.tokenizer(world, 400)
    taught = list(world.sentences())
    sentences = words(taught, add_special_tokens=False)["input_ids"]
    batch = training.rows(sentences, TINY, 5)
    assert batch.shape == (8, 25)
    assert torch.equal(batch, training.rows(sentences, TINY, 5))
    for row in batch.tolist():
        assert row[0] == words.bos_token_id
        assert row.count(words.bos_token_id) == 1
        first = words.decode(row[1:]).removeprefix(" ").split(".")[0]
        assert any(sentence.startswith(first) for sentence in taught)


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    settings = TrainSettings(steps=1000, warmup=100, learning_rate=1e-3)
    assert training.rate(settings, 0) == pytest.approx(1e-5)
    assert training.rate(settings, 100) == pytest.approx(1e-3)
    assert training.rate(settings, 1000) == pytest.approx(1e-4)
    for wrong in ({"shape": "rnn"}, {"width": 100}):
        with pytest.raises(TrainError, match=next(iter(wrong))):
            TrainSettings(**wrong)
