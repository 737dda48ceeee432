"""The human study without a browser: its design, what is refused, and its numbers."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, replace
from itertools import combinations

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as some

from mechedit import cli, study
from mechedit.facts import Fact
from mechedit.runs.store import RunError
from mechedit.settings import SettingsError, StudySettings
from mechedit.study import Scenario, StudyError, agreement, clusters, design, forms
from mechedit.study.making import KEY, STUDY
from tests.participants import EDITORS, QUALITY, SMALL, answers, scenarios, send, shown, sign, small

pytestmark = pytest.mark.anywhere


@given(some.integers(1, 5), some.integers(1, 6), some.integers(2, 6), some.integers(0, 3), some.data())
@settings(max_examples=25, deadline=None)
def test_the_design_is_balanced(raters, pages, editors, seed, data):
    """For every number of facts, raters, pages and editors that there can be."""
    step = pages // math.gcd(pages, raters)
    facts = step * data.draw(some.integers(-(-pages // step), -(-pages // step) + 4))
    found = design.plan(facts, raters, pages, editors, min(2, pages), seed)
    assert [len({page.fact for page in own}) for own in found.people] == [pages] * (facts * raters // pages)
    every = [page for own in found.people for page in own]
    assert set(Counter(page.fact for page in every).values()) == {raters}
    assert all(sorted(page.order) == list(range(editors)) for page in every)
    by_fact = [[page.order for page in every if page.fact == fact] for fact in range(facts)]
    firsts = [[page.order[0] for page in own] for own in found.people]
    for orders in by_fact:  # at every place, each editor equally often or once more
        for place in range(editors):
            assert spread([order[place] for order in orders], editors) <= 1
    assert all(spread(own, editors) <= 1 for own in firsts)
    marks = [Counter(editor for _, editor in own) for own in found.long_form]
    assert all(max(own.values()) - min(own[each] for each in range(editors)) <= 1 for own in marks)


def spread(values, n):
    counts = [values.count(each) for each in range(n)]
    return max(counts) - min(counts)


def test_the_papers_design_is_even_in_all_that_can_be_even():
    """15 people share 3 x 50 facts in 105 pairs, so two people share one or two; all six orders come 25 times."""
    found = design.plan(50, 3, 10, 3, 3, seed=7)
    shared = [len({page.fact for page in a} & {page.fact for page in b}) for a, b in combinations(found.people, 2)]
    assert set(shared) == {1, 2}
    assert set(Counter(page.order for own in found.people for page in own).values()) == {25}
    for own in found.people:
        assert all(spread([page.order[place] for page in own], 3) <= 2 for place in range(3))
    assert Counter(editor for own in found.long_form for _, editor in own) == dict.fromkeys(range(3), 15)
    at = {(page.fact, number) for own in found.people for number, page in enumerate(own)}
    assert len(at) == 150  # no two raters of a fact see it as the same page of their forms


def test_a_design_depends_on_its_seed_alone():
    assert design.plan(12, 2, 4, 3, 0, 5) == design.plan(12, 2, 4, 3, 0, 5) != design.plan(12, 2, 4, 3, 0, 6)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"scenarios": 52}, "Choose a multiple of 10"),
        ({"scenarios": 5}, "pages must be at most the 5 scenarios.*Choose --pages 5"),
        ({"editors": ("rome",)}, "2 to 6 different"),
        ({"editors": ("rome", "rome")}, "2 to 6 different"),
        ({"long_form": 11}, "from 0 to the 10 pages"),
        ({"raters": 0}, "raters must be at least 1"),
    ],
)
def test_settings_that_make_no_study_are_refused(wrong, said):
    with pytest.raises(SettingsError, match=said):
        StudySettings(**wrong)
    assert StudySettings().people == 15


def test_a_form_does_not_say_whose_text_is_whose_and_the_key_does(tmp_path):
    made = small(tmp_path)
    hidden = [Scenario(each.statement, {name: f"{at} {number}" for number, name in enumerate(EDITORS)}) for at, each in enumerate(scenarios(4))]  # fmt: skip
    made = study.make(hidden, tmp_path / "hidden", SMALL)
    for number, form in enumerate(made.forms):
        text = made.files()[number].read_text()
        assert not any(name in text for name in (*EDITORS, made.secret))
        for (fact, order), page in zip(form.pages, shown(made.files()[number])["pages"], strict=True):
            assert page["texts"] == [f"{fact} {EDITORS.index(name)}" for name in order]
    assert not any(name in (made.folder / STUDY).read_text() for name in (made.secret, '"order"'))
    assert study.load(made.folder) == made


def test_a_study_made_again_is_the_same_and_another_in_its_folder_is_refused(tmp_path):
    made = small(tmp_path)
    before = [path.read_bytes() for path in made.files()]
    assert small(tmp_path) == made
    assert [path.read_bytes() for path in made.files()] == before
    with pytest.raises(RunError, match="other settings"):
        study.make([replace(scenarios(4)[0], statement="Another."), *scenarios(4)[1:]], tmp_path, SMALL)
    with pytest.raises(RunError, match="settings.seed"):
        small(tmp_path, replace(SMALL, seed=1))


def test_a_key_that_was_changed_or_lost_is_told(tmp_path):
    small(tmp_path)
    key = json.loads((tmp_path / KEY).read_text())
    key["forms"][0]["pages"][0]["order"].reverse()
    (tmp_path / KEY).write_text(json.dumps(key))
    with pytest.raises(StudyError, match="is not the key of the study"):
        study.load(tmp_path)
    (tmp_path / KEY).unlink()
    with pytest.raises(StudyError, match="whose text is whose"):
        study.load(tmp_path)
    with pytest.raises(StudyError, match="holds no study"):
        study.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "at least one scenario"),
        ([{"statement": "S.", "texts": {"a": "x", "b": " "}}], "a word or more"),
        ([{"statement": "S.", "texts": {"a": "x", "b": "y"}}, {"statement": "T.", "texts": {"a": "x"}}], "number 1 has a"),
        ([{"statement": "S.", "texts": {"a": "x", "b": "y"}}] * 2, "there twice"),
        ([{"statement": "S."}], "lacks texts"),
        ({"scenarios": 3}, "must be a list"),
        ([{"statement": "S.", "texts": {"a": 3}}], "must be a text"),
    ],
)  # fmt: skip
def test_texts_that_cannot_be_ranked_are_refused(texts, said, tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    with pytest.raises(StudyError, match=said):
        study.read_scenarios(tmp_path / "texts.json")


def test_long_form_needs_second_passages(tmp_path):
    with pytest.raises(StudyError, match="second passage"):
        study.make([replace(each, related={}) for each in scenarios(4)], tmp_path, replace(SMALL, long_form=1))


def test_hostile_text_is_data_in_a_form(tmp_path):
    bad = "</script><script>alert(1)</script><!--\u2028\u202e\x1b[31m{{DATA}}&amp;"
    texts = [replace(each, statement=f"{each.statement} {bad}", texts=dict.fromkeys(EDITORS, bad * 3)) for each in scenarios(4)]  # fmt: skip
    made = study.make(texts, tmp_path, SMALL)
    page = made.files()[0].read_text(encoding="utf-8")
    assert page.count("<script") == 2
    assert not any(each in page for each in "\u2028\u202e\x1b")
    assert "</script><script>alert(1)</script><!--\\u2028\\u202e\\x1b[31m{{DATA}}&amp;" in shown(made.files()[0])["pages"][0]["texts"][0]  # fmt: skip


@pytest.fixture
def made(tmp_path):
    return small(tmp_path / "study", replace(SMALL, long_form=1))


def by_quality(page, question, editor):
    """ROME's texts first for consistency, the unedited model's for fluency."""
    return QUALITY[editor] if question == "consistency" else -QUALITY[editor]


def refusal(made, path, **how):
    found = study.read(made, [path], **how)
    assert not found.accepted
    ((name, why),) = found.refused
    assert name == str(path)
    return why


def test_a_whole_response_is_accepted_and_kept(made, tmp_path):
    path = send(made.files()[1], answers(made.files()[1], by_quality), tmp_path / "in" / "one.txt")
    found = study.read(made, [tmp_path / "in"])
    assert [(each.form, each.file) for each in found.accepted] == [(made.forms[1].name, str(path))]
    assert found.refused == ()
    found.save(made)
    assert study.report(made).to_json() == study.report(made, found.accepted).to_json()


def changed(body, at, value):
    """The body with a value put at a place."""
    *path, last = at
    inner = body
    for step in path:
        inner = inner[step]
    inner[last] = value
    return body


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (("study",), "0123456789ab", "foreign: it is of the study '0123456789ab'"),
        (("form",), "00000000", "foreign: this study has no form"),
        (("pages", 1, "consistency"), ["A", "B", "B"], "malformed: page 2 ranks A, B, B by consistency"),
        (("pages", 1, "consistency"), ["A", "B", "D"], "malformed: page 2 ranks"),
        (("pages", 1, "consistency"), ["A", "B", 3], "malformed"),
        (("pages", 0, "seconds"), -1, "malformed: page 1 of pages says -1 seconds"),
        (("pages", 0, "seconds"), float("nan"), "malformed: page 1 of pages says nan"),
        (("pages",), [], "malformed: pages must have 4 pages; found 0"),
        (("long_form", 0, "items", "fluency"), 8, "malformed: page 1 of long_form gives 'fluency' the mark 8"),
        (("long_form", 0, "items", "beauty"), 3, "gives 'beauty'"),
        (("comment",), None, "malformed: comment must be a text"),
        (("pages", 2, "fluency"), [], "incomplete: page 3 has no ranking by fluency"),
        (("pages", 2, "fluency"), ["A"], "incomplete: page 3 has no ranking by fluency"),
        (("long_form", 0, "items"), {}, "incomplete: page 1 of long_form lacks new_fact_main (and 8 more)"),
        (("finished",), False, "incomplete: it was not finished"),
    ],
)
def test_a_response_is_refused_with_its_reason(made, tmp_path, at, value, said):
    form = made.files()[0]
    assert said in refusal(made, send(form, changed(answers(form, by_quality), at, value), tmp_path / "r.json"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "malformed"),
        (b"\xff\xfe", "malformed"),
        (b"[]", "malformed: it must be an object"),
        (b'{"kind": "mechedit study response"}', "malformed: it lacks body"),
        (b'{"kind": "mechedit study response", "body": "{", "check": ""}', "malformed"),
        (b'{"kind": "mechedit study response", "body": "{}", "check": "\xc3\xa9"}', "hexadecimal"),
        (b'{"kind": "edit"}', "its kind is 'edit'"),
        (b'{"kind": "mechedit study progress"}', "a progress file"),
        (b'{"kind": "a", "kind": "b"}', "twice"),
        (b"[" * 5000, "malformed"),
        (b" " * (1 << 20) + b"{}", "more than 1048576 bytes"),
    ],
)
def test_what_is_no_response_is_malformed(made, tmp_path, content, said):
    (tmp_path / "r.json").write_bytes(content)
    why = refusal(made, tmp_path / "r.json")
    assert why.startswith("malformed")
    assert said in why


def test_answers_that_were_changed_or_made_up_without_the_form_are_forged(made, tmp_path):
    form, other = made.files()[:2]
    body = answers(form, by_quality)
    text = json.dumps(body)
    forged = send(form, text.replace('"A"', '"X"', 1).replace('"B"', '"A"', 1).replace('"X"', '"B"', 1), tmp_path / "changed.json", check=sign(form, text))  # fmt: skip
    assert refusal(made, forged).startswith("forged or changed")
    borrowed = send(form, text, tmp_path / "borrowed.json", check=sign(other, text))  # by who has another form
    assert refusal(made, borrowed).startswith("forged or changed")
    assert refusal(made, send(form, text, tmp_path / "none.json", check="")).startswith("forged or changed")
    assert study.read(made, [send(form, text, tmp_path / "good.json")]).accepted  # the control


def test_a_response_of_another_study_is_foreign(made, tmp_path):
    other = small(tmp_path / "other", replace(SMALL, seed=9))
    path = send(other.files()[0], answers(other.files()[0], by_quality), tmp_path / "r.json")
    assert f"foreign: it is of the study '{other.name}'" in refusal(made, path)


def test_a_copy_is_refused_and_of_two_different_responses_both_are(made, tmp_path):
    form = made.files()[0]
    body = answers(form, by_quality)
    paths = [send(form, body, tmp_path / "in" / f"{name}.json") for name in "ab"]
    found = study.read(made, [tmp_path / "in"])
    assert [each.file for each in found.accepted] == [str(paths[0])]
    assert found.refused == ((str(paths[1]), f"duplicated: the same answers of form {body['form']} are in {paths[0]}"),)
    send(form, changed(body, ("comment",), "again"), paths[1])
    found = study.read(made, [tmp_path / "in"])
    assert found.accepted == ()
    assert [why for _, why in found.refused] == [f"duplicated: form {body['form']} has 2 different responses (a.json, b.json); leave one in"] * 2  # fmt: skip


def test_a_finished_response_counts_before_an_unfinished_one_and_time_makes_no_difference(made, tmp_path):
    form = made.files()[0]
    unfinished = changed(changed(answers(form, by_quality), ("pages", 2, "fluency"), []), ("finished",), False)
    early = send(form, unfinished, tmp_path / "a.json")
    whole = [send(form, changed(answers(form, by_quality), ("pages", 0, "seconds"), time), tmp_path / f"{time}.json") for time in (20, 25)]  # fmt: skip
    found = study.read(made, [early, *whole], partial=True)
    assert [(each.file, each.pages[0]["seconds"]) for each in found.accepted] == [(str(whole[1]), 25)]
    name = made.forms[0].name
    assert dict(found.refused) == {
        str(early): f"duplicated: a finished response of form {name} is in {whole[1]}",
        str(whole[0]): f"duplicated: the same answers of form {name} are in {whole[1]}",
    }
    assert [each.file for each in study.read(made, [early, early.parent / "20.json"], partial=True).accepted] == [str(whole[0])]  # fmt: skip


def test_the_response_that_a_copy_is_of_is_named(made, tmp_path):
    form = made.files()[0]
    body = answers(form, by_quality)
    other = changed(answers(form, by_quality), ("comment",), "again")
    a, b, c = (send(form, each, tmp_path / f"{name}.json") for name, each in zip("abc", (body, other, other), strict=True))  # fmt: skip
    found = study.read(made, [a, b, c])
    assert dict(found.refused)[str(c)] == f"duplicated: the same answers of form {body['form']} are in {b}"
    assert all("2 different responses (a.json, b.json)" in dict(found.refused)[str(each)] for each in (a, b))


def test_of_an_unfinished_response_the_finished_pages_count_where_that_is_wanted(made, tmp_path):
    form = made.files()[0]
    body = changed(changed(answers(form, by_quality), ("pages", 2, "fluency"), []), ("finished",), False)
    found = study.read(made, [send(form, body, tmp_path / "r.json")], partial=True)
    assert study.report(made, found.accepted).numbers["pages"] == 3
    for page in body["pages"]:
        page["consistency"] = []
    assert refusal(made, send(form, body, tmp_path / "r.json"), partial=True) == "incomplete: no page is finished"


def test_no_response_at_all_is_told(made, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudyError, match="no response files"):
        study.read(made, [tmp_path / "empty"])
    with pytest.raises(StudyError, match="mechedit study read"):
        study.report(made)
    assert "malformed: " in refusal(made, tmp_path / "nowhere.json")


def all_of(made, folder, prefer):
    """Everybody's responses, with the same preferences."""
    for number, form in enumerate(made.files()):
        send(form, answers(form, lambda *what, number=number: prefer(number, *what)), folder / f"{number}.json")
    return study.read(made, [folder]).accepted


