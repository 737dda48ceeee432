"""The commands show, compare and status, on results that the other commands wrote."""

from __future__ import annotations

import io
import json
import math
import re
import shutil

import pytest
import torch
from rich.console import Console

from mechedit import applying, cli, edits, files, models
from mechedit.cli.sequencing import LOOKS, show_sequence
from mechedit.edits import Measured
from mechedit.rank_one import RankOneEdit
from mechedit.runs import units
from mechedit.runs.sequence import Entry, Sequence, as_edit
from mechedit.weights import Weight
from tests import viewed
from tests.command_line import QUICK, TRACE, command_line
from tests.test_cli_evaluating import RECORDS

pytestmark = pytest.mark.anywhere


@pytest.fixture
def run(folder, capsys, monkeypatch):
    return command_line(folder, capsys, monkeypatch)


@pytest.fixture
def two(run, tmp_path):
    """Folders of an evaluation without an editor and of one with, of three records and of two of them."""
    path = tmp_path / "records.json"
    third = RECORDS[0] | {"subject": "Berlin", "prompt": "Berlin is located in the city of", "id": "Berlin"}
    path.write_text(json.dumps([*RECORDS, third]))
    out = [tmp_path / "none", tmp_path / "rome"]
    assert run("evaluate", "--facts", str(path), "--editor", "none", "--out", str(out[0]))[0] == 0
    assert run("evaluate", "--facts", str(path), "--limit", "2", "--out", str(out[1]), *QUICK)[0] == 0
    return out


@pytest.fixture
def alone(monkeypatch):
    """Nothing may load a model from here on."""

    def forbid():
        monkeypatch.setattr(models, "load", lambda *args, **named: pytest.fail("loaded"))
        monkeypatch.setenv("COLUMNS", "80")

    return forbid


def test_an_evaluation_is_shown_as_it_was_when_it_ended_and_fits_80_columns(run, two, alone, tmp_path):
    alone()
    for place in (two[1], two[1] / "results.parquet", two[1] / "summary.json"):
        status, said, err = run("show", str(place), "--json", str(tmp_path / "shown.json"), model=False)
        assert (status, err) == (0, "")
        for words in (
            "2 records",
            "before",
            "after",
            "ES, %",
            "relative_norm",
            "docs/measuring.md says what each name",
        ):
            assert words in said
        assert "Intervals over 2 records are wide" in said
        assert "More records narrow them." in " ".join(said.split())
        assert max(len(line) for line in said.splitlines() if not line.startswith("  /")) <= 80, "but for paths"
    assert json.loads((tmp_path / "shown.json").read_text()) == json.loads((two[1] / "summary.json").read_text())


def test_the_units_of_a_run_are_listed_shown_and_written_as_files(run, two, alone, tmp_path):
    alone()
    status, said, _ = run("show", str(two[1] / "edits"), model=False)
    assert status == 0
    assert "2 of 2" in said
    assert "edit: Rome is located in the city of -> London" in " ".join(re.sub("[│┃]", " ", said).split())
    status, said, _ = run("show", str(two[1] / "edits"), "--unit", "1", model=False)
    assert (status, "P(London)" in said) == (0, True)
    status, said, _ = run("show", str(two[1] / "edits"), "--export", str(tmp_path / "files"), model=False)
    assert status == 0
    (first, second) = sorted((tmp_path / "files").iterdir())
    assert {edits.load(path).fact["subject"] for path in (first, second)} == {"Rome", "The Eiffel Tower"}
    status, said, _ = run("show", str(first), model=False)
    assert (status, "before" in said) == (0, True)
    status, said, _ = run("show", str(two[1] / "scores"), "--unit", "0", model=False)
    assert (status, "scores" in said) == (0, True)
    status, _, err = run("show", str(two[1] / "edits"), "--unit", "none", model=False)
    assert (status, err.count("\n"), "has 2 units" in err) == (2, 1, True)
    both = ("--export", str(tmp_path / "more"), "--json", str(tmp_path / "shown.json"))
    status, _, err = run("show", str(two[1] / "edits"), *both, model=False)
    assert (status, err.count("\n"), "give one of the two" in err) == (2, 1, True)
    assert not (tmp_path / "more").exists()


