from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from mechedit import generation, moments, prompts
from mechedit.benchmarks import metrics
from mechedit.facts import Fact
from mechedit.runs import shards
from mechedit.runs.evaluating import evaluate
from mechedit.runs.results import Evaluation, check_kept
from mechedit.runs.status import status
from mechedit.runs.store import RunError
from mechedit.settings import EvaluateSettings, MomentSettings
from tests.conftest import kept_units, widen_bands
from tests.three_facts import FACTS, PLAIN, QUICK, made_ready

pytestmark = pytest.mark.anywhere


@pytest.fixture
def moment(model, monkeypatch):
    widen_bands(monkeypatch)
    return moments.estimate(model, 1, settings=MomentSettings(tokens=600, context=32))


@pytest.fixture
def ready(model, moment):
    return made_ready(model, QUICK, moment)


@pytest.mark.parametrize("form", ["list", "object"])
def test_a_table_gives_way_to_one_of_more_facts_and_to_no_other(form, tmp_path):
    lines = [{"subject": "Rome", "prompt": "Rome is in", "target_new": "Oslo", "P": 0.5}, {"subject": "Bonn", "prompt": "Bonn is in", "target_new": None}]  # fmt: skip
    rome, bonn, kyiv = Fact("Rome", "{} is in", None, "Oslo"), Fact("Bonn", "{} is in"), Fact("Kyiv", "{} is in")
    path = tmp_path / "table.json"
    check_kept(path, [kyiv])
    path.write_text(json.dumps(lines if form == "list" else {"n": 2, "facts": lines}))
    check_kept(path, [bonn, kyiv, rome])
    said = r"of these 1 records \(1 of them; 'Rome is in' becoming 'Oslo' for one\), and they would be replaced\. Take those too, choose another"
    with pytest.raises(RunError, match=said):
        check_kept(path, [bonn])
    with pytest.raises(RunError, match=r"\(2 of them; 'Bonn is in' for one\)"):
        check_kept(path, [kyiv, replace(rome, target_new="Paris")])
    path.write_text(json.dumps({"n": 2}))
    check_kept(path, [kyiv])  # of an earlier version, which does not say whose it is
    for damaged in ("{", "5", '{"facts": 5}', '[{"subject": "Rome"}]'):
        path.write_text(damaged)
        with pytest.raises(RunError, match=r"table\.json is damaged \(.*delete it, or choose another folder"):
            check_kept(path, [rome])


def test_results_are_written_in_every_form(tmp_path):
    rows = [{"ES": 1.0, "PS": 0.5, "NS": 1.0, "RS": math.nan}, {"ES": 0.0, "PS": 1.0, "NS": 1.0, "RS": math.nan}]
    rows = [row | {"next_token_kl": 3.3e-5} for row in rows]
    facts = tuple({"id": str(index), "subject": "A_b", "reason": ""} for index in range(2))
    what = {
        "editor": "rome",
        "settings": {"mode": "independent"},
        "model": {"name": "M"},
        "benchmark": "counterfact",
    }
    result = Evaluation(facts, {"before": rows[::-1], "after": rows}, what)
    assert repr(result).startswith("Evaluation(M, counterfact, rome, independent: means over records (n = 2)")
    with pytest.raises(RunError, match="stages of this evaluation are before, after; found 'end'"):
        result.table("end")
    assert "3.3e-05" in result.cells()[1][0], "a small number is not told as 0"
    result.save(tmp_path)
    from pyarrow import parquet

    read = parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert [line["stage"] for line in read] == ["before", "before", "after", "after"]
    assert [line["ES"] for line in read] == [0.0, 1.0, 1.0, 0.0]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["stages"]["after"]["S"]["mean"] == pytest.approx(metrics.harmonic(0.5, 0.75, 1.0))
    assert summary["stages"]["after"]["RS"]["mean"] is None
    assert (tmp_path / "summary.csv").read_text().splitlines()[1].startswith("before,ES,0.5,")
    assert (tmp_path / "summary.md").read_text().startswith("| 2 records | ES | PS | NS | S |")
    assert (
        "M, counterfact, rome, independent: means over records (n = 2) with 95 % intervals"
        in (tmp_path / "summary.md").read_text()
    )
    partly = replace(result, rows={"after": [rows[0], rows[1] | {"PS": math.nan}]})
    assert "50.0, n = 1" in partly.cells()[1][0]
    assert partly.table("after")["S"].n == 1, "rows that are replaced have means of their own"
    assert "- ES (%, higher is better): efficacy score" in (tmp_path / "summary.md").read_text()
    unedited = replace(result, what=what | {"editor": "none"})
    assert unedited.caption.startswith("M, counterfact, not edited: means")
    controlled = replace(result, what=what | {"editor": "rome-identity"})
    assert controlled.caption.startswith("M, counterfact, rome-identity, independent: means")
    latex = (tmp_path / "summary.tex").read_text()
    assert r"\begin{tabular}{lrrrrrr}" in latex
    assert "50.0 [1.3, 98.7]" in latex, "1 of 2: Clopper and Pearson's"


