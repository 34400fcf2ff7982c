"""The report in a real browser: it requests nothing, logs nothing, and is accessible.

Screenshots are written to ``build/report/``.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from tests.report.browser import open_page

PICTURES = Path(__file__).resolve().parents[2] / "build" / "report"
LOOKS = {"light": (1200, False), "dark": (1200, True), "narrow": (360, False), "narrow-dark": (360, True)}
JOBS = ("no-errors", "many-errors", "own-predictor")
# Everything that axe-core knows of WCAG 2.2 A and AA, and its own good practice.
RULES = {
    "runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("job", JOBS)
def test_page_is_quiet_fits_and_is_accessible(browser: Browser, reports: dict[str, Path], job: str, look: str) -> None:
    width, dark = LOOKS[look]
    with open_page(browser, reports[job], width=width, dark=dark) as (page, activity):
        PICTURES.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=PICTURES / f"{job}-{look}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth == 160)")
        # Folded details count, too.
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        result = Axe().run(page, options=RULES)
        assert not result.response["violations"], result.generate_report()
        assert activity.messages == []
        assert activity.requests == []


@pytest.mark.parametrize("job", JOBS)
def test_headings_are_nested_and_charts_have_descriptions(browser: Browser, reports: dict[str, Path], job: str) -> None:
    with open_page(browser, reports[job]) as (page, _):
        levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
        assert page.locator("table").count() == page.locator("table > caption").count()
        assert page.locator("th").count() == page.locator("th[scope]").count()
        assert page.locator("img:not([alt]), img[alt='']").count() == 0
        assert page.locator("svg.plot").count() == page.locator("svg.plot > title + desc").count()
        assert page.locator("script").count() == 0


def test_keyboard_reaches_everything_with_a_visible_focus(browser: Browser, reports: dict[str, Path]) -> None:
    with open_page(browser, reports["many-errors"]) as (page, _):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
        assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
        reached = set()
        for _ in range(200):
            page.keyboard.press("Tab")
            where = _focused(page)
            if where in reached or where[0] == "BODY":
                break
            reached.add(where)
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", where
        tags = [tag for tag, _ in reached]
        assert tags.count("A") == 6
        assert tags.count("SUMMARY") >= 5
        assert tags.count("DIV") >= 4  # tables that scroll
        page.locator("nav a", has_text="Errors").press("Enter")
        assert page.evaluate("document.querySelector('#errors').getBoundingClientRect().top") < 100


def _focused(page: Page) -> tuple[str, str]:
    """Return tag and position of the element that has the focus."""
    where = "(e => [e.tagName, (e.getAttribute('aria-label') || '') + JSON.stringify(e.getBoundingClientRect())])"
    tag, position = page.evaluate(f"{where}(document.activeElement)")
    return tag, position


def test_hostile_names_are_only_shown(browser: Browser, reports: dict[str, Path]) -> None:
    with open_page(browser, reports["many-errors"]) as (page, activity):
        dialogs: list[str] = []
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        for summary in page.locator("summary").all():
            summary.click()
        page.mouse.move(300, 300)
        for image in page.locator("li figure").all()[:60]:
            image.hover()
        assert dialogs == []
        assert activity.messages == []
        assert activity.requests == []
        assert page.locator("a[href]:not([href^='#'])").count() == 0


def test_page_says_the_same_without_scripts_and_on_paper(browser: Browser, reports: dict[str, Path]) -> None:
    with open_page(browser, reports["no-errors"]) as (page, _):
        scripted = page.locator("main").inner_text()
        page.emulate_media(media="print")
        assert page.locator("nav").is_hidden()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    with open_page(browser, reports["no-errors"], scripts=False) as (page, _):
        assert page.locator("main").inner_text() == scripted


def test_bad_page_is_noticed(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(
        '<p style="color:#eee">Nobody can read this.</p><img src="http://127.0.0.1:9/x.png"><script>throw Error("here")</script>'
    )
    with open_page(browser, file) as (page, activity):
        assert activity.requests == ["http://127.0.0.1:9/x.png"]
        assert any("here" in message for message in activity.messages)
        violated = {violation["id"] for violation in Axe().run(page, options=RULES).response["violations"]}
        assert {"color-contrast", "image-alt", "html-has-lang"} <= violated
