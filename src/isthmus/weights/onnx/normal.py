"""An ONNX graph in one normal form, whatever exporter wrote it.

Every value is an operation of the normal form seen through its axes: a map with N, C, H and W, or after a pool over the
whole map a row with N and C. What only moves axes (transposes, reshapes, and the shapes computed for them) changes how
an operation is seen and makes none. Factors and terms per channel become one `norm`, pads join what they pad, and
gates of channels become one operation. Nodes are read once, each behind those it reads, which a cycle cannot be.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from isthmus.errors import WeightsError
from isthmus.weights.onnx import axes as axis_nodes
from isthmus.weights.onnx.file import Array, Graph, Node
from isthmus.weights.onnx.fold import Folder, argument, axis_of, sizes
from isthmus.weights.onnx.op import AREA, MAP, ONE, ROW, WIDE, Call, Kind, Op, Size, Value, Window

__all__ = ["Normal", "normal_form"]

GATES = {("linear", "act", "linear", "sigmoid"): "se", ("eca", "sigmoid"): "eca"}
BLUR = np.outer((1, 2, 1), (1, 2, 1)) / 16  # Zhang 2019


@dataclass(frozen=True, slots=True, kw_only=True)
class Normal:
    """The picture, the operation that ends the graph, and how the picture enters it."""

    start: Op
    end: Op
    channels_last: bool
    shape: tuple[Size, ...]


def normal_form(graph: Graph) -> Normal:
    """The graph's operations in normal form; raises WeightsError naming the first node that has no place in it."""
    last = _channels_last(graph)
    batch, *rest = graph.shape
    channels, *size = [rest[2], rest[0], rest[1]] if last else rest
    source = Node(graph.input, "input", (), (graph.input,), {})
    if not isinstance(channels, int):
        source.fail("its number of channels is not fixed")
    first = Op(kind="input", node=source, channels=channels, size=(size[0], size[1]))
    values: dict[str, Value | Array] = {**graph.constants}
    values[graph.input] = Value(first, ("N", "H", "W", "C") if last else MAP)
    fold = Folder(graph.constants)
    with np.errstate(all="ignore"):
        for node in graph.nodes:
            if missing := [name for name in node.inputs if name and name not in values]:
                node.fail(f"no node makes its input {missing[0]!r}, or only one that needs it")
            if not node.outputs or node.outputs[0] in values:
                node.fail("what it makes is there already, or has no name")
            args = [values[name] if name else None for name in node.inputs]
            try:
                values[node.outputs[0]] = _result(Call(node, args, batch), fold)
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                node.fail(f"its inputs or attributes do not fit it ({error or type(error).__name__})")
    found = values.get(graph.outputs[0])
    if not isinstance(found, Value):
        raise WeightsError(f"no node of the graph makes its output {graph.outputs[0]!r}")
    end = axis_nodes.row(found)
    if tuple(axis for axis in end.axes if axis != ONE) != ROW:
        end.op.node.fail(f"the graph ends with axes {', '.join(end.axes)}; logits (N, classes) were expected")
    return Normal(start=first, end=end.op, channels_last=last, shape=graph.shape)


def _channels_last(graph: Graph) -> bool:
    """Whether the picture comes as (N, H, W, C): the first transpose that it meets says so."""
    names = {graph.input}
    for node in graph.nodes:
        if names.isdisjoint(node.inputs[:1]):
            continue
        if node.op == "Transpose":
            return node.get("perm", ()) == (0, 3, 1, 2)
        if node.op in ("Identity", "Cast", "Pad"):
            names.update(node.outputs)
    return False


def _result(call: Call, fold: Folder) -> Value | Array:
    node, args = call.node, call.args
    if node.op == "Shape" and isinstance(args[0], Value):
        return sizes(node, call.sizes(args[0]))
    if all(isinstance(arg, np.ndarray) for arg in args if arg is not None):
        return fold(node, args)
    if node.op not in OPERATIONS:
        node.fail("this operation has no place in a network of this family that can be built")
    return OPERATIONS[node.op](call)


