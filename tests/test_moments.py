from __future__ import annotations

import io
import itertools
import json
import os
import random
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial

import jaxtyping
import numpy as np
import pytest
import torch

from mechedit import applying, cache, files, generation, models, moments
from mechedit.corruption import generator
from mechedit.files import FileError
from mechedit.interventions import intervened, read
from mechedit.models import ModelError
from mechedit.moments import Moment, MomentError, corpus
from mechedit.moments import estimation as estimating
from mechedit.progress import silent
from mechedit.rank_one import RankOneError
from mechedit.settings import MomentSettings, SettingsError
from mechedit.weights import Weight, restored, there, value
from tests import hand_made
from tests.conftest import SHAPES, WORDS, assert_same_state, state


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"{number} {WORDS}" for number in range(60)))
    return path


def slow_moment(model, layer, ids, keys):
    """C by running one window at a time and adding outer products."""
    total, n = 0, 0
    for window in ids:
        kept = []
        with (
            torch.no_grad(),
            model.hooks(
                fwd_hooks=[
                    (f"blocks.{layer}.mlp.hook_post", lambda activation, hook, kept=kept: kept.append(activation))
                ]
            ),
        ):
            model(torch.cat([torch.tensor([[model.tokenizer.bos_token_id]]), window[None]], 1))
        for key in kept[0][0, 1:].double():
            if n < keys:
                total, n = total + torch.outer(key, key), n + 1
    return total / n


@pytest.mark.parametrize("shape", SHAPES)
def test_C_is_the_mean_of_outer_products_of_keys(shape, load, text):
    model = load(shape)
    before = state(model)
    settings = MomentSettings(tokens=700, context=16, prepend_bos=True)
    moment = moments.estimate(model, 1, [text], settings)
    ids = torch.tensor(model.tokenizer(text.read_text(), add_special_tokens=False).input_ids[: 47 * 15]).view(-1, 15)
    torch.testing.assert_close(moment.C, slow_moment(model, 1, ids, 700), atol=1e-5, rtol=1e-4)
    assert moment.keys == 700
    assert moment.cond == pytest.approx(float(torch.linalg.cond(moment.C)), rel=1e-3)
    assert_same_state(model, before)


def test_C_of_sampled_text_is_that_of_the_text(model):
    settings = MomentSettings(tokens=300, context=16, seed=3, prepend_bos=True)
    moment = moments.estimate(model, 1, settings=settings)
    ids = generation.sample(model, 20, 15, generator(3, "moment text", "0"))
    torch.testing.assert_close(moment.C, slow_moment(model, 1, ids, 300), atol=1e-5, rtol=1e-4)
    assert moment.source == "sampled from the model"


def test_another_layer_reads_the_text_that_was_sampled(model, small_batches, monkeypatch):
    both = moments.estimate_layers(model, [0, 1], settings=SMALL)
    monkeypatch.setattr(corpus, "sample", lambda *args, **kwargs: pytest.fail("sampled again"))
    for path in (cache.root() / "moments").glob("*.safetensors"):
        if ".text." not in path.name:
            path.unlink()
    alone = moments.estimate(model, 1, settings=SMALL)
    assert torch.equal(alone.C, both[1].C)


def test_a_damaged_text_is_sampled_again(model, small_batches):
    whole = moments.estimate(model, 1, settings=SMALL)
    for path in (cache.root() / "moments").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    again = moments.estimate(model, 1, settings=SMALL)
    assert torch.equal(again.C, whole.C)


def test_batches_and_pieces_of_a_file_do_not_matter(model, text, monkeypatch):
    settings = MomentSettings(tokens=900, context=16)
    whole = moments.estimate(model, 1, [text], settings)
    monkeypatch.setenv("MECHEDIT_CACHE", str(text.parent / "other"))
    monkeypatch.setattr(corpus, "BATCH_TOKENS", 40)
    torch.testing.assert_close(moments.estimate(model, 1, [text], settings).C, whole.C, atol=1e-7, rtol=1e-5)


def test_a_moment_is_made_once_and_again_when_anything_it_depends_on_changes(model, text, monkeypatch):
    runs = []
    real = estimating.accumulate
    monkeypatch.setattr(estimating, "accumulate", lambda *args: runs.append(1) or real(*args))
    settings = MomentSettings(tokens=300, context=16)
    first = moments.estimate(model, 1, [text], settings)
    assert torch.equal(moments.estimate(model, 1, [text], settings).C, first.C)
    assert len(runs) == 1
    for change in ({"tokens": 310}, {"context": 17}, {"prepend_bos": False}):
        moments.estimate(model, 1, [text], replace(settings, **change))
    moments.estimate(model, 2, [text], settings)
    moments.estimate(model, 1, settings=settings)
    moments.estimate(model, 1, settings=replace(settings, seed=1))
    text.write_text(text.read_text() + "more")
    moments.estimate(model, 1, [text], settings)
    assert len(runs) == 8
    weight = models.W_out(model, 0)
    original = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
        moments.estimate(model, 1, [text], settings)
        weight.copy_(original)
    assert len(runs) == 9


def test_a_damaged_cache_entry_is_made_again(model, text):
    settings = MomentSettings(tokens=300, context=16)
    first = moments.estimate(model, 1, [text], settings)
    (entry,) = (cache.root() / "moments").glob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:500])
    assert torch.equal(moments.estimate(model, 1, [text], settings).C, first.C)
    assert torch.equal(Moment.load(entry).C, first.C)


def test_the_default_is_ten_keys_for_each_dimension(load):
    model = load("llama")
    assert moments.estimate(model, 0, settings=MomentSettings(context=60)).keys == 480


