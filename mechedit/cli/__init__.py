"""The `mechedit` command: thin, its options generated from the settings that Python uses.

Nothing heavy is imported before it is needed, so help answers at once. A mistake of the caller's ends in one line on
standard error and exit status 2; Ctrl-C in 130, with the model's weights untouched.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mechedit import __version__
from mechedit.cli.applying import add_applying
from mechedit.cli.choosing import named_in
from mechedit.cli.editing import add_editing
from mechedit.cli.evaluating import add_evaluating
from mechedit.cli.looking import add_looking
from mechedit.cli.moments import add_moments
from mechedit.cli.options import Parser
from mechedit.cli.tracing import add_tracing
from mechedit.cli.tuning import add_tuning
from mechedit.errors import MecheditError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(
            str(Path.cwd())
        )  # last: where editors and benchmarks of one's own are, and nothing is hidden by it
    try:
        arguments, unknown = _parser(named_in(given)).parse_known_args(given)
        if unknown:
            arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}{_whose(arguments)}")
        arguments.run(arguments)
    except MecheditError as error:
        sys.stderr.write(f"mechedit: {error}\n")
        return 2
    except KeyboardInterrupt as error:
        sys.stderr.write(f"mechedit: interrupted; {str(error) or 'nothing was changed and no result was written'}.\n")
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    return 0


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
    parser = Parser(prog="mechedit", description="Find where a transformer recalls a fact, and rewrite it there.")
    parser.add_argument("--version", action="version", version=f"mechedit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_tracing(commands)
    add_editing(commands, editor)
    add_applying(commands)
    add_tuning(commands, editor)
    add_moments(commands)
    add_evaluating(commands, editor)
    add_looking(commands)
    return parser
