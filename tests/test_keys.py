from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mechedit import cache, keys, models, prompts
from mechedit.facts import Fact, FactError
from mechedit.settings import RomeSettings, SettingsError
from tests.conftest import FACT, SHAPES

QUICK = RomeSettings(layer=1, steps=8, prefixes=((3, 2), (5, 1)))


def test_prefixes_are_the_bare_prompt_and_seeded_samples(model):
    found = keys.prefixes(model, QUICK)
    assert found == keys.prefixes(model, QUICK)
    assert found[0] == ""
    assert len(found) == 4
    assert all(prefix.endswith(". ") for prefix in found[1:])
    assert keys.prefixes(model, replace(QUICK, seed=1)) != found
    assert keys.prefixes(model, replace(QUICK, prefixes=())) == ("",)


def test_prefixes_are_sampled_once_for_a_model_and_again_where_the_file_is_damaged(model, monkeypatch):
    found = keys.prefixes(model, QUICK)
    real, sampled = keys.sample, []
    monkeypatch.setattr(keys, "sample", lambda *args, **kwargs: sampled.append(1) or real(*args, **kwargs))
    assert keys.prefixes(model, QUICK) == found
    assert sampled == []
    (entry,) = (cache.root() / "prefixes").iterdir()
    entry.write_text(entry.read_text()[:5])
    assert keys.prefixes(model, QUICK) == found
    assert len(sampled) == 2


@pytest.mark.parametrize("prefix", ["", "{} and {0}. ", "日本 é. ", "The Space Needle. "])
def test_the_subject_is_found_behind_any_prefix(prefix, model, fact):
    (row,) = keys.contexts(model, fact, (prefix,), prepend_bos=True)
    _, offsets = prompts.encode(model, prefix + fact.prompt, prepend_bos=True)
    assert offsets[row.lookup][1] == len(prefix) + len("The Space Needle")
    assert row.last == len(offsets) - 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_key_is_the_input_of_W_out_at_the_subject_of_each_context(shape, load):
    model = load(shape)
    rows = keys.contexts(model, FACT, ("", "Rome. ", "London Berlin. "), prepend_bos=True)
    together = keys.subject_keys(model, 1, rows)
    for index, row in enumerate(rows):
        kept = []
        with (
            torch.no_grad(),
            model.hooks(
                fwd_hooks=[("blocks.1.mlp.hook_post", lambda activation, hook, kept=kept: kept.append(activation))]
            ),
        ):
            model(torch.tensor([list(row.ids)]))
        torch.testing.assert_close(together[index], kept[0][0, row.lookup], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prefix", ["", "{} and {0}. ", "Rome. "])
def test_the_token_of_the_fact_is_found_by_its_place_in_the_whole_text(prefix, model, fact):
    _, offsets = prompts.encode(model, prefix + fact.prompt, prepend_bos=True)
    text = prefix + fact.prompt
    at = {}
    for token in ("subject_first", "subject_last", "after_first", "last"):
        (row,) = keys.contexts(model, fact, (prefix,), token, prepend_bos=True)
        at[token] = text[slice(*offsets[row.lookup])]
    assert text[len(prefix) :].startswith(at["subject_first"].strip())
    assert fact.subject.endswith(at["subject_last"].strip())
    assert at["after_first"].strip() == "is"
    assert text.endswith(at["last"].strip())


def test_a_prompt_that_ends_with_its_subject_has_no_token_after_it(model):
    with pytest.raises(FactError, match="no token comes after it"):
        keys.contexts(model, Fact("Rome", "The city of {}"), ("",), "after_first")


def test_with_a_hook_on_the_model_prefixes_are_sampled_and_not_kept(model):
    found = keys.prefixes(model, QUICK)
    (entry,) = (cache.root() / "prefixes").iterdir()
    entry.unlink()
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda resid, hook: resid * 0)]):
        assert keys.prefixes(model, QUICK) != found
    assert not list((cache.root() / "prefixes").iterdir())
    assert keys.prefixes(model, QUICK) == found


