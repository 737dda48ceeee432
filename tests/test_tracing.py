from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mechedit import corruption, files, models, prompts, sites
from mechedit.facts import Fact, FactError
from mechedit.settings import SettingsError, TraceSettings
from mechedit.tracing import Trace, engine, trace
from mechedit.tracing.engine import Cell, window
from tests.conftest import FACT, SHAPES, assert_same_state, state
from tests.slow_trace import loop

SMALL = TraceSettings(draws=3, window=2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["resid", "mlp", "attn"])
def test_every_cell_equals_one_forward_pass_for_it(shape, kind, load):
    model = load(shape)
    prompt = prompts.prepare(model, FACT)
    begin, end = prompt.subject
    scale = 3 * models.embedding_std(model)
    noise = corruption.gaussian(FACT, draws=3, tokens=end - begin, d_model=32, scale=scale, seed=0)
    answer = prompts.continuation(model, FACT.prompt, FACT.target_true)[0]
    layers = [range(layer, layer + 1) if kind == "resid" else window(layer, 2, 4) for layer in range(4)]
    cells = [Cell(kind, each, position) for each in layers for position in range(len(prompt.ids))]
    slow = loop(model, prompt.ids, noise, begin, answer, cells).view(4, len(prompt.ids), 3)
    before = state(model)  # after the loop: a bridge's first cached run installs hooks of its own for good
    found = trace(model, FACT, replace(SMALL, kinds=(kind,)))
    assert found.noise_std == pytest.approx(scale)
    torch.testing.assert_close(found.draws[kind], slow, atol=1e-5, rtol=1e-3)
    assert slow.std() > 1e-4, "the cells must differ for this to say anything"
    assert_same_state(model, before)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    component=st.sampled_from(["resid", "mlp", "attn"]),
    first=st.integers(0, 3),
    width=st.integers(1, 4),
    position=st.integers(0, 6),
    begin=st.integers(0, 4),
    span=st.integers(1, 3),
    draws=st.integers(1, 3),
)
def test_any_cell_equals_one_forward_pass(shape, component, first, width, position, begin, span, draws, load):
    model = load(shape)
    ids = [0, 40, 50, 60, 70, 80, 90]
    layers = range(first, first + 1) if component == "resid" else range(first, min(4, first + width))
    cells = [Cell(component, layers, position), Cell("mlp", range(1, 3), 6)]
    noise = torch.randn(draws, span, 32, generator=torch.Generator().manual_seed(0))
    fast = engine.sweep(model, ids, noise, begin, 33, cells).cells
    torch.testing.assert_close(fast, loop(model, ids, noise, begin, 33, cells), atol=1e-5, rtol=1e-3)


def test_small_batches_give_the_same_numbers(model, fact, monkeypatch):
    whole = trace(model, fact, SMALL)
    monkeypatch.setattr(engine, "ROW_TOKENS", 20)
    monkeypatch.setattr(engine, "UNEMBED_ROWS", 2)
    parts = trace(model, fact, SMALL)
    for kind in SMALL.kinds:
        torch.testing.assert_close(whole.draws[kind], parts.draws[kind], atol=1e-6, rtol=1e-4)


def test_windows_are_centred_as_the_published_code_does():
    assert window(20, 10, 48) == range(15, 25)
    assert window(2, 10, 48) == range(7)
    assert window(47, 10, 48) == range(42, 48)
    assert window(5, 1, 48) == range(5, 6)
    assert window(5, 3, 48) == range(4, 7)


def test_cells_before_the_subject_are_the_corrupted_run_and_the_last_state_restores_everything(model):
    found = trace(model, Fact("Paris", "The city of {} is in", "Seattle"), SMALL)
    begin, _ = found.subject_range
    assert begin > 0
    for grid in found.effects.values():
        torch.testing.assert_close(grid[:, :begin], torch.full_like(grid[:, :begin], found.p_corrupted))
    assert float(found.effects["resid"][-1, -1]) == pytest.approx(found.p_clean, rel=1e-4)


def test_the_same_seed_gives_the_same_trace_and_another_does_not(model, fact):
    first, again, other = (trace(model, fact, replace(SMALL, seed=seed)) for seed in (0, 0, 1))
    for kind in SMALL.kinds:
        assert torch.equal(first.draws[kind], again.draws[kind])
        assert not torch.equal(first.draws[kind], other.draws[kind])


def test_noise_and_bos_and_kinds_are_obeyed(model, fact):
    weak, strong = (trace(model, fact, replace(SMALL, noise=noise)) for noise in (0.01, 10.0))
    assert abs(weak.p_corrupted - weak.p_clean) < abs(strong.p_corrupted - strong.p_clean)
    assert strong.noise_std == pytest.approx(10 * models.embedding_std(model))
    without = trace(model, fact, replace(SMALL, prepend_bos=False, kinds=("mlp",)))
    assert len(without.tokens) == len(weak.tokens) - 1
    assert list(without.effects) == ["mlp"]
    assert without.settings.prepend_bos is False
    assert weak.settings.prepend_bos is True


