"""An ONNX file to nodes and constants: every size is checked before memory is taken, and no path leaves its folder."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import MissingExtraError, WeightsError
from isthmus.weights.files import first_bytes

__all__ = ["Array", "Graph", "Node", "read_graph"]

Array = NDArray[Any]
Value = TypeVar("Value", int, float, str, tuple[int, ...])

MOST_ITEMS = (
    50_000  # nodes or constants: fifty times ResNet-152's; an object each is the memory that a small file takes
)
LONGEST_LIST = 4096  # numbers in an attribute: axes, pads and shapes have a handful
FLOATS = ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16")
STORAGE: dict[str, tuple[str, str]] = {  # type of a constant -> how numpy stores it, and its field when not raw
    "FLOAT": ("<f4", "float_data"),
    "DOUBLE": ("<f8", "double_data"),
    "FLOAT16": ("<f2", "int32_data"),
    "BFLOAT16": ("<u2", "int32_data"),
    "INT64": ("<i8", "int64_data"),
    "INT32": ("<i4", "int32_data"),
    "INT8": ("<i1", "int32_data"),
    "UINT8": ("<u1", "int32_data"),
    "BOOL": ("?", "int32_data"),
}


@dataclass(frozen=True, slots=True)
class Node:
    """One operation as the file has it; `inputs` and `outputs` are names of values, "" for one left out."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]

    def fail(self, reason: str) -> NoReturn:
        """Raise WeightsError naming this node."""
        name = self.name or ", ".join(self.outputs)
        raise WeightsError(f"ONNX node {name[:99]!r} ({self.op[:99]}): {reason}")

    def get(self, name: str, default: Value) -> Value:
        """An attribute, of the type that its default has: a number, a word or a tuple of whole numbers."""
        value: Value = self.attributes.get(name, default)
        whole = not isinstance(value, tuple) or all(type(item) is int for item in value)
        if type(value) is not type(default) or not whole:
            self.fail(f"its {name} is {value!r}, where something like {default!r} belongs")
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """What a file holds. `shape` is the picture's, with a word where any size goes; nodes come after what they read."""

    nodes: tuple[Node, ...]
    constants: dict[str, Array]
    input: str
    shape: tuple[int | str, ...]
    outputs: tuple[str, ...]
    metadata: dict[str, str]


def read_graph(path: Path) -> Graph:
    """The graph in a file; raises WeightsError."""
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnx", "onnx") from error
    first_bytes(path)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
        if not model.graph.node:
            raise WeightsError(f"{path} is truncated, damaged or no ONNX file (it has no nodes)")
        if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
            raise WeightsError(f"{path} holds a network in 8 bits, which is for engines; load what it was made from")
        return _Reader(path).graph(model.graph, {each.key: each.value for each in model.metadata_props})
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror} ({error.filename}); check the path") from error
    except (DecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} is truncated, damaged or no ONNX file ({error})") from error


def _in_order(nodes: Iterable[Node], made: set[str]) -> Iterator[Node]:
    """Nodes behind those whose results they read, as converters to half precision do not leave them.

    Those that wait for ever come last. `made` are the names of what is there before all nodes.
    """
    waiting: defaultdict[str, list[Node]] = defaultdict(list)
    for node in nodes:
        ready = [node]
        while ready:
            one = ready.pop()
            missing = next((name for name in one.inputs if name and name not in made), None)
            if missing is not None:
                waiting[missing].append(one)
                continue
            yield one
            made.update(one.outputs)
            ready += [other for name in one.outputs for other in waiting.pop(name, ())]
    yield from (node for several in waiting.values() for node in several)


