"""What training holds in memory, on paper: the operations of a network, what backward keeps of them, and the bytes.

`nn.memory` runs a chain of these operations and keeps what `kept` says, so bytes and behaviour have one source. `plain`
tells what torch's own autograd keeps.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Literal, NamedTuple

from isthmus.arch.block import NORM_GROUPS, Activation, BlockSpec, Layer, Norm
from isthmus.arch.cost import cost
from isthmus.arch.plan import Plan
from isthmus.errors import SpecError

__all__ = [
    "Memory",
    "Optimizer",
    "Precision",
    "Step",
    "TrainingMemory",
    "block_steps",
    "kept",
    "largest_batch",
    "stem_steps",
    "training_memory",
]

Memory = Literal["plain", "checkpoint", "recompute"]
Optimizer = Literal["sgd", "adamw", "lamb"]
Precision = Literal["fp32", "bf16", "fp16"]
Size = tuple[int, ...]

FULL = 4  # bytes of fp32, in which weights, gradients, states and statistics are held whatever the maps are in
ITEM = {"fp32": 4, "bf16": 2, "fp16": 2}
INDEX = 8  # bytes of int64: max pools remember where each maximum was
COSTLY = 512  # input channels; a wider 1×1 costs more than a 3×3 of 64, and in ResNet-50 gives small maps
STATES = {"sgd": 1, "adamw": 2, "lamb": 2}  # numbers beside each weight: momentum; first and second moment


class Step(NamedTuple):
    """One operation of a chain: its module's name, its kind, and the values it reads (0 is the input, n step n's)."""

    name: str
    kind: str
    inputs: tuple[int, ...]
    layers: tuple[Layer, ...] = ()


@cache
def stem_steps(layers: tuple[Layer, ...], activation: Activation = "relu") -> tuple[Step, ...]:
    """The operations of a stem, or of any layers in a row."""
    steps: list[Step] = []
    follow(steps, layers, 0, activation)
    return tuple(steps)


@cache
def block_steps(spec: BlockSpec) -> tuple[Step, ...]:
    """The operations of a block, main path first; none for a kind that paper does not know."""
    if spec.main[0].kind == "custom":
        return ()
    steps: list[Step] = []
    preact = spec.kind == "preact_bottleneck"
    out = follow(steps, spec.main, 0, spec.activation)
    if spec.drop_path:
        steps.append(Step("drop_path", "drop", (out,)))
        out = len(steps)
    if spec.shortcut == "custom":
        steps.append(Step("downsample", "custom", (2 if preact else 0,)))
        steps.append(Step("", "add", (out, len(steps))))
    elif spec.shortcut != "none":
        projects = any(layer.kind == "conv" for layer in spec.downsample)
        other = follow(steps, spec.downsample, 2 if preact and projects else 0, spec.activation)
        steps.append(Step("", "add", (out, other)))
    if not preact:
        steps.append(Step("act", spec.activation, (len(steps),)))
    return tuple(steps)


def follow(steps: list[Step], layers: Iterable[Layer], value: int, activation: Activation) -> int:
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
            steps.append(Step(layer.name, activation if layer.kind == "act" else layer.kind, (value,), (layer,)))
        value = len(steps)
    return value


READS_NOTHING = ("add", "drop", "pad", "zeropad")  # in backward, of their maps


def kept(steps: tuple[Step, ...], mode: Memory) -> frozenset[int]:
    """The values of a chain that wait for backward.

    `plain` keeps all that some backward reads: of a ReLU its output, of an addition nothing, of the others their input.
    `recompute` keeps the input, the output where it is a ReLU's, and what COSTLY convolutions gave: norms, activations
    and the other convolutions are cheap to run again. `checkpoint` keeps the input alone.
    """
    if mode == "checkpoint":
        return frozenset((0,))
    places = range(1, len(steps) + 1)
    if mode == "recompute":
        costly = {place for place, step in zip(places, steps, strict=True) if step.kind == "conv" and is_costly(step)}
        return frozenset({0, *costly, *([len(steps)] if steps[-1].kind == "relu" else [])})
    return frozenset(
        place if step.kind == "relu" else step.inputs[0]
        for place, step in zip(places, steps, strict=True)
        if step.kind not in READS_NOTHING
    )


def is_costly(step: Step) -> bool:
    """Whether to keep what a convolution gave rather than to run it again."""
    layer = step.layers[0]
    return layer.kernel > 1 or layer.in_channels > COSTLY


class Bytes(NamedTuple):
    """Bytes for each picture of a batch, and bytes whatever the batch."""

    picture: int
    fixed: int = 0

    def plus(self, other: "Bytes") -> "Bytes":
        """Both together."""
        return Bytes(self.picture + other.picture, self.fixed + other.fixed)


@dataclass(frozen=True)
class Ledger:
    """What a chain of operations keeps, for maps of `item` bytes a number."""

    mode: Memory
    item: int
    norm: Norm

    def shapes(self, steps: tuple[Step, ...], channels: int, size: Size) -> list[tuple[int, Size]]:
        """Channels and map size of every value of a chain."""
        found = [(channels, size)]
        for step in steps:
            channels, size = found[step.inputs[0]]
            if step.layers and step.kind != "gate":
                channels, size = step.layers[0].out_channels, step.layers[0].out_size(size)
            found.append((channels, size))
        return found

    def maps(self, steps: tuple[Step, ...], channels: int, size: Size, mode: Memory) -> int:
        """Bytes a picture of the values kept, but for the last, which is the next chain's first."""
        shapes = self.shapes(steps, channels, size)
        return sum(self.item * elements(*shapes[value]) for value in kept(steps, mode) if value < len(steps))

    def chain(self, steps: tuple[Step, ...], channels: int, size: Size) -> Bytes:
        """All that a chain keeps, but for its last value."""
        shapes = self.shapes(steps, channels, size)
        total = Bytes(self.maps(steps, channels, size, self.mode))
        if self.mode != "checkpoint":
            for place, step in enumerate(steps, 1):
                total = total.plus(self.beside(step, shapes[step.inputs[0]], shapes[place]))
        return total

    def beside(self, step: Step, before: tuple[int, Size], after: tuple[int, Size]) -> Bytes:
        """What one operation keeps beside its maps: statistics, masks; in plain mode also what torch keeps."""
        item, plain, channels = self.item, self.mode == "plain", before[0]
        layer = step.layers[0] if step.layers else None
        if step.kind == "drop":
            return Bytes(item)
        if step.kind == "norm" and self.norm != "group":
            return Bytes(0, 2 * channels * FULL)
        if not plain or layer is None:
            return Bytes(0)
        if step.kind == "norm":
            return Bytes(2 * NORM_GROUPS * item)
        if step.kind == "maxpool":
            return Bytes(INDEX * elements(*after))
        if step.kind == "avgpool" and layer.stride == 1:  # the map is padded first
            return Bytes(item * elements(channels, tuple(side + layer.kernel - 1 for side in before[1])))
        copied = sum(copied_weights(each, len(before[1])) for each in step.layers) * (item if item < FULL else 0)
        if step.kind == "blur":
            return Bytes(item * elements(channels, tuple(side + 2 for side in before[1])), copied)
        if step.kind == "gate":  # pooled map and sigmoid, and the squeezed map between two convolutions
            squeezed = step.layers[0].out_channels * (len(step.layers) - 1)
            return Bytes(item * (2 * channels + squeezed), copied)
        return Bytes(0, copied)


