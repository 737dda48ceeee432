from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace

import jaxtyping
import pytest
import torch

from mechedit import applying, editing, edits, files, models, provenance
from mechedit.cache import WriteError
from mechedit.changes import Rows
from mechedit.edits import EditError, Measured
from mechedit.facts import Fact
from mechedit.rank_one import RankOneEdit
from mechedit.weights import Weight, value
from tests.conftest import FACT, assert_same_state, state
from tests.hand_made import dense, edit_of, low_rank, numbers, rank_one, some_rows

OTHER = Fact("Rome", "The city of {} is", target_true="Seattle", target_new="London")


@pytest.fixture
def one(model):
    """An edit with one rank-one change."""
    return edit_of(model, rank_one(model))


# --- what an edit says ------------------------------------------------------------------------------------------------


def test_an_edit_says_when_it_hardly_took(model, one):
    def after(**p):
        return replace(one, facts=(replace(one.facts[0], after=p),))

    took = after(p_new=0.6, p_true=0.1)
    assert took.notes == ()
    assert took.to_json()["notes"] == []
    for p in ({"p_new": 0.005, "p_true": 0.001}, {"p_new": 0.3, "p_true": 0.4}):
        (note,) = after(**p).notes
        assert note == f"it hardly took: P(new) = {p['p_new']:.2g} and P(true) = {p['p_true']:.2g} after it"
    assert replace(took, changes=(), reasons=("too large",)).notes == ("it has no changes, and writes nothing",)
    weak = after(p_new=0.001, p_true=0.9)
    assert applying.compose(weak, edit_of(model, rank_one(model, 2))).notes == (), "its parts have their own"


def test_of_several_facts_a_note_names_the_subject_of_which_it_speaks(one):
    first, second = one.facts[0], Measured(editing.described(OTHER), {"p_new": 0.1, "p_true": 0.2}, {"p_new": 0.1, "p_true": 0.3})  # fmt: skip
    assert replace(one, facts=(first, second)).notes == ("it hardly took for Rome: P(new) = 0.1 and P(true) = 0.3 after it",)  # fmt: skip


def test_the_first_fact_is_an_edits_own_and_all_are_listed_beside_it(one):
    first, second = one.facts[0], Measured(editing.described(OTHER), {"p_new": 0.1}, {"p_new": 0.7})
    both = replace(one, facts=(first, second))
    assert (both.fact, both.before, both.after) == (first.fact, first.before, first.after)
    said = both.to_json()
    assert (said["prompt"], said["subject"], said["target_new"], said["target_true"]) == (FACT.prompt, FACT.subject, "Paris", "Seattle")  # fmt: skip
    assert [(each["prompt"], each["after"]) for each in said["facts"]] == [(FACT.prompt, first.after), (OTHER.prompt, {"p_new": 0.7})]  # fmt: skip
    assert "facts" not in one.to_json()
    assert json.loads(json.dumps(said)) == said


def test_a_digest_is_of_what_is_written_and_of_nothing_else(model, one):
    assert replace(one, seconds=9.0, settings={}, reasons=("a",), state={"a": torch.ones(1)}).digest == one.digest
    change = one.changes[0]
    others = [
        replace(change, layer=2),
        replace(change, u=change.u + 1),
        replace(change, step=-change.step),
        replace(change, u=change.u.double()),
        dense(model, 1, "mlp.W_out"),
        some_rows(model, 1, "mlp.W_out", (3, 0)),
        some_rows(model, 1, "mlp.W_out", (0, 3)),
    ]
    digests = {edit_of(model, each).digest for each in others} | {one.digest, edit_of(model, change, change).digest}
    assert len(digests) == len(others) + 2


