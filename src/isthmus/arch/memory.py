"""What training holds in memory, on paper: the operations of a stem or block, and which maps backward keeps of them.

`nn.memory` runs these operations and keeps what this file says; the bytes follow from the same table.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from isthmus.arch.block import BlockSpec, Layer

__all__ = ["Memory", "Step", "block_steps", "kept", "stem_steps"]

Memory = Literal["plain", "checkpoint", "recompute"]
Size = tuple[int, ...]


class Step(NamedTuple):
    """One operation of a chain: the name of its module, and which values it reads (0 the input, n what step n gives)."""

    name: str
    kind: str
    inputs: tuple[int, ...]
    layers: tuple[Layer, ...] = ()


def stem_steps(layers: Iterable[Layer]) -> tuple[Step, ...]:
    """The operations of a stem, or of any layers in a row."""
    steps: list[Step] = []
    follow(steps, layers, 0)
    return tuple(steps)


def block_steps(spec: BlockSpec) -> tuple[Step, ...]:
    """The operations of a block, main path first; none for a kind that paper does not know."""
    if spec.main[0].kind == "custom" or spec.shortcut == "custom":
        return ()
    steps: list[Step] = []
    preact = spec.kind == "preact_bottleneck"
    out = follow(steps, spec.main, 0)
    if spec.drop_path:
        steps.append(Step("drop_path", "drop", (out,)))
        out = len(steps)
    if spec.shortcut != "none":
        projects = any(layer.kind == "conv" for layer in spec.downsample)
        other = follow(steps, spec.downsample, 2 if preact and projects else 0)
        steps.append(Step("", "add", (out, other)))
        out = len(steps)
    if not preact:
        steps.append(Step("act", "act", (out,), (Layer("act", "act", spec.out_channels, spec.out_channels),)))
    return tuple(steps)


def follow(steps: list[Step], layers: Iterable[Layer], value: int) -> int:
    """Append layers in a row that begin at `value`; returns the value they end in."""
    for layer in layers:
        if layer.kind == "avgpool" and layer.kernel == 1:  # the identity
            continue
        if layer.name.startswith("se."):
            if steps[-1].kind == "gate":
                steps[-1] = steps[-1]._replace(layers=(*steps[-1].layers, layer))
                continue
            steps.append(Step("se", "gate", (value,), (layer,)))
        else:
            steps.append(Step(layer.name, layer.kind, (value,), (layer,)))
        value = len(steps)
    return value


def kept(steps: tuple[Step, ...], mode: Memory) -> frozenset[int]:
    """The values of a chain that wait for backward.

    `plain` keeps all that some backward reads: an activation its output, an addition nothing, the others their input.
    `recompute` keeps the input, the output and what convolutions of more than 1×1 gave: norms, activations and 1×1
    convolutions are cheap to run again. `checkpoint` keeps the input alone.
    """
    last = len(steps)
    if mode == "checkpoint":
        return frozenset((0,))
    if mode == "recompute":
        wide = {place for place, step in enumerate(steps, 1) if step.kind == "conv" and step.layers[0].kernel > 1}
        return frozenset({0, *wide, *({last} if steps[-1].kind == "act" else ())})
    reads = {
        place if step.kind == "act" else step.inputs[0]
        for place, step in enumerate(steps, 1)
        if step.kind not in ("add", "drop")
    }
    return frozenset(reads)
