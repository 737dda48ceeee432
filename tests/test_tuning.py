from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mechedit import applying, editing, tuning
from mechedit.benchmarks.metrics import harmonic
from mechedit.editors.fine_tuning import FineTuning
from mechedit.facts import FactError
from mechedit.runs import units
from mechedit.settings import PRESETS, FineTuningSettings, RomeSettings, SettingsError, TuneSettings
from tests.conftest import FACT, widen_bands

pytestmark = pytest.mark.anywhere

BASE = RomeSettings(steps=2, prefixes=(), prepend_bos=False)
SMALL = TuneSettings(traced=2, edited=2, seed=3, around=1, grid=(("clamp", (1.0, 6.0)),), draws=2)


@pytest.fixture
def known(model, monkeypatch):
    """Facts that count as known, with everything that scoring needs."""
    widen_bands(monkeypatch)
    monkeypatch.setattr(tuning.runs, "known", lambda model, facts, **options: list(facts))
    return [replace(FACT, target_new=new) for new in ("Paris", "Rome", "London", "Apple")]


@pytest.mark.both
def test_every_combination_around_the_traced_layer_is_tried_and_the_best_is_proposed(model, known, tmp_path):
    found = tuning.tune(model, known, tmp_path, SMALL, "rome", BASE)
    tried = [(row.layer, row.tried["clamp"]) for row in found.rows]
    around = [layer for layer in range(found.site.layer - 1, found.site.layer + 2) if 0 <= layer < 4]
    assert tried == [(layer, clamp) for layer in around for clamp in (1.0, 6.0)]
    (best,) = [
        row for row in found.rows if (row.layer, row.tried["clamp"]) == (found.settings.layer, found.settings.clamp)
    ]
    assert all(best.S > row.S or (best.S == row.S and best.relative_norm <= row.relative_norm) for row in found.rows)
    assert found.settings.guard == "refuse", "only what is tried goes unguarded"
    described = json.loads((tmp_path / "traces" / "run.json").read_text())["settings"]
    assert (described["seed"], described["prepend_bos"]) == (3, False)
    assert found.settings.steps == 2
    for row in found.rows:
        assert row.n == 2
        assert pytest.approx(harmonic(row.ES, row.PS, row.NS)) == row.S
    json.dumps(found.to_json())


def test_what_is_out_of_its_bands_more_than_now_and_then_is_not_proposed_however_well_it_scores(model, known, tmp_path, monkeypatch):  # fmt: skip
    plain = tuning._row

    def row(model, facts, found, bos, tried):
        numbers = {1.0: {"S": 60.0, "within": 0.9}, 6.0: {"S": 90.0, "within": 0.8}}
        return replace(plain(model, facts, found, bos, tried), **numbers.get(tried.get("clamp"), {}))

    monkeypatch.setattr(tuning, "_row", row)
    assert tuning.tune(model, known, tmp_path, SMALL, "rome", BASE).settings.clamp == 1.0


def test_the_facts_that_are_edited_are_not_those_that_are_traced_and_rates_are_tried_too(model, known, tmp_path):
    rates = replace(SMALL, grid=(("clamp", (1.0,)), ("learning_rate", (0.1, 0.5))), around=0)
    found = tuning.tune(model, known, tmp_path, rates, "rome", BASE)
    assert [row.tried for row in found.rows] == [{"clamp": 1.0, "learning_rate": rate} for rate in (0.1, 0.5)]
    edited = {*units.names(next(tmp_path.glob("layer*-learning_rate0.1")))}
    assert len(edited) == 2
    assert not edited & {*units.names(tmp_path / "traces")}


