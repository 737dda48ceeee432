from __future__ import annotations

import copy
import json
import pickle
from dataclasses import asdict, dataclass, replace

import pytest

from mechedit.cli.choosing import resolved
from mechedit.editors import named
from mechedit.settings import (
    PRESETS,
    EditSettings,
    EvaluateSettings,
    FineTuningSettings,
    MomentSettings,
    Preset,
    RomeSettings,
    SettingsError,
    TraceSettings,
    filled,
    from_json,
    given,
    knob,
)

OWN = RomeSettings(layer=2, clamp=0.75, steps=7, fact_token="last", prefixes=((3, 1),))


def travelled(settings):
    """As a worker gets it."""
    return pickle.loads(pickle.dumps(settings))  # noqa: S301 (our own)


@pytest.fixture
def preset(model, monkeypatch):
    """The tiny model has a preset."""
    found = Preset({"rome": OWN}, {"rome": "a test"}, True, (4, 32, 400))
    monkeypatch.setitem(PRESETS, model.cfg.model_name, found)
    monkeypatch.setattr("mechedit.models.preset", lambda model: found)
    return found


def test_what_was_not_given_is_the_presets_in_python_as_on_the_command_line(model, preset):
    rome = named("rome")
    for fields in ({}, {"seed": 1}, {"clamp": 4.0}, {"steps": 20, "fact_token": "subject_last"}, {"prefixes": ()}):
        expected = {**asdict(OWN), "prepend_bos": True, **fields}
        assert asdict(rome.resolve(model, RomeSettings(**fields))) == expected
        assert asdict(resolved(model, rome, fields)) == expected
    assert asdict(rome.resolve(model)) == {**asdict(OWN), "prepend_bos": True}


def test_a_value_that_is_the_defaults_own_counts_once_it_is_given_however_it_is_given(model, preset):
    rome = named("rome")
    for settings in (
        RomeSettings(clamp=4.0, steps=20),
        replace(RomeSettings(seed=3), clamp=4.0, steps=20),
        replace(replace(RomeSettings(), clamp=4.0, steps=20), layer=1),
    ):
        for same in (settings, travelled(settings), copy.deepcopy(settings)):
            found = rome.resolve(model, same)
            assert (found.clamp, found.steps, found.fact_token) == (4.0, 20, "last")
    for unset in (RomeSettings(), replace(RomeSettings(), seed=1), travelled(RomeSettings())):
        assert rome.resolve(model, unset).clamp == 0.75


def test_what_is_resolved_stays_as_it_is_with_another_preset(model, preset, monkeypatch):
    rome = named("rome")
    once = rome.resolve(model, RomeSettings(seed=1))
    other = Preset({"rome": RomeSettings(layer=1, clamp=9.0, kl=5.0)}, {"rome": "another"}, False, (4, 32, 400))
    monkeypatch.setattr("mechedit.models.preset", lambda model: other)
    assert rome.resolve(model, once) == once
    assert all(type(value).__module__ == "builtins" for value in vars(once).values()), "plain values"
    assert from_json(RomeSettings, json.loads(json.dumps(asdict(once)))) == once


def test_which_fields_were_given_is_known():
    assert given(RomeSettings()) == {}
    assert given(RomeSettings(seed=0, clamp=4.0)) == {"seed": 0, "clamp": 4.0}
    assert given(filled(RomeSettings(), OWN))["clamp"] == 0.75
    assert RomeSettings() == RomeSettings(clamp=4.0), "the same settings where there is no preset"
    assert hash(RomeSettings()) == hash(RomeSettings(clamp=4.0))


def test_settings_of_ones_own_have_more_than_the_preset():
    @dataclass(frozen=True)
    class More(RomeSettings):
        share: float = knob(0.5, "a share")

    assert (filled(More(), OWN).share, filled(More(), OWN).clamp) == (0.5, 0.75)


@pytest.mark.parametrize(
    ("settings", "name", "message"),
    [
        (
            RomeSettings,
            "norm_bound",
            "RomeSettings has no field 'norm_bound'; BoundedSettings and AttentionEditSettings have it",
        ),
        (RomeSettings, "clmap", "did you mean 'clamp'"),
        (FineTuningSettings, "kl", "; RomeSettings has it"),
        (TraceSettings, "sigma", "TraceSettings has no field 'sigma'; it has centre"),
        (MomentSettings, "token", "did you mean 'tokens'"),
        (EvaluateSettings, "modes", "did you mean 'mode'"),
        (EditSettings, "guards", "did you mean 'guard'"),
    ],
)
def test_a_field_that_is_not_there_is_an_error_that_says_whose_it_is(settings, name, message):
    with pytest.raises(SettingsError, match=message):
        settings(**{name: 1})
