"""The notebooks run from top to bottom on a real kernel, and what is committed of them is what such a run says."""

from __future__ import annotations

import base64
import html
import os
import re

import pytest

pytest.importorskip("nbclient", reason="notebooks are run by nbclient (the extra dev)")
import nbformat

from experiments import notebooks

NAMES = [path.stem for path in notebooks.paths()]
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
OF_A_MACHINE = re.compile(r"/(?:home|root|tmp|work|Users|usr|opt|var)/|[A-Z]:\\\\|site-packages|0x[0-9a-f]{6}")

pytestmark = pytest.mark.filterwarnings("ignore")  # of Jupyter's own machinery; those of the cells are looked for


@pytest.fixture(scope="module")
def committed():
    return {path.stem: nbformat.read(path, as_version=4) for path in notebooks.paths()}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Every notebook as a kernel has just run it."""
    place = tmp_path_factory.mktemp("notebooks")
    (place / "work").mkdir()
    with notebooks.kernel(place / "work", place / "cache") as manager:
        return {path.stem: notebooks.executed(path, manager) for path in notebooks.paths()}


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def agree(said, again):
    """The same words, and numbers that differ by no more than two hundredths of themselves, or by what is small beside 1."""
    old, new = ([float(each) for each in NUMBER.findall(text)] for text in (said, again))
    return NUMBER.sub("#", said) == NUMBER.sub("#", again) and all(
        abs(a - b) <= 0.02 * abs(a) + (0.15 if "%" in said else 0.002) for a, b in zip(old, new, strict=True)
    )


def test_agreement_is_of_words_and_of_numbers():
    assert agree("P(a) is 0.997", "P(a) is 0.996")
    assert not agree("P(a) is 0.997", "P(b) is 0.997")
    assert not agree("P(a) is 0.997", "P(a) is 0.897")
    assert not agree("layer 3", "layer 4")
    assert not agree("1 2", "1")


def test_there_are_the_eight_that_the_page_lists():
    page = (notebooks.FOLDER.parents[1] / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert re.findall(r"notebooks/(\w+)\.ipynb", page) == NAMES
    assert len(NAMES) == 8


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_run_says_what_is_committed(name, committed, fresh):
    old, new = committed[name], fresh[name]
    assert [(cell.cell_type, cell.source, cell.id) for cell in old.cells] == [(cell.cell_type, cell.source, cell.id) for cell in new.cells]  # fmt: skip
    assert notebooks.complaints(new) == []
    for number, (cell, again) in enumerate(zip(code(old), code(new), strict=True)):
        assert [sorted(each.get("data", {"text": 0})) for each in cell.outputs] == [sorted(each.get("data", {"text": 0})) for each in again.outputs], f"kinds of output of code cell {number}"  # fmt: skip
        for said, told in zip(notebooks.plain(cell), notebooks.plain(again), strict=True):
            assert agree(said, told), f"code cell {number}: {said!r}, and now {told!r}"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_reads_well_where_nothing_runs(name, committed):
    notebook = committed[name]
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert notebook.cells[0].source.startswith("# "), "a title"
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert notebooks.complaints(notebook) == []
    pictures = [base64.b64decode(each.data["image/png"]) for each in outputs if "image/png" in each.get("data", {})]
    assert pictures
    assert all(each[:4] == b"\x89PNG" and len(each) < 150_000 for each in pictures)
    assert sum(bool(cell.outputs) for cell in code(notebook)) >= 3
    for cell in notebook.cells:
        assert len(cell.source.splitlines()) <= 26, "a cell is a few lines"
    whole = "\n".join(cell.source for cell in notebook.cells)
    said = "\n".join(line for cell in code(notebook) for line in notebooks.plain(cell))
    assert not OF_A_MACHINE.search(whole + said)
    assert "nan" not in said
    for cell in code(notebook):  # a view that runs scripts has the same beside it as a picture or as text
        for page in notebooks.pages(cell):
            assert not OF_A_MACHINE.search(re.sub("<script>.*?</script>", "", html.unescape(page), flags=re.DOTALL))
    assert (notebooks.FOLDER / f"{name}.ipynb").stat().st_size < 2_500_000


@pytest.mark.anywhere
def test_views_are_drawn_and_nothing_is_asked_for(committed, opened, tmp_path):
    for name in NAMES:
        shown = [page for cell in code(committed[name]) for page in notebooks.pages(cell)]
        if not shown:
            continue
        path = tmp_path / f"{name}.html"
        path.write_text(f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title>{''.join(shown)}", encoding="utf-8")  # fmt: skip
        found = opened(path)
        found.until(
            "[...document.querySelectorAll('[data-mechedit]')].every((each) => each.id && each.children.length)"
        )
        for place, frame in zip(found.page.locator("iframe").all(), found.page.frames[1:], strict=True):
            place.scroll_into_view_if_needed()  # what is out of sight is not drawn
            frame.wait_for_selector("html[data-ready]", timeout=20_000)
        assert (found.errors, found.left) == ([], []), name


def test_what_fails_or_complains_is_not_written(tmp_path, monkeypatch):
    for source, word in (("import warnings; warnings.warn('beware')", "beware"), ("1 / 0", "ZeroDivisionError")):
        path = tmp_path / "bad.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), path)
        before = path.read_bytes()
        monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
        with pytest.raises((SystemExit, Exception), match=word):
            notebooks.main(notebooks.Notebooks())
        assert path.read_bytes() == before
    with pytest.raises(SystemExit, match=f"of bad; found {os.path.basename('x/other')}"):
        notebooks.main(notebooks.Notebooks(only=("other",)))
