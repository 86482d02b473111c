"""Signals and volumes: networks of one and three dimensions against timm's of two, fed what only two can see.

A network of three dimensions that is fed a volume one voxel thin sees, of every kernel, the slice through its middle
along that axis: all others meet padding. So does a picture one pixel high, as the signal it is.
"""

from dataclasses import replace

import pytest
import torch

from isthmus.arch.cost import cost
from isthmus.arch.plan import plan
from isthmus.arch.variants import variant
from isthmus.nn.layers import AveragePool
from isthmus.nn.network import ResNet
from oracles import bare, ours, picture, random_state, relative_error, timm_net, trimmed

NAMES = [
    "resnet18",
    "resnet26d",
    "resnext50_32x4d",
    "seresnet18",
    *(pytest.param(name, marks=pytest.mark.long) for name in ("resnet50", "seresnet50", "ecaresnet50d", "resnetrs50")),
]


def slices(state, spec, axis):
    """A state of two dimensions from one of three: of every convolution the slice through its middle along `axis`."""
    with torch.device("meta"):
        wanted = ResNet(plan(spec)).state_dict()
    return {
        name: tensor.select(axis, tensor.shape[axis] // 2) if tensor.ndim > wanted[name].ndim else tensor
        for name, tensor in state.items()
    }


@pytest.mark.parametrize("axis", [2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_thin_volume_is_a_picture_to_timm(name, axis):
    spec, depths = trimmed(variant(name))
    volume = replace(spec, dims=3)
    state = random_state(bare(lambda: ResNet(plan(volume))))
    theirs = timm_net(name, **depths)
    theirs.load_state_dict(slices(state, spec, axis), assign=True)
    x = picture(1, 3, 33, 40)
    with torch.inference_mode():
        wanted = theirs.double().eval()(x)
        found = ours(volume, (33, 40, 1), state)(x.unsqueeze(axis))
    assert relative_error(found, wanted) <= 1e-8


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_is_a_flat_picture_to_timm(name):
    spec, depths = trimmed(variant(name))
    theirs = timm_net(name, **depths)
    state = random_state(theirs)
    theirs.load_state_dict(state, assign=True)
    signal = replace(spec, dims=1)
    x = picture(2, 3, 101)
    with torch.inference_mode():
        wanted = theirs.double().eval()(x.unsqueeze(2))
        found = ours(signal, 101, slices(state, signal, 2))(x)
    assert relative_error(found, wanted) <= 1e-8


@pytest.mark.parametrize("size", [(1, 33, 33), (8, 33, 33), (9, 1, 40)])
@pytest.mark.parametrize("name", ["resnet10t", "resnet26d"])
def test_volumes_thinner_than_a_pool_run(name, size):
    spec = replace(variant(name), dims=3, in_channels=1)
    net = ResNet(plan(spec, size)).eval()
    with torch.inference_mode():
        maps = net.features(torch.zeros(1, 1, *size))
    assert [tuple(map_.shape[2:]) for map_ in maps.values()] == [feature.size for feature in net.plan.features]
    assert cost(net.plan).macs > 0


@pytest.mark.parametrize("kernel", [2, 3])
def test_a_pool_of_a_volume_is_the_mean_of_what_there_is(kernel):
    x = picture(1, 2, 1, 5, 4)
    found = AveragePool(kernel, kernel, 3, ceil=True)(x)
    wanted = AveragePool(kernel, kernel, 2, ceil=True)(x[:, :, 0])
    torch.testing.assert_close(found, wanted.unsqueeze(2))
