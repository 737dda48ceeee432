"""Build the docs as a site: `python docs/theme/build.py` puts the pages together in build/docs, and mkdocs makes site/ of them.

The pages stay plain Markdown, whose links work in a checkout and on a hosting site. Here a link to another file of the project brings that
file in: Markdown as a page, a notebook as one with its pictures, Python as text, the rest as it is. The reference is written from the docstrings, settings from their fields.
Nothing of this is known to mkdocs, so that another generator can take its place.
"""

from __future__ import annotations

import argparse
import ast
import base64
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BEGIN = ("docs", "figures", "CHANGELOG.md")  # where the pages are from which links are followed
GALLERY = ROOT / "docs" / "all-figures.md"
NOT_SHOWN = ("figure13_noise/04.png", "figure13_noise/05.png")  # scaled wrongly, as the results' page says
LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)#\s]+)")
FENCE = re.compile(r"^( *```.*?^ *```\s*?$)", re.MULTILINE | re.DOTALL)

REFERENCE: dict[str, tuple[str, str, tuple[str, ...]]] = {  # page: title, what it is about, modules
    "facts": (
        "Facts and prompts",
        "What is traced and edited, how files of it are read, and how a prompt becomes tokens.",
        ("facts", "sources", "prompts", "writing"),
    ),
    "models": ("mechedit.models", "", ("models",)),
    "tracing": (
        "mechedit.tracing",
        "",
        (
            "tracing",
            "tracing.result",
            "tracing.cells",
            "tracing.severing",
            "tracing.averages",
            "tracing.roles",
            "tracing.attribution",
            "tracing.accuracy",
            "tracing.measures",
        ),
    ),
    "sites": (
        "Corruptions and sites",
        "What noise does to a subject, which sites a trace shows, and hooks of one's own.",
        ("corruption", "sites", "interventions"),
    ),
    "editing": (
        "Edits",
        "The harness of all editors, and what becomes of an edit.",
        ("editing", "edits", "applying", "changes", "weights", "export"),
    ),
    "editors": (
        "mechedit.editors",
        "",
        (
            "editors",
            "editors.rome",
            "editors.controls",
            "editors.fine_tuning",
            "editors.attention_edit",
            "editors.told",
            "editors.knowledge_neurons",
            "editors.trained.editor",
            "editors.trained.training",
            "editors.trained.state",
        ),
    ),
    "mathematics": (
        "Keys, values and the closed form",
        "The steps of ROME, each a function of tensors.",
        ("keys", "above", "values", "rank_one", "closed_form", "recursive"),
    ),
    "moments": ("mechedit.moments", "", ("moments",)),
    "neurons": ("mechedit.neurons", "", ("neurons", "neurons.result")),
    "guards": (
        "Guards, calibration and tuning",
        "What an edit may do to a model, and which settings suit a model.",
        ("guards", "calibration", "tuning"),
    ),
    "scoring": (
        "Scores and statistics",
        "Log-probabilities, generated text, and intervals.",
        ("scoring", "generation", "statistics"),
    ),
    "benchmarks": (
        "mechedit.benchmarks",
        "",
        (
            "benchmarks.benchmark",
            "benchmarks.counterfact",
            "benchmarks.zsre",
            "benchmarks.metrics",
            "benchmarks.answers",
            "benchmarks.beside",
            "benchmarks.texts",
            "benchmarks.health",
            "benchmarks.fetch",
        ),
    ),
    "runs": (
        "mechedit.runs",
        "",
        (
            "runs",
            "runs.tracing",
            "runs.editing",
            "runs.evaluating",
            "runs.results",
            "runs.comparing",
            "runs.extending",
            "runs.sequence",
            "runs.sweeping",
            "runs.status",
            "runs.engines",
        ),
    ),
    "study": ("mechedit.study", "", ("study",)),
    "viewing": ("Looking", "Pictures, pages and views for notebooks.", ("figures", "viewer", "notebook")),
    "organism": ("mechedit.organism", "", ("organism", "organism.world", "organism.judge", "organism.train")),
}


def build(site: Path, pages: Path) -> int:
    """Put the pages together and build the site; what mkdocs returns, which takes every warning for an error."""
    gather(pages)
    said = {"MECHEDIT_PAGES": str(pages), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", str(site)]  # fmt: skip
    return subprocess.run(command, env=os.environ | said, check=False).returncode


def gather(out: Path) -> None:
    """Write every page and what it links to into a folder, with links between them as they stand there."""
    shutil.rmtree(out, ignore_errors=True)
    for name in (*REFERENCE, "settings"):
        _write(out / "reference" / f"{name}.md", reference(name))
    waiting = [page for each in BEGIN for page in _pages(ROOT / each)]
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        there = out / address(page)
        if page.suffix == ".ipynb":
            text = moved(notebook(page, there), page)
            _write(there, text)
            continue
        if page.suffix != ".md":
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(page, there)
            continue
        text = page.read_text(encoding="utf-8") + (_further() if page == GALLERY else "")
        _write(there, moved(text, page))
        linked = {target(page, link) for link in links(text)} - {ROOT / "README.md"}
        waiting += sorted(linked - seen)
        seen |= linked


def _further() -> str:
    """Pictures that the page of all figures does not have yet."""
    own = GALLERY.read_text(encoding="utf-8")
    every = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "figures").rglob("*.png"))]
    new = [each for each in every if f"../{each})" not in own and not each.endswith(NOT_SHOWN)]
    said = "\n\n".join(f"![{Path(each).stem}](../{each})\n\n*{each.removeprefix('figures/')}*" for each in new)
    return f"\n## Further\n\n{said}\n" if new else ""


