from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

from mechedit import cache, edits, files, generation, guards, keys, models, moments, prompts, rank_one, scoring, values
from mechedit.editors import rome
from mechedit.edits import EditError
from mechedit.facts import Fact, FactError
from mechedit.models import ModelError
from mechedit.settings import MomentSettings, RomeSettings, SettingsError
from tests.conftest import FACT, SHAPES, assert_same_state, state, widen_bands
from tests.slow_edit import assert_same_edit, both

QUICK = RomeSettings(layer=1, steps=8, prefixes=((3, 2), (5, 1)))
BOS = replace(QUICK, prepend_bos=True)


@pytest.fixture(autouse=True)
def wide_band(monkeypatch):
    """Random models need changes larger than any trained one; the band itself has a test of its own."""
    widen_bands(monkeypatch)


@pytest.fixture
def moment(model):
    return moments.estimate(model, 1, settings=MomentSettings(tokens=600, context=32))


# --- keys -------------------------------------------------------------------------------------------------------------


def test_prefixes_are_the_bare_prompt_and_seeded_samples(model):
    found = keys.prefixes(model, QUICK)
    assert found == keys.prefixes(model, QUICK)
    assert found[0] == ""
    assert len(found) == 4
    assert all(prefix.endswith(". ") for prefix in found[1:])
    assert keys.prefixes(model, replace(QUICK, seed=1)) != found
    assert keys.prefixes(model, replace(QUICK, prefixes=())) == ("",)


def test_prefixes_are_sampled_once_for_a_model_and_again_where_the_file_is_damaged(model, monkeypatch):
    found = keys.prefixes(model, QUICK)
    real, sampled = keys.sample, []
    monkeypatch.setattr(keys, "sample", lambda *args, **kwargs: sampled.append(1) or real(*args, **kwargs))
    assert keys.prefixes(model, QUICK) == found
    assert sampled == []
    (entry,) = (cache.root() / "prefixes").iterdir()
    entry.write_text(entry.read_text()[:5])
    assert keys.prefixes(model, QUICK) == found
    assert len(sampled) == 2


