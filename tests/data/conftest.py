"""Real photographs from installed packages, and small made-up picture folders."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes class folders of tiny pictures, no two alike: ("pets", {"cat": 3}) fills pets/cat."""
    random = np.random.default_rng(0)

    def write(root: str, classes: dict[str, int], size: tuple[int, int] = (12, 10)) -> Path:
        for name, count in classes.items():
            folder = tmp_path / root / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
        return tmp_path / root

    return write
