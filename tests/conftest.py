"""What every test may use: golden files, photographs, a small run; one thread a worker, for workers fight for cores."""

import hashlib
import os
import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from isthmus.deploy import program
from isthmus.run import fit
from isthmus.train.recipes import recipe
from isthmus.weights.digest import add_tensors
from small_runs import class_folders, weights

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


SKIMAGE = (
    "astronaut.png brick.png camera.png cell.png chelsea.png coffee.png coins.png grass.png gravel.png ihc.png "
    "moon.png motorcycle_left.png page.png retina.jpg rocket.jpg"
)
SKLEARN = "china.jpg flower.jpg"
ELPV = "cell0001.png cell0042.png cell1234.png cell2624.png"


def _inside(package: str, folder: str, names: str) -> list[Path]:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return [Path(spec.origin).parent / folder / name for name in names.split()]


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    found = [
        *_inside("skimage", "data", SKIMAGE),
        *_inside("sklearn", "datasets/images", SKLEARN),
        *_inside("elpv_dataset", "data/images", ELPV),
    ]
    assert len(found) >= 20
    return found


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small pictures in two class folders."""
    return class_folders(tmp_path_factory.mktemp("data") / "pictures", {"flower": 10, "temple": 14})


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a small network."""
    return weights(tmp_path_factory.mktemp("weights") / "plain.safetensors")


@pytest.fixture(scope="session")
def linear(tmp_path_factory: pytest.TempPathFactory, pictures: Path, plain: Path) -> Path:
    """A finished run of these, the quickest kind."""
    out = tmp_path_factory.mktemp("runs") / "linear"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISTHMUS_CACHE", str(out.parent / "cache"))
        fit(recipe("linear-probe", data=str(pictures), weights=str(plain)), out, report=False)
    return out


@pytest.fixture(scope="session")
def programs() -> dict[object, program.Program]:
    """What was exported before."""
    return {}


@pytest.fixture
def exported_once(monkeypatch: pytest.MonkeyPatch, programs: dict[object, program.Program]) -> None:
    """Equal networks are traced and translated to ONNX once for all tests of a process: it takes seconds."""
    real = program.traced

    def traced(module: torch.nn.Module, example: torch.Tensor, name: str, axes: Any, text: str) -> program.Program:
        digest = hashlib.sha256()
        add_tensors(digest, module.state_dict().items())
        key = type(module), getattr(module, "record", None), example.shape, text, digest.hexdigest()
        if key not in programs:
            programs[key] = real(module, example, name, axes, text)
        return programs[key]

    monkeypatch.setattr(program, "traced", traced)
