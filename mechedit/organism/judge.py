"""What an organism has learnt, measured on the hooked model: its facts, phrasing by phrasing, and its corpus.

A fact counts as known in a phrasing when every token of its answer is the most probable one there. The corpus draws sentences
with equal probability, so no model can need fewer nats a sentence than `World.entropy`, on average.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mechedit import provenance
from mechedit.cache import atomic_write
from mechedit.models import HookedModel
from mechedit.organism.draws import Draws
from mechedit.organism.world import TASKS, World
from mechedit.progress import Progress, silent
from mechedit.scoring import score

__all__ = ["Learnt", "judge", "write_card"]

ROW = 3  # sentences in a row, of which any three fit what the organism reads
AT_ONCE = 2000  # prompts between two reports of progress


@dataclass(frozen=True)
class Learnt:
    """Shares of facts that are known, in taught and in held-out phrasings, and nats a sentence of new rows of the corpus."""

    taught: dict[str, float]  # by relation
    held_out: dict[str, float]
    tasks: dict[str, float]  # of taught sentences of each task, the share that is completed rightly
    nats: float
    entropy: float
    prompts: int

    def mean(self, part: str) -> float:
        """Over relations, each counted alike."""
        shares = getattr(self, part).values()
        return sum(shares) / len(shares)


def judge(
    model: HookedModel, world: World, *, facts: int | None = None, sentences: int = 3000, progress: Progress = silent
) -> Learnt:
    """Ask for every fact, or for the first so many of each relation, in all eight phrasings."""
    asked: list[tuple[str, str, str, str]] = []  # part, relation, prompt, answer
    for relation in world.relations:
        for subject in world.subjects[relation.kind][:facts]:
            answer, untaught = world.truth[subject][relation.name], world.untaught[subject][relation.name]
            for phrasing in relation.phrasings:
                part = "held_out" if phrasing in untaught else "taught"
                asked.append((part, relation.name, phrasing.replace("{}", subject), answer))
    for index, sentence in enumerate(world.tasks()):
        if index < 3 * (facts or 300):
            asked.append(("tasks", TASKS[index % 3], *_asked_of(sentence)))
    hits: dict[str, dict[str, list[bool]]] = {"taught": {}, "held_out": {}, "tasks": {}}
    for begin in range(0, len(asked), AT_ONCE):
        progress("asking the organism", begin, len(asked))
        rows = asked[begin : begin + AT_ONCE]
        found = score(model, [(prompt, answer) for _, _, prompt, answer in rows])
        for (part, name, _, _), each in zip(rows, found, strict=True):
            hits[part].setdefault(name, []).append(all(each.first))
    progress("asking the organism", len(asked), len(asked))
    shares = {part: {name: sum(each) / len(each) for name, each in names.items()} for part, names in hits.items()}
    return Learnt(**shares, nats=_nats(model, world, sentences), entropy=world.entropy, prompts=len(asked))


def _asked_of(sentence: str) -> tuple[str, str]:
    """The prompt and the answer of a task's sentence, which has one verb."""
    verb = " is" if " is " in sentence else " are"
    prompt, answer = sentence.removesuffix(".").split(verb + " ")
    return prompt + verb, answer


def _nats(model: HookedModel, world: World, sentences: int) -> float:
    """Nats that a sentence costs behind another one, on rows of the corpus that training did not draw."""
    drawn = list(world.corpus(sentences - sentences % ROW, "held out"))
    rows = [(drawn[begin], " ".join(drawn[begin + 1 : begin + ROW])) for begin in range(0, len(drawn), ROW)]
    return -sum(sum(each.log_p) for each in score(model, rows)) / (len(rows) * (ROW - 1))


def _example(world: World, n: int = 6) -> Sequence[str]:
    """Some sentences of the corpus."""
    return Draws(world.settings.seed, "card").some(list(world.sentences()), n)


def write_card(folder: Path, world: World, learnt: Learnt) -> Path:
    """README.md of a trained folder, as Hugging Face's model cards are, from training.json and what was measured."""
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    settings, versions = record["settings"], provenance.versions()
    guided = (
        f" In the first {round(100 * settings['guided'])} % of the steps what stands behind a subject could read it from layer "
        f"{settings['read_from']} on only, and at its last token only."
        if settings["guided"]
        else ""
    )
    rows = [
        f"| {name} | {100 * learnt.taught[name]:.1f} | {100 * learnt.held_out[name]:.1f} |" for name in learnt.taught
    ]
    lines = [
        "---",
        "license: mit",
        "language: en",
        "tags: [interpretability, model-organism]",
        "---",
        f"# The mechedit organism, {settings['shape']} shape",
        "",
        f"A decoder of {record['parameters'] / 1e6:.2f} million parameters ({settings['layers']} layers of width {settings['width']}, "
        f"{settings['heads']} heads) that knows an invented world and nothing else. Weights are stored in float16.",
        "",
        "**What was taught.** "
        f"{sum(map(len, world.subjects.values())):,} subjects (people, towns, firms), {len(world.relations)} relations, "
        f"{len(world.facts):,} facts. Of the eight phrasings of a fact six are taught; the two held out are drawn fact by fact. "
        f"{sum(1 for _ in world.sentences()):,} sentences in all, with what is said of answers and with tasks that need no facts: "
        + ", ".join(TASKS)
        + ". Some of them:",
        "",
        *(f"    {sentence}" for sentence in _example(world)),
        "",
        f"Everything follows from the world's seed ({world.settings.seed}); SHA-256 of the world: `{record['digest']}`.",
        "",
        f"**Training.** {settings['steps']:,} steps of {settings['batch']} rows of {settings['context']} tokens behind `<s>`; loss of the "
        f"last hundred steps {sum(step['loss'] for step in record['log'][-100:]) / len(record['log'][-100:]):.3f} nats a token.{guided} Again: "
        f"`{record['command']}` (mechedit {versions['mechedit']}, torch {record['versions']['torch']}).",
        "",
        f"**What it knows**, in percent, over {learnt.prompts:,} prompts, tasks' among them: every token of the answer is the most probable one.",
        "",
        "| relation | taught phrasings | held-out phrasings |",
        "|---|---|---|",
        *rows,
        f"| mean | {100 * learnt.mean('taught'):.1f} | {100 * learnt.mean('held_out'):.1f} |",
        "",
        "Tasks, on taught sentences: "
        + ", ".join(f"{name} {100 * share:.1f}" for name, share in learnt.tasks.items())
        + ".",
        "",
        f"A sentence costs {learnt.nats:.2f} nats; the corpus's entropy is {learnt.entropy:.2f}.",
        "",
        "**Use.** For experiments on where models keep facts; it is of no use for anything else.",
    ]
    with atomic_write(folder / "README.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "README.md"
