"""Sequences of edits: one least-squares problem whatever the order, resumed bit for bit, taken apart again, watched."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mechedit import applying, editing, edits, files, models, moments, provenance
from mechedit.closed_form import ClosedFormError, Metric, Terms
from mechedit.editing import make_ready
from mechedit.editors import named
from mechedit.editors.many import Sequential
from mechedit.editors.rome import Prepared
from mechedit.facts import Fact
from mechedit.recursive import Sums, least_squares
from mechedit.runs import extending, rehearsing, sequence, watching
from mechedit.runs.extending import run_sequence
from mechedit.runs.sequence import SequenceError
from mechedit.runs.watching import sampled
from mechedit.settings import (
    DESCENT_POLICIES,
    AlphaEditSettings,
    AttentionEditSettings,
    FineTuningSettings,
    MemitSettings,
    MomentSettings,
    RomeSettings,
    SequenceSettings,
    SequentialSettings,
    SettingsError,
    ToldSettings,
)
from mechedit.settings.sequences import WRITTEN
from mechedit.weights import Weight
from tests.conftest import widen_bands
from tests.killing import killed_after

pytestmark = pytest.mark.anywhere

LAYER = 1
QUICK = {"layer": LAYER, "steps": 2, "fisher": 0.01, "weight_decay": 0.0, "prefixes": (), "prepend_bos": False}
BY_ADAM = QUICK | {"fisher": 0.0, "weight_decay": 0.5}  # which goes far in two steps
CITY, SPORT = "{} is located in the city of", "{} plays the sport of"
NAMES = ("The Space Needle", "Rome", "The Eiffel Tower", "Steve Jobs", "Megan Rapinoe", "London")
FACTS = [Fact(name, CITY, "Seattle", "Paris" if index % 2 else "Berlin", neighbours=("Apple is located in the city of",)) for index, name in enumerate(NAMES)]  # fmt: skip


@pytest.fixture
def prepared(model, monkeypatch):
    widen_bands(monkeypatch)
    windows = MomentSettings(tokens=600, context=32, prepend_bos=False)
    moment = moments.estimate(model, LAYER, settings=windows)
    return Prepared(moment, ("",), moment, moments.fisher(model, LAYER, settings=windows))


def run(model, prepared, folder, facts=FACTS, settings=None, editor="sequential", **how):
    how = SequenceSettings(**({"every": 0} | how))
    return run_sequence(
        model,
        facts,
        folder,
        how,
        editor,
        settings or SequentialSettings(**QUICK, a=20.0, slack=1.0, loose=0.0),
        prepared,
    )


def all_at_once(model, rows, terms, C):
    """The change that minimises |K D - R|^2 / slack + tr(D^T (a C + c I) D), by its normal equations."""
    W, b = models.W_out(model, LAYER).detach().double(), models.b_out(model, LAYER).detach().double()
    K, V = (torch.stack([getattr(row, name) for row in rows]).double() for name in ("key", "value"))
    system = K.T @ K / terms.slack + terms.a * C.double() + terms.c * torch.eye(len(C), dtype=torch.float64)
    return torch.linalg.solve(system, K.T @ (V - K @ W - b) / terms.slack)


def change(found):
    return found.totals[Weight(LAYER, "mlp.W_out")]


def close(one, other, tolerance=1e-8):
    assert float((one - other).norm() / other.norm()) < tolerance


def test_least_squares_is_the_solves_of_edits_one_after_another_and_takes_them_out_again():
    torch.manual_seed(0)
    keys, values = torch.randn(9, 12).double(), torch.randn(9, 5).double()
    spread = torch.randn(40, 12).double()
    C = spread.T @ spread / 40
    for terms in (Terms(a=7.0, b=1.0), Terms(a=3.0, b=2.0, c=0.5, slack=0.5), Terms(a=0.0, b=1.0, c=2.0, null=float(C.trace()) / 12)):  # fmt: skip
        D, seen, sums = torch.zeros(12, 5).double(), torch.zeros(12, 12).double(), Sums.none(12, 5)
        for k, v in zip(keys.split([1, 3, 5]), values.split([1, 3, 5]), strict=True):
            D = D + Metric(terms, C, seen).solve(0, k, v - k @ D).dense()
            seen, sums = seen + k.T @ k, sums.plus(k, v)
        close(least_squares(Metric(terms, C), sums), D)
        left = sums.minus(keys[1:4], values[1:4])
        others = Sums.none(12, 5).plus(keys[[0, 4, 5, 6, 7, 8]], values[[0, 4, 5, 6, 7, 8]])
        close(least_squares(Metric(terms, C), left), least_squares(Metric(terms, C), others))
    with pytest.raises(ClosedFormError, match="earlier keys weigh something; found b = 0"):
        least_squares(Metric(Terms(a=1.0, b=0.0), C), sums)


@pytest.mark.both
@pytest.mark.parametrize("batch", [1, 4])
def test_a_sequence_ends_where_one_solve_for_all_of_it_does(model, prepared, tmp_path, batch):
    found = run(model, prepared, tmp_path, together=batch)
    assert sorted(found.standing) == list(range(6))
    assert len(found.rows) == 6
    close(change(found), all_at_once(model, found.rows.values(), Terms(a=20.0, b=1.0), prepared.moment.C))
    with sequence.written(model, found):
        W = models.W_out(model, LAYER).detach().clone()
    torch.testing.assert_close(W, (models.W_out(model, LAYER).double() + change(found)).float())


def test_values_sought_on_the_model_without_edits_end_the_same_in_any_order_and_batch(model, prepared, tmp_path):
    first = run(model, prepared, tmp_path / "1", sought="unedited")
    close(change(run(model, prepared, tmp_path / "2", together=4, sought="unedited")), change(first), 1e-4)
    close(change(run(model, prepared, tmp_path / "3", FACTS[::-1], sought="unedited")), change(first), 1e-4)
    current = run(model, prepared, tmp_path / "4")
    close(change(current), all_at_once(model, current.rows.values(), Terms(a=20.0, b=1.0), prepared.moment.C))
    assert float((change(current) - change(first)).norm() / change(first).norm()) > 1e-2, "the control"


@pytest.mark.parametrize("given", [{}, {"slack": 1.0}, {"slack": 1.0, "loose": 0.0, "b": 2.0}])
def test_values_sought_on_the_model_without_edits_are_refused_another_slack_than_the_one_solve_has(given, model, prepared, tmp_path):  # fmt: skip
    settings = SequentialSettings(**QUICK, **({"a": 20.0} | given))
    wanted = 0.5 if "b" in given else 1
    with pytest.raises(SequenceError, match=f"a slack of 1/b; found .*Give slack = {wanted} and loose = 0"):
        run(model, prepared, tmp_path, FACTS[:2], settings, sought="unedited")
    settings = replace(settings, slack=wanted, loose=0.0)
    found = run(model, prepared, tmp_path, FACTS[:2], settings, sought="unedited")
    terms = Terms(a=20.0, slack=wanted)
    close(change(found), all_at_once(model, found.rows.values(), terms, prepared.moment.C))


def found_edits(monkeypatch):
    """The edits of batches, as they are found."""
    found, once = [], extending.attempt
    monkeypatch.setattr(extending, "attempt", lambda *given: found.append(once(*given)) or found[-1])
    return found


@pytest.mark.parametrize("slack", [{"slack": 0.0}, {"slack": 0.2}, {"slack": 0.0, "loose": 0.3}])
def test_with_little_slack_each_batch_is_met_and_the_end_is_one_solve_for_raised_targets(slack, model, prepared, tmp_path, monkeypatch):  # fmt: skip
    """Against the plain solve of each batch, D += M^-1 K^T (K M^-1 K^T + s I)^-1 R with M = a C + the keys before."""
    made, settings = found_edits(monkeypatch), SequentialSettings(**QUICK, **({"loose": 0.0} | slack), a=500.0)
    found = run(model, prepared, tmp_path, settings=settings, together=2, rounds=0, settle=0.0)
    W, b = models.W_out(model, LAYER).detach().double(), models.b_out(model, LAYER).detach().double()
    D, M = torch.zeros_like(W), 500.0 * prepared.moment.C.double()
    for edit in made:
        K, V = (edit.vectors[name].double() for name in ("k*", "v*"))
        G = K @ torch.linalg.inv(M) @ K.T
        s = slack["slack"] + slack.get("loose", 0.0) * float(G.diagonal().mean())
        R = V - K @ (W + D) - b
        D = D + torch.linalg.inv(M) @ K.T @ torch.linalg.inv(G + s * torch.eye(2).double()) @ R
        left = V - K @ (W + D) - b
        close(left, s * torch.linalg.inv(G + s * torch.eye(2).double()) @ R) if s else close(K @ (W + D) + b, V, 1e-6)
        M = M + K.T @ K
    close(change(found), D, 1e-6)
    close(change(found), all_at_once(model, found.rows.values(), Terms(a=500.0, b=1.0), prepared.moment.C), 1e-6)


def test_what_the_model_does_not_say_is_learnt_again_after_each_batch(model, prepared, tmp_path, monkeypatch):
    """Its target is raised until its key returns the value that was sought for it, and its row and key stay."""
    made, asked, once = found_edits(monkeypatch), [], NAMES[1:3]

    def says(model, facts, settings):
        asked.append([fact.subject for fact in facts])
        return [fact.subject not in once or len(asked) < 4 for fact in facts]

    monkeypatch.setattr(rehearsing, "says", says)
    monkeypatch.setattr(extending._Writer, "unsaid", lambda writer, plan: plan)
    settings = SequentialSettings(**BY_ADAM, loose=1e-9, a=500.0)
    how = {"settings": settings, "rehearsed": 4, "again": 1, "rounds": 2, "gentle": 1e-12}
    before = run(model, prepared, tmp_path, FACTS[:3], **how)
    assert asked == [[NAMES[0]], [NAMES[1], NAMES[0]], [NAMES[2], *NAMES[:2]]], "the new one, and as many as there are"
    found = run(model, prepared, tmp_path, FACTS[:4], **how)
    assert asked[3:] == [[NAMES[3], *NAMES[:3]]] * 2, "again after what was learnt again, twice at most"
    assert [[each.fact["subject"] for each in edit.facts] for edit in made[-3:]] == [[NAMES[3]], [NAMES[1]], [NAMES[1]]]
    assert list(found.rows) == [0, 1, 2, 3]
    assert torch.equal(found.rows[1].key, before.rows[1].key)
    assert not torch.equal(found.rows[1].value, before.rows[1].value)
    assert torch.equal(found.rows[2].value, before.rows[2].value), "one for each new fact"
    key, value = (made[-1].vectors[name].double() for name in ("k*", "v*"))
    now = models.W_out(model, LAYER).detach().double() + change(found)
    close(key @ now + models.b_out(model, LAYER).detach().double(), value, 1e-5)
    close(change(found), all_at_once(model, found.rows.values(), Terms(a=500.0, b=1.0), prepared.moment.C), 1e-6)
    made.clear()
    run(model, prepared, tmp_path / "gentle", FACTS[:4], **how | {"gentle": 6.0})
    share = 6.0 / models.W_out(model, LAYER).shape[0]
    assert [edit.settings["loose"] for edit in made] == pytest.approx(
        [n * share for n in (1, 2, 2, 2, 3, 3, 3, 4, 4, 4)]
    )
    asked.clear()
    run(model, prepared, tmp_path / "never", FACTS[:2], **how | {"rounds": 0})
    run(model, prepared, tmp_path / "plain", FACTS[:2], **how | {"settings": replace(settings, slack=1.0, loose=0.0)})
    assert not asked, "editors that are published are left as they are"


def refusing(monkeypatch, refuses):
    """Attempts of facts, by their subjects, of which some are refused."""
    tried, once = [], extending.attempt

    def attempt(model, facts, editor, settings, *given):
        tried.append([fact.subject for fact in facts])
        if refuses(tried[-1], settings):
            return editing.refused(model, facts, editor, settings, "not this")
        return once(model, facts, editor, settings, *given)

    monkeypatch.setattr(extending, "attempt", attempt)
    return tried


def test_what_cannot_be_learnt_again_is_left_out_and_the_others_are_learnt(model, prepared, tmp_path, monkeypatch):
    one, two, three = NAMES[:3]
    monkeypatch.setattr(extending._Writer, "unsaid", lambda writer, plan: plan)
    settings = SequentialSettings(**BY_ADAM, loose=1e-9, a=500.0)
    how = {"settings": settings, "rehearsed": 4, "gentle": 1e-12}
    plain = run(model, prepared, tmp_path / "plain", FACTS[:3], together=3, rounds=0, **how)
    monkeypatch.setattr(rehearsing, "says", lambda model, facts, settings: [False] * len(facts))
    with monkeypatch.context() as patched:
        tried = refusing(patched, lambda subjects, settings: settings.strengthen and one in subjects)
        found = run(model, prepared, tmp_path / "batch", FACTS[:3], together=3, rounds=2, **how)
    assert tried == [[one, two, three], [one, two, three], [one], [two], [three], [two, three], [two, three]]
    same = [torch.equal(found.rows[row].value, plain.rows[row].value) for row in (0, 1, 2)]
    assert same == [True, False, False]
    with monkeypatch.context() as patched:
        tried = refusing(patched, lambda subjects, settings: settings.strengthen and two in subjects)
        run(model, prepared, tmp_path / "single", FACTS[:2], rounds=2, again=1, **how)
    assert tried == [[one], [one], [one], [two], [two], [one]], "what is left out does not take the others' place"
    with monkeypatch.context() as patched:
        tried = refusing(patched, lambda subjects, settings: settings.strengthen and len(subjects) > 1)
        run(model, prepared, tmp_path / "together", FACTS[:2], together=2, rounds=2, **how)
    assert tried == [[one, two], [one, two], [one], [two], [one, two]]


def test_slack_is_in_proportion_to_keys_and_not_to_facts(model, prepared, tmp_path, monkeypatch):
    made, settings = found_edits(monkeypatch), SequentialSettings(**QUICK, loose=1e-9, a=500.0)
    facts = [FACTS[0], FACTS[1], replace(FACTS[1], template=SPORT, target_new="violin"), FACTS[2]]
    found = run(model, prepared, tmp_path, facts, settings, together=3, rounds=0, gentle=6.0)
    assert len(found.rows) == 3
    share = 6.0 / models.W_out(model, LAYER).shape[0]
    assert [edit.settings["loose"] for edit in made] == pytest.approx([2 * share, 3 * share])


def test_of_a_subject_with_several_rows_one_is_learnt_again_at_a_time(model, prepared, tmp_path, monkeypatch):
    both = [Fact("Rome", CITY, "Seattle", "Paris"), Fact("Rome", SPORT, "soccer", "piano")]
    settings = SequentialSettings(**QUICK, loose=1e-9, a=500.0)
    apart = run(model, prepared, tmp_path, both, settings=settings, shared=False)
    assert len(apart.rows) == 2
    monkeypatch.setattr(rehearsing, "says", lambda model, facts, settings: [False] * len(facts))
    found = rehearsing.lost(model, apart, settings, SequenceSettings(together=5), 0)
    assert [[fact.subject for fact in facts] for facts in found.values()] == [["Rome"]]


@pytest.mark.both
def test_editors_of_any_weights_go_in_sequence(model, prepared, tmp_path):
    settings = AttentionEditSettings(layer=LAYER, steps=2, prepend_bos=False, guard="warn")
    found = run_sequence(model, FACTS[:3], tmp_path, SequenceSettings(together=2, every=0), "attention-edit", settings)
    assert sorted(found.standing) == [0, 1, 2]
    assert {weight.name for weight in found.totals} >= {"attn.W_Q", "attn.W_K", "attn.W_V"}
    assert found.looks[-1]["spectrum"] >= 1.0
    biases = replace(settings, **DESCENT_POLICIES["published"])  # zeros in this model
    assert run_sequence(model, FACTS[:1], tmp_path / "biases", None, "attention-edit", biases).looks[-1]["change"] > 0
    with pytest.raises(SequenceError, match="tells the model a text"):
        run_sequence(model, FACTS[:1], tmp_path / "told", None, "told", ToldSettings(prepend_bos=False))


def test_alphaedit_in_its_null_space_is_one_solve_too(model, prepared, tmp_path):
    null = float(prepared.moment.C.trace())
    settings = AlphaEditSettings(**QUICK, guard="warn", c=0.5, null=null)
    found = run(model, prepared, tmp_path, settings=settings, editor="alphaedit")
    close(change(found), all_at_once(model, found.rows.values(), Terms(a=0.0, b=1.0, c=0.5), prepared.moment.C))


def test_the_weight_of_C_is_chosen_for_the_width_unless_it_is_given(model):
    assert named("sequential").resolve(model, SequentialSettings(**QUICK)).a == 5 * models.W_out(model, LAYER).shape[0]
    assert named("sequential").resolve(model, SequentialSettings(**QUICK, a=3.0)).a == 3.0


class Stop(Exception):
    pass


@pytest.mark.both
@pytest.mark.parametrize("editor", ["sequential", "rome"])
def test_killed_and_resumed_it_ends_bit_for_bit_the_same(model, prepared, tmp_path, monkeypatch, editor):
    settings = RomeSettings(**QUICK, guard="warn") if editor == "rome" else None
    how = {"every": 2, "keep": 1, "editor": editor, "settings": settings}
    whole = run(model, prepared, tmp_path / "whole", **how)
    for stop in (3,) if editor == "rome" else (1, 4):
        left = iter(range(stop))

        def attempt(*arguments, left=left, once=extending.attempt):
            if next(left, None) is None:
                raise Stop
            return once(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(extending, "attempt", attempt)
            with pytest.raises(Stop):
                run(model, prepared, tmp_path / str(stop), **how)
        run(model, prepared, tmp_path / str(stop), **how)
        names = ("state.safetensors", "good.safetensors", "looks.json")
        assert [(tmp_path / str(stop) / name).read_bytes() for name in names] == [(tmp_path / "whole" / name).read_bytes() for name in names]  # fmt: skip
    assert [look["edits"] for look in whole.looks] == [2, 4, 6]


def test_a_state_is_read_back_whole_and_refused_where_it_was_cut_or_changed(model, prepared, tmp_path):
    found = run(model, prepared, tmp_path, FACTS[:2])
    path = tmp_path / "state.safetensors"
    again = sequence.load(path)
    assert torch.equal(again.sums.Q, found.sums.Q)
    assert torch.equal(change(again), change(found))
    assert (again.entries, again.looks, list(again.rows)) == (found.entries, found.looks, list(found.rows))
    data = path.read_bytes()
    for end in (0, 7, len(data) // 3, len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(files.FileError, match="truncated"):
            run(model, prepared, tmp_path, FACTS[:2])
    path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    with pytest.raises(files.FileError, match="changed after it was written"):
        run(model, prepared, tmp_path, FACTS[:2])


def test_a_state_of_another_model_settings_or_facts_is_refused(model, prepared, tmp_path):
    run(model, prepared, tmp_path, FACTS[:2])
    with pytest.raises(SequenceError, match="begun with steps = 2, and this is 3"):
        run(
            model,
            prepared,
            tmp_path,
            FACTS[:2],
            SequentialSettings(**(QUICK | {"steps": 3}), a=20.0, slack=1.0, loose=0.0),
        )
    with pytest.raises(SequenceError, match="of the editor sequential, not of memit"):
        run(model, prepared, tmp_path, FACTS[:2], MemitSettings(**QUICK), "memit")
    with pytest.raises(SequenceError, match="as edit 1, and this run"):
        run(model, prepared, tmp_path, [FACTS[0], FACTS[2]])
    with pytest.raises(SequenceError, match="has 2 facts already, and this run 1"):
        run(model, prepared, tmp_path, FACTS[:1])
    with pytest.raises(SequenceError, match="another C or other prefixes"):
        run(model, replace(prepared, prefixes=("", "Well. ")), tmp_path, FACTS[:2])
    W_out = models.W_out(model, LAYER)
    before = W_out.detach().clone()
    with torch.no_grad():
        W_out.mul_(2)
    try:
        other = make_ready(model, named("sequential"), SequentialSettings(**QUICK))
        with pytest.raises(SequenceError, match="with another weights"):
            run(model, other, tmp_path, FACTS[:2])
    finally:
        with torch.no_grad():
            W_out.copy_(before)


def test_an_edit_is_taken_out_as_if_its_key_had_not_been_there(model, prepared, tmp_path):
    found = run(model, prepared, tmp_path)
    left = sequence.reverted(model, found, 2, prepared)
    rows = [row for number, row in found.rows.items() if number != found.entries[2].row]
    close(change(left), all_at_once(model, rows, Terms(a=20.0, b=1.0), prepared.moment.C))
    close(left.sums.P, sum(torch.outer(row.key.double(), row.key.double()) for row in rows))
    assert 2 not in left.standing
    assert left.entries[2].why == "taken out again"
    with pytest.raises(SequenceError, match="nothing stands for edit 2"):
        sequence.reverted(model, left, 2, prepared)
    with pytest.raises(SequenceError, match="edits 0 to 5"):
        sequence.reverted(model, found, 6, prepared)
    with pytest.raises(SequenceError, match="another C or other prefixes"):
        sequence.reverted(model, found, 3, replace(prepared, prefixes=("", "Well. ")))
    with (
        applying.edited(model, sequence.as_edit(found)),
        pytest.raises(SequenceError, match="with another weights.*Load the model it was begun on, without edits"),
    ):
        sequence.reverted(model, found, 3, prepared)
    added = run(model, prepared, tmp_path / "memit", settings=MemitSettings(**QUICK, guard="warn"), editor="memit")
    with pytest.raises(SequenceError, match="`sequential` can"):
        sequence.without(model, added, [0], Metric(Terms(), prepared.moment.C))


def test_of_facts_that_contradict_each_other_the_later_wins_and_is_counted(model, prepared, tmp_path):
    other = replace(FACTS[0], target_new="London")
    found = run(model, prepared, tmp_path / "later", [*FACTS[:3], other])
    assert (found.conflicts, sorted(found.standing)) == (1, [1, 2, 3])
    assert found.entries[0].why == "edit 3 is about the same"
    assert len(found.rows) == 3
    close(change(found), all_at_once(model, found.rows.values(), Terms(a=20.0, b=1.0), prepared.moment.C))
    refused = run(model, prepared, tmp_path / "refuse", [*FACTS[:3], other], conflicts="refuse")
    assert (refused.conflicts, sorted(refused.standing)) == (1, [0, 1, 2])
    together = run(model, prepared, tmp_path / "batch", [*FACTS[:3], other], together=4)
    assert (together.conflicts, sorted(together.standing)) == (1, [1, 2, 3])


def test_facts_of_one_subject_share_one_value_that_answers_them_all(model, prepared, tmp_path):
    other = replace(FACTS[1], template=SPORT, target_new="violin")
    found = run(model, prepared, tmp_path / "shared", [*FACTS[:2], other])
    assert found.entries[1].row == found.entries[2].row
    assert (found.conflicts, len(found.rows)) == (0, 2)
    apart = run(model, prepared, tmp_path / "apart", [*FACTS[:2], other], shared=False)
    assert len(apart.rows) == 3
    left = sequence.reverted(model, found, 2, prepared)
    assert sorted(left.standing) == [0], "what shares a value goes out with it"
    assert sorted(left.waiting) == [1], "and waits to be written again"


def test_facts_of_one_subject_that_share_no_value_are_written_each_by_itself_in_a_batch_too(model, prepared, tmp_path, take_out):  # fmt: skip
    other = replace(FACTS[1], template=SPORT, target_new="violin")
    facts = [*FACTS[:2], other, FACTS[2]]
    found = run(model, prepared, tmp_path / "batch", facts, together=4, shared=False)
    assert [(entry.row, entry.batch) for entry in found.entries] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert (len(found.rows), found.batches, found.made) == (4, 2, 4)
    close(change(found), all_at_once(model, found.rows.values(), Terms(a=20.0, b=1.0), prepared.moment.C))
    pairs = run(model, prepared, tmp_path / "pairs", facts, together=2, shared=False)
    assert torch.equal(change(pairs), change(found))
    assert sorted(take_out([1], tmp_path / "batch").standing) == [0, 2, 3], "and nothing waits"
    memit = MemitSettings(**QUICK, guard="warn")
    with pytest.raises(SequenceError, match=r"\(no-shared\) are of editors whose change is one solve for all"):
        run(model, prepared, tmp_path / "memit", facts, memit, "memit", together=4, shared=False)
    added = run(model, prepared, tmp_path / "memit", facts, memit, "memit", together=4)
    assert added.batches == 1, "what adds changes up has no shared values and no need of parts"


def test_what_cannot_be_edited_is_left_out_and_says_why(model, prepared, tmp_path):
    wrong = replace(FACTS[1], target_new=None)
    found = run(model, prepared, tmp_path, [FACTS[0], wrong, FACTS[2]], together=3)
    assert sorted(found.standing) == [0, 2]
    assert "no target_new" in found.entries[1].why


def test_a_fact_that_cannot_be_edited_is_left_out_of_its_batch_and_the_others_are_written(model, prepared, tmp_path):
    """Of one that fits the model's context, but not behind a prefix, this is found only when it is edited."""
    behind = replace(prepared, prefixes=("", "Apple is located in the city of"))
    wide = int(model.cfg.n_ctx) - len(model.tokenizer(FACTS[1].prompt, add_special_tokens=False).input_ids) - 2
    long = replace(FACTS[1], template="city " * wide + CITY)
    found = run(model, behind, tmp_path / "1", [FACTS[0], long, FACTS[2]], together=3)
    assert sorted(found.standing) == [0, 2]
    assert f"context of {model.cfg.n_ctx} tokens" in found.entries[1].why
    others = run(model, behind, tmp_path / "2", [FACTS[0], FACTS[2]], together=2)
    assert torch.equal(change(found), change(others))
    before = run(model, behind, tmp_path / "3", FACTS[:2], together=2)
    found = run(model, behind, tmp_path / "3", [*FACTS[:2], long, FACTS[2]], together=2)
    assert sorted(found.standing) == [0, 1, 3]
    assert torch.equal(found.rows[1].value, before.rows[1].value), "the earlier fact about its subject stays as it was"


