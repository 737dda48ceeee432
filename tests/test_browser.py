"""The browser of the tests sees what it must: a good page passes, and each fault of a bad one is told."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.anywhere

GOOD = '<!doctype html><html lang="en"><meta name="viewport" content="width=device-width"><title>A page</title><main><h1>A page</h1><p id="of">Text</p></main></html>'
BAD = """<!doctype html><html><title>A page</title><main><h1>A page</h1><img src="http://localhost:9/a.png">
<script>console.error("told"); missing()</script></main></html>"""


def test_a_good_page_passes(opened, tmp_path):
    (tmp_path / "good page.html").write_text(GOOD)
    found = opened(tmp_path / "good page.html", phone=True, dark=True)
    found.check()
    assert found.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches && innerWidth") == 390
    assert found.picture(tmp_path / "good.png").stat().st_size > 1000


def test_every_fault_of_a_bad_page_is_told(opened, tmp_path):
    (tmp_path / "bad.html").write_text(BAD)
    found = opened(tmp_path / "bad.html")
    assert found.left == ["http://localhost:9/a.png"]
    assert any("told" in each for each in found.errors)
    assert any("missing is not defined" in each for each in found.errors)
    assert {each.split(":")[0] for each in found.faults()} == {"html-has-lang", "image-alt"}


def test_a_machine_without_a_browser_skips_and_ci_fails(pytester, monkeypatch):
    pytester.makepyfile("from tests.browser import browser, opened\ndef test_it(opened): pass")
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CI", raising=False)
    pytester.inline_run("-p", "no:cacheprovider").assertoutcome(skipped=1)
    monkeypatch.setenv("CI", "true")
    result = pytester.inline_run("-p", "no:cacheprovider").listoutcomes()
    assert len(result[2]) == 1
