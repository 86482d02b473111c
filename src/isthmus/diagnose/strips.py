"""How much of its narrow strip each bottleneck block uses: effective rank and dead channels, on real pictures."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from isthmus.arch.economics import economics
from isthmus.diagnose.findings import Finding, StripUse, Unchecked
from isthmus.messages import listed
from isthmus.nn.block import ResidualBlock
from isthmus.nn.network import ResNet

__all__ = ["Strip", "effective_rank", "strip_findings", "strip_unchecked", "strip_uses", "watched_strips"]

MOST = 16_384  # positions of a batch that count: neighbours tell the same, and the covariance takes fp64
PER_CHANNEL = 10  # samples a channel; of fewer, the rank of what is independent would seem lower by a tenth and more
UNUSED = 0.1  # effective rank over width, below which a strip is called unused
SOME_DEAD, MANY_DEAD = 0.1, 0.5  # parts of the channels
# The activation behind the 3×3, by the kind of a block.
BEHIND = {"bottleneck": "act2", "preact_bottleneck": "act3"}


@dataclass(kw_only=True, slots=True)
class Strip:
    """Sums over the activations of one strip, which batches are added to."""

    name: str
    width: int
    samples: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(()))
    products: Tensor = field(default_factory=lambda: torch.zeros(()))
    highest: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: Tensor) -> None:
        """Count a batch (N, C, *size): all of it for the highest values, MOST positions for the covariance."""
        highest = x.amax((0, *range(2, x.ndim))).cpu()
        rows = x.movedim(1, -1).flatten(0, -2)  # a view of maps in channels_last
        step = -(-len(rows) // MOST)
        step += step % 2 == 0 and step > 1  # odd, so that it meets every column of a map
        rows = rows[::step].cpu().double()
        first = not self.samples
        self.highest = highest if first else torch.maximum(self.highest, highest)
        self.sums = rows.sum(0) if first else self.sums + rows.sum(0)
        self.products = rows.T @ rows if first else self.products + rows.T @ rows
        self.samples += len(rows)

    @property
    def covariance(self) -> Tensor:
        """Of the channels over positions and pictures: fp64 (C, C)."""
        mean = self.sums / self.samples
        return self.products / self.samples - torch.outer(mean, mean)

    @property
    def use(self) -> StripUse:
        """What the sums say."""
        return StripUse(
            name=self.name,
            width=self.width,
            rank=effective_rank(self.covariance),
            dead=int((self.highest <= 0).sum()),
            samples=self.samples,
            enough=self.samples >= PER_CHANNEL * self.width,
        )


def effective_rank(covariance: Tensor) -> float:
    """The exponential of the entropy of the normalised singular values of centred activations (Roy & Vetterli 2007).

    These are the square roots of the eigenvalues of `covariance` (C, C). Between 1 and C, 0 where nothing varies.
    """
    values = torch.linalg.eigvalsh(covariance).clamp_min(0).sqrt()
    parts = values[values > 0] / values.sum()
    return math.exp(-float((parts * parts.log()).sum())) if len(parts) else 0.0


def strip_of(block: nn.Module) -> nn.Module | None:
    """The activation of a block that gives its strip; None of basic blocks and of a caller's own."""
    name = BEHIND.get(block.spec.kind) if isinstance(block, ResidualBlock) else None
    return block.get_submodule(name) if name else None


@contextmanager
def watched_strips(net: ResNet) -> Iterator[list[Strip]]:
    """A context in which every batch that goes through `net` is added to the strips of its bottleneck blocks."""
    strips, handles = list[Strip](), []
    for planned in net.plan.blocks:
        activation = strip_of(net.get_submodule(planned.name))
        if activation is None:
            continue
        strip = Strip(name=planned.name, width=planned.spec.mid)
        strips.append(strip)
        handles.append(
            activation.register_forward_hook(lambda _module, _inputs, output, strip=strip: strip.add(output))
        )
    try:
        yield strips
    finally:
        for handle in handles:
            handle.remove()


