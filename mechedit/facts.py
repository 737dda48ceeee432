"""A fact, and where facts come from.

A fact is a subject, a template with one `{}` for it, and what the model should say next. Files of facts are read in the
forms in which they are published: COUNTERFACT (nested as released, or flat), zsRE in the form of MEND, and the known facts
of causal tracing. `built_in()` is a set written for this project. Sets have names in `mechedit.sources`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from mechedit import records, writing
from mechedit.errors import FactError, check_list
from mechedit.records import Part
from mechedit.wording import meant

__all__ = [
    "Fact",
    "FactError",
    "built_in",
    "check_fact",
    "from_prompt",
    "from_zsre",
    "linked",
    "read",
]


PROMPTS = (
    "paraphrases",
    "neighbours",
    "generations",
    "same_subject",
)  # fields of a fact that are lists of whole prompts
ANSWERS = ("neighbour_answers", "same_subject_answers")
FORMS = (
    "subject, prompt (or template, with {} for the subject), target_true and target_new (the fields of facts.Fact); COUNTERFACT, nested (requested_rewrite) or flat "
    "(ground_truth); zsRE (loc_ans); known facts (attribute)"
)


@dataclass(frozen=True)
class Fact:
    """`template` with `subject` in the place of `{}` is completed by `target_true`; an edit makes it `target_new`.

    `paraphrases`, `neighbours` and `generations` are whole prompts: other wordings of the same question, the same question about
    subjects that share `target_true` (or have answers of their own: `neighbour_answers`, one for each), and openings for free
    text about the subject; `same_subject` are prompts of its other relations, with an answer each (`same_subject_answers`). Spaces around subject and targets and at the end of prompts are removed. `join` says how a prompt meets a
    target: "auto", as its writing has it (`writing.seam`: one space in English, none in Chinese or after an opening quotation
    mark); "space", always one; "none", the two exactly as they are.

    Raises:
        FactError: an empty subject, a template without exactly one `{}`, a target that is only white space, prompts that are no
            list of texts, or a text with half a character.
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
    neighbour_answers: tuple[str, ...] = ()
    join: str = "auto"
    same_subject: tuple[str, ...] = ()
    same_subject_answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        wrong = [*self._wrong_texts(), *self._wrong_lists()]
        if self.join not in writing.JOINS:
            wrong.append(f"join must be one of {', '.join(writing.JOINS)}; it is {self.join!r}")
        if wrong:
            raise FactError("; ".join(wrong) + ".")
        end = (lambda prompt: prompt) if self.join == "none" else writing.ended
        object.__setattr__(self, "template", end(self.template))
        if self.join != "none":
            object.__setattr__(self, "subject", self.subject.strip())
        for name in PROMPTS:
            object.__setattr__(self, name, tuple(end(prompt) for prompt in getattr(self, name)))
        for name in ("target_true", "target_new"):
            if (target := getattr(self, name)) is not None:
                object.__setattr__(self, name, target.strip())
        for name in ANSWERS:
            object.__setattr__(self, name, tuple(answer.strip() for answer in getattr(self, name)))
        if self.target_new is not None and writing.same(self.target_new, self.target_true):
            raise FactError(f"target_new equals target_true ({self.target_new!r}): there is nothing to edit.")

    def _wrong_texts(self) -> list[str]:
        """What is wrong with each text of its own."""
        wrong = []
        if not self.subject.strip():
            wrong.append(f"the subject must be a word or more; it is {self.subject!r}")
        if (slots := self.template.count("{}")) != 1:
            wrong.append(f"a template must hold exactly one {{}} for the subject; {self.template!r} holds {slots}")
        for name in ("target_true", "target_new"):
            target = getattr(self, name)
            if target is not None and not target.strip():
                wrong.append(f"{name} must be a word or more; it is {target!r}")
        for name in ("subject", "template", "target_true", "target_new", "relation", "id", "target_new_id"):
            wrong += [f"{name} {what}" for what in records.unwritable(getattr(self, name))]
        return wrong

    def _wrong_lists(self) -> list[str]:
        """What is wrong with its lists of prompts, and of answers."""
        wrong = []
        for name in (*PROMPTS, *ANSWERS):
            texts = getattr(self, name)
            if isinstance(texts, str) or not all(isinstance(each, str) and each.strip() for each in texts):
                wrong.append(f"{name} must be a list of texts, each a word or more; found {texts!r}")
            else:
                wrong += [f"{name} {what}" for text in texts for what in records.unwritable(text)]
        n, m, near, same = map(
            len, (self.neighbours, self.same_subject, self.neighbour_answers, self.same_subject_answers)
        )
        if near not in (0, n):
            wrong.append(f"neighbour_answers must be one for each of the {n} neighbours, or none; found {near}")
        if same != m:
            wrong.append(f"same_subject_answers must be one for each of the {m} prompts of same_subject; found {same}")
        return wrong

    @property
    def prompt(self) -> str:
        """The template with the subject in its place."""
        before, after = self.template.split("{}")
        return before + self.subject + after

    @property
    def subject_start(self) -> int:
        """The character of `prompt` at which the subject begins."""
        return self.template.index("{}")

    @property
    def neighbourhood(self) -> tuple[tuple[str, str | None], ...]:
        """Each neighbour, and the answer that an edit must leave there: its own, or `target_true`."""
        answers = self.neighbour_answers or (self.target_true,) * len(self.neighbours)
        return tuple(zip(self.neighbours, answers, strict=True))


