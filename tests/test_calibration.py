from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest

from mechedit import calibration, cli, editing, edits, guards, models, prompts, scoring, sources
from mechedit.calibration import CalibrationError, calibrate, edges, judged
from mechedit.editors import named, rome
from mechedit.edits import EditError
from mechedit.facts import FactError
from mechedit.settings import NO_EDGE, CalibrateSettings, RomeSettings, SettingsError, read_bands, shipped_bands

pytestmark = [pytest.mark.anywhere, pytest.mark.usefixtures("as_users")]
UPPER, LOWER = (0.0, 1.0, "less"), (0.05, math.inf, "more")
FEW = CalibrateSettings(facts=4, strengths=(1.0, 2.0), times=(20.0,))


@pytest.fixture(scope="module")
def organism():
    return models.load("organism", device="cpu")


@pytest.fixture(scope="module")
def world():
    return list(sources.named("organism"))


def rows(name, sound, broken, neither=()):
    kinds = (("sound", sound), ("broken", broken), ("neither", neither))
    return [{name: value, "verdict": verdict} for verdict, values in kinds for value in values]


def test_an_edge_is_halfway_in_logarithms_between_sound_edits_and_a_tenth_of_the_broken_ones_beyond_them():
    low, high, sound, broken = edges("n", UPPER, rows("n", [1.0] * 50, [0.5, 2.0, *[100.0] * 9, 400.0], [7.0]))
    assert (low, high, sound, broken) == (0.0, pytest.approx(10.0), 1.0, pytest.approx(100.0)), (
        "one of eleven is below it"
    )
    low, high, sound, broken = edges("n", LOWER, rows("n", [1.0] * 50, [2.0, *[0.01] * 5]))
    assert (low, high, sound, broken) == (pytest.approx(0.1), NO_EDGE, 1.0, pytest.approx(0.01))


def test_one_sound_edit_in_a_hundred_may_be_beyond_the_edge():
    found = edges("n", UPPER, rows("n", [1.0] * 990 + [50.0] * 5, [9.0]))
    assert found[1] == pytest.approx(3.0)


def test_a_number_that_finds_fewer_than_half_of_the_broken_edits_has_no_edge():
    few, half = ([0.5] * n + [100.0] * 3 for n in (4, 3))
    assert edges("n", UPPER, rows("n", [1.0] * 9, few))[1] == NO_EDGE
    assert edges("n", UPPER, rows("n", [1.0] * 9, half))[1] == pytest.approx(10.0)


def test_a_number_by_which_no_edit_is_broken_has_no_edge():
    low, high, _, broken = edges("n", UPPER, rows("n", [1.0] * 9, [0.5]))
    assert (low, high, math.isnan(broken)) == (0.0, NO_EDGE, True)
    assert edges("n", LOWER, rows("n", [1.0] * 9, [1.0]))[0] == 0.0


@pytest.mark.parametrize(
    ("takes", "lost", "text", "verdict"),
    [
        (1.0, 0.0, 1.0, "sound"),
        (1.0, 0.1, 1.1, "sound"),
        (0.0, 0.0, 1.0, "neither"),
        (1.0, 0.2, 1.0, "neither"),
        (1.0, 0.0, 1.2, "neither"),
        (1.0, 0.5, 1.0, "broken"),
        (0.0, 0.0, 1.5, "broken"),
        (1.0, 0.0, math.nan, "broken"),
        (1.0, math.nan, 1.0, "neither"),
    ],
)
def test_an_edit_is_judged_by_what_no_guard_reads(takes, lost, text, verdict):
    numbers = {"takes": takes, "neighbours_lost": lost, "text": text}
    assert judged(numbers) == verdict
    assert judged(numbers, harmful=True) == ("neither" if verdict == "sound" else verdict)


@pytest.mark.both
def test_the_organisms_bands_let_sound_edits_through_and_hold_broken_ones(organism, world, tmp_path):
    found = calibrate(organism, world[6000:], tmp_path, FEW)
    assert found.judged["sound"] >= 8
    assert found.judged["broken"] >= 4
    assert found.false_alarms.mean <= 0.25
    assert found.misses.mean <= 0.25
    assert {name for name, _, _ in found.bands} == {"relative_norm", "essence_kl", "perplexity_ratio"}, (
        "the rest is alike"
    )
    sound = [row["perplexity_ratio"] for row in found.edits if row["verdict"] == "sound"]
    (ratio,) = (each for each in found.found if each.name == "perplexity_ratio")
    assert sorted(sound)[-2] < ratio.high < ratio.broken
    again = calibrate(organism, world[6000:], tmp_path, FEW)
    assert again.to_json() == found.to_json(), "from what is kept"
    path = found.save(tmp_path / "bands.json")
    assert read_bands(path) == found.bands
    assert json.loads(path.read_text())["rule"].startswith("Facts are edited in ways that may be sound")


