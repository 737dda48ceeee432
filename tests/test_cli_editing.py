from __future__ import annotations

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mechedit import applying, cli, edits, guards, models
from mechedit.cli.applying import model_of
from mechedit.cli.terminal import UsageError
from mechedit.editors import rome
from mechedit.generation import complete
from mechedit.runs import extending, sequence, units
from tests import hand_made
from tests.command_line import EDIT, PROMPT, command_line

pytestmark = pytest.mark.anywhere


@pytest.fixture
def run(folder, capsys, monkeypatch):
    return command_line(folder, capsys, monkeypatch)


@pytest.mark.both
def test_edit_apply_and_inspect_go_together(run, tmp_path):
    path, record_path = tmp_path / "edit.safetensors", tmp_path / "edit.json"
    status, out, _ = run(*EDIT, "--out", str(path), "--json", str(record_path))
    assert status == 0
    assert "divisor" in out
    said = " ".join(out.split())
    assert "(1: as before)" in said
    assert said.count(". docs/editing.md says what these are") == 1
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


def test_an_editor_of_many_facts_writes_the_target(run, tmp_path):
    path = tmp_path / "edit.safetensors"
    status, _, err = run(*EDIT, "--editor", "memit", "--a", "50", "--sought-in", "stream", "--out", str(path))
    assert status == 0, err
    edit = edits.load(path)
    assert (edit.editor, edit.fact["target_new"], edit.settings["sought_in"]) == ("memit", "Paris", "stream")


def test_what_looks_wrong_about_a_subject_stands_before_the_edit(run):
    part = [word.replace("The Space Needle", "The Space Need") if word != PROMPT else word for word in EDIT]
    said = " ".join(run(*part)[1].split())
    assert "stands inside a longer word, 'The Space Needle'." in said.partition("update norm")[0]


def test_knowledge_neurons_are_shown_and_written(run, tmp_path):
    fact = ("edit", PROMPT, "--subject", "The Space Needle", "--target", "Paris", "--editor", "kn")
    where = ("--prepend-bos", "--steps", "2", "--guard", "warn", "--json", str(tmp_path / "edit.json"))
    status, out, err = run(*fact, *where, "--prefixes", "3x2")
    assert status == 0, err
    own = json.loads((tmp_path / "edit.json").read_text())["neurons"]
    assert 0 < len(own) <= 10
    assert "share of prompts" in out
    assert all(str(each["index"]) in out for each in own)
    status, out, err = run(*fact, *where, "--policy", "published")
    assert status == 0, err
    many = len(json.loads((tmp_path / "edit.json").read_text())["neurons"])
    assert f"and {many - 10} neurons more" in out


@pytest.fixture
def text(tmp_path):
    place = tmp_path / "text.txt"
    place.write_text("\n".join(f"{number} {PROMPT} Seattle." for number in range(300)))
    return place


def test_an_edit_takes_c_from_text(run, text, tmp_path):
    path = tmp_path / "edit.safetensors"
    status, _, _ = run(*EDIT, "--text", str(text), "--fisher", "1", "--out", str(path))
    assert status == 0
    made = edits.load(path).details
    assert made["moment"]["source"].startswith("texts ")
    assert made["fisher"]["source"] == made["moment"]["source"]


def test_an_edit_for_other_weights_is_refused_unless_forced(run, folder, tmp_path, capsys):
    path = tmp_path / "edit.safetensors"
    run(*EDIT, "--out", str(path))
    edit = edits.load(path)
    edits.save(replace(edit, origin={**edit.origin, "weights": "0" * 64}), path)
    status, _, err = run("apply", str(path))
    assert status == 2
    assert "--force" in err
    assert run("apply", str(path), "--force")[0] == 0


def test_an_edit_for_another_number_format_says_which(run, tmp_path):
    path = tmp_path / "edit.safetensors"
    assert run(*EDIT, "--guard", "warn", "--dtype", "bfloat16", "--out", str(path))[0] == 0
    status, _, err = run("apply", str(path))
    assert (status, err.count("\n")) == (2, 1)
    assert re.search(r"weights \w{12}… in bfloat16, but .* has weights \w{12}… in float32\. ", err)
    assert "Load the model it was made for (--dtype bfloat16), give" in err
    assert run("apply", str(path), "--dtype", "bfloat16")[0] == 0