def test_without_an_answer_the_models_own_is_traced(model):
    found = trace(model, Fact("Paris", "{} is in"), SMALL)
    tokens = torch.tensor([list(prompts.prepare(model, Fact("Paris", "{} is in")).ids)])
    with torch.no_grad():
        p = model(tokens)[0, -1].softmax(-1)
    assert found.answer_ids == (int(p.argmax()),)
    assert found.p_clean == pytest.approx(float(p.max()), rel=1e-4)


def test_a_trace_survives_its_file(model, fact, tmp_path):
    found = trace(model, fact, SMALL)
    loaded = Trace.load(found.save(tmp_path / "trace.safetensors"))
    assert {name: value for name, value in vars(loaded).items() if name not in {"draws", "effects"}} == {
        name: value for name, value in vars(found).items() if name not in {"draws", "effects"}
    }
    for kind in SMALL.kinds:
        assert torch.equal(loaded.effects[kind], found.effects[kind])
        assert torch.equal(loaded.draws[kind], found.draws[kind])


def test_the_json_has_the_fields_that_readers_rely_on(model, fact):
    record = json.loads(json.dumps(trace(model, fact, SMALL).to_json()))
    wanted = {
        "model",
        "prompt",
        "tokens",
        "subject_range",
        "answer",
        "answer_ids",
        "p_clean",
        "p_corrupted",
        "effects",
        "settings",
        "versions",
        "seconds",
    }
    assert wanted <= record.keys()
    assert len(record["effects"]["resid"]) == 4
    assert len(record["effects"]["resid"][0]) == len(record["tokens"])
    assert record["versions"]["torch"] == torch.__version__
    assert record["origin"]["weight_hash"] == models.weight_hash(model)


def test_another_kind_of_file_is_no_trace(model, fact, tmp_path):
    path = files.write(tmp_path / "x.safetensors", "edit", {"u": torch.zeros(1)}, {})
    with pytest.raises(files.FileError, match="not a mechedit trace: it is a mechedit edit"):
        Trace.load(path)
    path = files.write(tmp_path / "y.safetensors", "trace", {"u": torch.zeros(1)}, {})
    with pytest.raises(files.FileError, match="a trace that lacks 'settings'"):
        Trace.load(path)


def test_sites_are_where_restoring_helps_most(model, fact):
    found = trace(model, fact, SMALL)
    early, late = sites.early(found), sites.late(found)
    assert early.p == float(found.effects["mlp"][:, found.subject_range[1] - 1].max())
    assert (early.kind, early.role) == ("mlp", "last subject token")
    assert late.p == float(found.effects["attn"][:, -1].max())
    assert str(late.layer) in str(late)
    only = trace(model, fact, replace(SMALL, kinds=("resid",)))
    assert sites.early(only).kind == sites.late(only).kind == "resid"


def test_sites_need_a_kind_that_was_traced(model, fact):
    with pytest.raises(ValueError, match="needs a trace of kind resid; this one has mlp"):
        sites.late(trace(model, fact, replace(SMALL, kinds=("mlp",))))


def test_a_prompt_longer_than_the_context_is_refused_before_the_model_runs(model, monkeypatch):
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    with pytest.raises(FactError, match="must fit the context"):
        trace(model, Fact("A", "{} " + "xq " * 80))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kinds": ()}, "at least one"),
        ({"kinds": ("resids",)}, "'resids' is not"),
        ({"kinds": ("mlp", "mlp")}, "differ"),
        ({"window": 0}, "at least 1 layer"),
        ({"draws": 0}, "at least 1"),
        ({"noise": 0.0}, "positive"),
        ({"noise": float("nan")}, "positive"),
    ],
)
def test_settings_that_cannot_be_meant_are_errors(given, message):
    with pytest.raises(SettingsError, match=message):
        TraceSettings(**given)


def test_ctrl_c_leaves_the_model_as_it_was(model, fact):
    before = state(model)

    def interrupt(what, done, of):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace(model, fact, SMALL, progress=interrupt)
    assert_same_state(model, before)


def test_progress_counts_to_the_end(model, fact):
    calls = []
    trace(model, fact, SMALL, progress=lambda *call: calls.append(call))
    assert calls[0][:2] == ("trace", 0)
    assert calls[-1][1] == calls[-1][2]


@pytest.mark.parametrize("shape", ["gpt2", "gemma3"])
def test_in_bfloat16_the_trace_is_near_the_one_in_float32(shape, load, folder):
    half = models.load(str(folder(shape)), device="cpu", dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16
    found, exact = (trace(each, FACT, SMALL) for each in (half, load(shape)))
    assert found.origin["dtype"] == "bfloat16"
    for kind in SMALL.kinds:
        assert found.effects[kind].dtype == torch.float32
        torch.testing.assert_close(found.effects[kind], exact.effects[kind], atol=0.02, rtol=0.3)
