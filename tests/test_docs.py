"""The docs as a site: it builds without a warning, shows every public module and picture, asks for nothing, and is readable by all."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mechedit
from mechedit import cli
from mechedit.cli import documenting

pytestmark = pytest.mark.anywhere

ROOT = Path(__file__).parents[1]
SHOWN = (
    "index.html",
    "tracing.html",
    "reference/editing.html",
    "experiments/index.html",
    "reference/editors.html",
    "reference/tracing.html",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` builds it."""
    pytest.importorskip("mkdocs", reason="the docs need the extra `docs`")
    place = tmp_path_factory.mktemp("docs")
    command = [sys.executable, str(ROOT / "docs" / "theme" / "build.py"), "--site", str(place / "site"), "--pages", str(place / "pages")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "site"


@pytest.fixture(scope="module")
def build():
    """The module that builds the site."""
    spec = importlib.util.spec_from_file_location("build_of_docs", ROOT / "docs" / "theme" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("phone", [False, True], ids=["screen", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_are_readable_by_all_and_ask_for_nothing(site, opened, phone, dark):
    for name in SHOWN if phone and dark else SHOWN[:3]:
        found = opened(site / name, phone=phone, dark=dark)
        found.until("document.readyState === 'complete' && document.documentElement.classList.contains('js')", 60)
        scheme = found.page.evaluate("document.body.getAttribute('data-md-color-scheme')")
        assert scheme == ("slate" if dark else "default"), "the reader's preference"
        assert found.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} is wider than the screen"  # fmt: skip
        assert found.errors == []
        assert [each for each in found.requests if not each.startswith(("file:", "data:", "blob:"))] == []
        assert found.faults() == [], name


def test_the_search_finds_a_page_from_a_folder(site, opened):
    found = opened(site / "index.html")
    found.page.keyboard.press("/")
    found.page.keyboard.type("gaffke")
    found.until("[...document.querySelectorAll('.md-search-result__item a')].some(a => a.href.includes('intervals.html'))", 20)  # fmt: skip
    assert found.errors == []


def test_no_page_names_a_script_style_picture_or_font_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?([^\"'\s>]+)", text)
        loaded += re.findall(r"<link[^>]*rel=[\"']?(?:stylesheet|preconnect|icon|preload)[^>]*href=[\"']?([^\"'\s>]+)", text)  # fmt: skip
        assert [each for each in loaded if re.match(r"(\w+:)?//", each)] == [], page.name
    assert not any("http" in each for style in site.rglob("*.css") for each in re.findall(r"url\(([^)]*)\)", style.read_text()) if not each.startswith(("data:", '"data:', "'data:")))  # fmt: skip


def test_the_reference_has_every_public_module_and_its_names(site):
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (site / "reference").glob("*.html")}
    every = "".join(pages.values())
    packages = {path.parent.name for path in (ROOT / "mechedit").glob("*/__init__.py")} - {"cli"}
    assert [name for name in mechedit.__all__ if name not in packages and f'id="mechedit.{name}"' not in every] == []
    assert packages <= pages.keys() | {"viewer"}, "a page a package"
    for name in ("tracing.trace", "editors.rome.edit", "editing.edit", "facts.Fact.prompt", "runs.evaluating.evaluate", "moments.estimate"):  # fmt: skip
        assert f'id="mechedit.{name}"' in every, name
    assert 'id="mechedit.tracing.tracer._trace"' not in every
    assert "block whose W_out is edited" in pages["settings"]


def test_every_picture_is_in_the_gallery(site, build):
    shown = (site / "all-figures.html").read_text(encoding="utf-8")
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "figures").rglob("*.png")}
    assert [each for each in there if f'src="{each}"' not in shown and not each.endswith(build.NOT_SHOWN)] == []
    assert [each for each in there if f'src="{each}"' in shown and each.endswith(build.NOT_SHOWN)] == []


def test_every_page_is_in_the_contents():
    contents = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in contents] == []