def test_an_edits_own_prompt_is_completed_with_the_edits_bos(run, load, tmp_path):
    (one, other, both), shown = (str(tmp_path / name) for name in ("one", "other", "both")), tmp_path / "apply.json"
    at, there = [word.replace("The Space Needle", "Rome") for word in EDIT], "Rome is located in the city of"
    assert run(*EDIT, "--no-prepend-bos", "--guard", "warn", "--out", one)[0] == 0
    assert run(*at, "--guard", "warn", "--out", other)[0] == 0
    assert run("compose", one, other, "--out", both, model=False)[0] == 0
    expected = {PROMPT: False, there: True, "The city of": True}
    said = {bos: {prompt: complete(load("gpt2"), prompt, prepend_bos=bos) for prompt in expected} for bos in (False, True)}  # fmt: skip
    assert all(said[True][prompt] != said[False][prompt] for prompt in expected)
    for files in ([one, other], [both]):
        assert run("apply", *files, "--prompt", "The city of", "--prompt", PROMPT, "--json", str(shown))[0] == 0
        found = {each["prompt"]: each["before"] for each in json.loads(shown.read_text())["completions"]}
        assert found == {prompt: said[bos][prompt] for prompt, bos in expected.items()}


def test_constants_and_prefixes_go_by_name(run, tmp_path):
    path = tmp_path / "edit.safetensors"
    run(*EDIT, "--constants", "paper", "--prefixes", "published", "--guard", "warn", "--out", str(path))
    settings = edits.load(path).settings
    assert (settings["kl"], settings["weight_decay"]) == (100.0, 1.5e-3)
    assert settings["steps"] == 4, "an option of its own goes before the constants"
    assert settings["prefixes"] == [[4, 10], [9, 10]]


def test_a_warning_of_the_guards_is_told_once_and_without_a_source_line(run, monkeypatch, recwarn):
    monkeypatch.setitem(rome.BANDS, "cond_C", (0.0, 1.0, "it is a test"))
    status, out, err = run(*EDIT, "--guard", "warn")
    assert (status, out.count("it is a test"), "it is a test" in err, len(recwarn)) == (0, 1, False, 0)


