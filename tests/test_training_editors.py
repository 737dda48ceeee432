"""How MEND and KE are trained: on what, for what, and that a stopped training goes on to the same bits."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mechedit import editing, models, weights
from mechedit.editors import named
from mechedit.editors.trained import data as datas
from mechedit.editors.trained import state as states
from mechedit.editors.trained import training
from mechedit.editors.trained.data import TrainingError, drawn, of_facts, of_texts, some, split
from mechedit.editors.trained.factors import factors
from mechedit.editors.trained.objective import Multiplier, losses
from mechedit.editors.trained.rows import Rows
from mechedit.facts import Fact
from mechedit.files import FileError
from mechedit.models import Blocks
from mechedit.settings import KeTraining, MendSettings, MendTraining
from tests.command_line import command_line
from tests.conftest import FACT, widen_bands
from tests.killing import killed_after
from tests.trained import by_hand, scrambled

PLACES = ("Seattle", "Paris", "London", "Berlin")
FACTS = [
    Fact(f"{name} {kind}", template, true, new, (f"We saw that {template}".replace("{}", f"{name} {kind}"),), relation=template)
    for number, name in enumerate(("The Needle", "The Tower", "Steve", "Megan", "Apple", "Rome"))
    for kind, template, true, new in (
        ("Hill", "{} is located in the city of", PLACES[number % 4], PLACES[(number + 1) % 4]),
        ("Hill", "{} plays the", "piano", "violin"),
        ("Park", "{} is located in the city of", PLACES[number % 4], PLACES[(number + 2) % 4]),
    )
]  # fmt: skip
QUICK = {
    "steps": 4,
    "batch": 3,
    "validation": 2,
    "evaluation": 3,
    "validate_every": 2,
    "checkpoint_every": 1,
    "warmup": 0,
}
MEND = MendTraining(rank=4, edit_rate=0.01, learning_rate=1e-3, **QUICK)
KE = KeTraining(lstm=4, condition=6, hidden=5, **QUICK)


def test_parts_share_no_subject_and_the_first_facts_are_for_reports():
    facts = [replace(FACTS[0], subject="THE NEEDLE HILL"), *FACTS]
    train, validation, held = split(facts, MEND)
    assert held == facts[:3]
    assert validation == [facts[3], facts[4]]  # The Needle Park, and the first of the Tower's
    assert [fact.subject for fact in train][:2] == ["The Tower Park", "Steve Hill"]
    names = [{fact.subject.lower() for fact in part} for part in (train, validation, held)]
    assert len(set.union(*names)) == sum(map(len, names))
    with pytest.raises(TrainingError, match="0 are left to train on. Give more facts, or lower evaluation"):
        split(facts[:5], MEND)


def test_what_is_to_stay_is_of_another_subject_and_of_what_is_wanted(model):
    found = of_facts(model, [*FACTS, replace(FACT, target_new=None)], MEND)
    assert found.report["evaluation"] == {"facts": 3, "subjects": 2}
    assert found.report["left out"] == 1 + len(FACTS) - sum(found.report[part]["facts"] for part in ("train", "validation", "evaluation"))  # fmt: skip
    unrelated = {each.unrelated: each for each in found.train}
    stream = torch.Generator().manual_seed(0)
    for case in drawn(found, some(found, 60, stream), MEND, stream):
        other = unrelated[case.unrelated]
        assert other.subject != case.example.subject
        assert other.kind != case.example.kind
        assert case.equivalent in case.example.equivalents
    near = replace(MEND, locality="near")
    again = [(case.example, unrelated[case.unrelated]) for case in drawn(found, some(found, 60, stream), near, stream)]
    assert all((a.kind, a.answer) == (b.kind, b.answer) and a.subject != b.subject for a, b in again if len(found.near[a.kind, a.answer]) > 2)  # fmt: skip


def test_of_texts_the_model_goes_on_and_equivalent_is_what_lacks_a_part_of_the_beginning(model, tmp_path):
    own = replace(MEND, texts=9, text_tokens=3, text_context=12, validation=2)
    for found in (of_texts(model, own), datas.read(model, _text(tmp_path), own)):
        assert found.report == {"train": {"texts": 7}, "validation": {"texts": 2}}
        for each in found.train:
            assert len(each.edit.target) == 3
            for equivalent in each.equivalents:
                assert equivalent.target == each.edit.target
                body, head = equivalent.prompt, each.edit.prompt
                bos = 1 if body[0] == head[0] == model.tokenizer.bos_token_id else 0
                assert head[-(len(body) - bos) :] == body[bos:]
                assert len(head) - len(body) <= 4
            assert (*each.unrelated.prompt, *each.unrelated.target) == (*each.edit.prompt, *each.edit.target)
        assert len({each.subject for each in (*found.train, *found.validation)}) == 9
    others = of_texts(model, replace(own, text_targets="others"))
    mine, theirs = ((*each.validation, *each.train) for each in (of_texts(model, own), others))
    assert [each.edit.target for each in theirs] == [each.edit.target for each in (*mine[1:], mine[0])]
    assert [each.edit.prompt for each in theirs] == [each.edit.prompt for each in mine]
    assert [each.unrelated for each in theirs] == [each.unrelated for each in mine]
    assert theirs[0].condition[-3:] == theirs[0].edit.target
    with pytest.raises(TrainingError, match="are too few for a validation on 2. Give more text"):
        of_texts(model, replace(own, texts=3))
    (tmp_path / "short.txt").write_text("The Space Needle")
    with pytest.raises(TrainingError, match="0 texts of 12 tokens are too few"):
        datas.read(model, str(tmp_path / "short.txt"), own)
    with pytest.raises(TrainingError, match="no text in UTF-8"):
        datas.read(model, str(tmp_path / "none.txt"), own)


def _text(folder):
    path = folder / "text.txt"
    path.write_text("\n".join(f"The Space Needle is located in the city of Seattle {n}." for n in range(40)))
    return str(path)


def plain(model, line):
    """log p of every token where one of the line's target is read, in a whole pass."""
    tokens = torch.tensor([[*line.prompt, *line.target[:-1]]])
    return model(tokens)[0, len(line.prompt) - 1 :].float().log_softmax(-1), torch.tensor(line.target)