def test_too_few_facts_and_too_few_sound_edits_are_an_error(organism, world, tmp_path):
    with pytest.raises(FactError, match="of these 3 there are 3"):
        calibrate(organism, world[6000:6003], tmp_path, FEW)
    origin = {"name": "a model"}
    with pytest.raises(CalibrationError, match="5 sound and 5 broken edits; found 4 and 9"):
        calibration._set("rome", {"n": UPPER}, rows("n", [1.0] * 4, [2.0] * 9), 0, origin, {}, {})


def test_rates_are_of_bands_that_were_set_on_the_other_half_of_the_facts():
    """Even facts are sound at 1 and broken at 2.5, so that their edge is 1.6; odd ones at 2 and 9, and 4.2."""
    found = [
        {"fact": fact, "n": value, "verdict": verdict}
        for fact in range(12)
        for verdict, value in zip(("sound", "broken"), (2.0, 9.0) if fact % 2 else (1.0, 2.5), strict=True)
    ]
    made = calibration._set("rome", {"n": UPPER}, found, 0, {"name": "a model"}, {}, {})
    assert made.false_alarms.mean == 0.5, "of odd ones all"
    assert made.misses.mean == 0.5, "of even ones all"


def test_the_share_of_neighbours_that_is_lost_is_of_those_that_were_right(organism, world, monkeypatch):
    (fact, *_), settings = world[6000:], CalibrateSettings()
    probe = calibration._Probing(organism, named("rome"), calibration._Ways("", named("rome"), RomeSettings(layer=0)), [fact], settings)  # fmt: skip
    monkeypatch.setattr(calibration.counterfact, "scores", lambda *_, **__: [{"ES": 1.0, "NS": 0.4}])
    healthy = guards.of_unedited(organism, [fact.subject], prepend_bos=False)
    for before, lost in ((0.5, 0.2), (0.4, 0.0), (0.3, 0.0)):
        numbers = probe._effects(organism, fact, [], {"NS": before}, healthy)
        assert numbers["neighbours_lost"] == pytest.approx(lost)


# --- bands as settings ------------------------------------------------------------------------------------------------


def test_sound_edits_of_the_organism_are_accepted_with_the_bands_that_ship(organism, world):
    for layer, clamp in ((0, 1.0), (2, 4.0)):
        for fact in world[7000:7003]:
            edit = rome.edit(organism, fact, RomeSettings(layer=layer, clamp=clamp))
            assert edit.changes
            assert edit.after["p_new"] > 0.5


def test_bands_are_settings_and_the_result_has_them(organism, world, tmp_path):
    path = tmp_path / "bands.json"
    path.write_text(json.dumps({"bands": [{"name": "relative_norm", "low": 0.0, "high": 1e-3}]}))
    narrow = RomeSettings(bands=read_bands(path))
    with pytest.raises(EditError, match=r"relative_norm = .* is above 0.001"):
        rome.edit(organism, world[7000], narrow)
    kept = rome.edit(organism, world[7000], replace(narrow, guard="rollback"))
    assert kept.settings["bands"] == [["relative_norm", 0.0, 1e-3]]
    assert not kept.changes
    shipped = rome.edit(organism, world[7000], replace(narrow, bands=shipped_bands("organism", "rome")))
    assert shipped.changes
    assert shipped.settings["bands"] == rome.edit(organism, world[7000]).settings["bands"] != []


def test_a_band_that_an_editor_does_not_have_is_refused(organism):
    with pytest.raises(SettingsError, match="no number 'norm' to hold in a band; it has"):
        named("rome").resolve(organism, RomeSettings(bands=(("norm", 0.0, 1.0),)))
    with pytest.raises(SettingsError, match="from below to"):
        RomeSettings(bands=(("essence_kl", 2.0, 1.0),))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"bands": [{"name": "a"}]}', '{"bands": 3}', "\udcff"])
def test_a_file_that_is_no_calibration_is_refused(text, tmp_path):
    path = tmp_path / "bands.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SettingsError, match="is no file of `mechedit calibrate`"):
        read_bands(path)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_bands(tmp_path / "none")


