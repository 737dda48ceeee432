from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechedit import facts
from mechedit.benchmarks import zsre
from mechedit.facts import Fact, FactError

NESTED = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} plays the",
        "relation_id": "P1303",
        "subject": "Elton John",
        "target_true": {"str": "piano", "id": "Q5994"},
        "target_new": {"str": "violin", "id": "Q8355"},
    },
    "paraphrase_prompts": ["Elton John's instrument is the"],
    "neighborhood_prompts": ["Billy Joel plays the"],
    "generation_prompts": ["Elton John is"],
}
PLAIN = {
    "subject": "Paris",
    "prompt": "Paris is in",
    "target_true": "France",
    "target_new": "Italy",
    "paraphrases": ["Where is Paris?"],
    "relation": "country",
}
FLAT = {
    "case_id": 8,
    "prompt": "Elton John plays the",
    "subject": "Elton John",
    "target_new": "violin",
    "ground_truth": "piano",
    "rephrase_prompt": "Elton John's instrument is the",
    "locality_prompt": "Billy Joel plays the",
    "locality_ground_truth": "piano",
}
ZSRE = {
    "subject": "UniFirst",
    "src": "What is the product made by UniFirst?",
    "rephrase": "What will be the product of UniFirst?",
    "alt": "unmanned aircraft",
    "answers": ["uniform"],
    "loc": "nq question: who?",
    "loc_ans": "Walter",
}
KNOWN = {
    "known_id": 3,
    "subject": "Beats Music",
    "attribute": "Apple",
    "template": "{} is owned by",
    "prompt": "Beats Music is owned by",
    "relation_id": "P127",
}


def test_the_built_in_facts_are_enough_and_whole():
    built_in = facts.built_in()
    assert built_in[0].prompt == "The Space Needle is located in the city of"
    assert len(built_in) >= 150
    assert len({fact.relation for fact in built_in}) >= 12
    for fact in built_in:
        assert fact.target_true
        assert fact.target_new
        assert len(fact.paraphrases) == 2
        assert len(fact.neighbours) >= 4
        assert fact.generations
        assert all(fact.subject in prompt for prompt in fact.paraphrases)
        assert not any(fact.subject in prompt.split() for prompt in fact.neighbours)
        assert not any(prompt.endswith(" ") for prompt in (fact.prompt, *fact.paraphrases, *fact.neighbours))
    assert max(Counter((fact.subject, fact.relation) for fact in built_in).values()) == 1


def test_each_published_form_is_recognised_and_read(tmp_path):
    def read(record):
        path = tmp_path / "facts.json"
        path.write_text(json.dumps([record]))
        return facts.read(path)[0]

    assert read(NESTED) == Fact(
        "Elton John",
        "{} plays the",
        "piano",
        "violin",
        ("Elton John's instrument is the",),
        ("Billy Joel plays the",),
        ("Elton John is",),
        "P1303",
        "7",
        "Q8355",
    )
    flat = read(FLAT)
    assert (flat.prompt, flat.subject, flat.target_true, flat.target_new) == (
        "Elton John plays the",
        "Elton John",
        "piano",
        "violin",
    )
    assert (flat.paraphrases, flat.neighbours, flat.id) == (
        ("Elton John's instrument is the",),
        ("Billy Joel plays the",),
        "8",
    )
    zsre = read(ZSRE)
    assert (zsre.template, zsre.target_true, zsre.target_new) == (
        "What is the product made by {}?",
        "uniform",
        "unmanned aircraft",
    )
    known = read(KNOWN)
    assert (known.prompt, known.target_true, known.target_new, known.relation) == (
        "Beats Music is owned by",
        "Apple",
        None,
        "P127",
    )


@pytest.mark.parametrize("name", ["counterfact_flat", "zsre", "known_facts"])
def test_the_published_files_are_read(name, data):
    read = facts.read(data / f"{name}.json")
    assert len(read) >= 500
    assert all(fact.subject in fact.prompt for fact in read)


