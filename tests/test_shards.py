"""Results in few files that only grow: whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from io import FileIO
from pathlib import Path

import pytest

from mechedit.cache import WriteError
from mechedit.runs import shards
from mechedit.runs.shards import Shards

pytestmark = pytest.mark.anywhere
RESULTS = {f"{index:03d}": bytes([index]) * (index * 7) for index in range(40)}


def added(folder, results=RESULTS):
    with Shards(folder).writing() as writer:
        for name, data in results.items():
            writer.add(name, data, {"length": len(data)})
    return Shards(folder)


def test_what_was_added_is_there_with_its_note_and_nothing_else_is(tmp_path):
    there = added(tmp_path)
    assert there.names() == list(RESULTS)
    assert list(there.read(RESULTS)) == list(RESULTS.values())
    assert (there.note("039"), there.size(["038", "039"])) == ({"length": 273}, 539)
    assert there.get("040") is None
    assert len(Shards(tmp_path / "nothing")) == 0


def test_an_index_and_a_shard_cut_anywhere_give_a_beginning_and_go_on_to_the_same_bytes(tmp_path):
    """Every moment at which a process can be killed, and the next one that goes on from there."""
    few = dict(list(RESULTS.items())[:4])
    added(tmp_path / "whole", few)
    index, shard = ((tmp_path / "whole" / name).read_bytes() for name in ("index", "0000.shard"))
    own = tmp_path / "own"
    own.mkdir()
    for length in range(len(index) + 1):
        (own / "index").write_bytes(index[:length])
        (own / "0000.shard").write_bytes(shard)
        found = Shards(own)
        assert found.names() == list(few)[: index[:length].count(b"\n")]
        assert list(found.read(found.names())) == [few[name] for name in found.names()]
        added(own, {name: data for name, data in few.items() if name not in found})
        assert ((own / "index").read_bytes(), (own / "0000.shard").read_bytes()) == (index, shard)


def test_a_large_result_begins_another_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "LARGEST", 1000)
    there = added(tmp_path)
    names = sorted(path.name for path in tmp_path.glob("*.shard"))
    assert names == [f"{index:04d}.shard" for index in range(len(names))]
    assert len(names) > 5
    assert list(there.read(RESULTS)) == list(RESULTS.values())
    added(tmp_path, {"more": b"1"})
    assert Shards(tmp_path).get("more") == b"1"


def test_a_result_that_comes_in_pieces_is_read_whole(tmp_path):
    class Slow(FileIO):
        """A file of which a system reads 100 bytes at a time."""

        def read(self, size=-1):
            return super().read(min(size, 100))

    there, slow = added(tmp_path), Slow(tmp_path / "0000.shard")
    assert shards._bytes(slow, there._entry("039")) == RESULTS["039"]
    slow.close()


def test_a_result_that_the_disk_does_not_take_leaves_those_before_it(tmp_path):
    written = []

    class Full:
        """A file that takes half of what it is given, and then nothing."""

        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if written:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(1)
            return self.file.write(bytes(data[: len(data) // 2]))

    with pytest.raises(WriteError, match="No space left on device. What was there before is as it was"), Shards(tmp_path).writing() as writer:  # fmt: skip
        writer.add("a", b"first")
        writer._shard = Full(writer._shard)
        writer.add("b", b"second")
    assert Shards(tmp_path).names() == ["a"]
    assert (tmp_path / "0000.shard").read_bytes() == b"first"


def test_a_finished_folder_is_read_where_nothing_can_be_written(tmp_path):
    added(tmp_path)
    for path in tmp_path.iterdir():
        path.chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        assert list(Shards(tmp_path).read(RESULTS)) == list(RESULTS.values())
        Shards(tmp_path).forget("001")  # says nothing
    finally:
        tmp_path.chmod(0o755)


def test_what_is_forgotten_is_not_there_until_it_is_added_again(tmp_path):
    there = added(tmp_path)
    there.forget("003")
    assert "003" not in there
    assert "003" not in Shards(tmp_path)
    added(tmp_path, {"003": b"new"})
    assert Shards(tmp_path).get("003") == b"new"


SCRIPT = """
import sys, itertools
from pathlib import Path
from mechedit.runs.shards import Shards
with Shards(Path(sys.argv[1])).writing() as writer:
    for index in itertools.count(len(Shards(Path(sys.argv[1])))):
        writer.add(f"{index:06d}", str(index).encode() * 100, index)
"""


def test_killed_while_it_writes_every_result_that_is_there_is_whole(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    before = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment)
        deadline = time.monotonic() + 60
        while len(Shards(tmp_path)) < before + 50 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        there = Shards(tmp_path)
        assert there.names() == [f"{index:06d}" for index in range(len(there))]
        assert all(data == str(index).encode() * 100 for index, data in enumerate(there.read(there.names())))
        assert len(there) > before
        before = len(there)


def test_what_another_writes_between_two_turns_stays_and_is_seen(tmp_path):
    """A writer cuts away what it does not know of: it looks first."""
    early = Shards(tmp_path)
    added(tmp_path, {"a": b"first"})
    with early.writing() as writer:
        writer.add("b", b"second")
    assert [early.get(name) for name in "ab"] == [b"first", b"second"]
    assert list(Shards(tmp_path).read("ab")) == [b"first", b"second"]


def test_the_disk_is_asked_for_the_bytes_before_the_index_after_a_minute_and_at_the_end(tmp_path, monkeypatch):
    now, asked = [0.0], []
    monkeypatch.setattr(shards.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(shards.os, "fsync", lambda number: asked.append(os.fstat(number).st_ino))
    both = lambda: [(tmp_path / name).stat().st_ino for name in ("0000.shard", "index")]  # noqa: E731
    with Shards(tmp_path).writing() as writer:
        for moment, name in ((59, "a"), (61, "b"), (100, "c"), (122, "d")):
            now[0] = moment
            writer.add(name, b"x")
            assert asked == both() * ((moment > 60) + (moment > 121)), moment
    assert asked == both() * 3
