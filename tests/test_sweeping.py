from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from mechedit import applying, cli, editing, moments
from mechedit.benchmarks import counterfact
from mechedit.editing import Editor
from mechedit.editors import rome
from mechedit.editors.fine_tuning import FineTuning
from mechedit.facts import FactError
from mechedit.runs import suiting, sweeping
from mechedit.runs.status import by_stage, status
from mechedit.runs.sweeping import Sweep, sweep, sweep_maps
from mechedit.settings import (
    FACT_TOKENS,
    ROLE_TITLES,
    EditSettings,
    FineTuningSettings,
    MomentSettings,
    RomeSettings,
    SettingsError,
    SweepSettings,
    TraceSettings,
)
from mechedit.tracing import trace
from tests.conftest import assert_same_state, state, widen_bands
from tests.three_facts import FACTS

pytestmark = pytest.mark.anywhere

QUICK = RomeSettings(layer=1, steps=2, prefixes=())
SMALL = SweepSettings(
    layers=(0, 2), tokens=("subject_last", "after_first", "subject_first"), window=2, draws=2, tuned=0
)


@pytest.fixture
def few_keys(monkeypatch):
    widen_bands(monkeypatch)
    real, few = moments.estimate_layers, MomentSettings(tokens=600, context=32)
    monkeypatch.setattr(moments, "estimate", lambda model, layer, **named: real(model, [layer], settings=few)[layer])
    monkeypatch.setattr(moments, "estimate_layers", lambda model, layers, **named: real(model, layers, settings=few))


@pytest.mark.both
def test_every_cell_is_the_edit_there_and_its_trace(model, few_keys, tmp_path):
    before = state(model)
    found = sweep(model, FACTS, tmp_path, SMALL, "rome", QUICK)
    assert_same_state(model, before)
    assert found.scores["ES"].shape == (3, 2, 3)
    Cs = moments.estimate_layers(model, [0, 2])
    for row, layer in enumerate((0, 2)):
        edit = rome.edit(
            model, FACTS[1], replace(QUICK, layer=layer, fact_token="after_first", guard="warn"), Cs[layer]
        )
        with applying.edited(model, edit):
            (alone,) = counterfact.scores(model, FACTS[1:2])
        assert [found.scores[name][1, row, 1] for name in ("ES", "PS", "NS")] == [alone[name] for name in ("ES", "PS", "NS")]  # fmt: skip
        own = trace(model, FACTS[1], TraceSettings(kinds=("mlp",), window=2, draws=2))
        at = own.effects["mlp"][layer, own.subject_range[1]] - own.p_corrupted
        assert found.effects[1, row, 1] == pytest.approx(float(at), abs=1e-6)
    assert np.isnan(found.scores["ES"][2, :, 2]).all() == (len(own_subject(model)) == 1)


def own_subject(model):
    from mechedit.prompts import prepare

    begin, end = prepare(model, FACTS[2]).subject
    return range(begin, end)


def test_an_editor_without_a_choice_of_token_is_scored_once_a_layer(model, few_keys, tmp_path):
    tuned = FineTuningSettings(steps=4, learning_rate=5e-3)
    found = sweep(model, FACTS, tmp_path, SMALL, "ft", tuned)
    assert {place.name for place in tmp_path.iterdir()} == {"traces", "layer00", "layer02"}
    edit = editing.edit(model, FACTS[1], FineTuning(), replace(tuned, layer=2, guard="warn"))
    with applying.edited(model, edit):
        (alone,) = counterfact.scores(model, FACTS[1:2])
    for name in ("ES", "PS", "NS"):
        there = ~np.isnan(found.effects)
        assert (np.isnan(found.scores[name]) == ~there).all(), "scores where the trace has an effect"
        assert (found.scores[name][1, 1][there[1, 1]] == alone[name]).all()
    assert found.settings["editor"] == "ft"
    assert found.settings["edit"]["learning_rate"] == 5e-3
    assert "layer" not in found.settings["edit"]


class Everywhere(Editor):
    """An editor that has no layer."""

    name = "everywhere"


def test_an_editor_without_a_layer_cannot_be_swept(model, tmp_path):
    with pytest.raises(SettingsError, match="the editor everywhere has no layer to choose"):
        sweep(model, FACTS, tmp_path, SMALL, Everywhere(), EditSettings())
    assert not list(tmp_path.iterdir())


