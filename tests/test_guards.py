from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mechedit import applying, editing, edits, guards, models, moments, prompts, rank_one, scoring
from mechedit.editors import rome
from mechedit.edits import EditError
from mechedit.settings import MomentSettings, RomeSettings
from tests.conftest import assert_same_state, state, widen_bands

QUICK = RomeSettings(layer=1, steps=8, prefixes=((3, 2), (5, 1)))


@pytest.fixture(autouse=True)
def wide_band(monkeypatch):
    """Random models need changes larger than any trained one; the band itself has a test of its own."""
    widen_bands(monkeypatch)


@pytest.fixture
def moment(model):
    return moments.estimate(model, 1, settings=MomentSettings(tokens=600, context=32))


@pytest.mark.parametrize("name", list(rome.Rome.bands))
def test_a_number_out_of_its_band_is_refused_warned_of_or_rolled_back_with_the_reason(
    name, model, fact, moment, monkeypatch
):
    bands = guards.BANDS if name in guards.BANDS else rome.BANDS
    monkeypatch.setitem(bands, name, (1e20, 1e21, "do something else"))
    reason = f"{name} = .* is below 1e\\+20: do something else"
    with pytest.raises(EditError, match=f"block 1 by rome is out of its bands: {reason}"):
        rome.edit(model, fact, QUICK, moment)
    with pytest.warns(editing.EditWarning, match=reason):
        warned = rome.edit(model, fact, replace(QUICK, guard="warn"), moment)
    assert len(warned.changes) == 1
    rolled = rome.edit(model, fact, replace(QUICK, guard="rollback"), moment)
    assert rolled.changes == ()
    assert rolled.after == rolled.before
    assert rolled.layer == 1
    (found,) = rolled.reasons
    assert found == warned.reasons[0]


def test_an_edit_that_was_rolled_back_can_be_kept_and_changes_nothing(model, fact, moment, monkeypatch, tmp_path):
    monkeypatch.setitem(guards.BANDS, "relative_norm", (0.0, 1e-9, "nothing"))
    rolled = rome.edit(model, fact, replace(QUICK, guard="rollback"), moment)
    loaded = edits.load(edits.save(rolled, tmp_path / "edit.safetensors"))
    assert loaded.reasons == rolled.reasons
    before = state(model)
    with applying.edited(model, loaded):
        assert_same_state(model, before)
    applying.apply(model, loaded).undo()


def test_drift_is_the_divergence_of_what_follows_and_the_ratio_of_perplexities(model, fact):
    healthy = guards.measure(model, [fact.subject])
    assert guards.drift(healthy, healthy) == {"essence_kl": pytest.approx(0, abs=1e-6), "perplexity_ratio": 1.0}
    with rank_one.edited(model, rank_one.RankOneEdit(1, torch.ones(128) * 0.1, torch.randn(32))):
        harmed = guards.measure(model, [fact.subject])
        ids, _ = prompts.encode(model, f"{fact.subject} is a", prepend_bos=True)
        with torch.no_grad():
            p = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
    expected = float((p.exp() * (p - healthy.essence[fact.subject])).sum())
    assert guards.drift(healthy, harmed)["essence_kl"] == pytest.approx(expected, rel=1e-3)
    assert guards.drift(healthy, harmed)["perplexity_ratio"] != 1.0
    assert guards.reasons({name: float("nan") for name in guards.BANDS})[0].startswith(
        "relative_norm = nan is no number"
    )


def test_perplexity_is_that_of_every_token_given_those_before(model):
    text = "The Space Needle is located in the city of Seattle."
    ids, _ = prompts.encode(model, text, prepend_bos=True)
    with torch.no_grad():
        log_p = model(torch.tensor([ids]))[0].log_softmax(-1)
    expected = sum(float(log_p[at, token]) for at, token in enumerate(ids[1:])) / (len(ids) - 1)
    assert scoring.mean_log_p(model, text, prepend_bos=True) == pytest.approx(expected, rel=1e-4)