@pytest.fixture
def counterfact(tmp_path):
    path = tmp_path / "counterfact.json"
    rows = [
        {"prompt": PROMPT, "subject": "The Space Needle", "ground_truth": "Seattle", "target_new": "Paris"},
        {"prompt": "The city of Rome is", "subject": "Rome", "ground_truth": "Paris", "target_new": "London"},
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.both
def test_edits_of_many_facts_are_kept_and_can_be_composed_compared_and_exported(run, counterfact, tmp_path, monkeypatch):  # fmt: skip
    quick = ("--layer", "1", "--steps", "3", "--prefixes", "none")
    folder = tmp_path / "run"
    status, out, _ = run("edit", "--facts", str(counterfact), *quick, "--out", str(folder))
    assert status == 0
    assert "2 of 2 facts edited, each alone" in out
    first, second = map(str, units.export(folder, tmp_path / "files"))
    listed = json.loads((folder / "edits.json").read_text())
    assert len(listed) == 2
    assert [edits.load(units.read(folder, each["unit"])).fact["prompt"] for each in listed] == [
        each["prompt"] for each in listed
    ]
    assert [each["seconds"] for each in listed] == [None, None], "files of a run do not depend on its speed"
    before = (folder / "edits.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(models, "load", lambda *args, **named: pytest.fail("loaded"))
        status, _, err = run("edit", "--facts", str(counterfact), "--limit", "1", *quick, "--out", str(folder))
    assert (status, err.count("\n"), "has results that are not of these 1 records" in err) == (2, 1, True)
    assert (folder / "edits.json").read_bytes() == before
    whole = tmp_path / "whole.safetensors"
    assert run("compose", first, second, "--out", str(whole), model=False)[0] == 0
    status, _, err = run("compose", first, second, "--out", first, model=False)
    assert (status, "is one of the files that it is made of" in err) == (2, True)
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    status, _, err = run("compose", str(circle), str(circle), "--out", str(tmp_path / "of-circles"), model=False)
    assert (status, len(err.splitlines()), "cannot be read" in err or "circle" in err) == (2, 1, True), err
    assert len(edits.load(whole).changes) == 2
    status, out, _ = run("diff", first, second, "--json", str(tmp_path / "diff.json"), model=False)
    assert "cos of change" in out
    (found,) = json.loads((tmp_path / "diff.json").read_text())
    assert found["change"] == pytest.approx(applying.diff(edits.load(first), edits.load(second))[0].change)
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


@pytest.mark.both
def test_a_sequence_is_kept_resumed_shown_and_written_as_one_edit(run, counterfact, tmp_path):
    quick = ("--layer", "1", "--steps", "2", "--prefixes", "none", "--editor", "sequential", "--sequence")
    folder = tmp_path / "run"
    status, out, _ = run("edit", "--facts", str(counterfact), *quick, "--out", str(folder), "--limit", "1")
    assert (status, "1 of 1 facts are written" in out) == (0, True)
    record = tmp_path / "sequence.json"
    status, out, _ = run("edit", "--facts", str(counterfact), *quick, "--out", str(folder), "--json", str(record))
    assert (status, "2 of 2 facts are written, by 2 keys in 2 batches; 0 conflicts" in out) == (0, True)
    assert [look["edits"] for look in json.loads(record.read_text())["looks"]] == [2], (
        "the look at the end of fewer is dropped"
    )
    assert run("apply", str(folder / "edit.safetensors"))[0] == 0
    status, out, _ = run("show", str(folder), model=False)
    assert (status, "2 of 2 facts are written" in out, "perplexity ratio" in out) == (0, True, True)
    status, out, _ = run("edit", "--facts", str(counterfact), *quick, "--out", str(folder), "--take-out", "0")
    assert (status, "1 of 2 facts are written, by 1 keys" in out, "1 not: taken out again" in out) == (0, True, True), (
        out
    )
    kept = sequence.load(folder / "state.safetensors")
    assert f"taken out: 0, {kept.entries[0].as_fact.prompt!r}" in out
    (key,) = (row.key.double() for row in kept.rows.values())
    assert torch.allclose(kept.sums.P, torch.outer(key, key)), "the other's key is left, and nothing of the first"
    assert [look["edits"] for look in kept.looks] == [2, 2]
    prompt, other = (entry.as_fact.prompt for entry in kept.entries)
    assert f"0: {prompt!r} -> " in out
    assert f"{other!r}" not in out or "not above its true target at the last look" in out
    status, out, _ = run(
        "edit", "--facts", str(counterfact), *quick, "--out", str(folder), "--take-out", "0", "0", "--json", str(record)
    )
    assert (status, out.count(f"is out already: 0, {prompt!r}")) == (0, 1)
    made = json.loads(record.read_text())
    assert [look["edits"] for look in made["looks"]] == [2, 2], "and nothing more is done"
    assert [(each["number"], each["prompt"], each["why"]) for each in made["edits"]] == [
        (0, prompt, "taken out again"),
        (1, other, ""),
    ]
    assert (made["edits"][0]["stands"], made["edits"][1]["stands"]) == (
        None,
        kept.looks[-1]["row"].get("1", kept.looks[-1]["row"].get(1)),
    )
    assert run("apply", str(folder / "edit.safetensors"))[0] == 0
    status, _, err = run("edit", "--facts", str(counterfact), *quick, "--out", str(folder), "--take-out", "1")
    assert (status, "none of the 2 facts is written" in err, (folder / "edit.safetensors").exists()) == (2, True, False)
    status, _, err = run("edit", "--facts", str(counterfact), *quick, "--out", str(folder), "--take-out", "2")
    assert (status, "--take-out names facts by their numbers, here 0 to 1; found 2" in err) == (2, True)
    status, _, err = run("edit", "--facts", str(counterfact), *quick, "--steps", "3", "--out", str(folder))
    assert (status, "begun with steps = 2, and this is 3" in err) == (2, True)
    status, _, err = run("edit", "--facts", str(counterfact), *quick, "--together", "2", "--out", str(folder))
    assert (status, "begun with together = 1, and this is 2" in err) == (2, True)
    state = folder / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-9])
    status, _, err = run("show", str(folder), model=False)
    assert (status, len(err.splitlines())) == (2, 1)
    back = ("--on-collapse", "roll back", "--most-spectrum", "0.001", "--every", "1", "--out", str(tmp_path / "back"))
    status, _, err = run("edit", "--facts", str(counterfact), *quick, *back)
    assert (status, "none of the 2 facts is written: the run went back to its start" in err) == (2, True), err


