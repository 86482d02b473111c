"""Freezing that survives `.train()`."""

from isthmus.errors import SpecError
from isthmus.nn.network import ResNet

__all__ = ["freeze"]

STEM = ("conv1", "bn1", "act1", "maxpool")


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
