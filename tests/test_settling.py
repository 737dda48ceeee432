"""All values of a sequence found anew together: the loss against whole passes of the model, and what it does to a run."""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import log

import pytest
import torch
from scipy.optimize import minimize

from mechedit import losses, models, moments, prompts
from mechedit.editors import named
from mechedit.editors.earlier import latest
from mechedit.editors.rome import Prepared
from mechedit.keys import contexts, subject_keys
from mechedit.recursive import least_squares
from mechedit.runs import extending, settling
from mechedit.runs.extending import run_sequence, take_out
from mechedit.runs.sequence import written
from mechedit.runs.settling import is_due, settled
from mechedit.settings import MomentSettings, SequenceSettings, SequentialSettings, SettingsError
from mechedit.weights import Weight
from tests.conftest import widen_bands
from tests.test_sequence import FACTS, LAYER, QUICK

pytestmark = pytest.mark.anywhere

WEIGHT = Weight(LAYER, "mlp.W_out")
PREFIXES = ("", "Rome. ")
GENTLE = SequentialSettings(**QUICK | {"steps": 3}, a=20.0)


@pytest.fixture
def prepared(model, monkeypatch):
    widen_bands(monkeypatch)
    windows = MomentSettings(tokens=600, context=32, prepend_bos=False)
    moment = moments.estimate(model, LAYER, settings=windows)
    return Prepared(moment, PREFIXES, moment, moments.fisher(model, LAYER, settings=windows))


def begun(model, prepared, folder, facts=FACTS, **how):
    how = SequenceSettings(**({"every": 0, "settle": 0.0, "together": 3} | how))
    return run_sequence(model, facts, folder, how, "sequential", GENTLE, prepared)


def again(model, found, prepared, settings=GENTLE, how=SequenceSettings()):  # noqa: B008
    settings = named("sequential").resolve(model, settings)
    return settled(model, found, settings, how, prepared, latest(prepared, settings))


def plain(model, found, prepared, change):
    """The loss of a change of W_out in place of the sequence's own, felt at subjects' last tokens; by whole passes, and its slope."""
    change = change.clone().requires_grad_()
    total, standing = torch.zeros((), dtype=torch.float64), found.totals[WEIGHT].double()
    keys = torch.stack([row.key for row in found.rows.values()]).double()
    for entry in found.standing.values():
        fact = entry.as_fact
        target = prompts.continuation(model, fact.prompt, str(fact.target_new), fact.join)
        for row in contexts(model, fact, PREFIXES, "subject_last", prepend_bos=False):
            key = subject_keys(model, LAYER, (row,))[0].double()

            def add(module, args, output, row=row, key=key):
                return output.index_put((torch.tensor([0]), torch.tensor([row.lookup])), (key @ (change - standing)).to(output)[None], accumulate=True)  # fmt: skip

            handle = models.mlp_module(model, LAYER).register_forward_hook(add)
            said = model(torch.tensor([[*row.ids, *target[:-1]]]))[0].double().log_softmax(-1)
            handle.remove()
            total = total - sum(said[row.last + place, token] for place, token in enumerate(target)) / (2 * len(target))
    C, G = prepared.moment.C.double(), prepared.fisher.G.double()
    G = G * 2 * len(G) / (G.trace() * prepared.fisher.square)
    spread = torch.stack([key @ torch.linalg.solve(C, key) for key in keys]).mean()
    total = total + GENTLE.fisher * spread * torch.trace(G @ change.T @ C @ change) / 2
    (slope,) = torch.autograd.grad(total, change)
    return float(total), slope