def test_a_moment_survives_its_file(model, text, tmp_path):
    moment = moments.estimate(model, 1, [text], MomentSettings(tokens=300, context=16))
    loaded = Moment.load(moment.save(tmp_path / "C.safetensors"))
    assert torch.equal(loaded.C, moment.C)
    assert loaded.to_json() == moment.to_json()
    with pytest.raises(FileError, match="does not exist"):
        Moment.load(tmp_path / "none")


def with_tensors(path, moment, **tensors):
    """A moment's file with these tensors."""
    return files.write(path, "moment", tensors, moment.to_json())


def test_a_loaded_C_with_its_factor_needs_no_cholesky(model, text, tmp_path, monkeypatch):
    first = moments.estimate(model, 1, [text], MomentSettings(tokens=900, context=16))
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *args: pytest.fail("factorised again"))
    for loaded in (
        moments.estimate(model, 1, [text], MomentSettings(tokens=900, context=16)),
        Moment.load(first.save(tmp_path / "C.safetensors")),
    ):
        key = torch.randn(3, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        torch.testing.assert_close(loaded.factor @ loaded.factor.T, loaded.C, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(loaded.solve(key) @ loaded.C, key, atol=1e-6, rtol=1e-6)


def test_a_C_that_was_never_factorised_is_saved_without_a_factor(model, text, tmp_path):
    plain = replace(moments.estimate(model, 1, [text], MomentSettings(tokens=900, context=16)))
    assert files.read(plain.save(tmp_path / "C.safetensors"), "moment")[0].keys() == {"C"}
    factor = Moment.load(tmp_path / "C.safetensors").factor
    torch.testing.assert_close(factor @ factor.T, plain.C, atol=1e-12, rtol=1e-10)


def test_a_factor_that_does_not_belong_is_computed_again(model, text, tmp_path):
    moment = moments.estimate(model, 1, [text], MomentSettings(tokens=900, context=16))
    own = torch.linalg.cholesky(moment.C)
    root = torch.linalg.eigh(moment.C)
    for wrong in (
        own * 1.001,
        own.float(),
        own[:-1, :-1].contiguous(),
        torch.full_like(own, torch.nan),
        (root.eigenvectors * root.eigenvalues.sqrt()) @ root.eigenvectors.T,  # L L^T is C, and L is no triangle
    ):
        found = Moment.load(with_tensors(tmp_path / "C.safetensors", moment, C=moment.C, factor=wrong))
        assert torch.equal(found.factor, own)


def test_a_C_that_is_none_is_refused_when_it_is_loaded(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own checks, which users do not have
    moment = moments.estimate(model, 1, [text], MomentSettings(tokens=900, context=16))
    lopsided, holed = moment.C.clone(), moment.C.clone()
    lopsided[0, 1] += 1e-3 * float(moment.C.abs().max())
    holed[3, 3] = torch.inf
    cases = {
        r"no square matrix: \[127, 128\]": moment.C[1:].contiguous(),
        r"no square matrix: \[128\]": moment.C[0].contiguous(),
        "whose C is not symmetric": lopsided,
        "whose C is not finite": holed,
    }
    for message, C in cases.items():
        with pytest.raises(FileError, match=message):
            Moment.load(with_tensors(tmp_path / "C.safetensors", moment, C=C))
    with pytest.raises(FileError, match="lacks something"):
        Moment.load(with_tensors(tmp_path / "C.safetensors", moment, factor=moment.C))


def test_a_C_that_cannot_be_inverted_says_so_when_it_is_used(model, text):
    moment = replace(moments.estimate(model, 1, [text], MomentSettings(tokens=900, context=16)), C=torch.ones(128, 128, dtype=torch.float64))  # fmt: skip
    with pytest.raises(RankOneError, match="must be positive definite"):
        moment.solve(torch.ones(1, 128, dtype=torch.float64))


# --- whose keys they are ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["gpt2", "neox", "gemma3"])
def test_C_stays_valid_while_nothing_changes_that_the_keys_depend_on(shape, load, text):
    """Every weight of every block is changed in turn; whether the keys are others then is seen by running the model."""
    model = load(shape)
    before = state(model)
    moment = moments.estimate(model, 1, [text], MomentSettings(tokens=700, context=16))
    tokens = torch.arange(5, 17)[None]

    def keys():
        kept = {}
        with torch.no_grad(), intervened(model, read("blocks.1.mlp.hook_post", partial(kept.__setitem__, 1))):
            model(tokens)
        return kept[1]

    first = keys()
    for layer in range(4):
        for name in there(model, layer):
            weight = Weight(layer, name)
            if name == "attn.b_K" or (name.split(".")[1].startswith("b") and not value(model, weight).any()):
                continue  # which softmax takes out again; and biases that only one class has
            with applying.edited(model, hand_made.edit_of(model, hand_made.dense(model, layer, name))):
                valid, same = moment.is_of(model), torch.equal(keys(), first)
                assert valid == (layer > 1 or (layer == 1 and name in ("mlp.W_out", "mlp.b_out"))), weight
                parallel = (
                    shape == "neox" and layer == 1 and name.startswith("attn")
                )  # whose MLP does not see its attention
                assert valid == same or parallel, weight
    embedding = model.embed.W_E.detach()
    original = embedding.clone()
    embedding.mul_(1.5)
    assert not moment.is_of(model)
    embedding.copy_(original)
    assert moment.is_of(model)
    assert_same_state(model, before)


def test_C_of_an_edited_layer_is_found_in_the_cache(model, text, monkeypatch):
    """Edits of a layer's W_out do not change its keys: they all share one C."""
    settings = MomentSettings(tokens=300, context=16)
    first = moments.estimate(model, 1, [text], settings)
    monkeypatch.setattr(estimating, "accumulate", lambda *args: pytest.fail("estimated again"))
    with applying.edited(model, hand_made.edit_of(model, hand_made.rank_one(model, 1))):
        assert moments.estimate(model, 1, [text], settings).hash == first.hash


def test_C_of_sampled_text_is_that_of_the_model_that_wrote_it(model):
    """What an edited model writes is another text, though the layer's keys on the same text would be the same."""
    first = moments.estimate(model, 1, settings=SMALL)
    with applying.edited(model, hand_made.edit_of(model, hand_made.dense(model, 1, "mlp.W_out"))):
        again = moments.estimate(model, 1, settings=SMALL)
        assert not torch.equal(again.C, first.C)
        assert first.is_of(model)
        assert again.is_of(model)
    assert again.is_of(model), "of which text C is, is not asked"


def test_a_C_of_version_0_1_0_is_of_the_model_whose_weights_it_names(model, text, tmp_path):
    moment = moments.estimate(model, 1, [text], MomentSettings(tokens=300, context=16))
    record = {
        "layer": 1,
        "keys": 300,
        "cond": moment.cond,
        "source": moment.source,
        "settings": asdict(moment.settings),
        "origin": {"name": "tiny", "class": "HookedTransformer", "weight_hash": models.weight_hash(model)},
        "versions": {"mechedit": "0.1.0"},
    }
    old = Moment.load(files.write(tmp_path / "old.safetensors", "moment", {"C": moment.C}, record))
    assert old.is_of(model)
    assert torch.equal(old.factor, moment.factor)
    with applying.edited(model, hand_made.edit_of(model, hand_made.rank_one(model, 0))):
        assert not old.is_of(model)


def test_C_of_a_model_with_another_weight_below_is_not_of_this_one(model, text):
    with restored(model, Weight(0, "mlp.W_out")) as originals, torch.no_grad():
        value(model, Weight(0, "mlp.W_out")).mul_(2.0)
        moment = moments.estimate(model, 1, [text], MomentSettings(tokens=300, context=16))
        assert moment.is_of(model)
    assert len(originals) == 1
    assert not moment.is_of(model)


# --- what can be wrong ------------------------------------------------------------------------------------------------


def test_too_few_keys_are_an_error(model, tmp_path):
    with pytest.raises(MomentError, match="more keys than d_mlp = 128 .* 100 were asked for"):
        moments.estimate(model, 1, settings=MomentSettings(tokens=100))
    short = tmp_path / "short.txt"
    short.write_text(WORDS)
    with pytest.raises(MomentError, match=r"the text of .*short\.txt gave"):
        moments.estimate(model, 1, [short], MomentSettings(tokens=300, context=16))
    short.write_text("a")
    with pytest.raises(MomentError, match=r"short\.txt is shorter than one window of 16 tokens"):
        moments.estimate(model, 1, [short], MomentSettings(tokens=300, context=16))


def test_a_text_that_ends_too_early_is_noted(model, text):
    whole = moments.estimate(model, 1, [text], MomentSettings(tokens=300, context=16))
    assert whole.notes == ()
    short = moments.estimate(model, 1, [text], MomentSettings(tokens=10**6, context=16))
    assert short.notes == (f"the text gave {short.keys} keys of the 1000000 that were wanted",)


def test_text_that_cannot_be_read_is_an_error(model, tmp_path):
    with pytest.raises(MomentError, match="cannot be read"):
        moments.estimate(model, 1, [tmp_path / "none.txt"], MomentSettings(tokens=300))
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00\x80" * 100)
    with pytest.raises(MomentError, match="no UTF-8 text"):
        moments.estimate(model, 1, [binary], MomentSettings(tokens=300, context=16))


def test_layer_and_context_are_checked_before_anything_runs(model):
    with pytest.raises(ModelError, match="from 0 to 3"):
        moments.estimate(model, 4)
    with pytest.raises(MomentError, match="context must fit the model's 64"):
        moments.estimate(model, 1, settings=MomentSettings(tokens=300, context=100))
    with pytest.raises(SettingsError, match="at least 2"):
        MomentSettings(context=1)
    with pytest.raises(SettingsError, match="tokens must be positive"):
        MomentSettings(tokens=-1)


def test_sums_are_the_same_bits_as_sums_made_plainly_batch_by_batch(model, text, small_batches):
    settings = replace(SMALL, prepend_bos=True)
    sums = moments.accumulate(model, [1, 2], corpus.batches(model, [text], settings, silent), settings)
    totals, done = {layer: torch.zeros(128, 128, dtype=torch.float64) for layer in (1, 2)}, 0
    for _, tokens in corpus.batches(model, [text], settings, silent):
        kept = {}
        with torch.no_grad(), intervened(model, *(read(f"blocks.{layer}.mlp.hook_post", partial(kept.__setitem__, layer)) for layer in (1, 2))):  # fmt: skip
            model(tokens(), stop_at_layer=3)
        take = min(900 - done, kept[1][:, 1:].shape[:2].numel())
        for layer in totals:
            keys = kept[layer][:, 1:].flatten(0, 1)[:take]
            totals[layer] = totals[layer] + estimating._gram(keys).double()
        done += take
        if done == 900:
            break
    assert (sums.keys, done) == (900, 900)
    assert sums.batches > 10
    assert all(torch.equal(sums.totals[layer], totals[layer]) for layer in (1, 2))


@pytest.mark.parametrize("d_mlp", [1, 5, 128, 129])
def test_the_product_of_keys_is_symmetric_and_that_of_the_whole_matrices(d_mlp):
    keys = torch.randn(300, d_mlp, generator=torch.Generator().manual_seed(d_mlp))
    gram = estimating._gram(keys)
    assert bool((gram == gram.T).all())
    torch.testing.assert_close(gram.double(), keys.double().T @ keys.double(), rtol=1e-5, atol=1e-4)


def test_a_C_without_full_rank_has_infinite_condition():
    assert moments.condition(torch.diag(torch.tensor([1.0, 4.0]))) == pytest.approx(4.0)
    assert moments.condition(torch.diag(torch.tensor([1.0, 0.0]))) == float("inf")


# --- several layers, parts, checkpoints -------------------------------------------------------------------------------

SMALL = MomentSettings(tokens=900, context=16)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(corpus, "BATCH_TOKENS", 64)


def test_several_layers_in_one_pass_are_what_each_is_alone(model, text, monkeypatch, small_batches):
    together = moments.estimate_layers(model, [0, 2, 3], [text], SMALL)
    assert list(together) == [0, 2, 3]
    monkeypatch.setenv("MECHEDIT_CACHE", str(text.parent / "other"))
    for layer, moment in together.items():
        alone = moments.estimate(model, layer, [text], SMALL)
        assert torch.equal(alone.C, moment.C)
        assert alone.hash == moment.hash
        assert moment.layer == layer


def test_blocks_above_the_last_layer_that_is_wanted_do_not_run(model, text):
    ran = []
    hooks = [block.register_forward_hook(lambda *_, at=at: ran.append(at)) for at, block in enumerate(model.blocks)]
    moments.estimate_layers(model, [0, 1], [text], SMALL)
    for hook in hooks:
        hook.remove()
    assert {*ran} == {0, 1}


def test_progress_counts_through_all_batches(model, small_batches):
    said = []
    moments.estimate(model, 1, settings=SMALL, progress=lambda what, done, of: said.append((what, done, of)))
    sampled = [(done, of) for what, done, of in said if what == "sampling text"]
    assert len({of for _, of in sampled}) == 1
    assert [done for done, _ in sampled] == sorted(done for done, _ in sampled)
    assert sampled[-1][0] == sampled[-1][1]
    assert len(sampled) > 2 * SMALL.context, "more than one batch"


@pytest.mark.anywhere
@pytest.mark.parametrize("sampled", [False, True])
def test_a_job_that_is_stopped_goes_on_and_ends_with_the_same_bits(sampled, model, text, monkeypatch, small_batches):
    texts = None if sampled else [text]
    whole = moments.estimate(model, 1, texts, SMALL)
    passes, forward = (
        [],
        type(model).forward,
    )  # with a hook on the model, or a forward of its own, nothing would be kept
    monkeypatch.setattr(type(model), "forward", lambda *args, **named: passes.append(1) or forward(*args, **named))
    for stop in (1, 5, 9):
        monkeypatch.setenv("MECHEDIT_CACHE", str(text.parent / f"stopped{stop}"))
        done = []

        def interrupt(what, at, of, done=done, stop=stop):
            done.append(what)
            if done.count("second moment") == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            moments.estimate(model, 1, texts, SMALL, progress=interrupt)
        assert len(list((cache.root() / "moments").glob("*.part.safetensors"))) == 1
        passes.clear()
        again = moments.estimate(model, 1, texts, SMALL)
        assert torch.equal(again.C, whole.C)
        assert again.keys == whole.keys
        if not sampled:
            assert len(passes) == 15 - stop, "no batch is run twice"
        assert [path.name for path in (cache.root() / "moments").iterdir() if ".part." in path.name] == []


def test_a_batch_that_was_added_to_some_layers_alone_is_in_no_checkpoint(model, tmp_path, monkeypatch):
    grams, gram = [], estimating._gram

    def interrupted(keys):
        grams.append(gram(keys))
        return (
            grams[-1][:1, :2] if len(grams) == 4 else grams[-1]
        )  # of the second batch's second layer: cannot be added

    monkeypatch.setattr(estimating, "_gram", interrupted)
    monkeypatch.setattr(estimating, "CHECKPOINT_SECONDS", -1.0)
    batches = [(9, partial(torch.ones, 1, 10, dtype=torch.long))] * 2
    with pytest.raises(RuntimeError):
        estimating.accumulate(model, [0, 1], iter(batches), replace(SMALL, prepend_bos=True), tmp_path / "part")
    kept = estimating.Sums.load(tmp_path / "part", torch.device("cpu"))
    assert (kept.keys, kept.batches) == (9, 1)
    for layer in (0, 1):
        torch.testing.assert_close(kept.totals[layer], grams[layer].double())


def test_a_damaged_checkpoint_counts_as_none(model, text, monkeypatch, small_batches):
    whole = moments.estimate(model, 1, [text], SMALL)
    monkeypatch.setenv("MECHEDIT_CACHE", str(text.parent / "damaged"))

    def interrupt(what, at, of):
        if at > 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moments.estimate(model, 1, [text], SMALL, progress=interrupt)
    (kept,) = (cache.root() / "moments").glob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-3])
    assert torch.equal(moments.estimate(model, 1, [text], SMALL).C, whole.C)


@pytest.mark.slow
def test_a_job_killed_at_random_moments_ends_with_the_same_bits(folder, text, tmp_path):
    """Each round starts the job anew; it is killed ten times at random moments, and then left to end."""
    code = (
        "import sys; from mechedit import models, moments; from mechedit.settings import MomentSettings; "
        "import sys; moments.corpus.BATCH_TOKENS = 64; sys.modules['mechedit.moments.estimation'].CHECKPOINT_SECONDS = 0.0; "
        f"model = models.load({str(folder('gpt2'))!r}, device='cpu'); print('ready', flush=True); "
        f"print(moments.estimate(model, 1, [{str(text)!r}] * 40, MomentSettings(tokens=30000, context=16)).hash)"
    )

    def start(where):
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | {"MECHEDIT_CACHE": str(where)})  # fmt: skip

    whole, _ = start(tmp_path / "whole").communicate()
    numbers = random.Random(0)
    for _ in range(10):
        job = start(tmp_path / "killed")
        job.stdout.readline()
        time.sleep(numbers.uniform(0.0, 0.5))
        job.kill()
        job.communicate()
    again, _ = start(tmp_path / "killed").communicate()
    assert again == whole
    assert len(whole.split()[-1]) == 64