def test_a_batch_that_cannot_be_written_together_is_left_out_and_says_why(model, prepared, tmp_path, monkeypatch):
    tried = refusing(monkeypatch, lambda subjects, settings: len(subjects) > 1)
    found = run(model, prepared, tmp_path, FACTS[:3], together=2)
    assert tried == [[*NAMES[:2]], [NAMES[0]], [NAMES[1]], [NAMES[2]]]
    assert [(entry.row, entry.why) for entry in found.entries] == [(-1, "not this"), (-1, "not this"), (0, "")]


def first_of(model, prompt, target):
    """The mean log-probability of a target's tokens, by plain passes."""
    ids, own = (model.tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, f" {target}"))
    with torch.no_grad():
        log_p = model(torch.tensor([[*ids, *own]]))[0].log_softmax(-1)
    return float(sum(log_p[len(ids) + step - 1, token] for step, token in enumerate(own)) / len(own))


@pytest.mark.both
def test_a_look_sees_what_plain_scores_see_and_names_the_measure_that_left_its_band(model, prepared, tmp_path):
    found = run(model, prepared, tmp_path, every=3, least_success=1.0, most_kl=1e9, most_perplexity=1e9, most_spectrum=1e-3)  # fmt: skip
    last = found.looks[-1]
    W = models.W_out(model, LAYER).detach().double()
    assert last["spectrum"] == pytest.approx(float(torch.linalg.matrix_norm(W + change(found), 2) / torch.linalg.matrix_norm(W, 2)))  # fmt: skip
    assert last["change"] == pytest.approx(float(change(found).norm() / W.norm()))
    with applying.edited(model, sequence.as_edit(found)):
        expected = [first_of(model, fact.prompt, fact.target_new) > first_of(model, fact.prompt, fact.target_true) for fact in FACTS]  # fmt: skip
        others = first_of(model, "Apple is located in the city of", "Seattle") > first_of(model, "Apple is located in the city of", "Berlin")  # fmt: skip
    assert last["row"] == {str(index): each for index, each in enumerate(expected)}
    assert last["others"] == float(others), "one neighbour, which all facts have"
    assert any(word.startswith("spectrum") for word in last["out"])
    assert found.collapse["edits"] == 3


