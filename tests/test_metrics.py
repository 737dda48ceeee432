"""Every metric against numbers worked out by hand, or a slow plain version."""

from __future__ import annotations

import json
import math
import unicodedata
from dataclasses import replace
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch

from mechedit import models, prompts, scoring, sources, weights
from mechedit.benchmarks import counterfact, metrics, zsre
from mechedit.benchmarks.metrics import Pair
from mechedit.facts import Fact, FactError
from mechedit.records import RecordWarning
from mechedit.statistics import Mean
from mechedit.weights import Weight
from tests.conftest import FACT

HALF, FIFTH, TENTH = math.log(0.5), math.log(0.2), math.log(0.1)


def test_success_and_magnitude_of_one_fact():
    found = metrics.rewrite_scores(
        Pair(HALF, FIFTH), [Pair(HALF, TENTH), Pair(TENTH, FIFTH)], [Pair(TENTH, HALF), Pair(FIFTH, FIFTH)]
    )
    assert found == {
        "ES": 1.0,
        "EM": pytest.approx(0.3),
        "PS": 0.5,
        "PM": pytest.approx((0.4 - 0.1) / 2),
        "NS": 0.5,  # a tie is no success
        "NM": pytest.approx(0.2),
    }
    assert math.isnan(metrics.rewrite_scores(Pair(HALF, FIFTH), [], [])["PS"])


def test_the_harmonic_mean():
    assert metrics.harmonic(1.0, 0.5, 0.25) == pytest.approx(3 / 7)
    assert metrics.harmonic(0.0, 1.0) == 0.0


def test_entropy_of_a_text():
    assert metrics.entropy(["a", "b", "a", "b"], 2) == pytest.approx(-(2 / 3 * math.log2(2 / 3) + math.log2(1 / 3) / 3))
    assert metrics.entropy(["a", "a", "a"], 1) == 0.0
    assert metrics.entropy(["alone"], 2) == 0.0
    text = ["one", "two", "three", "four", "five"]  # all different: log2 of how many there are
    assert metrics.fluency([text]) == pytest.approx((2 / 3 * 2.0 + 4 / 3 * math.log2(3)) / 2)
    assert metrics.fluency([text, ["alone"]]) == pytest.approx(metrics.fluency([text]) / 2)
    assert math.isnan(metrics.fluency([]))


def test_essence_counts_the_first_token():
    assert metrics.essence([HALF, HALF, HALF]) == pytest.approx(2 ** (3 / 4))


def test_accuracy_is_by_tokens():
    assert metrics.accuracy([[True, True, False, True]]) == 0.75
    assert metrics.accuracy([[True], [False, False, True, False]]) == (1 + 0.25) / 2
    assert math.isnan(metrics.accuracy([]))


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        (" Paris, France", 1),
        ("paris", 1),
        ("\n Paris", 1),
        (" Parish church", 0),
        (" in Paris", 0),
        ("", 0),
        ("Paris是", 1),
        ("Pariſ", 1),
    ],
)
def test_exact_match_is_of_whole_words_at_the_beginning(text, matches):
    assert metrics.exact_match(text, "Paris") == matches


def test_exact_match_minds_how_a_script_is_written():
    assert metrics.exact_match("巴黎是首都", "巴黎") == 1, "no space ends a word there"
    assert metrics.exact_match("파리는", "파리") == 0
    assert metrics.exact_match(unicodedata.normalize("NFD", "São Paulo"), "São") == 1
    assert metrics.exact_match(unicodedata.normalize("NFD", "José"), "Jose") == 0