def strip_uses(strips: Sequence[Strip]) -> tuple[StripUse, ...]:
    """The rows of the strips that a batch went through."""
    return tuple(strip.use for strip in strips if strip.samples)


def strip_unchecked(net: ResNet, uses: Sequence[StripUse]) -> list[Unchecked]:
    """The strips of which nothing can be said, or not their rank."""
    known = {use.name for use in uses}
    missing = {block.name: block.spec.kind for block in net.plan.blocks if block.name not in known}
    own = [name for name, kind in missing.items() if kind not in ("basic", *BEHIND)]
    unread = [name for name, kind in missing.items() if kind in BEHIND]
    few = [use for use in uses if not use.enough]
    found = []
    if own:
        found.append(Unchecked(what="strips", reason=f"{listed(own)}: where an own block has its strip is not known"))
    if unread:
        found.append(Unchecked(what="strips", reason=f"{listed(unread)}: the head reads no map behind them"))
    if few:
        worst = max(few, key=lambda use: use.width / use.samples)
        found.append(
            Unchecked(
                what="ranks of strips",
                reason=f"{listed(use.name for use in few)}: {worst.samples} positions for {worst.width} channels; "
                f"{PER_CHANNEL} a channel tell, so give more or larger pictures",
            )
        )
    return found


def strip_findings(net: ResNet, uses: Sequence[StripUse], pictures: int) -> list[Finding]:
    """Strips too narrow, too wide, hardly used or dead."""
    found = [*width_findings(net, uses)]
    unused = [use for use in uses if use.enough and use.rank < UNUSED * use.width]
    if unused:
        least = min(unused, key=lambda use: use.rank / use.width)
        found.append(
            Finding(
                kind="unused_strip",
                severity="note",
                where=listed(use.name for use in unused),
                found=f"The {least.width} channels of {least.name}'s strip vary in {least.rank:.1f} dimensions "
                f"(effective rank over {least.samples:,} positions), under {UNUSED:.0%} of its width.",
                mend="If it stays so when the network is trained, a narrower mid carries as much: "
                "isthmus plan NAME --set stages.0.mid=... shows what it costs.",
            )
        )
    dead = [use for use in uses if use.dead >= SOME_DEAD * use.width and use.dead]
    if dead:
        worst = max(dead, key=lambda use: use.dead / use.width)
        many = worst.dead >= MANY_DEAD * worst.width
        found.append(
            Finding(
                kind="dead_channels",
                severity="warning" if many else "note",
                where=listed(use.name for use in dead),
                found=f"{worst.dead} of the {worst.width} channels of {worst.name}'s strip never rise above 0 on "
                f"{pictures} pictures, so nothing passes and no gradient returns through them.",
                mend="Train with a lower rate or a longer warm-up; where statistics are stale, mend these first, for "
                "they too push channels below 0.",
            )
        )
    return found


def width_findings(net: ResNet, uses: Sequence[StripUse]) -> list[Finding]:
    """What the economics of each stage warn of, with the rank that its strips were found to have."""
    found = []
    for stage in economics(net.plan):
        own = [use for use in uses if use.name.startswith(f"{stage.name}.") and use.enough]
        full = sum(use.rank / use.width for use in own) / len(own) if own else None
        rank = "" if full is None else f"; on the pictures {full:.0%} of its dimensions are in use (effective rank)"
        for warning in stage.warnings:
            sentence, _, mend = warning.partition("; ")
            narrow = stage.macs_ratio < 1
            found.append(
                Finding(
                    kind="narrow_strip" if narrow else "wide_strip",
                    severity="warning",
                    where=stage.name,
                    found=f"{sentence[0].upper()}{sentence[1:]}{rank}.",
                    mend=f"{mend[0].upper()}{mend[1:]}" + ("." if narrow else ", or basic blocks cost no more."),
                )
            )
    return found
