from __future__ import annotations

import json
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechedit import facts, sources
from mechedit.facts import Fact, FactError
from mechedit.records import RecordWarning

pytestmark = pytest.mark.anywhere

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
GONE = object()
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
@pytest.mark.filterwarnings(
    "ignore:.*records that are left out. nothing new is to be said:mechedit.records.RecordWarning"
)
def test_the_published_files_are_read(name, data):
    read = facts.read(data / f"{name}.json")
    assert len(read) >= 500
    assert all(fact.subject in fact.prompt for fact in read)


def test_zsre_questions_without_their_subject_are_left_out(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([ZSRE, ZSRE | {"subject": "Nobody"}, ZSRE | {"alt": "uniform "}]))
    told = (
        r"facts.json, 3 records: records that are left out: .*its subject exactly once .in 1., nothing new .* .in 1.\.$"
    )
    with pytest.warns(RecordWarning, match=told):
        assert len(facts.read(path)) == 1
    with pytest.warns(RecordWarning, match=told):
        assert len(sources.questions(path)) == 1


def test_fields_that_are_not_read_are_told(tmp_path):
    path = tmp_path / "facts.json"
    knowedit = {
        "subject": "Elton John",
        "prompt": "Elton John plays the",
        "target_new": "violin",
        "ground_truth": [["piano", "grand piano"]],
        "rephrase": "Elton John's instrument is the",
        "portability": {"Reasoning": [{"prompt": "x", "ground_truth": [["y"]]}]},
        "locality": {"Relation_Specificity": [{"prompt": "x", "ground_truth": [["y"]]}]},
    }
    path.write_text(json.dumps([knowedit, FLAT | {"portability": {}}, FLAT | {"case_id": 9}]))
    told = r"3 records: fields that are not read: portability \(in 2\), locality.Relation_Specificity \(in 1\)\.$"
    with pytest.warns(RecordWarning, match=told):
        first, *_ = facts.read(path)
    assert first == Fact("Elton John", "{} plays the", "piano", "violin", ("Elton John's instrument is the",), id="0")
    path.write_text(json.dumps([NESTED | {"counterfact_plus": 1, "pararel_idx": 3}]))
    with pytest.warns(RecordWarning, match=r"1 records: fields that are not read: counterfact_plus \(in 1\)\.$"):
        facts.read(path)


def test_neighbours_have_answers_of_their_own(tmp_path):
    path = tmp_path / "facts.json"

    def read(**fields):
        path.write_text(json.dumps([{key: value for key, value in (FLAT | fields).items() if value is not GONE}]))
        return facts.read(path)[0].neighbourhood

    assert read(locality_ground_truth="organ") == (("Billy Joel plays the", "organ"),)
    assert read(locality_ground_truth=["organ", "pipe organ"]) == (("Billy Joel plays the", "organ"),)
    assert read(locality_ground_truth=GONE) == (("Billy Joel plays the", "piano"),)
    many = {"locality_prompt": ["A plays the", "B plays the"], "locality_ground_truth": ["flute", ["drums", "drum"]]}
    assert read(**many) == (("A plays the", "flute"), ("B plays the", "drums"))
    easyedit = {"neighborhood": {"prompt": "A plays the", "ground_truth": "flute"}}
    assert read(locality_prompt=GONE, locality_ground_truth=GONE, locality=easyedit) == (("A plays the", "flute"),)
    with pytest.raises(
        FactError, match="locality_ground_truth must be one answer for each locality_prompt; found 1 for 2"
    ):
        read(locality_prompt=["A", "B"], locality_ground_truth=["flute"])
    path.write_text(json.dumps([PLAIN | {"neighbours": ["Rome is in"], "neighbour_answers": ["Lazio"]}]))
    assert facts.read(path)[0].neighbourhood == (("Rome is in", "Lazio"),)


