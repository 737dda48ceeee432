"""The new fact told before every prompt: what the model then says is what it says of prompts with that text in front, and no more."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from mechedit import (
    applying,
    editing,
    edits,
    export,
    files,
    generation,
    guards,
    keys,
    models,
    moments,
    prompts,
    provenance,
    scoring,
    tracing,
)
from mechedit.benchmarks import counterfact, health
from mechedit.editors import named
from mechedit.editors.told import sentences
from mechedit.edits import EditError
from mechedit.facts import Fact, FactError
from mechedit.files import FileError
from mechedit.models import kept
from mechedit.runs.evaluating import evaluate
from mechedit.runs.sweeping import sweep
from mechedit.settings import EvaluateSettings, FineTuningSettings, SettingsError, ToldSettings, TraceSettings
from tests.command_line import command_line
from tests.conftest import FACT, assert_same_state, state, widen_bands

TEXT = "Imagine that The Space Needle is located in the city of Paris. "
OTHER = replace(FACT, subject="The Eiffel Tower", target_true="Paris", target_new="London", neighbours=(FACT.prompt,))
SHORT = ToldSettings(sentence="{fact}. ")
TUNED = FineTuningSettings(layer=1, steps=3, learning_rate=5e-3)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    widen_bands(monkeypatch)


@pytest.fixture
def hold_out(model, monkeypatch):
    """Give held-out text of one's own, of which nothing is remembered afterwards."""

    def text(own):
        models.forget(model)
        monkeypatch.setattr(guards, "held_out_text", lambda model: own)

    yield text
    models.forget(model)


def told(model, facts=FACT, settings=None):
    return editing.edit(model, facts, named("told"), settings)


def ids_of(model, text, bos=True):
    """What any program would give the model: BOS, if any, and the tokens of the text."""
    found = model.tokenizer(text, add_special_tokens=False).input_ids
    return [model.tokenizer.bos_token_id, *found] if bos else found


@torch.no_grad()
def plain_log_p(model, before, after, bos=True, *, apart=False):
    """log P of each token of `after` behind `before`, one forward pass, by hand; `apart` where no token may have parts of both."""
    ids, n = ids_of(model, before + after, bos), len(ids_of(model, before, bos))
    ids = [*ids_of(model, before, bos), *ids_of(model, after, bos=False)] if apart else ids
    log_p = model(torch.tensor([ids]))[0].float().log_softmax(-1)
    return [float(log_p[at - 1, ids[at]]) for at in range(n, len(ids))]


@pytest.mark.parametrize("bos", [True, False])
def test_scores_are_those_of_prompts_with_the_text_in_front(model, bos):
    edit = told(model, settings=ToldSettings(prepend_bos=bos))
    assert edit.told == TEXT
    asked = [(FACT.prompt, "Paris"), (FACT.paraphrases[0], "Seattle"), (FACT.neighbours[0], "Paris"), (FACT.prompt, "Steve Jobs")]  # fmt: skip
    unedited = scoring.score(model, asked, prepend_bos=bos)
    with applying.edited(model, edit):
        found = scoring.score(model, asked, prepend_bos=bos)
    for (prompt, target), score, before in zip(asked, found, unedited, strict=True):
        assert score.log_p == pytest.approx(plain_log_p(model, TEXT + prompt, " " + target, bos), abs=1e-4)
        assert before.log_p == pytest.approx(plain_log_p(model, prompt, " " + target, bos), abs=1e-4)
        assert before.log_p != pytest.approx(score.log_p, abs=1e-2)
    assert edit.after["p_new"] == pytest.approx(found[0].p)
    assert edit.report["relative_norm"] == edit.report["update_norm"] == 0.0


def test_paraphrases_and_neighbours_are_asked_behind_the_text_too(model):
    asked = replace(FACT, template=TEXT + FACT.template, paraphrases=(TEXT + FACT.paraphrases[0],), neighbours=(TEXT + FACT.neighbours[0],))  # fmt: skip
    (expected,), (before,) = counterfact.measured(model, [asked]), counterfact.measured(model, [FACT])
    with applying.edited(model, told(model)):
        (found,) = counterfact.measured(model, [FACT])
    assert found.scores == pytest.approx(expected.scores)
    assert all(found.scores[name] != pytest.approx(before.scores[name], abs=1e-4) for name in ("EM", "PM", "NM"))
    assert [each.prompt for each in found.said] == [each.prompt for each in before.said]


def test_bos_is_first_and_once_whoever_writes_it(model):
    with applying.edited(model, told(model)):
        for prompt in (FACT.prompt, "<s>" + FACT.prompt):
            ids, offsets = prompts.encode(model, prompt, prepend_bos=True)
            assert ids == ids_of(model, TEXT + FACT.prompt)
            shift = len(prompt) - len(FACT.prompt)
            begin, end = prompts.subject_span(offsets, shift, shift + len(FACT.subject))
            assert model.tokenizer.decode(ids[begin:end]).strip() == FACT.subject
            assert prompts.told_tokens(offsets) == len(ids_of(model, TEXT.rstrip(), bos=False))


