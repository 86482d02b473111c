"""What a plan costs: parameters, multiply-adds, activations, receptive field. A MAC is two FLOPs; both are named.

Counted: every convolution, blur filter and linear layer. Norms, activations, pools and additions cost parameters or
memory traffic, not MACs. `activations` are the output elements of convolutions and linear layers (Radosavovic et al.
2020).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod
from typing import Literal, NamedTuple

from isthmus.arch.block import Layer
from isthmus.arch.plan import Plan, PlannedBlock, plan
from isthmus.arch.spec import NetSpec
from isthmus.errors import SpecError

__all__ = ["By", "Cost", "Row", "block_cost", "cost", "layer_cost"]

By = Literal["stage", "block", "layer"]
Size = tuple[int, ...]


class Row(NamedTuple):
    """Cost of one layer, block or stage for one picture; sizes are those of its input and output maps in pixels."""

    name: str
    kind: str
    in_channels: int
    out_channels: int
    in_size: Size
    out_size: Size
    params: int
    macs: int
    activations: int

    @property
    def flops(self) -> int:
        """Floating-point operations: two a MAC."""
        return 2 * self.macs


def layer_cost(layer: Layer, size: Size) -> tuple[int, int, int]:
    """Parameters, MACs and activations of a layer whose output map has `size`."""
    if layer.kind == "norm":
        return 2 * layer.out_channels, 0, 0
    if layer.kind not in ("conv", "linear", "blur"):
        return 0, 0, 0
    if layer.domain == "channels":
        return layer.kernel, layer.kernel * layer.out_channels, layer.out_channels
    if layer.domain == "pooled":
        weights, positions = layer.in_channels * layer.out_channels, 1
    else:
        weights = layer.in_channels // layer.groups * layer.out_channels * layer.kernel ** len(size)
        positions = prod(size)
    params = 0 if layer.kind == "blur" else weights + layer.out_channels * layer.bias
    return params, weights * positions, layer.out_channels * positions


def chain_rows(prefix: str, layers: Iterable[Layer], size: Size) -> Iterator[Row]:
    """One row a layer of a chain that starts on a map of `size`."""
    for layer in layers:
        after = layer.out_size(size)
        costs = layer_cost(layer, after)
        yield Row(prefix + layer.name, layer.kind, layer.in_channels, layer.out_channels, size, after, *costs)
        size = after


def block_rows(block: PlannedBlock) -> list[Row]:
    """One row a layer of a block, main path first; raises SpecError for a block that paper does not know."""
    if block.spec.main[0].kind == "custom":
        raise SpecError(
            f"{block.name} is a block of your own kind {block.spec.kind!r}, which cannot be costed on paper; "
            f"use isthmus.nn.trace.trace_cost(net)"
        )
    prefix = f"{block.name}."
    main = chain_rows(prefix, block.spec.main, block.in_size)
    return [*main, *chain_rows(prefix, block.spec.downsample, block.in_size)]


def reach(layers: Iterable[Layer]) -> tuple[int, int, int]:
    """First and last input position, from its own, that one output position of a chain sees, and the chain's stride."""
    first, last, stride = 0, 0, 1
    for layer in layers:
        if layer.domain == "map":
            first -= layer.padding * stride
            last += ((layer.kernel - 1) * layer.dilation - layer.padding) * stride
            stride *= layer.stride
    return first, last, stride


def total(rows: Iterable[Row]) -> tuple[int, int, int]:
    """Sums of parameters, MACs and activations."""
    params = macs = activations = 0
    for row in rows:
        params, macs, activations = params + row.params, macs + row.macs, activations + row.activations
    return params, macs, activations


def block_cost(block: PlannedBlock) -> tuple[int, int, int]:
    """Parameters, MACs and activations of one block for one picture."""
    return total(block_rows(block))


@dataclass(frozen=True)
class Cost:
    """Cost of a plan for one picture; see the module for what is counted."""

    plan: Plan

    @cached_property
    def blocks(self) -> tuple[Row, ...]:
        """One row a block; equal blocks on equal maps are counted once and listed each."""
        known: dict[tuple[int, Size], tuple[int, int, int]] = {}
        rows = []
        for block in self.plan.blocks:
            key = (id(block.spec), block.in_size)
            if key not in known:
                known[key] = block_cost(block)
            spec = block.spec
            rows.append(
                Row(
                    block.name,
                    spec.kind,
                    spec.in_channels,
                    spec.out_channels,
                    block.in_size,
                    block.out_size,
                    *known[key],
                )
            )
        return tuple(rows)

    @cached_property
    def stem(self) -> tuple[Row, ...]:
        """One row a layer of the stem."""
        return tuple(chain_rows("", self.plan.stem, self.plan.image_size))

    @cached_property
    def head(self) -> tuple[Row, ...]:
        """One row a layer after the last block."""
        size = self.plan.blocks[-1].out_size
        return tuple(chain_rows("", (*self.plan.tail, *self.plan.head), size))

    @cached_property
    def totals(self) -> tuple[int, int, int]:
        """Parameters, MACs and activations of the whole network."""
        return total((*self.stem, *self.blocks, *self.head))

    @property
    def params(self) -> int:
        """Learnable numbers."""
        return self.totals[0]

    @property
    def macs(self) -> int:
        """Multiply-adds for one picture."""
        return self.totals[1]

    @property
    def flops(self) -> int:
        """Floating-point operations for one picture: two a MAC."""
        return 2 * self.macs

    @property
    def activations(self) -> int:
        """Output elements of convolutions and linear layers for one picture."""
        return self.totals[2]

    @cached_property
    def receptive_field(self) -> int:
        """Side in pixels of the input region that one position of the last map sees; attention sees everything."""
        first, last, jump = 0, 0, 1
        for main, shortcut in (
            (self.plan.stem, ()),
            *((block.spec.main, block.spec.downsample) for block in self.plan.blocks),
        ):
            # A pooled shortcut of stride 3 or more reaches further than the 3×3 beside it.
            (main_first, main_last, stride), (other_first, other_last, _) = reach(main), reach(shortcut)
            first += jump * min(main_first, other_first)
            last += jump * max(main_last, other_last)
            jump *= stride
        return last - first + 1

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """One row a layer, in the order of the network."""
        blocks = (row for block in self.plan.blocks for row in block_rows(block))
        return (*self.stem, *blocks, *self.head)

    def by(self, level: By) -> tuple[Row, ...]:
        """Rows by stage, block or layer; the stem and the head are one row each unless by layer."""
        if level == "layer":
            return self.rows
        stem, head = merged("stem", self.stem), merged("head", self.head)
        if level == "block":
            return (stem, *self.blocks, head)
        stages = groupby(self.blocks, key=lambda row: row.name.partition(".")[0])
        return (stem, *(merged(name, tuple(rows)) for name, rows in stages), head)


def merged(name: str, rows: tuple[Row, ...]) -> Row:
    """Several rows in sequence as one."""
    first, last = rows[0], rows[-1]
    kind = rows[-1].kind if name.startswith("layer") else name
    sizes = first.in_channels, last.out_channels, first.in_size, last.out_size
    return Row(name, kind, *sizes, *total(rows))


def cost(plan_or_name: Plan | NetSpec | str, image_size: int | Size = 224) -> Cost:
    """The cost of a plan, of a spec or of a named variant at `image_size` pixels; raises SpecError."""
    return Cost(plan_or_name if isinstance(plan_or_name, Plan) else plan(plan_or_name, image_size))
