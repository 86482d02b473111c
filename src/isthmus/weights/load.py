"""Weights into networks: what is loaded is checked to the last tensor, and a report says what was done."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from isthmus.arch.plan import plan
from isthmus.arch.spec import NetSpec
from isthmus.arch.variants import variant
from isthmus.errors import WeightsError
from isthmus.nn.layers import BlurPool
from isthmus.nn.network import ResNet, make_head
from isthmus.records import to_dict
from isthmus.weights import adapt, layouts
from isthmus.weights.adopt import candidates, check_same_function
from isthmus.weights.source import Origin, Source, listed, open_source

__all__ = ["LoadReport", "create", "load", "load_weights", "read_network"]

HEAD = "fc."
FREE = ("stages", "head", "drop_path", "in_channels", "num_classes", "name")  # what a network may have of its own
SPATIAL = ("stride", "stride_block", "dilation", "first_dilation")
COUNTER = ".num_batches_tracked"

Blocks = Mapping[str, type[nn.Module]]
Head = Literal["keep", "adapt", "new"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What became of every tensor: names are ours, sentences are for people.

    `assumed` is what the source cannot say and the network decided, `dropped` what the source had and nobody wanted.
    """

    source: str
    layout: str
    loaded: tuple[str, ...]
    parameters: int
    adapted: tuple[str, ...] = ()
    initialised: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The report on a few lines."""
        lines = [
            f"{self.source} ({self.layout}): {len(self.loaded)} tensors, {self.parameters:,} parameters loaded",
            *(f"adapted: {sentence}" for sentence in self.adapted),
        ]
        for word, names in (("initialised", self.initialised), ("dropped", self.dropped)):
            if names:
                lines.append(f"{word}: {listed(names, 6)}")
        if self.assumed:
            lines.append(f"assumed, as the source cannot say: {', '.join(self.assumed)}")
        return "\n  ".join([*lines, *self.notes])


def create(
    name_or_spec: str | NetSpec,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    weights: Origin | None = None,
    blocks: Blocks | None = None,
) -> ResNet:
    """A network by name or spec, initialised as He et al. 2015, or with `weights`. None means what the spec says.

    A number that is given adapts the weights to it: a fresh classifier, a summed or repeated first convolution.
    """
    spec = variant(name_or_spec) if isinstance(name_or_spec, str) else name_or_spec
    net = ResNet(plan(_with(spec, num_classes, in_channels)), blocks=blocks)
    if weights is not None:
        load_weights(net, weights, head="keep" if num_classes is None else "adapt", adapt_input=in_channels is not None)
    return net


def load(
    ref_or_path: str | Path,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    head: Head | None = None,
    blocks: Blocks | None = None,
) -> ResNet:
    """The network that a file of ours, a run folder, an ONNX file or a name of the catalog describes, evaluating.

    `num_classes` and `in_channels` adapt it, as in `create`; `head="new"` starts the classifier afresh even where the
    number of classes is the same. `read_network` returns the report too. Raises WeightsError, or RunError for a run
    folder without a model.
    """
    return read_network(ref_or_path, num_classes=num_classes, in_channels=in_channels, head=head, blocks=blocks)[0]


def read_network(
    ref_or_path: str | Path,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    head: Head | None = None,
    blocks: Blocks | None = None,
) -> tuple[ResNet, LoadReport]:
    """As `load`, with the report."""
    source = open_source(ref_or_path, None)
    if source.spec is None:
        names = candidates(source.tensors, source.layout)
        fits = (
            f"its names and shapes fit {listed(names, 6)}"
            if names
            else "no network of the table has its names and shapes"
        )
        raise WeightsError(
            f"{source.name} does not say which network it is for; {fits}. Say it: net = "
            f"create({names[0] if names else 'your_spec'!r}); load_weights(net, {str(ref_or_path)!r})"
        )
    net_plan = plan(_with(source.spec, num_classes, in_channels))
    if blocks:
        net = ResNet(net_plan, blocks=blocks)
    else:
        with torch.device("meta"):  # no memory and no random numbers for what the file brings anyway
            net = ResNet(net_plan)
    head = head or ("keep" if num_classes is None else "adapt")
    tensors, report = _fitted(net, source, head=head, adapt_input=in_channels is not None)
    net.load_state_dict(tensors, assign=True)
    for name, module in list(net.named_modules()):
        if isinstance(module, BlurPool) and module.kernel.is_meta:  # its filter is in no state dict
            net.set_submodule(name, BlurPool(module.channels, module.stride))
    return net.eval(), _described(net, source, report)


def load_weights(
    net: ResNet,
    source: Origin,
    *,
    layout: str | None = None,
    head: Head = "keep",
    adapt_input: bool = False,
    ignore: tuple[str, ...] = (),
) -> LoadReport:
    """Fill a network from a file, a run folder, a name of the catalog or a network in memory (timm's, torchvision's).

    Every tensor must be there and fit, or WeightsError is raised and `net` stays as it was. Exceptions are asked for:
    `head="adapt"` starts a classifier of another size afresh and `"new"` any; `adapt_input` sums or repeats a first
    convolution for other input channels; tensors of the source whose names begin with one in `ignore` are dropped.
    A network in memory must also compute the same, which is tried out. `layout` None is found from the names.
    """
    found = open_source(source, layout)
    tensors, report = _fitted(net, found, head=head, adapt_input=adapt_input, ignore=ignore)
    if found.module is not None:
        difference = check_same_function(net, found.module, found.layout)
        note = f"computes as the network in memory, tried on random parameters (relative difference {difference:.0e})"
        report = replace(report, notes=(*report.notes, note))
    # In place: optimisers, devices and precisions stay as they are.
    with torch.no_grad():
        for name, target in net.state_dict().items():
            target.copy_(tensors[name])
    return _described(net, found, report)


def _with(spec: NetSpec, num_classes: int | None, in_channels: int | None) -> NetSpec:
    classes = spec.num_classes if num_classes is None else num_classes
    return replace(spec, num_classes=classes, in_channels=spec.in_channels if in_channels is None else in_channels)


def _fitted(
    net: ResNet, source: Source, *, head: Head, adapt_input: bool, ignore: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], LoadReport]:
    """A tensor for each of the network's, and the report; raises WeightsError unless everything fits."""
    spec = net.spec
    wanted = net.state_dict()
    notes = [*source.notes, *_compared(source, spec)]
    layout = "native" if source.layout == "onnx" else source.layout
    found, said = layouts.to_native(source.tensors, layout, spec)
    notes += said
    dropped = [name for name in found if ignore and name.startswith(ignore)]
    adapted: list[str] = []

    mine = {name: tensor.shape for name, tensor in wanted.items() if name.startswith(HEAD)}
    theirs = {name: tensor.shape for name, tensor in found.items() if name.startswith(HEAD)}
    fresh: dict[str, Tensor] = {}
    if not mine or head == "new" or (head == "adapt" and mine != theirs):
        dropped += theirs
        fresh = {HEAD + name: tensor for name, tensor in make_head(net.plan).state_dict().items()}
        if mine:
            adapted.append(f"a new classifier for {spec.num_classes} classes{_instead(theirs)}")
    elif mine != theirs:
        raise WeightsError(
            f"{source.name} does not fit: its classifier is {_shapes(theirs)} and the network's {_shapes(mine)}; start "
            f"a new one with load_weights(..., head='adapt'), or give create or load the num_classes you want"
        )
    ready = {name: tensor for name, tensor in found.items() if name not in dropped}

    first = "conv1.weight" if "conv1.weight" in wanted else "conv1.0.weight"
    if first in ready and ready[first].ndim > 1 and ready[first].shape[1] != spec.in_channels:
        channels = ready[first].shape[1]
        if not adapt_input:
            raise WeightsError(
                f"{source.name} does not fit: it takes {channels} input channels and the network {spec.in_channels}; "
                f"adapt it with load_weights(..., adapt_input=True), or give create or load the in_channels you want"
            )
        ready[first] = adapt.adapt_input(ready[first], spec.in_channels)
        adapted.append(
            f"{first} from {channels} to {spec.in_channels} input channels, equal where normalised channels are"
        )

    counters = [name for name in wanted if name.endswith(COUNTER) and name not in ready]
    ready |= {name: torch.zeros((), dtype=torch.long) for name in counters}  # older files lack them
    _check_fit(source, ready | fresh, wanted, spec)
    broken = [name for name, tensor in ready.items() if tensor.is_floating_point() and not _is_finite(tensor)]
    if broken:
        notes.append(f"warning: {len(broken)} tensors hold values that are not finite: {listed(broken)}")
    learnt = {name for name, _ in net.named_parameters()}
    report = LoadReport(
        source=source.name,
        layout=source.layout,
        loaded=tuple(name for name in wanted if name not in fresh and name not in counters),
        parameters=sum(ready[name].numel() for name in learnt if name in ready),
        adapted=tuple(adapted),
        initialised=(*fresh, *counters),
        dropped=tuple(dropped),
        assumed=_assumed(source, spec),
        notes=tuple(notes),
    )
    everything = ready | fresh
    return {name: everything[name].to(tensor.dtype) for name, tensor in wanted.items()}, report


