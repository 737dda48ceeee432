from __future__ import annotations

import json
from dataclasses import dataclass, replace

import jaxtyping
import pytest
import torch

from mechedit import applying, editing, edits, files, generation, models, moments, prompts, rank_one, scoring
from mechedit.editors import named, rome
from mechedit.edits import EditError
from mechedit.facts import Fact, FactError
from mechedit.models import ModelError
from mechedit.settings import EditSettings, MomentSettings, RomeSettings, SettingsError, knob
from mechedit.weights import Weight, value
from tests import hand_made
from tests.conftest import FACT, assert_same_state, state, widen_bands
from tests.outside_editor import LogitEditor, LogitSettings

QUICK = RomeSettings(layer=1, steps=8, prefixes=((3, 2), (5, 1)))


@pytest.fixture(autouse=True)
def wide_band(monkeypatch):
    """Random models need changes larger than any trained one; the band itself has a test of its own."""
    widen_bands(monkeypatch)


@pytest.fixture
def moment(model):
    return moments.estimate(model, 1, settings=MomentSettings(tokens=600, context=32))


def test_the_report_is_what_was_written(model, fact, moment):
    edit = rome.edit(model, fact, QUICK, moment)
    original = models.W_out(model, 1).detach().clone()
    with applying.edited(model, edit):
        change = models.W_out(model, 1).detach() - original
    assert edit.report["update_norm"] == pytest.approx(float(change.norm()), rel=1e-3)
    assert edit.report["relative_norm"] == pytest.approx(float(change.norm() / original.norm()), rel=1e-3)
    assert edit.report["cond_C"] == moment.cond
    assert edit.editor == "rome"
    assert 0 < edit.seconds < 600
    record = json.loads(json.dumps(edit.to_json()))
    wanted = {
        "model",
        "editor",
        "prompt",
        "subject",
        "target_new",
        "target_true",
        "layer",
        "before",
        "after",
        "edit",
        "seconds",
        "settings",
        "origin",
        "versions",
        "changes",
    }
    assert wanted <= record.keys()
    numbers = {"divisor", "divisor_share", "update_norm", "relative_norm", "cond_C", "essence_kl", "perplexity_ratio"}
    assert record["edit"].keys() == numbers
    assert edit.details["moment"]["keys"] == 600


def test_without_a_true_target_the_models_own_answer_is_the_true_one(model, moment):
    fact = Fact("Rome", "{} is the city", target_new="Paris")
    said, _, p = scoring.top(model, fact.prompt, 1)[0]
    if not said.strip():
        pytest.skip("the random model says white space")
    edit = rome.edit(model, fact, QUICK, moment)
    assert edit.fact["target_true"].startswith(said.strip())
    assert generation.complete(model, fact.prompt).split()[0].startswith(edit.fact["target_true"])
    assert edit.before["p_true"] <= p + 1e-6


@pytest.mark.parametrize(
    ("text", "word"),
    [(" New York, and", "New"), (" Seattle.", "Seattle"), (" U.S. of", "U.S"), (", he", "first"), ("", "first")],
)
def test_the_true_target_is_the_whole_first_word_of_the_models_answer(model, moment, monkeypatch, text, word):
    fact = Fact("Rome", "{} is the city", target_new="Paris")
    monkeypatch.setattr(generation, "complete", lambda *args, **kwargs: text)
    monkeypatch.setattr(scoring, "top", lambda *args, **kwargs: [(" first", -1, 0.5)])
    assert rome.edit(model, fact, QUICK, moment).fact["target_true"] == word


def test_the_old_answer_of_a_target_that_is_made_surer_is_the_most_probable_other(model, moment, monkeypatch):
    fact = Fact("Rome", "{} is the city", target_new="Paris")
    monkeypatch.setattr(generation, "complete", lambda *args, **kwargs: " Paris, and")
    monkeypatch.setattr(scoring, "top", lambda *args, **kwargs: [(each, -1, 0.1) for each in (" Paris", " Par", "\n", " London", " Oslo")])  # fmt: skip
    assert rome.edit(model, fact, replace(QUICK, strengthen=True), moment).fact["target_true"] == "London"


