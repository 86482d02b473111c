"""A source's tensors made to fit a network: each as it is, computed or initialised, and a report that says which."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mode
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from isthmus.arch.preprocess import Preprocess
from isthmus.arch.spec import NetSpec
from isthmus.errors import WeightsError
from isthmus.messages import listed
from isthmus.nn.network import ResNet, make_head
from isthmus.records import to_dict
from isthmus.weights import adapt, layouts
from isthmus.weights.adopt import candidates
from isthmus.weights.layout_tables import COUNTER
from isthmus.weights.source import Source, precision

__all__ = ["Fitted", "Head", "LoadReport", "fit_tensors", "layout_of", "preprocess_of"]

HEAD = "fc."
FREE = ("stages", "head", "drop_path", "in_channels", "num_classes", "dims", "name")  # what a network may have its own
SPATIAL = ("stride", "stride_block", "dilation", "first_dilation")
AXES = ("depth", "height", "width")

Head = Literal["keep", "adapt", "new"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What became of every tensor of the network, under our names: loaded as it is, computed or initialised.

    `computed` and `initialised` say how, by name. `parameters` counts those that came from the source. `dropped` is
    what the source had and nobody wanted, `assumed` what it cannot say and the network decided.
    """

    source: str
    layout: str
    loaded: tuple[str, ...]
    computed: Mapping[str, str] = field(default_factory=dict)
    initialised: Mapping[str, str] = field(default_factory=dict)
    parameters: int
    dropped: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The report on a few lines: tensors of one fate share one."""
        count = len(self.loaded) + len(self.computed) + len(self.initialised)
        kept = f"{len(self.loaded)} of {count} tensors as they are, {self.parameters:,} parameters loaded"
        lines = [f"{self.source} ({self.layout}): {kept}"]
        for word, fates in (("computed", self.computed), ("initialised", self.initialised)):
            every = {how: [name for name in fates if fates[name] == how] for how in fates.values()}
            lines += [f"{word}: {how} ({listed(names)})" for how, names in every.items()]
        if self.dropped:
            lines.append(f"dropped: {listed(self.dropped, 6)}")
        if self.assumed:
            lines.append(f"assumed, as the source cannot say: {', '.join(self.assumed)}")
        return "\n  ".join([*lines, *self.notes])


class Fitted(NamedTuple):
    """A tensor for each of a network's, in the source's precision; the names of the classes; and the report."""

    tensors: dict[str, Tensor]
    classes: tuple[str, ...]
    report: LoadReport


def fit_tensors(
    net: ResNet,
    source: Source,
    *,
    head: Head,
    classes: Sequence[str | int] | None,
    adapt_input: bool,
    adapt_dims: adapt.Inflate | None,
    ignore: tuple[str, ...] = (),
) -> Fitted:
    """The tensors of `source` as `net` wants them; raises WeightsError unless everything fits or is asked for."""
    _check_option("head", head, get_args(Head))
    _check_option("adapt_dims", adapt_dims, (None, *get_args(adapt.Inflate)))
    spec, wanted = net.spec, net.state_dict()
    notes = [*source.notes, *_compared(source, spec)]
    ready, said = layouts.to_native(source.tensors, layout_of(source), spec)
    notes += said
    dropped = [name for name in ready if ignore and name.startswith(ignore)]
    if idle := [start for start in ignore if not any(name.startswith(start) for name in dropped)]:
        raise WeightsError(
            f"ignore={idle[0]!r} is the beginning of no tensor's name in {source.name}; names begin with "
            f"{listed(dict.fromkeys(name.partition('.')[0] + '.' for name in ready), 8)}"
        )
    ready = {name: tensor for name, tensor in ready.items() if name not in dropped}
    computed: dict[str, str] = {}
    initialised: dict[str, str] = {}

    def compute(tensors: Mapping[str, Tensor], how: str) -> None:
        for name, tensor in tensors.items():
            computed[name] = f"{computed[name]}; {how}" if name in computed else how
            ready[name] = tensor

    def initialise(tensors: Mapping[str, Tensor], why: str) -> None:
        ready.update(tensors)
        initialised.update(dict.fromkeys(tensors, why))

    compute(*_in_dims(source, ready, wanted, spec.dims, adapt_dims))
    compute(*_in_channels(source, ready, wanted, spec.in_channels, asked=adapt_input))
    counters = [name for name in wanted if name.endswith(COUNTER) and name not in ready]
    older = [name for name in counters if f"{name.removesuffix(COUNTER)}running_mean" in ready]
    initialise({name: torch.zeros((), dtype=torch.long) for name in older}, "the source counts no batches")
    _check_fit(source, _trunk(ready), _trunk(wanted), spec)  # first: of another network the classifier differs too

    kept = source.classes
    if classes is not None:
        rows = _chosen(net, source, ready, head, classes)
        named = [source.classes[row] if source.classes else str(row) for row in rows]
        last = net.plan.head[-1].name
        how = f"rows of {len(rows)} of {len(ready[f'{last}.weight'])} classes kept: {listed(named, 8)}"
        compute({name: ready[name][list(rows)] for name in (f"{last}.weight", f"{last}.bias") if name in ready}, how)
        kept = tuple(named) if source.classes else ()
    fresh = _fresh_head(net, source, ready, head)
    if fresh is not None:
        old = [name for name in ready if name.startswith(HEAD)]
        instead = f" instead of {len(ready['fc.weight'])}" if "fc.weight" in old else ""
        ready, kept = _trunk(ready), ()
        dropped += old
        initialise(fresh, f"a new classifier for {spec.num_classes} classes{instead}")
    _check_fit(source, ready, wanted, spec)

    came = {name: tensor for name, tensor in ready.items() if name not in initialised}
    learnt = {name for name, _ in net.named_parameters()}
    report = LoadReport(
        source=source.name,
        layout=source.layout,
        loaded=tuple(name for name in wanted if name in came and name not in computed),
        computed={name: computed[name] for name in wanted if name in computed},
        initialised={name: initialised[name] for name in wanted if name in initialised},
        parameters=sum(came[name].numel() for name in learnt if name in came),
        dropped=tuple(dropped),
        assumed=_assumed(source, spec),
        notes=(*notes, *_findings(came, wanted)),
    )
    return Fitted({name: ready[name] for name in wanted}, kept, report)


def layout_of(source: Source) -> str:
    """The layout of a source's tensors: those of a graph have our names already."""
    return "native" if source.layout == "onnx" else source.layout