def test_a_table_has_means_intervals_and_the_harmonic_mean_of_means():
    rows = [{"ES": 1.0, "PS": 1.0, "NS": 0.5, "x": math.nan, "y": 7.0}]
    rows += [{"ES": 1.0, "PS": 0.5, "NS": 0.5, "x": math.nan, "y": math.nan}]
    found = metrics.table(rows)
    assert (found["PS"].mean, found["PS"].n, found["x"].n, found["y"].n, found["y"].mean) == (0.75, 2, 0, 1, 7.0)
    assert found["S"].mean == pytest.approx(3 / (1 + 1 / 0.75 + 2))
    weights = np.random.default_rng(1).dirichlet([1, 1, 1], 40_000)  # the third is that of one more fact
    lower = [3 / sum(1 / (row @ (*column, 0)) for column in ((1, 1), (1, 0.5), (0.5, 0.5))) for row in weights]
    upper = [3 / sum(1 / (row @ (*column, 1)) for column in ((1, 1), (1, 0.5), (0.5, 0.5))) for row in weights]
    assert found["S"].low == pytest.approx(np.quantile(lower, 0.025), abs=0.01)
    assert found["S"].high == pytest.approx(np.quantile(upper, 0.975), abs=0.01)
    assert "S" not in metrics.table([{"ES": 1.0}])
    assert "S" not in metrics.table([{"ES": 1.0, "PS": 1.0, "NS": math.nan}])
    for wrong in ([], [{"ES": 1.0}, {"PS": 1.0}]):
        with pytest.raises(ValueError, match="hold the same numbers"):
            metrics.table(wrong)


def test_scores_of_facts_are_those_of_their_prompts_one_by_one(model):
    fact = replace(FACT, paraphrases=("The city of The Space Needle is",), neighbours=("Rome is", "London is in"))
    other = replace(FACT, subject="The Louvre", target_true="Paris", target_new="New York City", neighbours=())
    found = counterfact.scores(model, [fact, other])
    assert found[0] == pytest.approx(counterfact.scores(model, [fact])[0], abs=1e-5)

    def plain(prompt, target):
        """The mean log-probability a token, and the share of tokens put first, by whole forward passes."""
        ids = model.to_tokens(prompt)[0].tolist()
        wanted = model.to_tokens(" " + target, prepend_bos=False)[0].tolist()
        with torch.no_grad():
            log_p = model(torch.tensor([ids + wanted])).log_softmax(-1)[0]
        own = [log_p[len(ids) - 1 + step] for step in range(len(wanted))]
        mean = sum(float(row[token]) for row, token in zip(own, wanted, strict=True)) / len(wanted)
        return mean, sum(int(row.argmax()) == token for row, token in zip(own, wanted, strict=True)) / len(wanted)

    for each, scores in zip((fact, other), found, strict=True):
        pair = [
            Pair(plain(prompt, each.target_new)[0], plain(prompt, each.target_true)[0])
            for prompt in (each.prompt, *each.paraphrases, *each.neighbours)
        ]
        n = 1 + len(each.paraphrases)
        slow = metrics.rewrite_scores(pair[0], pair[1:n], pair[n:])
        shares = [plain(prompt, each.target_new)[1] for prompt in (each.prompt, *each.paraphrases)]
        slow |= {"rewrite_acc": shares[0], "rephrase_acc": sum(shares[1:]) / (n - 1) if n > 1 else math.nan}
        assert {name: scores[name] for name in scores if name != "p_new"} == pytest.approx(slow, abs=1e-5, nan_ok=True)
    with pytest.raises(FactError, match="lacks one"):
        counterfact.scores(model, [replace(fact, target_new=None)])


def test_a_neighbour_is_scored_by_its_own_answer(model):
    neighbours = ("Rome is in", "London is in")
    own = replace(FACT, neighbours=neighbours, neighbour_answers=("Italy", " England "))
    (found,) = counterfact.scores(model, [own])

    def mean(prompt, target):
        ids = model.to_tokens(prompt)[0].tolist()
        wanted = model.to_tokens(" " + target, prepend_bos=False)[0].tolist()
        with torch.no_grad():
            log_p = model(torch.tensor([ids + wanted])).log_softmax(-1)[0]
        return sum(float(log_p[len(ids) - 1 + step, token]) for step, token in enumerate(wanted)) / len(wanted)

    kept, new = [mean("Rome is in", "Italy"), mean("London is in", "England")], [mean(each, "Paris") for each in neighbours]  # fmt: skip
    assert found["NM"] == pytest.approx(sum(math.exp(a) - math.exp(b) for a, b in zip(kept, new, strict=True)) / 2, abs=1e-6)  # fmt: skip
    assert found["NS"] == sum(a > b for a, b in zip(kept, new, strict=True)) / 2
    (shared,) = counterfact.scores(model, [replace(FACT, neighbours=neighbours)])
    assert shared["NM"] != pytest.approx(found["NM"], abs=1e-6), "the fact's own answer, where they have none"