def test_a_sequence_takes_c_and_g_from_text_for_as_long_as_it_goes_on(run, counterfact, text, tmp_path):
    folder = ("--facts", str(counterfact), "--out", str(tmp_path / "run"))
    quick = ("--layer", "1", "--steps", "2", "--prefixes", "none", "--editor", "sequential", "--sequence")
    assert run("edit", *folder, *quick, "--text", str(text), "--limit", "1")[0] == 0
    status, _, err = run("edit", *folder, *quick)
    assert (status, "begun with another C or other prefixes" in err) == (2, True), err
    status, out, _ = run("edit", *folder, *quick, "--text", str(text), "--take-out", "0")
    assert (status, "1 of 2 facts are written" in out) == (0, True)


def test_c_of_text_is_of_every_block_that_is_written(run, text, tmp_path):
    path = tmp_path / "edit.safetensors"
    spread = ("--editor", "memit", "--layers", "0,1", "--guard", "warn", "--steps", "2", "--a", "10")
    assert run(*FACT_OPTIONS, *spread, "--text", str(text), "--out", str(path))[0] == 0
    made = edits.load(path).details
    assert [each["layer"] for each in made["moments"]] == [0, 1]
    assert made["moment"]["source"].startswith("texts ")
    (published := tmp_path / "C.npz").touch()
    status, _, err = run(*FACT_OPTIONS, *spread, "--moment", str(published))
    assert (status, "--moment gives C of one block, and the change is spread over 2" in err) == (2, True), err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--editor", "memit", "--rounds", "2"), "--rounds does nothing here"),
        (("--editor", "sequential", "--no-shared", "--settle", "1"), "--settle does nothing here"),
        (("--editor", "sequential", "--loose", "0", "--again", "1"), "--again does nothing here"),
        (("--editor", "sequential", "--fisher", "0", "--settle", "1"), "--settle does nothing with fisher = 0"),
        (("--editor", "sequential", "--layers", "0,1", "--rounds", "3"), "--rounds does nothing here"),
        (("--editor", "sequential", "--entries", "0.5", "--rehearsed", "7"), "--rehearsed does nothing here"),
        (("--editor", "sequential", "--rounds", "0", "--again", "1"), "--again does nothing with rounds = 0"),
        (("--editor", "memit", "--take-out", "1"), "--take-out is of editors whose change is one solve for all"),
        (
            ("--editor", "sequential", "--take-out", "1", "9"),
            "--take-out names facts by their numbers, here 0 to 1; found 9",
        ),
        (("--editor", "memit", "--no-shared"), "are of editors whose change is one solve for all"),
        (("--editor", "rome", "--sought", "unedited"), "are of editors whose change is one solve for all"),
    ],
)
def test_options_of_sequences_that_the_editor_does_nothing_with_are_errors(options, message, run, counterfact, tmp_path, monkeypatch):  # fmt: skip
    monkeypatch.setattr(extending, "attempt", lambda *args, **kwargs: pytest.fail("facts were edited"))
    status, _, err = run(
        "edit", "--facts", str(counterfact), "--sequence", "--layer", "1", "--out", str(tmp_path / "run"), *options
    )
    assert (status, message in err, len(err.splitlines())) == (2, True, 1), err


