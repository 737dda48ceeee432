from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from mechedit import models
from mechedit.organism import judge as judging
from mechedit.organism.train import TrainSettings, main, train
from mechedit.organism.world import WorldSettings, make

TINY_WORLD = WorldSettings(people=60, towns=60, firms=60, tasks=30)
TINY = TrainSettings(
    layers=2, width=48, heads=4, vocabulary=400, context=112, batch=8, steps=60, warmup=5, autocast=False
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = train(TINY, tmp_path_factory.mktemp("organism"), TINY_WORLD)
    return folder, models.load(str(folder), device="cpu"), make(TINY_WORLD)


@torch.no_grad()
def says(model, prompt, answer):
    """Whether greedy reading of the whole text puts every token of the answer first, one prompt at a time."""
    both = model.to_tokens(f"{prompt} {answer}")
    alone = model.to_tokens(prompt).shape[1]
    said = model(both)[0].argmax(-1)
    return bool((said[alone - 1 : -1] == both[0, alone:]).all())


def test_shares_are_those_of_one_prompt_at_a_time(trained):
    _, model, world = trained
    found = judging.judge(model, world, facts=2, sentences=12)
    relation = world.relations[1]
    slow = {True: [], False: []}
    for subject in world.subjects[relation.kind][:2]:
        for phrasing in relation.phrasings:
            part = phrasing in world.untaught[subject][relation.name]
            slow[part].append(says(model, phrasing.replace("{}", subject), world.truth[subject][relation.name]))
    assert found.taught[relation.name] == sum(slow[False]) / 12
    assert found.held_out[relation.name] == sum(slow[True]) / 4
    assert set(found.taught) == {each.name for each in world.relations}
    assert set(found.tasks) == {"copy", "order", "sum"}
    assert found.mean("taught") == pytest.approx(sum(found.taught.values()) / 12)
    assert found.prompts == 12 * 2 * 8 + 6


def test_tasks_are_asked_for_up_to_their_answer(trained, monkeypatch):
    asked = []

    def score(model, pairs):
        asked.extend(pairs)
        return [judging_score] * len(pairs)

    judging_score = type("Score", (), {"first": (True,), "log_p": (0.0,)})()
    monkeypatch.setattr(judging, "score", score)
    _, model, world = trained
    found = judging.judge(model, world, facts=1, sentences=6)
    assert all(share == 1.0 for share in found.tasks.values())
    taught = set(world.tasks())
    assert sum(f"{prompt} {answer}." in taught for prompt, answer in asked) == 3


@torch.no_grad()
def test_nats_a_sentence_are_those_of_whole_rows(trained):
    _, model, world = trained
    drawn = list(world.corpus(12, "held out"))
    total = 0.0
    for begin in range(0, 12, 3):
        ids = model.to_tokens(" ".join(drawn[begin : begin + 3]))
        first = model.to_tokens(drawn[begin]).shape[1]
        log_p = model(ids)[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        total -= float(log_p[first - 1 :].sum())
    assert judging.judge(model, world, facts=1, sentences=12).nats == pytest.approx(total / 8, rel=1e-4)


def test_the_card_says_what_was_measured(trained):
    folder, model, world = trained
    learnt = judging.judge(model, world, facts=1, sentences=6)
    text = judging.write_card(folder, world, learnt).read_text()
    assert f"A sentence costs {learnt.nats:.2f} nats; the corpus's entropy is {world.entropy:.2f}." in text
    assert world.digest() in text
    assert "| river |" in text
    assert "`python -m mechedit.organism.train --out DIR --layers 2 --width 48" in text
    assert "--steps 60 --warmup 5 --no-autocast`" in text
    record = json.loads((folder / "training.json").read_text())
    assert record["parameters"] == sum(each.numel() for each in load_file(folder / "model.safetensors").values())


def test_the_command_trains_and_judges(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mechedit.organism.train.make", lambda settings=None: make(TINY_WORLD))
    sizes = [
        "--layers",
        "1",
        "--width",
        "16",
        "--heads",
        "2",
        "--vocabulary",
        "400",
        "--steps",
        "2",
        "--batch",
        "2",
        "--context",
        "112",
    ]
    main(["--out", str(tmp_path / "made"), *sizes, "--no-autocast"])
    assert (tmp_path / "made" / "README.md").is_file()
    assert f"wrote {tmp_path / 'made'}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="shape must be one of"):
        main(["--out", str(tmp_path / "made"), "--shape", "rnn"])