def _said(model, n):
    """A fact, and the text of the n tokens that the model says after its prompt, by TransformerLens's own forward pass, one after the other."""
    for place in ("in", "at", "near", "by", "of", "from", "under", "above", "beside", "behind"):
        fact = Fact("The Space Needle", f"{{}} is {place}", "Rome", "Paris", join="none")
        tokens = begin = model.to_tokens(fact.prompt, prepend_bos=True)
        for _ in range(n):
            with torch.no_grad():
                tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
        own = tokens[0, begin.shape[1] :].tolist()
        said = model.tokenizer.decode(own)
        if said.strip() and prompts.continuation(model, fact.prompt, said, "none") == own:
            return fact, said
    raise AssertionError("what the model says is read as other tokens, whatever it is asked")


def test_a_target_of_which_the_model_says_but_the_beginning_is_edited(model, moment):
    fact, said = _said(model, 1)
    longer = replace(fact, target_new=f"{said} Rome")
    assert prompts.continuation(model, fact.prompt, longer.target_new, "none")[:1] == prompts.continuation(model, fact.prompt, said, "none")  # fmt: skip
    assert rome.edit(model, longer, QUICK, moment).fact["target_new"] == longer.target_new.strip()


@pytest.mark.parametrize("true", ["Rome", None])
@pytest.mark.parametrize("n", [1, 3])
def test_a_target_of_one_token_or_of_several_that_the_model_says_is_refused_or_made_surer(n, true, model, moment):
    fact, said = _said(model, n)
    own = replace(fact, target_new=said, target_true=true)
    with pytest.raises(EditError, match="already says .* nothing to edit. strengthen=True"):
        rome.edit(model, own, QUICK, moment)
    surer = rome.edit(model, own, replace(QUICK, strengthen=True, guard="warn"), moment)
    assert surer.after["p_new"] > surer.before["p_new"]
    assert surer.report["relative_norm"] > 1e-3
    assert (surer.fact["target_true"] == "Rome") if true else surer.fact["target_true"] not in ("", said.strip())


def test_an_answer_that_is_as_sure_as_the_search_asks_for_cannot_be_strengthened_further(model, fact, moment):
    said = model.tokenizer.decode(model(model.to_tokens(fact.prompt, prepend_bos=True))[0, -1].argmax())
    own = replace(fact, target_new=said, target_true="Rome")
    with pytest.raises(EditError, match="with a loss of .* Lower stop_at"):
        rome.edit(model, own, replace(QUICK, strengthen=True, stop_at=20.0), moment)


def test_a_fact_without_a_new_target_is_refused(model):
    with pytest.raises(FactError, match="no target_new"):
        rome.edit(model, Fact("Rome", "{} is"), QUICK)


def test_a_prompt_that_does_not_fit_is_refused_before_the_model_runs(model, monkeypatch):
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    with pytest.raises(FactError, match="must fit the context"):
        rome.edit(model, Fact("A", "{} " + "xq " * 80, target_new="Paris"), QUICK)


def test_ctrl_c_anywhere_leaves_the_model_as_it_was(model, fact, moment):
    before = state(model)
    for stop in (0, 3):

        def interrupt(what, done, of, stop=stop):
            if what == "finding v*" and done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            rome.edit(model, fact, QUICK, moment, progress=interrupt)
        assert_same_state(model, before)


def test_facts_that_contradict_each_other_are_refused_before_the_model_runs(model, fact, monkeypatch):
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    monkeypatch.setattr(scoring, "top", lambda *args, **kwargs: pytest.fail("the model ran"))
    with pytest.raises(FactError, match="contradict each other: 'The Space Needle is .* 'Paris' and 'London'"):
        rome.edit(model, [fact, Fact("Rome", "{} is", target_new="Paris"), replace(fact, target_new="London")], QUICK)
    monkeypatch.undo()


