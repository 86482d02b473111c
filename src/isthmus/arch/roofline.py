"""The time of layers on a machine, on paper: the least by a roofline (Williams et al. 2009), and what to expect.

A layer's floor is the longer of two times: its operations at the machine's rate, and the bytes that it must read and
write at the machine's bandwidth. What an engine computes while a neighbour reads or writes its map counts nothing:
batch norms, activations, additions, paddings. So no engine that multiplies directly is faster than a floor.

The time to expect is the sum of both, with what a floor leaves out: whole vectors are multiplied, also where a layer
has fewer channels; and all that an engine reads and writes comes from the cache that still holds it, if the least
recently used goes first: weights from where all of a pass fits, a map from where what was used since it was does.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, takewhile
from math import inf
from operator import itemgetter
from typing import Literal, NamedTuple

from isthmus import records
from isthmus.arch.cost import By
from isthmus.arch.plan import Plan
from isthmus.arch.traffic import OwnLayer, layers_of
from isthmus.errors import SpecError

__all__ = ["Bandwidth", "Floor", "LayerTime", "Limits", "Precision", "merged", "merged_times", "roofline"]

Precision = Literal["fp32", "bf16", "int8"]
Side = Literal["arithmetic", "memory"]
ITEM = {"fp32": 4, "bf16": 2, "int8": 1}  # bytes of a number in maps and weights
SUM = 4  # bytes of a sum, in every precision


@dataclass(frozen=True, kw_only=True, slots=True)
class Bandwidth:
    """The most bytes a second that all threads together read and write while they go over `size` bytes."""

    size: int
    rate: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The most that a machine does with `threads`: operations a second by precision, bytes a second by working set.

    A multiplication and an addition are two operations; a precision that it does not multiply itself has none.
    `lanes` are the sums of 32 bits in one of its vectors.
    `bandwidth` begins with the smallest working set, and no larger one is faster. Raises SpecError for others.
    """

    machine: str
    threads: int
    lanes: int
    fp32: float
    bf16: float | None = None
    int8: float | None = None
    bandwidth: tuple[Bandwidth, ...]

    def __post_init__(self) -> None:
        records.check_fields(self)
        rates = [self.lanes, self.fp32, self.bf16 or inf, self.int8 or inf, *(each.rate for each in self.bandwidth)]
        ordered = all(one.size < two.size and one.rate >= two.rate for one, two in pairwise(self.bandwidth))
        if not self.bandwidth or not ordered or min(rates) <= 0:
            raise SpecError(
                "limits need lanes and rates above 0, and a bandwidth for one or more working sets, of which the "
                "larger come later and are no faster"
            )

    def operations(self, precision: Precision) -> float:
        """Operations a second in a precision; raises SpecError for one that the machine has not."""
        rate: float | None = getattr(self, precision)
        if rate is None:
            known = [name for name in ITEM if getattr(self, name) is not None]
            raise SpecError(f"{self.machine} does not multiply {precision} itself; it has {', '.join(known)}")
        return rate

    def rate(self, size: int) -> float:
        """Bytes a second of the smallest working set that holds `size` bytes."""
        return next((each.rate for each in self.bandwidth if size <= each.size), self.bandwidth[-1].rate)

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
    """What a layer, block or stage must do for a batch, the least seconds that it takes, and those to expect.

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
    expected: float

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
    rate, item, layers = limits.operations(precision), ITEM[precision], tuple(layers_of(plan))
    floors = []
    for layer, moving in zip(layers, seconds_of_moves(layers, limits, item, batch), strict=True):
        operations, moved = 2 * batch * layer.macs, item * (batch * layer.numbers + layer.params)
        arithmetic, memory = operations / rate, limits.seconds(moved)
        seconds = max(arithmetic, memory)
        expected = max(seconds, arithmetic * in_whole_vectors(layer, limits.lanes, SUM // item) + moving)
        floors.append(
            Floor(
                name=layer.name,
                kind=layer.kind,
                block=layer.block,
                operations=operations,
                bytes=moved,
                arithmetic=arithmetic,
                memory=memory,
                seconds=seconds,
                expected=expected,
            )
        )
    return tuple(floors)


def in_whole_vectors(layer: OwnLayer, lanes: int, packed: int) -> float:
    """How much more is multiplied where vectors of so many sums, each of so many products at once, are not full."""
    return whole(layer.summed, packed) * whole(layer.abreast, lanes)


def whole(number: int, step: int) -> float:
    """How many times as many it is in whole steps."""
    return -(-number // step) * step / number


def seconds_of_moves(layers: Sequence[OwnLayer], limits: Limits, item: int, batch: int) -> list[float]:
    """The seconds of each layer's moves, each from the smallest working set that holds what was used since, and it.

    Weights were used last a whole pass before; a map that is written needs room for itself alone.
    """
    used = dict[int, int]()  # bytes by map, and by minus the place of weights; the least recently used first
    maps = dict(sorted((move for layer in layers for move in layer.moves), key=itemgetter(1)))
    everything = item * (sum(layer.params for layer in layers) + batch * sum(maps.values()))

    def since(which: int, size: int) -> int:
        """Bytes of all that was used since, and its own."""
        later = 0
        if which in used:
            later = sum(used[other] for other in takewhile(which.__ne__, reversed(used)))
            size = max(size, used.pop(which))
        used[which] = size
        return later + size

    found = []
    for place, layer in enumerate(layers, 1):
        *reads, write = [(move.map, item * batch * move.numbers) for move in layer.moves]
        seconds = sum(size / limits.rate(since(which, size)) for which, size in reads)
        used[-place] = item * layer.params
        seconds += used[-place] / limits.rate(everything)
        which, size = write
        found.append(seconds + size / limits.rate(since(which, size)))
    return found


def joined(floors: tuple[Floor, ...]) -> Floor:
    """The floor of layers that are computed as one: together at least all operations, and the bytes of any one."""
    if len(floors) == 1:
        return floors[0]
    both = total(" + ".join(each.name for each in floors), floors[0].kind, floors)
    memory = max(each.memory for each in floors)
    return both._replace(block=floors[0].block, memory=memory, seconds=max(both.arithmetic, memory))


def total(name: str, kind: str, floors: Iterable[Floor]) -> Floor:
    """Layers one after the other."""
    every = list(floors)
    return Floor(
        name=name,
        kind=kind,
        block=name,
        operations=sum(each.operations for each in every),
        bytes=sum(each.bytes for each in every),
        arithmetic=sum(each.arithmetic for each in every),
        memory=sum(each.memory for each in every),
        seconds=sum(each.seconds for each in every),
        expected=sum(each.expected for each in every),
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
