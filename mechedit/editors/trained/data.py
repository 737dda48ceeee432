"""What editors are trained on: edits, equivalent prompts, and what is to stay; nothing of what they are judged on.

Of facts: an edit is a fact's prompt and new target, equivalent are its paraphrases and the prompt itself, and what is to stay is the true
answer of another fact. The first facts are for reports, the next for validation; facts of their subjects are in no other part, and no
text of theirs is read.

Of texts: an edit is a text and the model's own continuation of it (or of another text), equivalent is the text without up to half of its
beginning, and what is to stay is another text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mechedit import generation, sources, writing
from mechedit.cache import content_key
from mechedit.corruption import generator
from mechedit.editors.trained.rows import Line, line
from mechedit.editors.trained.state import condition_text
from mechedit.errors import MecheditError
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.progress import Progress, silent
from mechedit.prompts import bare, encode, resolve_bos
from mechedit.settings import TrainingSettings

__all__ = [
    "Case",
    "Data",
    "Example",
    "TrainingError",
    "drawn",
    "of_facts",
    "of_texts",
    "passages",
    "read",
    "some",
    "split",
]

VARIANTS = 4  # of a text, with other parts of its beginning left out
SAMPLED = 128  # texts that are sampled together
TRIES = 100


class TrainingError(MecheditError, ValueError):
    """A training that cannot start or go on."""


@dataclass(frozen=True)
class Example:
    """An edit to learn from; of which kind of question it is, and what the true answer is."""

    subject: str
    kind: str
    answer: str
    edit: Line
    equivalents: tuple[Line, ...]
    unrelated: Line  # what is to stay, of an edit of another example
    condition: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """An edit, an equivalent prompt, and what is to stay."""

    example: Example
    equivalent: Line
    unrelated: Line


@dataclass(frozen=True, eq=False)
class Data:
    """Examples in parts that share no subject, and how many facts and subjects each part has."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    report: dict[str, Any]

    @cached_property
    def key(self) -> str:
        """A digest of all."""
        return content_key(repr((self.train, self.validation)))

    @cached_property
    def near(self) -> dict[tuple[str, str], list[int]]:
        """Which training examples are of one kind and answer."""
        found: dict[tuple[str, str], list[int]] = {}
        for index, each in enumerate(self.train):
            found.setdefault((each.kind, each.answer), []).append(index)
        return found


def split(facts: Sequence[Fact], settings: TrainingSettings) -> tuple[list[Fact], list[Fact], list[Fact]]:
    """Facts to train on, to validate on, and to report on: the first ones. No subject is in two parts.

    Raises:
        TrainingError: too few are left.
    """
    held = list(facts[: settings.evaluation])
    taken = {writing.folded(fact.subject) for fact in held}
    rest = [fact for fact in facts[settings.evaluation :] if writing.folded(fact.subject) not in taken]
    validation = rest[: settings.validation]
    taken |= {writing.folded(fact.subject) for fact in validation}
    train = [fact for fact in rest[settings.validation :] if writing.folded(fact.subject) not in taken]
    if len({fact.subject for fact in train}) < 2 or not validation:
        raise TrainingError(
            f"of {len(facts)} facts, {settings.evaluation} are kept for reports and {settings.validation} for validation, with all of "
            f"their subjects; {len(train)} are left to train on. Give more facts, or lower evaluation and validation."
        )
    return train, validation, held


def of_facts(
    model: HookedModel, facts: Sequence[Fact], settings: TrainingSettings, *, progress: Progress = silent
) -> Data:
    """The examples of facts, each with both targets; others are left out. Errors as in `split`, and of facts that do not fit."""
    whole = [fact for fact in facts if fact.target_new and fact.target_true]
    parts = split(whole, settings)
    train, validation, _ = parts
    subjects = [{writing.folded(fact.subject) for fact in part} for part in parts]
    assert len(set.union(*subjects)) == sum(map(len, subjects)), "no subject is in two parts"
    report = {
        name: {"facts": len(part), "subjects": len(own)}
        for name, part, own in zip(("train", "validation", "evaluation"), parts, subjects, strict=True)
    }
    left = len(facts) - sum(map(len, parts))
    made, bos = [], resolve_bos(model, settings.prepend_bos)
    for done, fact in enumerate([*train, *validation]):
        progress("reading facts", done, len(train) + len(validation))
        made.append(_example(model, fact, settings, bos))
    progress("reading facts", len(made), len(made))
    return Data(tuple(made[: len(train)]), tuple(made[len(train) :]), report | {"left out": left})


def _example(model: HookedModel, fact: Fact, settings: TrainingSettings, bos: bool) -> Example:
    new, true = str(fact.target_new), str(fact.target_true)
    lines = [line(model, prompt, new, join=fact.join, prepend_bos=bos) for prompt in (fact.prompt, *fact.paraphrases)]
    return Example(
        fact.subject,
        fact.relation or fact.template,
        true,
        lines[0],
        tuple(lines),
        line(model, fact.prompt, true, join=fact.join, prepend_bos=bos),
        tuple(encode(model, condition_text(fact, settings.form), prepend_bos=False)[0]),
    )


