"""The `mechedit` command: thin, its options generated from the settings that Python uses.

Nothing heavy is imported before it is needed, so help answers at once. A mistake of the caller's ends in one line on standard error. The
exit status is 0 where all was done; 2 where a mistake, a refusal or a file that cannot be used is told; 1 where the operating system
refuses what was not foreseen; 130 after Ctrl-C, with the model's weights untouched.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mechedit import __version__
from mechedit.cache import CacheWarning
from mechedit.cli.applying import add_applying
from mechedit.cli.calibrating import add_calibrating
from mechedit.cli.choosing import named_in
from mechedit.cli.documenting import add_documenting
from mechedit.cli.editing import add_editing
from mechedit.cli.evaluating import add_evaluating
from mechedit.cli.looking import add_looking
from mechedit.cli.moments import add_moments
from mechedit.cli.options import Parser, check_texts, options_of
from mechedit.cli.results import add_results
from mechedit.cli.studying import add_studying
from mechedit.cli.terminal import no_more, tolerant
from mechedit.cli.tracing import add_tracing
from mechedit.cli.training import add_training
from mechedit.cli.tuning import add_tuning
from mechedit.cli.viewing import add_viewing
from mechedit.errors import ManyMistakes, MecheditError
from mechedit.wording import meant, visible

__all__ = ["main"]

STATUS = (
    "Exit status: 0 all was done; 2 a mistake in the command or a file, or a refusal, told in a line on standard error; 1 what the "
    "operating system refused; 130 interrupted, and what is finished is kept."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    tolerant(sys.stdout, sys.stderr)
    try:
        with _notes():
            _run(given)
        sys.stdout.flush()
    except MecheditError as error:
        _say(*(str(error).split("\n") if isinstance(error, ManyMistakes) else [str(error)]))
        return 2
    except KeyboardInterrupt as error:
        _say(f"interrupted; {str(error) or 'nothing was changed and no result was written'}.")
        return 130
    except BrokenPipeError:
        no_more(sys.stdout)
        no_more(sys.stderr)
        return 1
    except OSError as error:  # a full disk behind standard output, a name that is too long
        _say(f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}.")
        no_more(sys.stdout)  # what could not be written is not tried again at the end
        return 1
    return 0


def _run(given: Sequence[str]) -> None:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last, where nothing is hidden by it: editors and benchmarks of one's own
    arguments, unknown = _parser(named_in(given)).parse_known_args(given)
    if unknown:
        words = " ".join(unknown)
        near = next(
            (found for word in unknown if (found := meant(word.split("=")[0], options_of(arguments.parser)))), ""
        )
        arguments.parser.error(f"unrecognized arguments: {words}{near}{_whose(arguments)}")
    check_texts(arguments)
    arguments.run(arguments)


def _say(*lines: str) -> None:
    """A line on standard error, and those that belong to it."""
    sys.stderr.write(f"mechedit: {visible(lines[0])}\n" + "".join(f"{visible(line)}\n" for line in lines[1:]))


@contextmanager
def _notes() -> Iterator[None]:
    """Tell our own warnings in a line, without the place in the code."""

    told: set[type[Warning]] = set()

    def show(message: Any, kind: type[Warning], *place: Any, **named: Any) -> None:
        if kind in told and kind is CacheWarning:  # which is told once
            return
        told.add(kind)
        if kind.__module__.startswith("mechedit"):
            sys.stderr.write(f"note: {visible(message)}\n")
        else:
            plainly(message, kind, *place, **named)

    with warnings.catch_warnings():
        plainly = warnings.showwarning
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _whose(arguments: argparse.Namespace) -> str:
    """Whose options a command has, where they are an editor's."""
    editor = getattr(arguments, "editor", None)
    return (
        f"; these are not options of the editor {editor} (`--editor NAME --help` lists those of another)"
        if editor
        else ""
    )


def _parser(editor: str) -> argparse.ArgumentParser:
    """The commands, with the options of the editor that this command line names."""
    parser = Parser(
        prog="mechedit", description="Find where a transformer recalls a fact, and rewrite it there.", epilog=STATUS
    )
    parser.add_argument("--version", action="version", version=f"mechedit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_tracing(commands)
    add_editing(commands, editor)
    add_applying(commands)
    add_tuning(commands, editor)
    add_calibrating(commands, editor)
    add_training(commands)
    add_moments(commands)
    add_evaluating(commands, editor)
    add_results(commands)
    add_studying(commands)
    add_viewing(commands)
    add_looking(commands)
    add_documenting(commands)
    return parser