@pytest.mark.parametrize(
    ("unedited", "edited", "worked"),
    [
        ((0.0, 0.2, 1.0), (1.0, 0.5, 1.0), True),
        ((0.5, 0.5, 0.9), (0.5, 0.6, 0.9), False),  # as many succeed as did before
        ((0.0, 0.2, 1.0), (0.0, 0.2, 1.0), False),
        ((0.0, 0.2, 1.0), (1.0, 0.5, 0.0), False),  # and no neighbour is left
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), False),  # there was nothing to win
    ],
)
def test_nothing_is_proposed_where_edits_win_nothing_over_the_unedited_model(
    unedited, edited, worked, model, known, tmp_path, monkeypatch
):
    def scores(model, facts, **named):
        now = edited if any(each.sums for each in applying.kept(model).applied) else unedited
        return [dict(zip(("ES", "PS", "NS"), now, strict=True))]

    monkeypatch.setattr(tuning.counterfact, "scores", scores)
    found = tuning.tune(model, known, tmp_path, SMALL, "rome", BASE)
    first = found.unedited
    assert pytest.approx([100 * each for each in unedited]) == [first.ES, first.PS, first.NS]
    assert (first.relative_norm, first.perplexity_ratio, first.n) == (0.0, 1.0, 2)
    assert found.worked == worked
    assert (found.to_json()["settings"] is not None) == worked


def test_what_was_tuned_is_kept(model, known, tmp_path, monkeypatch):
    first = tuning.tune(model, known, tmp_path, SMALL, "rome", BASE)
    monkeypatch.setattr(editing, "edit", lambda *args, **kwargs: pytest.fail("an edit was found again"))
    assert tuning.tune(model, known, tmp_path, SMALL, "rome", BASE).rows == first.rows


def test_facts_that_cannot_be_tuned_on_are_an_error(model, known, tmp_path, monkeypatch):
    with pytest.raises(FactError, match="edits 2 facts .* apart from the 2 that are traced; there are 0"):
        tuning.tune(model, [replace(fact, neighbours=()) for fact in known], tmp_path, SMALL, "rome", BASE)
    monkeypatch.undo()
    with pytest.raises(FactError, match="knows 0 of these 4. Give more facts, or others"):
        tuning.tune(model, [replace(fact, target_true="zebra") for fact in known], tmp_path, SMALL, "rome", BASE)
    for wrong in ({"grid": (("clamp", ()),)}, {"edited": 0}, {"traced": 1}, {"around": -1}):
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            TuneSettings(**wrong)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((("norm_bound", (1e-3,)),), "the editor rome has no option norm_bound to try; it has .*clamp"),
        ((("layer", (1,)),), "has no option layer"),
        ((("learning_rate", (0.5, 0.0)),), "learning_rate must be positive"),
    ],
)
def test_options_that_cannot_be_tried_are_refused_before_anything_is_traced(grid, message, model, known, tmp_path):
    with pytest.raises(SettingsError, match=message):
        tuning.tune(model, known, tmp_path, replace(SMALL, grid=grid), "rome", BASE)
    assert not list(tmp_path.iterdir())


def test_another_editor_is_tuned_with_its_own_options(model, known, tmp_path):
    base = FineTuningSettings(steps=3, prepend_bos=False)
    found = tuning.tune(model, known, tmp_path, replace(SMALL, grid=(), around=0), "ft", base)
    tried = [{"learning_rate": rate} for rate in FineTuning.grid["learning_rate"]]
    assert [row.tried for row in found.rows] == tried
    assert found.editor == "ft"
    best = max(found.rows, key=lambda row: (row.within >= 0.9, round(row.S, 6), -row.relative_norm))
    assert found.settings == replace(base, layer=found.site.layer, **best.tried)
    changes = [row.relative_norm for row in found.rows]
    assert changes == sorted(changes), "the faster, the further"
    assert changes[0] < changes[-1]


def test_gemmas_preset_is_the_one_that_the_sweep_proposed():
    found = json.loads((Path(__file__).parents[1] / "figures" / "gemma-3-270m" / "tuned.json").read_text())
    preset = PRESETS["gemma-3-270m"].rome
    assert (found["settings"]["layer"], found["settings"]["clamp"]) == (preset.layer, preset.clamp)
    best = max(found["rows"], key=lambda row: (row["within"], row["S"]))
    assert (best["layer"], best["clamp"], best["n"]) == (preset.layer, preset.clamp, 20)