@pytest.mark.parametrize("prefix", ["", "{} and {0}. ", "日本 é. ", "The Space Needle. "])
def test_the_subject_is_found_behind_any_prefix(prefix, model, fact):
    (row,) = keys.contexts(model, fact, (prefix,), prepend_bos=True)
    _, offsets = prompts.encode(model, prefix + fact.prompt, prepend_bos=True)
    assert offsets[row.lookup][1] == len(prefix) + len("The Space Needle")
    assert row.last == len(offsets) - 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_key_is_the_input_of_W_out_at_the_subject_of_each_context(shape, load):
    model = load(shape)
    rows = keys.contexts(model, FACT, ("", "Rome. ", "London Berlin. "), prepend_bos=True)
    together = keys.subject_keys(model, 1, rows)
    for index, row in enumerate(rows):
        kept = []
        with (
            torch.no_grad(),
            model.hooks(
                fwd_hooks=[("blocks.1.mlp.hook_post", lambda activation, hook, kept=kept: kept.append(activation))]
            ),
        ):
            model(torch.tensor([list(row.ids)]))
        torch.testing.assert_close(together[index], kept[0][0, row.lookup], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prefix", ["", "{} and {0}. ", "Rome. "])
def test_the_token_of_the_fact_is_found_by_its_place_in_the_whole_text(prefix, model, fact):
    _, offsets = prompts.encode(model, prefix + fact.prompt, prepend_bos=True)
    text = prefix + fact.prompt
    at = {}
    for token in ("subject_first", "subject_last", "after_first", "last"):
        (row,) = keys.contexts(model, fact, (prefix,), token, prepend_bos=True)
        at[token] = text[slice(*offsets[row.lookup])]
    assert text[len(prefix) :].startswith(at["subject_first"].strip())
    assert fact.subject.endswith(at["subject_last"].strip())
    assert at["after_first"].strip() == "is"
    assert text.endswith(at["last"].strip())


def test_a_prompt_that_ends_with_its_subject_has_no_token_after_it(model):
    with pytest.raises(FactError, match="no token comes after it"):
        keys.contexts(model, Fact("Rome", "The city of {}"), ("",), "after_first")


# --- values -----------------------------------------------------------------------------------------------------------


def slow_value(model, rows, essence, target, initial, shares, layer, settings):
    """The same optimisation written plainly: whole forward passes with all logits, one prompt at a time."""
    delta = torch.zeros_like(initial, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=settings.learning_rate)

    def log_p(ids, subject, share, change):
        def add(module, args, output):
            output = output.clone()
            output[0, subject] = output[0, subject] + share * change
            return output

        handle = models.mlp_module(model, layer).register_forward_hook(add)
        try:
            return model(torch.tensor([list(ids)]))[0].log_softmax(-1)
        finally:
            handle.remove()

    original = log_p(essence.ids, essence.lookup, 0.0, delta)[essence.lookup].detach()
    for _ in range(settings.steps):
        losses = []
        for row, share in zip(rows, shares, strict=False):
            predicted = log_p([*row.ids, *target[:-1]], row.lookup, share, delta)
            losses.append(-torch.stack([predicted[row.last + step, token] for step, token in enumerate(target)]).mean())
        new = log_p(essence.ids, essence.lookup, shares[-1], delta)[essence.lookup]
        nll, kl = torch.stack(losses).mean(), (new.exp() * (new - original)).sum()
        loss = nll + settings.kl * kl + settings.weight_decay * delta.norm() / initial.norm() ** 2
        (delta.grad,) = torch.autograd.grad(loss, [delta])
        adam.step()
        with torch.no_grad():
            delta.mul_((settings.clamp * initial.norm() / delta.norm()).clamp(max=1.0))
    return initial + delta.detach()


@pytest.mark.parametrize("shape", ["gpt2", "gptj", "gemma3"])
def test_the_value_equals_a_plain_optimisation(shape, load):
    model = load(shape)
    before = state(model)
    settings = replace(BOS, steps=3, clamp=0.8, stop_at=0.0, learning_rate=0.1)
    rows = keys.contexts(model, FACT, ("", "Rome. ", "London Berlin. "), prepend_bos=True)
    (essence,) = keys.contexts(model, Fact(FACT.subject, "{} is a"), ("",), prepend_bos=True)
    target = prompts.continuation(model, FACT.prompt, "zebra")
    assert len(target) > 1
    key = keys.subject_keys(model, 1, rows)[0]
    initial = (key @ models.W_out(model, 1) + models.b_out(model, 1)).detach()
    shares = torch.tensor([1.0, 0.7, 1.3, 0.9])
    fast = values.optimise(model, rows, essence, [target] * len(rows), initial, shares, 1, settings)
    slow = slow_value(model, rows, essence, target, initial, shares, 1, settings)
    torch.testing.assert_close(fast.value, slow, atol=1e-3, rtol=1e-2)
    assert len(fast.losses) == 3
    assert_same_state(model, before)


def test_rows_run_together_where_that_computes_least():
    assert values._together([3, 5, 4, 9], [10, 11, 10, 12]) == [[0, 2, 1, 3]], "few rows: one group"
    many = values._together([3] * 20 + [40] * 20, [10] * 20 + [48] * 20)
    assert [len(group) for group in many] == [20, 20]
    lookups, lengths = [5, 2, 9, 2, 30, 31], [9, 12, 20, 4, 40, 41]
    found = values._together(lookups, lengths)
    assert sorted(index for group in found for index in group) == list(range(6))

    def cost(groups):
        return sum(values.GROUP_COST + len(group) * (max(lengths[i] for i in group) - min(lookups[i] for i in group)) for group in groups)  # fmt: skip

    order = sorted(range(6), key=lambda index: (lookups[index], lengths[index]))
    cuts = itertools.chain.from_iterable(itertools.combinations(range(1, 6), size) for size in range(6))
    every = [[order[a:b] for a, b in itertools.pairwise([0, *cut, 6])] for cut in cuts]
    assert cost(found) == min(map(cost, every))


@pytest.mark.parametrize("cost", [0, 1000])
def test_one_group_or_many_give_the_same_value(cost, model, monkeypatch):
    together, _ = optimised(model, stop_at=0.0)
    monkeypatch.setattr(values, "GROUP_COST", cost)
    torch.testing.assert_close(optimised(model, stop_at=0.0)[0].value, together.value, atol=1e-4, rtol=1e-3)


def optimised(model, **changes):
    settings = replace(BOS, **changes)
    rows = keys.contexts(model, FACT, ("", "Rome. "), prepend_bos=True)
    (essence,) = keys.contexts(model, Fact(FACT.subject, "{} is a"), ("",), prepend_bos=True)
    initial = (keys.subject_keys(model, 1, rows)[0] @ models.W_out(model, 1) + models.b_out(model, 1)).detach()
    target = prompts.continuation(model, FACT.prompt, "Paris")
    found = values.optimise(model, rows, essence, [target] * 2, initial, torch.ones(3), 1, settings)
    return found, initial


def test_the_change_of_the_value_is_clamped(model):
    found, initial = optimised(model, clamp=0.3, stop_at=0.0)
    assert float((found.value - initial).norm()) == pytest.approx(0.3 * float(initial.norm()), rel=1e-4)


def test_it_stops_once_the_target_is_learnt_and_not_for_the_penalties(model):
    found, _ = optimised(model, stop_at=100.0, weight_decay=1e6)
    assert len(found.losses) == 1
    assert len(optimised(model, stop_at=0.0)[0].losses) == 8


def test_no_steps_leave_the_value(model):
    found, initial = optimised(model, steps=0)
    torch.testing.assert_close(found.value, initial)


def test_each_weight_of_the_loss_is_obeyed(model):
    base, _ = optimised(model, stop_at=0.0, kl=0.0, weight_decay=0.0)
    assert all(kl == decay == 0 for _, kl, decay in base.losses)
    kl, _ = optimised(model, stop_at=0.0, kl=10.0, weight_decay=0.0)
    assert kl.losses[-1][1] > 0
    decay, _ = optimised(model, stop_at=0.0, kl=0.0, weight_decay=50.0)
    assert decay.losses[-1][2] > 0
    lr, _ = optimised(model, stop_at=0.0, kl=0.0, weight_decay=0.0, learning_rate=0.01)
    for other in (kl, decay, lr):
        assert not torch.allclose(other.value, base.value, atol=1e-3)


# --- the editor -------------------------------------------------------------------------------------------------------


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
    with edits.edited(model, edit):
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


def test_the_published_policy_inserts_at_the_bare_prompts_key(model, fact, moment):
    edit = rome.edit(model, fact, replace(BOS, policy="published"), moment)
    rows = keys.contexts(model, fact, tuple(edit.details["prefixes"]), prepend_bos=True)
    found = keys.subject_keys(model, 1, rows).double()
    change = edit.changes[0]
    assert float(found[0] @ change.u) == pytest.approx(change.divisor, rel=1e-4)
    assert edit.details["shares"] == [1.0] * 5
    assert edit.settings["policy"] == "published"
    assert not torch.allclose(change.step, rome.edit(model, fact, BOS, moment).changes[0].step)


@pytest.mark.parametrize(("target", "stop_at"), [("Paris", 0.0), ("zebra", 0.0), ("Paris", 5.27)])
def test_the_published_policy_is_the_published_code(target, stop_at, model, fact):
    moment = moments.estimate(model, 1, settings=MomentSettings(tokens=600, context=32, prepend_bos=False))
    settings = replace(QUICK, steps=6, stop_at=stop_at, prepend_bos=False, learning_rate=0.1)
    edit, plain = both(model, replace(fact, target_new=target), moment, settings)
    assert (len(edit.details["losses"]) < 6) == (stop_at > 0)
    assert_same_edit(model, edit, plain)


def test_the_report_is_what_was_written(model, fact, moment):
    edit = rome.edit(model, fact, QUICK, moment)
    original = models.W_out(model, 1).detach().clone()
    with edits.edited(model, edit):
        change = models.W_out(model, 1).detach() - original
    assert edit.report["update_norm"] == pytest.approx(float(change.norm()), rel=1e-3)
    assert edit.report["relative_norm"] == pytest.approx(float(change.norm() / original.norm()), rel=1e-3)
    assert edit.report["cond_C"] == moment.cond
    record = json.loads(json.dumps(edit.to_json()))
    wanted = {
        "model",
        "prompt",
        "subject",
        "target_new",
        "target_true",
        "layer",
        "before",
        "after",
        "edit",
        "seconds",
        "settings",
        "versions",
    }
    assert wanted <= record.keys()
    numbers = {"divisor", "divisor_share", "update_norm", "relative_norm", "cond_C", "essence_kl", "perplexity_ratio"}
    assert record["edit"].keys() == numbers
    assert edit.details["moment"]["keys"] == 600


def test_without_a_moment_one_is_estimated_from_sampled_text(load):
    model = load("llama")
    edit = rome.edit(model, FACT, QUICK)
    assert edit.details["moment"]["source"] == "sampled from the model"
    assert edit.details["moment"]["keys"] == 480


def test_without_a_true_target_the_models_own_answer_is_the_true_one(model, moment):
    fact = Fact("Rome", "{} is the city", target_new="Paris")
    said, _, p = scoring.top(model, fact.prompt, 1)[0]
    if not said.strip():
        pytest.skip("the random model says white space")
    edit = rome.edit(model, fact, QUICK, moment)
    assert edit.fact["target_true"].startswith(said.strip())
    assert generation.complete(model, fact.prompt).split()[0].startswith(edit.fact["target_true"])
    assert edit.before["p_true"] <= p + 1e-6


@pytest.mark.parametrize(
    ("text", "word"),
    [(" New York, and", "New"), (" Seattle.", "Seattle"), (" U.S. of", "U.S"), (", he", "first"), ("", "first")],
)
def test_the_true_target_is_the_whole_first_word_of_the_models_answer(model, moment, monkeypatch, text, word):
    fact = Fact("Rome", "{} is the city", target_new="Paris")
    monkeypatch.setattr(generation, "complete", lambda *args, **kwargs: text)
    monkeypatch.setattr(scoring, "top", lambda *args, **kwargs: [(" first", -1, 0.5)])
    assert rome.edit(model, fact, QUICK, moment).fact["target_true"] == word


def test_what_is_no_fact_or_no_moment_is_told(model, moment):
    """Past the tests' own checks of types, which users do not have."""
    with pytest.raises(EditError, match="a Moment .* found a Tensor"):
        rome.check_moment.__wrapped__(model, moment.C, QUICK)
    with pytest.raises(FactError, match="needs a Fact, or several of one subject; found the text 'Rome'"):
        rome.edit.__wrapped__(model, "Rome", QUICK, moment)


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


def test_a_target_that_the_model_already_says_is_refused(model, moment):
    said, _, _ = scoring.top(model, "The city of", 1)[0]
    ids = prompts.continuation(model, "The city of", said) if said.strip() else []
    if len(ids) != 1:
        pytest.skip("the random model's answer is no single token")
    with pytest.raises(EditError, match="already says .* nothing to edit"):
        rome.edit(model, Fact("city", "The {} of", target_new=said.strip()), QUICK, moment)


def test_a_fact_without_a_new_target_is_refused(model):
    with pytest.raises(FactError, match="no target_new"):
        rome.edit(model, Fact("Rome", "{} is"), QUICK)


def test_a_prompt_that_does_not_fit_is_refused_before_the_model_runs(model, monkeypatch):
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    with pytest.raises(FactError, match="must fit the context"):
        rome.edit(model, Fact("A", "{} " + "xq " * 80, target_new="Paris"), QUICK)


def test_a_C_that_does_not_belong_is_refused_before_the_model_runs(model, fact, moment, monkeypatch):
    bad = moment.C.clone()
    bad[0, 0] = float("nan")
    cases = {
        "of layer 2": replace(moment, layer=2),
        "it is \\[10, 10\\]": replace(moment, C=moment.C[:10, :10]),
        "NaN or infinity": replace(moment, C=bad),
        "more keys than d_mlp = 128; this one has 100": replace(moment, keys=100),
        "estimated on other weights": replace(moment, origin={**moment.origin, "weight_hash": "0"}),
    }
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    for message, spoilt in cases.items():
        with pytest.raises(EditError, match=message):
            rome.edit(model, fact, QUICK, spoilt)


@pytest.mark.parametrize("name", list(guards.BANDS))
def test_a_number_out_of_its_band_is_refused_warned_of_or_rolled_back_with_the_reason(
    name, model, fact, moment, monkeypatch
):
    monkeypatch.setitem(guards.BANDS, name, (1e20, 1e21, "do something else"))
    reason = f"{name} = .* is below 1e\\+20: do something else"
    with pytest.raises(EditError, match=f"block 1 is out of its bands .clamp 4.: {reason}"):
        rome.edit(model, fact, QUICK, moment)
    with pytest.warns(rome.EditWarning, match=reason):
        warned = rome.edit(model, fact, replace(QUICK, guard="warn"), moment)
    assert len(warned.changes) == 1
    rolled = rome.edit(model, fact, replace(QUICK, guard="rollback"), moment)
    assert rolled.changes == ()
    assert rolled.after == rolled.before
    assert rolled.layer == 1
    (found,) = rolled.reasons
    assert found == warned.reasons[0]


def test_an_edit_that_was_rolled_back_can_be_kept_and_changes_nothing(model, fact, moment, monkeypatch, tmp_path):
    monkeypatch.setitem(guards.BANDS, "relative_norm", (0.0, 1e-9, "nothing"))
    rolled = rome.edit(model, fact, replace(QUICK, guard="rollback"), moment)
    loaded = edits.load(edits.save(rolled, tmp_path / "edit.safetensors"))
    assert loaded.reasons == rolled.reasons
    before = state(model)
    with edits.edited(model, loaded):
        assert_same_state(model, before)
    edits.apply(model, loaded).undo()


def test_drift_is_the_divergence_of_what_follows_and_the_ratio_of_perplexities(model, fact):
    healthy = guards.measure(model, fact.subject)
    assert guards.drift(healthy, healthy) == {"essence_kl": pytest.approx(0, abs=1e-6), "perplexity_ratio": 1.0}
    with rank_one.edited(model, rank_one.RankOneEdit(1, torch.ones(128) * 0.1, torch.randn(32))):
        harmed = guards.measure(model, fact.subject)
        ids, _ = prompts.encode(model, f"{fact.subject} is a", prepend_bos=True)
        with torch.no_grad():
            p = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
    expected = float((p.exp() * (p - healthy.essence)).sum())
    assert guards.drift(healthy, harmed)["essence_kl"] == pytest.approx(expected, rel=1e-3)
    assert guards.drift(healthy, harmed)["perplexity_ratio"] != 1.0
    assert guards.reasons({name: float("nan") for name in guards.BANDS})[0].startswith("cond_C = nan is no number")


def test_perplexity_is_that_of_every_token_given_those_before(model):
    text = "The Space Needle is located in the city of Seattle."
    ids, _ = prompts.encode(model, text, prepend_bos=True)
    with torch.no_grad():
        log_p = model(torch.tensor([ids]))[0].log_softmax(-1)
    expected = sum(float(log_p[at, token]) for at, token in enumerate(ids[1:])) / (len(ids) - 1)
    assert scoring.mean_log_p(model, text, prepend_bos=True) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "given",
    [
        {"policy": "mixed"},
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
    ],
)
def test_settings_that_cannot_be_meant_are_errors(given):
    with pytest.raises(SettingsError, match=next(iter(given))):
        RomeSettings(**given)


