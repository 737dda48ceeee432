from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace

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


@pytest.fixture
def pieces(model):
    """A tokenizer of sentence pieces, which put the space into a token that begins a word."""
    vocabulary = dict.fromkeys(("▁The", "▁city", "▁of", "▁Paris", "▁", "P", "a", "r", "i", "s", "巴", "黎", "是"), 0.0)
    tokenizer = Tokenizer(Unigram([("<unk>", -20.0), ("<s>", 0.0), *((piece, -1.0 - len(piece) % 2) for piece in vocabulary)], unk_id=0))  # fmt: skip
    tokenizer.pre_tokenizer, tokenizer.decoder = Metaspace(prepend_scheme="first"), decoders.Metaspace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    alone = torch.nn.Module()  # on 4.3 a model reads a tokenizer anew that it is given
    alone.cfg, alone.tokenizer = model.cfg, fast
    return alone


def test_a_sentence_pieces_space_is_shown(pieces):
    audit = prompts.audit(pieces, Fact("The city", "{} of", "Paris"), prepend_bos=True)
    assert audit.prompt.tokens == ("<s>", " The", " city", " of")
    assert [token for _, token in audit.target_true] == [" Paris"]
    assert "' Paris'" in str(audit)
    chinese = prompts.audit(pieces, Fact("巴", "{}是", "巴黎"), prepend_bos=False)
    assert [token for _, token in chinese.target_true] == ["巴", "黎"], "no space where there is none"


def test_what_is_decoded_goes_on_where_the_text_before_it_ended(pieces):
    ids, _ = prompts.encode(pieces, "The city of Paris", prepend_bos=True)
    assert prompts.decoded(pieces, ids[3:], ids[:3]) == " of Paris"
    assert prompts.decoded(pieces, ids[3:]) == " of Paris"
    assert prompts.decoded(pieces, []) == ""


CHAT = "<s>user\nWhere is Rome?\n"


def test_a_chat_gets_one_bos_and_keeps_its_line_break(model):
    fact = from_prompt(CHAT, "Rome", target_true="Paris")
    prompt = prompts.prepare(model, fact, prepend_bos=True)
    plain = model.tokenizer(CHAT, add_special_tokens=False)["input_ids"]
    assert list(prompt.ids) == plain
    assert plain.count(model.tokenizer.bos_token_id) == 1
    begin, end = prompt.subject
    assert model.tokenizer.decode(prompt.ids[begin:end]).strip() == "Rome"
    paris = model.tokenizer(CHAT + "Paris", add_special_tokens=False)["input_ids"]
    assert [*plain, *prompts.continuation(model, fact.prompt, "Paris")] == paris
    text, at = prompts.behind(model, "x. ", fact)
    assert text == "<s>x. " + CHAT[3:]
    assert text[at : at + 4] == "Rome"


@pytest.mark.parametrize(
    ("prompt", "note"),
    [
        (CHAT, "begins with '<s>' itself"),
        (CHAT, "ends in a line break, which is kept"),
        ("Rome</s> is", "holds special tokens, '</s>', as a chat's does"),
        ("<|im_start|>user Rome is", r"'<\|im_start\|>' is no token of .*: it is read in pieces"),
    ],
)
def test_what_is_of_a_chat_is_noted(prompt, note, model):
    notes = prompts.doubts(model, from_prompt(prompt, "Rome"), prepend_bos=True)
    assert any(re.search(note, each) for each in notes), notes
    assert prompts.doubts(model, from_prompt("Rome < Paris [1] is", "Rome"), prepend_bos=True) == []


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
    assert any(re.search(note, each) for each in notes), notes
