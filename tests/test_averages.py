from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from mechedit import sites
from mechedit.settings import ROLES, TraceSettings
from mechedit.tracing import Trace
from mechedit.tracing.averages import AverageError, average, compare
from mechedit.tracing.roles import positions, roles

pytestmark = pytest.mark.anywhere

SETTINGS = TraceSettings(kinds=("mlp", "attn"), draws=1)


def made(effects, corrupted=0.1, clean=0.6, subject=(1, 3), prompt="a", settings=SETTINGS, weights="w"):
    """A trace with given effects [kind][layer][position]."""
    grids = {kind: torch.tensor(grid) for kind, grid in zip(settings.kinds, effects, strict=True)}
    n = grids[settings.kinds[0]].shape[1]
    return Trace(
        prompt=prompt,
        tokens=tuple("abcdefgh"[:n]),
        subject=prompt,
        subject_range=subject,
        relation=None,
        answer="x",
        answer_ids=(1,),
        corrupted_by="gaussian noise, sigma of vocabulary",
        p_clean=clean,
        p_corrupted=corrupted,
        effects=grids,
        draws={kind: grid[..., None] for kind, grid in grids.items()},
        noise_std=1.0,
        settings=settings,
        origin={"name": "m", "weights": weights, "configuration": "c"},
        versions={},
    )


def two():
    first = [[[0.1, 0.2, 0.5, 0.2, 0.1], [0.1, 0.2, 0.4, 0.1, 0.1]], [[0.1, 0.1, 0.1, 0.1, 0.3], [0.1] * 5]]
    second = [[[0.3, 0.2, 0.2, 0.4], [0.2, 0.2, 0.2, 0.2]], [[0.2, 0.2, 0.2, 0.2], [0.2, 0.2, 0.2, 0.5]]]
    return [made(first), made(second, corrupted=0.2, clean=0.4, subject=(0, 1), prompt="b")]


def test_each_position_has_one_role():
    assert roles(8, (1, 5)) == ("before", "subject_first", "subject_middle", "subject_middle", "subject_last", "after_first", "after_further", "last")  # fmt: skip
    assert roles(3, (0, 1)) == ("subject_last", "after_first", "last")
    assert roles(2, (0, 1)) == ("subject_last", "last")
    assert roles(3, (1, 3)) == ("before", "subject_first", "subject_last")
    assert positions("subject_middle", 8, (1, 5)) == [2, 3]


def test_averages_by_hand():
    found = average(two())
    assert found.n == 2
    assert found.n_role == (1, 1, 0, 2, 2, 1, 2)
    column = {role: index for index, role in enumerate(ROLES)}
    # subject_last: positions 2 and 0; less 0.1 and 0.2
    assert found.at("mlp", 0, "subject_last").mean == pytest.approx((0.4 + 0.1) / 2)
    assert found.at("mlp", 0, "subject_first").mean == pytest.approx(0.2 - 0.1)
    assert found.at("mlp", 0, "subject_first").n == 1
    assert found.at("attn", 1, "last").mean == pytest.approx((0.0 + 0.3) / 2)
    assert float(found.direct["mlp"][0, column["subject_last"]]) == pytest.approx((0.1 + 0.1) / 2)
    assert float(found.restored["mlp"][0, column["subject_last"]]) == pytest.approx(0.4)
    assert found.total.mean == pytest.approx((0.5 + 0.2) / 2)
    assert found.indirect["mlp"][:, column["subject_middle"]].isnan().all()
    whole = found.indirect["mlp"] + found.direct["mlp"]  # where both facts have the role, the total effect
    both = torch.tensor(found.n_role) == 2
    torch.testing.assert_close(whole[:, both], torch.full_like(whole[:, both], found.total.mean))
    assert float(found.best["mlp"][column["subject_last"]]) == pytest.approx((0.5 + 0.3) / 2)
    assert repr(found) == f"Average(2 facts: total effect {found.total}; mlp, attn)"
    assert json.loads(json.dumps(found.to_json()))["indirect_effect"]["mlp"][0][column["subject_middle"]] is None


def test_facts_whose_decisive_token_is_another_are_listed():
    elsewhere = made([[[0.1, 0.5, 0.2, 0.1], [0.1] * 4], [[0.1] * 4] * 2], subject=(0, 1), prompt="odd")
    usual = made([[[0.5, 0.1, 0.2, 0.9], [0.1] * 4], [[0.1] * 4] * 2], subject=(0, 1), prompt="usual")
    assert average([elsewhere, usual]).exceptions == (("odd", "after_first"),)
    last = [[math.nan, math.nan, math.nan, 0.3]] * 2
    untraced = [made([last, last], subject=(1, 2), prompt=str(index)) for index in range(2)]
    assert average(untraced).exceptions == (), "nothing is known of it"


def test_intervals_of_what_is_no_share_are_not_bounded_by_zero_and_one():
    effects = [[[0.1, 0.2]], [[0.1, 0.1]]]
    logits = replace(SETTINGS, measure="logit_difference")
    share, other = (
        average([made(effects, subject=(0, 1), prompt=str(index), settings=each) for index in range(5)])
        for each in (SETTINGS, logits)
    )
    assert 0 <= share.clean.low < share.clean.high <= 1
    assert math.isnan(other.clean.low)
    assert math.isnan(other.corrupted.high)


