"""ONNX graphs of our networks, written node by node: names say nothing, and every way that exporters have is tried."""

from itertools import count
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from isthmus.nn.network import ResNet


class Writer:
    """Collects the nodes and constants of a graph."""

    def __init__(self, net: ResNet):
        self.net, self.names = net, (f"n{number}" for number in count())
        self.state = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, op, *inputs, **attributes):
        output = next(self.names)
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def constant(self, array):
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), next(self.names)))
        return self.constants[-1].name

    def layers(self, layers, prefix, value):
        for layer in layers:
            name = prefix + layer.name
            if layer.kind == "conv":
                parts = [self.constant(self.state[f"{name}.weight"])]
                if layer.bias:
                    parts.append(self.constant(self.state[f"{name}.bias"]))
                value = self.add(
                    "Conv",
                    value,
                    *parts,
                    kernel_shape=[layer.kernel] * 2,
                    strides=[layer.stride] * 2,
                    pads=[layer.padding] * 4,
                    dilations=[layer.dilation] * 2,
                    group=layer.groups,
                )
            elif layer.kind == "norm":
                names = ("weight", "bias", "running_mean", "running_var")
                parts = [self.constant(self.state[f"{name}.{part}"]) for part in names]
                value = self.add("BatchNormalization", value, *parts, epsilon=self.net.spec.norm_eps)
            elif layer.kind == "act":
                value = self.add("Relu", value)
            elif layer.kind == "maxpool":
                pads = [0, 0, 1, 1] if layer.ceil else [layer.padding] * 4
                value = self.add("MaxPool", value, kernel_shape=[3, 3], strides=[2, 2], pads=pads)
            elif layer.kind == "avgpool" and layer.kernel > 1:
                value = self.add("AveragePool", value, kernel_shape=[2, 2], strides=[layer.stride] * 2, ceil_mode=1)
        return value

    def trunk(self, value):
        value = self.layers(self.net.plan.stem, "", value)
        for block in self.net.plan.blocks:
            main = self.layers(block.spec.main, f"{block.name}.", value)
            way = self.layers(block.spec.downsample, f"{block.name}.", value)
            value = self.add("Relu", self.add("Add", *((way, main) if block.stage % 2 else (main, way))))
        return value

    def head(self, value, *, pool="global", classifier="gemm", softmax=False):
        if pool == "global":
            value = self.add("GlobalAveragePool", value)
        elif pool == "window":
            value = self.add("AveragePool", value, kernel_shape=list(self.net.plan.features[-1].size), strides=[1, 1])
        elif pool == "mean":
            value = self.add("ReduceMean", value, axes=[-2, -1], keepdims=1)
        elif pool == "mean_last":
            value = self.add("Transpose", value, perm=[0, 2, 3, 1])
            value = self.add("ReduceMean", value, axes=[1, 2], keepdims=0)
        value = self.add("Flatten", value)
        if not self.net.spec.num_classes:
            return value
        weight, bias = self.state["fc.weight"], self.constant(self.state["fc.bias"])
        if classifier == "gemm":
            value = self.add("Gemm", value, self.constant(weight), bias, transB=1)
        elif classifier == "gemm_plain":
            value = self.add("Gemm", value, self.constant(weight.T), bias)
        else:
            value = self.add("Add", bias, self.add("MatMul", value, self.constant(weight.T)))
        return self.add("Softmax", value) if softmax else value

    def model(self, output, shape):
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info("picture", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def write_graph(path, net, *, channels_last=False, any_size=False, **head):
    """Write the ONNX graph of a network that evaluates."""
    writer = Writer(net)
    size: list[Any] = ["h", "w"] if any_size else list(net.plan.image_size)
    value, shape = "picture", ["n", net.spec.in_channels, *size]
    if channels_last:
        value, shape = writer.add("Transpose", value, perm=[0, 3, 1, 2]), ["n", *size, net.spec.in_channels]
    output = writer.head(writer.trunk(value), **head)
    onnx.save(writer.model(output, shape), str(path))
    return path
