"""A run's folder: who may write into it, what is kept of what fails, and what is read of what is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import pytest
import torch

from mechedit import files
from mechedit.runs import store as stores
from mechedit.runs import units
from mechedit.runs.engines import Local
from mechedit.runs.status import status
from mechedit.runs.store import RunError, Store, claim

pytestmark = pytest.mark.anywhere
MODEL = torch.nn.Identity()  # no task here looks at it
HALF = "\ud800"  # half of a surrogate pair, which no file can hold


def read(place):
    return files.read(place, "text")[1]


def write(result, place):
    files.write(place, "text", {}, result)


def task(model, unit):
    return {"text": unit}


def new(folder, what=None, **options):
    return Store(folder, what or {}, read, write, **options)


def test_results_are_read_when_they_are_used_and_notes_without_them(tmp_path, monkeypatch):
    names, opened = [f"{index:03d}" for index in range(20)], []
    store = Store(
        tmp_path, {}, lambda place: opened.append(1) or read(place), write, note=lambda result: result["text"] * 2
    )
    found = store.run(names, task, Local(MODEL))
    assert len(found) == 20
    assert found.notes[3] == "003003"
    assert opened == []
    kept = [json.loads(line) for line in (tmp_path / stores.SECONDS).read_text().splitlines()]
    assert [line["unit"] for line in kept] == names
    assert all(line["seconds"] >= 0 for line in kept)
    assert (found[3]["text"], found[-1]["text"], [each["text"] for each in found[4:6]]) == (
        "003",
        "019",
        ["004", "005"],
    )
    assert len(opened) == 4
    again = new(tmp_path).run(names, lambda model, unit: pytest.fail("computed again"), Local(MODEL))
    assert [each["text"] for each in again] == names


class Whatever(Exception):
    """Nothing that anyone foresaw."""


@pytest.mark.parametrize("error", [Whatever("x"), ValueError(f"{HALF} in it"), MemoryError(), AssertionError("no"), RecursionError("deep")])  # fmt: skip
def test_whatever_a_unit_raises_another_stands_in_its_place_and_the_next_run_tries_it_again(error, tmp_path):
    def failing(model, unit):
        if unit == "b":
            raise error
        return {"text": unit}

    found = new(tmp_path).run(list("abc"), failing, Local(MODEL), failed=lambda done: {"text": done.error})
    assert [each["text"] for each in found][::2] == ["a", "c"]
    assert found[1]["text"].startswith(type(error).__name__)
    (line,) = [json.loads(line) for line in (tmp_path / stores.FAILURES).read_text().splitlines()]
    assert line["unit"] == "b"
    assert "in failing" in line["traceback"]
    (seen,) = status(tmp_path)
    assert (seen.finished, seen.units, seen.failed) == (2, 3, 1)
    assert [each["text"] for each in new(tmp_path).run(list("abc"), task, Local(MODEL))] == list("abc")
    assert not (tmp_path / stores.FAILURES).exists()
    assert status(tmp_path)[0].failed == 0


def test_what_cannot_be_written_is_a_units_failure_too(tmp_path):
    def strange(model, unit):
        return {"text": {1, 2}} if unit == "b" else {"text": unit}

    found = new(tmp_path).run(list("abc"), strange, Local(MODEL), failed=lambda done: {"text": "?"})
    assert [each["text"] for each in found] == ["a", "?", "c"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_what_stops_a_program_stops_a_run(stop, tmp_path):
    def stopping(model, unit):
        if unit == "b":
            raise stop
        return {"text": unit}

    with pytest.raises(stop):
        new(tmp_path).run(list("abc"), stopping, Local(MODEL), failed=lambda done: {})
    assert units.names(tmp_path) == ["a"]


def test_a_run_that_needs_every_unit_names_the_first_that_failed_for_people(tmp_path):
    def failing(model, unit):
        raise ValueError("no")

    with pytest.raises(RunError, match=r"3 of 3 units .* failed, 0 are finished.*ValueError: no \(the fact a"):
        new(tmp_path).run(list("abc"), failing, Local(MODEL), called="the fact {}".format)


CLAIM = """
import sys, time
from pathlib import Path
from mechedit.runs.store import RunError, claim
while time.time() < float(sys.argv[2]):
    pass
