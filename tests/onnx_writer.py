"""ONNX graphs of our networks, written node by node: names say nothing, and every way that exporters have is tried."""

from dataclasses import dataclass
from itertools import count, zip_longest
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from isthmus.nn.network import ResNet
from isthmus.weights.onnx.parity import onnx_outputs
from oracles import relative_error

PROJECTIONS = ("conv1", "conv3", "avg")


@dataclass(frozen=True, kw_only=True)
class Style:
    """How an exporter spells things."""

    norm: str = "node"  # or "factor": Mul and Add; "statistics": Sub, Div, Mul and Add on constants still to compute
    biased: bool = False  # a bias beside every norm, which its mean undoes
    pads: str = "attribute"  # or "node": a Pad before; "same": auto_pad
    maps: str = "first"  # or "last": between nodes, maps have their channels last
    gate: str = "conv"  # or "matmul"
    addition: str = "Add"
    opset: int = 13


class Writer:
    """Collects the nodes and constants of a graph."""

    def __init__(self, net: ResNet, style: Style):
        self.net, self.style, self.names = net, style, (f"n{number}" for number in count())
        self.state = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.bias = np.random.default_rng(0)

    def add(self, op, *inputs, **attributes):
        output = next(self.names)
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def constant(self, array):
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), next(self.names)))
        return self.constants[-1].name

    def on_map(self, op, value, *inputs, **attributes):
        """A node that wants its channels first."""
        if self.style.maps == "last":
            value = self.add("Transpose", value, perm=[0, 3, 1, 2])
        value = self.add(op, value, *inputs, **attributes)
        return self.add("Transpose", value, perm=[0, 2, 3, 1]) if self.style.maps == "last" else value

    def channels(self, array):
        """A constant of one value a channel, as it is put to a map."""
        return self.constant(array if self.style.maps == "last" else array[:, None, None])

    def padded(self, value, pads, *fill, mode="constant"):
        """A map with (top, left, bottom, right) more at its edges, as a node of its own."""
        edges = [[0, *side, 0] if self.style.maps == "last" else [0, 0, *side] for side in (pads[:2], pads[2:])]
        return self.add("Pad", value, self.constant(np.array(edges, np.int64).reshape(-1)), *fill, mode=mode)

    def conv(self, layer, name, value, norm):
        parts, bias = [self.constant(self.state[f"{name}.weight"])], self.state.get(f"{name}.bias")
        if self.style.biased and norm:
            more = self.bias.uniform(-0.1, 0.1, layer.out_channels).astype(np.float32)
            bias = more if bias is None else bias + more
            self.state[f"{norm}.running_mean"] = self.state[f"{norm}.running_mean"] + more
        if bias is not None:
            parts.append(self.constant(bias))
        attributes = {"pads": [layer.padding] * 4}
        if self.style.pads == "node" and layer.padding:
            value, attributes = self.padded(value, attributes["pads"]), {}
        elif self.style.pads == "same" and layer.stride == 1:
            attributes = {"auto_pad": "SAME_UPPER"}
        return self.on_map(
            "Conv",
            value,
            *parts,
            kernel_shape=[layer.kernel] * 2,
            strides=[layer.stride] * 2,
            dilations=[layer.dilation] * 2,
            group=layer.groups,
            **attributes,
        )

    def norm(self, name, value):
        parts = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, var = (self.state[f"{name}.{part}"] for part in parts)
        eps = self.net.spec.norm_eps
        if self.style.norm == "node":
            return self.on_map("BatchNormalization", value, *map(self.constant, (weight, bias, mean, var)), epsilon=eps)
        if self.style.norm == "factor":
            factor = weight / np.sqrt(var + eps)
            product = self.add("Mul", value, self.channels(factor))
            return self.add("Add", product, self.channels(bias - mean * factor))
        spread = self.add("Sqrt", self.add("Add", self.channels(var), self.constant(np.array(eps, np.float32))))
        value = self.add("Div", self.add("Sub", value, self.channels(mean)), spread)
        return self.add("Add", self.channels(bias), self.add("Mul", self.channels(weight), value))

    def activation(self, value):
        if self.net.spec.activation == "silu":
            return self.add("Mul", self.add("Sigmoid", value), value)
        return self.add("Relu", value)

    def gate(self, prefix, value):
        """Squeeze-and-excitation or ECA."""
        axes, last = [1, 2] if self.style.maps == "last" else [2, 3], self.style.maps == "last"
        state = {name: self.state.get(f"{prefix}se.{name}") for name in ("conv.weight", "fc1.weight", "fc2.weight")}
        if state["conv.weight"] is not None:
            row = self.add("ReduceMean", value, axes=axes, keepdims=0)
            row = self.add("Unsqueeze", row, self.constant(np.array([1])))
            pads = [state["conv.weight"].shape[-1] // 2] * 2
            row = self.add("Sigmoid", self.add("Conv", row, self.constant(state["conv.weight"]), pads=pads))
            width = len(self.state[f"{prefix}conv3.weight"])
            shape = self.constant(np.array([-1, 1, 1, width] if last else [-1, width, 1, 1]))
            return self.add("Mul", value, self.add("Reshape", row, shape))
        matmul = self.style.gate == "matmul"
        row = self.add("ReduceMean", value, axes=axes, keepdims=0 if matmul else 1)
        if last and not matmul:
            row = self.add("Transpose", row, perm=[0, 3, 1, 2])
        for name, after in (("fc1", "Relu"), ("fc2", "Sigmoid")):
            weight, bias = self.state[f"{prefix}se.{name}.weight"], self.constant(self.state[f"{prefix}se.{name}.bias"])
            if matmul:
                row = self.add("Add", self.add("MatMul", row, self.constant(weight[:, :, 0, 0].T)), bias)
            else:
                row = self.add("Conv", row, self.constant(weight), bias)
            row = self.add(after, row)
        if matmul:
            row = self.add("Unsqueeze", row, self.constant(np.array(axes)))
        elif last:
            row = self.add("Transpose", row, perm=[0, 2, 3, 1])
        return self.add("Mul", row, value)

    def pool(self, layer, value):
        window: dict[str, Any] = {"kernel_shape": [layer.kernel] * 2, "strides": [layer.stride] * 2}
        if layer.kind == "maxpool":
            pads = [0, 0, 1, 1] if layer.ceil else [layer.padding] * 4
            if self.style.pads == "node" and any(pads):
                # Zeros will do behind a ReLU, and only there.
                fill = [self.constant(np.array(-np.inf, np.float32))] if self.net.spec.preact else []
                return self.on_map("MaxPool", self.padded(value, pads, *fill), **window)
            return self.on_map("MaxPool", value, pads=pads, **window)
        if layer.stride == 1:
            value, window = self.padded(value, [0, 0, 1, 1]), window | {"count_include_pad": 1}
        return self.on_map("AveragePool", value, ceil_mode=int(layer.ceil), **window)

    def layers(self, layers, prefix, value):
        for layer, after in zip_longest(layers, layers[1:]):
            name = prefix + layer.name
            if layer.kind == "conv" and layer.domain == "map":
                value = self.conv(layer, name, value, prefix + after.name if after and after.kind == "norm" else "")
            elif layer.kind == "norm":
                value = self.norm(name, value)
            elif layer.kind == "act":
                value = self.activation(value)
            elif layer.kind == "maxpool" or (layer.kind == "avgpool" and layer.kernel > 1):
                value = self.pool(layer, value)
            elif layer.kind == "zeropad":
                value = self.padded(value, [layer.padding] * 4)
            elif layer.kind == "blur":
                kernel = np.outer([1, 2, 1], [1, 2, 1]).astype(np.float32) / 16
                weight = self.constant(np.broadcast_to(kernel, (layer.out_channels, 1, 3, 3)))
                value = self.padded(value, [1] * 4, mode="reflect")
                value = self.on_map("Conv", value, weight, strides=[layer.stride] * 2, group=layer.out_channels)
            elif layer.name in ("se.fc1", "se.conv"):
                value = self.gate(prefix, value)
        return value

    def trunk(self, value):
        value = self.layers(self.net.plan.stem, "", value)
        for block in self.net.plan.blocks:
            prefix, main, ways = f"{block.name}.", block.spec.main, [value, value]
            if self.net.spec.preact:
                active = self.layers(main[:2], prefix, value)
                ways, main = [active, active if block.spec.shortcut in PROJECTIONS else value], main[2:]
            ways = [
                self.layers(main, prefix, ways[0]),
                self.layers(block.spec.downsample, prefix, ways[1]),
            ]
            value = self.add(self.style.addition, *(ways[::-1] if block.stage % 2 else ways))
            value = value if self.net.spec.preact else self.activation(value)
        return self.layers(self.net.plan.tail, "", value)

    def head(self, value, *, pool="global", classifier="gemm", ending=""):
        if self.style.maps == "last":
            value = self.add("Transpose", value, perm=[0, 3, 1, 2])
        if pool == "global":
            value = self.add("GlobalAveragePool", value)
        elif pool == "window":
            value = self.add("AveragePool", value, kernel_shape=list(self.net.plan.features[-1].size), strides=[1, 1])
        elif pool == "mean":
            value = self.add("ReduceMean", value, axes=[-2, -1], keepdims=1)
        elif pool == "mean_last":
            value = self.add("Transpose", value, perm=[0, 2, 3, 1])
            value = self.add("ReduceMean", value, axes=[1, 2], keepdims=0)
        elif pool == "mean_flat":
            value = self.add("Reshape", value, self.constant(np.array([0, 0, -1])))
            value = self.add("ReduceMean", value, axes=[2], keepdims=0)
        weight = self.state.get("fc.weight")
        if classifier == "conv":
            bias = self.constant(self.state["fc.bias"])
            value = self.add("Conv", value, self.constant(weight[:, :, None, None]), bias)
        value = self.add("Flatten", value)
        if not self.net.spec.num_classes or classifier == "conv":
            return value
        bias = self.constant(self.state["fc.bias"])
        if classifier == "gemm":
            value = self.add("Gemm", value, self.constant(weight), bias, transB=1)
        elif classifier == "gemm_plain":
            value = self.add("Gemm", value, self.constant(weight.T), bias)
        else:
            value = self.add("Add", bias, self.add("MatMul", value, self.constant(weight.T)))
        return self.add(ending, value) if ending else value

    def model(self, output, shape):
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info("picture", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.style.opset)], ir_version=8)


def write_graph(path, net, *, style=Style(), channels_last=False, any_size=False, **head):
    """Write the ONNX graph of a network that evaluates."""
    writer = Writer(net, style)
    size: list[Any] = ["h", "w"] if any_size else list(net.plan.image_size)
    value, shape = "picture", ["n", net.spec.in_channels, *size]
    if channels_last:
        shape = ["n", *size, net.spec.in_channels]
        value = writer.add("Transpose", value, perm=[0, 3, 1, 2])
    if style.maps == "last":
        value = writer.add("Transpose", value, perm=[0, 2, 3, 1])
    output = writer.head(writer.trunk(value), **head)
    onnx.save(writer.model(output, shape), str(path))
    return path


def onnx_parity(path, net):
    """How far a network in evaluation is from what ONNX Runtime computes of a graph, for a few fixed pictures."""
    return relative_error(*onnx_outputs(path, net))
