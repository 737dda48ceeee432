"""A fact, and where facts come from.

A fact is a subject, a template with one `{}` for it, and what the model should say next. Files of facts are read in the
forms in which they are published: COUNTERFACT (nested as released, or flat), zsRE in the form of MEND, and the known facts
of causal tracing. `built_in()` is a set written for this project. Sets have names in `mechedit.sources`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from mechedit import records
from mechedit.errors import FactError
from mechedit.records import Part

__all__ = [
    "Fact",
    "FactError",
    "built_in",
    "check_fact",
    "from_prompt",
    "from_zsre",
    "read",
]


FORMS = (
    "subject, prompt (or template, with {} for the subject), target_true and target_new (the fields of facts.Fact); COUNTERFACT, nested (requested_rewrite) or flat "
    "(ground_truth); zsRE (loc_ans); known facts (attribute)"
)


@dataclass(frozen=True)
class Fact:
    """`template.format(subject)` is completed by `target_true`; an edit makes it `target_new`.

    Targets are words without a leading space: the one that joins them to the prompt is put there once, when tokens are
    made. `paraphrases`, `neighbours` and `generations` are whole prompts: other wordings of the same question, the same
    question about subjects that share `target_true`, and openings for free text about the subject.

    Raises:
        FactError: an empty subject, a template without exactly one `{}`, or a target that is only white space.
    """

    subject: str
    template: str
    target_true: str | None = None
    target_new: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    generations: tuple[str, ...] = ()
    relation: str | None = None
    id: str | None = None
    target_new_id: str | None = None  # by which reference texts name the new target

    def __post_init__(self) -> None:
        wrong = []
        if not self.subject.strip():
            wrong.append(f"the subject must be a word or more; it is {self.subject!r}")
        if (slots := self.template.count("{}")) != 1:
            wrong.append(f"a template must hold exactly one {{}} for the subject; {self.template!r} holds {slots}")
        object.__setattr__(self, "template", self.template.rstrip())
        for name in ("target_true", "target_new"):
            target = getattr(self, name)
            if target is not None and not target.strip():
                wrong.append(f"{name} must be a word or more; it is {target!r}")
            if target is not None:
                object.__setattr__(self, name, target.strip())
        if self.target_new is not None and self.target_new == self.target_true:
            wrong.append(f"target_new equals target_true ({self.target_new!r}): there is nothing to edit")
        if wrong:
            raise FactError("; ".join(wrong) + ".")

    @property
    def prompt(self) -> str:
        """The template with the subject in its place."""
        before, after = self.template.split("{}")
        return before + self.subject + after

    @property
    def subject_start(self) -> int:
        """The character of `prompt` at which the subject begins."""
        return self.template.index("{}")


def check_fact(fact: object) -> None:
    """Raise for what is no fact, a prompt for one.

    Raises:
        FactError: it is not.
    """
    if not isinstance(fact, Fact):
        raise FactError(
            f"a fact is facts.Fact(subject, template, …) or facts.from_prompt(prompt, subject); found {fact!r}."
        )


def from_prompt(
    prompt: str,
    subject: str,
    *,
    target_true: str | None = None,
    target_new: str | None = None,
    occurrence: int | None = None,
) -> Fact:
    """The fact of a whole prompt that contains its subject; `occurrence` (from 0) chooses among several.

    Raises:
        FactError: the subject is empty, not in the prompt, or there more than once without a choice.
    """
    for name, text in (("prompt", prompt), ("subject", subject)):
        if not text.strip():
            raise FactError(f"the {name} must be a word or more; it is {text!r}.")
    if "{}" in prompt:
        raise FactError(
            f"a prompt holds its subject itself; {prompt!r} is a template, with {{}} in the subject's place."
        )
    subject = subject.strip()
    starts = [at for at in range(len(prompt)) if prompt.startswith(subject, at)]
    if not starts:
        raise FactError(
            f"the subject {subject!r} is not in the prompt {prompt!r}; it must appear there letter for letter."
        )
    if len(starts) > 1 and occurrence is None:
        raise FactError(
            f"the subject {subject!r} appears {len(starts)} times in the prompt {prompt!r}; "
            f"choose one with occurrence=0 to {len(starts) - 1} (--occurrence on the command line), or give a template, with {{}} there."
        )
    chosen = occurrence or 0
    if not 0 <= chosen < len(starts):
        raise FactError(
            f"occurrence must be from 0 to {len(starts) - 1}, as often as {subject!r} is in the prompt; found {chosen}."
        )
    at = starts[chosen]
    return Fact(subject, prompt[:at] + "{}" + prompt[at + len(subject) :], target_true, target_new)


def built_in() -> tuple[Fact, ...]:
    """The facts that ship with mechedit; the first is the Space Needle's."""
    text = resources.files("mechedit").joinpath("data/facts.json").read_text(encoding="utf-8")
    return records.make(json.loads(text), _nested, "data/facts.json")


