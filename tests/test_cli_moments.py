from __future__ import annotations

import json

import pytest

from mechedit import edits, moments
from mechedit.moments import Moment, corpus
from tests.command_line import EDIT, PROMPT, command_line

pytestmark = pytest.mark.anywhere


@pytest.fixture
def run(folder, capsys, monkeypatch):
    return command_line(folder, capsys, monkeypatch)


@pytest.mark.both
def test_moments_are_estimated_written_and_inspected(run, tmp_path):
    path = tmp_path / "C.safetensors"
    status, _, _ = run("moments", "--layer", "1", "--tokens", "300", "--context", "16", "--out", str(path))
    assert status == 0
    assert moments.Moment.load(path).keys == 300
    status, out, _ = run("inspect", str(path), model=False)
    assert status == 0
    assert "300" in out


def test_parts_of_a_moment_are_merged_and_used(run, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH_TOKENS", 64)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{number} {PROMPT} Seattle." for number in range(300)))
    common = ("moments", "--layer", "1", "--text", str(text), "--tokens", "1200", "--context", "16", "--parts", "2")
    paths = [tmp_path / f"{part}.safetensors" for part in (0, 1)]
    for part, path in enumerate(paths):
        assert run(*common, "--part", str(part), "--out", str(path))[0] == 0
    before, link = paths[1].read_bytes(), tmp_path / "link.safetensors"
    link.symlink_to(paths[1])
    for out in (paths[1], link):
        status, _, err = run("merge", *map(str, paths), "--out", str(out), model=False)
        assert (status, err.count("\n"), "is one of the files that it is made of" in err) == (2, 1, True)
    assert (link.is_symlink(), paths[1].read_bytes() == before) == (True, True)
    whole = tmp_path / "whole.safetensors"
    status, _, _ = run("merge", *map(str, paths), "--out", str(whole), model=False)
    assert status == 0
    assert Moment.load(whole).keys == 1200
    path = tmp_path / "edit.safetensors"
    assert run(*EDIT, "--moment", str(whole), "--out", str(path))[0] == 0
    assert edits.load(path).details["moment"]["hash"] == Moment.load(whole).hash
    status, _, err = run(*EDIT, "--moment", str(paths[0]), "--out", str(path))
    assert (status, "C is part 0 of 2" in err) == (2, True)
    status, _, err = run("merge", str(paths[0]), "--out", str(whole), model=False)
    assert status == 2
    assert "each of the 2 parts" in err


def test_several_layers_and_a_dataset_make_moments(run, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"body": f"{number} {PROMPT}"}) for number in range(200)))
    command = ("moments", "--layer", "0", "2", "--dataset", str(folder), "--column", "body", "--tokens", "600")
    status, _, _ = run(*command, "--context", "16", "--json", str(tmp_path / "m.json"))
    assert status == 0
    assert [record["layer"] for record in json.loads((tmp_path / "m.json").read_text())] == [0, 2]
