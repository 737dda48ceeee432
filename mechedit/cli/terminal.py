"""What the commands share: where people read, progress, tables, and checks that come before the expensive part."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechedit.errors import MecheditError
from mechedit.wording import visible

if TYPE_CHECKING:
    from rich.console import Console

    from mechedit.edits import Edit
    from mechedit.facts import Fact
    from mechedit.models import HookedModel
    from mechedit.moments import Moment
    from mechedit.progress import Progress
    from mechedit.tracing import Trace
    from mechedit.tracing.averages import Average
    from mechedit.tracing.severing import Severed

__all__ = [
    "UsageError",
    "check_apart",
    "check_files",
    "check_places",
    "console_of",
    "has_display",
    "keeping",
    "load_model",
    "no_more",
    "progress_bars",
    "screen",
    "show_average",
    "show_doubts",
    "show_files",
    "show_moment",
    "show_notes",
    "show_sites",
    "show_table",
    "show_trace",
    "tolerant",
    "write_json",
]


SECONDS_A_LINE = 15.0  # between lines of progress where there is no terminal
COLUMNS = 160  # of what is written to a file or a pipe, where COLUMNS in the environment says nothing: tables keep their numbers whole


def console_of(arguments: argparse.Namespace) -> Console:
    """Where people read: standard output, or standard error where standard output is for JSON."""
    return screen(stderr=_is_standard(getattr(arguments, "json", None)))


def _is_standard(path: Path | None) -> bool:
    """Whether JSON goes to standard output."""
    return str(path) in ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def screen(*, stderr: bool) -> Console:
    """A console on which text is text: brackets are no markup, and what a terminal would obey is written out (`wording.visible`).

    A string is shown in one line. Where the reader has gone (`| head`), the rest is dropped and the command goes on to its end.
    """
    from rich.console import Console
    from rich.text import Text

    class Screen(Console):
        def render_str(self, text: str, **how: Any) -> Text:
            style, justify, overflow = how.get("style", ""), how.get("justify"), how.get("overflow")
            return Text(visible(text), style=style, justify=justify, overflow=overflow)

        def on_broken_pipe(self) -> None:
            self.quiet = True
            no_more(sys.stderr if stderr else sys.stdout)

    known = "COLUMNS" in os.environ or (sys.stderr if stderr else sys.stdout).isatty()
    width = None if known else COLUMNS
    return Screen(stderr=stderr, width=width, soft_wrap=False, markup=False, emoji=False, highlight=False)


def no_more(stream: Any) -> None:
    """Let what is still written to a stream whose reader has gone vanish."""
    with suppress(OSError, ValueError):  # a stream without a number, in tests say
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def tolerant(*streams: Any) -> None:
    """Let streams write out what their encoding has no character for."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A bar on standard error for each step that lasts, with the time left; a line now and then where that is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    if not sys.stderr.isatty():
        yield _progress_lines()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left", markup=False),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=screen(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(visible(what), total=of)
            bars.update(tasks[what], completed=done, total=of)

        yield report


def _progress_lines() -> Progress:
    """A line on standard error when a step has lasted a while, every so often after that, and at the end of what was spoken of; with the
    time left, if all goes on as fast."""
    said, begun, spoken = time.monotonic(), dict[str, tuple[float, int]](), set[str]()

    def report(what: str, done: int, of: int) -> None:
        nonlocal said
        now = time.monotonic()
        since, first = begun.setdefault(what, (now, done))
        if now - said >= SECONDS_A_LINE or (done == of and what in spoken):
            said = now
            spoken.add(what)
            left = (now - since) * (of - done) / (done - first) if first < done < of else 0.0
            sys.stderr.write(f"{visible(what)}: {done} of {of}{f', about {_lasting(left)} left' if left else ''}\n")
            sys.stderr.flush()
        if done == of:
            begun.pop(what)
            spoken.discard(what)

    return report


