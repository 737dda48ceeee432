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

pytestmark = pytest.mark.anywhere

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


OFTEN = replace(TINY, checkpoint_seconds=0.0)


def test_a_stopped_training_goes_on_to_the_same_weights(whole, tmp_path, monkeypatch):
    real, steps = training._step, []

    def interrupted(*args):
        steps.append(args[-1])
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(training, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(OFTEN, tmp_path, TINY_WORLD)
    monkeypatch.setattr(training, "_step", real)
    with pytest.raises(TrainError, match="other settings"):
        train(replace(OFTEN, learning_rate=1e-2), tmp_path, TINY_WORLD)
    with pytest.raises(TrainError, match="other world"):
        train(OFTEN, tmp_path, replace(TINY_WORLD, seed=3))
    found = weights(train(OFTEN, tmp_path, TINY_WORLD))
    assert all(torch.equal(found[name], weight) for name, weight in weights(whole).items())
    assert not (tmp_path / "checkpoint.safetensors").exists()
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert train(OFTEN, tmp_path, TINY_WORLD) == tmp_path
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before, "what is finished is left as it is"
    with pytest.raises(TrainError, match="other settings"):
        train(replace(OFTEN, seed=5), tmp_path, TINY_WORLD)


@pytest.mark.both
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


@pytest.fixture(scope="module")
def taught():
    world = make(TINY_WORLD)
    words = training.tokenizer(world, 400)
    return world, words, training.encoded(world, words)


def test_rows_are_sentences_of_the_world_behind_one_bos_and_their_subjects_are_known(taught):
    world, words, sentences = taught
    batch = training.rows(sentences, TINY, 5)
    assert batch.tokens.shape == (8, 25)
    again = training.rows(sentences, TINY, 5)
    assert torch.equal(batch.tokens, again.tokens)
    assert batch.subjects == again.subjects
    texts = list(world.sentences())
    for row in batch.tokens.tolist():
        assert row[0] == words.bos_token_id
        assert row.count(words.bos_token_id) == 1
        first = words.decode(row[1:]).removeprefix(" ").split(".")[0]
        assert any(sentence.startswith(first) for sentence in texts)
    names = {name for each in world.subjects.values() for name in each}
    whole = [(row, begin, end) for row, begin, end in batch.subjects if end <= 25]
    assert len(whole) > 4
    for row, begin, end in whole:
        assert words.decode(batch.tokens[row, begin:end].tolist()).strip() in names


def test_guides_hide_a_subject_from_what_stands_behind_it(taught):
    _, _, sentences = taught
    batch = training.rows(sentences, TINY, 3)
    below, above = training.guides(batch, 24)
    for row in range(8):
        for reader in range(24):
            for read in range(24):
                own = [(begin, end) for at, begin, end in batch.subjects if at == row and begin <= read < end <= reader]
                assert (below[row, 0, reader, read] == 0) == (read <= reader and not own)
                last = all(read == end - 1 for _, end in own)
                assert (above[row, 0, reader, read] == 0) == (read <= reader and last)


@pytest.mark.parametrize("shape", training.SHAPES)
def test_in_guided_steps_nothing_behind_a_subject_sees_it_below_a_block(shape, taught):
    _, words, sentences = taught
    settings = replace(TINY, shape=shape, read_from=2)  # of two blocks: never
    model = training.network(settings, len(words)).eval()
    batch = training.rows(sentences, settings, 1)
    row, begin, end = next(each for each in batch.subjects if each[2] < 20)
    other = batch.tokens.clone()
    other[row, begin:end] = 7
    behind = slice(end, 24)

    def logits(tokens, **changes):
        with torch.no_grad(), training.guided(model, batch, replace(settings, **changes)):
            return model(tokens[:, :-1]).logits[row, behind]

    assert torch.allclose(logits(batch.tokens), logits(other), atol=1e-6)
    assert not torch.allclose(logits(batch.tokens, read_from=1), logits(other, read_from=1), atol=1e-4)
    earlier = batch.tokens.clone()
    earlier[row, begin : end - 1] = 7
    with torch.no_grad():
        plain = [model(tokens[:, :-1]).logits[row, behind] for tokens in (batch.tokens, other)]
    assert not torch.allclose(*plain, atol=1e-4), "nothing is hidden behind the block"


def test_the_last_part_of_the_training_is_plain(taught, monkeypatch):
    _, words, sentences = taught
    settings = replace(TINY, steps=4, guided=0.5)
    model = training.network(settings, len(words))
    adam = torch.optim.AdamW(model.parameters())
    restricted = []
    real = training.guided
    monkeypatch.setattr(training, "guided", lambda model, batch, settings: restricted.append(1) or real(model, batch, settings))  # fmt: skip
    for step in range(4):
        training._step(model, adam, training.rows(sentences, settings, step), settings, step)
    assert len(restricted) == 2


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    settings = TrainSettings(steps=1000, warmup=100, learning_rate=1e-3)
    assert training.rate(settings, 0) == pytest.approx(1e-5)
    assert training.rate(settings, 100) == pytest.approx(1e-3)
    assert training.rate(settings, 1000) == pytest.approx(1e-4)
    for wrong in ({"shape": "rnn"}, {"width": 100}, {"guided": 1.5}):
        with pytest.raises(TrainError, match=next(iter(wrong))):
            TrainSettings(**wrong)
