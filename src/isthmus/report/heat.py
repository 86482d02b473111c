"""Grad-CAM: which parts of a picture speak for a class (Selvaraju et al. 2017)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.nn.network import ResNet

__all__ = ["deepest_map", "heat_maps"]


def deepest_map(net: ResNet) -> str:
    """The module that gives the last of the maps which the head reads."""
    order = ("stem", *net.stages, "last")
    last = max(net.spec.head.taps, key=order.index)
    if last == "last":
        return "act" if net.spec.preact else net.stages[-1]
    return "act1" if last == "stem" else last


def heat_maps(net: ResNet, images: Tensor, targets: Tensor) -> Tensor:
    """How much each place of normalised images (N, C, H, W) speaks for the classes `targets` (N,): (N, H, W) in [0, 1].

    From the last map that the head reads: its channels weighted by the mean gradient of the class's logit, negative
    sums cut off, enlarged to the picture, its greatest place 1 (all 0 where nothing speaks for the class). Where the
    head reads several stages, the others' share is not shown. The network evaluates, and is as before afterwards.
    """
    from captum.attr import LayerGradCam

    with evaluating(net):
        seen = LayerGradCam(net, net.get_submodule(deepest_map(net))).attribute(
            images.detach().clone().requires_grad_(), target=targets, relu_attributions=True
        )
    found = F.interpolate(seen.detach(), images.shape[-2:], mode="bilinear", align_corners=False)
    peak = found.amax((1, 2, 3), keepdim=True)
    return (found / torch.where(peak > 0, peak, 1)).squeeze(1)


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """A context in which every module evaluates; each is in its own mode afterwards."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
