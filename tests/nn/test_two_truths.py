"""The plan and the network say the same: parameters, multiply-adds and maps, for every row of the table."""

from dataclasses import replace

import pytest
import torch

from isthmus.arch.plan import plan
from isthmus.arch.spec import HeadSpec, StageSpec
from isthmus.arch.variants import variant, variants
from isthmus.nn.network import ResNet
from oracles import assert_plan_is_true

# Those with more than a hundred blocks repeat what their smaller kin already show.
DEEP = {name for name in variants() if sum(stage.depth for stage in variant(name).stages) > 100}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name in DEEP)) for name in variants()])
def test_every_row(name):
    with torch.device("meta"):
        net = ResNet(plan(name, 33 if "cifar" in name else 97)).eval()
    assert_plan_is_true(net)


@pytest.mark.parametrize(
    "name", ["resnet50", "resnet50d", "resnext50_32x4d", "seresnet50", "resnet50_gn", "resnetv2_50t"]
)
def test_at_224(name):
    with torch.device("meta"):
        assert_plan_is_true(ResNet(plan(name)).eval())


@pytest.mark.parametrize(
    "head",
    [
        HeadSpec(taps=("layer3", "last"), pools=("avg", "max")),
        HeadSpec(taps=("stem", "layer1", "layer2", "layer3", "last"), pools=("max",)),
        HeadSpec(hidden=16),
    ],
)
@pytest.mark.parametrize("name", ["resnet50", "resnetv2_50"])
def test_heads(name, head):
    with torch.device("meta"):
        net = ResNet(plan(replace(variant(name), head=head, num_classes=7), 64)).eval()
    assert_plan_is_true(net)
    assert net.pooled(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, net.plan.num_features)
    assert net(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 7)


def test_strides_in_the_last_block():
    stages = tuple(
        StageSpec(depth=3, mid=8, out=32, stride=2, stride_block="last", block="preact_bottleneck") for _ in range(2)
    )
    spec = replace(variant("resnetv2_50"), stages=stages, shortcut="maxpool", norm="batch")
    with torch.device("meta"):
        net = ResNet(plan(spec, 65)).eval()
    assert_plan_is_true(net)
    assert [block.spec.stride for block in net.plan.blocks] == [1, 1, 2, 1, 1, 2]
    assert [block.spec.shortcut for block in net.plan.blocks] == [
        "conv1",
        "identity",
        "maxpool",
        "identity",
        "identity",
        "maxpool",
    ]
