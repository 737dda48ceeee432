"""MEND and KE: factors, terms, both networks against the formulas written out, what they begin as, and their checkpoints."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

from mechedit import applying, editing, models, scoring, sources, weights
from mechedit.changes import total
from mechedit.editors import named
from mechedit.editors.trained import state as states
from mechedit.editors.trained.editor import conditions_of
from mechedit.editors.trained.factors import Factors, Term, added, edited_weights, factors
from mechedit.editors.trained.ke import Ke
from mechedit.editors.trained.mend import Mend
from mechedit.editors.trained.rows import Line, Rows, of_fact
from mechedit.edits import EditError
from mechedit.files import FileError
from mechedit.models import ModelError
from mechedit.settings import KeSettings, KeTraining, MendSettings, MendTraining, SettingsError
from mechedit.weights import Weight, as_matrix, value
from tests.conftest import FACT, assert_same_state, state, widen_bands
from tests.trained import KE, MEND, by_hand, checkpoint, scrambled

LINES = [Line((2, 40, 41, 42), (50, 51)), Line((2, 60, 61), (70,)), Line((2, 80, 81, 82, 83), (90, 91, 92))]


def plain_loss(model, line):
    """-log p of the target, token by token, in whole passes."""
    losses = []
    for step in range(len(line.target)):
        tokens = torch.tensor([[*line.prompt, *line.target[:step]]])
        losses.append(-model(tokens)[0, -1].float().log_softmax(-1)[line.target[step]])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("shape", ["gpt2", "gptj", "gemma3", "llama"])
def test_factors_are_those_of_the_gradient_of_each_weight(load, shape):
    model = load(shape)
    before, own = state(model), edited_weights(model)
    assert len(own) == (9 if shape in ("gemma3", "llama") else 6)
    found, loss = factors(Rows(model, LINES, own[0].layer), own)
    assert_same_state(model, before)
    for row, each in enumerate(LINES):
        with models.frozen(model):
            parameters = [weights.parameter_of(model, weight).requires_grad_(True) for weight in own]
            expected = plain_loss(model, each)
            gradients = torch.autograd.grad(expected, parameters)
        assert loss[row].item() == pytest.approx(expected.item(), rel=1e-5)
        for weight, parameter, gradient in zip(own, parameters, gradients, strict=True):
            whole = as_matrix(weight, weights.part_of(gradient, parameter, value(model, weight).detach()))
            outer = found[weight].u[row].T @ found[weight].delta[row]
            torch.testing.assert_close(outer, whole, atol=1e-6 + 1e-5 * float(whole.abs().max()), rtol=1e-4)
            assert found[weight].count[row].sum() <= len(each.prompt) + len(each.target) - 1


@pytest.mark.parametrize("shape", ["gpt2", "gptj", "gemma3"])
def test_an_added_term_is_a_written_change_of_each_row(load, shape):
    model = load(shape)
    before, own, generator = state(model), edited_weights(model, (0, 2)), torch.Generator().manual_seed(0)
    terms = {
        weight: Term(*(0.3 * torch.randn(2, 3, size, generator=generator) for size in weights.matrix_shape(model, weight)))
        for weight in own
    }  # fmt: skip
    rows = Rows(model, LINES, 0)
    with torch.no_grad(), added(model, terms, torch.tensor([1, 0, 1])):
        final = rows.final()
    found = rows.nll(rows.log_p(final).detach())
    assert_same_state(model, before)
    for row, edit in enumerate((1, 0, 1)):
        with weights.restored(model, *own) as originals, torch.no_grad():
            for weight, term in terms.items():
                weights.write_(model, weight, originals[weight], (term.left[edit].T @ term.right[edit]).double())
            assert found[row].item() == pytest.approx(plain_loss(model, LINES[row]).item(), rel=1e-4)


def test_weights_that_are_not_there_are_told(model):
    with pytest.raises(ModelError, match="layer must be from 0 to 3"):
        edited_weights(model, (7,))
    assert [str(each) for each in edited_weights(model, (3, 1))] == [f"mlp.{name} of block {layer}" for layer in (1, 3) for name in ("W_in", "W_out")]  # fmt: skip


SHAPES = {Weight(0, "mlp.W_in"): (3, 5), Weight(0, "mlp.W_out"): (5, 3), Weight(1, "mlp.W_in"): (3, 5)}


def some_factors(edits=2, dtype=torch.float32):
    """Random ones; a token of the first edit has no gradient, as padding has none."""
    generator = torch.Generator().manual_seed(1)
    found = {
        weight: Factors(*(torch.randn(edits, 4, size, generator=generator, dtype=dtype) for size in shape))
        for weight, shape in SHAPES.items()
    }
    for own in found.values():
        own.delta[0, 2] = 0
    return found


def plain_mend(network, weight, mode, u, delta, form):
    """One token's edited factors, number by number."""
    net, z = network.network(weight), torch.cat([u, delta]).tolist()
    D, tensors = len(z), {name: each.tolist() for name, each in net.state_dict().items()}
    std = [(square / (tensors["seen"] - 1)) ** 0.5 + 1e-7 for square in tensors["squares"]]
    n = [(z[i] - tensors["mean"][i]) / std[i] for i in range(D)]

    def layer(h, number):
        inner = [sum(row[i] * h[i] for i in range(D)) for row in tensors[f"V{number}"]]
        out = []
        for i in range(D):
            outer = sum(each * inner[r] for r, each in enumerate(tensors[f"U{number}"][i]))
            if number == 1 or form == "published":
                outer += tensors[f"bias{number}"][i]
            out.append(max(0.0, tensors[f"scale{number}"][mode][i] * outer + tensors[f"offset{number}"][mode][i]))
        return out

    c1 = layer(n, 1)
    c2 = layer([a + b for a, b in zip(n, c1, strict=True)], 2)
    if form == "published":
        return [a + b + c for a, b, c in zip(n, c1, c2, strict=True)]
    return [z[i] + std[i] * (c1[i] + c2[i]) for i in range(D)]


