from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mechedit import figures, files, models, prompts, sites
from mechedit.facts import Fact, FactError
from mechedit.settings import SettingsError, TraceSettings
from mechedit.tracing import Trace, engine, prepare, restore, trace, trace_all
from mechedit.tracing.cells import (
    ATTN_OUT,
    COMPONENTS,
    MLP_OUT,
    RESID_POST,
    RESID_PRE,
    Cell,
    Component,
    Patch,
    Z,
    single,
    window,
)
from mechedit.tracing.engine import Job, Read
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
)
def test_any_cells_equal_one_forward_pass_each(shape, cells, begin, span, draws, row_tokens, load):
    model = load(shape)
    lacking = {"resid_mid"} if shape in {"gptj", "neox"} else set()
    cells = [
        cell
        for cell in map(build, cells)
        if not conflict(cell) and not lacking & {patch.component.name for patch in (*cell.restored, *cell.held)}
    ]
    corrupted = corrupted_embeddings(model, IDS, begin, span, draws)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "ROW_TOKENS", row_tokens)
        (fast,) = engine.sweep(model, [Job(IDS, corrupted, (Read(6, (33,)),), tuple(cells))])
    if cells:
        slow = loop(model, IDS, corrupted, 33, cells)
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


def test_a_whole_batch_of_facts_gives_the_traces_of_each(model, fact):
    facts = [fact, Fact("Paris", "The city of {} is in", "Seattle"), Fact("Megan Rapinoe", "{} plays the", "soccer")]
    together = list(trace_all(model, facts, SMALL, batch=3))
    for one, many in zip(facts, together, strict=True):
        alone = trace(model, one, SMALL)
        assert many.prompt == one.prompt
        for kind in SMALL.kinds:
            torch.testing.assert_close(many.draws[kind], alone.draws[kind], atol=1e-6, rtol=1e-4)


def test_all_heads_together_are_the_attention_output_and_some_are_not(model, fact):
    def cells(prompt):
        at = prompt.last_subject
        return [
            single(Z, [2], at),
            single(ATTN_OUT, [2], at),
            single(Z, [2], at, (0, 1, 2, 3)),
            *(single(Z, [2], at, (head,)) for head in range(4)),
        ]

    values, _, corrupted = restore(model, fact, cells, SMALL)
    torch.testing.assert_close(values[0], values[1], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(values[0], values[2], atol=1e-6, rtol=1e-4)
    assert all((value - corrupted).abs().max() > 1e-6 for value in values[3:])
    assert len({tuple(value.tolist()) for value in values}) >= 5


def test_restoring_everything_at_once_is_the_clean_run(model, fact):
    values, clean, corrupted = restore(
        model, fact, lambda prompt: [single(RESID_PRE, [0], range(*prompt.subject))], SMALL
    )
    torch.testing.assert_close(values, torch.full_like(values, clean), atol=1e-6, rtol=1e-4)
    assert (corrupted - clean).abs().min() > 1e-5


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (single(MLP_OUT, [4], 1), "block from 0 to 3; found 4"),
        (single(MLP_OUT, [-1], 1), "block from 0 to 3; found -1"),
        (single(MLP_OUT, [1], 99), "position from 0 to"),
        (single(Component("q9", "blocks.{layer}.attn.hook_q9"), [1], 1), "has no q9: there is no hook point"),
    ],
)
def test_cells_that_name_what_is_not_there_are_errors_before_the_model_runs(model, fact, cell, message, monkeypatch):
    monkeypatch.setattr(models.Blocks, "run", lambda *args, **kwargs: pytest.fail("the model ran"))
    with pytest.raises(models.ModelError, match=message):
        restore(model, fact, [cell], SMALL)


def test_a_parallel_model_has_no_state_between_attention_and_mlp(load):
    with pytest.raises(models.ModelError, match=r"has no resid_mid: there is no hook point blocks.0.hook_resid_mid"):
        trace(load("gptj"), FACT, replace(SMALL, kinds=("resid_mid",)))


