"""Which network fits given tensors, and whether a network in memory computes what ours does."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.arch.plan import plan
from isthmus.arch.preprocess import Preprocess
from isthmus.arch.spec import HeadSpec, NetSpec
from isthmus.arch.variants import variant, variants
from isthmus.errors import WeightsError
from isthmus.messages import first_line, listed
from isthmus.nn.block import BLOCKS
from isthmus.nn.network import ResNet
from isthmus.weights.files import unwrap
from isthmus.weights.layout_tables import COUNTER
from isthmus.weights.layouts import LAYOUTS, has, modules, pairs, to_native, weight_keys
from isthmus.weights.published.hf import from_pretrained_cfg

__all__ = ["candidates", "check_same_function", "decided", "timm_preprocess"]

TOLERANCE = 1e-3  # in single precision; a wrong stride place or filter is off by more than a tenth
STEMS = ("conv1", "conv1.0")


def timm_preprocess(module: nn.Module) -> Preprocess | None:
    """The preprocessing that a timm network carries in its `pretrained_cfg`; None where it says nothing we know."""
    try:
        return from_pretrained_cfg(getattr(module, "pretrained_cfg", None) or {})
    except WeightsError:
        return None


def candidates(tensors: Mapping[str, Tensor], layout: str) -> list[str]:
    """Names of the table whose tensors have these names and shapes; the number of classes and channels is free.

    Networks that the layout's library does not have, or has with another epsilon, are left out.
    """
    table = LAYOUTS[layout]
    shapes = {key: tensor.to("meta") for key, tensor in tensors.items()}
    stem = next((shapes[key] for key in weight_keys(layout, *STEMS) if key in shapes), None)
    if stem is None or stem.ndim != 4:
        return []
    head = next((shapes[key] for key in weight_keys(layout, "fc") if key in shapes), None)
    channels = stem.shape[-2 if table.channels_last else 1]
    classes = 0 if head is None else head.shape[-1 if table.channels_last else 0]
    kernel = tuple(stem.shape[:2] if table.channels_last else stem.shape[2:])
    count = sum(shape.ndim > 1 for shape in shapes.values())
    names = []
    for name in variants():
        spec = replace(variant(name), in_channels=channels, num_classes=classes)
        if table.norm_eps not in (None, spec.norm_eps) or kernel != (spec.stem.kernel,) * 2 or not has(layout, spec):
            continue
        wanted = _shapes(spec)
        # Counting is quicker than translating.
        if count == sum(len(shape) > 1 for shape in wanted.values()) and wanted == _given(shapes, layout, spec):
            names.append(name)
    return names


def decided(tensors: Mapping[str, Tensor], layout: str) -> str | None:
    """The one network of the table that tensors can be of; None where names and shapes leave anything open."""
    if not LAYOUTS[layout].decisive:
        return None
    names = candidates(tensors, layout)
    return names[0] if len(names) == 1 else None


def _shapes(spec: NetSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's tensors, read off its plan; counters of batches aside."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer, _ in modules(plan(spec)):
        width = (layer.out_channels,)
        if layer.kind == "norm":
            leaves = ("weight", "bias", *(() if spec.norm == "group" else ("running_mean", "running_var")))
            shapes |= {f"{name}.{leaf}": width for leaf in leaves}
            continue
        if layer.domain == "channels":
            shapes[f"{name}.weight"] = (1, 1, layer.kernel)
        else:
            size = (layer.kernel,) * spec.dims if layer.kind == "conv" else ()
            shapes[f"{name}.weight"] = (*width, layer.in_channels // layer.groups, *size)
        if layer.bias:
            shapes[f"{name}.bias"] = width
    return shapes


def _given(shapes: Mapping[str, Tensor], layout: str, spec: NetSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of tensors as they would be ours in a network; counters of batches aside."""
    found = to_native(shapes, layout, spec).tensors
    return {name: tuple(tensor.shape) for name, tensor in found.items() if not name.endswith(COUNTER)}


