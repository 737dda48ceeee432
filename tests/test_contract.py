"""What every editor must keep to: found, applied, undone, saved, composed, exported, evaluated, resumed, tuned, swept.

ROME (rank-one), solves over one block and over several, gradient steps on one weight and on several (dense), knowledge neurons (rows), telling (no weight at all), trained networks and an editor from outside the package
(low rank) pass the same tests.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import reduce
from pathlib import Path

import pytest
import torch
import transformers

from mechedit import applying, editing, edits, export, models, moments, provenance, scoring, tuning
from mechedit.benchmarks import counterfact
from mechedit.changes import by_weight, total
from mechedit.editors import named, rome
from mechedit.edits import EditError
from mechedit.runs.editing import edit_facts
from mechedit.runs.evaluating import evaluate
from mechedit.runs.shards import Shards
from mechedit.runs.sweeping import sweep
from mechedit.settings import (
    AlphaEditSettings,
    AttentionEditSettings,
    BoundedSettings,
    EvaluateSettings,
    FineTuningSettings,
    KeSettings,
    KnowledgeNeuronsSettings,
    MendSettings,
    MomentSettings,
    PmetSettings,
    RomeSettings,
    SettingsError,
    SweepSettings,
    ToldSettings,
    TuneSettings,
)
from mechedit.weights import as_matrix, value
from tests.conftest import FACT, assert_same_state, state, widen_bands
from tests.outside_editor import LogitEditor, LogitSettings
from tests.trained import checkpoint

FACTS = [
    FACT,
    replace(FACT, subject="The Eiffel Tower", target_true="Paris", target_new="London", neighbours=(FACT.prompt,)),
    replace(FACT, subject="Rome", target_new="Berlin"),
]
EDITORS = {
    "rome": RomeSettings(layer=1, steps=6, prefixes=(), guard="rollback"),
    "alphaedit": AlphaEditSettings(layers=(1, 2), steps=6, prefixes=(), c=1e-3, null=1.0, guard="rollback"),
    "pmet": PmetSettings(layer=1, steps=6, prefixes=(), a=1e-3, clamp=4.0, learning_rate=0.5, guard="rollback"),
    "ft": FineTuningSettings(layer=1, steps=6, learning_rate=5e-3, guard="rollback"),
    "ft-l": BoundedSettings(layer=1, steps=6, learning_rate=5e-3, norm_bound=0.02, guard="rollback"),
    "attention-edit": AttentionEditSettings(layer=1, steps=6, learning_rate=5e-3, norm_bound=0.02, guard="rollback"),
    "told": ToldSettings(sentence="{fact}. ", guard="rollback"),
    "kn": KnowledgeNeuronsSettings(steps=3, prefixes=((3, 2),), guard="rollback"),
    "mend": MendSettings(guard="rollback"),
    "ke": KeSettings(guard="rollback"),
    "tests.outside_editor:LogitEditor": LogitSettings(layer=1, length=4.0, guard="rollback"),
}


def settings_of(model, editor, folder):
    """The editor's settings; of one that is trained, with a network made by hand in this folder."""
    own = EDITORS[editor]
    return replace(own, checkpoint=checkpoint(model, editor, folder)) if hasattr(own, "checkpoint") else own


PLAIN = EvaluateSettings(health=False, answers=False, beside=False)