def check_fact(fact: object) -> None:
    """Raise for what is no fact, a prompt for one.

    Raises:
        FactError: it is not.
    """
    if not isinstance(fact, Fact):
        raise FactError(f"a fact is facts.Fact(subject, template, …) or facts.from_prompt(prompt, subject); found {fact!r}.")  # fmt: skip


def from_prompt(
    prompt: str,
    subject: str,
    *,
    target_true: str | None = None,
    target_new: str | None = None,
    occurrence: int | None = None,
    join: str = "auto",
) -> Fact:
    """The fact of a whole prompt that contains its subject; `occurrence` (from 0) chooses among several.

    The subject may be composed otherwise than in the prompt (`é` of one character or of two); the fact has it as in the prompt.

    Raises:
        FactError: the subject is empty, not in the prompt, or there more than once without a choice.
    """
    for name, text in (("prompt", prompt), ("subject", subject)):
        if not text.strip():
            raise FactError(f"the {name} must be a word or more; it is {text!r}.")
        for what in records.unwritable(text):
            raise FactError(f"the {name} {what}.")
    if "{}" in prompt:
        raise FactError(f"a prompt holds its subject itself; {prompt!r} is a template, with {{}} in the subject's place.")  # fmt: skip
    subject = subject.strip()
    places = writing.find(prompt, subject)
    if not places:
        raise FactError(f"the subject {subject!r} is not in the prompt {prompt!r}; it must appear there letter for letter.")  # fmt: skip
    if len(places) > 1 and occurrence is None:
        raise FactError(
            f"the subject {subject!r} appears {len(places)} times in the prompt {prompt!r}; "
            f"choose one with occurrence=0 to {len(places) - 1} (--occurrence on the command line), or give a template, with {{}} there."
        )
    chosen = occurrence or 0
    if not 0 <= chosen < len(places):
        raise FactError(f"occurrence must be from 0 to {len(places) - 1}, as often as {subject!r} is in the prompt; found {chosen}.")  # fmt: skip
    begin, end = places[chosen]
    return Fact(prompt[begin:end], prompt[:begin] + "{}" + prompt[end:], target_true, target_new, join=join)


def built_in() -> tuple[Fact, ...]:
    """The facts that ship with mechedit; the first is the Space Needle's."""
    text = resources.files("mechedit").joinpath("data/facts.json").read_text(encoding="utf-8")
    return records.make(json.loads(text), _nested, "data/facts.json")


