from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest
import torch

from mechedit import models, sources
from mechedit.benchmarks import answers
from mechedit.benchmarks.counterfact import COUNTERFACT
from mechedit.generation import complete, completions
from mechedit.prompts import encode
from mechedit.runs.evaluating import evaluate
from mechedit.runs.scored import measure
from mechedit.runs.store import RunError
from mechedit.settings import EvaluateSettings, SettingsError
from tests.three_facts import FACTS, PLAIN


@pytest.mark.anywhere
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" St. Louis. The city", "St. Louis."),
        (" J. K. Rowling. She wrote", "J. K. Rowling."),
        (" the U.S. Army. It is", "the U.S. Army."),
        (" Dr. Martin King! He", "Dr. Martin King!"),
        (" No. 5. It", "No. 5."),
        (" no. It is", "no."),
        (" 3.5 metres. It", "3.5 metres."),
        (" born on Jan. 5. He", "born on Jan. 5."),
        (' "Paris." It is', '"Paris."'),
        (" Paris\nBerlin. Rome", "Paris"),
        ("\n\nParis. It", "Paris."),
        (" Paris", "Paris"),
        ("巴黎。它", "巴黎。"),
        (" Warner Bros. Pictures. It", "Warner Bros. Pictures."),
        (" Warner Bros. It is", "Warner Bros."),
        (" Adm. Horatio Nelson. He", "Adm. Horatio Nelson."),
        (" Brig. Gen. Smith. He", "Brig. Gen. Smith."),
        (" Ste. Marie. It", "Ste. Marie."),
        (" Wm. Blake. He", "Wm. Blake."),
        (" Martin Luther King, Jr. Day. It", "Martin Luther King, Jr. Day."),
        (" Martin Luther King, Jr. He was", "Martin Luther King, Jr."),
        (" Sunset Blvd. The street", "Sunset Blvd."),
        (" Sunset Blvd. Theatre. It", "Sunset Blvd. Theatre."),
        (" Fr. Thos. Brown, Sr. Street. It", "Fr. Thos. Brown, Sr. Street."),
    ],
)
def test_an_answer_ends_with_its_sentence_or_line(text, expected):
    assert answers.cut(text) == expected
    assert answers.is_over(text) == (expected != text.strip())
    beginnings = [text[:end] for end in range(len(text) + 1)]
    over = next((each for each in beginnings if answers.is_over(each)), text)
    assert answers.cut(over) == expected, "as it is generated"


@pytest.mark.anywhere
@pytest.mark.parametrize(
    ("said", "target", "expected"),
    [
        ("St. Louis.", "St. Louis", True),
        ("by J. K. Rowling", "J.K. Rowling", False),
        ("by J. K. Rowling", "J. K. Rowling", True),
        ("in the U.S.", "U.S.", True),
        ("it is Apple Inc.", "Apple Inc.", True),
        ("The Beatles!", "beatles", True),
        ("Parisian food", "Paris", False),
        ("comparis", "Paris", False),
        ("France's capital", "France", True),
        ("Jose\u0301", "José", True),
        ("Jose\u0301", "Jos", False),
        ("它在巴黎。", "巴黎", True),
        ("Rome", "Paris", False),
        ("...", "...", False),
        ("Serie B", "Serie A", False),
        ("in Serie A.", "Serie A", True),
        ("Vitamin C", "Vitamin A", False),
        ("Hepatitis B", "Hepatitis A", False),
        ("Who knows", "The Who", False),
        ("Who?", "The Who", True),
        ("by the Who, a band", "The Who", True),
        ("a man", "A", False),
        ("C", "C#", False),
        ("C#, of course", "C", False),
        ("C#, of course", "C#", True),
        ("C++", "C", False),
        ("in C++.", "C++", True),
        ("Channel #1", "1", True),
    ],
)
def test_an_answer_holds_its_target_as_whole_words(said, target, expected):
    assert answers.is_answered(said, target) == expected


@pytest.mark.anywhere
def test_the_published_rule_stops_at_every_full_stop_and_wants_the_answer_alone():
    assert answers.cut(" St. Louis. The", "published") == "St"
    assert answers.is_over(" St.", "published")
    assert answers.is_answered("The Paris", "paris", "published")
    assert not answers.is_answered("in Paris", "Paris", "published")


def said_plainly(model, prompt, tokens=answers.TOKENS):
    """Greedy text, a whole forward pass a token, stopped with nothing remembered."""
    ids = begun = encode(model, prompt, prepend_bos=bool(model.cfg.default_prepend_bos))[0]
    whole = model.tokenizer.decode(begun)
    text = ""
    for _ in range(tokens):
        token = int(model(torch.tensor([ids]))[0, -1].argmax())
        if token == model.tokenizer.eos_token_id or len(ids) > model.cfg.n_ctx:
            break
        ids = [*ids, token]
        text = model.tokenizer.decode(ids)[len(whole) :]
        if answers.is_over(text):
            break
    return text