def test_learning_again_may_be_turned_off_for_any_editor(run, counterfact, tmp_path):
    quick = ("--editor", "memit", "--layer", "1", "--steps", "1", "--prefixes", "none", "--sequence", "--limit", "1")
    status, _, err = run("edit", "--facts", str(counterfact), *quick, "--settle", "0", "--rounds", "0", "--out", str(tmp_path / "run"))  # fmt: skip
    assert (status, "does nothing" in err) == (0, False), err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sequence", "--prompt-less"), "--sequence is of many facts: give --facts FILE and --out DIR"),
        (("--together", "3"), "--together is of --sequence"),
        (("--take-out", "3"), "--take-out is of --sequence"),
        (("--sequence", "--together", "0"), "together must be at least 1"),
    ],
)
def test_options_of_sequences_that_cannot_be_are_errors_before_a_model_is_loaded(options, message, run, counterfact, tmp_path, monkeypatch):  # fmt: skip
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    facts = () if "--prompt-less" in options else ("--facts", str(counterfact), "--out", str(tmp_path / "run"))
    given = [each for each in options if each != "--prompt-less"]
    status, _, err = run("edit", *facts, *given)
    assert (status, message in err) == (2, True), err


def test_edits_that_write_nothing_are_said_to(run, counterfact, tmp_path, monkeypatch):
    path, other = (tmp_path / f"{name}.safetensors" for name in ("edit", "other"))
    monkeypatch.setitem(guards.BANDS, "relative_norm", (1e3, 1e4, "nothing is"))
    status, out, _ = run(*EDIT, "--guard", "rollback", "--out", str(path))
    assert (status, "note: it has no changes, and writes nothing." in out) == (0, True)
    said = f"note on {path}: it has no changes, and writes nothing."
    assert said in " ".join(run("apply", str(path))[1].split())
    whole = tmp_path / "whole.safetensors"
    assert said in " ".join(run("compose", str(path), str(path), "--out", str(whole), model=False)[1].split())
    run(*EDIT, "--guard", "warn", "--out", str(other))
    assert run("compose", str(path), str(other), str(path), "--out", str(whole), model=False)[0] == 0
    assert edits.load(whole).parts == (edits.load(other).digest,), "what writes nothing is no part"
    status, _, err = run("compose", str(other), str(other), "--out", str(whole), model=False)
    assert (status, "an edit is written once" in err) == (2, True)
    quick = ("--layer", "1", "--steps", "1", "--prefixes", "none", "--guard", "rollback")
    status, out, err = run("edit", "--facts", str(counterfact), *quick, "--out", str(tmp_path / "run"))
    assert (status, "0 of 2 facts edited" in out, "none of the 2 facts was edited" in err) == (2, True, True)
    assert f"{PROMPT}: relative_norm" in " ".join(out.split()), "each fact's reason has a line of its own"
    status, _, err = run("edit", "--facts", str(counterfact), *quick, "--out", str(path))
    assert (status, "is a file; with --facts it is a folder" in err) == (2, True)


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


def test_a_file_without_new_targets_cannot_be_edited(run, tmp_path):
    path = tmp_path / "facts.json"
    row = {"known_id": 1, "subject": "Rome", "attribute": "Paris", "template": "{} is in the city of", "prediction": ""}
    path.write_text(json.dumps([row | {"prompt": "Rome is in the city of", "relation_id": "P1"}]))
    status, _, err = run("edit", "--facts", str(path), "--out", str(tmp_path / "run"))
    assert status == 2
    assert "no fact of" in err


# --- editors ----------------------------------------------------------------------------------------------------------

SHIFTING = '''
from dataclasses import dataclass

import torch

from mechedit.changes import Dense
from mechedit.editing import Editor, Found
from mechedit.settings import EditSettings, knob
from mechedit.weights import Weight, matrix_shape


@dataclass(frozen=True)
class ShiftSettings(EditSettings):
    layer: int = knob(0, "block whose weight is shifted")
    how_far: float = knob(0.5, "what is added to every number")
    which: str = knob("mlp.W_out", "weight that is shifted", ("mlp.W_out", "mlp.W_in"))


class Shift(Editor):
    """Adds the same to every number of a weight."""

    name = "shift"
    settings = ShiftSettings

    def find(self, model, facts, settings, prepared, state, *, progress):
        weight = Weight(settings.layer, settings.which)
        return Found([Dense(weight, torch.full(matrix_shape(model, weight), settings.how_far))], {"facts": float(len(facts))})


class Needy(Shift):
    def __init__(self, needed):
        self.needed = needed
'''
FACT_OPTIONS = EDIT[: EDIT.index("--layer")]