def test_ctrl_c_anywhere_leaves_the_model_as_it_was(model, fact, moment):
    before = state(model)
    for stop in (0, 3):

        def interrupt(what, done, of, stop=stop):
            if what == "finding v*" and done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            rome.edit(model, fact, QUICK, moment, progress=interrupt)
        assert_same_state(model, before)


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


def test_a_preset_gives_layer_and_constants(load, monkeypatch):
    model = load("gpt2")
    preset = replace(models.PRESETS["gemma-3-270m"], rome=RomeSettings(layer=2, clamp=0.5), n_layers=4)
    monkeypatch.setitem(models.PRESETS, model.cfg.model_name, preset)
    found = rome.resolve(model)
    assert (found.layer, found.clamp) == (2, 0.5)
    with pytest.raises(ModelError, match="from 0 to 3 .* found 15"):
        rome.resolve(model, RomeSettings(layer=15))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def edit(model, fact, moment):
    return rome.edit(model, fact, QUICK, moment)


def test_an_edit_survives_its_file(model, edit, tmp_path):
    loaded = edits.load(edits.save(edit, tmp_path / "edit.safetensors"))
    assert torch.equal(loaded.changes[0].u, edit.changes[0].u)
    assert torch.equal(loaded.changes[0].step, edit.changes[0].step)
    assert json.loads(json.dumps(edit.to_json())) == json.loads(json.dumps(loaded.to_json()))
    with edits.edited(model, edit):
        expected = models.W_out(model, 1).detach().clone()
    with edits.edited(model, loaded):
        assert torch.equal(models.W_out(model, 1), expected)


