"""Where results go: through links, into devices and pipes, onto full disks, to readers that leave."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from mechedit import cache
from mechedit.cache import CacheWarning, WriteError, atomic_write, check_writable
from mechedit.cli import terminal
from mechedit.edits import load
from tests.command_line import EDIT, TRACE, command_line


@pytest.fixture
def run(folder, capsys, monkeypatch):
    return command_line(folder, capsys, monkeypatch)


def write(path: Path, text: str = "new") -> None:
    check_writable(path)
    with atomic_write(path) as temporary:
        temporary.write_text(text)


@pytest.mark.anywhere
def test_a_link_is_written_through_and_keeps_its_target(tmp_path):
    (tmp_path / "store").mkdir()
    target = tmp_path / "store" / "real.json"
    target.write_text("old")
    target.chmod(0o640)
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "second").symlink_to("store/real.json")
    (tmp_path / "to-come").symlink_to(tmp_path / "store" / "fresh.json")
    write(tmp_path / "first")
    write(tmp_path / "to-come")
    assert target.read_text() == (tmp_path / "store" / "fresh.json").read_text() == "new"
    assert (tmp_path / "first").is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["first", "fresh.json", "real.json", "second", "store", "to-come"]  # fmt: skip
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(WriteError, match="circle cannot be written"):
        write(tmp_path / "circle")


@pytest.mark.anywhere
def test_devices_and_pipes_are_opened_and_never_replaced(tmp_path):
    before = os.stat("/dev/null")
    write(Path("/dev/null"))
    (tmp_path / "to-null").symlink_to("/dev/null")
    write(tmp_path / "to-null")
    assert (os.stat("/dev/null").st_mode, os.stat("/dev/null").st_rdev) == (before.st_mode, before.st_rdev)
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    reader.start()
    write(tmp_path / "pipe", "through the pipe")
    reader.join(10)
    assert got == ["through the pipe"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with pytest.raises(WriteError, match="No space left"):
        write(Path("/dev/full"), "x" * 10)


@pytest.mark.anywhere
def test_standard_output_by_a_name_is_where_it_stands_not_a_file_anew(tmp_path):
    """Redirected to a file, what was printed before and after stays beside it, in order."""
    code = (
        "from pathlib import Path; from mechedit.cache import atomic_write; print('before')\n"
        "for name in ('/dev/stdout', '/dev/fd/1', '/proc/self/fd/1'):\n"
        "  with atomic_write(Path(name)) as temporary: temporary.write_text(name + '\\n')\n"
        "print('after')"
    )
    with (tmp_path / "out").open("wb") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    expected = ["before", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "after"]
    assert (tmp_path / "out").read_text().split() == expected
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert piped.stdout.split() == expected


@pytest.mark.anywhere
@pytest.mark.parametrize(
    "name", ["x" * 300, "x" * 300 + "/a.json", "a\0b", "/proc/a.json", "/dev/null/a.json", "é" * 128]
)
def test_a_name_that_cannot_be_is_refused_before_anything_is_computed(name, tmp_path):
    with pytest.raises(WriteError) as found:
        check_writable(tmp_path / name)
    assert "cannot be written" in str(found.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.anywhere
def test_a_path_through_a_folder_that_is_not_there_touches_no_other(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    check_writable(Path("new/../../empty/a.json"))
    check_writable(Path("new/deeper/../../../other/a.json"))
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["empty", "work"]
    write(Path("new/../../empty/a.json"))
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["a.json", "empty", "work"]


@pytest.mark.anywhere
def test_what_is_put_into_a_new_folder_meanwhile_stays(tmp_path):
    with cache.unless_kept(tmp_path / "a" / "b"):
        (tmp_path / "a" / "others").write_text("theirs")
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["a", "others"]


@pytest.mark.anywhere
def test_what_a_full_disk_refuses_leaves_what_was_there(tmp_path):
    (tmp_path / "a").write_text("old")
    code = (
        "import resource, signal; from pathlib import Path; from mechedit.cache import WriteError, atomic_write\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        f"  with atomic_write(Path({str(tmp_path / 'a')!r})) as temporary: temporary.write_text('x' * 5000)\n"
        "except WriteError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "What was there before is as it was" in done.stdout
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a", "old")]


@pytest.mark.anywhere
def test_a_cache_that_cannot_be_written_is_told_and_passed_over(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(CacheWarning, match="work will be done again"):
        cache.keep(tmp_path / "file" / "prefixes.json", "[]")


@pytest.mark.anywhere
def test_text_of_others_reaches_no_terminal_as_a_command(capsys):
    console = terminal.screen(stderr=False)
    hostile = "[/b][red]\x1b]52;c;AAAA\x07 \u202e\nmechedit: done :smile:"
    console.print(hostile)
    console.rule(hostile)
    terminal.show_table(console, (hostile, "b"), [(hostile, hostile)])
    out = capsys.readouterr().out
    assert not any(character in out for character in "\x1b\x07\u202e")
    assert not any(line.startswith("mechedit: ") for line in out.splitlines())
    assert out.startswith(r"[/b][red]\x1b]52;c;AAAA\x07 \u202e\nmechedit: done :smile:")


@pytest.mark.anywhere
@pytest.mark.parametrize("columns", [None, "80"])
def test_tables_in_a_file_keep_their_numbers_in_one_line_unless_the_environment_says_how_wide(columns, capsys, monkeypatch):  # fmt: skip
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    numbers = [f"{index}2.3 [45.6, 78.9]" for index in range(1, 8)]
    terminal.show_table(terminal.screen(stderr=False), ("a", *("number",) * 7), [("row", *numbers)])
    out = capsys.readouterr().out
    assert all(number in out for number in numbers) is (columns is None)
    assert max(map(len, out.splitlines())) <= (80 if columns else 160)


SHOWN = (
    "import sys; from pathlib import Path; from types import SimpleNamespace; from mechedit import cli\n"
    "from mechedit.cli import looking, terminal\n"
    "def doctor(arguments):\n"
    "    console = terminal.console_of(arguments)\n"
    "    for line in range(4_000): console.print(f'line {line} é ⏎')\n"
    "    Path(sys.argv[1]).write_text('whole')\n"
    "looking._doctor = doctor\n"
    "sys.exit(cli.main(['doctor']))"
)


@pytest.mark.anywhere
def test_a_reader_that_leaves_ends_no_command(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SHOWN, str(tmp_path / "done")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)
    assert (tmp_path / "done").read_text() == "whole"
    process.stderr.close()


@pytest.mark.anywhere
def test_an_encoding_without_a_character_and_a_full_standard_output_end_in_no_traceback(tmp_path):
    narrow = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", SHOWN, str(tmp_path / "done")], capture_output=True, env=narrow, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(rb"line 0 \xe9 \u23ce")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", SHOWN, str(tmp_path / "done")], stdout=full, stderr=subprocess.PIPE, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (1, b"mechedit: No space left on device.\n")


def test_json_can_be_read_whatever_is_in_it(tmp_path, capsys):
    record = {"text": "é \ud800 \x1b", "p": float("nan")}
    for path in (tmp_path / "a.json", Path("-"), Path("/dev/stdout")):
        terminal.write_json(path, record)
        text = path.read_text(encoding="utf-8") if path.parent == tmp_path else capsys.readouterr().out
        assert json.loads(text) == {"text": "é \ud800 \x1b", "p": None}


def test_an_edit_needs_no_cache_that_can_be_written_and_says_so_once(run, monkeypatch, tmp_path):
    """A file stands where the cache's folder would be, so that nothing can be written below it."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MECHEDIT_CACHE", str(tmp_path / "file"))
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as for users, whom a warning does not stop
        status, _, err = run(*EDIT, "--out", str(tmp_path / "e.safetensors"))
    assert status == 0, err
    assert next(line for line in err.splitlines() if "cache" in line).startswith("note: the cache cannot be written")
    assert len([line for line in err.splitlines() if "cache" in line]) == 1
    assert load(tmp_path / "e.safetensors").changes
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/fd")
def test_results_are_saved_before_they_are_shown(run, monkeypatch, tmp_path):
    """Nothing can be shown at all, and everything is there."""

    def broken(*arguments, **options):
        raise OSError(28, "No space left on device")

    from rich.console import Console

    monkeypatch.setattr(Console, "print", broken)
    assert run(*TRACE, "--out", str(tmp_path / "t"), "--json", str(tmp_path / "t.json"))[0] == 1
    assert {each.name for each in (tmp_path / "t").iterdir()} >= {"trace.safetensors", "trace_mlp.png", "trace_mlp.svg"}
    assert json.loads((tmp_path / "t.json").read_text())["tokens"]
    assert run(*EDIT, "--out", str(tmp_path / "e.safetensors"), "--json", str(tmp_path / "e.json"))[0] == 1
    assert load(tmp_path / "e.safetensors").to_json()["prompt"] == json.loads((tmp_path / "e.json").read_text())["prompt"]  # fmt: skip
    assert run("sever", *TRACE[1:], "--out", str(tmp_path / "s"))[0] == 1
    assert (tmp_path / "s" / "severed.safetensors").is_file()
