from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mechedit import applying, keys, models, moments
from mechedit.corruption import generator
from mechedit.editors import controls, edit, named, rome
from mechedit.runs.editing import edit_facts
from mechedit.runs.evaluating import evaluate
from mechedit.scoring import score
from mechedit.settings import POLICIES, MomentSettings
from tests.conftest import widen_bands
from tests.three_facts import FACTS, PLAIN, QUICK, made_ready

pytestmark = pytest.mark.anywhere


@pytest.fixture
def moment(model, monkeypatch):
    """C of block 1 from few keys, as it is of every other block where one is estimated."""
    widen_bands(monkeypatch)
    real, few = moments.estimate_layers, MomentSettings(tokens=600, context=32)
    monkeypatch.setattr(moments, "estimate", lambda model, layer, **named: real(model, [layer], settings=few)[layer])
    monkeypatch.setattr(moments, "estimate_layers", lambda model, layers, **named: real(model, layers, settings=few))
    monkeypatch.setattr(controls, "TRIALS", 1)
    return real(model, [1], settings=few)[1]


def cosine(a, b):
    return abs(float(torch.nn.functional.cosine_similarity(a.double(), b.double(), 0)))


@pytest.mark.both
def test_without_C_the_direction_of_an_edit_is_its_key(model, moment):
    plain = edit(model, FACTS[0], "rome", QUICK, prepared=made_ready(model, QUICK, moment))
    identity = edit(model, FACTS[0], "rome-identity", QUICK)
    rows = keys.contexts(model, FACTS[0], keys.prefixes(model, QUICK))
    mean = keys.subject_keys(model, 1, rows).double().mean(0)
    assert cosine(identity.changes[0].u, mean) == pytest.approx(1.0, abs=1e-9)
    assert cosine(plain.changes[0].u, mean) < 0.999
    assert torch.equal(identity.vectors["k*"], plain.vectors["k*"]), "only C is another"
    assert identity.report["cond_C"] == 1.0
    assert identity.after["p_new"] > identity.before["p_new"]


@pytest.mark.parametrize("settings", [QUICK, replace(QUICK, fact_token="last", ridge=0.1, **POLICIES["prompt"])])
def test_a_random_key_carries_the_same_value(settings, model, moment):
    ready = made_ready(model, settings, moment)
    plain = edit(model, FACTS[0], "rome", settings, prepared=ready)
    control = edit(model, FACTS[0], "rome-random-key", replace(settings, seed=3), prepared=ready)
    key = plain.vectors["k*"].double()
    random = torch.randn(len(key), generator=generator(3, "random key", FACTS[0].prompt), dtype=torch.float64)
    random *= key.norm() / random.norm()
    (change,) = control.changes
    W_out, b_out = models.W_out(model, 1).detach().double(), models.b_out(model, 1).detach().double()
    torch.testing.assert_close(random @ (W_out + change.dense()) + b_out, plain.vectors["v*"].double(), atol=1e-4, rtol=1e-4)  # fmt: skip
    assert cosine(ready.moment.C.double() @ change.u, random) == pytest.approx(1.0, abs=1e-9)
    assert cosine(change.u, plain.changes[0].u) < 0.9
    assert not torch.equal(edit(model, FACTS[0], "rome-random-key", replace(settings, seed=4), prepared=ready).changes[0].u, change.u)  # fmt: skip


def test_a_control_is_measured_with_its_own_change(model, moment):
    ready = made_ready(model, QUICK, moment)
    plain, control = (edit(model, FACTS[0], name, QUICK, prepared=ready) for name in ("rome", "rome-random-key"))
    assert control.report["relative_norm"] == pytest.approx(control.changes[0].norm / float(models.W_out(model, 1).detach().norm()))  # fmt: skip
    assert control.report["relative_norm"] != plain.report["relative_norm"]
    with applying.edited(model, control):
        (new,) = score(model, [(FACTS[0].prompt, "Paris")])
    assert control.after["p_new"] == pytest.approx(new.p, rel=1e-5)
    assert control.after["p_new"] < plain.after["p_new"], "the subject's key does not return v*"


def test_another_layer_is_drawn_for_each_fact_and_edited_there_as_rome_would(model, moment, tmp_path):
    found = edit_facts(model, FACTS, tmp_path / "run", "rome-random-layer", QUICK)
    drawn = [controls.random_layer(model, fact, 1, QUICK.seed) for fact in FACTS]
    assert [each.layer for each in found] == drawn
    assert {controls.random_layer(model, fact, 1, seed) for fact in FACTS for seed in range(9)} == {0, 2, 3}
    there = replace(QUICK, layer=drawn[0])
    alone = rome.edit(model, FACTS[0], there, moments.estimate(model, drawn[0]))
    torch.testing.assert_close(found[0].changes[0].dense(), alone.changes[0].dense())
    assert [each.details["layer"] for each in found] == drawn
    assert all(each.details["clamp"] > 0 for each in found)


def test_the_ridge_of_the_settings_is_a_random_layers_too(model, moment):
    settings = replace(QUICK, ridge=0.5)
    layer = controls.random_layer(model, FACTS[0], 1, settings.seed)
    found = edit(model, FACTS[0], "rome-random-layer", settings)
    there = replace(settings, layer=layer, clamp=found.details["clamp"])
    plain = rome.edit(model, FACTS[0], there, moments.estimate(model, layer))
    torch.testing.assert_close(found.changes[0].dense(), plain.changes[0].dense())
    assert found.report["cond_C"] == plain.report["cond_C"] < moments.estimate(model, layer).cond


@pytest.mark.parametrize("name", ["rome-identity", "rome-random-key", "rome-random-layer"])
def test_a_control_is_evaluated_in_place_of_its_method(name, model, moment, tmp_path):
    made = edit_facts(model, FACTS, tmp_path / "alone", name, QUICK)
    found = evaluate(model, FACTS, tmp_path / "run", PLAIN, name, QUICK)
    assert [row["relative_norm"] for row in found.rows["after"]] == [each.report["relative_norm"] for each in made]
    assert f"counterfact, {name}, independent" in found.caption
    assert {each.editor for each in made} == {name}
    assert isinstance(named(name), rome.Rome)
