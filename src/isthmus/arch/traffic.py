"""What engines compute one after the other: layers with maps of their own, and which maps each reads and writes."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from math import prod
from typing import NamedTuple

from isthmus.arch.block import Layer
from isthmus.arch.cost import Row, block_rows, cost
from isthmus.arch.plan import Plan

__all__ = ["OwnLayer", "layers_of"]

Move = tuple[int, int]
"""Which map is read or written, and how many of its numbers for one picture."""
MOVED = ("conv", "blur", "maxpool", "avgpool", "linear")  # kinds that read one map and write another


class OwnLayer(NamedTuple):
    """A layer that moves bytes of its own: multiply-adds and numbers in maps for one picture, and its weights.

    `numbers` are those that must move; `moves` are what an engine moves that computes the layer alone, in order, also
    for a norm before it that is in no convolution, and for the sum of the block's paths where it ends the block.
    `widths` are the channels in and out of a group.
    """

    block: str
    name: str
    kind: str
    macs: int
    numbers: int
    params: int
    widths: tuple[int, int]
    moves: tuple[Move, ...]


def layers_of(plan: Plan) -> Iterator[OwnLayer]:
    """The layers of their own, in the order of the network; raises SpecError for a caller's own blocks."""
    walk, found = Walk(plan), cost(plan)
    own, end = walk.chain("stem", plan.stem, found.stem, next(walk.maps))
    yield from own
    for block in plan.blocks:
        rows, main, start = block_rows(block), len(block.spec.main), end
        own, end = walk.chain(block.name, block.spec.main, rows[:main], start)
        beside, other = walk.chain(block.name, block.spec.downsample, rows[main:], start)
        last = (beside or own)[-1]  # adds the other path to what it writes
        added = () if block.spec.shortcut == "none" else ((end if beside else other, last.moves[-1][1]),)
        yield from [*own, *beside][:-1]
        yield last._replace(moves=(*last.moves[:-1], *added, last.moves[-1]))
        end = last.moves[-1][0]
    yield from walk.chain("head", (*plan.tail, *plan.head), found.head, end)[0]


class Walk:
    """Goes through the layers of a plan and numbers the maps between them."""

    def __init__(self, plan: Plan) -> None:
        self.spec = plan.spec
        self.maps = count()
        # What the head reads: of the last map alone, or of those before it too.
        self.tapped = sum(numbers(tap.channels, tap.size) for tap in plan.features if tap.name in plan.spec.head.taps)

    def chain(
        self, block: str, layers: Sequence[Layer], rows: Sequence[Row], source: int
    ) -> tuple[list[OwnLayer], int]:
        """Layers of their own in a row from the map `source`, and the map that they end in."""
        own: list[OwnLayer] = []
        gate = [row for layer, row in zip(layers, rows, strict=True) if layer.name.startswith("se.")]
        here, waiting = "", tuple[Move, ...]()
        for layer, row in zip(layers, rows, strict=True):
            before, here = here, layer.kind
            name, kind, macs, params = row.name, str(layer.kind), 0, row.params
            whole = numbers(row.in_channels, row.in_size)
            times, needed, made = 1, whole, whole
            if row in gate:
                if row is not gate[0]:
                    continue
                name, kind, times = f"{block}.se", self.spec.attention, 2
                macs, params = sum(each.macs for each in gate), sum(each.params for each in gate)
            elif layer.kind == "norm" and layer.domain == "map":
                if self.spec.norm != "group":
                    if before != "conv":
                        target = next(self.maps)
                        waiting, source = ((source, whole), (target, whole)), target
                    continue
                times = 2  # read to its end before the first number is written
            elif layer.kind == "globalpool":
                needed, made = self.tapped, row.out_channels
            elif layer.kind in MOVED and not is_identity(layer):
                macs, needed, made = unpadded_macs(layer, row), read(layer, row), written(layer, row)
            else:
                continue
            target = next(self.maps)
            own.append(
                OwnLayer(
                    block,
                    name,
                    kind,
                    macs,
                    needed + made,
                    params,
                    (layer.in_channels // layer.groups, layer.out_channels // layer.groups),
                    (*waiting, *((source, needed),) * times, (target, made)),
                )
            )
            waiting, source = (), target
        return own, source


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


def read(layer: Layer, row: Row) -> int:
    """Numbers of the input that a layer needs: a strided 1×1 no more positions than it gives."""
    if layer.domain == "pooled":
        return row.in_channels
    return numbers(
        row.in_channels, [min(n, out * layer.kernel) for n, out in zip(row.in_size, row.out_size, strict=True)]
    )


def written(layer: Layer, row: Row) -> int:
    """Numbers of the output."""
    return row.out_channels if layer.domain == "pooled" else numbers(row.out_channels, row.out_size)