def test_every_model_that_ships_has_bands_which_its_own_evidence_gives():
    places = list(guards.resources.files("mechedit").joinpath("data", "bands").iterdir())
    assert places
    for place in places:
        record = json.loads(place.read_text())
        for each in record["bands"]:
            band = rome.Rome.bands[each["name"]]
            found = edges(each["name"], band, record["edits"])
            assert (found[0], found[1]) == (pytest.approx(each["low"], rel=1e-3), pytest.approx(each["high"], rel=1e-3))
            outside = [row for row in record["edits"] if each["name"] in row and row["verdict"] == "sound" and not found[0] <= row[each["name"]] <= found[1]]  # fmt: skip
            assert len(outside) <= 0.02 * record["judged"]["sound"], "the 99th percentile is within"


def test_the_harness_asks_the_editors_bands_where_none_are_given(model, fact):
    assert editing.Editor().resolve(model).bands == ()


def test_the_command_writes_bands_that_edits_take(tmp_path, capsys):
    command = [
        "calibrate",
        "--model",
        "organism",
        "--facts",
        "organism",
        "--begin",
        "6000",
        "--limit",
        "4",
        "--out",
        str(tmp_path),
    ]
    assert cli.main([*command, "--strengths", "1,2", "--times", "20", "--layers", "0", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "perplexity_ratio" in out
    assert "8 sound" in out
    record = json.loads((tmp_path / "bands.json").read_text())
    assert record["settings"]["calibrate"] == {
        "facts": 4,
        "layers": [0],
        "strengths": [1.0, 2.0],
        "times": [20.0],
        "seed": 3,
    }
    assert len(record["facts"]) == 4
    other = [*command, "--begin", "100", "--strengths", "1,2", "--times", "20", "--layers", "0", "--seed", "3"]
    assert cli.main(other) == 2
    assert "has results that are not of these 4 records" in capsys.readouterr().err
    same = ["--strengths", "1,2", "--times", "20", "--layers", "0", "--seed", "3"]
    for others, what in [
        (["--strengths", "1", "--times", "20", "--layers", "0"], "layer 0, clamp times 2"),
        (["--strengths", "1,2", "--times", "10", "--layers", "0"], "layer 0, clamp times 1, times 20"),
        (["--strengths", "1,2", "--times", "20", "--layers", "1"], "layer 0, clamp times 1"),
        ([*same, "--editor", "ft"], "the editor rome"),
    ]:
        assert cli.main([*command, *others]) == 2
        assert f"has results of {what}, which is not tried here, and they would be replaced" in capsys.readouterr().err
    capsys.readouterr()
    assert cli.main([*command, *same]) == 0, "the same again"
    made = capsys.readouterr().out
    assert cli.main(["show", str(tmp_path), "--json", str(tmp_path / "shown.json")]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[:-1] == made.splitlines()[: len(shown.splitlines()) - 1], "the same tables"
    way = [edit["verdict"] for edit in record["edits"] if edit["way"] == "layer 0, clamp times 1, times 20"]
    n = r"\W+".join(str(way.count(verdict)) for verdict in ("sound", "broken", "neither"))
    assert re.search(rf"layer 0, clamp times 1, times 20\W+{n}\W", shown)
    assert json.loads((tmp_path / "shown.json").read_text()) == record
    assert json.loads((tmp_path / "bands.json").read_text()) == record
    fact = sources.named("organism")[7000]
    edit = ["edit", fact.prompt, "--subject", fact.subject, "--target", fact.target_new, "--model", "organism"]
    assert cli.main([*edit, "--bands", str(tmp_path / "bands.json"), "--out", str(tmp_path / "edit.safetensors")]) == 0
    kept = edits.load(tmp_path / "edit.safetensors").settings["bands"]
    assert kept == [[each["name"], each["low"], each["high"]] for each in record["bands"]]
    with pytest.raises(SystemExit, match="2"):
        cli.main([*edit, "--bands", str(tmp_path / "none.json")])
    assert "none.json cannot be read: No such file" in capsys.readouterr().err


def test_a_target_of_several_tokens_that_the_organism_says_is_refused_like_one_of_one(organism, world):
    several = [fact for fact in world if len(prompts.continuation(organism, fact.prompt, fact.target_true)) > 1]
    said = next(fact for fact in several if all(scoring.score(organism, [(fact.prompt, fact.target_true)])[0].first))
    said = replace(said, target_new=said.target_true, target_true=said.target_new)
    with pytest.raises(EditError, match="already says .* strengthen=True"):
        rome.edit(organism, said)
    with pytest.raises(EditError, match="Lower stop_at to strengthen it further"):
        rome.edit(organism, said, RomeSettings(strengthen=True, stop_at=5.0))
