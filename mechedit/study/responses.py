"""What came back from participants: accepted, or refused with a reason.

A response is a JSON object: `body`, the answers as a text in JSON, and `check`, an HMAC-SHA256 of that text by the code in the form. The check
says that the answers are as that form wrote them, or were written by somebody who has that very form: damage, careless editing, and answers
made up without a form are found out. It is no proof against whoever holds a form, since the code is in it; who answered, and whether in
earnest, no file can say.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mechedit import cache, parsing
from mechedit.errors import check_list
from mechedit.parsing import ParseError, number
from mechedit.study.forms import ITEMS, QUESTIONS, SCALE
from mechedit.study.making import Form, Study, StudyError, signed

__all__ = ["ACCEPTED", "Read", "Response", "kept", "read"]

RESPONSE, PROGRESS, ACCEPTED = "mechedit study response", "mechedit study progress", "accepted.json"
MOST = 1 << 20  # bytes of a response
LONGEST = 86_400.0  # seconds on a page
PAGE = {**{name: [str] for name in QUESTIONS}, "seconds": number}
BODY = {"study": str, "form": str, "pages": [PAGE], "long_form": [{"items": {str: int}, "seconds": number}], "comment": str, "finished": bool}  # fmt: skip


@dataclass(frozen=True)
class Response:
    """One participant's answers. Of each page: {question: letters from best to worst}, and seconds; of those of long-form evaluation: the
    items' marks, and seconds. A page that was not finished has empty rankings."""

    form: str
    file: str
    pages: tuple[dict[str, Any], ...]
    long_form: tuple[dict[str, Any], ...]
    comment: str = ""


