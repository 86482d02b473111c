"""Residual blocks in torch, each built from a BlockSpec."""

import copy
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self, TypedDict, Unpack

import torch
from torch import Tensor, nn

from isthmus.arch import block as paper
from isthmus.arch.block import Activation, AntiAlias, Attention, BlockSpec, Norm, Shortcut
from isthmus.errors import ShortcutError, SpecError
from isthmus.nn.layers import ACTIVATION, DropPath, EfficientChannelAttention, SqueezeExcite, add_layer, make_layer

__all__ = ["BLOCKS", "BasicBlock", "BottleneckBlock", "PreActBottleneckBlock", "make_shortcut", "projection"]


class BlockOptions(TypedDict, total=False):
    """What a block takes beside its widths, its stride and its shortcut; see BlockSpec."""

    reduce: int
    stride_at: Literal["conv1", "conv2"]
    groups: int
    dilation: int
    first_dilation: int
    norm: Norm
    norm_eps: float
    activation: Activation
    attention: Attention
    attention_ratio: float
    anti_alias: AntiAlias
    drop_path: float
    dims: int


def projection(
    in_channels: int,
    out_channels: int,
    stride: int = 1,
    *,
    kind: Shortcut = "conv1",
    norm: Norm = "batch",
    dims: int = 2,
) -> nn.Module:
    """The usual shortcut that changes shape, to pass as a block's `downsample`.

    `conv1` is a strided 1×1 convolution and norm (He et al. 2015, option B), `avg` an average pool before it (He et
    al. 2018, ResNet-D), `conv3` SENet-154's 3×3, `pad` the parameter-free option A.
    """
    if kind in ("identity", "none", "custom") and (in_channels != out_channels or stride > 1):
        raise ShortcutError(
            f"a shortcut of kind {kind!r} cannot turn {in_channels} channels into {out_channels} at stride {stride}; "
            f"use kind='conv1'"
        )
    layers = paper.projection(kind, in_channels, out_channels, stride, norm=norm)
    return make_shortcut(layers, dims=dims, norm=norm, eps=1e-5, activation="relu") or nn.Identity()


def make_shortcut(layers: tuple[paper.Layer, ...], **made: Any) -> nn.Module | None:
    """The module of a shortcut's layers; None where it has none. `made` is what `make_layer` takes."""
    holder = nn.Module()
    for layer in layers:
        add_layer(holder, layer.name, make_layer(layer, **made))
    return getattr(holder, "downsample", None)


class ResidualBlock(nn.Module):
    """What the blocks share: construction from a spec, and the check that main path and shortcut can be added.

    `downsample` is a module, probed once on meta tensors, or None for the identity. Raises ShortcutError at
    construction, naming both shapes and the call that mends it.
    """

    kind: ClassVar[paper.BlockKind]
    expansion: ClassVar[int]
    conv1: nn.Module
    bn1: nn.Module
    act1: nn.Module
    conv2: nn.Module
    bn2: nn.Module
    act2: nn.Module
    conv3: nn.Module
    bn3: nn.Module
    act3: nn.Module
    act: nn.Module
    downsample: nn.Module | None
    in_place = False  # whether the shortcut is added into the main path's output: see nn.memory.work_in_place

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        out_channels: int | None = None,
        **options: Unpack[BlockOptions],
    ) -> None:
        super().__init__()
        spec = BlockSpec(
            kind=self.kind,
            in_channels=in_channels,
            mid=mid_channels,
            out_channels=mid_channels * self.expansion if out_channels is None else out_channels,
            stride=stride,
            shortcut="identity" if downsample is None else "custom",
            **options,
        )
        if downsample is not None:
            check_downsample(spec, downsample)
        self.build(spec, downsample)

    @classmethod
    def from_spec(cls, spec: BlockSpec) -> Self:
        """The block that a spec describes, shortcut included; an own subclass has the layers of its base."""
        block = cls.__new__(cls)
        nn.Module.__init__(block)
        block.build(replace(spec, kind=cls.kind), None)
        return block

    def build(self, spec: BlockSpec, downsample: nn.Module | None) -> None:
        """Register the layers of `spec` in the order of timm's state dict."""
        if spec.kind not in BLOCKS:
            raise SpecError(
                f"{type(self).__name__} calls its kind {spec.kind!r}, which has no layers: leave `kind` as its base "
                f"has it, one of {', '.join(BLOCKS)}"
            )
        self.spec = spec
        self.adds = spec.shortcut != "none"
        self.projects = spec.shortcut in ("conv1", "conv3", "avg", "custom")
        made: dict[str, Any] = {
            "dims": spec.dims,
            "norm": spec.norm,
            "eps": spec.norm_eps,
            "activation": spec.activation,
        }
        gate: dict[str, nn.Module] = {}
        for layer in spec.main:
            if layer.name.startswith("se."):
                gate[layer.name.removeprefix("se.")] = make_layer(layer, **made)
            else:
                add_layer(self, layer.name, make_layer(layer, **made))
        self.aa = getattr(self, "aa", nn.Identity())
        self.se = {"none": nn.Identity, "se": SqueezeExcite, "eca": EfficientChannelAttention}[spec.attention](**gate)
        self.drop_path = DropPath(spec.drop_path) if spec.drop_path else nn.Identity()
        if spec.kind != "preact_bottleneck":
            self.act = ACTIVATION[spec.activation]()
        self.downsample = make_shortcut(spec.downsample, **made) or downsample
        for index in (1, 2, 3):
            if spec.norm in paper.FOLDED and not hasattr(self, f"bn{index}"):
                add_layer(self, f"bn{index}", nn.Identity())

    def shortcut(self, x: Tensor) -> Tensor:
        """The input brought to the shape of the main path's output."""
        if self.downsample is not None:
            x = self.downsample(x)
        return x

    def joined(self, out: Tensor, x: Tensor) -> Tensor:
        """The main path's output and the shortcut of `x`, added."""
        shortcut = self.shortcut(x)
        # Autocast may leave them in two precisions, and the sum is in the wider.
        return out.add_(shortcut) if self.in_place and out.dtype == shortcut.dtype else out + shortcut


