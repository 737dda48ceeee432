from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from mechedit import cli, edits, models
from mechedit.runs import units
from mechedit.tracing import Trace
from tests.command_line import QUICK, command_line

pytestmark = pytest.mark.anywhere


@pytest.fixture
def run(folder, capsys, monkeypatch):
    return command_line(folder, capsys, monkeypatch)


RECORDS = [
    {
        "subject": name,
        "prompt": f"{name} is located in the city of",
        "target_true": "Seattle",
        "target_new": new,
        "paraphrases": [f"The city of {name} is"],
        "neighbours": ["The Space Needle is located in the city of"],
        "generations": [f"{name} is"],
        "id": name,
    }
    for name, new in (("The Eiffel Tower", "Paris"), ("Rome", "London"))
]


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps(RECORDS))
    return str(path)


def test_a_record_without_what_is_scored_says_what_it_is_needed_for(run, tmp_path):
    path, needed = tmp_path / "records.json", ", which is needed to score an edit."
    flat = {"prompt": "Rome is in", "subject": "Rome", "target_new": "London"}
    lacking = {name: value for name, value in RECORDS[1].items() if name != "target_true"}
    for rows, said in (([RECORDS[0], lacking], "record 1 (id 'Rome'): it lacks target_true"), ([flat | {"rephrase_prompt": "Rome?"}], "record 0: it lacks ground_truth")):  # fmt: skip
        path.write_text(json.dumps(rows))
        status, _, err = run("evaluate", "--facts", str(path), "--out", str(tmp_path / "run"))
        assert (status, said + needed in err) == (2, True)


@pytest.mark.both
def test_evaluate_scores_a_file_of_ones_own_and_resumes(run, records, tmp_path, monkeypatch):
    out = str(tmp_path / "run")
    status, said, _ = run("evaluate", "--facts", records, "--out", out, *QUICK)
    assert status == 0
    for name in ("2 records", "before", "after", "ES", "NS", "S", "next_token_kl", "summary.tex", "results.parquet"):
        assert name in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["facts"] == 2
    assert summary["edit"]["layer"] == 1
    assert summary["edit"]["guard"] == "refuse"
    assert (summary["benchmark"], summary["source"]) == ("counterfact", {"facts": records, "begin": 0})
    where = f"means over records of {Path(records).name} from 0 on (n = 2)"
    assert where in (tmp_path / "run" / "summary.md").read_text()
    monkeypatch.setattr("mechedit.editing.edit", lambda *args, **named: pytest.fail("found again"))
    assert run("evaluate", "--facts", records, "--out", out, *QUICK)[0] == 0
    status, said, _ = run("status", out, model=False)
    assert status == 0
    assert said.count("2 of 2") == 3
    assert "6 of 6" in said
    status, _, err = run("evaluate", "--facts", records, "--out", out, *QUICK, "--mode", "batch")
    assert (status, "settings.mode" in err) == (2, True)
    status, _, err = run("evaluate", "--facts", records, "--limit", "1", "--out", out, *QUICK)
    assert (
        status,
        "has results that are not of these 1 records (1 of them; 'Rome is located in the city of' becoming 'London' for one)"
        in " ".join(err.split()),
    ) == (2, True)
    (tmp_path / "run" / "results.parquet").write_bytes(b"PAR1")
    status, _, err = run("evaluate", "--facts", records, "--out", out, *QUICK)
    assert (status, "results.parquet is damaged" in " ".join(err.split())) == (2, True)


