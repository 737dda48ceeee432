"""Steps after the solve: each as its paper has it, on the change that the same edit has without it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mechedit import applying, editing, models, moments, weights
from mechedit.changes import total
from mechedit.editors import named
from mechedit.editors.many import prepare
from mechedit.editors.rome import Prepared
from mechedit.settings import (  # fmt: skip
    AlphaEditSettings,
    EmmetSettings,
    MemitSettings,
    MomentSettings,
    PmetSettings,
    SequentialSettings,
    SettingsError,
)
from mechedit.weights import Weight
from tests.conftest import widen_bands
from tests.test_contract import FACTS

LAYER = 1
QUICK = {"layer": LAYER, "steps": 3, "prefixes": (), "prepend_bos": False, "guard": "warn", "least_met": 0.0}
EVERY = {
    "memit": MemitSettings(**QUICK, a=1e-3),
    "emmet": EmmetSettings(**QUICK),
    "alphaedit": AlphaEditSettings(**QUICK, c=0.1, null=1e9),
    "pmet": PmetSettings(**QUICK, a=1e-3),
    "sequential": SequentialSettings(**QUICK, a=1e-3),
}


@pytest.fixture
def prepared(model, monkeypatch):
    widen_bands(monkeypatch)
    return prepared_of(model)


def change_of(model, name, settings, prepared, facts=FACTS):
    edit = editing.edit(model, facts, named(name), settings, prepared=prepared)
    return total(edit.changes).numpy(), edit


def W(model):
    return models.W_out(model, LAYER).detach().double().numpy().copy()


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def pruned(change, first, base):
    """PRUNE, of a whole change."""
    U, s, V = np.linalg.svd(change, full_matrices=False)
    m = np.linalg.norm(first, 2)
    return (U * [each if each <= m else np.log(each) / np.log(base) - np.log(m) / np.log(base) + m for each in s]) @ V


@pytest.mark.parametrize("name", EVERY)
def test_each_step_is_its_formula_with_every_editor(name, model, prepared):
    settings, now = EVERY[name], W(model)
    plain, edit = change_of(model, name, settings, prepared)
    assert "shaped" not in edit.details
    sparse, edit = change_of(model, name, replace(settings, entries=0.4), prepared)
    order = np.argsort(-np.abs(plain / now), axis=None)[: round(0.4 * plain.size)]
    expected = np.zeros(plain.size)
    expected[order] = plain.flatten()[order]
    close(sparse, expected.reshape(plain.shape))
    assert edit.details["shaped"] == [{"layer": LAYER, "entries": pytest.approx(0.4, abs=1e-3)}]
    length = np.linalg.norm(plain) / np.linalg.norm(now)
    short, edit = change_of(model, name, replace(settings, longest=0.3 * length), prepared)
    close(short, 0.3 * plain)
    assert edit.details["shaped"] == [{"layer": LAYER, "length": pytest.approx(0.3)}]
    assert edit.changes[0].factors() is not None
    whole, edit = change_of(model, name, replace(settings, longest=1.1 * length), prepared)
    close(whole, plain)
    assert edit.details["shaped"] == [{"layer": LAYER, "length": 1.0}]


def test_the_spectrum_is_that_of_all_change_since_the_weight_was_unedited(model, prepared):
    on = EmmetSettings(**QUICK, spectrum_base=1.2)
    off = replace(on, spectrum_base=0.0)
    with weights.restored(model, Weight(LAYER, "mlp.W_out")):
        with torch.no_grad():
            models.W_out(model, LAYER).mul_(0.02)  # small beside what the edits add
        first, ready = W(model), prepared_of(model)
        plain, _ = change_of(model, "emmet", off, ready, FACTS[:2])
        found, edit = change_of(model, "emmet", on, ready, FACTS[:2])
        close(found, pruned(plain, first, 1.2))
        above = int((np.linalg.svd(plain, compute_uv=False) > np.linalg.norm(first, 2)).sum())
        assert edit.details["shaped"] == [{"layer": LAYER, "lowered": float(above)}]
        assert above > 0
        assert np.abs(found - plain).max() > 0.1 * np.abs(plain).max()
        standing = applying.apply(model, edit)
        since = W(model) - first
        plain, _ = change_of(model, "emmet", off, ready, FACTS[2:])
        found, _ = change_of(model, "emmet", on, ready, FACTS[2:])
        close(found, pruned(since + plain, first, 1.2) - since)
        standing.undo()


def prepared_of(model):
    windows = MomentSettings(tokens=600, context=32, prepend_bos=False)
    moment = moments.estimate(model, LAYER, settings=windows)
    return Prepared(moment, ("",), moment, moments.fisher(model, LAYER, settings=windows))


def test_what_is_met_is_of_the_change_that_is_written_and_several_blocks_are_shaped_each(model, prepared):
    settings = EmmetSettings(**QUICK, longest=1e-3)
    found, edit = change_of(model, "emmet", settings, prepared, FACTS[:1])
    key, value = (edit.vectors[name].double().numpy() for name in ("k*", "v*"))
    wanted = value - (key @ W(model) + models.b_out(model, LAYER).detach().double().numpy())
    assert edit.report["met"] == pytest.approx(float((key @ found) @ wanted / (wanted @ wanted)))
    assert edit.report["met"] < 0.5
    several = MemitSettings(**QUICK | {"layer": -1}, layers=(0, 1), a=1e-3, entries=0.2)
    resolved = named("memit").resolve(model, several)
    both = editing.edit(model, FACTS, named("memit"), resolved, prepared=prepare(model, resolved, prefixes=("",)))
    assert [each["layer"] for each in both.details["shaped"]] == [0, 1]
    for change in both.changes:
        assert float((change.dense() != 0).double().mean()) == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "settings", "advice"),
    [
        ("memit", MemitSettings(**QUICK | {"least_met": 0.5}, a=1e9), r"lower a, the weight of C, from 1e\+09"),
        ("alphaedit", AlphaEditSettings(**QUICK | {"least_met": 0.5}, c=1e9, null=1e9), r"lower c from 1e\+09, or raise null \(1 of"),
        ("emmet", EmmetSettings(**QUICK | {"least_met": 0.5}, longest=1e-6), "take steps after the solve back"),
        ("sequential", SequentialSettings(**QUICK | {"least_met": 0.5, "fisher": 0.01, "weight_decay": 0.0}, loose=5.0), "lower loose, the slack, from 5"),
    ],
)  # fmt: skip
def test_an_edit_that_writes_little_of_what_is_wanted_says_so_and_what_to_lower(
    model, prepared, name, settings, advice
):
    with pytest.warns(
        editing.EditWarning, match=rf"{name}: the edit writes .* \(met\), less than least_met = 0.5: {advice}"
    ):
        edit = editing.edit(model, FACTS[:1], named(name), settings, prepared=prepared)
    assert edit.report["met"] < 0.5
    assert edit.notes[0] == edit.details["unmet"]
    assert "\n" not in edit.details["unmet"]
    _, edit = change_of(model, "emmet", EmmetSettings(**QUICK | {"least_met": 0.5}), prepared, FACTS[:1])
    assert "unmet" not in edit.details, "the control: and no warning"


@pytest.mark.anywhere
@pytest.mark.parametrize("wrong", [{"entries": 0.0}, {"entries": 1.1}, {"spectrum_base": 1.0}, {"longest": -1.0}, {"least_met": 2.0}])  # fmt: skip
def test_steps_that_cannot_be_are_refused(wrong):
    with pytest.raises(SettingsError, match=f"{next(iter(wrong))} must be"):
        MemitSettings(**wrong)
