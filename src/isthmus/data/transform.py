"""Pixels to a network's input: the one resize-and-crop, the crop of training, the normalisation of a batch."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from isthmus.arch.preprocess import Interpolation, Preprocess
from isthmus.data.decode import Pixels, pixels_of
from isthmus.errors import DataError

__all__ = [
    "Box",
    "centred",
    "channels_first",
    "cut_out",
    "evaluation_transform",
    "mirrored",
    "normalise",
    "resample",
    "shows_grey_levels",
]

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels of the picture."""

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_SLIVER = 100  # longer side over shorter


def centred(pixels: Pixels, record: Preprocess, *, exact: bool = True) -> Pixels:
    """The record's resize and centre crop: (crop, crop, C); without `exact` as near as `resample`, in less time.

    Rounds as torchvision does (the longer side down, the corner to even) and resamples the whole picture before it
    crops, although a part would do: Pillow's pixels depend on the part, and so would the equality with torchvision's.
    """
    height, width, channels = pixels.shape
    shorter = min(height, width)
    if record.squash:
        size = record.resize, record.resize
    else:
        if max(height, width) > _SLIVER * shorter:  # its resized self could fill the memory; the middle is all we need
            above, beside = (max(side - _SLIVER * shorter, 0) // 2 for side in (height, width))
            pixels = pixels[above : height - above, beside : width - beside]
            height, width, _ = pixels.shape
        size = record.resize * height // shorter, record.resize * width // shorter
    if exact:
        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        whole = pixels_of(image.resize(size[::-1], _FILTERS[record.interpolation]))
    else:
        whole = resample(pixels, (0, 0, width, height), size, record.interpolation)
    top, left = (round((side - record.crop) / 2) for side in size)
    return whole[top : top + record.crop, left : left + record.crop]


def shows_grey_levels(precision: str) -> bool:
    """Whether a network in a precision is worth exact pixels: below fp32 it loses more than a level in a hundred."""
    return precision == "fp32"


def cut_out(pixels: Pixels, box: Box, record: Preprocess) -> Pixels:
    """The part of a picture inside `box`, resized to (crop, crop, C)."""
    return resample(pixels, box, (record.crop, record.crop), record.interpolation)


def resample(pixels: Pixels, box: Box, size: tuple[int, int], interpolation: Interpolation) -> Pixels:
    """The part of a picture inside `box` in another size (height, width), antialiased.

    By torch, in a quarter of Pillow's time. One or two values in a hundred are a grey level off Pillow's; bicubic, less
    than one in ten thousand is further off.
    """
    left, top, right, bottom = box
    images = _batch_of_one(pixels[top:bottom, left:right])
    return _only(F.interpolate(images, size=size, mode=interpolation, antialias=True))


def mirrored(pixels: Pixels) -> Pixels:
    """Left and right exchanged; by torch, in a tenth of numpy's time."""
    return _only(_batch_of_one(pixels).flip(-1))


def _batch_of_one(pixels: Pixels) -> Tensor:
    """(1, C, H, W) in channels_last; a view would do, had its strides not two readings (pytorch/pytorch#68430)."""
    height, width, channels = pixels.shape
    images = torch.empty((1, channels, height, width), dtype=torch.uint8, memory_format=torch.channels_last)
    images[0] = torch.from_numpy(pixels).permute(2, 0, 1)
    return images


def _only(images: Tensor) -> Pixels:
    return images.permute(0, 2, 3, 1)[0].numpy()


def channels_first(pixels: Pixels) -> Tensor:
    """(H, W, C) -> a tensor (C, H, W) on the same memory, so that batches become channels_last for free."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def evaluation_transform(record: Preprocess) -> Callable[[Pixels], Tensor]:
    """Pixels -> uint8 (C, crop, crop): the record's resize and centre crop, without its normalisation."""
    return lambda pixels: channels_first(centred(pixels, record))


@lru_cache(maxsize=16)
def _mean_and_std(record: Preprocess, device: torch.device) -> tuple[Tensor, Tensor]:
    """In grey levels: (C, 1, 1)."""
    with torch.inference_mode(mode=False):  # they outlive the caller's mode
        mean, std = torch.tensor([record.mean, record.std], device=device).mul(255)[..., None, None]
    return mean, std


def normalise(images: Tensor, record: Preprocess, out: Tensor | None = None) -> Tensor:
    """A uint8 batch (N, C, H, W) of RGB or grey -> float32 as the record says, in its channel order, on its device.

    With `out`, into that tensor: fresh memory for every batch costs as much as the arithmetic. Raises DataError when
    the batch is not uint8 (already normalised?) or has other channels than the record.
    """
    if images.dtype != torch.uint8 or images.shape[-3] != len(record.channels):
        raise DataError(
            f"a batch of {images.dtype} {tuple(images.shape)} cannot be normalised; "
            f"it must be torch.uint8 with {len(record.channels)} channels, and normalised once"
        )
    ordered = images.flip(-3) if record.channels == "BGR" else images
    out = torch.empty_like(ordered, dtype=torch.float32) if out is None else out
    mean, std = _mean_and_std(record, out.device)
    if out.is_cpu and out.ndim == 4 and all(each.permute(0, 2, 3, 1).is_contiguous() for each in (ordered, out)):
        _normalise_rows(ordered, mean, std, out)
        return out
    return out.copy_(ordered).sub_(mean).div_(std)


def _normalise_rows(images: Tensor, mean: Tensor, std: Tensor, out: Tensor) -> None:
    """The same, on this thread alone and a picture at a time, which its cache holds.

    A team of torch's threads waits for the cores on which the loader's decode, and takes a fifth of their rate. Rows
    are seen as width * C numbers, so that the inner loop is a long one.
    """
    width = images.shape[-1]
    means, stds = (np.tile(each.flatten().numpy(), width) for each in (mean, std))
    for source, target in zip(images, out, strict=True):
        rows = target.permute(1, 2, 0).flatten(1).numpy()
        np.copyto(rows, source.permute(1, 2, 0).flatten(1).numpy())
        np.subtract(rows, means, out=rows)
        np.divide(rows, stds, out=rows)
