"""A fact, and where facts come from.

A fact is a subject, a template with one `{}` for it, and what the model should say next. Files of facts are read in the
forms in which they are published: COUNTERFACT (nested as released, or flat), zsRE in the form of MEND, and the known facts
of causal tracing. `built_in()` is a set written for this project, `named("organism")` the organism's world.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from mechedit.errors import MecheditError

__all__ = [
    "Fact",
    "FactError",
    "built_in",
    "check_fact",
    "from_prompt",
    "from_zsre",
    "named",
    "read",
    "read_as",
]

Made = TypeVar("Made")
SHOWN_MISTAKES = 20  # of a file, before the rest is counted

"""Sets of facts that ship with mechedit, as `named` takes them."""

FORMS = (
    "subject, prompt, target_true and target_new (the fields of facts.Fact); COUNTERFACT, nested (requested_rewrite) or flat "
    "(ground_truth); zsRE (loc_ans); known facts (attribute)"
)


class FactError(MecheditError, ValueError):
    """A fact, or a file of facts, that cannot be used as it is."""


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
        if not self.subject.strip():
            raise FactError(f"the subject must be a word or more; it is {self.subject!r}.")
        if (slots := self.template.count("{}")) != 1:
            raise FactError(f"a template must hold exactly one {{}} for the subject; {self.template!r} holds {slots}.")
        object.__setattr__(self, "template", self.template.rstrip())
        for name in ("target_true", "target_new"):
            target = getattr(self, name)
            if target is not None and not target.strip():
                raise FactError(f"{name} must be a word or more; it is {target!r}.")
            if target is not None:
                object.__setattr__(self, name, target.strip())
        if self.target_new is not None and self.target_new == self.target_true:
            raise FactError(f"target_new equals target_true ({self.target_new!r}): there is nothing to edit.")

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
    subject = subject.strip()
    starts = [at for at in range(len(prompt)) if prompt.startswith(subject, at)]
    if not starts:
        raise FactError(
            f"the subject {subject!r} is not in the prompt {prompt!r}; it must appear there letter for letter."
        )
    if len(starts) > 1 and occurrence is None:
        raise FactError(
            f"the subject {subject!r} appears {len(starts)} times in the prompt {prompt!r}; "
            f"choose one with occurrence=0 to {len(starts) - 1} (--occurrence on the command line)."
        )
    chosen = occurrence or 0
    if not 0 <= chosen < len(starts):
        raise FactError(
            f"occurrence must be from 0 to {len(starts) - 1}, as often as {subject!r} is in the prompt; found {chosen}."
        )
    if "{}" in prompt:
        raise FactError(f"a prompt may not contain {{}}, which marks the subject in a template: {prompt!r}.")
    at = starts[chosen]
    return Fact(subject, prompt[:at] + "{}" + prompt[at + len(subject) :], target_true, target_new)


def built_in() -> tuple[Fact, ...]:
    """The facts that ship with mechedit; the first is the Space Needle's."""
    text = resources.files("mechedit").joinpath("data/facts.json").read_text(encoding="utf-8")
    return tuple(_nested(record, index) for index, record in enumerate(json.loads(text)))


def named(name: str | Path) -> tuple[Fact, ...]:
    """The set of facts of this name: `built-in`, `organism` (all that is true in the organism's world), or a file.

    Raises:
        FactError: as in `read`.
    """
    if name == "organism":
        from mechedit.organism.world import make

        return make().facts
    return built_in() if name == "built-in" else read(name)


def read(path: str | Path) -> tuple[Fact, ...]:
    """The facts of a JSON file: a list of objects with the fields of `Fact` (`prompt` may stand for `template`), nested or
    flat COUNTERFACT, zsRE as MEND has it, or known facts; the form is recognised by the first record.

    zsRE records are left out where the question does not contain the subject exactly once or nothing new is to be said.

    Raises:
        FactError: the file is missing, no list of records, or records lack what their form needs; all of them are named.
    """
    return read_as(path, lambda records: _form(records, path))


def read_as(
    path: str | Path, form: Callable[[list[dict[str, Any]]], Callable[[dict[str, Any], int], Made | None]]
) -> tuple[Made, ...]:
    """What each record of a JSON file is made into, but None. `form` gives the maker for a file of such records.

    Raises:
        FactError: as in `read`.
    """
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FactError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise FactError(f"{path} is not JSON: it is no text in UTF-8.") from error
    except ValueError as error:
        raise FactError(f"{path} is not JSON: {error}.") from error
    if not isinstance(records, list) or not records or not all(isinstance(record, dict) for record in records):
        raise FactError(f"{path} must hold a list of one or more records, each an object.")
    make = form(records)
    found: list[Made] = []
    wrong: list[str] = []
    seen: dict[str, int] = {}
    for index, record in enumerate(records):
        try:
            made = make(record, index)
        except FactError as error:
            wrong.append(f"record {index}: {error}")
        except KeyError as error:
            wrong.append(f"record {index} lacks {error}, which its form ({FORMS}) needs.")
        except (TypeError, AttributeError, IndexError, ValueError) as error:
            wrong.append(f"record {index} is not of its form ({FORMS}): {error}.")
        else:
            if made is not None:
                found.append(made)
        for key in ("id", "case_id", "known_id"):
            if (own := record.get(key)) is not None and seen.setdefault(f"{key} {own!r}", index) != index:
                wrong.append(f"record {index} has the {key} {own!r} of record {seen[f'{key} {own!r}']}.")
    if wrong:
        if len(wrong) == 1:
            raise FactError(f"{path}, {wrong[0]}")
        more = f"\n... and {len(wrong) - SHOWN_MISTAKES} more" if len(wrong) > SHOWN_MISTAKES else ""
        first = "\n".join(wrong[:SHOWN_MISTAKES])
        raise FactError(f"{path} has {len(wrong)} mistakes:\n{first}{more}")
    return tuple(found)