def test_keys_and_traces_are_those_of_the_longer_prompt(model):
    longer = Fact(FACT.subject, TEXT + FACT.template, "Seattle", "Paris")
    longer_prompt = prompts.prepare(model, longer, prepend_bos=True)
    expected = keys.subject_keys(model, 1, keys.contexts(model, longer, ("",)))
    with applying.edited(model, told(model)):
        prompt = prompts.prepare(model, FACT, prepend_bos=True)
        found = keys.subject_keys(model, 1, keys.contexts(model, FACT, ("",)))
        trace = tracing.trace(model, FACT, TraceSettings(draws=1, kinds=("mlp",)))
    assert (prompt.ids, prompt.subject, prompt.text) == (longer_prompt.ids, longer_prompt.subject, FACT.prompt)
    torch.testing.assert_close(found, expected)
    assert tuple(trace.tokens) == longer_prompt.tokens
    assert trace.subject_range == longer_prompt.subject
    assert trace.p_clean == pytest.approx(plain_p(model, TEXT + FACT.prompt, " Seattle"), rel=1e-4)


def plain_p(model, before, after):
    return torch.tensor(plain_log_p(model, before, after)[0]).exp().item()


def test_text_goes_on_behind_the_text_and_is_no_longer_for_it(model):
    edit, asked = told(model), [FACT.prompt, "Steve Jobs was"]
    n = len(ids_of(model, TEXT.rstrip(), bos=False))
    expected = [generation.complete(model, TEXT + prompt, 6) for prompt in asked]
    greedy = generation.continuations(model, [TEXT + prompt for prompt in asked], n + 16, top_k=1)
    with applying.edited(model, edit):
        assert [generation.complete(model, prompt, 6) for prompt in asked] == expected
        found = generation.continuations(model, asked, 16, top_k=1)
        assert [TEXT + text for text in found] == greedy
        with pytest.raises(FactError, match="must fit the context of 64 tokens"):
            generation.continuations(model, asked, 60)


def test_harm_is_measured_with_the_text_in_front(model, hold_out):
    text = "Steve Jobs was the founder of Apple. The Eiffel Tower is located in the city of Paris."
    hold_out(text)
    before = health.unedited(model)
    edit = told(model)
    with applying.edited(model, edit):
        found = health.health(model, before)
        assert scoring.log_p(model, text) == pytest.approx(plain_log_p(model, TEXT, text, apart=True), abs=1e-4)
        further = "The Eiffel Tower plays the piano in " + text
        assert scoring.log_p(model, further, 4) == pytest.approx(
            plain_log_p(model, TEXT, further, apart=True)[:3], abs=1e-4
        )
    now, was = (torch.tensor(plain_log_p(model, each, text, apart=True), dtype=torch.float64) for each in (TEXT, ""))
    assert found["perplexity"] == pytest.approx(float((-now.mean()).exp()), rel=1e-4)
    ratio = float((was.mean() - now.mean()).exp())
    assert found["perplexity_ratio"] == pytest.approx(ratio, rel=1e-4)
    assert edit.report["perplexity_ratio"] == pytest.approx(ratio, rel=1e-4)
    assert found["weight_norm_ratio"] == 1.0
    assert found["next_token_kl"] > 0.01
    with torch.no_grad():
        log_p, log_q = (model(torch.tensor([ids_of(model, each + f"{FACT.subject} is a")]))[0, -1].log_softmax(-1) for each in (TEXT, ""))  # fmt: skip
    assert edit.report["essence_kl"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-3)


def test_where_the_context_ends_both_models_are_compared_on_what_fits(model, hold_out):
    text = "Steve Jobs was the founder of Apple. " * 20
    hold_out(text)
    before = health.unedited(model)
    fits = 64 - len(ids_of(model, TEXT))
    piece = model.tokenizer.decode(ids_of(model, text, bos=False)[:fits])
    now, was = (torch.tensor(plain_log_p(model, each, piece, apart=True)).mean() for each in (TEXT, ""))
    edit = told(model)
    with applying.edited(model, edit):
        found = health.health(model, before)
    expected = float((was - now).exp())
    assert found["perplexity_ratio"] == pytest.approx(expected, rel=1e-4)
    assert edit.report["perplexity_ratio"] == pytest.approx(expected, rel=1e-4)


