"""How a picture becomes a network's input: the record that travels with weights, in every file we write."""

from dataclasses import dataclass, replace
from typing import Literal, Self

from isthmus import records
from isthmus.errors import SpecError

__all__ = ["IMAGENET", "ChannelOrder", "Interpolation", "Preprocess", "View"]

Interpolation = Literal["bilinear", "bicubic"]
ChannelOrder = Literal["RGB", "BGR", "L"]
View = Literal["identity", "hflip", "vflip", "rot180"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """Resize, centre crop, scale to [0, 1], subtract `mean`, divide by `std`.

    `resize` is the length in pixels of the shorter side, or with `squash` of both sides; `crop` is the side of the
    square cut from the middle. `mean` and `std` are per channel in the order of `channels`, on the [0, 1] scale.
    A prediction is the mean over `views`; one view is the picture as it is.
    """

    resize: int = 256
    crop: int = 224
    squash: bool = False
    interpolation: Interpolation = "bilinear"
    channels: ChannelOrder = "RGB"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    views: tuple[View, ...] = ("identity",)

    def __post_init__(self) -> None:
        records.check_fields(self)
        count = len(self.channels)
        if not self.views:
            raise SpecError("preprocess views is empty; 'identity' is the picture as it is")
        if len(self.mean) != count or len(self.std) != count:
            raise SpecError(
                f"preprocess has {len(self.mean)} means and {len(self.std)} deviations for channels {self.channels}; "
                f"give {count} of each"
            )
        if not 0 < self.crop <= self.resize:
            raise SpecError(f"preprocess crops {self.crop} px out of {self.resize} px; crop must lie in 1..resize")
        if min(self.std) <= 0:
            raise SpecError(f"preprocess std is {self.std}; every value must be above 0")

    def __str__(self) -> str:
        """The steps in a line."""
        sides = "both sides" if self.squash else "shorter side"
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        views = f", mean over {', '.join(self.views)}" if len(self.views) > 1 else ""
        return (
            f"{sides} to {self.resize} px ({self.interpolation}), middle {self.crop}×{self.crop} px, {self.channels} "
            f"from 0 to 1, minus ({mean}), over ({std}){views}"
        )

    def at(self, size: int) -> Self:
        """The same record for another input size in pixels; the ratio of resize to crop is kept."""
        return replace(self, resize=round(self.resize * size / self.crop), crop=size)


IMAGENET = Preprocess()
"""The evaluation transform of torchvision's first ImageNet weights (resize 256, crop 224, bilinear)."""
