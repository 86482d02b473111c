"""What an ONNX graph computes from constants alone: shapes and pads, and norms spelled out on their statistics.

Sizes that are not fixed take part as words in arrays of objects: they can be picked and put together, not calculated.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from isthmus.weights.onnx.file import Array, Node

__all__ = ["Folder", "argument", "axis_of", "sizes"]

SMALL = 4096  # values that an operation may make beyond what it reads
TYPES: dict[int, str] = {1: "f4", 6: "i4", 7: "i8", 9: "?", 10: "f2", 11: "f8", 16: "f4"}  # of Cast


def argument(node: Node, args: list[Any], name: str, place: int) -> tuple[int, ...] | None:
    """Whole numbers that older versions of ONNX have as an attribute and newer ones as a constant input."""
    if name in node.attributes:
        return node.get(name, ())
    given = args[place] if place < len(args) else None
    return None if given is None else whole_numbers(node, given, name)


def whole_numbers(node: Node, array: Any, name: str) -> tuple[int, ...]:
    """A constant as whole numbers; raises WeightsError naming the node where it is not one."""
    if not isinstance(array, np.ndarray) or array.size > SMALL:
        node.fail(f"its {name} must be a short constant")
    values = array.reshape(-1).tolist()
    if not all(type(value) is int for value in values):
        node.fail(f"its {name} must be fixed whole numbers")
    return tuple(values)


def axis_of(axis: int, count: int, node: Node) -> int:
    return axis % count if -count <= axis < count else node.fail(f"axis {axis} of {count}")


def sizes(node: Node, shape: tuple[int | str, ...]) -> Array:
    """What the operation Shape gives: whole numbers, or objects where some size is not fixed."""
    picked = shape[node.get("start", 0) : node.get("end", len(shape))]
    fixed = all(isinstance(size, int) for size in picked)
    return np.array(picked, np.int64 if fixed else object)


def _constant(node: Node, _args: list[Array]) -> Array:
    kinds: dict[str, Any] = {
        "value": None,
        "value_float": np.float32,
        "value_floats": np.float32,
        "value_int": np.int64,
        "value_ints": np.int64,
    }
    for name, kind in kinds.items():
        if (value := node.attributes.get(name)) is not None:
            return np.asarray(value, kind)
    return node.fail("a constant of this kind cannot be read")


def _cast(node: Node, args: list[Array]) -> Array:
    kind = TYPES.get(node.get("to", 0))
    words = args[0].dtype == object
    return args[0] if words else args[0].astype(kind or node.fail("a type that cannot be read"), copy=False)


def _transpose(node: Node, args: list[Array]) -> Array:
    return args[0].transpose(node.get("perm", tuple(reversed(range(args[0].ndim)))))


def _reshape(node: Node, args: list[Array]) -> Array:
    shape = whole_numbers(node, args[1], "shape")
    if not node.get("allowzero", 0):
        shape = tuple(args[0].shape[place] if size == 0 else size for place, size in enumerate(shape))
    return args[0].reshape(shape)


def _flatten(node: Node, args: list[Array]) -> Array:
    axis = node.get("axis", 1)
    return args[0].reshape(prod(args[0].shape[:axis]), -1)


def _squeeze(node: Node, args: list[Array]) -> Array:
    return args[0].squeeze(argument(node, args, "axes", 1))


def _unsqueeze(node: Node, args: list[Array]) -> Array:
    return np.expand_dims(args[0], argument(node, args, "axes", 1) or ())


def _concat(node: Node, args: list[Array]) -> Array:
    return np.concatenate(args, node.get("axis", 0))


def _gather(node: Node, args: list[Array]) -> Array:
    source, places = args[0], args[1].astype(np.int64)
    axis = axis_of(node.get("axis", 0), source.ndim, node)
    shape = (*source.shape[:axis], *places.shape, *source.shape[axis + 1 :])
    if prod(shape) > source.size:
        _small(node, shape)
    return np.asarray(np.take(source, places, axis), source.dtype)  # a word stays an object


def _slice(node: Node, args: list[Array]) -> Array:
    starts, ends = argument(node, args, "starts", 1) or (), argument(node, args, "ends", 2) or ()
    axes = argument(node, args, "axes", 3) or tuple(range(len(starts)))
    steps = argument(node, args, "steps", 4) or (1,) * len(starts)
    picked = [slice(None)] * args[0].ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # Backwards, an end before the first value means that it is taken too.
        stop = None if step < 0 and end < -args[0].shape[axis] else end
        picked[axis] = slice(start, stop, step)
    return args[0][tuple(picked)]


def _filled(node: Node, args: list[Array]) -> Array:
    value = node.attributes.get("value", np.zeros(1, np.float32))
    if not isinstance(value, np.ndarray) or value.size != 1:
        node.fail("its value must be one number")
    return np.full(_small(node, whole_numbers(node, args[0], "shape")), value.reshape(-1)[0], value.dtype)


def _expand(node: Node, args: list[Array]) -> Array:
    shape = np.broadcast_shapes(args[0].shape, whole_numbers(node, args[1], "shape"))
    return np.broadcast_to(args[0], _small(node, shape))


def _small(node: Node, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if prod(shape) <= SMALL else node.fail(f"it makes a constant of shape {shape} out of nothing")


def _elementwise(operation: Callable[..., Any]) -> Callable[[Node, list[Array]], Array]:
    def fold(node: Node, args: list[Array]) -> Array:
        if any(array.dtype == object for array in args):
            node.fail("it calculates with a size that is not fixed; export with a fixed picture size")
        shape = np.broadcast_shapes(*(array.shape for array in args))
        if prod(shape) > max(array.size for array in args):
            _small(node, shape)
        return np.asarray(operation(*args))

    return fold


def _divide(first: Array, second: Array) -> Array:
    quotient: Array = first // second if np.issubdtype(first.dtype, np.integer) else first / second
    return quotient


FOLDS: dict[str, Callable[[Node, list[Array]], Array]] = {
    "Constant": _constant,
    "ConstantOfShape": _filled,
    "Identity": lambda _, args: args[0],
    "Cast": _cast,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Gather": _gather,
    "Slice": _slice,
    "Expand": _expand,
    "Shape": lambda node, args: sizes(node, args[0].shape),
    "Add": _elementwise(lambda first, second: first + second),
    "Sub": _elementwise(lambda first, second: first - second),
    "Mul": _elementwise(lambda first, second: first * second),
    "Div": _elementwise(_divide),
    "Neg": _elementwise(lambda value: -value),
    "Sqrt": _elementwise(np.sqrt),
    "Reciprocal": _elementwise(lambda value: 1 / value),
}


class Folder:
    """Computes constants from constants, in little more memory than the file's own constants take."""

    def __init__(self, constants: dict[str, Array]) -> None:
        self.budget = (32 << 20) + sum(array.nbytes for array in constants.values())

    def __call__(self, node: Node, args: list[Array]) -> Array:
        """The constant that a node makes; raises WeightsError."""
        if node.op not in FOLDS:
            node.fail("it makes a constant in a way that is not known; of a quantised graph, use the float one")
        result = FOLDS[node.op](node, args)
        if not any(np.may_share_memory(result, array) for array in args):
            self.budget -= result.nbytes
        return result if self.budget >= 0 else node.fail("the constants computed up to here take too much memory")