class BottleneckBlock(ResidualBlock):
    """1×1 reduce, 3×3 on the narrow strip, 1×1 expand, plus the shortcut (He et al. 2015, fig. 5 right).

    (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride), rounded up. The stride sits on the 3×3
    (Goyal et al. 2017); `stride_at="conv1"` is the original. `out_channels` defaults to `mid_channels * expansion`.
    """

    kind = "bottleneck"
    expansion = 4

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.aa(self.act2(self.bn2(self.conv2(out))))
        out = self.drop_path(self.se(self.bn3(self.conv3(out))))
        result: Tensor = self.act(self.joined(out, x) if self.adds else out)
        return result


class BasicBlock(ResidualBlock):
    """Two 3×3 convolutions plus the shortcut (He et al. 2015, fig. 5 left), the plain residual block.

    (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride), rounded up.
    """

    kind = "basic"
    expansion = 1

    def forward(self, x: Tensor) -> Tensor:
        out = self.aa(self.act1(self.bn1(self.conv1(x))))
        out = self.drop_path(self.se(self.bn2(self.conv2(out))))
        result: Tensor = self.act(self.joined(out, x) if self.adds else out)
        return result


class PreActBottleneckBlock(ResidualBlock):
    """The bottleneck with norm and activation before each convolution (He et al. 2016).

    (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride), rounded up. A projection reads the
    activated input, an identity or pooled shortcut the raw one; the stride sits on the 3×3.
    """

    kind = "preact_bottleneck"
    expansion = 4

    def forward(self, x: Tensor) -> Tensor:
        active = self.act1(self.bn1(x))
        out: Tensor = self.act2(self.bn2(self.conv1(active)))
        out = self.act3(self.bn3(self.conv2(out)))
        out = self.drop_path(self.se(self.conv3(out)))
        return self.joined(out, active if self.projects else x) if self.adds else out


BLOCKS: dict[str, type[ResidualBlock]] = {
    block.kind: block for block in (BottleneckBlock, BasicBlock, PreActBottleneckBlock)
}


def check_downsample(spec: BlockSpec, downsample: nn.Module) -> None:
    """Raise ShortcutError unless `downsample` turns a block's input into the shape of its main path's output."""
    probe = copy.deepcopy(downsample).to("meta").eval()
    for side in (8 * spec.stride, 8 * spec.stride + 1):  # an even and an odd map: pools round differently
        size = (side,) * spec.dims
        wanted = (1, spec.out_channels, *(-(-n // spec.stride) for n in size))
        try:
            with torch.no_grad():
                found = tuple(probe(torch.empty(1, spec.in_channels, *size, device="meta")).shape)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ShortcutError(
                f"downsample cannot take the block's input of {spec.in_channels} channels ({reason}); use "
                f"downsample={spec.mend}"
            ) from error
        if found != wanted:
            raise ShortcutError(
                f"main path and shortcut disagree: on an input of shape {(1, spec.in_channels, *size)} the main path "
                f"gives {wanted} and downsample gives {found}; use downsample={spec.mend}"
            )