@pytest.mark.parametrize("form", ["paper", "published"])
def test_mend_is_its_formulas(form):
    network = scrambled(Mend(SHAPES, MendTraining(rank=4, form=form)))
    assert set(network.networks) == {"3x5", "5x3"}
    own, modes = some_factors(), (0, 0, 1)
    terms = network.terms(own)
    for number, (weight, mode) in enumerate(zip(SHAPES, modes, strict=True)):
        rate = network.rates[number].item() * (-1 if form == "paper" else 1)
        for edit in range(2):
            expected = torch.zeros(SHAPES[weight])
            for token in range(4):
                if own[weight].delta[edit, token].any():
                    g = torch.tensor(plain_mend(network, weight, mode, own[weight].u[edit, token], own[weight].delta[edit, token], form))  # fmt: skip
                    expected += rate * torch.outer(g[: SHAPES[weight][0]], g[SHAPES[weight][0] :])
            torch.testing.assert_close(
                terms[weight].left[edit].T @ terms[weight].right[edit], expected, atol=1e-6, rtol=1e-5
            )


def test_statistics_are_those_of_all_tokens_that_count_whatever_parts_they_come_in():
    network, own = Mend(SHAPES, MendTraining(rank=2, form="published")), some_factors(6)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        network.observe({weight: Factors(each.u[part], each.delta[part]) for weight, each in own.items()})
    tokens = torch.cat([torch.cat([own[weight].u, own[weight].delta], -1)[own[weight].count] for weight in (Weight(0, "mlp.W_in"), Weight(1, "mlp.W_in"))])  # fmt: skip
    net = network.networks["3x5"]
    assert int(net.seen) == len(tokens) == 46
    torch.testing.assert_close(net.mean, tokens.double().mean(0))
    torch.testing.assert_close(net.deviation, tokens.double().std(0) + 1e-7)