def moved(text: str, page: Path) -> str:
    """A page's text, which points at where files are in the site, and indents what belongs to a list as mkdocs wants it."""
    parts = FENCE.split(text)
    parts[::2] = [_relinked(_indented(part), page) for part in parts[::2]]
    return "".join(parts)


def notebook(page: Path, there: Path) -> str:
    """A notebook's cells and outputs as a page; its pictures are written beside it. Of a view that runs scripts the text stands there."""
    parts = []
    for number, cell in enumerate(json.loads(page.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if picture := data.get("image/png"):
                name = f"{page.stem}-{number}.png"
                there.parent.mkdir(parents=True, exist_ok=True)
                (there.parent / name).write_bytes(base64.b64decode("".join(picture)))
                parts.append(f'<img src="{name}" alt="the picture that this cell draws">')
                continue
            said = "".join(output.get("text") or data.get("text/plain", "")).rstrip()
            if "text/html" in data:
                parts.append("*Here the notebook shows an interactive view. Its text:*")
                said = _aligned(said)
            parts.append(f"```text\n{said}\n```")
    return "\n\n".join(parts) + "\n"


def _aligned(text: str) -> str:
    """Lines of cells between tabs, with each column as wide as its widest cell."""
    rows = [line.split("\t") for line in text.splitlines()]
    wide = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    return "\n".join("  ".join(map(str.ljust, row, wide)).rstrip() for row in rows)


def links(text: str) -> list[str]:
    """The relative links of a page, outside its blocks of code."""
    return [found for part in FENCE.split(text)[::2] for _, found in LINK.findall(part)]


def reference(name: str) -> str:
    """A page of the reference: the public names of its modules."""
    if name == "settings":
        return settings()
    title, about, modules = REFERENCE[name]
    return "\n\n".join([f"# {title}", *([about] if about else []), *(f"::: mechedit.{module}" for module in modules)])


def settings() -> str:
    """Every class of settings, with a table of its fields: what they are called, their defaults and what they mean."""
    said = ["# mechedit.settings", "The same on the command line: `--norm-bound` is the field `norm_bound`."]
    for path in sorted((ROOT / "mechedit" / "settings").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and (rows := _knobs(node)):
                above = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id != "Settings"]
                said += [f"## {node.name}", (ast.get_docstring(node) or "").strip()]
                said += [f"It has the fields of `{each}` too." for each in above]
                said += ["| field | default | meaning |\n|---|---|---|\n" + "\n".join(rows)]
    return "\n\n".join(each for each in said if each)


def _knobs(node: ast.ClassDef) -> list[str]:
    found = [(each.target.id, each.value.args) for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and isinstance(each.value, ast.Call) and ast.unparse(each.value.func) == "knob"]  # fmt: skip
    return [f"| `{name}` | `{ast.unparse(default)}` | {_sentence(help)} |" for name, (default, help, *_) in found]


def _sentence(help: ast.expr) -> str:
    """A field's help, where it is not put together from parts in code; those are shown as they are written."""
    said = ast.literal_eval(help) if isinstance(help, ast.Constant) else ast.unparse(help)
    return str(said).replace("|", "\\|").replace("<", "&lt;")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _pages(place: Path) -> list[Path]:
    return [place] if place.is_file() else sorted([*place.rglob("*.md"), *(place.rglob("*.png"))])


def address(path: Path) -> str:
    """Where a file of the project is in the site."""
    own = path.relative_to(ROOT).as_posix().removeprefix("docs/")
    if own == "README.md":
        return "index.md"
    return (
        own.removesuffix(".ipynb") + ".md" if path.suffix == ".ipynb" else own + ".txt" if path.suffix == ".py" else own
    )


def target(page: Path, link: str) -> Path:
    """The file that a link is to."""
    found = (page.parent / link).resolve()
    if not found.is_file():
        sys.exit(f"{page.relative_to(ROOT)} links to {link}, which is no file of the project.")
    return found


def _relinked(text: str, page: Path) -> str:
    here = posixpath.dirname(address(page)) or "."
    return LINK.sub(lambda found: found[1] + posixpath.relpath(address(target(page, found[2])), here), text)


def _indented(text: str) -> str:
    """Two or three spaces, which put a line into a list elsewhere, as four."""
    return re.sub(r"^ {2,3}(?=\S)", "    ", text, flags=re.MULTILINE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the docs as a site.")
    parser.add_argument("--site", type=Path, default=ROOT / "site", help="folder of the site (default: site)")
    parser.add_argument("--pages", type=Path, default=ROOT / "build" / "docs", help="folder of the pages that it is made of (default: build/docs)")  # fmt: skip
    arguments = parser.parse_args()
    sys.exit(build(arguments.site.resolve(), arguments.pages.resolve()))
