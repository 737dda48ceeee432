"""Files whose contents somebody chose: what cannot be is refused in one line, by every command that reads it, and nothing crashes."""

from __future__ import annotations

import copy
import dataclasses
import inspect as source
import json
import pkgutil
import struct
from importlib import import_module

import jaxtyping
import numpy as np
import pytest
import torch

import mechedit
from mechedit import cli, edits, files
from mechedit.editors import edit, named, rome
from mechedit.moments import Moment
from mechedit.settings import MomentSettings, RomeSettings, TraceSettings
from mechedit.tracing import Trace, severing, trace
from tests.conftest import FACT, widen_bands
from tests.hand_made import edit_of, low_rank, rank_one, some_rows

pytestmark = pytest.mark.anywhere

ODD = (None, True, -1, 0.9, 10**400, float("nan"), "", "\x1b]52;c;AAAA\x07\n\u202e[/b]", [], [[]], {}, {"a": {"b": [1]}}, "x" * 5000)  # fmt: skip
TRIED = 60  # of about 1,200 for each kind of file


@pytest.fixture(scope="module")
def every_kind(load, tmp_path_factory):
    """A file of each kind that people pass on, with the format it has."""
    model, folder = load("gpt2"), tmp_path_factory.mktemp("kinds")
    changes = (rank_one(model), some_rows(model, 2, "mlp.W_out"), low_rank(model, 1, "attn.W_Q"))
    edits.save(edit_of(model, *changes, state={"seen": torch.ones(3)}), folder / "edit.safetensors")
    settings = TraceSettings(draws=2, kinds=("mlp",))
    trace(model, FACT, settings).save(folder / "trace.safetensors")
    severing.severed(model, FACT, settings).save(folder / "severed.safetensors")
    C = torch.eye(128, dtype=torch.float64)
    Moment.of(model, 1, C, 200, "a text", MomentSettings(tokens=200)).save(folder / "moment.safetensors")
    return {path.stem: (path, 2 if path.stem == "edit" else 1) for path in folder.iterdir()}


