"""A change spread over blocks: each block's write beside MEMIT's and PMET's own formulas, and what a norm behind the MLP lets through."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mechedit import applying, editing, keys, models, moments, weights
from mechedit.changes import total
from mechedit.closed_form import Metric, Terms
from mechedit.editors import many, named, spread
from mechedit.edits import EditError
from mechedit.settings import (  # fmt: skip
    MANY_POLICIES,
    PRESETS,
    AlphaEditSettings,
    EmmetSettings,
    MemitSettings,
    MomentSettings,
    PmetSettings,
    RomeSettings,
    SettingsError,
)
from mechedit.weights import Weight
from tests.conftest import FACT, assert_same_state, state, widen_bands
from tests.test_contract import FACTS

LAYERS = (1, 2, 3)
PREFIXES = ("", "Rome. ", "London Berlin. ")
ROME = {"steps": 3, "prefixes": (), "prepend_bos": False, "guard": "warn"}


def positive(n, seed):
    own = torch.randn(3 * n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return own.T @ own / len(own)


def subjects(model, settings, d_model=32):
    """The facts' contexts, with a change for each that was drawn."""
    found = []
    for seed, fact in enumerate(FACTS):
        rows = keys.contexts(model, fact, PREFIXES, prepend_bos=False)
        change = torch.randn(d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found.append(spread.Subject(rows, spread.averages(len(rows), [0], settings.average), change))
    return found


def seen(model, ids, at, name):
    """A hook point at a position, of one prompt alone."""
    _, cache = model.run_with_cache(torch.tensor([list(ids)]))
    return cache[name][0, at].double()


def plain(model, settings, Cs, wanted):
    """MEMIT's loop, or PMET's, as published (A.0): one prompt at a time, the normal equations, the model written as it goes."""
    last, n, changes = settings.layers[-1], len(settings.layers), []

    def now(fact):
        (row,) = keys.contexts(model, fact, ("",), prepend_bos=False)
        if settings.measured == "stream":
            return seen(model, row.ids, row.lookup, f"blocks.{last}.hook_resid_post")
        post = seen(model, row.ids, row.lookup, f"blocks.{last}.mlp.hook_post")
        return post @ models.W_out(model, last).detach().double() + models.b_out(model, last).double()

    def key(fact, layer):
        bare, *others = (seen(model, row.ids, row.lookup, f"blocks.{layer}.mlp.hook_post") for row in keys.contexts(model, fact, PREFIXES, prepend_bos=False))  # fmt: skip
        return (bare + sum(others) / len(others)) / 2

    Z = torch.stack([now(fact) + change for fact, change in zip(FACTS, wanted, strict=True)], 1)
    for i, layer in enumerate(settings.layers):
        K = torch.stack([key(fact, layer) for fact in FACTS], 1)
        left = n - i if settings.spread == "left" else (n - i) ** 0.5
        R = (Z - torch.stack([now(fact) for fact in FACTS], 1)) / left
        delta = torch.linalg.lstsq(settings.a * Cs[i] + K @ K.T, K).solution @ R.T
        changes.append(delta)
        place = Weight(layer, "mlp.W_out")
        weights.write_(model, place, weights.value(model, place).detach().clone(), delta)
    return changes


@pytest.mark.parametrize("policy", ["memit", "pmet"])
def test_each_block_writes_what_the_published_loop_writes(policy, load):
    model = load("gpt2")
    own = {name: MANY_POLICIES[policy][name] for name in ("sought_in", "measured", "spread", "average")}
    settings = MemitSettings(layers=LAYERS, layer=LAYERS[-1], a=30.0, **own)
    Cs, places = [positive(128, layer) for layer in LAYERS], [Weight(layer, "mlp.W_out") for layer in LAYERS]
    before = state(model)
    with models.cast(model, torch.float64), torch.no_grad():
        chosen = subjects(model, settings)
        with weights.restored(model, *places) as originals:
            spreading = spread.Spread(model, chosen, settings)
            found = [spreading.write_(i, Metric(Terms(a=30.0), Cs[i]), originals[places[i]]) for i in range(3)]
        with weights.restored(model, *places):
            expected = plain(model, settings, Cs, [each.change for each in chosen])
    assert_same_state(model, before)
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours.change.dense() - theirs).norm() / theirs.norm()) < 1e-8
    assert found[0].left == pytest.approx(1.0)
    if policy == "memit":
        assert found[2].left < 1.0, "what the blocks below add is wanted no more"


