from __future__ import annotations

from dataclasses import asdict, replace

import jaxtyping
import pytest
import torch

from mechedit import files
from mechedit.corruption import Statistics
from mechedit.facts import Fact
from mechedit.files import FileError
from mechedit.settings import SettingsError, TraceSettings
from mechedit.tracing import prepare
from mechedit.tracing.cells import MLP_OUT, RESID_POST, Cell, Patch
from mechedit.tracing.engine import sweep
from mechedit.tracing.severing import Severed, severed
from tests.conftest import FACT, SHAPES, assert_same_state, state
from tests.slow_trace import loop, severed_loop

SMALL = TraceSettings(draws=3)


MODULES = {"ordinary": None, "mlp": "blocks.{layer}.hook_mlp_out", "attn": "blocks.{layer}.hook_attn_out"}


@pytest.mark.parametrize("shared_draws", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_severed_curves_are_the_papers_two_passes(shape, shared_draws, load):
    """Modules are held in every block: at values of another draw, those below the restored state act on what is read too."""
    model = load(shape)
    prepared = prepare(model, FACT, SMALL)
    at = prepared.prompt.last_subject
    shift = 0 if shared_draws else 1
    before = state(model)
    found = severed(model, FACT, SMALL, shared_draws=shared_draws)
    assert_same_state(model, before)
    assert found.position == at
    for curve, held in MODULES.items():
        slow = severed_loop(model, prepared.ids, prepared.corrupted, prepared.answer_ids[0], at, held, shift)
        torch.testing.assert_close(found.curves[curve], slow, atol=1e-5, rtol=1e-3)
    assert (found.curves["ordinary"] - found.curves["mlp"])[:3].abs().max() > 1e-5
    assert (found.curves["ordinary"] - found.curves["attn"])[:3].abs().max() > 1e-5


def test_nothing_is_left_to_sever_above_the_last_block(model, fact):
    found = severed(model, fact, SMALL)
    for curve in ("mlp", "attn"):
        torch.testing.assert_close(found.curves[curve][-1], found.curves["ordinary"][-1])


def test_values_of_another_draw_matter_below_the_restored_block_too(model, fact):
    shared, mixed = (severed(model, fact, SMALL, shared_draws=each) for each in (True, False))
    torch.testing.assert_close(shared.curves["ordinary"], mixed.curves["ordinary"])
    for curve in ("mlp", "attn"):
        assert not torch.allclose(shared.curves[curve][0], mixed.curves[curve][0])
    # above the last block nothing is left to sever, but for what was held in the blocks below
    torch.testing.assert_close(shared.curves["mlp"][-1], shared.curves["ordinary"][-1])
    assert not torch.allclose(mixed.curves["mlp"][-1], mixed.curves["ordinary"][-1])


def test_another_draws_values_count_even_where_nothing_corrupted_is_restored(model, fact):
    """A cell whose restored patch stands before the corruption, where clean and corrupted runs agree."""
    prepared = prepare(model, fact, SMALL)
    at, before = prepared.prompt.last_subject, prepared.prompt.subject[0] - 1
    cell = Cell((Patch(RESID_POST, 0, before),), (Patch(MLP_OUT, 2, at),))
    (own, other) = (sweep(model, [prepared.job([cell], shift)])[0] for shift in (0, 1))
    torch.testing.assert_close(own.cells[0], own.corrupted)
    slow = loop(model, prepared.ids, prepared.corrupted, prepared.answer_ids[0], [cell], held_shift=1)
    torch.testing.assert_close(other.cells[..., 0].exp(), slow, atol=1e-6, rtol=1e-3)
    assert not torch.allclose(other.cells[0], other.corrupted)


def test_any_role_can_be_restored_and_one_that_is_not_there_is_an_error(model, fact):
    last = severed(model, fact, SMALL, role="last")
    assert last.position == len(prepare(model, fact, SMALL).ids) - 1
    assert last.answer.strip() == fact.target_true
    assert repr(last).endswith(f"{last.p_clean:.3f} clean, {last.p_corrupted:.3f} corrupted; ordinary, mlp, attn)")
    with pytest.raises(SettingsError, match="no token of 'Paris is' has the role subject_middle"):
        severed(model, Fact("Paris", "{} is", "Seattle"), SMALL, role="subject_middle")


def test_one_draw_has_no_other(model, fact):
    with pytest.raises(SettingsError, match="at least 2 draws"):
        severed(model, fact, replace(SMALL, draws=1), shared_draws=False)
    with pytest.raises(SettingsError, match="at least 2 draws"):
        severed(model, fact, replace(SMALL, corruption="tokens"), other="Rome", shared_draws=False)


def test_another_subject_can_take_its_place(model):
    fact = Fact("Seattle", "The city of {} is in", "Paris", relation="city")
    found = severed(model, fact, replace(SMALL, corruption="tokens"), other="London")
    assert found.curves["mlp"].shape == (4, 1)
    assert found.corrupted_by == "the subject 'London'"


def test_precision_is_obeyed(model, fact):
    half, exact = (severed(model, fact, replace(SMALL, precision=each)) for each in ("bfloat16", "model"))
    assert not torch.equal(half.curves["mlp"], exact.curves["mlp"])
    torch.testing.assert_close(half.curves["mlp"], exact.curves["mlp"], atol=0.02, rtol=0.3)


def test_severed_curves_survive_their_file(model, fact, tmp_path):
    found = severed(model, fact, SMALL)
    path = found.save(tmp_path / "severed.safetensors")
    loaded = Severed.load(path)
    assert all(torch.equal(loaded.curves[name], curve) for name, curve in found.curves.items())
    assert loaded.to_json() == found.to_json()
    first = path.read_bytes()
    assert loaded.save(path).read_bytes() == first
    path.write_bytes(first[:-3])
    with pytest.raises(FileError):
        Severed.load(path)


def test_two_draws_have_another_and_one_is_enough_where_draws_are_shared(model, fact):
    for shared in (True, False):
        assert severed(model, fact, replace(SMALL, draws=2), shared_draws=shared).curves["mlp"].shape == (4, 2)
    assert severed(model, fact, replace(SMALL, draws=1)).curves["mlp"].shape == (4, 1)
    with pytest.raises(SettingsError, match="at least 2 draws; there is 1"):
        severed(model, fact, replace(SMALL, draws=1), shared_draws=False)


def test_what_is_said_beside_the_curves_is_of_plain_runs(model, fact):
    found, prepared = severed(model, fact, SMALL, role="subject_first"), prepare(model, fact, SMALL)
    (answer,) = prepared.answer_ids
    with torch.no_grad():
        clean = model(torch.tensor([list(prepared.ids)]))[0, -1].softmax(-1)[answer]
        corrupting = ("hook_embed", lambda activation, hook: prepared.corrupted)
        tokens = torch.tensor([list(prepared.ids)] * 3)
        corrupted = model.run_with_hooks(tokens, fwd_hooks=[corrupting])[:, -1].softmax(-1)[:, answer]
    assert found.p_clean == pytest.approx(float(clean), rel=1e-3)
    assert found.p_corrupted == pytest.approx(float(corrupted.mean()), rel=1e-3)
    assert found.position == prepared.prompt.subject[0]
    assert (found.role, found.prompt, found.subject) == ("subject_first", fact.prompt, fact.subject)
    assert (found.shared_draws, found.settings.draws) == (True, 3)
    said = found.to_json()
    for name, curve in found.curves.items():
        assert said["curves"][name] == pytest.approx([sum(row) / 3 for row in curve.tolist()])
    assert said["settings"]["draws"] == 3
    assert severed(model, fact, SMALL, shared_draws=False).shared_draws is False


def test_embeddings_statistics_that_are_given_say_how_large_the_noise_is(model, fact):
    small = Statistics(1e-6, "nothing to speak of")
    quiet = severed(model, fact, SMALL, statistics=small)
    assert quiet.p_corrupted == pytest.approx(quiet.p_clean, rel=1e-3)
    assert quiet.corrupted_by == "gaussian noise, sigma of nothing to speak of"
    loud = severed(model, fact, SMALL)
    assert loud.corrupted_by == "gaussian noise, sigma of vocabulary"
    assert abs(loud.p_corrupted - loud.p_clean) > 1e-3 * loud.p_clean


def test_progress_is_told(model, fact):
    calls = []
    severed(model, fact, SMALL, progress=lambda *call: calls.append(call))
    assert calls
    assert calls[-1][1] == calls[-1][2]


SPOILT = {
    "a curve less": lambda curves, record: curves.pop("mlp"),
    "whole numbers": lambda curves, record: curves.update(attn=torch.ones(4, 3, dtype=torch.int64)),
    "one number": lambda curves, record: curves.update(ordinary=torch.tensor(1.0)),
    "no draws apart": lambda curves, record: curves.update(ordinary=torch.ones(4)),
    "three axes": lambda curves, record: curves.update(mlp=torch.ones(4, 3, 1)),
    "no layers": lambda curves, record: curves.update(mlp=torch.ones(0, 3)),
    "no draws": lambda curves, record: curves.update(mlp=torch.ones(4, 0)),
    "unknown settings": lambda curves, record: record["settings"].update(new=1),
    "settings that cannot be": lambda curves, record: record["settings"].update(draws=-1),
    "something more": lambda curves, record: record.update(new=1),
    "a position of text": lambda curves, record: record.update(position="3"),
    "a probability of text": lambda curves, record: record.update(p_clean="high"),
    "a truth value that is none": lambda curves, record: record.update(shared_draws=1),
    "no model's name": lambda curves, record: record.update(origin={}),
} | {f"no {name}": lambda curves, record, name=name: record.pop(name) for name in ("prompt", "subject", "answer", "position", "role", "p_clean", "p_corrupted", "settings", "shared_draws", "corrupted_by", "origin", "versions")}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_a_file_that_holds_what_no_curves_are_is_refused(name, model, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own checks, which users do not have
    curves = {name: torch.rand(4, 3) for name in ("ordinary", "mlp", "attn")}
    record = {"prompt": "Rome is", "subject": "Rome", "answer": " in", "position": 1, "role": "last", "p_clean": 0.5, "p_corrupted": 0.1, "settings": asdict(SMALL), "shared_draws": True, "corrupted_by": "noise", "origin": {"name": "tiny"}, "versions": {}}  # fmt: skip
    path = files.write(tmp_path / "severed", "severed", curves, record)
    loaded = Severed.load(path)
    assert torch.equal(loaded.curves["mlp"], curves["mlp"])
    assert (loaded.settings, loaded.p_clean) == (SMALL, 0.5)
    SPOILT[name](curves, record)
    with pytest.raises(FileError, match="lacks something, or has what is not known"):
        Severed.load(files.write(path, "severed", curves, record))