def test_a_digest_is_sha_256_of_each_change_in_turn(model):
    """By hand: kind, weight and numbers, then each tensor by name, with its dtype, its shape and its bytes in memory's order."""
    u, step = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.5, -1.0])
    values, index = torch.tensor([[1.0, 2.0]]), torch.tensor([4])
    edit = edit_of(model, RankOneEdit(1, u, step, 0.5), Rows(Weight(2, "mlp.W_out"), index, values, 6), told="é")
    said = hashlib.sha256()
    said.update(b"rank_one mlp.W_out of block 1 [('divisor', 0.5)]")
    said.update(b"step torch.float32 (3,)" + struct.pack("<3f", 3.0, 0.5, -1.0))
    said.update(b"u torch.float32 (2,)" + struct.pack("<2f", 1.0, 2.0))
    said.update(b"rows mlp.W_out of block 2 [('height', 6)]")
    said.update(b"index torch.int64 (1,)" + struct.pack("<q", 4))
    said.update(b"values torch.float32 (1, 2)" + struct.pack("<2f", 1.0, 2.0))
    said.update("told é".encode())
    assert edit.digest == said.hexdigest()


# --- files ------------------------------------------------------------------------------------------------------------


def each_kind(model):
    return {
        "rank_one": rank_one(model),
        "low_rank": low_rank(model, 1, "attn.W_Q"),
        "rows": some_rows(model, 2, "mlp.W_out"),
        "dense": dense(model, 0, "mlp.b_in"),
    }


@pytest.mark.parametrize("kinds", [("rank_one",), ("low_rank",), ("rows",), ("dense",), ("rows", "dense", "rank_one", "low_rank")])  # fmt: skip
def test_every_kind_of_change_survives_its_file(kinds, model, tmp_path):
    edit = edit_of(
        model,
        *(each_kind(model)[kind] for kind in kinds),
        details={"losses": [[1.0, 2.0]]},
        reasons=("because",),
        vectors={"k*": numbers(128), "v*": numbers(32, seed=1)},
        state={"seen": torch.ones(3, dtype=torch.float64)},
    )
    loaded = edits.load(edits.save(edit, tmp_path / "edit.safetensors"))
    assert [type(change) for change in loaded.changes] == [type(change) for change in edit.changes]
    for found, change in zip(loaded.changes, edit.changes, strict=True):
        assert found.weight == change.weight
        assert found.numbers() == change.numbers()
        assert {name: (each.dtype, each.tolist()) for name, each in found.tensors().items()} == {name: (each.dtype, each.tolist()) for name, each in change.tensors().items()}  # fmt: skip
    for name in ("editor", "facts", "report", "origin", "settings", "versions", "seconds", "details", "reasons"):
        assert getattr(loaded, name) == getattr(edit, name), name
    for found, own in ((loaded.vectors, edit.vectors), (loaded.state, edit.state)):
        assert found.keys() == own.keys()
        assert all(torch.equal(found[name], own[name]) for name in own)
    assert loaded.digest == edit.digest
    weights = {change.weight for change in edit.changes}
    with applying.edited(model, edit):
        expected = {weight: value(model, weight).detach().clone() for weight in weights}
    with applying.edited(model, loaded):
        assert all(torch.equal(value(model, weight), expected[weight]) for weight in weights)


def test_an_edit_without_changes_survives_its_file_with_its_reasons(one, tmp_path):
    nothing = replace(one, changes=(), reasons=("too large",), report={}, facts=(Measured(one.fact, {}, {}),))
    loaded = edits.load(edits.save(nothing, tmp_path / "edit.safetensors"))
    assert (loaded.changes, loaded.reasons, loaded.layer) == ((), ("too large",), 1)


def test_an_edit_is_not_saved_as_a_folder(one, tmp_path):
    with pytest.raises(WriteError, match="is a folder; name a file in it"):
        edits.save(one, tmp_path)


def test_a_file_of_a_later_form_says_to_update(one, tmp_path):
    path = edits.save(one, tmp_path / "edit.safetensors")
    tensors, record = files.read(path, "edit", 2)
    with pytest.raises(files.FileError, match="has format 4; .* knows up to 3. Update mechedit"):
        edits.load(files.write(path, "edit", tensors, record, 4))