@pytest.mark.parametrize("record", [NESTED, PLAIN, FLAT, ZSRE, KNOWN])
def test_a_record_of_any_form_says_how_it_is_joined(record, tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([record]))
    assert facts.read(path)[0].join == "auto"
    path.write_text(json.dumps([record | {"join": "none"}]))
    assert facts.read(path)[0].join == "none"
    path.write_text(json.dumps([record | {"join": "glue"}]))
    with pytest.raises(FactError, match="record 0.*: join must be one of auto, space, none; it is 'glue'"):
        facts.read(path)


def test_json_lines_and_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "facts.jsonl"
    records = [PLAIN, PLAIN | {"target_new": "\u2028Sp\u0085ain"}, PLAIN | {"target_new": "España"}]
    whole = json.dumps(records, ensure_ascii=False).encode()
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode()
    path.write_bytes(whole)
    read = facts.read(path)
    assert len(read) == 3
    for content in (
        b"\xef\xbb\xbf" + whole,
        lines,
        lines + b"\n\n",
        lines.replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + lines,
    ):
        path.write_bytes(content)
        assert facts.read(path) == read
    path.write_text(json.dumps(PLAIN))
    assert facts.read(path) == read[:1], "one line"
    path.write_bytes(lines.replace(b"{", b"[", 2).replace(b"[", b"{", 1))
    with pytest.raises(FactError, match="line 2 is no record"):
        facts.read(path)


def test_half_a_character_is_told_with_the_records_number_and_id_when_it_is_read(tmp_path):
    path = tmp_path / "facts.json"
    wrong = PLAIN | {"id": "mine", "target_new": "\ud83d", "paraphrases": ["Where is Paris\udc00?"]}
    path.write_text(json.dumps([PLAIN, wrong, PLAIN]))
    with pytest.raises(FactError) as found:
        facts.read(path)
    _, line, *rest = str(found.value).splitlines()
    assert line.startswith("record 1 (id 'mine'): target_new must be text that UTF-8 can write; character 0 of ")
    assert "paraphrases must be text that UTF-8 can write; character 14" in line
    assert len(rest) == 1, "the hint"
    path.write_text(json.dumps([ZSRE | {"loc": "\ud800"}]))
    with pytest.raises(FactError, match="record 0: loc must be text that UTF-8"):
        sources.questions(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "must hold a list"),
        ("[]", "must hold a list"),
        ('[{"a": 1}]', "form of the records is not known. It must be one of: subject, prompt .or template"),
        (
            json.dumps([PLAIN | {"prompts": ["x"]}]),
            r"record 0:? .*prompts \(did you mean prompt\?\) is no field of a fact; there are generations",
        ),
        (json.dumps([PLAIN | {"paraphrases": "one text"}]), "paraphrases must be a list of texts"),
        (json.dumps([PLAIN | {"subject": "Rome"}]), "record 0: .*is not in the prompt"),
        (json.dumps([KNOWN, {"subject": "x"}]), "record 1:? .*it lacks template"),
        (json.dumps([KNOWN | {"subject": ""}]), "record 0:? .*subject must be a word"),
        (json.dumps([KNOWN | {"template": "no slot"}]), r"record 0:? .*exactly one \{\}"),
        (json.dumps([FLAT | {"subject": "Nobody"}]), "record 0 .id '8'.: .*is not in the prompt"),
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
    fact = Fact(" A ", "{} is ", " x ", "  y")
    assert Fact("A ", "{}is", "x", "y", join="none").prompt == "A is"
    assert (fact.prompt, fact.target_true, fact.target_new) == ("A is", "x", "y")


def test_line_breaks_at_the_end_of_prompts_are_kept_and_spaces_are_not():
    fact = Fact("A", "{} is?\n", paraphrases=("Is A? \t", "Is A?\n"), neighbours=("Is B? ",), generations=("A ",))
    assert fact.prompt == "A is?\n"
    assert (fact.paraphrases, fact.neighbours, fact.generations) == (("Is A?", "Is A?\n"), ("Is B?",), ("A",))