@pytest.mark.parametrize("form", ["paper", "published"])
def test_mend_begins_as_a_gradient_step_of_normalised_factors_where_published(form):
    network, own = Mend(SHAPES, MendTraining(rank=4, form=form, edit_rate=0.25)), some_factors()
    network.observe(own)
    for weight, term in network.terms(own).items():
        u, delta = own[weight].u, own[weight].delta * own[weight].count[..., None]
        if form == "paper":
            assert torch.equal(term.left * own[weight].count[..., None], u * own[weight].count[..., None])
            assert torch.equal(term.right, -0.25 * delta)
        else:
            net = network.network(weight)
            z = (torch.cat([u, own[weight].delta], -1) - net.mean.float()) / net.deviation.float()
            z = z * own[weight].count[..., None]
            assert torch.equal(torch.cat([term.left, 4 * term.right], -1), z)


def plain_ke(network, number, condition, gradient, table):
    """The change of a weight, from the formulas, with an LSTM that is stepped by hand."""
    parts = dict(network.lstm.named_parameters())

    def last(ids, suffix):
        h = c = torch.zeros(network.lstm.hidden_size)
        for each in ids:
            gates = parts[f"weight_ih_l0{suffix}"] @ table[each] + parts[f"bias_ih_l0{suffix}"] + parts[f"weight_hh_l0{suffix}"] @ h + parts[f"bias_hh_l0{suffix}"]  # fmt: skip
            i, f, g, o = gates.chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return h

    def normed(linear, x):
        size, direction = linear.length, linear.direction
        return x @ (size * direction / direction.norm(dim=1, keepdim=True)).T + linear.bias

    both = torch.cat([last(condition, ""), last(condition.flip(0), "_reverse")])
    c = (network.condense.weight @ both + network.condense.bias).tanh()
    head = network.heads[number]
    d_in, d_out = gradient.shape
    p, q, r, s, e = normed(head[2], normed(head[0], c).tanh()).split([d_in, d_out, d_in, d_out, 1])
    a, b = torch.outer(p.softmax(0), q), torch.outer(r.softmax(0), s)
    return network.max_scale * e.sigmoid() * (gradient * a + b)


@pytest.mark.parametrize("embeddings", ["held", "trained"])
def test_ke_is_its_formulas(embeddings):
    table = torch.randn(20, 7, generator=torch.Generator().manual_seed(2))
    network = Ke(SHAPES, replace(KE, embeddings=embeddings, max_scale=1.5), 7, table if embeddings == "trained" else None)  # fmt: skip
    assert (network.embeddings is not None) == (embeddings == "trained")
    own, ids = some_factors(), [torch.tensor([3, 0, 7, 9]), torch.tensor([5, 6])]
    with torch.no_grad():
        terms = network.terms(own, ids if embeddings == "trained" else [table[each] for each in ids])
        for number, weight in enumerate(SHAPES):
            for edit in range(2):
                expected = plain_ke(network, number, ids[edit], own[weight].u[edit].T @ own[weight].delta[edit], table)
                found = terms[weight].left[edit].T @ terms[weight].right[edit]
                torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("editor", ["mend", "ke"])