@pytest.mark.parametrize("sampled", [False, True])
def test_parts_computed_apart_are_the_whole(sampled, model, text, small_batches):
    texts = None if sampled else [text]
    whole = moments.estimate(model, 1, texts, SMALL)
    parts = [moments.estimate(model, 1, texts, replace(SMALL, part=part, parts=3)) for part in range(3)]
    merged = moments.merge(parts[::-1])
    assert merged.keys == whole.keys == 900
    assert float((merged.C - whole.C).norm() / whole.C.norm()) < 1e-12
    assert merged.cond == pytest.approx(whole.cond, rel=1e-6)
    assert merged.source == whole.source
    assert (merged.settings.part, merged.settings.parts) == (0, 1)


def test_another_seed_of_a_file_is_the_same_text_and_of_samples_another(model, text, small_batches):
    files = [moments.estimate(model, 1, [text], replace(SMALL, seed=seed)) for seed in (0, 1)]
    with pytest.raises(MomentError, match="count twice"):
        moments.merge(files)
    samples = [moments.estimate(model, 1, settings=replace(SMALL, tokens=300, seed=seed)) for seed in (0, 1)]
    assert moments.merge(samples).keys == 600


def test_a_C_with_nan_is_not_kept(model, text, monkeypatch):
    nan = moments.Sums({1: torch.full((128, 128), torch.nan, dtype=torch.float64)}, keys=900, batches=1)
    monkeypatch.setattr(estimating, "accumulate", lambda *args: nan)
    with pytest.raises(MomentError, match="hold NaN or infinity"):
        moments.estimate(model, 1, [text], SMALL)
    assert list((cache.root() / "moments").glob("*[!t].safetensors")) == []


