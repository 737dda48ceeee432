from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from mechedit import applying, editing, keys, models, moments, rank_one, scoring, values
from mechedit.editors import rome
from mechedit.edits import EditError
from mechedit.facts import Fact, FactError
from mechedit.models import ModelError
from mechedit.settings import POLICIES, PRESETS, MomentSettings, RomeSettings, SettingsError, TraceSettings
from mechedit.tracing import trace
from tests.conftest import FACT, SHAPES, assert_same_state, state, widen_bands
from tests.slow_edit import BY_POLICY, assert_same_edit, both, relative

QUICK = RomeSettings(layer=1, steps=8, prefixes=((3, 2), (5, 1)))
BOS = replace(QUICK, prepend_bos=True)
NEEDLE = Fact("Space Needle", "{} lies in", target_true="Seattle", target_new="London")  # a key close to FACT's
ROME = Fact("Rome", "The city of {} is", target_true="Seattle", target_new="London")


@pytest.fixture(autouse=True)
def wide_band(monkeypatch):
    """Random models need changes larger than any trained one; the band itself has a test of its own."""
    widen_bands(monkeypatch)


@pytest.fixture
def moment(model):
    return moments.estimate(model, 1, settings=MomentSettings(tokens=600, context=32))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_edit_raises_the_target_and_leaves_the_model_as_it_was(shape, load):
    model = load(shape)
    before = state(model)
    edit = rome.edit(
        model,
        FACT,
        replace(QUICK, steps=20, clamp=8.0),
        moments.estimate(model, 1, settings=MomentSettings(tokens=600, context=32)),
    )
    assert edit.after["p_new"] > 1.05 * edit.before["p_new"]  # a random model can be moved only so far from one place
    assert_same_state(model, before)
    with applying.edited(model, edit):
        assert scoring.score(model, [(FACT.prompt, "Paris")])[0].p == pytest.approx(edit.after["p_new"], rel=1e-4)
    assert_same_state(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_value_is_found_in_float32_and_the_edit_works(dtype, folder):
    model = models.load(str(folder("gpt2")), device="cpu", dtype=dtype)
    before = state(model)
    edit = rome.edit(
        model,
        FACT,
        replace(QUICK, steps=20, clamp=8.0),
        moments.estimate(model, 1, settings=MomentSettings(tokens=600, context=32)),
    )
    assert edit.after["p_new"] > 1.05 * edit.before["p_new"]
    assert edit.changes[0].u.dtype == edit.changes[0].step.dtype == torch.float64
    assert edit.origin["dtype"] == str(dtype).removeprefix("torch.")
    assert_same_state(model, before)


def test_an_edit_and_a_trace_do_not_mind_inference_mode_nor_another_default_format(model, fact, moment):
    plain = rome.edit(model, fact, QUICK, moment)
    with torch.inference_mode():
        assert rome.edit(model, fact, QUICK, moment).digest == plain.digest
    torch.set_default_dtype(torch.float64)
    try:
        assert rome.edit(model, fact, QUICK, moment).after == pytest.approx(plain.after, rel=1e-4)
        trace(model, fact, TraceSettings(draws=1, kinds=("mlp",)))
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_averaged_key_returns_the_value_and_every_row_its_share(model, fact, moment):
    edit = rome.edit(model, fact, BOS, moment)
    rows = keys.contexts(model, fact, tuple(edit.details["prefixes"]), prepend_bos=True)
    found = keys.subject_keys(model, 1, rows)
    change = edit.changes[0]
    key = found.double().mean(0)
    torch.testing.assert_close(change.u, rank_one.direction(key.float(), moment.C), rtol=1e-4, atol=1e-4)
    assert float(key @ change.u) == pytest.approx(change.divisor, rel=1e-4)
    shares = found.double() @ change.u / change.divisor
    assert edit.details["shares"][: len(rows)] == pytest.approx(shares.tolist(), rel=1e-3)


def test_the_value_may_be_sought_with_some_of_the_prompts_and_the_key_is_averaged_over_all(
    model, fact, moment, monkeypatch
):
    before = ("", "Rome. ", "London Berlin. ", "Apple. ", "piano. ")
    asked, plain = [], values.optimise_all
    monkeypatch.setattr(values, "optimise_all", lambda model, sought, *given, **more: asked.extend(sought) or plain(model, sought, *given, **more))  # fmt: skip
    every = rome.edit(model, fact, BOS, moment, prefixes=before)
    some = rome.edit(model, fact, replace(BOS, sought_with=2), moment, prefixes=before)
    rows = keys.contexts(model, fact, before, prepend_bos=True)
    assert [list(each.rows) for each in asked] == [list(rows), [rows[0], rows[2]]]
    assert torch.equal(every.vectors["k*"], some.vectors["k*"])
    assert some.details["shares"] == pytest.approx([every.details["shares"][index] for index in (0, 2, -1)])
    assert not torch.allclose(every.vectors["v*"], some.vectors["v*"])


def test_the_published_policy_inserts_at_the_bare_prompts_key(model, fact, moment):
    edit = rome.edit(model, fact, replace(BOS, **POLICIES["published"]), moment)
    rows = keys.contexts(model, fact, tuple(edit.details["prefixes"]), prepend_bos=True)
    found = keys.subject_keys(model, 1, rows).double()
    change = edit.changes[0]
    assert float(found[0] @ change.u) == pytest.approx(change.divisor, rel=1e-4)
    assert edit.details["shares"] == [1.0] * 5
    own = {"direction": "averaged", "inserted": "prompt", "shares": "whole", "stop": "published"}
    assert own.items() <= edit.settings.items()
    assert not torch.allclose(change.step, rome.edit(model, fact, BOS, moment).changes[0].step)


@pytest.mark.parametrize("policy", BY_POLICY)
@pytest.mark.parametrize(("target", "stop_at"), [("Paris", 0.0), ("zebra", 0.0), ("Paris", 5.27)])
def test_a_policy_of_other_authors_is_a_plain_implementation_of_it(policy, target, stop_at, model, fact):
    moment = moments.estimate(model, 1, settings=MomentSettings(tokens=600, context=32, prepend_bos=False))
    settings = replace(QUICK, steps=6, stop_at=stop_at, prepend_bos=False, learning_rate=0.1)
    edit, plain = both(model, replace(fact, target_new=target), moment, settings, policy)
    assert (len(edit.details["losses"]) < 6) == (stop_at > 0)
    assert_same_edit(model, edit, plain)


def test_policies_differ_by_more_than_the_plain_implementation_may(model, fact, moment):
    found = {}
    for name, own in POLICIES.items():
        change = rome.edit(model, fact, replace(BOS, **own), moment).changes[0]
        found[name] = torch.outer(change.u, change.step)
    for a, b in itertools.combinations(found, 2):
        assert relative(found[a], found[b]) > 1e-2, (a, b)


def test_without_a_moment_one_is_estimated_from_sampled_text(load):
    model = load("llama")
    edit = rome.edit(model, FACT, QUICK)
    assert edit.details["moment"]["source"] == "sampled from the model"
    assert edit.details["moment"]["keys"] == 480


def test_what_is_no_fact_or_no_moment_is_told(model, moment):
    """Past the tests' own checks of types, which users do not have."""
    with pytest.raises(EditError, match="a Moment .* found a Tensor"):
        rome.check_moment.__wrapped__(model, moment.C, QUICK)
    with pytest.raises(FactError, match="needs a Fact, or several; found the text 'Rome'"):
        editing.edit.__wrapped__(model, "Rome", rome.Rome(), QUICK)


def test_the_same_seed_gives_the_same_edit(model, fact, moment):
    first, again, other = (rome.edit(model, fact, replace(QUICK, seed=seed), moment).changes[0] for seed in (0, 0, 1))
    assert torch.equal(first.step, again.step)
    assert not torch.equal(first.step, other.step)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layer": 4}, ModelError, "from 0 to 3"),
        ({"layer": -1}, EditError, "no layer is given and .* has no preset"),
    ],
)
def test_a_layer_that_cannot_be_edited_is_refused(change, error, message, model, fact):
    with pytest.raises(error, match=message):
        rome.edit(model, fact, replace(QUICK, **change))


