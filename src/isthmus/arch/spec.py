"""The network on paper: a stem, a table of stages and a head. Validated once, where it is made."""

from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Literal, Self

from isthmus import records
from isthmus.arch.block import FOLDED, KNOWN_KINDS, Activation, AntiAlias, Attention, Norm, Shortcut
from isthmus.errors import SpecError

__all__ = ["HeadSpec", "NetSpec", "StageSpec", "StemSpec"]


def check(condition: object, message: str) -> None:
    """Raise SpecError with `message` unless `condition` holds."""
    if not condition:
        raise SpecError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class StemSpec:
    """Convolutions before the first stage: one `kernel`×`kernel`, or three 3×3 when `widths` has three entries.

    `pool`: `max` is 3×3/2 padded on both sides, `max_zero` the same padded with zeros that take part in the maximum,
    `max_ceil` padded only at the end, `conv` a strided 3×3 (Bello et al. 2021, ResNet-RS), `none` for small pictures.
    `bias` gives the convolutions one beside their norms: Keras' pre-activation networks have both.
    """

    widths: tuple[int, ...] = (64,)
    kernel: int = 7
    stride: int = 2
    pool: Literal["max", "max_zero", "max_ceil", "conv", "none"] = "max"
    bias: bool = False

    def __post_init__(self) -> None:
        records.check_fields(self)
        check(len(self.widths) in (1, 3), f"stem.widths has {len(self.widths)} entries; give one (k×k) or three (3×3)")
        check(min(self.widths) >= 1 and self.stride >= 1, "stem widths and stride must be at least 1")
        check(self.kernel >= 1 and self.kernel % 2 == 1, f"stem.kernel is {self.kernel}; it must be odd")
        check(
            len(self.widths) == 1 or self.kernel == 3,
            f"stem.kernel is {self.kernel}; a stem of three convolutions has kernel 3",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpec:
    """`depth` equal blocks; one of them, the first by default, carries `stride` and changes the width to `out`.

    `mid` is the width of the strip and `reduce` that of its first 1×1 (0 means `mid`); `first_dilation` is the
    dilation of the first block's strided convolution (0 means `dilation`).
    """

    depth: int
    mid: int
    out: int
    block: str = "bottleneck"
    stride: int = 1
    stride_block: Literal["first", "last"] = "first"
    groups: int = 1
    reduce: int = 0
    dilation: int = 1
    first_dilation: int = 0

    def __post_init__(self) -> None:
        records.check_fields(self)
        check(self.depth >= 1, f"depth is {self.depth}; it must be at least 1")
        check(self.stride >= 1, f"stride is {self.stride}; it must be at least 1")
        check(self.block.isidentifier(), f"block is {self.block!r}; known: {', '.join(KNOWN_KINDS)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSpec:
    """What is read off the trunk and what turns it into logits.

    Pooled features of every stage in `taps`, by every way in `pools`, are concatenated; `norm` standardises each of
    them by batch norm, and `hidden` above 0 puts one hidden layer with ReLU before the classifier.
    """

    taps: tuple[str, ...] = ("last",)
    pools: tuple[Literal["avg", "max"], ...] = ("avg",)
    norm: bool = False
    hidden: int = 0

    def __post_init__(self) -> None:
        records.check_fields(self)
        check(self.taps, "head.taps is empty; name at least one stage, or 'last'")
        check(self.pools, "head.pools is empty; name 'avg', 'max' or both")
        check(self.hidden >= 0, f"head.hidden is {self.hidden}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class NetSpec:
    """A whole network. `shortcut` is how a block adds what it cannot add as it is; `none` makes a plain net.

    A folded network has norm `none`; one with pre-activation keeps the batch norms that no convolution stands right
    before, `leading`.

    Raises SpecError where it is made; NetSpec.from_toml(spec.to_toml()) == spec.
    """

    stages: tuple[StageSpec, ...]
    stem: StemSpec = StemSpec()
    head: HeadSpec = HeadSpec()
    shortcut: Shortcut = "conv1"
    stride_at: Literal["conv1", "conv2"] = "conv2"
    norm: Norm = "batch"
    norm_eps: float = 1e-5
    activation: Activation = "relu"
    attention: Attention = "none"
    attention_ratio: float = 1 / 16
    anti_alias: AntiAlias = "none"
    drop_path: float = 0.0
    dims: int = 2
    in_channels: int = 3
    num_classes: int = 1000
    name: str = ""

    def __post_init__(self) -> None:
        records.check_fields(self)
        check(self.stages, "a network needs at least one stage")
        check(self.dims in (1, 2, 3), f"dims is {self.dims}; it must be 1 (signals), 2 (pictures) or 3 (volumes)")
        check(self.in_channels >= 1, f"in_channels is {self.in_channels}; it must be at least 1")
        check(self.num_classes >= 0, f"num_classes is {self.num_classes}; it must be 0 (pooled features) or more")
        check(0 <= self.drop_path < 1, f"drop_path is {self.drop_path}; it must lie in [0, 1)")
        check(0 < self.attention_ratio <= 1, f"attention_ratio is {self.attention_ratio}; it must lie in (0, 1]")
        check(0 < self.norm_eps < inf, f"norm_eps is {self.norm_eps}; it must be above 0 and finite")
        check(
            self.shortcut not in ("identity", "custom"),
            f"shortcut is {self.shortcut!r}; name a kind that can change a shape, such as conv1",
        )
        check(
            self.stem.pool == "max" or self.anti_alias == "none",
            f"stem.pool is {self.stem.pool!r}; with anti-aliasing it must be 'max', which the filter then replaces",
        )
        check(
            len({stage.block.startswith("preact") for stage in self.stages}) == 1,
            "pre-activation and post-activation stages cannot be mixed: the first ends in a norm of its own",
        )
        check(
            self.norm not in FOLDED or self.preact == (self.norm == "leading"),
            f"norm is {self.norm!r}; without those behind convolutions the norms of a pre-activation network are "
            f"'leading', of any other 'none'",
        )
        names = ["stem", *(f"layer{index + 1}" for index in range(len(self.stages))), "last"]
        for tap in self.head.taps:
            check(tap in names, f"head.taps names {tap!r}; known: {', '.join(names)}")

    @property
    def preact(self) -> bool:
        """Whether the blocks are pre-activation, so that the trunk ends in a norm of its own."""
        return self.stages[0].block.startswith("preact")

    def with_output_stride(self, output_stride: int) -> Self:
        """Strides beyond `output_stride` become dilations (Yu & Koltun 2016), as timm and torchvision do.

        The first block of a dilated stage keeps the dilation of the stage before it.
        """
        reached = self.stem.stride * (1 if self.stem.pool == "none" else 2)
        check(output_stride >= reached, f"output_stride {output_stride} is below the stem's own {reached}")
        dilation, stages = 1, []
        for stage in self.stages:
            before = dilation
            if dilation > 1 or reached * stage.stride > output_stride:
                dilation *= stage.stride
                stage = replace(stage, stride=1, dilation=dilation, first_dilation=before)  # noqa: PLW2901
            else:
                reached *= stage.stride
            stages.append(stage)
        check(
            dilation == 1 or reached == output_stride,
            f"output_stride {output_stride} is none that this network passes; the nearest below it is {reached}",
        )
        return replace(self, stages=tuple(stages))

    def to_toml(self) -> str:
        """The network as a TOML document: a row a stage, and what departs from the defaults."""
        return records.to_toml(records.to_dict(self, defaults=False))

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """The network that a TOML document describes; raises SpecError."""
        return records.from_toml(cls, text)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """The network in a TOML file; raises SpecError naming the file."""
        try:
            return cls.from_toml(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SpecError(f"cannot read {path}: {error.strerror}") from error
        except (SpecError, UnicodeDecodeError) as error:
            raise SpecError(f"{path}: {error}") from error