@pytest.mark.parametrize("share", [number / 40 for number in range(40)])
def test_a_file_cut_short_anywhere_is_refused(share, one, tmp_path):
    path = edits.save(one, tmp_path / "edit.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(files.FileError, match="truncated or no safetensors"):
        edits.load(path)


@pytest.mark.parametrize("at", [number / 20 for number in range(20)])
def test_a_file_with_one_byte_changed_is_refused_or_says_the_same(at, one, tmp_path):
    path = edits.save(one, tmp_path / "edit.safetensors")
    whole = bytearray(path.read_bytes())
    whole[int(at * len(whole))] ^= 0x11
    path.write_bytes(bytes(whole))
    with pytest.raises(files.FileError):
        edits.load(path)


def put(name, index, number):
    """Write a number into a tensor of the file."""

    def spoil(tensors, record):
        tensors[name][index] = number

    return spoil


def swap(name, tensor):
    return lambda tensors, record: tensors.update({name: tensor})


SPOILT = {  # the file has a rank-one change, rows and a change of low rank
    "nan": (put("0.step", 0, float("nan")), "NaN or infinity"),
    "infinity": (put("0.u", -1, float("inf")), "NaN or infinity"),
    "nan in the state": (put("state.seen", 0, float("nan")), "NaN or infinity"),
    "matrix": (swap("0.u", torch.zeros(4, 4)), "two vectors"),
    "scalar": (swap("0.u", torch.tensor(1.0)), "two vectors"),
    "whole numbers": (swap("0.u", torch.ones(128, dtype=torch.int64)), "floating-point numbers"),
    "no u": (lambda tensors, record: tensors.pop("0.u"), "not whole"),
    "no step": (lambda tensors, record: tensors.pop("0.step"), "not whole"),
    "no values": (lambda tensors, record: tensors.pop("1.values"), "not whole"),
    "a row that is not there": (put("1.index", 0, 128), "rows must be from 0 to 127"),
    "a row twice": (put("1.index", 0, 0), "there twice"),
    "rows with fractions": (swap("1.index", torch.tensor([0.5, 1.0, 2.0])), "not whole"),
    "more values than rows": (swap("1.values", torch.zeros(4, 32)), r"found \[3\] and \[4, 32\]"),
    "height no number": (lambda tensors, record: record["changes"][1].update(height="tall"), "not whole"),
    "factors of two ranks": (swap("2.left", torch.zeros(3, 32)), r"found \[3, 32\] and \[2, 32\]"),
    "no changes": (lambda tensors, record: record.update(changes=[]), "without changes"),
    "changes no list": (lambda tensors, record: record.update(changes=3), "not whole"),
    "change without layer": (lambda tensors, record: record["changes"][0].pop("layer"), "not whole"),
    "layer no number": (lambda tensors, record: record["changes"][0].update(layer="../../etc"), "not whole"),
    "no such weight": (lambda tensors, record: record["changes"][2].update(weight="attn.__class__"), "a weight is one of"),
    "rank one elsewhere": (lambda tensors, record: record["changes"][0].update(weight="mlp.W_in"), "not whole"),
    "no such kind": (lambda tensors, record: record["changes"][0].update(kind="eval"), "not whole"),
    "divisor no number": (lambda tensors, record: record["changes"][0].update(divisor=None), "not whole"),
    "more changes than tensors": (
        lambda tensors, record: record["changes"].append({"layer": 1, "weight": "mlp.W_out", "kind": "dense"}),
        "not whole",
    ),
    "no facts": (lambda tensors, record: record.update(facts=[]), "not whole"),
    "fact no object": (lambda tensors, record: record["facts"][0].update(fact="../../fact"), "not whole"),
    "no prompt": (lambda tensors, record: record["facts"][0]["fact"].pop("prompt"), "not whole"),
    "no weights": (lambda tensors, record: record["origin"].pop("weights"), "not whole"),
    "weights null": (lambda tensors, record: record["origin"].update(weights=None), "not whole"),
    "no name of the model": (lambda tensors, record: record["origin"].pop("name"), "not whole"),
    "parents no list": (lambda tensors, record: record["origin"].update(edits=3), "not whole"),
    "composed of nothing": (lambda tensors, record: record.update(editor="composed"), "not whole"),
    "no norm": (lambda tensors, record: record["report"].pop("update_norm"), "not whole"),
    "nothing measured": (lambda tensors, record: record["facts"][0].update(before={}), "not whole"),
    "no reasons": (lambda tensors, record: record.pop("reasons"), "not whole"),
    "no settings": (lambda tensors, record: record.pop("settings"), "not whole"),
    "no editor": (lambda tensors, record: record.pop("editor"), "not whole"),
    "no rows in u": (swap("0.u", torch.zeros(0)), "from 1 to 16777216 rows and columns"),
    "no columns in values": (swap("1.values", torch.zeros(3, 0)), "from 1 to 16777216 rows and columns"),
    "a factor without columns": (swap("2.left", torch.zeros(2, 0)), "from 1 to 16777216 rows and columns"),
    "height zero": (lambda tensors, record: record["changes"][1].update(height=0), "from 1 to 16777216 rows; found 0"),
    "height true": (lambda tensors, record: record["changes"][1].update(height=True), "from 1 to 16777216 rows; found True"),
    "height too large": (lambda tensors, record: record["changes"][1].update(height=(1 << 24) + 1), "rows; found 16777217"),
    "values whole numbers": (swap("1.values", torch.ones(3, 32, dtype=torch.int64)), "floating-point numbers"),
    "u a matrix": (swap("0.u", torch.ones(1, 128)), "two vectors"),
    "step a matrix": (swap("0.step", torch.ones(1, 32)), "two vectors"),
    "new target no text": (lambda tensors, record: record["facts"][0]["fact"].update(target_new=3), r"targets\[0\]"),
    "true target no text": (lambda tensors, record: record["facts"][0]["fact"].update(target_true=["Seattle"]), r"targets\[1\]"),
    "no new target": (lambda tensors, record: record["facts"][0]["fact"].pop("target_new"), "target_new"),
    "new target null": (lambda tensors, record: record["facts"][0]["fact"].update(target_new=None), "may not be null"),
    "a parent no text": (lambda tensors, record: record["origin"].update(edits=[3]), r"origin.edits\[0\]"),
    "weights no text": (lambda tensors, record: record["origin"].update(weights={"a": 1}), "origin.weights"),
    "base no text": (lambda tensors, record: record["origin"].update(base=3), "origin.base"),
    "base null": (lambda tensors, record: record["origin"].update(base=None, weights=None, weight_hash=None), "not whole"),
    "no relative norm": (lambda tensors, record: record["report"].pop("relative_norm"), "relative_norm"),
    "nothing measured after": (lambda tensors, record: record["facts"][0].update(after={}), "p_new"),
    "parts with settings that are none": (lambda tensors, record: record.update(editor="composed", details={"parts": [{"prompt": "a", "settings": "b"}]}), r"details.parts.settings\[0\]"),
    "parts that have no prompt": (lambda tensors, record: record.update(editor="composed", details={"parts": [{}]}), r"details.parts\[0\]"),
    "digests that are none": (
        lambda tensors, record: record.update(editor="composed", details={"parts": [{"prompt": "a"}], "digests": [3]}),
        r"details.digests\[0\]",
    ),
    "told no text": (lambda tensors, record: record.update(told=3), "told"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_a_file_that_holds_what_no_edit_holds_is_refused(name, model, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own checks, which users do not have
    changes = (rank_one(model), some_rows(model, 2, "mlp.W_out"), low_rank(model, 1, "attn.W_Q"))
    path = edits.save(edit_of(model, *changes, state={"seen": torch.ones(3)}), tmp_path / "edit.safetensors")
    tensors, record = files.read(path, "edit", 2)
    spoil, message = SPOILT[name]
    spoil(tensors, record)
    with pytest.raises(files.FileError, match=message):
        edits.load(files.write(path, "edit", tensors, record, 2))


def written(path, edit, **changed):
    """The edit's file with another record, read again."""
    tensors, record = files.read(edits.save(edit, path), "edit", 3)
    return edits.load(files.write(path, "edit", tensors, record | changed, 3))


@pytest.mark.parametrize("settings", [{"layer": "x"}, {"layer": None}, {"layer": [1]}])
def test_the_layer_of_an_edit_without_changes_must_be_a_number(settings, one, tmp_path):
    nothing = replace(one, changes=(), reasons=("too large",))
    assert written(tmp_path / "1", nothing).layer == 1
    assert written(tmp_path / "2", nothing, settings={}).layer == -1
    with pytest.raises(files.FileError, match="not whole"):
        written(tmp_path / "3", nothing, settings=settings)


def test_a_fact_that_was_refused_may_lack_its_targets_and_the_true_one_may_always_lack(one, tmp_path):
    bare = {name: value for name, value in one.fact.items() if not name.startswith("target")}
    refused = replace(one, changes=(), reasons=("no target",), report={}, facts=(Measured(bare, {}, {}),))
    assert written(tmp_path / "1", refused).fact == bare
    own = one.facts[0]
    without = replace(one, facts=(replace(own, fact=own.fact | {"target_true": None}),))
    assert written(tmp_path / "2", without).fact["target_true"] is None


def test_the_second_facts_targets_and_numbers_are_looked_at_too(one, tmp_path):
    second = one.facts[0]
    for wrong in (replace(second, fact=second.fact | {"target_true": 3}), replace(second, after={}), replace(second, before={"p_true": 0.1})):  # fmt: skip
        with pytest.raises(files.FileError, match="not whole"):
            written(tmp_path / "edit", replace(one, facts=(second, wrong)))


@pytest.mark.parametrize("largest", [127, 128])
def test_a_weight_has_no_more_rows_than_the_largest(largest, one, tmp_path, monkeypatch):
    monkeypatch.setattr(edits, "LARGEST", largest)
    path = edits.save(one, tmp_path / "edit")  # u has 128 numbers
    if largest == 128:
        assert edits.load(path).digest == one.digest
    else:
        with pytest.raises(files.FileError, match="from 1 to 127 rows and columns"):
            edits.load(path)


def test_a_height_may_be_the_largest_there_is():
    assert edits._height(1 << 24) == 16_777_216
    assert edits._height(1) == 1


def test_a_change_of_no_rows_survives_its_file(model, tmp_path):
    none = replace(some_rows(model, 2, "mlp.W_out"), index=torch.zeros(0, dtype=torch.int64), values=torch.zeros(0, 32))
    (found,) = edits.load(edits.save(edit_of(model, none), tmp_path / "edit")).changes
    assert found.shape == none.shape
    assert found.norm == 0.0


def test_a_text_that_is_told_is_an_edit_with_a_file_of_its_own_form(one, tmp_path):
    told = replace(one, changes=(), told="It is in Paris. ")
    path = edits.save(told, tmp_path / "told")
    assert edits.load(path).told == "It is in Paris. "
    with pytest.raises(files.FileError, match="has format 3; .* knows up to 2"):
        files.read(path, "edit", 2)  # as versions before did, which would leave the text out
    assert "told" not in files.read(edits.save(one, tmp_path / "one"), "edit", 2)[1]
    assert edits.load(tmp_path / "one").told == ""


def test_what_is_told_is_in_the_digest_the_notes_and_the_record(one):
    told, other = replace(one, told="It is in Paris. "), replace(one, told="It is in Rome. ")
    alone = replace(told, changes=())
    assert len({one.digest, told.digest, other.digest, alone.digest, replace(one, changes=()).digest}) == 5
    assert (one.is_empty, told.is_empty, alone.is_empty, replace(one, changes=()).is_empty) == (False, False, False, True)  # fmt: skip
    (note,) = alone.notes
    assert note.startswith("while it stands in the model, mechedit reads every prompt behind 'It is in Paris. '")
    weak = replace(told, facts=(replace(one.facts[0], after={"p_new": 0.1, "p_true": 0.2}),))
    assert [each.split()[0] for each in weak.notes] == ["while", "it"]
    assert told.to_json()["told"] == "It is in Paris. "
    assert "told" not in one.to_json()


def test_an_edits_parts_are_its_own_digest_and_of_a_composition_those_of_all(model, one):
    assert one.parts == (one.digest,)
    assert replace(one, changes=()).parts == ()
    assert replace(one, changes=(), told="Paris. ").parts == (replace(one, changes=(), told="Paris. ").digest,)
    other = edit_of(model, rank_one(model, 2))
    assert applying.compose(one, other).parts == (one.digest, other.digest)
    assert replace(one, details={"digests": ["a"]}).parts == (one.digest,), "it was not composed"
    assert replace(one, editor="composed").parts == (one.digest,), "of version 0.1.0, which kept no digests"


@pytest.mark.parametrize(
    ("origin", "base"),
    [
        ({"base": "b", "weights": "w", "weight_hash": "h"}, "b"),
        ({"weights": "w", "weight_hash": "h"}, "w"),
        ({"weight_hash": "h"}, "h"),
        ({"base": "", "weights": "w"}, "w"),
    ],
)
def test_the_base_is_what_lies_below_the_edits_before(origin, base, one):
    found = replace(one, origin=origin)
    assert found.base == base
    assert found.is_of_0_1 == ("weights" not in origin)
    assert found.parents == ()


@pytest.mark.parametrize(
    ("after", "doubted"),
    [
        ({"p_new": 0.01, "p_true": 0.001}, False),
        ({"p_new": 0.0099, "p_true": 0.001}, True),
        ({"p_new": 0.5, "p_true": 0.5}, True),
        ({"p_new": 0.5, "p_true": 0.49}, False),
        ({"p_true": 0.49}, False),
        ({"p_new": 0.009}, True),
        ({}, False),
    ],
)
def test_a_target_below_one_percent_or_no_more_probable_than_the_true_one_is_doubted(after, doubted, one):
    assert bool(replace(one, facts=(replace(one.facts[0], after=after),)).doubts) == doubted


# --- files of version 0.1.0 -------------------------------------------------------------------------------------------


def of_0_1(model, path, *, layers=(1,), **changed):
    """A file as version 0.1.0 wrote it, with one rank-one change in each of these layers."""
    tensors = {}
    for index, layer in enumerate(layers):
        tensors |= {f"{index}.u": numbers(128, seed=layer), f"{index}.step": 5 * numbers(32, seed=layer + 50)}
    fact = {
        "subject": "The Space Needle",
        "template": "{} is located in the city of",
        "target_true": "Seattle",
        "target_new": "Paris",
        "paraphrases": [],
        "neighbours": [],
        "generations": [],
        "relation": None,
        "id": None,
        "target_new_id": None,
        "prompt": "The Space Needle is located in the city of",
    }
    again = fact | {"template": "{} was built in", "prompt": "The Space Needle was built in"}
    record = {
        "method": "rome",
        "fact": fact,
        "report": {
            "divisor": 0.5,
            "divisor_share": 1.0,
            "update_norm": 2.5,
            "relative_norm": 0.1,
            "cond_C": 1e4,
            "essence_kl": 0.2,
            "perplexity_ratio": 1.01,
        },
        "before": {"p_new": 0.01, "p_true": 0.9},
        "after": {"p_new": 0.97, "p_true": 0.01},
        "origin": {
            "name": "tiny",
            "class": "HookedTransformer",
            "weight_hash": models.weight_hash(model),
            "dtype": "float32",
            "device": "cpu",
        },
        "settings": {"layer": 1, "policy": "averaged", "clamp": 4.0, "guard": "refuse", "prepend_bos": True},
        "versions": {"python": "3.11.0", "mechedit": "0.1.0"},
        "seconds": 3.5,
        "details": {
            "prefixes": ["", "The"],
            "losses": [[2.0, 0.1, 0.0]],
            "also": [again | {"before": {"p_new": 0.02, "p_true": 0.3}, "after": {"p_new": 0.9, "p_true": 0.0}}],
        },
        "reasons": [],
        "changes": [{"layer": layer, "divisor": 0.5} for layer in layers],
    }
    return files.write(path, "edit", tensors, record | changed), tensors


def test_a_file_of_version_0_1_0_says_what_it_said(model, tmp_path):
    path, tensors = of_0_1(model, tmp_path / "old.safetensors")
    old = edits.load(path)
    assert old.is_of_0_1
    assert (old.editor, old.layer, old.seconds, old.settings["policy"]) == ("rome", 1, 3.5, "averaged")
    assert (old.before, old.after) == ({"p_new": 0.01, "p_true": 0.9}, {"p_new": 0.97, "p_true": 0.01})
    assert [(each.fact["prompt"], each.after["p_new"]) for each in old.facts] == [("The Space Needle is located in the city of", 0.97), ("The Space Needle was built in", 0.9)]  # fmt: skip
    (change,) = old.changes
    assert isinstance(change, RankOneEdit)
    assert (change.weight, change.divisor) == (Weight(1, "mlp.W_out"), 0.5)
    assert torch.equal(change.u, tensors["0.u"])
    assert torch.equal(change.step, tensors["0.step"])
    assert old.notes == old.parents == ()
    assert old.to_json()["facts"][1]["prompt"] == "The Space Needle was built in"
    saved = edits.load(edits.save(old, tmp_path / "new.safetensors"))
    assert saved.to_json() == old.to_json()
    assert saved.is_of_0_1, "of what it was made for, no more is known than before"


def test_an_edit_of_version_0_1_0_is_written_into_the_model_that_it_names_and_refused_by_another(model, load, tmp_path):
    path, tensors = of_0_1(model, tmp_path / "old.safetensors", layers=(1, 3))
    old, before = edits.load(path), state(model)
    first = {layer: models.W_out(model, layer).detach().clone() for layer in (1, 3)}
    applied = applying.apply(model, old)
    for index, layer in enumerate((1, 3)):
        change = torch.outer(tensors[f"{index}.u"].double(), tensors[f"{index}.step"].double())
        assert torch.equal(models.W_out(model, layer), (first[layer].double() + change).float())
    assert provenance.lineage(model).edits == (old.digest,)
    with pytest.raises(EditError, match="is written once; .* already"):
        applying.apply(model, old)
    applied.undo()
    assert_same_state(model, before)
    other, _ = of_0_1(load("gptj"), tmp_path / "other.safetensors")
    with pytest.raises(EditError, match="made for tiny with weights"):
        applying.apply(model, edits.load(other))
    assert_same_state(model, before)


def test_edits_of_version_0_1_0_become_one_and_composed_ones_load(model, tmp_path):
    first = edits.load(of_0_1(model, tmp_path / "1.safetensors")[0])
    second = edits.load(of_0_1(model, tmp_path / "2.safetensors", layers=(2,))[0])
    whole = edits.load(edits.save(applying.compose(first, second), tmp_path / "both.safetensors"))
    path, _ = of_0_1(
        model,
        tmp_path / "composed.safetensors",
        layers=(1, 2),
        method="composed",
        before={},
        after={},
        report={"update_norm": 3.0},
        settings={"layer": 1},
        details={"parts": [{"prompt": "one"}, {"prompt": "two"}]},
    )
    old = edits.load(path)
    assert [part["prompt"] for part in old.to_json()["parts"]] == ["one", "two"]
    assert old.notes == ()
    with applying.edited(model, whole):
        expected = [models.W_out(model, layer).detach().clone() for layer in (1, 2)]
    with applying.edited(model, old):
        assert all(torch.equal(models.W_out(model, layer), each) for layer, each in zip((1, 2), expected, strict=True))


SPOILT_0_1 = {
    "no weight hash": (lambda tensors, record: record["origin"].pop("weight_hash"), "not whole"),
    "weight hash null": (lambda tensors, record: record["origin"].update(weight_hash=None), "not whole"),
    "fact no object": (lambda tensors, record: record.update(fact="../../fact"), "not whole"),
    "no prompt": (lambda tensors, record: record["fact"].pop("prompt"), "not whole"),
    "nothing measured": (lambda tensors, record: record.update(before={}), "not whole"),
    "matrix": (swap("0.u", torch.zeros(4, 4)), "two vectors"),
    "nan": (put("0.step", 0, float("nan")), "NaN or infinity"),
    "no changes": (lambda tensors, record: record.update(changes=[]), "without changes"),
    "more changes than tensors": (lambda tensors, record: record["changes"].append({"layer": 1, "divisor": 1.0}), "not whole"),
    "others that are not whole": (lambda tensors, record: record["details"]["also"][0].pop("after"), "not whole"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT_0_1)
def test_a_file_of_version_0_1_0_that_holds_what_no_edit_holds_is_refused(name, model, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    path, _ = of_0_1(model, tmp_path / "old.safetensors")
    tensors, record = files.read(path, "edit")
    spoil, message = SPOILT_0_1[name]
    spoil(tensors, record)
    with pytest.raises(files.FileError, match=message):
        edits.load(files.write(path, "edit", tensors, record))