def of_texts(
    model: HookedModel,
    settings: TrainingSettings,
    passages: Sequence[Sequence[int]] | None = None,
    *,
    progress: Progress = silent,
) -> Data:
    """The examples of texts, given as tokens without BOS, which are cut; or of texts sampled from the model, where none are given."""
    tokens, body = settings.text_tokens, settings.text_context - settings.text_tokens
    if passages is not None:
        rows = [list(each[:body]) for each in passages if len(each) >= body][: settings.texts]
        streams = [generator(settings.seed, "continuation of a text", str(index)) for index in range(len(rows))]
        begun = [_begun(model, row, settings) for row in rows]
        said = [each for part in range(0, len(rows), SAMPLED) for each in generation.extended(model, begun[part : part + SAMPLED], tokens, streams[part : part + SAMPLED], None)]  # fmt: skip
        whole = [row + more for row, more in zip(rows, said, strict=True) if len(more) == tokens]
    else:
        whole = _sampled(model, settings, progress)
    if len(whole) < settings.validation + 2:
        raise TrainingError(f"{len(whole)} texts of {settings.text_context} tokens are too few for a validation on {settings.validation}. Give more text.")  # fmt: skip
    targets = [tuple(ids[-tokens:]) for ids in whole]
    if settings.text_targets == "others":
        targets = [*targets[1:], targets[0]]
    made = tuple(_of_text(model, index, ids, target, settings) for index, (ids, target) in enumerate(zip(whole, targets, strict=True)))  # fmt: skip
    n = settings.validation
    report = {"train": {"texts": len(made) - n}, "validation": {"texts": n}}
    return Data(made[n:], made[:n], report)


def _sampled(model: HookedModel, settings: TrainingSettings, progress: Progress) -> list[list[int]]:
    """Texts from the model, a part of them at a time."""
    found: list[list[int]] = []
    while len(found) < settings.texts:
        progress("sampling texts", len(found), settings.texts)
        n, stream = (
            min(SAMPLED, settings.texts - len(found)),
            generator(settings.seed, "texts to edit", str(len(found))),
        )
        found += generation.sample(model, n, settings.text_context, stream).tolist()
    progress("sampling texts", settings.texts, settings.texts)
    return found


def _begun(model: HookedModel, ids: Sequence[int], settings: TrainingSettings) -> list[int]:
    """A text with BOS, where the settings have it."""
    return [int(model.tokenizer.bos_token_id), *ids] if resolve_bos(model, settings.prepend_bos) else list(ids)


def _of_text(
    model: HookedModel, index: int, ids: Sequence[int], target: tuple[int, ...], settings: TrainingSettings
) -> Example:
    """A text that is to go on with the target; its own last tokens are another continuation."""
    head = ids[: -settings.text_tokens]
    stream = generator(settings.seed, "beginnings left out", str(index))
    dropped = torch.randint(max(1, len(head) // 2), (VARIANTS,), generator=stream).tolist()
    own = [Line(tuple(_begun(model, head[drop:], settings)), target) for drop in (0, *dropped)]
    first, *rest = _begun(model, ids, settings)
    return Example(f"text {index}", f"text {index}", "", own[0], tuple(own[1:]), Line((first,), tuple(rest)), (*head, *target))  # fmt: skip


def drawn(
    data: Data, examples: Sequence[Example], settings: TrainingSettings, stream: torch.Generator
) -> Iterator[Case]:
    """A case of each example: one of its equivalents, and what is to stay of a training example of another subject."""
    for example in examples:
        equivalent = example.equivalents[_below(len(example.equivalents), stream)]
        yield Case(example, equivalent, data.train[_other(data, example, settings, stream)].unrelated)


def some(data: Data, n: int, stream: torch.Generator) -> list[Example]:
    """Training examples, drawn with replacement."""
    return [data.train[index] for index in torch.randint(len(data.train), (n,), generator=stream).tolist()]


def _other(data: Data, example: Example, settings: TrainingSettings, stream: torch.Generator) -> int:
    """A training example of another subject: of another kind; or of its kind and answer, where there is one and they are wanted."""
    if settings.locality == "near":
        alike = [index for index in data.near.get((example.kind, example.answer), ()) if data.train[index].subject != example.subject]  # fmt: skip
        if alike:
            return alike[_below(len(alike), stream)]
    for _ in range(TRIES):
        index = _below(len(data.train), stream)
        if data.train[index].subject != example.subject and data.train[index].kind != example.kind:
            return index
    return next(index for index, each in enumerate(data.train) if each.subject != example.subject)


def _below(n: int, stream: torch.Generator) -> int:
    return int(torch.randint(n, (1,), generator=stream))


def read(model: HookedModel, name: str, settings: TrainingSettings, *, progress: Progress = silent) -> Data:
    """The data of a name: `sampled` is text from the model, FILE.txt a text; else facts, as `sources.named` has them.

    Raises:
        TrainingError: there is too little of it, or no text.
        FactError: as in `sources.named`.
    """
    if name == "sampled":
        return of_texts(model, settings, progress=progress)
    if name.endswith(".txt"):
        return of_texts(model, settings, passages(model, name, settings), progress=progress)
    return of_facts(model, sources.named(name), settings, progress=progress)


def passages(model: HookedModel, path: str | Path, settings: TrainingSettings) -> list[list[int]]:
    """A text's tokens in pieces that leave room for a continuation."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} is no text in UTF-8 that can be read ({error}).") from error
    body, ids = settings.text_context - settings.text_tokens, list[int]()
    for piece in text.splitlines(keepends=True):
        ids += bare(model, piece, prepend_bos=False)[0]
    return [ids[begin : begin + body] for begin in range(0, len(ids) - body + 1, body)]
