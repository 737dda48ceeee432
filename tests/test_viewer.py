"""Pages of results, in a real browser: what they show is what the results hold, and nothing else happens."""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from mechedit import cli, edits, viewer
from mechedit.cache import WriteError
from mechedit.runs import tracing as runs
from mechedit.settings import TraceSettings
from mechedit.tracing.averages import Average
from mechedit.viewer import packing
from tests import viewed
from tests.conftest import FACT

pytestmark = pytest.mark.anywhere

KINDS = {
    "trace": viewed.trace,
    "average": viewed.mean,
    "severed": viewed.curves,
    "severed of many": lambda: [viewed.curves(index) for index in range(25)],
    "sweep": viewed.swept_record,
    "edit": viewed.edit,
    "evaluation": viewed.evaluation,
}


@pytest.fixture
def view(opened, tmp_path):
    """Open the page of a result; ready when it is drawn."""

    def get(result, other=None, **how):
        path = viewer.save(result, tmp_path / "page.html", other)
        found = opened(path, **how)
        found.page.wait_for_selector("html[data-ready]", timeout=20_000)
        return found

    return get


def read(found, selector):
    return found.page.inner_text(selector)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_page_is_sound_on_screens_and_phones_in_light_and_dark(kind, view):
    result = KINDS[kind]()
    for how in ({}, {"phone": True, "dark": True}):
        found = view(result, **how, at="#record=1" if kind == "evaluation" else "")
        found.check()
        assert found.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"


