"""The paper's other editors on the organism, which knows what it is edited on, beside plain loops on Hugging Face's own model."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch

from mechedit import models, neurons, prompts, sources
from mechedit.editors import named
from mechedit.editors.knowledge_neurons import Prefixes
from mechedit.settings import DESCENT_POLICIES, NEURON_POLICIES
from tests.test_fine_tuning import assert_equals_plain, hugging_face
from tests.test_knowledge_neurons import Plain, added, close
from tests.test_neurons import Plain as NeuronLoop

FOLDER = Path(str(resources.files("mechedit"))) / "data" / "organism"


@pytest.fixture(scope="module")
def organism():
    return models.load("organism")


@pytest.fixture(scope="module")
def facts():
    return list(sources.named("organism")[100:102])


@pytest.mark.parametrize("policy", ["default", "published"])
@pytest.mark.parametrize("name", ["ft", "ft-l", "attention-edit"])
def test_weights_after_gradient_steps_are_those_of_a_plain_loop(name, policy, organism, facts):
    editor = named(name)
    own = DESCENT_POLICIES["published"] if policy == "published" else {}
    settings = replace(editor.resolve(organism), **{**own, "steps": 5, "prepend_bos": False})
    with models.cast(
        organism, torch.float64
    ):  # in float32 Adam makes whole steps of what rounding leaves of a gradient of zero
        found = editor.find(organism, facts, settings, None, {})
    chosen = [change.weight for change in found.changes]
    names = ("attn.W_Q", "attn.W_K", "attn.W_V") if name == "attention-edit" else ("mlp.W_out",)
    assert {weight.name for weight in chosen if ".b_" not in weight.name} == {*names}
    assert any(".b_" in weight.name for weight in chosen) == settings.bias
    assert_equals_plain(
        organism, hugging_face(lambda shape: FOLDER, "gpt2", torch.float64), found, chosen, facts, settings
    )


@pytest.mark.parametrize("policy", ["default", "published"])
def test_knowledge_neurons_and_what_becomes_of_them_are_the_formulas(policy, organism, facts):
    plain, fact = Plain(FOLDER, "gpt2"), facts[0]
    own = NEURON_POLICIES["published"] if policy == "published" else {"prefixes": ()}
    settings = replace(named("kn").resolve(organism), steps=4, prepend_bos=True, **own)
    found = neurons.find(organism, fact, settings, prefixes=("",))
    assert found.p_answer[0] > 0.5, "the organism knows it"
    e, places = plain.U, [(each.layer, each.index) for each in found.chosen]
    answer, new = (neurons.answer_ids(organism, fact, each, settings) for each in (fact.target_true, fact.target_new))
    ids, _ = prompts.encode(organism, fact.prompt, prepend_bos=True)
    attributor = NeuronLoop(FOLDER, "gpt2")
    how = {"pre": True, "separately": True} if policy == "published" else {"held": True}
    alphas = [0.0, 1 / 3, 2 / 3, 1.0] if policy == "published" else [0.25, 0.5, 0.75, 1.0]
    attr = torch.stack([attributor.attributed(ids, answer, layer, alphas, **how) for layer in range(8)])
    expected = (attr >= settings.threshold * attr.max()).nonzero().tolist()
    assert {tuple(each) for each in expected} == set(places)
    rows = {}
    for layer, index in places:
        v = plain.value(layer, index)
        if policy == "published":
            rows[layer, index] = sum(e[token] for token in new) - 2 * e[plain.greedy(fact.prompt)]
        else:
            rows[layer, index] = v.norm() * (settings.l2 * e[new[0]] / e[new[0]].norm() - settings.l1 * e[answer[0]] / e[answer[0]].norm())  # fmt: skip
    close(added(named("kn").find(organism, [fact], settings, Prefixes(("",)), {}).changes), rows)
