"""The training loss of a batch, as a sum over its pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Objective", "class_weights"]

PRESENT = 0.2  # of a mixed picture: a class with more of it counts as present (Wightman et al. 2021, timm)


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """Cross-entropy, or binary cross-entropy of each class; divided by the pictures of a step it is their mean.

    It is a sum, and class weights are constants that average to 1 over the training pictures, so that a step may be
    divided over micro-batches and processes. Binary cross-entropy is the mean over the classes, and takes a class as
    present where its share is above 0.2, as "ResNet strikes back" does of mixed pictures.
    """

    kind: Literal["ce", "bce"] = "ce"
    smoothing: float = 0.0
    weights: Tensor | None = None  # (classes,)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The summed loss of logits (N, classes) against labels, int64 (N,), or shares of the classes, (N, classes)."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if targets.is_floating_point():
            targets = targets.to(logits.dtype)
        if self.kind == "ce":
            return F.cross_entropy(
                logits, targets, weight=self.weights, label_smoothing=self.smoothing, reduction="sum"
            )
        classes, off = logits.shape[1], self.smoothing / logits.shape[1]
        if targets.is_floating_point():
            targets = (targets * (1 - self.smoothing) + off > PRESENT).to(logits.dtype)
        else:
            targets = F.one_hot(targets, classes).to(logits.dtype) * (1 - self.smoothing) + off
        loss = F.binary_cross_entropy_with_logits(logits, targets, weight=self.weights, reduction="sum")
        return loss / classes


def class_weights(counts: Sequence[int]) -> Tensor:
    """Weights under which every class that occurs counts alike: pictures / (such classes × pictures of the class).

    A class without pictures has 1, and so counts in binary cross-entropy as the average one does.
    """
    pictures = torch.tensor(counts, dtype=torch.float32)
    alike = pictures.sum() / ((pictures > 0).sum() * pictures)
    return torch.where(pictures > 0, alike, 1.0)
