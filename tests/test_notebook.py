"""What a notebook shows: numbers against plain ones, and the views in a real browser, without a request."""

from __future__ import annotations

import html
import json
import re

import jaxtyping
import pytest
import torch

from mechedit import notebook
from mechedit.editing import EditError, described
from mechedit.edits import Edit
from mechedit.models import ModelError
from tests import hand_made, viewed
from tests.conftest import FACT

PROMPT = FACT.prompt


def props(shown):
    """What each view of it was given."""
    return [json.loads(each) for each in re.findall(r"const props = (\{.*?\}); let left", shown.html)]


def ids(model):
    return torch.tensor([model.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]])


def test_attention_is_the_softmax_of_queries_and_keys_before_and_after_an_edit(model):
    edit = hand_made.edit_of(model, hand_made.rank_one(model, layer=0))
    before, after = props(notebook.attention(model, PROMPT, 1, edit, prepend_bos=False))
    _, cache = model.run_with_cache(ids(model))
    q, k = (cache[f"blocks.1.attn.hook_{each}"][0] for each in "qk")
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~torch.ones(scores.shape[1:], dtype=torch.bool).tril(), -torch.inf)
    torch.testing.assert_close(torch.tensor(before["attention"]), scores.softmax(-1), atol=1e-5, rtol=1e-4)
    assert "".join(before["tokens"]) == PROMPT
    moved = (torch.tensor(after["attention"]) - torch.tensor(before["attention"])).abs().max()
    assert moved > 1e-3, "the edit below changes what is attended to"
    (alone,) = props(notebook.attention(model, PROMPT, 1, prepend_bos=False))
    assert alone == before, "and nothing of it is left"


def test_answers_are_the_most_probable_tokens_before_and_after_an_edit(model):
    edit = hand_made.edit_of(model, hand_made.rank_one(model, layer=2))
    shown = notebook.answers(model, PROMPT, "Paris", edit, k=3, prepend_bos=False)
    before, after = props(shown)
    whole = "".join(before["prompt"])
    assert whole == PROMPT + " Paris"
    log_p = model(torch.tensor([model.tokenizer(whole, add_special_tokens=False)["input_ids"]]))[0].log_softmax(-1)
    at = ids(model).shape[1] - 1
    best = log_p[at].topk(3)
    assert before["topKLogProbs"][at] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert before["topKTokens"][at] == [model.tokenizer.decode([each]) for each in best.indices.tolist()]
    assert after["correctTokenLogProb"] != before["correctTokenLogProb"]
    assert all(rank < 400 for rank in before["correctTokenRank"])
    assert shown.text.splitlines()[1].startswith(f"before\t{model.tokenizer.decode([int(best.indices[0])])}")


def test_neurons_are_what_they_are_at_each_token(model):
    edit = hand_made.edit_of(model, hand_made.rank_one(model, layer=0))
    (found,) = props(notebook.neurons(model, PROMPT, [(1, 5), (3, 7)], edit, prepend_bos=False))
    _, cache = model.run_with_cache(ids(model))
    grid = torch.tensor(found["activations"])  # [token, before and after, neuron]
    for column, (layer, index) in enumerate([(1, 5), (3, 7)]):
        plain = cache[f"blocks.{layer}.mlp.hook_post"][0, :, index]
        torch.testing.assert_close(grid[:, 0, column], plain, atol=1e-5, rtol=1e-4)
    assert (grid[:, 0] - grid[:, 1]).abs().max() > 1e-4
    assert (found["firstDimensionLabels"], found["secondDimensionLabels"]) == (["before", "after"], ["1.5", "3.7"])


def test_an_edit_that_tells_the_model_something_is_shown_on_the_prompts_own_tokens(model):
    told = Edit("told", (), (hand_made.Measured(described(FACT), {"p_new": 0.1, "p_true": 0.2}, {"p_new": 0.3, "p_true": 0.1}),), {"update_norm": 0.0, "relative_norm": 0.0}, hand_made.provenance.origin(model), {}, {}, 0.0, told="Rome is a city. ")  # fmt: skip
    (found,) = props(notebook.neurons(model, PROMPT, [(1, 5)], told, prepend_bos=False))
    assert "".join(found["tokens"]) == PROMPT
    assert len(found["activations"]) == len(found["tokens"])
    assert len(props(notebook.attention(model, PROMPT, 1, told, prepend_bos=False))[1]["tokens"]) > len(found["tokens"])