def places(value, at=()):
    """Where something stands in a JSON value, the value itself left out."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*at, key)
        yield from places(each, (*at, key))


def spoilt(record, place, value):
    """The record with something else in one place; without it where `value` is `places`."""
    whole = copy.deepcopy(record)
    inner = whole
    for key in place[:-1]:
        inner = inner[key]
    if value is places:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return whole


@pytest.mark.parametrize("what", ["edit", "trace", "severed", "moment"])
def test_a_record_with_anything_anywhere_is_shown_or_refused_in_one_line(
    what, every_kind, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own checks, which users do not have
    path, form = every_kind[what]
    tensors, record = files.read(path, what, form)
    tried = [(place, value) for place in places(record) for value in (*ODD, places)]
    for index, (place, value) in enumerate(tried[:: max(1, len(tried) // TRIED)]):
        forged = files.write(tmp_path / "forged.safetensors", what, tensors, spoilt(record, place, value), form)
        status = cli.main(["inspect", str(forged)])
        out, err = capsys.readouterr()
        assert (status, len(err.splitlines())) in ((0, 0), (2, 1)), (place, value, err)
        assert not any(character in out + err for character in "\x1b\x07\u202e"), (index, place)


@pytest.mark.parametrize("what", ["edit", "trace", "severed", "moment"])
def test_tensors_of_any_kind_in_any_place_are_taken_or_refused_in_one_line(
    what, every_kind, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    path, form = every_kind[what]
    tensors, record = files.read(path, what, form)
    odd = [
        torch.zeros(()),
        torch.zeros(0),
        torch.zeros(0, 1 << 40),
        torch.zeros(1 << 40, 0),
        torch.ones(3, 3, dtype=torch.int8),
    ]
    odd += [
        torch.ones(3, dtype=torch.bool),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3).to(torch.float8_e4m3fn),
    ]
    odd += [torch.full((3, 3), float("nan")), torch.zeros(2, 3, 4, 5)]
    for name in tensors:
        for value in (*odd, tensors[name].to(torch.int8), tensors[name].to(torch.complex64), None):
            others = {each: tensor for each, tensor in tensors.items() if each != name or value is not None}
            if value is not None:
                others[name] = value
            forged = files.write(tmp_path / "forged.safetensors", what, others, record, form)
            status = cli.main(["inspect", str(forged)])
            err = capsys.readouterr().err
            assert (status, len(err.splitlines())) in ((0, 0), (2, 1)), (name, value, err)
            is_factor = what == "edit" and name[0].isdigit()
            assert status == 2 or not is_factor, (name, value)


def forged_header(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


NO_RESULTS = {
    "empty": b"",
    "shorter than it says": struct.pack("<Q", 1 << 62) + b"{}",
    "no header": b"\0" * 64,
    "an enormous tensor": forged_header({"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 0]}}),
    "a tensor beyond the end": forged_header({"a": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]}}),
    "one name twice": forged_header(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "float8": forged_header({"a": {"dtype": "F8_E5M2", "shape": [1], "data_offsets": [0, 1]}}, b"x"),
    "six bits": forged_header({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, b"xxx"),
    "brackets": forged_header(b"[" * 200_000),
    "brackets in the record": forged_header({"__metadata__": {"mechedit": "[" * 200_000}}),
    "deep and well-formed": forged_header({"__metadata__": {"mechedit": "[" * 200_000 + "]" * 200_000}}),
    "no kind": forged_header({"__metadata__": {"mechedit": "{}"}}),
    "another program's kind": forged_header({"__metadata__": {"kind": "edit"}}),
    "a kind that is no word": forged_header({"__metadata__": {"mechedit": '{"kind": ["edit"]}'}}),
    "a format that is no number": forged_header({"__metadata__": {"mechedit": '{"kind": "edit", "format": true, "record": {}}'}}),
    "an unknown kind": forged_header({"__metadata__": {"mechedit": '{"kind": "\\u001b[31m", "format": 1, "record": {}}'}}),
    "a name twice in the record": forged_header({"__metadata__": {"mechedit": '{"kind": "edit", "kind": "trace"}'}}),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_RESULTS)
def test_what_is_no_result_of_mechedit_is_refused_in_one_line(name, tmp_path, capsys):
    path = tmp_path / "forged.safetensors"
    path.write_bytes(NO_RESULTS[name])
    for command in (["inspect"], ["apply"], ["merge", "--out", str(tmp_path / "out")], ["edit", "x", "--subject", "x", "--target", "y", "--moment"]):  # fmt: skip
        assert cli.main([*command, str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.isprintable()
        assert "forged.safetensors" in line


# --- what is saved can be loaded, and used -----------------------------------------------------------------------------


def test_every_editors_edit_survives_its_file(model, tmp_path, monkeypatch):
    widen_bands(monkeypatch)
    settings = rome.resolve(model, RomeSettings(layer=1, steps=2, prefixes=()))
    C = Moment.of(model, 1, torch.eye(128, dtype=torch.float64), 200, "a text", MomentSettings(tokens=200))
    ready = rome.prepare(model, settings, C)
    for name in ("rome-identity", "rome-random-key", "rome"):
        made = edit(model, FACT, named(name), settings, prepared=ready if name != "rome-identity" else None)
        back = edits.load(edits.save(made, tmp_path / f"{name}.safetensors"))
        assert back.digest == made.digest
        (written, read) = made.to_json(), back.to_json()
        (norm,), (norm_read,) = ([each.pop("norm") for each in record["changes"]] for record in (written, read))
        assert norm_read == pytest.approx(norm, rel=1e-12), "summed in another order of memory"
        assert read == written


def test_changes_that_share_memory_can_be_saved(model, tmp_path):
    change = rank_one(model)
    twice = edit_of(model, change, dataclasses.replace(change), vectors={"key": change.u, "part": change.u[:3]})
    back = edits.load(edits.save(twice, tmp_path / "twice.safetensors"))
    assert torch.equal(back.changes[0].u, change.u)
    assert torch.equal(back.changes[1].step, change.step)
    assert torch.equal(back.vectors["part"], change.u[:3])


def test_settings_of_a_file_are_settings_again(every_kind, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    settings = RomeSettings(layer=2, clamp=0.75, prefixes=((3, 1), (4, 2)))
    through = json.loads(json.dumps(dataclasses.asdict(settings)))
    assert RomeSettings(**through) == settings
    found = Trace.load(every_kind["trace"][0]).settings
    assert TraceSettings(**json.loads(json.dumps(dataclasses.asdict(found)))) == found


def test_numbers_of_numpy_and_torch_are_numbers(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    wanted = RomeSettings(layer=3, clamp=0.5, steps=4, prefixes=((3, 1),), prepend_bos=True)
    found = RomeSettings(
        layer=np.int64(3),
        clamp=np.float32(0.5),
        steps=torch.tensor(4),
        prefixes=np.array([[3, 1]]),
        prepend_bos=np.bool_(True),
    )
    assert found == wanted
    assert json.dumps(dataclasses.asdict(found)) == json.dumps(dataclasses.asdict(wanted))
    assert RomeSettings(clamp=4) == RomeSettings(clamp=4.0)
    assert json.dumps(RomeSettings(clamp=4).clamp) == "4.0", "so that both are kept under one key"


def test_numbers_of_numpy_and_torch_can_be_saved(tmp_path):
    record = {"a": np.float32(0.5), "b": torch.tensor(2), "c": np.arange(3), "d": "half \ud800"}
    path = files.write(tmp_path / "a.safetensors", "training", {}, record)
    assert files.read(path, "training")[1] == {"a": 0.5, "b": 2, "c": [0, 1, 2], "d": "half \ud800"}


def test_results_are_compared_without_an_error():
    """Whatever holds a tensor is equal to itself alone: comparing tensors gives tensors, of which no truth can be told."""
    held = []
    for info in pkgutil.walk_packages(mechedit.__path__, "mechedit."):
        if "__main__" in info.name:
            continue
        for _, kind in source.getmembers(
            import_module(info.name), lambda each: isinstance(each, type) and dataclasses.is_dataclass(each)
        ):
            said = [str(each.type) for each in dataclasses.fields(kind)]
            if kind.__module__.startswith("mechedit") and any("Tensor" in each or "ndarray" in each for each in said):
                held.append(kind.__name__)
                assert "Callable" in str(said) or kind.__eq__ is object.__eq__, kind
    assert {"Trace", "Edit", "Moment", "LowRank", "Average"} <= set(held)


def test_two_readings_of_a_file_are_compared(every_kind):
    for load, what in ((edits.load, "edit"), (Trace.load, "trace"), (Moment.load, "moment")):
        first, second = (load(every_kind[what][0]) for _ in range(2))
        assert first == first
        assert first != second
        assert len({first, second}) == 2
