"""An ONNX graph of a residual network to a NetSpec and its tensors, read by structure and never by the nodes' names.

From the end of the graph's normal form backwards, every Add is the end of a residual block: both its ways lead back to
the Add before, and what they share belongs to neither. The convolutions suggest a spec; the spec is planned, and every
operation is laid beside its layer of the plan. What the plan cannot say is an error naming the node.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.arch.block import Layer
from isthmus.arch.plan import Plan, plan
from isthmus.arch.spec import NetSpec, StageSpec, StemSpec
from isthmus.arch.variants import name_of, variant, variants
from isthmus.errors import SpecError, WeightsError
from isthmus.weights.onnx_file import Array, read_graph
from isthmus.weights.onnx_normal import Normal, Op, normal_form

__all__ = ["OnnxNetwork", "read_onnx"]

ONNX_NAMES = {
    "conv": "Conv",
    "norm": "BatchNormalization",
    "act": "Relu",
    "maxpool": "MaxPool",
    "avgpool": "AveragePool",
}
STEM_POOLS: dict[tuple[tuple[int, ...], bool], Any] = {  # pads and ceil mode of a 3×3 pool
    ((1, 1, 1, 1), False): "max",
    ((0, 0, 1, 1), False): "max_ceil",
    ((0, 0, 0, 0), True): "max_ceil",
}
RATIOS = (1 / 16, 1 / 4, 1 / 8, 1 / 2, 1 / 32)  # of squeeze-and-excitation's strip; timm's first
FOLDED = "norms were already folded into the convolutions, so the network has none"
PARTLY = "some norms were already folded into convolutions; norms of mean 0 and variance 1 - epsilon hold their biases"
SPELLED = "norms are spelled out as a factor and a term; norms of mean 0 and variance 1 - epsilon hold them"
BIASED = "biases beside a norm, or in a pre-activation stream, are taken up by the means of the norms behind them"


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxNetwork:
    """A network read from an ONNX graph: its tensors under our names, and notes on what the graph does otherwise.

    `shape` is the picture's as the graph wants it, with a word where any size goes; `channels_last` that it comes as
    (N, H, W, C), and `softmax` that the graph ends in one.
    """

    spec: NetSpec
    tensors: dict[str, Tensor]
    notes: tuple[str, ...]
    shape: tuple[int | str, ...]
    channels_last: bool
    softmax: bool


@dataclass(frozen=True, slots=True)
class Block:
    """A residual block in the graph: main path, shortcut, their addition, and the norm that both begin with."""

    lead: list[Op]
    main: list[Op]
    shortcut: list[Op]
    add: Op

    def stage(self, preact: bool) -> StageSpec:
        """This block as a stage of its own."""
        convs = of_kind(self.main, "conv")
        if len(convs) not in ((3,) if preact else (2, 3)):
            self.add.node.fail(
                f"the block that ends here has {len(convs)} convolutions; a basic one has 2 and a bottleneck 3, as one "
                f"with pre-activation has"
            )
        *_, spatial, last = convs
        basic, first = len(convs) == 2, convs[0].channels
        dilation = (last if basic else spatial).window.dilations[0]
        first_dilation = spatial.window.dilations[0]
        return StageSpec(
            depth=1,
            block="basic" if basic else "preact_bottleneck" if preact else "bottleneck",
            mid=spatial.channels,
            out=last.channels,
            reduce=first if first != spatial.channels else 0,
            stride=prod(op.window.strides[0] for op in self.main),
            groups=spatial.window.groups,
            dilation=dilation,
            first_dilation=first_dilation if first_dilation != dilation else 0,
        )


def read_onnx(path: Path | str) -> OnnxNetwork:
    """The residual network in an ONNX file; raises WeightsError naming the node that cannot be expressed."""
    path = Path(path)
    normal = normal_form(read_graph(path))
    stem, blocks, tail = _blocks(normal.end)
    if not blocks:
        raise WeightsError(f"{path} holds no residual network: no two ways in its graph are added")
    every = [*stem, *(op for block in blocks for op in (*block.lead, *block.main, *block.shortcut)), *tail]
    try:
        spec = replace(_spec(stem, blocks, tail, every), name=path.stem)
        size = tuple(side if isinstance(side, int) else 224 for side in every[0].inputs[0].size)
        spec = _named(_squeezed(spec, every, size), every)
        net = plan(spec, size)
        layers = _Layers(spec)
        layers.network(net, stem, blocks, tail)
    except SpecError as error:
        raise WeightsError(f"{path}: its network cannot be built: {error}") from error
    return OnnxNetwork(
        spec=spec,
        tensors=layers.tensors,
        notes=tuple(_notes(normal, spec, every, layers.notes)),
        shape=normal.shape,
        channels_last=normal.channels_last,
        softmax=normal.end.kind == "softmax",
    )


def of_kind(ops: Iterable[Op], *kinds: str) -> list[Op]:
    """Those of the operations that are of one of these kinds."""
    return [op for op in ops if op.kind in kinds]


# Structure


def _blocks(end: Op) -> tuple[list[Op], list[Block], list[Op]]:
    """Stem, residual blocks and tail of a network that ends in `end`."""
    tail, start = _way(end)
    found: list[tuple[list[Op], list[Op], list[Op], Op]] = []
    while start.kind == "add":
        add = start
        (first, start), (second, other) = (_way(op) for op in add.inputs)
        if other is not start:
            add.node.fail("the two ways of a residual block were expected here, and they begin at different places")
        common = 0
        while common < min(len(first), len(second)) and first[common] is second[common]:
            common += 1
        shortcut, main = sorted((first[common:], second[common:]), key=lambda way: len(of_kind(way, "conv")))
        found.insert(0, (first[:common], main, shortcut, add))
    if not found:
        return tail, [], []
    preact = tail[:1] != [] and tail[0].kind == "norm"
    stem, blocks = found[0][0], []
    for number, (shared, main, shortcut, add) in enumerate(found):
        lead: list[Op] = shared
        if number == 0 and preact:
            # Where a projection reads the activated stem, its norm and activation are the first block's.
            begins = main[0].kind == "conv" if main else False
            cut = len(stem) - (0 if not begins else 2 if stem[-2:-1] and stem[-2].kind == "norm" else 1)
            stem, lead = stem[:cut], stem[cut:]
        elif number == 0:
            lead = []
        elif not preact:
            _check_activation(shared, (*main, add), found[number - 1][3])
            lead = []
        blocks.append(Block(lead, main, shortcut, add))
    if not preact:
        _check_activation(tail[:1], tail or [end], found[-1][3])
        tail = tail[1:]
    return stem, blocks, tail


def _way(op: Op) -> tuple[list[Op], Op]:
    """The operations that lead one after another to `op`, and the Add or the picture that they begin at."""
    way: list[Op] = []
    while op.kind not in ("add", "input"):
        way.append(op)
        op = op.inputs[0]
    return way[::-1], op


def _check_activation(shared: Sequence[Op], after: Sequence[Op], add: Op) -> None:
    """Raise WeightsError unless one activation follows a post-activation block's addition."""
    if len(shared) != 1 or shared[0].kind not in ("act", "silu"):
        culprit = shared[0] if shared else after[0] if after else add
        culprit.node.fail("a ReLU or SiLU must follow a block's addition, or a norm begin every block and the head")


