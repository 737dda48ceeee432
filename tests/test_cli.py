from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mechedit
from mechedit import cli, edits, figures, guards, models, moments
from mechedit.cli import options, terminal
from mechedit.moments import Moment
from mechedit.settings import MomentSettings, RomeSettings, TraceSettings, TuneSettings, knobs
from mechedit.tracing import Trace, trace
from tests.conftest import FACT, widen_bands

PROMPT = "The Space Needle is located in the city of"


@pytest.fixture
def run(folder, capsys, monkeypatch):
    """Run a command in this process on the tiny GPT-2; status, standard output and standard error."""
    monkeypatch.setenv("COLUMNS", "160")

    widen_bands(monkeypatch)

    def call(*arguments: str, model: bool = True) -> tuple[int, str, str]:
        options = ["--model", str(folder("gpt2")), "--device", "cpu"] if model else []
        status = cli.main([*arguments, *options])
        out, err = capsys.readouterr()
        return status, out, err

    return call


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


def test_help_answers_within_a_second_and_loads_nothing_heavy():
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mechedit.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - began < 1.0
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
        ("moments", MomentSettings),
        ("tune", TuneSettings),
    ):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        for name, _, text in knobs(settings):
            assert "--" + name.replace("_", "-") in shown
            assert text.split(",")[0].split("-")[0] in shown


def test_trace_writes_what_python_returns(run, load, tmp_path):
    status, out, _ = run(
        *TRACE,
        "--answer",
        "Seattle",
        "--out",
        str(tmp_path / "out"),
        "--json",
        str(tmp_path / "trace.json"),
        "--window",
        "2",
    )
    assert status == 0
    record = json.loads((tmp_path / "trace.json").read_text())
    expected = trace(load("gpt2"), FACT, TraceSettings(draws=2, window=2))
    torch.testing.assert_close(torch.tensor(record["effects"]["mlp"]), expected.effects["mlp"])
    assert record["settings"]["window"] == 2
    saved = Trace.load(tmp_path / "out" / "trace.safetensors")
    torch.testing.assert_close(saved.effects["attn"], expected.effects["attn"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "trace.safetensors",
        *(f"trace_{kind}{suffix}" for kind in ("resid", "mlp", "attn") for suffix in (".png", ".svg")),
    }
    assert "clean" in out
    assert "Needle" in out
    assert "trace_mlp.png" in out


def test_kinds_and_occurrence_and_bos_reach_the_trace(run, tmp_path):
    path = tmp_path / "t.json"
    status, _, _ = run(
        *(
            "trace",
            "Rome is not Rome in",
            "--subject",
            "Rome",
            "--occurrence",
            "1",
            "--draws",
            "1",
            "--kinds",
            "resid,attn",
        ),
        *("--no-prepend-bos", "--seed", "3", "--noise", "2.5", "--json", str(path)),
    )
    record = json.loads(path.read_text())
    assert status == 0
    assert list(record["effects"]) == ["resid", "attn"]
    assert record["subject_range"][0] > 0
    assert (record["settings"]["prepend_bos"], record["settings"]["seed"], record["settings"]["noise"]) == (
        False,
        3,
        2.5,
    )


def read(path):
    return json.loads(path.read_text())


def test_a_trace_that_is_not_exact_says_by_how_much(run, tmp_path):
    _, out, _ = run(*TRACE, "--window", "2", "--json", str(tmp_path / "t.json"))
    assert "what fewer draws or bfloat16 cost, against ten draws in the model's own format, on 24 cells" in " ".join(
        out.split()
    )
    assert read(tmp_path / "t.json")["error"]["cells"] == 24


@pytest.fixture
def known_file(tmp_path):
    """A file of four facts in the published form."""
    rows = [
        {
            "known_id": index,
            "subject": name,
            "attribute": "Paris",
            "template": "{} is in the city of",
            "prediction": "",
            "prompt": f"{name} is in the city of",
            "relation_id": "P1",
        }
        for index, name in enumerate(["London", "Berlin", "Rome", "Seattle"])
    ]
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(rows))
    return path