def test_a_cell_that_restores_nothing_is_refused():
    with pytest.raises(ValueError, match="must restore something"):
        Cell(())


def test_a_component_stands_in_every_block():
    with pytest.raises(SettingsError, match=r"must hold \{layer\}.*blocks.0.hook_mlp_out"):
        Component("first", "blocks.0.hook_mlp_out")


@pytest.mark.parametrize(
    ("measure", "ids", "label"),
    [
        ("p", (1,), "P(Seattle)"),
        ("p", (1, 2), "P(first token of Seattle)"),
        ("p_answer", (1, 2), "P(Seattle)"),
        ("log_p", (1,), "log P(Seattle)"),
        ("logit_difference", (1, 2), "logit(Seattle) less the other's"),
    ],
)
def test_a_trace_says_what_was_measured(model, fact, measure, ids, label):
    found = trace(model, fact, replace(SMALL, kinds=("mlp",), draws=1))
    found = replace(found, answer=" Seattle", answer_ids=ids, settings=replace(found.settings, measure=measure))
    assert found.label == label
    assert (
        repr(found)
        == f"Trace({fact.prompt!r}: {label} = {found.p_clean:.3f} clean, {found.p_corrupted:.3f} corrupted; mlp)"
    )
    assert figures.heat_map(found, "mlp").axes[1].get_ylabel() == label


def test_a_component_of_ones_own_is_a_kind(model, fact):
    queries = Component("queries", "blocks.{layer}.attn.hook_q")
    found = trace(model, fact, replace(SMALL, kinds=("queries", "attn")), components=[queries])
    prepared = prepare(model, fact, SMALL)
    cells = [single(queries, window(layer, 2, 4), len(prepared.ids) - 1) for layer in range(4)]
    slow = loop(model, prepared.ids, prepared.corrupted, prepared.answer_ids[0], cells)
    torch.testing.assert_close(found.draws["queries"][:, -1], slow, atol=1e-5, rtol=1e-3)
    assert not torch.equal(found.draws["queries"], found.draws["attn"])
    with pytest.raises(SettingsError, match="'queries' is not"):
        trace(model, fact, replace(SMALL, kinds=("queries",)))


def test_both_centrings_of_a_window(model, fact):
    code, paper = (trace(model, fact, replace(SMALL, kinds=("mlp",), centre=centre)) for centre in ("code", "paper"))
    torch.testing.assert_close(code.draws["mlp"][1:], paper.draws["mlp"][:-1], atol=1e-6, rtol=1e-4)
    assert not torch.allclose(code.draws["mlp"][1:-1], paper.draws["mlp"][1:-1])
    odd = [trace(model, fact, replace(SMALL, kinds=("mlp",), window=3, centre=centre)) for centre in ("code", "paper")]
    assert torch.equal(odd[0].draws["mlp"], odd[1].draws["mlp"])


def test_only_the_roles_asked_for_are_computed(model, fact):
    whole, part = trace(model, fact, SMALL), trace(model, fact, replace(SMALL, roles=("subject_last", "last")))
    chosen = [index for index, role in enumerate(part.roles) if role in {"subject_last", "last"}]
    assert len(chosen) == 2
    for kind in SMALL.kinds:
        torch.testing.assert_close(part.draws[kind][:, chosen], whole.draws[kind][:, chosen], atol=1e-6, rtol=1e-4)
        assert int(part.effects[kind].isnan().sum()) == 4 * (len(part.tokens) - 2)
    assert json.loads(json.dumps(part.to_json()))["effects"]["resid"][0][0] is None
    with pytest.raises(SettingsError, match="has a role among before"):
        trace(model, Fact("The", "{} city"), replace(SMALL, roles=("before",), prepend_bos=False))


