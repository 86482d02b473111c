"""The receptive field on paper against the input pixels that a gradient reaches."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from isthmus.arch.cost import cost
from isthmus.arch.plan import plan
from isthmus.arch.spec import NetSpec, StageSpec
from isthmus.arch.variants import variant
from isthmus.nn.network import ResNet

POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class Mean(nn.Module):
    """The window of a max pool, but every pixel in it counts."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def forward(self, x):
        pool = self.pool
        return POOL[x.ndim - 2](x, pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)


def slim(spec: NetSpec, **changes) -> NetSpec:
    """The same geometry with widths that cost nothing."""
    stages = tuple(
        replace(stage, mid=stage.groups * 2, out=4 + 4 * (stage.block != "basic"), reduce=0) for stage in spec.stages
    )
    return replace(
        spec, stages=stages, stem=replace(spec.stem, widths=(2,) * len(spec.stem.widths)), num_classes=0, **changes
    )


def reached(spec: NetSpec, positions: int) -> list[int]:
    """Per dimension, the side of the input region that the middle of the last map depends on."""
    laid_out = plan(spec, plan(spec, 512).output_stride * positions)
    net = ResNet(laid_out, zero_init=False).double().eval()
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d):
            net.set_submodule(name, Mean(module))
    for parameter in net.parameters():  # all positive: nothing cancels, and every ReLU is open
        nn.init.constant_(parameter, 0.5)
    image = torch.ones(1, spec.in_channels, *laid_out.image_size, dtype=torch.float64, requires_grad=True)
    last = net.features(image)["last"]
    middle = tuple(side // 2 for side in last.shape[2:])
    (gradient,) = torch.autograd.grad(last[(0, slice(None), *middle)].sum(), image)
    seen = gradient[0].sum(0)
    sides = []
    for axis in range(seen.ndim):
        touched = seen.transpose(0, axis).flatten(1).sum(1) if seen.ndim > 1 else seen
        place = touched.nonzero().flatten()
        assert 0 < place[0] <= place[-1] < len(touched) - 1, "the image is too small to tell"
        sides.append(int(place[-1] - place[0]) + 1)
    return sides


ONE_DIMENSIONAL = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet50_v1",
    "resnet50d",
    "resnet50t",
    "resnet101",
    "resnext50_32x4d",
    "resnetrs50",
    "resnetv2_50d",
    "senet154",
    "resnet20_cifar",
    "plain20_cifar",
    "resnet164_cifar",
    "test_resnet",
]


@pytest.mark.parametrize("name", ONE_DIMENSIONAL)
def test_signals(name):
    spec = slim(variant(name), dims=1, attention="none")
    field = cost(plan(spec, 512)).receptive_field
    assert reached(spec, 2 * field // plan(spec, 512).output_stride + 3) == [field]


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet10t", "resnetaa50", "resnetblur50", "resnetaa34d", "resnetblur18", "resnet20_cifar"]
)
def test_pictures(name):
    spec = slim(variant(name))
    field = cost(plan(spec, 512)).receptive_field
    assert reached(spec, field // plan(spec, 512).output_stride + 3) == [field, field]


def test_volumes():
    spec = slim(variant("resnet10t"), dims=3)
    spec = replace(spec, stages=spec.stages[:2])
    field = cost(plan(spec, 64)).receptive_field
    assert reached(spec, field // 8 + 3) == [field] * 3


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", ["resnet50", "resnet50d", "resnet18"])
def test_dilated(name, output_stride):
    spec = slim(variant(name), dims=1).with_output_stride(output_stride)
    field = cost(plan(spec, 512)).receptive_field
    assert reached(spec, 2 * field // output_stride + 3) == [field]


@pytest.mark.parametrize("shortcut", ["conv1", "conv3", "avg", "maxpool", "none"])
@pytest.mark.parametrize("stride_block", ["first", "last"])
@pytest.mark.parametrize("stride", [2, 3, 4])
def test_wide_strides(shortcut, stride_block, stride):
    """A pooled shortcut of stride 3 or more sees further than the 3x3 beside it."""
    stage = StageSpec(depth=2, mid=2, out=8, stride=stride, stride_block=stride_block)
    spec = slim(NetSpec(stages=(stage, stage), shortcut=shortcut, dims=1))
    field = cost(plan(spec, 512)).receptive_field
    assert reached(spec, 9) == [field]


def test_known():
    assert [cost(name).receptive_field for name in ("resnet18", "resnet50", "resnet50_v1", "resnet101")] == [
        435,
        427,
        483,
        971,
    ]
