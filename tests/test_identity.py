"""Which model is it? Everything that a kept number depends on changes the identity, and nothing else does."""

from __future__ import annotations

import copy
import json
import shutil
import sys
import threading

import pytest
import torch

from mechedit import applying, cache, edits, keys, models, moments, values
from mechedit.changes import Dense
from mechedit.edits import Edit, EditError, Measured
from mechedit.models import ModelError
from mechedit.runs.store import RunError
from mechedit.runs.tracing import trace_facts
from mechedit.settings import MomentSettings, RomeSettings, TraceSettings
from mechedit.tracing import trace
from mechedit.weights import Weight, matrix_shape, restored, value
from tests.conftest import FACT, SHAPES, assert_same_state, state

FEW = MomentSettings(tokens=600, context=32)


def edit_of(model, layer=1, name="mlp.W_out"):
    """A small dense edit, found on the model as it is."""
    from mechedit import provenance

    weight = Weight(layer, name)
    delta = torch.full(matrix_shape(model, weight), 1e-3)
    fact = Measured({"subject": "Rome", "prompt": "Rome is", "target_new": "a"}, {"p_new": 0.1}, {"p_new": 0.2})
    report = {"update_norm": 1.0, "relative_norm": 0.1}
    return Edit("none", (Dense(weight, delta),), (fact,), report, provenance.origin(model), {}, {}, 0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_parameter_counts(shape, load):
    model = load(shape)
    before, first = state(model), models.identity(model)
    for name, parameter in model.named_parameters():
        if ".qkv." in name:
            continue  # what a bridge keeps beside the parts that it computes with
        place = tuple(0 for _ in parameter.shape)
        kept = float(parameter.detach()[place])
        with torch.no_grad():
            parameter[place] = kept + 0.5
        assert models.identity(model).weights != first.weights, name
        assert models.identity(model).whole != first.whole, name
        with torch.no_grad():
            parameter[place] = kept
        assert models.identity(model) == first, name
    assert_same_state(model, before)


def test_writes_through_data_and_replaced_parameters_and_modules_are_seen(load, folder):
    model = models.load(str(folder("gpt2")), device="cpu")
    first = models.identity(model)
    weight = value(model, Weight(2, "mlp.W_in"))
    original = weight.data.clone()
    weight.data.mul_(2.0)
    assert models.identity(model) != first
    weight.data.copy_(original)
    assert models.identity(model) == first
    block = model.blocks[3]
    model.blocks[3] = copy.deepcopy(model.blocks[2])
    assert models.identity(model) != first
    model.blocks[3] = block
    assert models.identity(model) == first


def test_what_cannot_be_seen_is_seen_by_who_forgets(folder):
    model = models.load(str(folder("gpt2")), device="cpu")
    first = models.identity(model)
    with torch.no_grad():
        value(model, Weight(0, "mlp.W_in")).data[3, 5] += 1.0
    models.forget(model)
    assert models.identity(model) != first


def test_a_copy_is_the_same_model(folder):
    model = models.load(str(folder("gpt2")), device="cpu")
    assert models.identity(copy.deepcopy(model)) == models.identity(model)


CHANGED = {
    "config.json": lambda text: json.dumps(json.loads(text) | {"activation_function": "relu"}),
    "tokenizer.json": lambda text: json.dumps(json.loads(text) | {"pre_tokenizer": {"type": "Whitespace"}}),
}


@pytest.mark.parametrize("file", CHANGED)
def test_another_configuration_or_tokenizer_is_another_model(file, folder, tmp_path):
    """The same weights: C, prefixes and runs of the one are not taken for the other's."""
    plain = models.load(str(folder("gpt2")), device="cpu")
    shutil.copytree(folder("gpt2"), tmp_path / "other", dirs_exist_ok=True)
    path = tmp_path / "other" / file
    path.write_text(CHANGED[file](path.read_text()))
    other = models.load(str(tmp_path / "other"), device="cpu")
    first, second = models.identity(plain), models.identity(other)
    assert first.parts == second.parts
    assert first.whole != second.whole
    assert first.keys(1) != second.keys(1)
    assert (first.weights != second.weights) == (file == "config.json"), "an edit does not depend on the tokenizer"
    (tmp_path / "text").write_text("The Space Needle is located in the city of Seattle. " * 300)
    Cs = [moments.estimate(each, 1, [tmp_path / "text"], FEW) for each in (plain, other)]
    assert not torch.equal(Cs[0].C, Cs[1].C)
    assert torch.equal(moments.estimate(plain, 1, [tmp_path / "text"], FEW).C, Cs[0].C)
    trace_facts(plain, [FACT], tmp_path / "run", TraceSettings(draws=1))
    with pytest.raises(RunError, match="identity"):
        trace_facts(other, [FACT], tmp_path / "run", TraceSettings(draws=1))


def test_a_merge_of_the_tokenizer_counts(folder, tmp_path):
    shutil.copytree(folder("gpt2"), tmp_path / "other", dirs_exist_ok=True)
    path = tmp_path / "other" / "tokenizer.json"
    record = json.loads(path.read_text())
    record["model"]["merges"] = record["model"]["merges"][:-1]
    path.write_text(json.dumps(record))
    first, second = (
        models.identity(models.load(str(each), device="cpu")) for each in (folder("gpt2"), tmp_path / "other")
    )
    assert first.tokenizer != second.tokenizer


def test_a_tokenizer_that_is_changed_in_memory_counts(folder):
    model = models.load(str(folder("gpt2")), device="cpu")
    first = models.identity(model)
    model.tokenizer.add_tokens(["zebra"])
    assert models.identity(model).tokenizer != first.tokenizer
    assert models.identity(model).weights == first.weights


def test_a_configuration_that_is_changed_in_memory_counts(folder):
    model = models.load(str(folder("gpt2")), device="cpu")
    first = models.identity(model)
    model.cfg.eps = 0.1
    assert models.identity(model).whole != first.whole
    assert models.identity(model).weights != first.weights


def test_a_new_rule_makes_new_entries(load, monkeypatch):
    model = load("gpt2")
    moments.estimate(model, 1, settings=FEW)
    entries = set((cache.root() / "moments").iterdir())
    monkeypatch.setattr(sys.modules["mechedit.moments.estimation"], "RULE", "another rule")
    moments.estimate(model, 1, settings=FEW)
    assert len(set((cache.root() / "moments").glob("*.safetensors")) - entries) == 1
    kept = keys.prefixes(model, RomeSettings(prefixes=((3, 1),)))
    before = set((cache.root() / "prefixes").iterdir())
    monkeypatch.setattr(keys, "RULE", "another rule")
    assert keys.prefixes(model, RomeSettings(prefixes=((3, 1),))) == kept
    assert len(set((cache.root() / "prefixes").glob("*.json")) - before) == 1


def test_keys_depend_on_what_lies_below_and_on_nothing_else(model):
    first = models.identity(model)

    def changed(weight):
        with restored(model, weight), torch.no_grad():
            value(model, weight).mul_(1.5)
            return models.identity(model).keys(1) != first.keys(1)

    assert not changed(Weight(1, "mlp.W_out"))
    assert not changed(Weight(1, "mlp.b_out"))
    assert not changed(Weight(2, "mlp.W_in"))
    assert not changed(Weight(3, "attn.W_V"))
    assert changed(Weight(1, "mlp.W_in"))
    assert changed(Weight(1, "attn.W_V"))
    assert changed(Weight(0, "mlp.W_out"))
    assert changed(Weight(0, "attn.W_Q"))
    assert models.identity(model).keys(1) == first.keys(1)
    with torch.no_grad():
        kept = model.embed.W_E[7].clone()
        model.embed.W_E[7] += 1.0
        assert models.identity(model).keys(0) != first.keys(0)
        model.embed.W_E[7] = kept


def test_an_edit_of_a_model_with_other_weights_anywhere_is_refused(model):
    edit = edit_of(model)
    for weight in (Weight(0, "mlp.W_in"), Weight(2, "attn.W_O")):
        with restored(model, weight), torch.no_grad():
            value(model, weight).neg_()
            with pytest.raises(EditError, match="was made for"):
                applying.apply(model, edit)
    applying.apply(model, edit).undo()


def test_identity_is_made_once_and_only_what_was_written_is_read_again(model, monkeypatch):
    models.forget(model)
    module = sys.modules["mechedit.models.identities"]
    real, read = module._digest, []
    monkeypatch.setattr(module, "_digest", lambda model, name, stored: read.append(name) or real(model, name, stored))
    models.identity(model)
    assert len(read) > 30
    read.clear()
    models.identity(model)
    edit = edit_of(model)
    for _ in range(3):
        with applying.edited(model, edit):
            pass
    assert read == []
    with applying.edited(model, edit):
        models.identity(model)
    assert read == ["1.mlp.W_out"]
    read.clear()
    models.identity(model)
    assert read == [], "what was put back is as it was"


def noisy(activation, hook):
    return activation * 1.5


def test_with_hooks_on_the_model_nothing_is_kept_and_pieces_are_refused(model, tmp_path):
    plain = moments.estimate(model, 1, settings=FEW)
    entries = sorted((cache.root() / "moments").iterdir())
    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", noisy)]):
        hooked = moments.estimate(model, 1, settings=FEW)
        assert not torch.equal(hooked.C, plain.C)
        keys.prefixes(model, RomeSettings(prefixes=((3, 1),)))
        with pytest.raises(ModelError, match="hooks on .* Take them off"):
            trace(model, FACT, TraceSettings(draws=1))
        with pytest.raises(RunError, match="hooks on"):
            trace_facts(model, [FACT], tmp_path / "run", TraceSettings(draws=1))
        rows = keys.contexts(model, FACT, ("",))
        with pytest.raises(ModelError, match="hooks on"):
            values.optimise(model, rows, rows[0], [[5]], torch.ones(32), torch.ones(2), 1, RomeSettings(layer=1))
    assert sorted((cache.root() / "moments").iterdir()) == entries
    assert not (cache.root() / "prefixes").exists()
    assert torch.equal(moments.estimate(model, 1, settings=FEW).C, plain.C)


def test_with_dropout_at_work_nothing_is_kept_and_nothing_is_found(model):
    own = torch.nn.Dropout(0.5)
    model.blocks[0].add_module("own_dropout", own)
    try:
        for training in (True, False):
            own.train(training)
            assert models.hooked(model) == training
            if training:
                with pytest.raises(ModelError, match=r"its dropout blocks\.0\.own_dropout draws anew .* model\.eval"):
                    trace(model, FACT, TraceSettings(draws=1))
        trace(model, FACT, TraceSettings(draws=1))
    finally:
        del model.blocks[0].own_dropout


def test_a_forward_that_was_replaced_is_kept_from_the_cache_and_pieces_are_refused(model):
    plain = moments.estimate(model, 1, settings=FEW)
    module = model.blocks[0].mlp
    module = getattr(module, "original_component", module)  # a bridge's is called in its place
    own, had = module.forward, vars(module).get("forward")
    module.forward = lambda *given, **named: own(*given, **named) * 1.5
    try:
        assert not torch.equal(moments.estimate(model, 1, settings=FEW).C, plain.C)
        with pytest.raises(ModelError, match=r"forward of blocks\.0.*mlp.* was replaced"):
            trace(model, FACT, TraceSettings(draws=1))
    finally:
        del module.forward
        if had is not None:
            module.forward = had
    assert torch.equal(moments.estimate(model, 1, settings=FEW).C, plain.C)
    trace(model, FACT, TraceSettings(draws=1))


def test_two_threads_on_one_model_give_the_numbers_of_one(model):
    expected = trace(model, FACT, TraceSettings(draws=2))
    edit, found, failed = edit_of(model), [], []

    def tracing():
        try:
            found.append(trace(model, FACT, TraceSettings(draws=2)))
        except Exception as error:
            failed.append(error)

    def editing():
        try:
            for _ in range(20):
                with applying.edited(model, edit):
                    pass
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=target) for target in (tracing, editing, tracing)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for each in found:
        assert all(
            torch.equal(each.draws[kind].nan_to_num(), grid.nan_to_num()) for kind, grid in expected.draws.items()
        )


