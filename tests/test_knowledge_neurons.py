from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from mechedit import applying, editing, models, neurons, scoring
from mechedit.changes import Rows, by_weight, total
from mechedit.editors import knowledge_neurons, named
from mechedit.editors.knowledge_neurons import Prefixes
from mechedit.edits import EditError
from mechedit.models import ModelError
from mechedit.neurons import finding
from mechedit.settings import NEURON_POLICIES, KnowledgeNeuronsSettings
from tests.conftest import FACT, assert_same_state, state, widen_bands
from tests.test_neurons import READS

SMALL = KnowledgeNeuronsSettings(steps=4, prepend_bos=True, guard="warn")
BEFORE = Prefixes(("", "Rome. ", "The violin plays. ", "Paris. "))
LONG = replace(FACT, target_true="Seattle plays", target_new="Paris plays soccer")
OTHER = replace(FACT, subject="The Eiffel Tower", target_true="Paris", target_new="London")


def found(model, settings, facts=(FACT,), before=BEFORE):
    editor = named("kn")
    return editor.find(model, facts, editor.resolve(model, settings), before, {})


def added(changes):
    """What is added to each row that changes: by layer and row."""
    whole = {weight.layer: total(own) for weight, own in by_weight(changes).items()}
    return {(layer, row): each[row] for layer, each in whole.items() for row in each.abs().sum(1).nonzero()[:, 0].tolist()}  # fmt: skip


class Plain:
    """Hugging Face's weights, and the published formulas on them."""

    def __init__(self, folder, shape):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        blocks, self.out, _ = READS[shape]
        self.blocks = self.model.get_submodule(blocks)
        self.E, self.U = self.model.get_input_embeddings().weight.detach().double(), self.model.lm_head.weight.detach().double()  # fmt: skip

    def value(self, layer, row):
        module = self.blocks[layer].get_submodule(self.out)
        return (module.weight[:, row] if isinstance(module, torch.nn.Linear) else module.weight[row]).detach().double()

    def token(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def greedy(self, prompt):
        ids = torch.tensor([[self.tokenizer.bos_token_id, *self.token(prompt)]])
        with torch.no_grad():
            return int(self.model(ids).logits[0, -1].argmax())


def close(rows, expected):
    assert rows.keys() == expected.keys()
    for place, row in rows.items():
        torch.testing.assert_close(row, expected[place], atol=1e-5 * float(expected[place].abs().max()), rtol=1e-5)


@pytest.mark.parametrize("shape", ["gpt2", "llama", "neox", "gemma3"])
@pytest.mark.parametrize("direction", ["unembedding", "embedding"])
def test_an_update_is_the_papers_formula(shape, direction, load, folder):
    model, plain = load(shape), Plain(folder(shape), shape)
    settings = replace(SMALL, l1=1.5, l2=6.0, direction=direction)
    e = plain.U if direction == "unembedding" else plain.E
    old, new = e[plain.token(" Seattle")[0]], e[plain.token(" Paris")[0]]
    own = neurons.find(model, LONG, settings, prefixes=BEFORE.texts)
    expected = {}
    for each in own.chosen:
        v = plain.value(each.layer, each.index)
        expected[each.layer, each.index] = -1.5 * v.norm() / old.norm() * old + 6.0 * v.norm() / new.norm() * new
    close(added(found(model, settings, (LONG,)).changes), expected)


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_an_update_as_published_is_the_codes_formula(shape, load, folder):
    """Two embeddings of the model's own next token out, one of each of the target's tokens in, as they are."""
    model, plain = load(shape), Plain(folder(shape), shape)
    settings = replace(SMALL, **NEURON_POLICIES["published"])
    editor = named("kn")
    prepared = editor.prepare(model, editor.resolve(model, settings))
    assert prepared.texts == ("",)
    step = sum(plain.U[token] for token in plain.token(LONG.target_new)) - 2 * plain.U[plain.greedy(LONG.prompt)]
    own = neurons.find(model, LONG, settings, prefixes=("",))
    assert len(plain.token(LONG.target_new)) > 1
    close(added(found(model, settings, (LONG,), prepared).changes), {(each.layer, each.index): step for each in own.chosen})  # fmt: skip


@pytest.mark.parametrize(("action", "factor"), [("erase", -1.0), ("suppress", -1.0), ("amplify", 1.0)])
def test_rows_are_erased_suppressed_and_amplified(action, factor, load, folder):
    model, plain = load("llama"), Plain(folder("llama"), "llama")
    own = neurons.find(model, FACT, SMALL, prefixes=BEFORE.texts)
    expected = {(each.layer, each.index): factor * plain.value(each.layer, each.index) for each in own.chosen}
    close(added(found(model, replace(SMALL, action=action)).changes), expected)


@pytest.mark.parametrize(("action", "times"), [("suppress", 0.0), ("amplify", 2.0)])
@pytest.mark.parametrize("shape", ["gpt2", "gemma2"])
def test_a_row_times_so_much_is_the_activation_times_so_much(shape, action, times, load, monkeypatch):
    widen_bands(monkeypatch)
    model = load(shape)
    tokens = torch.tensor([[0, 5, 9, 40, 33]])
    edit = editing.edit(model, FACT, named("kn"), replace(SMALL, action=action, strengthen=True), prepared=BEFORE)
    own = neurons.find(model, FACT, SMALL, prefixes=BEFORE.texts).chosen

    def scaled(activation, hook):
        changed = activation.clone()
        for each in own:
            if f"blocks.{each.layer}." in hook.name:
                changed[..., each.index] *= times
        return changed

    hooks = [(f"blocks.{layer}.mlp.hook_post", scaled) for layer in {each.layer for each in own}]
    with torch.no_grad():
        expected, plain = model.run_with_hooks(tokens, fwd_hooks=hooks), model(tokens)
        with applying.edited(model, edit):
            torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=1e-4)
    assert (expected - plain).abs().max() > 1e-3


