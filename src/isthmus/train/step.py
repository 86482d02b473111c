"""One training step in its pieces: what the network takes of a batch, the loss of it, and the move of the weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from isthmus.data.loader import Batch
from isthmus.data.mixing import mix
from isthmus.data.sources import DataSet
from isthmus.data.transform import normalise
from isthmus.nn.network import ResNet
from isthmus.runtime import Machine, Precision
from isthmus.train.loss import Objective, class_weights
from isthmus.train.outputs import Computed
from isthmus.train.prefix import Given, Prefix
from isthmus.train.recipe import Recipe
from isthmus.train.schedule import rate
from isthmus.train.state import RunState

__all__ = ["Behind", "Forward", "Inputs", "move"]


class Inputs(NamedTuple):
    """What the network and the objective take of a batch."""

    given: Given
    targets: Tensor


class Behind(nn.Module):
    """A network that goes on from what its frozen beginning gives; its forward takes the parts of a `Given`."""

    def __init__(self, net: ResNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, after: str = "", known: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits (N, classes)."""
        # Pictures go through the network itself, so that hooks on it are called.
        logits: Tensor = self.net.fc(self.net.pooled(images, after=after, known=known)) if after else self.net(images)
        return logits


@dataclass(frozen=True, kw_only=True, slots=True)
class Forward:
    """From a batch to its loss."""

    net: ResNet
    recipe: Recipe
    objective: Objective
    machine: Machine
    precision: Precision
    classes: int

    @classmethod
    def of(cls, net: ResNet, data: DataSet, recipe: Recipe, machine: Machine, precision: Precision) -> "Forward":
        """As a recipe says; `net` is on its device."""
        balanced = recipe.balance == "weights"
        weights = class_weights(list(data.train.counts().values())).to(machine.torch_device) if balanced else None
        objective = Objective(kind=recipe.loss, smoothing=recipe.label_smoothing, weights=weights)
        return cls(
            net=net,
            recipe=recipe,
            objective=objective,
            machine=machine,
            precision=precision,
            classes=len(data.classes),
        )

    def inputs(self, batch: Batch, prefix: Prefix, epoch: int) -> Inputs:
        """Normalised, channels_last and mixed on the network's device, or computed already; behind what is frozen."""
        device = self.machine.torch_device
        targets = batch.labels.to(device)
        if isinstance(batch, Computed):
            return Inputs(batch.given, targets)
        images = normalise(batch.images.to(device), self.net.preprocess).contiguous(memory_format=torch.channels_last)
        at = {"seed": self.recipe.seed, "epoch": epoch, "step": batch.step}
        images, targets = mix(images, targets, self.recipe.augment, classes=self.classes, **at)
        return Inputs(prefix(images), targets)

    def loss(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """The summed loss of the batch; `model` is a `Behind`, or a wrapped or compiled form of it."""
        with self.machine.autocast(self.precision):
            logits = model(*inputs.given)
        return self.objective(logits, inputs.targets)


def move(state: RunState, recipe: Recipe, steps: int) -> tuple[float, Tensor | None]:
    """Let the optimiser take the next step, of `steps` in an epoch, and the average follow.

    The rate that it took, and the norm of the gradient where it is clipped.
    """
    step = state.epoch * steps + state.step
    lr = rate(recipe, step, steps)
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    state.scaler.unscale_(state.optimizer)
    norm = None
    if recipe.clip_norm:
        norm = torch.nn.utils.clip_grad_norm_(state.net.parameters(), recipe.clip_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    state.step += 1
    if state.average is not None and (step + 1) % recipe.ema_every == 0:
        state.average.update_parameters(state.net)
    return lr, norm
