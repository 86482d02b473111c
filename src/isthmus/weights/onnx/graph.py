"""An ONNX graph of a residual network to a NetSpec and its tensors, read by structure and never by the nodes' names.

The graph is brought into a normal form (`normal`) and cut into blocks (`blocks`). Their convolutions suggest
a spec; the spec is planned, and every operation is laid beside its layer of the plan (`layers`). What the plan
cannot say is an error naming the node.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from isthmus.arch.plan import plan
from isthmus.arch.spec import NetSpec, StageSpec, StemSpec
from isthmus.arch.variants import name_of, variant, variants
from isthmus.errors import SpecError, WeightsError
from isthmus.weights.onnx.blocks import Block, Parts, of_kind, parts
from isthmus.weights.onnx.file import read_graph
from isthmus.weights.onnx.layers import ENDINGS, Layers
from isthmus.weights.onnx.normal import Normal, normal_form
from isthmus.weights.onnx.op import Op

__all__ = ["OnnxNetwork", "read_onnx"]

SHORTCUTS = {"padchannels": "pad", "maxpool": "maxpool", "avgpool": "avg", "conv3": "conv3"}  # operation -> kind
STEM_POOLS: dict[tuple[tuple[int, ...], bool], Any] = {  # pads and ceil mode of a 3×3 pool
    ((1, 1, 1, 1), False): "max",
    ((0, 0, 1, 1), False): "max_ceil",
    ((0, 0, 0, 0), True): "max_ceil",
}
RATIOS = (1 / 16, 1 / 4, 1 / 8, 1 / 2, 1 / 32)  # of squeeze-and-excitation's strip; timm's first
FOLDED = "norms were already folded into the convolutions, so the network has none"


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxNetwork:
    """A network read from an ONNX graph: its tensors under our names, and notes on what the graph does otherwise.

    `shape` is the picture's as the graph wants it, with a word where any size goes; `channels_last` that it comes as
    (N, H, W, C), and `ending` what the graph does to the logits: nothing (""), softmax, logsoftmax or sigmoid;
    `metadata` is what exporters noted beside the graph.
    """

    spec: NetSpec
    tensors: dict[str, Tensor]
    notes: tuple[str, ...]
    shape: tuple[int | str, ...]
    channels_last: bool
    ending: str
    metadata: dict[str, str]


def read_onnx(path: Path | str) -> OnnxNetwork:
    """The residual network in an ONNX file; raises WeightsError naming the node that cannot be expressed."""
    path = Path(path)
    graph = read_graph(path)
    normal = normal_form(graph)
    found = parts(normal.end)
    if not found.blocks:
        raise WeightsError(f"{path} holds no residual network: no two ways in its graph are added")
    try:
        size = tuple(side if isinstance(side, int) else 224 for side in normal.start.size)
        spec = _named(_squeezed(replace(_spec(found), name=path.stem), found, size), found)
        layers = Layers(plan(spec, size))
        layers.lay(found)
    except SpecError as error:
        raise WeightsError(f"{path}: its network cannot be built: {error}") from error
    return OnnxNetwork(
        spec=spec,
        tensors=layers.tensors,
        notes=tuple(_notes(normal, spec, found, layers.notes)),
        shape=normal.shape,
        channels_last=normal.channels_last,
        ending=normal.end.kind if normal.end.kind in ENDINGS else "",
        metadata=graph.metadata,
    )


# From operations to a spec


def _spec(found: Parts) -> NetSpec:
    """The spec that the graph's convolutions suggest; laying its plan beside the graph proves or refutes it."""
    convs = of_kind(found.stem, "conv")
    if not convs:
        next(iter(found)).node.fail("the network begins with it; a convolution was expected")
    rows = [_stage(block, preact=found.preact) for block in found.blocks]
    mains = [op for block in found.blocks for op in block.main]
    shortcuts = [op for block in found.blocks for op in block.shortcut]
    kinds: set[str] = {op.kind for op in shortcuts}
    if any(op.weight.shape[-1] == 3 for op in of_kind(shortcuts, "conv")):
        kinds.add("conv3")
    early = any(
        of_kind(block.main, "conv")[0].window.strides[0] > 1 and row.block != "basic"
        for block, row in zip(found.blocks, rows, strict=True)
    )
    filters = {op.kind for op in (*found.stem, *mains)}
    gates = {part.kind for op in of_kind(mains, "gate") for part in op.parts}
    norms = of_kind(found, "norm")
    head = of_kind(found.tail, "linear")
    return NetSpec(
        stem=_stem(found.stem, convs),
        stages=_stages(rows, pooled="maxpool" in kinds),
        shortcut=_first(SHORTCUTS, kinds, "conv1"),
        stride_at="conv1" if early else "conv2",
        norm="batch" if norms else "none",
        norm_eps=next((op.eps for op in norms if op.eps is not None), 1e-5),
        activation="silu" if of_kind(found, "silu") else "relu",
        attention=_first({"linear": "se", "eca": "eca"}, gates, "none"),
        anti_alias=_first({"blur": "blur", "avgpool": "avg"}, filters, "none"),
        in_channels=convs[0].inputs[0].channels,
        num_classes=head[0].channels if head else 0,
    )


