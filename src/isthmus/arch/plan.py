"""From a NetSpec and an image size to every layer, its widths, stride and shape: the one place that decides them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from isthmus.arch.block import FOLDED, BlockSpec, Layer, Shortcut, folded
from isthmus.arch.spec import NetSpec, StageSpec, check
from isthmus.arch.variants import variant

__all__ = ["Feature", "Plan", "PlannedBlock", "plan"]

Size = tuple[int, ...]


class PlannedBlock(NamedTuple):
    """One block of the network: its name, the number of its stage from 1, and its map sizes in pixels."""

    name: str
    stage: int
    spec: BlockSpec
    in_size: Size
    out_size: Size


class Feature(NamedTuple):
    """A named tap of the network: what `ResNet.features` returns under `name`."""

    name: str
    channels: int
    stride: int
    size: Size


@dataclass(frozen=True)
class Plan:
    """A network laid out for inputs of `image_size` pixels per dimension."""

    spec: NetSpec
    image_size: Size

    @cached_property
    def stem(self) -> tuple[Layer, ...]:
        """The stem's layers up to and including its pool, named as in timm."""
        return stem_layers(self.spec)

    @property
    def stem_pool(self) -> int:
        """The number of the stem's layers before its pool."""
        return next((i for i, layer in enumerate(self.stem) if layer.name.startswith("maxpool")), len(self.stem))

    @cached_property
    def blocks(self) -> tuple[PlannedBlock, ...]:
        """Every block in order; equal blocks share one BlockSpec."""
        return tuple(planned_blocks(self.spec, out_size(self.stem, self.image_size)))

    @cached_property
    def tail(self) -> tuple[Layer, ...]:
        """What follows the last block: the final norm and activation of a pre-activation network."""
        width = self.spec.stages[-1].out
        return (Layer("norm", "norm", width, width), Layer("act", "act", width, width)) if self.spec.preact else ()

    @cached_property
    def features(self) -> tuple[Feature, ...]:
        """The taps: `stem` (before its pool), `layer1` … , and `last` (after the final norm, if there is one)."""
        size, stride = out_size(self.stem[: self.stem_pool], self.image_size), self.spec.stem.stride
        taps = [Feature("stem", self.spec.stem.widths[-1], stride, size)]
        for layer in self.stem[self.stem_pool :]:
            stride *= layer.stride
        for block in self.blocks:
            stride *= block.spec.stride
            if taps[-1].name == f"layer{block.stage}":
                taps.pop()
            taps.append(Feature(f"layer{block.stage}", block.spec.out_channels, stride, block.out_size))
        return (*taps, taps[-1]._replace(name="last"))

    @cached_property
    def head(self) -> tuple[Layer, ...]:
        """Pooling and classifier; with `num_classes` 0 the pooled features are the output."""
        head, width, classes = self.spec.head, self.num_features, self.spec.num_classes
        pool = Layer("pool", "globalpool", width, width)
        if not classes:
            return (pool,)
        layers = [Layer("", "norm", width, width, domain="pooled")] if head.norm else []
        if head.hidden:
            layers.append(Layer("", "linear", width, head.hidden, bias=True, domain="pooled"))
            layers.append(Layer("", "act", head.hidden, head.hidden, domain="pooled"))
        layers.append(Layer("", "linear", head.hidden or width, classes, bias=True, domain="pooled"))
        names = ["fc"] if len(layers) == 1 else [f"fc.{index}" for index in range(len(layers))]
        return (pool, *(layer._replace(name=name) for layer, name in zip(layers, names, strict=True)))

    @cached_property
    def num_features(self) -> int:
        """Width of the pooled features that the classifier sees."""
        widths = {"stem": self.spec.stem.widths[-1], "last": self.spec.stages[-1].out}
        widths |= {f"layer{number}": stage.out for number, stage in enumerate(self.spec.stages, 1)}
        return len(self.spec.head.pools) * sum(widths[tap] for tap in self.spec.head.taps)

    @property
    def output_stride(self) -> int:
        """Input pixels per position of the last map."""
        return self.features[-1].stride


def plan(spec: NetSpec | str, image_size: int | tuple[int, ...] = 224) -> Plan:
    """The plan of a network or a named variant for inputs of `image_size` pixels; raises SpecError."""
    spec = variant(spec) if isinstance(spec, str) else spec
    size = image_size if isinstance(image_size, tuple) else (image_size,) * spec.dims
    check(
        len(size) == spec.dims and all(type(n) is int and n > 0 for n in size),
        f"image size {image_size!r} does not fit dims={spec.dims}: give {spec.dims} whole numbers above 0",
    )
    return Plan(spec, size)


