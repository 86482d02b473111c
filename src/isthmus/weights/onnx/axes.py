"""ONNX nodes that move, pad or pick a value's axes; those that only move them leave the operation as it is."""

from dataclasses import replace

import numpy as np

from isthmus.weights.onnx.file import Array
from isthmus.weights.onnx.fold import argument, axis_of
from isthmus.weights.onnx.op import AREA, ONE, WIDE, Call, Kind, Value, Window

__all__ = [
    "as_is",
    "cast",
    "cast_like",
    "expand",
    "flatten",
    "pad",
    "pick",
    "reshape",
    "row",
    "squeeze",
    "transpose",
    "unsqueeze",
]

LOWEST = -3e38  # a pad by such a number is a pad by minus infinity
MOST_CHANNELS = 1 << 20


def row(value: Value) -> Value:
    """A map that an average over all of it has left with one position, as the row of channels that it is."""
    op = value.op
    if op.kind != "avgpool":
        return value
    size = op.inputs[0].size
    if any(isinstance(side, str) for side in size):
        op.node.fail("a fixed window over a map of any size; export with a fixed picture size, or a global mean")
    if op.window.kernel != size or any(op.window.pads):
        op.node.fail(f"a window of {op.window.kernel} on a map of {size}; only a mean over the whole map is known")
    axes = tuple(ONE if axis in ("H", "W") else axis for axis in value.axes)
    return Value(op.inputs[0].then("pool", op.node, pooled=True), axes)


def as_is(call: Call) -> Value:
    if call.has(2) and call.constant(2, "mode").any():
        call.node.fail("a dropout in training mode; export the network in evaluation mode")
    return call.value()


def cast(call: Call) -> Value:
    floating = call.node.get("to", 0) in (1, 10, 11, 16)
    return call.value() if floating else call.node.fail("a cast to whole numbers; quantised graphs cannot be read")


def cast_like(call: Call) -> Value | Array:
    """Everything that is computed is floating-point."""
    value = call.args[0]
    return value.astype(np.float32) if isinstance(value, np.ndarray) else call.value()


def transpose(call: Call) -> Value:
    value = call.value()
    perm = call.node.get("perm", tuple(reversed(range(len(value.axes)))))
    if sorted(perm) != list(range(len(value.axes))):
        call.node.fail(f"its perm {perm} does not fit {len(value.axes)} axes")
    return replace(value, axes=tuple(value.axes[axis] for axis in perm))


def squeeze(call: Call) -> Value:
    value = row(call.value())
    axes = argument(call.node, call.args, "axes", 1)
    every = [place for place, axis in enumerate(value.axes) if axis == ONE]
    places = every if axes is None else [axis_of(axis, len(value.axes), call.node) for axis in axes]
    if not set(places) <= set(every):
        call.node.fail(f"it removes axes {axes} of {', '.join(value.axes)}, which are not all of one value")
    return replace(value, axes=tuple(axis for place, axis in enumerate(value.axes) if place not in places))


def unsqueeze(call: Call) -> Value:
    value, axes = call.value(), argument(call.node, call.args, "axes", 1) or ()
    count = len(value.axes) + len(axes)
    places = {axis_of(axis, count, call.node) for axis in axes}
    rest = iter(value.axes)
    if len(places) != len(axes) or count > 8:
        call.node.fail(f"its axes {axes} do not fit {len(value.axes)} axes")
    return replace(value, axes=tuple(ONE if place in places else next(rest) for place in range(count)))


def flatten(call: Call) -> Value:
    value, axis = row(call.value()), call.node.get("axis", 1)
    rest = [label for label in value.axes[1:] if label != ONE]
    if axis not in (1, 1 - len(value.axes)) or len(rest) != 1:
        call.node.fail(f"it flattens axes {', '.join(value.axes)}; only a pooled map can be")
    return replace(value, axes=(value.axes[0], rest[0]))