def test_a_C_that_does_not_belong_is_refused_before_the_model_runs(model, fact, moment, monkeypatch):
    bad = moment.C.clone()
    bad[0, 0] = float("nan")
    cases = {
        "of layer 2": replace(moment, layer=2),
        "it is \\[10, 10\\]": replace(moment, C=moment.C[:10, :10]),
        "NaN or infinity": replace(moment, C=bad),
        "more keys than d_mlp = 128; this one has 100": replace(moment, keys=100),
        "estimated on other weights": replace(moment, origin={**moment.origin, "keys": "0"}),
        "estimated on other weights .gpt2-old.": replace(moment, origin={"weight_hash": "0", "name": "gpt2-old"}),
        "part 1 of 2 of a text": replace(moment, settings=replace(moment.settings, parts=2, part=1)),
        "estimated with(out)? BOS, and the edit": replace(
            moment, settings=replace(moment.settings, prepend_bos=not moment.settings.prepend_bos)
        ),
    }
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    for message, spoilt in cases.items():
        with pytest.raises(EditError, match=message):
            rome.edit(model, fact, QUICK, spoilt)


def test_prefixes_can_be_given(load, monkeypatch):
    widen_bands(monkeypatch)
    model, settings = load("gpt2"), RomeSettings(layer=1, steps=2, prefixes=((3, 1),))
    sampled = rome.edit(model, FACT, settings)
    monkeypatch.setattr(keys, "sample", lambda *args, **named: pytest.fail("sampled"))
    given = rome.edit(model, FACT, settings, prefixes=sampled.details["prefixes"])
    assert torch.equal(given.changes[0].u, sampled.changes[0].u)
    other = rome.edit(model, FACT, settings, prefixes=("", "The city. "))
    assert other.details["prefixes"] == ["", "The city. "]
    assert not torch.equal(other.changes[0].u, sampled.changes[0].u)
    turned = rome.edit(model, FACT, settings, prefixes=("The city. ", ""))
    assert turned.details["prefixes"] == ["", "The city. "]
    assert torch.equal(turned.changes[0].u, other.changes[0].u)
    with pytest.raises(EditError, match="prefixes must have the bare prompt's, .* found .'The city. '."):
        rome.edit(model, FACT, settings, prefixes=("The city. ",))


