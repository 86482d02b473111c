"""A picture file to pixels: decoding, the one resize-and-crop, and the normalisation of a batch."""

import re
import warnings
from collections.abc import Callable
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from isthmus.arch.preprocess import ChannelOrder, Preprocess
from isthmus.data.pictures import read_file
from isthmus.errors import DataError

__all__ = [
    "Box",
    "centred",
    "channels_first",
    "cut_out",
    "decode",
    "evaluation_transform",
    "extensions",
    "normalise",
    "pixels_of",
]

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of the picture; fractions are meant."""

# Pillow also opens PostScript and the like through outside programs: nothing here does.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "DIB", "PPM", "JPEG2000", "AVIF", "MPO")
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SLIVER = 100  # longer side over shorter
_FROM_PILLOW = re.compile(r"PIL\.")


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@lru_cache(maxsize=1)
def extensions() -> frozenset[str]:
    """Names that end so (.jpg, .png, ...) are taken for pictures when a folder is searched."""
    return frozenset(end for end, name in Image.registered_extensions().items() if name in _FORMATS)


def _hush() -> None:
    """Ignore what Pillow's own modules warn of: damaged metadata, large pictures.

    For good, and not around each call: `warnings.catch_warnings` swaps a list that all threads share.
    """
    quiet: Any = ("ignore", None, Warning, _FROM_PILLOW, 0)
    if quiet not in warnings.filters:
        warnings.filterwarnings("ignore", module=_FROM_PILLOW.pattern)


def decode(source: Path | str | bytes, channels: ChannelOrder = "RGB", name: str = "") -> Image.Image:
    """The first frame of a picture file (or of its bytes) as people see it: mode L for channels L, else RGB.

    EXIF orientation is applied, transparency is laid on white, deep grey pixels are scaled to 8 bit, grey is repeated
    into RGB. Raises DataError naming the file (of bytes: `name`) and the reason when there is no sound picture of sane
    size in it.
    """
    if isinstance(source, bytes):
        content, name = source, name or f"the picture of {len(source)} bytes"
    else:
        content, name = read_file(source), str(source)
    if not content:
        raise DataError(f"{name} is empty; copy it again or leave it out")
    _hush()
    try:
        image = Image.open(BytesIO(content), formats=_formats())
        image.load()
        return _in_mode(_upright(image), "L" if channels == "L" else "RGB")
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not a picture; what can be read: {', '.join(_formats())}") from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise DataError(f"{name} has more than {limit:,} pixels; scale it down first") from error
    except Exception as error:  # each of Pillow's formats raises its own: OSError, SyntaxError, struct.error, ...
        reason = str(error) or type(error).__name__
        raise DataError(f"{name} cannot be decoded: {reason}; copy it again or leave it out") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - damaged metadata raises anything, and the pixels are sound
        turn = None
    return image if turn is None else image.transpose(turn)


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_eight_bit(np.asarray(image)))
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == mode else image.convert(mode)


def _eight_bit(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Grey in 0..255 from whole numbers in 0..65535, or from floats in 0..1, 0..255 or 0..65535 (the first that fits).

    Whole numbers are never stretched: a dark picture stays dark beside a bright one.
    """
    low, high = float(pixels.min()), float(pixels.max())
    if not 0 <= low <= high <= 65535:  # also not-a-number
        raise ValueError(f"its pixels run from {low:g} to {high:g}, and only 0..1, 0..255 and 0..65535 have a meaning")
    full = 65535 if pixels.dtype.kind in "iu" else next(top for top in (1, 255, 65535) if high <= top)
    return np.rint(pixels * (255 / full)).astype(np.uint8)


def centred(image: Image.Image, record: Preprocess) -> Image.Image:
    """The record's resize and centre crop: crop x crop pixels.

    Rounds as torchvision does (the longer side down, the corner to even) and resamples the whole picture before it
    crops, although a part would do: Pillow's pixels depend on the part, and so would the equality with torchvision's.
    """
    if record.squash:
        size = record.resize, record.resize
    else:
        shorter = min(image.size)
        if max(image.size) > _SLIVER * shorter:  # its resized self could fill the memory; the middle is all we need
            left, top = (max(side - _SLIVER * shorter, 0) // 2 for side in image.size)
            image = image.crop((left, top, image.width - left, image.height - top))
        size = record.resize * image.width // shorter, record.resize * image.height // shorter
    left, top = (round((side - record.crop) / 2) for side in size)
    whole = image.resize(size, _FILTERS[record.interpolation])
    return whole.crop((left, top, left + record.crop, top + record.crop))


def cut_out(image: Image.Image, box: Box, record: Preprocess) -> Image.Image:
    """The part of a picture inside `box`, resized to crop x crop pixels."""
    return image.resize((record.crop, record.crop), _FILTERS[record.interpolation], box=box)


def pixels_of(image: Image.Image) -> NDArray[np.uint8]:
    """Its pixels: uint8 (H, W, C)."""
    return np.array(image).reshape(image.height, image.width, -1)


def channels_first(pixels: NDArray[np.uint8]) -> Tensor:
    """(H, W, C) -> a tensor (C, H, W) on the same memory, so that batches become channels_last for free."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def evaluation_transform(record: Preprocess) -> Callable[[Image.Image], Tensor]:
    """Picture -> uint8 (C, crop, crop): the record's resize and centre crop, without its normalisation."""
    return lambda image: channels_first(pixels_of(centred(image, record)))


@lru_cache(maxsize=16)
def _mean_and_std(record: Preprocess, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(mode=False):  # they outlive the caller's mode
        mean, std = torch.tensor([record.mean, record.std], device=device).mul(255)[..., None, None]
    return mean, std


def normalise(images: Tensor, record: Preprocess) -> Tensor:
    """A uint8 batch (N, C, H, W) of RGB or grey -> float32 as the record says, in its channel order, on its device.

    Raises DataError when the batch is not uint8 (already normalised?) or has other channels than the record.
    """
    if images.dtype != torch.uint8 or images.shape[-3] != len(record.channels):
        raise DataError(
            f"a batch of {images.dtype} {tuple(images.shape)} cannot be normalised; "
            f"it must be torch.uint8 with {len(record.channels)} channels, and normalised once"
        )
    mean, std = _mean_and_std(record, images.device)
    ordered = images.flip(-3) if record.channels == "BGR" else images
    return ordered.to(torch.float32).sub_(mean).div_(std)
