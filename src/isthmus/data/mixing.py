"""Mixup and cutmix of a batch, with random numbers that are a pure function of (seed, epoch, step)."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.data.augment import Augment
from isthmus.data.order import step_generator

__all__ = ["mix"]


def mix(
    images: Tensor, labels: Tensor, augment: Augment, *, classes: int, seed: int, epoch: int, step: int
) -> tuple[Tensor, Tensor]:
    """A normalised batch (N, C, H, W), mixed in place, and its targets: shares (N, classes), or `labels` unmixed.

    `labels` are int64 (N,) or shares (N, classes). As in timm and torchvision one draw holds for the whole step, from
    Beta(alpha, alpha), and a cutmix share is the area that is left after the box is cut at the picture's edge. Partners
    are neighbours, or `augment.repeats` places apart, since the copies of a picture come in a row: a step divided over
    processes and micro-batches gives the same as undivided, as long as the sizes of its parts are multiples of twice
    the repeats. What is left over at the end of a part stays as it is.
    """
    if not (augment.mixup or augment.cutmix):
        return images, labels
    random = step_generator(seed, epoch, step)
    cuts = bool(augment.cutmix) and (not augment.mixup or random.random() < 0.5)
    alpha = augment.cutmix if cuts else augment.mixup
    share = float(random.beta(alpha, alpha))
    apart = augment.repeats
    paired = len(images) // (2 * apart) * 2 * apart
    one, other = images[:paired].view(-1, 2, apart, *images.shape[1:]).unbind(1)
    if cuts:
        rows, columns = box(images.shape[-2], images.shape[-1], share, random)
        kept = one[..., rows, columns].clone()
        one[..., rows, columns] = other[..., rows, columns]
        other[..., rows, columns] = kept
        share = 1 - kept.shape[-2] * kept.shape[-1] / (images.shape[-2] * images.shape[-1])
    else:
        difference = (other - one).mul_(1 - share)
        one.add_(difference)
        other.sub_(difference)
    targets = (F.one_hot(labels, classes) if labels.ndim == 1 else labels).to(torch.float32, copy=True)
    pairs = targets[:paired].view(-1, 2, apart, classes)
    pairs.lerp_(pairs.flip(1), 1 - share)
    return images, targets


def box(height: int, width: int, share: float, random: np.random.Generator) -> tuple[slice, slice]:
    """Rows and columns around a random centre that leave `share` of the area (Yun et al. 2019), cut at the edges."""

    def side(length: int) -> slice:
        long, centre = int(length * math.sqrt(1 - share)), int(random.integers(length))
        return slice(max(centre - long // 2, 0), min(centre + (long + 1) // 2, length))

    return side(height), side(width)
