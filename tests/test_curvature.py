from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from mechedit import cache, editing, editors, files, keys, models, moments, prompts, values
from mechedit.editors import controls, many, rome
from mechedit.edits import EditError
from mechedit.facts import Fact
from mechedit.interventions import mlp_outputs
from mechedit.moments import Fisher, MomentError, corpus, curvature
from mechedit.runs.extending import run_sequence
from mechedit.settings import (
    EmmetSettings,
    MomentSettings,
    PmetSettings,
    RomeSettings,
    SequentialSettings,
    SettingsError,
)
from tests.conftest import FACT, assert_same_state, state
from tests.test_values import slow_value

DRAWS = 40
FEW = MomentSettings(tokens=160, context=8, prepend_bos=True)


@pytest.fixture
def own(folder):
    """A model of this test alone, whose weights may be changed."""
    return models.load(str(folder("gpt2")), device="cpu")


def windows_of(model, settings):
    """The text that the model samples, BOS first."""
    return torch.cat([tokens() for _, tokens in corpus.batches(model, (), settings, lambda *_: None)])


def said(model, layer, window, at, changes):
    """The logits of all that is said from a token of one window on, with each change added there to what the block's W_out gives."""

    def add(output):
        output = output.clone()
        output[:, at] += changes
        return output

    with torch.no_grad(), mlp_outputs(model, layer, add):
        return model(window.expand(len(changes), -1))[:, at:]


@pytest.mark.parametrize("shape", ["gpt2", "gemma3"])
def test_G_is_on_average_what_whole_jacobians_give_and_half_d_G_d_the_KL_of_a_small_d(shape, folder, monkeypatch):
    model = models.load(str(folder(shape)), device="cpu", dtype=torch.float64)
    before = state(model)
    found = []
    for draw in range(DRAWS):  # of other normal numbers, for the same text
        monkeypatch.setattr(curvature, "PURPOSE", str(draw))
        monkeypatch.setattr(curvature, "RULE", str(draw))
        found.append(moments.fisher(model, 1, settings=FEW))
    d = 1e-3 * torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = torch.cat([1e-4 * torch.eye(32), -1e-4 * torch.eye(32), torch.zeros(1, 32), d[None]]).double()
    total, cost, n = torch.zeros(32, 32, dtype=torch.float64), 0.0, 0
    for window in windows_of(model, FEW):
        for at in range(1, len(window)):  # not of BOS
            up, down, here, there = said(model, 1, window, at, steps).split([32, 32, 1, 1])
            J, p = (up - down) / 2e-4, here[0].softmax(-1)  # [d_model, pos, d_vocab]
            mean = torch.einsum("ipv,pv->ip", J, p)
            total += torch.einsum("ipv,pv,jpv->ij", J, p, J) - mean @ mean.T
            cost += float((p * (here[0].log_softmax(-1) - there[0].log_softmax(-1))).sum())
            n += 1
    assert cost / n == pytest.approx(float(d @ total @ d) / n / 2, rel=0.01)  # which is what G is for
    assert {each.tokens for each in found} == {n} == {23 * 7}
    G = torch.stack([each.G for each in found]).mean(0)
    assert float((G - total / n).norm()) < 0.15 * float(total.norm() / n)
    assert_same_state(model, before)


def test_no_more_text_is_read_than_is_enough(load, monkeypatch):
    model = load("gpt2")
    monkeypatch.setattr(curvature, "TIMES", 1)
    monkeypatch.setattr(curvature, "NUMBERS", 2 * 8 * int(model.cfg.d_vocab))  # two windows at once
    assert moments.fisher(model, 1, settings=FEW).tokens == 42  # of the model's width, 32, or more


def test_seeds_have_the_fisher_information_of_what_is_said_as_their_second_moment():
    p = torch.tensor([[0.7, 0.2, 0.1, 0.0]], dtype=torch.float64)
    A = torch.stack([curvature.seeded(p, row[None])[0] for row in torch.eye(4, dtype=torch.float64)], 1)
    torch.testing.assert_close(A @ A.T, p[0].diag() - torch.outer(p[0], p[0]))


