"""The page in a real browser: a picture is dropped and its classes are seen; a text file is dropped and refused."""

import base64
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import isthmus
from services import Service, service
from small_runs import class_folders, network, weights

CLASSES = (
    "brick",
    "cell",
    "dome",
    "flower",
    "grass",
    "temple",
    "<b>tower</b> of a name so long that a phone breaks it",
)
SHOTS = os.environ.get("ISTHMUS_SHOTS", "")  # a folder for screenshots
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 800}
DROP = """([content, name, kind]) => {
  const bytes = Uint8Array.from(atob(content), (each) => each.charCodeAt(0));
  const held = new DataTransfer();
  held.items.add(new File([bytes], name, {type: kind}));
  document.querySelector("label").dispatchEvent(
    new DragEvent("drop", {dataTransfer: held, bubbles: true, cancelable: true}));
}"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    net = network()
    net.classes = CLASSES
    return weights(tmp_path_factory.mktemp("page") / "net.safetensors", net)


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    return class_folders(tmp_path_factory.mktemp("page") / "pictures", {"temple": 1}, side=300) / "temple" / "0.jpg"


@pytest.fixture(scope="module")
def server(run, tmp_path_factory) -> Iterator[Service]:
    with service(run, tmp_path_factory.mktemp("cache"), max_bytes=1_000_000) as made:
        yield made


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as library:
        made = library.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(params=[(DESK, "light"), (PHONE, "dark")], ids=["desk-light", "phone-dark"])
def page(request, browser, server):
    """The page, open; it may ask this server alone, and complain of nothing."""
    size, scheme = request.param
    context = browser.new_context(viewport=size, color_scheme=scheme)
    made = context.new_page()
    asked, complaints = [], []
    made.on("request", lambda each: asked.append(each.url))
    made.on("console", lambda each: complaints.append(each.text))
    made.on("pageerror", lambda each: complaints.append(str(each)))
    made.goto(server.address)
    made.shot = lambda name: SHOTS and made.screenshot(path=f"{SHOTS}/{name}-{request.node.callspec.id}.png")
    yield made
    made.wait_for_load_state("networkidle")
    assert all(url.startswith((server.address, "blob:", "data:")) for url in asked), asked
    refused = ("the server responded with a status of 415", "the server responded with a status of 502")
    assert all(any(each in text for each in refused) for text in complaints), complaints  # Chromium's own words
    assert made.evaluate("document.documentElement.scrollWidth <= innerWidth")
    context.close()


def drop(page, content: bytes, name: str, kind: str) -> None:
    page.evaluate(DROP, [base64.b64encode(content).decode(), name, kind])


def test_a_dropped_picture_shows_its_classes(page, run, picture):
    page.shot("empty")
    (expected,) = isthmus.predict(run, picture, precision="fp32")
    drop(page, picture.read_bytes(), "temple.jpg", "image/jpeg")
    page.wait_for_selector("li")
    rows = [row.split("\n") for row in page.locator("li").all_inner_texts()]
    assert [name for name, _ in rows] == list(expected.classes)
    assert [float(part.split()[0]) for _, part in rows] == pytest.approx(
        [100 * each for each in expected.probabilities], abs=0.06
    )
    widths = page.locator("li div div").evaluate_all("bars => bars.map(bar => parseFloat(bar.style.width))")
    assert widths == pytest.approx([100 * each for each in expected.probabilities], abs=0.06)
    page.wait_for_selector("img:not([hidden])")
    page.shot("classes")


def test_a_dropped_text_is_refused_and_a_picture_comes_after(page, picture):
    drop(page, b"this is no picture", "notes.txt", "text/plain")
    assert "the upload is not a picture" in page.get_by_role("alert").text_content()
    assert page.locator("li").count() == 0
    page.shot("error")
    drop(page, bytes(1_000_001), "large.jpg", "image/jpeg")
    page.get_by_text("large.jpg has more than 1,000,000 bytes; choose a smaller one.").wait_for()
    page.locator("input").set_input_files(picture)
    page.wait_for_selector("li")
    assert page.get_by_role("alert").count() == 0


def test_the_keyboard_and_a_reader_find_their_way(page, picture):
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.type") == "file"
        page.shot("focus")
        page.keyboard.press("Enter")
    chooser.value.set_files(picture)
    page.wait_for_selector("li")
    assert page.get_by_label("Choose a picture").count() == 1
    assert page.get_by_role("listitem").count() == 5
    assert page.locator("[aria-live=polite] ol").count() == 1
    assert page.get_by_role("heading").count() == 1


def test_a_service_that_is_gone_is_told(page, picture):
    page.route("**/predict", lambda route: route.fulfill(status=502, body="bad gateway"))
    drop(page, picture.read_bytes(), "temple.jpg", "image/jpeg")
    page.get_by_text("gave no answer").wait_for()
    page.unroute("**/predict")
