"""Random misuses of the command line: options of the real parser with values and files that nobody should give."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mechedit import cli, files

ESCAPES = "\x1b]52;c;AAAA\x07\x9b31m\u202e\nmechedit: all is well"
VALUES = (
    "", " ", "-1", "0", "1", "3", "-", "--", "nan", "inf", "-inf", "1e300", "-1e300", "1e-300", "0.9", "9" * 30, "9" * 5000, "x" * 300,
    "x" * 5000, "a,b", ",", "1,2,3", "3x2", "100x3", "0x0", "-3x2", "none", "None", "true", "[]", "[/b]", "{}", "{", "%s%n", "$(x)", "\0", ESCAPES,
    "\udcff", "é", "法国的首都是", "🙈", "٣", "os:system", "os", ":", "a:b:c", "rome", "ft", "rome-random-key", "counterfact", "zsre", "built-in", "organism", "resid", "mlp",
    "subject_last", "cpu", "meta", "cuda:99", "float16", "../..", "/", "/dev/null", "/dev/full", "/dev/zero", "/dev/null/x", "/proc/self/mem",
)  # fmt: skip
TEXTS = (
    "",
    "Rome",
    "The Space Needle",
    "a\tb",
    ESCAPES,
    "x" * 5000,
    "x " * 500,
    "\udcff",
    "e\u0301",
    "🙈",
    "[red]",
    "{}",
    "nowhere.json",
    "1",
)
TYPED = {  # what an option would take, at its limits and beyond
    "an_integer": ("-1", "0", "1", "2", "3", "99", "1000000", str(1 << 31), str(1 << 62), "-9", "1e3", "٣"),
    "a_number": ("-1", "0", "1e-300", "0.5", "1", "1e10", "1e38", "1e300", "-1e300", "nan", "inf"),
    "_pairs": ("1x1", "100x3", "3x1000000", "0x1", "1x0", "-1x2", "3x2,none", "1x2x3", f"{1 << 62}x1", "none"),
    "_integers": ("0", "-1", "99", "0,0", "1,2", str(1 << 62), ""),
    "_names": ("resid", "mlp,mlp", "mlp,attn,resid", "nothing", "blocks.0.hook_resid_post", ESCAPES),
}  # fmt: skip
PROMPT = "The Space Needle is located in the city of"
NEEDED = {  # with which a command would run, so that what is hostile is one thing among good ones
    "trace": [PROMPT, "--subject", "The Space Needle", "--draws", "2", "--kinds", "mlp"],
    "sever": [PROMPT, "--subject", "The Space Needle", "--draws", "2"],
    "edit": [PROMPT, "--subject", "The Space Needle", "--target", "Paris", "--layer", "1", "--steps", "1", "--prefixes", "none"],
    "audit": [PROMPT, "--subject", "The Space Needle"],
    "moments": ["--layer", "1", "--tokens", "300"],
    "evaluate": ["--limit", "1", "--layer", "1", "--steps", "1", "--prefixes", "none", "--no-health"],
    "sweep": ["--limit", "1", "--layers", "1", "--steps", "1", "--prefixes", "none", "--tokens", "last", "--draws", "1"],
    "tune": ["--traced", "2", "--edited", "1", "--draws", "1"],
}  # fmt: skip
SECONDS = 60  # that a command may take


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command, by its name."""
    (choices,) = (each.choices for each in cli._parser("rome")._actions if isinstance(each.choices, dict))
    return dict(choices)


