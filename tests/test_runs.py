from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mechedit import corruption, prompts, provenance
from mechedit.cache import WriteError
from mechedit.facts import Fact, FactError
from mechedit.files import FileError
from mechedit.runs import units
from mechedit.runs.store import RunError, Store
from mechedit.runs.tracing import known, sever_facts, trace_facts, traceable, unit
from mechedit.settings import TraceSettings
from mechedit.tracing import Trace, trace, trace_all
from tests.conftest import kept_units

pytestmark = pytest.mark.anywhere

SMALL = TraceSettings(draws=2, window=2)
NAMES = ("Paris", "London", "Rome", "Berlin", "Seattle")
FACTS = [Fact(name, "{} is located in the city of", "Apple", relation="city") for name in NAMES]
FACTS += [Fact("The Space Needle", "{} is in", "Seattle", relation="tower")]


def shards(folder):
    """The bytes of all that a run writes and reads again."""
    return {path.name: path.read_bytes() for path in (folder / "units").iterdir()}


@pytest.mark.both
def test_a_run_gives_each_facts_own_trace(model, tmp_path):
    found = trace_facts(model, FACTS, tmp_path, SMALL)
    for fact, each in zip(FACTS, found, strict=True):
        alone = trace(model, fact, SMALL)
        assert each.prompt == fact.prompt
        assert all(torch.equal(each.draws[kind], alone.draws[kind]) for kind in SMALL.kinds)
    assert set(kept_units(tmp_path)) == {unit(fact) for fact in FACTS}
    told = []
    trace_facts(model, FACTS[:1], tmp_path / "alone", SMALL, progress=lambda *step: told.append(step))
    assert [step for step in told if step[0] == "trace"], "of one fact the sweep's own steps are told"
    told.clear()
    trace_facts(model, FACTS[:2], tmp_path / "two", SMALL, progress=lambda *step: told.append(step))
    assert told
    assert not [step for step in told if step[0] == "trace"]
    twice = trace_facts(model, [FACTS[0], FACTS[1], FACTS[0]], tmp_path, SMALL)
    assert [each.prompt for each in twice] == [FACTS[0].prompt, FACTS[1].prompt, FACTS[0].prompt]


@pytest.mark.both
def test_facts_that_share_a_sweep_give_what_each_gives_alone(model, tmp_path, monkeypatch):
    sizes = []
    real = trace_all
    monkeypatch.setattr(
        "mechedit.runs.tracing.trace_all",
        lambda model, facts, *rest, **named: sizes.append(len(facts)) or real(model, facts, *rest, **named),
    )
    alone, together = (trace_facts(model, FACTS, tmp_path / str(batch), SMALL, batch=batch) for batch in (1, 4))
    assert sizes == [4, 2]
    for one, other in zip(alone, together, strict=True):
        assert one.prompt == other.prompt
        assert all(torch.allclose(one.draws[kind], other.draws[kind], atol=1e-6, rtol=1e-4) for kind in SMALL.kinds)
    trace_facts(model, FACTS, tmp_path / "4", SMALL, batch=1)  # the same run: nothing is left to do


def test_one_fact_that_fails_does_not_take_its_batch_with_it(model, tmp_path, monkeypatch):
    def failing(model, fact, *rest, **named):
        if fact is FACTS[1]:
            raise ValueError("this one")
        return trace(model, fact, *rest, **named)

    monkeypatch.setattr("mechedit.runs.tracing.trace", failing)
    monkeypatch.setattr("mechedit.runs.tracing.trace_all", lambda *args, **named: failing(model, FACTS[1]))
    with pytest.raises(RunError, match="this one"):
        trace_facts(model, FACTS[:3], tmp_path, SMALL, batch=3)
    assert set(kept_units(tmp_path)) == {unit(FACTS[0]), unit(FACTS[2])}


def test_a_run_that_was_cut_off_goes_on_with_what_is_missing(model, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    trace_facts(model, FACTS, whole, SMALL)
    cut = tmp_path / "cut"

    def interrupt(what, done, of):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace_facts(model, FACTS, cut, SMALL, progress=interrupt)
    assert len(kept_units(cut)) == 3
    computed = []
    monkeypatch.setattr("mechedit.runs.tracing.trace", lambda model, fact, *rest, **named: computed.append(fact) or trace(model, fact, *rest, **named))  # fmt: skip
    trace_facts(model, FACTS, cut, SMALL)
    assert computed == FACTS[3:]
    assert kept_units(cut) == kept_units(whole)
    assert shards(cut) == shards(whole), "nothing that a run writes tells that it was stopped"


def test_a_file_cut_short_at_any_byte_or_changed_in_one_is_done_again(model, tmp_path):
    (found,) = trace_facts(model, FACTS[:1], tmp_path, replace(SMALL, kinds=("mlp",), draws=1))
    what, stream = json.loads((tmp_path / "run.json").read_text()), random.Random(0)

    def kept():
        return Store(tmp_path, what, Trace.load, Trace.save).get(unit(FACTS[0]))

    assert torch.equal(kept().draws["mlp"], found.draws["mlp"])
    before = shards(tmp_path)
    assert before.keys() == {"index", "0000.shard"}
    for name, whole in before.items():
        path = tmp_path / "units" / name
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            assert kept() is None, f"{name} cut to {length} of {len(whole)} bytes and not noticed"
        for _ in range(200):
            place = stream.randrange(len(whole))
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << stream.randrange(8)]) + whole[place + 1 :])
            assert kept() is None, f"{name} changed at {place} and not noticed"
        path.write_bytes(whole[:-1])
        trace_facts(model, FACTS[:1], tmp_path, replace(SMALL, kinds=("mlp",), draws=1))
        assert kept_units(tmp_path)[unit(FACTS[0])] in before["0000.shard"], "the same bytes again"
        for name, whole in before.items():
            (tmp_path / "units" / name).write_bytes(whole)


