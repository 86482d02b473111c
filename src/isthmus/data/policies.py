"""RandAugment and TrivialAugment as tables: what may happen to a crop, and how strongly. Pillow does the pixels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

__all__ = ["OPERATIONS", "RAND", "TRIVIAL", "Chance", "rand_augment", "trivial_augment"]

Operation = Callable[..., Image.Image]


def _affine(image: Image.Image, *matrix: float, **look: Any) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, **look)


def _solarize_add(image: Image.Image, amount: float, **_: Any) -> Image.Image:
    lookup = [min(255, value + int(amount)) if value < 128 else value for value in range(256)]
    return image.point(lookup * len(image.getbands()))


OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, _, **__: image,
    "autocontrast": lambda image, _, **__: ImageOps.autocontrast(image),
    "equalize": lambda image, _, **__: ImageOps.equalize(image),
    "invert": lambda image, _, **__: ImageOps.invert(image),
    "posterize": lambda image, bits, **_: ImageOps.posterize(image, int(bits)),
    "solarize": lambda image, threshold, **_: ImageOps.solarize(image, threshold),
    "solarize_add": _solarize_add,
    "color": lambda image, change, **_: ImageEnhance.Color(image).enhance(1 + change),
    "contrast": lambda image, change, **_: ImageEnhance.Contrast(image).enhance(1 + change),
    "brightness": lambda image, change, **_: ImageEnhance.Brightness(image).enhance(1 + change),
    "sharpness": lambda image, change, **_: ImageEnhance.Sharpness(image).enhance(1 + change),
    "rotate": lambda image, degrees, **look: image.rotate(degrees, **look),
    "shear_x": lambda image, factor, **look: _affine(image, 1, factor, 0, 0, 1, 0, **look),
    "shear_y": lambda image, factor, **look: _affine(image, 1, 0, 0, factor, 1, 0, **look),
    "translate_x": lambda image, pixels, **look: _affine(image, 1, 0, pixels, 0, 1, 0, **look),
    "translate_y": lambda image, pixels, **look: _affine(image, 1, 0, 0, 0, 1, pixels, **look),
}
"""Operation of (image, amount) and, for those that move pixels, Pillow's `resample` and `fillcolor`."""


class Chance(NamedTuple):
    """A policy's operation: its amount at a level in 0..1 for a crop of `side` pixels, of either sign if `signed`."""

    operation: str
    amount: Callable[[float, int], float] = lambda _level, _side: 0.0
    signed: bool = False


RAND = (
    Chance("autocontrast"),
    Chance("equalize"),
    Chance("invert"),
    Chance("rotate", lambda level, _: 30 * level, signed=True),
    Chance(
        "posterize", lambda level, _: max(4 - int(4 * level), 1)
    ),  # Pillow refuses to keep no bit, timm would ask it
    Chance("solarize", lambda level, _: 256 - int(256 * level)),
    Chance("solarize_add", lambda level, _: int(110 * level)),
    Chance("color", lambda level, _: 0.9 * level, signed=True),
    Chance("contrast", lambda level, _: 0.9 * level, signed=True),
    Chance("brightness", lambda level, _: 0.9 * level, signed=True),
    Chance("sharpness", lambda level, _: 0.9 * level, signed=True),
    Chance("shear_x", lambda level, _: 0.3 * level, signed=True),
    Chance("shear_y", lambda level, _: 0.3 * level, signed=True),
    Chance("translate_x", lambda level, side: 0.45 * level * side, signed=True),
    Chance("translate_y", lambda level, side: 0.45 * level * side, signed=True),
)
"""RandAugment (Cubuk et al. 2020) as timm's `rand-...-inc1` has it: every operation grows with the level."""

TRIVIAL = (
    Chance("identity"),
    Chance("shear_x", lambda level, _: 0.99 * level, signed=True),
    Chance("shear_y", lambda level, _: 0.99 * level, signed=True),
    Chance("translate_x", lambda level, _: int(32 * level), signed=True),
    Chance("translate_y", lambda level, _: int(32 * level), signed=True),
    Chance("rotate", lambda level, _: 135 * level, signed=True),
    Chance("brightness", lambda level, _: 0.99 * level, signed=True),
    Chance("color", lambda level, _: 0.99 * level, signed=True),
    Chance("contrast", lambda level, _: 0.99 * level, signed=True),
    Chance("sharpness", lambda level, _: 0.99 * level, signed=True),
    Chance("posterize", lambda level, _: 8 - round(6 * level)),
    Chance("solarize", lambda level, _: 255 - 255 * level),
    Chance("autocontrast"),
    Chance("equalize"),
)
"""TrivialAugment, the wide space (Müller & Hutter 2021, table 7; torchvision's TrivialAugmentWide)."""

BINS = 31  # of TrivialAugment's levels


def _applied(
    image: Image.Image, chance: Chance, level: float, random: np.random.Generator, look: dict[str, Any]
) -> Image.Image:
    amount = chance.amount(level, image.width)
    sign = -1 if chance.signed and random.random() < 0.5 else 1
    return OPERATIONS[chance.operation](image, sign * amount, **look)


def rand_augment(
    image: Image.Image,
    random: np.random.Generator,
    *,
    layers: int,
    magnitude: float,
    spread: float,
    **look: Any,
) -> Image.Image:
    """A crop after `layers` random operations of RAND, each skipped half of the time as in timm.

    The magnitude of each is drawn from N(magnitude, spread) and cut to 0..10.
    """
    for chosen in random.integers(len(RAND), size=layers):
        if random.random() < 0.5:
            level = min(max(random.normal(magnitude, spread), 0.0), 10.0) / 10
            image = _applied(image, RAND[chosen], level, random, look)
    return image


def trivial_augment(image: Image.Image, random: np.random.Generator, **look: Any) -> Image.Image:
    """A crop after one random operation of TRIVIAL at a random one of its 31 levels."""
    chosen, level = random.integers(len(TRIVIAL)), random.integers(BINS) / (BINS - 1)
    return _applied(image, TRIVIAL[chosen], float(level), random, look)
