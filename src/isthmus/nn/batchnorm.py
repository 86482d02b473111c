"""Batch norm beyond torch's own: frozen whatever `.train()` says, synchronised, also on the CPU, and precise."""

from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from isthmus.errors import DataError

__all__ = [
    "BATCH_NORM",
    "BatchNorm",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "Sums",
    "SynchronisedBatchNorm1d",
    "SynchronisedBatchNorm2d",
    "SynchronisedBatchNorm3d",
    "freeze_batchnorm",
    "precise_batchnorm",
    "separate_batchnorm",
    "synchronise_batchnorm",
]

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


class _Synchronised(nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - the base of all three
    """In training, normalises with the statistics of the batches of all processes, which may differ in size."""

    process_group = None  # read, as the next line is, by torch's own, which serves every device but the CPU
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels  # noqa: SLF001

    def forward(self, x: Tensor) -> Tensor:
        together = self.training and distributed.is_initialized() and distributed.get_world_size() > 1
        if not together:
            return super().forward(x)
        if x.device.type != "cpu":
            stock: Any = nn.SyncBatchNorm
            normed: Tensor = stock.forward(self, x)
            return normed
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        mean, var, count = batch_statistics(x)
        if count < 2:
            raise ValueError("batch norm needs more than 1 value per channel when training; all processes have 1")
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            part = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), part)
                self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), part)
        applied: Tensor = _Normalise.apply(x, self.weight, self.bias, mean, var, count, self.eps)
        return applied


class SynchronisedBatchNorm1d(_Synchronised, nn.BatchNorm1d):
    """nn.BatchNorm1d over the batches of all processes."""


class SynchronisedBatchNorm2d(_Synchronised, nn.BatchNorm2d):
    """nn.BatchNorm2d over the batches of all processes."""


class SynchronisedBatchNorm3d(_Synchronised, nn.BatchNorm3d):
    """nn.BatchNorm3d over the batches of all processes."""


SYNCHRONISED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: SynchronisedBatchNorm1d,
    nn.BatchNorm2d: SynchronisedBatchNorm2d,
    nn.BatchNorm3d: SynchronisedBatchNorm3d,
}
FROZEN: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
    SynchronisedBatchNorm1d: FrozenBatchNorm1d,
    SynchronisedBatchNorm2d: FrozenBatchNorm2d,
    SynchronisedBatchNorm3d: FrozenBatchNorm3d,
}


def freeze_batchnorm(module: nn.Module) -> int:
    """Freeze the statistics of every batch norm inside `module`; returns how many. Scale and shift can still train."""
    return _become(module, FROZEN)


def synchronise_batchnorm(module: nn.Module) -> int:
    """Let every batch norm inside `module` see the batches of all processes; returns how many. Frozen ones stay so."""
    return _become(module, SYNCHRONISED)


def separate_batchnorm(module: nn.Module) -> int:
    """Let every synchronised batch norm inside `module` see the batches of its own process alone; returns how many."""
    return _become(module, {theirs: own for own, theirs in SYNCHRONISED.items()})