def test_settings_weights_and_noise_that_differ_are_refused_not_mixed(model, load, tmp_path):
    trace_facts(model, FACTS[:1], tmp_path, SMALL)
    with pytest.raises(RunError, match=r"settings\.seed: 0 there, 1 now"):
        trace_facts(model, FACTS[:1], tmp_path, replace(SMALL, seed=1))
    with pytest.raises(RunError, match=r"model\.identity"):
        trace_facts(load("llama"), FACTS[:1], tmp_path, SMALL)
    with pytest.raises(RunError, match=r"noise\.sigma"):
        trace_facts(model, FACTS[:1], tmp_path, SMALL, statistics=corruption.statistics(model, ["Paris", "London"]))
    with pytest.raises(RunError, match="shared_draws"):
        sever_facts(model, FACTS[:1], tmp_path, SMALL)
    trace_facts(model, FACTS[:2], tmp_path, SMALL)  # more facts are no other run


def test_another_version_or_configuration_is_another_run_and_memory_is_none(model, tmp_path, monkeypatch):
    first = trace_facts(model, FACTS[:1], tmp_path, SMALL)
    now = provenance.versions()
    with monkeypatch.context() as other:
        other.setattr(provenance, "versions", lambda: now | {"mechedit": "0.0.1"})
        with pytest.raises(RunError, match=r"\(versions\.mechedit: .* there, '0\.0\.1' now\)"):
            trace_facts(model, FACTS[:1], tmp_path, SMALL)
    with monkeypatch.context() as other:
        other.setattr(model.cfg, "eps", 2 * model.cfg.eps)
        with pytest.raises(RunError, match=r"\(model\.identity: [^,]* there, [^,]* now\)"):
            trace_facts(model, FACTS[:1], tmp_path, SMALL)
    monkeypatch.setattr("mechedit.runs.tracing.trace", lambda *args, **named: pytest.fail("traced again"))
    again = trace_facts(model, FACTS[:1], tmp_path, replace(SMALL, memory=0.5))
    assert torch.equal(again[0].draws["mlp"], first[0].draws["mlp"])


@pytest.mark.both
@pytest.mark.parametrize("run", [trace_facts, sever_facts])
def test_a_model_with_hooks_is_not_traced_in_a_run(run, model, tmp_path):
    with (
        model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda resid, hook: 2 * resid)]),
        pytest.raises(RunError, match="there are hooks on"),
    ):
        run(model, FACTS[:1], tmp_path / "run", SMALL)
    assert not (tmp_path / "run").exists()


def test_two_processes_in_one_folder_do_not_mix(model, tmp_path):
    def intrude(what, done, of):
        if done == 1:
            trace_facts(model, FACTS, tmp_path, SMALL)

    with pytest.raises(RunError, match="another process is at work"):
        trace_facts(model, FACTS, tmp_path, SMALL, progress=intrude)


def test_folders_that_cannot_hold_a_run_are_errors(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot be written"):
        trace_facts(model, FACTS[:1], tmp_path / "file" / "run", SMALL)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        trace_facts(model, FACTS[:1], tmp_path, SMALL)


def test_other_tokens_take_partners_from_the_same_relation(model, tmp_path):
    facts = [replace(fact, target_true=answer) for fact, answer in zip(FACTS, ("Apple", "London", "Rome", "Berlin", "piano", "violin"), strict=True)]  # fmt: skip
    found = trace_facts(model, facts, tmp_path, replace(SMALL, corruption="tokens"))
    assert "The Space Needle" not in {each.subject for each in found}, "it alone has its relation, so it has no partner"
    assert len(found) >= 2
    assert all(each.draws["mlp"].shape[-1] == 1 for each in found)
    cut = sever_facts(model, facts, tmp_path / "severed", replace(SMALL, corruption="tokens"))
    assert [each.corrupted_by for each in cut] == [each.corrupted_by for each in found]


@pytest.mark.parametrize("run", [trace_facts, sever_facts])
def test_with_other_tokens_a_unit_is_a_facts_with_its_partner(run, model, tmp_path):
    """A partner is chosen among the facts of a call; what an earlier call found with another partner is not this one's."""
    facts, wanted = (
        [replace(fact, target_true=fact.subject) for fact in FACTS[:5]],
        replace(SMALL, corruption="tokens", seed=2),
    )
    two = run(model, facts[:2], tmp_path / "both", wanted)
    assert [each.corrupted_by for each in two] == ["the subject 'London'", "the subject 'Paris'"]
    found = run(model, facts, tmp_path / "both", wanted)
    fresh = run(model, facts, tmp_path / "fresh", wanted)
    assert [each.corrupted_by for each in found] == [each.corrupted_by for each in fresh]
    assert any(now.corrupted_by != then.corrupted_by for now, then in zip(found, two, strict=False)), (
        "there was a choice"
    )
    fresh_units, both = kept_units(tmp_path / "fresh"), kept_units(tmp_path / "both")
    assert fresh_units.items() <= both.items()
    backwards = run(model, facts[::-1], tmp_path / "both", wanted)
    assert [each.corrupted_by for each in backwards[::-1]] == [each.corrupted_by for each in fresh]
    assert kept_units(tmp_path / "both") == both, "the order of facts makes no other units"


@pytest.mark.both
def test_severed_runs_resume_too(model, tmp_path):
    first = sever_facts(model, FACTS, tmp_path, SMALL)
    before = kept_units(tmp_path)
    again = sever_facts(model, FACTS, tmp_path, SMALL)
    assert kept_units(tmp_path) == before
    assert [each.subject for each in first] == [each.subject for each in again] == [fact.subject for fact in FACTS]


def greedy(model, prompt, n):
    """What the model says, a token at a time, by whole forward passes."""
    ids = list(prompts.prepare(model, Fact(prompt, "{}")).ids)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-n:]