for index in range(30):
    try:
        claim(Path(sys.argv[1]) / str(index), {"seed": int(sys.argv[3])})
        print("claimed")
    except RunError:
        print("refused")
"""


def test_of_two_processes_with_other_settings_one_gets_a_new_folder(tmp_path):
    import time

    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    start = str(time.time() + 4)
    both = [subprocess.Popen([sys.executable, "-c", CLAIM, str(tmp_path), start, seed], env=environment, stdout=subprocess.PIPE, text=True) for seed in "01"]  # fmt: skip
    said = [process.communicate()[0].split() for process in both]
    assert [sorted(pair) for pair in zip(*said, strict=True)] == [["claimed", "refused"]] * 30
    for index in range(30):
        claim(tmp_path / str(index), {"seed": int(said[1][index] == "claimed")})


def test_a_folder_that_another_process_claims_is_waited_for_however_long_it_takes(tmp_path):
    """Longer than a second, then it is found to be of other settings."""
    with filelock.FileLock(tmp_path / "claim.lock") as held, ThreadPoolExecutor(1) as pool:
        claimed = pool.submit(claim, tmp_path, {"a": 1})
        with pytest.raises(TimeoutError):
            claimed.result(timeout=1.5)
        assert not (tmp_path / "run.json").exists()
        (tmp_path / "run.json").write_text('{"a": 2}')
        held.release()
        with pytest.raises(RunError, match="a: 2 there, 1 now"):
            claimed.result(timeout=10)


def test_a_damaged_result_is_noticed_when_it_is_read_and_computed_anew_by_the_next_run(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "CHECKED", 0)  # as of results that are too many to be looked at beforehand
    new(tmp_path).run(list("abc"), task, Local(MODEL))
    shard = tmp_path / "units" / "0000.shard"
    data = bytearray(shard.read_bytes())
    data[data.rindex(b'"b') + 1] ^= 1
    shard.write_bytes(data)
    found = new(tmp_path).run(list("abc"), task, Local(MODEL))
    assert (found[0]["text"], found[2]["text"]) == ("a", "c")
    with pytest.raises(RunError, match="the unit b in .* was damaged after it was written; run again"):
        list(found)
    assert [each["text"] for each in new(tmp_path).run(list("abc"), task, Local(MODEL))] == list("abc")


def test_a_run_in_the_form_of_an_earlier_version_is_refused_in_a_line(tmp_path):
    (tmp_path / "units").mkdir()
    write({"text": "a"}, tmp_path / "units" / "a.safetensors")
    with pytest.raises(
        RunError, match="in the form of an earlier version, a file a unit; finish it with that version, or choose"
    ):
        new(tmp_path)


def test_one_unit_is_read_by_name_beginning_or_number_and_units_are_written_as_files(tmp_path):
    new(tmp_path / "run").run(["aa1", "ab2", "c3"], task, Local(MODEL))
    assert [read(units.read(tmp_path / "run", name))["text"] for name in ("aa1", "ab", "2")] == ["aa1", "ab2", "c3"]
    for name in ("a", "x", "7"):
        with pytest.raises(RunError, match=f"has 3 units, and (2|none) of them begins? with '{name}'; .*from 0 to 2"):
            units.read(tmp_path / "run", name)
    every = units.export(tmp_path / "run", tmp_path / "files")
    assert [path.name for path in every] == ["aa1.safetensors", "ab2.safetensors", "c3.safetensors"]
    assert [read(path)["text"] for path in every] == ["aa1", "ab2", "c3"]
    assert units.export(tmp_path / "run", tmp_path / "one", ["c3"]) == [tmp_path / "one" / "c3.safetensors"]
    with pytest.raises(RunError, match="has no units of a run"):
        units.names(tmp_path)


def test_what_a_unit_alone_needs_travels_with_it(tmp_path):
    def carried(model, unit, own):
        return {"text": own}

    found = new(tmp_path).run(list("ab"), carried, Local(MODEL), own=lambda unit: unit * 3)
    assert [each["text"] for each in found] == ["aaa", "bbb"]
