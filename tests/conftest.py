"""What every test may use: committed golden files, and one thread a worker so that workers do not fight for cores."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"

os.environ["KERAS_BACKEND"] = "torch"  # read when keras is imported; TensorFlow would take seconds and a core

# The same examples on every machine and every run; no time is ever asserted.
hypothesis.settings.register_profile("isthmus", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("isthmus")
torch.set_num_threads(1)
# A shell starts background jobs with Ctrl-C ignored, and Python inherits that; tests of Ctrl-C must not.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="write the golden files anew instead of comparing")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with a committed file in tests/golden; `pytest --regenerate` writes the file instead."""

    def compare(name: str, found: str) -> None:
        path = GOLDEN / name
        found = "\n".join(line.rstrip() for line in found.splitlines()) + "\n"
        if request.config.getoption("--regenerate"):
            path.write_text(found, encoding="utf-8")
        assert found == path.read_text(encoding="utf-8"), f"{name} differs; if meant so, run pytest --regenerate"

    return compare
