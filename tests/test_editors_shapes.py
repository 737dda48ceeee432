"""The editors of gradients, of neurons and of prompts, with ROME and MEMIT beside them, on every shape of model and both TransformerLens versions.

That each equals a plain implementation of its definition is tested elsewhere (`test_fine_tuning`, `test_attention_edit`,
`test_knowledge_neurons`, `test_neurons`, `test_told`, `test_rome`, `test_many`); here it goes through the harness. What a model says with an
edit in it is checked against Hugging Face's own model. Numbers are kept in expected_edits.json, written on TransformerLens 3.9 by

    python -m tests.test_editors_shapes

and compared on both versions; where a definition is meant to change, look at what the tests above say, then write them again.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mechedit import applying, editing, edits, guards, models, moments
from mechedit.changes import by_weight, total
from mechedit.editors import named, rome
from mechedit.huggingface import place
from mechedit.settings import (
    DESCENT_POLICIES,
    AttentionEditSettings,
    BoundedSettings,
    FineTuningSettings,
    KnowledgeNeuronsSettings,
    MemitSettings,
    MomentSettings,
    RomeSettings,
    ToldSettings,
)
from mechedit.weights import as_matrix, value
from tests.conftest import FACT, SHAPES, assert_same_state, make_folder, state, widen_bands
from tests.test_fine_tuning import hugging_face

pytestmark = pytest.mark.usefixtures("as_users")

PLACE = Path(__file__).with_name("expected_edits.json")
TEXT = Path(models.__file__).parents[1] / "data" / "held_out.txt"
LAYER = 1
LONG = replace(FACT, target_new="Paris London")  # tokens of a target are read in several places
STEPS = {"layer": LAYER, "steps": 3, "learning_rate": 5e-3, "guard": "warn", "prepend_bos": True}
SOUGHT = {"layer": LAYER, "steps": 3, "prefixes": (), "guard": "warn", "prepend_bos": True}
EDITORS = {
    "ft": FineTuningSettings(**STEPS),
    "ft published": FineTuningSettings(**{**STEPS, **DESCENT_POLICIES["published"], "steps": 3}),
    "ft-l": BoundedSettings(**STEPS, norm_bound=8e-3),
    "attention-edit": AttentionEditSettings(**STEPS, norm_bound=8e-3, weights=("W_Q", "W_K", "W_V", "W_O")),
    "attention-edit of a head": AttentionEditSettings(**STEPS, norm_bound=8e-3, heads=(2,)),
    "kn": KnowledgeNeuronsSettings(steps=3, prefixes=((3, 1),), guard="warn", prepend_bos=True),
    "told": ToldSettings(guard="warn", prepend_bos=True),
    "rome": RomeSettings(**SOUGHT),
    "memit": MemitSettings(**SOUGHT, a=50.0, least_met=0.0),
}
CASES = [(shape, case) for shape in SHAPES for case in EDITORS]
each_case = pytest.mark.parametrize(("shape", "case"), CASES, ids=[f"{shape}, {case}" for shape, case in CASES])


def found_by(model, case, moment):
    """The edit of one case. C is of few tokens, and estimated once for a model."""
    editor = named(case.split()[0])
    settings = editor.resolve(model, EDITORS[case])
    prepared = rome.prepare(model, settings, moment) if case in ("rome", "memit") else None
    return editing.edit(model, LONG, editor, settings, prepared=prepared)


def moment_of(model):
    few = MomentSettings(tokens=1500, context=32, prepend_bos=True)
    return moments.estimate(model, LAYER, [TEXT], few)


def numbers_of(edit):
    """What is compared: probabilities, sizes, and of each weight's change the size and a product with a fixed pattern of its shape."""
    changes = {}
    for weight, own in sorted(by_weight(edit.changes).items()):
        delta = total(own)
        pattern = torch.arange(1.0, delta.numel() + 1, dtype=torch.float64).cos().view(delta.shape)
        changes[str(weight)] = [float(delta.norm()), float((delta * pattern).sum())]
    report = {name: edit.report[name] for name in ("update_norm", "relative_norm", "essence_kl", "perplexity_ratio")}
    return {"before": edit.before, "after": edit.after, "report": report, "changes": changes}