def test_it_comes_and_goes_with_the_edit_whatever_happens(model):
    edit, before, now = told(model), state(model), models.identity(model)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), applying.edited(model, edit):
            assert models.told(model) == TEXT
            assert models.identity(model).whole != now.whole
            assert models.identity(model).keys(1) == now.keys(1), "C is of texts that stand alone"
            raise error
        assert (models.told(model), models.identity(model)) == ("", now)
    applied = applying.apply(model, edit)
    with pytest.raises(EditError, match="written once"):
        applying.apply(model, replace(edit, origin=edit.origin | {"weights": "0" * 32}))
    assert models.told(model) == TEXT
    applied.undo()
    assert (models.told(model), models.identity(model)) == ("", now)
    assert (kept(model).applied, kept(model).told) == ([], [])
    assert_same_state(model, before)


def test_it_stands_until_it_is_undone_whatever_becomes_of_the_weights(model):
    weight = models.W_out(model, 0)
    original = weight.detach().clone()
    applied = applying.apply(model, told(model))
    with torch.no_grad():
        weight.add_(1e-3)
    try:
        with applying.edited(model, told(model, OTHER)):
            assert models.told(model).startswith(TEXT + "Imagine that The Eiffel")
        assert models.told(model) == TEXT
        assert provenance.lineage(model) == provenance.Lineage(models.identity(model).weights, ())
    finally:
        applied.undo()
        with torch.no_grad():
            weight.copy_(original)
    assert models.told(model) == ""


