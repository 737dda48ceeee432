"""The commands of a study, with a model."""

from __future__ import annotations

import json

import pytest

from mechedit import study
from tests.command_line import command_line
from tests.participants import send, shown

pytestmark = pytest.mark.anywhere

RECORDS = [
    {
        "subject": name,
        "template": "{} is located in the city of",
        "target_true": "Seattle",
        "target_new": "Paris",
        "generations": [f"{name} is best known for", f"{name} is near"],
    }
    for name in ("The Eiffel Tower", "The Space Needle", "The Louvre")
]
FEW = ("--scenarios", "2", "--raters", "2", "--pages", "2", "--tokens", "14")


def test_the_commands_make_read_and_report(folder, capsys, monkeypatch, tmp_path):
    run = command_line(folder, capsys, monkeypatch)
    records, out = tmp_path / "records.json", tmp_path / "study"
    records.write_text(json.dumps(RECORDS))
    make = ("study", "make", "--facts", str(records), *FEW, "--editors", "rome-identity,unedited", "--out", str(out), "--long-form", "1")  # fmt: skip
    status, _, err = run(*make)
    assert status == 2  # no preset has a layer for this model
    assert "layer" in err
    make = (*make[:-4], "--editors", "told,unedited", "--out", str(out))
    status, _, err = run(*make, "--top-k", "10000")
    assert (status, err.count("\n"), "top_k must be from 1 to the" in err, out.exists()) == (2, 1, True, False)
    status, said, err = run(*make)
    assert (status, err) == (0, "")
    assert "2 forms of 2 pages: 2 facts, 2 raters each, texts by told, unedited" in said
    texts = study.read_scenarios(out / "texts.json")
    for each in texts:
        assert each.statement.endswith(" is located in the city of Paris.")
        assert all(text.startswith(each.statement.split(" is")[0] + " is") for text in each.texts.values())
    monkeypatch.setattr("mechedit.generation.continuations", lambda *args, **named: pytest.fail("written again"))
    before = [path.read_bytes() for path in study.load(out).files()]
    assert run(*make)[0] == 0
    made = study.load(out)
    assert [path.read_bytes() for path in made.files()] == before
    for number, form in enumerate(made.files()):
        data = shown(form)
        body = {
            "study": data["study"],
            "form": data["form"],
            "long_form": [],
            "comment": "fine\x1b[31m",
            "finished": True,
        }
        body["pages"] = [{"consistency": ["A", "B"], "fluency": ["B", "A"], "seconds": 9}] * 2
        send(form, body, tmp_path / "in" / f"{number}.json")
    (tmp_path / "in" / "stray.json").write_text("{}")
    status, said, err = run("study", "read", str(out), str(tmp_path / "in"), "--json", str(tmp_path / "read.json"), model=False)  # fmt: skip
    assert status == 2
    assert "1 of 3 files were refused; the 2 others are kept" in err
    assert "malformed: it lacks kind" in said
    assert [len(each) for each in json.loads((tmp_path / "read.json").read_text()).values()] == [2, 1]
    status, said, _ = run("study", "report", str(out), model=False)
    assert status == 0
    for name in (
        "told / unedited",
        "2 of 2 forms came back: 4 pages",
        "Krippendorff",
        "comment: fine\\x1b[31m",
        "report.md",
    ):
        assert name in said
