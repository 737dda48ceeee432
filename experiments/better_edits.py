"""What makes a single edit better, and does not only trade paraphrases for neighbours?  python -m experiments.better_edits

Each row is a way to edit, of the same facts, each alone; all are compared with the default record by record:
- default: ROME, as the model's preset has it;
- spread: the same value, found at the last of `layers` and written over them in even parts, exactly (EMMET);
- spread by effect: in parts as large as the average trace's indirect effects of these layers' MLPs (figure2_average_effects);
- spread in full: each layer writes all that is still wanted;
- sentences: before the prompt stand whole sentences of other topics, as before COUNTERFACT's paraphrases, in place of sampled beginnings;
- paraphrases: what the model itself writes in the prompt's place, where that leads to the true answer, is edited with the prompt;
- bound: the change is no longer than `bound` times the weight;
- quick: v* is sought with fewer prompts, each of which is left out when it is learnt (`--search quick`); for less time, not for more success;
- few: the same with fewer still (`--search few`);
- prose: C is also of prose (WikiText-2), of as many keys as of text sampled from the model;
- statements: C is also of prose and of true statements about subjects that the edited records do not name, of as many keys each;
- statements, further: so, and v* may go as far as `further` lengths of the value;
- fisher; statements, fisher; statements, fisher, further: v* also keeps clear of what ordinary text depends on (`--fisher`);
- null space: the change stays where ordinary keys are small, in the `null` share of C's directions.

Nothing is refused (`guard`). Scores are kept in out/ as soon as they are found, so a killed run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments.common import FIGURES, parse, progress, say, short_name, write
from experiments.editing import (
    LESS,
    Row,
    also_of,
    benchmark_facts,
    compared,
    corrected,
    data,
    folder,
    gained,
    stated,
    statements,
    write_table,
)
from mechedit import editing, generation, models, writing
from mechedit.changes import LowRank
from mechedit.closed_form import bounded
from mechedit.editing import Editor, Found, State
from mechedit.editors import named, rome
from mechedit.editors.rome import Prepared, Rome
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.progress import Progress, silent
from mechedit.runs.evaluating import evaluate
from mechedit.runs.results import Evaluation
from mechedit.settings import EmmetSettings, EvaluateSettings, RomeSettings, given
from mechedit.settings.rome import SEARCHES
from mechedit.weights import value

COLUMNS = ("S", "ES", "EM", "PS", "PM", "NS", "NM", "answer", "drift", "drift_log_p")
ROWS = (
    "default",
    "spread",
    "spread by effect",
    "spread in full",
    "sentences",
    "paraphrases",
    "bound",
    "null space",
    "quick",
    "few",
    "prose",
    "statements",
    "statements, further",
    "fisher",
    "statements, fisher",
    "statements, fisher, further",
)
ASKED = ("{} In other words:", "{} That is to say,", "{} Put differently,", "{} To say it in another way:")


@dataclass(frozen=True)
class BetterEdits:
    """Settings of the experiment."""

    model: str = "gemma-3-270m"
    begin: int = 0
    facts: int = 40
    layers: tuple[int, ...] = (2, 3, 4, 5)  # of the spread rows; around the peak of Gemma's average trace
    sentences: int = 8  # of other topics
    others: int = 3000  # the benchmark's fact from which on those sentences are made
    statements: int = 5000  # of them for C
    bound: float = 0.035  # times the weight's norm; the default's changes are of about 0.048
    null: float = 0.9  # share of C's directions, those of its smallest eigenvalues
    further: float = 1.0  # the clamp; the default's is 0.75
    fisher: float = 4.0  # the weight of what v* costs ordinary text
    rows: tuple[str, ...] = ROWS
    name: str = "better_edits"  # of the figure, which has the rows that were run
    seed: int = 0
    threads: int = 2


class Sentences(Rome):
    """ROME whose prompts stand behind these sentences, and bare."""

    name = "rome-sentences"

    def __init__(self, before: Sequence[str]) -> None:
        self.before = ("", *before)

    def prepare(self, model: HookedModel, settings: RomeSettings, *, progress: Progress = silent) -> Prepared:
        return rome.prepare(model, settings, prefixes=self.before, progress=progress)


class Paraphrased(Rome):
    """ROME that edits what the model writes in the prompt's place together with the prompt."""

    name = "rome-paraphrased"

    def find(self, model: HookedModel, facts: Sequence[Fact], settings: RomeSettings, prepared: Prepared, state: State, *, progress: Progress = silent) -> Found:  # fmt: skip
        more = [each for fact in facts for each in paraphrases(model, fact, prepend_bos=bool(settings.prepend_bos))]
        found = super().find(model, [*facts, *more], settings, prepared, state, progress=progress)
        return replace(found, report={**found.report, "paraphrases": float(len(more))}, details={**found.details, "paraphrases": [each.prompt for each in more]})  # fmt: skip


class Informed(Rome):
    """ROME whose C is also of other texts."""

    name = "rome-informed"

    def __init__(self, texts: Sequence[Path]) -> None:
        self.texts = texts

    def prepare(self, model: HookedModel, settings: RomeSettings, *, progress: Progress = silent) -> Prepared:
        return rome.prepare(model, settings, also_of(model, settings, self.texts, progress), progress=progress)


class Bounded(Rome):
    """ROME whose change is no longer than a share of its weight."""

    name = "rome-bounded"

    def __init__(self, share: float) -> None:
        self.share = share

    def find(self, model: HookedModel, facts: Sequence[Fact], settings: RomeSettings, prepared: Prepared, state: State, *, progress: Progress = silent) -> Found:  # fmt: skip
        found = super().find(model, facts, settings, prepared, state, progress=progress)
        changes = []
        for change in found.changes:
            own, factors = float(value(model, change.weight).detach().double().norm()), change.factors()
            assert factors is not None
            changes.append(bounded(LowRank(change.weight, *factors), self.share * own))
        return replace(found, changes=changes)