def test_a_paired_comparison_takes_differences_within_facts():
    first = [made([[[0.1 * n, 0.2]], [[0.1, 0.1]]], subject=(0, 1), prompt=str(n)) for n in range(24)]
    second = [
        replace(each, effects={kind: grid + 0.05 + 0.01 * (n % 2) for kind, grid in each.effects.items()})
        for n, each in enumerate(first)
    ]  # far less than facts differ among themselves
    found = compare(first, second, "mlp", 0, "subject_last")
    assert found.mean == pytest.approx(0.055)
    assert found.excludes_zero
    assert found.n == 24
    assert not compare(first[:19], second[:19], "mlp", 0, "subject_last").excludes_zero, "no interval of few facts"
    with pytest.raises(AverageError, match="same facts, with the same answers, in the same order"):
        compare(first, second[::-1], "mlp", 0, "subject_last")
    answered = [replace(each, answer_ids=(2,)) for each in second]
    with pytest.raises(AverageError, match="with the same answers"):
        compare(first, answered, "mlp", 0, "subject_last")


def test_traces_that_differ_in_more_than_the_fact_are_not_averaged():
    first, second = two()
    with pytest.raises(AverageError, match="at least 2"):
        average([first])
    others = {
        "settings": {"settings": replace(SETTINGS, seed=1)},
        "weights": {"origin": second.origin | {"weights": "other"}},
        "configuration": {"origin": second.origin | {"configuration": "other"}},
        "corruption": {"noise_std": 2.0},
    }
    for what, changed in others.items():
        with pytest.raises(AverageError, match=f"share settings, model and corruption; 'b' differs .* in its {what}"):
            average([first, replace(second, **changed)])
    old = [replace(each, origin={"name": "m", "weight_hash": name}) for each, name in zip((first, second), "vw", strict=True)]  # fmt: skip
    with pytest.raises(AverageError, match="in its weights"):
        average(old)


def test_traces_that_differ_in_what_no_number_depends_on_are_averaged():
    first, second = two()
    sparing = replace(second, settings=replace(SETTINGS, memory=2.0))
    assert average([first, sparing]).total.mean == average([first, second]).total.mean


def test_an_averages_sites_are_where_it_restores_most_and_name_layers_as_good():
    def fact(noise):
        mlp = [[0.1, 0.3 + noise], [0.3 + 3 * noise, 0.1], [0.2, 0.1]]
        attn = [[0.1, 0.1], [0.1, 0.2], [0.1, 0.4]]
        return made([mlp, attn], subject=(0, 1), prompt=str(noise))

    found = average([fact(noise) for noise in 8 * (-0.06, 0.0, 0.06)])
    early, late = sites.early(found), sites.late(found)
    assert (early.kind, early.layer, early.role) == ("mlp", 1, "subject_last")
    assert early.p == pytest.approx(0.3)
    assert early.near == (1,)
    assert (late.kind, late.layer, late.near) == ("attn", 2, (2,))
    wide = average([fact(noise) for noise in 8 * (-0.06, 0.0, 0.0601)] + 8 * [made([[[0.4, 0.1], [0.1, 0.1], [0.5, 0.1]], [[0.1, 0.1]] * 3], subject=(0, 1), prompt="c")])  # fmt: skip
    assert len(sites.early(wide).near) > 1
    assert "are as good" in str(sites.early(wide))


def test_a_role_that_was_not_traced_has_no_site():
    traces = [made([[[0.1, 0.2]], [[0.1, 0.2]]], subject=(0, 2), prompt=name) for name in "ab"]
    with pytest.raises(sites.SiteError, match="no position with the role last"):
        sites.late(average(traces))


def test_layers_are_as_good_where_the_paired_difference_reaches_zero():
    """Layers that differ little beside how facts differ, but for every fact alike, are told apart; and the other way round."""
    random = np.random.default_rng(0)
    fact = random.uniform(0.1, 0.9, 40)
    best = fact + 0.05
    always_less = best - random.uniform(0.02, 0.06, 40)
    sometimes = best - np.where(np.arange(40) % 2, 0.32, -0.28)
    layers = np.stack([always_less, best, sometimes, 0.1 * fact])
    found = average([made([[[row[n], 0.0] for row in layers.tolist()], [[0.0, 0.0]] * 4], corrupted=0.0, clean=1.0, subject=(0, 1), prompt=str(n)) for n in range(40)])  # fmt: skip
    assert sites.early(found).layer == 1
    column = ROLES.index("subject_last")
    assert float(found.high["mlp"][0, column]) > float(found.indirect["mlp"][1, column]), "unpaired intervals overlap"
    difference = always_less - best
    upper = difference.mean() + stats.t.ppf(0.975, 39) * difference.std(ddof=1) / 40**0.5
    assert float(found.behind["mlp"][0, column]) == pytest.approx(upper, abs=0.01)
    assert sites.early(found).near == (1, 2)
    assert "layers 1, 2 are as good" in str(sites.early(found))
    few = average([made([[[row[n], 0.0] for row in layers.tolist()], [[0.0, 0.0]] * 4], subject=(0, 1), prompt=str(n)) for n in range(19)])  # fmt: skip
    assert sites.early(few).near == ()
    assert "(19 facts are too few to tell layers apart)" in str(sites.early(few))


def test_a_site_of_an_average_counts_the_facts_that_another_token_decides():
    elsewhere = made([[[0.1, 0.5, 0.2, 0.1], [0.1] * 4], [[0.1] * 4] * 2], subject=(0, 1), prompt="odd")
    usual = made([[[0.5, 0.1, 0.2, 0.9], [0.1] * 4], [[0.1] * 4] * 2], subject=(0, 1), prompt="usual")
    assert str(sites.early(average([elsewhere, usual]))).endswith("another token decides for 1 of 2 facts")


def test_a_comparison_of_a_site_that_was_not_traced_is_an_error():
    for kind, layer, role in (("mlp", 9, "last"), ("resid", 0, "last"), ("mlp", 0, "middle")):
        with pytest.raises(AverageError, match="a site must have a role among"):
            compare(two(), two(), kind, layer, role)
