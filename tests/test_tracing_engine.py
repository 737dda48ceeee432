from __future__ import annotations

import weakref
from dataclasses import replace

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mechedit import models, prompts
from mechedit.settings import SettingsError, TraceSettings
from mechedit.tracing import baseline, engine, passes, prepare, restore, trace
from mechedit.tracing.baseline import Job, Read
from mechedit.tracing.cells import (
    ATTN_OUT,
    COMPONENTS,
    MLP_OUT,
    POST,
    RESID_POST,
    Cell,
    Component,
    Patch,
    Z,
    single,
    window,
)
from tests.conftest import FACT, SHAPES, assert_same_state, state
from tests.slow_trace import loop

SMALL = TraceSettings(draws=3, window=2)
SHAPE = pytest.mark.parametrize("shape", SHAPES)
IDS = (0, 40, 50, 60, 70, 80, 90)
NAMES = sorted(COMPONENTS)


def grid(model, kind, width=2):
    """Every cell of a kind, layers first."""
    component = {"resid": RESID_POST, "mlp": MLP_OUT, "attn": ATTN_OUT}[kind]
    n = len(prompts.prepare(model, FACT).ids)
    layers = [[layer] if kind == "resid" else window(layer, width, 4) for layer in range(4)]
    return [single(component, each, position) for each in layers for position in range(n)]


def corrupted_embeddings(model, ids, begin, span, draws):
    """Embeddings with fixed noise on some tokens."""
    clean = models.embed(model, torch.tensor([ids]))[0].repeat(draws, 1, 1)
    clean[:, begin : begin + span] += torch.randn(draws, span, 32, generator=torch.Generator().manual_seed(0))
    return clean


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["resid", "mlp", "attn"])
def test_every_cell_equals_one_forward_pass_for_it(shape, kind, load):
    model = load(shape)
    prepared = prepare(model, FACT, SMALL)
    n = len(prepared.ids)
    slow = loop(model, prepared.ids, prepared.corrupted, prepared.answer_ids[0], grid(model, kind)).view(4, n, 3)
    before = state(model)  # after the loop: a bridge's first cached run installs hooks of its own for good
    found = trace(model, FACT, replace(SMALL, kinds=(kind,)))
    assert found.noise_std == pytest.approx(3 * models.embedding_std(model))
    torch.testing.assert_close(found.draws[kind], slow, atol=1e-5, rtol=1e-3)
    assert slow.std() > 1e-4, "the cells must differ for this to say anything"
    assert_same_state(model, before)


# plain tuples, because a strategy that builds checked objects would use the checker's random numbers
patches = st.tuples(
    st.sampled_from(NAMES),
    st.integers(0, 3),
    st.integers(0, 6),
    st.none() | st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True).map(tuple),
)


any_cell = st.tuples(st.lists(patches, min_size=1, max_size=4), st.lists(patches, max_size=3))


def build(cell):
    restored, held = (
        tuple(Patch(COMPONENTS[name], layer, position, part) for name, layer, position, part in each) for each in cell
    )
    return Cell(restored, held)


def conflict(cell):
    """Whether a cell says two things of one place, or of both sides of a seam between blocks."""
    places = [(patch.component.enters is not None, patch.start, patch.position, patch.component.name if patch.component.enters is None else "") for patch in (*cell.restored, *cell.held)]  # fmt: skip
    return len(set(places)) < len(places)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    cells=st.lists(any_cell, min_size=1, max_size=4),
    begin=st.integers(0, 4),
    span=st.integers(1, 3),
    draws=st.integers(1, 3),
    row_tokens=st.sampled_from([5, 20, 2048]),
    held_shift=st.integers(0, 1),
)
def test_any_cells_equal_one_forward_pass_each(shape, cells, begin, span, draws, row_tokens, held_shift, load):
    model = load(shape)
    lacking = {"resid_mid"} if shape in {"gptj", "neox"} else set()
    cells = [
        cell
        for cell in map(build, cells)
        if not conflict(cell) and not lacking & {patch.component.name for patch in (*cell.restored, *cell.held)}
    ]
    corrupted = corrupted_embeddings(model, IDS, begin, span, draws)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "ROW_TOKENS", row_tokens)
        (fast,) = engine.sweep(model, [Job(IDS, corrupted, (Read(6, (33,)),), tuple(cells), held_shift)])
    if cells:
        slow = loop(model, IDS, corrupted, 33, cells, held_shift)
        torch.testing.assert_close(fast.cells[..., 0].exp(), slow, atol=1e-5, rtol=1e-3)


