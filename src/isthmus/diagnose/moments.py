"""Moments of what a network's batch norms are given."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Self

import torch
from torch import Tensor, nn

from isthmus.nn.batchnorm import BatchNorm, Sums

__all__ = ["Moments", "Pass", "batch_norms", "norm_moments"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Of each channel over pictures of `values` values each: mean and Bessel-corrected variance (C,), as running ones.

    `pictures` are the means of the single pictures (N, C). All in fp64 on the CPU.
    """

    mean: Tensor
    variance: Tensor
    pictures: Tensor
    values: int

    @classmethod
    def of(cls, x: Tensor, norm: BatchNorm | None = None) -> Self:
        """Those of a map (N, C, *size); of one that `norm` has just taken with momentum 1, by what it kept of it."""
        over = tuple(range(2, x.ndim))
        pictures = x.mean(over) if over else x
        if norm is not None:
            mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        else:
            variance, mean = torch.var_mean(x, (0, *over))
        return cls(  # copies: the next batch overwrites what a norm keeps
            mean=mean.to("cpu", torch.float64, copy=True),
            variance=variance.to("cpu", torch.float64, copy=True),
            pictures=pictures.cpu().double(),
            values=x[0, 0].numel(),
        )

    @classmethod
    def together(cls, parts: Sequence["Moments"]) -> Self:
        """Those of several batches."""
        each = [
            Sums(count := len(part.pictures) * part.values, part.mean, part.variance * (count - 1)) for part in parts
        ]
        every = reduce(Sums.joined, each)
        pictures = torch.cat([part.pictures for part in parts])
        return cls(mean=every.mean, variance=every.variance, pictures=pictures, values=parts[0].values)

    def noise(self, batch: int) -> float:
        """Standard error of the mean of `batch` pictures, in standard deviations of a channel, rms over channels.

        Pictures are drawn, not values: those of one picture belong together.
        """
        varies = self.variance > 0
        between = self.pictures.var(0)[varies] / self.variance[varies]
        return float((between.mean() / batch).sqrt()) if len(between) else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """What a run over batches left: the moments of each norm's input in each by its name, and the outputs (N, n)."""

    batches: dict[str, list[Moments]]
    outputs: Tensor

    @property
    def moments(self) -> dict[str, Moments]:
        """Of all batches together."""
        return {name: Moments.together(parts) for name, parts in self.batches.items()}


def batch_norms(net: nn.Module) -> dict[str, BatchNorm]:
    """Every batch norm by its name, in the order of the network."""
    return {name: module for name, module in net.named_modules() if isinstance(module, BatchNorm)}


@torch.no_grad()
def norm_moments(net: nn.Module, batches: Sequence[Tensor], names: Collection[str] | None = None) -> Pass:
    """Run batches through `net` in the mode that it is in, and keep the moments of what its batch norms are given.

    Of all norms, or of those in `names`. Norms that train must do so with momentum 1.
    """
    kept: dict[str, list[Moments]] = {}

    def keep(name: str, norm: BatchNorm, x: Tensor) -> None:
        known = norm.training and norm.running_mean is not None
        kept.setdefault(name, []).append(Moments.of(x, norm if known else None))

    handles = [
        norm.register_forward_hook(lambda norm, inputs, _output, name=name: keep(name, norm, inputs[0]))
        for name, norm in batch_norms(net).items()
        if names is None or name in names
    ]
    try:
        outputs = torch.cat([net(batch) for batch in batches])
    finally:
        for handle in handles:
            handle.remove()
    return Pass(batches=kept, outputs=outputs)