@pytest.mark.anywhere
def test_shares_of_what_is_left():
    assert [spread.share("left", (), i, 3) for i in range(3)] == pytest.approx([1 / 3, 1 / 2, 1])
    assert [spread.share("sqrt", (), i, 4) for i in (0, 3)] == pytest.approx([1 / 2, 1])
    assert [spread.share("own", (), i, 2) for i in range(2)] == [1, 1]
    assert [spread.share("left", (1.0, 3.0), i, 2) for i in range(2)] == [1 / 4, 1]
    assert [spread.share("own", (2.0, 2.0, 2.0), i, 3) for i in range(3)] == pytest.approx([1 / 3, 1 / 2, 1])


@pytest.mark.anywhere
def test_behind_a_norm_no_other_output_of_this_length_comes_closer_and_what_can_be_met_is():
    stream = torch.Generator().manual_seed(0)
    o, target, added = (torch.randn(4, 16, generator=stream, dtype=torch.float64) for _ in range(3))
    weight = 0.2 + torch.rand(16, generator=stream, dtype=torch.float64) * torch.randn(16, generator=stream, dtype=torch.float64).sign()  # fmt: skip

    def through(each):
        return weight * each / each.square().mean(1, keepdim=True).sqrt()

    for size in (0.1, 1.0, 10.0):
        wanted = through(o) + size * added
        best = o + spread.through_norm(o, size * added, weight)
        torch.testing.assert_close(best.norm(dim=1), o.norm(dim=1))
        least = (through(best) - wanted).norm(dim=1)
        for far in (1e-3, 0.1, 1.0, 3.0):
            for _ in range(50):
                other = best + far * torch.randn(4, 16, generator=stream, dtype=torch.float64)
                assert bool(((through(other) - wanted).norm(dim=1) >= least - 1e-9).all())
    met = o + spread.through_norm(o, through(target) - through(o), weight)
    torch.testing.assert_close(through(met), through(target), atol=1e-9, rtol=1e-9)
    assert spread.through_norm(o, added, None) is added


@pytest.mark.parametrize("shape", ["gemma2", "gemma3", "gpt2"])
def test_what_a_block_adds_to_the_stream_is_known_from_its_key(shape, load):
    model = load(shape)
    rows = keys.contexts(model, FACT, PREFIXES, prepend_bos=True)
    names = [f"blocks.1.{name}" for name in ("mlp.hook_post", "hook_resid_mid", "hook_resid_post")]
    post, middle, after = spread.read_at(model, names, 1, rows)
    added = spread.normed(spread.outputs(model, 1, post), spread.weight_after(model, 1))
    torch.testing.assert_close(added, after - middle, atol=1e-4, rtol=1e-4)


@pytest.fixture
def few(monkeypatch):
    widen_bands(monkeypatch)
    real, windows = moments.estimate_layers, MomentSettings(tokens=600, context=32, prepend_bos=False)
    monkeypatch.setattr(moments, "estimate_layers", lambda model, layers, **named: real(model, layers, settings=windows))  # fmt: skip


def edited(model, name, settings, facts=FACTS, **given):
    return editing.edit(model, facts, named(name), settings, **given)


@pytest.mark.parametrize(("shape", "target"), [("gpt2", "mlp"), ("gpt2", "stream"), ("gemma3", "mlp"), ("gemma3", "stream")])  # fmt: skip
def test_a_spread_edit_brings_to_the_last_block_what_one_block_brings(shape, target, load, few):
    model = load(shape)
    before = state(model)
    settings = MemitSettings(**ROME, layers=LAYERS, sought_in=target, a=1e-4)
    edit = edited(model, "memit", settings, FACTS[:1])
    assert_same_state(model, before)
    assert [change.weight for change in edit.changes] == [Weight(layer, "mlp.W_out") for layer in LAYERS]
    assert {f"{name}.{layer}" for name in ("met", "left") for layer in LAYERS} <= set(edit.report)
    alone = edited(model, "memit", MemitSettings(**ROME, layer=3, sought_in=target, a=1e-4), FACTS[:1])
    assert len(alone.changes) == 1
    assert "met.3" not in alone.report
    if shape == "gpt2":
        assert edit.report["met"] == pytest.approx(1.0, abs=1e-2)
        assert edit.after["p_new"] == pytest.approx(alone.after["p_new"], rel=0.05)
    assert [own["layer"] for own in edit.details["moments"]] == list(LAYERS)


