"""The result of an evaluation, and its files, which `Evaluation.load` reads again. Nothing in them depends on how long it took or on
how often the run was stopped.

results.parquet   a line for each record at each stage: `stage`; `id`, `subject`, `prompt`, `target_true`, `target_new`, `relation` and
                  `reason` as text; and every number, null where the stage has none and nan where the record has none. The settings
                  are in its metadata, under `mechedit`, as JSON.
prompts.parquet   a line for each prompt and target: `stage`, `record` (its place among the stage's lines), `kind` (prompt, paraphrase,
                  neighbour, unrelated), `prompt`, `target`, and for each of the target's tokens `log_p` (natural logarithm) and
                  `first`, whether it is the most probable one there.
texts.parquet     generated texts: `stage`, `record`, `prompt`, `text` (with its prompt, where that was sampled from).
summary.*         means with intervals, as JSON, CSV, Markdown and LaTeX.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mechedit import parsing
from mechedit.benchmarks import metrics
from mechedit.cache import atomic_write, plain
from mechedit.facts import Fact
from mechedit.runs.parquet import Details, read_details, read_results, write_details, write_results
from mechedit.runs.store import RunError
from mechedit.statistics import Mean

__all__ = ["Evaluation", "check_kept", "check_made", "who"]

WHO = ("subject", "prompt", "target_new")  # what facts of a table are told by


@dataclass(frozen=True, repr=False, eq=False)
class Evaluation:
    """Scores of each fact at each stage: "before", "after" (each edit, or all), and "at the end" of sequential edits.

    `facts` has, in the same order, who and what each is about, and the reason why it was not edited, or what of its edit is out of
    its bands.
    """

    facts: tuple[dict[str, Any], ...]
    rows: dict[str, list[dict[str, float]]]
    what: dict[str, Any]  # settings, model, versions, benchmark; from the command line, the source of the facts
    seed: int = 0
    details: Details = field(default=lambda name: iter(()), repr=False)
    """The lines of `prompts` and of `texts`, read as they are asked for; none where they were not kept."""
    _tables: dict[str, dict[str, Mean]] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __repr__(self) -> str:
        return f"Evaluation({self.caption})"

    def __eq__(self, other: object) -> bool:
        """Whether all is the same but `details`; nan is nan."""
        return self._said == other._said if isinstance(other, Evaluation) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    @property
    def _said(self) -> str:
        return json.dumps(plain([self.facts, self.rows, self.what, self.seed]), sort_keys=True)

    @classmethod
    def load(cls, folder: str | Path) -> Evaluation:
        """The evaluation that `save` wrote into a folder, those of version 0.1.0 and 0.2.0 too.

        Raises:
            RunError: there is none, or its files are damaged.
        """
        facts, rows, what, seed = read_results(Path(folder))
        return cls(facts, rows, what, seed, partial(read_details, Path(folder)))

    def table(self, stage: str) -> dict[str, Mean]:
        """Mean and interval of each number at a stage, and S.

        Raises:
            RunError: the evaluation has no such stage.
        """
        if stage not in self.rows:
            raise RunError(f"stages of this evaluation are {', '.join(self.rows)}; found {stage!r}.")
        if stage not in self._tables:
            self._tables[stage] = metrics.table(self.rows[stage], self.seed)
        return self._tables[stage]

    @property
    def names(self) -> list[str]:
        """Every number that is measured at some stage, in order, S behind what it is made of."""
        found = list(dict.fromkeys(name for stage in self.rows for name in self.table(stage) if name != "S"))
        if any("S" in self.table(stage) for stage in self.rows):
            found.insert(max(map(found.index, ("ES", "PS", "NS"))) + 1, "S")
        return found

    def to_json(self) -> dict[str, Any]:
        """Settings and means, as JSON values."""
        return self.what | {
            "facts": len(self.facts),
            "stages": {
                stage: {name: each.to_json() for name, each in self.table(stage).items()} for stage in self.rows
            },
        }

    @property
    def nothing(self) -> str:
        """Why the table tells nothing: no record was edited, or none could be scored. Empty where one was."""
        reason = next((fact["reason"] for fact in self.facts if fact.get("reason")), "")
        first = f": {reason.rstrip('.')}." if reason else "."
        if not any(value == value for rows in self.rows.values() for row in rows for value in row.values()):
            return f"no record of {len(self.facts)} could be scored{first}"
        if "after" in self.rows and not any(row.get("edited") for row in self.rows["after"]):
            return f"no record of {len(self.facts)} was edited{first}"
        return ""

    @property
    def subject(self) -> str:
        """The model, the benchmark, the editor and the mode."""
        editor, mode = self.what["editor"], self.what["settings"]["mode"]
        how = [editor, mode] if editor != "none" else ["not edited"]
        return ", ".join([self.what["model"]["name"], self.what["benchmark"], *how])

    @property
    def caption(self) -> str:
        """What the table is of, in a sentence."""
        source = self.what.get("source")
        where = f" of {Path(source['facts']).name} from {source['begin']} on" if source else ""
        return (
            f"{self.subject}: means over records{where} (n = {len(self.facts)}) with 95 % intervals; shares in percent."
        )

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The table as people read it: header and rows. Shares are in percent, intervals behind the mean, n where it is smaller."""
        rows = [
            [stage, *(_cell(name, self.table(stage).get(name), len(self.facts)) for name in self.names)]
            for stage in self.rows
        ]
        return [f"{len(self.facts)} records", *self.names], rows

    def save(self, folder: str | Path) -> list[Path]:
        """Write the files above, those of details where there are any; the files.

        Raises:
            WriteError: the folder cannot be written.
        """
        folder = Path(folder)
        header, rows = self.cells()
        legend = "".join(f"- {metrics.metric(name)}\n" for name in self.names)
        texts = {
            "summary.json": json.dumps(plain(self.to_json()), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
            "summary.csv": self._csv(),
            "summary.md": f"{_markdown(header, rows)}\n{self.caption}\n\n{legend}",
            "summary.tex": f"% {self.caption}\n{_latex(header, rows)}",
        }
        names = [name for name in self.names if name != "S"]
        written = [write_results(folder, self.facts, self.rows, names, self.what, self.seed)]
        written += write_details(folder, self.details)
        for name, text in texts.items():
            with atomic_write(folder / name) as temporary:
                temporary.write_text(text.encode("utf-8", "backslashreplace").decode(), encoding="utf-8")
        return written + [folder / name for name in texts]

    def _csv(self) -> str:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["stage", "metric", "mean", "low", "high", "n"])
        for stage in self.rows:
            for name in self.names:
                if (each := self.table(stage).get(name)) is not None:
                    writer.writerow([stage, name, each.mean, each.low, each.high, each.n])
        return out.getvalue()