def read(path: str | Path, need: Sequence[str] = ()) -> tuple[Fact, ...]:
    """The facts of a JSON file: a list of objects with the fields of `Fact` (`prompt` may stand for `template`), nested or
    flat COUNTERFACT, zsRE as MEND has it, or known facts; the form is recognised by what the records have.

    Every fact must have the fields named in `need` ("target_true", say). zsRE records are left out where the question does not
    contain the subject exactly once or nothing new is to be said.

    Raises:
        FactError: the file is missing, no list of records, or records have mistakes; all of them are named.
    """
    found = records.load(path)
    return records.make(found, _form(found, path), path, f"A record has one of these forms: {FORMS}.", need)


def _form(found: Sequence[Any], path: str | Path) -> Callable[[Part, int], Fact | None]:
    """The maker for records of the first form that any of them has."""
    forms: list[tuple[str, Callable[[Part, int], Fact | None]]] = [
        ("requested_rewrite", _nested),
        ("ground_truth", _flat),
        ("loc_ans", from_zsre),
        ("attribute", _known),
        ("template", _plain),
        ("prompt", _plain),
    ]
    objects = [record for record in found if isinstance(record, dict)]
    for key, make in forms:
        if any(key in record for record in objects):
            return make
    raise FactError(
        f"{path}: the form of the records is not known. It must be one of: {FORMS}. The first has "
        f"{', '.join(objects[0]) or 'nothing'}."
    )


def _fact(part: Part, subject: str | None, template: str | None, **rest: Any) -> Fact | None:
    """The fact. What is missing is noted already; stand-ins let the rest be checked."""
    try:
        return Fact("subject" if subject is None else subject, "{}" if template is None else template, **rest)
    except FactError as error:
        part.mistakes.append(str(error).rstrip("."))
        return None


def _whole(part: Part, occurrence: int | None = None) -> tuple[str | None, str | None]:
    """Subject and template of a record with a whole prompt."""
    subject, prompt = part.text("subject"), part.text("prompt")
    if subject is not None and prompt is not None:
        try:
            fact = from_prompt(prompt, subject, occurrence=occurrence)
        except FactError as error:
            part.mistakes.append(str(error).rstrip("."))
        else:
            return fact.subject, fact.template
    return None, None


def _plain(part: Part, index: int) -> Fact | None:
    """The fields of `Fact` themselves, a whole `prompt` in the template's place if that is there."""
    names = {each.name for each in fields(Fact)} | {"prompt"}
    if unknown := sorted(part.value.keys() - names):
        part.mistakes.append(f"{', '.join(unknown)} is no field of a fact; there are {', '.join(sorted(names))}")
    subject, template = (part.text("subject"), part.text("template")) if "template" in part.value else _whole(part)
    return _fact(
        part,
        subject,
        template,
        target_true=part.optional("target_true"),
        target_new=part.optional("target_new"),
        paraphrases=part.texts("paraphrases"),
        neighbours=part.texts("neighbours"),
        generations=part.texts("generations"),
        relation=part.optional("relation"),
        id=part.id("id", index),
        target_new_id=part.optional("target_new_id"),
    )


def _one(part: Part, name: str) -> tuple[str, ...]:
    """The one prompt of a record by this name, if it has it."""
    prompt = part.optional(name)
    return () if prompt is None or not prompt.strip() else (prompt,)


def _nested(part: Part, index: int) -> Fact | None:
    rewrite = part.part("requested_rewrite")
    true, new = rewrite.part("target_true"), rewrite.part("target_new")
    return _fact(
        part,
        rewrite.text("subject"),
        rewrite.text("prompt"),
        target_true=true.text("str"),
        target_new=new.text("str"),
        paraphrases=part.texts("paraphrase_prompts"),
        neighbours=part.texts("neighborhood_prompts"),
        generations=part.texts("generation_prompts"),
        relation=rewrite.optional("relation_id"),
        id=part.id("case_id", index),
        target_new_id=new.optional("id"),
    )


def _flat(part: Part, index: int) -> Fact | None:
    subject, template = _whole(part, occurrence=0)
    return _fact(
        part,
        subject,
        template,
        target_true=part.text("ground_truth"),
        target_new=part.text("target_new"),
        paraphrases=_one(part, "rephrase_prompt"),
        neighbours=_one(part, "locality_prompt"),
        id=part.id("case_id", index),
    )


def from_zsre(part: Part, index: int) -> Fact | None:
    """The fact of a zsRE record in the form of MEND; None where it cannot be edited (`read`)."""
    subject, question, new = (part.text(name, blank=True) for name in ("subject", "src", "alt"))
    answers, paraphrases, own_id = part.texts("answers", needed=True), _one(part, "rephrase"), part.id("case_id", index)
    if subject is None or question is None or new is None or not answers:
        return None
    true, new = answers[0].strip(), new.strip()
    try:
        template = from_prompt(question, subject).template
    except FactError:  # not there, or more than once
        return None
    if not new or new == true:
        return None
    return _fact(part, subject.strip(), template, target_true=true, target_new=new, paraphrases=paraphrases, id=own_id)


def _known(part: Part, index: int) -> Fact | None:
    return _fact(
        part,
        part.text("subject"),
        part.text("template"),
        target_true=part.text("attribute"),
        target_new=part.optional("target_new"),
        relation=part.optional("relation_id"),
        id=part.id("known_id", index),
    )
