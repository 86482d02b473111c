"""Weights into networks: what is loaded is checked to the last tensor, and a report says what was done."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.arch.plan import plan
from isthmus.arch.spec import NetSpec
from isthmus.arch.variants import variant
from isthmus.errors import WeightsError
from isthmus.messages import listed
from isthmus.nn.layers import BlurPool
from isthmus.nn.network import ResNet
from isthmus.weights import adapt, layouts
from isthmus.weights.adopt import candidates, check_same_function, decided
from isthmus.weights.fit import Fitted, Head, LoadReport, fit_tensors, layout_of, preprocess_of
from isthmus.weights.source import Origin, Source, open_source

__all__ = ["create", "load", "load_weights", "read_network"]

Blocks = Mapping[str, type[nn.Module]]
Classes = Sequence[str | int]


def create(
    name_or_spec: str | NetSpec,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    dims: int | None = None,
    weights: Origin | None = None,
    blocks: Blocks | None = None,
) -> ResNet:
    """A network by name, TOML file or spec, initialised as He et al. 2015, or with `weights`.

    None means what the spec says.

    A number that is given adapts the weights to it: a fresh classifier, a summed or repeated first convolution, kernels
    repeated over the depth of volumes or summed over the height of pictures (`dims` 1: signals, 3: volumes).
    """
    spec = _network(name_or_spec)
    wanted = _with(spec, num_classes=num_classes, in_channels=in_channels, dims=dims)
    if weights is None:
        return ResNet(plan(wanted), blocks=blocks)
    head: Head = "keep" if num_classes is None else "adapt"
    source = open_source(weights, None)
    if isinstance(weights, nn.Module):  # its parameters stay its own
        source = replace(source, tensors={name: tensor.clone() for name, tensor in source.tensors.items()})
    return _made(wanted, source, blocks, head=head, classes=None, channels=in_channels, dims=dims)[0]


def load(
    ref_or_path: str | Path,
    *,
    arch: str | NetSpec | None = None,
    num_classes: int | None = None,
    classes: Classes | None = None,
    in_channels: int | None = None,
    dims: int | None = None,
    head: Head | None = None,
    blocks: Blocks | None = None,
) -> ResNet:
    """The network that weights describe, evaluating: a file of ours, a run folder, an ONNX file, a published name.

    A bare state dict leaves open which network it is for: `arch` says it, by name or spec. `num_classes`, `in_channels`
    and `dims` adapt it, as in `create`; `head="new"` starts the classifier afresh even where the number of classes is
    the same, and `classes` keeps its rows for the classes named or numbered, in that order. `read_network` returns the
    report too. Raises WeightsError, or RunError for a run folder without a model.
    """
    return read_network(
        ref_or_path,
        arch=arch,
        num_classes=num_classes,
        classes=classes,
        in_channels=in_channels,
        dims=dims,
        head=head,
        blocks=blocks,
    )[0]


def read_network(
    ref_or_path: str | Path | Source,
    *,
    arch: str | NetSpec | None = None,
    num_classes: int | None = None,
    classes: Classes | None = None,
    in_channels: int | None = None,
    dims: int | None = None,
    head: Head | None = None,
    blocks: Blocks | None = None,
) -> tuple[ResNet, LoadReport]:
    """As `load`, also from what is open already, with the report."""
    if classes is not None and num_classes is not None:
        raise WeightsError("classes says how many classes stay, and num_classes starts another classifier; give one")
    source = ref_or_path if isinstance(ref_or_path, Source) else open_source(ref_or_path, None)
    if arch is not None:
        spec = _counted(_network(arch), source)
    elif source.spec is not None:
        spec = source.spec
    else:
        source, spec = _decided(source)
    count = num_classes if classes is None else len(classes)
    wanted = _with(spec, num_classes=count, in_channels=in_channels, dims=dims)
    head = head or ("keep" if num_classes is None else "adapt")
    net, report = _made(wanted, source, blocks, head=head, classes=classes, channels=in_channels, dims=dims)
    return net.eval(), report


def load_weights(
    net: ResNet,
    source: Origin,
    *,
    layout: str | None = None,
    head: Head = "keep",
    classes: Classes | None = None,
    adapt_input: bool = False,
    adapt_dims: adapt.Inflate | None = None,
    ignore: Sequence[str] = (),
) -> LoadReport:
    """Fill a network from a file, a folder, a published name, a state dict, or a network in memory (timm's, say).

    Every tensor must be there and fit, or WeightsError is raised and `net` stays as it was. Exceptions are asked for:
    `head="adapt"` starts a classifier of another size afresh and `"new"` any; `classes` keeps the rows of those named
    or numbered; `adapt_input` sums or repeats a first convolution for other input channels; `adapt_dims` sums kernels
    over dimensions that go (3D to 2D) and lays them into those that come (2D to 3D), as the "mean" or at the "centre";
    tensors of the source whose names begin with one in `ignore` are dropped.

    A network in memory must also compute the same, which is tried out. `layout` None is found from the names.
    """
    if not isinstance(net, ResNet):
        raise WeightsError(f"a {type(net).__module__}.{type(net).__name__} is no network of ours; make one by create()")
    found = open_source(source, layout)
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    fitted = fit_tensors(
        net, found, head=head, classes=classes, adapt_input=adapt_input, adapt_dims=adapt_dims, ignore=ignore
    )
    fitted = _tried(net, found, fitted)
    # In place: optimisers, devices and precisions stay as they are.
    with torch.no_grad():
        for name, target in net.state_dict().items():
            target.copy_(fitted.tensors[name])
    return _described(net, found, fitted)


def _network(name_or_spec: str | NetSpec) -> NetSpec:
    """A network by name, from a TOML file, or as it is."""
    if isinstance(name_or_spec, NetSpec):
        return name_or_spec
    return NetSpec.from_file(Path(name_or_spec)) if name_or_spec.endswith(".toml") else variant(name_or_spec)


def _with(spec: NetSpec, **numbers: int | None) -> NetSpec:
    """A spec with the numbers that are given."""
    changes: dict[str, Any] = {name: number for name, number in numbers.items() if number is not None}
    return replace(spec, **changes)


def _counted(spec: NetSpec, source: Source) -> NetSpec:
    """A spec with the numbers of classes and input channels that the tensors of a source have."""
    shapes = {name: tensor.to("meta") for name, tensor in source.tensors.items()}
    ours = layouts.to_native(shapes, layout_of(source), spec).tensors
    first = next((ours[name] for name in ("conv1.weight", "conv1.0.weight") if name in ours), None)
    last = ours.get(f"{plan(replace(spec, num_classes=1)).head[-1].name}.weight")
    channels = spec.in_channels if first is None or first.ndim < 3 else first.shape[1]
    return replace(spec, in_channels=channels, num_classes=0 if last is None else len(last))


def _decided(source: Source) -> tuple[Source, NetSpec]:
    """The one network that a bare state dict can be for, where its layout leaves nothing else open.

    Raises WeightsError listing those of the table that it fits.
    """
    layout = layout_of(source)
    if (name := decided(source.tensors, layout)) is not None:
        spec = _counted(variant(name), source)
        note = f"{name}, as layout {layout} has one network of these names and shapes"
        return replace(source, spec=spec, notes=(*source.notes, note)), spec
    names = candidates(source.tensors, layout)
    fits = (
        f"its names and shapes fit {listed(names, 6)}" if names else "no network of the table has its names and shapes"
    )
    arch = names[0] if names else "NAME"
    raise WeightsError(
        f"{source.name} does not say which network it is for; {fits}. Say it with --arch {arch}, in Python "
        f"arch={arch!r}; `isthmus weights convert … --to native --arch {arch}` writes it down for good"
    )


def _made(
    spec: NetSpec,
    source: Source,
    blocks: Blocks | None,
    *,
    head: Head,
    classes: Classes | None,
    channels: int | None,
    dims: int | None,
) -> tuple[ResNet, LoadReport]:
    """A new network that holds a source's tensors; a number that is given asks for adapting to it."""
    net_plan = plan(spec)
    if blocks:
        net = ResNet(net_plan, blocks=blocks)
    else:
        with torch.device("meta"):  # no memory and no random numbers for what the source brings anyway
            net = ResNet(net_plan)
    fitted = fit_tensors(
        net,
        source,
        head=head,
        classes=classes,
        adapt_input=channels is not None,
        adapt_dims=None if dims is None else "mean",
    )
    fitted = _tried(net, source, fitted)
    net.load_state_dict(_own(fitted.tensors, net.state_dict()), assign=True)
    for name, module in list(net.named_modules()):
        if isinstance(module, BlurPool) and module.kernel.is_meta:  # its filter is in no state dict
            net.set_submodule(name, BlurPool(module.channels, module.stride))
    return net, _described(net, source, fitted)


def _tried(net: ResNet, source: Source, fitted: Fitted) -> Fitted:
    """Try out that a network in memory computes what `net` will; raises WeightsError if not."""
    if source.module is None:
        return fitted
    difference = check_same_function(net, source.module, source.layout)
    note = f"computes as the network in memory, tried on random parameters (relative difference {difference:.0e})"
    return _noted(fitted, note)


def _own(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor in the precision that a network wants and, as training must have it, in memory of its own."""
    owned: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, target in wanted.items():
        tensor = tensors[name].to(torch.get_default_device(), target.dtype).contiguous()
        owned[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in taken else tensor
        taken.add(owned[name].untyped_storage().data_ptr())
    return owned


def _described(net: ResNet, source: Source, fitted: Fitted) -> LoadReport:
    """Give the network the preprocessing and the classes of its weights; the report, with notes where it cannot."""
    spec = net.spec
    if (known := preprocess_of(source, spec)) is not None:
        if source.preprocess is None:
            fitted = _noted(
                fitted, f"preprocessing as layout {source.layout} has it, for the file does not say: {known}"
            )
        record = adapt.adapt_preprocess(known, spec.in_channels)
        if record is None:
            note = f"no preprocessing is known for {spec.in_channels} channels: feed normalised tensors"
            fitted = _noted(fitted, note)
        elif spec.dims != (source.spec.dims if source.spec else 2):
            note = f"its preprocessing is of pictures: scale and normalise the values of {spec.dims}D inputs as it does"
            fitted = _noted(fitted, note)
        net.preprocess = record or known
    net.classes = fitted.classes
    return fitted.report


def _noted(fitted: Fitted, note: str) -> Fitted:
    return fitted._replace(report=replace(fitted.report, notes=(*fitted.report.notes, note)))