def elements(channels: int, size: Size) -> int:
    """Numbers in a map."""
    return channels * prod(size)


def copied_weights(layer: Layer, dims: int) -> int:
    """Weights of which autocast makes a copy that waits for backward."""
    if layer.kind not in ("conv", "linear", "blur"):
        return 0
    if layer.domain == "channels":
        return layer.kernel
    over = 0 if layer.domain == "pooled" else dims
    return layer.in_channels // layer.groups * layer.out_channels * prod((layer.kernel,) * over)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingMemory:
    """Bytes that training holds: `saved` waits for backward, `transient` comes and goes within one block's backward.

    `saved` is exact but for the loss; `transient` is an estimate. Not in it: the libraries themselves, the allocator's
    rounding, and the batches that wait in the loader.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    saved: int
    transient: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.average + self.saved + self.transient


def training_memory(
    plan: Plan,
    *,
    batch: int,
    precision: Precision = "fp32",
    memory: Memory = "plain",
    optimizer: Optimizer = "sgd",
    ema: bool = False,
) -> TrainingMemory:
    """What training all of a network holds for `batch` pictures at once; raises SpecError for a caller's own blocks."""
    if batch < 1:
        raise SpecError(f"batch is {batch}; it must be at least 1")
    params = FULL * cost(plan).params
    buffers = (
        FULL * 2 * sum(row.out_channels for row in cost(plan).rows if row.kind == "norm") * (plan.spec.norm != "group")
    )
    saved, transient = map_bytes(plan, ITEM[precision], memory)
    return TrainingMemory(
        weights=params + buffers,
        gradients=params,
        optimizer=STATES[optimizer] * params,
        average=(params + buffers) * ema,
        saved=saved.picture * batch + saved.fixed,
        transient=transient * batch,
    )