def test_status_says_how_far_a_run_is(model, ready, tmp_path):
    def interrupt(what, done, of):
        if what == "records after" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, FACTS, tmp_path, PLAIN, "rome", QUICK, ready, progress=interrupt)
    found = {each.folder: each for each in status(tmp_path)}
    assert set(found) == {"before", "edits", "scores"}
    assert (found["edits"].finished, found["edits"].units, found["edits"].left) == (3, 3, 0.0)
    assert (found["scores"].finished, found["scores"].units) == (2, 3)
    log = tmp_path / "scores" / "seconds.jsonl"
    log.write_text(log.read_text() + '{"unit": "cut o')
    assert [each.units for each in status(tmp_path)] == [3, 3, 3], "the unedited model's scores too"
    assert found["scores"].left == found["scores"].seconds > 0
    with pytest.raises(RunError, match="holds no run"):
        status(tmp_path / "edits" / "units")


def test_status_counts_stages_that_have_not_begun(model, ready, tmp_path):
    def interrupt(what, done, of):
        if what == "edits" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, FACTS, tmp_path, PLAIN, "rome", QUICK, ready, progress=interrupt)
    assert [(each.folder, each.finished, each.units) for each in status(tmp_path)] == [
        ("before", 3, 3),
        ("edits", 1, 3),
        ("scores", 0, 3),
    ]
    evaluate(model, FACTS, tmp_path, PLAIN, "rome", QUICK, ready)
    assert [each.finished for each in status(tmp_path)] == [3, 3, 3]


def test_status_is_the_same_from_any_folder_and_of_a_run_that_was_moved(model, ready, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluate(model, FACTS, "run", PLAIN, "rome", QUICK, ready)
    monkeypatch.chdir("/")
    assert [each.finished for each in status(tmp_path / "run")] == [3, 3, 3]
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "moved" / "deeper").mkdir()
    (tmp_path / "moved" / "deeper" / "plan.json").write_text("[1]")  # another program's
    assert [each.finished for each in status(tmp_path / "moved")] == [3, 3, 3]


def test_damage_a_full_disk_and_a_second_run_are_noticed_and_nothing_finished_is_lost(model, ready, tmp_path, monkeypatch):  # fmt: skip
    import errno

    from mechedit.cache import WriteError

    def results(folder):
        return {
            path.name: path.read_bytes()
            for path in evaluate(model, FACTS, folder, PLAIN, "rome", QUICK, ready).save(folder)
        }

    whole = results(tmp_path / "whole")
    unit = next((tmp_path / "whole" / "scores" / "units").glob("*.shard"))
    unit.write_bytes(unit.read_bytes()[:-3])
    assert results(tmp_path / "whole") == whole, "a damaged unit is done again"

    real, written = shards._append, []

    def full(file, data):
        written.append(data)
        if len(written) == 11:  # bytes and a line of the index for three edits and two scores, and then
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, data)

    monkeypatch.setattr(shards, "_append", full)
    with pytest.raises(WriteError, match="No space left on device. What was there before is as it was"):
        evaluate(model, FACTS, tmp_path / "full", PLAIN, "rome", QUICK, ready)
    monkeypatch.setattr(shards, "_append", real)
    assert len(kept_units(tmp_path / "full" / "scores")) == 2
    assert results(tmp_path / "full") == whole
    with pytest.raises(WriteError):
        evaluate(model, FACTS, unit, PLAIN, "rome", QUICK, ready)

    def again(what, done, of):
        if what == "records after":
            with pytest.raises(RunError, match="another process is at work"):
                evaluate(model, FACTS, tmp_path / "two", PLAIN, "rome", QUICK, ready)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, FACTS, tmp_path / "two", PLAIN, "rome", QUICK, ready, progress=again)


@pytest.mark.both
def test_an_evaluation_is_the_same_when_it_is_read_again(model, ready, tmp_path):
    unknown = replace(FACTS[2], paraphrases=("a city and " * 60 + "Rome is",))  # does not fit: nan, and a reason
    for mode in ("independent", "sequential"):
        settings = EvaluateSettings(mode=mode, generate=True, tokens=20)
        found = evaluate(model, [*FACTS[:2], unknown], tmp_path / mode, settings, "rome", QUICK, ready)
        found.save(tmp_path / mode)
        read = Evaluation.load(tmp_path / mode)
        assert read == found
        assert read.to_json() == found.to_json()
        assert (read.cells(), read.caption, read.facts[0]["relation"]) == (found.cells(), found.caption, "city")
        assert all(list(read.details(name)) == list(found.details(name)) for name in ("prompts", "texts"))
        assert read != replace(found, seed=1)
        other = replace(found, rows=found.rows | {"after": found.rows["before"]})
        assert read != other
        assert other.table("after")["ES"] == found.table("before")["ES"], "a changed result has means of its own"


