"""An ONNX graph of a residual network to a NetSpec and its tensors, read by structure and never by the nodes' names.

From the picture on, the stem is the chain of nodes up to the first value that two nodes use. There a block begins; it
ends in the Add where its main path and its shortcut meet. After the last block comes the head. The spec found is then
planned, and every node is laid beside its layer of the plan: what the plan cannot say is an error naming the node.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus.arch.block import Layer
from isthmus.arch.plan import Plan, plan
from isthmus.arch.spec import NetSpec, StageSpec, StemSpec
from isthmus.errors import MissingExtraError, SpecError, WeightsError

__all__ = ["OnnxNetwork", "read_onnx"]

OPERATIONS = {
    "conv": "Conv",
    "norm": "BatchNormalization",
    "act": "Relu",
    "maxpool": "MaxPool",
    "avgpool": "AveragePool",
}
SHAPE_ONLY = ("Identity", "Dropout", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose")
STEM_POOLS = {((1, 1, 1, 1), 0): "max", ((0, 0, 1, 1), 0): "max_ceil", ((0, 0, 0, 0), 1): "max_ceil"}  # pads, ceil_mode


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxNetwork:
    """A network read from an ONNX graph: its tensors under our names, and notes on what the graph does otherwise."""

    spec: NetSpec
    tensors: dict[str, Tensor]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """One operation of a graph: `inputs` are computed values, `constants` are the others by their position."""

    name: str
    op: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any]
    constants: dict[int, NDArray[Any]]

    def fail(self, reason: str) -> NoReturn:
        """Raise WeightsError naming this node."""
        raise WeightsError(f"ONNX node {self.name or self.output!r} ({self.op}): {reason}")

    def get(self, name: str, default: Any) -> Any:
        """An attribute, lists as tuples."""
        value = self.attributes.get(name, default)
        return tuple(value) if isinstance(value, list) else value

    @property
    def weight(self) -> NDArray[Any]:
        """The constant that a convolution or a classifier multiplies with."""
        return self.constants[1] if 1 in self.constants else self.fail("its weight is computed; it must be a constant")

    @property
    def stride(self) -> int:
        """Of a convolution."""
        return int(self.get("strides", (1, 1))[0])

    @property
    def dilation(self) -> int:
        """Of a convolution."""
        return int(self.get("dilations", (1, 1))[0])


@dataclass(frozen=True, slots=True)
class Graph:
    """The nodes that read each value, the name of the picture with its shape (0: any), and the outputs' names."""

    users: dict[str, list[Node]]
    input: str
    shape: tuple[int, ...]
    outputs: tuple[str, ...]

    def chain(self, value: str) -> list[Node]:
        """The nodes that follow one another from `value` on, up to a branch, a meeting of two values, or the end."""
        nodes: list[Node] = []
        while len(users := self.users.get(value, [])) == 1 and len(users[0].inputs) == 1:
            nodes.append(users[0])
            value = users[0].output
        return nodes


@dataclass(frozen=True, slots=True)
class Block:
    """A residual block in the graph: main path, shortcut, and their addition."""

    main: list[Node]
    shortcut: list[Node]
    add: Node

    def stage(self) -> StageSpec:
        """This block as a stage of its own."""
        convs = convolutions(self.main)
        if len(convs) not in (2, 3):
            self.add.fail(f"the block that ends here has {len(convs)} convolutions; a basic one has 2, a bottleneck 3")
        *_, spatial, last = convs
        basic, first = len(convs) == 2, convs[0].weight.shape[0]
        dilation = last.dilation if basic else spatial.dilation
        return StageSpec(
            depth=1,
            block="basic" if basic else "bottleneck",
            mid=spatial.weight.shape[0],
            out=last.weight.shape[0],
            reduce=first if first != spatial.weight.shape[0] else 0,
            stride=prod(conv.stride for conv in convs),
            groups=spatial.get("group", 1),
            dilation=dilation,
            first_dilation=spatial.dilation if spatial.dilation != dilation else 0,
        )