def read(path: str | Path, need: Sequence[str] = ()) -> tuple[Fact, ...]:
    """The facts of a JSON file, or of JSON Lines: objects with the fields of `Fact` (`prompt` may stand for `template`), nested
    or flat COUNTERFACT, zsRE as MEND has it, or known facts; the form is recognised by what the records have. Each can say how
    its prompts and targets are joined (`join`).

    Every fact must have the fields named in `need` ("target_true", say). zsRE records are left out where the question does not
    contain the subject exactly once or nothing new is to be said. How many are left out, and fields that say something of a fact
    and are not read (KnowEdit's `portability`), are told in a `records.RecordWarning`.

    Raises:
        FactError: the file is missing, no list of records, or records have mistakes; all of them are named.
    """
    check_list("need", need)
    found = records.load(path)
    return linked(records.make(found, _form(found, path), path, f"A record has one of these forms: {FORMS}.", need))


def linked(found: Sequence[Fact]) -> tuple[Fact, ...]:
    """The facts, each with the prompts and true answers of those that have its subject and another relation, unless it has such prompts
    already. Facts whose relation is not known have none: other words may ask the same (`{} is a twin city of`, `The twin city of {} is`)."""
    by_subject: dict[str, list[Fact]] = {}
    for fact in found:
        by_subject.setdefault(fact.subject, []).append(fact)
    return tuple(fact if fact.same_subject else _with(fact, by_subject[fact.subject]) for fact in found)


def _with(fact: Fact, others: Sequence[Fact]) -> Fact:
    own = {
        other.prompt: other.target_true
        for other in others
        if other.target_true and None not in (fact.relation, other.relation) and fact.relation != other.relation
    }
    return replace(fact, same_subject=tuple(own), same_subject_answers=tuple(own.values())) if own else fact