def test_the_cache_notices_a_change_anywhere_in_the_model(model, text):
    first = moments.estimate(model, 1, [text], SMALL)
    weight = next(parameter for name, parameter in model.named_parameters() if "attn" in name and parameter.ndim > 1)
    original = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
        assert not torch.equal(moments.estimate(model, 1, [text], SMALL).C, first.C)
        weight.copy_(original)
    assert torch.equal(moments.estimate(model, 1, [text], SMALL).C, first.C)


def test_different_texts_are_merged_by_their_numbers_of_keys(model, text):
    first = moments.estimate(model, 1, [text], SMALL)
    second = moments.estimate(model, 1, settings=replace(SMALL, tokens=300))
    merged = moments.merge([first, second])
    torch.testing.assert_close(merged.C, (first.C * 900 + second.C * 300) / 1200)
    assert merged.source.startswith("merged: ")


def test_moments_that_do_not_belong_together_are_not_merged(model, text, small_batches):
    first = moments.estimate(model, 1, [text], SMALL)
    half = moments.estimate(model, 1, [text], replace(SMALL, part=1, parts=2))
    cases = {
        "nothing to merge": [],
        "one layer; found 1 and 2": [first, replace(first, layer=2)],
        "one model": [first, replace(first, origin={**first.origin, "keys": "0"})],
        "one window; found 16 and 8": [first, replace(first, settings=replace(first.settings, context=8))],
        "one BOS rule": [
            first,
            replace(first, settings=replace(first.settings, prepend_bos=not first.settings.prepend_bos)),
        ],
        r"each of the 1 parts .* found \[0, 0\]": [first, first],
        "count twice, in different numbers": [first, moments.estimate(model, 1, [text], replace(SMALL, tokens=800))],
        "count twice, as a part of several": [first, moments.estimate(model, 1, [text, text], SMALL)],
        "count twice, as a part of": [first, moments.merge([first, moments.estimate(model, 1, settings=SMALL)])],
        r"each of the 2 parts .* found \[1\]": [half],
    }
    for message, wrong in cases.items():
        with pytest.raises(MomentError, match=message):
            moments.merge(wrong)
    with pytest.raises(MomentError, match="fewer than 90 batches .* take fewer parts"):
        moments.estimate(model, 1, [text], replace(SMALL, part=80, parts=90))
    with pytest.raises(SettingsError, match="part must be from 0 to"):
        MomentSettings(part=2, parts=2)


