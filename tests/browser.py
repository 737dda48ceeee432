"""A page in a real browser without a window: what it says in the console, what it asks the network for, its picture, and whether an
accessibility checker (axe) finds fault with it.

The browser is Debian's `chromium`, or one like it that is there; none is downloaded. Where there is none, tests that need it are skipped,
and fail where `CI` is `true`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
INSIDE = ("data:", "blob:")  # addresses of what is inside a page
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
SCREEN = {"viewport": {"width": 1280, "height": 860}}


@dataclass
class Opened:
    """A page that is open: `page` is Playwright's, `errors` what the console and scripts complained of, `requests` every address."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    @property
    def left(self) -> list[str]:
        """The requests for more than the page itself and what is inside it."""
        own = self.requests[0].split("#")[0]
        inside = [each for each in self.requests if each.split("#")[0] == own or each.startswith(INSIDE)]
        return [
            each for each in self.requests if each not in inside or not each.startswith((*INSIDE, "file:", "about:"))
        ]

    def faults(self) -> list[str]:
        """What axe finds: the rule, and the elements that break it."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page).response["violations"]
        return [f"{each['id']}: {node['html'][:200]} {node['failureSummary']}" for each in found for node in each["nodes"]]  # fmt: skip

    def until(self, expression: str, seconds: float = 20.0) -> None:
        """Wait until a JavaScript expression is true, in pages too whose policy forbids what Playwright's own waiting does."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"not within {seconds:g} s: {expression}"
            self.page.wait_for_timeout(20)

    def check(self) -> None:
        """Fail where the console had an error, a request was made, or axe finds fault."""
        found = [*self.errors, *self.left, *self.faults()]
        assert found == [], "\n".join(found)

    def picture(self, path: Path, *, whole: bool = True) -> Path:
        """A screenshot, of the whole page or of what is seen of it."""
        self.page.screenshot(path=str(path), full_page=whole)
        return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser for the tests of a file."""
    where = next((found for name in NAMES if (found := shutil.which(name))), None)
    if where is None:
        said = "no browser: install Debian's chromium (apt-get install chromium), or another that is called " + ", ".join(NAMES[1:])  # fmt: skip
        pytest.fail(said) if os.environ.get("CI") == "true" else pytest.skip(said)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=where, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Opened]]:
    """`opened(path)` opens a file, at a screen's width in light colours unless told `phone=True` or `dark=True`; other names are those of
    Playwright's `new_context`, and `at` is put behind the address (`#state`)."""
    contexts = []

    def get(path: Path | str, *, dark: bool = False, phone: bool = False, at: str = "", **named: Any) -> Opened:
        context = browser.new_context(
            **{"color_scheme": "dark" if dark else "light"} | (PHONE if phone else SCREEN) | named
        )
        contexts.append(context)
        found = Opened(context.new_page())
        found.page.on("console", lambda said: found.errors.append(said.text) if said.type == "error" else None)
        found.page.on("pageerror", lambda error: found.errors.append(str(error)))
        found.page.on("request", lambda request: found.requests.append(request.url))
        found.page.goto(Path(path).resolve().as_uri() + at)
        return found

    yield get
    for each in contexts:
        each.close()
