"""The trained organism: what its card says is measured again, and the whole story is run on facts that are known."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mechedit import applying, cli, models, moments, organism, scoring, shipped, sites, sources
from mechedit.benchmarks import counterfact, health, metrics
from mechedit.editors import rome
from mechedit.organism.judge import judge
from mechedit.organism.world import make
from mechedit.runs.evaluating import evaluate
from mechedit.runs.shards import Shards
from mechedit.runs.sweeping import sweep
from mechedit.runs.tracing import known, trace_facts
from mechedit.settings import EvaluateSettings, RomeSettings, SweepSettings, TraceSettings, TuneSettings
from mechedit.tracing import trace
from mechedit.tracing.averages import average
from mechedit.tuning import tune
from tests.conftest import assert_same_state, state

pytestmark = pytest.mark.usefixtures("as_users")
SHIPPED = [name for name in organism.MODELS if organism.folder(name).is_dir()]


@pytest.fixture(scope="module")
def world():
    return make()


@pytest.fixture(scope="module")
def learnt():
    """The organism and the facts that are asked about here."""
    return models.load("organism", device="cpu"), sources.named("organism")[:60]


def test_the_organism_ships_and_loads_by_name_without_a_network_in_two_seconds():
    assert "organism" in SHIPPED
    code = (
        "import time, torch, transformers, mechedit.models as m\n"
        "from importlib import import_module\n"
        "import_module('transformer_lens')\n"
        "began = time.perf_counter(); model = m.load('organism', device='cpu'); print(time.perf_counter() - began, m.device_of(model))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[0]) < 8.0, "two seconds on a machine that does nothing else"
    light = "import sys, mechedit, mechedit.organism; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", SHIPPED)
def test_each_shipped_model_knows_the_world_its_card_describes(name, world):
    folder = organism.folder(name)
    record = json.loads((folder / "training.json").read_text())
    card = (folder / "README.md").read_text()
    assert record["settings"]["shape"] == organism.MODELS[name]
    assert record["digest"] == world.digest()
    assert world.digest() in card
    assert record["parameters"] < 8e6
    assert (folder / "model.safetensors").stat().st_size < 20e6
    assert models.parity(name, "The home of Mevom Breamzas was") < models.PARITY
    found = judge(models.load(name, device="cpu"), world, facts=20, sentences=1200)
    assert found.mean("taught") >= 0.98
    assert found.mean("held_out") >= 0.90
    said = float(re.search(r"A sentence costs ([0-9.]+) nats", card).group(1))
    assert found.nats == pytest.approx(said, abs=0.2)
    assert found.nats < found.entropy + 1.5


def test_transformers_loads_the_same_folder(world):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = organism.folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(folder)
    fact = sources.named("organism")[0]
    ids = torch.tensor([[words.bos_token_id, *words(fact.prompt, add_special_tokens=False)["input_ids"]]])
    said = words.decode(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=1)[0, ids.shape[1] :])
    assert said.strip().startswith(fact.target_true)


def test_facts_localise_early_at_the_subjects_last_token_and_late_at_the_last(learnt, tmp_path):
    model, chosen = learnt
    traces = trace_facts(model, known(model, chosen)[:40], tmp_path, TraceSettings(draws=4))
    assert traces[0].settings.window == models.preset(model).window
    mean = average(traces)
    early, late = sites.early(mean), sites.late(mean)
    assert early.layer < late.layer
    first = mean.at("mlp", early.layer, "subject_last")
    assert first.excludes_zero
    assert first.mean > 0.2
    assert first.mean > 5 * mean.at("attn", early.layer, "subject_last").mean
    assert first.mean > 5 * mean.at("mlp", early.layer, "subject_first").mean
    last = mean.at("attn", late.layer, "last")
    assert last.excludes_zero
    assert last.mean > 0.2


def test_a_trace_by_default_is_of_three_kinds_and_ten_draws(learnt):
    model, chosen = learnt
    found = trace(model, chosen[1])
    assert set(found.effects) == {"resid", "mlp", "attn"}
    assert found.settings.draws == 10
    assert found.p_clean > 0.9


def test_rome_rewrites_facts_and_leaves_their_neighbours(learnt, tmp_path):
    model, chosen = learnt
    before = state(model)
    found = evaluate(model, chosen[:25], tmp_path, EvaluateSettings(health=False))
    assert_same_state(model, before)
    table = found.table("after")
    assert table["ES"].mean >= 0.95
    assert table["PS"].mean >= 0.85
    assert table["NS"].mean >= 0.85
    assert found.table("before")["ES"].mean < 0.05


def test_an_edit_changes_what_is_said_and_is_undone_bit_for_bit(learnt):
    model, chosen = learnt
    fact, before = chosen[3], state(model)
    edit = rome.edit(model, fact)
    with applying.edited(model, edit):
        assert scoring.top(model, fact.prompt, 1)[0][2] > 0.5
        new, true = scoring.score(model, [(fact.prompt, fact.target_new), (fact.prompt, fact.target_true)])
        assert new.p > true.p
    assert_same_state(model, before)
    (undone,) = counterfact.scores(model, [fact])
    assert undone["ES"] == 0.0
    for _ in range(100):
        applying.apply(model, edit).undo()
    assert_same_state(model, before)


def test_unrelated_text_is_of_the_organisms_own_world(learnt):
    model, chosen = learnt
    before = health.unedited(model)
    assert math.exp(-float(before.text.mean())) < 8, "sentences it knows; English prose is noise to it"
    with applying.edited(model, rome.edit(model, chosen[4])):
        after = health.health(model, before)
    assert after["perplexity_ratio"] == pytest.approx(1, abs=0.1)
    assert after["next_token_same"] > 0.9


def test_scores_are_those_of_whole_logits_one_prompt_at_a_time(learnt):
    model, chosen = learnt

    @torch.no_grad()
    def mean_log_p(prompt, target):
        begin = model.to_tokens(prompt).shape[1]
        whole = model.to_tokens(f"{prompt} {target}")
        log_p = model(whole).log_softmax(-1)[0, :-1].gather(1, whole[0, 1:, None])[:, 0]
        return float(log_p[begin - 1 :].mean())

    some = chosen[:10]
    together, turned = counterfact.scores(model, some), counterfact.scores(model, some[::-1])[::-1]
    for fact, row, other in zip(some, together, turned, strict=True):
        asked = (fact.prompt, *fact.paraphrases, *fact.neighbours)
        pairs = [metrics.Pair(mean_log_p(each, fact.target_new), mean_log_p(each, fact.target_true)) for each in asked]
        slow = metrics.rewrite_scores(pairs[0], pairs[1:3], pairs[3:])
        assert {name: row[name] for name in slow} == pytest.approx(slow, abs=2e-6)  # of float32 log-probabilities
        assert other == pytest.approx(row, abs=1e-6)
    (known,) = counterfact.scores(model, [replace(some[0], target_new=some[0].target_true, target_true="Rome")])
    assert (known["rewrite_acc"], known["rephrase_acc"]) == (1, 1)
    assert max(together[0]["rewrite_acc"], together[0]["rephrase_acc"]) < 1


@pytest.mark.anywhere
def test_edits_succeed_where_the_trace_says_and_the_sweep_shows_it(learnt, tmp_path):
    model, chosen = learnt
    wanted = SweepSettings(layers=(0, 4), tokens=("subject_last", "last"), draws=2)
    found = sweep(model, chosen[:3], tmp_path, wanted)
    S, effect = found.mean("S"), found.mean("effect")
    assert np.unravel_index(S.argmax(), S.shape) == (0, 0), "layer 0 at the subject's last token"
    assert effect[0, 0] > effect[1, 0]
    assert S[0, 0] > 0.9


@pytest.mark.anywhere
def test_tuning_proposes_the_layer_where_facts_are_looked_up(learnt, tmp_path):
    model, chosen = learnt
    settings = TuneSettings(traced=10, edited=4, grid=(("clamp", (1.0,)),), draws=2)
    found = tune(model, chosen, tmp_path, settings, "rome", RomeSettings(prefixes=((5, 5),)))
    assert found.settings.layer == models.preset(model).rome.layer
    assert {row.layer for row in found.rows} == {0, 1, 2}


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_an_evaluation_killed_at_twenty_moments_ends_in_the_same_bytes(tmp_path):
    """SIGKILL of the command, wherever it happens to be; then it is finished and compared with one left in peace."""
    command = [sys.executable, "-m", "mechedit.cli", "evaluate", "--model", "organism", "--facts", "organism"]
    command += ["--limit", "200", "--device", "cpu", "--out"]

    def tables(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.stem in ("results", "summary")}

    def units():
        return sum(len(Shards(path.parent)) for path in tmp_path.glob("war/**/units/index"))

    subprocess.run([*command, str(tmp_path / "peace")], check=True, capture_output=True)
    stream, kept = random.Random(0), [0]
    for _ in range(20):
        process = subprocess.Popen([*command, str(tmp_path / "war")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        wanted = kept[-1] + stream.randrange(1, 9)
        while units() < wanted and process.poll() is None:
            time.sleep(0.01)
        time.sleep(stream.uniform(0, 0.3))
        process.kill()
        process.wait()
        kept.append(units())
    assert kept == sorted(kept)
    assert 20 <= kept[-1] < 200, "killed in the middle each time, and nothing finished was lost"
    subprocess.run([*command, str(tmp_path / "war")], check=True, capture_output=True)
    assert tables(tmp_path / "war") == tables(tmp_path / "peace")
    assert {"results.parquet", "summary.json", "summary.csv", "summary.md", "summary.tex"} <= tables(tmp_path / "war").keys()  # fmt: skip


def test_the_demo_tells_the_story_on_the_organism(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["demo", "--model", "organism", "--device", "cpu", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for part in ("early site", "late site", "paraphrase", "neighbour"):
        assert part in said
    record = json.loads((tmp_path / "edit.json").read_text())
    assert record["before"]["p_true"] > 0.9
    assert record["after"]["p_new"] > 0.9


@pytest.mark.parametrize("name", SHIPPED)
def test_the_preset_is_the_one_that_the_sweep_proposed(name):
    model = models.load(name, device="cpu")
    preset = models.preset(model)
    evidence = json.loads((Path(__file__).parents[1] / "figures" / name / "tuned.json").read_text())
    assert (evidence["settings"]["layer"], evidence["settings"]["clamp"]) == (preset.rome.layer, preset.rome.clamp)
    assert evidence["origin"]["weight_hash"] == models.weight_hash(model)
    assert preset.rome.layer < int(model.cfg.n_layers) // 2
    assert preset.window < int(model.cfg.n_layers) // 2
    C = moments.estimate(model, preset.rome.layer)
    assert np.isfinite(C.cond)
    assert C.keys >= 10 * len(C.C)


def test_the_world_asks_zsre_questions(learnt, tmp_path):
    model, _ = learnt
    questions = sources.questions("organism")[:5]
    found = evaluate(model, questions, tmp_path, EvaluateSettings(health=False))
    before, after = found.table("before"), found.table("after")
    assert before["specificity"].mean == after["specificity"].mean == 1.0
    assert before["efficacy"].mean < 0.6 < after["efficacy"].mean


def test_a_folder_of_that_name_that_holds_no_model_is_not_in_the_way(tmp_path, monkeypatch):
    (tmp_path / "organism").mkdir()
    monkeypatch.chdir(tmp_path)
    assert models.load("organism", device="cpu").cfg.n_layers == 8


def test_a_variant_that_does_not_ship_says_how_to_train_it(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "folder", lambda name="organism": tmp_path / name)
    with pytest.raises(models.ModelError, match=r"organism-llama does not ship.*--shape llama --out DIR"):
        models.load("organism-llama")
    listed = {each.name: each for each in models.listing()}
    assert not listed["organism-llama"].here
    assert "organism.train" in listed["organism-llama"].source