def test_known_preferences_give_back_the_known_ratios(made, tmp_path):
    """Two people rank rome, ft-l, unedited by consistency on all four pages, the third the other way round on one: 11 of 12."""

    def prefer(person, page, question, editor):
        turned = question == "fluency" or (person == 2 and page == 0)
        return -QUALITY[editor] if turned else QUALITY[editor]

    found = study.report(made, all_of(made, tmp_path / "in", prefer)).numbers
    assert (found["responses"], found["of"], found["pages"], found["facts"], found["raters"]) == (3, 3, 12, 4, 3)
    pairs = {(each["first"], each["second"]): each for each in found["questions"]["consistency"]["pairs"]}
    assert {(pair["wins"], pair["share"], pair["odds"]) for pair in pairs.values()} == {(11, 11 / 12, 11.0)}
    assert found["questions"]["consistency"]["best"] == {"rome": 11, "ft-l": 0, "unedited": 1}
    assert pairs["rome", "unedited"]["best_ratio"] == 11
    assert pairs["rome", "ft-l"]["best_ratio"] == math.inf
    assert (pairs["rome", "ft-l"]["paper"], pairs["rome", "unedited"]["paper"]) == (1.8, None)
    z = scipy.stats.norm.ppf(0.975)  # Wilson 1927
    middle, reach = (11 / 12 + z**2 / 24) / (1 + z**2 / 12), z * math.sqrt(11 / 144 / 12 + z**2 / (4 * 144)) / (1 + z**2 / 12)  # fmt: skip
    assert pairs["rome", "ft-l"]["wilson"] == pytest.approx([middle - reach, middle + reach])
    low, high = pairs["rome", "ft-l"]["by_facts_and_raters"]
    assert low <= middle - reach
    assert high >= middle + reach
    assert pairs["rome", "ft-l"]["odds_interval"] == pytest.approx([low / (1 - low), high / (1 - high)])
    fluent = found["questions"]["fluency"]
    assert [pair["wins"] for pair in fluent["pairs"]] == [0, 0, 0]
    assert fluent["pairs"][0]["odds_interval"][0] == 0
    assert fluent["agreement"] == {"facts": 4, "alpha": 1, "W": 1, "W_at_random": pytest.approx(1 / 3)}
    assert found["seconds"]["median"] == 21.5
    marks = found["long_form"]["topicality"]
    assert {name: marks[name]["mean"] for name in EDITORS} == QUALITY
    saved = study.report(made, all_of(made, tmp_path / "in", prefer)).save(tmp_path / "out")
    assert json.loads(saved[0].read_text())["questions"]["consistency"]["pairs"][0]["best_ratio"] is None  # infinite
    assert "| rome / ft-l | 11 of 12 | 0.92 |" in saved[1].read_text()