def read_onnx(path: Path | str) -> OnnxNetwork:
    """The residual network in an ONNX file; raises WeightsError naming the node that cannot be expressed."""
    graph = _graph(Path(path))
    notes: list[str] = []
    stem = graph.chain(graph.input)
    if stem and stem[0].op == "Transpose" and stem[0].get("perm", ()) == (0, 3, 1, 2):
        notes.append("the graph takes pictures as (N, H, W, C); the network takes (N, C, H, W)")
        graph = replace(graph, shape=tuple(graph.shape[axis] for axis in (0, 3, 1, 2)))
        del stem[0]
    if not stem or stem[-1].output not in graph.users:
        raise WeightsError(f"{path} holds no residual network: no value in its graph takes two ways")
    blocks, value = _blocks(graph, stem[-1].output)
    head = graph.chain(value)
    every = [*stem, *(node for block in blocks for node in (*block.main, *block.shortcut))]
    norm = next((node for node in every if node.op == "BatchNormalization"), None)
    if norm is None:
        notes.append("norms were already folded into the convolutions, so the network has none")
    try:
        spec = replace(
            _spec(stem, blocks),
            name=Path(path).stem,
            norm="batch" if norm else "none",
            norm_eps=_epsilon(norm) if norm else 1e-5,
            num_classes=next((_classifier(node).shape[0] for node in head if node.op in ("Gemm", "MatMul")), 0),
        )
        net = plan(spec, graph.shape[2:] if min(graph.shape[2:]) > 0 else 224)
        layers = [net.stem, *(part for block in net.blocks for part in (block.spec.main, block.spec.downsample))]
    except SpecError as error:
        raise WeightsError(f"{path}: its network cannot be built: {error}") from error
    chains = [stem, *(part for block in blocks for part in (block.main, block.shortcut))]
    ends = [blocks[0].add, *(block.add for block in blocks for _ in range(2))]
    prefixes = ["", *(f"{block.name}." for block in net.blocks for _ in range(2))]
    tensors: dict[str, Tensor] = {}
    for nodes, wanted, prefix, end in zip(chains, layers, prefixes, ends, strict=True):
        tensors |= _chain_tensors(nodes, wanted, prefix, end, spec.norm_eps)
    tensors |= _head_tensors(head, graph, net, notes)
    return OnnxNetwork(spec=spec, tensors=tensors, notes=tuple(notes))


def convolutions(nodes: Sequence[Node]) -> list[Node]:
    """The convolutions among nodes."""
    return [node for node in nodes if node.op == "Conv"]


def _blocks(graph: Graph, value: str) -> tuple[list[Block], str]:
    """The residual blocks from `value` on, and the value after the last."""
    blocks: list[Block] = []
    while len(starts := graph.users.get(value, [])) > 1:
        ways, meetings = [], []
        for start in starts:
            way = [start, *graph.chain(start.output)] if len(start.inputs) == 1 else []
            ends = graph.users.get(way[-1].output, []) if way else [start]
            if len(starts) > 2 or len(ends) != 1:
                (way or [start])[-1].fail("a block with more ways than a main path and a shortcut (attention?)")
            ways.append(way)
            meetings.append(ends[0])
        for meeting in meetings:
            if meeting.op != "Add" or meeting is not meetings[0]:
                meeting.fail("here the two ways of a residual block were expected to be added")
        after = graph.users.get(meetings[0].output, [])
        if len(after) != 1 or after[0].op != "Relu":
            culprit = after[0] if after else meetings[0]
            culprit.fail("a ReLU must follow a block's addition; other activations and orders cannot be read yet")
        shortcut, main = sorted(ways, key=lambda way: len(convolutions(way)))
        blocks.append(Block(main, shortcut, meetings[0]))
        value = after[0].output
    return blocks, value


def _spec(stem: list[Node], blocks: list[Block]) -> NetSpec:
    """The spec that the graph's convolutions suggest; laying the plan beside the graph proves or refutes it."""
    convs, pools = convolutions(stem), [node for node in stem if node.op == "MaxPool"]
    if not convs:
        stem[0].fail("the network begins with it; a convolution was expected, and preprocessing belongs outside")
    pool: Any = "conv" if len(convs) == 4 else "none"
    if pools:
        facts = pools[0].get("pads", (0, 0, 0, 0)), pools[0].get("ceil_mode", 0)
        if facts not in STEM_POOLS or pools[0].get("auto_pad", b"NOTSET") != b"NOTSET":
            pools[0].fail("its pads fit neither of the stem pools max and max_ceil")
        pool = STEM_POOLS[facts]
    rows = [block.stage() for block in blocks]
    stages: list[StageSpec] = []
    for row in rows:
        # Within a stage, the first block may have another stride and dilation than the others.
        changes = {"stride": 1, "dilation": row.dilation, "first_dilation": row.first_dilation}
        if stages and replace(stages[-1], depth=1, **changes) == row:  # type: ignore[arg-type]
            last = stages[-1]
            first = last.first_dilation or last.dilation
            first = first if first != row.dilation else 0
            stages[-1] = replace(last, depth=last.depth + 1, dilation=row.dilation, first_dilation=first)
        else:
            stages.append(row)
    shortcuts = [node for block in blocks for node in block.shortcut]
    wide = any(conv.weight.shape[-1] == 3 for conv in convolutions(shortcuts))
    early = any(
        convolutions(block.main)[0].stride > 1 for block, row in zip(blocks, rows, strict=True) if row.block != "basic"
    )
    kernel, widths = convs[0].weight.shape[-1], tuple(conv.weight.shape[0] for conv in convs)
    return NetSpec(
        stem=StemSpec(widths=widths[:3], kernel=kernel, stride=convs[0].stride, pool=pool),
        stages=tuple(stages),
        shortcut="avg" if any(node.op == "AveragePool" for node in shortcuts) else "conv3" if wide else "conv1",
        stride_at="conv1" if early else "conv2",
        in_channels=convs[0].weight.shape[1],
    )


