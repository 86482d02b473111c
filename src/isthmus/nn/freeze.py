"""Freezing that survives `.train()`, and the proof that what is frozen did not move."""

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from isthmus.errors import RunError, SpecError
from isthmus.messages import listed
from isthmus.nn.batchnorm import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from isthmus.nn.network import ResNet

__all__ = ["freeze", "frozen_sums", "require_unmoved"]

STEM = ("conv1", "bn1", "act1", "maxpool")
FROZEN_NORM = FrozenBatchNorm1d | FrozenBatchNorm2d | FrozenBatchNorm3d


def freeze(net: ResNet, until: str = "trunk") -> int:
    """Freeze a network from its input up to and including `until`; returns the number of frozen parameters.

    `until` is `none`, `stem`, a stage such as `layer3`, or `trunk` (all but the classifier). Frozen parts get no
    gradient and stay in evaluation under `net.train()`: batch-norm statistics do not move. Another call replaces
    the earlier one. Raises SpecError for an unknown name.
    """
    points = ("none", "stem", *net.stages, "trunk")
    if until not in points:
        raise SpecError(f"cannot freeze until {until!r}; known: {', '.join(points)}")
    tail = ("norm", "act") if net.spec.preact else ()
    prefix = {"none": (), "stem": STEM, "trunk": (*STEM, *net.stages, *tail)}
    frozen = prefix.get(until) or (*STEM, *net.stages[: points.index(until) - 1]) if until != "none" else ()
    net.frozen = frozen
    count = 0
    for name, child in net.named_children():
        for parameter in child.parameters():
            parameter.requires_grad_(name not in frozen)
            count += parameter.numel() * (name in frozen)
    net.train(net.training)
    return count


def frozen_sums(net: ResNet) -> dict[str, int]:
    """A checksum of every parameter and buffer that must not move, by its name: frozen parts and frozen statistics."""
    statistics = [name for name, module in net.named_modules() if isinstance(module, FROZEN_NORM)]
    names = {f"{module}.{buffer}" for module in statistics for buffer, _ in net.get_submodule(module).named_buffers()}
    return {
        name: checksum(value)
        for name, value in (*net.named_parameters(), *net.named_buffers())
        if name in names or name.partition(".")[0] in net.frozen
    }


def require_unmoved(before: Mapping[str, int], net: ResNet) -> None:
    """Raise RunError naming what moved since `before` (from `frozen_sums`), among what is still frozen."""
    moved = [name for name, found in frozen_sums(net).items() if before.get(name, found) != found]
    if moved:
        raise RunError(
            f"frozen, and yet changed: {listed(moved)}; something writes to the network's weights besides training "
            f"(a hook, an own block, another thread?); leave them alone, or freeze less"
        )


def checksum(value: Tensor) -> int:
    """CRC-32 of the bytes of a tensor."""
    flat = value.detach().cpu().contiguous().view(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data)