def test_where_texts_stand_does_not_count_for_them_and_is_seen_where_it_does(made, tmp_path):
    """Who always prefers the first text prefers no editor: the design has each there equally often."""
    for number, form in enumerate(made.files()):
        body = answers(form, by_quality)
        for page in body["pages"]:
            page["consistency"] = ["A", "B", "C"]
        send(form, body, tmp_path / "in" / f"{number}.json")
    own = study.report(made, study.read(made, [tmp_path / "in"]).accepted).numbers["questions"]["consistency"]
    assert own["best"] == dict.fromkeys(EDITORS, 4)
    assert [pair["wins"] for pair in own["pairs"]] == [6, 6, 6]
    assert own["places"] == {"best": [12, 0, 0], "p": pytest.approx(scipy.stats.chi2.sf(24, 2))}
    assert own["agreement"]["W"] == 0
    assert own["agreement"]["alpha"] < 0
    assert [each["strength"] for each in own["strengths"].values()] == pytest.approx([1, 1, 1])


def test_one_response_has_no_interval_over_raters(made, tmp_path):
    form = made.files()[0]
    found = study.report(made, study.read(made, [send(form, answers(form, by_quality), tmp_path / "r.json")]).accepted)
    pair = found.to_json()["questions"]["consistency"]["pairs"][0]
    assert (pair["wins"], pair["by_facts_and_raters"]) == (4, [None, None])
    assert found.to_json()["questions"]["consistency"]["agreement"]["alpha"] is None
    assert found.markdown()