def _chain_tensors(
    nodes: Sequence[Node], layers: Sequence[Layer], prefix: str, end: Node, eps: float
) -> dict[str, Tensor]:
    """The tensors of a chain of nodes that is a chain of layers; raises WeightsError at the first that differs."""
    tensors: dict[str, Tensor] = {}
    layers = [layer for layer in layers if layer.kind != "avgpool" or layer.kernel > 1]
    for node, layer in zip(nodes, layers, strict=False):
        name = prefix + layer.name
        if node.op != OPERATIONS.get(layer.kind):
            node.fail(f"{OPERATIONS.get(layer.kind, layer.kind)} was expected here, as layer {name}")
        if layer.kind in ("maxpool", "avgpool"):
            found = node.get("kernel_shape", ()), node.get("strides", (1, 1))
            wanted = (layer.kernel,) * 2, (layer.stride,) * 2
            if found != wanted or (layer.kind == "avgpool" and any(node.get("pads", ()))):
                node.fail(f"kernel and strides are {found}; as layer {name} they would be {wanted}, without pads")
        elif layer.kind == "norm":
            if _epsilon(node) != eps or set(node.constants) != {1, 2, 3, 4}:
                node.fail(f"its statistics must be constants and its epsilon {eps}, as in the first norm")
            for position, part in enumerate(("weight", "bias", "running_mean", "running_var"), 1):
                tensors[f"{name}.{part}"] = _tensor(node.constants[position])
            tensors[f"{name}.num_batches_tracked"] = torch.tensor(0)
        elif layer.kind == "conv":
            _check_conv(node, layer, name)
            tensors[f"{name}.weight"] = _tensor(node.weight)
            if layer.bias:
                tensors[f"{name}.bias"] = _tensor(node.constants.get(2, np.zeros(layer.out_channels, np.float32)))
            elif 2 in node.constants:
                node.fail("it has a bias and a norm after it; fold the norm into the convolution first")
    if len(nodes) != len(layers):
        culprit = nodes[len(layers)] if len(nodes) > len(layers) else end
        culprit.fail(f"{len(nodes)} nodes stand where {len(layers)} layers {prefix}* were expected")
    return tensors