def test_facts_together_add_up_and_erase_the_most_frequent(model, monkeypatch):
    settings = replace(SMALL, layers=(1, 2))
    alone = [added(found(model, settings, (fact,)).changes) for fact in (FACT, OTHER)]
    together = found(model, settings, (FACT, OTHER))
    expected = {place: sum(each[place] for each in alone if place in each) for place in alone[0].keys() | alone[1].keys()}  # fmt: skip
    assert alone[0].keys() & alone[1].keys() or len(expected) == sum(map(len, alone))
    close(added(together.changes), expected)
    assert all(isinstance(change, Rows) for change in together.changes)
    assert together.report["neurons"] == sum(map(len, alone))
    monkeypatch.setattr(knowledge_neurons, "ERASED", 1)
    again = [FACT, OTHER, replace(OTHER, target_new="Rome")]
    (most,) = added(found(model, replace(settings, action="erase"), again).changes)
    assert most in alone[1], "it is among the neurons of two facts of three"


def test_the_neurons_are_in_the_edit(model):
    details = found(model, SMALL, (FACT, OTHER)).details
    for own, fact in zip(details["neurons"], (FACT, OTHER), strict=True):
        expected = neurons.find(model, fact, SMALL, prefixes=BEFORE.texts)
        assert [(each["layer"], each["index"], each["attribution"], each["share"]) for each in own] == [
            (each.layer, each.index, each.attribution, each.share) for each in expected.chosen
        ]


def test_suppressing_its_neurons_makes_an_answer_less_probable_and_amplifying_more(model, monkeypatch):
    widen_bands(monkeypatch)
    before = state(model)
    (p,) = (each.p for each in scoring.score(model, [(FACT.prompt, "Seattle")], prepend_bos=True))
    after = {
        action: editing.edit(model, FACT, named("kn"), replace(SMALL, action=action), prepared=BEFORE).after["p_true"]
        for action in ("suppress", "amplify")
    }
    assert after["suppress"] < p < after["amplify"]
    assert_same_state(model, before)


def test_prepared_prefixes_are_the_settings_and_their_key_is_theirs(model):
    editor = named("kn")
    first, second = (editor.prepare(model, replace(SMALL, prefixes=((3, 2),), seed=seed)) for seed in (0, 1))
    assert len(first.texts) == 3
    assert first.texts[0] == ""
    assert first.key != second.key
    assert added(found(model, replace(SMALL, prefixes=((3, 2),)), before=None).changes).keys() == added(found(model, SMALL, before=first).changes).keys()  # fmt: skip


def test_a_block_that_is_not_there_and_an_answer_without_neurons_are_refused(model, monkeypatch):
    with pytest.raises(ModelError, match="layer must be from 0 to 3"):
        named("kn").resolve(model, replace(SMALL, layers=(9,)))
    monkeypatch.setattr(finding, "attributions", lambda *args, **named: (-torch.ones(4, 4, 128), [0.1] * 4))
    with pytest.raises(EditError, match=r"no neuron carries 'Seattle' .* in 40% of 4 prompts. Lower p or threshold"):
        found(model, SMALL)


def test_a_blank_that_an_answer_begins_with_has_no_direction(model, monkeypatch):
    """Where tokens 5, 6 are the answer and 5 is blank, the direction is that of 6."""
    monkeypatch.setattr(
        neurons, "answer_ids", lambda model, fact, answer, settings: [5, 6 if answer == "Seattle" else 7]
    )
    monkeypatch.setattr(knowledge_neurons, "blanks_of", lambda model, answer: 1)
    old, new = knowledge_neurons._directions(model, FACT, SMALL)
    W_U = model.unembed.W_U.detach().double()
    assert torch.equal(old, W_U[:, 6])
    assert torch.equal(new, W_U[:, 7])


def test_a_model_without_a_matrix_is_refused_before_anything_is_run(model, monkeypatch):
    def gone(model, layer):
        raise ModelError(f"block {layer} has no W_out")

    monkeypatch.setattr(models, "mlp_module", gone)
    with pytest.raises(ModelError, match="block 0 has no W_out"):
        named("kn").resolve(model, SMALL)