KRIPPENDORFF = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 ."""


def test_alpha_is_that_of_krippendorffs_own_example():
    """Computing Krippendorff's Alpha-Reliability (2011), section D: ordinal alpha is 0.815."""
    columns = zip(*(line.split() for line in KRIPPENDORFF.strip().splitlines()), strict=True)
    units = [np.array([[int(value)] for value in column if value != "."]) for column in columns]
    assert agreement.alpha([unit for unit in units if len(unit) > 1]) == pytest.approx(0.815, abs=5e-4)
    assert math.isnan(agreement.alpha([]))


def test_w_is_friedmans_statistic_over_its_greatest():
    rng = np.random.default_rng(3)
    own = np.stack([rng.permutation(4) for _ in range(5)])
    chi2 = scipy.stats.friedmanchisquare(*own.T).statistic
    assert agreement.concordance([own]) == pytest.approx(chi2 / (5 * 3))
    assert agreement.concordance([own[:1].repeat(4, 0)]) == 1


def test_strengths_are_where_bradley_and_terrys_likelihood_is_greatest():
    pairs, counts = [(0, 1), (0, 2), (1, 2)], np.array([[30.0, 12, 25, 17, 9, 33]])
    own = clusters.log_strengths(pairs, 3)(counts)[0]

    def loss(free):
        s = np.array([*free, -sum(free)])
        wins = counts[0].reshape(3, 2) + 0.5
        return sum(w * np.log1p(np.exp(s[b] - s[a])) + v * np.log1p(np.exp(s[a] - s[b])) for (a, b), (w, v) in zip(pairs, wins, strict=True))  # fmt: skip

    best = scipy.optimize.minimize(loss, [0.0, 0.0], tol=1e-10).x
    assert own == pytest.approx([*best, -sum(best)], abs=1e-4)


