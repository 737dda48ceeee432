"""A participant's form in a real browser: what is ranked is what is read, nothing is lost, nothing is asked of the network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mechedit import study
from tests.participants import EDITORS, QUALITY, SMALL, scenarios, send, shown, small, whose

pytestmark = pytest.mark.anywhere

HOSTILE = (
    "</script><script>document.title='bad'</script><img src=x onerror=alert(1)> \"'`\u2028\u202eevil\x00\x1b[31m "
    + "w" * 10_000
)


@pytest.fixture
def made(tmp_path):
    return small(tmp_path / "study")


def begin(page) -> None:
    page.get_by_label("I have read this").check()
    page.get_by_role("button", name="Go on").click()
    page.get_by_role("button", name="Begin").click()


def order(data, at: int, question: str) -> list[str]:
    """The letters of a page by quality, the best first for consistency, the worst first for fluency."""
    found = sorted("ABC", key=lambda letter: -QUALITY[whose(data["pages"][at]["texts"]["ABC".index(letter)])])
    return found if question == "consistency" else found[::-1]


def by_button(page, question: str, letters: list[str], how: str) -> None:
    for letter in letters[:-1]:  # the last one follows
        getattr(page.get_by_role("button", name=f"Text {letter}, not ranked, by {question}"), how)()


def by_key(page, question: str, letters: list[str]) -> None:
    page.get_by_role("button", name=f", by {question}").first.focus()
    for letter in ["c", "Backspace", *map(str.lower, letters[:-1])]:
        page.keyboard.press(letter)


def saved(page, name: str, to: Path) -> Path:
    with page.expect_download() as waiting:
        page.get_by_role("button", name=name).click()
    waiting.value.save_as(to / waiting.value.suggested_filename)
    return to / waiting.value.suggested_filename


def test_three_participants_with_known_preferences_give_back_the_known_ratios(opened, tmp_path):
    """One with a mouse, one with a keyboard, one on a phone; the one with the keyboard turns consistency round on one page: 11 of 12."""
    made = small(tmp_path / "study", replace(SMALL, long_form=1))
    for way, form in zip(("click", "key", "tap"), made.files(), strict=True):
        own = opened(form, phone=way == "tap", dark=way == "tap")
        page, data = own.page, shown(form)
        begin(page)
        for at in range(len(data["pages"])):
            for question in ("consistency", "fluency"):
                letters = order(data, at, question)
                letters = letters[::-1] if (way, at, question) == ("key", 2, "consistency") else letters
                by_key(page, question, letters) if way == "key" else by_button(page, question, letters, way)
            page.get_by_role("button", name="Next").click()
        mark = QUALITY[whose(data["long_form"][0]["texts"][0])]
        for item in page.get_by_role("radio", name=str(mark), exact=True).all():
            item.check()
        page.get_by_role("button", name="Next").click()
        page.get_by_label("Is there anything").fill('Grüße, "日本" \\ \ud83d\ude00' + way * 50)
        saved(page, "Save my response", tmp_path / "in")
        assert own.errors == own.left == []
    found = study.read(made, [tmp_path / "in"])
    assert (len(found.accepted), found.refused) == (3, ())
    numbers = study.report(made, found.accepted).numbers
    assert [pair["wins"] for pair in numbers["questions"]["consistency"]["pairs"]] == [11, 11, 11]
    assert [pair["wins"] for pair in numbers["questions"]["fluency"]["pairs"]] == [0, 0, 0]
    assert numbers["comments"][0].startswith('Grüße, "日本" \\ 😀')
    assert numbers["seconds"]["median"] > 0
    assert {name: each["mean"] for name, each in numbers["long_form"]["fluency"].items()} == QUALITY


def state_of(page) -> dict:
    return json.loads(page.evaluate("JSON.stringify(Object.values(localStorage).map(JSON.parse)[0])"))


def test_a_form_closed_midway_and_opened_again_has_lost_nothing(opened, made, tmp_path):
    first = opened(made.files()[0])
    begin(first.page)
    by_button(first.page, "consistency", ["B", "C", "A"], "click")
    by_button(first.page, "fluency", ["A", "B"], "click")  # one of three
    before = state_of(first.page)
    assert before["pages"][0]["consistency"] == ["B", "C", "A"]
    again = first.page.context.new_page()
    first.page.close()
    again.goto(made.files()[0].as_uri())
    after = state_of(again)
    assert [{**page, "seconds": 0} for page in after["pages"]] == [{**page, "seconds": 0} for page in before["pages"]]
    assert after["screen"] == before["screen"] == 2
    assert after["pages"][0]["seconds"] >= before["pages"][0]["seconds"]
    for name in ("Text B, 1st, by consistency", "Text A, 3rd, by consistency", "Text A, 1st, by fluency"):
        assert again.get_by_role("button", name=name).get_attribute("aria-pressed") == "true"
    path = saved(again, "Save progress as a file", tmp_path)
    elsewhere = opened(made.files()[0]).page  # another browser
    assert elsewhere.get_by_label("I have read this").count() == 1
    elsewhere.locator("#open").set_input_files(path)
    elsewhere.get_by_text("Your progress is loaded.").wait_for()
    assert elsewhere.get_by_role("button", name="Text B, 1st, by consistency").count() == 1
    refused = study.read(made, [path]).refused
    assert "a progress file" in refused[0][1]


def test_two_tabs_of_a_form_lose_nothing_of_each_other(opened, made):
    """The first stays open, with older answers, while the second is worked in and closed; so the other way round."""
    first = opened(made.files()[0])
    one = first.page
    one.clock.install()
    one.reload()
    begin(one)
    by_button(one, "consistency", ["B", ""], "click")
    two = one.context.new_page()
    two.goto(made.files()[0].as_uri())
    assert two.get_by_role("button", name="Text B, 1st, by consistency").count() == 1
    by_button(two, "consistency", ["C", ""], "click")
    by_button(two, "fluency", ["A", "B", "C"], "click")
    two.close()
    one.clock.run_for(6_000)  # the first tab's own keeping
    wanted = [["B", "C", "A"], ["A", "B", "C"]]
    assert [state_of(one)["pages"][0][name] for name in ("consistency", "fluency")] == wanted
    assert one.get_by_role("button", name="Text B, 2nd, by fluency").count() == 1, "and shows them"
    assert "open in another tab" in one.locator("#said").inner_text()
    one.evaluate("dispatchEvent(new Event('pagehide'))")
    one.get_by_role("button", name="Next").click()
    by_button(one, "fluency", ["C", "B", "A"], "click")
    three = one.context.new_page()
    three.goto(made.files()[0].as_uri())
    assert [state_of(three)["pages"][at]["fluency"] for at in (0, 1)] == [["A", "B", "C"], ["C", "B", "A"]]
    assert first.errors == []


def test_where_the_browser_keeps_nothing_the_form_says_so_and_works(opened, made, tmp_path):
    form = opened(made.files()[0])
    form.page.add_init_script("Object.defineProperty(window, 'localStorage', {get() { throw new Error('no') }})")
    form.page.reload()
    begin(form.page)
    assert "does not keep your answers" in form.page.locator("#kept").inner_text()
    by_button(form.page, "consistency", ["B", "C", "A"], "click")
    path = saved(form.page, "Save progress as a file", tmp_path)
    assert json.loads(json.loads(path.read_text())["body"])["pages"][0]["consistency"] == ["B", "C", "A"]
    assert form.errors == []


def test_a_progress_file_that_is_damaged_or_of_another_form_changes_nothing(opened, made, tmp_path):
    form, other = made.files()[:2]
    page = opened(form).page
    begin(page)
    by_button(page, "consistency", ["B", "C", "A"], "click")
    path = saved(page, "Save progress as a file", tmp_path)
    good = json.loads(path.read_text())
    before = state_of(page)["pages"][0]["consistency"]
    wrong = json.loads(good["body"]) | {"screen": 99}
    files = {
        "This is no progress file": send(form, good["body"], tmp_path / "response.json"),
        "was changed or is damaged": send(form, good["body"].replace('"B"', '"A"', 1), tmp_path / "changed.json", kind="mechedit study progress", check=good["check"]),
        "is of another form": send(other, good["body"].replace(shown(form)["form"], shown(other)["form"]), tmp_path / "other.json", kind="mechedit study progress"),
        "damaged": send(form, wrong, tmp_path / "wrong.json", kind="mechedit study progress"),
    }  # fmt: skip
    for said, each in files.items():
        page.locator("#open").set_input_files(each)
        page.get_by_role("alert").get_by_text(said).wait_for()
        assert state_of(page)["pages"][0]["consistency"] == before
        page.evaluate("document.getElementById('said').textContent = ''")


def test_a_page_that_is_not_finished_is_told_once_and_the_end_says_what_is_missing(opened, made, tmp_path):
    page = opened(made.files()[0]).page
    page.get_by_role("button", name="Go on").click()
    assert "tick the box" in page.locator(".problem").inner_text()
    begin(page)
    by_button(page, "consistency", ["B", "C", "A"], "click")
    page.get_by_role("button", name="Next").click()
    assert "not ranked by fluency yet" in page.locator(".problem").inner_text()
    page.get_by_role("button", name="Next").click()
    assert page.get_by_role("heading", level=1).inner_text() == "Page 2 of 4"
    page.get_by_role("button", name="End").click()
    assert page.locator("main .row button", has_text="Page").all_inner_texts() == [f"Page {at}" for at in (1, 2, 3, 4)]
    path = saved(page, "Save an unfinished response", tmp_path)
    assert "incomplete: page 1 has no ranking by fluency" in study.read(made, [path]).refused[0][1]
    page.get_by_text("No file appeared?").click()
    (tmp_path / "pasted.txt").write_text(page.get_by_label("Your response as text").input_value())
    assert "incomplete: page 1" in study.read(made, [tmp_path / "pasted.txt"]).refused[0][1]


def test_time_counts_while_a_page_is_seen_and_answers_are_deleted_where_that_is_wanted(opened, made):
    page = opened(made.files()[0]).page
    page.clock.install()
    page.reload()
    begin(page)

    def seen(state: str) -> None:
        page.evaluate(f"Object.defineProperty(document, 'visibilityState', {{configurable: true, get: () => '{state}'}}); document.dispatchEvent(new Event('visibilitychange'))")  # fmt: skip

    page.clock.run_for(20_000)
    seen("hidden")
    page.clock.run_for(60_000)
    seen("visible")
    page.clock.run_for(10_000)
    by_button(page, "consistency", ["B", "C", "A"], "click")
    own = state_of(page)["pages"]
    assert own[0]["seconds"] == pytest.approx(30, abs=3)  # the clock goes on in between
    assert own[1]["seconds"] == 0
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete my answers").click()
    assert page.get_by_role("heading", level=1).inner_text() == "A study of what language models write"
    assert state_of(page)["pages"][0] == {"consistency": [], "fluency": [], "seconds": 0}


def test_hostile_text_shows_as_text_and_pages_pass_the_accessibility_checker(opened, tmp_path):
    texts = [replace(each, statement=each.statement + HOSTILE, texts={name: f"{name} {HOSTILE}" for name in EDITORS}) for each in scenarios(4)]  # fmt: skip
    contact = "<b>me</b>@example.org \u202eevil"
    made = study.make(texts, tmp_path / "study", replace(SMALL, long_form=1, contact=contact))
    for phone in (False, True):
        form = opened(made.files()[0], phone=phone, dark=phone)
        page = form.page
        page.on("dialog", lambda dialog: pytest.fail(dialog.message))
        assert contact.replace("\u202e", r"\u202e") in page.locator("main").inner_text()
        form.check()
        page.get_by_label("I have read this").check()
        page.get_by_role("button", name="Go on").click()
        form.check()
        page.get_by_role("button", name="Begin").click()
        said = page.locator(".card .foreign").first.inner_text()
        assert "</script><script>document.title='bad'</script><img src=x onerror=alert(1)>" in said
        assert "\\u2028\\u202eevil\\x00\\x1b[31m" in said
        assert page.title() == "Which text is better?"
        assert page.locator("img").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        by_button(page, "consistency", ["B", "C", "A"], "click")
        form.check()
        for name in ("Page 5, not done", "End"):
            page.get_by_role("button", name=name).click()
            form.check()
        page.get_by_role("button", name="colours").click()
        form.check()


def test_a_form_prints_on_white_with_the_texts_and_without_buttons_to_go_on(opened, made):
    page = opened(made.files()[0], dark=True).page
    begin(page)
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert (page.locator(".card").first.is_visible(), page.locator("footer").is_visible()) == (True, False)


def test_a_keyboard_alone_is_enough(opened, made):
    """From the first screen to a ranked page with Tab, Space, Enter and letters; what has the focus can be seen."""
    page = opened(made.files()[0]).page

    def to(name: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if name in page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.textContent || document.activeElement.id"):  # fmt: skip
                assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
                return
        pytest.fail(f"Tab does not reach {name}")

    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "agreed":
            break
    page.keyboard.press("Space")
    to("Go on")
    page.keyboard.press("Enter")
    to("Begin")
    page.keyboard.press("Enter")
    to("Text A, not ranked, by consistency")
    page.keyboard.press("Enter")
    to("Text C, not ranked, by consistency")
    page.keyboard.press("Space")
    to("Text A, not ranked, by fluency")
    for key in "CB":
        page.keyboard.press(key)
    assert [state_of(page)["pages"][0][name] for name in ("consistency", "fluency")] == [["A", "C", "B"], ["C", "B", "A"]]  # fmt: skip
    to("Next")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.textContent") == "Page 2 of 4"