def test_a_run_over_facts_is_kept_resumed_and_averaged(run, known_file, tmp_path):
    folder = tmp_path / "run"
    small = ("--unknown", "--draws", "2", "--window", "2")
    command = ("trace", "--facts", str(known_file), *small, "--limit", "3", "--out", str(folder))
    status, out, _ = run(*command)
    assert status == 0
    assert "3 facts. clean" in out
    assert (
        "what fewer draws or bfloat16 cost 'London is in the city of', against ten draws in the model's own format, on 24 cells"
        in " ".join(out.split())
    )
    assert "last subject token" in out
    assert "early site: mlp at layer" in out
    first = {path.name: path.read_bytes() for path in (folder / "units").iterdir()}
    assert len(first) == 3
    assert read(folder / "average.json")["n"] == 3
    assert (folder / "average_lines.png").is_file()
    run(*command)
    assert {path.name: path.read_bytes() for path in (folder / "units").iterdir()} == first
    status, _, err = run(*command, "--seed", "1")
    assert status == 2
    assert "holds a run of other settings (settings.seed: 0 there, 1 now)" in err


def test_an_interrupted_run_says_what_is_kept_and_how_to_go_on(run, known_file, tmp_path, monkeypatch):
    from mechedit.runs import tracing as runs

    command = ("trace", "--facts", str(known_file), "--unknown", "--draws", "1", "--out", str(tmp_path / "run"))
    real, calls = runs.trace, []

    def interrupt(*arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(runs, "trace", interrupt)
    status, _, err = run(*command)
    assert status == 130
    assert "2 of 4 facts are kept in" in err
    assert "the same command goes on from there" in err
    status, out, _ = run(*command)
    assert status == 0
    assert "2 of 4 facts are in" in out
    assert len(calls) == 5


@pytest.mark.parametrize("wrong", [["trace", "x", "--draws", "many"], ["diff", "x"], ["tune", "--clamps", "a"], ["no-such-command"], ["edit", "x", "--policy", "mixed"], ["evaluate", "--control", "luck"], ["trace", "--no-such-option"], ["sever", "x", "--subject", "x", "--window", "3"], ["sever", "x", "--subject", "x", "--role", "verb"]])  # fmt: skip
def test_wrong_options_end_in_one_line(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(wrong)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--help` lists the options" in line


def test_an_unknown_option_names_the_help_of_its_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["edit", "x", "--clampp", "1"])
    assert capsys.readouterr().err == "mechedit edit: unrecognized arguments: --clampp 1. `mechedit edit --help` lists the options.\n"  # fmt: skip


def test_a_trace_says_what_may_surprise_and_where_the_sites_are(run):
    status, out, _ = run(*TRACE, "--answer", "Seattle")
    assert status == 0
    assert "early site: mlp at layer" in out
    assert "late site: attn at layer" in out
    _, out, _ = run(*TRACE, "--answer", "Seattle Seattle")
    assert "P(first token of Seattle Seattle) = " in out
    assert "a trace measures the first (measure p_answer: all)" in " ".join(out.split())


def test_progress_is_lines_where_there_is_no_terminal(run, monkeypatch):
    monkeypatch.setattr(terminal, "SECONDS_A_LINE", 0.0)
    _, _, err = run(*TRACE, "--answer", "Seattle")
    lines = [line for line in err.splitlines() if line.startswith("trace: ")]
    assert lines[0].startswith("trace: 0 of ")
    assert lines[-1].split()[1] == lines[-1].split()[3], "the last line says that all is done"
    monkeypatch.setattr(terminal, "SECONDS_A_LINE", 100.0)
    assert "trace: " not in run(*TRACE, "--answer", "Seattle")[2]


def test_what_was_spoken_of_is_said_to_be_done(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 16.0, 16.0, 17.0, 18.0, 18.0, 19.0])  # read once more when a line is said
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    report = terminal._progress_lines()
    for done in (1, 2, 3, 4):
        report("edits", done, 4)
    report("scores", 4, 4)
    assert capsys.readouterr().err.splitlines() == ["edits: 2 of 4", "edits: 4 of 4"]


def test_facts_the_model_does_not_know_are_left_out(run, known_file, tmp_path):
    status, out, err = run("trace", "--facts", str(known_file), "--draws", "1", "--out", str(tmp_path / "run"))
    assert "the model knows 0 of 4 facts" in out
    assert status == 2
    assert "an average needs at least 2 facts; 0 of" in err


def test_roles_and_sigma_of_subjects_reach_a_run(run, tmp_path):
    few = ("--limit", "2", "--unknown", "--draws", "1", "--roles", "subject_last,last")
    run("trace", "--facts", "built-in", *few, "--sigma-from", "subjects", "--no-replace", "--out", str(tmp_path))
    description = read(tmp_path / "run.json")
    assert description["noise"]["source"] == "subjects of 2 facts"
    assert description["settings"]["roles"] == ["subject_last", "last"]
    assert description["settings"]["replace"] is False


def test_tokens_and_sigma_from_a_file_reach_the_trace(run, tmp_path):
    text = tmp_path / "names.txt"
    text.write_text("Paris\nLondon\n")

    def std(*options):
        run("trace", "Paris is in", "--subject", "Paris", "--draws", "1", *options, "--json", str(tmp_path / "t.json"))
        return read(tmp_path / "t.json")["noise_std"]

    assert std("--sigma-from", str(text)) != std()
    assert std("--corruption", "tokens", "--other", "London") == 0.0


def test_sever_writes_three_curves(run, tmp_path):
    subject = (PROMPT, "--subject", "The Space Needle", "--draws", "2")
    status, out, _ = run("sever", *subject, "--out", str(tmp_path), "--json", str(tmp_path / "s.json"))
    assert status == 0
    assert "nothing severed" in " ".join(out.split())
    assert "MLPs severed" in " ".join(out.split())
    record = read(tmp_path / "s.json")
    assert set(record["curves"]) == {"ordinary", "mlp", "attn"}
    assert len(record["curves"]["mlp"]) == 4
    assert (tmp_path / "severed.png").is_file()
    _, out, _ = run("inspect", str(tmp_path / "severed.safetensors"), model=False)
    assert "severed" in out


def test_json_on_standard_output_is_json_alone(run):
    status, out, err = run(*TRACE, "--json", "-")
    assert status == 0
    assert json.loads(out)["prompt"] == PROMPT
    assert "clean" in err


def test_edit_apply_and_inspect_go_together(run, tmp_path):
    path, record_path = tmp_path / "edit.safetensors", tmp_path / "edit.json"
    status, out, _ = run(*EDIT, "--out", str(path), "--json", str(record_path))
    assert status == 0
    assert "divisor" in out
    record = json.loads(record_path.read_text())
    assert record["layer"] == 1
    assert record["settings"]["prefixes"] == [[3, 2]]
    assert record["after"]["p_new"] == edits.load(path).after["p_new"]

    status, out, _ = run("apply", str(path), "--prompt", "The city of", "--json", str(tmp_path / "apply.json"))
    assert status == 0
    completions = json.loads((tmp_path / "apply.json").read_text())["completions"]
    assert [each["prompt"] for each in completions] == [PROMPT, "The city of"]

    status, out, _ = run("inspect", str(path), "--json", str(tmp_path / "inspect.json"), model=False)
    assert status == 0
    assert "Space Needle" in out
    assert json.loads((tmp_path / "inspect.json").read_text())["kind"] == "edit"


def test_an_edit_takes_c_from_text(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{number} {PROMPT} Seattle." for number in range(300)))
    path = tmp_path / "edit.safetensors"
    status, _, _ = run(*EDIT, "--text", str(text), "--out", str(path))
    assert status == 0
    assert edits.load(path).details["moment"]["source"].startswith("texts ")


def test_moments_are_estimated_written_and_inspected(run, tmp_path):
    path = tmp_path / "C.safetensors"
    status, _, _ = run("moments", "--layer", "1", "--tokens", "300", "--context", "16", "--out", str(path))
    assert status == 0
    assert moments.Moment.load(path).keys == 300
    status, out, _ = run("inspect", str(path), model=False)
    assert status == 0
    assert "300" in out


def test_inspect_shows_a_trace(run, load, tmp_path):
    path = trace(load("gpt2"), FACT, TraceSettings(draws=1)).save(tmp_path / "t.safetensors")
    status, out, _ = run("inspect", str(path), model=False)
    assert status == 0
    assert "p_clean" in out


def test_audit_shows_tokens(run):
    status, out, _ = run("audit", PROMPT, "--subject", "The Space Needle", "--answer", "Seattle", "--target", "Paris")
    assert status == 0
    assert "*" in out
    assert "new" in out


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
        ((*TRACE, "--corruption", "tokens"), "--corruption tokens and --other SUBJECT belong together"),
        ((*TRACE, "--other", "The Louvre"), "--corruption tokens and --other SUBJECT belong together"),
        (("sever", *TRACE[1:], "--other", "The Louvre"), "--corruption tokens and --other SUBJECT belong together"),
        ((*TRACE, "--limit", "3"), "--limit and --unknown choose among --facts"),
        ((*TRACE, "--unknown"), "--limit and --unknown choose among --facts"),
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
        (("moments", "--layer", "-2"), "layer must be a block, from 0, or -1"),
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


def test_an_edit_for_other_weights_is_refused_unless_forced(run, folder, tmp_path, capsys):
    path = tmp_path / "edit.safetensors"
    run(*EDIT, "--out", str(path))
    edit = edits.load(path)
    from dataclasses import replace

    edits.save(replace(edit, origin={**edit.origin, "weight_hash": "0" * 64}), path)
    status, _, err = run("apply", str(path))
    assert status == 2
    assert "--force" in err
    assert run("apply", str(path), "--force")[0] == 0


def test_ctrl_c_ends_quietly(run, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "load", interrupt)
    status, _, err = run(*TRACE)
    assert status == 130
    assert "interrupted; nothing was changed and no result was written." in err


def test_the_demo_runs_on_any_model_with_a_preset(run, folder, tmp_path, monkeypatch):
    from dataclasses import replace

    preset = replace(models.PRESETS["gemma-3-270m"], rome=RomeSettings(layer=1, steps=3, prefixes=((3, 1),)))
    monkeypatch.setattr(models, "preset", lambda model: preset)
    status, out, _ = run("demo", "--out", str(tmp_path / "demo"))
    assert status == 0
    for said in (
        "top answer",
        "early site",
        "late site",
        "ROME writes at layer 1",
        "paraphrase",
        "neighbour",
        "P(Seattle)",
        "P(Paris)",
        "before",
        "after",
        "edit.safetensors",
    ):
        assert said in out
    assert out.count("paraphrase") == 2
    assert out.count("neighbour") == 4
    assert (tmp_path / "demo" / "trace_mlp.png").stat().st_size > 5000
    assert json.loads((tmp_path / "demo" / "edit.json").read_text())["target_new"] == "Paris"


RECORDS = [
    {
        "subject": name,
        "prompt": f"{name} is located in the city of",
        "target_true": "Seattle",
        "target_new": new,
        "paraphrases": [f"The city of {name} is"],
        "neighbours": ["The Space Needle is located in the city of"],
        "generations": [f"{name} is"],
        "id": name,
    }
    for name, new in (("The Eiffel Tower", "Paris"), ("Rome", "London"))
]
QUICK = ("--layer", "1", "--steps", "2", "--prefixes", "none")


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps(RECORDS))
    return str(path)


def test_evaluate_scores_a_file_of_ones_own_and_resumes(run, records, tmp_path, monkeypatch):
    out = str(tmp_path / "run")
    status, said, _ = run("evaluate", "--facts", records, "--out", out, *QUICK)
    assert status == 0
    for name in ("2 records", "before", "after", "ES", "NS", "S", "next_token_kl", "summary.tex", "results.parquet"):
        assert name in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["facts"] == 2
    assert summary["edit"]["layer"] == 1
    assert summary["edit"]["guard"] == "refuse"
    assert (summary["benchmark"], summary["source"]) == ("counterfact", {"facts": records, "begin": 0})
    where = f"means over records of {Path(records).name} from 0 on (n = 2)"
    assert where in (tmp_path / "run" / "summary.md").read_text()
    monkeypatch.setattr("mechedit.editors.rome.edit", lambda *args, **named: pytest.fail("found again"))
    assert run("evaluate", "--facts", records, "--out", out, *QUICK)[0] == 0
    status, said, _ = run("status", out, model=False)
    assert status == 0
    assert said.count("2 of 2") == 3
    assert "6 of 6" in said
    status, _, err = run("evaluate", "--facts", records, "--out", out, *QUICK, "--mode", "batch")
    assert (status, "settings.mode" in err) == (2, True)
    status, _, err = run("evaluate", "--facts", records, "--limit", "1", "--out", out, *QUICK)
    assert (
        status,
        "has results that are not of these 1 records (1 of them; 'Rome is located in the city of' becoming 'London' for one)"
        in " ".join(err.split()),
    ) == (2, True)
    (tmp_path / "run" / "results.parquet").write_bytes(b"PAR1")
    status, _, err = run("evaluate", "--facts", records, "--out", out, *QUICK)
    assert (status, "results.parquet is damaged" in " ".join(err.split())) == (2, True)


def test_help_says_the_defaults_of_the_command_and_the_choices(capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "A model with a preset (`mechedit models`) has the preset's layer" in shown
    assert "--guard {refuse,warn,rollback}" in shown
    assert "with the reason (rollback) (default: refuse)" in shown


def test_evaluate_has_every_option_of_its_settings(run, records, tmp_path):
    references = tmp_path / "references.json"
    references.write_text(json.dumps({"city": {"Q90": ["Paris is a city."]}}))
    options = (
        "--generate",
        "--tokens",
        "20",
        "--top-k",
        "3",
        "--references",
        str(references),
        "--no-health",
        "--seed",
        "4",
    )
    status, said, _ = run("evaluate", "--facts", records, "--limit", "1", "--editor", "none", "--out", str(tmp_path / "a"), *options)  # fmt: skip
    assert status == 0
    assert "exact_match" in said
    assert "next_token_kl" not in said
    settings = json.loads((tmp_path / "a" / "summary.json").read_text())["settings"]
    assert (settings["tokens"], settings["top_k"], settings["seed"], settings["editor"]) == (20, 3, 4, "none")
    status, said, _ = run("evaluate", "--facts", records, "--estimate", "--workers", "2", "--editor", "none")
    assert status == 0
    assert "2 records, independent" in said
    assert "on 2 workers" in said


def test_evaluate_reads_zsre(run, tmp_path):
    path = tmp_path / "zsre.json"
    record = {"subject": "Rome", "src": "What city is Rome in?", "rephrase": "Where is Rome?", "alt": "London", "answers": ["Paris"], "loc": "nq question: where is London", "loc_ans": "Seattle"}  # fmt: skip
    path.write_text(json.dumps([record]))
    status, said, _ = run("evaluate", "--benchmark", "zsre", "--facts", str(path), "--out", str(tmp_path / "z"), *QUICK)
    assert status == 0
    assert "efficacy" in said
    assert "specificity" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--out DIR"),
        (("--out", "x", "--limit", "0"), "--limit at least 1"),
        (("--out", "x", "--begin", "-1"), "--begin must be 0 or more"),
        (("--out", "x", "--begin", "9"), "leaves none of the 2 records"),
        (("--out", "x", "--workers", "2"), "--workers is of --engine ray"),
        (("--out", "x", "--gpus", "1"), "--gpus is of --engine ray"),
        (("--out", "x", "--engine", "ray", "--cpus", "0"), "--cpus more than 0"),
        (("--out", "x", "--references", "y"), "give --generate too"),
        (("--out", "x", "--generate", "--tfidf", "a", "b"), "give both"),
        (("--out", "x", "--mode", "sequential", "--control", "identity"), "a control changes ROME's independent edits"),
        (("--out", "x", "--generate", "--references", "nothing.json"), "nothing.json cannot be read"),
        (("--out", "x", "--tokens", "20"), "--tokens is of generated text"),
        (("--out", "x", "--top-k", "2"), "--top-k is of generated text"),
        (("--out", "x", "--editor", "none", "--clamp", "1"), "--clamp is of edits"),
        (("--out", "x", "--editor", "none", "--mode", "batch"), "--mode is of edits"),
        (("--out", "x", "--benchmark", "zsre", "--facts", "built-in"), "no zsRE questions"),
    ],
)
def test_evaluate_says_what_does_not_go_together_before_anything_is_loaded(run, records, tmp_path, monkeypatch, options, message):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load", lambda *args, **named: pytest.fail("loaded"))
    status, _, err = run("evaluate", "--facts", records, *options)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_sweep_draws_its_maps_and_says_how_far_traces_foretell_them(run, records, tmp_path):
    status, said, _ = run("sweep", "--facts", records, "--out", str(tmp_path / "s"), "--layers", "0,2", "--tokens", "subject_last,last", "--draws", "2", "--steps", "2", "--prefixes", "none")  # fmt: skip
    assert status == 0
    assert "rank correlation of S" in said
    assert (tmp_path / "s" / "sweep.png").stat().st_size > 5000
    record = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert record["layers"] == [0, 2]
    lines = [line.split(",") for line in (tmp_path / "s" / "sweep.csv").read_text().splitlines()]
    assert lines[0] == ["layer", "token", "ES", "PS", "NS", "S", "effect", "n"]
    assert [line[:2] for line in lines[1:]] == [["0", "subject_last"], ["0", "last"], ["2", "subject_last"], ["2", "last"]]  # fmt: skip
    assert float(lines[4][6]) == record["mean"]["effect"][1][1]
    assert lines[4][7] == "2"
    status, _, err = run("sweep", "--facts", records, "--out", str(tmp_path / "t" / "u"), "--layers", "9")
    assert (status, "layer must be from 0 to 3" in err) == (2, True)
    assert not (tmp_path / "t").exists(), "a command that is refused leaves nothing"
    with pytest.raises(SystemExit):
        run("sweep", "--facts", records, "--out", str(tmp_path / "t"), "--layers", "0.5")


def test_status_says_that_more_is_left_than_is_known(run, records, tmp_path, monkeypatch):
    def interrupt(*args, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("mechedit.editors.rome.edit", interrupt)
    assert run("evaluate", "--facts", records, "--out", str(tmp_path / "run"), *QUICK)[0] == 130
    status, said, _ = run("status", str(tmp_path / "run"), model=False)
    assert status == 0
    assert "2 of 6" in said
    assert "more than 0.00" in said


def test_status_of_a_folder_without_runs(run, tmp_path):
    status, _, err = run("status", str(tmp_path), model=False)
    assert (status, "holds no run" in err) == (2, True)
    status, _, err = run("status", str(tmp_path / "none"), model=False)
    assert (status, "is no folder; give one that a run was kept in" in err) == (2, True)


def test_heat_maps_are_the_same_bytes_for_the_same_trace_and_star_the_subject(load, tmp_path):
    found = trace(load("gpt2"), FACT, TraceSettings(draws=1))
    first, second = (figures.save(found, tmp_path / name) for name in "ab")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    labels = [label.get_text() for label in figures.heat_map(found, "mlp").axes[0].get_yticklabels()]
    begin, end = found.subject_range
    assert [label.endswith("*") for label in labels] == [begin <= index < end for index in range(len(labels))]
    image = figures.heat_map(found, "mlp").axes[0].images[0].get_array()
    torch.testing.assert_close(torch.tensor(image.data), found.effects["mlp"].T)
    with pytest.raises(ValueError, match="not head"):
        figures.heat_map(found, "head")


def test_dollar_signs_in_tokens_do_not_break_a_picture(load, tmp_path):
    from dataclasses import replace

    found = trace(load("gpt2"), FACT, TraceSettings(draws=1, kinds=("mlp",)))
    odd = replace(found, tokens=("$x_1$", "\n", *found.tokens[2:]), answer="$")
    assert all(path.stat().st_size for path in figures.save(odd, tmp_path))


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_results_are_files_like_any_other(load, tmp_path):
    path = trace(load("gpt2"), FACT, TraceSettings(draws=1)).save(tmp_path / "t.safetensors")
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    assert [each.name for each in Path(tmp_path).iterdir()] == ["t.safetensors"]


@pytest.fixture
def counterfact(tmp_path):
    path = tmp_path / "counterfact.json"
    rows = [
        {"prompt": PROMPT, "subject": "The Space Needle", "ground_truth": "Seattle", "target_new": "Paris"},
        {"prompt": "The city of Rome is", "subject": "Rome", "ground_truth": "Paris", "target_new": "London"},
    ]
    path.write_text(json.dumps(rows))
    return path


def test_edits_of_many_facts_are_kept_and_can_be_composed_compared_and_exported(run, counterfact, tmp_path):
    quick = ("--layer", "1", "--steps", "3", "--prefixes", "none")
    folder = tmp_path / "run"
    status, out, _ = run("edit", "--facts", str(counterfact), *quick, "--out", str(folder))
    assert status == 0
    assert "2 of 2 facts edited, each alone" in out
    first, second = (str(path) for path in sorted((folder / "units").iterdir()))
    listed = json.loads((folder / "edits.json").read_text())
    assert len(listed) == 2
    assert [edits.load(folder / each["file"]).fact["prompt"] for each in listed] == [each["prompt"] for each in listed]
    assert [each["seconds"] for each in listed] == [None, None], "files of a run do not depend on its speed"
    whole = tmp_path / "whole.safetensors"
    assert run("compose", first, second, "--out", str(whole), model=False)[0] == 0
    status, _, err = run("compose", first, second, "--out", first, model=False)
    assert (status, "is one of the edits that are composed" in err) == (2, True)
    assert len(edits.load(whole).changes) == 2
    status, out, _ = run("diff", first, second, "--json", str(tmp_path / "diff.json"), model=False)
    assert "cos of change" in out
    (found,) = json.loads((tmp_path / "diff.json").read_text())
    assert found["change"] == pytest.approx(edits.diff(edits.load(first), edits.load(second))[0].change)
    status, out, _ = run("export", str(whole), "--out", str(tmp_path / "edited"))
    assert status == 0
    assert (tmp_path / "edited" / "model.safetensors").is_file()
    assert "mechedit.json" in out
    status, out, _ = run("export", str(whole), "--adapter", "--out", str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    status, out, _ = run("apply", str(whole))
    assert status == 0
    assert "The city of Rome is" in out, "every part is asked for"
    assert run("inspect", str(whole), "--json", str(tmp_path / "i.json"), model=False)[0] == 0
    assert len(json.loads((tmp_path / "i.json").read_text())["parts"]) == 2
    assert run("diff", str(whole), first, "--json", str(tmp_path / "d.json"), model=False)[0] == 0
    assert json.loads((tmp_path / "d.json").read_text())[0]["u"] is None, "JSON has no nan"
    assert "nan" not in run("diff", str(whole), first, model=False)[1]
    status, _, err = run("export", str(whole), "--out", str(tmp_path / "edited"))
    assert status == 2
    assert "is not empty; export into a new folder" in err


def test_edits_that_write_nothing_are_said_to(run, counterfact, tmp_path, monkeypatch):
    path, strict = tmp_path / "edit.safetensors", dict.fromkeys(guards.BANDS, (2.0, 3.0, "nothing is"))
    monkeypatch.setattr(guards, "BANDS", strict)
    status, out, _ = run(*EDIT, "--guard", "rollback", "--out", str(path))
    assert (status, "note: it has no changes, and writes nothing." in out) == (0, True)
    said = f"note on {path}: it has no changes, and writes nothing."
    assert said in " ".join(run("apply", str(path))[1].split())
    whole = tmp_path / "whole.safetensors"
    assert said in " ".join(run("compose", str(path), str(path), "--out", str(whole), model=False)[1].split())
    quick = ("--layer", "1", "--steps", "1", "--prefixes", "none", "--guard", "rollback")
    status, out, err = run("edit", "--facts", str(counterfact), *quick, "--out", str(tmp_path / "run"))
    assert (status, "0 of 2 facts edited" in out, "none of the 2 facts was edited" in err) == (2, True, True)
    assert f"{PROMPT}: cond_C" in " ".join(out.split()), "each fact's reason has a line of its own"
    status, _, err = run("edit", "--facts", str(counterfact), *quick, "--out", str(path))
    assert (status, "is a file; with --facts it is a folder" in err) == (2, True)


def test_a_warning_of_the_guards_is_told_once_and_without_a_source_line(run, monkeypatch, recwarn):
    monkeypatch.setattr(guards, "BANDS", {"cond_C": (0.0, 1.0, "it is a test")})
    status, out, err = run(*EDIT, "--guard", "warn")
    assert (status, out.count("it is a test"), "it is a test" in err, len(recwarn)) == (0, 1, False, 0)


def test_constants_and_prefixes_go_by_name(run, tmp_path):
    path = tmp_path / "edit.safetensors"
    run(*EDIT, "--constants", "paper", "--prefixes", "published", "--guard", "warn", "--out", str(path))
    settings = edits.load(path).settings
    assert (settings["kl"], settings["weight_decay"]) == (100.0, 1.5e-3)
    assert settings["steps"] == 4, "an option of its own goes before the constants"
    assert settings["prefixes"] == [[4, 10], [9, 10]]


def test_parts_of_a_moment_are_merged_and_used(run, tmp_path, monkeypatch):
    monkeypatch.setattr(moments, "BATCH_TOKENS", 64)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{number} {PROMPT} Seattle." for number in range(300)))
    common = ("moments", "--layer", "1", "--text", str(text), "--tokens", "1200", "--context", "16", "--parts", "2")
    paths = [tmp_path / f"{part}.safetensors" for part in (0, 1)]
    for part, path in enumerate(paths):
        assert run(*common, "--part", str(part), "--out", str(path))[0] == 0
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


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("edit", PROMPT, "--subject", "Rome"), "edit needs PROMPT, --subject and --target"),
        (("edit", "--facts", "FILE"), "--facts needs --out DIR"),
        (("edit", PROMPT, "--facts", "FILE", "--out", "x"), "leave out prompt, subject"),
        (("edit", "--facts", "FILE", "--out", "x", "--true", "y"), "leave out prompt, subject"),
        (("edit", "--facts", "FILE", "--out", "x", "--limit", "0"), "--limit must be at least 1"),
        (("tune", "--begin", "-1", "--out", "x"), "--begin must be 0 or more"),
        ((*EDIT, "--text", "a", "--moment", "b"), "not from both"),
        ((*EDIT, "--moment", "none.safetensors"), "there is no such file"),
        (("moments", "--text", "a", "--dataset", "b"), "not from both"),
        (("moments", "--layer", "1", "2", "--out", "x.safetensors"), "a file for one layer"),
    ],
)
def test_options_of_edits_that_do_not_go_together_are_errors_before_a_model_is_loaded(
    command, message, run, counterfact, monkeypatch
):
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    status, _, err = run(*(str(counterfact) if word == "FILE" else word for word in command))
    assert status == 2
    assert message in err


def test_a_file_without_new_targets_cannot_be_edited(run, known_file, tmp_path):
    status, _, err = run("edit", "--facts", str(known_file), "--out", str(tmp_path / "run"))
    assert status == 2
    assert "no fact of" in err


def test_tuning_proposes_settings_and_keeps_its_runs(run, tmp_path, monkeypatch):
    from mechedit.runs import tracing as runs

    monkeypatch.setattr(runs, "known", lambda model, facts, **options: list(facts))
    path = tmp_path / "facts.json"
    rewrite = {"subject": "The Space Needle", "prompt": "{} is located in the city of"}
    rows = [
        {
            "case_id": number,
            "requested_rewrite": rewrite | {"target_true": {"str": "Seattle"}, "target_new": {"str": new}},
            "paraphrase_prompts": ["The city of The Space Needle is"],
            "neighborhood_prompts": ["The Eiffel Tower is located in the city of"],
        }
        for number, new in enumerate(("Paris", "Rome", "London", "Apple"))
    ]
    path.write_text(json.dumps(rows))
    command = ("tune", "--facts", str(path), "--begin", "1", "--traced", "2", "--edited", "1", "--around", "0")
    monkeypatch.setattr("mechedit.tuning.Tuned.worked", True)
    status, out, _ = run(*command, "--clamps", "1,3", "--draws", "1", "--out", str(tmp_path / "tune"))
    assert status == 0
    assert "proposed: --layer" in out
    monkeypatch.setattr("mechedit.tuning.Tuned.worked", False)
    out = run(*command, "--clamps", "1,3", "--draws", "1", "--out", str(tmp_path / "tune"))[1]
    assert "no edit succeeded, so nothing is proposed" in out
    record = json.loads((tmp_path / "tune" / "tuned.json").read_text())
    assert [row["clamp"] for row in record["rows"]] == [1.0, 3.0]
    kept = [Trace.load(path) for path in (tmp_path / "tune" / "traces" / "units").iterdir()]
    assert len(kept) == 2, "the first of four is left out, and one is edited"