def test_help_says_the_defaults_of_the_command_and_the_choices(capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "A model with a preset (`mechedit models`) has the preset's layer" in shown
    assert "--guard {refuse,warn,rollback}" in shown
    assert "with the reason (rollback) (default: refuse)" in shown


def test_evaluate_has_every_option_of_its_settings(run, records, tmp_path):
    references = tmp_path / "references.json"
    references.write_text(json.dumps({"city": {"Q90": ["Paris is a city."]}}))
    options = (
        "--generate",
        "--tokens",
        "20",
        "--top-k",
        "3",
        "--references",
        str(references),
        "--no-health",
        "--seed",
        "4",
    )
    status, said, _ = run("evaluate", "--facts", records, "--limit", "1", "--editor", "none", "--out", str(tmp_path / "a"), *options)  # fmt: skip
    assert status == 0
    assert "exact_match" in said
    assert "next_token_kl" not in said
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    settings = summary["settings"]
    assert (settings["tokens"], settings["top_k"], settings["seed"], summary["editor"]) == (20, 3, 4, "none")
    status, said, _ = run("evaluate", "--facts", records, "--estimate", "--workers", "2", "--editor", "none")
    assert status == 0
    assert "2 records, independent" in said
    assert "on 2 workers" in said


def test_knowledge_neurons_are_evaluated_in_one_batch(run, records, tmp_path):
    out, quick = tmp_path / "run", ("--steps", "2", "--prefixes", "none", "--no-health", "--guard", "warn")
    status, _, err = run("evaluate", "--facts", records, "--out", str(out), "--editor", "kn", "--mode", "batch", *quick)
    assert status == 0, err
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["settings"]["mode"], summary["edit"]["action"]) == ("batch", "update")


def test_evaluate_reads_zsre(run, tmp_path):
    path = tmp_path / "zsre.json"
    record = {"subject": "Rome", "src": "What city is Rome in?", "rephrase": "Where is Rome?", "alt": "London", "answers": ["Paris"], "loc": "nq question: where is London", "loc_ans": "Seattle"}  # fmt: skip
    path.write_text(json.dumps([record]))
    status, said, _ = run("evaluate", "--benchmark", "zsre", "--facts", str(path), "--out", str(tmp_path / "z"), *QUICK)
    assert status == 0
    assert "efficacy" in said
    assert "specificity" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--out DIR"),
        (("--out", "x", "--limit", "0"), "--limit at least 1"),
        (("--out", "x", "--begin", "-1"), "--begin must be 0 or more"),
        (("--out", "x", "--begin", "9"), "leaves none of the 2 records"),
        (("--out", "x", "--workers", "2"), "--workers is of --engine ray"),
        (("--out", "x", "--gpus", "1"), "--gpus is of --engine ray"),
        (("--out", "x", "--engine", "ray", "--cpus", "0"), "--cpus more than 0"),
        (("--out", "x", "--references", "y"), "give --generate too"),
        (("--out", "x", "--generate", "--tfidf", "a", "b"), "give both"),
        (("--out", "x", "--generate", "--references", "nothing.json"), "nothing.json cannot be read"),
        (("--out", "x", "--tokens", "20"), "--tokens is of generated text"),
        (("--out", "x", "--top-k", "2"), "--top-k is of generated text"),
        (("--out", "x", "--editor", "none", "--clamp", "1"), "--clamp is of edits"),
        (("--out", "x", "--editor", "none", "--mode", "batch"), "--mode is of edits"),
        (("--out", "x", "--editor", "none", "--policy", "published"), "--policy is of edits"),
        (("--out", "x", "--editor", "none", "--constants", "paper"), "--constants is of edits"),
        (("--out", "x", "--editor", "none", "--search", "quick"), "--search is of edits"),
        (("--out", "x", "--no-answers", "--answer-rule", "published"), "--answer-rule is of answers"),
        (("--out", "x", "--benchmark", "zsre", "--facts", "built-in"), "no zsRE questions"),
    ],
)
def test_evaluate_says_what_does_not_go_together_before_anything_is_loaded(run, records, tmp_path, monkeypatch, options, message):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load", lambda *args, **named: pytest.fail("loaded"))
    status, _, err = run("evaluate", "--facts", records, *options)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_sweep_draws_its_maps_and_says_how_far_traces_foretell_them(run, records, tmp_path, monkeypatch):
    status, said, _ = run("sweep", "--facts", records, "--out", str(tmp_path / "s"), "--layers", "0,2", "--tokens", "subject_last,last", "--draws", "2", "--steps", "2", "--prefixes", "none")  # fmt: skip
    assert status == 0
    assert "rank correlation of S" in said
    assert (tmp_path / "s" / "sweep.png").stat().st_size > 5000
    record = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert record["layers"] == [0, 2]
    lines = [line.split(",") for line in (tmp_path / "s" / "sweep.csv").read_text().splitlines()]
    assert lines[0] == ["layer", "token", "ES", "PS", "NS", "S", "effect", "n"]
    assert [line[:2] for line in lines[1:]] == [["0", "subject_last"], ["0", "last"], ["2", "subject_last"], ["2", "last"]]  # fmt: skip
    assert float(lines[4][6]) == record["mean"]["effect"][1][1]
    assert lines[4][7] == "2"
    there = {path: path.read_bytes() for path in (tmp_path / "s").glob("sweep.*")}
    with monkeypatch.context() as patch:
        patch.setattr(models, "load", lambda *args, **named: pytest.fail("loaded"))
        status, _, err = run("sweep", "--facts", records, "--begin", "1", "--out", str(tmp_path / "s"))
    assert (status, err.count("\n"), "has results that are not of these 1 records" in err) == (2, 1, True)
    assert {path: path.read_bytes() for path in there} == there
    status, _, err = run("sweep", "--facts", records, "--out", str(tmp_path / "t" / "u"), "--layers", "9")
    assert (status, "layer must be from 0 to 3" in err) == (2, True)
    assert not (tmp_path / "t").exists(), "a command that is refused leaves nothing"
    with pytest.raises(SystemExit):
        run("sweep", "--facts", records, "--out", str(tmp_path / "t"), "--layers", "0.5")