def test_a_sweep_goes_on_and_gives_the_same(model, few_keys, tmp_path, monkeypatch):
    first = sweep(model, FACTS, tmp_path, SMALL, "rome", QUICK)
    monkeypatch.setattr(editing, "edit", lambda *args, **named: pytest.fail("found again"))
    said: list[tuple[str, int, int]] = []
    again = sweep(model, FACTS, tmp_path, SMALL, "rome", QUICK, progress=lambda *each: said.append(each))
    assert [each[1:] for each in said if each[0] == "layers and tokens"] == [(done, 6) for done in range(7)]
    assert again.to_json() == first.to_json()


def test_status_counts_the_cells_to_come(model, few_keys, tmp_path, monkeypatch, capsys):
    real = sweeping.evaluate
    begun: list[object] = []

    def two_cells(*args, **named):
        begun.append(args)
        return real(*args, **named) if len(begun) < 3 else pytest.fail("stopped here")

    monkeypatch.setattr(sweeping, "evaluate", two_cells)
    with pytest.raises(pytest.fail.Exception, match="stopped here"):
        sweep(model, FACTS, tmp_path, SMALL, "rome", QUICK)
    whole = status(tmp_path)
    found = {each.folder: each for each in by_stage(whole)}
    assert list(found) == ["edits, in 6 folders", "scores, in 6 folders", "before, in 2 folders", "traces"]
    edited = found["edits, in 6 folders"]
    known = [each.seconds for each in whole if each.folder.endswith("edits") and each.finished]
    units = sum(each.units for each in whole if each.folder.endswith("edits"))
    assert (edited.finished, edited.units, edited.seconds) == (6, units, np.median(known))
    assert edited.left == (units - 6) * edited.seconds
    assert cli.main(["status", str(tmp_path), "--json", str(tmp_path / "status.json")]) == 0
    assert f"6 of {units}" in capsys.readouterr().out
    assert [each["folder"] for each in json.loads((tmp_path / "status.json").read_text())] == [each.folder for each in whole]  # fmt: skip


def test_the_correlation_is_spearmans_over_cells():
    random = np.random.default_rng(3)
    scores = {name: random.random((20, 4, 3)) for name in ("ES", "PS", "NS")}
    effects = random.random((20, 4, 3)) + 0.5 * scores["PS"].mean(0)
    effects[:, :, 2] = np.nan
    found = Sweep((0, 1, 2, 3), ("subject_last", "last", "after_first"), scores, effects, 0, {}, {})
    means = scores["PS"].mean(0)[:, :2].ravel(), effects[:, :, :2].mean(0).ravel()
    correlation = found.correlation("PS")
    assert correlation.mean == pytest.approx(spearmanr(*means).statistic)
    drawn = [random.integers(20, size=20) for _ in range(1000)]
    again = [spearmanr(*(each[rows][:, :, :2].mean(0).ravel() for each in (scores["PS"], effects))).statistic for rows in drawn]  # fmt: skip
    assert (correlation.low, correlation.high) == pytest.approx(tuple(np.percentile(again, [2.5, 97.5])), abs=0.12)
    assert correlation.high - correlation.low > 0.2
    few = replace(found, scores={name: each[:19] for name, each in scores.items()}, effects=effects[:19])
    assert np.isnan(few.correlation("PS").low), "no interval of few facts"
    s = [3 / sum(1 / scores[name].mean(0)[1, 2] for name in scores)]
    assert found.mean("S")[1, 2] == pytest.approx(s[0])
    flat = replace(found, scores={name: np.ones((20, 4, 3)) for name in scores})
    assert np.isnan(flat.correlation("S").mean), "nothing to rank"


def test_maps_are_drawn_with_gaps_where_nothing_was_seen(tmp_path):
    scores = {name: np.full((2, 2, 2), 0.5) for name in ("ES", "PS", "NS")}
    scores["PS"][:, 0, 1] = np.nan
    figure = sweep_maps(
        Sweep((0, 5), ("subject_last", "last"), scores, np.full((2, 2, 2), 0.012), 0, {"name": "M"}, {})
    )
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["efficacy, %", "paraphrase, %", "neighbourhood, %", "S, %", "trace: indirect effect, %"]  # fmt: skip
    assert len(panels[1].texts) == 3
    assert figure.get_suptitle().startswith("M, 2 facts")
    assert {text.get_text() for text in panels[4].texts} == {"1.2"}, "small effects keep a digit"
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["0", "5"]