@pytest.fixture(scope="module")
def edit_of(load):
    """The edit of a shape's model by one case, found once."""
    kept, estimated = {}, {}

    def get(shape, case):
        model = load(shape)
        if (shape, case) not in kept:
            with pytest.MonkeyPatch.context() as patch:
                widen_bands(patch)
                if shape not in estimated:
                    estimated[shape] = moment_of(model)
                before = state(model)
                kept[shape, case] = found_by(model, case, estimated[shape])
                assert_same_state(model, before)
        return model, kept[shape, case]

    return get


@each_case
def test_it_applies_reverts_bit_for_bit_saves_and_loads(shape, case, edit_of, tmp_path):
    model, edit = edit_of(shape, case)
    before = state(model)
    loaded = edits.load(edits.save(edit, tmp_path / "edit.safetensors"))
    assert (loaded.digest, loaded.told, loaded.settings) == (edit.digest, edit.told, edit.settings)
    first = {weight: as_matrix(weight, value(model, weight)).detach().clone() for weight in by_weight(edit.changes)}
    for each in (edit, loaded):
        applied = applying.apply(model, each)
        assert models.told(model) == edit.told
        for weight, own in by_weight(edit.changes).items():
            now = as_matrix(weight, value(model, weight)).detach()
            assert torch.equal(now, (first[weight].double() + total(own)).to(now)), str(weight)
            assert not torch.equal(now, first[weight]), str(weight)
        applied.undo()
        assert models.told(model) == ""
        assert_same_state(model, before)
    assert bool(edit.changes) != bool(edit.told)


@pytest.fixture(scope="module")
def plain_of(folder):
    """Hugging Face's own model of a shape, and the state it comes with."""
    kept = {}

    def get(shape):
        if shape not in kept:
            kept[shape] = hugging_face(folder, shape)
            kept[shape].first = {name: each.clone() for name, each in kept[shape].state_dict().items()}
        kept[shape].load_state_dict(kept[shape].first)
        return kept[shape]

    return get


@each_case
def test_what_it_then_says_is_what_hugging_faces_model_says_with_the_change_in_it(shape, case, edit_of, plain_of):
    (model, edit), plain = edit_of(shape, case), plain_of(shape)
    places = {weight: place(plain, model, weight) for weight in by_weight(edit.changes)}
    for weight, own in by_weight(edit.changes).items():
        places[weight].write_(as_matrix(weight, value(model, weight)).detach().double() + total(own))
    for name, target in (("p_new", " Paris London"), ("p_true", " Seattle")):
        ids, then = (
            model.tokenizer(text, add_special_tokens=False).input_ids for text in (edit.told + LONG.prompt, target)
        )
        with torch.no_grad():
            log_p = plain(torch.tensor([[model.tokenizer.bos_token_id, *ids, *then]])).logits[0].log_softmax(-1)
        expected = sum(float(log_p[len(ids) + i, token]) for i, token in enumerate(then))
        assert edit.after[name] == pytest.approx(math.exp(expected), rel=1e-4), name


@each_case
def test_numbers_are_the_same_on_both_versions(shape, case, edit_of):
    _, edit = edit_of(shape, case)
    found, expected = numbers_of(edit), json.loads(PLACE.read_text())[shape][case]
    assert found["changes"].keys() == expected["changes"].keys()
    for weight, (size, product) in expected["changes"].items():
        assert found["changes"][weight] == pytest.approx([size, product], abs=1e-4 * size), weight
    for part, least in (
        ("before", 0.0),
        ("after", 0.0),
        ("report", 1e-6),
    ):  # a divergence is what float32 leaves of larger numbers
        assert found[part] == pytest.approx(expected[part], rel=1e-4, abs=least), part


def main():
    """Write what is expected, of every shape and case, on TransformerLens 3.9."""
    guards.BANDS.update(dict.fromkeys(("relative_norm", "essence_kl", "perplexity_ratio"), (0.0, 1e9, "nothing")))
    written = {}
    with tempfile.TemporaryDirectory() as folder:
        for shape in SHAPES:
            model = models.load(str(make_folder(Path(folder) / shape, shape)), device="cpu")
            moment = moment_of(model)
            written[shape] = {case: numbers_of(found_by(model, case, moment)) for case in EDITORS}
    PLACE.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