def test_a_subject_is_found_however_its_letters_are_composed():
    composed, decomposed = (unicodedata.normalize(form, "Beyoncé plays the") for form in ("NFC", "NFD"))
    for prompt in (composed, decomposed):
        for subject in (composed.split()[0], decomposed.split()[0]):
            fact = facts.from_prompt(prompt, subject)
            assert fact.prompt == prompt, "the user's text is not changed"
            assert fact.template == "{} plays the"
    with pytest.raises(FactError, match="is not in the prompt"):
        facts.from_prompt(decomposed.replace("Beyonc", "Jos"), "Jose")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"subject": "A\ud800"}, r"subject must be text that UTF-8 can write; character 1 of 'A\\ud800' is half of one"),
        ({"target_new": "\udcff"}, "target_new must be text that UTF-8"),
        ({"neighbours": ("B is", "\ud800")}, "neighbours must be text that UTF-8"),
        ({"neighbours": ("B is",), "neighbour_answers": ("x", "y")}, "one for each of the 1 neighbours, or none; found 2"),
        ({"paraphrases": ("A is", " ")}, "paraphrases must be a list of texts, each a word or more"),
    ],
)  # fmt: skip
def test_texts_of_a_fact_that_cannot_be_used_are_errors(fields, message):
    with pytest.raises(FactError, match=message):
        Fact(**({"subject": "A", "template": "{} is"} | fields))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((" ", "{} is"), "subject must be a word"),
        (("A", "is"), "holds 0"),
        (("A", "{} {}"), "holds 2"),
        (("A", "{} is", " "), "target_true must be a word"),
        (("A", "{} is", "x", ""), "target_new must be a word"),
        (("A", "{} is", "x", " x"), "nothing to edit"),
        (("A", "{} is", "é", "e\u0301"), "nothing to edit"),
    ],
)
def test_a_fact_that_cannot_be_meant_is_an_error(arguments, message):
    with pytest.raises(FactError, match=message):
        Fact(*arguments)


def test_a_prompt_with_its_subject_becomes_a_fact():
    with pytest.raises(FactError, match=r"a prompt holds its subject itself; '\{\} is in' is a template"):
        facts.from_prompt("{} is in", "Rome")
    assert facts.from_prompt("The Louvre is in", "Louvre").template == "The {} is in"
    twice = facts.from_prompt("Rome, not Rome, is in", "Rome", occurrence=1)
    assert (twice.template, twice.prompt, twice.subject_start) == ("Rome, not {}, is in", "Rome, not Rome, is in", 10)


@pytest.mark.parametrize(
    ("subject", "occurrence", "message"),
    [
        ("Paris", None, "is not in the prompt"),
        ("", None, "must be a word"),
        ("Rome", None, "appears 2 times .* occurrence=0 to 1.*or give a template"),
        ("Rome", 2, "from 0 to 1"),
        ("Rome", -1, "from 0 to 1"),
    ],
)
def test_a_subject_that_is_not_clear_is_an_error(subject, occurrence, message):
    with pytest.raises(FactError, match=message):
        facts.from_prompt("Rome, not Rome, is in", subject, occurrence=occurrence)