def test_a_folder_whose_units_are_in_the_cache_or_below_is_shown_as_far_as_they_are_there(run, two, alone, tmp_path):
    alone()
    status, said, err = run("show", str(two[1] / "before"), "--json", str(tmp_path / "shown.json"), model=False)
    assert (status, err, "2 of 2" in said) == (0, "", True)
    assert list(json.loads((tmp_path / "shown.json").read_text())) == ["runs"]
    outer = tmp_path / "outer"
    shutil.copytree(two[1] / "edits", outer)
    shutil.copytree(two[1] / "scores", outer / "a")
    shutil.rmtree(outer / "a" / "units")
    status, said, _ = run("show", str(outer), "--json", str(tmp_path / "shown.json"), model=False)
    found = json.loads((tmp_path / "shown.json").read_text())
    assert [(each["folder"], each["finished"]) for each in found["runs"]] == [("a", 0), (str(outer), 2)]
    assert (status, found["units"]) == (0, units.names(two[1] / "edits"))
    assert "Rome is located in the city of -> London" in " ".join(re.sub("[│┃]", " ", said).split())


def test_a_trace_is_shown_as_it_was_traced(run, alone, tmp_path):
    status, _, _ = run(*TRACE, "--out", str(tmp_path / "t"))
    assert status == 0
    alone()
    status, said, err = run("show", str(tmp_path / "t" / "trace.safetensors"), model=False)
    assert (status, err) == (0, "")
    assert "early site" in said
    assert "by token and layer" in said


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[1]", "is no result that can be shown"),
        ("b.json", "{", "is no result that can be shown"),
        ("c.json", '{"correlation_with_effect": 5}', "is no result that can be shown"),
        ("d.safetensors", "x", "is truncated or no safetensors file"),
        ("e.parquet", "x", "holds no finished evaluation"),
        ("results.parquet", "x", "is damaged"),
    ],
)
def test_what_cannot_be_shown_is_told_in_a_line(name, content, message, run, tmp_path):
    (tmp_path / name).write_text(content)
    status, out, err = run("show", str(tmp_path / name), model=False)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    status, _, err = run("show", str(tmp_path / "nothing"), model=False)
    assert (status, "does not exist" in err) == (2, True)


def test_a_folder_of_nothing_is_told_in_a_line(run, tmp_path):
    status, _, err = run("show", str(tmp_path), model=False)
    assert (status, err.count("\n"), "is nothing that can be shown" in err) == (2, 1, True)


def test_a_folder_of_files_names_those_that_are_shown(run, two, tmp_path):
    place = tmp_path / "mixed"
    place.mkdir()
    viewed.trace().save(place / "trace.safetensors")
    edits.save(viewed.edit(), place / "edit.safetensors")
    (place / "broken.safetensors").write_text("x")
    status, _, err = run("show", str(place), model=False)
    here = "edit.safetensors, trace.safetensors"
    assert (status, err) == (2, f"mechedit: {place} is nothing that can be shown: name a file in it ({here}).\n")
    shutil.copytree(two[1] / "edits", place / "runs")  # as the demo keeps its trace
    status, said, _ = run("show", str(place), model=False)
    assert (status, f"files in it that are shown by their names: {here}" in " ".join(said.split())) == (0, True)
    for number in range(9):
        shutil.copy(place / "edit.safetensors", place / f"{number}.safetensors")
    assert files.names(place, ("edit",)) == f"{', '.join(f'{number}.safetensors' for number in range(8))}, …"


def fact(subject, before=None, after=None):
    """A fact of a made edit, with P of both targets where it was measured."""
    own = {"prompt": f"{subject} is in", "subject": subject, "target_new": "Paris", "target_true": "Seattle"}
    return Measured(own, *({"p_new": p, "p_true": 1 - p} if p else {} for p in (before, after)))


