"""What tests of the commands share: how a command is run in this process, and options that make it quick."""

from __future__ import annotations

from mechedit import cli
from tests.conftest import widen_bands

PROMPT = "The Space Needle is located in the city of"
TRACE = ("trace", PROMPT, "--subject", "The Space Needle", "--draws", "2")
EDIT = (
    "edit",
    PROMPT,
    "--subject",
    "The Space Needle",
    "--target",
    "Paris",
    "--true",
    "Seattle",
    "--layer",
    "1",
    "--steps",
    "4",
    "--prefixes",
    "3x2",
)
QUICK = ("--layer", "1", "--steps", "2", "--prefixes", "none")


def command_line(folder, capsys, monkeypatch):
    """Run a command in this process on the tiny GPT-2; status, standard output and standard error."""
    monkeypatch.setenv("COLUMNS", "160")
    widen_bands(monkeypatch)

    def call(*arguments: str, model: bool = True) -> tuple[int, str, str]:
        options = ["--model", str(folder("gpt2")), "--device", "cpu"] if model else []
        status = cli.main([*arguments, *options])
        out, err = capsys.readouterr()
        return status, out, err

    return call
