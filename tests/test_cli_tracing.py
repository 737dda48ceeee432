from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from mechedit import figures, models, scoring
from mechedit.models import loading
from mechedit.settings import PRESETS, RomeSettings, TraceSettings
from mechedit.tracing import Trace, trace
from tests.command_line import EDIT, PROMPT, TRACE, command_line
from tests.conftest import FACT, kept_units

pytestmark = pytest.mark.anywhere


@pytest.fixture
def run(folder, capsys, monkeypatch):
    return command_line(folder, capsys, monkeypatch)


@pytest.mark.both
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


@pytest.mark.both
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
    first = kept_units(folder)
    assert len(first) == 3
    assert read(folder / "average.json")["n"] == 3
    assert (folder / "average_lines.png").is_file()
    run(*command)
    assert kept_units(folder) == first
    status, _, err = run(*command, "--seed", "1")
    assert status == 2
    assert "holds a run of other settings (settings.seed: 0 there, 1 now)" in err
    there = {path: path.read_bytes() for path in folder.glob("average*")}
    rows = json.loads(known_file.read_text())
    known_file.write_text(json.dumps(rows[1:]))
    status, _, err = run(*command)
    assert (status, err.count("\n")) == (2, 1)
    assert "has results that are not of these 3 records (1 of them; 'London is in the city of'" in err
    assert {path: path.read_bytes() for path in there} == there
    known_file.write_text(json.dumps([rows[3], *rows[:3]]))
    assert run(*command[:-4], "--out", str(folder))[0] == 0
    assert read(folder / "average.json")["n"] == 4, "more facts are welcome"


def test_facts_share_sweeps_and_average_alike(run, known_file, tmp_path, monkeypatch):
    from mechedit.runs import tracing as runs

    real, batches = runs.trace_facts, []
    monkeypatch.setattr(
        runs, "trace_facts", lambda *rest, **named: batches.append(named["batch"]) or real(*rest, **named)
    )
    means = []
    for number, options in enumerate(((), ("--batch", "3"))):
        folder = tmp_path / str(number)
        command = ("trace", "--facts", str(known_file), "--unknown", "--draws", "2", "--window", "2", *options)
        assert run(*command, "--out", str(folder))[0] == 0
        means.append(read(folder / "average.json")["indirect_effect"]["mlp"])
    assert batches == [1, 3]
    pairs = [(a, b) for one, other in zip(*means, strict=True) for a, b in zip(one, other, strict=True)]
    assert all(a == b if a is None else abs(a - b) < 1e-6 for a, b in pairs)
    status, _, err = run("trace", "--facts", str(known_file), "--batch", "0", "--out", str(tmp_path / "no"))
    assert (status, err.strip()) == (2, "mechedit: --batch must be at least 1 fact; found 0.")


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


def test_a_trace_says_what_may_surprise_and_where_the_sites_are(run):
    status, out, _ = run(*TRACE, "--answer", "Seattle")
    assert status == 0
    assert "early site: mlp at layer" in out
    assert "late site: attn at layer" in out
    _, out, _ = run(*TRACE, "--answer", "Seattle Seattle")
    assert "P(first token of Seattle Seattle) = " in out
    assert "a trace measures the first (measure p_answer: all)" in " ".join(out.split())


def test_what_to_know_of_prompt_and_answer_stands_before_the_maps(run, load, tmp_path):
    part = (PROMPT, "--subject", "The Space Need", "--draws", "1")
    said, _, p = scoring.top(load("gpt2"), PROMPT, 1)[0]
    first = f"note: the model's first answer is not 'Seattle', but {said!r} with P = {p:.3f}."
    cut = "note: the subject 'The Space Need' stands inside a longer word, 'The Space Needle'."
    for command, table in (("trace", "resid: P("), ("sever", "nothing severed")):
        _, out, _ = run(command, *part, "--answer", "Seattle", "--out", str(tmp_path / command))
        before, _, after = " ".join(out.split()).partition(table)
        assert first in before
        assert cut in before
        assert after
        _, out, _ = run(command, *part)
        assert f"no --answer is given, so it is what the model says first: {said.strip()!r}" in " ".join(out.split())
        assert "first answer is not" not in out
    _, out, _ = run("show", str(tmp_path / "trace" / "trace.safetensors"), model=False)
    assert first in " ".join(out.split()).partition("resid: P(")[0]


def test_what_would_keep_a_result_is_said_where_nothing_does(run, tmp_path):
    sever = ("sever", *TRACE[1:])
    for command, said in ((TRACE, "--out DIR keeps the trace"), (sever, "--out DIR keeps the curves"), (EDIT, "--out FILE keeps the edit")):  # fmt: skip
        assert f"nothing is saved: {said}" in run(*command)[1]
    for option, place in (("--json", "-"), ("--json", str(tmp_path / "kept.json")), ("--out", str(tmp_path / "kept"))):
        _, out, err = run(*sever, option, place)
        assert "nothing is saved" not in out + err


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


@pytest.mark.both
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