def test_tokens_of_an_edit_are_roles_of_a_trace():
    assert set(FACT_TOKENS) <= set(ROLE_TITLES)


def test_mistakes_are_said_first(model, tmp_path):
    some = [FACTS[0], replace(FACTS[1], neighbours=()), replace(FACTS[2], neighbours=(), paraphrases=())]
    with pytest.raises(
        FactError, match=r"(?s)record .*has no neighbours\..*record .*has no paraphrases and no neighbours"
    ):
        sweep(model, some, tmp_path)
    with pytest.raises(FactError, match="says what record .* says"):
        sweep(model, [*FACTS[:2], replace(FACTS[0], id="2")], tmp_path)
    for wrong in ({"tokens": ()}, {"tokens": ("middle",)}, {"draws": 0}, {"window": -1}):
        with pytest.raises(SettingsError):
            SweepSettings(**wrong)


def test_every_second_fact_is_scored_with_the_strength_that_suits_the_others():
    """A place where four times the clamp is needed by the even facts, and twice by the odd ones."""
    asked: list[tuple[float, tuple[int, ...]]] = []

    def score(value, own):
        asked.append((value, tuple(own)))
        needs = {fact: 4.0 if fact % 2 == 0 else 2.0 for fact in own}
        return {
            fact: {"ES": float(value >= needs[fact]), "PS": 1.0, "NS": 1.0 if value <= needs[fact] else 0.5}
            for fact in own
        }

    rows, best = suiting.suited([0, 1, 2, 3, 5, 7], 2, (1.0, 2.0, 4.0), score)
    assert suiting.tried([0, 1, 2, 3, 5, 7], 2) == ([1, 3], [0, 2])
    assert {fact: best[fact] for fact in (0, 2, 5)} == dict.fromkeys((0, 2, 5), 2.0), "chosen on 1 and 3"
    assert {fact: best[fact] for fact in (1, 3, 7)} == dict.fromkeys((1, 3, 7), 4.0), "chosen on 0 and 2"
    assert rows[0] == {"ES": 0.0, "PS": 1.0, "NS": 1.0}
    assert rows[7]["NS"] == 0.5
    assert asked[:3] == [(value, (0, 1, 2, 3)) for value in (1.0, 2.0, 4.0)]


def test_ties_go_to_the_gentler_edit_and_a_fact_alone_is_its_own_judge():
    score = lambda value, own: {fact: {"ES": 1.0, "PS": 1.0, "NS": 1.0} for fact in own}  # noqa: E731
    assert suiting.suited([4], 3, (4.0, 0.5, 1.0), score)[1] == {4: 0.5}


def test_a_sweep_gives_each_place_the_clamp_that_suits_it(model, few_keys, tmp_path):
    """As found by hand: each fact with each clamp, then the choice."""
    settings = replace(SMALL, layers=(1,), tokens=("subject_last",), tuned=2, strengths=(1.0, 3.0))
    found = sweep(model, FACTS, tmp_path, settings, "rome", QUICK)
    C = moments.estimate_layers(model, [1])[1]
    by_hand = {}
    for clamp in (QUICK.clamp, 3 * QUICK.clamp):
        for index, fact in enumerate(FACTS):
            with applying.edited(model, rome.edit(model, fact, replace(QUICK, clamp=clamp, guard="warn"), C)):
                (by_hand[clamp, index],) = counterfact.scores(model, [fact])
    assert found.strengths is not None
    for index in range(3):
        own = found.strengths[index, 0, 0]
        assert [found.scores[name][index, 0, 0] for name in ("ES", "PS", "NS")] == [by_hand[own, index][name] for name in ("ES", "PS", "NS")]  # fmt: skip
    others = [index for index in range(3) if index % 2]
    worth = {
        clamp: np.mean([by_hand[clamp, index]["ES"] for index in others]) for clamp in (QUICK.clamp, 3 * QUICK.clamp)
    }
    if worth[QUICK.clamp] != worth[3 * QUICK.clamp]:
        assert (found.strengths[0::2, 0, 0] == max(worth, key=worth.get)).all()
    assert found.to_json()["strengths"] == [[pytest.approx(found.strengths[:, 0, 0].mean())]]