def test_status_says_that_more_is_left_than_is_known(run, records, tmp_path, monkeypatch):
    def interrupt(*args, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("mechedit.editing.edit", interrupt)
    assert run("evaluate", "--facts", records, "--out", str(tmp_path / "run"), *QUICK)[0] == 130
    status, said, _ = run("status", str(tmp_path / "run"), model=False)
    assert status == 0
    assert "2 of 6" in said
    assert "more than 0.00" in said


def test_status_of_a_folder_without_runs(run, tmp_path):
    status, _, err = run("status", str(tmp_path), model=False)
    assert (status, "holds no run" in err) == (2, True)
    status, _, err = run("status", str(tmp_path / "none"), model=False)
    assert (status, "is no folder; give one that a run was kept in" in err) == (2, True)


def test_tuning_proposes_settings_and_keeps_its_runs(run, tmp_path, monkeypatch):
    from mechedit.runs import tracing as runs

    monkeypatch.setattr(runs, "known", lambda model, facts, **options: list(facts))
    path = tmp_path / "facts.json"
    rewrite = {"subject": "The Space Needle", "prompt": "{} is located in the city of"}
    rows = [
        {
            "case_id": number,
            "requested_rewrite": rewrite | {"target_true": {"str": "Seattle"}, "target_new": {"str": new}},
            "paraphrase_prompts": ["The city of The Space Needle is"],
            "neighborhood_prompts": ["The Eiffel Tower is located in the city of"],
        }
        for number, new in enumerate(("Paris", "Rome", "London", "Apple"))
    ]
    path.write_text(json.dumps(rows))
    command = ("tune", "--facts", str(path), "--begin", "1", "--traced", "2", "--edited", "1", "--around", "0")
    monkeypatch.setattr("mechedit.tuning.Tuned.worked", True)
    status, out, _ = run(*command, "--try", "clamp=1,3", "--draws", "1", "--out", str(tmp_path / "tune"))
    assert status == 0
    assert re.search(r"proposed: --layer \d --clamp [13]\n", out)
    assert re.search(r"none\W", out), "the unedited model"
    monkeypatch.setattr("mechedit.tuning.Tuned.worked", False)
    status, out, err = run(*command, "--try", "clamp=1,3", "--draws", "1", "--out", str(tmp_path / "tune"))
    assert status == 2
    assert re.search(
        r"nothing is proposed: the best edits that were tried have ES .* and S .*, the model as it is", err
    )
    assert "proposed:" not in out
    record = json.loads((tmp_path / "tune" / "tuned.json").read_text())
    assert [row["tried"]["clamp"] for row in record["rows"]] == [1.0, 3.0]
    kept = [Trace.load(unit) for unit in units.read_all(tmp_path / "tune" / "traces")]
    assert len(kept) == 2, "the first of four is left out, and one is edited"
    for options, what in ((("--try", "clamp=3"), "layer .*, {'clamp': 1.0}"), (("--editor", "ft", "--try", "learning_rate=1e-3"), "the editor rome")):  # fmt: skip
        status, _, err = run(*command, *options, "--draws", "1", "--out", str(tmp_path / "tune"))
        assert (status, err.count("\n")) == (2, 1)
        assert re.search(rf"has results of {what}, which is not tried here, and they would be replaced", err), err
    table = tmp_path / "tune" / "tuned.json"
    table.write_text(json.dumps(record | {"rows": [*record["rows"], record["rows"][0] | {"layer": 99}]}))
    status, _, err = run(*command, "--try", "clamp=1,3", "--draws", "1", "--out", str(tmp_path / "tune"))
    assert (status, "has results of layer 99, {'clamp': 1.0}, which is not tried here" in err) == (2, True), err
    table.write_text(json.dumps(record))
    other = rows[0] | {
        "requested_rewrite": rows[0]["requested_rewrite"] | {"target_new": {"str": "Bonn"}},
        "case_id": 4,
    }
    path.write_text(json.dumps([*rows[:1], *rows[2:], other, rows[1]]))  # what was traced first is last, and not chosen
    status, _, err = run(*command, "--draws", "1", "--out", str(tmp_path / "tune"))
    assert (status, err.count("\n")) == (2, 1)
    assert "has results that are not of these 3 records (1 of them; 'The Space Needle is located in the city of' becoming 'Rome' for one)" in err  # fmt: skip
    assert json.loads((tmp_path / "tune" / "tuned.json").read_text()) == record


# --- editors and benchmarks by name -----------------------------------------------------------------------------------


def test_controls_are_editors_of_an_evaluation(run, records, tmp_path):
    def evaluated(editor):
        out = tmp_path / editor
        status, said, _ = run("evaluate", "--facts", records, "--editor", editor, "--out", str(out), *QUICK)
        assert status == 0
        assert "2 records" in said
        summary = json.loads((out / "summary.json").read_text())
        found = [edits.load(unit) for unit in units.read_all(out / "edits")]
        assert (summary["editor"], summary["edit"]["layer"], len(found)) == (editor, 1, 2)
        assert {edit.editor for edit in found} == {editor}
        return found

    ordinary, control = evaluated("rome"), evaluated("rome-identity")
    for edit, plain in zip(control, ordinary, strict=True):
        assert edit.details["moment"]["source"] == "identity"
        (change,), key = edit.changes, edit.vectors["k*"].double()
        torch.testing.assert_close(change.u, key, atol=1e-6, rtol=1e-6)  # C^-1 k* = k*
        assert not torch.allclose(plain.changes[0].u, plain.vectors["k*"].double(), rtol=0.1)
    status, _, err = run("evaluate", "--facts", records, "--editor", "rome-identity", "--out", str(tmp_path / "rome"), *QUICK)  # fmt: skip
    assert (status, "holds a run of other settings" in err) == (2, True)


COUNTING = '''
import json
from dataclasses import dataclass, replace
from pathlib import Path

from mechedit.facts import Fact


@dataclass(frozen=True)
class Name:
    """A name whose city is to be another."""

    who: str
    city: str
    source: str = "an atlas"
    id: str = ""


class Counting:
    name = "counting"

    def read(self, source):
        return [Name(**each) for each in json.loads(Path(source).read_text())]

    def takes(self, record):
        return isinstance(record, Name)

    def fact(self, record):
        return Fact(record.who, "{} is located in the city of", "Seattle", record.city, id=record.id)

    def lacks(self, record):
        return "" if record.source else "a source"

    def named(self, record, name):
        return replace(record, id=name)

    def scores(self, model, records, *, prepend_bos=None):
        largest = model.blocks[1].mlp.W_out.max().item()
        return [{"letters": float(len(each.who)), "largest": largest} for each in records]


COUNTING = Counting()
HALF = {"name": "half"}
'''


@pytest.fixture
def counting(tmp_path, monkeypatch):
    """The name of a benchmark in a module that is not of mechedit."""
    (tmp_path / "counting.py").write_text(COUNTING)
    monkeypatch.syspath_prepend(tmp_path)
    yield "counting:COUNTING"
    sys.modules.pop("counting", None)


def test_a_benchmark_from_outside_reads_and_scores_its_own_records(run, load, counting, tmp_path):
    path, out = tmp_path / "names.json", tmp_path / "run"
    path.write_text(json.dumps([{"who": "Rome", "city": "London"}, {"who": "The Eiffel Tower", "city": "Paris"}]))
    status, said, err = run("evaluate", "--benchmark", counting, "--facts", str(path), "--out", str(out), *QUICK)
    assert (status, err) == (0, "")
    assert "letters" in said
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["benchmark"], summary["facts"]) == ("counting", 2)
    before, after = summary["stages"]["before"], summary["stages"]["after"]
    assert before["letters"]["mean"] == after["letters"]["mean"] == (4 + 16) / 2
    assert before["largest"]["mean"] == pytest.approx(load("gpt2").blocks[1].mlp.W_out.max().item())
    assert before["largest"]["mean"] != after["largest"]["mean"], "after is on the edited weights"
    path.write_text(json.dumps([{"who": "Rome", "city": "London", "source": ""}]))
    status, _, err = run("evaluate", "--benchmark", counting, "--facts", str(path), "--out", str(out), *QUICK)
    assert (status, "about 'Rome', lacks a source" in err) == (2, True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("counts", "no benchmark is called 'counts'; there are counterfact, zsre, and package.module:object"),
        ("no.such.module:OBJECT", "the benchmark no.such.module:OBJECT cannot be imported: No module named"),
        ("counting:NOTHING", "the benchmark counting:NOTHING cannot be imported"),
        ("counting:HALF", "counting:HALF is no benchmark"),
    ],
)
def test_an_unknown_benchmark_ends_in_one_line(name, message, run, records, counting, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *args, **named: pytest.fail("loaded"))
    status, out, err = run("evaluate", "--benchmark", name, "--facts", records, "--out", str(tmp_path / "x"))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_an_editor_without_a_choice_of_token_is_swept_over_layers(run, records, tmp_path):
    own = ("--editor", "ft", "--steps", "2", "--learning-rate", "0.01", "--layers", "0,2", "--draws", "2")
    status, said, _ = run("sweep", "--facts", records, "--out", str(tmp_path), *own, "--tokens", "subject_last,last")
    assert (status, "rank correlation of S" in said) == (0, True)
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert (record["layers"], record["tokens"]) == ([0, 2], ["subject_last", "last"])
    first, second = record["mean"]["ES"]
    assert first[0] == first[1], "the same edits, whatever the token"
    assert second[0] == second[1]
    found = [edits.load(unit) for path in tmp_path.glob("**/edits") for unit in units.read_all(path)]
    assert {(edit.editor, edit.layer, edit.settings["steps"]) for edit in found} == {("ft", 0, 2), ("ft", 2, 2)}


@pytest.mark.parametrize(
    ("tried", "message"),
    [
        ("clamp", "--try takes OPTION=VALUE,VALUE with an option of the editor (seed, clamp, steps,"),
        ("clamps=1,2", "found 'clamps=1,2'"),
        ("layer=1,2", "found 'layer=1,2'"),
        ("guard=warn", "found 'guard=warn'"),
        ("prepend-bos=True", "found 'prepend-bos=True'"),
        ("prefixes=none", "found 'prefixes=none'"),
        ("clamp=1,a", "--try 'clamp=1,a': could not convert string to float"),
        ("clamp=", "--try 'clamp=': could not convert string to float"),
        ("steps=1.5", "--try 'steps=1.5': invalid literal for int()"),
        ("clamp=1,-2", "clamp must be positive; found -2.0"),
        ("stop=target,never", "stop must be one of target, published, top; found 'never'"),
        ("norm-bound=1", "found 'norm-bound=1'"),
    ],
)
def test_a_try_that_cannot_be_meant_ends_in_one_line(tried, message, run, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *args, **named: pytest.fail("loaded"))
    status, out, err = run("tune", "--try", tried, "--out", str(tmp_path / "x"))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