def test_inspect_shows_a_trace(run, load, tmp_path):
    path = trace(load("gpt2"), FACT, TraceSettings(draws=1)).save(tmp_path / "t.safetensors")
    status, out, _ = run("inspect", str(path), model=False)
    assert status == 0
    assert "p_clean" in out


@pytest.mark.both
def test_the_demo_runs_on_any_model_with_a_preset(run, folder, tmp_path, monkeypatch):
    preset = replace(PRESETS["gemma-3-270m"], settings={"rome": RomeSettings(layer=1, steps=3, prefixes=((3, 1),))})
    for place in (models, loading):
        monkeypatch.setattr(place, "preset", lambda model: preset)
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
    assert out.count("neighbour") == 5, "four rows, and the sentence above them"
    assert (tmp_path / "demo" / "trace_mlp.png").stat().st_size > 5000
    assert json.loads((tmp_path / "demo" / "edit.json").read_text())["target_new"] == "Paris"
    monkeypatch.setattr("mechedit.runs.tracing.trace", None)  # a second time needs no sweep
    before = json.loads((tmp_path / "demo" / "trace.json").read_text())
    status, out, _ = run("demo", "--out", str(tmp_path / "demo"))
    assert status == 0
    assert "its trace is kept in" in out
    assert "nan" not in out
    assert json.loads((tmp_path / "demo" / "trace.json").read_text()) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--degrees", "5"), "--degrees would play no part: only --corruption student_t"),
        (("--kinds", "resid", "--window", "3"), "--window would play no part: only outputs are restored in windows"),
        (("--kinds", "resid,resid_pre", "--centre", "paper"), "--centre would play no part"),
        (
            ("--corruption", "tokens", "--other", "London", "--noise", "2"),
            "--noise would play no part: --corruption tokens",
        ),
        (("--corruption", "tokens", "--other", "London", "--replace"), "--replace would play no part"),
        (("--corruption", "tokens", "--other", "London", "--draws", "7"), "--draws would play no part"),
        (("--scale", "absolute", "--sigma-from", "subjects"), "--sigma-from would play no part: --scale absolute"),
        (("--against", "Paris"), "--measure logit_difference and --against ANSWER belong together"),
        (("--measure", "logit_difference"), "--measure logit_difference and --against ANSWER belong together"),
    ],
)
def test_options_that_would_play_no_part_are_refused(run, options, said):
    status, _, err = run("trace", "Paris is in", "--subject", "Paris", *options)
    assert (status, err.count("\n")) == (2, 1)
    assert said in err
    if "--kinds" not in options and "--sigma-from" not in options:
        assert run("sever", "Paris is in", "--subject", "Paris", *options)[0] == 2


@pytest.mark.parametrize("option", ["--subject", "--answer", "--against"])
def test_what_is_one_prompts_is_refused_with_facts(run, option, tmp_path):
    status, _, err = run("trace", "--facts", "built-in", "--out", str(tmp_path / "run"), option, "Paris")
    assert status == 2
    assert f"{option} is one prompt's" in err


def test_a_logit_difference_of_one_prompt_is_measured(run, load, tmp_path):
    path = tmp_path / "t.json"
    both = ("--answer", "Seattle", "--against", "Paris", "--measure", "logit_difference", "--window", "2")
    status, out, _ = run(*TRACE, *both, "--json", str(path))
    assert status == 0
    assert "logit(Seattle) less the other's = " in out
    expected = trace(load("gpt2"), FACT, TraceSettings(draws=2, window=2, measure="logit_difference"))
    torch.testing.assert_close(torch.tensor(read(path)["effects"]["mlp"]), expected.effects["mlp"])
    status, _, _ = run("sever", *TRACE[1:], *both[:-2], "--json", str(path))
    assert status == 0
    assert read(path)["p_clean"] == pytest.approx(expected.p_clean)


def test_every_kind_has_a_table_and_a_picture_that_says_what_it_is(run, tmp_path):
    kinds = "resid_pre,resid_mid,attn"
    status, out, _ = run(*TRACE, "--answer", "Seattle", "--kinds", kinds, "--out", str(tmp_path))
    assert status == 0
    assert all(f"{kind}: P(Seattle)" in out for kind in kinds.split(","))
    for kind in ("resid_pre", "resid_mid"):
        picture = figures.heat_map(Trace.load(tmp_path / "trace.safetensors"), kind).axes[0]
        assert "window" not in picture.get_title()
        assert "centre" not in picture.get_xlabel()


def test_a_run_says_which_facts_it_leaves_out(run, known_file, tmp_path):
    rows = json.loads(known_file.read_text())
    template = "{} " + "is in " * 80
    long = rows[0] | {"known_id": 9, "template": template, "prompt": template.format("London").strip()}
    known_file.write_text(json.dumps([*rows, long]))
    small = ("--unknown", "--draws", "1", "--window", "2", "--roles", "last")
    status, out, _ = run("trace", "--facts", str(known_file), *small, "--out", str(tmp_path / "run"))
    assert status == 0
    assert "1 of 5 facts cannot be traced and are left out. The first: a prompt must fit the context" in " ".join(out.split())  # fmt: skip
    assert read(tmp_path / "run" / "average.json")["n"] == 4
