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

    A finished response counts before unfinished ones of its form. Of several with the same answers, that with the most time counts, the last
    that was saved; of those whose answers differ none does, since nobody can say which is meant.

    Raises:
        StudyError: there is no file.
    """
    check_list("places", places)
    files = list(_files(map(Path, places)))
    if not files:
        raise StudyError(f"there are no response files in {', '.join(map(str, places)) or 'no place'}. Participants send them: mechedit-response-….json.")  # fmt: skip
    found: dict[str, list[tuple[Response, bool]]] = {}
    accepted, refused = [], []
    for file in files:
        try:
            each, is_finished = _checked(study, file, partial=partial)
        except ParseError as error:
            refused.append((str(file), str(error)))
            continue
        found.setdefault(each.form, []).append((each, is_finished))
    for sent in found.values():
        those, why = _counted(sent)
        accepted += those
        refused += why
    return Read(tuple(accepted), tuple(sorted(refused)))


def _counted(sent: Sequence[tuple[Response, bool]]) -> tuple[list[Response], list[tuple[str, str]]]:
    """Of the responses from one form, each with whether it is finished: the one that counts, if any, and why the others do not."""
    form = sent[0][0].form
    finished = [each for each, is_finished in sent if is_finished]
    considered = sorted(
        finished or [each for each, _ in sent], key=lambda each: -_seconds(each)
    )  # the first stays so where they are equal
    refused, different = [], list[Response]()
    if finished:
        refused = [(each.file, f"duplicated: a finished response of form {form} is in {considered[0].file}") for each, is_finished in sent if not is_finished]  # fmt: skip
    for each in considered:
        same = next((other for other in different if _answers(other) == _answers(each)), None)
        if same is None:
            different.append(each)
        else:
            refused.append((each.file, f"duplicated: the same answers of form {form} are in {same.file}"))
    if len(different) == 1:
        return different, refused
    names = ", ".join(Path(each.file).name for each in different)
    return [], refused + [(each.file, f"duplicated: form {form} has {len(different)} different responses ({names}); leave one in") for each in different]  # fmt: skip


def _answers(response: Response) -> Any:
    """What was answered, whatever time it took."""
    return [{**page, "seconds": None} for page in (*response.pages, *response.long_form)], response.comment


def _seconds(response: Response) -> float:
    return sum(page["seconds"] for page in (*response.pages, *response.long_form))


def _files(places: Iterable[Path]) -> Iterable[Path]:
    for place in places:
        if place.is_dir():
            yield from sorted(each for each in place.iterdir() if each.is_file() and not each.name.startswith("."))
        else:
            yield place


def _checked(study: Study, file: Path, *, partial: bool) -> tuple[Response, bool]:
    """The response in a file, and whether it is finished.

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
    is_finished = _check_answers(study, form, said, partial=partial)
    return Response(form.name, str(file), tuple(map(_whole, said["pages"])), tuple(said["long_form"]), said["comment"]), is_finished  # fmt: skip


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


def _check_answers(study: Study, form: Form, said: dict[str, Any], *, partial: bool) -> bool:
    """Raise where answers are not of the form's pages, or not whole; whether they are finished."""
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
    return bool(said["finished"]) and not lacking


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
