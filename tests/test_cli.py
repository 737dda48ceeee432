from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import fields, make_dataclass
from pathlib import Path

import pytest
import torch

import mechedit
from mechedit import cli, models
from mechedit.cli import options, terminal
from mechedit.cli.choosing import NONE, settings_of
from mechedit.editing import Editor
from mechedit.settings import (
    EDITOR_SETTINGS,
    EditSettings,
    EvaluateSettings,
    FineTuningSettings,
    KnowledgeNeuronsSettings,
    MomentSettings,
    RomeSettings,
    TraceSettings,
    TuneSettings,
    knob,
    knobs,
)
from mechedit.tracing import trace
from tests.command_line import EDIT, PROMPT, TRACE, command_line
from tests.conftest import FACT

pytestmark = pytest.mark.anywhere


@pytest.fixture
def run(folder, capsys, monkeypatch):
    return command_line(folder, capsys, monkeypatch)


def test_help_loads_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mechedit.cli", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("trace", "edit", "apply", "inspect", "models", "moments", "doctor", "demo", "audit"):
        assert command in done.stdout
    assert not any(name in done.stderr for name in ("torch", "transformers", "numpy", "rich"))


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, mechedit; print(sorted({'torch', 'transformers', 'transformer_lens', 'matplotlib'} & sys.modules.keys()))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
    assert "tracing" in dir(mechedit)
    assert mechedit.settings.KINDS == ("resid", "mlp", "attn")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mechedit.nothing


