"""Claim: the report of a run with 1,000 classes, 50,000 validation pictures and 100 epochs opens in 2 s, in 5 MB.

A made-up run. Opened from the disk in Chromium, its cache cold: from the start of the navigation to the last picture
decoded and painted, on a desk and on a phone whose CPU is four times slower (DevTools' throttling).
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

from isthmus.report.write import write_report
from measure import spread, write_result

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from made_up_runs import made_up_run
from photographs import write_photographs

RUNS = 5
SIZES = {"desk": ({"width": 1280, "height": 800}, 1), "phone": ({"width": 390, "height": 844}, 4)}
PAINTED = """async () => {
  await Promise.all([...document.images].map((image) => image.decode()));
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  return performance.now();
}"""


def opened(page: Path, size: dict[str, int], slower: int) -> float:
    """Seconds until a browser that was just started has painted the page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as library:
        browser = library.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_context(viewport=size).new_page()
        tab.context.new_cdp_session(tab).send("Emulation.setCPUThrottlingRate", {"rate": slower})
        tab.goto(page.as_uri())
        seconds: float = tab.evaluate(PAINTED) / 1000
        browser.close()
    return seconds


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)

        write_photographs(root / "photographs", 12)
        data = made_up_run(root / "run", sorted((root / "photographs").rglob("*.jpg")))
        begun = time.perf_counter()
        page = write_report(root / "run", val=data.val)
        wrote = time.perf_counter() - begun
        seconds = {name: [opened(page, *each) for _ in range(RUNS)] for name, each in SIZES.items()}
        megabytes = page.stat().st_size / 1e6
    write_result(
        "report_page",
        __doc__,
        {
            **{f"opened, {name}": {**spread(each), "unit": "s", "target": "<= 2"} for name, each in seconds.items()},
            "page": f"{megabytes:.2f} MB; target <= 5",
            "written in": f"{wrote:.1f} s",
        },
    )


if __name__ == "__main__":
    main()