@pytest.mark.parametrize("editor", ["mend", "ke"])
def test_the_losses_are_those_of_the_model_with_the_edit_written_into_it(model, editor):
    settings = MEND if editor == "mend" else KE
    trained = states.new(model, editor, settings)
    scrambled(trained.network)
    found = of_facts(model, FACTS, settings)
    stream = torch.Generator().manual_seed(0)
    cases = list(drawn(found, some(found, 3, stream), settings, stream))
    with models.frozen(model), torch.no_grad():
        got = {training_: losses(model, trained, cases, Blocks(model), training=training_) for training_ in (True, False)}  # fmt: skip
    for number, case in enumerate(cases):
        with torch.no_grad():
            before, _ = plain(model, case.unrelated)
        own, _ = factors(Rows(model, [case.example.edit], 1), trained.weights)
        ids = torch.tensor(case.example.condition)
        with torch.no_grad():
            terms = trained.network.terms(own, [models.embed(model, ids[None])[0]])
        with weights.restored(model, *terms) as originals, torch.no_grad():
            for weight, term in terms.items():
                weights.write_(model, weight, originals[weight], (term.left[0].T @ term.right[0]).double())
            (log_p, ids), (same, own_ids), (after, _) = (plain(model, line) for line in (case.equivalent, case.example.edit, case.unrelated))  # fmt: skip
        nll = [-each.gather(1, which[:, None]).mean() for each, which in ((log_p, ids), (same, own_ids))]
        kl = (before.exp() * (before - after)).sum(-1).mean()
        assert got[False].edit[number].item() == pytest.approx(nll[0].item(), rel=1e-4)
        assert got[False].locality[number].item() == pytest.approx(kl.item(), rel=1e-3, abs=1e-6)
        assert got[False].says[number].item() == float((log_p.argmax(-1) == ids).all())
        smooth = [0.9 * one - 0.1 * each.mean() for one, each in zip(nll, (log_p, same), strict=True)]
        expected = nll[0] if editor == "mend" else (smooth[0] + smooth[1]) / 2
        assert got[True].edit[number].item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_losses_are_weighed_and_the_multiplier_goes_up_where_the_network_goes_down():
    edit, locality = (torch.tensor([2.0, 4.0], requires_grad=True), torch.tensor([0.5, 1.5], requires_grad=True))
    assert Multiplier(replace(MEND, edit_weight=0.5, locality_weight=3.0))(edit, locality).item() == pytest.approx(0.5 * 3 + 3 * 1)  # fmt: skip
    held = Multiplier(replace(KE, margin=0.25))
    loss = held(edit, locality)
    assert loss.item() == pytest.approx(3 + 1 * (1 - 0.25))
    by_alpha, by_locality = torch.autograd.grad(loss, [held.alpha, locality])
    assert by_alpha.item() == pytest.approx(
        -(1 - 0.25)
    )  # descended, alpha rises while the divergence is above the margin
    assert by_locality.tolist() == pytest.approx([0.5, 0.5])
    with torch.no_grad():
        held.alpha.fill_(-3)
    held.settle()
    assert held.alpha.item() == 0
    held.validated(0.9)
    assert held.margin.item() == pytest.approx(0.25)
    held.validated(0.95)
    assert held.margin.item() == pytest.approx(0.25 * 0.8)
    for _ in range(60):
        held.validated(1.0)
    assert held.margin.item() == pytest.approx(1e-5)


