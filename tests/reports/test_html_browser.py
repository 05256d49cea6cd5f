"""The page in a browser, without a network: it sorts, it has two sets of colours, and it fits a telephone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from reports import report, report_comparison, report_family
from tests.reports.factory import make_details, make_family, make_matching, make_samples, make_search, make_searched
from tests.reports.test_comparison_page import LABELS, runs

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
LEGIBLE = 4.5  # least contrast of text (WCAG 2, AA)

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser among {', '.join(BROWSERS)}; install Debian's package chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A run with everything, a family, and a comparison."""
    folder = tmp_path_factory.mktemp("report")
    console = Console(file=StringIO(), width=80)
    summary = make_searched(make_search(), blocks=3, matching=make_matching(3), model="<b>a model</b> & co")
    details = make_details(summary, make_samples())
    return {
        "run": report(summary, folder / "run", console, details=details).page,
        "family": report_family(make_family(), folder / "family", console).page,
        "comparison": report_comparison(runs(), LABELS, (), folder / "comparison").page,
    }


@pytest.fixture
def opened(browser, pages):
    """Opens a page without a network; in the end nothing else was asked for, and nothing was complained about."""
    contexts, asked, said = [], [], []

    def opens(name: str = "run", width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True, reduced_motion="reduce"
        )
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(pages[name].as_uri())
        return page

    yield opens
    for context in contexts:
        context.close()
    own = {path.as_uri() for path in pages.values()}
    assert {url for url in asked if not url.startswith("data:")} <= own
    assert said == []


def column(page: Any, table: str, number: int) -> list[str]:
    rows = page.get_by_role("region", name=table, exact=True).locator("tbody tr")
    return rows.locator(f"td:nth-child({number})").all_inner_texts()


def test_a_click_on_a_header_sorts_and_another_turns_it_round(opened):
    page = opened()
    region = page.get_by_role("region", name="Layer by layer", exact=True)
    before = column(page, "Layer by layer", 7)
    header = region.locator("th", has_text=re.compile("^kept"))
    assert header.get_attribute("aria-sort") is None
    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "descending"
    falling = [float(text) for text in column(page, "Layer by layer", 7)]
    assert falling == sorted(falling, reverse=True)
    assert [f"{value:.3f}" for value in falling] != before
    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert [float(text) for text in column(page, "Layer by layer", 7)] == falling[::-1]
    # Numbers are compared as such, with their thousands apart; and one column is sorted at a time.
    nonzeros = region.locator("th", has_text="nonzeros")
    nonzeros.get_by_role("button").click()
    counts = [int(text.replace(",", "")) for text in column(page, "Layer by layer", 6)]
    assert counts == sorted(counts, reverse=True)
    assert region.locator("th[aria-sort]").count() == 1


def test_a_header_is_reached_and_pressed_by_keyboard(opened):
    page = opened()
    region = page.get_by_role("region", name="By kind", exact=True)
    region.focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "kind"
    before = column(page, "By kind", 1)
    page.keyboard.press("Enter")
    assert column(page, "By kind", 1) == sorted(before) != before
    page.keyboard.press("Space")
    assert column(page, "By kind", 1) == sorted(before, reverse=True)
    # What all kinds come to stays below them.
    assert region.locator("tfoot td").first.inner_text() == "all"


def test_what_is_missing_comes_last_whichever_way(opened):
    page = opened()
    header = page.get_by_role("region", name="Block by block", exact=True).locator("th").first
    for _ in range(2):
        header.get_by_role("button").click()
        assert column(page, "Block by block", 1)[-1] == "model"


def luminance(colour: str) -> float:
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# The colour of every element that has text of its own, and of the first thing behind it that is not transparent.
COLOURS = """() => Array.from(document.querySelectorAll("body *")).filter((element) =>
  !["SCRIPT", "STYLE"].includes(element.tagName) && element.getClientRects().length &&
  Array.from(element.childNodes).some((node) => node.nodeType === 3 && node.data.trim())
).map((element) => {
  let behind = element;
  while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
  return [getComputedStyle(element).color, getComputedStyle(behind ?? document.body).backgroundColor,
          element.textContent.trim().slice(0, 40)];
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_is_legible(opened, scheme):
    page = opened(scheme=scheme)
    background = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (background < 0.1) == (scheme == "dark")
    found = page.evaluate(COLOURS)
    assert len(found) > 400
    for ink, behind, text in found:
        low, high = sorted((luminance(ink), luminance(behind)))
        assert (high + 0.05) / (low + 0.05) >= LEGIBLE, (scheme, ink, behind, text)


def test_the_colours_can_be_switched(opened):
    page = opened(scheme="dark")
    body = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(body)
    toggle = page.locator(".theme")
    assert toggle.inner_text() == "Light"
    toggle.click()
    assert luminance(page.evaluate(body)) > 0.9
    assert toggle.get_attribute("aria-label") == "Switch to the dark colours"
    page.keyboard.press("Enter")
    assert page.evaluate(body) == dark


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["run", "family", "comparison"])
def test_nothing_is_wider_than_the_screen(opened, name, width):
    page = opened(name, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    loaded = page.evaluate("Array.from(document.images, (image) => image.complete && image.naturalWidth > 0)")
    assert loaded == [True] * len(loaded)
    assert len(loaded) == {"run": 6, "family": 1, "comparison": 2}[name]


def test_text_of_others_is_shown_as_it_is(opened):
    page = opened()
    assert page.locator("h1").inner_text() == "<b>a model</b> & co, 50 % kept"
    assert page.locator("h1 b").count() == 0
    assert page.get_by_text("<script>alert('x')</script> & so").count() == 1