def _spec(stem: list[Op], blocks: list[Block], tail: list[Op], every: list[Op]) -> NetSpec:
    """The spec that the graph's convolutions suggest; laying the plan beside the graph proves or refutes it."""
    preact = bool(tail) and tail[0].kind == "norm"
    convs = of_kind(stem, "conv")
    if not convs:
        (stem or every)[0].node.fail("the network begins with it; a convolution was expected")
    rows = [block.stage(preact) for block in blocks]
    mains = [op for block in blocks for op in block.main]
    shortcuts = [op for block in blocks for op in block.shortcut]
    kinds = {op.kind for op in shortcuts}
    wide = any(op.weight.shape[-1] == 3 for op in of_kind(shortcuts, "conv"))
    early = any(
        of_kind(block.main, "conv")[0].window.strides[0] > 1 and row.block != "basic"
        for block, row in zip(blocks, rows, strict=True)
    )
    filters = {op.kind for op in (*stem, *mains)} & {"blur", "avgpool"}
    gates = {part.kind for op in of_kind(mains, "gate") for part in op.parts}
    norms = of_kind(every, "norm")
    heads = of_kind(tail, "linear", "conv")
    return NetSpec(
        stem=_stem(stem, convs),
        stages=_stages(rows, preact),
        shortcut="pad" if "padchannels" in kinds
        else "maxpool" if "maxpool" in kinds
        else "avg" if "avgpool" in kinds
        else "conv3" if wide
        else "conv1",
        stride_at="conv1" if early else "conv2",
        norm="batch" if norms else "none",
        norm_eps=next((op.eps for op in norms if op.eps is not None), 1e-5),
        activation="silu" if of_kind(every, "silu") else "relu",
        attention="se" if "linear" in gates else "eca" if gates else "none",
        anti_alias="blur" if "blur" in filters else "avg" if filters else "none",
        in_channels=convs[0].inputs[0].channels,
        num_classes=heads[0].channels if heads else 0,
    )  # fmt: skip


