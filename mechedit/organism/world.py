"""An invented world: who and what there is in it, what is true of them, and every sentence that says so.

Names are made of syllables, so that nothing is known about them but what the world says. People share first and last names,
some towns have one short name and some two words, firms are named after people. Each of twelve relations has a closed set of
answers, some of several words, and eight phrasings. What is true is drawn once, by the seed alone. Of each fact two phrasings,
drawn for it, are never taught; other subjects' facts teach what they mean.

A corpus is a sequence of sentences drawn with equal probability from a finite list, so the entropy of a sentence is known: the
logarithm of the list's length. Beside facts it has tasks that need no facts: copying, ordering, sums.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from typing import Any

from mechedit.errors import MecheditError
from mechedit.facts import Fact, linked
from mechedit.organism.draws import Draws

__all__ = ["HELD_OUT", "World", "WorldError", "WorldSettings", "make"]

HELD_OUT = 2  # phrasings of each fact that are never taught, never the first
ONSETS = ("b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "gl", "st", "tr")
NUCLEI = ("a", "e", "i", "o", "u", "ai", "ea")
CODAS = ("", "", "", "l", "n", "r", "s", "m")
TASKS = ("copy", "order", "sum")
LETTERS = "abcdefghijklmnop"
MOST_PEOPLE = 8000  # one in fourteen has a name of one syllable, and there are 840 such names


class WorldError(MecheditError, ValueError):
    """A world that cannot be made."""


@dataclass(frozen=True)
class WorldSettings:
    """How large the world is."""

    seed: int = 0
    people: int = 1400
    towns: int = 300
    firms: int = 300
    tasks: int = 6000  # different sentences of tasks

    def __post_init__(self) -> None:
        if min(self.people, self.towns, self.firms) < 60:
            raise WorldError("a world needs at least 60 people, 60 towns and 60 firms, of which answers are chosen.")
        if self.people > MOST_PEOPLE or self.firms > 2 * max(60, self.people // 8):
            raise WorldError(
                f"there are names for {MOST_PEOPLE} people at most, and for two firms of each of the {max(60, self.people // 8)} last "
                f"names; found {self.people} people and {self.firms} firms."
            )


@dataclass(frozen=True)
class Relation:
    """What can be asked of a kind of subject. Every phrasing ends where the answer begins."""

    name: str
    kind: str
    answers: tuple[str, ...]
    phrasings: tuple[str, ...]
    attributes: tuple[str, ...]  # what is said of an answer by itself


@dataclass(frozen=True)
class World:
    """All that is true. `truth[subject][relation]` is the answer, `untaught` has the phrasings that never say it."""

    settings: WorldSettings
    subjects: dict[str, tuple[str, ...]]
    relations: tuple[Relation, ...]
    truth: dict[str, dict[str, str]]
    untaught: dict[str, dict[str, tuple[str, ...]]]

    def taught(self, relation: Relation, subject: str) -> tuple[str, ...]:
        """The phrasings that say this fact in the corpus."""
        return tuple(each for each in relation.phrasings if each not in self.untaught[subject][relation.name])

    @cached_property
    def facts(self) -> tuple[Fact, ...]:
        """Each fact once, in its first phrasing, with an answer to put in its place, held-out phrasings and neighbours; in an
        order that mixes the relations."""
        draws = Draws(self.settings.seed, "facts")
        found = []
        for relation in self.relations:
            by_answer: dict[str, list[str]] = {}
            for subject in self.subjects[relation.kind]:
                by_answer.setdefault(self.truth[subject][relation.name], []).append(subject)
            for subject in self.subjects[relation.kind]:
                answer = self.truth[subject][relation.name]
                alike = [other for other in draws.some(by_answer[answer], 11) if other != subject][:10]
                target_new = draws.choice([other for other in relation.answers if other != answer])
                found.append(
                    Fact(
                        subject=subject,
                        template=relation.phrasings[0],
                        target_true=answer,
                        target_new=target_new,
                        paraphrases=tuple(
                            phrasing.replace("{}", subject) for phrasing in self.untaught[subject][relation.name]
                        ),
                        neighbours=tuple(relation.phrasings[0].replace("{}", other) for other in alike),
                        generations=tuple(
                            phrasing.replace("{}", subject) for phrasing in self.taught(relation, subject)[1:4]
                        ),
                        relation=relation.name,
                        id=f"{relation.name}/{subject}",
                        target_new_id=target_new,
                    )
                )
        return linked(draws.shuffled(found))

    def sentences(self) -> Iterator[str]:
        """Every sentence that is taught, once."""
        return (sentence for sentence, _ in self.statements())

    def statements(self) -> Iterator[tuple[str, tuple[int, int] | None]]:
        """Every sentence that is taught, once, and the range of characters of the subject whose fact it says, if any."""
        for relation in self.relations:
            for subject in self.subjects[relation.kind]:
                for phrasing in self.taught(relation, subject):
                    begin = phrasing.index("{}")
                    said = f"{phrasing.replace('{}', subject)} {self.truth[subject][relation.name]}."
                    yield said, (begin, begin + len(subject))
        for relation in self.relations:
            for answer in relation.answers:
                for attribute in relation.attributes:
                    yield attribute.replace("{}", answer), None
        yield from ((task, None) for task in self.tasks())

    def tasks(self) -> Iterator[str]:
        """Sentences that need no facts: copying, ordering, sums. Each is different."""
        draws = Draws(self.settings.seed, "tasks")
        seen: set[str] = set()
        while len(seen) < self.settings.tasks:
            kind = TASKS[len(seen) % len(TASKS)]
            if kind == "sum":
                a, b = draws.below(90), draws.below(90)
                sentence = f"The sum of {a} and {b} is {a + b}."
            else:
                letters = [draws.choice(LETTERS) for _ in range(5)]
                done = letters if kind == "copy" else sorted(letters)
                word = "copied" if kind == "copy" else "in order"
                sentence = f"The letters {' '.join(letters)} {word} are {' '.join(done)}."
            if sentence not in seen:
                seen.add(sentence)
                yield sentence

    @property
    def entropy(self) -> float:
        """Nats a sentence of the corpus, which draws every sentence with the same probability."""
        return math.log(sum(1 for _ in self.sentences()))

    def corpus(self, sentences: int, part: str = "train") -> Iterator[str]:
        """So many sentences, drawn with replacement; `part` names the stream."""
        every, draws = list(self.sentences()), Draws(self.settings.seed, "corpus", part)
        for _ in range(sentences):
            yield draws.choice(every)

    def counterfact(self) -> list[dict[str, Any]]:
        """The facts as COUNTERFACT's nested records."""
        return [
            {
                "case_id": index,
                "requested_rewrite": {
                    "prompt": fact.template,
                    "relation_id": fact.relation,
                    "target_new": {"str": fact.target_new, "id": fact.target_new},
                    "target_true": {"str": fact.target_true, "id": fact.target_true},
                    "subject": fact.subject,
                },
                "paraphrase_prompts": list(fact.paraphrases),
                "neighborhood_prompts": list(fact.neighbours),
                "attribute_prompts": [],
                "generation_prompts": list(fact.generations),
            }
            for index, fact in enumerate(self.facts)
        ]

    def zsre(self) -> list[dict[str, Any]]:
        """The facts as zsRE records in the form of MEND."""
        return [
            {
                "subject": fact.subject,
                "src": fact.prompt,
                "rephrase": fact.paraphrases[0],
                "alt": fact.target_new,
                "answers": [fact.target_true],
                "loc": other.prompt,
                "loc_ans": other.target_true,
            }
            for fact, other in zip(self.facts, [*self.facts[1:], self.facts[0]], strict=True)
        ]

    def snippets(self) -> dict[str, dict[str, list[str]]]:
        """For each relation and answer, what the world says of that answer: the reference texts of consistency scores."""
        return {
            relation.name: {
                answer: [each.replace("{}", answer) for each in relation.attributes] for answer in relation.answers
            }
            for relation in self.relations
        }

    def digest(self) -> str:
        """SHA-256 of everything that is true and said."""
        whole = json.dumps([self.truth, list(self.sentences()), self.counterfact()], ensure_ascii=False)
        return hashlib.sha256(whole.encode()).hexdigest()