@SHAPE
def test_prompts_of_any_length_share_a_batch(shape, load):
    model = load(shape)
    jobs = []
    for length, begin in ((7, 2), (4, 1), (5, 2), (6, 0)):
        ids = IDS[:length]
        cells = [single(component, range(layer, min(4, layer + 2)), position)
                 for component in (RESID_POST, MLP_OUT, Z) for layer in range(4) for position in range(length)]  # fmt: skip
        reads = (Read(length - 1, (33, 34)),)
        jobs.append(Job(ids, corrupted_embeddings(model, ids, begin, 2, 2), reads, tuple(cells)))
    together = engine.sweep(model, jobs)
    for job, mine in zip(jobs, together, strict=True):
        (alone,) = engine.sweep(model, [job])
        torch.testing.assert_close(mine.cells, alone.cells, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(mine.clean, alone.clean, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(mine.corrupted, alone.corrupted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (single(MLP_OUT, [4], 1), "block from 0 to 3; found 4"),
        (single(MLP_OUT, [-1], 1), "block from 0 to 3; found -1"),
        (single(MLP_OUT, [1], 99), "position from 0 to"),
        (single(Z, [1], 1, (9,)), r"index of a patch of z must be from 0 to 3; found 9"),
        (single(Z, [1], 0, (9,)), r"index of a patch of z must be from 0 to 3; found 9"),
        (single(MLP_OUT, [1], 1, (0, -1)), r"index of a patch of mlp_out must be from 0 to 31; found 0, -1"),
        (single(POST, [1], 1, (128,)), r"index of a patch of post must be from 0 to 127; found 128"),
        (single(Component("q9", "blocks.{layer}.attn.hook_q9"), [1], 1), "has no q9: there is no hook point"),
    ],
)
def test_cells_that_name_what_is_not_there_are_errors_before_the_model_runs(model, fact, cell, message, monkeypatch):
    monkeypatch.setattr(models.Blocks, "run", lambda *args, **kwargs: pytest.fail("the model ran"))
    with pytest.raises(models.ModelError, match=message):
        restore(model, fact, [cell], SMALL)


def test_a_small_budget_gives_the_same_numbers(model, fact, monkeypatch):
    whole = trace(model, fact, SMALL)
    tokens = []
    original = passes.Pass.found
    monkeypatch.setattr(passes.Pass, "found", lambda self: tokens.append(self.row_tokens) or original(self))
    tight = trace(model, fact, replace(SMALL, memory=2e-4))
    assert len(tokens) > len(whole.tokens)
    assert min(tokens) < passes.ROW_TOKENS
    for kind in SMALL.kinds:
        torch.testing.assert_close(whole.draws[kind], tight.draws[kind], atol=1e-6, rtol=1e-4)


class Allocated(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at one time."""

    def __enter__(self):
        self.now, self.most = 0, 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {each.untyped_storage()._cdata for each in tree_leaves(args) if isinstance(each, torch.Tensor)}
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and each.untyped_storage()._cdata not in old:
                size = each.untyped_storage().nbytes()
                self.now += size
                weakref.finalize(each.untyped_storage(), self.freed, size)
        self.most = max(self.most, self.now)
        return out

    def freed(self, size):
        self.now -= size


def test_the_budget_bounds_draws(model):
    """What 30 draws keep is more than the budget's half, so they are swept some at a time, to the same numbers."""
    corrupted = corrupted_embeddings(model, IDS, 1, 3, 30)
    cells = [single(RESID_POST, [1], 2), single(MLP_OUT, [1], 5)]
    cells.append(Cell((Patch(RESID_POST, 1, 2),), (Patch(MLP_OUT, 2, 2),)))
    job = Job(IDS, corrupted, (Read(6, (33,)),), tuple(cells), held_shift=1)
    with Allocated() as used:
        (whole,) = engine.sweep(model, [job])
    assert used.most > 900_000, "the budget must matter for this to say anything"
    with Allocated() as used:
        (parts,) = engine.sweep(model, [job], memory=400_000)
    assert 100_000 < used.most < 800_000
    torch.testing.assert_close(parts.cells, whole.cells, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(parts.corrupted, whole.corrupted, atol=1e-6, rtol=1e-4)
    assert torch.equal(parts.clean, whole.clean)


def test_a_budget_too_small_for_one_draw_says_what_is_needed(model, fact):
    with pytest.raises(
        SettingsError, match=r"memory must be at least .* gigabytes for a prompt of \d+ tokens"
    ) as error:
        trace(model, fact, replace(SMALL, memory=1e-6))
    needed = float(str(error.value).split("at least ")[1].split(" ")[0])
    trace(model, fact, replace(SMALL, memory=1.1 * needed, kinds=("mlp",)))


def test_jobs_that_do_not_fit_together_are_swept_in_turn(model):
    jobs = [
        Job(IDS[:length], corrupted_embeddings(model, IDS[:length], 1, 2, 2), (Read(length - 1, (33,)),),
            tuple(single(MLP_OUT, [layer], 2) for layer in range(4)))
        for length in (5, 7, 6)
    ]  # fmt: skip
    whole, parts = (engine.sweep(model, jobs, memory=memory) for memory in (1 << 30, 60_000))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.cells, other.cells, atol=1e-6, rtol=1e-4)


def test_nothing_is_computed_that_nobody_reads(load, monkeypatch):
    """Earlier keys and values are not copied, and the last block gives the positions that are read alone."""
    model = load("gemma3")
    if models.is_bridge(model):
        pytest.skip("a bridge's blocks are run whole")
    widths: dict[int, set[int]] = {}
    run = models.parts.run

    def counted(block, resid, earlier, begin):
        out = run(block, resid, earlier, begin)
        widths.setdefault(list(model.blocks).index(block), set()).add(out.shape[1])
        return out

    prepared = prepare(model, FACT, SMALL)
    slow = {kind: loop(model, prepared.ids, prepared.corrupted, prepared.answer_ids[0], grid(model, kind))
            for kind in ("resid", "mlp", "attn")}  # fmt: skip
    monkeypatch.setattr(models.parts, "run", counted)
    monkeypatch.setattr(models.KeyValues, "rows", lambda *args: pytest.fail("a past was copied"))
    found = trace(model, FACT, SMALL)
    for kind, expected in slow.items():
        torch.testing.assert_close(found.draws[kind].flatten(0, 1), expected, atol=1e-5, rtol=1e-3)
    whole = len(prepared.ids) - len(prepared.ids) // 2  # where parts are compared, once
    assert widths[3] <= {1, len(prepared.ids) // 2}
    assert max(widths[2]) > whole


def test_a_logit_difference_needs_no_other_logits(model, fact, monkeypatch):
    settings_ = replace(SMALL, measure="logit_difference")
    prepared = prepare(model, fact, settings_)
    (read,) = prepared.reads
    cells = grid(model, "mlp")
    log_p = [loop(model, prepared.ids, prepared.corrupted, token, cells).log() for token in read.targets]
    monkeypatch.setattr(models.Blocks, "log_p", lambda *args: pytest.fail("a normaliser was computed"))
    found, _, _ = restore(model, fact, cells, settings_)
    torch.testing.assert_close(found, log_p[0] - log_p[1], atol=1e-4, rtol=1e-3)


def test_small_batches_give_the_same_numbers(model, fact, monkeypatch):
    whole = trace(model, fact, SMALL)
    monkeypatch.setattr(passes, "ROW_TOKENS", 20)
    monkeypatch.setattr(baseline, "UNEMBED_ROWS", 2)
    parts = trace(model, fact, SMALL)
    for kind in SMALL.kinds:
        torch.testing.assert_close(whole.draws[kind], parts.draws[kind], atol=1e-6, rtol=1e-4)


def test_ctrl_c_leaves_the_model_as_it_was(model, fact):
    before = state(model)

    def interrupt(what, done, of):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace(model, fact, SMALL, progress=interrupt)
    assert_same_state(model, before)


def test_progress_counts_to_the_end(model, fact):
    calls = []
    trace(model, fact, SMALL, progress=lambda *call: calls.append(call))
    assert calls[0][:2] == ("trace", 0)
    assert calls[-1][1] == calls[-1][2]


@pytest.mark.parametrize("name", ["attn.hook_rot_k", "attn.hook_rot_q", "attn.hook_v"])
@pytest.mark.parametrize("shape", ["llama", "gemma3"])
def test_a_component_whose_activation_has_all_positions_is_restored_where_it_is_said(shape, name, load):
    """Rotated keys are those of the earlier positions too, whatever part of a prompt is computed."""
    model, component = load(shape), Component("own", "blocks.{layer}." + name)
    if component.at(0) not in model.hook_dict:
        pytest.skip(f"this model class has no {name}")
    prepared = prepare(model, FACT, SMALL)
    cells = [single(component, [layer], position) for layer in (0, 2) for position in range(1, len(prepared.ids))]
    slow = loop(model, prepared.ids, prepared.corrupted, prepared.answer_ids[0], cells)
    found, _, corrupted = restore(model, FACT, cells, SMALL)
    torch.testing.assert_close(found, slow, atol=1e-5, rtol=1e-3)
    assert float((found - corrupted).abs().max()) > 1e-5, "the cells must do something for this to say anything"


# --- what is swept together, and what a cell is made of ---------------------------------------------------------------


def some_jobs(model, lengths=(5, 7, 6), draws=6, shifts=(0, 0, 0)):
    return [
        Job(IDS[:length], corrupted_embeddings(model, IDS[:length], 1, 2, draws), (Read(length - 1, (33,)),),
            (single(MLP_OUT, [1], 2), Cell((Patch(RESID_POST, 0, 2),), (Patch(MLP_OUT, 2, 2),))), shift)
        for length, shift in zip(lengths, shifts, strict=True)
    ]  # fmt: skip


def kept_bytes(model, length=7):
    """What is kept of a clean run and of a corrupted one, counted by hand for the cells of `some_jobs`, in float32."""
    d_model, n_layers, kv = 32, 4, 32
    inside = 32  # the MLP's output, restored by one cell and held by another
    return 4 * length * ((n_layers + 1) * d_model + inside), 4 * length * ((n_layers + 1) * d_model + inside + 2 * n_layers * kv)  # fmt: skip


def test_all_jobs_and_draws_that_fit_half_of_the_memory_are_swept_together(model):
    jobs = some_jobs(model)
    clean, each = kept_bytes(model)
    whole = 2 * 3 * (clean + 6 * each)
    every = range(6)
    assert engine._parts(model, jobs, whole) == [([0, 1, 2], every)]
    assert engine._parts(model, jobs, whole - 2) == [([0, 1], every), ([2], every)]
    assert engine._parts(model, jobs, 2 * 2 * (clean + 6 * each)) == [([0, 1], every), ([2], every)]
    assert engine._parts(model, jobs, 2 * 2 * (clean + 6 * each) - 2) == [([0], every), ([1], every), ([2], every)]
    assert engine._parts(model, jobs, 2 * (clean + 6 * each)) == [([0], every), ([1], every), ([2], every)]


@pytest.mark.parametrize("shift", [0, 1, 2, 7])
@pytest.mark.parametrize("together", [2, 3, 5])
def test_draws_that_do_not_fit_are_swept_in_turn_each_with_the_one_that_it_holds(together, shift, model):
    """`together` draws fit, less those whose values are held; a shift of 7 among 6 draws is one of 1."""
    jobs = some_jobs(model, shifts=(0, shift, 0))
    clean, each = kept_bytes(model)
    found = engine._parts(model, jobs, 2 * (clean + together * each))
    draws = max(1, together - shift % 6)
    expected = [range(at, min(at + draws, 6)) for at in range(0, 6, draws)]
    assert found == [([job], own) for job in range(3) for own in expected]
    assert engine._parts(model, jobs, 2 * (clean + (together + 1) * each) - 2) == found, "a byte too few for one more"


@pytest.mark.parametrize("shift", [0, 1])
def test_the_least_memory_is_one_draws_runs_and_one_cells_rows(shift, model):
    jobs = some_jobs(model, shifts=(0, shift, 0))
    clean, each = kept_bytes(model)
    rows = 2 * (1 + shift) * (7 + 4) * 32 * 4  # states twice, of each draw, at every position and block, in float32
    needed = clean + (1 + shift) * each + rows
    assert engine._bytes_of_a_member(model, 1 + shift, 7) == rows
    assert engine._parts(model, jobs, needed) == [([job], range(at, at + 1)) for job in range(3) for at in range(6)]
    with pytest.raises(SettingsError, match=rf"at least {needed / (1 << 30):.2g} gigabytes for a prompt of 7 tokens"):
        engine._parts(model, jobs, needed - 1)


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.25, 0.12])
def test_jobs_of_different_lengths_in_any_memory_give_the_same_numbers(share, shift, model):
    jobs = some_jobs(model, shifts=(shift,) * 3)
    clean, each = kept_bytes(model)
    whole = engine.sweep(model, jobs)
    calls = []
    parts = engine.sweep(model, jobs, lambda *call: calls.append(call), memory=int(share * 2 * 3 * (clean + 6 * each)))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.clean, other.clean, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(one.corrupted, other.corrupted, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(one.cells, other.cells, atol=1e-6, rtol=1e-5)
        assert other.cells.shape == (2, 6, 1)
    done = [done / of for _, done, of in calls]
    assert done[0] == 0
    assert done[-1] == 1
    assert done == sorted(done), "it never goes back"
    assert {what for what, _, _ in calls} == {"trace"}
    if share < 1:
        assert any(0 < each < 1 for each in done)


def test_the_draws_of_a_part_come_with_those_that_they_hold():
    numbers = torch.arange(5.0)[:, None, None].expand(5, 3, 2)
    job = Job((1, 2, 3), numbers, (Read(2, (1,)),), (), held_shift=7)
    assert engine._with_draws(job, range(5)) is job
    part = engine._with_draws(job, range(3, 5))
    assert part.corrupted[:, 0, 0].tolist() == [3, 4, 0, 1], "two draws, and two places on from the last"
    assert part.held_shift == 2
    assert engine._with_draws(replace(job, held_shift=0), range(1, 3)).corrupted[:, 0, 0].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("restored", "held", "shift", "expected"),
    [
        ([(MLP_OUT, 1, 3)], [], 0, (3, 1)),
        ([(RESID_POST, 1, 3)], [], 0, (3, 2)),
        ([(MLP_OUT, 1, 2), (MLP_OUT, 3, 6)], [], 0, (2, 1)),
        ([(MLP_OUT, 1, 1)], [], 0, None),  # before the corruption
        ([(MLP_OUT, 3, 3)], [], 0, None),  # in the last block, where nobody reads
        ([(MLP_OUT, 3, 6)], [], 0, (6, 3)),  # where it is read
        ([(RESID_POST, 3, 3)], [], 0, None),
        ([(RESID_POST, 3, 6)], [], 0, (6, 4)),
        ([(RESID_POST, 2, 3)], [], 0, (3, 3)),  # it enters the last block, which makes keys and values of it
        ([(ATTN_OUT, 3, 3)], [], 0, None),
        ([(MLP_OUT, 2, 3)], [], 0, (3, 2)),
        ([(MLP_OUT, 1, 1)], [(MLP_OUT, 2, 3)], 0, None),  # held at the run's own values
        ([(MLP_OUT, 1, 1)], [(MLP_OUT, 2, 3)], 1, (3, 2)),  # held at another draw's
        ([(MLP_OUT, 1, 1)], [(MLP_OUT, 2, 3)], 3, None),  # three places on of three draws are its own
        ([(MLP_OUT, 2, 4)], [(MLP_OUT, 1, 5), (MLP_OUT, 2, 3), (MLP_OUT, 3, 6)], 0, (4, 2)),
        ([(MLP_OUT, 2, 4)], [(MLP_OUT, 1, 5), (MLP_OUT, 2, 3)], 1, (3, 1)),
    ],
)
def test_what_of_a_cell_changes_anything_begins_at_its_first_position_and_block(restored, held, shift, expected, model):
    """Four blocks, corruption from position 2, read at position 6; three draws."""
    restored, held = (tuple(Patch(*each) for each in own) for own in (restored, held))
    job = Job(IDS, corrupted_embeddings(model, IDS, 2, 2, 3), (Read(6, (33,)),), (), held_shift=shift)
    found = engine._effect(Cell(restored, held), job, 2, 4)
    assert (None if found is None else (found.position, found.start)) == expected
    if found is not None:
        assert all(patch.position >= found.position and patch.start >= found.start for patch in (*found.restored, *found.held))  # fmt: skip
        assert set(found.restored) == {each for each in restored if each.position >= 2}
        kept = {each for each in held if each.position >= expected[0] and each.start >= expected[1]}
        assert set(found.held) == kept


@pytest.mark.parametrize(("position", "used", "cells"), [(0, 0, 11), (5, 0, 20), (0, 50_000, 8), (0, 150_000, 2), (0, 180_000, 1), (0, 250_000, 1)])  # fmt: skip
def test_as_many_cells_run_at_once_as_fit_beside_what_is_kept(position, used, cells, model, monkeypatch):
    """190 kB less what is kept, half of it for rows: each has two states of 3 draws, at the positions left and at every block."""
    runs = baseline.Runs.of(model, some_jobs(model, lengths=(7,), draws=3, shifts=(0,)))
    monkeypatch.setattr(baseline.Runs, "bytes", property(lambda self: used))
    assert engine._members_at_once(model, runs, position, 190_000) == cells
    assert cells == max(1, (95_000 - used // 2) // (2 * 3 * (7 - position + 4) * 32 * 4))


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (single(MLP_OUT, [1], 7), "position from 0 to 6; found 7"),
        (single(MLP_OUT, [1], -1), "position from 0 to 6; found -1"),
        (Cell((Patch(MLP_OUT, 1, 6),), (Patch(MLP_OUT, 4, 6),)), "block from 0 to 3; found 4"),
        (Cell((Patch(MLP_OUT, 1, 6),), (Patch(MLP_OUT, 1, 7),)), "position from 0 to 6; found 7"),
        (Cell((Patch(MLP_OUT, 1, 6), Patch(RESID_POST, 4, 6))), "block from 0 to 3; found 4"),
    ],
)
def test_every_patch_of_every_cell_is_looked_at(cell, message, model):
    job = Job(IDS, corrupted_embeddings(model, IDS, 1, 2, 2), (Read(6, (33,)),), (single(MLP_OUT, [0, 3], [0, 6]), cell))  # fmt: skip
    with pytest.raises(models.ModelError, match=message):
        engine.sweep(model, [job])
    engine.sweep(model, [replace(job, cells=job.cells[:1])])


def test_an_index_that_a_component_of_ones_own_has_not_is_refused(model, fact):
    own = Component("queries", "blocks.{layer}.attn.hook_q")
    restore(model, fact, lambda prompt: [single(own, [1], prompt.last_subject, (model.cfg.n_heads - 1,))], SMALL)
    with pytest.raises(models.ModelError, match=r"index of a patch of queries must be from 0 to 3; found 4"):
        restore(model, fact, lambda prompt: [single(own, [1], prompt.last_subject, (4,))], SMALL)


def test_what_is_no_cell_is_refused_in_a_sentence(model, fact, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own checks, which users do not have
    with pytest.raises(SettingsError, match=r"a patch is of a Component, one of RESID_PRE, .* or your own; found 'z'"):
        single("z", [1], 1)
    for cells in (single(MLP_OUT, [1], 1), [MLP_OUT], lambda prompt: single(MLP_OUT, [1], 1)):
        with pytest.raises(SettingsError, match="restore takes cells in a list"):
            restore(model, fact, cells, SMALL)