def largest_batch(
    plan: Plan,
    limit: int,
    *,
    precision: Precision = "fp32",
    memory: Memory = "plain",
    optimizer: Optimizer = "sgd",
    ema: bool = False,
) -> int:
    """The most pictures at once that train within `limit` bytes; 0 where not even one does."""
    one, two = (
        training_memory(plan, batch=batch, precision=precision, memory=memory, optimizer=optimizer, ema=ema).total
        for batch in (1, 2)
    )
    return max(0, (limit - (2 * one - two)) // (two - one))


def map_bytes(plan: Plan, item: int, memory: Memory) -> tuple[Bytes, int]:
    """What waits for backward, and the bytes a picture that come and go within the widest chain."""
    spec = plan.spec
    size = plan.image_size
    # A head that reads the stem's map keeps torch from running stem and pool as one.
    ledger = Ledger(memory, item, spec.norm)
    first = Ledger("plain", item, spec.norm) if "stem" in spec.head.taps else ledger
    steps = stem_steps(plan.stem, spec.activation)
    total = first.chain(steps, spec.in_channels, size)
    if first.mode != "plain":  # the picture waits as it came, in fp32
        total = total.plus(Bytes((FULL - item) * elements(spec.in_channels, size)))
    widest = working_set(first, steps, spec.in_channels, size)
    known: dict[tuple[BlockSpec, Size], tuple[Bytes, int]] = {}
    for block in plan.blocks:
        key = block.spec, block.in_size
        if key not in known:
            steps = block_steps(block.spec)
            if not steps:
                raise SpecError(
                    f"{block.name} is a block of your own kind {block.spec.kind!r}, whose memory is not known on paper"
                )
            shape = block.spec.in_channels, block.in_size
            known[key] = ledger.chain(steps, *shape), working_set(ledger, steps, *shape)
        held, working = known[key]
        total, widest = total.plus(held), max(widest, working)
    return total.plus(last_bytes(plan, item, memory)), widest


def working_set(ledger: Ledger, steps: tuple[Step, ...], channels: int, size: Size) -> int:
    """Bytes a picture while a chain runs backward: what it runs again, and the gradients of its two widest maps."""
    again = ledger.maps(steps, channels, size, "plain") - ledger.maps(steps, channels, size, ledger.mode)
    widest = sorted(elements(*shape) for shape in ledger.shapes(steps, channels, size))[-2:]
    return max(again, 0) + ledger.item * sum(widest)


def last_bytes(plan: Plan, item: int, memory: Memory) -> Bytes:
    """What waits behind the blocks: the last map, its norm, the pooled features and the classifier."""
    head, ledger = plan.spec.head, Ledger("plain", item, plan.spec.norm)
    block = plan.blocks[-1]
    last = elements(block.spec.out_channels, block.out_size)
    tail = stem_steps(plan.tail, plan.spec.activation)
    # A ReLU keeps its output, a maximum its input. What the tail keeps it keeps in every mode.
    keeps = (tail or block_steps(block.spec))[-1].kind == "relu" and (plan.spec.preact or memory != "checkpoint")
    total = Bytes(item * last * (keeps or "max" in head.pools))
    total = total.plus(ledger.chain(tail, block.spec.out_channels, block.out_size))
    if "max" in head.pools:
        total = total.plus(Bytes(item * plan.num_features // len(head.pools)))
    for layer in plan.head:
        if layer.kind == "norm":
            total = total.plus(Bytes(item * layer.in_channels, 2 * layer.in_channels * FULL))
        if layer.kind == "linear":
            copied = layer.in_channels * layer.out_channels * (item if item < FULL else 0)
            total = total.plus(Bytes(item * layer.in_channels, copied))
    return total
