"""The least time that layers can take on a machine, on paper: a roofline (Williams et al. 2009) with its caches.

A layer's floor is the longer of two times: its operations at the machine's rate, and the bytes that it must read and
write at the machine's bandwidth. What an engine computes while a neighbour reads or writes its map counts nothing:
batch norms, activations, additions, paddings. So no engine that multiplies directly is faster than a floor.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import inf, prod
from typing import Literal, NamedTuple

from isthmus import records
from isthmus.arch.block import Layer
from isthmus.arch.cost import By, Row, block_rows, cost
from isthmus.arch.plan import Plan
from isthmus.errors import SpecError

__all__ = ["Bandwidth", "Floor", "LayerTime", "Limits", "Precision", "merged", "merged_times", "roofline"]

Precision = Literal["fp32", "bf16", "int8"]
Side = Literal["arithmetic", "memory"]
Size = tuple[int, ...]
ITEM = {"fp32": 4, "bf16": 2, "int8": 1}  # bytes of a number in maps and weights
MOVED = ("conv", "blur", "maxpool", "avgpool", "linear")  # kinds that read one map and write another


@dataclass(frozen=True, kw_only=True, slots=True)
class Bandwidth:
    """The most bytes a second that all threads together read and write while they go over `size` bytes."""

    size: int
    rate: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The most that a machine does with `threads`: operations a second by precision, bytes a second by working set.

    A multiplication and an addition are two operations; a precision that it does not multiply itself has none.
    `bandwidth` begins with the smallest working set, and no larger one is faster. Raises SpecError for others.
    """

    machine: str
    threads: int
    fp32: float
    bf16: float | None = None
    int8: float | None = None
    bandwidth: tuple[Bandwidth, ...]

    def __post_init__(self) -> None:
        records.check_fields(self)
        rates = [self.fp32, self.bf16 or inf, self.int8 or inf, *(each.rate for each in self.bandwidth)]
        ordered = all(one.size < two.size and one.rate >= two.rate for one, two in pairwise(self.bandwidth))
        if not self.bandwidth or not ordered or min(rates) <= 0:
            raise SpecError(
                "limits need rates above 0, and a bandwidth for one or more working sets, of which the larger come "
                "later and are no faster"
            )

    def operations(self, precision: Precision) -> float:
        """Operations a second in a precision; raises SpecError for one that the machine has not."""
        rate: float | None = getattr(self, precision)
        if rate is None:
            known = [name for name in ITEM if getattr(self, name) is not None]
            raise SpecError(f"{self.machine} does not multiply {precision} itself; it has {', '.join(known)}")
        return rate

    def seconds(self, size: int) -> float:
        """The least time to read and write `size` bytes.

        Each cache may still hold as much as it can from the layer before, so that only the bytes beyond a working set
        come as slowly as a set of that size.
        """
        steps = [each.size for each in self.bandwidth[1:]]
        bounds = pairwise((0, *steps, max(size, *steps, 0)))
        return sum(
            (min(size, high) - low) / each.rate
            for each, (low, high) in zip(self.bandwidth, bounds, strict=True)
            if size > low
        )


class Floor(NamedTuple):
    """What a layer, block or stage must do for a batch, and the least seconds that it takes.

    `operations` are without those on padding, so that they may be a little fewer than `cost` counts.
    `arithmetic` and `memory` are the seconds of either side alone; of several layers `seconds` is the sum of floors.
    """

    name: str
    kind: str
    block: str
    operations: int
    bytes: int
    arithmetic: float
    memory: float
    seconds: float

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.bytes

    @property
    def binds(self) -> Side:
        """Which side takes longer."""
        return "arithmetic" if self.arithmetic >= self.memory else "memory"


class LayerTime(NamedTuple):
    """Measured seconds of a layer, block or stage, and its floor; none for what an engine does beside the layers."""

    name: str
    kind: str
    block: str
    seconds: float
    floor: Floor | None

    @property
    def share(self) -> float | None:
        """The part of the limit that was reached: floor over measured."""
        return self.floor.seconds / self.seconds if self.floor and self.seconds else None


def roofline(plan: Plan, limits: Limits, *, precision: Precision = "fp32", batch: int = 1) -> tuple[Floor, ...]:
    """One floor a layer that moves bytes of its own, for `batch` pictures at once; attention is one layer a block.

    Raises SpecError for a caller's own blocks, and for a precision that the machine has not.
    """
    if batch < 1:
        raise SpecError(f"batch is {batch}; it must be at least 1")
    rate, item = limits.operations(precision), ITEM[precision]
    floors = []
    for layer in layers_of(plan):
        operations, moved = 2 * batch * layer.macs, item * (batch * layer.numbers + layer.params)
        arithmetic, memory = operations / rate, limits.seconds(moved)
        seconds = max(arithmetic, memory)
        floors.append(Floor(layer.name, layer.kind, layer.block, operations, moved, arithmetic, memory, seconds))
    return tuple(floors)


class OwnLayer(NamedTuple):
    """A layer that moves bytes of its own: multiply-adds and numbers in maps for one picture, and its weights."""

    block: str
    name: str
    kind: str
    macs: int
    numbers: int
    params: int


