"""Editors of many facts: each published formula on the keys and values that the edit has, alone, together and in a sequence."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mechedit import applying, editing, models, moments, rank_one, sources
from mechedit.changes import total
from mechedit.editors import named
from mechedit.editors.rome import Prepared
from mechedit.edits import EditError
from mechedit.runs.evaluating import evaluate
from mechedit.settings import (  # fmt: skip
    PRESETS,
    AlphaEditSettings,
    EmmetSettings,
    EvaluateSettings,
    MemitSettings,
    MomentSettings,
    RomeSettings,
    SettingsError,
)
from tests.conftest import widen_bands
from tests.test_contract import FACTS

LAYER = 1
ROME = {"layer": LAYER, "steps": 3, "prefixes": (), "prepend_bos": False, "guard": "warn"}
MANY = ROME | {"least_met": 0.0}


@pytest.fixture
def prepared(model, monkeypatch):
    widen_bands(monkeypatch)
    moment = moments.estimate_layers(model, [LAYER], settings=MomentSettings(tokens=600, context=32, prepend_bos=False))[LAYER]  # fmt: skip
    return Prepared(moment, ("",), moment)


def edited(model, name, settings, prepared, facts=FACTS, state=None):
    return editing.edit(model, facts, named(name), settings, prepared=prepared, state=state)


def problem(model, edit):
    """K, R [n, ...] of an edit that was found on this model, in float64."""
    keys, values = (edit.vectors[name].double().reshape(len(edit.facts), -1) for name in ("k*", "v*"))
    W, b = models.W_out(model, LAYER).detach().double(), models.b_out(model, LAYER).detach().double()
    return keys, values - (keys @ W + b)


def close(change, expected):
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_memit_is_its_formula(model, prepared):
    edit = edited(model, "memit", MemitSettings(**MANY, a=50.0), prepared)
    keys, R = problem(model, edit)
    K, C = keys.T, prepared.moment.C.double()
    close(total(edit.changes), (R.T @ torch.linalg.solve(50.0 * C + K @ K.T, K).T).T)
    assert len(edit.facts) == len(edit.changes[0].left) == 3
    met = [float((keys[i] @ total(edit.changes)) @ R[i] / (R[i] @ R[i])) for i in range(3)]
    assert edit.report["met"] == pytest.approx(min(met))
    assert edit.report["survives"] == 1.0
    assert edit.state == {}, "nothing is handed on where earlier keys weigh nothing"


def test_emmet_with_one_fact_is_rome_and_with_more_is_several_keys_at_once(model, prepared):
    alone = edited(model, "emmet", EmmetSettings(**MANY), prepared, FACTS[:1])
    rome = edited(model, "rome", RomeSettings(**ROME), prepared, FACTS[:1])
    torch.testing.assert_close(total(alone.changes), total(rome.changes), rtol=1e-4, atol=1e-6)
    together = edited(model, "emmet", EmmetSettings(**MANY), prepared)
    assert together.report["met"] == pytest.approx(1.0)
    keys, R = problem(model, together)
    inverse = torch.linalg.inv(prepared.moment.C.double())
    close(total(together.changes), (R.T @ torch.linalg.inv(keys @ inverse @ keys.T) @ keys @ inverse).T)


def test_alphaedit_is_its_formula_and_knows_the_keys_of_earlier_edits(model, prepared):
    values = torch.linalg.eigvalsh(prepared.moment.C.double())
    null = float(values[len(values) // 2 - 1 : len(values) // 2 + 1].mean())
    settings = AlphaEditSettings(**MANY, c=0.5, null=null)
    editor, state, seen = named("alphaedit"), {}, torch.zeros_like(prepared.moment.C, dtype=torch.float64)
    U, s, _ = torch.linalg.svd(prepared.moment.C.double())
    P = U[:, s < null] @ U[:, s < null].T
    with applying.edited(model):
        standing = applying.apply(model)
        for fact in FACTS:
            edit = edited(model, "alphaedit", settings, prepared, [fact], state)
            keys, R = problem(model, edit)
            K, eye = keys.T, torch.eye(len(P), dtype=torch.float64)
            close(total(edit.changes), torch.linalg.solve(P @ (K @ K.T + seen) + 0.5 * eye, P @ K @ R))
            assert edit.report["survives"] == pytest.approx(float((P @ K).norm() / K.norm()) ** 2, rel=1e-5)
            assert edit.report["null_rank"] == int((s < null).sum())
            (told,) = edit.details["projections"]
            assert told == {
                "layer": LAYER,
                "rank": int((s < null).sum()),
                "of": len(P),
                "survives": [edit.report["survives"]],
            }
            seen += K @ K.T
            state = editor.joined(state, edit.state)
            torch.testing.assert_close(state["earlier"], seen, rtol=1e-6, atol=1e-9)
            standing.add(edit)
        standing.undo()


def test_a_sequence_hands_on_keys_and_is_the_edits_one_after_another(model, prepared, tmp_path):
    settings = AlphaEditSettings(**MANY, c=0.5, null=float(prepared.moment.C.trace()))
    plain = EvaluateSettings(mode="sequential", health=False, answers=False, beside=False)
    found = evaluate(model, FACTS, tmp_path, plain, "alphaedit", settings, prepared)
    alone, editor = [], named("alphaedit")
    standing, state = applying.apply(model), {}
    for fact in FACTS:
        alone.append(edited(model, "alphaedit", settings, prepared, [fact], state))
        state = editor.joined(state, alone[-1].state)
        standing.add(alone[-1])
    standing.undo()
    assert [row["p_new"] for row in found.rows["after"]] == pytest.approx([each.after["p_new"] for each in alone], rel=1e-4)  # fmt: skip
    forgetful = [edited(model, "alphaedit", settings, prepared, [FACTS[0]], {"earlier": 1e3 * state["earlier"]})]
    assert forgetful[0].report["update_norm"] < 0.5 * alone[0].report["update_norm"], "the control: the state weighs"


def test_in_a_sequence_c_is_taken_apart_once_and_m_is_updated_and_edits_are_those_of_a_solve_made_anew(
    model, prepared, monkeypatch
):
    counts = {"eigh": 0, "cholesky_ex": 0}
    for name in counts:
        plain = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda *given, name=name, plain=plain: counts.update({name: counts[name] + 1}) or plain(*given))  # fmt: skip
    values = torch.linalg.eigvalsh(prepared.moment.C.double())
    settings = AlphaEditSettings(**MANY, c=0.5, null=float(values[-20:-18].mean()), strengthen=True)
    editor, six = named("alphaedit"), [*FACTS, *FACTS]
    found, states = [], [{}]
    standing = applying.apply(model)
    for fact in six:
        found.append(edited(model, "alphaedit", settings, prepared, [fact], states[-1]))
        states.append(editor.joined(states[-1], found[-1].state, settings, prepared))
        standing.add(found[-1])
    assert counts == {"eigh": 1, "cholesky_ex": 1}
    assert all("factor" in each for each in states[1:])
    standing.undo()
    standing = applying.apply(model)
    for fact, state, edit in zip(six, states[:-1], found, strict=True):
        anew = Prepared(prepared.moment, ("",), prepared.estimated)
        alone = edited(model, "alphaedit", settings, anew, [fact], {name: each for name, each in state.items() if name == "earlier"})  # fmt: skip
        expected = total(alone.changes)
        torch.testing.assert_close(total(edit.changes), expected, rtol=0, atol=1e-8 * float(expected.abs().max()))
        standing.add(edit)
    standing.undo()
    assert counts == {"eigh": 7, "cholesky_ex": 7}, "the control: made anew, each has its own"
    again = {}
    other = Prepared(prepared.moment, ("",), prepared.estimated)
    for edit, expected in zip(found, states[1:], strict=True):  # as a run that goes on has its state
        again = editor.joined(again, edit.state, settings, other)
        assert all(torch.equal(again[name], each) for name, each in expected.items())
    assert "made" in vars(other)
    assert "made" not in vars(pickle.loads(pickle.dumps(other)))  # noqa: S301  # what was written here


def test_the_layer_and_constants_are_those_of_the_models_preset_for_the_editor_or_for_rome():
    model = models.load("organism")
    rome = named("rome").resolve(model)
    for name in ("memit", "pmet", "emmet", "alphaedit", "sequential"):
        own = named(name).resolve(model)
        assert (own.layer, own.clamp, own.prefixes, own.bands) == (rome.layer, rome.clamp, rome.prefixes, rome.bands)
    weights = [(own.a, own.c, own.slack) for own in (named(name).resolve(model) for name in ("memit", "pmet", "emmet", "alphaedit"))]  # fmt: skip
    assert weights == [(150.0, 0.0, 1.0), (150.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 1.0)]
    assert MemitSettings().a == 15000.0, "as published, where a model has no preset"
    long = named("sequential").resolve(model)
    assert (rome.guard, long.guard, long.loose) == ("refuse", "warn", 0.2), "its own, where the preset is ROME's"


@pytest.mark.anywhere
@pytest.mark.parametrize(("model", "facts"), [("organism", 15), ("gemma-3-270m", 8)])
def test_the_presets_weights_are_the_best_of_what_was_tried(model, facts):
    place = Path(__file__).parents[1] / "figures" / model / "tuned_many.json"
    for name, rows in json.loads(place.read_text())["editors"].items():
        best, own = max(rows, key=lambda row: (round(row["S"], 6), -row["relative_norm"])), PRESETS[model].settings[name]  # fmt: skip
        tried = dict(best["tried"])
        assert tried.pop("layers") == [own.layer]
        assert {field: getattr(own, field) for field in tried} == tried
        assert best["n"] >= facts


@pytest.mark.parametrize("name", ["memit", "pmet", "emmet", "alphaedit"])
def test_every_editor_of_many_facts_edits_the_organism_at_its_preset(name):
    model = models.load("organism")
    edit = editing.edit(model, sources.named("organism")[0], named(name))
    assert edit.after["p_new"] > 0.5
    assert edit.report["met"] > 0.8
    assert not edit.notes


@pytest.mark.anywhere
@pytest.mark.parametrize("wrong", [{"a": -1.0}, {"slack": float("nan")}, {"null": float("inf")}, {"a": 0.0}])
def test_terms_that_cannot_be_are_refused(wrong):
    with pytest.raises(SettingsError, match="must be"):
        MemitSettings(**wrong)


@pytest.mark.anywhere
@pytest.mark.parametrize(
    "wrong", [{"direction": "prompt"}, {"direction": "prompt", "inserted": "prompt", "layers": (0, 1)}]
)
def test_a_key_that_the_solve_does_not_write_at_is_refused(wrong):
    with pytest.raises(SettingsError, match="found (prompt and averaged|prompt)"):
        MemitSettings(**wrong)


def test_what_a_rolled_back_edit_would_have_written_is_not_known_to_the_next(model, prepared):
    settings = AlphaEditSettings(**(MANY | {"guard": "rollback"}), bands=(("relative_norm", 0.0, 1e-12),), null=1e3)
    rolled = edited(model, "alphaedit", settings, prepared, FACTS[:1])
    assert (rolled.changes, rolled.state) == ((), {})
    assert set(edited(model, "alphaedit", replace(settings, bands=()), prepared, FACTS[:1]).state) == {"keys"}


def test_a_state_without_the_sum_of_earlier_keys_is_refused(model, prepared):
    settings = AlphaEditSettings(**MANY, null=1e3)
    first = edited(model, "alphaedit", settings, prepared, FACTS[:1])
    with pytest.raises(EditError, match=r"no earlier; found keys\. .* editor\.joined"):
        edited(model, "alphaedit", settings, prepared, FACTS[1:2], first.state)
    joined = named("alphaedit").joined({}, first.state)
    second = edited(model, "alphaedit", settings, prepared, FACTS[1:2], joined)
    assert not torch.equal(
        second.changes[0].dense(), edited(model, "alphaedit", settings, prepared, FACTS[1:2]).changes[0].dense()
    )


def test_keys_that_depend_on_each_other_are_named(model, prepared):
    twice = [FACTS[0], replace(FACTS[0], subject="Space Needle", template="The {} is located in the city of")]
    with pytest.raises(rank_one.RankOneError, match="2 keys must not depend"):
        named("emmet").find(model, twice, EmmetSettings(**MANY), prepared, {})
