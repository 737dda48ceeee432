from __future__ import annotations

import random
import re

import jaxtyping
import pytest

from mechedit import edits
from mechedit.moments import Moment
from mechedit.settings import MomentSettings, TraceSettings
from mechedit.tracing import severing, trace
from tests import misuse
from tests.conftest import FACT
from tests.hand_made import edit_of, rank_one

pytestmark = pytest.mark.anywhere

QUICK, WHOLE = 60, 500
SAID = re.compile(r"[a-z ,0-9]+: \d+ of \d+$|note: |wrote|  /")  # progress and notes, which may stand beside an error


@pytest.fixture(scope="module")
def world(load, folder, tmp_path_factory):
    """A folder with good files and bad ones, an output folder, and something precious."""
    import torch

    root, model = tmp_path_factory.mktemp("world"), load("gpt2")
    made = root / "made"
    edit = edits.save(edit_of(model, rank_one(model)), made / "edit.safetensors")
    settings = TraceSettings(draws=2, kinds=("mlp",))
    found = {
        "edit": edit,
        "trace": trace(model, FACT, settings).save(made / "trace.safetensors"),
        "severed": severing.severed(model, FACT, settings).save(made / "severed.safetensors"),
        "moment": Moment.of(model, 1, torch.eye(128, dtype=torch.float64), 200, "a text", MomentSettings(tokens=200)).save(made / "moment.safetensors"),
        "facts": made / "facts.json",
    }  # fmt: skip
    found["facts"].write_text('[{"subject": "Rome", "prompt": "Rome is in", "target_true": "Italy", "target_new": "France", "paraphrases": ["Rome is"], "neighbours": ["Paris is in"]}]')  # fmt: skip
    (root / "inputs").mkdir()
    for name in ("cwd", "out"):
        (root / name).mkdir()
    (root / "precious").write_text("precious")
    return root, misuse.hostile_files(root / "inputs", found), str(folder("gpt2"))


def judged(words, root, cwd, capfd):
    """What is wrong with how a command ends; nothing where it ends as promised."""
    before = misuse.snapshot(root)
    status = misuse.status_of(words)
    out, err = capfd.readouterr()
    if status not in (0, 1, 2):
        return f"{status}"
    lines = err.splitlines()
    told = [line for line in lines if line.startswith("mechedit")]
    if any(character in out + err for character in "\x1b\x07\x9b\u202e"):
        return f"what a terminal obeys is in {(out + err)[:500]!r}"
    if status and len(told) != 1:
        return f"{len(told)} lines tell an error: {err[:500]!r}"
    if status and "Traceback" in err:
        return err
    if not status and told:
        return f"an error and status 0: {err[:300]!r}"
    rest = [line for line in lines if line not in told and not SAID.match(line)]
    if (
        status
        and rest
        and not any(word in told[0] for word in ("has mistakes in", "a sweep needs", "lacks", "says what"))
    ):
        return f"more than a line: {err[:500]!r}"
    if others := misuse.changed(before, misuse.snapshot(root), misuse.written_to(words, cwd)):
        return f"{others} changed"
    return ""


def tried(cases, world, capfd, monkeypatch):
    root, _, _ = world
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own checks, which users do not have
    monkeypatch.chdir(root / "cwd")
    monkeypatch.setenv("COLUMNS", "200")
    return [f"{words}\n    {wrong}" for words in cases if (wrong := judged(words, root, root / "cwd", capfd))]


def random_cases(world, number, seed):
    root, inputs, model = world
    parsers = misuse.commands()
    return [misuse.misuse(random.Random(f"{seed} {index}"), parsers, inputs, root / "out", model) for index in range(number)]  # fmt: skip


def file_cases(world):
    """Every command that takes a file, with every hostile file, all else as it should be."""
    root, inputs, model = world
    own = ["--model", model]
    for index, path in enumerate(inputs):
        out, file = str(root / "out" / f"file-{index}"), str(path)
        yield ["inspect", file]
        yield ["diff", file, file]
        yield ["status", file]
        yield ["merge", file, "--out", out]
        yield ["compose", file, file, "--out", out]
        yield ["apply", file, *own]
        yield ["export", file, "--out", out, *own]
        yield ["trace", "--facts", file, "--out", out, "--limit", "2", "--draws", "1", *own]
        yield ["trace", *misuse.NEEDED["trace"], "--sigma-from", file, *own]
        yield ["edit", "--facts", file, "--out", out, "--limit", "1", *misuse.NEEDED["edit"][5:], *own]
        yield ["edit", *misuse.NEEDED["edit"], "--moment", file, *own]
        yield ["edit", *misuse.NEEDED["edit"], "--text", file, *own]
        yield ["moments", *misuse.NEEDED["moments"], "--text", file, *own]
        yield ["evaluate", *misuse.NEEDED["evaluate"], "--facts", file, "--out", out, *own]
        yield ["evaluate", *misuse.NEEDED["evaluate"], "--generate", "--references", file, "--out", out, *own]
        yield ["evaluate", *misuse.NEEDED["evaluate"], "--generate", "--references", "organism", "--tfidf", file, file, "--out", out, *own]  # fmt: skip
        yield ["sweep", *misuse.NEEDED["sweep"], "--facts", file, "--out", out, *own]
        yield ["tune", *misuse.NEEDED["tune"], "--facts", file, "--out", out, *own]
        yield ["fetch", "known", "--out", file]
        yield ["audit", *misuse.NEEDED["audit"], "--model", file]


def test_misuses_end_in_one_line_and_touch_nothing(world, capfd, monkeypatch):
    cases = random_cases(world, QUICK, "quick") + random.Random(0).sample(list(file_cases(world)), QUICK)
    assert tried(cases, world, capfd, monkeypatch) == []


@pytest.mark.slow
def test_500_misuses_end_in_one_line_and_touch_nothing(world, capfd, monkeypatch):
    assert tried(random_cases(world, WHOLE, "whole"), world, capfd, monkeypatch) == []


@pytest.mark.slow
def test_a_hundred_hostile_files_end_every_command_in_one_line(world, capfd, monkeypatch):
    assert len(world[1]) >= 100
    assert tried(file_cases(world), world, capfd, monkeypatch) == []