def _check_conv(node: Node, layer: Layer, name: str) -> None:
    """Raise WeightsError unless a convolution is what the plan says."""
    if node.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID") and layer.kernel > 1:
        node.fail("automatic padding depends on the picture's size; export with explicit pads")
    facts = {
        "weight shape": (
            node.weight.shape,
            (layer.out_channels, layer.in_channels // layer.groups, layer.kernel, layer.kernel),
        ),
        "strides": (node.get("strides", (1, 1)), (layer.stride,) * 2),
        "pads": (node.get("pads", (0,) * 4), (layer.padding,) * 4),
        "dilations": (node.get("dilations", (1, 1)), (layer.dilation,) * 2),
        "group": (node.get("group", 1), layer.groups),
    }
    for fact, (found, wanted) in facts.items():
        if found != wanted:
            node.fail(f"{fact} {found}; as layer {name} it would be {wanted}, and no other can be built")


def _head_tensors(nodes: list[Node], graph: Graph, net: Plan, notes: list[str]) -> dict[str, Tensor]:
    """The classifier's tensors; raises WeightsError unless the head is a mean over the map and one linear layer."""
    tensors: dict[str, Tensor] = {}
    axes, pooled = (2, 3), False
    for node in nodes:
        if not pooled and node.op == "Transpose" and node.get("perm", ()) == (0, 2, 3, 1):
            axes = (1, 2)
        elif not pooled and node.op in ("GlobalAveragePool", "AveragePool", "ReduceMean"):
            _check_pool(node, graph, net, axes)
            pooled = True
        elif pooled and node.op in SHAPE_ONLY:
            continue
        elif pooled and node.op in ("Gemm", "MatMul") and not tensors:
            weight = _classifier(node)
            bias = node.constants.get(2, np.zeros(len(weight), np.float32))
            tensors = {"fc.weight": _tensor(weight), "fc.bias": _tensor(bias)}
        elif node.op == "Add" and tensors:
            tensors["fc.bias"] += _tensor(next(iter(node.constants.values()))).flatten()
        elif node.op == "Softmax" and tensors and node.output in graph.outputs:
            notes.append("the graph ends in a softmax; the network gives the logits before it")
        else:
            node.fail("a head is a mean over the map, then one linear layer; this cannot be expressed")
    if not pooled or nodes[-1].output not in graph.outputs:
        raise WeightsError("the graph does not end in a mean over the map and a linear layer")
    return tensors


def _check_pool(node: Node, graph: Graph, net: Plan, axes: tuple[int, int]) -> None:
    """Raise WeightsError unless a pool takes the mean over the whole map."""
    if node.op == "ReduceMean":
        found = tuple(int(axis) % 4 for axis in node.get("axes", node.constants.get(1, ())))
        if found != axes:
            node.fail(f"a mean over axes {found}; over the map it would be {axes}")
    elif node.op == "AveragePool":
        if min(graph.shape[2:]) < 1:
            node.fail("a fixed window over a map of any size; export with a fixed picture size, or a global mean")
        window, size = node.get("kernel_shape", ()), net.features[-1].size
        if window != size or any(node.get("pads", ())):
            node.fail(f"a window of {window} on a map of {size}; only a mean over the whole map is known")


def _classifier(node: Node) -> NDArray[Any]:
    """A linear layer's weight (classes, features)."""
    if node.get("alpha", 1.0) != 1 or node.get("beta", 1.0) != 1 or node.get("transA", 0):
        node.fail("a scaled or transposed classifier cannot be read")
    return node.weight if node.get("transB", 0) else node.weight.T


def _epsilon(node: Node) -> float:
    return round(float(node.get("epsilon", 1e-5)), 9)  # the file has it in single precision


def _tensor(array: NDArray[Any]) -> Tensor:
    """A constant as a tensor of its own, in single precision at least."""
    return torch.from_numpy(array.astype(np.float64 if array.dtype == np.float64 else np.float32))


def _graph(path: Path) -> Graph:
    """The graph in a file, its constants at the nodes that use them; raises WeightsError."""
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnx", "onnx") from error
    try:
        model = onnx.load(str(path), load_external_data=False)
        _load_external(model, path)
        constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    except FileNotFoundError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror} ({error.filename}); check the path") from error
    except WeightsError:
        raise
    except Exception as error:  # the parser and the reader of tensors raise a family of their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path} is truncated, damaged or no ONNX file ({reason})") from error
    users: dict[str, list[Node]] = {}
    for proto in model.graph.node:
        attributes = {item.name: onnx.helper.get_attribute_value(item) for item in proto.attribute}
        if proto.op_type == "Constant" and "value" in attributes:
            constants[proto.output[0]] = onnx.numpy_helper.to_array(attributes["value"])
        elif proto.op_type == "Identity" and proto.input[0] in constants:
            constants[proto.output[0]] = constants[proto.input[0]]
        else:
            inputs = tuple(name for name in proto.input if name and name not in constants)
            fixed = {place: constants[name] for place, name in enumerate(proto.input) if name in constants}
            node = Node(proto.name, proto.op_type, inputs, proto.output[0], attributes, fixed)
            for name in dict.fromkeys(inputs):
                users.setdefault(name, []).append(node)
    pictures = [value for value in model.graph.input if value.name not in constants]
    shapes = [tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in pictures]
    if len(shapes) != 1 or len(shapes[0]) != 4:
        raise WeightsError(f"{path} takes inputs of shapes {shapes}; a network of pictures takes one, (N, C, H, W)")
    return Graph(users, pictures[0].name, shapes[0], tuple(value.name for value in model.graph.output))


def _load_external(model: Any, path: Path) -> None:
    """Bring in tensors kept in files of their own; raises WeightsError for one outside the model's folder."""
    from onnx import external_data_helper

    folder = path.resolve().parent
    for tensor in model.graph.initializer:
        if external_data_helper.uses_external_data(tensor):
            location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
            if not location or not (folder / location).resolve().is_relative_to(folder):
                raise WeightsError(
                    f"{path}: tensor {tensor.name} lies outside the file's folder ({location!r}); refused"
                )
    external_data_helper.load_external_data_for_model(model, str(folder))