PLAIN_ONE = {"prompt": "Rome is in", "subject": "Rome", "target_true": "Italy", "target_new": "Spain"}
MISTAKES = [  # the field, what is put there, and what is said of it
    ("subject", GONE, "it lacks subject"),
    ("subject", 7, "subject must be a word or more; found 7"),
    (
        "subject",
        "Nowhere",
        "the subject 'Nowhere' is not in the prompt 'Rome is in'; it must appear there letter for letter",
    ),
    ("paraphrases", [1], "paraphrases must be a list of texts; found [1]"),
    ("neighbours", "one", "neighbours must be a list of texts; found 'one'"),
    ("id", "first", "its id 'first' is that of record 0"),
    ("id", [1], "id must be a text or a whole number; found [1]"),
    ("target_new", " ", "target_new must be a word or more; found ' '"),
    ("target_new", "Italy", "target_new equals target_true ('Italy'): there is nothing to edit"),
    ("target_new", GONE, "it lacks target_new, which is needed to score an edit"),
    ("relation", {}, "relation must be a word or more; found {}"),
    ("colour", "red", "colour is no field of a fact; there are generations, id,"),
]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from(MISTAKES), max_size=3, unique_by=lambda each: each[0]), max_size=6))
def test_every_mistake_of_every_record_is_reported_at_once_and_no_other(tmp_path_factory, wrong):
    path = tmp_path_factory.mktemp("own") / "facts.json"
    records = [PLAIN_ONE | {"id": "first"}, *(PLAIN_ONE | {"id": str(index)} for index in range(1, len(wrong) + 1))]
    for record, own in zip(records[1:], wrong, strict=True):
        record |= {field: value for field, value, _ in own}
    path.write_text(json.dumps([{k: v for k, v in record.items() if v is not GONE} for record in records]))
    need = ("target_true", "target_new")
    if not any(wrong):
        assert len(facts.read(path, need)) == len(records)
        return
    with pytest.raises(FactError) as found:
        facts.read(path, need)
    first, *lines, hint = str(found.value).splitlines()
    assert first.endswith(f"mistakes in {sum(map(bool, wrong))} of {len(records)} records, which are numbered from 0:")
    assert hint.startswith("A record has one of these forms")
    told = {line.split(": ")[0]: line.rstrip(".").split(": ", 1)[1] for line in lines}
    told = {re.sub(r" .id .*", "", name): said for name, said in told.items()}
    assert told.keys() == {f"record {index}" for index, own in enumerate(wrong, 1) if own}
    for index, own in enumerate(wrong, 1):
        for _, _, message in own:
            assert message in told[f"record {index}"]
        if own:
            assert told[f"record {index}"].count(";") == sum(each[2].count(";") + 1 for each in own) - 1, "and no other"


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (NESTED | {"requested_rewrite": 7}, "record 0 (id '7'): requested_rewrite must be an object; found 7."),
        (NESTED | {"requested_rewrite": NESTED["requested_rewrite"] | {"target_new": {}}}, "record 0 (id '7'): it lacks requested_rewrite.target_new.str."),
        (NESTED | {"case_id": 1.5}, "record 0: case_id must be a text or a whole number; found 1.5."),
        (NESTED | {"case_id": True}, "record 0: case_id must be a text or a whole number; found True."),
        ({key: FLAT[key] for key in FLAT if key != "target_new"}, "record 0 (id '8'): it lacks target_new."),
        (ZSRE | {"answers": []}, "record 0: answers must be a list of texts; found []."),
        (ZSRE | {"answers": "uniform", "src": 3}, "record 0: src must be a word or more; found 3; answers must be a list of texts; found 'uniform'."),
        ({key: ZSRE[key] for key in ZSRE if key != "alt"}, "record 0: it lacks alt."),
        ({key: KNOWN[key] for key in KNOWN if key != "template"} | {"subject": None}, "record 0 (id '3'): it lacks subject; it lacks template."),
        (PLAIN | {"target_new": "x" * 1000, "relation": ["x" * 1000]}, "record 0: relation must be a word or more; found ['xxxxxxxxxxxx...xxxxxxxxxxxxx']."),
    ],
)  # fmt: skip
def test_a_mistake_is_told_once_and_shortly(record, told, tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([record, PLAIN] if record == 7 else [record]))
    with pytest.raises(FactError) as found:
        facts.read(path)
    assert str(found.value).splitlines()[1] == told


def test_what_is_no_object_is_told_with_its_number(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([PLAIN, None, [1]]))
    with pytest.raises(FactError, match=r"(?s)record 1: it must be an object; found None.*record 2: .* found \[1\]"):
        facts.read(path)
    path.write_text("[null, 1]")
    with pytest.raises(FactError, match="one or more records, each an object"):
        facts.read(path)
    path.write_text("[" * 200_000)
    with pytest.raises(FactError, match="is not JSON"):
        facts.read(path)


def test_ids_that_read_alike_are_alike(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([asdict(Fact("Rome", "{} is in")), asdict(Fact("Rome", "{} lies in"))]))
    assert [fact.id for fact in facts.read(path)] == ["0", "1"], "null is no id"
    path.write_text(json.dumps([PLAIN | {"id": 1}, PLAIN]))
    with pytest.raises(FactError, match="record 1: its id '1' is that of record 0"):
        facts.read(path)


