"""What the front page and the pages under docs/ say can be done, and what they point at is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from mechedit.cli import _parser, named_in

pytestmark = pytest.mark.usefixtures("as_users")
ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("docs/*.md"))
WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "experiments" / "README.md", *PAGES]
RUN = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]


def blocks(page: Path) -> str:
    """All Python of a page, one block after another."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))


@pytest.mark.anywhere
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs_as_it_stands(page, tmp_path, tmp_path_factory, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MECHEDIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache-of-pages"))  # one C for all
    exec(compile(blocks(page), str(page), "exec"), {"__name__": "__main__"})  # noqa: S102 (our own page)
    assert "nan" not in capsys.readouterr().out


@pytest.mark.real
@pytest.mark.anywhere  # tests/real does as much on either version
def test_the_ten_lines_of_the_front_page_move_the_space_needle(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(ROOT / "README.md"), "README.md", "exec"), {"__name__": "__main__"})  # noqa: S102 (our own page)
    said = capsys.readouterr().out
    assert "mlp at layer" in said
    assert "Paris" in said
    assert Path("paris.safetensors").stat().st_size < 40_000


@pytest.mark.anywhere
def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.anywhere
def test_every_command_on_a_page_is_one_that_there_is(capsys):
    """The real parser takes it; nothing is run."""
    found = []
    for page in WRITTEN:
        for block in re.findall(r"^ *```sh\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if not line.strip().startswith("mechedit "):
                    continue
                given = shlex.split(line, comments=True)[1:]
                found.append(line)
                try:
                    _parser(named_in(given)).parse_args(given)
                except SystemExit:
                    pytest.fail(f"{page.name}: {line}\n{capsys.readouterr().err}")
    assert len(found) > 50


@pytest.mark.anywhere
@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_points_at_is_there(page):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