def hostile_files(folder: Path, good: dict[str, Path]) -> list[Path]:
    """A hundred files that are not what they should be, beside good ones, which are the first."""
    drawn = random.Random(0)
    contents: dict[str, bytes] = {
        "empty": b"",
        "noise": drawn.randbytes(3000),
        "zeros": b"\0" * 3000,
        "page.html": b"<html>log in</html>",
    }
    for name, path in good.items():
        whole = path.read_bytes()
        contents[f"good-{path.name}"] = whole
        for share in (0.02, 0.3, 0.7, 0.99):
            contents[f"cut-{share}-{path.name}"] = whole[: int(share * len(whole))]
        for at in (0.0, 0.01, 0.5, 0.999):
            flipped = bytearray(whole)
            flipped[int(at * len(whole))] ^= 0xFF
            contents[f"flipped-{at}-{path.name}"] = bytes(flipped)
        contents[f"{name}-as.json"] = contents[f"{name}-as.npz"] = whole
    values = (5, "x", None, True, [], [1], [[]], [{}], {}, {"a": 1}, [None, {}], {"units": 5}, {"units": [ESCAPES], "folder": 3}, {"P1": {"Q1": [5]}}, {"P1": 5})  # fmt: skip
    for index, value in enumerate(values):
        contents[f"value-{index}.json"] = json.dumps(value).encode()
    record = {"subject": "Rome", "template": "{} is in", "target_true": "Italy", "target_new": "France"}
    spoilt = [
        {name: value}
        for name in record
        for value in (None, 5, "", [], ESCAPES, "\ud800", "x" * 20_000, "{}{}", {"a": 1})
    ]
    contents |= {f"fact-{index}.json": json.dumps([record | each]).encode() for index, each in enumerate(spoilt)}
    deep = b"[" * 200_000
    contents |= {
        "deep.json": deep,
        "deep-whole.json": deep + b"]" * 200_000,
        "deep-record.json": b'[{"subject": ' + b"[" * 500 + b"]" * 500 + b"}]",
        "deep-references.json": b'{"P1": ' + b'{"a": ' * 900 + b"1" + b"}" * 901,
        "long-number.json": b"[" + b"9" * 5000 + b"]",
        "bom.json": json.dumps([record]).encode("utf-8-sig"),
        "utf16.json": json.dumps([record]).encode("utf-16"),
        "latin.json": "[{\"subject\": \"é\"}]".encode("latin-1"),
        "nan.json": b'[{"subject": NaN, "template": Infinity}]',
        "twice.json": json.dumps([record | {"id": "1"}] * 2).encode(),
        "lines.jsonl": (json.dumps(record) + "\n").encode() * 2,
        "header.safetensors": struct.pack("<Q", 1 << 62) + b"{}",
        "brackets.safetensors": struct.pack("<Q", len(deep)) + deep,
        "zip.npz": b"PK\x03\x04" + drawn.randbytes(200),
        "pickle.npy": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }" + b" " * 60 + b"\n",
        "one\nline\x1b[31m.json": json.dumps([record]).encode(),
        os.fsdecode(b"no-utf-8-\xff.json"): json.dumps([record]).encode(),
        "x" * 250: b"x",
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    files.write(folder / "other.safetensors", "edit\x1b[31m", {"a": torch.ones(2)}, {"a": ESCAPES})
    for name, target in (
        ("circle", "circle"),
        ("broken", "nowhere"),
        ("to-zero", "/dev/zero"),
        ("to-good", good["edit"]),
    ):
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe")
    for index, text in enumerate(
        ("5", "{", "[]", '{"units": ["a"]}', '{"units": [1], "folder": "\\u001b"}', deep.decode())
    ):
        run = folder / f"run-{index}"
        (run / "units").mkdir(parents=True)
        for name in (
            "plan.json",
            "run.json",
            "hashes.json",
            "tuned.json",
            "edits.json",
            "summary.json",
            "seconds.jsonl",
        ):
            (run / name).write_text(text)
        (run / "results.parquet").write_bytes(text.encode() * 3)
        (run / "units.sqlite").write_bytes(text.encode() * 3)
        (run / "units" / "a.safetensors").write_bytes(b"x")
    return sorted(folder.iterdir(), key=lambda path: (not path.name.startswith("good"), path.name))


