"""A folder of pictures as ImageNet has them, made from the photographs that scientific packages bring along."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["write_photographs"]

SOURCES = {
    "skimage": (
        "data/astronaut.png data/brick.png data/chelsea.png data/coffee.png data/grass.png data/gravel.png "
        "data/hubble_deep_field.jpg data/ihc.png data/motorcycle_left.png data/retina.jpg data/rocket.jpg"
    ),
    "sklearn": "datasets/images/china.jpg datasets/images/flower.jpg",
    "elpv_dataset": "data/images/cell0001.png data/images/cell2001.png",
}
CLASSES = 10


def photographs() -> list[Image.Image]:
    """The whole photographs, in RGB."""
    found = []
    for package, names in SOURCES.items():
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f'{package} is needed for its photographs: pip install "isthmus[dev]"')
        for name in names.split():
            with Image.open(Path(spec.origin).parent / name) as photograph:
                found.append(photograph.convert("RGB"))
    return found


def write_photographs(folder: Path, count: int) -> int:
    """Class folders of `count` JPEGs of about 500 x 375 pixels, quality 75 to 95, no two alike; gives their bytes.

    Each is a random part of a photograph, enlarged by a fifth at most where the photograph is large enough; half of
    them are mirrored, three in ten upright.
    """
    random, sources, written = np.random.default_rng(0), photographs(), 0
    for number in range(count):
        whole = sources[number % len(sources)]
        sides = [int(np.clip(random.normal(mean, 40), mean - 120, mean + 120)) for mean in (500, 375)]
        width, height = sides if random.random() < 0.7 else sides[::-1]
        fits = min(whole.width / width, whole.height / height)
        scale = 0.999 * random.uniform(min(1 / 1.2, fits), fits)  # pixels of the photograph to one of the picture
        left, top = random.uniform(0, whole.width - width * scale), random.uniform(0, whole.height - height * scale)
        box = (left, top, left + width * scale, top + height * scale)
        picture = whole.resize((width, height), Image.Resampling.BICUBIC, box=box)
        if random.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        quality = int(random.integers(75, 96))
        path = folder / f"class{number % CLASSES}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=quality, subsampling="4:2:0" if quality < 90 or number % 2 else "4:4:4")
        written += path.stat().st_size
    return written