def test_the_same_fact_twice_is_no_contradiction(model, fact, moment):
    once, twice = rome.edit(model, fact, QUICK, moment), rome.edit(model, [fact, fact], QUICK, moment)
    torch.testing.assert_close(twice.changes[0].u, once.changes[0].u, atol=1e-4, rtol=1e-3)
    assert len(twice.facts) == 2


def test_an_edit_needs_a_fact(model):
    with pytest.raises(FactError, match="at least one fact"):
        rome.edit(model, [], QUICK)


def test_settings_of_another_editor_are_refused(model, fact):
    with pytest.raises(SettingsError, match="ft takes FineTuningSettings; found RomeSettings"):
        editing.edit(model, fact, named("ft"), QUICK)


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf"), 1e200])
def test_an_edit_whose_product_is_no_number_is_refused_before_anything_is_written(spoilt, model, fact, moment):
    before = state(model)
    good = rome.edit(model, fact, QUICK, moment)
    (change,) = good.changes
    broken = replace(
        good, changes=(replace(change, u=change.u * 0 + spoilt, step=change.step.double() * 0 + abs(spoilt)),)
    )
    standing = applying.apply(model, good)
    with pytest.raises(EditError, match="destroy the model"):
        standing.add(broken, force=True)
    for refused in (lambda: applying.apply(model, broken, force=True), lambda: rank_one.write_(model, *broken.changes)):
        with pytest.raises((EditError, ModelError), match="destroy the model"):
            refused()
    standing.undo()
    assert_same_state(model, before)


def test_an_edit_can_be_undone_where_another_weight_is_no_number(load, fact, moment, model):
    edit = rome.edit(model, fact, QUICK, moment)
    other = models.W_out(model, 2)
    kept, original = other.detach().clone(), models.W_out(model, 1).detach().clone()
    try:
        with torch.no_grad():
            other[0, 0] = float("nan")
        applied = applying.apply(model, edit, force=True)
        applied.undo()
        assert torch.equal(models.W_out(model, 1), original)
    finally:
        with torch.no_grad():
            other.copy_(kept)


def test_under_autocast_an_edited_model_is_measured_as_it_is(model, fact, moment):
    edit = rome.edit(model, fact, QUICK, moment)
    tokens = model.to_tokens(fact.prompt, prepend_bos=True)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(tokens).float()
        with applying.edited(model, edit):
            within = model(tokens).float()
        after = model(tokens).float()
    with applying.edited(model, edit), torch.autocast("cpu", torch.bfloat16):
        expected = model(tokens).float()
    torch.testing.assert_close(within, expected)
    torch.testing.assert_close(after, before)
    assert not torch.allclose(within, before, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens)
        under = rome.edit(model, fact, QUICK, moment)
    assert (under.digest, under.after) == (edit.digest, edit.after), "an edit and its numbers do not depend on it"


def test_many_edits_in_bfloat16_are_rounded_once_however_they_are_written(folder, fact, moment, model):
    half = models.load(str(folder("gpt2")), device="cpu", dtype=torch.bfloat16)
    original = models.W_out(half, 1).detach().clone()
    stream = torch.Generator().manual_seed(0)
    steps = [1e-3 * torch.randn(32, generator=stream) for _ in range(50)]
    u = torch.randn(128, generator=stream)
    found = [rank_one.RankOneEdit(1, u, step) for step in steps]
    expected = original.double() + torch.outer(u.double(), torch.stack(steps).double().sum(0))
    base = rome.edit(model, fact, QUICK, moment)
    whole = [replace(base, changes=(each,), report={"n": float(index)}) for index, each in enumerate(found)]
    with rank_one.edited(half, *found):
        assert torch.equal(models.W_out(half, 1), expected.bfloat16())
    standing = applying.apply(half)
    for each in whole:
        standing.add(each, force=True)
    assert torch.equal(models.W_out(half, 1), expected.bfloat16()), "one after the other"
    standing.undo()
    with applying.edited(half, *whole, force=True):
        assert torch.equal(models.W_out(half, 1), expected.bfloat16()), "at once"
    assert torch.equal(models.W_out(half, 1), original)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def edit(model, fact, moment):
    return rome.edit(model, fact, QUICK, moment)


