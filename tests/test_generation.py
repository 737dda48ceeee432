from __future__ import annotations

import pytest
import torch

from mechedit import generation, scoring
from mechedit.corruption import generator
from mechedit.facts import FactError
from mechedit.models import ModelError, blocks
from mechedit.settings import SettingsError


def test_sampling_is_fixed_by_its_generator(model):
    first = generation.sample(model, 3, 6, generator(0, "a"))
    torch.randn(10)
    assert torch.equal(generation.sample(model, 3, 6, generator(0, "a")), first)
    assert not torch.equal(generation.sample(model, 3, 6, generator(1, "a")), first)
    assert first.shape == (3, 6)


def test_sampling_needs_a_token_to_begin_with(model, monkeypatch):
    for name in ("bos_token_id", "eos_token_id"):
        monkeypatch.setattr(type(model.tokenizer), name, None, raising=False)
    with pytest.raises(ModelError, match="neither a BOS nor an EOS token"):
        generation.sample(model, 1, 2, torch.Generator())


def test_tokens_are_drawn_with_their_probabilities():
    p = torch.tensor([0.5, 0.0, 0.2, 0.05, 0.0, 0.25])
    uniform = torch.linspace(0, 1, 20001)[:-1, None]
    for top_k in (None, 6):
        drawn = generation._draw(p.log().expand(20000, -1), uniform, top_k)
        share = torch.bincount(drawn[:, 0], minlength=6) / 20000
        torch.testing.assert_close(share, p, atol=1e-3, rtol=0)
    only = generation._draw(p.log().expand(20000, -1), uniform, 2)
    assert set(only.flatten().tolist()) == {0, 5}


def test_a_vocabulary_of_prime_size_can_be_drawn_from():
    p = torch.rand(7).softmax(-1)
    uniform = torch.linspace(0, 1, 7001)[:-1, None]
    share = torch.bincount(generation._draw(p.log().expand(7000, -1), uniform, None)[:, 0], minlength=7) / 7000
    torch.testing.assert_close(share, p, atol=1e-3, rtol=0)


def test_completion_is_the_greedy_path(model):
    prompt, said = "The city of", generation.complete(model, "The city of", 4)
    ids = model.tokenizer(prompt, add_special_tokens=False).input_ids
    tokens = torch.tensor([[model.tokenizer.bos_token_id, *ids]])
    for _ in range(4):
        with torch.no_grad():
            token = model(tokens)[:, -1].argmax(-1, keepdim=True)
        if int(token) == model.tokenizer.eos_token_id:
            break
        tokens = torch.cat([tokens, token], 1)
    assert said == model.tokenizer.decode(tokens[0, len(ids) + 1 :])


def test_completion_ends_with_the_text(model):
    kept = model.tokenizer.eos_token
    said = generation.complete(model, "The city of", 1)
    (ids,) = [model.tokenizer(said, add_special_tokens=False).input_ids]
    assert len(ids) >= 1
    try:
        model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(ids[0])
        assert generation.complete(model, "The city of", 5) == ""
    finally:
        model.tokenizer.eos_token = kept


def test_scores_equal_one_forward_pass_a_pair(load):
    pairs = [
        ("The city of", "Paris"),
        ("The Space Needle is located in the city of", "zebra one"),
        ("Paris", "Rome"),
    ] * 3
    for shape in ("gpt2", "gemma3"):
        model = load(shape)
        for (prompt, target), score in zip(pairs, scoring.score(model, pairs), strict=True):
            before = [model.tokenizer.bos_token_id, *model.tokenizer(prompt, add_special_tokens=False).input_ids]
            whole = [
                model.tokenizer.bos_token_id,
                *model.tokenizer(f"{prompt} {target}", add_special_tokens=False).input_ids,
            ]
            with torch.no_grad():
                log_p = model(torch.tensor([whole]))[0].log_softmax(-1)
            expected = [float(log_p[at - 1, whole[at]]) for at in range(len(before), len(whole))]
            assert score.log_p == pytest.approx(expected, abs=1e-4)
            assert score.p == pytest.approx(float(torch.tensor(expected).sum().exp()), rel=1e-3)
            assert score.mean_log_p == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def test_scores_do_not_depend_on_batches(model, monkeypatch):
    pairs = [
        ("The city of", "Paris"),
        ("The Space Needle is located in the city of", "Rome"),
        ("Paris is", "Rome zebra"),
    ]
    whole = scoring.score(model, pairs)
    monkeypatch.setattr(scoring, "ROW_TOKENS", 1)
    monkeypatch.setattr(blocks, "UNEMBED_ROWS", 1)
    monkeypatch.setattr(blocks, "VOCABULARY_PART", 7)
    for one, other in zip(scoring.score(model, pairs), whole, strict=True):
        assert one.log_p == pytest.approx(other.log_p, abs=1e-5)


def test_no_pairs_give_no_scores(model):
    assert scoring.score(model, []) == []


