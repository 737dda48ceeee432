from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mechedit.facts import Fact
from mechedit.files import FileError
from mechedit.settings import SettingsError, TraceSettings
from mechedit.tracing import prepare
from mechedit.tracing.cells import ATTN_OUT, MLP_OUT, RESID_POST, Cell, Patch
from mechedit.tracing.severing import Severed, severed
from tests.conftest import FACT, SHAPES, assert_same_state, state
from tests.slow_trace import loop

SMALL = TraceSettings(draws=3)


@pytest.mark.parametrize("shape", SHAPES)
def test_severed_curves_equal_two_whole_passes_with_one_draw(shape, load):
    model = load(shape)
    prepared = prepare(model, FACT, SMALL)
    at = prepared.prompt.last_subject
    cells = [
        Cell((Patch(RESID_POST, layer, at),), tuple(Patch(held, each, at) for held in components for each in range(4)))
        for components in ((), (MLP_OUT,), (ATTN_OUT,))
        for layer in range(4)
    ]
    slow = loop(model, prepared.ids, prepared.corrupted, prepared.answer_ids[0], cells).view(3, 4, 3)
    before = state(model)
    found = severed(model, FACT, SMALL)
    assert_same_state(model, before)
    assert found.position == at
    for curve, expected in zip(("ordinary", "mlp", "attn"), slow, strict=True):
        torch.testing.assert_close(found.curves[curve], expected, atol=1e-5, rtol=1e-3)
    assert (found.curves["ordinary"] - found.curves["mlp"])[:3].abs().max() > 1e-5
    assert (found.curves["ordinary"] - found.curves["attn"])[:3].abs().max() > 1e-5


def test_nothing_is_left_to_sever_above_the_last_block(model, fact):
    found = severed(model, fact, SMALL)
    for curve in ("mlp", "attn"):
        torch.testing.assert_close(found.curves[curve][-1], found.curves["ordinary"][-1])


def test_the_published_way_holds_values_of_another_draw(model, fact):
    shared, mixed = (severed(model, fact, SMALL, shared_draws=each) for each in (True, False))
    torch.testing.assert_close(shared.curves["ordinary"], mixed.curves["ordinary"])
    assert not torch.allclose(shared.curves["mlp"], mixed.curves["mlp"])
    prepared = prepare(model, fact, SMALL)
    at = prepared.prompt.last_subject
    turned = replace(prepared, corrupted=prepared.corrupted.roll(-1, 0))
    tokens = torch.tensor([list(prepared.ids)]).expand(3, -1)
    _, clean = model.run_with_cache(tokens)
    with model.hooks(fwd_hooks=[("hook_embed", lambda activation, hook: turned.corrupted)]):
        _, other = model.run_with_cache(tokens)

    def put(run, position):
        def hook(activation, hook):
            activation = activation.clone()
            activation[:, position] = run[hook.name][:, position]
            return activation

        return hook

    hooks = [("hook_embed", lambda activation, hook: prepared.corrupted)]
    hooks += [("blocks.1.hook_resid_post", put(clean, at))]
    hooks += [(f"blocks.{layer}.hook_mlp_out", put(other, at)) for layer in (2, 3)]
    with torch.no_grad():
        p = model.run_with_hooks(tokens, fwd_hooks=hooks)[:, -1].softmax(-1)[:, prepared.answer_ids[0]]
    torch.testing.assert_close(mixed.curves["mlp"][1], p, atol=1e-6, rtol=1e-3)


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
    assert replace(loaded, curves={}) == replace(found, curves={})
    first = path.read_bytes()
    assert loaded.save(path).read_bytes() == first
    path.write_bytes(first[:-3])
    with pytest.raises(FileError):
        Severed.load(path)