def test_measures_are_what_they_are_called(model):
    fact = Fact("The Space Needle", "{} is located in the city of", "Seattle piano", target_new="Paris")
    found = {
        measure: trace(model, fact, replace(SMALL, measure=measure, kinds=("mlp",)))
        for measure in ("p", "log_p", "p_answer", "logit_difference")
    }
    torch.testing.assert_close(found["p"].draws["mlp"].log(), found["log_p"].draws["mlp"], atol=1e-5, rtol=1e-5)
    prompt = prompts.prepare(model, fact)
    answer, second = found["p"].answer_ids, prompts.continuation(model, fact.prompt, "Paris")
    assert len(answer) > 1
    tokens = torch.tensor([[*prompt.ids, *answer[:-1]]])
    with torch.no_grad():
        logits = model(tokens)[0]
    log_p = logits.log_softmax(-1)
    at = len(prompt.ids) - 1
    whole = sum(float(log_p[at + step, token]) for step, token in enumerate(answer))
    assert found["p_answer"].p_clean == pytest.approx(math.exp(whole), rel=1e-3)
    assert found["logit_difference"].p_clean == pytest.approx(
        float(logits[at, answer[0]] - logits[at, second[0]]), abs=1e-4
    )
    # the whole answer, in a restored run, by hand
    prepared = prepare(model, fact, replace(SMALL, measure="p_answer"))
    position = prompt.last_subject
    _, clean = model.run_with_cache(tokens)
    hooks = [("hook_embed", lambda activation, hook: prepared.corrupted.to(activation))]
    for layer in window(1, 2, 4):

        def restoring(activation, hook, layer=layer):
            activation[:, position] = clean[f"blocks.{layer}.hook_mlp_out"][0, position]
            return activation

        hooks.append((f"blocks.{layer}.hook_mlp_out", restoring))
    with torch.no_grad():
        log_p = model.run_with_hooks(tokens.expand(3, -1), fwd_hooks=hooks).log_softmax(-1)
    by_hand = sum(log_p[:, at + step, token] for step, token in enumerate(answer)).exp()
    torch.testing.assert_close(found["p_answer"].draws["mlp"][1, position], by_hand, atol=1e-6, rtol=1e-3)


def test_a_logit_difference_needs_two_answers_that_differ(model):
    chosen = replace(SMALL, measure="logit_difference")
    with pytest.raises(FactError, match="needs a second answer"):
        trace(model, Fact("Paris", "{} is in", "Seattle"), chosen)
    with pytest.raises(FactError, match="begin with the same token"):
        trace(model, Fact("Paris", "{} is in", "Seattle", target_new="Seattle Needle"), chosen)


def test_a_small_budget_gives_the_same_numbers(model, fact, monkeypatch):
    whole = trace(model, fact, SMALL)
    passes = []
    original = engine._Pass.log_p
    monkeypatch.setattr(engine._Pass, "log_p", lambda self: passes.append(self.row_tokens) or original(self))
    tight = trace(model, fact, replace(SMALL, memory=2e-4))
    assert len(passes) > len(whole.tokens)
    assert min(passes) < engine.ROW_TOKENS
    for kind in SMALL.kinds:
        torch.testing.assert_close(whole.draws[kind], tight.draws[kind], atol=1e-6, rtol=1e-4)


def test_small_batches_give_the_same_numbers(model, fact, monkeypatch):
    whole = trace(model, fact, SMALL)
    monkeypatch.setattr(engine, "ROW_TOKENS", 20)
    monkeypatch.setattr(engine, "UNEMBED_ROWS", 2)
    parts = trace(model, fact, SMALL)
    for kind in SMALL.kinds:
        torch.testing.assert_close(whole.draws[kind], parts.draws[kind], atol=1e-6, rtol=1e-4)