def test_a_slope_is_what_a_small_change_makes_of_what_follows(folder):
    model = models.load(str(folder("gpt2")), device="cpu", dtype=torch.float64)
    (window,) = windows_of(model, replace(FEW, tokens=140))[:1]
    stream = torch.Generator().manual_seed(0)
    direction = torch.randn(32, generator=stream, dtype=torch.float64)
    normal = torch.randn(len(window), int(model.cfg.d_vocab), generator=stream, dtype=torch.float64)
    _, (slopes,) = curvature.slopes_of(model, models.Blocks(model), 1, window[None], normal)
    with torch.no_grad():
        p = model(window[None])[0].softmax(-1)
        for at in (1, 4, 7):
            seeds = p[at:].sqrt() * normal[at:] - p[at:] * (p[at:].sqrt() * normal[at:]).sum(-1, keepdim=True)
            step = 1e-5
            moved = [
                float((said(model, 1, window, at, sign * step * direction[None])[0] * seeds).sum()) for sign in (1, -1)
            ]
            assert float(slopes[at] @ direction) == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=1e-5)


def test_G_is_made_once_and_again_when_anything_it_depends_on_changes(own, monkeypatch):
    model = own
    plain, made = curvature._slopes, []
    monkeypatch.setattr(curvature, "_slopes", lambda *given: made.append(1) or plain(*given))
    first = moments.fisher(model, 1, settings=FEW)
    assert torch.equal(moments.fisher(model, 1, settings=FEW).G, first.G)
    assert len(made) == 1
    other = moments.fisher(model, 1, settings=replace(FEW, seed=1))
    moments.fisher(model, 0, settings=FEW)
    assert len(made) == 3
    assert not torch.equal(other.G, first.G)
    with torch.no_grad():
        model.unembed.W_U.mul_(1.5)
    assert not first.is_of(model)
    assert not torch.equal(moments.fisher(model, 1, settings=FEW).G, first.G)
    with torch.no_grad():
        models.W_out(model, 1).mul_(1.5)  # an edit of its own block
    assert moments.fisher(model, 1, settings=FEW).is_of(model)


def test_G_of_a_model_with_an_edit_in_its_block_is_of_it_still(own):
    model = own
    found = moments.fisher(model, 1, settings=FEW)
    with torch.no_grad():
        models.W_out(model, 1).add_(0.01)
    assert found.is_of(model)
    with torch.no_grad():
        models.W_out(model, 0).add_(0.01)
    assert not found.is_of(model)


def test_G_survives_its_file_and_a_damaged_one_is_made_again(load, tmp_path):
    model = load("gpt2")
    found = moments.fisher(model, 1, settings=FEW)
    again = Fisher.load(found.save(tmp_path / "G.safetensors"))
    assert torch.equal(again.G, found.G)
    assert (again.to_json(), again.hash) == (found.to_json(), found.hash)
    (kept,) = (cache.root() / "moments").glob("*.fisher.safetensors")
    kept.write_bytes(kept.read_bytes()[:-8])
    assert torch.equal(moments.fisher(model, 1, settings=FEW).G, found.G)
    for G in (found.G.float(), found.G * float("nan")):
        path = replace(found, G=G).save(tmp_path / "bad.safetensors")
        with pytest.raises(files.FileError, match="no finite square matrix"):
            Fisher.load(path)
    files.write(tmp_path / "none.safetensors", "fisher", {"G": found.G}, {"layer": 1})
    with pytest.raises(files.FileError, match="lacks something"):
        Fisher.load(tmp_path / "none.safetensors")