def who(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    """What a table keeps of the facts that it is of, for `check_kept`."""
    return [{name: getattr(fact, name) for name in WHO} for fact in facts]


def check_kept(path: Path, facts: Sequence[Fact]) -> None:
    """Raise where the table of these would take the place of one of other facts. A table of these and more may.

    `path` is that of `results.parquet`, or of JSON: a list of facts, or an object with the list `facts` (of one without nobody knows).

    Raises:
        RunError: the table there is of facts that are not among these, or is damaged.
    """
    if not path.is_file():
        return
    there = {tuple(line[name] for name in WHO) for line in (_of_json if path.suffix == ".json" else _of_parquet)(path)}
    if others := there - {tuple(each.values()) for each in who(facts)}:
        _, prompt, target = min(others, key=str)
        one = f"{prompt!r} becoming {target!r}" if target else repr(prompt)
        raise RunError(
            f"{path.parent} has results that are not of these {len(facts)} records ({len(others)} of them; {one} for one), and they would be "
            "replaced. Take those too, choose another folder, or delete that one."
        )


def check_made(path: Path, editor: str, rows: str, unmade: Callable[[Mapping[str, Any]], str]) -> None:
    """Raise where the table of what one editor made would take the place of one that has more. `unmade` says of each of its `rows` what this
    run does not make, or nothing.

    Raises:
        RunError: the table there has such a row, or is of another editor.
    """
    if not path.is_file():
        return
    found = parsing.from_file(path)
    of = found.get("editor", editor)
    left = next((what for row in found.get(rows, []) if (what := unmade(row))), "")
    if of != editor or left:
        what = left if of == editor else f"the editor {of}"
        raise RunError(
            f"{path.parent} has results of {what}, which is not tried here, and they would be replaced. "
            f"{'Try that too, choose' if of == editor else 'Choose'} another folder, or delete that one."
        )


def _of_parquet(path: Path) -> list[dict[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        return list(parquet.read_table(path, columns=list(WHO)).to_pylist())
    except (ArrowException, OSError) as error:
        raise RunError(f"{path} is damaged ({error}); delete it, or choose another folder.") from error


def _of_json(path: Path) -> list[dict[str, Any]]:
    try:
        found = parsing.from_file(path)
        lines = found.get("facts", []) if isinstance(found, dict) else found
        parsing.check(lines, [dict.fromkeys(WHO, (str, None))], "facts")
    except parsing.ParseError as error:
        raise RunError(f"{path} is damaged ({error}); delete it, or choose another folder.") from error
    return list(lines)


def _cell(name: str, each: Mean | None, n: int) -> str:
    return metrics.metric(name).shown(each, n) if each is not None else ""


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _latex(header: list[str], rows: list[list[str]]) -> str:
    lines = [
        " & ".join(cell.replace("_", r"\_").replace("%", r"\%") for cell in line) + r" \\" for line in [header, *rows]
    ]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\hline",
            lines[0],
            r"\hline",
            *lines[1:],
            r"\hline",
            r"\end{tabular}",
            "",
        ]
    )