@pytest.mark.parametrize("shape", ["gpt2", "gemma3"])
def test_the_gradient_of_the_network_through_the_edited_model_is_finite_differences(load, shape, editor):
    model = load(shape)
    with models.cast(model, torch.float64), models.frozen(model):
        training = replace(MEND, form="published") if editor == "mend" else KE
        trained = states.new(model, editor, training)
        network = scrambled(trained.network).double()
        rows, edit = Rows(model, LINES, trained.weights[0].layer), Rows(model, LINES[:1], trained.weights[0].layer)
        own, _ = factors(edit, trained.weights)
        condition = conditions_of(model, trained, [FACT])

        def loss():
            with added(model, network.terms(own, condition), torch.zeros(3, dtype=torch.long)):
                final = rows.final()
            return rows.nll(rows.log_p(final)).sum()

        parameters = list(network.parameters())
        generator = torch.Generator().manual_seed(3)
        direction = [torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in parameters]
        gradients = torch.autograd.grad(loss(), parameters)
        slope = sum(float((a * b).sum()) for a, b in zip(gradients, direction, strict=True))
        ends = []
        narrow = models.is_bridge(model) and shape == "gemma3"  # whose norms compute in float32 whatever the model does
        size = 1e-4 if narrow else 1e-6
        with torch.no_grad():
            for step in (size, -2 * size):
                for each, way in zip(parameters, direction, strict=True):
                    each += step * way
                ends.append(loss().item())
        assert (ends[0] - ends[1]) / (2 * size) == pytest.approx(slope, rel=1e-2 if narrow else 1e-5)


@pytest.fixture
def trained_folder(model, tmp_path, monkeypatch):
    widen_bands(monkeypatch)
    for editor in ("mend", "ke"):
        checkpoint(model, editor, tmp_path)
    return tmp_path


def test_an_edit_is_the_gradient_step_that_the_network_begins_as_and_names_its_digest(model, trained_folder):
    settings = MendSettings(checkpoint=str(trained_folder), scale=0.5)
    edit = editing.edit(model, FACT, named("mend"), settings)
    key = states.load(trained_folder / "mend.safetensors").key
    assert edit.settings["digest"] == edit.details["prepared"] == key
    own = edited_weights(model)
    found, _ = factors(Rows(model, [of_fact(model, FACT, prepend_bos=edit.settings["prepend_bos"])], 1), own)
    for change, weight in zip(edit.changes, own, strict=True):
        step = -0.5 * 0.05 * found[weight].u[0].T @ found[weight].delta[0]
        torch.testing.assert_close(total([change]), step.double(), atol=1e-7, rtol=1e-4)
        assert len(change.left) == found[weight].count.sum()
    assert edit.details["trained_on"] == 0


def test_edits_of_several_facts_are_summed(model, trained_folder):
    facts = [FACT, replace(FACT, subject="Rome", target_new="Berlin")]
    settings = MendSettings(checkpoint=str(trained_folder))
    both = editing.edit(model, facts, named("mend"), settings)
    alone = [editing.edit(model, fact, named("mend"), settings) for fact in facts]
    for number, change in enumerate(both.changes):
        expected = sum(total([each.changes[number]]) for each in alone)
        torch.testing.assert_close(total([change]), expected, atol=1e-7, rtol=1e-4)


def test_ke_is_repeated_until_the_model_says_it(model, trained_folder):
    once = editing.edit(model, FACT, named("ke"), KeSettings(checkpoint=str(trained_folder), scale=0.1))
    often = editing.edit(model, FACT, named("ke"), KeSettings(checkpoint=str(trained_folder), scale=0.1, repeats=40))
    with applying.edited(model, once):
        assert not all(scoring.score(model, [(FACT.prompt, "Paris")])[0].first)
    with applying.edited(model, often):
        assert all(scoring.score(model, [(FACT.prompt, "Paris")])[0].first)
    times = float(total([often.changes[0]]).norm() / total([once.changes[0]]).norm())
    assert times == pytest.approx(round(times), rel=1e-4)
    assert 1 < round(times) < 40