def test_a_cell_is_read_by_pointer_and_by_keys_and_stands_in_the_address(view):
    found = view(viewed.trace(), at="#kind=mlp&at=2.1")
    page = found.page
    assert read(found, ".value b").replace("\u202f", " ") == f"{100 * viewed.value(1, 2, 1):.1f} %"
    page.focus(".plot")
    for key in ("ArrowRight", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
    assert read(found, ".value b").startswith(f"{100 * viewed.value(2, 4, 1):.1f}")
    assert read(found, ".place").split() == ["is", "first", "token", "after,", "layer", "2"]
    assert "at=4.2" in page.evaluate("location.hash")
    found.until("document.querySelector('[aria-live]').textContent.includes('layer 2')")
    page.keyboard.press("End")
    assert read(found, ".value b").startswith(f"{100 * viewed.value(5, 4, 1):.1f}")
    page.get_by_role("button", name="Attention outputs").click()
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert read(found, ".value b").startswith(f"{100 * viewed.value(5, 4, 2):.1f}"), (
        "the address has the cell and the kind"
    )
    left, top = (page.locator(".stage rect").nth(index).bounding_box() for index in (0, 7))
    page.mouse.move(top["x"] + 3, top["y"] + 3)  # the eighth rectangle: row 1, layer 1
    found.until("document.querySelector('.place').textContent.includes('layer 1')")
    assert left["y"] < top["y"]
    assert read(found, ".value b").startswith(f"{100 * viewed.value(1, 1, 2):.1f}")
    page.mouse.move(2, 2)
    found.until("document.querySelector('.place').textContent.includes('layer 5')")


def test_lines_are_read_by_keys_and_colours_are_chosen(view):
    found = view(viewed.curves())
    page = found.page
    page.focus(".plot")
    page.keyboard.press("Home")
    assert read(found, ".legend dt").strip() == "Layer 0"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert read(found, ".legend dt").strip() == "Layer 2"
    assert "14.3\u202f% [13.3, 15.3]" in read(found, ".legend"), "0.4 / 3, and a draw 0.02 above"
    page.get_by_label("Colours").select_option("dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 18, 21)"
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert "theme=dark" in page.evaluate("location.hash")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert read(found, ".legend dt").strip() == "Layer 2"
    found.check()


def test_a_touch_reads_a_cell(view):
    found = view(viewed.trace(), phone=True, at="#kind=mlp")
    found.page.locator(".stage rect").nth(1).tap(position={"x": 4, "y": 4})
    found.until("location.hash.includes('at=0.1')")
    assert read(found, ".value b").startswith(f"{100 * viewed.value(1, 0, 1):.1f}")


def test_the_whole_page_is_walked_by_keyboard(view):
    page = view(viewed.trace()).page
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate("document.activeElement.textContent.slice(0, 20) || document.activeElement.className")
        )
    for wanted in ("Early site", "Late site", "States", "Table", "Copy SVG", "How it was made"):
        assert any(wanted in each for each in seen), wanted
    page.get_by_role("button", name="Late site").focus()
    page.keyboard.press("Enter")
    assert "attn" in page.evaluate("location.hash")
    assert page.evaluate("document.activeElement.className") == "plot"


def test_the_table_has_every_cell(view):
    found = view(viewed.trace(), at="#kind=resid&view=table")
    rows = found.page.eval_on_selector_all(
        "section.card table >> nth=0",
        "([table]) => [...table.rows].map((row) => [...row.cells].map((cell) => cell.innerText))",
    )
    assert rows[0][1:] == [f"layer {layer}" for layer in range(6)]
    for position, row in enumerate(rows[1:]):
        assert [cell.replace("\u202f%", "") for cell in row[1:]] == [f"{100 * viewed.value(layer, position, 0):.1f}" for layer in range(6)]  # fmt: skip
    found.check()


def test_pictures_are_saved_as_svg_and_png_in_light_colours(view, tmp_path):
    from PIL import Image

    page = view(viewed.trace(), dark=True, at="#kind=resid", accept_downloads=True).page
    for name in ("SVG", "PNG"):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Copy {name}").first.click(modifiers=["Shift"])
        download.value.save_as(tmp_path / name)
    svg = ElementTree.parse(tmp_path / "SVG").getroot()  # noqa: S314 (our own)
    assert {"Space", "Needle", "0", "5"} <= {each.text.strip() for each in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert len(list(svg.iter("{http://www.w3.org/2000/svg}rect"))) >= 36
    picture = Image.open(tmp_path / "PNG").convert("RGB")
    assert picture.width >= 1000
    assert picture.getpixel((picture.width - 3, 3)) == (255, 255, 255)
    with page.expect_download() as download:
        page.get_by_role("button", name="Copy SVG").nth(1).click(modifiers=["Shift"])
    download.value.save_as(tmp_path / "lines")
    lines = {each.text for each in ElementTree.parse(tmp_path / "lines").iter("{http://www.w3.org/2000/svg}text")}  # noqa: S314
    assert {"States", "MLP outputs", "Attention outputs", "clean", "corrupted"} <= lines, (
        "a picture says what its lines are"
    )


def test_pictures_are_copied_where_the_browser_allows_it(view):
    found = view(viewed.trace(), permissions=["clipboard-read", "clipboard-write"])
    page = found.page
    page.get_by_role("button", name="Copy SVG").first.click()
    found.until("document.querySelector('.note').textContent === 'SVG copied'")
    assert page.evaluate("navigator.clipboard.readText()").startswith("<svg")
    page.get_by_role("button", name="Copy PNG").first.click()
    found.until("document.querySelector('.note').textContent === 'PNG copied'")


def hostile_results():
    tokens = ("<bos>", *viewed.HOSTILE)
    prompt = "".join(viewed.HOSTILE)
    fact = {
        "prompt": prompt,
        "subject": viewed.HOSTILE[0],
        "target_new": viewed.HOSTILE[1],
        "target_true": viewed.HOSTILE[3],
    }
    measured = viewed.Measured(fact, {"p_new": 0.1, "p_true": 0.2}, {"p_new": 0.3, "p_true": 0.1})
    yield viewed.trace(tokens=tokens, prompt=prompt, answer=viewed.HOSTILE[0], subject=viewed.HOSTILE[0], origin={"name": viewed.HOSTILE[1]}), None  # fmt: skip
    yield viewed.edit(facts=(measured,), reasons=viewed.HOSTILE, told=prompt, editor=viewed.HOSTILE[0]), None
    yield viewed.evaluation(harm=True), viewed.evaluation(harm=True, editor=viewed.HOSTILE[1])


@pytest.mark.parametrize("index", range(3))
def test_text_that_would_do_harm_is_shown_as_text(index, view):
    result, other = list(hostile_results())[index]
    found = view(result, other, at="#record=0&pin=3")
    found.check()
    said = found.page.evaluate("document.body.innerText")
    assert "ran" not in found.page.title().replace("ran'", "")
    assert "<script>document.title='ran'</script>" in said
    assert not re.search("[\u202e\u2028\u2029\x1b]", said), "marks that move text are written out"
    assert found.page.evaluate("document.querySelectorAll('img, main script').length") == 0
    assert found.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_policy_lets_no_script_but_the_pages_own_run_and_no_request_out(view):
    found = view(viewed.trace())
    page = found.page
    page.evaluate(
        "() => { const own = document.createElement('script'); own.textContent = 'window.ran = 1'; document.body.append(own); }"
    )
    assert page.evaluate("window.ran") is None
    assert page.evaluate("fetch('http://localhost:9/').then(() => 'sent', () => 'refused')") == "refused"
    assert found.left == []


def test_a_page_of_a_large_trace_is_small(tmp_path):
    trace = viewed.trace(layers=26, tokens=tuple(f"token{index}" for index in range(20)), draws=10)
    assert viewer.save(trace, tmp_path / "page.html").stat().st_size <= 150_000
    assert len(viewer.page(viewed.edit())) < 80_000, "a page has no script that another kind of page needs"


COUNTED = """() => {
  window.worked = 0;
  for (const name of ['fillRect', 'fillText', 'fill', 'stroke']) {
    const plain = CanvasRenderingContext2D.prototype[name];
    CanvasRenderingContext2D.prototype[name] = function (...given) { window.worked += 1; return plain.apply(this, given); };
  }
  new MutationObserver((changes) => { window.worked += changes.length; }).observe(document.body, {subtree: true, childList: true, attributes: true});
}"""


def test_a_move_over_ten_thousand_cells_draws_none_of_them_anew(view):
    """Counted, not timed: what is drawn on a canvas or changed in the page."""
    page = view(viewed.trace(layers=100, tokens=tuple(f"t{index}" for index in range(100)), draws=1)).page
    assert page.evaluate("!!document.querySelector('.stage canvas')")
    page.evaluate(COUNTED)
    box = page.locator(".plot").first.bounding_box()
    for step in range(40):
        page.mouse.move(box["x"] + 160 + 9 * step, box["y"] + 60 + 5 * step)
    page.wait_for_timeout(100)
    worked = page.evaluate("window.worked")
    assert 0 < worked < 40 * 100, "a move marks its row and its column at most"
    page.evaluate(
        "() => { const plot = document.querySelector('.plot'); for (let step = 0; step < 48; step++) plot.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'})); }"
    )
    assert 0 < page.evaluate("window.worked") - worked < 48 * 100, "and so does a move by a key"
    page.locator("label.theme select").select_option("dark")
    assert page.evaluate("window.worked") > 10_000, "what draws every cell is counted"


def test_a_page_of_more_cells_than_a_call_has_arguments_opens(view):
    trace = viewed.trace(layers=1, tokens=tuple(f"t{index}" for index in range(1400)), draws=1)
    grid = torch.arange(96 * 1400, dtype=torch.float32).view(96, 1400) / (96 * 1400)
    found = view(replace(trace, effects={"resid": grid}, draws={"resid": grid[..., None]}), at="#at=699.48")
    assert read(found, ".value b") == f"{100 * (48 * 1400 + 699) / (96 * 1400):.1f}\u202f%"
    assert found.errors == []


def test_a_thousand_records_of_counterfact_are_small_and_open_at_once(opened, tmp_path):
    whole, half = viewed.like_counterfact(), viewed.like_counterfact(500)
    one = viewer.save(whole, tmp_path / "one.html")
    both = viewer.save(half, tmp_path / "both.html", viewed.like_counterfact(500, "ft", seed=1))
    for path, result in ((one, whole), (both, half)):
        assert path.stat().st_size <= 5_000_000, path
        at = len(result.facts) - 300
        found = opened(path, at=f"#record={at}")
        found.page.wait_for_selector("text=Neighbour (10)", timeout=60_000)
        since_asked_for = found.page.evaluate("performance.now()") / 1000
        assert since_asked_for < 5, "seconds until it is seen; a machine may be slow, or busy"
        said = found.page.evaluate("document.querySelector('.details').textContent")
        assert all(line["text"][-200:] in said for line in result.details("texts") if line["record"] == at), (
            "letter by letter"
        )
        assert all(line["prompt"] in said for line in result.details("prompts") if line["record"] == at)
        assert found.page.locator("[data-record]").count() == 50
        assert (found.errors, found.left) == ([], [])


def test_text_of_every_kind_comes_back_from_its_words(view):
    texts = ["", "one two, one two; one two.", "日本語のテキスト 日本語", "a_b " * 4, "\U0001f600 x" * 3, "é" * 500, "x" * 10_000, '"\\\n\t\0', *viewed.HOSTILE[:4]]  # fmt: skip
    words = packing.Words(texts)
    assert words.words[:2] == sorted(words.words[:2], key=lambda word: -sum(text.count(word) for text in texts))
    found = view(viewed.evaluation(2), at="#record=0")
    source = (Path(viewer.__file__).parent / "base.js").read_text(encoding="utf-8")
    own = source[source.index("const LETTERS") : source.index("// --- state")]
    assert packing.LETTERS in own
    for text in texts:
        given = [packing.packed(words.coded(text)), words.packed()]
        back = f"async ([text, words]) => {{ {own} const known = JSON.parse(new TextDecoder().decode(await unpacked(words))); return textOf(text, known); }}"  # fmt: skip
        assert found.page.evaluate(back, given) == text
    for size in range(9):
        raw = bytes(range(250, 250 + size)) if size < 6 else bytes(size)
        assert gzip.decompress(base64.b85decode(packing.packed(raw).translate(str.maketrans(":./", "&<>")))) == raw


def test_records_are_sorted_filtered_pinned_and_kept_in_the_address(view):
    found = view(viewed.evaluation(60))
    page = found.page
    first = lambda: page.locator("tr[data-record]").first.get_attribute("data-record")  # noqa: E731
    page.get_by_role("button", name="PS, %").click()
    assert first() == "0"
    page.get_by_role("button", name="PS, %").click()
    assert first() == "59"
    page.fill("input[type=search]", "ES<50 PS>=50")
    found.until("document.querySelector('.finder [role=status]').textContent.startsWith('10 of 60')")
    assert first() == "57", "of 30, 33, … 57 the highest"
    for term, n in (("PS>=70", 18), ("PS<70", 42), ("PS=70", 1)):  # 42 of 60 is 69.9999988 % in single precision
        page.fill("input[type=search]", term)
        found.until(f"document.querySelector('.finder [role=status]').textContent.startsWith('{n} of 60')")
    page.fill("input[type=search]", "ES<50 PS>=50")
    found.until("document.querySelector('.finder [role=status]').textContent.startsWith('10 of 60')")
    page.get_by_label("Relation").select_option("city")
    assert read(found, ".finder [role=status]") == "5 of 60 records"
    page.locator("tr[data-record='54']").click()
    page.get_by_role("button", name="Pin", exact=True).click()
    page.locator("tr[data-record='48'] button").focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowDown")
    found.until("document.querySelectorAll('.details > section').length === 2")
    assert "Subject 54 is in" in read(found, ".details > section >> nth=0")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    found.until("document.querySelectorAll('.details > section').length === 2")
    assert read(found, ".finder [role=status]") == "5 of 60 records"
    found.check()
    page.evaluate("location.hash = 'q=ES%3C50+PS%3E%3D50&sort=PS.1.down&theme=dark&record=54&stage=after&numbers=PS'")
    found.until(
        "document.querySelector('.finder [role=status]').textContent === '10 of 60 records'"
    )  # an address that is gone to is obeyed
    assert (first(), page.input_value("input[type=search]")) == ("57", "ES<50 PS>=50")
    assert [page.get_by_label(name, exact=True).input_value() for name in ("Colours", "Relation", "Stage")] == [
        "dark",
        "",
        "after",
    ]
    assert page.locator("tr[aria-current=true]").get_attribute("data-record") == "54"
    assert page.locator(".menu input:checked").count() == 1
    found.until("document.querySelectorAll('.details > section').length === 1")
    page.evaluate("location.hash = 'stage=before'")
    found.until("document.querySelector('.keys dt').textContent === 'S, before'")
    assert page.locator("tr[aria-current=true]").count() == 0


def test_two_evaluations_stand_side_by_side_with_every_prompt_before_and_after(view):
    found = view(viewed.evaluation(), viewed.evaluation(editor="ft", records=29), at="#record=2")
    found.page.wait_for_selector("text=The prompt")
    said = read(found, ".details")
    for words in ("before", "rome after", "ft after", "as wanted: before 0 · rome after 1 · ft after 1", "90.5", "13.5", "Story 0:"):  # fmt: skip
        assert words in said, words  # exp(-0.1) and exp(-2)
    assert "29 records are in both" in read(found, ".top")
    names = "[...document.querySelectorAll('.names')].filter((each) => each.offsetWidth).map((each) => each.innerText.split(/\\s+/).join(' '))"
    beside = "[...document.querySelectorAll('.target')].every((each) => each.offsetWidth > 10)"
    assert (found.page.evaluate(names), found.page.evaluate(beside)) == ([], True)
    found.page.evaluate("location.hash = 'record=2&pin=5'")
    for width in (1280, 390):  # where there is no room beside the bars, their names stand above them
        found.page.set_viewport_size({"width": width, "height": 860})
        found.until("document.querySelectorAll('.details > section').length === 2")
        assert not found.page.evaluate(beside)
        assert set(found.page.evaluate(names)) == {"Paris Seattle"}
    found.page.get_by_role("button", name="Table").click()
    assert "ft less rome" in found.page.locator("section table").first.inner_text()
    found.check()


def test_names_of_two_evaluations_are_whole_on_a_phone(view):
    page = view(viewed.evaluation(), viewed.evaluation(editor="attention-edit"), phone=True).page
    right = "(each) => each.getBoundingClientRect().right"
    texts = page.evaluate(f"[...document.querySelectorAll('section svg text')].map({right})")
    assert len(texts) > 10
    assert max(texts) <= page.evaluate(f"({right})(document.querySelector('section svg'))")


def test_a_page_prints_on_white_without_buttons(view):
    page = view(viewed.trace(), dark=True).page
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator(".tools").first.is_visible()
    wide = "Math.max(...[...document.querySelectorAll('.stage > *')].map((each) => each.getBoundingClientRect().width))"
    page.emulate_media(media="screen", color_scheme="dark")
    for event, least, most in (
        ("beforeprint", 600, 680),
        ("afterprint", 681, 1280),
    ):  # A4 less margins of a centimetre is 718
        page.evaluate(f"dispatchEvent(new Event('{event}'))")
        assert least < page.evaluate(wide) <= most
    assert page.pdf()[:4] == b"%PDF"


def test_a_printed_evaluation_has_its_pinned_record_and_says_how_many_records_there_are(view):
    found = view(viewed.evaluation(60), dark=True, at="#record=48&pin=54")
    page = found.page
    found.until("document.querySelectorAll('.details > section').length === 2")
    page.emulate_media(media="print", color_scheme="dark")
    assert all(page.locator(".details > section").nth(at).is_visible() for at in (0, 1))
    assert [page.locator(each).is_visible() for each in (".finder [role=status]", ".pager .soft", ".finder input[type=search]", ".pager button >> nth=0")] == [True, True, False, False]  # fmt: skip
    assert (read(found, ".finder [role=status]"), read(found, ".pager .soft")) == ("60 of 60 records", "1 of 2")
    assert page.evaluate("getComputedStyle(document.querySelector('.poor')).color") == "rgb(138, 75, 0)", "dark enough for white paper"  # fmt: skip


def told_fact(before, after):
    """The edit of the made fact with these probabilities, of its new and its true target."""
    first, second = ({"p_new": new, "p_true": true} for new, true in (before, after))
    return viewed.edit(facts=(replace(viewed.edit().facts[0], before=first, after=second),))


def test_a_share_below_a_hundredth_of_a_percent_is_said_to_be_that_and_its_title_has_the_number(view):
    found = view(told_fact((3.1e-6, 0.9), (0.8, 0.0001)))
    said = read(found, "main").replace("\u202f", " ")
    assert "before < 0.01 %" in said
    assert "0.010 %" in said, "a hundredth itself is not below"
    assert found.page.get_by_title("3.1e−6 as a share of 1").count() == 2, "above, and in the table"
    assert "e−" not in said
    small = viewed.curves()
    small = replace(small, curves={name: 1e-5 * curve for name, curve in small.curves.items()}, p_clean=1e-5, p_corrupted=-1e-6)  # fmt: skip
    found = view(small)
    assert "> −0.01\u202f%" in read(found, ".keys")
    marks = found.page.eval_on_selector_all(
        ".stage text[text-anchor=end]", "all => all.map((each) => each.textContent)"
    )
    marks = [each for each in marks if each not in ("clean", "corrupted")]
    assert len(set(marks)) == len(marks) > 2, "marks at an axis differ, however small"
    result = viewed.evaluation(3)
    result.rows["after"][1]["p_new"] = 1e-6
    assert "< 0.01" in read(view(result), "tr[data-record='1']")


def test_the_words_above_a_trace_are_those_of_the_docs_and_a_difference_is_in_points(view):
    said = read(view(viewed.trace()), ".keys")
    assert "with the subject corrupted" in said
    assert "55.0 points" in said, "0.6 less 0.05"
    assert "Difference" in said


def test_a_cell_says_which_layers_its_window_covers(view):
    found = view(viewed.trace(), at="#kind=mlp&at=1.0")  # six layers, windows of three
    for layer, words in ((0, "window: layers 0 to 1, cut at the model's foot"), (2, "window: layers 1 to 3"), (5, "window: layers 4 to 5, cut at the model's top")):  # fmt: skip
        found.page.evaluate(f"location.hash = 'kind=mlp&at=1.{layer}'")
        found.until(f"document.querySelector('.place').textContent.includes('layer {layer}')")
        assert words in read(found, ".reading").splitlines()
    found.page.get_by_role("button", name="States").click()
    assert "window:" not in read(found, ".reading"), "one state"
    assert "window: layers 4 to 5, cut at the model's top" in read(
        view(viewed.mean(), at="#kind=attn&at=1.5"), ".reading"
    )


def test_all_kinds_have_one_scale_on_which_a_line_is_the_clean_run_where_a_cell_goes_beyond(view):
    whole = viewed.trace()
    most = max(float(each.max()) for each in whole.effects.values())
    labels = "[...document.querySelector('.stage svg').querySelectorAll('text')].map((each) => each.textContent)"
    for p_clean, is_over in ((2 * most, False), (most / 2, True)):
        found = view(replace(whole, p_clean=p_clean))
        seen = []
        for name in ("States", "MLP outputs", "Attention outputs"):
            found.page.get_by_role("button", name=name).click()
            texts = found.page.evaluate(labels)
            assert any(each.endswith("line: clean") for each in texts) == is_over
            seen.append([each for each in texts if re.fullmatch(r"[\d.]+", each)])
        assert seen[0] == seen[1] == seen[2]


def test_of_several_ranges_of_draws_that_of_the_maps_kind_alone_is_filled(view):
    found = view(viewed.trace(), at="#kind=mlp&at=1.0")
    filled = "[...document.querySelectorAll('.stage polygon')].map((each) => each.getAttribute('fill'))"
    dotted = "[...document.querySelectorAll('.stage polyline[stroke-dasharray=\"1 3\"]')].map((each) => each.getAttribute('stroke'))"
    states, mlps, attentions = "#5e4fa2", "#1f7a3d", "#c2341d"
    assert (found.page.evaluate(filled), found.page.evaluate(dotted)) == ([mlps], [states] * 2 + [attentions] * 2)
    found.page.get_by_role("button", name="States").click()
    assert (found.page.evaluate(filled), found.page.evaluate(dotted)) == ([states], [mlps] * 2 + [attentions] * 2)
    assert "range of 3 draws, filled for the kind of the map" in read(found, ".legend")


def test_an_edit_has_the_bands_that_it_was_held_in_and_says_whose_they_are():
    def bands(**named):
        found = viewer.contents(viewed.edit(**named))["numbers"]
        return {each["name"]: (each["from"], each["to"], each["own"]) for each in found if "from" in each}

    report = viewed.edit().report | {"divisor_share": 1.0, "its own": 2.0}
    given = {"layer": 3, "bands": [["divisor_share", 0.2, 5.0], ["perplexity_ratio", 0.0, 1.1]]}
    common = {"relative_norm": (0.0, 1.0, False), "essence_kl": (0.0, 16.0, False)}
    of_rome = {"divisor_share": (0.2, 5.0, True), "perplexity_ratio": (0.0, 1.1, True)}
    assert bands(report=report, settings=given) == common | of_rome, "also of a number that only this editor has"
    assert bands(editor="outside:Mine", report=report, settings=given) == of_rome, "what others held it in is not known"
    assert bands(editor="composed", details={"parts": []}, report=report) == {}
    assert bands(editor="outside:Mine", settings={"bands": "nonsense"}) == {}


def test_every_column_of_an_edit_has_a_heading_and_all_of_them_fit_a_phone(view):
    settings = {"layer": 3, "bands": [["essence_kl", 0.0, 2.5]]}
    report = viewed.edit().report | {"divisor_share": 0.5, "cond_C": 2.9e4}
    found = view(viewed.edit(settings=settings, report=report), phone=True)
    headings = found.page.eval_on_selector_all("thead tr", "all => all.map((row) => [...row.cells].map((cell) => cell.innerText))")  # fmt: skip
    assert [row for row in headings if not all(row)] == []
    assert ["Number", "Value", "Band", "Verdict"] in headings
    wide = "[...document.querySelectorAll('.scroll')].filter((each) => each.scrollWidth > each.clientWidth).map((each) => each.getAttribute('aria-label'))"  # fmt: skip
    assert found.page.evaluate(wide) == []
    rows = found.page.eval_on_selector_all("tbody tr", "all => all.map((row) => row.innerText.split(/\\s+/).join(' '))")
    for row in ("essence kl 0.1000 0 to 2.5 settings within", "perplexity ratio 1.000 0 to 1.5 editor within", "divisor share 0.5000 from 0.05 editor within", "cond C 29000 0 to 1.0e12 editor within"):  # fmt: skip
        assert row in rows
    assert [row for row in rows if row.startswith("relative norm 1.500 0 to 1 editor outside: so large a change")]
    assert "Band" not in read(view(viewed.edit(editor="outside:Mine")), "main"), (
        "where none is known there is no column"
    )


def test_records_fit_a_phone_with_all_of_their_numbers_and_say_what_their_colour_means(view):
    found = view(viewed.evaluation(), phone=True)
    inside = "[document.querySelector('.records')].every((each) => each.scrollWidth <= each.clientWidth)"
    assert found.page.evaluate(inside)
    boxes = "[...document.querySelectorAll('tr[data-record=\"3\"] td')].map((each) => each.getBoundingClientRect())"
    assert found.page.evaluate(f"{boxes}.length") == 4, "ES, PS, NS and p_new"
    assert found.page.evaluate(f"Math.max(...{boxes}.map((each) => each.right)) <= innerWidth")
    for name in ("ES, %", "p_new, %"):
        heading = found.page.get_by_role("columnheader", name=name).bounding_box()
        cell = found.page.locator("tr[data-record='3'] td").nth(0 if name == "ES, %" else 3).bounding_box()
        assert abs(heading["x"] - cell["x"]) < 2, "a heading stands above its numbers"
    assert "Below 50 % is in this colour where more is better." in read(found, "main")
    colour = "(each) => getComputedStyle(document.querySelector(each)).color"
    assert found.page.evaluate(colour, ".records + p b") == found.page.evaluate(colour, "td.poor")
    found.page.evaluate("location.hash = 'stage=before'")
    found.until("document.querySelector('.keys dt').textContent.endsWith('before')")
    assert "in this colour" not in read(found, "main"), "of the unedited model nothing is coloured"


def test_a_page_says_what_each_kind_of_result_holds(view):
    assert "<title>rome: a model, 1 record</title>" in viewer.page(viewed.evaluation(1))
    for result, words in (
        (viewed.mean(), ("Average causal effects over 24 facts", "last subject token", "95 % interval over facts")),
        (viewed.curves(), ("Most lost without MLPs", "range of 2 draws", "attention severed")),
        ([viewed.curves(index) for index in range(3)], ("too few for intervals",)),
        (
            viewed.swept_record(),
            ("rome at every layer and token", "S, all three", "Does the trace foretell where an edit works?"),
        ),
        (viewed.edit(), ("80.0", "relative_norm = 1.5 is above 1", "outside", "rank one", "mlp.W_out")),
    ):
        said = view(result).page.evaluate("document.body.innerText")
        for each in words:
            assert each in said, (each, said)


def test_what_was_not_traced_is_a_gap_and_other_measures_are_no_percent(view):
    trace = viewed.trace()
    nothing = {kind: grid.clone() for kind, grid in trace.draws.items()}
    for grid in nothing.values():
        grid[:, 1:5] = math.nan
    found = view(replace(trace, draws=nothing, effects={kind: grid.mean(-1) for kind, grid in nothing.items()}, p_corrupted=0.6), at="#at=2.1&kind=mlp")  # fmt: skip
    assert "not traced" in read(found, ".reading")
    assert read(found, ".value b") == "–"
    found.page.focus(".plot")
    found.page.keyboard.press("PageUp")  # measured, while the corruption changed nothing
    assert read(found, ".value b").startswith(f"{100 * viewed.value(1, 0, 1):.1f}")
    assert "clean and corrupted are the same" in read(found, ".reading")
    assert "not traced" not in read(found, ".reading")
    assert found.errors == []
    logs = {kind: -8 * grid for kind, grid in trace.draws.items()}
    found = view(replace(trace, settings=TraceSettings(measure="log_p", draws=3), draws=logs, effects={kind: grid.mean(-1) for kind, grid in logs.items()}, p_clean=-0.5, p_corrupted=-6.2), at="#at=2.1&kind=mlp")  # fmt: skip
    assert read(found, ".value b") == f"\u2212{8 * viewed.value(1, 2, 1):.2f}"
    assert "[−1.5" in read(found, ".legend"), "the range of draws in as many figures"
    assert found.errors == []


def test_an_average_is_the_same_when_it_is_read_from_its_json(tmp_path):
    found = viewed.mean()
    again = Average.from_json(json.loads(json.dumps(found.to_json())))
    assert again.to_json() == found.to_json()
    few = viewed.swept(3)
    assert viewer.page(few) == viewer.page(few.to_json())
    assert viewer.page(again) == viewer.page(found)


def test_what_has_no_page_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(viewer.ViewError, match="found dict|no sweep"):
        viewer.page({"a": 1})
    with pytest.raises(viewer.ViewError, match="found list"):
        viewer.page([])
    with pytest.raises(viewer.ViewError, match="both are evaluations; found Trace and Evaluation"):
        viewer.page(viewed.trace(), viewed.evaluation())
    with pytest.raises(WriteError, match="is a folder"):
        viewer.save(viewed.trace(), tmp_path)
    assert io.StringIO(viewer.page(viewed.trace())).readline() == "<!doctype html>\n"


# --- the command


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """`mechedit view …` in an empty folder, where no screen is; status, standard output and standard error."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("webbrowser.open", lambda address: pytest.fail("opened"))
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        status = cli.main(["view", *map(str, arguments)])
        return (status, *capsys.readouterr())

    return call


def test_the_command_makes_a_page_of_every_file_and_folder_that_has_one(run, tmp_path, monkeypatch):
    viewed.trace().save("Space Needle.safetensors")
    viewed.curves().save("severed.safetensors")
    edits.save(viewed.edit(), "edit.safetensors")
    for name, record in (("average.json", viewed.mean().to_json()), ("sweep.json", viewed.swept_record())):
        Path(name).write_text(json.dumps(record))
    viewed.evaluation(5).save("rome")
    for place, name in (("Space Needle.safetensors", "Space Needle.html"), ("severed.safetensors", "severed.html"), ("edit.safetensors", "edit.html"), ("average.json", "average.html"), ("sweep.json", "sweep.html"), ("rome", "rome.html"), ("rome/summary.json", "rome.html"), ("rome/results.parquet", "rome.html")):  # fmt: skip
        assert run(place) == (0, f"wrote\n  {name}\n", "")
        assert Path(name).read_text(encoding="utf-8") == viewer.page(viewer.read(place))
        Path(name).unlink()
    assert viewer.page(viewer.read("Space Needle.safetensors")) == viewer.page(viewed.trace())
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setenv("DISPLAY", ":0")
    assert run("rome", "rome", "--out", "both.html")[0] == 0
    assert run("rome", "--no-open")[0] == 0
    assert opened == [(tmp_path / "both.html").as_uri()]
    assert '"label":"rome A"' in Path("both.html").read_text(encoding="utf-8"), "two that are called the same"


def test_units_of_runs_have_pages_and_a_run_of_severed_curves_has_one(run, load, tmp_path):
    model, facts = load("gpt2"), [FACT, replace(FACT, subject="The Eiffel Tower")]
    runs.trace_facts(model, facts, "traces", TraceSettings(draws=1, kinds=("mlp",)))
    runs.sever_facts(model, facts, "severed", TraceSettings(draws=1))
    assert run("traces", "--unit", "1", "--out", "one.html") == (0, "wrote\n  one.html\n", "")
    assert "The Eiffel Tower" in Path("one.html").read_text(encoding="utf-8").partition("</title>")[0]
    assert run("traces")[0] == 0
    assert "Average causal effects over 2 facts" in Path("traces.html").read_text(encoding="utf-8")
    assert run("severed")[0] == 0
    assert "Severed causal traces of 2 facts" in Path("severed.html").read_text(encoding="utf-8")


def test_a_files_name_is_text_too(run, view, opened, tmp_path):
    for name in ("<img src=x onerror=alert(1)>", "'\"&amp;\u202e"):
        viewed.evaluation(3).save(name)
    first, second = "<img src=x onerror=alert(1)>", "'\"&amp;\u202e"
    assert run(first, second, "--out", "page.html") == (0, "wrote\n  page.html\n", "")
    found = opened(tmp_path / "page.html", at="#record=1")
    found.page.wait_for_selector("html[data-ready]")
    assert first in found.page.evaluate("document.body.innerText")
    assert found.page.locator("img").count() == 0
    found.check()
    assert run(second)[1] == "wrote\n  '\"&amp;\\u202e.html\n"


def test_the_command_says_in_a_line_what_has_no_page(run, tmp_path):
    viewed.trace().save("trace.safetensors")
    Path("empty").mkdir()
    for begun in ("begun/before", "several/edits"):
        Path(begun).mkdir(parents=True)
        Path(begun, "plan.json").write_text("{}")
    Path("other.json").write_text('{"a": 1}')
    Path("average.json").write_text(json.dumps(viewed.mean().to_json() | {"indirect_effect": {"mlp": [[1.0]]}}))
    Path("deep.json").write_text("[" * 5000)
    Path("sweep.json").write_text(json.dumps(viewed.swept_record() | {"mean": {"ES": [[1.0]]}}))
    for given, words in (
        (["missing.safetensors"], "does not exist"),
        (["empty"], "nothing that has a page"),
        (["begun"], "begun holds an evaluation that has not ended"),
        (["several"], "nothing that has a page"),
        (["other.json"], "has no page"),
        (["average.json"], "no average that can be shown"),
        (["deep.json"], "average that can be shown"),
        (["sweep.json"], "no sweep that can be shown"),
        (["trace.safetensors", "trace.safetensors"], "both are evaluations; found Trace and Trace"),
        (["trace.safetensors", "--out", "empty"], "is a folder"),
        (["trace.safetensors", "--unit", "0"], "trace.safetensors"),
    ):
        status, out, err = run(*given)
        assert (status, out) == (2, ""), given
        assert words in err
        assert err.count("\n") == 1
    Path("mixed").mkdir()
    edits.save(viewed.edit(), "mixed/edit.safetensors")
    viewed.trace().save("mixed/trace.safetensors")
    Path("mixed/broken.safetensors").write_text("x")
    status, out, err = run("mixed")
    assert (status, out) == (2, "")
    assert (
        err == "mechedit: mixed is nothing that has a page: name a file in it (edit.safetensors, trace.safetensors).\n"
    )
    assert not list(tmp_path.glob("*.html"))
