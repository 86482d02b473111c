"""Names of tensors in other libraries, as reversible rules. Ours are those of timm's resnet.py and of torchvision."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from isthmus.arch.plan import plan
from isthmus.arch.spec import NetSpec
from isthmus.errors import WeightsError

__all__ = ["LAYOUTS", "Layout", "Rule", "detect", "from_native", "to_native"]


class Rule(NamedTuple):
    """Our name of a module and theirs; `{stage}` counts from 0, `{number}` from 1.

    `pointwise`: their weight is a 1×1 convolution where ours is linear.
    """

    native: str
    foreign: str
    pointwise: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a library names a network; no rules: as we do. `signs` are patterns of keys that tell it."""

    name: str
    signs: tuple[str, ...]
    preact: bool
    rules: tuple[Rule, ...] = ()


NATIVE = Layout(name="native", signs=(r"conv1\.(0\.)?weight", r"layer1\.0\.conv1\.weight"), preact=False)
TIMM_RESNETV2 = Layout(
    name="timm_resnetv2",
    signs=(r"stem\.conv1?\.weight", r"stages\.0\.blocks\.0\.conv1\.weight"),
    preact=True,
    rules=(
        Rule("conv1", "stem.conv"),
        Rule("conv1.0", "stem.conv1"),
        Rule("conv1.1", "stem.norm1"),
        Rule("conv1.3", "stem.conv2"),
        Rule("conv1.4", "stem.norm2"),
        Rule("conv1.6", "stem.conv3"),
        Rule("layer{number}.{block}.bn1", "stages.{stage}.blocks.{block}.norm1"),
        Rule("layer{number}.{block}.conv1", "stages.{stage}.blocks.{block}.conv1"),
        Rule("layer{number}.{block}.bn2", "stages.{stage}.blocks.{block}.norm2"),
        Rule("layer{number}.{block}.conv2", "stages.{stage}.blocks.{block}.conv2"),
        Rule("layer{number}.{block}.bn3", "stages.{stage}.blocks.{block}.norm3"),
        Rule("layer{number}.{block}.conv3", "stages.{stage}.blocks.{block}.conv3"),
        Rule("layer{number}.{block}.downsample.0", "stages.{stage}.blocks.{block}.downsample.conv"),
        Rule("layer{number}.{block}.downsample.1", "stages.{stage}.blocks.{block}.downsample.conv"),
        Rule("norm", "norm"),
        Rule("fc", "head.fc", pointwise=True),
    ),
)
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (NATIVE, TIMM_RESNETV2)}


def detect(keys: Iterable[str]) -> str:
    """The layout that a state dict's keys are in; raises WeightsError when none is known to have them."""
    names = list(keys)
    for layout in LAYOUTS.values():
        if all(any(re.fullmatch(sign, name) for name in names) for sign in layout.signs):
            return layout.name
    raise WeightsError(
        f"the names of these {len(names)} tensors are in no layout known here ({', '.join(LAYOUTS)}): "
        f"{', '.join(names[:4])}, …; rename them, or load the network they come from and pass it as it is"
    )


def to_native(tensors: Mapping[str, Tensor], layout: str, spec: NetSpec) -> dict[str, Tensor]:
    """Tensors of a foreign layout under our names, bit for bit; names without a rule stay. Raises WeightsError."""
    renamed: dict[str, Tensor] = {}
    back = {rule.foreign: rule for rule in pairs(layout, spec)}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        rule = back.get(module)
        name = f"{rule.native}.{leaf}" if rule else key
        renamed[name] = tensor.flatten(1) if rule and rule.pointwise and leaf == "weight" else tensor
    return renamed


def from_native(tensors: Mapping[str, Tensor], layout: str, spec: NetSpec) -> dict[str, Tensor]:
    """Our tensors under a foreign layout's names, bit for bit: the rules of `to_native` backwards."""
    renamed: dict[str, Tensor] = {}
    rules = {rule.native: rule for rule in pairs(layout, spec)}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        rule = rules.get(module)
        name = f"{rule.foreign}.{leaf}" if rule else key
        pointwise = rule and rule.pointwise and leaf == "weight"
        renamed[name] = tensor[(..., *(None,) * spec.dims)] if pointwise else tensor
    return renamed


def pairs(layout: str, spec: NetSpec) -> tuple[Rule, ...]:
    """The rules of a layout written out for every convolution, norm and classifier of a network."""
    if layout not in LAYOUTS:
        raise WeightsError(f"there is no layout {layout!r}; known: {', '.join(LAYOUTS)}")
    rules = LAYOUTS[layout].rules
    if not rules:
        return ()
    if spec.preact != LAYOUTS[layout].preact:
        raise WeightsError(
            f"layout {layout} is for {'pre' if LAYOUTS[layout].preact else 'post'}-activation networks, and "
            f"{spec.name or 'this one'} is not; use layout='native', or another network"
        )
    net = plan(spec)
    layers = [*net.stem, *net.tail, *net.head]
    names = [layer.name for layer in layers if layer.kind in ("conv", "norm", "linear")]
    for block in net.blocks:
        parts = (*block.spec.main, *block.spec.downsample)
        names += [f"{block.name}.{layer.name}" for layer in parts if layer.kind in ("conv", "norm")]
    return tuple(_written_out(rules, name, layout) for name in names)


def _written_out(rules: tuple[Rule, ...], name: str, layout: str) -> Rule:
    place = re.match(r"layer(?P<number>\d+)\.(?P<block>\d+)\.", name)
    number, block = (int(place["number"]), int(place["block"])) if place else (0, 0)
    where = {"number": number, "stage": number - 1, "block": block}
    for rule in rules:
        if rule.native.format(**where) == name:
            return Rule(name, rule.foreign.format(**where), rule.pointwise)
    raise WeightsError(f"layout {layout} has no name for {name}; use layout='native'")