def paraphrases(model: HookedModel, fact: Fact, *, prepend_bos: bool) -> list[Fact]:
    """What the model, asked to say the fact otherwise, writes before the true answer, where its subject stands there, as prompts."""
    told = "".join(writing.seam(fact.prompt, str(fact.target_true), fact.join)) + "."
    texts = generation.completions(model, [asked.format(told) for asked in ASKED], 30, prepend_bos=prepend_bos)
    found: dict[str, Fact] = {}
    for text in texts:
        said = text.strip().splitlines()[0] if text.strip() else ""
        prompt, answer, _ = said.partition(str(fact.target_true))
        prompt = prompt.strip()
        if answer and prompt.count(fact.subject) == 1 and prompt != fact.prompt and not prompt.endswith(fact.subject):
            template = prompt.replace("{", "(").replace("}", ")").replace(fact.subject, "{}")
            found[prompt] = replace(fact, template=template, paraphrases=(), neighbours=(), neighbour_answers=())
    return list(found.values())


def effects(model: HookedModel, layers: Sequence[int]) -> tuple[float, ...]:
    """The average trace's indirect effect of MLP windows at the subject's last token, at these layers.

    Raises:
        SystemExit: there is none for the model.
    """
    path = FIGURES / short_name(model) / "figure2_average_effects.json"
    if not path.is_file():
        raise SystemExit(f"the row 'spread by effect' needs {path}: run experiments.figure2_average_effects.")
    record = json.loads(path.read_text())
    role = record["roles"].index("subject_last")
    return tuple(max(record["indirect_effect"]["mlp"][layer][role], 1e-3) for layer in layers)


def ways(settings: BetterEdits, model: HookedModel) -> dict[str, Callable[[], tuple[Editor, Any]]]:
    """What makes each row's editor and its settings."""
    default = replace(rome.resolve(model), guard="warn", seed=settings.seed)
    clear = replace(default, fisher=settings.fisher)
    emmet, prose = named("emmet"), data("wikitext2_valid.txt")
    others = benchmark_facts(settings.model, settings.others, settings.statements)

    def informed() -> Informed:
        chosen = benchmark_facts(settings.model, settings.begin, settings.facts)
        return Informed([prose, statements(model, chosen, others)])

    def spread(**fields: Any) -> tuple[Editor, Any]:
        own = {name: each for name, each in given(default).items() if name != "layer"}
        return emmet, emmet.resolve(model, EmmetSettings(**own | {"layers": settings.layers} | fields))

    def null() -> tuple[Editor, Any]:
        C = editing.make_ready(model, named("rome"), default).moment.C  # type: ignore[union-attr]
        edge = float(torch.linalg.eigvalsh(C.double()).quantile(settings.null))
        return emmet, emmet.resolve(model, EmmetSettings(**given(default) | {"null": edge}))

    return {
        "default": lambda: (named("rome"), default),
        "spread": lambda: spread(),
        "spread by effect": lambda: spread(portions=effects(model, settings.layers)),
        "spread in full": lambda: spread(spread="own"),
        "sentences": lambda: (Sentences([f"{stated(fact)} " for fact in others[: settings.sentences]]), default),
        "paraphrases": lambda: (Paraphrased(), default),
        "bound": lambda: (Bounded(settings.bound), default),
        "null space": null,
        "quick": lambda: (named("rome"), replace(default, **SEARCHES["quick"])),
        "few": lambda: (named("rome"), replace(default, **SEARCHES["few"])),
        "prose": lambda: (Informed([prose]), default),
        "statements": lambda: (informed(), default),
        "statements, further": lambda: (informed(), replace(default, clamp=settings.further)),
        "fisher": lambda: (named("rome"), clear),
        "statements, fisher": lambda: (informed(), clear),
        "statements, fisher, further": lambda: (informed(), replace(clear, clamp=settings.further)),
    }


def evaluated(settings: BetterEdits, model: HookedModel, row: str, editor: Editor, edit: Any) -> Evaluation:
    """The row's scores, from out/ as far as they are there."""
    chosen = benchmark_facts(settings.model, settings.begin, settings.facts)
    run = EvaluateSettings(health=False, seed=settings.seed)
    found = evaluate(model, chosen, folder(model, "better_edits", settings.begin, row), run, editor, edit, progress=progress(4))  # fmt: skip
    shown = found.table("after")
    say(f"{row}: {', '.join(f'{name} {shown[name]}' for name in COLUMNS if name in shown)}")
    return found


def main(settings: BetterEdits) -> None:
    torch.set_num_threads(settings.threads)
    if unknown := set(settings.rows) - set(ROWS):
        raise SystemExit(f"rows are {', '.join(ROWS)}; found {', '.join(sorted(unknown))}.")
    model = models.load(settings.model)
    made = ways(settings, model)
    chosen = {row: made[row]() for row in ("default", *settings.rows)}  # mistakes come before the first edit
    found = {row: evaluated(settings, model, row, *way) for row, way in chosen.items()}
    rows = {row: Row.of(each) for row, each in found.items()}
    differences = corrected(
        {
            LESS: {row: gained(each, COLUMNS) for row, each in found.items()},
            "less the default": {row: compared(found["default"], each, COLUMNS) for row, each in found.items() if row != "default"},
        }
    )  # fmt: skip
    result = {"rows": {row: each.to_json() for row, each in rows.items()}, "paired": differences}
    say(f"wrote {write(settings.name, model, settings, result)}")
    say(f"wrote {write_table(model, settings.name, COLUMNS, rows, differences, (), {})}")


if __name__ == "__main__":
    main(parse(BetterEdits))