def out_size(layers: tuple[Layer, ...], size: Size) -> Size:
    """Map size after a chain of layers."""
    for layer in layers:
        size = layer.out_size(size)
    return size


def stem_layers(spec: NetSpec) -> tuple[Layer, ...]:
    """The stem of He et al. 2015, or of ResNet-C/D/T/S/RS, without its last norm in a pre-activation network."""
    stem, bias = spec.stem, spec.stem.bias
    layers: list[Layer] = []

    def norm_act(norm: str, act: str, width: int) -> None:
        layers.append(Layer(norm, "norm", width, width))
        layers.append(Layer(act, "act", width, width))

    width = spec.in_channels
    for index, next_width in enumerate(stem.widths):
        deep = len(stem.widths) > 1
        stride = stem.stride if index == 0 else 1
        name = f"conv1.{3 * index}" if deep else "conv1"
        layers.append(Layer(name, "conv", width, next_width, stem.kernel, stride, stem.kernel // 2, bias=bias))
        width = next_width
        if deep and index < len(stem.widths) - 1:
            norm_act(f"conv1.{3 * index + 1}", f"conv1.{3 * index + 2}", width)
    if not spec.preact:
        norm_act("bn1", "act1", width)
    if stem.pool == "conv":
        layers.append(Layer("maxpool.0", "conv", width, width, 3, 2, 1, bias=bias))
        norm_act("maxpool.1", "maxpool.2", width)
    elif stem.pool == "max_ceil":
        layers.append(Layer("maxpool", "maxpool", width, width, 3, 2, 0, ceil=True))
    elif stem.pool == "max_zero":
        layers.append(Layer("maxpool.0", "zeropad", width, width, padding=1))
        layers.append(Layer("maxpool.1", "maxpool", width, width, 3, 2))
    elif stem.pool == "max" and spec.anti_alias == "avg":
        layers.append(Layer("maxpool", "avgpool", width, width, 2, 2))
    elif stem.pool == "max" and spec.anti_alias == "blur":
        layers.append(Layer("maxpool.0", "maxpool", width, width, 3, 1, 1))
        layers.append(Layer("maxpool.1", "blur", width, width, 3, 2, 1, groups=width))
    elif stem.pool == "max":
        layers.append(Layer("maxpool", "maxpool", width, width, 3, 2, 1))
    return folded(tuple(layers)) if spec.norm in FOLDED else tuple(layers)


def planned_blocks(spec: NetSpec, size: Size) -> Iterator[PlannedBlock]:
    """The blocks of every stage; drop path grows linearly with depth (Huang et al. 2016)."""
    total, done, width = sum(stage.depth for stage in spec.stages), 0, spec.stem.widths[-1]
    made: dict[tuple[object, ...], BlockSpec] = {}
    for number, stage in enumerate(spec.stages, 1):
        for index in range(stage.depth):
            stride = stage.stride if index == (0 if stage.stride_block == "first" else stage.depth - 1) else 1
            first_dilation = stage.first_dilation if index == 0 else stage.dilation
            drop_path = spec.drop_path * done / max(total - 1, 1)
            key = (number, width, stride, first_dilation, drop_path)
            if key not in made:
                made[key] = block_spec(spec, stage, width, stride, first_dilation, drop_path)
            block = made[key]
            # Norms, activations and 1×1 convolutions keep the size: the strided layers alone decide it.
            after = out_size(tuple(layer for layer in block.main if layer.stride > 1), size)
            yield PlannedBlock(f"layer{number}.{index}", number, block, size, after)
            size, width, done = after, stage.out, done + 1


def block_spec(
    spec: NetSpec, stage: StageSpec, width: int, stride: int, first_dilation: int, drop_path: float
) -> BlockSpec:
    """One block of a stage, with the shortcut that its change of shape asks for."""
    shortcut: Shortcut = spec.shortcut
    if shortcut != "none" and width == stage.out and stride == 1:
        shortcut = "identity"
    elif shortcut == "maxpool" and width != stage.out:
        shortcut = "conv1"  # a pool cannot change the width (Keras' V2: pool at the stride, convolution at the width)
    return BlockSpec(
        kind=stage.block,
        in_channels=width,
        reduce=stage.reduce,
        mid=stage.mid,
        out_channels=stage.out,
        stride=stride,
        stride_at=spec.stride_at if stage.block != "basic" else "conv2",
        groups=stage.groups,
        dilation=stage.dilation,
        first_dilation=first_dilation,
        shortcut=shortcut,
        norm=spec.norm,
        norm_eps=spec.norm_eps,
        activation=spec.activation,
        attention=spec.attention,
        attention_ratio=spec.attention_ratio,
        anti_alias=spec.anti_alias,
        drop_path=drop_path,
        dims=spec.dims,
    )
