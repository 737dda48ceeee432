from __future__ import annotations

from dataclasses import replace

import pytest
import torch

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
