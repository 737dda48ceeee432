"""The `mechedit` command: thin, its options generated from the settings that Python uses.

Nothing heavy is imported before it is needed, so help answers at once. A mistake of the caller's ends in one line on
standard error and exit status 2; Ctrl-C in 130, with the model's weights untouched.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mechedit import __version__
from mechedit.cli.editing import add_editing
from mechedit.cli.evaluating import add_evaluating
from mechedit.cli.looking import add_looking
from mechedit.cli.options import Parser
from mechedit.cli.tracing import add_tracing
from mechedit.errors import MecheditError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
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


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mechedit", description="Find where a transformer recalls a fact, and rewrite it there.")
    parser.add_argument("--version", action="version", version=f"mechedit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_tracing(commands)
    add_editing(commands)
    add_evaluating(commands)
    add_looking(commands)
    return parser