def test_an_edit_survives_its_file(model, edit, tmp_path):
    loaded = edits.load(edits.save(edit, tmp_path / "edit.safetensors"))
    assert torch.equal(loaded.changes[0].u, edit.changes[0].u)
    assert torch.equal(loaded.changes[0].step, edit.changes[0].step)
    assert json.loads(json.dumps(edit.to_json())) == json.loads(json.dumps(loaded.to_json()))
    with applying.edited(model, edit):
        expected = models.W_out(model, 1).detach().clone()
    with applying.edited(model, loaded):
        assert torch.equal(models.W_out(model, 1), expected)


def test_undo_restores_every_weight_bit_for_bit(model, edit):
    before = state(model)
    for _ in range(20):
        applied = applying.apply(model, edit)
        assert scoring.score(model, [(FACT.prompt, "Paris")])[0].p == pytest.approx(edit.after["p_new"], rel=1e-4)
        applied.undo()
        assert_same_state(model, before)


def test_undo_in_the_wrong_order_is_refused(model, edit):
    before = state(model)
    first = applying.apply(model, edit)
    second = applying.apply(model, edit, force=True)
    with pytest.raises(EditError, match="undo the later changes first"):
        first.undo()
    second.undo()
    first.undo()
    assert_same_state(model, before)


def test_an_edit_for_other_weights_is_refused_unless_forced(model, edit, load):
    before = state(model)
    other = replace(edit, origin={**edit.origin, "weights": "0" * 64})
    with pytest.raises(EditError, match="made for .* with weights 000000000000.*force=True"):
        applying.apply(model, other)
    with pytest.raises(EditError, match="made for"), applying.edited(model, other):
        raise AssertionError("the body must not run")
    assert_same_state(model, before)
    applying.apply(model, other, force=True).undo()
    assert_same_state(model, before)


def test_applying_several_is_all_or_nothing(model, edit, load):
    before = state(model)
    for layer in (1, 2):
        unfit = replace(edit, changes=(rank_one.RankOneEdit(layer, torch.ones(3), torch.ones(32)),))
        with pytest.raises(ModelError, match="another model"):
            applying.apply(model, edit, unfit, force=True)
        assert_same_state(model, before)


def test_a_file_that_is_no_edit_is_refused(edit, tmp_path):
    path = edits.save(edit, tmp_path / "edit.safetensors")
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(files.FileError, match="truncated or no safetensors"):
            edits.load(path)
    path.write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(files.FileError, match="no safetensors"):
        edits.load(path)
    with pytest.raises(files.FileError, match="does not exist"):
        edits.load(tmp_path / "none")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(files.FileError, match="another kind"):
        edits.load(path)


def test_a_file_of_a_newer_format_is_refused(edit, tmp_path, monkeypatch):
    monkeypatch.setattr(edits, "FORMAT", 99)
    path = edits.save(edit, tmp_path / "edit.safetensors")
    monkeypatch.undo()
    with pytest.raises(files.FileError, match="format 99; .* knows up to 3. Update"):
        edits.load(path)


