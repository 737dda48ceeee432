"""What each editor makes the model write, side by side (appendix G).  python -m experiments.figure6_generations

A few facts, each edited alone by every editor: after the prompt, a paraphrase, a prompt for free text and a neighbour's prompt, the
model's greedy continuation and a sampled one, beside those of the unedited model. Nothing is chosen by how it looks: the facts are the
first ones of the benchmark from `begin` on. On the organism they are of its own world.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments.common import FIGURES, parse, say, short_name, write
from experiments.editing import TRAINED, benchmark_facts
from mechedit import applying, cache, editing, generation, models, prompts
from mechedit.editors import BUILT_IN, named
from mechedit.edits import Edit
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.runs.editing import attempt

UNEDITED = "unedited"


@dataclass(frozen=True)
class Figure6:
    """Settings of the experiment."""

    model: str = "gemma-3-270m"
    begin: int = 2000  # after the facts of the tables and of figure 5
    facts: int = 4
    editors: tuple[str, ...] = (
        "",
    )  # by name; empty: those of mechedit, controls aside, that have a preset for the model
    tokens: int = 30  # of each continuation
    top_k: int = 5  # of the sampled ones
    seed: int = 0
    threads: int = 2


def main(settings: Figure6) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    ways = [name for name in settings.editors if name] or suited(model)
    facts = benchmark_facts(settings.model, settings.begin, settings.facts)
    written: dict[int, list[dict[str, Any]]] = {id(fact): [] for fact in facts}
    for name in ways:
        editor = named(name)
        chosen = editor.resolve(model, replace(editor.settings(), guard="warn", seed=settings.seed))
        prepared = editing.make_ready(model, editor, chosen)
        for fact in facts:
            edit = attempt(model, [fact], editor, chosen, prepared)
            written[id(fact)].append({"editor": name, **_told_of(edit), "texts": _texts(model, fact, settings, edit)})
        say(f"{name}: {len(facts)} facts")
    record = [
        {"prompt": fact.prompt, "target_true": fact.target_true, "target_new": fact.target_new, "texts": _texts(model, fact, settings), "edited": written[id(fact)]}
        for fact in facts
    ]  # fmt: skip
    say(f"wrote {write('figure6_generations', model, replace(settings, editors=tuple(ways)), {'facts': record})}")
    say(f"wrote {_write_pages(FIGURES / short_name(model) / 'figure6_generations.md', model, settings, record)}")


def suited(model: HookedModel) -> list[str]:
    """The editors that are no variant of another, need no training, and have a preset for the model, or no layer that could suit one."""
    preset = models.preset(model)
    ways = {name: named(name) for name in BUILT_IN}
    return [
        name
        for name, way in ways.items()
        if way.of == name not in TRAINED
        and (not hasattr(way.settings, "layer") or (preset and name in preset.settings))
    ]


def asked(fact: Fact) -> dict[str, str]:
    """The prompts that are gone on from, by what they are: the fact's own, and the first of each other kind that it has."""
    others = {"paraphrase": fact.paraphrases, "free text": fact.generations, "neighbour": fact.neighbours}
    return {"prompt": fact.prompt} | {kind: each[0] for kind, each in others.items() if each}


def _texts(model: HookedModel, fact: Fact, settings: Figure6, edit: Edit | None = None) -> list[dict[str, str]]:
    """Of each prompt, the greedy and a sampled continuation, on the model with the edit, if any."""
    with applying.edited(model, *([edit] if edit else []), force=True):
        return [
            {"kind": kind, "prompt": prompt, "greedy": generation.complete(model, prompt, settings.tokens)}
            | {"sampled": _sampled(model, prompt, settings)}
            for kind, prompt in asked(fact).items()
        ]


def _sampled(model: HookedModel, prompt: str, settings: Figure6) -> str:
    own = len(prompts.bare(model, prompt, prepend_bos=False)[0])
    (text,) = generation.continuations(model, [prompt], own + settings.tokens, top_k=settings.top_k, seed=settings.seed)
    return text.removeprefix(prompt)


def _told_of(edit: Edit) -> dict[str, Any]:
    """Of the edit, its settings, and what it says of itself."""
    notes = [*edit.reasons, *edit.doubts]
    return {"settings": edit.settings, "p_new": edit.facts[0].after.get("p_new"), "digest": edit.digest, "notes": notes}


def _write_pages(path: Path, model: HookedModel, settings: Figure6, record: Sequence[dict[str, Any]]) -> Path:
    """All of it as Markdown, a table for each prompt."""
    lines = [
        f"# What editors make {short_name(model)} write",
        f"Greedy, and sampled among the {settings.top_k} most probable tokens (seed {settings.seed}), {settings.tokens} tokens; "
        f"facts {settings.begin} to {settings.begin + len(record) - 1} of the benchmark, each edited alone.",
    ]
    for fact in record:
        lines.append(f"## {_cell(fact['prompt'])} {_cell(fact['target_true'])} → {_cell(fact['target_new'])}")
        ways = [(UNEDITED, fact["texts"]), *((each["editor"], each["texts"]) for each in fact["edited"])]
        for at, first in enumerate(fact["texts"]):
            rows = [f"| {way} | {_cell(texts[at]['greedy'])} | {_cell(texts[at]['sampled'])} |" for way, texts in ways]
            lines.append(f"{first['kind'].capitalize()}: *{_cell(first['prompt'])}* …")
            lines.append("\n".join(["| | greedy | sampled |", "|---|---|---|", *rows]))
        notes = [f"{each['editor']}: {_cell(note.rstrip('.'))}" for each in fact["edited"] for note in each["notes"]]
        lines += ["Notes. " + "; ".join(notes) + "."] if notes else []
    with cache.atomic_write(path) as temporary:
        temporary.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


def _cell(text: str) -> str:
    """A text in a line of Markdown, as it is."""
    marked = "".join(f"\\{letter}" if letter in "\\|*_`<>[]#" else letter for letter in text.strip())
    return " ⏎ ".join(marked.splitlines())


if __name__ == "__main__":
    main(parse(Figure6))