def test_the_bands_of_every_editor_and_those_of_rome():
    assert set(guards.BANDS) == {"relative_norm", "essence_kl", "perplexity_ratio"}
    assert set(rome.Rome.bands) == {*guards.BANDS, "cond_C", "divisor_share"}


def test_of_several_subjects_the_largest_divergence_counts_and_no_number_hides(model):
    flat, nan = torch.full((4,), 0.25), torch.full((4,), float("nan"))
    tilted, steep = torch.tensor([0.4, 0.2, 0.2, 0.2]), torch.tensor([0.7, 0.1, 0.1, 0.1])
    health = lambda *p: guards.Health({str(index): each.log() for index, each in enumerate(p)}, (-2.0,))  # noqa: E731
    expected = float((steep * (steep / flat).log()).sum())
    found = guards.drift(health(flat, flat, flat), health(tilted, steep, flat))
    assert found["essence_kl"] == pytest.approx(expected, rel=1e-5)
    spoilt = guards.drift(health(flat, flat), health(steep, nan))["essence_kl"]
    assert spoilt != spoilt, "nan"
    assert guards.reasons({"essence_kl": spoilt}, {"essence_kl": guards.BANDS["essence_kl"]})


def test_of_many_subjects_the_first_sixteen_are_looked_at(model):
    subjects = [f"{first} {second}" for first in ("Rome", "London", "Berlin", "Paris") for second in "ABCDE"]
    found = guards.measure(model, subjects)
    assert list(found.essence) == subjects[:16]
    torch.testing.assert_close(found.essence["Berlin B"], guards.measure(model, ["Berlin B"]).essence["Berlin B"])


@pytest.fixture
def counted(monkeypatch):
    """What the guards measured: calls by what they were of."""
    calls = {"text": 0, "essence": 0}
    text, essence = guards._text, guards._essence

    def counting(name, real):
        def call(*args):
            calls[name] += 1
            return real(*args)

        return call

    monkeypatch.setattr(guards, "_text", counting("text", text))
    monkeypatch.setattr(guards, "_essence", counting("essence", essence))
    return calls


def test_the_unedited_model_is_measured_once_a_model(model, fact, moment, counted):
    models.forget(model)
    rome.edit(model, fact, QUICK, moment)
    assert counted == {"text": 2, "essence": 2}
    again = rome.edit(model, fact, QUICK, moment)
    assert counted == {"text": 3, "essence": 3}, "after the edit alone"
    rome.edit(model, replace(fact, subject="Rome"), QUICK, moment)
    assert counted == {"text": 4, "essence": 5}, "another subject's essence"
    with applying.edited(model, again):
        rome.edit(model, replace(fact, subject="Rome"), QUICK, moment)
        assert counted == {"text": 6, "essence": 7}, "the edited model is another"
    rome.edit(model, fact, QUICK, moment)
    assert counted == {"text": 7, "essence": 8}


def test_what_is_kept_of_the_unedited_model_is_of_the_model_as_it_is(model, fact, moment):
    first = guards.of_unedited(model, [fact.subject])
    edit = rome.edit(model, fact, QUICK, moment)
    with applying.edited(model, edit):
        kept, measured = (look(model, [fact.subject]) for look in (guards.of_unedited, guards.measure))
        assert kept.text == measured.text != first.text
        assert torch.equal(kept.essence[fact.subject], measured.essence[fact.subject])
    assert guards.of_unedited(model, [fact.subject]).text == first.text == guards.measure(model, [fact.subject]).text


def test_with_a_hook_on_the_model_it_is_measured_each_time(model, fact, counted):
    with model.hooks(fwd_hooks=[("blocks.3.hook_resid_post", lambda resid, hook: resid * 0.5)]):
        for _ in range(2):
            guards.of_unedited(model, [fact.subject])
    assert counted == {"text": 2, "essence": 2}
