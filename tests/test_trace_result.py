from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from mechedit import files, models, scoring
from mechedit.settings import TraceSettings
from mechedit.tracing import Trace, trace

SMALL = TraceSettings(draws=3, window=2)


def test_a_trace_survives_its_file(model, fact, tmp_path):
    found = trace(model, fact, SMALL)
    loaded = Trace.load(found.save(tmp_path / "trace.safetensors"))
    assert {name: value for name, value in vars(loaded).items() if name not in {"draws", "effects", "seconds"}} == {
        name: value for name, value in vars(found).items() if name not in {"draws", "effects", "seconds"}
    }
    for kind in SMALL.kinds:
        assert torch.equal(loaded.effects[kind], found.effects[kind])
        assert torch.equal(loaded.draws[kind], found.draws[kind])


def test_a_trace_says_what_the_model_says_in_its_answers_place(model, fact, tmp_path):
    found = trace(model, fact, SMALL)
    said, _, p = scoring.top(model, fact.prompt, 1)[0]
    assert found.notes == (f"the model's first answer is not 'Seattle', but {said!r} with P = {p:.3f}.",)
    own = trace(model, replace(fact, target_true=None), SMALL)
    assert (own.said, own.notes) == (None, ())
    assert Trace.load(own.save(tmp_path / "own.safetensors")).said is None


def test_the_json_has_the_fields_that_readers_rely_on(model, fact):
    record = json.loads(json.dumps(trace(model, fact, SMALL).to_json()))
    wanted = {
        "model",
        "prompt",
        "tokens",
        "subject_range",
        "answer",
        "answer_ids",
        "p_clean",
        "p_corrupted",
        "effects",
        "settings",
        "versions",
        "seconds",
    }
    assert wanted <= record.keys()
    assert len(record["effects"]["resid"]) == 4
    assert len(record["effects"]["resid"][0]) == len(record["tokens"])
    assert record["versions"]["torch"] == torch.__version__
    assert record["origin"]["weights"] == models.identity(model).weights


def test_another_kind_of_file_is_no_trace(model, fact, tmp_path):
    path = files.write(tmp_path / "x.safetensors", "edit", {"u": torch.zeros(1)}, {})
    with pytest.raises(files.FileError, match="not a mechedit trace: it is a mechedit edit"):
        Trace.load(path)
    path = files.write(tmp_path / "y.safetensors", "trace", {"u": torch.zeros(1)}, {})
    with pytest.raises(
        files.FileError, match="a trace that lacks something, or has what is not known: it lacks prompt"
    ):
        Trace.load(path)
