"""Parameter groups and optimisers."""

from typing import Any

import torch
from torch import nn

from isthmus.nn.network import ResNet
from isthmus.train.lamb import Lamb
from isthmus.train.recipe import Recipe

__all__ = ["make_optimizer", "parameter_groups"]


def parameter_groups(net: ResNet, recipe: Recipe) -> list[dict[str, Any]]:
    """All parameters by part of the network and by decay, with the `lr_factor` of each; norms and biases do not decay.

    The rate falls by `layer_decay` from each part to the one before it: the head at the full rate times its own factor,
    then the stages from the last, then the stem (timm's coarse groups of its ResNets). Parameters that are frozen are
    here too, for the day that they thaw; an optimiser passes over what has no gradient.
    """
    depths = {name: depth for depth, name in enumerate(("fc", *reversed(net.stages), "stem"))}
    groups: dict[tuple[int, float], list[nn.Parameter]] = {}
    for name, child in net.named_children():
        # The final norm of a pre-activation network goes with the stage before it.
        depth = 1 if name == "norm" else depths.get(name, depths["stem"])
        for parameter in child.parameters():
            decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((depth, decay), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": decay,
            "lr_factor": recipe.layer_decay**depth if depth else recipe.head_lr_factor,
        }
        for (depth, decay), parameters in groups.items()
    ]


def make_optimizer(net: ResNet, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over all parameters of a network that is on its device already."""
    groups = parameter_groups(net, recipe)
    if recipe.optimizer == "lamb":
        return Lamb(groups, lr=recipe.lr, betas=(recipe.momentum, 0.999))
    # Fused, one pass over each parameter: on the CPU a step takes a third of the time of torch's default. It asks two
    # things in return: gradients lie in memory as their weights do (autograd sees to that; otherwise the CPU's step is
    # silently wrong), and a group thaws as a whole (SGD fails where part of a group has taken a step before).
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.momentum, 0.999), fused=True)
    nesterov = recipe.nesterov and recipe.momentum > 0
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov, fused=True)