def preprocess_of(source: Source, spec: NetSpec) -> Preprocess | None:
    """The preprocessing of a source's weights: its own, or that of all weights of its layout; None if unknown."""
    return source.preprocess or layouts.preprocess_of(layout_of(source), spec)


def _check_option(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise WeightsError(f"{name} is {value!r}; known: {', '.join(map(repr, known))}")


def _chosen(
    net: ResNet, source: Source, tensors: Mapping[str, Tensor], head: Head, classes: Sequence[str | int]
) -> tuple[int, ...]:
    """The rows of the source's classifier that a network keeps; raises WeightsError."""
    if head != "keep":
        raise WeightsError(f"classes keeps rows of the classifier and head={head!r} starts another; give one of them")
    if not classes or isinstance(classes, str):
        raise WeightsError(f"classes is {classes!r}; give the names or indices to keep, such as classes=('cat', 'dog')")
    weight = f"{net.plan.head[-1].name}.weight"
    if weight not in tensors:
        raise WeightsError(f"{source.name} has no classifier ({weight}) whose rows could be kept")
    rows = adapt.class_rows(classes, source.classes, len(tensors[weight]), source.name)
    if len(rows) != net.spec.num_classes:
        raise WeightsError(
            f"{len(rows)} classes are chosen and the network has {net.spec.num_classes} outputs; make it with "
            f"num_classes={len(rows)}"
        )
    return rows


def _fresh_head(net: ResNet, source: Source, tensors: Mapping[str, Tensor], head: Head) -> dict[str, Tensor] | None:
    """A new classifier, None where the source's own fits and is kept; raises WeightsError where that cannot be."""
    mine = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items() if name.startswith(HEAD)}
    theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith(HEAD)}
    if mine == theirs and head != "new":
        return None
    if mine and head == "keep":
        raise WeightsError(
            f"{source.name} does not fit: its classifier is {_shapes(theirs)} and the network's {_shapes(mine)}; start "
            f"a new one with load_weights(..., head='adapt'), or give create or load the num_classes you want"
        )
    return {HEAD + name: tensor for name, tensor in make_head(net.plan).state_dict().items()}


def _trunk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(HEAD)}