def check_same_function(net: ResNet, module: nn.Module, layout: str) -> float:
    """Relative difference of the pooled features of two networks with equal random parameters.

    Raises WeightsError where it is more than rounding: tensors may fit a network that strides, filters or pools
    elsewhere. Parameters are random because those of a fresh network hide much (a block whose last scale is 0).
    """
    theirs = copy.deepcopy(module).cpu().float().eval()
    modules = dict(theirs.named_modules())
    for name in (key.removesuffix(".weight") for key in weight_keys(layout, "fc")):
        if name in modules:
            theirs.set_submodule(name, nn.Identity())
    randomise(theirs)
    tensors = to_native(unwrap(theirs.state_dict(), "the network in memory")[0], layout, net.spec).tensors
    first = next(tensors[f"{name}.weight"] for name in STEMS if f"{name}.weight" in tensors)
    channels, dims = first.shape[1], first.ndim - 2
    spec = replace(net.spec, in_channels=channels, dims=dims, num_classes=0, drop_path=0.0, head=HeadSpec())
    own = {
        block.spec.kind: type(net.get_submodule(block.name))
        for block in net.plan.blocks
        if block.spec.kind not in BLOCKS
    }
    ours = ResNet(plan(spec), blocks=own).eval()
    ours.load_state_dict({name: tensor for name, tensor in tensors.items() if name in ours.state_dict()})
    if wrong := _different_layers(ours, theirs, layout):
        raise WeightsError(
            f"the tensors of the network in memory fit, but it computes something else: {listed(wrong, 3, '; ')}; "
            f"{_mend(net, theirs, layout)}; another output stride is NetSpec.with_output_stride"
        )
    side = 97 if spec.dims == 2 else 33  # odd, as pools round differently there
    pictures = torch.randn(1, channels, *(side,) * spec.dims, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine = ours(pictures)
        try:
            other = _pooled(theirs(pictures))
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, AssertionError) as error:
            raise WeightsError(
                f"the network in memory cannot be tried on a {side} px picture: {first_line(error)}"
            ) from error
    if other.shape != mine.shape:
        raise WeightsError(
            f"the network in memory gives {tuple(other.shape)} before its classifier and ours {tuple(mine.shape)}; "
            f"it must end in a mean over the map and one linear layer"
        )
    difference = float((mine - other).abs().max() / other.abs().max())
    if not difference <= TOLERANCE:
        raise WeightsError(
            f"the tensors of the network in memory fit, but it computes something else (relative difference "
            f"{difference:.1e}); likely another stride place, anti-aliasing, dilation, pool or activation; "
            f"{_mend(net, theirs, layout)}"
        )
    return difference


def _pooled(output: Any) -> Tensor:
    """Features (N, C) of what a network gives: a tensor, an output of transformers, or several maps: the last."""
    for name in ("logits", "pooler_output"):
        output = getattr(output, name, output)
    if isinstance(output, Mapping):
        output = list(output.values())
    last: Tensor = output[-1] if isinstance(output, list | tuple) else output
    return last.flatten(2).mean(2) if last.ndim > 2 else last


def randomise(module: nn.Module) -> None:
    """Random numbers for every parameter and buffer, such that signals neither vanish nor explode."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        low, high = {"weight": (0.5, 1.0), "running_var": (0.5, 1.5)}.get(name.rpartition(".")[2], (-0.1, 0.1))
        if tensor.ndim > 1:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.uniform_(low, high, generator=generator)


def _mend(net: ResNet, theirs: nn.Module, layout: str) -> str:
    others = [name for name in candidates(theirs.state_dict(), layout) if name != net.spec.name]
    return "create the network that it is" + (f": {', '.join(others)} have the same tensors" if others else "")


def _different_layers(ours: ResNet, theirs: nn.Module, layout: str) -> list[str]:
    """Sentences on convolutions and norms whose stride, dilation, groups or epsilon differ."""
    names = {pair.native: pair.foreign for pair in pairs(layout, ours.spec)}
    modules = dict(theirs.named_modules())
    wrong = []
    for name, layer in ours.named_modules():
        spelled = (prefix + foreign for foreign in names.get(name, (name,)) for prefix in ("", LAYOUTS[layout].prefix))
        other = next((modules[spelling] for spelling in spelled if spelling in modules), None)
        for fact in ("stride", "dilation", "groups", "eps"):
            mine, found = getattr(layer, fact, None), getattr(other, fact, None)
            if hasattr(other, "weight") and None not in (mine, found) and mine != found:
                wrong.append(f"{name} has {fact} {found} there and {mine} here")
    return wrong