@pytest.fixture(scope="module", params=EDITORS)
def way(request, load, tmp_path_factory):
    """An editor with its settings and what it prepared."""
    model, editor = load("gpt2"), named(request.param)
    real, few = moments.estimate_layers, MomentSettings(tokens=600, context=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MECHEDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        widen_bands(patch)
        patch.setattr(moments, "estimate", lambda model, layer, **named: real(model, [layer], settings=few)[layer])
        patch.setattr(moments, "estimate_layers", lambda model, layers, **named: real(model, layers, settings=few))
        settings = editor.resolve(model, settings_of(model, request.param, tmp_path_factory.mktemp("trained")))
        yield editor, settings, editing.make_ready(model, editor, settings)


def one(model, way, fact=FACT):
    editor, settings, prepared = way
    return editing.edit(model, fact, editor, settings, prepared=prepared)


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_an_edit_is_found_and_the_model_left_alone(model, way):
    before = state(model)
    edit = one(model, way)
    assert_same_state(model, before)
    assert edit.editor == way[0].name
    assert (
        edit.after["p_new"] > 1.2 * edit.before["p_new"] or way[0].name == "told"
    )  # to a model that never learnt to listen
    with applying.edited(model, edit):
        assert scoring.score(model, [(FACT.prompt, "Paris")])[0].p == pytest.approx(edit.after["p_new"], rel=1e-5)
    assert edit.report["update_norm"] == pytest.approx(float(sum(total(own).square().sum() for own in by_weight(edit.changes).values()) ** 0.5))  # fmt: skip
    assert edit.origin["weights"] == models.identity(model).weights
    assert edit.parents == ()


def test_what_is_applied_is_written_once_and_undone_bit_for_bit(model, way):
    edit, before = one(model, way), state(model)
    applied = applying.apply(model, edit)
    written = {weight: as_matrix(weight, value(model, weight)).detach().clone() for weight in by_weight(edit.changes)}
    changed = [name for name, now in model.named_parameters() if not torch.equal(now, before[0][name])]
    changed = [name for name in changed if ".qkv." not in name]  # of which a bridge has parts of their own
    applied.undo()
    assert_same_state(model, before)
    assert len(changed) == len(written)
    for weight, own in by_weight(edit.changes).items():
        first = as_matrix(weight, value(model, weight)).detach()
        assert torch.equal(written[weight], (first.double() + total(own)).to(first))


@pytest.mark.anywhere
def test_an_edit_survives_its_file(model, way, tmp_path):
    edit = one(model, way)
    loaded = edits.load(edits.save(edit, tmp_path / "edit.safetensors"))
    assert loaded.digest == edit.digest
    told, kept = loaded.to_json(), edit.to_json()
    norm = [
        row.pop("norm") for row in (*told["changes"], *kept["changes"])
    ]  # taken of the factors anew, wherever they lie in memory
    assert norm[: len(norm) // 2] == pytest.approx(norm[len(norm) // 2 :], rel=1e-12)
    assert told == kept
    assert {name: tensor.tolist() for name, tensor in loaded.state.items()} == {name: tensor.tolist() for name, tensor in edit.state.items()}  # fmt: skip
    with applying.edited(model, edit):
        expected = weights_of(model)
    with applying.edited(model, loaded):
        assert all(torch.equal(expected[name], now) for name, now in weights_of(model).items())


@pytest.mark.anywhere
def test_edits_found_one_after_another_compose_apply_in_order_and_revert(model, way, tmp_path):
    editor, settings, prepared = way
    before, found, standing = state(model), [], applying.apply(model)
    for fact in FACTS:
        known = reduce(editor.joined, (each.state for each in found), {})
        edit = editing.edit(model, fact, editor, settings, prepared=prepared, state=known)
        assert edit.parents == tuple(each.digest for each in found)
        found.append(edits.load(edits.save(edit, tmp_path / f"{len(found)}.safetensors")))
        standing.add(found[-1])
    in_order = weights_of(model)
    standing.undo()
    assert_same_state(model, before)
    with pytest.raises(EditError, match="in the order in which they were found"):
        applying.apply(model, found[1])
    with pytest.raises(EditError, match="each on top of those before it"):
        applying.compose(found[1], found[0])
    whole = edits.load(edits.save(applying.compose(*found), tmp_path / "whole.safetensors"))
    for each in ([whole], found):
        with applying.edited(model, *each):
            assert all(torch.equal(in_order[name], now) for name, now in weights_of(model).items())
    with applying.edited(model, whole):
        applying.revert(model, whole)
        assert all(torch.allclose(now, before[0][name], atol=1e-5) for name, now in weights_of(model).items())
    assert_same_state(model, before)


def test_an_exported_checkpoint_is_the_edited_model(model, way, folder, tmp_path):
    edit = one(model, way)
    if not edit.changes:
        with pytest.raises(EditError, match="an export has weights alone"):
            export.checkpoint(model, str(folder("gpt2")), [edit], tmp_path / "edited")
        return
    export.checkpoint(model, str(folder("gpt2")), [edit], tmp_path / "edited")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "edited", dtype=torch.float32)
    tokens = torch.arange(5, 17)[None]
    with applying.edited(model, edit), torch.no_grad():
        torch.testing.assert_close(model(tokens), plain(tokens).logits, atol=1e-4, rtol=1e-4)


IN_SEQUENCE = [(name, "sequential") for name in EDITORS]
OTHERWISE = itertools.product(
    ("rome", "ft", "kn", "told", "mend"), ("independent", "batch")
)  # one for each kind of change


@pytest.mark.anywhere
@pytest.mark.parametrize(("way", "mode"), [*IN_SEQUENCE, *OTHERWISE], indirect=["way"], scope="module")
def test_it_is_evaluated_in_every_mode_and_a_stopped_run_ends_in_the_same_bytes(model, way, mode, tmp_path):
    editor, settings, prepared = way
    before, wanted = state(model), replace(PLAIN, mode=mode)

    def results(folder, progress=lambda *said: None):
        found = evaluate(model, FACTS, folder, wanted, editor, settings, prepared, progress=progress)
        return found, {path.name: path.read_bytes() for path in found.save(folder)}

    def interrupt(what, done, of):
        if what == "records after" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results(tmp_path / "cut", interrupt)
    assert_same_state(model, before)
    found, whole = results(tmp_path / "whole")
    assert results(tmp_path / "cut")[1] == whole
    assert_same_state(model, before)
    assert [row["edited"] for row in found.rows["after"]] == [1.0] * 3
    if mode == "independent":
        with applying.edited(model, one(model, way, FACTS[1])):
            (alone,) = counterfact.scores(model, FACTS[1:2])
        assert {name: found.rows["after"][1][name] for name in alone} == pytest.approx(alone, abs=1e-6, nan_ok=True)
    if mode == "batch":
        with applying.edited(model, one(model, way, FACTS)):
            together = counterfact.scores(model, FACTS)
        for row, alone in zip(found.rows["after"], together, strict=True):
            assert {name: row[name] for name in alone} == pytest.approx(alone, abs=1e-6, nan_ok=True)


@pytest.mark.anywhere
def test_it_is_tuned_and_swept(model, way, tmp_path, monkeypatch):
    editor, settings, _ = way
    monkeypatch.setattr(tuning.runs, "known", lambda model, facts, **options: list(facts))
    facts = [*FACTS, replace(FACT, target_new="Rome")]
    (name, values), *_ = editor.grid.items()
    wanted = TuneSettings(traced=2, edited=2, around=0, draws=2, grid=((name, tuple(values[:2])),))
    tuned = tuning.tune(model, facts, tmp_path / "tune", wanted, editor, settings)
    assert [row.tried[name] for row in tuned.rows] == list(values[:2])
    assert type(tuned.settings) is editor.settings
    several = hasattr(settings, "layer") and getattr(settings, "layers", ())
    if several:
        assert {row.layer for row in tuned.rows} == {-1}, "the layers are those that were given"
        assert tuned.settings.layers == settings.layers
    if several or not hasattr(settings, "layer"):
        with pytest.raises(SettingsError, match="has no layer to choose|leave layers out"):
            sweep(model, FACTS, tmp_path / "sweep", SweepSettings(), editor, settings)
        return
    swept = sweep(model, FACTS, tmp_path / "sweep", SweepSettings(layers=(0, 2), tokens=("subject_last", "last"), window=2, draws=2, tuned=0), editor, settings)  # fmt: skip
    expected = edit_facts(model, FACTS[:1], tmp_path / "one", editor, replace(settings, layer=2, guard="warn"))
    with applying.edited(model, *expected):
        (alone,) = counterfact.scores(model, FACTS[:1])
    assert [swept.scores[each][0, 1, 0] for each in ("ES", "PS", "NS")] == [alone[each] for each in ("ES", "PS", "NS")]
    if not hasattr(settings, "fact_token"):
        assert (swept.scores["ES"][0, :, 0] == swept.scores["ES"][0, :, 1]).all(), "no choice of token"


SCRIPT = """
import sys
import torch
from mechedit import guards, models
from mechedit.runs.evaluating import evaluate
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
from tests.test_contract import FACTS, PLAIN, settings_of
for name in list(guards.BANDS):
    guards.BANDS[name] = (0.0, 1e9, "nothing")
model = models.load({folder!r}, device="cpu")
from dataclasses import replace
from functools import reduce
from pathlib import Path
settings = settings_of(model, sys.argv[1], Path(sys.argv[2]).parent)
evaluate(model, FACTS, sys.argv[2], replace(PLAIN, mode="sequential"), sys.argv[1], settings).save(sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITORS)
def test_killed_and_run_again_it_ends_in_the_same_bytes(name, folder, tmp_path):
    root = str(Path(__file__).parents[1])
    script = SCRIPT.format(root=root, folder=str(folder("gpt2")))
    command = [sys.executable, "-c", script, name]
    environment = {**os.environ, "PYTHONPATH": root, "MECHEDIT_CACHE": str(tmp_path / "cache")}
    subprocess.run([*command, str(tmp_path / "peace")], check=True, env=environment)
    process = subprocess.Popen([*command, str(tmp_path / "war")], env=environment)
    deadline = time.monotonic() + 120
    while not len(Shards(tmp_path / "war" / "edits" / "units")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "war" / "summary.json").exists(), "it was killed in the middle"
    subprocess.run([*command, str(tmp_path / "war")], check=True, env=environment)
    for file in ("summary.json", "results.parquet"):
        assert (tmp_path / "war" / file).read_bytes() == (tmp_path / "peace" / file).read_bytes()


@pytest.mark.anywhere
def test_the_origin_of_an_edit_says_on_what_it_was_found(model, way):
    first = one(model, way)
    with applying.edited(model, first):
        second = one(model, way, FACTS[2])
        assert provenance.lineage(model).edits == (first.digest,)
    assert second.parents == (first.digest,)
    assert second.base == first.base == models.identity(model).weights
    assert second.origin["weights"] != first.origin["weights"]


def test_rome_is_first_among_them():
    assert isinstance(named("rome"), rome.Rome)
    assert isinstance(named("tests.outside_editor:LogitEditor"), LogitEditor)