def test_no_checkpoint_and_a_wrong_one_are_told_with_the_command_that_trains_one(model, load, trained_folder, tmp_path):
    mend = named("mend")
    with pytest.raises(EditError, match="none ships for .* Train one with `mechedit train-editor mend --model"):
        mend.resolve(model)
    with pytest.raises(EditError, match="found 'nowhere'. `mechedit train-editor mend"):
        mend.resolve(model, MendSettings(checkpoint="nowhere"))
    with pytest.raises(EditError, match="cannot be read: File name too long"):
        mend.resolve(model, MendSettings(checkpoint="x" * 300))
    own = MendSettings(checkpoint=str(trained_folder / "mend.safetensors"))
    with pytest.raises(EditError, match="is of the editor ke, not of mend"):
        mend.resolve(model, replace(own, checkpoint=str(trained_folder / "ke.safetensors")))
    with pytest.raises(EditError, match="is of the form 'paper', and form is 'published'"):
        mend.resolve(model, replace(own, form="published"))
    with pytest.raises(EditError, match="was trained for other weights"):
        mend.resolve(load("gptj"), own)
    with pytest.raises(EditError, match="it is another checkpoint"):
        mend.resolve(model, replace(own, digest="0" * 64))
    bos = mend.resolve(model, own).prepend_bos
    with pytest.raises(EditError, match=f"give prepend_bos={bos}"):
        mend.resolve(model, replace(own, prepend_bos=not bos))
    with weights.restored(model, Weight(0, "attn.W_Q")) as originals:
        weights.write_(model, Weight(0, "attn.W_Q"), originals[Weight(0, "attn.W_Q")], torch.ones(32, 32))
        with pytest.raises(EditError, match="was trained for other weights"):
            mend.resolve(model, own)
    with applying.edited(
        model, editing.edit(model, FACT, mend, own)
    ):  # an edit on top of another is none of another model
        assert mend.resolve(model, own).digest
    with pytest.raises(SettingsError, match="scale must be positive"):
        MendSettings(scale=0.0)


@pytest.mark.parametrize("editor", ["mend", "ke"])
def test_a_checkpoint_comes_back_and_a_cut_or_changed_one_is_refused(model, editor, tmp_path):
    made = by_hand(model, editor)
    scrambled(made.network)
    path = made.save(tmp_path / "it.safetensors")
    back = states.load(path)
    assert back.key == made.key == pickle.loads(pickle.dumps(back)).key  # noqa: S301 (our own)
    assert all(torch.equal(each, made.network.state_dict()[name]) for name, each in back.network.state_dict().items())
    whole = path.read_bytes()
    for cut in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(FileError, match="truncated or no safetensors"):
            states.load(path)
        with pytest.raises(FileError):
            named(editor).resolve(model, named(editor).settings(checkpoint=str(path)))
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(FileError, match="was changed after it was written"):
        states.load(path)


@pytest.mark.anywhere
def test_settings_that_cannot_be_meant_are_told():
    for wrong, message in (
        ({"rank": 0}, "rank must be 1 or more"),
        ({"batch": 0}, "batch must be 1 or more"),
        ({"validation": 0}, "validation must be 1 or more"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"layers": (1, 1)}, "layers must be different"),
        ({"form": "mine"}, "form must be one of paper, published"),
        ({"text_context": 20}, "more than twice text_tokens"),
    ):
        with pytest.raises(SettingsError, match=message):
            MendTraining(**wrong)
    with pytest.raises(SettingsError, match="smoothing must be"):
        KeTraining(smoothing=1.0)
    with pytest.raises(SettingsError, match="repeats must be 1 or more"):
        KeSettings(repeats=0)


def test_what_ships_is_small_and_edits_facts_that_it_was_not_trained_on():
    organism, world = models.load("organism", device="cpu"), sources.named("organism")
    there = [(editor, name) for editor in ("mend", "ke") for name in states.shipped(organism, editor)]
    assert ("mend", "set") in there
    for editor, name in there:
        path = states.shipped(organism, editor)[name]
        assert path.stat().st_size <= 5 * 2**20
        assert not any(states.load(path).seen([fact.subject for fact in world[:500]]))
        edit = editing.edit(organism, world[7], named(editor), named(editor).settings(checkpoint=name, guard="warn"))
        assert edit.after["p_new"] > edit.before["p_new"] + 0.3
