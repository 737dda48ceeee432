"""Run the notebooks of experiments/notebooks/ and keep their outputs.  python -m experiments.notebooks [--only NAME ...]

A notebook is written in Jupyter, or in any editor; this runs it from top to bottom on a kernel that holds nothing of another notebook,
in an empty folder, without a network, and writes it back with its outputs and nothing of this machine. One kernel runs all of them, one
after another: starting one costs more than any of these notebooks. tests/test_notebooks.py runs them again and compares.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common import parse, say

FOLDER = Path(__file__).parent / "notebooks"
FRESH = "%reset -f"  # and what is imported stays: the minutes are in imports
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


@dataclass(frozen=True)
class Notebooks:
    """Which notebooks are run."""

    only: tuple[str, ...] = ("all",)  # names, without .ipynb


def paths() -> list[Path]:
    """The notebooks, in the order in which they are read."""
    return sorted(FOLDER.glob("*.ipynb"))


@contextmanager
def kernel(folder: Path, cache: Path | None = None) -> Iterator[Any]:
    """A kernel that works in a folder, without a network; what mechedit keeps for later is kept in `cache`, where one is named."""
    from jupyter_client.manager import KernelManager

    own = {
        "PYTHONPATH": str(FOLDER.parents[1]),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONWARNINGS": "default",
    }
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(
        cwd=str(folder), env={**os.environ, **own, **({"MECHEDIT_CACHE": str(cache)} if cache else {})}
    )
    try:
        yield manager
    finally:
        manager.shutdown_kernel(now=True)


def executed(path: Path, manager: Any) -> Any:
    """The notebook of a path with the outputs of a run on this kernel, and nothing that differs from run to run but those.

    Raises:
        CellExecutionError: a cell failed.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    first = nbformat.v4.new_code_cell(FRESH)
    notebook.cells.insert(0, first)
    client = NotebookClient(notebook, km=manager, timeout=600, coalesce_streams=True)
    try:
        client.execute()
    finally:
        if client.kc is not None:
            client.kc.stop_channels()
    notebook.cells.pop(0)
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type == "code":
            cell.execution_count = sum(each.cell_type == "code" for each in notebook.cells[: number + 1])
            for output in cell.outputs:
                output.pop("execution_count", None)
                if output.output_type == "execute_result":
                    output.execution_count = cell.execution_count
    return notebook


def plain(cell: Any) -> list[str]:
    """What a cell printed and what its values look like as text, warnings and complaints included."""
    return [
        str(each.get("text") or each.get("data", {}).get("text/plain", each.get("traceback", "")))
        for each in cell.outputs
    ]


def pages(cell: Any) -> list[str]:
    """The HTML of a cell's outputs."""
    return [str(each["data"]["text/html"]) for each in cell.outputs if "text/html" in each.get("data", {})]


def complaints(notebook: Any) -> list[str]:
    """What the cells wrote as errors and warnings, and failures."""
    outputs = [each for cell in notebook.cells if cell.cell_type == "code" for each in cell.outputs]
    return [str(each.get("text", each.get("traceback"))) for each in outputs if each.get("name") == "stderr" or each.output_type == "error"]  # fmt: skip


def main(settings: Notebooks) -> None:
    import nbformat

    wanted: Sequence[Path] = [path for path in paths() if settings.only == ("all",) or path.stem in settings.only]
    if not wanted:
        raise SystemExit(
            f"--only must be of {', '.join(path.stem for path in paths())}; found {' '.join(settings.only)}."
        )
    with tempfile.TemporaryDirectory() as folder, kernel(Path(folder)) as manager:
        for path in wanted:
            notebook = executed(path, manager)
            if said := complaints(notebook):
                raise SystemExit(f"{path.name} is not written, because it complains: {said[0]}")
            nbformat.write(notebook, path)
            say(f"wrote {path.relative_to(FOLDER.parents[1])}, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(parse(Notebooks))