@pytest.mark.anywhere
def test_tokens_are_coloured_by_what_restoring_them_brings_back():
    trace = viewed.trace()
    (found,) = props(notebook.effects(trace))
    for kind, label in enumerate(("States", "MLP outputs", "Attention outputs")):
        assert found["labels"][kind] == label
        for position in range(6):
            assert found["values"][position][kind] == pytest.approx(viewed.value(5, position, kind) - 0.05, abs=1e-6)
    (one,) = props(notebook.effects(trace, "attn"))
    assert one["values"][3][2] == pytest.approx(viewed.value(2, 3, 2) - 0.05, abs=1e-6)
    assert one["labels"][2] == "layer 2"
    with pytest.raises(notebook.NotebookError, match="resid, mlp, attn; found post"):
        notebook.effects(trace, "post")


def test_what_cannot_be_shown_is_refused_in_a_sentence(model, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users
    for call, said in (
        (lambda: notebook.attention(model, "", 1, prepend_bos=False), "the prompt gives no token; write a word"),
        (lambda: notebook.neurons(model, "", [(1, 5)], prepend_bos=False), "the prompt gives no token; write a word"),
        (lambda: notebook.answers(model, "", "Paris", prepend_bos=False), "the prompt gives no token; write a word"),
        (lambda: notebook.answers(model, PROMPT, "Paris", k=2.0), "k must be a whole number from 1 to the 400 .* found 2.0"),
        (lambda: notebook.answers(model, PROMPT, "Paris", k="3"), "found '3'"),
        (lambda: notebook.neurons(model, PROMPT, [5]), "as .0, 5.; found 5"),
        (lambda: notebook.neurons(model, PROMPT, 5), "at least one; found 5"),
        (lambda: notebook.neurons(model, PROMPT, ["15"]), "found '15'"),
        (lambda: notebook.neurons(model, PROMPT, [(1.0, 5)]), "a layer below 4 and a number below 128, .* found .1.0, 5."),
    ):  # fmt: skip
        with pytest.raises(notebook.NotebookError, match=said):
            call()
    for call, error in (
        (lambda: notebook.attention(model, PROMPT, 9), ModelError),
        (lambda: notebook.neurons(model, PROMPT, []), notebook.NotebookError),
        (lambda: notebook.neurons(model, PROMPT, [(0, 128)]), notebook.NotebookError),
        (lambda: notebook.neurons(model, PROMPT, [(4, 0)]), notebook.NotebookError),
        (lambda: notebook.answers(model, PROMPT, "Paris", k=0), notebook.NotebookError),
        (lambda: notebook.answers(model, PROMPT, "Paris", k=401), notebook.NotebookError),
        (lambda: notebook.attention(model, PROMPT, 1, viewed.edit()), (EditError, ModelError)),
    ):
        with pytest.raises(error, match=r"\w"):
            call()


@pytest.mark.anywhere
def test_views_are_drawn_from_one_bundle_without_a_request_and_hostile_tokens_are_text(opened, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *given: pytest.fail("connected"))
    trace = viewed.trace(tokens=("<bos>", *viewed.HOSTILE), answer=viewed.HOSTILE[0])
    log_p = torch.full((2, 1), -1.0).tolist()
    guesses = {"prompt": notebook._plain(viewed.HOSTILE[:3]), "topKLogProbs": log_p, "topKTokens": [notebook._plain(viewed.HOSTILE[1:2])] * 2, "correctTokenRank": [0, 1], "correctTokenLogProb": [-1.0, -2.0]}  # fmt: skip
    neurons = {"tokens": notebook._plain(viewed.HOSTILE), "activations": torch.rand(8, 1, 1).tolist(), "firstDimensionName": "Model", "secondDimensionName": "Neuron", "firstDimensionLabels": ["before"], "secondDimensionLabels": ["1.5"]}  # fmt: skip
    pattern = torch.rand(2, 8, 8).tril().tolist()
    widgets = [notebook._widget(viewed.HOSTILE[0], name, own) for name, own in (("TokenLogProbs", guesses), ("TextNeuronActivations", neurons), ("AttentionHeads", {"attention": pattern, "tokens": notebook._plain(viewed.HOSTILE), "attentionHeadNames": ["0", "1"]}))]  # fmt: skip
    shown = [notebook.start(), notebook.effects(trace), notebook.effects(trace), notebook._shown(widgets, [viewed.HOSTILE, viewed.HOSTILE]), notebook.view(trace, height=400)]  # fmt: skip
    parts = [each._repr_html_() for each in shown]
    assert [len(each) > 1_000_000 for each in parts] == [True, False, False, False, False], "the bundle is there once"
    (tmp_path / "page.html").write_text("<!doctype html><html lang=en><meta charset=utf-8><title>t</title>" + "".join(parts), encoding="utf-8")  # fmt: skip
    found = opened(tmp_path / "page.html")
    found.until("[...document.querySelectorAll('[data-mechedit]')].every((each) => each.id && each.children.length)")
    found.page.locator("iframe").scroll_into_view_if_needed()
    frame = found.page.frames[1]
    frame.wait_for_selector("html[data-ready]")
    assert (found.errors, found.left, found.page.title()) == ([], [], "t")
    assert found.page.locator("[data-mechedit] img, [data-mechedit] script").count() == 0
    said = found.page.evaluate("document.body.innerText").replace("\u2060", "").replace("\u00a0", " ")
    assert said.count("<bos>") >= 2
    assert said.count("</script><script>document.title='ran'</script>") >= 4
    assert not re.search("[\u202a-\u202e\u2028\u2029\x00\x1b]", said), "marks that move or end text are written out"
    assert all(r"\u202eright to left" in each for each in (said, shown[1].text, shown[3].text)), "and can be read"
    assert "Causal trace" in frame.evaluate("document.body.innerText")
    frame.click("text=Attention outputs")
    assert "attn" not in found.page.url, "the state of a frame stays in it"


@pytest.mark.parametrize("at", [0, 1, 2, 3, 6])
def test_a_hostile_prompt_is_text_in_every_view_of_a_model(model, at):
    text = viewed.HOSTILE[at][:50]  # the tiny model reads no more
    prompt = f"The {text} is"
    for shown in (
        notebook.attention(model, prompt, 1, prepend_bos=False),
        notebook.answers(model, prompt, f"Paris {text[:9]}", k=2, prepend_bos=False),
        notebook.neurons(model, prompt, [(1, 5)], prepend_bos=False),
    ):
        around = re.sub(r"const props = .*?; let left", "", shown.html)
        assert len(re.findall("<script", around)) == len(re.findall("</script", around)) == len(props(shown))
        assert "<img" not in around
        for whole in (shown.html, shown.text):
            assert not re.search("[\u202a-\u202e\u2028\u2029\x00\x1b]", whole)


@pytest.mark.anywhere
def test_a_view_without_the_bundle_says_what_to_run_and_has_its_table(opened, tmp_path):
    shown = notebook.effects(viewed.trace())
    (tmp_path / "page.html").write_text("<!doctype html><title>t</title>" + shown.html, encoding="utf-8")
    found = opened(tmp_path / "page.html")
    assert "Run mechedit.notebook.start() above" in found.page.inner_text("body")
    assert "No scripts run here" not in found.page.inner_text("body")
    still = re.sub("<script.*?</script>", "", shown.html, flags=re.DOTALL)  # as a hosting site shows it
    assert "No scripts run here: open the table below" in still
    assert "Run mechedit" not in still
    found.page.click("summary")
    assert "Needle" in found.page.inner_text("table")
    assert found.errors == []
    assert shown.text == repr(shown)
    assert html.unescape(notebook.view(viewed.trace()).html).count("<!doctype html>") == 1