@pytest.fixture
def shifting(tmp_path, monkeypatch):
    """The name of an editor in a module that is not of mechedit."""
    package = tmp_path / "outside"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "shifting.py").write_text(SHIFTING)
    monkeypatch.syspath_prepend(tmp_path)
    yield "outside.shifting:Shift"
    for name in ("outside", "outside.shifting"):
        sys.modules.pop(name, None)


def test_an_editor_from_outside_has_its_own_options_and_obeys_them(run, shifting, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["edit", "--editor", shifting, "--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--how-far FLOAT what is added to every number (default: 0.5)" in shown
    assert "--which {mlp.W_out,mlp.W_in}" in shown
    assert "--guard" in shown
    assert "--clamp" not in shown
    assert "--policy" not in shown
    path = tmp_path / "edit.safetensors"
    own = ("--layer", "2", "--how-far", "0.25", "--which", "mlp.W_in", "--guard", "warn")
    status, out, _ = run(*FACT_OPTIONS, "--editor", shifting, *own, "--out", str(path))
    assert status == 0
    assert "shift in" in out
    assert "(0: as before); facts 1" in " ".join(out.split()), "its own numbers are shown"
    edit = edits.load(path)
    (change,) = edit.changes
    assert (edit.editor, str(change.weight), change.shape) == ("shift", "mlp.W_in of block 2", (32, 128))
    assert change.dense().unique().tolist() == [0.25]
    with pytest.raises(SystemExit):
        run(*FACT_OPTIONS, "--editor", shifting, "--clamp", "1")
    assert "unrecognized arguments: --clamp 1" in capsys.readouterr().err


def test_fine_tuning_has_its_own_options_and_obeys_them(run, tmp_path):
    path = tmp_path / "edit.safetensors"
    own = ("--layer", "2", "--steps", "3", "--learning-rate", "0.01", "--norm-bound", "0.015", "--stop-at", "0")
    status, out, _ = run(
        *FACT_OPTIONS, "--editor", "ft-l", *own, "--out", str(path), "--json", str(tmp_path / "e.json")
    )
    assert (status, "ft-l in" in out) == (0, True)
    edit = edits.load(path)
    (change,) = edit.changes
    assert (edit.editor, change.kind, change.weight.name, change.weight.layer) == ("ft-l", "dense", "mlp.W_out", 2)
    assert float(change.dense().abs().max()) == pytest.approx(0.015), "three steps of 0.01 are held at the bound"
    assert len(edit.details["losses"]) == 4, "before each of three steps, and at the end"
    assert edit.after["p_new"] > edit.before["p_new"]
    record = json.loads((tmp_path / "e.json").read_text())
    assert (record["editor"], record["settings"]["norm_bound"]) == ("ft-l", 0.015)
    folder = tmp_path / "many"
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps([{"prompt": PROMPT, "subject": "The Space Needle", "target_new": "Paris"}]))
    status, out, _ = run("edit", "--facts", str(facts), "--editor", "ft-l", *own, "--out", str(folder))
    assert (status, "1 of 1 facts edited" in out) == (0, True)
    (listed,) = json.loads((folder / "edits.json").read_text())
    assert edits.load(units.read(folder, listed["unit"])).digest == edit.digest, "a run of many finds what one edit is"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "no editor is called 'nothing'; there are rome, rome-identity, rome-random-layer, rome-random-key, ft, ft-l, attention-edit"),
        ("no.such.module:Editor", "the editor no.such.module:Editor cannot be imported: No module named"),
        ("mechedit.editors.rome:Rum", "the editor mechedit.editors.rome:Rum cannot be imported"),
        ("mechedit.facts:Fact", "mechedit.facts:Fact is no editor: it has no name, settings, bands"),
        ("outside.shifting:Needy", "the editor outside.shifting:Needy cannot be made without arguments"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["edit", "evaluate", "sweep", "tune"])
def test_an_unknown_editor_ends_in_one_line(command, name, message, run, counterfact, shifting, tmp_path, monkeypatch):  # fmt: skip
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    status, out, err = run(command, "--facts", str(counterfact), "--editor", name, "--out", str(tmp_path / "x"))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("mechedit: ")
    assert message in err