def make(settings: WorldSettings | None = None) -> World:
    """The world of these settings; the same on every machine, and made once in a process."""
    return _made(settings or WorldSettings())


@lru_cache(maxsize=4)
def _made(settings: WorldSettings) -> World:
    draws = Draws(settings.seed, "names")
    taken: set[str] = set()
    first = [_word(draws, 2, taken) for _ in range(max(40, settings.people // 12))]
    last = [_word(draws, 2, taken) for _ in range(max(60, settings.people // 8))]
    people = _different(settings.people, lambda: _person(draws, first, last, taken))
    towns = _different(settings.towns, lambda: _town(draws, taken))
    firms = _different(settings.firms, lambda: f"{draws.choice(last)} {draws.choice(('Works', 'Brothers', 'and Sons', 'Trading', 'Foundry'))}")  # fmt: skip
    words = json.loads(resources.files("mechedit").joinpath("data/world.json").read_text(encoding="utf-8"))
    answers = {name: tuple(each) for name, each in words["answers"].items()} | {
        "birthplace": tuple(draws.some(towns, 40)),
        "language": tuple(f"{_word(draws, 2, taken)}ish" for _ in range(10)),
        "employer": tuple(draws.some(firms, 30)),
        "country": tuple(_word(draws, 3, taken) + ("" if index % 3 else " Republic") for index in range(12)),
        "river": tuple(_word(draws, 1, taken) for _ in range(16)),
        "seat": tuple(draws.some(towns, 25)),
        "owner": tuple(draws.some(last, 20)),
    }
    subjects = {"person": tuple(people), "town": tuple(towns), "firm": tuple(firms)}
    relations = tuple(
        Relation(each["name"], each["kind"], answers[each["name"]], tuple(each["phrasings"]), tuple(each["attributes"]))
        for each in words["relations"]
    )
    truth: dict[str, dict[str, str]] = {name: {} for names in subjects.values() for name in names}
    untaught: dict[str, dict[str, tuple[str, ...]]] = {name: {} for name in truth}
    for relation in relations:
        drawn, left_out = (Draws(settings.seed, what, relation.name) for what in ("truth", "untaught"))
        for subject in subjects[relation.kind]:
            truth[subject][relation.name] = drawn.choice(relation.answers)
            untaught[subject][relation.name] = tuple(left_out.some(relation.phrasings[1:], HELD_OUT))
    return World(settings, subjects, relations, truth, untaught)


def _word(draws: Draws, syllables: int, taken: set[str]) -> str:
    """A name of so many syllables that nothing else has."""
    while True:
        parts = [draws.choice(ONSETS) + draws.choice(NUCLEI) + draws.choice(CODAS) for _ in range(syllables)]
        word = "".join(parts).capitalize()
        if word not in taken:
            taken.add(word)
            return word


def _person(draws: Draws, first: list[str], last: list[str], taken: set[str]) -> str:
    """Mostly first and last name, which others share; one in fourteen goes by a single name, one in seven has a middle name."""
    form = draws.below(14)
    if form == 0:
        return _word(draws, 1, taken)
    middle = f" {draws.choice(first)}" if form < 3 else ""
    return f"{draws.choice(first)}{middle} {draws.choice(last)}"


def _town(draws: Draws, taken: set[str]) -> str:
    """A name of its own, with one of a few words beside it for one in three."""
    name = _word(draws, 2, taken)
    form = draws.below(6)
    return f"Port {name}" if form == 0 else f"{name} Hill" if form == 1 else name


def _different(n: int, draw: Callable[[], str]) -> list[str]:
    """`n` different names."""
    found: dict[str, None] = {}
    while len(found) < n:
        found[draw()] = None
    return list(found)
