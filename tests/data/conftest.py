"""Small made-up picture folders."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
