"""The editor that docs/editors.md shows, in a file of its own, goes through everything by its name."""

from __future__ import annotations

import json
import os
import sys
from math import nan
from pathlib import Path

import pytest
import torch
import transformers

from mechedit import applying, edits, models, tuning
from tests.command_line import command_line
from tests.conftest import FACT
from tests.test_pages import ROOT, blocks
from tests.three_facts import FACTS

PUSH = "push_editor:Push"
LINES = 30  # and a few for what it imports
ASKED = ("edit", FACT.prompt, "--subject", FACT.subject, "--target", "Paris", "--true", "Seattle")
OWN = ("--editor", PUSH, "--layer", "1", "--length", "4")


@pytest.fixture
def run(folder, capsys, monkeypatch, tmp_path):
    """Commands in a folder that has the editor's file, and three facts."""
    text = blocks(ROOT / "docs" / "own-editor.md")
    begin = text.rindex("from dataclasses import dataclass", 0, text.index("class PushSettings"))
    (tmp_path / "push_editor.py").write_text(text[begin : text.index("model, fact = ", begin)])
    records = [{name: getattr(fact, name) for name in ("subject", "prompt", "target_true", "target_new", "paraphrases", "neighbours")} for fact in FACTS]  # fmt: skip
    (tmp_path / "facts.json").write_text(json.dumps(records))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield command_line(folder, capsys, monkeypatch)
    sys.modules.pop("push_editor", None)


def summary(name):
    return json.loads(Path(name, "summary.json").read_text())


def test_it_is_as_short_as_the_page_says(run):
    lines = [line for line in Path("push_editor.py").read_text().splitlines() if line.strip()]
    assert len(lines) <= LINES
    assert not any(" _" in line or "._" in line for line in lines), "nothing of the package's own"


def test_it_edits_and_the_edit_is_applied_and_exported(run, folder):
    status, out, err = run(*ASKED, *OWN, "--out", "edit.safetensors")
    assert (status, "push in" in out) == (0, True), err
    edit = edits.load("edit.safetensors")
    assert edit.after["p_new"] > 2 * edit.before["p_new"]
    assert run("apply", "edit.safetensors")[0] == 0
    assert run("export", "edit.safetensors", "--out", "whole")[0] == 0
    assert run("export", "edit.safetensors", "--adapter", "--out", "adapter")[0] == 0
    assert Path("adapter", "adapter_model.safetensors").stat().st_size > 100
    plain, tokens = (
        transformers.AutoModelForCausalLM.from_pretrained("whole", dtype=torch.float32),
        torch.arange(5, 17)[None],
    )
    model = models.load(str(folder("gpt2")), device="cpu")
    with torch.no_grad():
        unedited = model(tokens)
        with applying.edited(model, edit):
            torch.testing.assert_close(model(tokens), plain(tokens).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(unedited, plain(tokens).logits, atol=1e-2)


def test_it_is_evaluated_in_every_mode(run):
    for mode in ("independent", "batch", "sequential"):
        status, _, err = run("evaluate", "--facts", "facts.json", *OWN, "--mode", mode, "--out", mode)
        assert status == 0, err
        found = summary(mode)
        assert (found["editor"], found["edit"]["length"], found["facts"]) == ("push", 4.0, 3)
        assert found["stages"]["after"]["p_new"]["mean"] > found["stages"]["before"]["p_new"]["mean"], mode


def test_it_is_swept_and_tuned(run, monkeypatch):
    own = (
        "--editor",
        PUSH,
        "--length",
        "4",
        "--layers",
        "0,2",
        "--tokens",
        "subject_last",
        "--draws",
        "2",
        "--window",
        "2",
    )
    status, _, err = run("sweep", "--facts", "facts.json", *own, "--out", "sweep")
    assert status == 0, err
    swept = json.loads(Path("sweep", "sweep.json").read_text())
    assert (swept["layers"], swept["n"], swept["settings"]["editor"]) == ([0, 2], 3, "push")
    monkeypatch.setattr(tuning.runs, "known", lambda model, facts, **named: list(facts))  # it knows nothing
    own = ("--editor", PUSH, "--try", "length=1,4", "--traced", "2", "--edited", "1", "--around", "0", "--draws", "2")
    status, _, err = run("tune", "--facts", "facts.json", *own, "--out", "tune")
    tuned = json.loads(Path("tune", "tuned.json").read_text())
    assert ([row["tried"]["length"] for row in tuned["rows"]], tuned["editor"]) == ([1.0, 4.0], "push"), err


@pytest.mark.anywhere
def test_workers_of_a_cluster_find_it_in_the_folder_where_the_run_began(run, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    own = ("--facts", "facts.json", *OWN)
    assert run("evaluate", *own, "--out", "here")[0] == 0
    status, _, err = run("evaluate", *own, "--out", "there", "--engine", "ray", "--workers", "1")
    assert status == 0, err
    here, there = (summary(name)["stages"]["after"] for name in ("here", "there"))
    assert here.keys() == there.keys()
    for name, mean in here.items():
        own, other = (nan if each["mean"] is None else each["mean"] for each in (mean, there[name]))
        assert other == pytest.approx(own, rel=1e-4, abs=1e-6, nan_ok=True), name