def _form(found: Sequence[Any], path: str | Path) -> Callable[[Part, int], Fact | None]:
    """The maker for records of the first form that any of them has."""
    forms: list[tuple[str, Callable[[Part, int], Fact | None]]] = [
        ("requested_rewrite", _nested),
        ("ground_truth", _flat),
        ("loc_ans", from_zsre),
        ("attribute", _known),
        *((name, _flat) for name in ("rephrase_prompt", "rephrase", "locality_prompt", "locality", "portability")),
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
        return Fact("subject" if subject is None else subject, "{}" if template is None else template, join=_join(part), **rest)  # fmt: skip
    except FactError as error:
        part.mistakes.append(str(error).rstrip("."))
        return None


def _join(part: Part) -> str:
    """How a record says its prompts and targets are joined; what is none of the ways is told once, by the fact."""
    return part.optional("join") or "auto"


def _whole(part: Part, occurrence: int | None = None) -> tuple[str | None, str | None]:
    """Subject and template of a record with a whole prompt."""
    subject, prompt = part.text("subject"), part.text("prompt")
    if subject is not None and prompt is not None:
        try:
            fact = from_prompt(prompt, subject, occurrence=occurrence, join="none")  # its end is the fact's to judge
        except FactError as error:
            part.mistakes.append(str(error).rstrip("."))
        else:
            return fact.subject, fact.template
    return None, None


def _plain(part: Part, index: int) -> Fact | None:
    """The fields of `Fact` themselves, a whole `prompt` in the template's place if that is there."""
    names = {each.name for each in fields(Fact)} | {"prompt"}
    if unknown := sorted(part.value.keys() - names):
        part.mistakes.append(f"{', '.join(each + meant(each, names) for each in unknown)} is no field of a fact; there are {', '.join(sorted(names))}")  # fmt: skip
    part.aside(*part.value)
    subject, template = (part.text("subject"), part.text("template")) if "template" in part.value else _whole(part)
    return _fact(
        part,
        subject,
        template,
        id=part.id("id", index),
        **{name: part.optional(name) for name in ("target_true", "target_new", "relation", "target_new_id")},
        **{name: part.texts(name) for name in (*PROMPTS, *ANSWERS)},
    )


def _nested(part: Part, index: int) -> Fact | None:
    rewrite = part.part("requested_rewrite")
    true, new = rewrite.part("target_true"), rewrite.part("target_new")
    part.aside("pararel_idx", "attribute_prompts")
    true.aside("id")
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
    """EasyEdit's and KnowEdit's names; of an answer by several names the first."""
    subject, template = _whole(part, occurrence=0)
    near = _near(part)
    part.aside("cond", "pred")
    if part.value.get("ground_truth") is None and "target_true" in part.need:
        part.mistakes.append(f"it lacks ground_truth{records.NEEDED}")
    return _fact(
        part,
        subject,
        template,
        target_true=next(iter(part.several("ground_truth")), None),
        target_new=part.text("target_new"),
        paraphrases=tuple(each for name in ("rephrase_prompt", "rephrase") for each in part.several(name) if each.strip()),
        neighbours=tuple(prompt for prompt, _ in near),
        neighbour_answers=tuple(answer for _, answer in near if answer is not None),
        relation=part.optional("relation") or part.optional("relation_id"),
        id=part.id("case_id" if "case_id" in part.value else "id", index),
    )  # fmt: skip


def _near(part: Part) -> list[tuple[str, str | None]]:
    """The prompts of a record that an edit must leave alone, with their answers: about neighbours, in the flat form or in
    EasyEdit's `locality`. What else `locality` holds (KnowEdit's about the subject itself) is no neighbour, and is not read."""
    of = [(part, "locality_prompt", "locality_ground_truth")]
    if part.value.get("locality") is not None:
        locality = part.part("locality")
        part.aside("locality")
        names = [name for name in ("neighborhood", "neighbourhood") if name in locality.value]
        of += [(locality.part(name), "prompt", "ground_truth") for name in names]
        locality.aside(*names)
    found: list[tuple[str, str | None]] = []
    for own, prompt, answer in of:
        prompts, answers = own.several(prompt), own.several(answer)
        answers = answers[:1] if isinstance(own.value.get(prompt), str) else answers  # one, by several names
        if answers and len(answers) != len(prompts):
            part.mistakes.append(
                f"{answer} must be one answer for each {prompt}; found {len(answers)} for {len(prompts)}"
            )
        else:
            found += [
                (text, answer) for text, answer in zip(prompts, answers or [None] * len(prompts), strict=True) if text.strip()
            ]  # fmt: skip
    return found


def from_zsre(part: Part, index: int) -> Fact | None:
    """The fact of a zsRE record in the form of MEND; None where it cannot be edited (`read`)."""
    subject, question, new = (part.text(name, blank=True) for name in ("subject", "src", "alt"))
    answers, own_id = part.texts("answers", needed=True), part.id("case_id", index)
    paraphrases = tuple(each for each in part.several("rephrase") if each.strip())
    part.aside("pred", "cond", "loc", "loc_ans")
    if subject is None or question is None or new is None or not answers:
        return None
    true, new = answers[0].strip(), new.strip()
    try:
        fact = from_prompt(question, subject, join="none")
    except FactError:  # not there, or more than once
        part.left_out = "the question does not hold its subject exactly once"
        return None
    if not new or writing.same(new, true):
        part.left_out = "nothing new is to be said"
        return None
    return _fact(part, fact.subject, fact.template, target_true=true, target_new=new, paraphrases=paraphrases, id=own_id)  # fmt: skip


def _known(part: Part, index: int) -> Fact | None:
    part.aside("prompt", "prediction")
    return _fact(
        part,
        part.text("subject"),
        part.text("template"),
        target_true=part.text("attribute"),
        target_new=part.optional("target_new"),
        relation=part.optional("relation_id"),
        id=part.id("known_id", index),
    )