def test_a_preset_gives_layer_and_constants(load, monkeypatch):
    model = load("gpt2")
    preset = replace(PRESETS["gpt2"], settings={"rome": RomeSettings(layer=2, clamp=0.5)}, shape=(4, 32, 400))
    monkeypatch.setitem(PRESETS, model.cfg.model_name, preset)
    found = rome.resolve(model)
    assert (found.layer, found.clamp) == (2, 0.5)
    with pytest.raises(ModelError, match="from 0 to 3 .* found 15"):
        rome.resolve(model, RomeSettings(layer=15))


@pytest.mark.parametrize(
    "given",
    [
        {"direction": "mixed"},
        {"inserted": "published"},
        {"shares": "half"},
        {"stop": "never"},
        {"fact_token": "middle"},
        {"guard": "hope"},
        {"ridge": -1.0},
        {"clamp": 0.0},
        {"clamp": float("inf")},
        {"stop_at": float("nan")},
        {"ridge": float("inf")},
        {"learning_rate": float("inf")},
        {"seed": -1},
        {"steps": -1},
        {"learning_rate": 0.0},
        {"weight_decay": -1.0},
        {"kl": -1.0},
        {"prefixes": ((0, 1),)},
        {"sought_with": -1},
    ],
)
def test_settings_that_cannot_be_meant_are_errors(given):
    with pytest.raises(SettingsError, match=next(iter(given))):
        RomeSettings(**given)


# --- what is done once ------------------------------------------------------------------------------------------------


