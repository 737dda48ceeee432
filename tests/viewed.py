"""Results made by hand for pages: no model, numbers that a test can know, and text that would do harm if it were more than text."""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mechedit.edits import Edit, Measured
from mechedit.rank_one import RankOneEdit
from mechedit.runs.results import Evaluation
from mechedit.runs.sweeping import Sweep
from mechedit.settings import TraceSettings
from mechedit.tracing import Trace
from mechedit.tracing.averages import Average, average
from mechedit.tracing.severing import Severed

HOSTILE = (
    "</script><script>document.title='ran'</script>",
    "<img src=x onerror=\"document.title='ran'\">",
    "\u2028\u2029\"'`${1}&amp;<!--",
    "\u202eright to left\u202c",
    "\ud800 half a pair",
    "x" * 10_000,
    "\x1b[31m\x00\n\ttab",
    "]]> --> {{7*7}} \\u003c",
)
ORIGIN = {"name": "a model", "weights": "w", "class": "HookedTransformer"}


def value(layer: int, position: int, kind: int) -> float:
    """What every cell of a made trace has."""
    return round(0.1 + 0.013 * layer + 0.029 * position + 0.007 * kind, 4)


def trace(layers=6, tokens=("<bos>", "The", " Space", " Needle", " is", " in"), draws=3, prompt="The Space Needle is in", **named) -> Trace:  # fmt: skip
    """A trace whose cells have `value`; the draws of each lie around it."""
    kinds = ("resid", "mlp", "attn")
    grids = {kind: torch.tensor([[value(layer, position, number) for position in range(len(tokens))] for layer in range(layers)]) for number, kind in enumerate(kinds)}  # fmt: skip
    spread = torch.linspace(-0.02, 0.02, draws) if draws > 1 else torch.zeros(1)
    around = {kind: grid[:, :, None] + spread for kind, grid in grids.items()}
    parts = {
        "prompt": prompt,
        "tokens": tuple(tokens),
        "subject": "The Space Needle",
        "subject_range": (1, 4),
        "relation": None,
        "answer": " Seattle",
        "answer_ids": (5,),
        "corrupted_by": "gaussian noise",
        "p_clean": 0.6,
        "p_corrupted": 0.05,
        "effects": {kind: each.mean(-1) for kind, each in around.items()},
        "draws": around,
        "noise_std": 3.0,
        "settings": TraceSettings(draws=draws, window=3),
        "origin": ORIGIN,
        "versions": {"python": "3"},
    }
    return Trace(**(parts | named))


def mean(facts=24) -> Average:
    """An average of so many made traces, each a little higher than the last."""
    made = []
    for index in range(facts):
        one = trace(prompt=f"The Space Needle is in {index}")
        higher = {kind: grid + 0.002 * index for kind, grid in one.effects.items()}
        made.append(trace(prompt=one.prompt, effects=higher))
    return average(made)


def curves(index=0) -> Severed:
    """Severed curves of four layers and two draws: 0.4, 0.3, 0.2 and 0.1 at layer 0, falling."""
    lines = {name: torch.tensor([[base / (layer + 1), base / (layer + 1) + 0.02] for layer in range(4)]) + 0.001 * index for name, base in (("ordinary", 0.4), ("mlp", 0.1), ("attn", 0.3))}  # fmt: skip
    return Severed("The Space Needle is in", "The Space Needle", " Seattle", 3, "subject_last", 0.6, 0.05, lines, TraceSettings(draws=2), True, "noise", ORIGIN, {"python": "3"})  # fmt: skip


def swept(facts=24) -> Sweep:
    """A sweep of three layers and two tokens, with a correlation that has an interval."""
    random = np.random.default_rng(0)
    scores = {name: random.random((facts, 3, 2)) for name in ("ES", "PS", "NS")}
    return Sweep((0, 2, 4), ("subject_last", "last"), scores, random.random((facts, 3, 2)), 0, ORIGIN, {"editor": "rome", "sweep": {"draws": 2}, "edit": {"steps": 3}})  # fmt: skip


@cache
def swept_record() -> dict[str, Any]:
    """What is kept of it; its intervals take seconds."""
    return swept().to_json()


def edit(**named) -> Edit:
    """An edit of one weight, which left a band."""
    fact = {"prompt": "The Space Needle is in", "subject": "The Space Needle", "target_new": "Paris", "target_true": "Seattle"}  # fmt: skip
    parts = {
        "editor": "rome",
        "changes": (RankOneEdit(3, torch.ones(4), torch.ones(5), 2.0),),
        "facts": (Measured(fact, {"p_new": 0.01, "p_true": 0.9}, {"p_new": 0.8, "p_true": 0.1}),),
        "report": {"update_norm": 1.0, "relative_norm": 1.5, "essence_kl": 0.1, "perplexity_ratio": 1.0},
        "origin": ORIGIN,
        "settings": {"layer": 3},
        "versions": {"python": "3"},
        "seconds": 1.5,
        "reasons": ("relative_norm = 1.5 is above 1",),
    }
    return Edit(**(parts | named))


