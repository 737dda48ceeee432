"""The list of figures is what the page of results has, its commands are commands, and a run makes what is not made yet."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import common, figures
from experiments.figures import ROWS, Figures, Row, Run
from mechedit import cli

pytestmark = pytest.mark.anywhere
PAGE = Path(common.__file__).parent / "README.md"


def test_the_page_of_results_begins_with_the_same_table():
    head, *lines = (line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| "))
    assert [each.strip() for each in head.strip("|").split("|")][:4] == ["figure or table", "script", "Gemma 3 270M", "organism"]  # fmt: skip
    rows = [[each.strip() for each in line.strip("|").split("|")] for line in lines[: len(ROWS)]]
    for row, (name, script, *times) in zip(ROWS, rows, strict=True):
        own = [row.runs[model].time if model in row.runs else "–" for model in figures.MODELS]
        assert [name, script.partition("]")[0], *times[:2]] == [row.name, f"[{row.script}", *own]


def test_times_are_said_in_minutes_and_hours():
    assert [Run(each).time for each in (0.5, 75, 150, None)] == ["0.5 min", "75 min", "2.5 h", "not timed"]


def test_every_command_is_one_that_its_script_takes(monkeypatch):
    for row in ROWS:
        if row.script.startswith("mechedit "):
            for model in row.runs:
                command = row.command(model)
                assert command[:2] == ["-m", "mechedit.cli"]
                assert cli._parser(cli.named_in(command[2:])).parse_args(command[2:]).model == model
            continue
        script = importlib.import_module(f"experiments.{row.script}")
        for model in row.runs:
            taken = []
            monkeypatch.setattr(script, "main", taken.append)
            own = [
                each for each in vars(script).values() if isinstance(each, type) and each.__module__ == script.__name__
            ]
            (settings,) = [each for each in own if "threads" in getattr(each, "__dataclass_fields__", {})] or [
                getattr(script, "".join(map(str.title, row.script.split("_"))), None) or script.Lines
            ]
            found = common.parse(settings, row.command(model)[2:])
            assert getattr(found, "model", model) == model


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A list of four: one that works, one that fails, one that lacks a file, and one of another model."""
    monkeypatch.setattr(common, "OUT", tmp_path / "out")
    monkeypatch.setenv("MECHEDIT_DATA", str(tmp_path))
    rows = (
        Row("1: works", "works", {"organism": Run(2, '--named "two words"')}),
        Row("2: fails", "fails", {"organism": Run(90)}),
        Row("3: lacks", "lacks", {"organism": Run(1)}, {"organism": "zsre.json"}),
        Row("4: other", "other", {"gemma-3-270m": Run(None)}),
    )
    monkeypatch.setattr(figures, "ROWS", rows)
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    ran = []

    def run(command, **named):
        ran.append(command)
        return subprocess.CompletedProcess(command, int("experiments.fails" in command))

    monkeypatch.setattr(figures.subprocess, "run", run)
    return ran


def test_what_is_done_is_not_run_again_and_what_fails_is_told(small, tmp_path, capsys, monkeypatch):
    for _ in range(2):
        with pytest.raises(
            SystemExit, match="failed:\n2: fails, organism: python -m experiments.fails --model organism"
        ):
            figures.main(Figures(model="organism"))
    works = [sys.executable, "-m", "experiments.works", "--model", "organism", "--named", "two words"]
    assert [command[2].partition(".")[2] for command in small] == ["works", "fails", "fails"]
    assert small[0] == works
    said = capsys.readouterr().err
    assert "1: works, organism: done" in said
    assert "3: lacks, organism: needs zsre.json in the folder that MECHEDIT_DATA names" in said
    assert len(json.loads((tmp_path / "out" / "figures.json").read_text())) == 1
    monkeypatch.setattr(figures.mechedit, "__version__", "9.9")
    with pytest.raises(SystemExit):
        figures.main(Figures(model="organism", scripts=("works", "fails")))
    assert small[-2] == works, "another version makes them again"


def test_the_list_runs_nothing_and_sums_what_is_left(small, capsys):
    figures.main(common.parse(Figures, ["--list"]))
    said = capsys.readouterr().out
    assert small == []
    assert "python -m experiments.works --model organism --named 'two words'" in said
    assert "needs the weights" in said
    assert said.splitlines()[-1] == "2 to run, 1.5 h on two cores"
    figures.main(Figures(model="organism", scripts=("lacks",), list=True))
    assert capsys.readouterr().out.splitlines()[-1] == "0 to run, 0.0 h on two cores"


def test_what_is_not_known_to_take_so_few_minutes_is_left_out(small, capsys):
    figures.main(common.parse(Figures, ["--within", "2"]))
    assert [command[2] for command in small] == ["experiments.works"]
    assert "3: lacks" in capsys.readouterr().err
    figures.main(common.parse(Figures, ["--within", "0.5", "--list"]))
    assert capsys.readouterr().out.splitlines() == ["0 to run, 0.0 h on two cores"]


def test_what_a_command_draws_is_put_among_the_figures(small, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(figures, "ROWS", (Row("learns", "mechedit train-editor mend", {"organism": Run(1, "--data {data}/some.json --out trained", "train")}),))  # fmt: skip
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    (tmp_path / "trained").mkdir()
    for kind in ("json", "png", "svg"):
        (tmp_path / "trained" / f"training.{kind}").write_text(kind)
    figures.main(Figures(model="organism"))
    assert small == [[sys.executable, "-m", "mechedit.cli", "train-editor", "mend", "--model", "organism", "--data", f"{tmp_path}/some.json", "--out", "trained"]]  # fmt: skip
    kept = {path.name: path.read_text() for path in (tmp_path / "figures" / "organism").iterdir()}
    assert kept == {"train.json": "json", "train.png": "png", "train.svg": "svg"}


def test_a_run_that_is_stopped_says_how_it_goes_on(small, tmp_path, monkeypatch):
    def stopped(command, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(figures.subprocess, "run", stopped)
    with pytest.raises(SystemExit, match="stopped; the same command goes on from here"):
        figures.main(Figures(model="organism"))
    assert not (tmp_path / "out" / "figures.json").exists(), "nothing is done"


def test_what_there_is_not_is_refused(small):
    with pytest.raises(SystemExit, match="--model must be of all, gemma-3-270m, organism; found gpt5"):
        figures.main(Figures(model="gpt5"))
    with pytest.raises(SystemExit, match="--scripts must be of all, works, fails, lacks, other; found figure99"):
        figures.main(Figures(scripts=("figure99",)))


@pytest.mark.parametrize(("raised", "told"), [("KeyboardInterrupt", "stopped\n"), ("ValueError('x')", "Traceback")])
def test_a_script_that_is_stopped_says_so_in_a_line_and_what_is_wrong_has_its_traceback(raised, told):
    code = f"from experiments import common, figures; common.parse(figures.Figures); raise {raised}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=figures.ROOT)
    assert done.returncode != 0
    assert done.stderr == told if told.endswith("\n") else done.stderr.startswith(told)
