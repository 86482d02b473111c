"""Pages in a real browser: on a phone and on a desk, light and dark, for eyes and for screen readers."""

import os
import shutil
from pathlib import Path

import pytest

from isthmus.report.write import write_comparison, write_report
from made_up_runs import made_up_run
from report_pages import PROBE, TUNED

SHOTS = os.environ.get("ISTHMUS_SHOTS", "")  # a folder for screenshots
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SIZES = {"phone": {"width": 390, "height": 844}, "desk": {"width": 1280, "height": 800}}
PAGES = (PROBE, TUNED, "compared", "large")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@pytest.fixture(scope="module")
def pages(runs, photos, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    data = made_up_run(folder / "made up", photos[:4], classes=100, pictures=2000, epochs=20)
    return {
        PROBE: runs[PROBE] / "report.html",
        TUNED: runs[TUNED] / "report.html",
        "compared": write_comparison([runs[PROBE], runs[TUNED]], folder / "compared.html"),
        "large": write_report(folder / "made up", val=data.val),
    }


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as library:
        made = library.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(params=[(size, scheme) for size in SIZES for scheme in ("light", "dark")], ids="-".join)
def opened(request, browser, pages):
    """Opens a page from the disk; it may ask for nothing beside itself, and complain of nothing."""
    size, scheme = request.param
    context = browser.new_context(viewport=SIZES[size], color_scheme=scheme)
    asked, complaints = [], []

    def call(name: str):
        page = context.new_page()
        page.on("request", lambda each: asked.append(each.url))
        page.on("console", lambda each: complaints.append(each.text))
        page.on("pageerror", lambda each: complaints.append(str(each)))
        page.goto(pages[name].as_uri())
        page.wait_for_load_state("networkidle")
        if SHOTS:
            page.screenshot(path=f"{SHOTS}/{name}-{size}-{scheme}.png", full_page=True)
        return page

    yield call
    assert all(url.startswith(("file:", "data:")) for url in asked), asked
    assert complaints == []
    context.close()


@pytest.mark.parametrize("name", PAGES)
def test_everything_is_seen_and_nothing_runs_over(opened, name):
    page = opened(name)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    figures = page.locator("svg, img").evaluate_all(
        "all => all.map(each => each.getBoundingClientRect()).map(box => [box.left, box.width, box.height])"
    )
    assert len(figures) > 1
    width = page.viewport_size["width"]
    assert all(left >= 0 and least > 60 and height > 60 for left, least, height in figures)
    assert all(left + wide <= width for left, wide, _ in figures)
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # wide tables scroll inside their box


@pytest.mark.parametrize("name", PAGES)
def test_accessible_by_axe(opened, name):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = opened(name)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    found = axe.Axe().run(page).response["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert not serious, [(each["id"], [node["html"] for node in each["nodes"]][:3]) for each in serious]


def test_text_in_figures_is_large_enough_to_read(opened):
    """Also on a phone, where figures are made smaller: 9 px and more."""
    page = opened(TUNED)
    heights = page.locator("svg text").evaluate_all(
        "all => all.map(each => parseFloat(getComputedStyle(each).fontSize) * each.getCTM().a)"
    )
    assert min(heights) >= 9


def test_figures_take_the_colours_of_the_page(opened, request):
    page = opened(TUNED)
    dark = "dark" in request.node.callspec.id
    ink = page.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
    assert (ink == "rgb(230, 233, 236)") is dark
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(13, 16, 19)") is dark


def test_wide_tables_scroll_by_keyboard(opened):
    page = opened("compared")
    box = page.locator(".scroll").first
    box.focus()
    assert page.evaluate("document.activeElement.className") == "scroll"
