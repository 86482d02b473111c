"""Gradient norms and update ratios of each block, over a few real steps."""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, pstdev
from typing import NamedTuple

import torch
from torch import Tensor, nn

from isthmus.diagnose.findings import BlockSignals, Finding, Spread
from isthmus.messages import listed

__all__ = ["BlockGradient", "Step", "block_gradients", "gradient_findings", "norm_of", "signals", "take_steps"]

Loss = Callable[[Tensor, Tensor], Tensor]
"""Mean loss of logits (N, classes) against labels (N,)."""
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]

# First block's gradient over the last one's, or the other way round. Before training those with shortcuts have up to
# 3e3 (152 layers; 164 of pre-activation), and plain networks of 56 layers with batch norm 2.5e4: docs/depth.md.
FAR = 1e4
LARGE, SMALL = 0.1, 1e-7  # of |dw| / |w|: a tenth of a weight at once; less than single precision holds (2^-23)


class BlockGradient(NamedTuple):
    """Norms of the gradients of one block: in all its parameters, and in its input map, rms over pictures.

    None where nothing of it trains, or no gradient goes so far back.
    """

    name: str
    parameters: float | None
    inputs: float | None


class Step(NamedTuple):
    """One step: its loss, the gradients of each block and |dw| / |w| of those that train."""

    loss: float
    gradients: tuple[BlockGradient, ...]
    updates: dict[str, float]


def norm_of(tensors: Iterable[Tensor | None]) -> float | None:
    """The Euclidean norm of all of them together, in fp64; None of none."""
    squares = [float(exact(tensor.detach()).square().sum()) for tensor in tensors if tensor is not None]
    return math.sqrt(sum(squares)) if squares else None


def exact(tensor: Tensor) -> Tensor:
    """The same values in fp64, which Apple's GPUs do not have: on the CPU then."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def block_gradients(
    net: nn.Module, images: Tensor, labels: Tensor, blocks: Sequence[str], loss: Loss
) -> tuple[float, tuple[BlockGradient, ...]]:
    """The mean loss of a batch, and the gradient norms of `blocks` (names of modules) in the mode that `net` is in.

    The gradient of a picture's input map is that of the picture's own loss. Parameters keep theirs in `.grad`.
    """
    maps: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        if x.requires_grad:
            x.retain_grad()
            maps[name] = x

    handles = [
        net.get_submodule(name).register_forward_pre_hook(lambda _block, inputs, name=name: keep(name, inputs[0]))
        for name in blocks
    ]
    try:
        net.zero_grad(set_to_none=True)
        value = loss(net(images), labels)
        value.backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    rows = []
    for name in blocks:
        into = norm_of([maps[name].grad]) if name in maps else None
        # The mean loss has 1 / N of each picture's own gradient: N times it, over the root of N pictures.
        each = None if into is None else into * math.sqrt(len(images))
        rows.append(BlockGradient(name, norm_of(each.grad for each in net.get_submodule(name).parameters()), each))
    return float(value.detach()), tuple(rows)


def take_steps(
    net: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    blocks: Sequence[str],
    loss: Loss,
    make_optimizer: MakeOptimizer,
) -> list[Step]:
    """Train `net`, in place and in the mode that it is in, a step a batch, and measure each block; stops at a NaN."""
    optimizer = make_optimizer(net)
    steps = []
    for images, labels in batches:
        value, gradients = block_gradients(net, images, labels, blocks, loss)
        before = {
            name: [(each, each.detach().clone()) for each in net.get_submodule(name).parameters() if each.requires_grad]
            for name in blocks
        }
        optimizer.step()
        updates = {
            name: (norm_of(now - then for now, then in pairs) or 0.0)
            / max(norm_of(then for _, then in pairs) or 0.0, 1e-30)
            for name, pairs in before.items()
            if pairs
        }
        steps.append(Step(value, gradients, updates))
        if not math.isfinite(value):
            break
    optimizer.zero_grad(set_to_none=True)
    return steps


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and standard deviation, which is no number where a value is none; None of none."""
    if not values:
        return None
    deviation = pstdev(values) if all(map(math.isfinite, values)) else math.nan  # pstdev itself would raise
    return Spread(mean=fmean(values), deviation=deviation)