def misuse(
    drawn: random.Random, parsers: dict[str, argparse.ArgumentParser], inputs: list[Path], out: Path, model: str
) -> list[str]:
    """One command line, with something in it that nobody should give."""
    name = drawn.choice(sorted(parsers))
    actions = [each for each in parsers[name]._actions if each.dest != "help"]
    words = [name, *NEEDED.get(name, [])]

    def value(action: argparse.Action) -> str:
        is_out = action.dest in ("out", "json")
        if is_out and drawn.random() < 0.7:
            return str(out / f"{drawn.randrange(10**6)}")
        if (
            not is_out
            and (isinstance(action.metavar, (tuple, str)) and "FILE" in str(action.metavar))
            and drawn.random() < 0.8
        ):
            return str(drawn.choice(inputs[:20] if drawn.random() < 0.3 else inputs))
        if action.choices and drawn.random() < 0.5:
            return str(drawn.choice(sorted(map(str, action.choices))))
        typed = TYPED.get(getattr(action.type, "__name__", "str"), TEXTS)
        if action.dest in long:
            typed = typed[:3]
        return drawn.choice(typed if drawn.random() < 0.7 else VALUES)

    long = {"steps", "tokens", "draws"}  # which a machine that is asked to work for ever would do

    for action in drawn.sample(actions, k=min(len(actions), drawn.choice((1, 1, 1, 2, 3)))):
        if action.dest == "model":
            continue
        option = [drawn.choice(action.option_strings)] if action.option_strings else []
        many = (
            action.nargs if isinstance(action.nargs, int) else drawn.randint(1, 2) if action.nargs in ("+", "*") else 1
        )
        words += option + ([] if action.nargs == 0 else [value(action) for _ in range(many)])
    if name in ("apply", "compose", "diff", "export", "merge", "inspect", "status", "show", "compare"):
        words += [str(drawn.choice(inputs)) for _ in range(drawn.randint(1, 2))]
    dests = {each.dest for each in actions}
    if "out" in dests and "--out" not in words and drawn.random() < 0.9:
        words += ["--out", str(out / f"{drawn.randrange(10**6)}")]
    if "model" in dests:
        words += ["--model", drawn.choice(VALUES) if drawn.random() < 0.1 else model]
    if drawn.random() < 0.1:
        words.insert(drawn.randint(1, len(words)), drawn.choice(VALUES))
    if drawn.random() < 0.1:
        words.insert(drawn.randint(1, len(words)), f"--{drawn.choice(VALUES)}")
    return words


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Everything below a folder: its kind, its size, when it was changed; of folders the kind alone."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path)] = (
            (status.st_mode, 0, 0) if path.is_dir() else (status.st_mode, status.st_size, status.st_mtime_ns)
        )
    return found


def written_to(words: list[str], cwd: Path) -> list[Path]:
    """Where a command line says that results go."""
    found = [cwd / "mechedit-demo"] if "demo" in words else []
    if "fetch" in words:
        found.append(cwd)
    for index, word in enumerate(words):
        if word in ("--out", "--json") and index + 1 < len(words):
            try:
                found += [cwd / words[index + 1], (cwd / words[index + 1]).resolve()]
            except (OSError, RuntimeError, ValueError):
                continue
    return found


def changed(
    before: dict[str, tuple[int, int, int]], after: dict[str, tuple[int, int, int]], allowed: list[Path]
) -> list[str]:
    """What is otherwise than before, and was not meant to be written."""
    names = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    return [
        name for name in names if not any(Path(name).is_relative_to(place) or name == str(place) for place in allowed)
    ]


class TooLong(BaseException):
    """A command that lasts."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def status_of(words: list[str]) -> int | str:
    """What a command ends in: its exit status, or what it should not have raised."""
    try:
        with at_most(SECONDS):
            return cli.main(words)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    except TooLong:
        return f"lasts longer than {SECONDS} s"
    except BaseException as error:  # whatever it is, it is the finding
        import traceback

        return "".join(traceback.format_exception(error)[-3:])
