"""The records of the normal form that ONNX graphs are brought into: an operation, and a value seen through its axes."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from isthmus.weights.onnx.file import Array, Node

__all__ = ["AREA", "MAP", "ONE", "ROW", "WIDE", "Call", "Kind", "Op", "Size", "Value", "Window"]

Size = int | str
Kind = Literal[
    "input", "conv", "norm", "act", "sigmoid", "silu", "maxpool", "avgpool", "blur", "zeropad", "lowpad", "reflectpad",
    "padchannels", "subsample", "gate", "add", "pool", "linear", "eca", "softmax", "logsoftmax",
]  # fmt: skip
MAP, ROW = ("N", "C", "H", "W"), ("N", "C")
ONE = "1"  # the label of an axis of one value
WIDE = "*"  # the same, repeated to the size of another map; only a product may read it
AREA = "HW"  # H and W as one axis; only a mean may read it


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """How a convolution or a pool slides over a map: per axis, and `pads` as (top, left, bottom, right)."""

    kernel: tuple[int, ...] = (1, 1)
    strides: tuple[int, ...] = (1, 1)
    pads: tuple[int, ...] = (0, 0, 0, 0)
    dilations: tuple[int, ...] = (1, 1)
    groups: int = 1
    ceil: bool = False
    counts_pads: bool = True

    def out_size(self, size: tuple[Size, Size]) -> tuple[Size, Size]:
        """Of a map; a word where it is not fixed."""
        return self._out(0, size[0]), self._out(1, size[1])

    def _out(self, axis: int, size: Size) -> Size:
        stride = self.strides[axis]
        reach = self.dilations[axis] * (self.kernel[axis] - 1) + 1 - self.pads[axis] - self.pads[axis + 2]
        if isinstance(size, str):
            return size if stride == reach == 1 else f"({size} - {reach}) / {stride}"[:99]
        return (size - reach + (stride - 1 if self.ceil else 0)) // stride + 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Op:
    """One operation of the normal form. `size` is of the map it makes, or that was pooled into the row it makes."""

    kind: Kind
    node: Node
    inputs: tuple["Op", ...] = ()
    channels: int
    size: tuple[Size, Size]
    pooled: bool = False
    window: Window = Window()
    constants: dict[str, Array] = field(default_factory=dict)
    eps: float | None = None
    parts: tuple["Op", ...] = ()

    @property
    def weight(self) -> Array:
        """What a convolution or a linear layer multiplies with."""
        return self.constants["weight"]

    def then(self, kind: Kind, node: Node, **changes: Any) -> "Op":
        """An operation that reads this one and makes what this one makes, but for the changes."""
        facts: dict[str, Any] = {"channels": self.channels, "size": self.size, "pooled": self.pooled}
        return Op(**facts | changes, kind=kind, node=node, inputs=(self,))


@dataclass(frozen=True, slots=True)
class Value:
    """An operation's result, and what each of its axes is."""

    op: Op
    axes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """A node with what it reads: values, constants, and None for what is left out."""

    node: Node
    args: list[Any]
    batch: Size

    def value(self, place: int = 0) -> Value:
        """A computed input."""
        found = self.args[place] if place < len(self.args) else None
        return found if isinstance(found, Value) else self.node.fail(f"its input {place} must be computed")

    def map(self) -> Op:
        """The computed input as a map with channels first."""
        value = self.value()
        if value.axes != MAP:
            self.node.fail(f"it reads axes {', '.join(value.axes)}; a map (N, C, H, W) was expected")
        return value.op

    def constant(self, place: int, what: str) -> Array:
        """A constant input."""
        found = self.args[place] if place < len(self.args) else None
        if not isinstance(found, np.ndarray):
            self.node.fail(f"its {what} is computed or missing; it must be a constant")
        return found

    def has(self, place: int) -> bool:
        """Whether an input that may be left out is there."""
        return place < len(self.args) and self.args[place] is not None

    def sizes(self, value: Value) -> tuple[Size, ...]:
        """The shape of a value."""
        known = {"N": self.batch, "C": value.op.channels, ONE: 1, WIDE: 1}
        high, wide = value.op.size
        area = high * wide if isinstance(high, int) and isinstance(wide, int) else f"{high} × {wide}"
        known |= {"H": high, "W": wide, AREA: area}
        return tuple(known[axis] for axis in value.axes)