def test_every_setting_is_an_option_with_its_sentence(capsys):
    for command, settings in (
        ("trace", TraceSettings),
        ("edit", RomeSettings),
        ("edit --editor rome-identity", RomeSettings),
        ("evaluate --editor=ft", FineTuningSettings),
        ("edit --editor kn", KnowledgeNeuronsSettings),
        ("evaluate", EvaluateSettings),
        ("moments", MomentSettings),
        ("tune", TuneSettings),
    ):
        with pytest.raises(SystemExit):
            cli.main([*command.split(), "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        for name, _, text in knobs(settings):
            assert ("--try" if name == "grid" else "--" + name.replace("_", "-")) in shown
            if name in (
                "grid",
                "seed",
            ):  # --try has a sentence of its own; the seed of an evaluation is its editor's too
                continue
            assert text.split(",")[0].split("-")[0] in shown


@pytest.mark.parametrize("editor", [*EDITOR_SETTINGS, NONE])
def test_every_command_that_edits_has_every_option_of_every_editor(editor):
    (commands,) = (each for each in cli._parser(editor)._actions if isinstance(each, argparse._SubParsersAction))
    editing = {name: each for name, each in commands.choices.items() if each.get_default("edit_without") is not None}
    assert editing.keys() == {"edit", "calibrate", "evaluate", "sweep"}
    for command in editing.values():
        for each in fields(settings_of(editor)):
            if each.name == "seed" or each.name in command.get_default("edit_without"):
                continue  # the command's own
            option = command._option_string_actions["--" + each.name.replace("_", "-")]
            assert str(option.help).replace("%%", "%").startswith(each.metadata["help"]), each.name


@pytest.mark.parametrize("named", [("--editor", "ft", "--editor", "rome"), ("--editor=ft", "--editor", "rome"), ("--editor", "ft", "--editor=rome")])  # fmt: skip
def test_the_last_editor_that_is_named_has_the_options(named):
    command = ["edit", *named, "--clamp", "2"]  # of rome, and not of ft
    parsed = cli._parser(cli.named_in(command)).parse_args(command)
    assert (parsed.editor, parsed.edit_settings) == ("rome", RomeSettings)


class Limited(Editor):
    name = "limited"


@pytest.mark.parametrize("name", ["limit", "keep", "out"])
def test_an_editors_field_that_is_called_as_an_option_of_the_command_is_refused(name, run, monkeypatch):
    own = make_dataclass(
        "LimitedSettings", [(name, int, knob(1, "another number"))], bases=(EditSettings,), frozen=True
    )
    monkeypatch.setattr(Limited, "settings", own)
    status, _, err = run("edit", "x", "--editor", "tests.test_cli:Limited")
    assert (status, err.count("\n")) == (2, 1)
    assert f"LimitedSettings must have no field '{name}'" in err
    assert f"--{name} is an option of `mechedit edit` already" in err


@pytest.mark.parametrize("wrong", [["trace", "x", "--draws", "many"], ["diff", "x"], ["tune", "--clamps", "1"], ["edit", "x", "--editor", "ft", "--clamp", "1"], ["edit", "x", "--editor=ft", "--policy", "averaged"], ["no-such-command"], ["edit", "x", "--policy", "mixed"], ["evaluate", "--control", "identity"], ["evaluate", "--mode", "luck"], ["trace", "--no-such-option"], ["sever", "x", "--subject", "x", "--window", "3"], ["sever", "x", "--subject", "x", "--role", "verb"]])  # fmt: skip
def test_wrong_options_end_in_one_line(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(wrong)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--help` lists the options" in line


def test_an_unknown_option_names_the_help_of_its_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["edit", "x", "--clampp", "1"])
    assert capsys.readouterr().err == "mechedit edit: unrecognized arguments: --clampp 1 (did you mean --clamp?); these are not options of the editor rome (`--editor NAME --help` lists those of another). `mechedit edit --help` lists the options.\n"  # fmt: skip


def test_progress_is_lines_where_there_is_no_terminal(run, monkeypatch):
    monkeypatch.setattr(terminal, "SECONDS_A_LINE", 0.0)
    _, _, err = run(*TRACE, "--answer", "Seattle")
    lines = [line for line in err.splitlines() if line.startswith("trace: ")]
    assert lines[0].startswith("trace: 0 of ")
    assert lines[-1].split()[1] == lines[-1].split()[3], "the last line says that all is done"
    monkeypatch.setattr(terminal, "SECONDS_A_LINE", 100.0)
    assert "trace: " not in run(*TRACE, "--answer", "Seattle")[2]


def test_what_was_spoken_of_is_said_to_be_done(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 16.0, 17.0, 18.0, 19.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    report = terminal._progress_lines()
    for done in (1, 2, 3, 4):
        report("edits", done, 4)
    report("scores", 4, 4)
    assert capsys.readouterr().err.splitlines() == ["edits: 2 of 4, about 30 s left", "edits: 4 of 4"]


@pytest.mark.parametrize(
    ("seconds", "said"), [(99.4, "99 s"), (150.0, "2 min"), (5990.0, "100 min"), (9000.0, "2.5 h")]
)
def test_the_time_left_is_in_a_unit_that_suits(seconds, said):
    assert terminal._lasting(seconds) == said


def test_json_on_standard_output_is_json_alone(run):
    status, out, err = run(*TRACE, "--json", "-")
    assert status == 0
    assert json.loads(out)["prompt"] == PROMPT
    assert "clean" in err


def test_audit_shows_tokens(run):
    status, out, _ = run("audit", PROMPT, "--subject", "The Space Needle", "--answer", "Seattle", "--target", "Paris")
    assert status == 0
    assert "*" in out
    assert "new" in out


@pytest.mark.both
def test_models_lists_and_checks(run, folder, tmp_path):
    status, out, _ = run("models", "--json", str(tmp_path / "m.json"), model=False)
    assert status == 0
    assert "gemma-3-270m" in out
    assert json.loads((tmp_path / "m.json").read_text())[0]["name"] == "gemma-3-270m"
    status, out, _ = run("models", "--check", str(folder("llama")), model=False)
    assert status == 0
    assert "equal" in out


def test_a_failed_check_is_an_error(run, folder, monkeypatch):
    monkeypatch.setattr(models, "parity", lambda name: 1.0)
    status, out, err = run("models", "--check", str(folder("llama")), model=False)
    assert status == 2
    assert "DIFFERENT" in out
    assert "not Hugging Face's" in err


@pytest.mark.both
def test_doctor_reports(run, tmp_path):
    status, out, _ = run("doctor", "--json", str(tmp_path / "d.json"), model=False)
    assert status == 0
    assert "writable" in out
    assert json.loads((tmp_path / "d.json").read_text())["version of torch"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trace", "Paris is", "--subject", "Rome"), "is not in the prompt"),
        (("trace", "Rome or Rome is", "--subject", "Rome"), "--occurrence"),
        (("trace", "Paris is", "--subject", ""), "must be a word"),
        ((*TRACE, "--kinds", "mlps"), "'mlps' is not"),
        (("trace",), "needs PROMPT and --subject, or --facts"),
        (("trace", "--facts", "built-in"), "give --out DIR"),
        ((*TRACE, "--facts", "built-in", "--out", "x"), "not both"),
        (("trace", "--facts", "/no/file", "--out", "x"), "/no/file"),
        ((*TRACE, "--sigma-from", "/no/file"), "no such file"),
        ((*TRACE[:-2], "--corruption", "tokens"), "--corruption tokens and --other SUBJECT belong together"),
        ((*TRACE, "--other", "The Louvre"), "--corruption tokens and --other SUBJECT belong together"),
        (("sever", *TRACE[1:], "--other", "The Louvre"), "--corruption tokens and --other SUBJECT belong together"),
        ((*TRACE, "--limit", "3"), "--limit, --unknown and --batch are for --facts"),
        ((*TRACE, "--batch", "3"), "--limit, --unknown and --batch are for --facts"),
        ((*TRACE, "--unknown"), "--limit, --unknown and --batch are for --facts"),
        (("trace", "--facts", "built-in", "--out", "x", "--limit", "1"), "--limit must be at least 2 facts"),
        (("trace", "--facts", "built-in", "--out", "x", "--limit", "-3"), "--limit must be at least 2 facts"),
        (("trace", "--facts", "built-in", "--out", "x", "--other", "The Louvre"), "--other is one prompt's"),
        ((*TRACE, "--roles", "verb"), "roles must be one of"),
        ((*TRACE, "--kinds", ","), "at least one"),
        ((*TRACE, "--window", "-1"), "0 (the preset's) or more layers"),
        ((*TRACE[:-2], "--draws", "0"), "at least 1"),
        ((*EDIT, "--target", " "), "target_new must be a word"),
        ((*EDIT, "--target", "Seattle"), "nothing to edit"),
        ((*EDIT, "--layer", "99"), "layer must be from 0 to 3"),
        (EDIT[:8], "no layer is given"),
        ((*EDIT, "--text", "/no/file"), "cannot be read"),
        (("apply", "/no/file"), "does not exist"),
        ((*TRACE, "--out", "/dev/null/x"), "cannot be written"),
        ((*EDIT, "--out", "/dev/null/x.safetensors"), "cannot be written"),
        ((*EDIT, "--out", "/tmp"), "is a folder"),  # noqa: S108
        (("moments", "--layer", "1", "--tokens", "5"), "more keys than d_mlp"),
        (("moments", "--layer", "1", "--split", "test"), "--split is of a dataset: give --dataset too"),
        ((*EDIT, "--limit", "3"), "--limit chooses among --facts"),
        (("trace", "--facts", "built-in", "--out", "x", "--subject", "Rome"), "--subject is one prompt's"),
        (("trace", "--facts", "built-in", "--out", "x", "--answer", "Rome"), "--answer is one prompt's"),
        (("evaluate", "--estimate", "--cpus", "2"), "--cpus is of --engine ray"),
        (("moments", "--layer", "-2"), "--layer must be blocks from 0, or -1"),
        (("moments", "--layer", "1", "--text", "/tmp"), "/tmp cannot be read: it is a folder"),  # noqa: S108
        ((*EDIT, "--layer", "-2"), "layer must be a block, from 0, or -1"),
        (("tune", "--begin", "99999", "--out", "x"), "--begin 99999 leaves no fact of the"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(arguments, message, run):
    status, _, err = run(*arguments)
    assert status == 2
    assert message in err
    assert err.strip().startswith("mechedit: ")
    assert "Traceback" not in err


@pytest.mark.parametrize("device", ["meta", "", "cuda:99", "hpu", "mkldnn", "cpu:-1", "🙈"])
def test_a_device_that_is_not_here_or_has_no_numbers_is_refused(device, run):
    status, _, err = run(*TRACE, "--device", device, model=False)
    assert (status, len(err.splitlines())) == (2, 1)
    assert "there is no device" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*EDIT, "--prefixes", "100x3"), "prefixes must fit the context of 64 tokens"),
        ((*EDIT, "--prefixes", "63x1"), "a prompt must fit the context of 64 tokens"),
        ((*TRACE, "--json", "/tmp"), "is a folder"),  # noqa: S108
        ((*TRACE, "--json", "x" * 300), "File name too long"),
        ((*TRACE, "--out", "x" * 300), "File name too long"),
        (("inspect", "x" * 300), "File name too long"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(arguments, message, run):
    status, _, err = run(*arguments, model=arguments[0] != "inspect")
    assert status == 2
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("mechedit")]) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["evaluate", "--engine", "ray", "--cpus", "nan", "--out", "x"], "'nan' is no finite number"),
        (["evaluate", "--gpus", "inf"], "'inf' is no finite number"),
        (["trace", "x", "--draws", "9" * 30], "larger than any number"),
        (["trace", "x", "--subject", "x\udcff"], "subject must be text in UTF-8"),
        (["inspect", ""], "names no file or folder"),
        (["inspect", "a\0b"], "names no file or folder"),
        (["trcae", "x"], "(did you mean trace?)"),
        (["evaluate", "--mode", "sequentiall"], "(did you mean sequential?)"),
        (["trace", "x", "--subjetc", "x"], "(did you mean --subject?)"),
    ],
)
def test_what_an_option_cannot_take_is_told_in_one_line(wrong, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(wrong)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_inspecting_what_is_no_result_is_an_error(run, tmp_path):
    (tmp_path / "edits.json").write_text("[]")
    for name, message in (("none", "does not exist"), ("edits.json", "what mechedit reads again ends in .safetensors")):
        status, _, err = run("inspect", str(tmp_path / name), model=False)
        assert (status, message in err) == (2, True)


def test_prefixes_are_parsed(capsys):
    assert options._pairs("5x10,10x2") == ((5, 10), (10, 2))
    assert options._pairs("none") == ()
    with pytest.raises(SystemExit):
        cli.main([*EDIT, "--prefixes", "5"])
    assert "TOKENSxHOWMANY" in capsys.readouterr().err


def test_ctrl_c_ends_quietly(run, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "load", interrupt)
    status, _, err = run(*TRACE)
    assert status == 130
    assert "interrupted; nothing was changed and no result was written." in err


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_results_are_files_like_any_other(load, tmp_path):
    path = trace(load("gpt2"), FACT, TraceSettings(draws=1)).save(tmp_path / "t.safetensors")
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    assert [each.name for each in Path(tmp_path).iterdir()] == ["t.safetensors"]
