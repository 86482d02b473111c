"""What a diagnosis says: findings in plain sentences, and the figures behind them by block, strip and norm."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from isthmus import records

__all__ = [
    "KINDS",
    "BlockSignals",
    "Diagnosis",
    "Finding",
    "Kind",
    "NormDrift",
    "Severity",
    "Spread",
    "StripUse",
    "Unchecked",
    "worst_first",
]

Severity = Literal["fault", "warning", "note"]
"""Wrong results for certain; likely harm; worth knowing."""
SEVERITIES: tuple[Severity, ...] = ("fault", "warning", "note")
Mode = Literal["training", "evaluating", "frozen"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of finding: what part of a network it is about, and what it says when it is made."""

    about: Literal["weights", "batch norm", "input", "strip", "shortcut", "gradients"]
    says: str


KINDS: dict[str, Kind] = {
    "not_finite": Kind(about="weights", says="a weight or a statistic is no number"),
    "training_mode": Kind(about="batch norm", says="a network that is to predict is in training mode"),
    "mixed_mode": Kind(about="batch norm", says="some batch norms train and others evaluate, and nothing froze them"),
    "frozen_statistics": Kind(about="batch norm", says="statistics are frozen; the pictures have others"),
    "no_statistics": Kind(about="batch norm", says="a batch norm keeps no statistics and needs a batch to predict"),
    "stale_statistics": Kind(about="batch norm", says="running statistics are not those of the pictures"),
    "zero_variance": Kind(about="batch norm", says="a running variance is next to 0 where the pictures vary"),
    "momentum": Kind(about="batch norm", says="statistics never move (momentum 0) or forget all but a batch (1)"),
    "small_batch": Kind(about="batch norm", says="batches are too small for the statistics of training"),
    "preprocessing": Kind(about="input", says="the statistics fit pictures that are prepared otherwise"),
    "stride_place": Kind(about="shortcut", says="the statistics fit a stride on the block's other convolution"),
    "missing_shortcut": Kind(about="shortcut", says="many blocks in a row have no shortcut"),
    "narrow_strip": Kind(about="strip", says="the strip is under 1/8 of the outer width"),
    "wide_strip": Kind(about="strip", says="the strip saves nothing against two plain convolutions"),
    "unused_strip": Kind(about="strip", says="the activations of the strip fill few of its dimensions"),
    "dead_channels": Kind(about="strip", says="channels of the strip never rise above 0"),
    "no_gradient": Kind(about="gradients", says="a block gets no gradient, or one that is no number"),
    "vanishing_gradient": Kind(about="gradients", says="gradients shrink from the last block to the first"),
    "exploding_gradient": Kind(about="gradients", says="gradients grow from the last block to the first"),
    "large_updates": Kind(about="gradients", says="a step changes weights by a large part of themselves"),
    "small_updates": Kind(about="gradients", says="a step hardly changes the weights"),
}
"""Every kind of finding by its name, in the order in which findings of one severity are told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was found: `found` is a sentence with its evidence in figures, `mend` says what to do.

    `kind` is a name of KINDS, `where` the block, norm or stage (and how many more), or "the network".
    """

    kind: str
    severity: Severity
    where: str
    found: str
    mend: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Unchecked:
    """What could not be judged, and why."""

    what: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A figure over several steps: its mean, and the standard deviation between them."""

    mean: float
    deviation: float


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSignals:
    """One block in a few real steps.

    `gradient` is the norm of the loss's gradient in all its parameters, `input_gradient` that in its input map (per
    picture), `update` the length of a step over that of the weights, |dw| / |w|; all are None where nothing trains.
    `scale` is the root mean square of its output on the pictures, `weight` the norm of its parameters.
    """

    name: str
    weight: float
    scale: float
    gradient: Spread | None = None
    input_gradient: Spread | None = None
    update: Spread | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StripUse:
    """How much of its narrow strip a block uses on the pictures, behind the 3×3's norm and activation.

    `rank` is the effective rank of the activations (Roy & Vetterli 2007), between 1 and `width`; `samples` the
    positions that it was measured on, of which `enough` says whether they suffice for that width. `dead` channels never
    rose above 0.
    """

    name: str
    width: int
    rank: float
    dead: int
    samples: int
    enough: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class NormDrift:
    """One batch norm's running statistics against those of the pictures.

    With its running statistics the norm would give the pictures, channel by channel, a mean of 0 and a variance of 1:
    `shift` is the root mean square over channels of the mean, `ratio` the geometric mean of the variance.
    `least_variance` is the smallest running variance, `channels` the width. For the run's batch (None where that is not
    known, or statistics are frozen) `values` are those that a channel's statistics are taken of, and `noise` is the
    standard error of their mean in standard deviations.
    """

    name: str
    channels: int
    shift: float
    ratio: float
    least_variance: float
    momentum: float | None
    mode: Mode
    values: int | None = None
    noise: float | None = None

    @property
    def distance(self) -> float:
        """How far the norm is off: the larger of the shift and the distance of log deviations, |ln ratio| / 2."""
        return max(self.shift, abs(math.log(max(self.ratio, 1e-30))) / 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What was found in a network on `pictures` pictures, worst first, and the figures of every block, strip and norm.

    `checked` names what was judged, `unchecked` what could not be and why.
    """

    findings: tuple[Finding, ...]
    blocks: tuple[BlockSignals, ...]
    strips: tuple[StripUse, ...]
    norms: tuple[NormDrift, ...]
    checked: tuple[str, ...]
    unchecked: tuple[Unchecked, ...]
    pictures: int

    @property
    def healthy(self) -> bool:
        """Whether there is neither a fault nor a warning."""
        return all(finding.severity == "note" for finding in self.findings)

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """The findings of one severity."""
        return tuple(finding for finding in self.findings if finding.severity == severity)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON: what is None is left out, what is no finite number is None."""
        return {"healthy": self.healthy, **records.finite(records.to_dict(self))}


def worst_first(findings: list[Finding]) -> tuple[Finding, ...]:
    """Findings by severity, then in the order of KINDS."""
    kinds = list(KINDS)
    return tuple(sorted(findings, key=lambda each: (SEVERITIES.index(each.severity), kinds.index(each.kind))))