def test_ten_edits_of_three_kinds_stand_one_on_the_other_and_a_hundred_are_undone_bit_for_bit(model):
    from mechedit.changes import LowRank, Rows

    before, stream = state(model), torch.Generator().manual_seed(0)
    places = [Weight(0, "mlp.W_out"), Weight(1, "mlp.W_in"), Weight(2, "attn.W_Q"), Weight(3, "attn.b_V")]

    def made(number):
        weight = places[number % 4]
        rows, columns = matrix_shape(model, weight)
        kind = number % 3
        if kind == 0:
            return LowRank(weight, torch.randn(2, rows, generator=stream), torch.randn(2, columns, generator=stream))
        if kind == 1:
            index = torch.randperm(rows, generator=stream)[: max(1, rows // 3)]
            return Rows(weight, index, torch.randn(len(index), columns, generator=stream), rows)
        return Dense(weight, torch.randn(rows, columns, generator=stream))

    def wrapped(change):
        plain = edit_of(model)
        return Edit("none", (change,), plain.facts, plain.report, plain.origin, {}, {}, 0.0)

    for number in range(120):
        applying.apply(model, wrapped(made(number)), force=True).undo()
    assert_same_state(model, before)
    found, standing = [], applying.apply(model)
    for number in range(10):
        found.append(wrapped(made(number)))
        assert found[-1].parents == tuple(edit.digest for edit in found[:-1])
        standing.add(found[-1])
    there = {weight: value(model, weight).detach().clone() for weight in places}
    standing.undo()
    assert_same_state(model, before)
    whole = applying.compose(*found)
    with applying.edited(model, whole):
        assert all(torch.equal(value(model, weight), each) for weight, each in there.items())
        applying.revert(model, whole)
        for name, parameter in model.named_parameters():
            assert torch.allclose(parameter, before[0][name], atol=1e-5)
    assert_same_state(model, before)
    stack = [applying.apply(model, edit) for edit in found]
    for applied in reversed(stack):
        applied.undo()
    assert_same_state(model, before)
    assert whole.editor == edits.COMPOSED
