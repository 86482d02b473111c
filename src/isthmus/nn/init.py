"""All initialisation, in one function."""

import torch
from torch import nn

__all__ = ["initialise"]


def initialise(net: nn.Module, *, zero_init: bool = True) -> None:
    """He et al. 2015 (normal, fan out) for convolutions; N(0, 0.01) for classifiers and, with `zero_init`, 0 for the
    last scale of each post-activation residual branch (Goyal et al. 2017), so that a block starts as its shortcut.
    Convolutions and linear layers inside blocks of your own are initialised too.
    """
    from isthmus.nn.block import PreActBottleneckBlock, ResidualBlock
    from isthmus.nn.layers import EfficientChannelAttention

    if any(parameter.is_meta for parameter in net.parameters()):
        return  # there is nothing to fill, and torch would import its compiler (seconds) to do it
    over_channels = {id(module.conv) for module in net.modules() if isinstance(module, EfficientChannelAttention)}
    for module in net.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and id(module) not in over_channels:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
    for block in net.modules():
        # A plain block has nothing but its main path, which must not be switched off.
        if (
            zero_init
            and isinstance(block, ResidualBlock)
            and block.adds
            and not isinstance(block, PreActBottleneckBlock)
        ):
            last = block.get_submodule("bn2" if block.kind == "basic" else "bn3")
            if isinstance(weight := getattr(last, "weight", None), torch.Tensor):
                nn.init.zeros_(weight)