def test_the_top_tokens_are_the_most_probable(model):
    found = scoring.top(model, "The city of", 3)
    ids = [model.tokenizer.bos_token_id, *model.tokenizer("The city of", add_special_tokens=False).input_ids]
    with torch.no_grad():
        p = model(torch.tensor([ids]))[0, -1].softmax(-1).topk(3)
    assert [token for _, token, _ in found] == p.indices.tolist()
    assert [value for _, _, value in found] == pytest.approx(p.values.tolist(), rel=1e-4)


def test_texts_that_do_not_fit_or_say_nothing_are_errors(model):
    with pytest.raises(FactError, match="context of 64"):
        scoring.score(model, [("xq " * 80, "Paris")])
    with pytest.raises(FactError, match="target must be"):
        scoring.score(model, [("Paris", " ")])


@pytest.mark.parametrize("said", [generation.complete, scoring.top, lambda model, prompt, **named: generation.continuations(model, [prompt], 4, **named)])  # fmt: skip
def test_a_prompt_that_cannot_be_read_is_an_error(model, said):
    with pytest.raises(FactError, match="without BOS, '' has none"):
        said(model, "", prepend_bos=False)
    assert said(model, "", prepend_bos=True)
    with pytest.raises(FactError, match="context of 64 .* it has 1"):
        said(model, "Rome " * 100)


@pytest.mark.parametrize("top_k", [0, -1, 10_000])
def test_no_more_tokens_can_be_chosen_among_than_there_are(model, top_k):
    with torch.no_grad():
        there = model(torch.tensor([[0]])).shape[-1]
    with pytest.raises(SettingsError, match=rf"top_k must be from 1 to the {there} tokens .*; found {top_k}\. "):
        generation.continuations(model, ["Paris is"], 9, top_k=top_k)
    with pytest.raises(SettingsError, match="top_k must be from 1"):
        generation.sample(model, 1, 2, generator(0, "a"), top_k=top_k)
    assert generation.sample(model, 1, 2, generator(0, "a"), top_k=there).shape == (1, 2)


PROMPTS = ["The city of", "Paris is", "Rome is", "The Space Needle is located in", "London is"]


def test_a_continuation_depends_on_its_prompt_and_the_seed_alone(model, monkeypatch):
    together = generation.continuations(model, PROMPTS, 9)
    assert together == [generation.continuations(model, [prompt], 9)[0] for prompt in PROMPTS]
    monkeypatch.setattr(generation, "GENERATED_ROWS", 2)
    assert generation.continuations(model, PROMPTS[::-1], 9) == together[::-1]
    assert generation.continuations(model, PROMPTS, 9, seed=1) != together
    assert all(text.startswith(prompt) for text, prompt in zip(together, PROMPTS, strict=True))


def test_the_most_probable_continuation_is_the_greedy_one_and_counts_the_prompts_tokens(model):
    for prompt in PROMPTS:
        n = len(model.tokenizer(prompt, add_special_tokens=False).input_ids)
        (said,) = generation.continuations(model, [prompt], n + 4, top_k=1)
        assert said == prompt + generation.complete(model, prompt, 4)
        assert generation.continuations(model, [prompt], n, top_k=1) == [prompt]


def test_a_continuation_ends_with_the_text_and_must_fit(model):
    first = generation.complete(model, "The city of", 1)
    kept, (ids,) = model.tokenizer.eos_token, [model.tokenizer(first, add_special_tokens=False).input_ids]
    try:
        model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(ids[0])
        assert generation.continuations(model, ["The city of"], 9, top_k=1) == ["The city of"]
    finally:
        model.tokenizer.eos_token = kept
    with pytest.raises(FactError, match="context"):
        generation.continuations(model, ["The city of"], 100_000)


def test_continuations_are_drawn_with_the_models_probabilities(model):
    prompt, n = "The city of", 400
    ids = model.tokenizer(prompt, add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = model(torch.tensor([[model.tokenizer.bos_token_id, *ids]]))[0, -1]
    p, tokens = logits.topk(2)
    texts = [generation.continuations(model, [prompt], len(ids) + 1, top_k=2, seed=seed)[0] for seed in range(n)]
    share = texts.count(prompt + model.tokenizer.decode([int(tokens[0])])) / n
    assert share == pytest.approx(float(p.softmax(-1)[0]), abs=0.08)


def test_prompts_that_share_a_beginning_are_read_once_and_scored_as_if_alone(model, monkeypatch):
    from mechedit.models import Blocks

    prompt = "The Space Needle is located in the city of"
    pairs = [(prompt, "Seattle"), (prompt, "Seattle Paris London"), (prompt, "Seattle Rome"), (prompt, "Paris"), (prompt, "Paris")]  # fmt: skip
    pairs += [("The Space", "Needle"), ("The", "Space Needle is")]
    alone = [scoring.score(model, [pair])[0] for pair in pairs]
    read = []
    real = Blocks.final
    monkeypatch.setattr(Blocks, "final", lambda self, tokens: read.append(tokens.shape[0]) or real(self, tokens))
    together = scoring.score(model, pairs)
    for one, many in zip(alone, together, strict=True):
        assert many.first == one.first
        assert many.log_p == pytest.approx(one.log_p, abs=1e-5)
    assert sum(read) <= 3, "two continuations part; everything else is the beginning of one of them"