def test_links_to_the_project_are_links_into_the_site(build):
    page = ROOT / "docs" / "tracing.md"
    text = "[a](../experiments/README.md#x) [b](editing.md) [c](../experiments/coverage.py) [d](https://x.org)\n```\n[e](nowhere.md)\n```\n"
    moved = "[a](experiments/README.md#x) [b](editing.md) [c](experiments/coverage.py.txt) [d](https://x.org)\n```\n[e](nowhere.md)\n```\n"
    assert build.moved(text, page) == moved
    assert build.moved("- item\n\n  | a |\n", page) == "- item\n\n    | a |\n"
    assert build.moved("[up](../README.md)", ROOT / "experiments" / "localisation.md") == "[up](../index.md)"
    with pytest.raises(SystemExit, match=r"docs/tracing.md links to gone.md, which is no file"):
        build.moved("[a](gone.md)", page)


def test_a_notebook_is_a_page_with_its_pictures(build, tmp_path):
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["P = 0.9\n"]},
        {"output_type": "execute_result", "data": {"image/png": "QUJD", "text/plain": "<Figure>"}},
        {
            "output_type": "execute_result",
            "data": {"text/html": "<script>1</script>", "text/plain": "token\tStates\n<s>\t0.0 %\n Fairma\t3.4 %"},
        },
    ]
    cells = [{"cell_type": "markdown", "source": ["# Title\n", "words"]}, {"cell_type": "code", "source": ["1"], "outputs": outputs}]  # fmt: skip
    (tmp_path / "one.ipynb").write_text(json.dumps({"cells": cells}))
    said = build.notebook(tmp_path / "one.ipynb", tmp_path / "site" / "one.md")
    assert said.startswith("# Title\nwords\n\n```python\n1\n```\n\n```text\nP = 0.9\n```\n\n<img ")
    assert (tmp_path / "site" / "one-1.png").read_bytes() == b"ABC"
    assert said.endswith("*Here the notebook shows an interactive view. Its text:*\n\n```text\ntoken    States\n<s>      0.0 %\n Fairma  3.4 %\n```\n")  # fmt: skip
    assert "<script" not in said
    link = build.moved("[a](../experiments/notebooks/1_trace_a_fact.ipynb)", ROOT / "docs" / "tracing.md")
    assert link == "[a](experiments/notebooks/1_trace_a_fact.md)"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project's folder, in the place of this one, and the addresses that a browser was given."""
    package = tmp_path / "a project"
    package.mkdir()
    monkeypatch.setattr(documenting, "__file__", str(package / "mechedit" / "cli" / "documenting.py"))
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("DISPLAY", ":0")
    asked: list[str] = []
    monkeypatch.setattr("webbrowser.open", asked.append)
    return package, asked


def test_docs_opens_the_site_that_was_built(project, capsys, monkeypatch):
    place, asked = project
    (place / "site").mkdir()
    (place / "site" / "index.html").write_text("<title>docs</title>")
    own = (place / "site" / "index.html").as_uri()
    assert (cli.main(["docs"]), asked) == (0, [own])
    assert cli.main(["docs", "--no-open"]) == 0
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert (cli.main(["docs"]), asked) == (0, [own]), "nothing is opened where nothing is seen"
    assert capsys.readouterr().out.split() == [own] * 3


def test_docs_says_how_to_build_it(project, capsys):
    place, asked = project
    (place / "mkdocs.yml").touch()
    assert (cli.main(["docs"]), asked) == (2, [])
    said = capsys.readouterr().err
    assert "run `make docs` in" in said
    assert len(said.splitlines()) == 1


def test_docs_of_a_package_alone_opens_the_projects_address_or_says_there_is_none(project, capsys, monkeypatch):
    _, asked = project
    monkeypatch.setattr(documenting, "_addresses", dict)
    assert (cli.main(["docs"]), asked) == (2, [])
    assert "not a part of the installed package" in capsys.readouterr().err
    monkeypatch.setattr(documenting, "_addresses", lambda: {"homepage": "https://example.org/home", "documentation": "https://example.org/docs"})  # fmt: skip
    assert (cli.main(["docs"]), asked) == (0, ["https://example.org/docs"])
