"""Sequences that know earlier edits by the factor of M: brought along, in the state, and the same as one made anew."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mechedit import models, moments
from mechedit.editors.rome import Prepared
from mechedit.facts import Fact
from mechedit.runs import sequence
from mechedit.runs.extending import run_sequence
from mechedit.runs.sequence import SequenceError
from mechedit.settings import AlphaEditSettings, MomentSettings, SequenceSettings, SequentialSettings
from tests.conftest import widen_bands

LAYER = 1
QUICK = {"layer": LAYER, "steps": 2, "fisher": 0.01, "weight_decay": 0.0, "prefixes": (), "prepend_bos": False}
NAMES = ("The Space Needle", "Rome", "The Eiffel Tower", "Steve Jobs", "Megan Rapinoe", "London")
FACTS = [Fact(name, "{} is located in the city of", "Seattle", "Paris" if index % 2 else "Berlin") for index, name in enumerate(NAMES)]  # fmt: skip


@pytest.fixture
def prepared(model, monkeypatch):
    widen_bands(monkeypatch)
    windows = MomentSettings(tokens=600, context=32, prepend_bos=False)
    moment = moments.estimate(model, LAYER, settings=windows)
    return Prepared(moment, ("",), moment, moments.fisher(model, LAYER, settings=windows))


@pytest.fixture
def counted(monkeypatch):
    counts = {"eigh": 0, "cholesky_ex": 0}
    for name in counts:
        plain = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda *given, name=name, plain=plain: counts.update({name: counts[name] + 1}) or plain(*given))  # fmt: skip
    return counts


def run(model, prepared, folder, settings, editor="sequential", facts=FACTS, **how):
    how = SequenceSettings(**({"every": 0, "rounds": 0, "shared": False} | how))
    return run_sequence(model, facts, folder, how, editor, settings, prepared)


def settings_of(editor, prepared):
    if editor == "sequential":
        return SequentialSettings(**QUICK, a=20.0, slack=1.0, loose=0.0)
    null = float(torch.linalg.eigvalsh(prepared.moment.C.double())[-20:-18].mean())
    return AlphaEditSettings(**QUICK, guard="warn", c=0.5, null=null)


def at_once(model, found, settings, C):
    """The change that minimises |K D - R|^2 + tr(D^T (a C + c I) D) over rows of the sequence, inside the null space, by its normal equations."""
    rows = list(found.rows.values())
    W, b = models.W_out(model, LAYER).detach().double(), models.b_out(model, LAYER).detach().double()
    K, V = (torch.stack([getattr(row, name) for row in rows]).double() for name in ("key", "value"))
    U, s, _ = torch.linalg.svd(C.double())
    U = U[:, s < settings.null] if settings.null else U
    system = U.T @ (K.T @ K + settings.a * C.double()) @ U + settings.c * torch.eye(U.shape[1], dtype=torch.float64)
    return U @ torch.linalg.solve(system, U.T @ K.T @ (V - K @ W - b))


@pytest.mark.parametrize("editor", ["sequential", "alphaedit"])
def test_six_edits_take_one_factor_and_are_one_solve_for_all(editor, model, prepared, tmp_path, counted):
    settings = settings_of(editor, prepared)
    counted.update(eigh=0, cholesky_ex=0)
    found = run(model, prepared, tmp_path, settings, editor)
    assert len(found.rows) == 6
    assert counted == {"eigh": int(editor == "alphaedit"), "cholesky_ex": 1}
    (total,) = found.totals.values()
    expected = at_once(model, found, settings, prepared.moment.C)
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))
    kept = sequence.load(tmp_path / "state.safetensors")
    assert torch.equal(kept.state["factor"], found.state["factor"])
    less = sequence.reverted(model, found, 2, prepared)
    assert less.state == {}, "where an edit was taken out the factor is made anew"
    expected = at_once(model, less, settings, prepared.moment.C)
    torch.testing.assert_close(*less.totals.values(), expected, rtol=0, atol=1e-8 * float(expected.abs().max()))


def test_a_run_that_goes_on_ends_in_the_same_bits_and_one_of_many_facts_at_once_makes_the_factor_anew(
    model, prepared, tmp_path, counted
):
    settings = settings_of("sequential", prepared)
    whole = run(model, prepared, tmp_path / "whole", settings)
    run(model, prepared, tmp_path / "part", settings, facts=FACTS[:3])
    other = Prepared(prepared.moment, ("",), prepared.estimated, prepared.fisher)
    found = run(model, other, tmp_path / "part", settings)
    for name in ("totals", "state"):
        ours, theirs = getattr(found, name), getattr(whole, name)
        assert all(torch.equal(ours[each], own) for each, own in theirs.items())
    counted.update(cholesky_ex=0)
    many = [replace(fact, subject=f"{fact.subject} {place}") for fact in FACTS for place in ("", "East")]
    large = run(model, prepared, tmp_path / "many", settings, facts=many, together=12)
    assert large.state == {}
    assert counted["cholesky_ex"] == 2, "that of no earlier edits, and that of all twelve"


def test_a_sequence_of_shaped_changes_adds_them_up_and_takes_none_out(model, prepared, tmp_path):
    settings = replace(settings_of("sequential", prepared), entries=0.3)
    found = run(model, prepared, tmp_path, settings, facts=FACTS[:2], shared=True)
    assert found.sums is None
    assert "earlier" in found.state
    (total,) = found.totals.values()
    assert 0.3 <= float((total != 0).double().mean()) <= 0.6
    with pytest.raises(SequenceError, match="adds changes up, and none can be taken out"):
        sequence.reverted(model, found, 0, prepared)