def _stem(stem: list[Op], convs: list[Op]) -> StemSpec:
    pool: Any = "conv" if len(convs) == 4 else "none"
    if of_kind(stem, "blur", "avgpool"):
        pool = "max"
    elif pools := of_kind(stem, "maxpool"):
        facts = pools[0].window.pads, pools[0].window.ceil
        zeros = of_kind(stem, "zeropad")
        if zeros:
            facts = (zeros[0].window.pads, False) if not any(facts[0]) and not facts[1] else ((), False)
        if facts not in STEM_POOLS or (zeros and STEM_POOLS[facts] != "max"):
            pools[0].node.fail("its pads fit neither of the stem pools max, max_zero and max_ceil")
        pool = "max_zero" if zeros else STEM_POOLS[facts]
    last = convs[min(len(convs), 3) - 1]
    # A bias behind which a norm or an activation stands is taken up by that norm, or is what is left of it.
    open_end = stem[-1] is last or stem[stem.index(last) + 1].kind not in ("norm", "act", "silu")
    return StemSpec(
        widths=tuple(conv.channels for conv in convs[:3]),
        kernel=convs[0].weight.shape[-1],
        stride=convs[0].window.strides[0],
        pool=pool,
        bias=open_end and "bias" in last.constants and pool != "none",
    )


def _stages(rows: list[StageSpec], preact: bool) -> tuple[StageSpec, ...]:
    """Blocks of one shape put together; a stage's first block, or its last, may have a stride and another dilation."""
    stages: list[StageSpec] = []
    for row in rows:
        last = stages[-1] if stages else row
        same: dict[str, Any] = {
            "depth": 1,
            "stride": row.stride,
            "dilation": row.dilation,
            "first_dilation": row.first_dilation,
        }
        alike = bool(stages) and replace(last, **same) == row
        if alike and row.stride == 1:
            first = last.first_dilation or last.dilation
            changes: dict[str, Any] = {
                "dilation": row.dilation,
                "first_dilation": first if first != row.dilation else 0,
            }
            stages[-1] = replace(last, depth=last.depth + 1, **changes)
        elif alike and preact and last.stride == 1:
            stages[-1] = replace(last, depth=last.depth + 1, stride=row.stride, stride_block="last")
        else:
            stages.append(row)
    return tuple(stages)


def _squeezed(spec: NetSpec, every: list[Op], size: tuple[int, ...]) -> NetSpec:
    """The spec with the ratio of its squeeze-and-excitation that gives the widths found."""
    found = [op.parts[0].channels for op in of_kind(every, "gate")]
    if spec.attention != "se":
        return spec
    for ratio in RATIOS:
        tried = replace(spec, attention_ratio=ratio)
        gates = [block.spec.gate()[0].out_channels for block in plan(tried, size).blocks]
        if gates == found:
            return tried
    gate = of_kind(every, "gate")[0]
    return gate.parts[0].node.fail(f"squeeze-and-excitation through {found} channels fits no ratio of {RATIOS}")


def _named(spec: NetSpec, every: list[Op]) -> NetSpec:
    """The spec under its name in the table of variants, if it has one; norms without an epsilon get that one's."""
    known = spec.norm == "none" or any(op.eps is not None for op in every)
    for eps in [spec.norm_eps] if known else dict.fromkeys(variant(name).norm_eps for name in variants()):
        # Networks whose norms are folded keep their name.
        if name := name_of(replace(spec, norm="batch", norm_eps=eps)):
            return replace(spec, name=name, norm_eps=eps)
    return spec


def _notes(normal: Normal, spec: NetSpec, every: list[Op], found: set[str]) -> Iterable[str]:
    """What the user should know of the graph beside its spec and tensors."""
    if normal.channels_last:
        yield "the graph takes pictures as (N, H, W, C); the network takes (N, C, H, W)"
    if any(any(op.window.pads) and op.node.text("auto_pad", "NOTSET").startswith("SAME") for op in every):
        yield f"automatic pads were worked out for pictures of {normal.shape}; at other sizes they may differ"
    if spec.norm == "none":
        yield FOLDED
    yield from sorted(found)
    if normal.end.kind == "softmax":
        yield "the graph ends in a softmax; the network gives the logits before it"


# Tensors