def test_spaces_around_a_subject_are_not_the_prompts(tmp_path):
    path = tmp_path / "facts.json"
    for record in (FLAT | {"subject": "Elton John "}, PLAIN | {"subject": " Paris"}, ZSRE | {"subject": "UniFirst "}):
        path.write_text(json.dumps([record]))
        assert facts.read(path)[0].prompt == record.get("prompt", record.get("src"))


def test_zsre_asks_the_unrelated_question_as_the_fact_is_asked(tmp_path):
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps([ZSRE | {"subject": "Guess Who?", "src": "Who made Guess Who?", "loc": "who sang"}]))
    assert sources.questions(path)[0].unrelated == "who sang?"
    path.write_text(json.dumps([ZSRE | {"loc": "who sang?"}]))
    assert sources.questions(path)[0].unrelated == "who sang?"
    blanks = [ZSRE | {"subject": " "}, ZSRE | {"alt": " "}, ZSRE | {"alt": "uniform "}, ZSRE | {"rephrase": " "}]
    path.write_text(json.dumps(blanks))
    with pytest.warns(RecordWarning, match="left out"):
        (left,) = sources.questions(path)
    assert left.fact.paraphrases == ()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.filterwarnings("ignore::mechedit.records.RecordWarning")
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whatever_a_record_holds_a_fact_says_it_or_there_is_none(tmp_path_factory, data):
    record = json.loads(json.dumps(data.draw(st.sampled_from([NESTED, PLAIN, FLAT, ZSRE, KNOWN]))))
    inside = data.draw(st.sampled_from([record, record.get("requested_rewrite", record)]))
    inside[data.draw(st.sampled_from(sorted(inside)))] = data.draw(JSON)
    path = tmp_path_factory.mktemp("own") / "facts.json"
    path.write_text(json.dumps([record]))
    with suppress(FactError):
        for fact in facts.read(path):
            written = json.dumps(record, ensure_ascii=False)
            for text in (fact.subject, fact.target_true, fact.target_new, *fact.template.split("{}")):
                assert text is None or json.dumps(text.strip(), ensure_ascii=False)[1:-1] in written
    with suppress(FactError):
        assert len(sources.questions(path)) <= 1


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
    assert sources.named("built-in") == facts.built_in()
    assert len(sources.named("organism")) == 10200


def test_what_is_no_file_is_told_the_sets_that_have_names(tmp_path):
    for name in (tmp_path / "mine.json", "organsm"):
        with pytest.raises(FactError, match="is neither a file nor a set of facts, which are built-in and organism"):
            sources.named(name)


def test_a_place_that_may_not_be_looked_at_is_one_that_cannot_be_read(tmp_path):
    with pytest.raises(FactError, match="cannot be read"):
        sources.named(tmp_path / ("long" * 100 + ".json"))


def test_a_file_is_a_set_by_its_path_and_may_have_to_have_more(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([{"subject": "Paris", "prompt": "Paris is in", "target_true": "France"}]))
    assert sources.named(path) == sources.named(str(path)) == (Fact("Paris", "{} is in", "France", id="0"),)
    with pytest.raises(FactError, match="target_new"):
        sources.named(path, ("target_new",))


def test_questions_are_of_the_organisms_world_or_of_a_zsre_file(tmp_path):
    asked, known = sources.questions("organism"), sources.named("organism")
    assert len(asked) == len(known)
    assert (asked[0].fact.prompt, asked[0].fact.target_new) == (known[0].prompt, known[0].target_new)
    assert (asked[0].unrelated, asked[0].answer) == (known[1].prompt, known[1].target_true)
    with pytest.raises(FactError, match="the built-in facts are no zsRE questions"):
        sources.questions("built-in")
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([{"subject": "Paris", "prompt": "Paris is in"}]))
    with pytest.raises(FactError, match="is no zsRE file"):
        sources.questions(path)


def test_facts_do_not_know_the_world_that_is_made_of_them():
    code = "import sys; import mechedit.facts; print('mechedit.organism.world' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"  # fmt: skip