def forbid(monkeypatch):
    """No cubic work on C from now on."""

    def refuse(*args, **named):
        raise AssertionError("C was factorised or its eigenvalues computed")

    for name in ("cholesky_ex", "cholesky", "eigvalsh", "eigh", "inv", "solve"):
        monkeypatch.setattr(torch.linalg, name, refuse)


def test_a_second_edit_with_a_moment_does_no_cubic_work(model, fact, moment, monkeypatch):
    fresh = replace(moment)
    expected = rome.edit(model, ROME, BOS, replace(moment)).changes[0]
    rome.edit(model, fact, BOS, moment)
    forbid(monkeypatch)
    again = rome.edit(model, ROME, BOS, moment).changes[0]
    assert torch.equal(again.u, expected.u)
    assert torch.equal(again.step, expected.step)
    with pytest.raises(AssertionError, match="factorised"):
        rome.edit(model, ROME, BOS, fresh)


def test_a_moment_that_was_saved_after_an_edit_has_its_factor(model, fact, moment, monkeypatch, tmp_path):
    rome.edit(model, fact, BOS, moment)
    path = moment.save(tmp_path / "C.safetensors")
    forbid(monkeypatch)
    loaded = moments.Moment.load(path)
    assert torch.equal(
        rome.edit(model, fact, BOS, loaded).changes[0].u, rome.edit(model, fact, BOS, moment).changes[0].u
    )


def test_what_was_prepared_with_a_ridge_serves_every_edit(model, fact, moment, monkeypatch):
    settings = replace(BOS, ridge=0.1)
    expected = rome.edit(model, ROME, settings, moment)
    prepared = rome.prepare(model, settings, moment)
    editing.edit(model, fact, rome.Rome(), settings, prepared=prepared)
    forbid(monkeypatch)
    second = editing.edit(model, ROME, rome.Rome(), settings, prepared=prepared)
    assert torch.equal(second.changes[0].u, expected.changes[0].u)
    assert second.report["cond_C"] < moment.cond


