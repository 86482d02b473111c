"""How a picture becomes a network's input: the record that travels with weights, in every file we write."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from isthmus.errors import SpecError

__all__ = ["IMAGENET", "Preprocess"]

Interpolation = Literal["bilinear", "bicubic"]
ChannelOrder = Literal["RGB", "BGR", "L"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """Resize, centre crop, scale to [0, 1], subtract `mean`, divide by `std`.

    `resize` is the length in pixels of the shorter side, or with `squash` of both sides; `crop` is the side of the
    square cut from the middle. `mean` and `std` are per channel in the order of `channels`, on the [0, 1] scale.
    """

    resize: int = 256
    crop: int = 224
    squash: bool = False
    interpolation: Interpolation = "bilinear"
    channels: ChannelOrder = "RGB"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        count = len(self.channels)
        if self.channels not in ("RGB", "BGR", "L"):
            raise SpecError(f"preprocess channels is {self.channels!r}; it must be RGB, BGR or L")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise SpecError(f"preprocess interpolation is {self.interpolation!r}; it must be bilinear or bicubic")
        if len(self.mean) != count or len(self.std) != count:
            raise SpecError(
                f"preprocess has {len(self.mean)} means and {len(self.std)} deviations for channels {self.channels}; "
                f"give {count} of each"
            )
        if not 0 < self.crop <= self.resize:
            raise SpecError(f"preprocess crops {self.crop} px out of {self.resize} px; crop must lie in 1..resize")
        if min(self.std) <= 0:
            raise SpecError(f"preprocess std is {self.std}; every value must be above 0")

    def at(self, size: int) -> Self:
        """The same record for another input size in pixels; the ratio of resize to crop is kept."""
        from dataclasses import replace

        return replace(self, resize=round(self.resize * size / self.crop), crop=size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON or TOML."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The record written by `to_dict`; raises SpecError on an unknown key."""
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise SpecError(f"preprocess has unknown keys {sorted(unknown)}; known: {list(cls.__dataclass_fields__)}")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


IMAGENET = Preprocess()
"""The evaluation transform of torchvision's first ImageNet weights (resize 256, crop 224, bilinear)."""