# --- other sources ----------------------------------------------------------------------------------------------------


def test_a_folder_of_the_hubs_formats_is_a_corpus(model, tmp_path, text):
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [f"{number} {WORDS}" for number in range(60)]
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"id": 1, "body": row}) for row in rows))
    corpus = moments.Corpus(str(folder), column="body")
    moment = moments.estimate(model, 1, [corpus], replace(SMALL, prepend_bos=True))
    ids = [token for row in rows for token in model.tokenizer(row, add_special_tokens=False).input_ids]
    expected = slow_moment(model, 1, torch.tensor(ids[: 60 * 15]).view(-1, 15), 900)
    torch.testing.assert_close(moment.C, expected, atol=1e-5, rtol=1e-4)
    assert moment.source.startswith(f"texts {folder}/None/train/body/")
    assert moments.estimate(model, 1, [corpus], replace(SMALL, prepend_bos=True)).hash == moment.hash
    (folder / "test.jsonl").write_text("\n".join(json.dumps({"body": row}) for row in [*rows[:50], None]))
    split = moments.Corpus(str(folder), split="test", column="body")
    assert moments.estimate(model, 1, [split], replace(SMALL, tokens=600)).hash != moment.hash
    with pytest.raises(MomentError, match="no column 'text'; it has id, body"):
        moments.estimate(model, 1, [moments.Corpus(str(folder))], SMALL)
    with pytest.raises(MomentError, match="cannot be loaded"):
        moments.estimate(model, 1, [moments.Corpus(str(tmp_path / "none"))], SMALL)