@pytest.mark.both
def test_the_loss_of_all_is_that_of_whole_passes(model, prepared, tmp_path):
    found = begun(model, prepared, tmp_path)
    settings, metric = named("sequential").resolve(model, GENTLE), latest(prepared, GENTLE)
    rows, b = list(found.rows), settings.b
    with written(model, found), models.frozen(model):
        loss = settling._Loss(model, found, settings, prepared, metric)
        more = 0.05 * torch.randn(loss.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        at = [loss.at(each) for each in (torch.zeros_like(more), more)]
    keys = torch.stack([found.rows[row].key for row in rows]).double()
    M = GENTLE.a * prepared.moment.C.double() + b * keys.T @ keys
    with written(model, found):
        for change, (own, slope) in zip((torch.zeros_like(more), more), at, strict=True):
            D = found.totals[WEIGHT].double() + b * torch.linalg.solve(M, keys.T @ change)
            expected, by_change = plain(model, found, prepared, D)
            assert float(own) == pytest.approx(expected, rel=1e-5)
            torch.testing.assert_close(slope, b * keys @ torch.linalg.solve(M, by_change), rtol=1e-3, atol=1e-5)


def test_one_loss_of_all_gets_least_and_the_change_is_the_one_solve_for_the_new_targets(model, prepared, tmp_path, monkeypatch):  # fmt: skip
    """Against another optimiser with the slope by whole passes."""
    found = begun(model, prepared, tmp_path, FACTS[:3])
    made = again(model, found, prepared)
    keys = torch.stack([row.key for row in found.rows.values()]).double()
    reach = torch.linalg.solve(GENTLE.a * prepared.moment.C.double() + keys.T @ keys, keys.T)
    first = found.totals[WEIGHT].double()

    def loss(more):
        value, slope = plain(model, found, prepared, first + reach @ torch.from_numpy(more).view(len(keys), -1))
        return value, (reach.T @ slope).flatten().numpy()

    with written(model, found):
        before, after = (plain(model, found, prepared, each.totals[WEIGHT].double())[0] for each in (found, made))
        least = minimize(loss, torch.zeros(reach.shape[1] * first.shape[1]).double().numpy(), jac=True, method="L-BFGS-B", options={"maxiter": 100}).fun  # fmt: skip
        assert least < after < before - 0.5 * (before - least), "in few steps"
        monkeypatch.setattr(settling, "STEPS", 100)
        monkeypatch.setattr(settling, "LEAST", 1e-6)
    longer = again(model, found, prepared)
    with written(model, found):
        reached = plain(model, found, prepared, longer.totals[WEIGHT].double())[0]
    assert abs(reached - least) < 0.1 * (before - least)
    assert made.rows.keys() == found.rows.keys()
    assert all(torch.equal(made.rows[row].key, each.key) for row, each in found.rows.items())
    W, b = models.W_out(model, LAYER).detach().double(), models.b_out(model, LAYER).detach().double()
    K, V = (torch.stack([getattr(row, name) for row in made.rows.values()]).double() for name in ("key", "value"))
    solve = torch.linalg.solve(GENTLE.a * prepared.moment.C.double() + K.T @ K, K.T @ (V - K @ W - b))
    torch.testing.assert_close(made.totals[WEIGHT].double(), solve, rtol=0, atol=1e-5 * float(solve.abs().max()))


@pytest.mark.parametrize("name", ["MEMORY", "KEPT"])
def test_with_little_memory_it_finds_the_same(model, prepared, tmp_path, name, monkeypatch):
    found = begun(model, prepared, tmp_path)
    monkeypatch.setattr(settling, "STEPS", 3)  # more of them make more of rounding
    whole = again(model, found, prepared)
    assert float((whole.totals[WEIGHT] - found.totals[WEIGHT]).norm()) > 0.01 * float(found.totals[WEIGHT].norm())
    monkeypatch.setattr(losses, "MEMORY", 1)
    if name == "KEPT":
        monkeypatch.setattr(settling, "KEPT", 1)
    made = again(model, found, prepared)
    torch.testing.assert_close(made.totals[WEIGHT], whole.totals[WEIGHT], rtol=0, atol=1e-3 * float(whole.totals[WEIGHT].abs().max()))  # fmt: skip


def test_an_edit_is_taken_out_of_a_settled_sequence_as_of_any_other(model, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(extending.editing, "make_ready", lambda *_, **__: prepared)
    found = begun(model, prepared, tmp_path, settle=0.5, rounds=0)
    assert take_out(model, [2], tmp_path).standing.keys() == found.standing.keys() - {2}
    left = take_out(model, [], tmp_path)
    metric, rows = latest(prepared, GENTLE), [row for number, row in found.rows.items() if number != found.entries[2].row]  # fmt: skip
    sums = type(found.sums).none(*found.sums.Q.shape).plus(*extending.parts_of(model, LAYER, rows))
    torch.testing.assert_close(left.totals[WEIGHT], least_squares(metric, sums), rtol=0, atol=1e-6)


def test_a_run_settles_as_it_grows_and_goes_on_with_the_same_bits(model, prepared, tmp_path, monkeypatch):
    at = []

    def counted(model, found, *given, **named):
        at.append(len(found.entries))
        return settled(model, found, *given, **named)

    monkeypatch.setattr(settling, "settled", counted)
    how = {"settle": 0.5, "together": 1, "rounds": 0}
    whole = begun(model, prepared, tmp_path / "whole", FACTS[:4], **how)
    assert at == [2, 3, 4]
    begun(model, prepared, tmp_path / "parts", FACTS[:3], **how)
    parts = begun(model, prepared, tmp_path / "parts", FACTS[:4], **how)
    assert torch.equal(parts.totals[WEIGHT], whole.totals[WEIGHT])
    asked, says = [], extending.rehearsing.says
    monkeypatch.setattr(extending.rehearsing, "says", lambda *given: asked.append(1) or says(*given))
    begun(model, prepared, tmp_path / "asked", FACTS[:2], **how | {"rounds": 1})
    assert len(asked) == 3, "after each of two facts, and after settling"
    never = begun(model, prepared, tmp_path / "never", FACTS[:4], **how | {"settle": 0.0})
    assert not torch.equal(never.totals[WEIGHT], whole.totals[WEIGHT])


def test_what_settles_is_told_to_whoever_waits(model, prepared, tmp_path):
    found, told = begun(model, prepared, tmp_path), []
    settings = named("sequential").resolve(model, GENTLE)
    settled(model, found, settings, SequenceSettings(), prepared, latest(prepared, settings), progress=lambda *each: told.append(each))  # fmt: skip
    assert told[0] == ("finding all values anew", 0, settling.STEPS)
    assert told[-1] == ("finding all values anew", settling.STEPS, settling.STEPS)


def test_it_is_due_at_powers_of_the_growth_wherever_batches_end():
    for growth in (0.25, 0.5, 1.0):
        due = [n for n in range(1, 2000) if is_due(n - 1, n, growth)]
        assert len(due) <= log(2000) / log(1 + growth)
        assert all(later <= (1 + growth) * earlier + 2 for earlier, later in itertools.pairwise(due))
        batches = [(n, n + 50) for n in range(0, 1950, 50)]
        assert all(is_due(first, last, growth) == any(first < n <= last for n in due) for first, last in batches)
    assert not any(is_due(n, n + 1, 0.0) for n in range(100))
    assert not is_due(0, 1, 0.5)


def test_it_asks_some_of_a_facts_prompts_the_bare_one_among_them(model, prepared, tmp_path, monkeypatch):
    found, asked = begun(model, prepared, tmp_path), []

    def made(self, *given, once=losses.Losses.__init__):
        asked.extend(given[1])
        once(self, *given)

    monkeypatch.setattr(losses.Losses, "__init__", made)
    for most, sought_with, n in ((6, 0, 2), (1, 0, 1), (6, 1, 1)):
        monkeypatch.setattr(settling, "PROMPTS", most)
        asked.clear()
        again(model, found, prepared, replace(GENTLE, sought_with=sought_with))
        assert [len(each.rows) for each in asked] == [n] * len(FACTS)
        bare = [contexts(model, fact, ("",), "subject_last", prepend_bos=False)[0].ids for fact in FACTS]
        assert [each.rows[0].ids for each in asked] == bare


@pytest.mark.parametrize("what", ["one fact", "no G", "no slack"])
def test_it_leaves_alone_what_it_is_not_for(model, prepared, tmp_path, what):
    found = begun(model, prepared, tmp_path, FACTS[:1] if what == "one fact" else FACTS)
    settings = replace(GENTLE, **{"no G": {"fisher": 0.0}, "no slack": {"loose": 0.0}}.get(what, {}))
    assert again(model, found, prepared, settings) is found


@pytest.mark.parametrize("growth", [-0.5, 0.001])
def test_a_growth_that_cannot_be_is_refused(growth):
    with pytest.raises(SettingsError, match=r"settle must be 0 \(never\), or a growth of at least 0.01; found"):
        SequenceSettings(settle=growth)
