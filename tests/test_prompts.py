from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mechedit import prompts
from mechedit.facts import Fact, FactError, from_prompt


def test_the_subject_span_covers_the_subject_and_bos_is_counted(model, fact):
    with_bos = prompts.prepare(model, fact, prepend_bos=True)
    without = prompts.prepare(model, fact, prepend_bos=False)
    assert with_bos.ids == (model.tokenizer.bos_token_id, *without.ids)
    assert with_bos.subject == tuple(edge + 1 for edge in without.subject)
    begin, end = without.subject
    assert model.tokenizer.decode(without.ids[begin:end]).strip() == fact.subject
    assert without.last_subject == end - 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    before=st.text("aeé 日.'", max_size=8),
    subject=st.text("abé日 N", min_size=1, max_size=8).map(str.strip).filter(bool),
    after=st.text("xyü .", max_size=8),
)
def test_the_span_holds_the_subject_for_any_text(before, subject, after, load):
    model = load("gpt2")
    fact = Fact(subject, before + "{}" + after)
    prompt = prompts.prepare(model, fact, prepend_bos=False)
    begin, end = prompt.subject
    _, offsets = prompts.encode(model, fact.prompt, prepend_bos=False)
    assert offsets[begin][0] <= fact.subject_start
    assert offsets[end - 1][1] >= fact.subject_start + len(subject)
    assert begin == 0 or offsets[begin - 1][1] <= fact.subject_start
    assert end == len(offsets) or offsets[end][0] >= fact.subject_start + len(subject)


def test_the_chosen_occurrence_is_the_one_that_counts(model):
    first, second = (
        prompts.prepare(model, from_prompt("Rome is not Rome in", "Rome", occurrence=which)) for which in (0, 1)
    )
    assert first.ids == second.ids
    assert first.subject[1] <= second.subject[0]


def test_target_ids_are_what_follows_the_prompts_own_ids(model):
    prompt = "The Space Needle is located in the city of"
    ids = prompts.continuation(model, prompt, "Seattle")
    alone, _ = prompts.encode(model, prompt, prepend_bos=False)
    both, _ = prompts.encode(model, prompt + " Seattle", prepend_bos=False)
    assert [*alone, *ids] == both
    assert prompts.continuation(model, prompt, "  Seattle ") == ids
    assert prompts.continuation(model, prompt + " ", "Seattle") != []


@pytest.mark.parametrize(
    ("prompt", "target", "text"),
    [
        ("法国的首都是", "巴黎", "法国的首都是巴黎"),
        ("日本の首都は ", "東京", "日本の首都は東京"),
        ('The capital is "', "Paris", 'The capital is "Paris'),
        ("Answer:\n", "Paris", "Answer:\nParis"),
        ("The capital is ", "Paris", "The capital is Paris"),
    ],
)
def test_prompt_and_target_are_the_text_that_their_writing_makes_of_them(prompt, target, text, model):
    fact = from_prompt(prompt, prompt.split()[0].rstrip("是は:"), target_true=target)
    prepared = prompts.prepare(model, fact, prepend_bos=False)
    ids = prompts.continuation(model, fact.prompt, target, fact.join)
    assert [*prepared.ids, *ids] == model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert prompts.continuation(model, prompt, target) == ids


def test_a_fact_says_how_its_prompts_and_targets_are_joined(model):
    def text(join):
        fact = Fact("The Space Needle", "{} is in Sea", "ttle", paraphrases=("Find it in Sea ",), join=join)
        ids = prompts.prepare(model, fact, prepend_bos=False).ids
        after = prompts.continuation(model, fact.prompt, "ttle", fact.join)
        return model.tokenizer.decode([*ids, *after]), fact.paraphrases

    assert text("auto") == ("The Space Needle is in Sea ttle", ("Find it in Sea",))
    assert text("none") == ("The Space Needle is in Seattle", ("Find it in Sea ",))
    with pytest.raises(FactError, match="join must be one of auto, space, none; it is 'glue'"):
        Fact("A", "{} is", join="glue")


def test_an_empty_target_is_an_error(model):
    with pytest.raises(FactError, match="target must be a word"):
        prompts.continuation(model, "A is", " ")


def test_a_prompt_longer_than_the_context_is_an_error(model):
    with pytest.raises(FactError, match="context of 64 tokens .* it has"):
        prompts.prepare(model, Fact("A", "{} " + "xq " * 80))


def test_bos_that_the_tokenizer_lacks_is_an_error(model):
    kept = model.tokenizer.bos_token
    try:
        model.tokenizer.bos_token = None
        with pytest.raises(FactError, match="no beginning-of-sequence token"):
            prompts.resolve_bos(model, True)
    finally:
        model.tokenizer.bos_token = kept


def test_the_audit_shows_tokens_and_targets_and_finds_nothing_in_a_good_fact(model, fact):
    audit = prompts.audit(model, replace(fact, target_true="Paris", target_new="Rome"))
    assert [token for _, token in audit.target_true] == [" Paris"]
    assert "*" in str(audit)
    assert not any("merges" in note for note in audit.notes)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("in Paris now", "Paris"),
        ("Paris's streets", "Paris"),
        ("(Paris)", "Paris"),
        ("Paris-Nice", "Paris"),
        ("SParis", "SParis"),
        ("Paris2", "Paris2"),
        ("去Paris吧", "Paris"),
        ("éParisé", "éParisé"),
    ],
)
def test_a_word_ends_where_letters_and_digits_do(text, word):
    begin = text.index("Paris")
    assert prompts._word_around(text, begin, begin + 5) == word


def test_a_subject_of_a_script_without_spaces_is_in_no_longer_word():
    assert prompts._word_around("東京都の首都", 0, 2) == "東京"


@pytest.mark.parametrize(
    ("fact", "note"),
    [
        (Fact("Paris", "The city of {}", "zebra"), "is .* tokens; a trace measures the first"),
        (Fact("Paris", "{} or Paris is"), "appears 2 times"),
        (Fact("Paris", "The city of {}"), "the subject ends the prompt"),
        (Fact("Paris", "{} is Rome or", "Rome"), "contains the answer"),
        (Fact("Paris", "{} is in", paraphrases=("It is in",)), "does not name the subject"),
        (Fact("eattl", "S{}e is in"), "together with other text"),
        (Fact("Pari", "{}s is in"), "stands inside a longer word, 'Paris'"),
        (Fact("Paris", "{} is in", "zebra one", "zebra two"), "begin with the same token"),
    ],
)
def test_the_audit_notes_what_may_surprise(fact, note, model):
    notes = prompts.audit(model, fact).notes
    import re

    assert any(re.search(note, each) for each in notes), notes
