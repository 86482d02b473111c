"""Moments of what a network's batch norms are given, picture by picture."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isthmus.nn.batchnorm import BatchNorm

__all__ = ["Moments", "Pass", "batch_norms", "norm_moments", "picture_moments"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Of each picture and channel, in fp64 on the CPU: mean and biased variance (pictures, channels) of `values`."""

    means: Tensor
    variances: Tensor
    values: int

    @property
    def mean(self) -> Tensor:
        """Of each channel over all pictures: (channels,)."""
        return self.means.mean(0)

    @property
    def variance(self) -> Tensor:
        """Of each channel over all pictures, with Bessel's correction, as running variances have it: (channels,)."""
        count = max(len(self.means) * self.values, 2)
        within, between = self.variances.mean(0), self.means.var(0, correction=0)
        return (within + between) * (count / (count - 1))

    def of_first(self, pictures: int) -> "Moments":
        """The moments of the first pictures alone."""
        return Moments(means=self.means[:pictures], variances=self.variances[:pictures], values=self.values)

    def noise(self, batch: int) -> float:
        """Standard error of the mean of `batch` pictures, in standard deviations of a channel, rms over channels.

        Pictures are drawn, not values: those of one picture belong together.
        """
        varies = self.variance > 0
        between = self.means.var(0)[varies] / self.variance[varies]
        return float((between.mean() / batch).sqrt()) if len(between) else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """What a run over pictures left: the moments of each norm's input by its name, and the outputs (N, outputs)."""

    moments: dict[str, Moments]
    outputs: Tensor


def batch_norms(net: nn.Module) -> dict[str, BatchNorm]:
    """Every batch norm by its name, in the order of the network."""
    return {name: module for name, module in net.named_modules() if isinstance(module, BatchNorm)}


def picture_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each picture and channel of (N, C, *size): fp64 (N, C) each, on the CPU."""
    if x.ndim == 2:
        return x.cpu().double(), torch.zeros(x.shape, dtype=torch.float64)
    variances, means = torch.var_mean(x, tuple(range(2, x.ndim)), correction=0)
    return means.cpu().double(), variances.cpu().double()


@torch.no_grad()
def norm_moments(net: nn.Module, batches: Sequence[Tensor]) -> Pass:
    """Run batches through `net` in the mode that it is in, and keep the moments of what each batch norm is given."""
    kept: dict[str, list[tuple[Tensor, Tensor, int]]] = {}

    def keep(name: str, x: Tensor) -> None:
        kept.setdefault(name, []).append((*picture_moments(x), x[0, 0].numel()))

    handles = [
        norm.register_forward_pre_hook(lambda _norm, inputs, name=name: keep(name, inputs[0]))
        for name, norm in batch_norms(net).items()
    ]
    try:
        outputs = torch.cat([net(batch) for batch in batches])
    finally:
        for handle in handles:
            handle.remove()
    moments = {
        name: Moments(
            means=torch.cat([means for means, _, _ in parts]),
            variances=torch.cat([variances for _, variances, _ in parts]),
            values=parts[0][2],
        )
        for name, parts in kept.items()
    }
    return Pass(moments=moments, outputs=outputs)
