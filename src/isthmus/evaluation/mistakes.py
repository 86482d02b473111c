"""The most confident mistakes: where a network is wrong and sure of it, the pictures are worth a look."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["KEPT", "NO_MISTAKES", "Mistake", "Mistakes", "mistakes_in"]

KEPT = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """A picture under a wrong class: its place among the pictures, and its name where they were at hand.

    `places` are those of `label` and `predicted` among the classes, of which several may share a name.
    """

    index: int
    name: str
    label: str
    predicted: str
    places: tuple[int, int]
    confidence: float


class Mistakes(NamedTuple):
    """The `KEPT` most confident mistakes of some pictures, the surest first and the earlier picture before its equals.

    `confidence` is float32 (M,), `rows` int64 (M, 3): index, label and predicted class.
    """

    confidence: Tensor
    rows: Tensor

    def joined(self, other: "Mistakes") -> "Mistakes":
        """The most confident of both."""
        both = (torch.cat([mine, theirs]) for mine, theirs in zip(self, other, strict=True))
        return surest(*both)

    def to(self, device: torch.device) -> "Mistakes":
        """The same on another device."""
        return Mistakes(self.confidence.to(device), self.rows.to(device))


NO_MISTAKES = Mistakes(torch.zeros(0), torch.zeros(0, 3, dtype=torch.int64))


def mistakes_in(confidence: Tensor, guess: Tensor, labels: Tensor, indices: Tensor) -> Mistakes:
    """The mistakes of a batch, (N,) each. What is right has confidence -1, so that nobody waits for a count."""
    unsure = torch.full_like(confidence, -1)
    return surest(torch.where(guess == labels, unsure, confidence), torch.stack([indices, labels, guess], dim=1))


def surest(confidence: Tensor, rows: Tensor) -> Mistakes:
    """The first of these by confidence, then by index: the same whatever the order that they come in."""
    by_index = rows[:, 0].argsort(stable=True)
    order = by_index[confidence[by_index].argsort(stable=True, descending=True)][:KEPT]
    return Mistakes(confidence[order], rows[order])