def test_spaces_at_the_end_of_prompts_change_no_score(model):
    plain = replace(FACT, paraphrases=("The city of The Space Needle is",), neighbours=("Rome is",))
    spaced = replace(plain, template=plain.template + " ", paraphrases=("The city of The Space Needle is  ",), neighbours=("Rome is\t",))  # fmt: skip
    assert counterfact.scores(model, [spaced]) == counterfact.scores(model, [plain])
    once, twice = scoring.score(model, [("Rome is", "in"), ("Rome is ", "in")])
    assert once == twice


def test_answers_of_zsre_are_scored_by_their_most_probable_tokens(model, tmp_path):
    record = {"subject": "Paris", "src": "What is Paris?", "rephrase": "Paris is what?", "alt": "Rome Rome", "answers": ["London"], "loc": "nq question: where is Rome", "loc_ans": "Italy"}  # fmt: skip
    path = tmp_path / "zsre.json"
    path.write_text(
        json.dumps([record, record | {"src": "What?"}, record | {"alt": "London"}, record | {"case_id": 9}])
    )
    with pytest.warns(RecordWarning, match="left out"):
        questions = sources.questions(path)
    assert questions[0].fact == Fact("Paris", "What is {}?", "London", "Rome Rome", ("Paris is what?",), id="0")
    assert [question.fact.id for question in questions] == ["0", "9"], "what cannot be edited is left out"
    assert (questions[0].unrelated, questions[0].answer) == ("nq question: where is Rome?", "Italy")
    found = zsre.scores(model, questions)
    assert found[0] == found[1]

    def plain(prompt, target):
        ids, wanted = (model.to_tokens(text, prepend_bos=bos)[0].tolist() for text, bos in ((prompt, True), (" " + target, False)))  # fmt: skip
        right = []
        for step, token in enumerate(wanted):
            with torch.no_grad():
                right.append(int(model(torch.tensor([ids + wanted[:step]]))[0, -1].argmax()) == token)
        return sum(right) / len(right)

    assert found[0]["efficacy"] == plain("What is Paris?", "Rome Rome")
    assert found[0]["paraphrase"] == plain("Paris is what?", "Rome Rome")
    assert found[0]["specificity"] == plain("nq question: where is Rome?", "Italy")
    path.write_text(json.dumps([{"subject": "Paris", "prompt": "Paris is"}]))
    with pytest.raises(FactError, match="no zsRE file"):
        sources.questions(path)
    with pytest.raises(FactError, match="has no target_new"):
        zsre.scores(model, [replace(questions[0], fact=replace(questions[0].fact, target_new=None))])


