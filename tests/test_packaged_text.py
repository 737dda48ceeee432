from __future__ import annotations

import pytest
import torch

from mechedit import moments
from mechedit.moments import corpus, packaged
from mechedit.settings import MomentSettings
from mechedit.weights import Weight, restored, value

SIZE, SEED = (3, 7), (0, corpus.PURPOSE, "0")


@pytest.fixture
def shipped(model, tmp_path, monkeypatch):
    """A text that says it is of the tiny model, and is not what sampling gives."""
    batch = torch.arange(21).view(SIZE) + 5
    path = packaged.write(model, {"0": batch}, 0, corpus.PURPOSE, tmp_path / "new" / "text.safetensors")
    monkeypatch.setattr(packaged, "PLACE", path)
    return batch


def test_C_of_the_model_that_wrote_it_is_made_from_the_text_that_ships(model, monkeypatch, tmp_path):
    settings = MomentSettings(tokens=250, context=8)
    sampled = moments.estimate(model, 1, settings=settings)
    batches = {str(i): tokens()[:, 1:] for i, (_, tokens) in enumerate(corpus.batches(model, (), moments.estimation.resolved(model, [1], settings), lambda *_: None))}  # fmt: skip
    monkeypatch.setattr(
        packaged, "PLACE", packaged.write(model, batches, 0, corpus.PURPOSE, tmp_path / "t.safetensors")
    )
    monkeypatch.setenv("MECHEDIT_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(corpus, "sample", lambda *_, **__: pytest.fail("text was sampled"))
    torch.testing.assert_close(moments.estimate(model, 1, settings=settings).C, sampled.C, atol=0, rtol=0)


def test_a_batch_is_given_for_its_own_seed_and_size_alone(model, shipped):
    assert torch.equal(packaged.read(model, *SIZE, SEED), shipped)
    assert packaged.read(model, *SIZE, (1, corpus.PURPOSE, "0")) is None
    assert packaged.read(model, *SIZE, (0, "prefixes", "0")) is None
    assert packaged.read(model, *SIZE, (0, corpus.PURPOSE, "1")) is None
    assert packaged.read(model, 3, 6, SEED) is None


@pytest.mark.usefixtures("shipped")
def test_another_model_samples_its_own(model):
    weight = Weight(3, "mlp.W_in")
    with restored(model, weight):
        with torch.no_grad():
            value(model, weight)[0, 0] += 1
        assert packaged.read(model, *SIZE, SEED) is None