def test_autocast_around_them_does_not_bear_on_prefixes(model, monkeypatch, tmp_path):
    settings = replace(QUICK, prefixes=((10, 5),))
    found = keys.prefixes(model, settings)
    monkeypatch.setenv("MECHEDIT_CACHE", str(tmp_path))
    with torch.autocast("cpu", torch.bfloat16):
        assert keys.prefixes(model, settings) == found


@pytest.mark.parametrize("order", [1, -1])
def test_a_prefix_that_is_longer_than_the_context_is_refused_wherever_it_stands(order, model):
    context = int(model.cfg.n_ctx)
    with pytest.raises(SettingsError, match=f"fit the context of {context} tokens .* one has {context + 1}"):
        keys.prefixes(model, replace(QUICK, prefixes=((3, 1), (context + 1, 1))[::order]))


def test_prefixes_are_of_the_five_most_probable_tokens(model, monkeypatch):
    """By whole forward passes; five, and not fewer."""
    drawn, real = [], keys.sample
    monkeypatch.setattr(keys, "sample", lambda *args, **named: drawn.append(real(*args, **named)) or drawn[-1])
    found = keys.prefixes(model, replace(QUICK, prefixes=((6, 40),)))
    (rows,) = drawn
    assert rows.shape == (40, 6)
    with torch.no_grad():
        bos = torch.full((40, 1), model.tokenizer.bos_token_id)
        logits = model(torch.cat([bos, rows], 1))[:, :-1]
    ranks = (logits > logits.gather(-1, rows[..., None])).sum(-1)
    assert int(ranks.max()) == 4
    assert found[1:] == tuple(model.tokenizer.decode(row, skip_special_tokens=True) + ". " for row in rows)


def test_each_length_has_a_stream_of_its_own(model):
    alone = keys.prefixes(model, replace(QUICK, prefixes=((5, 1),)))
    after = keys.prefixes(model, replace(QUICK, prefixes=((3, 2), (5, 1))))
    assert after[3:] == alone[1:]


@pytest.mark.parametrize("bos", [True, False])
def test_contexts_have_bos_as_the_settings_say_and_must_fit(bos, model, fact):
    for place in ("subject_first", "subject_last", "after_first", "last"):
        (row,) = keys.contexts(model, fact, ("Rome. ",), place, prepend_bos=bos)
        assert list(row.ids) == model.to_tokens("Rome. " + fact.prompt, prepend_bos=bos)[0].tolist()
        assert 0 <= row.lookup <= row.last
    long = "Rome is. " * 40
    with pytest.raises(FactError, match="must fit the context"):
        keys.contexts(model, fact, ("", long), prepend_bos=bos)


def test_keys_of_a_block_need_none_of_the_blocks_above_and_are_in_float32(model, fact, folder):
    rows = keys.contexts(model, fact, ("", "Rome. "), prepend_bos=True)
    handle = model.blocks[2].mlp.register_forward_pre_hook(lambda *args: pytest.fail("a block above was run"))
    try:
        found = keys.subject_keys(model, 1, rows)
    finally:
        handle.remove()
    assert found.dtype == torch.float32
    half = models.load(str(folder("gpt2")), device="cpu", dtype=torch.bfloat16)
    assert keys.subject_keys(half, 1, rows).dtype == torch.float32


def test_a_prefix_has_words_and_no_marks_of_the_tokenizer(model, monkeypatch):
    """A model may say the token that ends a text anywhere."""
    words, end = model.tokenizer.encode(" Rome London"), model.tokenizer.eos_token_id
    monkeypatch.setattr(keys, "sample", lambda *args, **kwargs: torch.tensor([[words[-2], end, words[-1]]]))
    monkeypatch.setattr(keys, "hooked", lambda model: True)  # so that nothing is kept
    assert keys.prefixes(model, replace(QUICK, prefixes=((3, 1),))) == ("", " Rome London. ")