def _lasting(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


@contextmanager
def keeping(kept: str) -> Iterator[None]:
    """Let Ctrl-C say what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{kept}; the same command goes on from there") from None


def load_model(arguments: argparse.Namespace) -> HookedModel:
    from rich.console import Console
    from rich.text import Text

    what = Text(f"loading {visible(arguments.model)} (the first time converts or downloads it)")
    with Console(file=sys.stderr).status(what):  # the stream itself, because loading silences standard error
        import torch

        from mechedit import models

        return models.load(arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype))


def show_doubts(console: Console, model: HookedModel, fact: Fact, found: Trace | Severed) -> None:
    """What may surprise about prompt, subject and answer."""
    from mechedit import prompts

    if fact.target_true is None:
        console.print(f"no --answer is given, so it is what the model says first: {found.answer.strip()!r}")
    for note in prompts.audit(model, fact, prepend_bos=found.settings.prepend_bos).notes:
        console.print(f"note: {note}")


def show_trace(console: Console, trace: Trace, kinds: Sequence[str] = ()) -> None:
    """What was measured, P in percent, by token and layer, darker where restoring helps more; of all kinds by default."""
    from rich.table import Table
    from rich.text import Text

    from mechedit.tracing import measures

    took = "" if math.isnan(trace.seconds) else f"; traced in {trace.seconds:.1f} s"  # of a kept one nobody knows
    console.print(f"{trace.label} = {trace.p_clean:.3f} clean, {trace.p_corrupted:.3f} corrupted{took}")
    for note in trace.notes:
        console.print(f"note: {note}")
    begin, end = trace.subject_range
    percent = measures.of(trace.settings).share
    for kind, grid in trace.effects.items():
        if kinds and kind not in kinds:
            continue
        fits = max(1, (console.width - max(len(repr(token)) for token in trace.tokens) - 6) // 3)
        layers = range(0, len(grid), -(-len(grid) // fits))
        table = Table(
            title=f"{kind}: {trace.label}{' in percent' if percent else ''}, by token and layer (* subject)",
            box=None,
            padding=(0, 1, 0, 0),
            title_justify="left",
        )
        table.add_column("token")
        for layer in layers:
            table.add_column(str(layer), justify="right", min_width=2)
        highest = max(float(grid.nan_to_num(0.0).max()), 1e-9)
        for position, token in enumerate(trace.tokens):
            cells = []
            for layer in layers:
                p = float(grid[layer, position])
                if p != p:  # not traced
                    cells.append(Text(""))
                    continue
                share = min(1.0, max(0.0, p / highest))
                cells.append(
                    Text(
                        f"{100 * p if percent else p:.0f}",
                        style=f"{'bold white' if share > 0.5 else 'default'} {f'on color({_SHADES[int(share * (len(_SHADES) - 1))]})' if share > 0.1 else ''}",
                    )
                )
            table.add_row(repr(token) + ("*" if begin <= position < end else ""), *cells)
        console.print(table)


def show_sites(console: Console, found: Trace | Average) -> None:
    """Where restoring helped most, early and late, where the kinds for it were traced."""
    from mechedit import sites

    for name, find in (("early", sites.early), ("late", sites.late)):
        with suppress(sites.SiteError):
            console.print(f"{name} site: {find(found)}")


_SHADES = (22, 28, 34, 34, 40)


def show_notes(console: Console, named: Mapping[Path, Edit]) -> None:
    """What makes any of these edits less than one."""
    for path, edit in named.items():
        for note in edit.notes:
            console.print(f"note on {path}: {note}.")


def show_average(console: Console, mean: Average) -> None:
    """The best layer of each kind and role, with its interval."""
    from mechedit.tracing.roles import ROLES, TITLES

    rows = []
    for role, n in zip(ROLES, mean.n_role, strict=True):
        column = ROLES.index(role)
        cells = []
        for kind, grid in mean.indirect.items():
            if grid[:, column].isnan().all():
                cells.append("")
                continue
            layer = int(grid[:, column].nan_to_num(-1e9).argmax())
            cells.append(f"{mean.at(kind, layer, role)} layer {layer}")
        if any(cells):
            rows.append((TITLES[role], str(n), *cells))
    show_table(console, ("average indirect effect", "facts", *mean.indirect), rows)


def show_moment(console: Console, moment: Moment) -> None:
    show_table(console, ("", "second moment"), [(name, json.dumps(value)) for name, value in moment.to_json().items()])
    for note in moment.notes:
        console.print(f"note: {note}.")


def show_table(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    names = max((len(row[0]) for row in rows), default=0) <= 30  # short first cells are names, which are copied whole
    for index, name in enumerate(header):
        table.add_column(Text(visible(name)), overflow="fold", no_wrap=names and index == 0)
    for row in rows:
        table.add_row(*(Text(visible(cell), overflow="fold") for cell in row))
    console.print(table)


def show_files(console: Console, paths: Sequence[Path], unsaved: str = "") -> None:
    """Where results were written; where none was, what would keep them."""
    if paths or unsaved:
        console.print("wrote" if paths else f"nothing is saved: {unsaved}")
    for path in paths:
        console.print(f"  {path}", soft_wrap=True)


def check_places(*paths: Path | None) -> None:
    """Raise for a result that could not be written, before anything is computed."""
    from mechedit.cache import check_writable

    for path in paths:
        if path is not None and not _is_standard(path):
            check_writable(path)


def check_apart(out: Path, files: Sequence[Path]) -> None:
    """Raise where a result would take the place of a file that it is made of."""
    if os.path.realpath(out) in map(os.path.realpath, files):  # which no circle of links stops
        raise UsageError(f"--out {out} is one of the files that it is made of; name another file.")


def check_files(*paths: Path | None) -> None:
    """Raise for a text file that is not there, before a model is loaded."""
    for path in paths:
        if path and not path.is_file():
            what = "it is a folder; name its files" if path.is_dir() else "there is no such file"
            raise UsageError(f"{path} cannot be read: {what}.")


def write_json(path: Path | None, record: Any) -> list[Path]:
    """Write the result as JSON, where it is wanted; the file written, if any."""
    if path is None:
        return []
    from mechedit.cache import atomic_write

    if _is_standard(path):
        sys.stdout.write(_json(record, is_utf=(sys.stdout.encoding or "").lower().startswith("utf")))
        sys.stdout.flush()
        return []
    with atomic_write(path) as temporary:
        temporary.write_text(_json(record, is_utf=True), encoding="utf-8")
    return [path]


def _json(record: Any, *, is_utf: bool) -> str:
    """The record as text that any reader of JSON takes; half a surrogate pair, and what another encoding lacks, is escaped."""
    from mechedit.cache import plain

    text = json.dumps(plain(record), ensure_ascii=not is_utf, indent=1, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()


class UsageError(MecheditError, ValueError):
    """Options that do not go together."""


def has_display() -> bool:
    """Whether a browser can be seen; without, one may start in the terminal, or hang."""
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