def signals(
    net: nn.Module, blocks: Sequence[str], scales: dict[str, float], steps: Sequence[Step]
) -> tuple[BlockSignals, ...]:
    """One row a block: `scales` are the rms of their outputs, `net` has the weights before the steps."""
    rows = []
    for place, name in enumerate(blocks):
        taken = [step.gradients[place] for step in steps]
        rows.append(
            BlockSignals(
                name=name,
                weight=norm_of(net.get_submodule(name).parameters()) or 0.0,
                scale=scales[name],
                gradient=spread([each.parameters for each in taken if each.parameters is not None]),
                input_gradient=spread([each.inputs for each in taken if each.inputs is not None]),
                update=spread([step.updates[name] for step in steps if name in step.updates]),
            )
        )
    return tuple(rows)


def gradient_findings(rows: Sequence[BlockSignals], steps: int) -> list[Finding]:
    """Gradients that vanish, explode or are missing, and steps that are far too long or short."""
    found = []
    known = [(row.name, row.gradient.mean) for row in rows if row.gradient is not None]
    broken = [name for name, value in known if value == 0 or not math.isfinite(value)]
    over = f"over {steps} step{'s' * (steps > 1)}"
    some = len(broken) < len(known)
    bad = dict(known)[broken[0]] if broken else 0.0
    if broken and (some or not math.isfinite(bad)):
        found.append(
            Finding(
                kind="no_gradient",
                severity="warning",
                where=listed(broken),
                found=f"The gradient in the weights of {broken[0]} is {bad:g} {over}, "
                f"{'while other blocks have one' if some else 'as in all blocks'}.",
                mend="Look at what stands behind it: scales of 0, activations that are dead, or a path that is cut."
                if some
                else "Lower the rate, or clip gradients (clip_norm=1): they leave all numbers within these steps.",
            )
        )
    paths = [(row.name, row.input_gradient.mean) for row in rows if row.input_gradient is not None]
    paths = [(name, value) for name, value in paths if value > 0 and math.isfinite(value)]
    if len(paths) > 1:
        (first, early), (last, late) = paths[0], paths[-1]
        factor = early / late
        if not 1 / FAR <= factor <= FAR:
            grows = factor > 1
            found.append(
                Finding(
                    kind="exploding_gradient" if grows else "vanishing_gradient",
                    severity="warning",
                    where=first,
                    found=f"The gradient that reaches {first} is {early:.2g} and that at {last} {late:.2g} {over}: it "
                    f"{'grows' if grows else 'shrinks'} {factor if grows else 1 / factor:,.0f}-fold on the way back.",
                    mend="Give blocks shortcuts and norms where they have none; else lower the rate (or clip_norm=1), "
                    "and train fewer blocks."
                    if grows
                    else "Give blocks shortcuts and norms where they have none, or start from trained weights.",
                )
            )
    updates = [(row.name, row.update.mean) for row in rows if row.update is not None]
    updates = [(name, value) for name, value in updates if math.isfinite(value)]
    large = sorted(((value, name) for name, value in updates if value > LARGE), reverse=True)
    if large:
        found.append(
            Finding(
                kind="large_updates",
                severity="warning",
                where=listed(name for _, name in large),
                found=f"A step at the peak rate changes the weights of {large[0][1]} by {large[0][0]:.0%} of their "
                f"length (|dw| / |w|, mean {over}); about 0.1% is usual.",
                mend=f"Divide lr by {10 ** math.ceil(math.log10(large[0][0] / LARGE) or 1):g}, or warm up longer.",
            )
        )
    moving = [(value, name) for name, value in updates if value < SMALL]
    if moving and len(moving) == len(updates):
        most = max(moving)
        found.append(
            Finding(
                kind="small_updates",
                severity="warning",
                where="the network",
                found=f"A step at the peak rate changes no block by more than {most[0]:.1g} of its weights' length "
                f"({most[1]}, mean {over}), which single precision rounds away; about 1e-3 is usual.",
                mend="Raise lr, or look whether the loss is next to 0 already.",
            )
        )
    return found
