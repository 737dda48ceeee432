from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch
import transformers

from mechedit import figures, keys, models, neurons, prompts, weights
from mechedit.facts import FactError
from mechedit.files import FileError
from mechedit.models import ModelError
from mechedit.neurons import Neuron, Neurons, attribution, finding
from mechedit.settings import NEURON_POLICIES, KnowledgeNeuronsSettings, SettingsError
from mechedit.weights import Weight
from tests.conftest import FACT, SHAPES, assert_same_state, state
from tests.slow_neurons import attributed

SMALL = KnowledgeNeuronsSettings(steps=4, prepend_bos=True)
LONG = replace(FACT, target_true="Seattle plays soccer")  # of several tokens
BEFORE = ("", "Rome. ", "The violin plays. ", "Paris. ")
READS = {  # Hugging Face's modules: what W_out reads is put into the first, what the nonlinearity reads comes out of the second
    "gpt2": ("transformer.h", "mlp.c_proj", "mlp.c_fc"),
    "gptj": ("transformer.h", "mlp.fc_out", "mlp.fc_in"),
    "neox": ("gpt_neox.layers", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h"),
    **dict.fromkeys(("llama", "qwen2", "gemma2", "gemma3"), ("model.layers", "mlp.down_proj", "mlp.gate_proj")),
}


def rows_of(model, fact, before=BEFORE, settings=SMALL):
    return [list(row.ids) for row in keys.contexts(model, fact, before, prepend_bos=settings.prepend_bos)]


class Plain:
    """Dai et al.'s definition on Hugging Face's model: one prompt, one block and one step at a time."""

    def __init__(self, folder, shape):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        blocks, self.post, self.pre = READS[shape]
        self.blocks = self.model.get_submodule(blocks)

    def p(self, ids, answer, layer, w, last, *, pre=False, separately=False, held=False):
        """P(answer) with these activations; `w` None leaves them. What they were is kept in `seen`."""

        def changed(found):
            self.seen = found[0, last].detach().clone()
            if w is None:
                return found
            return torch.cat([found[:, :last], w[None, None], found[:, last + 1 :]], 1)

        module = self.blocks[layer].get_submodule(self.pre if pre else self.post)
        handle = (
            module.register_forward_hook(lambda module, args, output: changed(output))
            if pre
            else module.register_forward_pre_hook(lambda module, args: (changed(args[0]),))
        )
        given = [] if separately else list(answer[:-1])
        norm = getattr(self.blocks[layer], "post_feedforward_layernorm", None) if held else None
        own = norm and norm.register_forward_hook(lambda norm, args, output: self.normed(norm, args[0], w is None))
        logits = self.model(torch.tensor([[*ids, *given]])).logits[0]
        handle.remove()
        if own:
            own.remove()
        if separately:
            return logits[last].softmax(-1)[list(answer)].mean()
        return torch.stack([logits[last + place].softmax(-1)[token] for place, token in enumerate(answer)]).prod()

    def normed(self, norm, into, clean):
        """Gemma's norm by its formula, its denominator that of the clean run."""
        if clean:
            self.denominator = (into.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt().detach()
        return into / self.denominator * (1 + norm.weight)

    def attributed(self, ids, answer, layer, alphas, **how):
        last = len(ids) - 1
        with torch.no_grad():
            self.p(ids, answer, layer, None, last, **how)
        whole, total = self.seen, torch.zeros_like(self.seen)
        for alpha in alphas:
            w = (alpha * whole).requires_grad_()
            total += torch.autograd.grad(self.p(ids, answer, layer, w, last, **how), [w])[0]
        return whole * total / len(alphas)


@pytest.mark.parametrize("shape", SHAPES)
def test_attributions_are_those_of_one_prompt_and_one_step_at_a_time(shape, load, folder):
    model, plain = load(shape), Plain(folder(shape), shape)
    before = state(model)
    rows = rows_of(model, LONG)
    answer = prompts.continuation(model, LONG.prompt, LONG.target_true)
    assert len({len(row) for row in rows}) > 1
    assert len(answer) > 1
    for wanted, index in ((answer[:1], 0), (answer, 2)):
        for norm in ("held", "moving") if "gemma" in shape else ("held",):
            found, p = neurons.attributions(model, rows, wanted, replace(SMALL, norm=norm))
            ids = rows[index]
            with torch.no_grad():
                assert p[index] == pytest.approx(float(plain.p(ids, wanted, 0, None, len(ids) - 1)), rel=1e-4, abs=1e-9)
            for layer in (0, 2):
                expected = plain.attributed(ids, wanted, layer, [0.25, 0.5, 0.75, 1.0], held=norm == "held")
                scale = float(expected.abs().max())
                assert scale > 0
                torch.testing.assert_close(found[index, layer], expected, atol=1e-5 * scale, rtol=1e-4)
    assert_same_state(model, before)


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_attributions_as_published_score_each_token_at_the_prompts_end_before_the_nonlinearity(shape, load, folder):
    model, plain = load(shape), Plain(folder(shape), shape)
    settings = replace(SMALL, **NEURON_POLICIES["published"])
    answer = neurons.answer_ids(model, LONG, LONG.target_true, settings)
    assert answer == model.tokenizer(LONG.target_true, add_special_tokens=False).input_ids
    assert answer != neurons.answer_ids(model, LONG, LONG.target_true, SMALL), "which has the space"
    (ids,) = rows_of(model, LONG, ("",))
    found, _ = neurons.attributions(model, [ids], answer, settings)
    for layer in range(4):
        expected = plain.attributed(ids, answer, layer, [0.0, 1 / 3, 2 / 3, 1.0], pre=True, separately=True)
        torch.testing.assert_close(found[0, layer], expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("shape", ["gpt2", "gemma3"])
def test_the_slow_loop_of_the_benchmark_is_the_same(shape, load):
    model = load(shape)
    rows, answer = rows_of(model, LONG), prompts.continuation(model, LONG.prompt, LONG.target_true)
    found, _ = neurons.attributions(model, rows, answer, replace(SMALL, norm="moving"))
    with models.frozen(model):
        slow = attributed(model, rows[2], answer, 1, 4)
    torch.testing.assert_close(found[2, 1], slow, atol=1e-5 * float(slow.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("shape", ["gpt2", "gemma3"])
def test_with_many_steps_they_add_up_to_what_the_activations_are_worth(shape, load, folder):
    """Completeness: P(w) - P(0), for each block alone. A right Riemann sum is off by at most about (g(1) - g(0)) / 2m."""
    model, plain = load(shape), Plain(folder(shape), shape)
    answer = prompts.continuation(model, FACT.prompt, FACT.target_true)[:1]
    (ids,) = rows_of(model, FACT, ("",))
    found, (p,) = neurons.attributions(model, [ids], answer, replace(SMALL, steps=500))
    for layer in range(4):
        with torch.no_grad():
            nothing = float(plain.p(ids, answer, layer, torch.zeros(found.shape[2]), len(ids) - 1))
        assert float(found[0, layer].sum()) == pytest.approx(p - nothing, rel=0.03, abs=0.01 * max(p, nothing))
    assert abs(p - nothing) > 1e-6, "there was something to add up"


@pytest.mark.parametrize("shape", ["gemma2", "gemma3"])
def test_with_a_norm_that_moves_they_add_up_to_nothing(shape, load):
    """Which is why it is held: what a norm lets through does not depend on the length of w."""
    model = load(shape)
    rows, answer = rows_of(model, FACT, ("",)), prompts.continuation(model, FACT.prompt, FACT.target_true)[:1]
    for norm, more in (("moving", False), ("held", True)):
        found, _ = neurons.attributions(model, rows, answer, replace(SMALL, norm=norm))
        assert (float((found.sum(2).abs() / found.abs().sum(2)).max()) > 0.01) == more


def test_how_many_rows_run_together_changes_nothing(model):
    rows, answer = rows_of(model, FACT), [40, 41]
    whole, _ = neurons.attributions(model, rows, answer, SMALL)
    for most in (1, 3, 7):
        parts, _ = neurons.attributions(model, rows, answer, SMALL, most_rows=most)
        torch.testing.assert_close(parts, whole, atol=1e-6 * float(whole.abs().max()), rtol=1e-4)


def test_few_logits_are_held_at_once_and_the_same_comes_out(model, monkeypatch):
    rows, answer = rows_of(model, FACT), [40, 41]
    whole, _ = neurons.attributions(model, rows, answer, SMALL)
    monkeypatch.setattr(attribution, "PART", 3)
    parts, _ = neurons.attributions(model, rows, answer, SMALL)
    torch.testing.assert_close(parts, whole, atol=1e-6 * float(whole.abs().max()), rtol=1e-4)


def test_chosen_blocks_alone_are_looked_at(model):
    rows = rows_of(model, FACT)
    whole, _ = neurons.attributions(model, rows, [40], SMALL)
    some, _ = neurons.attributions(model, rows, [40], replace(SMALL, layers=(3, 1)))
    torch.testing.assert_close(some, whole[:, [3, 1]])
    found = neurons.find(model, FACT, replace(SMALL, layers=(3, 1)), prefixes=BEFORE)
    assert {each.layer for each in found.coarse} <= {1, 3}
    with pytest.raises(ModelError, match="layer must be from 0 to 3"):
        neurons.find(model, FACT, replace(SMALL, layers=(4,)), prefixes=BEFORE)


def test_a_prompt_of_one_token_has_neurons(model):
    found, _ = neurons.attributions(model, [[40], [41]], [42], SMALL)
    with models.frozen(model):
        slow = attributed(model, [41], [42], 2, 4)
    torch.testing.assert_close(found[1, 2], slow, atol=1e-5 * float(slow.abs().max()), rtol=1e-4)


MADE_UP = torch.tensor(
    [  # three prompts, two blocks, three neurons
        [[1.0, 0.2, 0.19], [0.0, 0.5, -3.0]],
        [[0.1, 0.05, 0.0], [0.0, 0.03, 0.0]],
        [[-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]],
    ]
)


@pytest.mark.anywhere
def test_coarse_neurons_have_a_share_of_their_prompts_largest_attribution():
    found = neurons.coarse(MADE_UP, 0.2)
    assert found[0].tolist() == [[True, True, False], [False, True, False]]
    assert found[1].tolist() == [[True, True, False], [False, True, False]]
    assert not found[2].any(), "nothing speaks for the answer"
    assert neurons.coarse(MADE_UP, 0.5)[0].tolist() == [[True, False, False], [False, True, False]]


def sets(*counts, of=20):
    """Coarse sets of so many prompts: neuron i is in the first `counts[i]` of them."""
    return torch.tensor([[[index < count for count in counts]] for index in range(of)])


@pytest.mark.anywhere
@pytest.mark.parametrize(
    ("counts", "kept", "p"),
    [
        ((20, 14, 13), 2, 0.70),  # within bounds at once
        ((20, 20, 20, 20, 20, 14, 14), 5, 0.75),  # seven are too many
        ((20, 12, 3), 2, 0.60),  # one is too few
        ((20,) * 6, 6, 1.00),  # still too many after six moves
        ((20, 7), 1, 0.40),  # still too few
        ((15,) * 4 + (14,) * 3, 4, 0.75),
        ((14,) * 7, 7, 0.70),  # six moves between too many and too few
        ((0, 0), 0, 0.40),  # in no prompt at all
    ],
)
def test_refined_neurons_are_in_enough_prompts_and_p_moves_until_there_are_two_to_five(counts, kept, p):
    found, share = neurons.refined(sets(*counts))
    assert (int(found.sum()), share) == (kept, pytest.approx(p))
    enough = [count > 0 and count >= share * 20 - 1e-6 for count in counts]
    assert found.tolist() == [enough]


@pytest.mark.anywhere
def test_refinement_has_its_own_bounds():
    found, p = neurons.refined(sets(20, 18, 16, 14), 0.8, fewest=1, most=2)
    assert (found.tolist(), p) == ([[True, True, False, False]], pytest.approx(0.85))


def test_what_is_found_is_what_the_attributions_say(model):
    found = neurons.find(model, FACT, SMALL, prefixes=BEFORE)
    rows, answer = rows_of(model, FACT), prompts.continuation(model, FACT.prompt, FACT.target_true)
    attr, p = neurons.attributions(model, rows, answer, SMALL)
    enough = attr >= 0.2 * attr.flatten(1).max(1).values[:, None, None]
    assert {(each.layer, each.index) for each in found.coarse} == {tuple(each) for each in enough.any(0).nonzero().tolist()}  # fmt: skip
    for each in found.chosen:
        assert each.attribution == pytest.approx(float(attr[:, each.layer, each.index].mean()), rel=1e-5)
        assert each.share == pytest.approx(float(enough[:, each.layer, each.index].float().mean()))
        assert each.share >= found.p - 1e-6
    assert [each.attribution for each in found.chosen] == sorted((each.attribution for each in found.chosen), reverse=True)  # fmt: skip
    assert found.prompts == tuple(each + FACT.prompt for each in BEFORE)
    assert list(found.p_answer) == pytest.approx(p)
    assert bool(found.notes) != (2 <= len(found.chosen) <= 5)


def test_fewer_than_three_prompts_are_not_refined_and_a_note_says_so(model):
    for before in (("",), ("", "Rome. ")):
        found = neurons.find(model, FACT, SMALL, prefixes=before)
        assert {(each.layer, each.index) for each in found.chosen} == {(each.layer, each.index) for each in found.coarse}  # fmt: skip
        assert "refined over 3 or more" in found.notes[0]


def test_prefixes_are_the_settings_and_no_paraphrase_is_read(model):
    settings = replace(SMALL, prefixes=((3, 2),))
    found = neurons.find(model, FACT, settings)
    assert len(found.prompts) == 3
    assert all(each.endswith(FACT.prompt) for each in found.prompts)
    assert neurons.find(model, replace(FACT, paraphrases=("Seattle has The Space Needle and",)), settings) == found


def test_neurons_survive_their_file(model, tmp_path):
    found = neurons.find(model, FACT, SMALL, prefixes=BEFORE)
    assert Neurons.load(found.save(tmp_path / "neurons.json")) == found
    assert all(f"{each.layer}.{each.index}" in str(found) for each in found.chosen)
    record = json.loads((tmp_path / "neurons.json").read_text())
    for wrong in ({"chosen": [{"layer": 1}]}, {"n_layers": "4"}, {"more": 1}):
        (tmp_path / "wrong.json").write_text(json.dumps(record | wrong))
        with pytest.raises(FileError, match="holds no neurons"):
            Neurons.load(tmp_path / "wrong.json")
    with pytest.raises(FileError, match="holds no neurons"):
        Neurons.load(tmp_path / "missing.json")


OTHERS = {
    "layers": (1, 2),
    "threshold": 0.3,
    "p": 0.9,
    "fewest": 1,
    "most": 4,
    "steps": 3,
    "prefixes": ((3, 2),),
    "activation": "pre",
    "points": "both ends",
    "answer": "published",
    "norm": "moving",
    "seed": 1,
    "prepend_bos": False,
}


def test_neurons_are_looked_for_once_for_all_settings_that_change_only_what_becomes_of_them(
    model, tmp_path, monkeypatch
):
    monkeypatch.setenv("MECHEDIT_CACHE", str(tmp_path))
    runs = []
    monkeypatch.setattr(
        finding, "attributions", lambda *given, **named: runs.append(1) or attributions(*given, **named)
    )
    attributions = neurons.attributions
    first = neurons.find(model, FACT, SMALL, prefixes=BEFORE)
    afterwards = {"action": "erase", "l1": 2.0, "l2": 3.0, "scale": "none", "old": "greedy", "direction": "embedding", "guard": "warn", "bands": (("after", 0.0, 1.0),), "strengthen": True}  # fmt: skip
    assert {*afterwards, *OTHERS} == {each.name for each in fields(KnowledgeNeuronsSettings)}
    for name, value in afterwards.items():
        assert neurons.find(model, FACT, replace(SMALL, **{name: value}), prefixes=BEFORE) == first
    assert len(runs) == 1
    for name, value in OTHERS.items():
        neurons.find(model, FACT, replace(SMALL, **{name: value}), prefixes=BEFORE)
    others = (LONG, replace(FACT, template="{} stands in"), replace(FACT, target_true="Rome"))
    for fact in others:
        neurons.find(model, fact, SMALL, prefixes=BEFORE)
    neurons.find(model, FACT, SMALL, prefixes=BEFORE[:3])
    with weights.restored(model, Weight(0, "mlp.W_out")):
        models.W_out(model, 0).data.mul_(0.5)
        neurons.find(model, FACT, SMALL, prefixes=BEFORE)
    assert len(runs) == 1 + len(OTHERS) + len(others) + 2
    for path in (tmp_path / "neurons").iterdir():
        path.write_text(path.read_text()[:-9])
    assert neurons.find(model, FACT, SMALL, prefixes=BEFORE) == first, "a damaged file is made anew"
    handle = model.ln_final.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match="hook"):
        neurons.find(model, FACT, SMALL, prefixes=BEFORE)
    handle.remove()


@pytest.mark.anywhere
def test_a_picture_shows_the_neurons_by_layer(tmp_path):
    strong, weak = Neuron(2, 7, 0.5, 1.0), Neuron(0, 3, 0.1, 0.25)
    found = Neurons("m", "Space", "Space $5 is", "Seattle", 4, ("a",), (0.5,), 0.7, (strong,), (weak, strong))
    counts, attribution = figures.neurons(found).axes
    assert [bar.get_height() for bar in counts.patches] == [1, 0, 1, 0]
    points = {label.get_label(): label.get_offsets().tolist() for label in attribution.collections}
    assert points["chosen"] == [[2, 0.5]]
    assert points["coarse"] == [[0, 0.1]]
    assert [path.name for path in figures.save_neurons(found, tmp_path)] == ["neurons.png", "neurons.svg"]
    assert (tmp_path / "neurons.png").stat().st_size > 1000


def test_a_fact_without_an_answer_and_one_that_does_not_fit_are_refused(model):
    with pytest.raises(FactError, match="has no target_true"):
        neurons.find(model, replace(FACT, target_true=None), SMALL)
    with pytest.raises(FactError, match="must fit the context of 64"):
        neurons.attributions(model, [[40] * 60], [41] * 6, SMALL)


@pytest.mark.anywhere
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "steps must be 1 or more"),
        ({"steps": 1, "points": "both ends"}, "both ends has 2 steps"),
        ({"threshold": 0.0}, "threshold must be above 0"),
        ({"p": 1.5}, "p must be above 0"),
        ({"fewest": 6}, "fewest must be 1 or more"),
        ({"layers": (1, 1)}, "different blocks"),
        ({"prefixes": ((0, 1),)}, "prefixes must be pairs"),
        ({"action": "rewrite"}, "action must be one of"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(wrong, said):
    with pytest.raises(SettingsError, match=said):
        KnowledgeNeuronsSettings(**wrong)