def layers_of(plan: Plan) -> Iterator[OwnLayer]:
    """The layers of their own, in the order of the network."""
    found, spec = cost(plan), plan.spec
    parts = [("stem", plan.stem, found.stem)]
    parts += [
        (block.name, (*block.spec.main, *block.spec.downsample), tuple(block_rows(block))) for block in plan.blocks
    ]
    parts.append(("head", (*plan.tail, *plan.head), found.head))
    for block, layers, rows in parts:
        gate = [row for layer, row in zip(layers, rows, strict=True) if layer.name.startswith("se.")]
        for layer, row in zip(layers, rows, strict=True):
            whole_map = 2 * numbers(row.in_channels, row.in_size)  # read to its end before the first number is written
            if row in gate:
                if row is gate[0]:
                    macs, params = sum(each.macs for each in gate), sum(each.params for each in gate)
                    yield OwnLayer(block, f"{block}.se", spec.attention, macs, whole_map, params)
            elif layer.kind == "globalpool":
                read = sum(numbers(tap.channels, tap.size) for tap in plan.features if tap.name in spec.head.taps)
                yield OwnLayer(block, row.name, layer.kind, 0, read + row.out_channels, 0)
            elif layer.kind == "norm" and layer.domain == "map" and spec.norm == "group":
                yield OwnLayer(block, row.name, layer.kind, 0, whole_map, row.params)
            elif layer.kind in MOVED and not is_identity(layer):
                moved = read_and_written(layer, row)
                yield OwnLayer(block, row.name, layer.kind, unpadded_macs(layer, row), moved, row.params)


def unpadded_macs(layer: Layer, row: Row) -> int:
    """Multiply-adds without those by zeros of the padding, which engines leave out: at 7×7 a 3×3 has 18 % fewer."""
    if layer.kind != "conv" or not layer.padding:
        return row.macs
    every = prod(layer.kernel * out for out in row.out_size)
    return row.macs * prod(taps(layer, n, out) for n, out in zip(row.in_size, row.out_size, strict=True)) // every


def taps(layer: Layer, size: int, out: int) -> int:
    """How often a kernel meets a number of the map, in one dimension, over all of its `out` positions."""
    begins = (place * layer.stride - layer.padding for place in range(out))
    reach = range(0, layer.kernel * layer.dilation, layer.dilation)
    return sum(0 <= begin + tap < size for begin in begins for tap in reach)


def is_identity(layer: Layer) -> bool:
    """Whether a pool is none."""
    return layer.kind == "avgpool" and layer.kernel == layer.stride == 1


def numbers(channels: int, size: Size) -> int:
    """Numbers in a map."""
    return channels * prod(size)


def read_and_written(layer: Layer, row: Row) -> int:
    """Numbers of the input that a layer needs (a strided 1×1 no more positions than it gives), and of its output."""
    if layer.domain == "pooled":
        return row.in_channels + row.out_channels
    needed = tuple(min(n, out * layer.kernel) for n, out in zip(row.in_size, row.out_size, strict=True))
    return numbers(row.in_channels, needed) + numbers(row.out_channels, row.out_size)


def joined(floors: tuple[Floor, ...]) -> Floor:
    """The floor of layers that are computed as one: together at least all operations, and the bytes of any one."""
    if len(floors) == 1:
        return floors[0]
    arithmetic, memory = sum(each.arithmetic for each in floors), max(each.memory for each in floors)
    first = floors[0]
    return Floor(
        " + ".join(each.name for each in floors),
        first.kind,
        first.block,
        sum(each.operations for each in floors),
        sum(each.bytes for each in floors),
        arithmetic,
        memory,
        max(arithmetic, memory),
    )


def total(name: str, kind: str, floors: Iterable[Floor]) -> Floor:
    """Layers one after the other."""
    every = list(floors)
    return Floor(
        name,
        kind,
        name,
        sum(each.operations for each in every),
        sum(each.bytes for each in every),
        sum(each.arithmetic for each in every),
        sum(each.memory for each in every),
        sum(each.seconds for each in every),
    )


def place(block: str, by: By) -> str:
    """The block or stage that a block's name says."""
    return block.partition(".")[0] if by == "stage" else block


def merged(floors: Iterable[Floor], by: By) -> tuple[Floor, ...]:
    """Floors by stage, block or layer; the stem and the head are one row each unless by layer."""
    if by == "layer":
        return tuple(floors)
    return tuple(total(name, by, rows) for name, rows in groupby(floors, lambda each: place(each.block, by)))


def merged_times(times: Iterable[LayerTime], by: By) -> tuple[LayerTime, ...]:
    """Measured times by stage, block or layer, as `merged` does."""
    if by == "layer":
        return tuple(times)
    rows = []
    for name, group in groupby(times, lambda each: place(each.block, by)):
        every = list(group)
        floors = [each.floor for each in every if each.floor]
        seconds = sum(each.seconds for each in every)
        rows.append(LayerTime(name, by, name, seconds, total(name, by, floors) if floors else None))
    return tuple(rows)
