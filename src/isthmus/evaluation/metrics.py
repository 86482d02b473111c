"""How good predictions are: sums and counts that add up, divided once at the end."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional

from isthmus.errors import DataError
from isthmus.evaluation.calibration import BINS, Calibration, binned
from isthmus.evaluation.mistakes import NO_MISTAKES, Mistake, Mistakes, mistakes_in

__all__ = ["ClassScore", "Ranks", "Tally", "wilson"]


class Ranks(Protocol):
    """The processes that share a job: `isthmus.train.distributed.World`."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor."""

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in their order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassScore:
    """One class: the part of its predictions that are right, the part of its pictures found, and how many these are.

    A ratio without a denominator (never predicted, no pictures) is 0, as scikit-learn's with zero_division=0.
    """

    name: str
    precision: float
    recall: float
    support: int


class Tally:
    """Confusion counts (true class, predicted class), the sum of cross-entropies, and the hits among the best five.

    Beside them confidences by bins, and the most confident mistakes of the pictures whose places are given; `name_of`
    says what the picture in a place is called.
    Sums live on the device of the first batch and are read only when asked, so that `add` never waits for it.
    Partial tallies add up (`+`) to the tally of the whole, whatever the parts' sizes.
    """

    def __init__(self, classes: tuple[str, ...], name_of: Callable[[int], str] | None = None) -> None:
        self.classes, self.name_of = classes, name_of
        self._counts = torch.zeros(len(classes) ** 2, dtype=torch.int64)
        self._loss = torch.zeros((), dtype=torch.float64)
        self._top5 = torch.zeros((), dtype=torch.int64)
        self._bins = torch.zeros(3, BINS, dtype=torch.float64)
        self._mistakes = NO_MISTAKES

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, indices: Tensor | None = None) -> None:
        """Count a batch of logits (N, classes), labels (N,) and the places (N,) of the pictures among all.

        Raises DataError when the shapes do not fit.
        """
        classes = len(self.classes)
        if logits.ndim != 2 or logits.shape[1] != classes or labels.shape != logits.shape[:1]:
            raise DataError(
                f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit {classes} classes; "
                f"they must be (N, {classes}) and (N,)"
            )
        self._to(logits.device)
        guess = logits.argmax(1)
        places = labels * classes + guess
        self._counts.index_add_(0, places, torch.ones_like(places))
        self._loss += functional.cross_entropy(logits.float(), labels, reduction="none").to(self._loss.dtype).sum()
        if classes >= 5:
            self._top5 += (logits.topk(5, dim=1).indices == labels[:, None]).sum()
        confidence = logits.float().softmax(1).gather(1, guess[:, None]).squeeze(1)
        self._bins += binned(confidence.to(self._bins.dtype), guess == labels)
        if indices is not None:
            found = mistakes_in(confidence, guess, labels, indices.to(logits.device))
            self._mistakes = self._mistakes.joined(found)

    def over(self, ranks: Ranks) -> "Tally":
        """The tally of all processes, of which each has counted its own pictures; the same on all of them."""
        total = Tally(self.classes, self.name_of)
        total._counts = ranks.sum(self._counts.cpu())
        total._loss = ranks.sum(self._loss.cpu().double())
        total._top5 = ranks.sum(self._top5.cpu())
        total._bins = ranks.sum(self._bins.cpu().double())
        for each in ranks.gather(list(self._mistakes.to(torch.device("cpu")))):
            total._mistakes = total._mistakes.joined(Mistakes(*each))
        return total

    def _to(self, device: torch.device) -> None:
        if self._counts.device != device:
            exact = torch.float32 if device.type == "mps" else torch.float64
            self._counts, self._top5 = self._counts.to(device), self._top5.to(device)
            self._loss, self._bins = self._loss.to(device, exact), self._bins.to(device, exact)
            self._mistakes = self._mistakes.to(device)

    def __add__(self, other: "Tally") -> "Tally":
        """The tally of both; raises DataError when their classes differ."""
        if self.classes != other.classes:
            raise DataError(f"tallies over {self.classes} and {other.classes} cannot be added; the classes must agree")
        total, cpu = Tally(self.classes, self.name_of or other.name_of), torch.device("cpu")
        total._counts = self._counts.cpu() + other._counts.cpu()
        total._loss = self._loss.cpu().double() + other._loss.cpu().double()
        total._top5 = self._top5.cpu() + other._top5.cpu()
        total._bins = self._bins.cpu().double() + other._bins.cpu().double()
        total._mistakes = self._mistakes.to(cpu).joined(other._mistakes.to(cpu))
        return total

    @property
    def confusion(self) -> Tensor:
        """Pictures by true class (rows) and predicted class (columns): int64 (classes, classes) on the CPU."""
        return self._counts.cpu().view(len(self.classes), len(self.classes))

    @property
    def seen(self) -> int:
        """Pictures counted."""
        return int(self._counts.sum())

    @property
    def correct(self) -> int:
        """Pictures whose first guess is right."""
        return int(self.confusion.trace())

    def _mean(self, total: float) -> float:
        if not self.seen:
            raise DataError("no picture was evaluated, so there is no score; add at least one")
        return total / self.seen

    @property
    def accuracy(self) -> float:
        """The part of all pictures whose first guess is right; raises DataError when nothing was counted."""
        return self._mean(self.correct)

    @property
    def loss(self) -> float:
        """Mean cross-entropy of a picture, in nats."""
        return self._mean(float(self._loss))

    @property
    def top5(self) -> float | None:
        """The part of pictures whose class is among the first five guesses; None with fewer than five classes."""
        return self._mean(int(self._top5)) if len(self.classes) >= 5 else None

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes that occur."""
        occurring = [row.recall for row in self.per_class() if row.support]
        return sum(occurring) / len(occurring) if occurring else self._mean(0)

    @property
    def calibration(self) -> Calibration | None:
        """Confidence and what came of it; None of scores that were written without it."""
        return Calibration.of(self._bins) if self._bins.any() else None

    @property
    def mistakes(self) -> list[Mistake]:
        """The most confident mistakes, the surest first, among the pictures whose places were given."""
        return [
            Mistake(
                index=index,
                name=self.name_of(index) if self.name_of else "",
                label=self.classes[label],
                predicted=self.classes[guess],
                places=(label, guess),
                confidence=confidence,
            )
            for confidence, (index, label, guess) in zip(*map(Tensor.tolist, self._mistakes), strict=True)
            if confidence >= 0
        ]

    def per_class(self) -> list[ClassScore]:
        """One row a class, in the order of the classes."""
        table = self.confusion
        hits, support, predicted = table.diagonal().tolist(), table.sum(1).tolist(), table.sum(0).tolist()
        return [
            ClassScore(name=name, precision=hit / max(guesses, 1), recall=hit / max(pictures, 1), support=pictures)
            for name, hit, guesses, pictures in zip(self.classes, hits, predicted, support, strict=True)
        ]

    @classmethod
    def from_dict(cls, scores: Mapping[str, Any]) -> Self:
        """The tally that gave these scores; raises KeyError, TypeError or ValueError for others."""
        names = {int(row["index"]): str(row.get("name", "")) for row in scores.get("mistakes", ())}
        tally = cls(tuple(str(row["name"]) for row in scores["per_class"]), lambda index: names.get(index, ""))
        count = len(tally.classes)
        tally._counts = torch.tensor(scores["confusion"], dtype=torch.int64).reshape(count**2)
        tally._loss = torch.tensor(scores["loss"] * tally.seen, dtype=torch.float64)
        tally._top5 = torch.tensor(round(scores.get("top5", 0) * tally.seen))
        if "calibration" in scores:
            tally._bins = Calibration.from_dict(scores["calibration"]).sums()
        rows = [(int(row["index"]), *map(int, row["places"])) for row in scores.get("mistakes", ())]
        tally._mistakes = Mistakes(
            torch.tensor([float(row["confidence"]) for row in scores.get("mistakes", ())]),
            torch.tensor(rows, dtype=torch.int64).reshape(len(rows), 3),
        )
        return tally

    def to_dict(self) -> dict[str, Any]:
        """Every score as plain values, ready for JSON."""
        five, calibration, mistakes = self.top5, self.calibration, self.mistakes
        return {
            "pictures": self.seen,
            "loss": self.loss,
            "accuracy": self.accuracy,
            **({} if five is None else {"top5": five}),
            "balanced_accuracy": self.balanced_accuracy,
            **({} if calibration is None else {"calibration": calibration.to_dict()}),
            **({"mistakes": [asdict(row) | {"places": list(row.places)} for row in mistakes]} if mistakes else {}),
            "per_class": [asdict(row) for row in self.per_class()],
            "confusion": self.confusion.tolist(),
        }


def wilson(hits: int, count: int, deviations: float = 1.96) -> tuple[float, float]:
    """The score interval of a part of `count` trials, 95 % unless other deviations are given (Wilson 1927).

    Raises DataError for no trials.
    """
    if count < 1:
        raise DataError("an interval of a part needs one trial or more")
    part, spread = hits / count, deviations**2 / count
    middle = (part + spread / 2) / (1 + spread)
    reach = deviations / (1 + spread) * sqrt(part * (1 - part) / count + spread / (4 * count))
    return max(0.0, middle - reach), min(1.0, middle + reach)