def test_undo_restores_every_weight_bit_for_bit(model, edit):
    before = state(model)
    for _ in range(20):
        applied = edits.apply(model, edit)
        assert scoring.score(model, [(FACT.prompt, "Paris")])[0].p == pytest.approx(edit.after["p_new"], rel=1e-4)
        applied.undo()
        assert_same_state(model, before)


def test_undo_in_the_wrong_order_is_refused(model, edit):
    before = state(model)
    first = edits.apply(model, edit)
    second = edits.apply(model, edit, force=True)
    with pytest.raises(EditError, match="undo the later changes first"):
        first.undo()
    second.undo()
    first.undo()
    assert_same_state(model, before)


def test_an_edit_for_other_weights_is_refused_unless_forced(model, edit, load):
    before = state(model)
    other = replace(edit, origin={**edit.origin, "weight_hash": "0" * 64})
    with pytest.raises(EditError, match="made for .* with weights 000000000000.*force=True"):
        edits.apply(model, other)
    with pytest.raises(EditError, match="made for"), edits.edited(model, other):
        raise AssertionError("the body must not run")
    assert_same_state(model, before)
    edits.apply(model, other, force=True).undo()
    assert_same_state(model, before)


def test_applying_several_is_all_or_nothing(model, edit, load):
    before = state(model)
    unfit = replace(edit, changes=(rank_one.RankOneEdit(1, torch.ones(3), torch.ones(32)),))
    with pytest.raises(rank_one.RankOneError, match="another model"):
        edits.apply(model, edit, unfit, force=True)
    assert_same_state(model, before)


def test_a_file_that_is_no_edit_is_refused(edit, tmp_path):
    path = edits.save(edit, tmp_path / "edit.safetensors")
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(files.FileError, match="truncated or no safetensors"):
            edits.load(path)
    path.write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(files.FileError, match="no safetensors"):
        edits.load(path)
    with pytest.raises(files.FileError, match="does not exist"):
        edits.load(tmp_path / "none")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(files.FileError, match="another kind"):
        edits.load(path)


def test_a_file_of_a_newer_format_is_refused(edit, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_FORMAT", 99)
    path = edits.save(edit, tmp_path / "edit.safetensors")
    monkeypatch.undo()
    with pytest.raises(files.FileError, match="format 99; .* knows up to 1. Update"):
        edits.load(path)


def test_a_place_that_cannot_be_written_is_an_error(edit, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        edits.save(edit, tmp_path / "file" / "edit.safetensors")