@pytest.mark.parametrize("command", ["edit", "sweep", "tune"])
def test_only_an_evaluation_can_be_without_an_editor(command, run, counterfact, tmp_path):
    status, out, err = run(command, "--facts", str(counterfact), "--editor", "none", "--out", str(tmp_path / "x"))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "no editor is called 'none'" in err


def test_a_policy_stands_for_fields_and_a_field_goes_before_it(run, tmp_path):
    def settings(*options):
        path = tmp_path / "edit.safetensors"
        assert run(*EDIT, "--guard", "warn", *options, "--out", str(path))[0] == 0
        own = edits.load(path).settings
        return own["direction"], own["inserted"], own["shares"], own["stop"]

    assert settings("--policy", "r-rome") == ("averaged", "averaged", "whole", "published")
    assert settings("--policy", "p-rome", "--stop", "target") == ("prompt", "prompt", "whole", "target")
    assert settings() == ("averaged", "averaged", "own", "target")


@pytest.mark.parametrize(("search", "prompts", "leave"), [("quick", 11, True), ("few", 5, True), ("whole", 0, False)])
def test_a_search_goes_by_name(run, tmp_path, search, prompts, leave):
    path = tmp_path / "edit.safetensors"
    assert run(*EDIT, "--guard", "warn", "--search", search, "--out", str(path))[0] == 0
    own = edits.load(path).settings
    assert (own["sought_with"], own["leave_learnt"]) == (prompts, leave)


def test_c_is_of_editors_that_solve_with_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    for editor in ("ft", "rome-identity"):
        status, _, err = run(*FACT_OPTIONS, "--editor", editor, "--moment", "C.safetensors")
        assert status == 2
        assert (
            f"--text and --moment give ROME and the editors of many facts their C; the editor {editor} takes none"
            in err
        )


def test_a_whole_matrix_is_exported_as_an_adapter_of_a_lower_rank_with_the_error_that_is_left(run, tmp_path):
    path, folder = tmp_path / "edit.safetensors", tmp_path / "adapter"
    own = ("--layer", "1", "--steps", "3", "--learning-rate", "0.01")
    assert run(*FACT_OPTIONS, "--editor", "ft", *own, "--out", str(path))[0] == 0
    assert run("export", str(path), "--adapter", "--rank", "2", "--out", str(folder))[0] == 0
    (change,) = edits.load(path).changes
    singular = torch.linalg.svdvals(change.dense())
    assert int((singular > 1e-6 * singular[0]).sum()) > 2, "else nothing is approximated"
    tensors = load_file(folder / "adapter_model.safetensors")
    (A,), (B,) = ([each for name, each in tensors.items() if side in name] for side in ("lora_A", "lora_B"))
    assert (A.shape, B.shape) == ((2, 128), (32, 2))
    left = float((change.dense() - (B @ A).T.double()).norm()) / change.norm
    best = float(singular[2:].norm() / singular.norm())  # no matrix of rank 2 comes closer (Eckart and Young)
    assert left == pytest.approx(best, rel=1e-4)
    (error,) = json.loads((folder / "mechedit.json").read_text())["errors"].values()
    assert error == pytest.approx(best)
    for wrong in (("--rank", "2"), ("--adapter", "--rank", "0")):
        status, _, err = run("export", str(path), *wrong, "--out", str(tmp_path / "other"))
        assert (status, "--rank N, at least 1, is of --adapter" in err) == (2, True)


def test_an_editor_of_the_current_folder_is_found(tmp_path, monkeypatch, capsys):
    (tmp_path / "of_mine.py").write_text(SHIFTING)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["edit", "--editor", "of_mine:Shift", "--help"])
    sys.modules.pop("of_mine", None)
    assert stopped.value.code == 0
    assert "--how-far" in capsys.readouterr().out


def test_saved_edits_name_their_model(load):
    plain = hand_made.edit_of(load("gpt2"), hand_made.rank_one(load("gpt2")))
    ours, other, folder = (replace(plain, origin={**plain.origin, "name": name}) for name in ("organism", "gemma-3-270m", "mine"))  # fmt: skip
    assert model_of([ours, ours]) == "organism"
    assert model_of([folder]) == "gemma-3-270m", "nobody knows where the folder is"
    with pytest.raises(UsageError, match="of gemma-3-270m and organism; name the model with --model"):
        model_of([ours, other])