def test_the_answers_of_fifty_facts_are_those_of_a_plain_loop():
    model = models.load("organism")
    some = sources.named("organism")[:50]
    found = completions(model, [fact.prompt for fact in some], answers.TOKENS, until=answers.is_over)
    with torch.no_grad():
        plain = [said_plainly(model, fact.prompt) for fact in some]
    assert [text.strip() for text in found] == [text.strip() for text in plain]
    right = []
    for fact, text in zip(some, plain, strict=True):
        said = " ".join(text.lower().replace(".", "").split())
        right.append(f" {fact.target_true.lower()} " in f" {said} ")
    assert sum(right) > 25, "it knows them"
    assert [answers.is_answered(answers.cut(text), fact.target_true) for fact, text in zip(some, found, strict=True)] == right  # fmt: skip


def test_prompts_that_are_completed_together_are_completed_as_each_alone(model):
    some = [fact.prompt for fact in FACTS] + ["Rome is", "Paris is"]
    assert completions(model, some, 12) == [complete(model, prompt, 12) for prompt in some]
    assert completions(model, some[:1], 12, until=lambda text: len(text) > 3)[0] in complete(model, some[0], 12)


def test_a_judge_stands_in_the_rules_place(model):
    asked = []

    def judge(question, said, target):
        asked.append((question, said, target))
        return True

    settings = PLAIN.__class__(health=False, beside=False)
    assert measure(model, FACTS[0], COUNTERFACT, settings, judge=judge)["answer"] == 1.0
    ((question, said, target),) = asked
    assert (question, target) == (FACTS[0].prompt, "Paris")
    assert said == answers.cut(complete(model, FACTS[0].prompt, answers.TOKENS))
    assert "answer" not in measure(model, FACTS[0], COUNTERFACT, PLAIN)


class Strict:
    def __call__(self, question, said, target):
        return said == target


def always(value, *, how=None):
    """A judge that says one thing."""

    def judge(question, said, target):
        return value if how is None else how(value)

    return judge


@pytest.mark.anywhere
def test_a_judge_is_told_by_what_it_does_and_not_by_its_name():
    keys = [answers.judge_key(each) for each in (always(True), always(False), lambda q, s, t: True, lambda q, s, t: False, lambda q, s, t=1: True)]  # fmt: skip
    assert len(set(keys)) == 5
    assert answers.judge_key(always(True)) == keys[0]
    partial = functools.partial(always(True))
    for unknown in (partial, Strict(), always(True, how=len)):
        with pytest.raises(SettingsError, match=r"or have an attribute key.*found <|found functools"):
            answers.judge_key(unknown)
    partial.key = "mine, 1"
    assert answers.judge_key(partial) == "mine, 1"


@pytest.mark.anywhere
def test_a_judge_that_has_sets_in_it_has_the_same_key_in_every_process():
    judges = """
from mechedit.benchmarks.answers import judge_key
one = lambda question, said, target: said in {"yes", "ja", "oui", "si", "da"} and target not in {("no", "nein"), ("non",)}
two = lambda question, said, target: said in {"yes", "ja", "oui", "si", "no"} and target not in {("no", "nein"), ("non",)}
code = one.__code__
nested = (frozenset(["yes", "ja", "oui"]), frozenset([frozenset(["non", "nein"]), frozenset(["si", "da"])]))
three = type(one)(code.replace(co_consts=(nested, *code.co_consts[1:])), globals())
print(*(judge_key(each).split()[1] for each in (one, two, three)))
"""
    said = [
        subprocess.run(
            [sys.executable, "-c", judges],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for seed in ("1", "2", "3")
    ]
    assert said[0] == said[1] == said[2]
    assert len(set(said[0])) == 3


@pytest.mark.anywhere
def test_a_judge_that_waits_for_what_it_closes_over_has_no_key_yet():
    def judge(question, said, target):
        return said == wanted

    with pytest.raises(SettingsError, match="or have an attribute key"):
        answers.judge_key(judge)
    wanted = "yes"
    assert answers.judge_key(judge).startswith(f"{__name__}.")


@pytest.mark.anywhere
def test_another_judges_scores_are_not_taken_for_this_ones(model, tmp_path):
    def scored(judge):
        found = evaluate(model, FACTS, tmp_path, EvaluateSettings(health=False, beside=False), None, judge=judge)
        return [row["answer"] for row in found.rows["before"]]

    assert scored(lambda question, said, target: True) == [1.0, 1.0, 1.0]
    with pytest.raises(RunError, match="other settings"):
        scored(lambda question, said, target: False)