def test_a_window_not_chosen_is_the_presets_else_ten(model, fact, monkeypatch):
    assert trace(model, fact, TraceSettings(draws=1, kinds=("mlp",))).settings.window == 10
    preset = replace(models.PRESETS["gpt2"], window=3)
    monkeypatch.setattr(models, "preset", lambda model: preset)
    chosen = trace(model, fact, TraceSettings(draws=1, kinds=("mlp",)))
    assert chosen.settings.window == 3
    other = trace(model, fact, TraceSettings(draws=1, kinds=("mlp",), window=3))
    assert torch.equal(chosen.effects["mlp"], other.effects["mlp"])


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
    assert {name: value for name, value in vars(loaded).items() if name not in {"draws", "effects", "seconds"}} == {
        name: value for name, value in vars(found).items() if name not in {"draws", "effects", "seconds"}
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
    with pytest.raises(files.FileError, match="a trace that lacks something, or has what is not known: 'settings'"):
        Trace.load(path)


def test_sites_are_where_restoring_helps_most(model, fact):
    found = trace(model, fact, SMALL)
    early, late = sites.early(found), sites.late(found)
    assert early.p == float(found.effects["mlp"][:, found.subject_range[1] - 1].max())
    assert (early.kind, early.role) == ("mlp", "subject_last")
    assert late.p == float(found.effects["attn"][:, -1].max())
    assert str(late.layer) in str(late)
    only = trace(model, fact, replace(SMALL, kinds=("resid",)))
    assert sites.early(only).kind == sites.late(only).kind == "resid"


def test_sites_need_a_kind_that_was_traced(model, fact):
    with pytest.raises(sites.SiteError, match="needs a trace of kind resid; this one has mlp"):
        sites.late(trace(model, fact, replace(SMALL, kinds=("mlp",))))


def test_a_prompt_longer_than_the_context_is_refused_before_the_model_runs(model, monkeypatch):
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    with pytest.raises(FactError, match="must fit the context"):
        trace(model, Fact("A", "{} " + "xq " * 80))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kinds": ()}, "at least one"),
        ({"kinds": ("mlp", "mlp")}, "differ"),
        ({"window": -1}, "or more layers"),
        ({"draws": 0}, "at least 1"),
        ({"noise": 0.0}, "positive"),
        ({"noise": float("nan")}, "noise must be finite; found nan"),
        ({"centre": "middle"}, "centre must be one of code, paper; found 'middle'"),
        ({"corruption": "salt"}, "corruption must be one of"),
        ({"scale": "large"}, "scale must be one of"),
        ({"measure": "loss"}, "measure must be one of"),
        ({"precision": "int4"}, "precision must be one of"),
        ({"roles": ("verb",)}, "roles must be one of"),
        ({"degrees": 0.0}, "degrees must be positive"),
        ({"extra": -1}, "0 or more tokens"),
        ({"memory": 0.0}, "positive number of gigabytes"),
    ],
)
def test_settings_that_cannot_be_meant_are_errors(given, message):
    with pytest.raises(SettingsError, match=message):
        TraceSettings(**given)


def test_settings_of_another_type_are_errors():
    """In a process of its own, because the type checks of the tests would come first."""
    given = [{"draws": "2"}, {"draws": True}, {"noise": "3"}, {"kinds": "mlp"}, {"replace": 1}, {"noise": 3}]
    code = f"""
from mechedit.settings import SettingsError, TraceSettings
for given in {given}:
    try:
        print(TraceSettings(**given).noise)
    except SettingsError as error:
        print(error)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    ) == [
        "draws must be of type int; found '2'.",
        "draws must be of type int; found True.",
        "noise must be of type float; found '3'.",
        "kinds must be of type tuple; found 'mlp'.",
        "replace must be of type True, False or None; found 1.",
        "3",
        "",
    ]


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


@pytest.mark.parametrize("shape", ["gpt2", "gemma3"])
def test_in_bfloat16_the_trace_is_near_the_one_in_float32(shape, load, folder):
    half = models.load(str(folder(shape)), device="cpu", dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16
    found, exact = (trace(each, FACT, SMALL) for each in (half, load(shape)))
    assert found.origin["dtype"] == "bfloat16"
    for kind in SMALL.kinds:
        assert found.effects[kind].dtype == torch.float32
        torch.testing.assert_close(found.effects[kind], exact.effects[kind], atol=0.02, rtol=0.3)