class _Layers:
    """Lays operations beside the layers of a plan and collects their tensors; raises WeightsError where they differ.

    A bias that no layer holds is an offset per channel of all that follows. It moves on through pools and additions
    to the next norm, which takes it up in its mean.
    """

    def __init__(self, spec: NetSpec) -> None:
        self.spec = spec
        self.tensors: dict[str, Tensor] = {}
        self.notes: set[str] = set()

    def network(self, net: Plan, stem: list[Op], blocks: list[Block], tail: list[Op]) -> None:
        """All layers. Only the residual stream of a pre-activation network may carry an offset from block to block."""
        stream = self.chain(stem, net.stem, "", blocks[0].add, None)
        for block, planned in zip(blocks, net.blocks, strict=True):
            prefix, spec = f"{planned.name}.", planned.spec
            main = self.chain([*block.lead, *block.main], spec.main, prefix, block.add, stream)
            side = self.chain(block.shortcut, spec.downsample, prefix, block.add, None if block.lead else stream)
            stream = main if side is None else side if main is None else main + side
            if stream is not None and not self.spec.preact:
                block.add.node.fail("before it stands a bias that no norm takes up")
        end = blocks[-1].add
        self.chain(tail[: len(net.tail)], net.tail, "", end, stream)
        self.head(tail[len(net.tail) :], net, end)

    def chain(
        self, ops: Sequence[Op], layers: Sequence[Layer], prefix: str, end: Op, offset: Array | None
    ) -> Array | None:
        """A chain of operations as a chain of layers; the offset that is left behind them."""
        left = [part for op in ops for part in (op.parts if op.kind == "gate" else (op,))]
        for layer in layers:
            name, wanted = prefix + layer.name, self.kind(layer)
            if layer.kind == "avgpool" and layer.kernel == 1:
                continue
            if layer.kind == "pad":
                left = self.padded(left, layer, name, end)
                continue
            if layer.kind == "norm" and (not left or left[0].kind != "norm"):
                self.norm(None, layer, name, offset)
                offset = None
                continue
            if not left or left[0].kind != wanted:
                culprit = left[0] if left else end
                culprit.node.fail(f"{ONNX_NAMES.get(wanted, wanted)} was expected here, as layer {name}")
            op = left.pop(0)
            if layer.kind == "norm":
                self.norm(op, layer, name, offset)
                offset = None
            elif layer.kind == "conv" and layer.domain == "map":
                offset = self.conv(op, layer, name)
            elif offset is not None and wanted != "maxpool":
                op.node.fail("before it stands a bias that no norm takes up")
            elif layer.kind == "conv":
                self.gate(op, layer, name)
            elif layer.kind in ("maxpool", "avgpool", "blur", "zeropad"):
                _check_window(op, layer, name)
        if left:
            left[0].node.fail(f"it stands behind the last of the layers {prefix}*, and nothing there can be built")
        return offset

    def kind(self, layer: Layer) -> str:
        """The operation of the normal form that a layer is."""
        if layer.kind == "act":
            return "silu" if self.spec.activation == "silu" else "act"
        return {"pooled": "linear", "channels": "eca"}.get(layer.domain, layer.kind)

    def conv(self, op: Op, layer: Layer, name: str) -> Array | None:
        """A convolution's tensors; the offset that its bias is where the layer has none."""
        window = op.window
        facts = {
            "weight shape": (
                op.weight.shape,
                (layer.out_channels, layer.in_channels // layer.groups, layer.kernel, layer.kernel),
            ),
            "strides": (window.strides, (layer.stride,) * 2),
            "pads": (window.pads, (layer.padding,) * 4),
            "dilations": (window.dilations, (layer.dilation,) * 2),
            "group": (window.groups, layer.groups),
        }
        for fact, (found, wanted) in facts.items():
            if found != wanted:
                op.node.fail(f"{fact} {found}; as layer {name} it would be {wanted}, and no other can be built")
        self.tensors[f"{name}.weight"] = _tensor(op.weight)
        bias = op.constants.get("bias")
        if layer.bias:
            self.tensors[f"{name}.bias"] = _tensor(np.zeros(layer.out_channels, np.float32) if bias is None else bias)
            return None
        return bias

    def norm(self, op: Op | None, layer: Layer, name: str, offset: Array | None) -> None:
        """A norm's tensors, its mean less by the offset before it; without an operation, one that adds the offset."""
        width, eps = layer.out_channels, self.spec.norm_eps
        if op is not None and (op.channels != width or op.eps not in (None, eps)):
            op.node.fail(f"it has {op.channels} channels and epsilon {op.eps}; the network's other norms have {eps}")
        found = op.constants if op is not None else {}
        constants: dict[str, Array] = {
            "weight": np.ones(width, np.float32),
            "bias": np.zeros(width, np.float32),
            "running_mean": np.zeros(width, np.float32),
            "running_var": np.full(width, 1 - eps),
        } | found
        if offset is not None:
            constants["running_mean"] = constants["running_mean"] - offset.astype(np.float64)
        for part, constant in constants.items():
            self.tensors[f"{name}.{part}"] = _tensor(constant)
        self.tensors[f"{name}.num_batches_tracked"] = torch.tensor(0)
        if op is None:
            self.notes.add(PARTLY)
        elif op.eps is None:
            self.notes.add(SPELLED)
        elif offset is not None:
            self.notes.add(BIASED)

    def gate(self, op: Op, layer: Layer, name: str) -> None:
        """Tensors of channel attention: the linear layers of SE as 1×1 convolutions, or ECA's filter."""
        se = layer.domain == "pooled"
        weight = op.weight[:, :, None, None] if se else op.weight
        wanted = (layer.out_channels, layer.in_channels, 1, 1) if se else (1, 1, layer.kernel)
        if weight.shape != wanted:
            op.node.fail(f"weight shape {weight.shape}; as layer {name} it would be {wanted}")
        self.tensors[f"{name}.weight"] = _tensor(weight)
        if layer.bias:
            self.tensors[f"{name}.bias"] = _tensor(op.constants.get("bias", np.zeros(len(weight), np.float32)))

    def padded(self, ops: list[Op], layer: Layer, name: str, end: Op) -> list[Op]:
        """The shortcut that picks positions and adds channels of zeros (He et al. 2015, option A); what follows it."""
        left = list(ops)
        picked = left.pop(0).window.strides if left and left[0].kind == "subsample" else (1, 1)
        channels = left.pop(0).channels if left and left[0].kind == "padchannels" else layer.in_channels
        if picked != (layer.stride,) * 2 or channels != layer.out_channels:
            (ops[0] if ops else end).node.fail(
                f"it picks by {picked} and makes {channels} channels; as layer {name} it would be "
                f"{(layer.stride,) * 2} and {layer.out_channels}"
            )
        return left

    def head(self, ops: list[Op], net: Plan, end: Op) -> None:
        """The classifier's tensors; raises WeightsError unless the head is a mean over the map and one linear layer."""
        kinds = ["pool", *(["linear"] if net.spec.num_classes else [])]
        for op, kind in zip(ops, [*kinds, *(["softmax"] if net.spec.num_classes else [])], strict=False):
            if op.kind != kind:
                op.node.fail("a head is a mean over the map, then one linear layer; this cannot be expressed")
        if not len(kinds) <= len(ops) <= len(kinds) + bool(net.spec.num_classes):
            (ops[-1] if ops else end).node.fail("the graph does not end in a mean over the map and a linear layer")
        if net.spec.num_classes:
            linear = ops[1]
            bias = linear.constants.get("bias", np.zeros(linear.channels, np.float32))
            self.tensors |= {"fc.weight": _tensor(linear.weight), "fc.bias": _tensor(bias)}


def _check_window(op: Op, layer: Layer, name: str) -> None:
    """Raise WeightsError unless a pool, a filter or a pad slides as the plan says."""
    window, size = op.window, op.inputs[0].size
    found, wanted = (window.kernel, window.strides), ((layer.kernel,) * 2, (layer.stride,) * 2)
    pads = (layer.padding,) * 4
    if layer.ceil and layer.kind == "maxpool":
        pads = (0, 0, 1, 1) if not window.ceil else pads  # the same windows, said otherwise
    elif layer.kind == "avgpool" and layer.stride == 1:
        pads = (0, 0, layer.kernel - 1, layer.kernel - 1)  # so that the size stays; the zeros count
    if found != wanted or window.pads != pads or window.dilations != (1, 1):
        op.node.fail(
            f"kernel and strides are {found} and pads {window.pads}; as layer {name} they would be {wanted} and {pads}"
        )
    if layer.kind == "avgpool":
        whole = replace(window, ceil=layer.ceil).out_size(size) == window.out_size(size)
        counted = window.counts_pads if layer.stride == 1 else not (window.counts_pads and window.ceil)
        divided = all(isinstance(side, int) and (side - layer.kernel) % layer.stride == 0 for side in size)
        if not ((whole and counted) or (divided and not any(pads))):
            op.node.fail(f"it treats the edge otherwise than layer {name}: maps of odd sizes would differ")


def _tensor(array: Array) -> Tensor:
    """A constant as a tensor of its own, in single precision."""
    return torch.from_numpy(np.array(array, np.float32, order="C"))