def test_one_block_of_layers_is_the_layer(model, few):
    one = edited(model, "memit", MemitSettings(**ROME, layers=(2,), a=50.0))
    same = edited(model, "memit", MemitSettings(**ROME, layer=2, a=50.0))
    assert one.digest == same.digest


def test_pmet_lets_the_attention_change_and_writes_the_mlps_alone(model, few):
    edit = edited(model, "pmet", PmetSettings(**ROME, layer=2, a=50.0))
    (change,) = edit.changes
    assert change.weight == Weight(2, "mlp.W_out")
    K, V = (edit.vectors[name].double() for name in ("k*", "v*"))
    R = V - (K @ models.W_out(model, 2).detach().double() + models.b_out(model, 2).double())
    C = moments.estimate_layers(model, [2])[2].C
    expected = (R.T @ K @ torch.linalg.inv(K.T @ K + 50.0 * C)).T
    assert float((total([change]) - expected).norm() / expected.norm()) < 1e-5
    mlp_only = edited(model, "pmet", PmetSettings(**ROME, layer=2, a=50.0, sought_in="mlp"))
    assert float((edit.vectors["v*"] - mlp_only.vectors["v*"]).norm() / mlp_only.vectors["v*"].norm()) > 1e-3


def test_a_sequence_over_blocks_knows_the_keys_of_earlier_edits_block_by_block(model, few):
    settings = AlphaEditSettings(**ROME, layers=(1, 2), c=0.5, null=1e9)
    editor, known, standing = named("alphaedit"), {}, applying.apply(model)
    prepared = editing.make_ready(model, editor, settings)
    try:
        for fact in FACTS[:2]:
            edit = edited(model, "alphaedit", settings, [fact], prepared=prepared, state=known)
            known = editor.joined(known, edit.state)
            standing.add(edit)
        assert {name: len(each) for name, each in known.items()} == {"earlier.1": 128, "earlier.2": 128}
        assert [int(torch.linalg.matrix_rank(each, rtol=1e-6)) for each in known.values()] == [2, 2]
    finally:
        standing.undo()


def test_with_no_weight_of_c_memit_is_emmet_and_without_projection_and_ridge_alphaedit_is_memit_in_sequence(model, few):
    light = edited(model, "memit", MemitSettings(**ROME, layer=1, a=1e-9))
    exact = edited(model, "emmet", EmmetSettings(**ROME, layer=1))
    torch.testing.assert_close(total(light.changes), total(exact.changes), rtol=1e-4, atol=1e-5)
    known = {"earlier": positive(128, 5)}
    alpha = edited(model, "alphaedit", AlphaEditSettings(**ROME, layer=1, c=1e-9, null=0.0), state=known)
    memit = edited(model, "memit", MemitSettings(**ROME, layer=1, a=1e-9, b=1.0), state=known)
    torch.testing.assert_close(total(alpha.changes), total(memit.changes), rtol=1e-4, atol=1e-6)


