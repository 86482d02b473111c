"""An ONNX graph of a residual network to a NetSpec and its tensors, read by structure and never by the nodes' names.

From the picture on, the stem is the chain of nodes up to the first value that two nodes use. There a block begins; it
ends in the Add where its main path and its shortcut meet. After the last block comes the head. The spec found is then
planned, and every node is laid beside its layer of the plan: what the plan cannot say is an error naming the node.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus.arch.block import Layer, Shortcut
from isthmus.arch.plan import plan
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


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxNetwork:
    """A network read from an ONNX graph: its tensors under our names, and notes on what the graph does otherwise."""

    spec: NetSpec
    tensors: dict[str, Tensor]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """One operation of a graph; `inputs` without the constants, which are in `constants` by position."""

    name: str
    op: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any]
    constants: dict[int, NDArray[Any]]

    def fail(self, reason: str) -> NoReturn:
        """Raise WeightsError naming this node."""
        raise WeightsError(f"ONNX node {self.name or self.output!r} ({self.op}): {reason}")

    @property
    def joins(self) -> bool:
        """Whether this is the addition of two computed values, which ends a block."""
        return self.op == "Add" and len(self.inputs) == 2

    @property
    def weight(self) -> NDArray[Any]:
        """The constant that a convolution or a classifier multiplies with."""
        if 1 not in self.constants:
            self.fail("its weight is computed, and only a constant can be read")
        return self.constants[1]

    def sizes(self, name: str, default: int) -> tuple[int, ...]:
        """An attribute with one number per dimension (two for pads)."""
        return tuple(self.attributes.get(name, [default] * (4 if name == "pads" else 2)))


@dataclass(frozen=True, slots=True)
class Graph:
    """The nodes that read each value, the name of the picture with its shape (0: any), and the outputs' names."""

    users: dict[str, list[Node]]
    input: str
    input_shape: tuple[int, ...]
    outputs: tuple[str, ...]

    def chain(self, value: str) -> list[Node]:
        """The nodes that follow one another from `value` on, up to a branch, an addition of two values, or the end."""
        nodes: list[Node] = []
        while len(users := self.users.get(value, [])) == 1 and not users[0].joins:
            nodes.append(users[0])
            value = users[0].output
        return nodes


@dataclass(frozen=True, slots=True)
class Block:
    """A residual block in the graph: main path, shortcut, their addition, and the activation after it."""

    main: list[Node]
    shortcut: list[Node]
    add: Node
    act: Node

    @property
    def convs(self) -> list[Node]:
        """The convolutions of the main path."""
        return [node for node in self.main if node.op == "Conv"]

    @property
    def stride(self) -> int:
        """The product of the main path's strides."""
        return int(np.prod([conv.sizes("strides", 1)[0] for conv in self.convs]))

    @property
    def row(self) -> StageSpec:
        """This block as a stage of its own."""
        widths = [conv.weight.shape[0] for conv in self.convs]
        if len(widths) not in (2, 3):
            self.add.fail(
                f"the block that ends here has {len(widths)} convolutions; a basic block has 2, a bottleneck 3"
            )
        spatial = self.convs[-2 if len(widths) == 3 else -1]
        first = self.convs[-2].sizes("dilations", 1)[0]
        dilation = spatial.sizes("dilations", 1)[0]
        try:
            return StageSpec(
                depth=1,
                block="bottleneck" if len(widths) == 3 else "basic",
                mid=widths[-2],
                out=widths[-1],
                reduce=widths[0] if widths[0] != widths[-2] else 0,
                stride=self.stride,
                groups=self.convs[-2].attributes.get("group", 1),
                dilation=dilation,
                first_dilation=first if first != dilation else 0,
            )
        except SpecError as error:
            self.add.fail(f"the block that ends here cannot be built: {error}")


