"""What every experiment does: a command line from its settings, one result file with settings, versions and seed."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from mechedit import cache, facts, organism, provenance, sources
from mechedit.facts import Fact
from mechedit.models import HookedModel, identity
from mechedit.runs import tracing

OUT = Path(__file__).parents[1] / "out"
FIGURES = Path(__file__).parents[1] / "figures"
Settings = TypeVar("Settings")


def parse(settings: type[Settings], argv: list[str] | None = None) -> Settings:
    """The settings, each field an option with its default. Ctrl-C then ends a script in a line."""
    if argv is None:
        sys.excepthook = _told
    parser = argparse.ArgumentParser(
        description=settings.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for each in fields(settings):  # type: ignore[arg-type]
        several = isinstance(each.default, tuple)
        example = each.default[0] if several else each.default
        kind = Path if isinstance(example, Path) else type(example)
        flag = "--" + each.name.replace("_", "-")
        if isinstance(example, bool):
            parser.add_argument(flag, action="store_true", default=each.default)
            continue
        parser.add_argument(flag, type=kind, default=each.default, nargs="+" if several else None)
    chosen = vars(parser.parse_args(argv))
    return settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()})


def _told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A traceback for whatever is wrong, and none for Ctrl-C."""
    if issubclass(kind, KeyboardInterrupt):
        say("stopped")
    else:
        sys.__excepthook__(kind, error, trace)


def write(name: str, model: HookedModel, settings: Any, result: dict[str, Any]) -> Path:
    """Write a result as JSON under figures/MODEL/, with all that made it."""
    plain = {key: value.name if isinstance(value, Path) else value for key, value in asdict(settings).items()}
    record = {"settings": plain, "origin": provenance.origin(model), "versions": provenance.versions(), **result}
    path = FIGURES / short_name(model) / f"{name}.json"
    with cache.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return path


def runs(model: HookedModel, name: str) -> Path:
    """The folder of a resumable run, out of git's sight: out/MODEL/NAME."""
    return OUT / short_name(model) / name


def short_name(model: HookedModel) -> str:
    """The model's name without its owner."""
    return str(model.cfg.model_name).rsplit("/", 1)[-1]


def known_facts(model: HookedModel, n: int, seed: int) -> list[Fact]:
    """`n` facts whose whole answer is what the model says, in an order fixed by the seed: published known facts and built-in ones; of
    the organism, those of its world.

    The published file is read from MECHEDIT_DATA, or ../shared/data beside the project; without it the built-in facts
    serve alone.
    """
    data = Path(os.environ.get("MECHEDIT_DATA", Path(__file__).parents[2] / "shared" / "data")) / "known_facts.json"
    candidates = [*(facts.read(data) if data.is_file() else ()), *facts.built_in()]
    if short_name(model) in organism.MODELS:
        candidates = list(sources.named("organism"))
    unique = list({(fact.prompt, fact.subject): fact for fact in candidates}.values())
    random.Random(seed).shuffle(unique)  # noqa: S311 (a sample)
    memory = (
        OUT
        / short_name(model)
        / f"known-{cache.content_key(['whole answers', identity(model).whole, [[fact.prompt, fact.target_true] for fact in unique]])}.json"
    )
    if memory.is_file():
        wanted = set(json.loads(memory.read_text()))
        kept = [fact for fact in unique if fact.prompt in wanted]
    else:
        kept = tracing.known(model, unique, progress=progress())
        with cache.atomic_write(memory) as temporary:
            temporary.write_text(json.dumps([fact.prompt for fact in kept]))
    say(f"{short_name(model)} knows {len(kept)} of {len(unique)} facts; {min(n, len(kept))} are used")
    return kept[:n]


def commit_of(checkout: Path) -> str:
    """The commit of another version of mechedit, in seven digits.

    Raises:
        SystemExit: that is no checkout of one.
    """
    if not (checkout / "mechedit").is_dir():
        raise SystemExit(f"--old must be a checkout of another version of mechedit; found {checkout}.")
    command = ["git", "-C", str(checkout), "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def say(text: str) -> None:
    """A line for whoever watches."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def progress(every: int = 20) -> Callable[[str, int, int], None]:
    """A line now and then."""

    def report(what: str, done: int, of: int) -> None:
        if of and done % max(1, of // every) == 0:
            say(f"  {what}: {done} of {of}")

    return report