def _is_finite(tensor: Tensor) -> bool:
    low, high = torch.aminmax(tensor)  # five times as quick as torch.isfinite, and not-a-number passes through
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _check_fit(source: Source, ready: dict[str, Tensor], wanted: dict[str, Tensor], spec: NetSpec) -> None:
    """Raise WeightsError unless names, shapes and kinds of numbers are equal."""
    missing = [name for name in wanted if name not in ready]
    unexpected = [name for name in ready if name not in wanted]
    wrong = [
        f"{name} is {tuple(tensor.shape)} and must be {tuple(wanted[name].shape)}"
        for name, tensor in ready.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    integers = [
        f"{name} is {tensor.dtype}"
        for name, tensor in ready.items()
        if name in wanted and tensor.is_floating_point() != wanted[name].is_floating_point()
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": wrong, "of another kind": integers}
    told = [f"{len(names)} tensors {word} ({listed(names, 3)})" for word, names in faults.items() if names]
    if told:
        names = candidates(source.tensors, "native" if source.layout == "onnx" else source.layout)
        mend = f"they fit {listed(names, 6)}" if names else "make the network that they are from"
        raise WeightsError(f"{source.name} does not fit {spec.name or 'the network'}: {'; '.join(told)}; {mend}")


def _compared(source: Source, spec: NetSpec) -> list[str]:
    """Notes on stages that stride or dilate elsewhere; raises WeightsError where the networks differ in kind."""
    if source.spec is None:
        return []
    theirs, mine = to_dict(source.spec), to_dict(spec)
    kind = [name for name in mine if name not in FREE and mine[name] != theirs[name]]
    if kind:
        wrong = "; ".join(f"{name} is {theirs[name]} there and {mine[name]} here" for name in kind)
        raise WeightsError(f"{source.name} is for another network: {wrong}; make its own: load({source.name!r})")
    notes = []
    for number, stages in enumerate(zip(mine["stages"], theirs["stages"], strict=False), 1):
        here, there = ({name: stage[name] for name in SPATIAL} for stage in stages)
        if here != there:
            notes.append(f"layer{number} has {here} and the source {there}")
    return notes


def _assumed(source: Source, spec: NetSpec) -> tuple[str, ...]:
    """What keys and shapes cannot say, as the network has it; a network in memory is tried out instead."""
    if source.spec is not None:
        return ()
    if source.module is not None:
        return () if source.preprocess else ("preprocessing",)
    place = {"conv1": "the first 1×1", "conv2": "the 3×3"}[spec.stride_at]
    said = [f"anti-aliasing {spec.anti_alias}", f"stem pool {spec.stem.pool}", f"activation {spec.activation}"]
    if any(stage.block != "basic" for stage in spec.stages):
        said.insert(0, f"stride on {place}")
    if spec.norm != "none":
        said.append(f"norm epsilon {spec.norm_eps:g}")
    return (*said, "preprocessing")


def _described(net: ResNet, source: Source, report: LoadReport) -> LoadReport:
    """Give the network the preprocessing and the classes of its weights; the report, with a note where it cannot."""
    if source.preprocess is not None:
        record = adapt.adapt_preprocess(source.preprocess, net.spec.in_channels)
        if record is None:
            note = f"no preprocessing is known for {net.spec.in_channels} channels: feed normalised tensors"
            report = replace(report, notes=(*report.notes, note))
        net.preprocess = record or source.preprocess
    kept = any(name.startswith(HEAD) for name in report.loaded)
    net.classes = source.classes if kept else ()
    return report


def _instead(shapes: Mapping[str, torch.Size]) -> str:
    return f" instead of {shapes['fc.weight'][0]}" if "fc.weight" in shapes else ""


def _shapes(shapes: Mapping[str, torch.Size]) -> str:
    return listed(f"{name} {tuple(shape)}" for name, shape in shapes.items()) or "absent"