def test_a_published_file_is_read(model, tmp_path):
    keys = np.random.default_rng(0).standard_normal((300, 128)).astype(np.float32)
    path = tmp_path / "transformer.h.1.mlp.c_proj_float32_mom2_100000.npz"
    np.savez(path, **{"mom2.mom2": keys.T @ keys, "mom2.count": 300, "mom2.constructor": "SecondMoment()"})
    moment = moments.read_published(path, model, 1)
    np.testing.assert_allclose(moment.C.numpy(), keys.T.astype(float) @ keys / 300, rtol=1e-3, atol=1e-4)
    assert (moment.layer, moment.keys) == (1, 300)
    assert (moment.settings.tokens, moment.settings.context) == (300, model.cfg.n_ctx)
    assert moment.source.startswith("published file ")


def test_a_file_that_is_no_published_one_is_refused(model, tmp_path):
    path = tmp_path / "x.npz"
    cases = {
        "mom2.mom2": {"other": np.zeros(3)},
        r"finite, symmetric sum \[128, 128\] .* it has \[3, 3\] over 5": {
            "mom2.mom2": np.zeros((3, 3)),
            "mom2.count": 5,
        },
        r"it has \[128, 3\] over 5": {"mom2.mom2": np.zeros((128, 3)), "mom2.count": 5},
        "over 0": {"mom2.mom2": np.zeros((128, 128)), "mom2.count": 0},
        "it is not finite": {"mom2.mom2": np.full((128, 128), np.nan), "mom2.count": 5},
        "it is not symmetric": {"mom2.mom2": np.triu(np.ones((128, 128))), "mom2.count": 5},
        "allow_pickle": {"mom2.mom2": np.array([{}]), "mom2.count": 5},
    }
    for message, arrays in cases.items():
        np.savez(path, **arrays)
        with pytest.raises(MomentError, match=message):
            moments.read_published(path, model, 1)
    for content in (b"no zip", b""):
        path.write_bytes(content)
        with pytest.raises(MomentError, match="no .npz"):
            moments.read_published(path, model, 1)
    np.save(tmp_path / "y.npy", np.zeros(3))
    (tmp_path / "y.npy").rename(path)
    with pytest.raises(MomentError, match="no .npz"):
        moments.read_published(path, model, 1)
    with pytest.raises(MomentError, match="no .npz"):
        moments.read_published(tmp_path / "none.npz", model, 1)


def test_of_two_processes_that_need_the_same_C_one_computes_it(model, monkeypatch):
    """The lock is held while C is computed, and what another process made meanwhile is taken."""
    import filelock

    settings, real, tried = MomentSettings(tokens=600, context=32), estimating.accumulate, []

    def accumulate(*args, **named):
        (lock,) = (cache.root() / "moments").glob("*.lock")
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(lock).acquire(timeout=0)
        tried.append(lock)
        return real(*args, **named)

    monkeypatch.setattr(estimating, "accumulate", accumulate)
    first = moments.estimate(model, 1, settings=settings)
    assert len(tried) == 1
    (path,) = (path for path in (cache.root() / "moments").glob("*.safetensors") if files.kind(path) == "moment")
    made = path.read_bytes()
    path.unlink()

    @contextmanager
    def after_another(lock):
        path.write_bytes(made)
        yield

    monkeypatch.setattr(cache, "alone", after_another)
    assert torch.equal(moments.estimate(model, 1, settings=settings).C, first.C)
    assert len(tried) == 1, "the other's is taken"


# --- windows, pieces, parts and checks, each by hand ------------------------------------------------------------------


def slow_gap(text):
    """The last space with letters on both sides; the end, where there is none but at the beginning."""
    places = [at for at in range(1, len(text) - 1) if text[at] == " " and not text[at - 1].isspace() and not text[at + 1].isspace()]  # fmt: skip
    return places[-1] if places else len(text)


