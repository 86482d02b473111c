"""The frozen beginning of a network: which it is in an epoch, and running it in its fast form without autograd."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from isthmus.arch.plan import out_size, plan
from isthmus.arch.preprocess import Preprocess
from isthmus.nn.fuse import fast_form
from isthmus.nn.network import ResNet
from isthmus.runtime import Machine, Precision, torch_dtype
from isthmus.train.recipe import Recipe

__all__ = ["Given", "Prefix", "frozen_at"]


def frozen_at(recipe: Recipe, stages: Sequence[str], epoch: int) -> str:
    """The point until which the network is frozen in an epoch: `recipe.freeze`, or earlier under gradual unfreezing.

    Every `unfreeze_epochs` epochs one more part thaws, from the back (Howard & Ruder 2018).
    """
    if not recipe.unfreeze_epochs or recipe.freeze == "none":
        return recipe.freeze
    points = ("none", "stem", *stages)
    place = len(points) - 1 if recipe.freeze == "trunk" else points.index(recipe.freeze)
    thawed = int(epoch / recipe.unfreeze_epochs)
    return points[max(place - thawed, 0)] if thawed else recipe.freeze


class Given(NamedTuple):
    """What the rest of a network is given, as `ResNet.pooled` takes it.

    Normalised pictures (N, C, H, W); or, with `after`, the map behind that point (empty where the head does not need
    it), and what the head's taps up to there are when pooled.
    """

    images: Tensor
    after: str = ""
    known: Mapping[str, Tensor] = {}


class Prefix:
    """A network from its input up to a point of `freeze`, ready to run; from `none` on, nothing.

    It is a copy: frozen parameters that move all the same move without it.
    """

    def __init__(self, net: ResNet, until: str, machine: Machine, precision: Precision) -> None:
        self.until, self.machine, self.device, self.spec = until, machine.name, machine.torch_device, net.spec
        whole = until == "trunk" or (until == net.stages[-1] and not net.spec.preact)
        points = ("stem", *net.stages)
        inside = points if whole else points[: points.index(until) + 1] if until != "none" else ()
        taps = net.spec.head.taps
        self.taps = tuple(tap for tap in taps if tap in inside or (tap == "last" and whole))
        self.after = "" if until == "none" else inside[-1]
        self.needs_map = len(self.taps) < len(taps)
        # fp32 stands for the network's own, which may be wider.
        self.dtype = next(net.parameters()).dtype if precision == "fp32" else torch_dtype(precision)
        self.form: ResNet | None = None
        if self.after:
            self.form = fast_form(net, self.names, self.device, self.dtype)

    @property
    def names(self) -> tuple[str, ...]:
        """The maps that it reads."""
        return tuple(dict.fromkeys((*self.taps, *((self.after,) if self.needs_map else ()))))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Given:
        """What comes of normalised pictures (N, C, H, W); the pooled values are fp32, or fp64 in a network of that."""
        if self.form is None:
            return Given(images)
        maps = self.form.features(images.to(self.dtype, memory_format=torch.channels_last), self.names)
        wide = torch.promote_types(self.dtype, torch.float32)
        known = {tap: self.form.pool(maps[tap], wide) for tap in self.taps}
        if not self.needs_map:
            return Given(images.new_empty((len(images), 0)), self.after, known)
        x = maps[self.after]
        return Given(self.form.maxpool(x) if self.after == "stem" else x, self.after, known)

    def shapes(self, record: Preprocess) -> tuple[tuple[int, ...], dict[str, int]]:
        """The map (C, H, W) for pictures of `record`, () where it is not needed, and the width of each pooled tap."""
        paper = plan(self.spec, record.crop)
        features = {feature.name: feature for feature in paper.features}
        widths = {tap: features[tap].channels * len(self.spec.head.pools) for tap in self.taps}
        if not self.needs_map:
            return (), widths
        size = out_size(paper.stem, paper.image_size) if self.after == "stem" else features[self.after].size
        return (features[self.after].channels, *size), widths