def test_which_rates_which_parameters_have(model):
    def groups(editor, settings):
        made = states.new(model, editor, settings)
        found = training._optimisers(made, Multiplier(settings))
        names = {id(each): name for name, each in made.network.named_parameters()}
        return [
            (type(each).__name__, group["lr"], sorted({names.get(id(own), "alpha") == "rates" for own in group["params"]}))
            for each in found
            for group in each.param_groups
        ]  # fmt: skip

    policies = MendTraining.bundles["policy"]
    assert groups("mend", MendTraining(**policies["paper"])) == [("Adam", 1e-6, [False]), ("Adam", 1e-4, [True])]
    published = groups("mend", MendTraining(**policies["published"]))
    assert published == [("Adam", 1e-6, [False, True]), ("Adam", 1e-4, [True])]
    policies = KeTraining.bundles["policy"]
    assert groups("ke", KeTraining(**policies["paper"])) == [("RMSprop", 3e-4, [False]), ("RMSprop", 0.1, [False])]
    assert groups("ke", KeTraining(**policies["published"])) == [("Adam", 1e-5, [False])]


@pytest.mark.anywhere
def test_rates_rise_and_fall_where_there_is_a_warm_up():
    settings = MendTraining(steps=10, warmup=4)
    assert [training._share(settings, step) for step in range(10)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])  # fmt: skip
    assert training._share(MendTraining(steps=10, warmup=0), 9) == 1


def test_gradients_add_up_are_cut_and_left_out_where_they_are_no_numbers(model, monkeypatch):
    found = of_facts(model, FACTS, MEND)

    def stepped(**other):
        settings = replace(MEND, **other)
        run = training._Run.begun(model, states.new(model, "mend", settings), found)
        taken = []
        monkeypatch.setattr(run, "_descend", lambda parameters, gradients, factor: taken.append((gradients, factor)))
        with models.frozen(model):
            run.take_step()
        return run, taken

    (_, [(whole, _)]), (_, [(parts, factor)]) = stepped(), stepped(together=2, clip=1e-3)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert factor == pytest.approx(1e-3 / float(torch.stack([each.norm() for each in parts]).norm()), rel=1e-2)
    monkeypatch.setattr(Multiplier, "forward", lambda self, edit, locality: edit.mean() * torch.nan)
    run, taken = stepped()
    assert (run.step, run.skipped, taken) == (1, 1, [])


@pytest.mark.parametrize("form", ["paper", "published"])
def test_statistics_are_made_before_or_follow_the_training(model, form, tmp_path):
    settings = replace(MEND, form=form, validate_every=4)
    found = of_facts(model, FACTS, settings)
    path = training.train(model, "mend", found, tmp_path, settings)
    seen = [each for name, each in states.load(path).network.state_dict().items() if name.endswith("seen")]
    edits = len(found.train) if form == "paper" else settings.steps * settings.batch
    stream = training.generator(settings.seed, "statistics")
    tokens = 0
    if form == "paper":
        examples = some(found, edits, stream)
    else:
        examples = [each for step in range(settings.steps) for each in some(found, settings.batch, training.generator(settings.seed, "step", str(step)))]  # fmt: skip
    for each in examples:
        own, _ = factors(Rows(model, [each.edit], 1), states.new(model, "mend", settings).weights)
        tokens += sum(int(one.count.sum()) for weight, one in own.items() if weight.name == "mlp.W_in")
    assert tokens in [int(each) for each in seen]


class Stopped(Exception):
    """Stands for a power cut."""


def stop_at(moments):
    """A progress callback that stops the training when so many steps were begun, once each."""
    left = set(moments)

    def progress(what, done, of):
        if what == "training" and done in left:
            left.discard(done)
            raise Stopped

    return progress


