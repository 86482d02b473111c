"""One residual block on paper: its widths, its stride, its shortcut, and the layers that follow from them.

`nn` builds blocks from these layers and `cost` counts them; neither works anything out again.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

from isthmus import records
from isthmus.errors import ShortcutError, SpecError

__all__ = [
    "FOLDED",
    "Activation",
    "AntiAlias",
    "Attention",
    "BlockKind",
    "BlockSpec",
    "Layer",
    "Norm",
    "Shortcut",
    "folded",
    "projection",
]

BlockKind = Literal["bottleneck", "basic", "preact_bottleneck"]
Shortcut = Literal["none", "identity", "pad", "conv1", "conv3", "avg", "maxpool", "custom"]
Norm = Literal["batch", "group", "leading", "none"]
Activation = Literal["relu", "silu"]
Attention = Literal["none", "se", "eca"]
AntiAlias = Literal["none", "avg", "blur"]
LayerKind = Literal[
    "conv", "norm", "act", "pad", "zeropad", "maxpool", "avgpool", "blur", "globalpool", "linear", "custom"
]
Domain = Literal["map", "pooled", "channels"]

# Batch norms behind convolutions are in those; `leading` are the others, which begin pre-activation blocks.
FOLDED: tuple[Norm, ...] = ("leading", "none")
NORM_GROUPS = 32  # Wu & He 2018 (group normalization), as in timm's resnet50_gn


class Layer(NamedTuple):
    """One layer on paper. `domain` says what it slides over: the feature map, the pooled map, or the channels."""

    name: str
    kind: LayerKind
    in_channels: int
    out_channels: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    bias: bool = False
    ceil: bool = False
    domain: Domain = "map"

    def out_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial size after this layer, per dimension in pixels; raises SpecError when nothing is left."""
        if self.kind == "globalpool":
            return (1,) * len(size)
        if self.domain != "map" or (self.kernel == 1 and self.stride == 1 and not self.padding):
            return size
        if self.kind == "avgpool" and self.stride == 1:  # padded at the end so that the size stays
            return size
        reach = self.dilation * (self.kernel - 1) + 1 - 2 * self.padding
        rounding = self.stride - 1 if self.ceil else 0
        out = tuple((n - reach + rounding) // self.stride + 1 for n in size)
        least = 2 if self.kind == "blur" else 1  # reflection needs a neighbour
        if min(out) < 1 or min(size) < least:
            raise SpecError(
                f"layer {self.name}: nothing is left of a {'×'.join(map(str, size))} map; enlarge the image"
            )
        return out


def folded(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Layers in a row without the norms right behind convolutions, which have a bias instead."""
    left: list[Layer] = []
    for layer in layers:
        if layer.kind == "norm" and left and left[-1].kind == "conv":
            left[-1] = left[-1]._replace(bias=True)
        else:
            left.append(layer)
    return tuple(left)


def projection(
    kind: Shortcut,
    in_channels: int,
    out_channels: int,
    stride: int,
    *,
    dilation: int = 1,
    first_dilation: int = 1,
    norm: Norm = "batch",
) -> tuple[Layer, ...]:
    """The layers of a shortcut that changes shape, named `downsample.*` as in torchvision and timm.

    `conv1` is He et al. 2015 option B, `pad` option A; `avg` is He et al. 2018 (ResNet-D); `conv3` is SENet-154's.
    """
    if kind not in get_args(Shortcut):
        raise SpecError(f"there is no shortcut {kind!r}; known: {', '.join(get_args(Shortcut))}")
    if kind in ("none", "identity", "custom"):
        return ()
    if kind == "pad":
        return (Layer("downsample", "pad", in_channels, out_channels, stride=stride),)
    if kind == "maxpool":
        return (Layer("downsample", "maxpool", in_channels, in_channels, kernel=1, stride=stride),)
    layers: list[Layer] = []
    kernel, padding, conv_stride, conv_dilation = 1, 0, stride, 1
    if kind == "avg":
        # Without a stride, timm's dilated shortcut still averages 2×2; at stride 1 and no dilation the pool is absent.
        pool = stride if stride > 1 else 2 if dilation > 1 else 1
        layers.append(Layer("downsample.0", "avgpool", in_channels, in_channels, pool, stride, ceil=True))
        conv_stride = 1
    elif kind == "conv3" and (stride > 1 or dilation > 1):
        kernel, padding, conv_dilation = 3, first_dilation, first_dilation
    layers.append(
        Layer(
            f"downsample.{len(layers)}",
            "conv",
            in_channels,
            out_channels,
            kernel,
            conv_stride,
            padding,
            conv_dilation,
        )
    )
    layers.append(Layer(f"downsample.{len(layers)}", "norm", out_channels, out_channels))
    return folded(tuple(layers)) if norm in FOLDED else tuple(layers)


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """One residual block; raises SpecError or ShortcutError where it is made when its shapes cannot agree.

    bottleneck: 1×1 `in`→`reduce`, 3×3 `reduce`→`mid`, 1×1 `mid`→`out` (He et al. 2015, fig. 5 right);
    basic: 3×3 `in`→`mid`, 3×3 `mid`→`out` (fig. 5 left); preact_bottleneck: norm and activation before each
    convolution (He et al. 2016). A `kind` outside these three is a caller's own block, and the shortcut `custom` a
    caller's own module; neither has layers on paper.
    """

    kind: str
    in_channels: int
    mid: int
    out_channels: int
    reduce: int = 0
    stride: int = 1
    stride_at: Literal["conv1", "conv2"] = "conv2"
    groups: int = 1
    dilation: int = 1
    first_dilation: int = 0
    shortcut: Shortcut = "identity"
    norm: Norm = "batch"
    norm_eps: float = 1e-5
    activation: Activation = "relu"
    attention: Attention = "none"
    attention_ratio: float = 1 / 16
    anti_alias: AntiAlias = "none"
    drop_path: float = 0.0
    dims: int = 2

    def __post_init__(self) -> None:
        # 0 means "as usual": no extra reduction before the 3×3, and one dilation for the whole block.
        if not self.reduce:
            object.__setattr__(self, "reduce", self.mid)
        if not self.first_dilation:
            object.__setattr__(self, "first_dilation", self.dilation)
        records.check_fields(self)
        if self.dims not in (1, 2, 3) or not 0 <= self.drop_path < 1 or self.norm_eps <= 0:
            raise SpecError("a block has dims 1, 2 or 3, drop_path in [0, 1) and norm_eps above 0")
        widths = (self.in_channels, self.reduce, self.mid, self.out_channels)
        if min(widths) < 1:
            raise SpecError(f"a block's widths must be at least 1; got in, reduce, mid, out = {widths}")
        if min(self.stride, self.dilation, self.first_dilation, self.groups) < 1:
            raise SpecError("a block's stride, dilation and groups must be at least 1")
        if self.reduce % self.groups or self.mid % self.groups:
            raise SpecError(f"{self.groups} groups do not divide a strip of {self.reduce} → {self.mid} channels")
        if self.kind == "basic" and (self.groups > 1 or self.stride_at != "conv2" or self.reduce != self.mid):
            raise SpecError(
                "a basic block has no groups, no reduce and a fixed stride place; use a bottleneck for those"
            )
        if self.norm == "group" and any(width % NORM_GROUPS for width in widths):
            raise SpecError(f"group norm needs widths divisible by {NORM_GROUPS}; got in, reduce, mid, out = {widths}")
        if self.kind == "preact_bottleneck" and (self.norm == "none" or self.anti_alias != "none"):
            raise SpecError("a pre-activation block needs a norm and has no anti-aliasing")
        if self.kind in ("bottleneck", "basic") and self.norm == "leading":
            raise SpecError(
                f"no norm leads a {self.kind} block; norm 'leading' is for pre-activation, here it is 'none'"
            )
        if self.anti_alias != "none" and self.stride_at == "conv1":
            raise SpecError("anti-aliasing follows the 3×3; with it the stride must be at conv2")
        if self.dims != 2 and self.anti_alias != "none":
            raise SpecError(f"anti-aliasing is defined for pictures (dims=2); this block has dims={self.dims}")
        self.check_shortcut()

    def check_shortcut(self) -> None:
        """Raise ShortcutError when the shortcut cannot be added to the main path."""
        grows, strides = self.in_channels != self.out_channels, self.stride > 1
        wrong = {
            "identity": grows or strides,
            "maxpool": grows,
            "pad": self.out_channels < self.in_channels,
        }
        if wrong.get(self.shortcut, False):
            raise ShortcutError(
                f"main path and shortcut disagree: the main path turns {self.in_channels} channels into "
                f"{self.out_channels} at stride {self.stride}, the {self.shortcut} shortcut cannot; use "
                f"downsample={self.mend}, or shortcut='conv1' in a spec"
            )

    @property
    def mend(self) -> str:
        """The call that makes a shortcut which fits."""
        special = "" if self.dims == 2 else f", dims={self.dims}"
        special += "" if self.norm == "batch" else f", norm={self.norm!r}"
        return f"isthmus.projection({self.in_channels}, {self.out_channels}, stride={self.stride}{special})"

    @cached_property
    def main(self) -> tuple[Layer, ...]:
        """The layers of the main path in order; a custom kind is one layer that cannot be counted on paper."""
        known = {"bottleneck": self.bottleneck, "basic": self.basic, "preact_bottleneck": self.preact_bottleneck}
        if self.kind not in known:
            return (Layer("", "custom", self.in_channels, self.out_channels, 3, self.stride, 1),)
        layers = known[self.kind]()
        return folded(layers) if self.norm in FOLDED else layers

    @cached_property
    def downsample(self) -> tuple[Layer, ...]:
        """The layers of the shortcut; a pre-activation shortcut has no norm of its own, and no bias for want of it."""
        preact = self.kind == "preact_bottleneck"
        layers = projection(
            self.shortcut,
            self.in_channels,
            self.out_channels,
            self.stride,
            dilation=self.dilation,
            first_dilation=self.first_dilation,
            norm="batch" if preact else self.norm,
        )
        return tuple(layer for layer in layers if layer.kind != "norm") if preact else layers

    @property
    def smooths(self) -> bool:
        """Whether anti-aliasing takes over the stride (timm: also where a dilation replaced one)."""
        return self.anti_alias != "none" and (self.stride > 1 or self.first_dilation != self.dilation)

    @property
    def conv_strides(self) -> tuple[int, int]:
        """Strides of a bottleneck's first 1×1 (the original v1) and its 3×3 (v1.5, Goyal et al. 2017)."""
        if self.stride_at == "conv1":
            return self.stride, 1
        return 1, 1 if self.smooths else self.stride

    def conv(self, name: str, widths: tuple[int, int], kernel: int, stride: int = 1, dilation: int = 1) -> Layer:
        """A convolution that keeps its map centred; groups belong to the 3×3 of a bottleneck."""
        groups = self.groups if kernel == 3 else 1
        padding = dilation * (kernel // 2)
        return Layer(name, "conv", *widths, kernel, stride, padding, dilation, groups)

    def after(self, index: int, width: int, *, act: bool = True) -> tuple[Layer, ...]:
        """Norm and activation number `index`."""
        norm = Layer(f"bn{index}", "norm", width, width)
        return (norm, Layer(f"act{index}", "act", width, width)) if act else (norm,)

    def smooth(self, width: int) -> tuple[Layer, ...]:
        """The anti-aliasing filter that carries the stride (Zhang 2019), or nothing."""
        if not self.smooths:
            return ()
        if self.anti_alias == "blur":
            return (Layer("aa", "blur", width, width, 3, self.stride, 1, groups=width),)
        return () if self.stride == 1 else (Layer("aa", "avgpool", width, width, self.stride, self.stride, ceil=True),)

    def gate(self) -> tuple[Layer, ...]:
        """Channel attention on the main path's output: SE (Hu et al. 2017) or ECA (Wang et al. 2019)."""
        width = self.out_channels
        if self.attention == "se":
            squeezed = max(8, int(width * self.attention_ratio + 4) // 8 * 8)
            return (
                Layer("se.fc1", "conv", width, squeezed, bias=True, domain="pooled"),
                Layer("se.fc2", "conv", squeezed, width, bias=True, domain="pooled"),
            )
        if self.attention == "eca":
            kernel = int((math.log2(width) + 1) / 2)
            kernel = max(kernel + 1 - kernel % 2, 3)
            return (Layer("se.conv", "conv", width, width, kernel, padding=kernel // 2, domain="channels"),)
        return ()

    def bottleneck(self) -> tuple[Layer, ...]:
        at_conv1, at_conv2 = self.conv_strides
        return (
            self.conv("conv1", (self.in_channels, self.reduce), 1, at_conv1),
            *self.after(1, self.reduce),
            self.conv("conv2", (self.reduce, self.mid), 3, at_conv2, self.first_dilation),
            *self.after(2, self.mid),
            *self.smooth(self.mid),
            self.conv("conv3", (self.mid, self.out_channels), 1),
            *self.after(3, self.out_channels, act=False),
            *self.gate(),
        )

    def basic(self) -> tuple[Layer, ...]:
        return (
            self.conv(
                "conv1", (self.in_channels, self.mid), 3, 1 if self.smooths else self.stride, self.first_dilation
            ),
            *self.after(1, self.mid),
            *self.smooth(self.mid),
            self.conv("conv2", (self.mid, self.out_channels), 3, 1, self.dilation),
            *self.after(2, self.out_channels, act=False),
            *self.gate(),
        )

    def preact_bottleneck(self) -> tuple[Layer, ...]:
        at_conv1, at_conv2 = self.conv_strides
        return (
            *self.after(1, self.in_channels),
            self.conv("conv1", (self.in_channels, self.reduce), 1, at_conv1),
            *self.after(2, self.reduce),
            self.conv("conv2", (self.reduce, self.mid), 3, at_conv2, self.first_dilation),
            *self.after(3, self.mid),
            self.conv("conv3", (self.mid, self.out_channels), 1),
            *self.gate(),
        )


KNOWN_KINDS: tuple[str, ...] = get_args(BlockKind)