def made():
    """Edits of every kind that `show` may be given, by name."""
    one = viewed.edit(reasons=(), seconds=math.nan)
    two = viewed.edit(facts=(fact("Rome", 0.25, 0.5), fact("Oslo", 0.125, 0.75)), reasons=(), changes=(RankOneEdit(4, torch.ones(4), torch.full((5,), 2.0), 2.0),))  # fmt: skip
    refused = viewed.edit(changes=(), report={}, facts=(fact("Bonn"), fact("Kyiv")), reasons=("Bonn is not asked about",), settings={})  # fmt: skip
    facts = [{"subject": f"Subject {number}", "template": "{} is in", "relation": "", "target_new": "Paris"} for number in range(22)]  # fmt: skip
    entries = tuple(Entry(own, 0, -1 if number == 5 else number) for number, own in enumerate(facts))
    running = Sequence("sequential", {"layer": 1}, viewed.ORIGIN, "", entries=entries, totals={Weight(1, "mlp.W_out"): torch.full((4, 4), 0.5)})  # fmt: skip
    return {
        "one": one,
        "left a band": viewed.edit(),
        "rolled back": viewed.edit(changes=(), facts=(fact("Rome", 0.25, 0.25),)),
        "two": two,
        "refused": refused,
        "composed": applying.compose(one, two),
        "composed of refused": applying.compose(refused, viewed.edit(seconds=2.0)),
        "sequence": as_edit(running),
    }


NUMBERS = " (150.0% of the weight's); perplexity of other text x 1.000 (1: as before); KL after '"
SHOWN = {
    "one": ["The Space Needle is in | before | after", "P(Paris) | 0.0100 | 0.8000", "P(Seattle) | 0.9000 | 0.1000", f"rome: mlp.W_out of layer 3, update norm 1{NUMBERS}The Space Needle is a' 0.10 (0: as before). docs/editing.md says what these are"],
    "left a band": ["rome in 1.5 s: mlp.W_out of layer 3, update norm 1", "out of its band: relative_norm = 1.5 is above 1"],
    "rolled back": ["P(Paris) | 0.2500 | 0.2500", "rome in 1.5 s: no weight of layer 3, update norm 1", "out of its band: relative_norm = 1.5 is above 1", "note: it has no changes, and writes nothing."],
    "two": ["prompt | new target | P before | P after", "Rome is in | Paris | 0.2500 | 0.5000", "Oslo is in | Paris | 0.1250 | 0.7500", f"rome in 1.5 s: mlp.W_out of layer 4, update norm 1{NUMBERS}X is a' 0.10"],
    "refused": ["Bonn is in -> Paris, and 1 more: not edited; Bonn is not asked about"],
    "composed": ["The Space Needle is in | Paris | 0.0100 | 0.8000", "Oslo is in | Paris | 0.1250 | 0.7500", "probabilities are those of each part alone, measured when it was found", "composed of 2 edits: mlp.W_out of layers 3, 4, update norm 10. docs"],
    "composed of refused": ["Bonn is in | Paris | - | -", "The Space Needle is in | Paris | 0.0100 | 0.8000", "composed of 2 edits in 3.5 s: mlp.W_out of layer 3, update norm 4.47. docs", "of a part: Bonn is not asked about", "of a part: relative_norm = 1.5 is above 1"],
    "sequence": ["prompt | new target", "Subject 0 is in | Paris", "Subject 20 is in | Paris", "and 1 more", "composed of 21 edits: mlp.W_out of layer 1, update norm 2. docs"],
}  # fmt: skip


@pytest.mark.parametrize("name", list(SHOWN))
def test_an_edit_of_any_kind_is_shown_as_much_as_it_says(name, run, tmp_path):
    path = edits.save(made()[name], tmp_path / "edit.safetensors")
    status, said, err = run("show", str(path), model=False)
    assert (status, err) == (0, "")
    plain = " ".join(re.sub("[│┃]", "|", said).split())
    for words in SHOWN[name]:
        assert words in plain, said
    assert ("not edited" in plain, "nan" in plain) == (name == "refused", False)
    assert ("of a part" in plain) == (name == "composed of refused")
    assert ("out of its band" in plain) == (name in ("left a band", "rolled back"))
    assert ("Subject 5 " in plain, "Subject 21 " in plain) == (False, False)


def test_a_sweep_and_settings_that_were_tuned_are_shown(run, tmp_path):
    sweep = {"layers": [3, 4], "tokens": ["last"], "mean": {"S": [[0.5], [None]]}, "n": 7, "correlation_with_effect": {"S": {"mean": 0.25}}}  # fmt: skip
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    status, said, _ = run("show", str(tmp_path), model=False)
    assert (status, "S by layer" in said, "0.25 (7 facts)" in said) == (0, True, True)
    row = {"layer": 3, "tried": {"clamp": 2.0}, "ES": 90.0, "PS": 80.0, "NS": 70.0, "S": 79.0, "within": 1.0, "n": 5}
    tuned = {"editor": "rome", "settings": {"layer": 3, "clamp": 2.0}, "site": {}, "rows": [row]}
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tuned.json").write_text(json.dumps(tuned))
    status, said, _ = run("show", str(tmp_path / "t"), model=False)
    assert (status, "proposed: layer 3, clamp 2.0" in said) == (0, True)