@pytest.mark.parametrize(
    ("editor", "settings"),
    [
        ("mend", MEND),
        ("mend", replace(MEND, form="published")),
        ("ke", KE),
        ("ke", replace(KE, form="published", embeddings="trained")),
    ],
)
def test_a_stopped_training_ends_in_the_same_bytes(model, editor, settings, tmp_path):
    found = of_facts(model, FACTS, settings)
    whole = training.train(model, editor, found, tmp_path / "whole", settings)
    progress = stop_at((1, 2, 3))
    for _ in range(3):
        with pytest.raises(Stopped):
            training.train(model, editor, found, tmp_path / "cut", settings, progress=progress)
        assert (tmp_path / "cut" / "checkpoint.safetensors").is_file()
    cut = training.train(model, editor, found, tmp_path / "cut", settings, progress=progress)
    assert cut.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "cut" / "checkpoint.safetensors").exists()
    logs = [json.loads((tmp_path / name / "training.json").read_text())["log"] for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    assert [each["step"] for each in logs[0]] == [2, 4]
    before = cut.stat().st_mtime_ns
    assert training.train(model, editor, found, tmp_path / "cut", settings) == cut
    assert cut.stat().st_mtime_ns == before


def test_a_checkpoint_of_another_training_or_a_damaged_one_is_refused(model, load, tmp_path):
    found = of_facts(model, FACTS, MEND)
    with pytest.raises(Stopped):
        training.train(model, "mend", found, tmp_path, MEND, progress=stop_at((2,)))
    for wrong, message in (
        ({"form": "published"}, "was trained with another form"),
        ({"rank": 3, "learning_rate": 1.0}, "with another learning_rate, rank"),
        ({"layers": (0,)}, "is of another weights"),
    ):
        with pytest.raises(TrainingError, match=message):
            training.train(model, "mend", found, tmp_path, replace(MEND, **wrong))
    with pytest.raises(TrainingError, match="trained on other data"):
        training.train(model, "mend", of_facts(model, FACTS[:-1], MEND), tmp_path, MEND)
    with pytest.raises(TrainingError, match="is of another editor"):
        training.train(model, "ke", found, tmp_path, KE)
    with pytest.raises(TrainingError, match="is of another model"):
        training.train(load("gptj"), "mend", of_facts(load("gptj"), FACTS, MEND), tmp_path, MEND)
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    for cut in (0, 9, len(whole) // 3, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(FileError, match="truncated or no safetensors"):
            training.train(model, "mend", found, tmp_path, MEND)
    path.write_bytes(whole)
    done = training.train(model, "mend", found, tmp_path, MEND)
    with pytest.raises(TrainingError, match="was trained with another form"):
        training.train(model, "mend", found, tmp_path, replace(MEND, form="published"))
    with pytest.raises(TrainingError, match="has what was trained for the editor mend"):
        training.train(model, "ke", found, tmp_path, KE)
    assert states.load(done).seen(["Rome Hill", FACTS[0].subject, "nobody"]) == [True, False, False]


def test_training_stops_when_validations_get_no_better_and_keeps_the_best(model, tmp_path):
    settings = replace(MEND, steps=30, validate_every=1, patience=3, learning_rate=0.1, rate_learning_rate=0.1)
    path = training.train(model, "mend", of_facts(model, FACTS, settings), tmp_path, settings)
    log = json.loads((tmp_path / "training.json").read_text())["log"]
    best = min(log, key=lambda each: each["loss"])
    assert states.load(path).record["training"]["best"] == best
    assert len(log) == best["step"] + 4 < 30


def test_a_training_whose_validations_are_no_numbers_says_so(model, tmp_path):
    settings = replace(MEND, steps=2, edit_rate=1e30)
    with pytest.raises(TrainingError, match="no validation gave a number. Lower learning_rate or edit_rate"):
        training.train(model, "mend", of_facts(model, FACTS, settings), tmp_path, settings)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_number_format_of_the_products_is_chosen(model, tmp_path, precision):
    settings = replace(MEND, steps=2, precision=precision)
    found = of_facts(model, FACTS, settings)
    trained, stream = by_hand(model, "mend"), torch.Generator().manual_seed(0)
    trained.record["settings"]["precision"] = precision
    cases = list(drawn(found, some(found, 3, stream), settings, stream))
    with models.frozen(model), torch.no_grad():
        own = losses(model, trained, cases, Blocks(model), training=False).edit
        trained.record["settings"]["precision"] = "float32"
        exact = losses(model, trained, cases, Blocks(model), training=False).edit
    assert torch.equal(own, exact) == (precision == "float32")
    torch.testing.assert_close(own, exact, rtol=0.1, atol=0.2)


def test_on_the_organism_a_few_steps_teach_mend_to_edit(tmp_path, monkeypatch):
    from mechedit import sources

    widen_bands(monkeypatch)
    model, world = models.load("organism", device="cpu"), sources.named("organism")
    settings = MendTraining(steps=20, batch=8, evaluation=10, validation=10, validate_every=20, rank=32, learning_rate=1e-3, edit_rate=1e-2, rate_learning_rate=1e-2, warmup=0)  # fmt: skip
    path = training.train(model, "mend", of_facts(model, world[:160], settings), tmp_path, settings)
    best = states.load(path).record["training"]["best"]
    assert best["success"] >= 0.7
    edited = editing.edit(model, world[0], named("mend"), MendSettings(checkpoint=str(tmp_path), guard="warn"))
    assert edited.details["trained_on"] == 0
    assert edited.after["p_new"] > 20 * edited.before["p_new"] > 0


@pytest.fixture
def run(folder, capsys, monkeypatch):
    return command_line(folder, capsys, monkeypatch)


def _facts(folder):
    path = folder / "facts.json"
    path.write_text(json.dumps([{name: value for name, value in vars(fact).items() if value} for fact in FACTS]))
    return str(path)


def test_the_command_trains_reports_and_what_it_made_edits(run, tmp_path):
    few = ("--evaluation", "3", "--validation", "2", "--steps", "2", "--validate-every", "1", "--batch", "2")
    command = ("train-editor", "mend", "--data", _facts(tmp_path), *few, "--rank", "3", "--edit-rate", "0.05")
    status, out, _ = run(*command, "--out", str(tmp_path / "made"), "--json", str(tmp_path / "it.json"))
    assert status == 0
    assert "evaluation: 3 facts, 2 subjects" in out
    assert "says the target" in out
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"mend.safetensors", "training.json", "training.png", "training.svg"}  # fmt: skip
    record = json.loads((tmp_path / "it.json").read_text())
    assert record["settings"]["rank"] == 3
    edit = (
        "edit",
        FACT.prompt,
        "--subject",
        FACT.subject,
        "--target",
        "Paris",
        "--true",
        "Seattle",
        "--editor",
        "mend",
    )
    status, out, _ = run(*edit, "--checkpoint", str(tmp_path / "made"), "--guard", "warn")
    assert status == 0
    assert "mlp.W_in, mlp.W_out of layers 1, 2, 3" in " ".join(out.split())
    status, out, _ = run("inspect", str(tmp_path / "made" / "mend.safetensors"), model=False)
    assert (status, "trained-editor" in out) == (0, True)
    status, _, err = run("train-editor", "mend", "--data", _facts(tmp_path), *few, "--policy", "published", "--out", str(tmp_path / "made"))  # fmt: skip
    assert (status, "was trained with another" in err) == (2, True)
    status, _, err = run(*edit)
    assert (status, "Train one with `mechedit train-editor mend" in err) == (2, True)
    status, _, err = run("train-editor", "ke", "--data", "nowhere.json", "--out", str(tmp_path / "ke"))
    assert (status, len(err.strip().splitlines())) == (2, 1)


SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
from mechedit import models
from mechedit.editors.trained import training
from mechedit.editors.trained.data import of_facts
from tests.test_training_editors import FACTS, MEND
from dataclasses import replace
model, settings = models.load({folder!r}, device="cpu"), replace(MEND, steps=150, form="published")
training.train(model, "mend", of_facts(model, FACTS, settings), sys.argv[1], settings)
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)  # twelve processes that load torch
def test_killed_at_ten_random_moments_it_ends_in_the_same_bytes(folder, tmp_path):
    root = str(Path(__file__).parents[1])
    script = SCRIPT.format(root=root, folder=str(folder("gpt2")))
    environment = {**os.environ, "PYTHONPATH": root, "MECHEDIT_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "peace")], check=True, env=environment)
    draws, war = random.Random(0), tmp_path / "war"
    for _ in range(10):
        command = [sys.executable, "-c", script, str(war)]
        killed_after(command, environment, war / "checkpoint.safetensors", draws.random() * 0.2)
    assert not (war / "mend.safetensors").exists(), "it was killed in the middle"
    subprocess.run([sys.executable, "-c", script, str(war)], check=True, env=environment)
    assert (war / "mend.safetensors").read_bytes() == (tmp_path / "peace" / "mend.safetensors").read_bytes()
