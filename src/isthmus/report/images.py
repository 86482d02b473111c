"""Pictures inside a page, as data URIs: small JPEGs, and PNGs of which the page decides the colour behind them."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from isthmus.report.drawing import BLUE, ORANGE

__all__ = ["confusion_picture", "heated", "jpeg"]

SIDE, QUALITY = 224, 80
CELLS = 500  # a side of a confusion picture has no more; on a page they would be less than a pixel
GLOW = np.array([[0.55, 0.0, 0.35], [0.95, 0.3, 0.1], [1.0, 0.95, 0.45]])  # from some heat to the greatest


def jpeg(pixels: NDArray[np.uint8]) -> str:
    """RGB or grey pixels (H, W, C), made smaller where they are larger than a page needs."""
    import simplejpeg

    grey = pixels.shape[2] == 1
    image = Image.fromarray(pixels[..., 0] if grey else pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    small = np.ascontiguousarray(np.asarray(image).reshape(image.height, image.width, -1))
    content = simplejpeg.encode_jpeg(small, QUALITY, colorspace="GRAY" if grey else "RGB", colorsubsampling="420")
    return uri("jpeg", content)


def heated(pixels: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Pixels (H, W, C) in grey, and over them the heat (H, W) in [0, 1] as a glow: RGB."""
    grey = pixels.astype(np.float32).mean(2, keepdims=True) / 255
    levels = np.linspace(0, 1, len(GLOW))
    glow = np.stack([np.interp(heat, levels, GLOW[:, channel]) for channel in range(3)], axis=2)
    part = 0.75 * np.clip(heat * 1.5, 0, 1)[..., None]
    mixed = grey * (1 - part) + glow * part
    shown: NDArray[np.uint8] = (255 * mixed).round().astype(np.uint8)
    return shown


def confusion_picture(confusion: NDArray[np.int64]) -> str:
    """A confusion matrix with a point a cell, the stronger the larger its part of the row; transparent where it is 0.

    Blue where classes are right and orange where they are wrong. More than `CELLS` classes share points.
    """
    count = len(confusion)
    each = -(-count // CELLS)
    starts = np.arange(0, count, each)
    pooled = np.add.reduceat(np.add.reduceat(confusion, starts, 0), starts, 1)
    part = pooled / np.maximum(pooled.sum(1, keepdims=True), 1)
    # The root shows a picture in a hundred; half of the levels are for each colour.
    level = np.ceil(127 * np.sqrt(part)).astype(np.uint8)
    np.fill_diagonal(level, np.where(level.diagonal() > 0, level.diagonal() + 128, 0))
    image = Image.fromarray(level, "P")
    colours = [[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in (ORANGE, BLUE)]
    image.putpalette([value for colour in colours for value in colour * 128])
    alpha = [min(255, 2 * (place % 128)) for place in range(256)]
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, transparency=bytes(alpha))
    return uri("png", buffer.getvalue())


def uri(kind: str, content: bytes) -> str:
    """The content of an image file as an address."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