def test_layers_that_cannot_be_are_refused_before_anything_is_computed(model, few):
    editor = named("memit")
    with pytest.raises(SettingsError, match="layer is the last of layers"):
        editor.resolve(model, MemitSettings(layer=1, layers=(1, 2)))
    with pytest.raises(models.ModelError, match="layer must be from 0 to 3"):
        editor.resolve(model, MemitSettings(layers=(1, 9)))
    for wrong in ({"layers": (2, 1)}, {"layers": (1, 1)}, {"layers": (1, 2), "portions": (1.0,)}, {"portions": (1.0,)}, {"layers": (1, 2), "portions": (1.0, 0.0)}):  # fmt: skip
        with pytest.raises(SettingsError, match=r"layers must be different|portions must be"):
            MemitSettings(**wrong)
    resolved = editor.resolve(model, MemitSettings(**ROME, layers=(1, 2)))
    assert (resolved.layer, resolved.layers, resolved.blocks) == (2, (1, 2), (1, 2))
    one = many.prepare(model, replace(resolved, layers=()))
    with pytest.raises(EditError, match="C is needed of each of the blocks"):
        edited(model, "memit", resolved, prepared=one)
    both = many.prepare(model, resolved)
    wrong_order = replace(both, below=(both.below[0],), moment=both.below[0].moment, estimated=both.below[0].estimated)
    with pytest.raises(EditError, match="must be of the edited layer 2"):
        edited(model, "memit", resolved, prepared=wrong_order)


@pytest.mark.anywhere
def test_presets_of_published_models_have_the_published_layers_and_constants():
    xl, j, neox = (PRESETS[name].settings for name in ("gpt2-xl", "gpt-j-6b", "gpt-neox-20b"))
    assert (xl["memit"].layers, xl["memit"].clamp, xl["memit"].steps, xl["memit"].a) == ((13, 14, 15, 16, 17), 0.75, 20, 20000.0)  # fmt: skip
    assert (j["memit"].layers, j["memit"].clamp, j["memit"].steps, j["memit"].a) == ((3, 4, 5, 6, 7, 8), 0.75, 25, 15000.0)  # fmt: skip
    assert (j["pmet"].layers, j["pmet"].learning_rate, j["pmet"].steps, j["pmet"].kl, j["pmet"].a) == ((3, 4, 5, 6, 7, 8), 0.2, 30, 1.0, 6000.0)  # fmt: skip
    assert (neox["pmet"].layers, neox["pmet"].clamp, neox["pmet"].kl, neox["pmet"].a) == ((6, 7, 8, 9, 10), 0.8, 0.8, 15000.0)  # fmt: skip
    assert (xl["alphaedit"].layers, xl["alphaedit"].null, xl["alphaedit"].c, xl["alphaedit"].a) == (xl["memit"].layers, 0.02, 10.0, 0.0)  # fmt: skip
    assert (xl["emmet"].layers, xl["emmet"].layer, j["emmet"].layer) == ((), 17, 5)


def test_a_layer_that_is_given_alone_is_edited_alone_whatever_the_preset_spreads_over(model, monkeypatch):
    preset = replace(PRESETS["gpt-j-6b"], shape=(4, 32, 400))
    own = replace(preset.settings["memit"], layers=(1, 2), layer=2)
    monkeypatch.setitem(PRESETS, model.cfg.model_name, replace(preset, settings={**preset.settings, "memit": own}))
    editor = named("memit")
    resolved = editor.resolve(model)
    assert (resolved.layers, resolved.layer, resolved.sought_in, resolved.clamp) == ((1, 2), 2, "stream", 0.75)
    alone = editor.resolve(model, MemitSettings(layer=0))
    assert (alone.layers, alone.layer, alone.sought_in) == ((), 0, "stream")
    assert editor.resolve(model, resolved) == resolved
    assert editor.resolve(model, MemitSettings(layers=(0, 3))).layer == 3


def test_where_a_model_has_no_preset_for_pmet_its_constants_are_pmets_and_its_layer_is_romes(model, monkeypatch):
    preset = replace(PRESETS["gpt2"], shape=(4, 32, 400), settings={"rome": RomeSettings(layer=1, clamp=0.6)})
    monkeypatch.setitem(PRESETS, model.cfg.model_name, preset)
    found = named("pmet").resolve(model)
    assert (found.layer, found.clamp, found.stop, found.learning_rate, found.kl) == (1, 0.6, "top", 0.2, 1.0)
    assert named("memit").resolve(model).stop == "target"


def test_a_subject_of_which_nothing_was_wanted_says_nothing_of_what_was_met():
    wanted = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    added = torch.tensor([[1.5, 2.0], [0.1, 0.0]])
    assert spread.met(added, wanted) == pytest.approx(0.5)
    assert spread.met(added[1:], wanted[1:]) == 1.0