def test_evaluations_are_compared_on_their_common_records(run, two, alone, tmp_path):
    alone()
    command = ("compare", *map(str, two))
    status, said, err = run(*command, "--json", str(tmp_path / "compared.json"), model=False)
    assert (status, err) == (0, "")
    assert "2 records, with the numbers of counterfact, are common to all (of 3, 2)" in " ".join(said.split())
    assert max(map(len, said.splitlines())) <= 80 + len(str(tmp_path))
    record = json.loads((tmp_path / "compared.json").read_text())
    (ES,) = [each for each in record["overall"] if each["name"] == "ES"]
    _, after = (json.loads((path / "summary.json").read_text())["stages"] for path in two)
    assert ES["second"] == after["after"]["ES"]["mean"]
    assert ES["first"] == after["before"]["ES"]["mean"], "of the two records that both have"
    assert record["stages"] == ["before", "after"]
    status, _, err = run("compare", str(two[0]), model=False)
    assert (status, "takes two folders or more" in err) == (2, True)
    status, _, err = run(*command, "--stage", "at the end", model=False)
    assert (status, "has no stage 'at the end'" in err) == (2, True)


def test_an_evaluation_in_which_nothing_was_edited_is_written_and_does_not_end_well(run, tmp_path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps(RECORDS))
    for mode in ("independent", "batch", "sequential"):
        out = tmp_path / mode
        status, said, err = run("evaluate", "--facts", str(path), "--editor", "ft", "--mode", mode, "--layer", "1", "--steps", "2", "--learning-rate", "1e300", "--out", str(out))  # fmt: skip
        assert status == 2
        assert "2 records have a note" in said
        assert re.fullmatch(r"mechedit: no record of 2 was edited: .* The table is in .* all the same\.\n", err)
        assert (out / "results.parquet").is_file()


def test_notes_of_an_evaluation_are_shown(run, tmp_path):
    path = tmp_path / "records.json"
    odd = RECORDS[1] | {"paraphrases": ["a city and " * 60 + "Rome is"]}
    path.write_text(json.dumps([RECORDS[0], odd]))
    status, said, _ = run("evaluate", "--facts", str(path), "--editor", "none", "--out", str(tmp_path / "run"))
    assert status == 0
    said = " ".join(said.split())
    assert "1 record has a note; the first is about Rome:" in said
    assert "must fit the context" in said


def test_the_facts_of_an_average_are_not_printed_one_by_one(capsys, tmp_path):
    (tmp_path / "average.json").write_text(json.dumps({"n": 3, "facts": [{"subject": "Rome"}]}))
    status = cli.main(["show", str(tmp_path / "average.json")])
    out = capsys.readouterr().out
    assert (status, "Rome" in out, " 3" in out) == (0, False, True)


def test_a_sequence_names_what_is_not_written_and_what_does_not_stand():
    facts = [{"subject": f"Subject {number}", "template": "{} is in", "relation": "", "target_new": "Paris"} for number in range(30)]  # fmt: skip
    entries = tuple(Entry(own, 0, *((-1, "taken out again") if number == 5 else (number,))) for number, own in enumerate(facts))  # fmt: skip
    look = {"edits": 30, **dict.fromkeys(LOOKS), "success": 0.25, "row": {str(number): number < 7 for number in range(30)}, "out": ["success"]}  # fmt: skip
    console = Console(file=io.StringIO(), width=200)
    record = show_sequence(console, Sequence("sequential", {}, viewed.ORIGIN, "", entries=entries, looks=(look,)))
    said = console.file.getvalue()
    assert "29 of 30 facts are written" in said
    assert "1 not: taken out again" in said
    assert "  5: 'Subject 5 is in' -> 'Paris': taken out again" in said
    assert said.count("written, and not above its true target at the last look") == 19
    assert "  25: " in said
    assert "  26: " not in said
    assert "and 4 more (--json FILE has all)" in said
    assert "it broke by edit 30: success" in said
    assert [each["stands"] for each in record["edits"]][4:8] == [True, None, True, False]
