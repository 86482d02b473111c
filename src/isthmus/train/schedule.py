"""The learning rate as a pure function of the step."""

import math
from collections.abc import Callable

from isthmus.train.recipe import Recipe

__all__ = ["learning_rate", "rate", "training_size"]

FALLS: dict[str, Callable[[float], float]] = {
    "cosine": lambda part: 0.5 * (1 + math.cos(math.pi * part)),  # Loshchilov & Hutter 2016
    "linear": lambda part: 1 - part,
    "step": lambda _: 1.0,
}
"""Part of the way from the end of the warm-up to the end of the run -> part of the peak."""


def rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a recipe at a step of the run, counted from 0."""
    total = recipe.epochs * steps_per_epoch
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), total // 2)  # however short the run, it also cools down
    return learning_rate(step, peak=recipe.lr, warmup=warmup, total=total, schedule=recipe.schedule, drops=recipe.drops)


def learning_rate(
    step: int, *, peak: float, warmup: int, total: int, schedule: str = "cosine", drops: tuple[float, ...] = ()
) -> float:
    """Linear warm-up over `warmup` steps (Goyal et al. 2017), then a fall to 0 at `total`.

    The schedule `step` stays at the peak instead, divided by ten at each of `drops`, which are parts of the whole run.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    dropped: int = sum(step >= round(drop * total) for drop in drops)
    return peak * FALLS[schedule]((step - warmup) / max(total - warmup, 1)) * 0.1**dropped


def training_size(recipe: Recipe, epoch: int, evaluated: int) -> int:
    """Pixels a side of the training crop in an epoch; `evaluated` is the evaluation's.

    From `start_size` it grows evenly to its full size over the run, in steps of 32 pixels.
    """
    full = recipe.train_size or evaluated
    if not recipe.start_size or epoch == recipe.epochs - 1:
        return full
    grown = recipe.start_size + (full - recipe.start_size) * epoch / (recipe.epochs - 1)
    return min(full, recipe.start_size + int(grown - recipe.start_size) // 32 * 32)