def _in_dims(
    source: Source, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], dims: int, how: adapt.Inflate | None
) -> tuple[dict[str, Tensor], str]:
    """Convolutions for a network of other dimensions, and what was done; raises WeightsError if not asked for."""
    ranks = [tensor.ndim for tensor in tensors.values() if tensor.ndim > 2]
    theirs = mode(ranks) - 2 if ranks else dims
    if theirs == dims:
        return {}, ""
    if how is None:
        raise WeightsError(
            f"{source.name} does not fit: it is for {theirs}D inputs and the network for {dims}D; adapt it with "
            f"load_weights(..., adapt_dims='mean'), or give create or load the dims you want"
        )
    adapted = {
        name: adapt.adapt_dims(tensor, wanted[name].shape[2:], how)
        for name, tensor in tensors.items()
        if name in wanted and tensor.ndim == theirs + 2 and wanted[name].ndim == dims + 2 and tensor.is_floating_point()
    }
    axes = " and ".join(AXES[3 - max(theirs, dims) : 3 - min(theirs, dims)])
    ways = {"mean": f"repeated over {axes} and divided by its size", "centre": f"in the middle of {axes}, zeros around"}
    return adapted, f"{theirs}D to {dims}D, {ways[how] if dims > theirs else f'summed over {axes}'}"


def _in_channels(
    source: Source, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], channels: int, *, asked: bool
) -> tuple[dict[str, Tensor], str]:
    """The first convolution for other input channels, and what was done; raises WeightsError if not asked for."""
    first = "conv1.weight" if "conv1.weight" in wanted else "conv1.0.weight"
    weight = tensors.get(first)
    if weight is None or weight.ndim < 3 or not weight.is_floating_point() or weight.shape[1] == channels:
        return {}, ""
    theirs = weight.shape[1]
    if not asked:
        raise WeightsError(
            f"{source.name} does not fit: it takes {theirs} input channels and the network {channels}; adapt it with "
            f"load_weights(..., adapt_input=True), or give create or load the in_channels you want"
        )
    way = "their sum" if channels == 1 else "their mean, scaled" if channels < theirs else "repeated and scaled"
    how = f"{theirs} to {channels} input channels, {way}: the same response to channels equal after normalisation"
    return {first: adapt.adapt_input(weight, channels)}, how


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
        known = source.spec.name if source.spec else ""
        names = [known] if known else candidates(source.tensors, layout_of(source))
        mend = f"they fit {listed(names, 6)}" if names else "make the network that they are from"
        heads = tuple(dict.fromkeys(name.partition(".")[0] + "." for name in unexpected))
        if not (missing or wrong or any(name.startswith(heads) for name in wanted)):  # a decoder's, say
            mend += f", or leave them out: load_weights(..., ignore={heads})"
        raise WeightsError(f"{source.name} does not fit {spec.name or 'the network'}: {'; '.join(told)}; {mend}")


def _findings(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Sentences on values that are not finite and on changes of precision."""
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    casts: dict[str, int] = {}
    for name, tensor in floating.items():
        if tensor.dtype != wanted[name].dtype:
            cast = f"from {precision(tensor.dtype)} to {precision(wanted[name].dtype)}"
            casts[cast] = casts.get(cast, 0) + 1
    notes = [f"{count} tensors cast {cast}" for cast, count in casts.items()]
    broken = [name for name, tensor in floating.items() if not _is_finite(tensor)]
    if broken:
        notes.append(f"warning: {len(broken)} tensors hold values that are not finite: {listed(broken)}")
    return notes


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel() or tensor.is_meta:
        return True
    low, high = torch.aminmax(tensor)  # five times as quick as torch.isfinite, and not-a-number passes through
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _compared(source: Source, spec: NetSpec) -> list[str]:
    """Notes on stages that stride or dilate elsewhere, which tensors allow and users mean (another output stride).

    Raises WeightsError where the networks differ in kind.
    """
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
    """What neither names and shapes nor the layout say, as the network has it; one in memory is tried out instead."""
    if source.spec is not None:
        return ()
    unknown = () if preprocess_of(source, spec) else ("preprocessing",)
    if source.module is not None:
        return unknown
    place = {"conv1": "the first 1×1", "conv2": "the 3×3"}[spec.stride_at]
    said = {
        "stride place": f"stride on {place}",
        "anti-aliasing": f"anti-aliasing {spec.anti_alias}",
        "stem": f"stem pool {spec.stem.pool}",
        "activation": f"activation {spec.activation}",
    }
    if all(stage.block == "basic" for stage in spec.stages):
        del said["stride place"]
    table = layouts.LAYOUTS[layout_of(source)]
    left = [sentence for fact, sentence in said.items() if len(table.can.get(fact, ())) != 1]
    if spec.norm != "none" and table.norm_eps is None:
        left.append(f"norm epsilon {spec.norm_eps:g}")
    return (*left, *unknown)


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return listed(f"{name} {shape}" for name, shape in shapes.items()) or "absent"
