"""Batch norm that stays frozen: the statistics in use never move, whatever `.train()` says."""

from typing import Self

from torch import nn

__all__ = ["BATCH_NORM", "BatchNorm", "FrozenBatchNorm1d", "FrozenBatchNorm2d", "FrozenBatchNorm3d", "freeze_batchnorm"]

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
BATCH_NORM: dict[int, type[BatchNorm]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class _Frozen(nn.Module):
    """Always in evaluation: bit for bit `BatchNorm.eval()`, with the eps and momentum it had."""

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002 - the point is to ignore it
        return super().train(False)


class FrozenBatchNorm1d(_Frozen, nn.BatchNorm1d):
    """nn.BatchNorm1d that stays in evaluation."""


class FrozenBatchNorm2d(_Frozen, nn.BatchNorm2d):
    """nn.BatchNorm2d that stays in evaluation."""


class FrozenBatchNorm3d(_Frozen, nn.BatchNorm3d):
    """nn.BatchNorm3d that stays in evaluation."""


FROZEN: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
}


def freeze_batchnorm(module: nn.Module) -> int:
    """Freeze the statistics of every batch norm inside `module`; returns how many. Scale and shift can still train."""
    count = 0
    for child in module.modules():
        if type(child) in FROZEN:
            # The class alone differs, so parameters, buffers, hooks and optimiser references stay as they are.
            child.__class__ = FROZEN[type(child)]
            child.train()
            count += 1
    return count
