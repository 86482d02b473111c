"""Whether confidences can be believed: predictions in bins of confidence, and how often those of each bin come true."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from isthmus.errors import DataError

__all__ = ["BINS", "Calibration", "binned"]

BINS = 15  # as Guo et al. 2017 use


def binned(confidence: Tensor, hit: Tensor) -> Tensor:
    """Count, sum of confidences and hits in equal bins of confidence (low, high]: (3, BINS) of `confidence` (N,)."""
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    columns = torch.stack([torch.ones_like(confidence), confidence, hit.to(confidence.dtype)])
    return torch.zeros(3, BINS, dtype=confidence.dtype, device=confidence.device).index_add_(1, bins, columns)


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Predictions by confidence, the probability of the class that they name, in equal bins (low, high] from 0 to 1.

    Of each bin the number of predictions, the sum of their confidences, and how many are right.
    """

    count: tuple[int, ...]
    confidence: tuple[float, ...]
    hits: tuple[int, ...]

    @classmethod
    def of(cls, sums: Tensor) -> Self:
        """The record of what `binned` gave, added up."""
        count, confidence, hits = sums.tolist()
        return cls(count=tuple(map(round, count)), confidence=tuple(confidence), hits=tuple(map(round, hits)))

    def sums(self) -> Tensor:
        """What `binned` gave, added up: float64 (3, bins)."""
        return torch.tensor([self.count, self.confidence, self.hits], dtype=torch.float64)

    @property
    def expected_error(self) -> float:
        """Mean distance between confidence and accuracy: the ECE (Guo et al. 2017, eq. 3); DataError without any."""
        return sum(abs(hit - sure) for hit, sure in zip(self.hits, self.confidence, strict=True)) / self._seen

    @property
    def excess(self) -> float:
        """Mean confidence minus accuracy: above 0 the predictions are too sure of themselves."""
        return (sum(self.confidence) - sum(self.hits)) / self._seen

    @property
    def _seen(self) -> int:
        if not (seen := sum(self.count)):
            raise DataError("no prediction was counted, so there is nothing to believe; add at least one")
        return seen

    def to_dict(self) -> dict[str, Any]:
        """The bins and the expected error as plain values."""
        return {
            "expected_error": self.expected_error,
            "count": list(self.count),
            "confidence": list(self.confidence),
            "hits": list(self.hits),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The record that `to_dict` wrote; raises KeyError, TypeError or ValueError for others."""
        count, confidence, hits = (tuple(map(float, values[name])) for name in ("count", "confidence", "hits"))
        if not len(count) == len(confidence) == len(hits) == BINS:
            raise ValueError(f"a calibration has {BINS} bins, not {len(count)}, {len(confidence)} and {len(hits)}")
        return cls(count=tuple(map(int, count)), confidence=confidence, hits=tuple(map(int, hits)))