class _Reader:
    """The way from what the parser made to our records."""

    def __init__(self, path: Path) -> None:
        import onnx

        self.path = path
        # A file that is a link (as in the hub's cache) may have its data beside the link or beside its target.
        self.folders = (path.parent.resolve(), path.resolve().parent)
        self.types = {number: name for name, number in onnx.TensorProto.DataType.items()}
        self.attributes = onnx.AttributeProto
        self.taken: Counter[Path] = Counter()

    def fail(self, reason: str) -> NoReturn:
        raise WeightsError(f"{self.path} {reason}")

    def graph(self, graph: Any, metadata: dict[str, str]) -> Graph:
        count = max(map(len, (graph.node, graph.initializer, graph.input, graph.output)))
        if count > MOST_ITEMS:
            self.fail(
                f"has {count} nodes, constants, inputs or outputs; no network of this family has more than {MOST_ITEMS}"
            )
        if graph.sparse_initializer:
            self.fail("has sparse constants; export it with dense ones")
        constants = {tensor.name: self.array(tensor) for tensor in graph.initializer}
        pictures = [value for value in graph.input if value.name not in constants]
        shapes = [self.shape(value) for value in pictures]
        if len(shapes) != 1 or len(shapes[0]) != 4:
            self.fail(f"takes inputs of shapes {shapes[:9]}; a network of pictures takes one, (N, C, H, W)")
        if len(graph.output) != 1:
            names = ", ".join(value.name[:99] for value in graph.output[:9]) or "none"
            self.fail(f"gives several outputs or none ({names}); export it with the logits alone")
        kind = self.types.get(pictures[0].type.tensor_type.elem_type, "unknown")
        if kind not in FLOATS:
            self.fail(f"takes pictures of type {kind}; a network takes floating-point ones")
        return Graph(
            nodes=tuple(_in_order(map(self.node, graph.node), {pictures[0].name, *constants})),
            constants=constants,
            input=pictures[0].name,
            shape=shapes[0],
            outputs=tuple(value.name for value in graph.output),
            metadata=metadata,
        )

    def shape(self, value: Any) -> tuple[int | str, ...]:
        """Of an input; a size that is not fixed is a word."""
        dims = value.type.tensor_type.shape.dim[:9]
        return tuple(dim.dim_value if dim.dim_value > 0 else f"size {place}" for place, dim in enumerate(dims))

    def node(self, proto: Any) -> Node:
        op = proto.op_type if proto.domain in ("", "ai.onnx") else f"{proto.domain}.{proto.op_type}"
        attributes = {item.name: self.attribute(item) for item in proto.attribute}
        return Node(proto.name, op, tuple(proto.input), tuple(proto.output), attributes)

    def attribute(self, item: Any) -> Any:
        """A number, a word, an array, or a tuple of numbers; None for all others, which no operation here reads."""
        if item.type == self.attributes.TENSOR:
            return self.array(item.t)
        if item.type == self.attributes.STRING:
            return item.s.decode()
        fields = {
            self.attributes.FLOAT: "f",
            self.attributes.INT: "i",
            self.attributes.FLOATS: "floats",
            self.attributes.INTS: "ints",
        }
        value: Any = getattr(item, fields[item.type]) if item.type in fields else None
        if item.type in (self.attributes.FLOATS, self.attributes.INTS):
            if len(value) > LONGEST_LIST:
                self.fail(f"has an attribute {item.name} of {len(value)} numbers; store them as a tensor")
            return tuple(value)
        return value

    def array(self, tensor: Any) -> Array:
        """A constant; raises WeightsError unless its shape, type and bytes agree."""
        kind = self.types.get(tensor.data_type, str(tensor.data_type))
        shape = tuple(tensor.dims)
        label = f"tensor {tensor.name[:99]!r} of shape {shape[:9]}"
        if kind not in STORAGE:
            self.fail(f"holds {label} and type {kind}; known types: {', '.join(STORAGE)}")
        if len(shape) > 8 or min(shape, default=1) < 0:
            self.fail(f"holds {label}, which no tensor can have")
        storage, field = STORAGE[kind]
        dtype, count = np.dtype(storage), prod(shape)
        if tensor.external_data or tensor.data_location == tensor.EXTERNAL:
            flat = self.external(tensor, label, dtype, count)
        else:
            raw = tensor.HasField("raw_data")
            data = tensor.raw_data if raw else getattr(tensor, field)
            if len(data) != (count * dtype.itemsize if raw else count):
                self.fail(f"holds {label} with {len(data)} {'bytes' if raw else 'values'} of data; it is damaged")
            if raw:
                flat = np.frombuffer(data, dtype)
            else:
                values = np.fromiter(data, dtype if field != "int32_data" else np.int64, count)
                bits = np.dtype("<u2") if kind == "FLOAT16" else dtype  # half precision is stored by its bits
                flat = values.astype(bits, copy=False).view(dtype)
        if kind == "BFLOAT16":  # the upper half of single precision, which numpy has no type for
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.reshape(shape)

    def external(self, tensor: Any, label: str, dtype: np.dtype[Any], count: int) -> Array:
        """Data of a tensor in a file of its own, which must lie in the model's folder and hold all of it."""
        told = {entry.key: entry.value for entry in tensor.external_data}
        location, offset, length = told.get("location", ""), told.get("offset", "0"), told.get("length", "")
        try:
            file = (self.path.parent / location).resolve()
            inside = any(file.is_relative_to(folder) for folder in self.folders)
            size = file.stat().st_size if location and inside and file.is_file() else -1
        except (ValueError, OSError):  # a path that no file system has
            inside, size = False, -1
        if not location or not inside:
            self.fail(f"says that {label} lies outside the file's folder ({location[:80]!r}); refused")
        if size < 0:
            self.fail(f"says that {label} lies in {location[:80]!r}, which is not there; copy it beside the model")
        wanted = count * dtype.itemsize
        if not offset.isdecimal() or length not in ("", str(wanted)) or len(offset) > 18:
            self.fail(f"holds {label}: {wanted} bytes, and says {length[:20]!r} from {offset[:20]!r} on; it is damaged")
        self.taken[file] += wanted  # so that many tensors cannot multiply one small file
        if int(offset) + wanted > size or self.taken[file] > size:
            self.fail(f"needs more of {location[:80]!r} for {label} than its {size} bytes; it is damaged")
        return np.fromfile(file, dtype, count, offset=int(offset))