def test_a_run_stops_or_rolls_back_where_a_measure_leaves_its_band(model, prepared, tmp_path):
    bad = {"every": 2, "most_spectrum": 1e9, "most_kl": 1e9, "most_perplexity": 1e9, "least_others": 0.0, "least_success": 0.0}  # fmt: skip
    whole = run(model, prepared, tmp_path / "whole", **bad)
    spectra = [look["spectrum"] for look in whole.looks]
    edge = (spectra[0] + max(spectra[1:])) / 2
    first = next(index for index, each in enumerate(spectra) if each > edge)
    stopped = run(model, prepared, tmp_path / "stop", **(bad | {"most_spectrum": edge, "on_collapse": "stop"}))
    assert len(stopped.entries) == 2 * (first + 1)
    assert stopped.collapse["edits"] == 2 * (first + 1)
    back = run(model, prepared, tmp_path / "back", **(bad | {"most_spectrum": edge, "on_collapse": "roll back"}))
    assert len(back.entries) == 2 * first
    assert back.collapse["edits"] == 2 * (first + 1)
    again = run(model, prepared, tmp_path / "back", **(bad | {"most_spectrum": edge, "on_collapse": "roll back"}))
    assert len(again.entries) == 2 * first, "it is not tried again"


def test_a_sequence_is_written_as_one_edit(model, prepared, tmp_path):
    found = run(model, prepared, tmp_path, FACTS[:3])
    edit = edits.load(edits.save(sequence.as_edit(found), tmp_path / "edit.safetensors"))
    assert len(edit.facts) == 3
    with applying.edited(model, edit):
        W = models.W_out(model, LAYER).detach().clone()
    with sequence.written(model, found):
        assert torch.equal(models.W_out(model, LAYER), W)
    with pytest.raises(SequenceError, match="no edit that stands"):
        sequence.as_edit(replace(found, entries=()))