def test_a_fact_is_known_where_the_model_says_its_whole_answer(model, monkeypatch):
    """Not where it says the answer's first word and goes on to another: New Orleans is not New York."""
    said = {fact: greedy(model, fact.prompt, 3) for fact in FACTS}
    assert len({ids[0] for ids in said.values()}) > 1

    def answered(last):
        answers = {fact.prompt: [*ids[:-1], ids[-1] if last else (ids[-1] + 1) % 400] for fact, ids in said.items()}
        monkeypatch.setattr(
            "mechedit.runs.tracing.continuation", lambda model, prompt, target, join=None: answers[prompt]
        )
        return known(model, FACTS)

    assert answered(last=True) == FACTS
    assert answered(last=False) == []


def test_facts_without_an_answer_are_known_and_those_too_long_are_not(model):
    open_ended, long = Fact("Paris", "{} is in"), Fact("Paris", "{} " + "Seattle " * 80)
    assert (
        known(model, [FACTS[0], long, open_ended, replace(long, target_true="Apple"), open_ended]) == [open_ended] * 2
    )


def test_facts_that_cannot_be_traced_are_named_before_a_run_begins(model, tmp_path):
    long, short = Fact("Paris", "{} " + "Seattle " * 80, "Apple"), Fact("Rome", "{} is in", "Apple")
    middle = replace(SMALL, roles=("subject_middle",))
    fit, others = traceable(model, [long, FACTS[5], short], middle)
    assert fit == [FACTS[5]]
    assert [fact for fact, _ in others] == [long, short]
    assert "must fit the context" in others[0][1]
    assert "has a role among subject_middle" in others[1][1]
    for run in (trace_facts, sever_facts):
        with pytest.raises(
            FactError, match="1 of 3 facts cannot be traced .* The first: a prompt must fit the context"
        ):
            run(model, [FACTS[0], long, FACTS[1]], tmp_path / "run", SMALL)
    with pytest.raises(FactError, match="needs a second answer"):
        trace_facts(model, FACTS[:2], tmp_path / "run", replace(SMALL, measure="logit_difference"))


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from mechedit import models
from tests.test_runs import trace_facts, TraceSettings, many
trace_facts(models.load(sys.argv[1], device="cpu"), many(), sys.argv[2], TraceSettings(draws=2, window=2))
"""


def many():
    """Thirty facts."""
    return [Fact(f"{name} {second}", "{} is located in", "Apple") for name in NAMES for second in (*NAMES, "Jobs")]


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_byte_equal(folder, tmp_path):
    """SIGKILL, twenty times, wherever it happens to be; then the run is finished and compared with one left in peace."""
    command = [sys.executable, "-c", SCRIPT, str(folder("gpt2"))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    began = time.monotonic()
    subprocess.run([*command, str(tmp_path / "peace")], check=True, env=environment)
    seconds = time.monotonic() - began
    stream, kills, finished = random.Random(0), 0, 0
    while kills < 20:
        target = tmp_path / f"war{finished}"
        process = subprocess.Popen([*command, str(target)], env=environment)
        try:
            process.wait(timeout=stream.uniform(0.4, 1.0) * seconds)
            finished += 1
            assert kept_units(target) == kept_units(tmp_path / "peace")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    subprocess.run([*command, str(target)], check=True, env=environment)
    assert kept_units(target) == kept_units(tmp_path / "peace")


def test_a_file_of_another_kind_is_no_unit(model, tmp_path):
    sever_facts(model, FACTS[:1], tmp_path / "a", SMALL)
    with pytest.raises(FileError, match="not a mechedit trace: it is a mechedit severed"):
        Trace.load(units.read(tmp_path / "a", "0"))