def _form(records: list[dict[str, Any]], path: str | Path) -> Callable[[dict[str, Any], int], Fact | None]:
    """The reader for records that look like the first of these that has a form."""
    forms: list[tuple[str, Callable[[dict[str, Any], int], Fact | None]]] = [
        ("requested_rewrite", _nested),
        ("ground_truth", _flat),
        ("loc_ans", from_zsre),
        ("attribute", _known),
        ("template", _plain),
        ("prompt", _plain),
    ]
    for record in records:
        for key, make in forms:
            if key in record:
                return make
    raise FactError(
        f"{path}: the form of the records is not known. It must be one of: {FORMS}. The first record has {', '.join(records[0])}."
    )


def _plain(record: dict[str, Any], index: int) -> Fact:
    """The fields of `Fact` themselves, a whole `prompt` in the template's place if that is there."""
    several = ("paraphrases", "neighbours", "generations")
    names = {each.name for each in fields(Fact)} | {"prompt"}
    if unknown := sorted(record.keys() - names):
        raise FactError(f"{', '.join(unknown)} is no field of a fact; there are {', '.join(sorted(names))}.")
    given = {key: value for key, value in record.items() if key not in ("prompt", "template", *several)}
    given |= {name: _prompts(record, name) for name in several}
    template = record["template"] if "template" in record else from_prompt(record["prompt"], record["subject"]).template
    return Fact(**(given | {"template": template, "id": str(record.get("id", index))}))


def _prompts(record: dict[str, Any], name: str) -> tuple[str, ...]:
    """A list of prompts of a record, empty where it has none."""
    prompts = record.get(name, [])
    if not isinstance(prompts, list) or not all(isinstance(each, str) and each.strip() for each in prompts):
        raise FactError(f"{name} must be a list of prompts; found {prompts!r}.")
    return tuple(prompts)


def _prompt(record: dict[str, Any], name: str) -> tuple[str, ...]:
    """The one prompt of a record by this name, if it has it."""
    prompt = record.get(name) or ""
    if not isinstance(prompt, str):
        raise FactError(f"{name} must be a prompt; found {prompt!r}.")
    return (prompt,) if prompt.strip() else ()


def _nested(record: dict[str, Any], index: int) -> Fact:
    rewrite = record["requested_rewrite"]
    return Fact(
        subject=rewrite["subject"],
        template=rewrite["prompt"],
        target_true=rewrite["target_true"]["str"],
        target_new=rewrite["target_new"]["str"],
        paraphrases=_prompts(record, "paraphrase_prompts"),
        neighbours=_prompts(record, "neighborhood_prompts"),
        generations=_prompts(record, "generation_prompts"),
        relation=rewrite.get("relation_id"),
        id=str(record.get("case_id", index)),
        target_new_id=rewrite["target_new"].get("id"),
    )


def _flat(record: dict[str, Any], index: int) -> Fact:
    whole = from_prompt(record["prompt"], record["subject"], occurrence=0)
    return Fact(
        subject=whole.subject,
        template=whole.template,
        target_true=record["ground_truth"],
        target_new=record["target_new"],
        paraphrases=_prompt(record, "rephrase_prompt"),
        neighbours=_prompt(record, "locality_prompt"),
        id=str(record.get("case_id", index)),
    )


def from_zsre(record: dict[str, Any], index: int) -> Fact | None:
    """The fact of a zsRE record in the form of MEND; None where it cannot be edited (`read`)."""
    usable = record["subject"].strip() and record["src"].count(record["subject"]) == 1
    if not usable or not record["alt"].strip() or record["alt"] == record["answers"][0]:
        return None
    whole = from_prompt(record["src"], record["subject"])
    return Fact(
        subject=whole.subject,
        template=whole.template,
        target_true=record["answers"][0],
        target_new=record["alt"],
        paraphrases=_prompt(record, "rephrase"),
        id=str(record.get("case_id", index)),
    )


def _known(record: dict[str, Any], index: int) -> Fact:
    return Fact(
        subject=record["subject"],
        template=record["template"],
        target_true=record["attribute"],
        relation=record.get("relation_id"),
        id=str(record.get("known_id", index)),
    )
