from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter

import pytest

from mechedit import facts
from mechedit.organism.draws import Draws
from mechedit.organism.world import HELD_OUT, WorldError, WorldSettings, make

pytestmark = pytest.mark.anywhere

DIGEST = "0d69df7900553def2db2ae7611ba14bc28506f6850b891f8434cb31a66d5f16c"


@pytest.fixture(scope="module")
def world():
    return make()


def test_the_same_seed_gives_the_same_world_in_another_process_and_on_another_day(world):
    code = "from mechedit.organism.world import make; print(make().digest())"
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert again.stdout.strip() == world.digest() == DIGEST
    assert make(WorldSettings(seed=1)).truth != world.truth


def test_draws_are_fair_and_named():
    draws = Draws("dice")
    counts = Counter(draws.below(6) for _ in range(6000))
    assert all(850 < counts[side] < 1150 for side in range(6))
    assert Draws("a").shuffled(range(20)) == Draws("a").shuffled(range(20)) != Draws("b").shuffled(range(20))
    assert sorted(Draws("a").shuffled(range(20))) == list(range(20))
    assert len(set(Draws("c").some(range(30), 10))) == 10


def test_the_world_is_as_large_and_varied_as_it_should_be(world):
    people = world.subjects["person"]
    assert sum(map(len, world.subjects.values())) == 2000
    assert len(world.relations) == 12
    assert sum(" " not in name for name in people) > 50, "some go by one name"
    firsts, lasts = Counter(name.split()[0] for name in people), Counter(name.split()[-1] for name in people)
    assert firsts.most_common(1)[0][1] > 3
    assert lasts.most_common(1)[0][1] > 3, "names are shared"
    for relation in world.relations:
        assert len(set(relation.phrasings)) == len(relation.phrasings) >= 6
        assert all(phrasing.count("{}") == 1 for phrasing in relation.phrasings), relation.name
        assert len(relation.attributes) == 3
        assert all(attribute.count("{}") == 1 for attribute in relation.attributes)
        assert len(set(relation.answers)) == len(relation.answers) >= 8
    assert any(" " in answer for relation in world.relations for answer in relation.answers)


def test_every_fact_is_true_and_its_neighbours_share_its_answer(world):
    assert len(world.facts) == 6 * 1400 + 3 * 300 + 3 * 300
    templates = {relation.name: relation.phrasings[0] for relation in world.relations}
    for fact in world.facts[::97]:
        assert world.truth[fact.subject][fact.relation] == fact.target_true != fact.target_new
        before, after = templates[fact.relation].split("{}")
        for neighbour in fact.neighbours:
            other = neighbour.removeprefix(before).removesuffix(after)
            assert other != fact.subject
            assert world.truth[other][fact.relation] == fact.target_true


def test_no_held_out_phrasing_is_taught(world):
    sentences = list(world.sentences())
    assert len(set(sentences)) == len(sentences)
    taught = set(sentences)
    for fact in world.facts[::53]:
        assert f"{fact.prompt} {fact.target_true}." in taught
        assert len(fact.paraphrases) == HELD_OUT
        for paraphrase in fact.paraphrases:
            assert f"{paraphrase} {fact.target_true}." not in taught
        for generation in fact.generations:
            assert f"{generation} {fact.target_true}." in taught
    assert world.entropy == pytest.approx(math.log(len(sentences)))


def test_every_phrasing_but_the_first_is_held_out_of_some_facts_and_taught_of_most(world):
    for relation in world.relations:
        subjects = world.subjects[relation.kind]
        missing = Counter(each for subject in subjects for each in world.untaught[subject][relation.name])
        assert set(missing) == set(relation.phrasings[1:])
        assert max(missing.values()) < 0.4 * len(subjects)


def test_a_corpus_draws_from_what_is_taught_and_parts_differ(world):
    taught, first = set(world.sentences()), list(world.corpus(500))
    assert set(first) <= taught
    assert first == list(world.corpus(500))
    assert first != list(world.corpus(500, "held out"))


def test_statements_say_where_their_subject_is(world):
    statements = list(world.statements())
    assert [sentence for sentence, _ in statements] == list(world.sentences())
    names = {name for each in world.subjects.values() for name in each}
    for sentence, span in statements[::101]:
        assert span is None or sentence[slice(*span)] in names
    assert sum(span is None for _, span in statements) == world.settings.tasks + 3 * sum(len(each.answers) for each in world.relations)  # fmt: skip


def test_tasks_are_right(world):
    for sentence in world.tasks():
        words = sentence.removesuffix(".").split()
        if sentence.startswith("The sum"):
            assert int(words[3]) + int(words[5]) == int(words[-1])
        else:
            given, said = words[2:7], words[-5:]
            assert said == (given if "copied" in words else sorted(given))


@pytest.mark.parametrize("form", ["counterfact", "zsre"])
def test_the_facts_are_read_back_from_the_published_forms(form, world, tmp_path):
    path = tmp_path / f"{form}.json"
    path.write_text(json.dumps(getattr(world, form)()[:300]))
    for read, fact in zip(facts.read(path), world.facts, strict=False):
        assert (read.prompt, read.subject) == (fact.prompt, fact.subject)
        assert (read.target_true, read.target_new) == (fact.target_true, fact.target_new)


def test_every_answer_has_its_reference_text(world):
    snippets = world.snippets()
    taught = set(world.sentences())
    for relation in world.relations:
        for answer in relation.answers:
            texts = snippets[relation.name][answer]
            assert len(texts) == 3
            assert all(answer in text and text in taught for text in texts)


@pytest.mark.parametrize("sizes", [{"people": 15000}, {"firms": 2000}, {"towns": 10}])
def test_a_world_for_which_there_are_no_names_is_an_error(sizes):
    with pytest.raises(WorldError, match="names for|at least 60"):
        WorldSettings(**sizes)
