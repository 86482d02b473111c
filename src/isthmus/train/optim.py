"""Parameter groups, optimisers, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from isthmus.nn.network import ResNet
from isthmus.train.recipe import Recipe

__all__ = ["learning_rate", "make_optimizer", "parameter_groups"]


def parameter_groups(net: ResNet, recipe: Recipe) -> list[dict[str, object]]:
    """Trainable parameters by decay and by rate: none of norms and biases decays, the head has a factor of its own."""
    head = {id(parameter) for parameter in net.fc.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in net.parameters():
        if parameter.requires_grad:
            decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
            factor = recipe.head_lr_factor if id(parameter) in head else 1.0
            groups.setdefault((decay, factor), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_factor": factor}
        for (decay, factor), parameters in groups.items()
    ]


def make_optimizer(net: ResNet, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW, over the trainable parameters."""
    groups = parameter_groups(net, recipe)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


def learning_rate(step: int, *, peak: float, warmup: int, total: int) -> float:
    """Linear warm-up over `warmup` steps (Goyal et al. 2017), then half a cosine to 0 at `total` (Loshchilov 2016)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
