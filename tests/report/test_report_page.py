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


VIEWS = [
    *((TUNED, size, scheme) for size in SIZES for scheme in ("light", "dark")),
    *((name, *view) for name in (PROBE, "compared", "large") for view in (("desk", "light"), ("phone", "dark"))),
]


@pytest.fixture(params=VIEWS, ids="-".join)
def page(request, browser, pages):
    """A page, opened from the disk; it may ask for nothing beside itself, and complain of nothing."""
    name, size, scheme = request.param
    context = browser.new_context(viewport=SIZES[size], color_scheme=scheme)
    asked, complaints = [], []
    made = context.new_page()
    made.on("request", lambda each: asked.append(each.url))
    made.on("console", lambda each: complaints.append(each.text))
    made.on("pageerror", lambda each: complaints.append(str(each)))
    made.goto(pages[name].as_uri())
    made.wait_for_load_state("networkidle")
    if SHOTS:
        made.screenshot(path=f"{SHOTS}/{name}-{size}-{scheme}.png", full_page=True)
    made.scheme = scheme
    yield made
    assert all(url.startswith(("file:", "data:")) for url in asked), asked
    assert complaints == []
    context.close()


def test_a_page_for_everybody(page):
    """Nothing runs over, figures are seen and large enough, colours are those of the page, and axe is content."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    figures = page.locator("svg, img").evaluate_all(
        "all => all.map(each => each.getBoundingClientRect()).map(box => [box.left, box.width, box.height])"
    )
    assert len(figures) > 1
    width = page.viewport_size["width"]
    assert all(left >= 0 and wide > 60 and height > 60 and left + wide <= width for left, wide, height in figures)

    texts = page.locator("svg text").evaluate_all(
        "all => all.map(each => parseFloat(getComputedStyle(each).fontSize) * each.getCTM().a).filter(size => size)"
    )
    assert min(texts) >= 10  # pixels
    dark = page.scheme == "dark"
    assert (page.evaluate("getComputedStyle(document.querySelector('svg text')).fill") == "rgb(230, 233, 236)") is dark
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 16, 19)") is dark

    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # wide tables scroll inside their box
    box = page.locator(".scroll").first
    box.focus()
    assert page.evaluate("document.activeElement.className") == "scroll"
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(page).response["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert not serious, [(each["id"], [node["html"] for node in each["nodes"]][:3]) for each in serious]