@dataclass(slots=True)
class Reader:
    """Lays nodes beside the layers of a plan and collects the tensors."""

    eps: float
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def take(self, nodes: Sequence[Node], layers: Sequence[Layer], prefix: str, end: Node) -> None:
        """Read a chain of nodes as a chain of layers; raises WeightsError at the first that differs."""
        layers = [layer for layer in layers if not (layer.kind == "avgpool" and layer.kernel == 1)]
        for node, layer in zip(nodes, layers, strict=False):
            if node.op != OPERATIONS.get(layer.kind):
                node.fail(f"{OPERATIONS.get(layer.kind, layer.kind)} was expected here, as layer {prefix}{layer.name}")
            self.take_layer(node, layer, prefix + layer.name)
        if len(nodes) != len(layers):
            culprit = nodes[len(layers)] if len(nodes) > len(layers) else end
            culprit.fail(f"{len(nodes)} nodes stand where {len(layers)} layers {prefix}* were expected")

    def take_layer(self, node: Node, layer: Layer, name: str) -> None:
        if layer.kind in ("maxpool", "avgpool"):
            size, stride = node.sizes("kernel_shape", 1), node.sizes("strides", 1)
            if size != (layer.kernel,) * 2 or stride != (layer.stride,) * 2:
                node.fail(f"kernel {size} and stride {stride}; layer {name} has {layer.kernel} and {layer.stride}")
        elif layer.kind == "conv":
            self.take_conv(node, layer, name)
        elif layer.kind == "norm":
            if abs(node.attributes.get("epsilon", 1e-5) - self.eps) > 1e-9 or set(node.constants) != {1, 2, 3, 4}:
                node.fail(f"its statistics must be constants and its epsilon {self.eps}, as in the first norm")
            for position, part in enumerate(("weight", "bias", "running_mean", "running_var"), 1):
                self.tensors[f"{name}.{part}"] = as_tensor(node.constants[position])
            self.tensors[f"{name}.num_batches_tracked"] = torch.tensor(0)

    def take_conv(self, node: Node, layer: Layer, name: str) -> None:
        if node.attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID") and layer.kernel > 1:
            node.fail("automatic padding depends on the picture's size; export with explicit pads")
        found = {
            "weight shape": node.weight.shape,
            "strides": node.sizes("strides", 1),
            "pads": node.sizes("pads", 0),
            "dilations": node.sizes("dilations", 1),
            "group": node.attributes.get("group", 1),
        }
        wanted = {
            "weight shape": (layer.out_channels, layer.in_channels // layer.groups, layer.kernel, layer.kernel),
            "strides": (layer.stride,) * 2,
            "pads": (layer.padding,) * 4,
            "dilations": (layer.dilation,) * 2,
            "group": layer.groups,
        }
        for fact, value in wanted.items():
            if found[fact] != value:
                node.fail(f"{fact} {found[fact]}; as layer {name} it would be {value}, and no other can be built")
        self.tensors[f"{name}.weight"] = as_tensor(node.weight)
        if layer.bias:
            bias = node.constants.get(2)
            self.tensors[f"{name}.bias"] = torch.zeros(layer.out_channels) if bias is None else as_tensor(bias)
        elif 2 in node.constants:
            node.fail("it has a bias and a norm after it; fold the norm into the convolution first")


def read_onnx(path: Path | str) -> OnnxNetwork:
    """The residual network in an ONNX file; raises WeightsError naming the node that cannot be expressed."""
    graph = _graph(Path(path))
    notes: list[str] = []
    nodes = graph.chain(graph.input)
    if nodes and nodes[0].op == "Transpose" and nodes[0].attributes.get("perm") == [0, 3, 1, 2]:
        notes.append("the graph takes pictures as (N, H, W, C); the network takes (N, C, H, W)")
        graph = replace(graph, input_shape=tuple(graph.input_shape[i] for i in (0, 3, 1, 2)))
        del nodes[0]
    if not nodes or nodes[-1].output not in graph.users:
        raise WeightsError(f"{path} holds no residual network: no value in its graph takes two ways")
    blocks, value = _blocks(graph, nodes[-1].output)
    head = graph.chain(value)
    every = [*nodes, *(node for block in blocks for node in (*block.main, *block.shortcut))]
    norm = next((node for node in every if node.op == "BatchNormalization"), None)
    # ONNX keeps epsilon in single precision.
    eps = round(norm.attributes.get("epsilon", 1e-5), 9) if norm else 1e-5
    if norm is None:
        notes.append("norms were already folded into the convolutions, so the network has none")
    classifier = [node for node in head if node.op in ("Gemm", "MatMul")]
    spec = _spec(nodes, blocks, name=Path(path).stem, norm="batch" if norm else "none", norm_eps=eps)
    reader = Reader(eps)
    tensors = _head(head, graph, replace(spec, num_classes=0), notes)
    spec = replace(spec, num_classes=len(tensors["fc.bias"]) if classifier else 0)
    net = plan(spec, 224)
    reader.take(nodes, net.stem, "", blocks[0].add)
    for block, planned in zip(blocks, net.blocks, strict=True):
        reader.take(block.main, planned.spec.main, f"{planned.name}.", block.add)
        reader.take(block.shortcut, planned.spec.downsample, f"{planned.name}.", block.add)
    return OnnxNetwork(spec=spec, tensors=reader.tensors | tensors, notes=tuple(notes))


def as_tensor(array: NDArray[Any]) -> Tensor:
    """A constant as a tensor of its own, in single precision at least."""
    return torch.from_numpy(array.astype(np.float64 if array.dtype == np.float64 else np.float32))


def _blocks(graph: Graph, value: str) -> tuple[list[Block], str]:
    """The residual blocks from `value` on, and the value after the last."""
    blocks: list[Block] = []
    while len(starts := graph.users.get(value, [])) > 1:
        ways = [[] if start.joins else [start, *graph.chain(start.output)] for start in starts]
        ends = [
            graph.users.get(way[-1].output, []) if way else [start] for way, start in zip(ways, starts, strict=True)
        ]
        for start, end in zip(starts, ends, strict=True):
            if len(starts) != 2 or len(end) != 1 or end[0] is not ends[0][0]:
                start.fail("from here the ways do not meet in one addition, as in a residual block")
        shortcut, main = sorted(ways, key=lambda way: sum(node.op == "Conv" for node in way))
        add = ends[0][0]
        after = graph.users.get(add.output, [])
        if len(after) != 1 or after[0].op != "Relu":
            add.fail("a ReLU must follow the addition; other activations and pre-activation graphs cannot be read yet")
        blocks.append(Block(main, shortcut, add, after[0]))
        value = after[0].output
    return blocks, value


def _spec(stem: list[Node], blocks: list[Block], **network: Any) -> NetSpec:
    """The spec that the graph's convolutions suggest; laying the plan beside the graph proves or refutes it."""
    convs = [node for node in stem if node.op == "Conv"]
    if not convs:
        stem[0].fail("the network begins with it; a convolution was expected, and preprocessing belongs outside")
    pools = [node for node in stem if node.op == "MaxPool"]
    pool = "none"
    if pools:
        pads: dict[tuple[int, ...], str] = {(1, 1, 1, 1): "max", (0, 0, 1, 1): "max_ceil"}
        pads |= {(0, 0, 0, 0): "max_ceil"} if pools[0].attributes.get("ceil_mode") else {}
        pool = pads.get(pools[0].sizes("pads", 0), "")
        if not pool or pools[0].attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
            pools[0].fail("its pads fit neither of the stem pools max and max_ceil")
    elif len(convs) == 4:
        pool = "conv"
    stages: list[StageSpec] = []
    for block in blocks:
        row = block.row
        # The first block may differ in stride and dilation from the others, and a stride begins a stage.
        like = stages and replace(
            stages[-1], depth=1, stride=1, dilation=row.dilation, first_dilation=row.first_dilation
        )
        if like == row:
            last = stages[-1]
            first = last.first_dilation or last.dilation
            first = first if first != row.dilation else 0
            stages[-1] = replace(last, depth=last.depth + 1, dilation=row.dilation, first_dilation=first)
        else:
            stages.append(row)
    shortcuts = [node for block in blocks for node in block.shortcut]
    kind: Shortcut = "conv1"
    if any(node.op == "AveragePool" for node in shortcuts):
        kind = "avg"
    elif any(node.op == "Conv" and node.weight.shape[-1] == 3 for node in shortcuts):
        kind = "conv3"
    early = any(block.convs[0].sizes("strides", 1)[0] > 1 for block in blocks if block.row.block == "bottleneck")
    widths = tuple(conv.weight.shape[0] for conv in convs[: 3 if pool == "conv" else None])
    try:
        return NetSpec(
            stem=StemSpec(
                widths=widths,
                kernel=convs[0].weight.shape[-1],
                stride=convs[0].sizes("strides", 1)[0],
                pool=pool,  # type: ignore[arg-type]
            ),
            stages=tuple(stages),
            shortcut=kind,
            stride_at="conv1" if early else "conv2",
            in_channels=convs[0].weight.shape[1],
            **network,
        )
    except SpecError as error:
        raise WeightsError(f"the graph's network cannot be built: {error}") from error


def _head(nodes: list[Node], graph: Graph, spec: NetSpec, notes: list[str]) -> dict[str, Tensor]:
    """The classifier's tensors; raises WeightsError unless the head is a mean over the map and one linear layer."""
    tensors: dict[str, Tensor] = {}
    axes, pooled = (2, 3), False
    for node in nodes:
        if node.op == "Transpose" and not pooled and node.attributes.get("perm") == [0, 2, 3, 1]:
            axes = (1, 2)
        elif node.op in SHAPE_ONLY and pooled:
            continue
        elif node.op in ("GlobalAveragePool", "AveragePool", "ReduceMean") and not pooled:
            pooled = _pools_all(node, graph, spec, axes)
        elif node.op in ("Gemm", "MatMul") and pooled and not tensors:
            facts = node.attributes
            if facts.get("alpha", 1.0) != 1 or facts.get("beta", 1.0) != 1 or facts.get("transA", 0):
                node.fail("a scaled or transposed classifier cannot be read")
            weight = as_tensor(node.weight if facts.get("transB") else node.weight.T)
            bias = node.constants.get(2)
            tensors["fc.weight"] = weight
            tensors["fc.bias"] = torch.zeros(len(weight)) if bias is None else as_tensor(bias)
        elif node.op == "Add" and tensors:
            tensors["fc.bias"] = tensors["fc.bias"] + as_tensor(next(iter(node.constants.values()))).flatten()
        elif node.op == "Softmax" and tensors and node.output in graph.outputs:
            notes.append("the graph ends in a softmax; the network gives the logits before it")
        else:
            node.fail("a head is a mean over the map, then one linear layer; this cannot be expressed")
    if not pooled or nodes[-1].output not in graph.outputs:
        raise WeightsError("the graph does not end in a mean over the map and a linear layer")
    return tensors


def _pools_all(node: Node, graph: Graph, spec: NetSpec, axes: tuple[int, int]) -> bool:
    """True for a mean over the whole map; anything else is an error."""
    if node.op == "ReduceMean":
        found = node.attributes.get("axes", node.constants.get(1, np.array([])))
        if tuple(int(axis) % 4 for axis in found) != axes:
            node.fail(f"a mean over axes {tuple(found)}; over the map it would be {axes}")
    elif node.op == "AveragePool":
        size = graph.input_shape[-2:]
        if min(size) < 1:
            node.fail("a fixed window over a map of any size; export with a fixed picture size, or a global mean")
        last = plan(spec, size).features[-1].size
        if node.sizes("kernel_shape", 1) != last or node.sizes("pads", 0) != (0, 0, 0, 0):
            node.fail(
                f"a window of {node.sizes('kernel_shape', 1)} on a map of {last}; only a mean over the whole is known"
            )
    return True


def _graph(path: Path) -> Graph:
    """The graph in a file, its constants at the nodes that use them; raises WeightsError."""
    try:
        import onnx
        from onnx import numpy_helper
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnx", "onnx") from error
    try:
        model = onnx.load(str(path), load_external_data=False)
        _load_external(model, path)
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
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
            constants[proto.output[0]] = numpy_helper.to_array(attributes["value"])
        elif proto.op_type == "Identity" and proto.input[0] in constants:
            constants[proto.output[0]] = constants[proto.input[0]]
        else:
            node = Node(
                name=proto.name,
                op=proto.op_type,
                inputs=tuple(name for name in proto.input if name and name not in constants),
                output=proto.output[0],
                attributes=attributes,
                constants={place: constants[name] for place, name in enumerate(proto.input) if name in constants},
            )
            for name in dict.fromkeys(node.inputs):
                users.setdefault(name, []).append(node)
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1:
        raise WeightsError(f"{path} takes {len(inputs)} inputs; a network of pictures takes one")
    shape = tuple(dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim)
    if len(shape) != 4:
        raise WeightsError(f"{path} takes an input of {len(shape)} dimensions; pictures have four (N, C, H, W)")
    outputs = tuple(value.name for value in model.graph.output)
    return Graph(users=users, input=inputs[0].name, input_shape=shape, outputs=outputs)


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