# Convolutions, linear layers and pools


def _conv(call: Call) -> Value:
    node, value, weight = call.node, call.value(), call.constant(1, "weight")
    constants = {"weight": weight}
    if call.has(2) and (bias := _vector(call, 2, len(weight))).any():  # some exporters write a bias of zeros
        constants["bias"] = bias
    if not weight.size or node.get("kernel_shape", weight.shape[2:]) != weight.shape[2:]:
        node.fail(f"its weight has shape {weight.shape} and its kernel_shape is another, or nothing")
    if weight.ndim == 3:
        return _conv_over_channels(call, constants)
    if value.op.pooled:
        plain = value.axes == (*ROW, ONE, ONE) and weight.ndim == 4
        if not plain or _window(node, weight.shape[2:], (1, 1)) != Window():
            node.fail("a convolution of a pooled map must be a plain 1×1")
        return Value(_linear(node, value.op, constants | {"weight": weight[:, :, 0, 0]}), value.axes)
    op = call.map()
    if weight.ndim != 4:
        node.fail(f"its weight has shape {weight.shape}; that of a map has four dimensions")
    window = _window(node, weight.shape[2:], op.size)
    if op.kind == "reflectpad":
        return _blur(node, op, window, weight)
    if op.kind == "zeropad":
        op, window = _joined(op, window)
    if weight.shape[1] * window.groups != op.channels or len(weight) % window.groups:
        node.fail(f"its weight has shape {weight.shape} in {window.groups} groups; it reads {op.channels} channels")
    return _slid("conv", node, op, window, channels=len(weight), constants=constants)