@dataclass(frozen=True)
class Read:
    """Responses that were accepted, and the others: (file, why it was refused)."""

    accepted: tuple[Response, ...]
    refused: tuple[tuple[str, str], ...]

    def save(self, study: Study) -> Path:
        """Keep what was accepted in the study's folder, for its report."""
        path = study.folder / ACCEPTED
        record = {"study": study.name, "responses": [asdict(each) for each in self.accepted], "refused": [list(each) for each in self.refused]}  # fmt: skip
        with cache.atomic_write(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
        return path


def read(study: Study, places: Sequence[str | Path], *, partial: bool = False) -> Read:
    """Responses from files, and from all files in folders. With `partial`, the finished pages of an unfinished response count.

    A second copy of a response is refused; of two responses from one form that differ, both are, since nobody can say which is meant.

    Raises:
        StudyError: there is no file.
    """
    check_list("places", places)
    files = list(_files(map(Path, places)))
    if not files:
        raise StudyError(f"there are no response files in {', '.join(map(str, places)) or 'no place'}. Participants send them: mechedit-response-….json.")  # fmt: skip
    found: dict[str, list[Response]] = {}
    refused = []
    for file in files:
        try:
            each = _checked(study, file, partial=partial)
        except ParseError as error:
            refused.append((str(file), str(error)))
            continue
        same = found.setdefault(each.form, [])
        if any(_answers(each) == _answers(other) for other in same):
            refused.append((str(file), f"duplicated: the same answers of form {each.form} are in {same[0].file}"))
        else:
            same.append(each)
    for form, several in found.items():
        if len(several) > 1:
            names = ", ".join(Path(each.file).name for each in several)
            refused += [(each.file, f"duplicated: form {form} has {len(several)} different responses ({names}); leave one in") for each in several]  # fmt: skip
    accepted = tuple(several[0] for several in found.values() if len(several) == 1)
    return Read(accepted, tuple(sorted(refused)))


def _answers(response: Response) -> tuple[Any, ...]:
    return response.pages, response.long_form, response.comment


def _files(places: Iterable[Path]) -> Iterable[Path]:
    for place in places:
        if place.is_dir():
            yield from sorted(each for each in place.iterdir() if each.is_file() and not each.name.startswith("."))
        else:
            yield place


def _checked(study: Study, file: Path, *, partial: bool) -> Response:
    """The response in a file.

    Raises:
        ParseError: it is refused; the message begins with what it is.
    """
    body, check = _opened(file)
    try:
        said = parsing.from_text(body, unique=True)
        parsing.check(said, BODY)
    except ParseError as error:
        raise ParseError(f"malformed: {error}") from error
    if said["study"] != study.name:
        raise ParseError(f"foreign: it is of the study {said['study']!r}, and this is {study.name}")
    form = next((each for each in study.forms if each.name == said["form"]), None)
    if form is None:
        raise ParseError(f"foreign: this study has no form {said['form']!r}")
    if not hmac.compare_digest(signed(study.token(form.name), body), check):
        raise ParseError("forged or changed: its check value is not the one that the form makes of these answers")
    _check_answers(study, form, said, partial=partial)
    return Response(form.name, str(file), tuple(map(_whole, said["pages"])), tuple(said["long_form"]), said["comment"])


def _opened(file: Path) -> tuple[str, str]:
    """Body and check of a response file."""
    try:
        if file.is_file() and file.stat().st_size > MOST:
            raise ParseError(f"it has more than {MOST} bytes, which no response has")
        outer = parsing.from_file(file, unique=True)
        parsing.check(outer, {"kind": str})
        if outer["kind"] == PROGRESS:
            raise ParseError("it is a progress file; open it in the form, finish, and save the response")
        if outer["kind"] != RESPONSE:
            raise ParseError(f"its kind is {outer['kind']!r}, and must be {RESPONSE!r}")
        parsing.check(outer, {"body": str, "check": str})
        if not outer["check"].isascii():
            raise ParseError("its check value must be hexadecimal")
    except (ParseError, OSError) as error:
        raise ParseError(f"malformed: {error}") from error
    return outer["body"], outer["check"]


def _check_answers(study: Study, form: Form, said: dict[str, Any], *, partial: bool) -> None:
    """Raise where answers are not of the form's pages, or not whole."""
    for name, wanted in (("pages", form.pages), ("long_form", form.long_form)):
        if len(said[name]) != len(wanted):
            raise ParseError(f"malformed: {name} must have {len(wanted)} pages; found {len(said[name])}")
        for at, page in enumerate(said[name], 1):
            if not 0 <= page["seconds"] <= LONGEST * 365:
                raise ParseError(f"malformed: page {at} of {name} says {page['seconds']} seconds")
    lacking = []
    for at, page in enumerate(said["pages"], 1):
        for question in QUESTIONS:
            ranking = page[question]
            if len(set(ranking)) < len(ranking) or not set(ranking) <= set(study.letters):
                raise ParseError(f"malformed: page {at} ranks {', '.join(ranking)[:80]} by {question}, and its texts are {', '.join(study.letters)}")  # fmt: skip
            lacking += [f"page {at} has no ranking by {question}"] if len(ranking) < len(study.letters) else []
    for at, page in enumerate(said["long_form"], 1):
        for name, mark in page["items"].items():
            if name not in ITEMS or not 1 <= mark <= SCALE:
                raise ParseError(f"malformed: page {at} of long_form gives {str(name)[:40]!r} the mark {mark}; marks of {', '.join(ITEMS)} are 1 to {SCALE}")  # fmt: skip
        lacking += [f"page {at} of long_form lacks {name}" for name in ITEMS if name not in page["items"]]
    if not partial and (lacking or not said["finished"]):
        more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
        raise ParseError(f"incomplete: {lacking[0] + more if lacking else 'it was not finished'}")
    if partial and not any(all(len(page[name]) == len(study.letters) for name in QUESTIONS) for page in said["pages"]):
        raise ParseError("incomplete: no page is finished")


def _whole(page: dict[str, Any]) -> dict[str, Any]:
    return {name: page[name] for name in PAGE}


def kept(study: Study) -> list[Response]:
    """The responses that were accepted last.

    Raises:
        StudyError: none were read, or the file was changed.
    """
    path = study.folder / ACCEPTED
    try:
        found = parsing.from_file(path, unique=True)
        parsing.check(found, {"study": str, "responses": [{"form": str, "file": str, "pages": [PAGE], "long_form": [{}], "comment": str}]})  # fmt: skip
    except ParseError as error:
        raise StudyError(f"no accepted responses can be read ({path.name}: {error}). `mechedit study read` checks what came back.") from error  # fmt: skip
    if found["study"] != study.name:
        raise StudyError(f"{path} is of the study {found['study']}, and this is {study.name}. Read the responses again.")  # fmt: skip
    return [Response(each["form"], each["file"], tuple(each["pages"]), tuple(each["long_form"]), each["comment"]) for each in found["responses"]]  # fmt: skip