def test_zsre_questions_without_their_subject_are_left_out(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([ZSRE, ZSRE | {"subject": "Nobody"}]))
    assert len(facts.read(path)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "must hold a list"),
        ("[]", "must hold a list"),
        ('[{"a": 1}]', "form of the records is not known. It must be one of: subject, prompt, target_true"),
        (json.dumps([PLAIN | {"prompts": ["x"]}]), "record 0:? .*prompts is no field of a fact; there are generations"),
        (json.dumps([PLAIN | {"paraphrases": "one text"}]), "paraphrases must be a list of texts"),
        (json.dumps([PLAIN | {"subject": "Rome"}]), "record 0:? .*is not in the prompt"),
        (json.dumps([KNOWN, {"subject": "x"}]), "record 1:? .*it lacks template"),
        (json.dumps([KNOWN | {"subject": ""}]), "record 0:? .*subject must be a word"),
        (json.dumps([KNOWN | {"template": "no slot"}]), r"record 0:? .*exactly one \{\}"),
        (json.dumps([FLAT | {"subject": "Nobody"}]), "record 0:? .*is not in the prompt"),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_that_names_the_record(content, message, tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(content)
    with pytest.raises(FactError, match=message):
        facts.read(path)


def test_facts_of_ones_own_are_read(tmp_path):
    path = tmp_path / "facts.json"
    template = {key: value for key, value in PLAIN.items() if key != "prompt"} | {"template": "{} is in", "id": 7}
    path.write_text(json.dumps([PLAIN, template, {"subject": "Rome", "prompt": "Rome is in"}]))
    expected = Fact("Paris", "{} is in", "France", "Italy", ("Where is Paris?",), relation="country", id="0")
    assert facts.read(path) == (expected, replace(expected, id="7"), Fact("Rome", "{} is in", id="2"))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(FactError, match="no text in UTF-8"):
        facts.read(path)


def test_what_is_no_fact_is_an_error():
    with pytest.raises(FactError, match=r"a fact is facts.Fact\(subject, template, …\) or .*found 'Paris is in'"):
        facts.check_fact("Paris is in")
    facts.check_fact(Fact("Paris", "{} is in"))
    with pytest.raises(FactError, match="the prompt must be a word or more"):
        facts.from_prompt(" ", "Paris")


def test_a_missing_file_is_an_error():
    with pytest.raises(FactError, match=r"no\.json cannot be read"):
        facts.read("no.json")


def test_targets_and_templates_are_stripped_once():
    fact = Fact("A", "{} is ", " x ", "  y")
    assert (fact.prompt, fact.target_true, fact.target_new) == ("A is", "x", "y")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((" ", "{} is"), "subject must be a word"),
        (("A", "is"), "holds 0"),
        (("A", "{} {}"), "holds 2"),
        (("A", "{} is", " "), "target_true must be a word"),
        (("A", "{} is", "x", ""), "target_new must be a word"),
        (("A", "{} is", "x", " x"), "nothing to edit"),
    ],
)
def test_a_fact_that_cannot_be_meant_is_an_error(arguments, message):
    with pytest.raises(FactError, match=message):
        Fact(*arguments)


def test_a_prompt_with_its_subject_becomes_a_fact():
    assert facts.from_prompt("The Louvre is in", "Louvre").template == "The {} is in"
    twice = facts.from_prompt("Rome, not Rome, is in", "Rome", occurrence=1)
    assert (twice.template, twice.prompt, twice.subject_start) == ("Rome, not {}, is in", "Rome, not Rome, is in", 10)


@pytest.mark.parametrize(
    ("subject", "occurrence", "message"),
    [
        ("Paris", None, "is not in the prompt"),
        ("", None, "must be a word"),
        ("Rome", None, "appears 2 times .* occurrence=0 to 1"),
        ("Rome", 2, "from 0 to 1"),
        ("Rome", -1, "from 0 to 1"),
    ],
)
def test_a_subject_that_is_not_clear_is_an_error(subject, occurrence, message):
    with pytest.raises(FactError, match=message):
        facts.from_prompt("Rome, not Rome, is in", subject, occurrence=occurrence)