def _conv_over_channels(call: Call, constants: dict[str, Array]) -> Value:
    """The convolution of ECA (Wang et al. 2019), which slides over the channels of a pooled map."""
    node, value = call.node, call.value()
    kernel = constants["weight"].shape[-1]
    pads = node.get("pads", (0, 0))
    found = constants["weight"].shape[:2], pads, node.get("strides", (1,)), node.get("dilations", (1,))
    if value.axes != ("N", ONE, "C") or found != ((1, 1), (kernel // 2,) * 2, (1,), (1,)) or len(constants) > 1:
        node.fail("a one-dimensional convolution must be channel attention's: one filter over all channels")
    return Value(value.op.then("eca", node, constants=constants), value.axes)


def _blur(node: Node, op: Op, window: Window, weight: Array) -> Value:
    """A convolution behind reflection, which can only be the low-pass filter of anti-aliasing."""
    fixed = weight.shape == (op.channels, 1, 3, 3) and np.allclose(weight[:, 0], BLUR, atol=1e-6)
    if not fixed or any(window.pads) or op.window.pads != (1, 1, 1, 1):
        node.fail("only the 3×3 low-pass filter of anti-aliasing may stand behind a pad by reflection")
    op, window = _joined(op, window)
    return _slid("blur", node, op, window)


def _linear(node: Node, op: Op, constants: dict[str, Array]) -> Op:
    weight = constants["weight"]
    if not op.pooled or weight.ndim != 2 or not weight.size or weight.shape[1] != op.channels:
        node.fail(f"its weight has shape {weight.shape}; it must multiply {op.channels} pooled channels")
    return op.then("linear", node, channels=len(weight), constants=constants)


def _gemm(call: Call) -> Value:
    node, value, weight = call.node, axis_nodes.row(call.value()), call.constant(1, "weight")
    if node.get("alpha", 1.0) != 1 or node.get("beta", 1.0) != 1 or node.get("transA", 0):
        node.fail("a scaled or transposed classifier cannot be read")
    if value.axes != ROW:
        node.fail(f"it reads axes {', '.join(value.axes)}; a pooled map (N, C) was expected")
    weight = weight if node.get("transB", 0) else weight.T
    bias = {"bias": _vector(call, 2, len(weight))} if call.has(2) else {}
    return Value(_linear(node, value.op, {"weight": weight, **bias}), ROW)


def _matmul(call: Call) -> Value:
    value = axis_nodes.row(call.value())
    if value.axes[0] != "N" or value.axes[-1] != "C":
        call.node.fail(f"it multiplies the last of the axes {', '.join(value.axes)}, which must be C")
    return Value(_linear(call.node, value.op, {"weight": call.constant(1, "weight").T}), value.axes)


def _max_pool(call: Call) -> Value:
    node, op = call.node, call.map()
    window = _window(node, node.get("kernel_shape", ()), op.size)
    # Behind a ReLU nothing is below zero, so zeros never win and such a pad is a pad by minus infinity.
    if op.kind == "lowpad" or (op.kind == "zeropad" and op.inputs[0].kind == "act"):
        op, window = _joined(op, window)
    return _slid("maxpool", node, op, window)


def _average_pool(call: Call) -> Value:
    node, op = call.node, call.map()
    window = _window(node, node.get("kernel_shape", ()), op.size)
    window = replace(window, counts_pads=bool(node.get("count_include_pad", 0)))
    if op.kind == "zeropad" and not any(window.pads):
        op, window = _joined(op, replace(window, counts_pads=True))
    return _slid("avgpool", node, op, window)


def _global_pool(call: Call) -> Value:
    return Value(call.map().then("pool", call.node, pooled=True), (*ROW, ONE, ONE))


def _reduce_mean(call: Call) -> Value:
    node, value = call.node, call.value()
    axes = argument(node, call.args, "axes", 1) or ()
    places = {axis_of(axis, len(value.axes), node) for axis in axes}
    if {value.axes[place] for place in places} not in ({"H", "W"}, {AREA}):
        node.fail(f"a mean over axes {axes}; over the map it would be those of H and W")
    kept = (ONE,) if node.get("keepdims", 1) else ()
    seen = [kept if place in places else (axis,) for place, axis in enumerate(value.axes)]
    return Value(value.op.then("pool", node, pooled=True), tuple(axis for part in seen for axis in part))


def _window(node: Node, kernel: tuple[int, ...], size: tuple[Size, Size]) -> Window:
    """What a node says of its sliding, with automatic pads worked out."""
    window = Window(
        kernel=kernel,
        strides=node.get("strides", (1, 1)),
        pads=node.get("pads", (0, 0, 0, 0)),
        dilations=node.get("dilations", (1, 1)),
        groups=node.get("group", 1),
        ceil=bool(node.get("ceil_mode", 0)),
    )
    lengths = [len(part) for part in (window.kernel, window.strides, window.dilations, window.pads)]
    least = min((*window.kernel, *window.strides, *window.dilations, window.groups), default=0)
    if lengths != [2, 2, 2, 4] or least < 1 or min(window.pads) < 0:
        node.fail("kernel, strides, dilations or pads are none of a window on a map")
    for name, (first, second) in {"strides": window.strides, "dilations": window.dilations}.items():
        if first != second:
            node.fail(f"its {name} {first} and {second} differ; no layer that can be built has such")
    automatic = node.get("auto_pad", "NOTSET")
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        totals = [_same(node, window, axis, size[axis]) for axis in (0, 1)]
        less, more = [total // 2 for total in totals], [total - total // 2 for total in totals]
        window = replace(window, pads=(*less, *more) if automatic == "SAME_UPPER" else (*more, *less), ceil=False)
    elif automatic == "VALID":
        window = replace(window, pads=(0, 0, 0, 0))
    return window


def _same(node: Node, window: Window, axis: int, size: Size) -> int:
    """Pads of an axis, both sides together, that make ceil(size / stride) of it."""
    reach, stride = window.dilations[axis] * (window.kernel[axis] - 1) + 1, window.strides[axis]
    if stride == 1 or reach == 1:
        return reach - 1
    if isinstance(size, str):
        node.fail("automatic padding depends on the picture's size; export with explicit pads or a fixed size")
    return max((-(-size // stride) - 1) * stride + reach - size, 0)


def _joined(pad: Op, window: Window) -> tuple[Op, Window]:
    """What a pad reads, and a window that pads by itself."""
    pads = tuple(first + second for first, second in zip(pad.window.pads, window.pads, strict=True))
    return pad.inputs[0], replace(window, pads=pads)


def _slid(kind: Kind, node: Node, op: Op, window: Window, **changes: Any) -> Value:
    size = window.out_size(op.size)
    if any(isinstance(side, int) and side < 1 for side in size):
        node.fail(f"nothing is left of a map of {op.size}")
    return Value(op.then(kind, node, size=size, window=window, **changes), MAP)


# Factors, terms, activations, gates and the addition of two ways


def _vector(call: Call, place: int, channels: int) -> Array:
    """A constant of one value a channel."""
    found = call.constant(place, f"input {place}")
    if found.shape != (channels,):
        call.node.fail(f"its input {place} has shape {found.shape}; {channels} values were expected")
    return found


def _batch_norm(call: Call) -> Value:
    node, value = call.node, call.value()
    if node.get("training_mode", 0) or not node.get("spatial", 1):
        node.fail("it normalises by its batch; export the network in evaluation mode")
    if value.axes[1:2] != ("C",):
        node.fail(f"it reads axes {', '.join(value.axes)}; the second must be C")
    names = ("weight", "bias", "running_mean", "running_var")
    constants = {name: _vector(call, place, value.op.channels) for place, name in enumerate(names, 1)}
    eps = float(str(np.float32(node.get("epsilon", 1e-5))))  # as it was before it became single precision
    if value.op.kind == "norm":
        scale = constants["weight"] / np.sqrt(constants["running_var"].astype(np.float64) + eps)
        return _affine(node, value, scale, constants["bias"] - constants["running_mean"] * scale)
    return replace(value, op=value.op.then("norm", node, constants=constants, eps=eps))


def _affine(node: Node, value: Value, scale: Array, shift: Array) -> Value:
    """A factor and a term per channel: joined to a norm before them, a bias, or a norm of their own."""
    op = value.op
    if op.kind == "input":
        node.fail("the network begins with it; a convolution was expected, and preprocessing belongs outside")
    if op.kind == "norm":
        joined = {"weight": op.weight * scale, "bias": op.constants["bias"] * scale + shift}
        return replace(value, op=replace(op, constants=op.constants | joined))
    if op.kind in ("conv", "linear") and (scale == 1).all():
        bias = op.constants.get("bias", np.zeros(op.channels)) + shift
        return replace(value, op=replace(op, constants=op.constants | {"bias": bias}))
    return replace(value, op=op.then("norm", node, constants={"weight": scale, "bias": shift}))


def _per_channel(call: Call, value: Value, constant: Array) -> Array:
    """A constant that is put to a value, as one number a channel."""
    axes = value.axes[-constant.ndim :] if constant.ndim else ()
    wide = [axis for axis, count in zip(axes, constant.shape, strict=False) if count != 1]
    if constant.ndim > len(value.axes) or wide not in ([], ["C"]) or constant.size not in (1, value.op.channels):
        call.node.fail(
            f"a constant of shape {constant.shape} on axes {', '.join(value.axes)}; one value a channel was expected"
        )
    return np.broadcast_to(constant.reshape(-1).astype(np.float64), (value.op.channels,))


def _arithmetic(call: Call) -> Value:
    """Add, Sum, Sub, Mul and Div of a value and a constant, or of two values."""
    node = call.node
    if len(call.args) != 2 or any(arg is None for arg in call.args):
        node.fail("it must have two inputs")
    first, second = call.args
    if isinstance(first, Value) and isinstance(second, Value):
        return _together(node, first, second)
    value, constant = (first, second) if isinstance(first, Value) else (second, first)
    if value.op.kind == "input":
        return _affine(node, value, np.ones(1), np.zeros(1))
    number = _per_channel(call, value, constant)
    one, none = np.ones_like(number), np.zeros_like(number)
    if node.op in ("Add", "Sum"):
        return _affine(node, value, one, number)
    if node.op == "Mul":
        return _affine(node, value, number, none)
    if node.op == "Sub":
        return _affine(node, value, one, -number) if value is first else _affine(node, value, -one, number)
    return _affine(node, value, one / number, none) if value is first else node.fail("it divides by a computed value")


def _together(node: Node, first: Value, second: Value) -> Value:
    ops = (first.op, second.op)
    if node.op in ("Add", "Sum"):
        if first.axes != second.axes or ops[0].channels != ops[1].channels or ops[0].pooled:
            node.fail("it adds two values that are not two maps of one shape, as the two ways of a residual block are")
        return replace(first, op=replace(ops[0].then("add", node), inputs=ops))
    if node.op != "Mul":
        node.fail("it subtracts or divides two values; the two ways of a residual block are added")
    for value, other in ((first, second), (second, first)):
        if other.op.kind == "sigmoid" and other.op.inputs[0] is value.op and value.axes == other.axes:
            return replace(value, op=value.op.then("silu", node))
    if ops[0].pooled == ops[1].pooled:
        node.fail("it multiplies two maps; the two ways of a residual block are added")
    return _gate(node, *((second, first) if ops[0].pooled else (first, second)))


def _gate(node: Node, value: Value, row: Value) -> Value:
    """Channel attention on a map (SE or ECA): the product with a row that was computed from it."""
    parts: list[Op] = []
    op = row.op
    while op.pooled and op.kind != "pool" and len(parts) < 5:
        parts.insert(0, op)
        op = op.inputs[0]
    name = GATES.get(tuple(part.kind for part in parts))
    aligned = all(
        axis == seen or axis in (ONE, WIDE)
        for axis, seen in zip(reversed(row.axes), reversed(value.axes), strict=False)
    )
    if op.kind != "pool" or op.inputs[0] is not value.op or name is None or "C" not in row.axes or not aligned:
        node.fail("a gate must be squeeze-and-excitation or ECA of the map that it multiplies")
    weights = tuple(part for part in parts if part.kind in ("linear", "eca"))
    return replace(value, op=value.op.then("gate", node, parts=weights))


def _softmax(kind: Kind) -> Callable[[Call], Value]:
    def over_classes(call: Call) -> Value:
        value = axis_nodes.row(call.value())
        if value.axes[axis_of(call.node.get("axis", -1), len(value.axes), call.node)] != "C" or not value.op.pooled:
            call.node.fail("a softmax must be over the classes")
        return replace(value, op=value.op.then(kind, call.node))

    return over_classes


def _swish(call: Call) -> Value:
    if (alpha := call.node.get("alpha", 1.0)) != 1:
        call.node.fail(f"its alpha is {alpha}; SiLU has 1")
    return _activation("silu")(call)


def _activation(kind: Kind) -> Callable[[Call], Value]:
    return lambda call: replace(call.value(), op=call.value().op.then(kind, call.node))


OPERATIONS: dict[str, Callable[[Call], Value | Array]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_pool,
    "ReduceMean": _reduce_mean,
    "BatchNormalization": _batch_norm,
    "Add": _arithmetic,
    "Sum": _arithmetic,
    "Sub": _arithmetic,
    "Mul": _arithmetic,
    "Div": _arithmetic,
    "Relu": _activation("act"),
    "Sigmoid": _activation("sigmoid"),
    "Swish": _swish,
    "Softmax": _softmax("softmax"),
    "LogSoftmax": _softmax("logsoftmax"),
    "Identity": axis_nodes.as_is,
    "Dropout": axis_nodes.as_is,
    "Cast": axis_nodes.cast,
    "CastLike": axis_nodes.cast_like,
    "Transpose": axis_nodes.transpose,
    "Squeeze": axis_nodes.squeeze,
    "Unsqueeze": axis_nodes.unsqueeze,
    "Flatten": axis_nodes.flatten,
    "Reshape": axis_nodes.reshape,
    "Expand": axis_nodes.expand,
    "Pad": axis_nodes.pad,
    "Slice": axis_nodes.pick,
}