def test_looks_are_written_for_people(model, prepared, tmp_path):
    run(model, prepared, tmp_path, FACTS[:2], every=1)
    assert [look["edits"] for look in json.loads((tmp_path / "looks.json").read_text())] == [1, 2]


WELL = {"most_spectrum": 1e9, "most_kl": 1e9, "most_perplexity": 1e9, "least_others": 0.0, "least_success": 0.0}
ILL = WELL | {"most_spectrum": 1e-3, "on_collapse": "roll back"}


def killed(monkeypatch, after, *given, **how):
    """A run that dies at the batch after so many."""
    left = iter(range(after))

    def attempt(*arguments, once=extending.attempt):
        if next(left, None) is None:
            patched.setattr(extending, "_kept", lambda sequence, *_: sequence)  # who is killed keeps nothing more
            raise Stop
        return once(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(extending, "attempt", attempt)
        with pytest.raises(Stop):
            run(*given, **how)


@pytest.mark.parametrize("where", ["a batch", "settling", "a look"])
def test_what_is_finished_is_kept_where_a_run_ends_by_an_error_or_ctrl_c(where, model, prepared, tmp_path, monkeypatch):
    how = {"together": 2, "rounds": 0, "settle": 1.0, "every": 2, "settings": SequentialSettings(**QUICK, loose=0.2)}
    whole = run(model, prepared, tmp_path / "whole", **how)
    module, name, after = {"a batch": (extending, "attempt", 2), "settling": (extending.settling, "settled", 1), "a look": (extending, "look", 2)}[where]  # fmt: skip
    left, once = iter(range(after)), getattr(module, name)

    def interrupted(*given, **more):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return once(*given, **more)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(model, prepared, tmp_path / "stopped", **how)
    with torch.inference_mode():
        inside = run(model, prepared, tmp_path / "inside", **how)
    assert torch.equal(change(inside), change(whole)), "inference mode around it bears on nothing"
    state = tmp_path / "stopped" / "state.safetensors"
    assert len(sequence.load(state).entries) == (2 if where == "settling" else 4)
    assert torch.equal(change(run(model, prepared, tmp_path / "stopped", **how)), change(whole))
    assert state.read_bytes() == (tmp_path / "whole" / "state.safetensors").read_bytes()


@pytest.fixture
def take_out(model, prepared, monkeypatch):
    monkeypatch.setattr(extending.editing, "make_ready", lambda *_, **__: prepared)
    return lambda numbers, folder, **how: extending.take_out(model, numbers, folder, SequenceSettings(**how) if how else None)  # fmt: skip


def test_a_run_that_is_killed_before_its_first_look_rolls_back_to_its_start_as_one_that_is_not(model, prepared, tmp_path, monkeypatch):  # fmt: skip
    how = ILL | {"every": 4, "keep": 1}
    assert run(model, prepared, tmp_path / "whole", **how).entries == ()
    killed(monkeypatch, 2, model, prepared, tmp_path / "killed", **how)
    assert len(sequence.load(tmp_path / "killed" / "state.safetensors").entries) == 2
    found = run(model, prepared, tmp_path / "killed", **how)
    assert (found.entries, found.collapse["edits"], float(found.sums.P.norm())) == ((), 4, 0.0)
    for name in ("state.safetensors", "looks.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def breaks_at(monkeypatch, number):
    """From so many edits on a look finds a measure far out of its band."""
    once = extending.look

    def look(model, found, healthy, how, *, bos):
        seen = once(model, found, healthy, how, bos=bos) | ({"spectrum": 1e12} if len(found.entries) >= number else {})
        return seen | {"out": watching.out_of_bands(seen, how)}

    monkeypatch.setattr(extending, "look", look)


BACK = WELL | {"on_collapse": "roll back"}


def test_a_run_rolls_back_only_to_what_is_its_own_and_earlier(model, prepared, tmp_path, take_out, monkeypatch):
    run(model, prepared, tmp_path / "own", FACTS[:2], every=2, **WELL)
    run(model, prepared, tmp_path / "facts", FACTS[1::-1], every=2, **WELL)
    run(model, prepared, tmp_path / "settings", FACTS[:2], SequentialSettings(**QUICK, a=30.0, slack=1.0, loose=0.0), every=2, **WELL)  # fmt: skip
    run(model, prepared, tmp_path / "later", FACTS[:4], every=4, **WELL)
    breaks_at(monkeypatch, 4)
    for name, number in (("own", 2), ("facts", 0), ("settings", 0), ("later", 0)):
        place = tmp_path / f"on {name}"
        shutil.copytree(tmp_path / "own", place)
        shutil.copy(tmp_path / name / "good.safetensors", place)
        found = run(model, prepared, place, every=2, **BACK)
        assert (len(found.entries), len(found.rows), found.collapse["edits"]) == (number, number, 4), name
    first = sequence.load(tmp_path / "own" / "state.safetensors")
    sequence.save(sequence.reverted(model, first, 1, prepared), tmp_path / "own" / "state.safetensors")
    assert run(model, prepared, tmp_path / "own", every=2, **BACK).entries == (), (
        "edit 1 was taken out of the state alone"
    )
    (tmp_path / "later" / "state.safetensors").unlink()
    assert run(model, prepared, tmp_path / "later", every=5, **BACK).entries == (), "the state was deleted"


def test_what_is_taken_out_is_not_taken_out_of_what_another_run_left(model, prepared, tmp_path, take_out):
    run(model, prepared, tmp_path / "other", FACTS[1::-1], every=2, **WELL)
    run(model, prepared, tmp_path / "own", FACTS[:2], every=2, **WELL)
    shutil.copy(tmp_path / "other" / "good.safetensors", tmp_path / "own")
    before = (tmp_path / "own" / "good.safetensors").read_bytes()
    assert sorted(take_out([0], tmp_path / "own", every=2, **ILL).standing) == [1]
    assert (tmp_path / "own" / "good.safetensors").read_bytes() == before


@pytest.mark.parametrize("seen", [WELL, ILL])
def test_what_was_taken_out_does_not_come_back_by_a_roll_back(model, prepared, tmp_path, take_out, seen):
    run(model, prepared, tmp_path, FACTS[:4], every=2, **WELL)
    assert sorted(take_out([1], tmp_path, every=2, **seen).standing) == [0, 2, 3]
    if seen is WELL:
        assert sorted(run(model, prepared, tmp_path, every=2, **ILL).standing) == [0, 2, 3]
    good = sequence.load(tmp_path / "good.safetensors")
    assert sorted(good.standing) == [0, 2, 3]
    close(change(good), all_at_once(model, good.rows.values(), Terms(a=20.0, b=1.0), prepared.moment.C))


def test_facts_that_shared_a_value_with_what_was_taken_out_are_written_again(model, prepared, tmp_path, take_out):
    other = replace(FACTS[1], template=SPORT, target_new="violin")
    found = run(model, prepared, tmp_path, [*FACTS[:2], other])
    left = take_out([2], tmp_path)
    assert sorted(left.standing) == [0, 1]
    assert left.entries[2].why == "taken out again"
    assert list(left.rows) == [0, left.entries[1].row]
    assert not torch.equal(left.rows[left.entries[1].row].value, found.rows[found.entries[1].row].value)
    close(change(left), all_at_once(model, left.rows.values(), Terms(a=20.0, b=1.0), prepared.moment.C))
    again = run(model, prepared, tmp_path, [*FACTS[:2], other])
    assert sorted(again.standing) == [0, 1], "nothing changes by the same command"
    sequence.save(sequence.reverted(model, found, 2, prepared), tmp_path / "state.safetensors")
    later = run(model, prepared, tmp_path, [*FACTS[:2], other])
    assert (sorted(later.standing), later.waiting) == ([0, 1], {}), "what waits is written again by going on"
    assert torch.equal(change(later), change(left))
    assert take_out([1, 0], tmp_path).standing == {}
    sequence.save(found, tmp_path / "state.safetensors")
    assert sorted(take_out([1, 2], tmp_path).standing) == [0], "both of one row"


def test_of_an_editor_that_adds_changes_up_none_is_taken_out(model, tmp_path, monkeypatch):
    widen_bands(monkeypatch)
    settings = FineTuningSettings(layer=LAYER, steps=2, prepend_bos=False, guard="warn")
    run(model, None, tmp_path, FACTS[:2], settings, "ft")
    with pytest.raises(SequenceError, match="the editor ft with these settings adds changes up, and none can be taken"):
        extending.take_out(model, [0], tmp_path)


class Own(Sequential):
    """An editor from outside, which no list of names has."""

    name = "own"


class Strong(Sequential):
    """One that is made with something."""

    name = "strong"

    def __init__(self, times=1.0):
        self.times = times


def test_an_editor_that_its_class_alone_does_not_make_is_refused_before_anything_is_edited(model, prepared, tmp_path):
    with pytest.raises(SequenceError, match="made without arguments; strong was made with times"):
        run(model, prepared, tmp_path, editor=Strong(2.0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("how", "what"), [({"sought": "unedited"}, "sought = unedited"), ({"shared": False}, "no-shared")]
)
def test_options_of_one_solve_for_all_are_refused_where_changes_are_added_up(how, what, model, tmp_path):
    settings = FineTuningSettings(layer=LAYER, steps=2, prepend_bos=False, guard="warn")
    with pytest.raises(SequenceError, match=rf"{what}\) are of editors whose change is one solve for all .*found ft"):
        run(model, None, tmp_path, FACTS[:2], settings, "ft", **how)


class Namesake(Sequential):
    """One that has the name of another."""


def test_an_editor_of_ones_own_takes_edits_out_by_where_it_is(model, prepared, tmp_path, take_out):
    found = run(model, prepared, tmp_path, FACTS[:3], editor=f"{__name__}:Own")
    left = sequence.reverted(model, found, 1, prepared)
    assert torch.equal(change(take_out([1], tmp_path)), change(left))
    close(change(left), all_at_once(model, left.rows.values(), Terms(a=20.0, b=1.0), prepared.moment.C))
    with pytest.raises(SequenceError, match="of the editor own, not of sequential"):
        run(model, prepared, tmp_path, FACTS[:3])
    run(model, prepared, tmp_path / "same", FACTS[:1])
    with pytest.raises(
        SequenceError, match=f"of the editor mechedit.editors.many:Sequential, not of {__name__}:Namesake"
    ):
        run(model, prepared, tmp_path / "same", FACTS[:1], editor=Namesake())


def test_what_cannot_be_written_again_says_why(model, prepared, tmp_path, take_out, monkeypatch):
    other = replace(FACTS[1], template=SPORT, target_new="violin")
    run(model, prepared, tmp_path, [*FACTS[:2], other])

    def refuse(*_, **__):
        raise edits.EditError("not today")

    monkeypatch.setattr(extending.editing, "edit", refuse)
    left = take_out([2], tmp_path)
    assert (sorted(left.standing), left.entries[1].why) == ([0], "not today")


TWINS = (
    replace(FACTS[0], relation="P1", target_new="London"),
    replace(FACTS[0], subject="Space Needle", template="The {} is located in the city of", target_new="London"),
)


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("together", [1, 5])
def test_one_prompt_with_two_targets_is_a_conflict_and_loses_no_batch(model, prepared, tmp_path, twin, together):
    facts = [FACTS[0], twin, *FACTS[1:3]]
    found = run(model, prepared, tmp_path / "later", facts, together=together)
    assert (found.conflicts, sorted(found.standing)) == (1, [1, 2, 3])
    refused = run(model, prepared, tmp_path / "refuse", facts, together=together, conflicts="refuse")
    assert (refused.conflicts, sorted(refused.standing)) == (1, [0, 2, 3])


def test_facts_without_a_true_target_are_left_out_of_looks(model, prepared, tmp_path, monkeypatch):
    asked, once = [], watching.scoring.score
    seen = SimpleNamespace(score=lambda model, pairs, **how: asked.extend(pairs) or once(model, pairs, **how))
    monkeypatch.setattr(watching, "scoring", seen)
    bare = [replace(fact, target_true=None) for fact in FACTS[:2]]
    last = run(model, prepared, tmp_path / "none", bare).looks[-1]
    assert (last["success"], last["others"], last["row"], asked) == (None, None, {}, [])
    answered = replace(bare[1], neighbours=("Tokyo is located in the city of",), neighbour_answers=("London",))
    last = run(model, prepared, tmp_path / "some", [bare[0], FACTS[2], answered]).looks[-1]
    assert list(last["row"]) == ["1"]
    assert [target for _, target, _ in asked] == ["Berlin", "Seattle", "Seattle", "Berlin", "London", "Paris"]


@pytest.mark.parametrize("editor", ["rome", "sequential"])
def test_a_fact_that_is_repeated_in_a_batch_and_said_already_still_stands(model, prepared, tmp_path, monkeypatch, editor):  # fmt: skip
    settings = None if editor == "sequential" else RomeSettings(**QUICK, guard="warn")
    said = set()
    monkeypatch.setattr(rehearsing, "says", lambda model, facts, settings: [fact.subject in said for fact in facts])
    other, facts = replace(FACTS[1], target_new="London"), [FACTS[1], FACTS[2], FACTS[1], FACTS[3]]
    found = run(model, prepared, tmp_path / "no", facts, settings, editor, together=2)
    assert sorted(found.standing) == [1, 2, 3], "what is not said is written again, and takes the first one's place"
    for name, more in (("yes", [FACTS[1], FACTS[3]]), ("between", [other, FACTS[1]])):
        said.clear()
        run(model, prepared, tmp_path / name, FACTS[1:3], settings, editor, together=2)
        said.add(FACTS[1].subject)
        found = run(model, prepared, tmp_path / name, [*FACTS[1:3], *more], settings, editor, together=2)
        place = 2 if name == "yes" else 3
        assert sorted(found.standing) == ([0, 1, 3] if name == "yes" else [0, 1])
        assert found.entries[place].why == "the model says it already"
        assert found.conflicts == (0 if name == "yes" else 2)


def test_it_goes_on_with_more_facts_to_the_same_bytes_where_batches_are_the_same(model, prepared, tmp_path):
    for together, every, limits in ((1, 4, (3,)), (2, 4, (2,)), (2, 0, (4,))):
        how = {"together": together, "every": every, **WELL}
        place = tmp_path / f"{together}-{every}"
        whole = run(model, prepared, place / "whole", **how)
        for limit in limits:
            short = run(model, prepared, place / "parts", FACTS[:limit], **how)
            assert short.looks[-1]["edits"] == limit
        assert run(model, prepared, place / "parts", **how).looks == whole.looks
        names = [each.name for each in (place / "whole").iterdir()]
        assert {"state.safetensors", "looks.json"} <= set(names)
        for name in names:
            assert (place / "parts" / name).read_bytes() == (place / "whole" / name).read_bytes(), name


def test_a_look_that_ended_a_run_out_of_its_band_stays(model, prepared, tmp_path):
    stop = WELL | {"most_spectrum": 1e-3, "on_collapse": "stop", "every": 4}
    assert run(model, prepared, tmp_path, FACTS[:3], **stop).collapse["edits"] == 3
    assert len(run(model, prepared, tmp_path, **stop).entries) == 3
    assert [look["edits"] for look in run(model, prepared, tmp_path, **WELL, every=4).looks] == [4, 6]


def test_a_state_of_another_version_is_refused_and_so_is_one_that_names_none(model, prepared, tmp_path, monkeypatch):
    run(model, prepared, tmp_path, FACTS[:1])
    now, state = provenance.versions(), tmp_path / "state.safetensors"
    for name, why in (
        ("torch", re.escape(f"begun with torch = {now['torch']!r}, and this is '0.0.1'")),
        ("python", ""),
    ):
        with monkeypatch.context() as other:
            other.setattr(provenance, "versions", lambda name=name: now | {name: "0.0.1"})
            with pytest.raises(SequenceError, match=why) if why else nullcontext():
                run(model, prepared, tmp_path, FACTS[:1])
    sequence.save(replace(sequence.load(state), versions={}), state)
    with pytest.raises(SequenceError, match="begun with mechedit = 'unknown', and this is"):
        run(model, prepared, tmp_path, FACTS[:1])
    tensors, record = files.read(state, sequence.KIND)
    files.write(state, sequence.KIND, tensors, {name: each for name, each in record.items() if name not in ("versions", "place")})  # fmt: skip
    earlier = sequence.load(state)
    assert len(earlier.standing) == 1, "one of an earlier form is shown"
    for use in (lambda: run(model, prepared, tmp_path, FACTS[:1]), lambda: extending.take_out(model, [0], tmp_path), lambda: sequence.reverted(model, earlier, 0, prepared)):  # fmt: skip
        with pytest.raises(SequenceError, match="of an earlier version of mechedit"):
            use()


def test_a_run_goes_on_by_the_bands_that_it_is_given_now(model, prepared, tmp_path):
    whole = run(model, prepared, tmp_path / "whole", every=2, **WELL)
    for on_collapse, number in (("stop", 2), ("roll back", 0)):
        folder = tmp_path / on_collapse
        assert len(run(model, prepared, folder, every=2, **(ILL | {"on_collapse": on_collapse})).entries) == number
        found = run(model, prepared, folder, every=2, **(WELL | {"on_collapse": on_collapse}))
        assert (len(found.entries), found.looks, found.collapse) == (6, whole.looks, None)
        for path in (tmp_path / "whole").iterdir():
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    run(model, prepared, tmp_path / "ill", FACTS[:2], every=2, **WELL)
    found = run(model, prepared, tmp_path / "ill", every=2, **(ILL | {"on_collapse": "stop"}))
    assert (len(found.entries), found.collapse["edits"]) == (2, 2)


def test_a_measure_that_is_not_finite_is_out_of_its_band_when_it_is_read_again_too(
    model, prepared, tmp_path, monkeypatch
):
    broken = {"perplexity_ratio": math.inf, "next_token_kl": math.nan, "next_token_same": 0.0, "weight_norm_ratio": 1.0}
    monkeypatch.setattr(watching, "health", lambda model, healthy: broken)
    how = WELL | {"every": 2, "on_collapse": "stop"}
    first = run(model, prepared, tmp_path, FACTS[:2], **how)
    assert first.collapse["out"] == ["perplexity_ratio inf above 1e+09", "next_token_kl inf above 1e+09"]
    assert run(model, prepared, tmp_path, **how).looks == first.looks


OTHERS = {"together": 2, "shared": False, "sought": "unedited", "rehearsed": 3, "again": 1, "rounds": 2, "gentle": 2.0, "settle": 2.0, "conflicts": "refuse"}  # fmt: skip


def test_a_state_goes_on_only_with_the_settings_that_decide_what_is_written(model, prepared, tmp_path, take_out):
    assert set(OTHERS) == set(WRITTEN)
    run(model, prepared, tmp_path, FACTS[:1])
    default = SequenceSettings()
    for name, other in OTHERS.items():
        message = f"begun with {name} = {getattr(default, name)!r}, and this is {other!r}; give the same"
        with pytest.raises(SequenceError, match=message):
            run(model, prepared, tmp_path, FACTS[:2], **{name: other})
        with pytest.raises(SequenceError, match=message):
            take_out([0], tmp_path, **{name: other})
    run(model, prepared, tmp_path, FACTS[:2], every=1, sampled=3, keep=2, most_kl=1e9, on_collapse="stop")
    old = replace(sequence.load(tmp_path / "state.safetensors"), how={})
    sequence.save(old, tmp_path / "state.safetensors")
    with pytest.raises(SequenceError, match="begun with together = 'unknown', and this is 1"):
        run(model, prepared, tmp_path, FACTS[:2])


def test_sampled_edits_are_those_of_earlier_looks():
    assert sampled(list(range(5)), 8) == [0, 1, 2, 3, 4]
    assert sampled(list(range(20)), 8) == [0, 2, 4, 8, 10, 12, 16, 18], (
        "00000, 10000, 01000, 00100 and so on, read backwards in order"
    )
    assert sampled(list(range(1, 400, 2)), 128)[:3] == [1, 3, 5], "where none of the even ones stands"
    assert len(sampled(list(range(3, 4000, 8)), 128)) == 128
    assert set(sampled(list(range(1000)), 8)) <= set(sampled(list(range(300)), 8)) | set(range(300, 1000))


@pytest.mark.parametrize("wrong", [{"together": 0}, {"every": -1}, {"least_success": 1.5}, {"most_kl": 0.0}, {"conflicts": "first"}])  # fmt: skip
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(SettingsError, match="must be"):
        SequenceSettings(**wrong)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # twelve processes that load the organism
def test_five_hundred_edits_killed_at_ten_random_moments_end_in_the_same_bytes(tmp_path):
    environment = {**os.environ, "MECHEDIT_CACHE": str(tmp_path / "cache")}
    command = [
        sys.executable,
        "-m",
        "mechedit.cli",
        "edit",
        "--model",
        "organism",
        "--facts",
        "organism",
        "--limit",
        "500",
    ]
    command += ["--editor", "sequential", "--sequence", "--together", "5", "--keep", "20", "--guard", "warn", "--out"]
    subprocess.run([*command, str(tmp_path / "peace")], check=True, env=environment, stdout=subprocess.DEVNULL)
    draws, war = random.Random(0), tmp_path / "war"
    for _ in range(10):
        killed_after([*command, str(war)], environment, war / "state.safetensors", draws.random())
    assert len(sequence.load(war / "state.safetensors").entries) < 500, "it was killed in the middle"
    subprocess.run([*command, str(war)], check=True, env=environment, stdout=subprocess.DEVNULL)
    assert len(sequence.load(war / "state.safetensors").entries) == 500
    for name in ("state.safetensors", "looks.json", "edit.safetensors"):
        assert (war / name).read_bytes() == (tmp_path / "peace" / name).read_bytes(), name