@pytest.mark.parametrize("text", ["a b", "a b c", "ab", "a  b", "a b  c", " ab", "ab ", "a b ", "a  b c  d ", " a", "a b\t", "a \tb", "a b \tc", "", " ", "  ", "a", "x y  ", "a b c  "])  # fmt: skip
def test_a_line_is_cut_before_its_last_single_space(text):
    assert corpus._last_gap(text) == slow_gap(text)


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 8, 1000])
@pytest.mark.parametrize("text", ["a b\nc d\n", "one two three four five six", "abcdefghijkl", "ab\n" * 9, "a  b  c  d", "ab cdefgh\n\nij k\n", "", "\n", "ab cd"])  # fmt: skip
def test_pieces_are_the_whole_text_and_end_where_lines_or_words_do(text, piece, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", piece)
    pieces = list(corpus._pieces(io.StringIO(text, newline="\n")))
    assert "".join(pieces) == text
    assert all(pieces)
    for own, after in itertools.pairwise(pieces):
        assert own.endswith("\n") or after.startswith(" ") or " " not in own[-piece:].strip() or piece < 4
        assert len(own) > piece or not own.endswith("\n"), "lines are joined up to a piece"
    assert piece < 1000 or len(pieces) == (1 if text else 0)


def windows_of(model, texts, **named):
    settings = replace(SMALL, prepend_bos=True) if "prepend_bos" not in named else SMALL
    return [(size, tokens()) for size, tokens in corpus.batches(model, texts, replace(settings, **named), silent)]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(("batch_tokens", "rows"), [(64, 4), (79, 4), (80, 5), (10, 1)])
def test_a_text_is_cut_into_windows_some_at_a_time(bos, batch_tokens, rows, model, text, monkeypatch):
    """Windows of 16 tokens, one of which is BOS where that is there; what does not fill one is left out."""
    monkeypatch.setattr(corpus, "BATCH_TOKENS", batch_tokens)
    ids, body = model.tokenizer(text.read_text(), add_special_tokens=False).input_ids, 16 - bos
    found = windows_of(model, [text], prepend_bos=bos, tokens=300)
    assert all(tokens.shape == (rows, 16) for _, tokens in found[:-1])
    assert 1 <= len(found[-1][1]) <= rows
    assert [size for size, _ in found] == [len(tokens) * body for _, tokens in found]
    whole = torch.cat([tokens for _, tokens in found])
    if bos:
        assert bool((whole[:, 0] == model.tokenizer.bos_token_id).all())
    count = len(ids) // body
    assert whole[:, int(bos) :].tolist() == torch.tensor(ids[: count * body]).view(count, body).tolist()


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("tokens", [130, 135, 300])
def test_sampled_text_has_just_as_many_windows_as_keys_are_wanted(tokens, bos, model, small_batches):
    body = 16 - bos
    found = windows_of(model, [], prepend_bos=bos, tokens=tokens)
    assert [len(rows) for _, rows in found[:-1]] == [4] * (len(found) - 1)
    assert sum(size for size, _ in found) == -(-tokens // body) * body
    assert all(rows.shape[1] == 16 and size == len(rows) * body for size, rows in found)
    for index, (_, rows) in enumerate(found):
        own = generation.sample(model, len(rows), body, generator(SMALL.seed, corpus.PURPOSE, str(index)))
        assert torch.equal(rows[:, int(bos) :], own)


def test_one_text_is_no_list_of_texts(model, text, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own checks, which users do not have
    for wrong in (str(text), text):
        with pytest.raises(TypeError, match="texts must be a list"):
            moments.estimate(model, 1, wrong, SMALL)


@pytest.mark.parametrize("tokens", [128, 129])
def test_a_key_more_than_d_mlp_is_enough(tokens, model, text):
    settings = MomentSettings(tokens=tokens, context=16)
    if tokens == 128:
        with pytest.raises(MomentError, match="more keys than d_mlp = 128 .* 128 were asked for"):
            moments.estimate(model, 1, [text], settings)
    else:
        assert moments.estimate(model, 1, [text], settings).keys == 129
    assert moments.estimate(model, 1, [text], MomentSettings(tokens=300, context=64)).keys == 300, "the whole context"


@pytest.mark.parametrize("windows", [8, 9])
def test_a_text_of_as_few_keys_as_d_mlp_is_too_short(windows, model, tmp_path):
    """Windows of 17 tokens with BOS have 16 keys: eight give 128, nine 144."""
    word = next(each for each in (" is", " the", " of") if len(model.tokenizer(each * 3, add_special_tokens=False).input_ids) == 3)  # fmt: skip
    path = tmp_path / "short.txt"
    path.write_text(word * 16 * windows)
    settings = MomentSettings(tokens=300, context=17, prepend_bos=True)
    if windows == 8:
        with pytest.raises(MomentError, match="gave 128"):
            moments.estimate(model, 1, [path], settings)
    else:
        assert moments.estimate(model, 1, [path], settings).keys == 144


def test_a_checkpoint_is_written_each_minute(model, text, monkeypatch, small_batches, tmp_path):
    clock, saved = iter(range(0, 10_000, 25)), []
    monkeypatch.setattr(estimating.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(moments.Sums, "save", lambda self, path: saved.append(self.batches))
    settings = replace(SMALL, prepend_bos=True)
    batches = list(corpus.batches(model, [text], settings, silent))
    moments.accumulate(model, [1], iter(batches), settings, tmp_path / "part")
    assert saved == list(range(3, 3 * len(saved) + 1, 3)), (
        "the clock moves by 25 seconds: the third look is the first past 60"
    )
    assert len(saved) >= 3


def test_a_moment_of_no_block_or_no_key_is_refused(tmp_path):
    made = Moment(0, torch.eye(2, dtype=torch.float64), 1, 1.0, "by hand", MomentSettings(tokens=1), {"name": "tiny"}, {})  # fmt: skip
    assert Moment.load(made.save(tmp_path / "one")).keys == 1
    for wrong in (replace(made, keys=0), replace(made, layer=-1)):
        with pytest.raises(FileError, match=f"of {wrong.keys} keys of block {wrong.layer}, which cannot be"):
            Moment.load(wrong.save(tmp_path / "none"))


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e3])
def test_a_factor_must_be_lower_and_of_C(size, tmp_path):
    C = size**2 * torch.tensor([[4.0, 2.0], [2.0, 5.0]], dtype=torch.float64)
    made = Moment(0, C, 9, 1.0, "by hand", MomentSettings(tokens=9), {"name": "tiny"}, {})
    right = size * torch.tensor([[2.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    for factor, kept in ((right, True), (right @ turn, False), (right.float(), False), (right * (1 + 1e-7), False), (right * (1 + 1e-10), True), (right[:1], False)):  # fmt: skip
        path = files.write(tmp_path / "moment", "moment", {"C": C, "factor": factor}, made.to_json())
        loaded = Moment.load(path)
        assert ("factor" in vars(loaded)) == kept
        torch.testing.assert_close(loaded.factor, right)
    assert torch.equal(made.solve(torch.eye(2))[0], torch.linalg.inv(C)[0]) or torch.allclose(made.solve(torch.eye(2)), torch.linalg.inv(C))  # fmt: skip


@pytest.mark.parametrize(("values", "condition"), [((1.0, 4.0), 4.0), ((0.5, 0.5), 1.0), ((0.0, 1.0), float("inf")), ((-1.0, 1.0), float("inf"))])  # fmt: skip
def test_the_condition_is_the_ratio_of_the_eigenvalues(values, condition):
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    C = turn @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ turn.T
    assert moments.condition(C) == pytest.approx(condition) or condition > 1e15 < moments.condition(C)


def test_a_published_sum_over_one_key_is_read_and_one_that_is_not_symmetric_says_so(model, tmp_path):
    path, key = tmp_path / "x.npz", np.arange(128.0)
    np.savez(path, **{"mom2.mom2": np.outer(key, key), "mom2.count": 1})
    found = moments.read_published(path, model, 1)
    assert (found.keys, found.settings.tokens, found.settings.context) == (1, 1, int(model.cfg.n_ctx))
    np.testing.assert_allclose(found.C.numpy(), np.outer(key, key))
    np.savez(path, **{"mom2.mom2": np.triu(np.ones((128, 128))), "mom2.count": 1})
    with pytest.raises(MomentError, match="it is not symmetric"):
        moments.read_published(path, model, 1)


def test_notes_are_of_whole_texts_that_ended_before(model):
    made = Moment(0, torch.eye(2, dtype=torch.float64), 5, 1.0, "by hand", MomentSettings(tokens=6), {"name": "tiny"}, {})  # fmt: skip
    assert made.notes == ("the text gave 5 keys of the 6 that were wanted",)
    assert replace(made, keys=6).notes == ()
    assert replace(made, settings=MomentSettings(tokens=6, parts=2)).notes == ()


def test_a_merged_C_is_the_mean_over_all_keys(model):
    def made(C, keys, source, **named):
        settings = MomentSettings(tokens=keys, prepend_bos=True, **named)
        return Moment(1, torch.tensor(C, dtype=torch.float64), keys, 1.0, source, settings, {"name": "tiny", "keys": "k"}, {})  # fmt: skip

    first, second = made([[2.0, 0.0], [0.0, 1.0]], 10, "texts a"), made([[4.0, 1.0], [1.0, 3.0]], 30, "texts b")
    both = moments.merge([first, second])
    torch.testing.assert_close(both.C, torch.tensor([[3.5, 0.75], [0.75, 2.5]], dtype=torch.float64))
    assert (both.keys, both.settings.tokens, both.source, both.layer) == (40, 40, "merged: texts a; texts b", 1)
    roots = np.linalg.eigvalsh(both.C.numpy())
    assert both.cond == pytest.approx(roots[1] / roots[0])
    with pytest.raises(MomentError, match="one size of C; found 2 and 3"):
        moments.merge([first, made(torch.eye(3).tolist(), 5, "texts c")])
    with pytest.raises(MomentError, match=r"as a part of several: a\.$"):
        moments.merge([both, made([[1.0, 0.0], [0.0, 1.0]], 7, "texts a c")])
    old = replace(first, origin={"name": "tiny", "weight_hash": "h"})
    with pytest.raises(MomentError, match="one model; found h and k"):
        moments.merge([old, second])


def test_a_shipped_or_kept_text_is_described_by_its_names(tmp_path):
    assert corpus.described([]) == "the sampled text"
    assert corpus.described(["a.txt", moments.Corpus("own/set")]) == "the text of a.txt, own/set"
    path = tmp_path / "a"
    path.write_text("a")
    assert corpus.source_of([]) == "sampled from the model"
    assert corpus.source_of([path, path]) == f"texts {cache.file_hash(path)} {cache.file_hash(path)}"


def test_windows_begin_with_the_tokenizers_own_bos(model, text):
    kept = model.tokenizer.bos_token
    try:
        model.tokenizer.bos_token = model.tokenizer.eos_token
        assert model.tokenizer.bos_token_id == 1
        assert {int(token) for _, rows in windows_of(model, [text]) for token in rows[:, 0]} == {1}
    finally:
        model.tokenizer.bos_token = kept


@pytest.mark.parametrize("texts", [[], (), ["\ud800"], [3]])
def test_texts_that_are_none_are_refused_and_not_taken_for_sampled_text(texts, model, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which users do not have
    with pytest.raises(MomentError, match="texts must"):
        moments.estimate(model, 1, texts, SMALL)


def test_a_layer_that_is_no_number_is_an_error(model, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which users do not have
    with pytest.raises(models.ModelError, match="whole number from 0 to 3; found '0'"):
        moments.estimate(model, "0", settings=SMALL)