# --- facts about several subjects -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["averaged", "prompt", "r-rome", "p-rome"])
def test_after_an_edit_of_two_subjects_each_ones_key_returns_its_value(policy, model, fact, moment):
    settings = replace(BOS, **POLICIES[policy])
    edit = rome.edit(model, [fact, NEEDLE], settings, moment)
    assert [change.layer for change in edit.changes] == [1, 1]
    own = [key_of(model, each, edit, settings.inserted) for each in (fact, NEEDLE)]
    b_out = models.b_out(model, 1)

    def returned():
        return torch.stack(own) @ models.W_out(model, 1).detach() + b_out

    assert edit.vectors["v*"].shape == (2, 32)
    torch.testing.assert_close(edit.vectors["k*"], torch.stack(own), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(returned(), edit.vectors["v*"], atol=1e-2)
    with applying.edited(model, edit):
        torch.testing.assert_close(returned(), edit.vectors["v*"], atol=1e-4, rtol=1e-4)
    alone = [rome.edit(model, each, settings, moment) for each in (fact, NEEDLE)]
    for index, each in enumerate(alone):
        torch.testing.assert_close(edit.vectors["v*"][index], each.vectors["v*"], atol=1e-4, rtol=1e-4)
    with applying.edited(model, *alone):
        assert not torch.allclose(returned(), edit.vectors["v*"], atol=1e-3), "one by one they disturb each other"


def key_of(model, fact, edit, whose):
    rows = keys.contexts(model, fact, tuple(edit.details["prefixes"]), prepend_bos=True)
    found = keys.subject_keys(model, 1, rows)
    return found.mean(0) if whose == "averaged" else found[0]


def test_an_edit_of_two_subjects_moves_ordinary_keys_least(model, fact, moment):
    """Against the least change that a general solver finds for the same keys and values: min trace(D^T C D) with K D = R."""
    edit = rome.edit(model, [fact, NEEDLE], BOS, moment)
    K, V = edit.vectors["k*"].double(), edit.vectors["v*"].double()
    wanted = V - (K @ models.W_out(model, 1).detach().double() + models.b_out(model, 1).double())
    system = torch.cat([torch.cat([2 * moment.C, K.T], 1), torch.cat([K, torch.zeros(2, 2).double()], 1)])
    best = torch.linalg.solve(system, torch.cat([torch.zeros(len(moment.C), 32).double(), wanted]))[: len(moment.C)]
    assert relative(sum(torch.outer(change.u, change.step) for change in edit.changes), best) < 1e-6


def test_two_subjects_are_measured_each_and_two_prompts_of_one_are_one_change(model, fact, moment):
    also = Fact("Rome", "{} lies in", target_true="Italy", target_new="London")
    edit = rome.edit(model, [ROME, fact, also], BOS, moment)
    assert len(edit.changes) == 2
    assert [each.fact["prompt"] for each in edit.facts] == [ROME.prompt, fact.prompt, also.prompt]
    assert len(edit.details["losses"]) == len(edit.details["shares"]) == 2
    assert len(edit.details["shares"][0]) == 2 * 4 + 1, "both prompts behind each prefix, and the essence"
    with applying.edited(model, edit):
        for each in edit.facts:
            assert scoring.score(model, [(each.fact["prompt"], each.fact["target_new"])])[0].p == pytest.approx(
                each.after["p_new"], rel=1e-4
            )
            assert each.after["p_new"] > each.before["p_new"]
    assert "divisor" not in edit.report, "each has its own"


def test_the_published_policy_is_refused_for_two_subjects(model, fact, moment):
    mixed = replace(BOS, **POLICIES["published"])
    with pytest.raises(SettingsError, match="give direction and inserted the same key .found averaged and prompt."):
        rome.edit(model, [fact, ROME], mixed, moment)
    rome.edit(model, [fact, replace(fact, template="The city of {} is")], mixed, moment)


def test_two_subjects_with_one_key_are_refused(model, fact, moment):
    """Block 1 cannot tell them apart: all it has read is the same."""
    part = Fact("Space Needle", "The {} lies in", target_true="Seattle", target_new="London")
    with pytest.raises(rank_one.RankOneError, match="2 keys must not depend on each other.*one at a time"):
        rome.edit(model, [fact, part], BOS, moment)


def test_the_bare_prompts_key_is_its_own_wherever_it_stands_among_prefixes(model, fact, moment):
    settings = rome.resolve(model, replace(QUICK, direction="prompt", inserted="prompt", guard="warn"))
    (bare,) = keys.contexts(model, fact, ("",), prepend_bos=settings.prepend_bos)
    expected = keys.subject_keys(model, 1, (bare,))[0]
    for before in (("", "The city. "), ("The city. ", ""), ("A. ", "", "The city. ")):
        for ready in (rome.prepare(model, settings, moment, before), rome.Prepared(moment, before, moment)):
            made = editing.edit(model, fact, rome.Rome(), settings, prepared=ready)
            torch.testing.assert_close(made.vectors["k*"], expected)
    with pytest.raises(EditError, match="bare prompt's"):
        rome.Prepared(moment, ("A. ",), moment)


def test_what_is_made_ready_with_an_edit_in_a_lower_block_belongs_to_the_model_as_it_is(model, fact, monkeypatch):
    """C and prefixes are those of the model underneath, given or not."""
    widen_bands(monkeypatch)
    real, few = moments.estimate_layers, MomentSettings(tokens=600, context=32)
    monkeypatch.setattr(moments, "estimate", lambda model, layer, **named: real(model, [layer], settings=few)[layer])
    low = rome.edit(model, NEEDLE, replace(QUICK, layer=0), moments.estimate(model, 0))
    with applying.edited(model, low):
        ready = editing.make_ready(model, rome.Rome(), QUICK)
        given = editing.edit(model, fact, rome.Rome(), QUICK, prepared=ready)
        made = editing.edit(model, fact, rome.Rome(), QUICK)
    assert torch.equal(given.changes[0].dense(), made.changes[0].dense())