def test_a_place_that_cannot_be_written_is_an_error(edit, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        edits.save(edit, tmp_path / "file" / "edit.safetensors")


# --- the harness, with an editor made for the test --------------------------------------------------------------------


@dataclass(frozen=True)
class Given(EditSettings):
    layer: int = knob(1, "block")
    size: float = knob(0.0, "whatever")


class ByHand(editing.Editor):
    """Finds what it is given."""

    name = "by hand"
    settings = Given

    def __init__(self, found=None, refuses=""):
        self.found, self.refuses, self.seen, self.made = found or editing.Found([]), refuses, [], 0

    def check(self, model, facts, settings, prepared):
        self.seen.append(("check", prepared))
        if self.refuses:
            raise EditError(self.refuses)

    def prepare(self, model, settings, *, progress=None):
        self.made += 1
        return Ready(f"{self.made}")

    def find(self, model, facts, settings, prepared, state, *, progress=None):
        self.seen.append(("find", prepared, dict(state)))
        return self.found


@dataclass(frozen=True)
class Ready:
    key: str


def two_changes(model):
    return [hand_made.rank_one(model, 1), hand_made.low_rank(model, 2, "attn.W_Q")]


@pytest.mark.parametrize("what", ["target", "check", "says", "fits"])
def test_why_a_fact_cannot_be_edited_is_told_and_nothing_where_it_can(what, model, fact):
    said, _, _ = scoring.top(model, "Megan", 1)[0]
    cases = {
        "target": (ByHand(), replace(fact, target_new=None), "has no target_new to write"),
        "check": (ByHand(refuses="not such a fact"), fact, "not such a fact"),
        "says": (ByHand(), Fact("Megan", "{}", "Rome", said.strip()), "there is nothing to edit"),
        "fits": (ByHand(), fact, ""),
    }
    editor, own, reason = cases[what]
    settings = editor.resolve(model, Given())
    found = editing.refusal(model, own, editor, settings)
    assert reason in found
    assert bool(found) == bool(reason)
    assert ("check", None) in editor.seen or what == "target"
    if reason:
        empty = editing.refused(model, [own], editor, settings, found)
        assert (empty.changes, empty.reasons, empty.report, empty.editor) == ((), (found,), {}, "by hand")
        assert (empty.before, empty.after, empty.seconds != empty.seconds) == ({}, {}, True)
        with pytest.raises((EditError, FactError), match=reason):
            editing.edit(model, own, editor, settings)


def test_norms_are_of_all_changes_and_of_the_weights_that_they_change(model, fact):
    found = two_changes(model)
    edit = editing.edit(model, fact, ByHand(editing.Found(found)))
    own = [value(model, each.weight).detach().double().square().sum() for each in found]
    size = sum(each.dense().square().sum() for each in found)
    assert edit.report["update_norm"] == pytest.approx(float(size.sqrt()), rel=1e-6)
    assert edit.report["relative_norm"] == pytest.approx(float((size / sum(own)).sqrt()), rel=1e-6)


def test_what_a_change_of_a_weight_of_zeros_is_relative_to_is_nothing(model):
    bias = next(each for each in (Weight(1, name) for name in ("mlp.b_out", "attn.b_O")) if not value(model, each).any())  # fmt: skip
    change = hand_made.dense(model, 1, bias.name)
    found = editing._relative_norm(model, [change])
    assert found != found
    assert editing._relative_norm(model, []) != 0


def test_a_text_that_is_told_is_an_edit_of_no_weight(model, fact):
    edit = editing.edit(model, fact, ByHand(editing.Found([], told="Paris. ")))
    assert edit.report["relative_norm"] == edit.report["update_norm"] == 0.0
    assert edit.told == "Paris. "
    spoken = scoring.score(model, [("Paris. " + fact.prompt, "Paris"), ("Paris. " + fact.prompt, "Seattle")])
    assert edit.after == {"p_new": pytest.approx(spoken[0].p, rel=1e-4), "p_true": pytest.approx(spoken[1].p, rel=1e-4)}
    own = scoring.score(model, [(fact.prompt, "Paris")])
    assert edit.before["p_new"] == pytest.approx(own[0].p, rel=1e-4)
    assert edit.before["p_new"] != pytest.approx(edit.after["p_new"], rel=1e-3)
    both = editing.edit(model, fact, ByHand(editing.Found(two_changes(model), told="Paris. ")))
    assert both.report["relative_norm"] > 0
    assert len(both.changes) == 2


def test_what_is_told_is_rolled_back_with_the_changes(model, fact):
    found = editing.Found(two_changes(model), {"own": 1.0}, told="Paris. ")
    editor = ByHand(found)
    editor.bands = {"own": (0.0, 0.5, "do less")}
    rolled = editing.edit(model, fact, editor, Given(guard="rollback"))
    assert (rolled.changes, rolled.told, rolled.after) == ((), "", rolled.before)
    assert rolled.reasons[0].startswith("own = 1 is above 0.5")
    with pytest.warns(editing.EditWarning, match="block 1 by by hand is out of its bands: own"):
        kept = editing.edit(model, fact, editor, Given(guard="warn"))
    assert (len(kept.changes), kept.told) == (2, "Paris. ")
    assert kept.after != kept.before


def test_what_find_gives_is_in_the_edit_and_what_was_prepared_is_named(model, fact):
    found = editing.Found(two_changes(model), {"own": 2.0}, {"a": [1]}, {"k*": torch.ones(2)}, {"s": torch.ones(1)})
    editor = ByHand(found)
    edit = editing.edit(model, [fact], editor, Given(size=2.0), state={"before": torch.zeros(1)})
    assert (edit.details, edit.report["own"]) == ({"a": [1], "prepared": "1"}, 2.0)
    assert (edit.vectors["k*"].tolist(), edit.state["s"].tolist()) == ([1.0, 1.0], [1.0])
    assert editor.seen[-1] == ("find", Ready("1"), {"before": torch.zeros(1)})
    assert edit.settings["size"] == 2.0
    assert edit.seconds > 0
    given = editing.edit(model, fact, editor, Given(), prepared=Ready("given"))
    assert given.details["prepared"] == "given"
    assert editor.seen[-2:] == [("check", Ready("given")), ("find", Ready("given"), {})]
    assert editor.made == 1


def test_what_is_prepared_is_made_once_for_the_same_settings_and_weights(model):
    editor = ByHand()
    assert editing.make_ready(model, editor, Given()) is editing.make_ready(model, editor, Given())
    assert editor.made == 1
    assert editing.make_ready(model, editor, Given(size=1.0)).key == "2"
    assert editing.make_ready(model, editor, Given()).key == "3", "the latest alone is kept"
    with applying.edited(model, hand_made.edit_of(model, hand_made.rank_one(model, 1))):
        assert editing.make_ready(model, editor, Given()).key == "3", "made on the model underneath"


def test_settings_are_filled_in_and_checked(model, monkeypatch):
    editor = ByHand()
    assert editor.resolve(model).layer == 1
    assert editor.resolve(model, Given(layer=3)).layer == 3
    assert editor.resolve(model, Given()).prepend_bos is True
    assert editor.resolve(model, Given(prepend_bos=False)).prepend_bos is False
    with pytest.raises(ModelError, match="0 to 3"):
        editor.resolve(model, Given(layer=4))
    with pytest.raises(
        EditError, match=r"no preset for the editor logit\. Trace .* MLP outputs .* LogitSettings\(layer="
    ):
        LogitEditor().resolve(model)
    assert LogitEditor().resolve(model, LogitSettings(layer=0)).layer == 0
    with pytest.raises(SettingsError, match="band"):
        editor.resolve(model, Given(bands=(("no such number", 0.0, 1.0),)))
    assert editor.resolve(model, Given(bands=(("relative_norm", 0.0, 1.0),))).bands == (("relative_norm", 0.0, 1.0),)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own checks, which users do not have
    with pytest.raises(FactError, match="several; found the text 'Rome is'"):
        editing.edit(model, "Rome is", editor)


@pytest.mark.parametrize("bos", [True, False])
def test_everything_is_measured_with_or_without_bos_as_the_settings_say(bos, model, fact):
    """Greedy continuations of several tokens, by whole forward passes, are refused with the same BOS alone."""
    tokens = model.to_tokens("London", prepend_bos=bos)
    length = tokens.shape[1]
    for _ in range(2):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    said = model.tokenizer.decode(tokens[0, length:])
    if prompts.continuation(model, "London", said) == tokens[0, length:].tolist():
        own = Fact("London", "{}", "Rome", said.strip())
        assert "nothing to edit" in editing.refusal(model, own, ByHand(), ByHand().resolve(model, Given(prepend_bos=bos)))  # fmt: skip
    edit = editing.edit(model, fact, ByHand(editing.Found(two_changes(model))), Given(prepend_bos=bos))
    ids = model.to_tokens(fact.prompt, prepend_bos=bos)

    def p(word):
        (token,) = prompts.continuation(model, fact.prompt, word)
        with torch.no_grad():
            return float(model(ids)[0, -1].softmax(-1)[token])

    assert edit.before["p_new"] == pytest.approx(p("Paris"), rel=1e-3)
    with applying.edited(model, edit, force=True):
        assert edit.after["p_new"] == pytest.approx(p("Paris"), rel=1e-3)
        after = model(model.to_tokens(f"{fact.subject} is a", prepend_bos=bos))[0, -1].double().log_softmax(-1)
    before = model(model.to_tokens(f"{fact.subject} is a", prepend_bos=bos))[0, -1].double().log_softmax(-1)
    assert edit.report["essence_kl"] == pytest.approx(float((after.exp() * (after - before)).sum()), rel=1e-2)


def test_the_models_own_answer_is_asked_for_as_the_settings_say(model, monkeypatch):
    editor, asked, fact = (
        ByHand(editing.Found(two_changes(model))),
        [],
        Fact("Rome", "{} is the city", target_new="Paris"),
    )
    monkeypatch.setattr(generation, "complete", lambda model, prompt, n, **named: asked.append(named) or " London, and")
    assert editing.edit(model, fact, editor, Given(prepend_bos=False)).fact["target_true"] == "London"
    assert asked == [{"prepend_bos": False}]
    monkeypatch.setattr(scoring, "top", lambda *args, **kwargs: [(" 西", -1, 0.5)])
    monkeypatch.setattr(generation, "complete", lambda *args, **kwargs: " 西雅图是")
    assert editing.edit(model, fact, editor).fact["target_true"] == "西", "no space ends a word there"
    monkeypatch.setattr(scoring, "top", lambda *args, **kwargs: [("\n", -1, 0.5)])
    with pytest.raises(FactError, match=r"is '\\n'; name the true target"):
        editing.edit(model, fact, editor)
    assert editing.edit(model, replace(fact, target_true="Rome"), editor).fact["target_true"] == "Rome"


def test_a_fact_is_kept_with_how_its_target_is_joined(fact):
    found = editing.described(fact)
    assert (found["joined"], found["prompt"], found["paraphrases"]) == ("space", fact.prompt, list(fact.paraphrases))
    assert editing.described(replace(fact, join="none"))["joined"] == "none"
    assert "joined" not in editing.described(replace(fact, target_new=None))


@pytest.mark.parametrize("beyond", [False, True])
def test_a_target_may_fill_the_context_and_its_last_token_stand_behind_it(beyond, model):
    room = int(model.cfg.n_ctx) - len(model.to_tokens("A is")[0])
    one = Fact("A", "{} is" + " is" * (room + beyond), target_new="in")
    two = Fact("A", "{} is" + " is" * (room - 1 + beyond), target_new="in in")
    for own in (one, two):
        if beyond:
            with pytest.raises(FactError, match="must fit the context"):
                editing.check_facts(model, [own], Given(prepend_bos=True))
        else:
            editing.check_facts(model, [own], Given(prepend_bos=True))
    if beyond:
        editing.check_facts(model, [one], Given(prepend_bos=False))  # which is one token shorter