def test_what_is_estimated_for_all_facts_never_sees_it(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Steve Jobs was the founder of Apple. " * 40)
    now, sampled = models.identity(model).whole, generation.sample(model, 2, 5, torch.Generator().manual_seed(0))
    C = moments.estimate(model, 1, [text])
    with applying.edited(model, told(model)):
        assert torch.equal(moments.estimate(model, 1, [text]).C, C.C)
        assert torch.equal(generation.sample(model, 2, 5, torch.Generator().manual_seed(0)), sampled)
        with applying.underneath(model):
            assert (models.told(model), models.identity(model).whole) == ("", now)
            with applying.edited(model, told(model, OTHER)):
                assert "Space Needle" not in models.told(model)
        assert models.told(model) == TEXT


def test_edits_on_top_of_it_know_so_and_become_one_with_it(model, tmp_path):
    first, before = told(model), state(model)
    with applying.edited(model, first):
        second = editing.edit(model, OTHER, named("ft"), TUNED)
        third = told(model, OTHER, SHORT)
        expected = scoring.score(model, [(OTHER.prompt, "London")])[0].p
    assert second.parents == third.parents == (first.digest,)
    assert second.base == first.base == models.identity(model).weights
    assert second.before["p_new"] == pytest.approx(expected)
    with pytest.raises(EditError, match="1 edit in it"):
        applying.apply(model, second)
    whole = edits.load(edits.save(applying.compose(first, second), tmp_path / "whole.safetensors"))
    assert (whole.told, len(whole.changes)) == (TEXT, 1)
    for each in ([whole], [first, second]):
        with applying.edited(model, *each):
            assert scoring.score(model, [(OTHER.prompt, "London")])[0].p == pytest.approx(second.after["p_new"], rel=1e-5)  # fmt: skip
    assert applying.compose(first, third).told == TEXT + "The Eiffel Tower is located in the city of London. "
    assert applying.diff(first, third) == []
    standing = applying.apply(model, first)
    standing.add(third)
    assert models.told(model) == first.told + third.told
    standing.undo()
    assert models.told(model) == ""
    assert_same_state(model, before)


def test_it_survives_its_file_and_says_who_does_not_see_it(model, tmp_path):
    edit = told(model)
    loaded = edits.load(edits.save(edit, tmp_path / "edit.safetensors"))
    assert (loaded.told, loaded.digest, loaded.to_json()) == (TEXT, edit.digest, edit.to_json())
    assert not loaded.is_empty
    assert edit.parts == (edit.digest,)
    assert replace(edit, told="Something else. ").digest != edit.digest
    assert edit.to_json()["told"] == TEXT
    assert "model.generate and other programs do not: give them edit.told + prompt" in edit.notes[0]
    tensors, record = files.read(tmp_path / "edit.safetensors", "edit", edits.TELLING)
    with pytest.raises(FileError, match="knows up to 2"):
        files.read(
            tmp_path / "edit.safetensors", "edit", edits.FORMAT
        )  # as a version that would leave the text out does
    files.write(tmp_path / "forged.safetensors", "edit", tensors, record | {"told": 3}, edits.TELLING)
    with pytest.raises(FileError, match="told"):
        edits.load(tmp_path / "forged.safetensors")


def test_an_edit_that_is_taken_back_tells_nothing(model, monkeypatch):
    monkeypatch.setitem(guards.BANDS, "perplexity_ratio", (0.0, 1e-6, "nothing"))
    edit = told(model, settings=ToldSettings(guard="rollback"))
    assert (edit.told, edit.is_empty, edit.parts) == ("", True, ())
    assert edit.reasons


def test_revert_takes_the_text_back_and_says_where_there_is_none(model):
    edit = told(model)
    with pytest.raises(EditError, match="found no 'Imagine"):
        applying.revert(model, edit)
    with applying.edited(model, edit):
        applying.revert(model, edit)
        assert models.told(model) == ""
    assert (kept(model).applied, kept(model).told) == ([], [])


def test_what_has_no_weights_is_not_exported(model, folder, tmp_path):
    edit = told(model)
    for write in (export.checkpoint, export.adapter):
        with pytest.raises(EditError, match="an export has weights alone, and these edits put 'Imagine that"):
            write(model, str(folder("gpt2")), [edit], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_meant_is_said_first(model, tmp_path):
    with pytest.raises(SettingsError, match=r"sentence must have \{fact\} in it once; found 'Imagine'"):
        ToldSettings(sentence="Imagine")
    with pytest.raises(FactError, match="must fit the context of 64 tokens"):
        told(model, settings=ToldSettings(sentence="Imagine " * 12 + "{fact}."))
    with pytest.raises(SettingsError, match="the editor told has no layer to choose"):
        sweep(model, [FACT], tmp_path, editor="told")


@pytest.mark.parametrize(
    ("fact", "words", "expected"),
    [
        (replace(FACT, target_new="Washington, D.C."), "{fact}. ", "The Space Needle is located in the city of Washington, D.C. "),
        (replace(FACT, target_new="Paris"), "So, {fact}!", "So, The Space Needle is located in the city of Paris! "),
        (replace(FACT, template="<s>{} is in "), "{fact}.\n", "The Space Needle is in Paris.\n"),
        (Fact("東京", "{}は", "日本", "中国"), "{fact}. ", "東京は中国. "),
        (replace(FACT, target_new="Yahoo!"), "{fact}. ", "The Space Needle is located in the city of Yahoo! "),
        (Fact("UniFirst", "<s>What does {} make?", "uniforms", "aircraft"), "Imagine that {fact}. ", "What does UniFirst make? aircraft. "),
    ],
)  # fmt: skip
def test_a_fact_is_written_as_a_sentence(model, fact, words, expected):
    assert sentences(model, [fact], ToldSettings(sentence=words)) == expected


def test_a_question_has_words_of_its_own(model):
    asked = Fact("UniFirst", "What does {} make?", "uniforms", "aircraft")
    settings = ToldSettings(sentence="So, {fact}!", question="We were asked: {fact}.")
    assert sentences(model, [asked, replace(FACT, target_new="Paris")], settings) == (
        "We were asked: What does UniFirst make? aircraft. So, The Space Needle is located in the city of Paris! "
    )
    with pytest.raises(SettingsError, match=r"question must have \{fact\} in it once; found 'What'"):
        ToldSettings(question="What")


def test_a_batch_is_told_together_and_a_sequence_one_after_the_other(model, tmp_path):
    facts = [FACT, OTHER]
    both = "The Space Needle is located in the city of Paris. The Eiffel Tower is located in the city of London. "
    texts = {"independent": "The Eiffel Tower is located in the city of London. ", "batch": both, "sequential": both}
    before = state(model)
    assert told(model, facts, SHORT).told == both
    for mode, text in texts.items():
        wanted = EvaluateSettings(mode=mode)
        found = evaluate(model, facts, tmp_path / mode, wanted, "told", SHORT)
        last = list(found.rows.values())[-1][1]
        expected = torch.tensor(plain_log_p(model, text + OTHER.prompt, " London")).sum().exp().item()
        assert last["p_new"] == pytest.approx(expected, rel=1e-4), mode
        assert [row["edited"] for row in found.rows["after"]] == [1.0, 1.0]
        assert_same_state(model, before)
        assert models.told(model) == ""


def test_commands_show_what_the_model_is_told(folder, capsys, monkeypatch, tmp_path):
    call, path = command_line(folder, capsys, monkeypatch), str(tmp_path / "edit.safetensors")
    asked = [
        "edit",
        FACT.prompt,
        "--subject",
        FACT.subject,
        "--target",
        "Paris",
        "--true",
        "Seattle",
        "--editor",
        "told",
    ]
    status, out, err = call(*asked, "--out", path, "--json", str(tmp_path / "edit.json"))
    assert (status, json.loads((tmp_path / "edit.json").read_text())["told"]) == (0, TEXT), err
    assert "no weight, update norm 0" in out
    for command in ("show", "apply"):
        status, out, err = call(command, path, model=command == "apply")
        assert (status, "mechedit reads every prompt behind 'Imagine that" in " ".join(out.split())) == (0, True), (
            out + err
        )
    status, _, err = call("export", path, "--out", str(tmp_path / "folder"))
    assert (status, "an export has weights alone" in " ".join(err.split())) == (2, True)
