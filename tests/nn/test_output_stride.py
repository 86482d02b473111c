"""Strides turned into dilations: the same function as timm's and torchvision's."""

from dataclasses import replace

import pytest
import timm
import torch
import torchvision

from isthmus.arch.variants import variant
from oracles import bare, ours, picture, random_state, relative_error, timm_net, trimmed

NETS = ["resnet18", "resnet50", "resnet26d", "resnet18d", "resnext50_32x4d", "senet154", "resnetaa50", "resnetaa34d"]
NETS += ["resnetblur18", "resnetblur50", "seresnet50", "ecaresnet26t", "resnetrs50", "resnet50_gn", "test_resnet"]
LARGE = ("senet154", "resnetaa50", "resnetblur50")  # of kinds that smaller ones have
CASES = [
    pytest.param(name, stride, marks=[pytest.mark.long] * (name in LARGE or (stride == 32 and name != "resnet50")))
    for name in NETS
    for stride in (8, 16, 32)  # 32 has no dilations
]


@torch.inference_mode()
def last_maps_differ(theirs, feature_map, spec, size):
    state = random_state(theirs)
    theirs.load_state_dict(state, assign=True)
    theirs = theirs.double().eval()
    x = picture(1, 3, size, size)
    net = ours(spec, size, state)
    found = net.features(x)["last"]
    assert found.shape[2:] == net.plan.features[-1].size
    assert relative_error(net(x), theirs(x)) <= 1e-8
    return relative_error(found, feature_map(theirs, x))


@pytest.mark.parametrize(("name", "output_stride"), CASES)
def test_timm(name, output_stride):
    spec, options = trimmed(variant(name).with_output_stride(output_stride))
    theirs = timm_net(name, output_stride=output_stride, **options)
    assert last_maps_differ(theirs, lambda net, x: net.forward_features(x), spec, 128) <= 1e-8


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", ["resnet50d", "resnet26"])
def test_timm_odd(name, output_stride):
    spec, options = trimmed(variant(name).with_output_stride(output_stride))
    theirs = timm_net(name, output_stride=output_stride, **options)
    assert last_maps_differ(theirs, lambda net, x: net.forward_features(x), spec, 97) <= 1e-8


@pytest.mark.parametrize(
    ("output_stride", "dilate"), [(8, (False, True, True)), (16, (False, False, True)), (32, (False, False, False))]
)
@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
def test_torchvision(name, output_stride, dilate):
    theirs = bare(lambda: torchvision.models.get_model(name, weights=None, replace_stride_with_dilation=dilate))

    def feature_map(net, x):
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        return net.layer4(net.layer3(net.layer2(net.layer1(x))))

    assert last_maps_differ(theirs, feature_map, variant(name).with_output_stride(output_stride), 97) <= 1e-8


def test_the_first_block_keeps_the_dilation_before_it():
    """The other convention (every block dilated alike) has the same keys and is another function."""
    spec = variant("resnet26").with_output_stride(8)
    alike = replace(spec, stages=tuple(replace(stage, first_dilation=0) for stage in spec.stages))
    theirs = timm.create_model("resnet26", output_stride=8)
    with torch.inference_mode():
        state = random_state(theirs)
        x = picture(1, 3, 97, 97)
        assert relative_error(ours(alike, 97, state)(x), ours(spec, 97, state)(x)) > 1e-3
