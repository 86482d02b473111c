"""What engines compute one after the other: layers with maps of their own, and which maps each reads and writes."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from math import prod
from typing import NamedTuple

from isthmus.arch.block import Layer
from isthmus.arch.cost import Row, block_rows, cost
from isthmus.arch.plan import Plan

__all__ = ["Move", "OwnLayer", "layers_of"]

MOVED = ("conv", "blur", "maxpool", "avgpool", "linear")  # kinds that read one map and write another


class Move(NamedTuple):
    """Numbers of one picture that are read from a map, or written."""

    map: int
    numbers: int


class OwnLayer(NamedTuple):
    """A layer that moves bytes of its own: multiply-adds for one picture, weights, and numbers it reads and writes.

    A number that it writes is a sum over `summed` channels, and `abreast` of them are sums over the same positions.
    What must be seen whole first is read in two `passes`. `moves` are all that an engine moves which computes the layer
    alone, what it writes last: also for a norm before it that is in no convolution, and for the sum of a block's paths
    where it ends the block.
    """

    block: str
    name: str
    kind: str
    macs: int
    params: int
    summed: int
    abreast: int
    read: int
    written: int
    passes: int = 1
    moves: tuple[Move, ...] = ()

    @property
    def numbers(self) -> int:
        """Numbers in maps that must be moved for one picture."""
        return self.read + self.written


def layers_of(plan: Plan) -> Iterator[OwnLayer]:
    """The layers of their own, in the order of the network; raises SpecError for a caller's own blocks."""
    walk, found = Walk(plan), cost(plan)
    own, ends = walk.chain("stem", plan.stem, found.stem, next(walk.maps))
    walk.taps["stem"] = ends[plan.stem_pool]
    yield from own
    for block in plan.blocks:
        spec, rows, start = block.spec, block_rows(block), ends[-1]
        own, ends = walk.chain(block.name, spec.main, rows[: len(spec.main)], start)
        activated = plan.spec.preact and any(layer.kind == "conv" for layer in spec.downsample)
        source = ends[1] if activated else start  # a projection of a pre-activation block reads what its norm wrote
        beside, others = walk.chain(block.name, spec.downsample, rows[len(spec.main) :], source)
        *before, last = *own, *beside
        if spec.shortcut != "none":  # what ends later adds the other path
            added = Move(ends[-1], last.written)
            if not beside:  # of a padded shortcut the zeros are nowhere
                added = Move(others[-1], numbers(min(spec.in_channels, spec.out_channels), block.out_size))
            last = last._replace(moves=(*last.moves[:-1], added, last.moves[-1]))
        yield from (*before, last)
        ends = [last.moves[-1].map]
        walk.taps[f"layer{block.stage}"] = ends[-1]
    yield from walk.chain("head", (*plan.tail, *plan.head), found.head, ends[-1])[0]


class Walk:
    """Goes through the layers of a plan and numbers the maps between them."""

    def __init__(self, plan: Plan) -> None:
        self.spec = plan.spec
        self.maps = count()
        self.taps: dict[str, int] = {}  # maps that a head may read, but for the last
        self.tapped = {tap.name: numbers(tap.channels, tap.size) for tap in plan.features}

    def chain(
        self, block: str, layers: Sequence[Layer], rows: Sequence[Row], source: int
    ) -> tuple[list[OwnLayer], list[int]]:
        """Layers of their own in a row from the map `source`; and the map before the first layer and behind each."""
        own, ends, waiting = list[OwnLayer](), [source], tuple[Move, ...]()
        gate = [row for layer, row in zip(layers, rows, strict=True) if layer.name.startswith("se.")]
        for place, (layer, row) in enumerate(zip(layers, rows, strict=True)):
            whole, before = numbers(row.in_channels, row.in_size), layers[place - 1].kind if place else ""
            if found := self.own(block, layer, row, gate):
                reads = (Move(source, found.read),) * found.passes
                if layer.kind == "globalpool":
                    reads = tuple(Move(self.taps.get(tap, source), self.tapped[tap]) for tap in self.spec.head.taps)
                source = next(self.maps)
                own.append(found._replace(moves=(*waiting, *reads, Move(source, found.written))))
                waiting = ()
            elif layer.kind == "norm" and layer.domain == "map" and before != "conv":
                waiting, source = (Move(source, whole), Move(new := next(self.maps), whole)), new
            ends.append(source)
        return own, ends

    def own(self, block: str, layer: Layer, row: Row, gate: Sequence[Row]) -> OwnLayer | None:
        """A layer that moves bytes of its own, still without its moves; None for another."""
        whole, wide = numbers(row.in_channels, row.in_size), row.in_channels
        if layer.name.startswith("se."):  # all of a gate are one
            if row is not gate[0]:
                return None
            macs, params = sum(each.macs for each in gate), sum(each.params for each in gate)
            return OwnLayer(block, f"{block}.se", self.spec.attention, macs, params, wide, wide, whole, whole, 2)
        if layer.kind == "norm" and layer.domain == "map" and self.spec.norm == "group":
            return OwnLayer(block, row.name, layer.kind, 0, row.params, wide, wide, whole, whole, 2)
        if layer.kind == "globalpool":
            read = sum(self.tapped[tap] for tap in self.spec.head.taps)
            return OwnLayer(block, row.name, layer.kind, 0, 0, wide, wide, read, row.out_channels)
        if layer.kind not in MOVED or is_identity(layer):
            return None
        summed, abreast = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        if abreast == 1:  # depthwise: the sums of all groups stand side by side
            abreast = layer.groups
        macs, params = unpadded_macs(layer, row), row.params
        return OwnLayer(
            block, row.name, layer.kind, macs, params, summed, abreast, read_by(layer, row), written_by(layer, row)
        )


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


def numbers(channels: int, size: Iterable[int]) -> int:
    """Numbers in a map."""
    return channels * prod(size)


def read_by(layer: Layer, row: Row) -> int:
    """Numbers of the input that a layer needs: a strided 1×1 no more positions than it gives."""
    if layer.domain == "pooled":
        return row.in_channels
    return numbers(
        row.in_channels, [min(n, out * layer.kernel) for n, out in zip(row.in_size, row.out_size, strict=True)]
    )


def written_by(layer: Layer, row: Row) -> int:
    """Numbers of the output."""
    return row.out_channels if layer.domain == "pooled" else numbers(row.out_channels, row.out_size)