def _first(names: Mapping[str, Any], kinds: Collection[str], other: str) -> Any:
    """What the first of the kinds of operation that is there stands for."""
    return next((name for kind, name in names.items() if kind in kinds), other)


def _stage(block: Block, *, preact: bool) -> StageSpec:
    """A block as a stage of its own."""
    convs = of_kind(block.main, "conv")
    if len(convs) not in ((3,) if preact else (2, 3)):
        block.add.node.fail(
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
        stride=prod(op.window.strides[0] for op in block.main),
        groups=spatial.window.groups,
        dilation=dilation,
        first_dilation=first_dilation if first_dilation != dilation else 0,
    )


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


def _stages(rows: list[StageSpec], *, pooled: bool) -> tuple[StageSpec, ...]:
    """Blocks of one shape put together; a stage's first block may have a stride and another dilation.

    With `pooled` shortcuts it is the last block that strides (TensorFlow's and Keras' pre-activation networks).
    """
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
        elif alike and pooled and last.stride == 1:
            stages[-1] = replace(last, depth=last.depth + 1, stride=row.stride, stride_block="last")
        else:
            stages.append(row)
    # A stage without a stride has no place for one; it is named as the others are.
    return tuple(replace(stage, stride_block="last") if pooled and stage.stride == 1 else stage for stage in stages)


def _squeezed(spec: NetSpec, found: Parts, size: tuple[int, ...]) -> NetSpec:
    """The spec with the ratio of its squeeze-and-excitation that gives the widths found."""
    widths = [op.parts[0].channels for op in of_kind(found, "gate")]
    if spec.attention != "se":
        return spec
    for ratio in RATIOS:
        tried = replace(spec, attention_ratio=ratio)
        gates = [block.spec.gate()[0].out_channels for block in plan(tried, size).blocks]
        if gates == widths:
            return tried
    gate = of_kind(found, "gate")[0]
    return gate.parts[0].node.fail(f"squeeze-and-excitation through {widths} channels fits no ratio of {RATIOS}")


def _named(spec: NetSpec, found: Parts) -> NetSpec:
    """The spec under its name in the table of variants, if it has one; norms without an epsilon get that one's."""
    known = spec.norm == "none" or any(op.eps is not None for op in found)
    for eps in [spec.norm_eps] if known else dict.fromkeys(variant(name).norm_eps for name in variants()):
        # Networks whose norms are folded keep their name.
        if name := name_of(replace(spec, norm="batch", norm_eps=eps)):
            return replace(spec, name=name, norm_eps=eps)
    return spec


def _notes(normal: Normal, spec: NetSpec, found: Parts, told: set[str]) -> Iterable[str]:
    """What the user should know of the graph beside its spec and tensors."""
    if normal.channels_last:
        yield "the graph takes pictures as (N, H, W, C); the network takes (N, C, H, W)"
    if any(any(op.window.pads) and op.node.get("auto_pad", "NOTSET").startswith("SAME") for op in found):
        yield f"automatic pads were worked out for pictures of {normal.shape}; at other sizes they may differ"
    if types := {str(op.weight.dtype) for op in of_kind(found, "conv")} - {"float32"}:
        yield f"the weights are of type {', '.join(sorted(types))}; the network's are float32, so it rounds otherwise"
    if spec.norm == "none":
        yield FOLDED
    yield from sorted(told)
    if normal.end.kind in ENDINGS:
        yield f"the graph ends in a {normal.end.kind}; the network gives the logits before it"