def _become(module: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> int:
    count = 0
    for child in module.modules():
        if type(child) in classes:
            # The class alone differs, so parameters, buffers, hooks and optimiser references stay as they are.
            child.__class__ = classes[type(child)]
            child.train(child.training)
            count += 1
    return count


class Sums(NamedTuple):
    """Moments of each channel (C,) in sums that join: how many values, their mean, their summed squared deviation."""

    values: float
    mean: Tensor
    squares: Tensor

    def joined(self, other: Self) -> Self:
        """Those of both (Chan et al. 1979), so that nothing cancels."""
        both, apart = self.values + other.values, other.mean - self.mean
        return type(self)(
            both,
            self.mean + apart * (other.values / both),
            self.squares + other.squares + apart.square() * (self.values * other.values / both),
        )

    @property
    def variance(self) -> Tensor:
        """With Bessel's correction, as running variances have."""
        return self.squares / (self.values - 1)


@torch.no_grad()
def precise_batchnorm(net: nn.Module, batches: Iterable[Tensor]) -> int:
    """Give every batch norm of `net` that is not frozen the exact statistics of `batches`, in place; returns how many.

    Each batch (whatever `net` takes) goes through once, normalised by itself as in training, and the moments of all are
    put together by the law of total variance, whatever their sizes (Wu & Johnson 2021, "precise batch norm"); variances
    have Bessel's correction, as running ones have. All norms at once: a pass for each norm, those before it exact
    already, would differ only by what the batches differ among each other, which larger ones lessen. Drop path and
    dropout stay off, for the statistics are those of evaluation. Modes, momenta and counters stay as they are. Raises
    DataError when there is no batch, or one has a single value in a channel; the statistics then stay too.
    """
    modes = [(module, module.training) for module in net.modules()]
    net.train()
    norms = [module for module in net.modules() if isinstance(module, BatchNorm) and module.training]
    norms = [norm for norm in norms if norm.running_mean is not None]
    held = [({name: each.clone() for name, each in norm.named_buffers()}, norm.momentum) for norm in norms]
    moments: dict[nn.Module, Sums] = {}

    def check(_norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            raise DataError("a batch has a single value in a channel, of which there is no variance; give larger ones")

    def add(norm: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        values = inputs[0].numel() / inputs[0].shape[1]
        # Copies: the next batch overwrites the buffers.
        mean, var = (norm.get_buffer(f"running_{name}").to("cpu", torch.float64, copy=True) for name in ("mean", "var"))
        found = Sums(values, mean, var * (values - 1))
        moments[norm] = moments[norm].joined(found) if norm in moments else found

    handles = [norm.register_forward_pre_hook(check) for norm in norms]
    handles += [norm.register_forward_hook(add) for norm in norms]
    try:
        net.eval()
        for norm in norms:
            norm.train()
            norm.reset_running_stats()  # 0 × NaN would stay NaN
            norm.momentum = 1.0  # so that what it keeps is the batch's own
        for batch in batches if norms else ():
            net(batch)
    finally:
        for handle in handles:
            handle.remove()
        for norm, (buffers, momentum) in zip(norms, held, strict=True):
            norm.momentum = momentum
            for name, buffer in norm.named_buffers():
                buffer.copy_(buffers[name])
        for module, mode in modes:
            module.training = mode
    if norms and not moments:
        raise DataError("no batch was given to measure batch-norm statistics on; give some pictures")
    for each, sums in moments.items():
        each.get_buffer("running_mean").copy_(sums.mean)
        each.get_buffer("running_var").copy_(sums.variance)
    return len(moments)


@torch.no_grad()
def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean and biased variance of each channel of (N, C, *size) over all processes, and the values in a channel.

    fp32, or fp64 for such an input; the parts are put together as Chan et al. 1979 do, so that nothing cancels.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    channels = x.shape[1]
    spare = (
        torch.zeros(channels, dtype=dtype),
        torch.ones(channels, dtype=dtype),
    )  # makes it count half precision in fp32
    mean, var = torch.batch_norm_update_stats(x, *spare, 0.0)
    part = torch.cat([mean.double(), var.double(), torch.tensor([x.numel() / channels], dtype=torch.float64)])
    parts = [torch.empty_like(part) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, part)
    gathered = torch.stack(parts)
    means, variances, counts = gathered[:, :channels], gathered[:, channels:-1], gathered[:, -1:]
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    var = (counts * (variances + (means - mean).square())).sum(0) / count
    return mean.to(dtype), var.to(dtype), float(count)


class _Normalise(torch.autograd.Function):
    """Batch norm with given statistics, whose backward knows that they depend on the input of every process."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: float,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.count, ctx.eps = count, eps
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight
        # As in evaluation, where the statistics are constants: the gradients of scale and shift are this process's own.
        dx, dscale, dshift = torch.ops.aten.native_batch_norm_backward(
            dy, x, scale, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        if ctx.needs_input_grad[0]:
            sums = torch.stack([dscale, dshift])
            distributed.all_reduce(sums)
            # What flows through the statistics: -(shift + (x - mean) / std * scale), a batch norm of its own.
            through_scale, through_shift = sums * (scale * (var + ctx.eps).rsqrt() / -ctx.count)
            dx += F.batch_norm(x, mean, var, through_scale, through_shift, training=False, eps=ctx.eps)
        needs_dscale, needs_dshift = ctx.needs_input_grad[1:3]
        return dx, dscale if needs_dscale else None, dshift if needs_dshift else None, None, None, None, None