def test_a_token_counts_as_first_where_the_model_puts_it_first(model):
    blocks = models.Blocks(model)
    resid = torch.randn(50, int(model.cfg.d_model), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = torch.cat([blocks.logits(row[None]) for row in resid])
    best = logits.topk(2).indices
    log_p, top = blocks.log_p_and_top(resid, best)
    assert torch.equal(top, best[:, 0])
    torch.testing.assert_close(log_p, logits.log_softmax(-1).gather(1, best), atol=1e-5, rtol=1e-5)

    (found,) = scoring.score(model, [("The city of", "Paris Rome")])
    ids = model.to_tokens("The city of")[0].tolist()
    for token, first in zip(model.to_tokens(" Paris Rome", prepend_bos=False)[0].tolist(), found.first, strict=True):
        with torch.no_grad():
            assert first == (int(model(torch.tensor([ids]))[0, -1].argmax()) == token)
        ids.append(token)


@pytest.mark.parametrize("streams", [True, False])
def test_of_equally_probable_tokens_the_one_of_greedy_decoding_counts_as_first(model, monkeypatch, streams):
    monkeypatch.setattr("mechedit.models.blocks.VOCABULARY_PART", 64)
    monkeypatch.setattr(models.Blocks, "_streams", streams)
    blocks = models.Blocks(model)
    resid = torch.randn(6, int(model.cfg.d_model), generator=torch.Generator().manual_seed(0))
    weight = model.unembed.W_U
    before = weight.detach().clone()
    best = blocks.logits(resid).argmax(-1)
    with torch.no_grad():
        for token in best.tolist():  # every one has a twin further on, in another part, and one nearer
            for twin in (token + 1, weight.shape[1] - 1 - token):
                weight[:, twin % weight.shape[1]] = weight[:, token]
        logits = blocks.logits(resid)
        wanted = logits.topk(3).indices
        assert (logits.topk(2).values.diff() == 0).any(), "a tie"
        assert torch.equal(blocks.log_p_and_top(resid, wanted)[1], logits.argmax(-1))
        weight.copy_(before)


def test_a_broken_model_gives_every_target_the_probability_0_and_fails_by_one_rule(model):
    fact = replace(FACT, paraphrases=("The Space Needle is in",), neighbours=("Rome is",))
    W_out = Weight(2, "mlp.W_out")
    models.kept(model).applied.append(
        object()
    )  # an edit stands in the model, so that it is no model that was loaded broken
    try:
        with weights.restored(model, W_out), torch.no_grad():
            models.W_out(model, 2).fill_(math.nan)
            (found,) = counterfact.scores(model, [fact])
    finally:
        models.kept(model).applied.clear()
    assert found == dict.fromkeys(found, 0.0)
    sound = {"ES": 1.0, "EM": 0.8, "PS": 1.0, "PM": 0.5, "NS": 1.0, "NM": 0.1, "rewrite_acc": 1.0, "rephrase_acc": 1.0}
    table = metrics.table([found, sound | {"p_new": 0.5}])
    assert {each.n for each in table.values()} == {2}, "the broken record is in every mean"
    assert (table["ES"].mean, table["EM"].mean) == (0.5, 0.4)
    assert math.isnan(metrics.essence([-math.inf])) and math.isnan(metrics.essence([-5000.0, -1.0]))  # noqa: PT018
    assert metrics.table([{"perplexity": math.inf}, {"perplexity": 2.0}])["perplexity"].n == 1


def test_a_target_may_end_one_token_behind_the_context(model):
    limit = int(model.cfg.n_ctx)
    bos = len(model.to_tokens("")[0])
    word = model.to_tokens(" is", prepend_bos=False)[0].tolist()
    prompt = "A" + " is" * ((limit - bos - len(model.to_tokens("A", prepend_bos=False)[0])) // len(word))
    while len(model.to_tokens(prompt)[0]) > limit:
        prompt = prompt.removesuffix(" is")
    tokens = model.to_tokens(prompt)
    (found,) = scoring.score(model, [(prompt, "is")]) if tokens.shape[1] == limit else (None,)
    assert found is not None, "the prompt fills the context"
    with torch.no_grad():
        theirs = model(tokens)[0, -1].float().log_softmax(-1)
    assert found.log_p == pytest.approx([float(theirs[word[0]])], abs=1e-4)
    with pytest.raises(FactError, match="must fit the context"):
        scoring.score(model, [(prompt, "is is")])
    from mechedit import generation

    assert len(model.to_tokens(generation.complete(model, prompt, 5), prepend_bos=False)[0]) <= 2


def test_differences_are_of_the_same_facts_and_have_s_too():
    before = [{"ES": 0.0, "PS": 0.0, "NS": 1.0, "x": 1.0}] * 5 + [{"ES": 1.0, "PS": 1.0, "NS": 1.0, "x": 1.0}]
    after = [{"ES": 1.0, "PS": 0.5, "NS": 0.8, "y": 1.0}] * 5 + [{"ES": 1.0, "PS": 1.0, "NS": math.nan, "y": 1.0}]
    found = metrics.differences(before, after)
    assert set(found) == {"ES", "PS", "NS", "S"}
    assert found["ES"].difference.mean == pytest.approx(5 / 6)
    assert found["ES"].p == 2 / 2**5, "five of six differ"
    assert (found["NS"].difference.mean, found["NS"].difference.n) == (pytest.approx(-0.2), 5)
    assert found["S"].difference.mean == pytest.approx(3 / (1 + 2 + 1 / 0.8)), "over five, where the unedited S is 0"
    assert found["S"].difference.n == 5
    assert found["S"].p == 2 / 2**5
    assert found["S"].difference.low < found["S"].difference.mean < found["S"].difference.high < 1
    with pytest.raises(ValueError, match="found 6 and 5"):
        metrics.differences(before, after[:5])


def test_the_difference_of_s_is_tested_by_exchanging_conditions_fact_by_fact():
    random = np.random.default_rng(0)
    rows = [[dict(zip(metrics.SUCCESSES, map(float, random.binomial(10, p, 3) / 10), strict=True)) for _ in range(30)] for p in (0.6, 0.7)]  # fmt: skip
    found = metrics.differences(*rows)["S"]
    a, b = (np.array([list(row.values()) for row in each]) for each in rows)
    hits = 0
    for _ in range(2000):
        swap = random.random(30) < 0.5
        one, two = np.where(swap[:, None], b, a).mean(0), np.where(swap[:, None], a, b).mean(0)
        hits += abs(metrics.harmonic(*two) - metrics.harmonic(*one)) >= abs(found.difference.mean) - 1e-12
    assert found.p == pytest.approx(hits / 2000, abs=0.02)
    assert found.difference.mean == pytest.approx(3 / (1 / b.mean(0)).sum() - 3 / (1 / a.mean(0)).sum())


def test_every_number_of_a_table_is_described_and_percent_means_shares(model):
    from mechedit.benchmarks.health import health, unedited
    from mechedit.runs.editing import EDIT_NUMBERS

    fact = replace(FACT, paraphrases=("The Space Needle is in",), neighbours=("Rome is",))
    (scores,) = counterfact.scores(model, [fact])
    generated = ("exact_match", "GE", "RS", "essence", "answer", "N+", "NM+", "SR", "drift", "drift_log_p")
    made = {*scores, *health(model, unedited(model)), *EDIT_NUMBERS, "edited", "S", *generated}
    assert made | {"efficacy", "paraphrase", "specificity"} == metrics.METRICS.keys()
    shares = {name for name, each in metrics.METRICS.items() if each.support in ((0.0, 1.0), (-1.0, 1.0))}
    assert {name for name, each in metrics.METRICS.items() if each.unit == "%"} == shares
    assert {"ES", "EM", "PM", "NM", "rewrite_acc", "rephrase_acc", "exact_match"} <= shares
    assert {each.better for each in metrics.METRICS.values()} == {"higher", "lower", "near 0", "near 1"}
    page = Path(__file__).parents[1] / "docs" / "measuring.md"
    assert metrics.described() in page.read_text(), "the page's table is this one"


@pytest.mark.parametrize(
    ("name", "mean", "shown"),
    [
        ("PM", Mean(0.5, 0.25, 0.75, 9), "50.0 [25.0, 75.0]"),
        ("rewrite_acc", Mean(1.0, 0.9, 1.0, 8), "100.0 [90.0, 100.0], n = 8"),
        ("GE", Mean(6.215, 6.0, 6.5, 9), "621.5 [600.0, 650.0]"),
        ("next_token_kl", Mean(3.3e-5, math.nan, math.nan, 9), "3.3e-05"),
        ("perplexity_ratio", Mean(1.25, 1.0, 1.5, 9), "1.250 [1.000, 1.500]"),
        ("of another benchmark", Mean(0.5, 0.25, 0.75, 9), "0.500 [0.250, 0.750]"),
        ("RS", Mean(math.nan, math.nan, math.nan, 0), ""),
    ],
)
def test_a_mean_is_shown_in_its_unit(name, mean, shown):
    assert metrics.metric(name).shown(mean, 9) == shown


@pytest.mark.filterwarnings("ignore::mechedit.records.RecordWarning")
def test_the_published_zsre_file_is_read(data):
    questions = sources.questions(data / "zsre.json")
    assert len(questions) > 500
    assert questions[0].unrelated == "nq question: john goodman's character in the big lebowski?"


# --- scoring, against whole forward passes ----------------------------------------------------------------------------


def greedy(model, prompt, n, *, bos=True):
    """The ids of a prompt, and those that the model goes on with, by TransformerLens's own forward pass."""
    tokens = model.to_tokens(prompt, prepend_bos=bos)
    ids = tokens[0].tolist()
    for _ in range(n):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    return ids, tokens[0, len(ids) :].tolist()


def own_words(model, n, *, bos=True):
    """Prompts with texts that are read as exactly what the model goes on with, n tokens of it."""
    found = []
    for prompt in ("Megan", "plays", "of", "London", "of Apple. Megan"):
        _, said = greedy(model, prompt, n, bos=bos)
        text = model.tokenizer.decode(said)
        if prompts.continuation(model, prompt, text) == said:
            found.append((prompt, text, said))
    assert found, "of some prompts the continuation is read as it was said"
    return found


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("bos", [True, False])
def test_every_token_of_the_models_own_continuation_is_first_and_has_its_probability(n, bos, model):
    for prompt, text, said in own_words(model, n, bos=bos):
        (found,) = scoring.score(model, [(prompt, text)], prepend_bos=bos)
        assert found.first == (True,) * n
        ids = model.to_tokens(prompt, prepend_bos=bos)[0].tolist()
        with torch.no_grad():
            log_p = model(torch.tensor([ids + said]))[0].log_softmax(-1)
        slow = [float(log_p[len(ids) - 1 + step, token]) for step, token in enumerate(said)]
        assert found.log_p == pytest.approx(slow, abs=1e-4)
        assert found.p == pytest.approx(math.exp(sum(slow)), rel=1e-3)
        assert found.mean_log_p == pytest.approx(sum(slow) / n, abs=1e-4)


def test_what_the_model_would_not_say_is_not_first(model):
    _, (token,) = greedy(model, "The city of", 1)
    other = next(word for word in (" Paris", " Rome") if prompts.continuation(model, "The city of", word)[0] != token)
    assert scoring.score(model, [("The city of", other)])[0].first[0] is False


@pytest.mark.parametrize("row_tokens", [1, 9, 4096])
def test_scores_do_not_depend_on_what_else_is_asked_or_in_which_order(row_tokens, model, monkeypatch):
    pairs = [("The city of", "Paris"), ("The city of Paris", "Rome London"), ("Rome is", "Paris"), ("The city of", "Paris Rome"), ("The city of", "Rome")]  # fmt: skip
    alone = [scoring.score(model, [pair])[0] for pair in pairs]
    monkeypatch.setattr(scoring, "ROW_TOKENS", row_tokens)
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [3, 3, 0]):
        for index, found in zip(order, scoring.score(model, [pairs[index] for index in order]), strict=True):
            assert found.log_p == pytest.approx(alone[index].log_p, abs=1e-4)
            assert found.first == alone[index].first
    assert scoring.score(model, []) == []


@pytest.mark.parametrize(("row_tokens", "most"), [(1, 1), (16, 2), (4096, 6)])
def test_so_many_rows_run_together_as_fit(row_tokens, most, model, monkeypatch):
    sizes, real = [], scoring.pad
    monkeypatch.setattr(scoring, "ROW_TOKENS", row_tokens)
    monkeypatch.setattr(scoring, "pad", lambda model, rows: sizes.append([len(row) for row in rows]) or real(model, rows))  # fmt: skip
    first = ("Rome", "Paris", "London", "Berlin", "piano", "violin")
    scoring.score(model, [(f"{word} is in the", "city") for word in first])
    assert max(map(len, sizes)) == most
    assert sum(map(len, sizes)) == len(first)
    assert all(len(rows) == 1 or len(rows) * max(rows) <= row_tokens for rows in sizes)
    sizes.clear()
    scoring.score(model, [("Rome is", "in the city"), ("Rome is in", "the"), ("Rome", "is")])
    assert len(sizes) == 1 and len(sizes[0]) == 1, "one text begins like the other two"  # noqa: PT018


@pytest.mark.parametrize("bos", [True, False])
def test_a_texts_tokens_are_scored_each_after_those_before(bos, model):
    text = "The Space Needle is located in the city of Seattle."
    ids = model.to_tokens(text, prepend_bos=bos)[0].tolist()
    with torch.no_grad():
        log_p = model(torch.tensor([ids]))[0].log_softmax(-1)
    slow = [float(log_p[at, token]) for at, token in enumerate(ids[1:])]
    assert scoring.log_p(model, text, prepend_bos=bos) == pytest.approx(slow, abs=1e-4)
    assert scoring.log_p(model, text, 4, prepend_bos=bos) == pytest.approx(slow[:3], abs=1e-4)
    assert scoring.mean_log_p(model, text, 4, prepend_bos=bos) == pytest.approx(sum(slow[:3]) / 3, abs=1e-4)
    assert len(scoring.log_p(model, text * 20, prepend_bos=bos)) == int(model.cfg.n_ctx) - 1
    with torch.no_grad():
        last = model(torch.tensor([ids]))[0, -1].softmax(-1)
    found = scoring.top(model, text, 3, prepend_bos=bos)
    assert [token for _, token, _ in found] == last.topk(3).indices.tolist()
    assert [p for _, _, p in found] == pytest.approx(last.topk(3).values.tolist(), rel=1e-3)
    assert len(scoring.top(model, text)) == 5
    assert len(scoring.log_p(model, "is" if bos else "is is", prepend_bos=bos)) == 1
    with pytest.raises(FactError, match="must fit the context"):
        scoring.top(model, text * 20, prepend_bos=bos)


def test_one_text_is_no_list_of_pairs(model, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own checks, which users do not have
    with pytest.raises(TypeError, match="pairs must be a list"):
        scoring.score(model, "Rome is")


def test_what_has_nothing_before_it_has_no_score(model):
    with pytest.raises(FactError, match=r"prompt must have a token for 'city' to follow"):
        scoring.score(model, [("", "city")], prepend_bos=False)
    for text, bos in (("", True), ("", False), ("is", False)):
        with pytest.raises(FactError, match=f"two tokens or more.*found '{text}'"):
            scoring.log_p(model, text, prepend_bos=bos)


# --- metrics at their edges -------------------------------------------------------------------------------------------


def test_magnitude_and_worth_by_hand():
    assert metrics.magnitude([Pair(HALF, FIFTH), Pair(TENTH, FIFTH)]) == pytest.approx((0.3 - 0.1) / 2)
    rows = [{"ES": 1.0, "PS": 0.5, "NS": 0.25}, {"ES": 0.0, "PS": 0.5, "NS": 0.75}]
    assert metrics.worth(rows) == (0.5, 0.5)
    assert metrics.worth([{"ES": 1.0, "PS": 0.0, "NS": 1.0}]) == (0.0, 1.0)
    assert metrics.worth([{"ES": 0.5, "PS": 0.5, "NS": 0.5}, {}]) == (0.5, 0.5), "a fact that could not be scored"
    assert metrics.worth([{}]) == (0.0, 0.0)
    thirds = metrics.worth([{"ES": 1 / 3, "PS": 2 / 3, "NS": 1.0}])
    assert thirds == (0.545455, 0.333333), "6 of 11, of six digits"


def test_the_harmonic_mean_of_arrays_is_one_by_one():
    found = metrics.harmonic(np.array([1.0, 0.0, 0.5]), np.array([0.5, 1.0, 0.5]), 0.25)
    assert found.tolist() == pytest.approx([3 / 7, 0.0, 3 / 8])


@pytest.mark.parametrize(("log_p", "perplexity"), [([-699.9 * 2], math.exp(699.9)), ([-700.1 * 2], math.nan), ([math.nan], math.nan)])  # fmt: skip
def test_a_perplexity_that_is_too_large_is_none(log_p, perplexity):
    assert metrics.essence(log_p) == pytest.approx(perplexity, rel=1e-9, nan_ok=True)


def test_seeds_of_tables_are_the_callers():
    random = np.random.default_rng(0)
    rows, other = ([dict(zip(metrics.SUCCESSES, map(float, random.binomial(10, 0.6, 3) / 10), strict=True)) for _ in range(20)] for _ in range(2))  # fmt: skip
    for of in (lambda seed: metrics.table(rows, seed), lambda seed: metrics.differences(rows, other, seed)):
        first, again, second = of(0), of(0), of(1)
        assert first == again
        for name in ("ES", "S"):
            assert first[name] != second[name]


def test_what_is_infinite_is_left_out_of_a_difference_as_nan_is():
    first = [{"perplexity": 1.0}, {"perplexity": math.inf}, {"perplexity": 2.0}]
    second = [{"perplexity": 2.0}, {"perplexity": 3.0}, {"perplexity": 4.0}]
    for a, b, sign in ((first, second, 1), (second, first, -1)):
        found = metrics.differences(a, b)["perplexity"].difference
        assert (found.mean, found.n) == (sign * 1.5, 2)


@pytest.mark.parametrize(
    ("name", "mean", "shown"),
    [
        ("perplexity_ratio", Mean(0.01, math.nan, math.nan, 9), "0.010"),
        ("perplexity_ratio", Mean(0.0099, math.nan, math.nan, 9), "9.9e-03"),
        ("perplexity_ratio", Mean(0.0, math.nan, math.nan, 9), "0.000"),
        ("perplexity_ratio", Mean(-0.001, -0.5, 0.2, 9), "-0.001 [-0.500, 0.200]"),
        ("ES", Mean(0.00001, math.nan, math.nan, 9), "0.0"),
    ],
)
def test_a_small_mean_is_shown_with_an_exponent(name, mean, shown):
    assert metrics.metric(name).shown(mean) == metrics.metric(name).shown(mean, 9) == shown


def test_a_metrics_name_unit_and_meaning_are_told():
    assert (metrics.metric("ES").label, metrics.metric("perplexity").label) == ("ES, %", "perplexity")
    assert str(metrics.metric("perplexity")).startswith("perplexity (lower is better): of text")
    assert str(metrics.metric("own")) == "own"
    assert metrics.metric("own").support is None
    assert {name: each.scale for name, each in metrics.METRICS.items() if each.scale != 1.0} == {name: 100.0 for name, each in metrics.METRICS.items() if each.unit in ("%", "bits x 100")}  # fmt: skip


@pytest.mark.parametrize("rows", [1, 2, 64])
def test_states_behind_prompts_are_kept_and_their_divergence_is_that_of_whole_passes(rows, model, monkeypatch):
    monkeypatch.setattr(scoring, "KL_ROWS", rows)
    texts = ("Rome is", "The city of", "Steve Jobs was")
    scores, states = scoring.score_and_states(model, [(text, "Paris") for text in texts])
    assert scores == scoring.score(model, [(text, "Paris") for text in texts])
    with torch.no_grad():
        log_p = [model(model.to_tokens(text))[0, -1].double().log_softmax(-1) for text in texts]
    found = scoring.kl(model, states, states[[1, 2, 0]])
    slow = [float((p.exp() * (p - q)).sum()) for p, q in zip(log_p, (log_p[1], log_p[2], log_p[0]), strict=True)]
    assert found.tolist() == pytest.approx(slow, rel=1e-3)
    assert min(slow) > 0.01
    assert scoring.kl(model, states, states).abs().max() < 1e-5
