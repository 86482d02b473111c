"""Where an ONNX graph's stem, residual blocks and tail begin and end, told by its additions alone.

From the end of the normal form backwards, every Add ends a block: both its ways lead back to the Add before, and what
they share belongs to neither.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from isthmus.weights.onnx.op import Op

__all__ = ["Block", "Parts", "of_kind", "parts"]


@dataclass(frozen=True, slots=True)
class Block:
    """A residual block in the graph: main path, shortcut, their addition, and the norm that both begin with."""

    lead: list[Op]
    main: list[Op]
    shortcut: list[Op]
    add: Op


@dataclass(frozen=True, slots=True)
class Parts:
    """A network in the graph: what is before the first block, the blocks, and what follows the last."""

    stem: list[Op]
    blocks: list[Block]
    tail: list[Op]
    preact: bool

    def __iter__(self) -> Iterator[Op]:
        """Every operation but the additions, and the activations behind them."""
        yield from self.stem
        for block in self.blocks:
            yield from (*block.lead, *block.main, *block.shortcut)
        yield from self.tail


def of_kind(ops: Iterable[Op], *kinds: str) -> list[Op]:
    """Those of the operations that are of one of these kinds."""
    return [op for op in ops if op.kind in kinds]


def parts(end: Op) -> Parts:
    """The parts of a network that ends in `end`; without an addition, all of it is stem. Raises WeightsError."""
    tail, start = _way(end)
    found: list[tuple[list[Op], list[Op], list[Op], Op]] = []
    while start.kind == "add":
        add = start
        (first, start), (second, other) = (_way(op) for op in add.inputs)
        if other is not start:
            add.node.fail("the two ways of a residual block were expected here, and they begin at different places")
        common = 0
        while common < min(len(first), len(second)) and first[common] is second[common]:
            common += 1
        shortcut, main = sorted((first[common:], second[common:]), key=lambda way: len(of_kind(way, "conv")))
        found.append((first[:common], main, shortcut, add))
    found.reverse()
    if not found:
        return Parts(tail, [], [], preact=False)
    preact = bool(tail) and tail[0].kind == "norm"
    stem, lead = _without_lead(*found[0][:2]) if preact else (found[0][0], [])
    blocks = [Block(lead, *found[0][1:])]
    for shared, main, shortcut, add in found[1:]:
        if not preact:
            _check_activation(shared, [*main, add])
        blocks.append(Block(shared if preact else [], main, shortcut, add))
    if not preact:
        _check_activation(tail[:1], [*tail, found[-1][-1]])
    return Parts(stem, blocks, tail if preact else tail[1:], preact)


def _way(op: Op) -> tuple[list[Op], Op]:
    """The operations that lead one after another to `op`, and the Add or the picture that they begin at."""
    way: list[Op] = []
    while op.kind not in ("add", "input"):
        way.append(op)
        op = op.inputs[0]
    return way[::-1], op


def _without_lead(stem: list[Op], main: list[Op]) -> tuple[list[Op], list[Op]]:
    """A pre-activation stem, and the norm and activation behind it that a block with a projection begins with."""
    if not main or main[0].kind != "conv":
        return stem, []
    normed = len(stem) > 1 and stem[-2].kind == "norm"  # if not, it was folded into the stem's convolution
    cut = len(stem) - (2 if normed else 1)
    return stem[:cut], stem[cut:]


def _check_activation(shared: list[Op], after: list[Op]) -> None:
    """Raise WeightsError unless one activation follows a post-activation block's addition."""
    if len(shared) != 1 or shared[0].kind not in ("act", "silu"):
        [*shared, *after][0].node.fail(
            "a ReLU or SiLU must follow a block's addition, or a norm begin every block and the head"
        )