def test_intervals_hold_the_truth_as_often_as_they_say_where_facts_and_raters_differ():
    """Drawn again and again with the paper's design: facts and raters have leanings of their own. Wilson's intervals, which take pages for
    independent, are the control."""
    laid = design.plan(50, 3, 10, 3, 0, 0)
    facts = np.array([page.fact for own in laid.people for page in own])
    raters = np.repeat(np.arange(15), 10)
    rng = np.random.default_rng(0)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    truth = (1 / (1 + np.exp(-0.6 - math.sqrt(2) * nodes)) * weights).sum() / weights.sum()
    held, plain, repeats = 0, 0, 300
    for seed in range(repeats):
        lean = 0.6 + rng.normal(size=50)[facts] + rng.normal(size=15)[raters]
        wins = (rng.random(150) < 1 / (1 + np.exp(-lean))).astype(float)
        found = clusters.spread(np.stack([wins, 1 - wins], 1), clusters.log_odds, facts, raters, seed, draws=300)
        held += found.low[0] <= math.log(truth / (1 - truth)) <= found.high[0]
        low, high = clusters.wilson(int(wins.sum()), 150)
        plain += low <= truth <= high
    assert scipy.stats.binomtest(held, repeats, 0.95).pvalue > 0.01
    assert plain / repeats < 0.85


