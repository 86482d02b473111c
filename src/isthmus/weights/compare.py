"""Two networks side by side: their tensors bit by bit, and their outputs for the same pictures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isnan

import torch
from torch import Tensor

from isthmus.arch.preprocess import Preprocess
from isthmus.errors import WeightsError
from isthmus.nn.network import ResNet

__all__ = ["Agreement", "Logits", "TensorComparison", "agreement", "compare_logits", "compare_tensors", "pictures"]

BATCH = 4

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Outputs of two networks for the same pictures; `relative` is to the largest output of the second."""

    pictures: int
    precision: str
    difference: float
    relative: float
    same_top1: int
    tolerance: float

    @property
    def equal(self) -> bool:
        """Whether the relative difference is within the tolerance."""
        return self.relative <= self.tolerance  # false for not-a-number


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorComparison:
    """Tensors of two networks by their native names: to the last bit equal, different, or only in one of them."""

    equal: int
    different: tuple[str, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    largest: float = 0.0
    where: str = ""

    @property
    def same(self) -> bool:
        """Whether both have the same tensors to the last bit."""
        return not (self.different or self.only_first or self.only_second)


def compare_logits(net: ResNet, other: Logits, batch: Tensor, *, precision: torch.dtype, tolerance: float) -> Agreement:
    """How far the outputs of `net` are from those of `other` on `batch` (N, C, *size). `net` is left in `precision`."""
    net.to(precision)
    with torch.inference_mode():
        rows = [(net(part), other(part)) for part in torch.split(batch.to(precision), BATCH)]
    mine, theirs = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return agreement(mine, theirs, precision=precision, tolerance=tolerance)


def agreement(mine: Tensor, theirs: Tensor, *, precision: torch.dtype, tolerance: float) -> Agreement:
    """How far outputs (N, classes) are from others; raises WeightsError when their shapes differ."""
    if mine.shape != theirs.shape:
        raise WeightsError(f"outputs of {tuple(mine.shape)} and of {tuple(theirs.shape)} cannot be compared")
    difference, scale = float((mine.double() - theirs.double()).abs().max()), float(theirs.abs().max())
    return Agreement(
        pictures=len(mine),
        precision=str(precision).removeprefix("torch."),
        difference=difference,
        relative=difference / scale if scale else difference,
        same_top1=int((mine.argmax(1) == theirs.argmax(1)).sum()),
        tolerance=tolerance,
    )


def compare_tensors(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> TensorComparison:
    """Two state dicts side by side; the largest difference is absolute, among tensors of equal shape."""
    different, largest, where = [], 0.0, ""
    shared = [name for name in first if name in second]
    for name in shared:
        one, other = first[name], second[name]
        if one.shape == other.shape and one.dtype == other.dtype and torch.equal(_bits(one), _bits(other)):
            continue
        different.append(name)
        if one.shape == other.shape and one.numel():
            gap = float((one.double() - other.double()).abs().max())
            if gap > largest or isnan(gap):  # what is not a number stays the largest: nothing is above it
                largest, where = gap, name
    return TensorComparison(
        equal=len(shared) - len(different),
        different=tuple(different),
        only_first=tuple(name for name in first if name not in second),
        only_second=tuple(name for name in second if name not in first),
        largest=largest,
        where=where,
    )


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: numbers would take 0 for -0, and what is not a number for another."""
    return tensor.contiguous().flatten().view(torch.uint8)


def pictures(record: Preprocess, channels: int, dims: int) -> Tensor:
    """Four drawn pictures, normalised by `record`, the same on every machine: (4, channels, *size) in double precision.

    A gradient, a checkerboard, rings and noise, with colours that differ; volumes are 32 voxels a side.
    """
    side = min(record.crop, 32) if dims == 3 else record.crop
    line = torch.arange(side, dtype=torch.float64) / side
    axes = torch.meshgrid(*(line,) * dims, indexing="ij")
    radius = sum((axis - 0.5).square() for axis in axes)
    noise = torch.Generator().manual_seed(0)
    drawn = [
        torch.stack([draw(channel) for channel in range(channels)])
        for draw in (
            lambda c: (axes[c % dims] + c / channels) % 1,
            lambda c: sum((axis * (8 + c)).floor() for axis in axes) % 2,
            lambda c: 0.5 + 0.5 * torch.sin(60 * radius + c),
            lambda _: torch.rand(axes[0].shape, dtype=torch.float64, generator=noise),
        )
    ]
    known = len(record.channels) == channels
    mean, std = (record.mean, record.std) if known else ((0.5,) * channels, (0.25,) * channels)
    centre, spread = (torch.tensor(values, dtype=torch.float64).view(-1, *(1,) * dims) for values in (mean, std))
    return (torch.stack(drawn) - centre) / spread
