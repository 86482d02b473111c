"""One torch module for each kind of layer on paper."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.arch.block import NORM_GROUPS, Layer
from isthmus.nn.batchnorm import BATCH_NORM

__all__ = ["DropPath", "EfficientChannelAttention", "SqueezeExcite", "add_layer", "make_layer"]

CONV: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
ZERO_PAD: dict[int, type[nn.Module]] = {1: nn.ZeroPad1d, 2: nn.ZeroPad2d, 3: nn.ZeroPad3d}
MAX_POOL: dict[int, type[nn.Module]] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
ACTIVATION: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


def make_layer(layer: Layer, *, dims: int, norm: str, eps: float, activation: str) -> nn.Module:
    """The torch module of one layer on paper."""
    if layer.kind == "conv":
        # ECA slides over the channels themselves: one channel in, one out.
        over_channels = layer.domain == "channels"
        width_in, width_out = (1, 1) if over_channels else (layer.in_channels, layer.out_channels)
        return CONV[1 if over_channels else dims](
            width_in,
            width_out,
            layer.kernel,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            bias=layer.bias,
        )
    if layer.kind == "norm":
        width = layer.out_channels
        return nn.GroupNorm(NORM_GROUPS, width, eps=eps) if norm == "group" else BATCH_NORM[dims](width, eps=eps)
    if layer.kind == "act":
        return ACTIVATION[activation]()
    if layer.kind == "linear":
        return nn.Linear(layer.in_channels, layer.out_channels)
    if layer.kind == "maxpool":
        return MAX_POOL[dims](layer.kernel, layer.stride, layer.padding, ceil_mode=layer.ceil)
    if layer.kind == "avgpool":
        return AveragePool(layer.kernel, layer.stride, dims, ceil=layer.ceil) if layer.kernel > 1 else nn.Identity()
    if layer.kind == "blur":
        return BlurPool(layer.out_channels, layer.stride)
    if layer.kind == "zeropad":
        return ZERO_PAD[dims](layer.padding)
    if layer.kind == "pad":
        return ZeroPad(layer.out_channels - layer.in_channels, layer.stride)
    message = f"no torch module for a layer of kind {layer.kind!r}"
    raise AssertionError(message)


def add_layer(module: nn.Module, name: str, child: nn.Module) -> None:
    """Register `child` under a dotted name, making the nn.Sequential that the dots ask for."""
    parent, dot, rest = name.partition(".")
    if dot and not hasattr(module, parent):
        module.add_module(parent, nn.Sequential())
    target = module.get_submodule(parent) if dot else module
    target.add_module(rest or name, child)


class AveragePool(nn.Module):
    """Mean over `kernel`; at stride 1 of maps with zeros at the end, so that the size stays (timm's dilated D)."""

    def __init__(self, kernel: int, stride: int, dims: int, *, ceil: bool) -> None:
        super().__init__()
        self.kernel, self.stride, self.dims, self.ceil = kernel, stride, dims, ceil

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}"

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *size) to (N, C, *size / stride), rounded up when `ceil`."""
        if self.stride == 1:
            x = F.pad(x, (0, self.kernel - 1) * self.dims)
        if self.dims == 3:
            # Short clips end in maps thinner than the kernel; in 3D alone torch refuses them.
            kernel = [min(self.kernel, side) for side in x.shape[2:]]
            return F.avg_pool3d(x, kernel, self.stride, ceil_mode=self.ceil, count_include_pad=False)
        pool = F.avg_pool1d if self.dims == 1 else F.avg_pool2d
        return pool(x, self.kernel, self.stride, ceil_mode=self.ceil, count_include_pad=False)


class BlurPool(nn.Module):
    """Binomial 3×3 low-pass filter with the stride (Zhang 2019), edges reflected. The filter is no parameter."""

    kernel: Tensor

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("kernel", (line[:, None] * line).expand(channels, 1, 3, 3).clone(), persistent=False)

    def extra_repr(self) -> str:
        return f"{self.channels}, stride={self.stride}"

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H / stride, W / stride), rounded up."""
        # On the CPU autocast pads in fp32, which changes no value and copies every map twice.
        pads_wide = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", enabled=False) if pads_wide else nullcontext():
            padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(padded, self.kernel, stride=self.stride, groups=self.channels)


class ZeroPad(nn.Module):
    """Shortcut option A of He et al. 2015: every `stride`-th position, and zeros for the channels that are missing."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def extra_repr(self) -> str:
        return f"{self.channels}, stride={self.stride}"

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *size) to (N, C + channels, *size / stride), rounded up."""
        dims = x.ndim - 2
        strided = x[(slice(None), slice(None), *(slice(None, None, self.stride),) * dims)]
        return F.pad(strided, (0, 0) * dims + (0, self.channels))


class SqueezeExcite(nn.Module):
    """Channel gate from the pooled map through two 1×1 convolutions (Hu et al. 2017)."""

    def __init__(self, fc1: nn.Module, fc2: nn.Module) -> None:
        super().__init__()
        self.fc1 = fc1
        self.act = nn.ReLU()
        self.fc2 = fc2

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *size) to the same shape."""
        pooled = x.mean(tuple(range(2, x.ndim)), keepdim=True)
        gate: Tensor = self.fc2(self.act(self.fc1(pooled)))
        return x * gate.sigmoid()


class EfficientChannelAttention(nn.Module):
    """Channel gate from the pooled map through one small convolution over channels (Wang et al. 2019)."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *size) to the same shape."""
        gate: Tensor = self.conv(x.mean(tuple(range(2, x.ndim))).unsqueeze(1))
        return x * gate.sigmoid().view(x.shape[0], -1, *(1,) * (x.ndim - 2))


class DropPath(nn.Module):
    """Drops a sample's whole branch with probability `rate` in training, and rescales the rest (Huang et al. 2016)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def extra_repr(self) -> str:
        return f"{self.rate:.3f}"

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *size) to the same shape."""
        return self.scaled(x, self.kept(x)) if self.training else x

    def kept(self, x: Tensor) -> Tensor:
        """Who keeps the branch this time: ones and zeros (N, 1, …)."""
        return x.new_empty((x.shape[0], *(1,) * (x.ndim - 1))).bernoulli_(1 - self.rate)

    def scaled(self, x: Tensor, kept: Tensor) -> Tensor:
        """The branch of those who keep it, so much larger that the mean stays."""
        return x * kept / (1 - self.rate)