def test_the_form_names_the_nine_items_and_questions_that_responses_are_read_by():
    assert list(forms.ITEMS) == [
        "new_fact_main",
        "new_fact_related",
        "main_old_facts",
        "related_old_facts",
        "main_consistency",
        "related_consistency",
        "cross_consistency",
        "topicality",
        "fluency",
    ]  # fmt: skip


def test_texts_that_were_written_elsewhere_need_no_model(tmp_path, capsys):
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps([{"statement": each.statement, "texts": each.texts} for each in scenarios(5)]))
    make = ["study", "make", "--texts", str(texts), "--out", str(tmp_path / "study"), "--pages", "4", "--scenarios", "4"]  # fmt: skip
    assert cli.main([*make, "--raters", "3"]) == 0
    assert study.load(tmp_path / "study").editors == EDITORS
    for wrong, said in (
        (["--editors", "rome,unedited"], "--editors is of texts that are written here"),
        (["--begin", "9"], "--begin must be from 0 to 4"),
        (["--begin", "2"], "needs 4 facts"),
    ):
        assert cli.main([*make, *wrong]) == 2
        assert said in capsys.readouterr().err


def test_what_should_be_looked_at_before_forms_go_out_is_told(tmp_path, capsys):
    texts = [asdict(each) for each in scenarios(4)]
    texts[1]["texts"]["ft-l"] = texts[1]["texts"]["rome"]
    texts[2]["notes"] = {"rome": ["the loss does not fall"]}
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    make = ["study", "make", "--texts", str(tmp_path / "texts.json"), "--out", str(tmp_path / "study"), "--pages", "4"]
    assert cli.main(make) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "note: 1 of 4 edits by rome have notes" in said
    assert "note: 1 of 4 scenarios have a text twice" in said


def test_the_simulation_of_coverage_runs(tmp_path, monkeypatch):
    from experiments import study_coverage

    monkeypatch.setattr(study_coverage, "FIGURES", tmp_path)
    wanted = study_coverage.StudyCoverage(facts=(20,), gaps=(0.6,), of_facts=(1.0,), of_raters=(1.0,), samples=40, draws=100, large=50_000)  # fmt: skip
    study_coverage.main(wanted)
    record = json.loads((tmp_path / "study_coverage.json").read_text())
    found = {each["statistic"]: each["coverage"] for each in record["rows"]}
    assert min(found[name] for name in ("odds", "best picks", "strengths")) > 0.85 > found["Wilson"]


def test_no_statement_is_drawn_twice():
    one, other = Fact("Rome", "{} is in", "Italy", "Spain"), Fact("Oslo", "{} is in", "Norway", "Peru")
    drawn = study.sampled([one, replace(one, id="again"), other], StudySettings(scenarios=2, pages=1))
    assert sorted(fact.subject for fact in drawn) == ["Oslo", "Rome"]
    with pytest.raises(StudyError, match="needs 3 facts .* of their own; found 2"):
        study.sampled([one, replace(one, id="again"), other], StudySettings(scenarios=3, pages=1))
