"""Maps at odd, oblong and tiny sizes, in one and three dimensions, and at other output strides."""

from dataclasses import replace

import pytest
import torch

from isthmus.arch.cost import cost
from isthmus.arch.plan import plan
from isthmus.arch.spec import NetSpec, StageSpec
from isthmus.arch.variants import variant, variants
from isthmus.errors import SpecError
from isthmus.nn.network import ResNet
from oracles import assert_plan_is_true

KINDS = [
    "resnet18d",
    "resnet26t",
    "resnetaa34d",
    "resnetblur18",
    "resnetrs50",
    "resnetv2_50d",
    "senet154",
    "ecaresnet26t",
]


def meta(spec, size):
    with torch.device("meta"):
        return ResNet(plan(spec, size)).eval()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=[pytest.mark.long] * (name == "senet154" and size != 97))
        for name in KINDS
        for size in (97, 200, 225, 240, (64, 160), (97, 33))
    ],
)
def test_odd_and_oblong_pictures(name, size):
    assert_plan_is_true(meta(name, size))


@pytest.mark.parametrize("name", ["resnetaa50", "resnetaa34d", "resnetblur18"])
def test_anti_alias_runs_at_200(name):
    net = ResNet(plan(name, 200)).eval()
    with torch.inference_mode():
        assert net(torch.zeros(1, 3, 200, 200)).shape == (1, 1000)


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet50", "resnet26d", "seresnet18", "resnet50_gn", "resnetv2_50", "resnext50_32x4d", "resnetrs50"],
)
def test_signals_and_volumes(name, dims):
    spec = replace(variant(name), dims=dims, in_channels=2)
    net = meta(spec, (65,) if dims == 1 else (17, 33, 40))
    assert_plan_is_true(net)
    if dims == 1:
        assert all(side == () or len(side) == 1 for side in (row.out_size for row in cost(net.plan).rows))


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("name", ["resnetaa50", "resnetblur18"])
def test_anti_alias_has_no_meaning_outside_pictures(name, dims):
    with pytest.raises(SpecError, match=f"pictures.*dims={dims}"):
        cost(replace(variant(name), dims=dims), 64).totals  # noqa: B018


@pytest.mark.parametrize("name", variants())
def test_output_strides(name):
    spec, cifar = variant(name), "cifar" in name
    assert plan(spec).output_stride == (4 if cifar else 32)
    for output_stride in (8, 16, 32):
        dilated = spec.with_output_stride(output_stride)
        assert plan(dilated).output_stride == (4 if cifar else output_stride)
        assert cost(dilated).params == cost(spec).params
        assert NetSpec.from_toml(dilated.to_toml()) == dilated
    assert spec.with_output_stride(32) == spec


def test_dilations_grow_as_strides_go():
    stages = variant("resnet50").with_output_stride(8).stages
    assert [(stage.stride, stage.dilation, stage.first_dilation) for stage in stages] == [
        (1, 1, 0),
        (2, 1, 0),
        (1, 2, 1),
        (1, 4, 2),
    ]
    with pytest.raises(SpecError, match="output_stride 2 is below the stem's own 4"):
        variant("resnet50").with_output_stride(2)
    with pytest.raises(SpecError, match="output_stride 12 is none that this network passes; the nearest below it is 8"):
        variant("resnet50").with_output_stride(12)
    assert variant("resnet50").with_output_stride(64) == variant("resnet50")


@pytest.mark.parametrize(
    ("name", "smallest"),
    [("resnet50", 1), ("resnetaa50", 3), ("resnetblur18", 17), ("resnetrs50", 1), ("resnet20_cifar", 1)],
)
def test_the_smallest_picture_runs_and_one_less_is_refused(name, smallest):
    net = ResNet(plan(name, smallest)).eval()
    assert cost(net.plan).macs > 0
    with torch.inference_mode():
        assert net(torch.zeros(1, 3, smallest, smallest)).shape == (1, net.spec.num_classes)
    if smallest > 1:
        with pytest.raises(SpecError, match=r"nothing is left .*enlarge the image"):
            cost(name, smallest - 1).totals  # noqa: B018


def test_ceil_pool_needs_two_pixels():
    spec = NetSpec(stages=(StageSpec(depth=1, mid=4, out=16),), stem=replace(variant("resnet50").stem, pool="max_ceil"))
    assert plan(spec, 3).features[-1].size == (1, 1)
    with pytest.raises(SpecError, match="maxpool"):
        cost(spec, 1).totals  # noqa: B018


@pytest.mark.parametrize("name", ["resnet50", "resnet50_v1", "resnetaa50d", "resnet20_cifar", "resnetv2_50"])
def test_features_on_paper(name):
    laid_out = plan(name, 64)
    taps = [feature.name for feature in laid_out.features]
    assert taps == ["stem", *(f"layer{number + 1}" for number in range(len(laid_out.spec.stages))), "last"]
    assert laid_out.features[-1].channels == laid_out.num_features == laid_out.spec.stages[-1].out
    assert laid_out.features[-1][1:] == laid_out.features[-2][1:]
    assert all(feature.size == (-(-64 // feature.stride),) * 2 for feature in laid_out.features)