RECORD = {"prompt": "Rome is in", "subject": "Rome", "target_true": "Italy", "target_new": "Spain"}
MISTAKES = {  # what each says, and what makes it
    "it lacks subject": lambda record: record.pop("subject"),
    "subject must be a word or more; found 7": lambda record: record.update(subject=7),
    "paraphrases must be a list of texts; found [1]": lambda record: record.update(paraphrases=[1]),
    "neighbours must be a list of texts; found 'one'": lambda record: record.update(neighbours="one"),
    "the subject 'Nowhere' is not in the prompt": lambda record: record.update(subject="Nowhere"),
    "it has the id 'first' of record 0": lambda record: record.update(id="first"),
    "id must be a text or a number; found [1]": lambda record: record.update(id=[1]),
    "target_new must be a word or more; found ' '": lambda record: record.update(target_new=" "),
    "target_new equals target_true": lambda record: record.update(target_new="Italy"),
    "it lacks target_true, which is needed here": lambda record: record.pop("target_true"),
    "relation must be a word or more; found {}": lambda record: record.update(relation={}),
    "colour is no field of a fact": lambda record: record.update(colour="red"),
    "it must be an object; found None": None,
}
ABOUT = {
    "subject": 0,
    "Nowhere": 0,
    "id": 1,
    "target_new": 2,
    "target_true": 2,
}  # mistakes of one thing exclude each other


def excluded(mistakes):
    """Whether two of these are about one thing, or one leaves nothing for another to be about."""
    about = [next((ABOUT[word] for word in ABOUT if word in each), each) for each in mistakes]
    return len(set(about)) < len(about) or (len(about) > 1 and any(MISTAKES[each] is None for each in mistakes))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(list(MISTAKES)), max_size=3).filter(lambda own: not excluded(own)), max_size=6)
)
def test_every_mistake_of_every_record_is_reported_at_once(tmp_path_factory, wrong):
    path = tmp_path_factory.mktemp("own") / "facts.json"
    records = [RECORD | {"id": "first"}, *(RECORD | {"id": str(index)} for index in range(len(wrong)))]
    for index, own in enumerate(wrong, 1):
        for mistake in own:
            if MISTAKES[mistake]:
                MISTAKES[mistake](records[index])
            else:
                records[index] = None
    path.write_text(json.dumps(records))
    need = ("target_true", "target_new")
    if not any(wrong):
        assert len(facts.read(path, need)) == len(records)
        return
    with pytest.raises(FactError) as found:
        facts.read(path, need)
    lines = str(found.value).splitlines()
    assert f"mistakes in {sum(map(bool, wrong))} of {len(records)} records" in lines[0]
    for index, own in enumerate(wrong, 1):
        told = [line for line in lines if line.startswith(f"record {index}: ")]
        assert len(told) == bool(own)
        assert all(mistake in told[0] for mistake in own)
        assert not own or told[0].count(";") >= len(own) - 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_record_of_any_form_breaks_the_reader(tmp_path_factory, data):
    record = json.loads(json.dumps(data.draw(st.sampled_from([NESTED, PLAIN, FLAT, ZSRE, KNOWN]))))
    inside = data.draw(st.sampled_from([record, record.get("requested_rewrite", record)]))
    inside[data.draw(st.sampled_from(sorted(inside)))] = data.draw(JSON)
    path = tmp_path_factory.mktemp("own") / "facts.json"
    path.write_text(json.dumps([record]))
    for read in (facts.read, zsre.read):
        with suppress(FactError):
            assert len(read(path)) <= 1


def test_many_mistakes_are_counted_and_not_all_shown(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([{"prompt": "Rome is in", "subject": "Paris"}] * 50))
    with pytest.raises(FactError, match=r"(?s)mistakes in 50 of 50 records.*record 19.*and 30 more"):
        facts.read(path)


def test_an_empty_list_is_no_file_of_facts(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text("[]")
    with pytest.raises(FactError, match="one or more records"):
        facts.read(path)


def test_sets_have_names():
    assert facts.named("built-in") == facts.built_in()
    assert len(facts.named("organism")) == 10200