def reshape(call: Call) -> Value:
    """A shape that keeps every axis of more than one value, in order; H and W may become one."""
    value = row(call.value())
    wanted = call.constant(1, "shape").reshape(-1).tolist()
    old, zero = call.sizes(value), call.node.get("allowzero", 0)
    wanted = [old[place] if size == 0 and not zero else size for place, size in enumerate(wanted)]
    area = call.sizes(replace(value, axes=(AREA,)))[0]
    left = [(axis, size) for axis, size in zip(value.axes, old, strict=True) if axis != ONE]
    axes: list[str] = []
    for place, size in enumerate(wanted[:9]):
        joins = [axis for axis, _ in left[:2]] == ["H", "W"] and len(left) > len(wanted) - place
        if joins and size in (area, -1):
            axes, left = [*axes, AREA], left[2:]
        elif left and size in (left[0][1], -1):
            axes.append(left.pop(0)[0])
        else:
            axes.append(ONE if size in (1, -1) else "")
    if left or "" in axes or wanted.count(-1) > 1 or len(wanted) > 8:
        call.node.fail(f"it makes {tuple(wanted)} of axes {', '.join(value.axes)} ({old}), whose order it would change")
    return replace(value, axes=tuple(axes))


def expand(call: Call) -> Value:
    """A row repeated over a map, for a product with it."""
    value, wanted = call.value(), call.constant(1, "shape").reshape(-1).tolist()
    old = call.sizes(value)
    fits = len(wanted) == len(old) and all(
        axis == ONE or want in (size, 1) for axis, size, want in zip(value.axes, old, wanted, strict=True)
    )
    if not fits:
        call.node.fail(f"it makes {tuple(wanted)} of {old}")
    axes = [WIDE if axis == ONE and want != 1 else axis for axis, want in zip(value.axes, wanted, strict=True)]
    return replace(value, axes=tuple(axes))


def pad(call: Call) -> Value:
    node, value = call.node, call.value()
    pads = argument(node, call.args, "pads", 1)
    if pads is None:
        node.fail("it has no pads")
    axes = argument(node, call.args, "axes", 3) or tuple(range(len(pads) // 2))
    if len(pads) != 2 * len(axes) or min(pads, default=0) < 0 or value.op.pooled:
        node.fail(f"its pads {pads} are none of a map")
    labels = [value.axes[axis_of(axis, len(value.axes), node)] for axis in axes]
    before, after = (dict(zip(labels, part, strict=True)) for part in (pads[: len(axes)], pads[len(axes) :]))
    edges = tuple(side.get(axis, 0) for side in (before, after) for axis in "HW")
    more = after.get("C", 0)
    mode = node.get("mode", "constant")
    fill = float(call.constant(2, "value").reshape(-1)[0]) if call.has(2) else node.get("value", 0.0)
    if not any(pads):
        return value
    if before.get("N", 0) or after.get("N", 0) or before.get("C", 0) or (more and any(edges)):
        node.fail(f"its pads {pads} are none of a map, nor of channels at the end")
    if value.op.channels + more > MOST_CHANNELS or (more and (mode, fill) != ("constant", 0.0)):
        node.fail(f"it adds {more} channels by {mode} {fill}; zeros were expected")
    kinds: dict[tuple[str, bool, bool], Kind] = {
        ("constant", True, False): "zeropad",
        ("constant", False, True): "lowpad",
        ("reflect", True, False): "reflectpad",
    }
    kind = "padchannels" if more else kinds.get((mode, fill == 0, fill <= LOWEST))
    if kind is None:
        node.fail(f"it pads by {mode} {fill}; zeros or a reflection were expected")
    window = Window(pads=edges)
    size = window.out_size(value.op.size)
    return replace(value, op=value.op.then(kind, node, window=window, size=size, channels=value.op.channels + more))


def pick(call: Call) -> Value:
    """Every so many-th position of a map (the parameter-free shortcut of He et al. 2015, option A)."""
    node, value = call.node, call.value()
    starts, ends = argument(node, call.args, "starts", 1) or (), argument(node, call.args, "ends", 2) or ()
    axes = argument(node, call.args, "axes", 3) or tuple(range(len(starts)))
    steps = argument(node, call.args, "steps", 4) or (1,) * len(starts)
    strides = {"H": 1, "W": 1}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        place = axis_of(axis, len(value.axes), node)
        size, label = call.sizes(value)[place], value.axes[place]
        whole = start == 0 and end >= (size if isinstance(size, int) else 2**31 - 1)
        if not whole or step < 1 or (label not in strides and step > 1) or value.op.pooled:
            node.fail("only every so many-th position of a whole map can be picked")
        strides[label] = step
    window = Window(strides=(strides["H"], strides["W"]))
    if window == Window():
        return value
    op = value.op
    if op.kind == "subsample":
        first, second = op.window.strides, window.strides
        op, window = op.inputs[0], Window(strides=(first[0] * second[0], first[1] * second[1]))
    return replace(value, op=op.then("subsample", node, window=window, size=window.out_size(op.size)))