def evaluation(records=30, editor="rome", neighbours=3, texts=2, length=40, harm=False) -> Evaluation:
    """An evaluation whose ES after the edit is 0 for every third record; PS is the record's number over how many there are."""
    facts, before, after, prompts, written = [], [], [], [], []
    words = [
        "the",
        "city",
        "lies",
        "on",
        "a",
        "river",
        "where",
        "people",
        "trade",
        "and",
        "sing",
        "towers",
        "old",
        "bridges",
    ]
    random = np.random.default_rng(1)
    for index in range(records):
        bad = HOSTILE[index % len(HOSTILE)] if harm else ""
        facts.append({"id": str(index), "subject": f"Subject {index}", "prompt": f"Subject {index} is in{bad}", "target_new": f"Paris{bad}", "target_true": "Seattle", "relation": ("city", "land")[index % 2] + bad, "reason": f"a note{bad}" if index == 4 else ""})  # fmt: skip
        before.append({"ES": 0.0, "PS": 0.0, "NS": 1.0, "p_new": 0.01})
        after.append({"ES": float(index % 3 > 0), "PS": index / records, "NS": 1.0 if index % 5 else math.nan, "p_new": 0.9, "drift": 0.1})  # fmt: skip
        for stage, new in (("before", -5.0), ("after", -0.1)):
            asked = [("prompt", facts[-1]["prompt"]), ("paraphrase", f"Where is {index}? In")]
            asked += [("neighbour", f"Neighbour {index} {each} is in{bad}") for each in range(neighbours)]
            for kind, prompt in asked:
                own = new if kind != "neighbour" else -6.0
                for target, p in ((f"Paris{bad}", own), ("Seattle", -2.0)):
                    prompts.append({"stage": stage, "record": index, "kind": kind, "prompt": prompt, "target": target, "log_p": [p, p], "first": [p > -1, True]})  # fmt: skip
            for each in range(texts):
                text = " ".join(random.choice(words, length))
                written.append({"stage": stage, "record": index, "prompt": f"Story {each}:", "text": f"Story {each}: {text}{bad}"})  # fmt: skip
    what = {"editor": editor, "settings": {"mode": "independent"}, "model": {"name": "a model"}, "benchmark": "counterfact"}  # fmt: skip
    kept = {"prompts": prompts, "texts": written}
    return Evaluation(tuple(facts), {"before": before, "after": after}, what, 0, lambda name: iter(kept[name]))


def like_counterfact(records=1000, editor="rome", seed=0) -> Evaluation:
    """An evaluation of COUNTERFACT's shape: two paraphrases, ten neighbours, these behind the new fact too, and ten texts of a hundred
    tokens before and after. Texts are words of the documentation at random, as often as it has them: as hard to compress as prose, and
    before an edit the same whatever the editor."""
    pages = sorted(Path(__file__).parents[1].glob("docs/*.md"))
    words = np.array(re.findall(r"[A-Za-z]+[.,]?", " ".join(page.read_text(encoding="utf-8") for page in pages)))
    names = ("ES", "EM", "PS", "PM", "NS", "NM", "p_new", "rewrite_acc", "rephrase_acc", "N+", "SR", "drift", "GE")
    facts, rows, prompts, written = [], {"before": [], "after": []}, [], []
    random = {"before": np.random.default_rng(0), "after": np.random.default_rng(seed + 1)}
    wording = np.random.default_rng(0)
    for index in range(records):
        told = [" ".join(line) for line in words[wording.integers(len(words), size=(13, 6))]]
        new, true, *subject = words[wording.integers(len(words), size=4)]
        asked = [("prompt", told[0]), *(("paraphrase", each) for each in told[1:3])]
        asked += [(kind, before + each) for kind, before in (("neighbour", ""), ("neighbour behind", f"{told[0]} {new}. ")) for each in told[3:]]  # fmt: skip
        facts.append({"id": str(index), "subject": " ".join(subject), "prompt": told[0], "target_new": str(new), "target_true": str(true), "relation": f"P{index % 34}", "reason": ""})  # fmt: skip
        for stage, drawn in random.items():
            rows[stage].append(dict(zip(names, drawn.random(len(names)).tolist(), strict=True)))
            log_p = iter((-15 * drawn.random(2 * len(asked))).tolist())
            prompts += [{"stage": stage, "record": index, "kind": kind, "prompt": prompt, "target": str(target), "log_p": [next(log_p)], "first": [True]} for kind, prompt in asked for target in (new, true)]  # fmt: skip
            for each, line in enumerate(words[drawn.integers(len(words), size=(10, 70))]):
                begin = f"{' '.join(subject)} {('lives in', 'is known for', 'often travels to')[each % 3]}"
                written.append({"stage": stage, "record": index, "prompt": begin, "text": f"{begin} {' '.join(line)}"})
    what = {"editor": editor, "settings": {"mode": "independent"}, "model": {"name": "a model"}, "benchmark": "counterfact"}  # fmt: skip
    kept = {"prompts": prompts, "texts": written}
    return Evaluation(tuple(facts), rows, what, 0, lambda name: iter(kept[name]))