def test_G_of_a_text_reads_that_text_and_is_merged_with_another(load, tmp_path, monkeypatch):
    model = load("gpt2")
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for path, name in zip(texts, ("Seattle", "Paris"), strict=True):
        path.write_text(f"The Space Needle is located in the city of {name}. " * 20)
    read, plain = [], curvature.slopes_of
    monkeypatch.setattr(curvature, "slopes_of", lambda *given: read.append(given[3]) or plain(*given))
    one = moments.fisher(model, 1, texts[:1], FEW)
    ids = model.tokenizer(texts[0].read_text(), add_special_tokens=False)["input_ids"]
    assert torch.cat(read)[:, 1:].flatten().tolist() == ids[: len(ids) // 7 * 7]
    assert torch.cat(read)[:, 0].unique().tolist() == [model.tokenizer.bos_token_id]
    assert one.tokens == len(ids) // 7 * 7

    two, sampled = moments.fisher(model, 1, texts[1:], FEW), moments.fisher(model, 1, settings=FEW)
    both = one.merged(two).merged(sampled)
    n = torch.tensor([each.tokens for each in (one, two, sampled)], dtype=torch.float64)
    assert both.tokens == n.sum()
    assert len({each.hash for each in (one, two, sampled, both)}) == 4
    mean = sum(w * each.G for w, each in zip(n / n.sum(), (one, two, sampled), strict=True))
    torch.testing.assert_close(both.G, mean)
    assert both.square == pytest.approx(
        sum(float(w) * each.square for w, each in zip(n / n.sum(), (one, two, sampled), strict=True))
    )
    assert Fisher.load(both.save(tmp_path / "G.safetensors")).source == both.source
    with pytest.raises(MomentError, match="the same text would count twice"):
        both.merged(two)
    with pytest.raises(MomentError, match="must be of one block; found 1 and 0"):
        one.merged(moments.fisher(model, 0, settings=FEW))
    with pytest.raises(MomentError, match="must be of one model"):
        one.merged(moments.fisher(load("llama"), 1, settings=FEW))
    for other in (replace(FEW, context=FEW.context + 1), replace(FEW, prepend_bos=False)):
        with pytest.raises(MomentError, match="must be of one (window|BOS rule); found"):
            one.merged(moments.fisher(model, 1, settings=other))
    texts[0].write_text("The Space Needle")
    with pytest.raises(MomentError, match=r"G of a block needs 32 tokens, and better 320; the text of .*one.txt has"):
        moments.fisher(model, 1, texts[:1], FEW)


@pytest.mark.parametrize("around", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["inference", "autocast"])  # fmt: skip
def test_what_stands_around_bears_neither_on_G_nor_on_C(around, load, tmp_path, monkeypatch):
    model = load("gpt2")
    G, C = moments.fisher(model, 1, settings=FEW).G, moments.estimate(model, 1, settings=FEW).C
    monkeypatch.setenv("MECHEDIT_CACHE", str(tmp_path))  # where neither is kept
    with around():
        again = moments.fisher(model, 1, settings=FEW).G, moments.estimate(model, 1, settings=FEW).C
    assert torch.equal(again[0], G)
    assert torch.equal(again[1], C)


def test_slopes_that_are_nan_say_so(own):
    model = own
    windows_of(model, FEW)
    with torch.no_grad():
        model.unembed.W_U[0, 0] = float("nan")
    with pytest.raises((MomentError, RuntimeError), match="NaN|nan"):
        moments.fisher(model, 1, settings=FEW)
    with torch.no_grad():
        model.unembed.W_U.zero_()
    with pytest.raises(MomentError, match="nothing that the model says depends on what block 1 gives"):
        moments.fisher(model, 1, settings=FEW)


@pytest.mark.parametrize("shape", ["gpt2", "gemma3"])
def test_a_value_that_weighs_G_is_as_low_as_many_small_steps_lead(shape, load):
    model = load(shape)
    settings = RomeSettings(
        layer=1, steps=40, prefixes=(), clamp=4.0, stop_at=0.0, weight_decay=1e-3, prepend_bos=True, fisher=0.01
    )
    rows = keys.contexts(model, FACT, ("",), prepend_bos=True)
    (essence,) = keys.contexts(model, Fact(FACT.subject, "{} is a"), ("",), prepend_bos=True)
    target = prompts.continuation(model, FACT.prompt, "zebra")
    initial = torch.randn(32, generator=torch.Generator().manual_seed(1))
    G = torch.randn(32, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    G = G @ G.T / 32
    fast = values.optimise(model, rows, essence, [target], initial, torch.ones(2), 1, settings, G=G)

    small, told = replace(settings, steps=300, learning_rate=0.01), []
    slow_value(
        model, rows, essence, target, initial, torch.ones(2), 1, small, lambda d: 0.005 * d @ G.float() @ d, told
    )
    sums = [sum(each) for each in fast.losses]
    # by losses: where they are flat, which of the values comes out is a matter of rounding
    assert sums[-1] - told[-1] < 0.02 * (told[0] - told[-1])
    assert told[0] == pytest.approx(sums[0], abs=1e-4)
    assert told[0] - told[-1] > 4e-3
    assert all(after < before + 1e-6 for before, after in itertools.pairwise(sums))
    d = (fast.value - initial).double()
    decay = 1e-3 * float(d.norm()) / float(initial.norm()) ** 2
    assert fast.losses[-1][2] == pytest.approx(decay + 0.005 * float(d @ G @ d), rel=1e-4)
    with pytest.raises(SettingsError, match=r"fisher = 0.01 weighs G .*none was given"):
        values.optimise(model, rows, essence, [target], initial, torch.ones(2), 1, settings)


@pytest.mark.parametrize("name", ["rome", "emmet", "sequential", "rome-identity", "rome-random-layer"])
def test_editors_that_seek_values_weigh_G_and_say_by_which(name, load, monkeypatch):
    model = load("gpt2")
    monkeypatch.setattr(curvature, "TIMES", 1)
    monkeypatch.setattr(controls, "CLAMPS", (1.0,))  # of other layers, one for each
    monkeypatch.setattr(controls, "TRIALS", 1)
    editor = editors.named(name)
    settings = editor.settings(layer=1, steps=3, prefixes=(), guard="warn", prepend_bos=True, fisher=0.0)
    plain = editing.edit(model, FACT, editor, settings)
    weighed = editing.edit(model, FACT, editor, replace(settings, fisher=1e4))
    assert "fisher" not in plain.details
    layer = weighed.changes[0].weight.layer
    assert (
        weighed.details["fisher"]["hash"]
        == moments.fisher(model, layer, settings=MomentSettings(prepend_bos=True)).hash
    )
    assert not torch.equal(plain.vectors["v*"], weighed.vectors["v*"])
    assert plain.details["prepared"] != weighed.details["prepared"]


def test_G_that_does_not_belong_is_refused(load, tmp_path):
    model = load("gpt2")
    settings = rome.resolve(model, RomeSettings(layer=1, steps=2, prefixes=(), prepend_bos=True, fisher=1.0))
    ready = rome.prepare(model, settings)
    assert ready.key != rome.prepare(model, replace(settings, fisher=0.0)).key
    for other, found in ((None, "there is none"), (moments.fisher(model, 0), "this one is of layer 0")):
        with pytest.raises(EditError, match=rf"fisher = 1 weighs G of layer 1 .*{found}"):
            editing.edit(model, FACT, editors.named("rome"), settings, prepared=replace(ready, fisher=other))
    given = moments.fisher(model, 1, settings=FEW)
    assert rome.prepare(model, settings, fisher=given).fisher is given
    assert rome.prepare(model, replace(settings, fisher=0.0), fisher=given).fisher is None
    with pytest.raises(EditError, match="this one is of layer 0"):
        rome.prepare(model, settings, fisher=moments.fisher(model, 0))
    for other, message in (
        (
            replace(given.settings, prepend_bos=False),
            "G was estimated without BOS, and the edit reads its prompts with it: slopes of the two differ",
        ),
        (replace(given.settings, parts=4, part=1), "G is part 1 of 4 of a text"),
    ):
        with pytest.raises(EditError, match=message):
            rome.prepare(model, settings, fisher=replace(given, settings=other))
    long = SequentialSettings(layer=1, steps=2, prefixes=(), prepend_bos=True)
    with pytest.raises(
        EditError, match=r"fisher = 4 weighs G of layer 1 .*there is none"
    ):  # and not that each fact cannot be edited
        run_sequence(model, [FACT], tmp_path, settings=long, prepared=replace(ready, fisher=None))
    with pytest.raises(SettingsError, match=r"fisher must be 0 or more; found -1"):
        RomeSettings(fisher=-1.0)
    with pytest.raises(SettingsError, match=r"sought_in = mlp; found both"):
        PmetSettings(fisher=1.0)


def test_several_blocks_have_G_of_the_last_alone(load):
    model = load("gpt2")
    editor = editors.named("emmet")
    settings = editor.resolve(
        model, EmmetSettings(layers=(0, 1), steps=2, prefixes=(), prepend_bos=True, fisher=1.0, guard="warn")
    )
    ready = many.prepare(model, settings)
    assert ready.fisher is not None
    assert ready.fisher.layer == 1
    assert [each.fisher for each in ready.below] == [None]
    assert len(editing.edit(model, FACT, editor, settings, prepared=ready).changes) == 2
    assert ready.key != many.prepare(model, replace(settings, fisher=0.0)).key
    given = moments.fisher(model, 1, settings=FEW)
    assert many.prepare(model, settings, fisher=given).fisher is given
    with pytest.raises(EditError, match=r"fisher = 1 weighs G of layer 1 .*there is none"):
        editing.edit(model, FACT, editor, settings, prepared=replace(ready, fisher=None))