@pytest.mark.both
def test_every_prompts_log_probabilities_and_every_text_are_kept(model, tmp_path):
    """Against a plain softmax of the model's logits, and against what the generator says."""
    settings = replace(PLAIN, generate=True, tokens=20, top_k=3, seed=5)
    found = evaluate(model, FACTS, tmp_path, settings, None)
    found.save(tmp_path)
    lines = list(Evaluation.load(tmp_path).details("prompts"))
    fact = FACTS[0]
    own = [line for line in lines if line["record"] == 0]
    asked = [("prompt", fact.prompt), *(("paraphrase", each) for each in fact.paraphrases), *(("neighbour", each) for each in fact.neighbours)]  # fmt: skip
    assert [(line["kind"], line["prompt"]) for line in own[::2]] == asked
    assert [line["target"] for line in own[:2]] == [fact.target_new, fact.target_true]
    for line in own:
        ids, tail = (
            prompts.encode(model, line["prompt"], prepend_bos=prompts.resolve_bos(model, None))[0],
            prompts.continuation(model, line["prompt"], line["target"]),
        )
        log_p = model(torch.tensor([[*ids, *tail]]))[0].log_softmax(-1)[len(ids) - 1 : -1]
        assert line["log_p"] == pytest.approx(log_p.gather(1, torch.tensor(tail)[:, None])[:, 0].tolist(), abs=1e-4)
        assert line["first"] == (log_p.argmax(-1) == torch.tensor(tail)).tolist()
    texts = [(line["prompt"], line["text"]) for line in found.details("texts") if line["record"] == 0]
    written = generation.continuations(model, fact.generations, 20, top_k=3, seed=5)
    assert texts[1:] == list(zip(fact.generations, written, strict=True))
    assert texts[0][0] == fact.prompt


@pytest.mark.parametrize("option", [{"seed": 6}, {"top_k": 1}, {"tokens": 12}])
def test_options_of_sampled_text_change_what_is_sampled(model, tmp_path, option):
    settings = replace(PLAIN, generate=True, tokens=30, top_k=50, seed=5)

    def sampled(wanted, name):
        found = evaluate(model, FACTS[:1], tmp_path / name, wanted, None)
        return [line["text"] for line in found.details("texts")][1:]

    first = sampled(settings, "a")
    assert first == sampled(settings, "again")
    assert sampled(replace(settings, **option), "b") != first


def test_results_of_earlier_versions_are_read_without_what_they_lack(tmp_path):
    import pyarrow
    from pyarrow import parquet

    lines = [{"stage": stage, "id": "1", "subject": "A", "prompt": "A is", "target_true": "B", "target_new": "C", "reason": "", "ES": 1.0, "PS": math.nan, "NS": 0.5} for stage in ("before", "after")]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(lines), tmp_path / "results.parquet")
    what = {"editor": "rome", "settings": {"mode": "independent", "seed": 3}, "model": {"name": "M"}, "benchmark": "counterfact"}  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(what | {"facts": 1, "stages": {}}))
    found = Evaluation.load(tmp_path)
    assert (found.seed, found.what, list(found.rows)) == (3, what, ["before", "after"])
    assert found.table("after")["ES"].mean == 1.0
    assert list(found.details("prompts")) == []
    found.save(tmp_path / "again")
    assert Evaluation.load(tmp_path / "again") == found


@pytest.mark.parametrize("damage", [b"", b"PAR1", None])
def test_what_is_no_evaluation_is_told_in_a_line(damage, tmp_path):
    if damage is not None:
        (tmp_path / "results.parquet").write_bytes(damage)
    with pytest.raises(RunError, match="is damaged|holds no finished evaluation"):
        Evaluation.load(tmp_path)


def test_half_characters_and_other_numbers_are_written(tmp_path):
    rows = [{"ES": 1.0, "PS": 1.0, "NS": 1.0}]
    what = {"editor": "none", "settings": {"mode": "independent"}, "model": {"name": "M"}, "benchmark": "counterfact"}
    found = Evaluation(({"id": "\ud800", "subject": "A\udfff", "prompt": "A is", "target_true": "B", "target_new": "C", "relation": None, "reason": ""},), {"before": rows}, what)  # fmt: skip
    found.save(tmp_path)
    assert Evaluation.load(tmp_path).facts[0]["subject"] == "A\\udfff"
