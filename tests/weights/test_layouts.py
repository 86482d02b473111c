"""Key rules of other libraries: reversible, complete, and the networks behind them compute the same."""

from dataclasses import replace

import pytest
import timm
import torch
import torchvision

from isthmus.arch.plan import plan
from isthmus.arch.spec import StemSpec
from isthmus.arch.variants import variant, variants
from isthmus.errors import WeightsError
from isthmus.nn.network import ResNet
from isthmus.weights.layouts import detect, from_native, to_native
from oracles import bare, ours, picture, randomise, relative_error, seed_of, timm_net

PREACT = [name for name in variants() if variant(name).preact and "1001" not in name]  # 164's rules, more blocks
TIMM_PREACT = [name for name in PREACT if not name.endswith("_cifar")]


def numbered(module):
    """A different value for each tensor of the state dict, in no memory at all."""
    state = module.state_dict()
    return {
        name: torch.tensor(float(number)).expand(tensor.shape) for number, (name, tensor) in enumerate(state.items())
    }


@pytest.mark.parametrize("name", PREACT)
def test_round_trip(name):
    spec = variant(name)
    native = numbered(bare(lambda: ResNet(plan(spec))))
    foreign = from_native(native, "timm_resnetv2", spec)
    assert detect(foreign) == "timm_resnetv2"
    assert len(foreign) == len(native)
    assert not {key for key in foreign if key.startswith(("layer", "fc", "conv1"))}
    back = to_native(foreign, "timm_resnetv2", spec)
    assert list(back) == list(native)
    assert all(torch.equal(back[key], native[key]) for key in native)


@pytest.mark.parametrize("name", TIMM_PREACT)
def test_names_and_shapes_are_timms(name):
    theirs = timm_net(name).state_dict()
    native = numbered(bare(lambda: ResNet(plan(variant(name)))))
    foreign = from_native(native, "timm_resnetv2", variant(name))
    assert {key: tensor.shape for key, tensor in foreign.items()} == {key: item.shape for key, item in theirs.items()}


@pytest.mark.parametrize("size", [97, pytest.param(224, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", TIMM_PREACT)
def test_parity_with_timm(name, size):
    theirs = randomise(timm_net(name), seed_of(name))
    state = to_native(theirs.state_dict(), "timm_resnetv2", variant(name))
    x = picture(1, 3, size, size)
    assert relative_error(ours(variant(name), size, state)(x), theirs(x)) <= 1e-8


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("resnetv2_50", {"stride_at": "conv1"}),
        ("resnetv2_50", {"stem": StemSpec(pool="max_ceil")}),
        ("resnetv2_50", {"norm_eps": 1e-2}),
        ("resnetv2_50", {"activation": "silu"}),
        ("resnetv2_50d", {"stem": replace(variant("resnetv2_50d").stem, pool="max_ceil")}),
    ],
)
def test_mutations_fail(name, change):
    """What the keys cannot say still shows in the outputs, so the parity above proves it."""
    theirs = randomise(timm_net(name), seed_of(name))
    state = to_native(theirs.state_dict(), "timm_resnetv2", variant(name))
    x = picture(1, 3, 97, 97)
    assert relative_error(ours(replace(variant(name), **change), 97, state)(x), theirs(x)) > 1e-4


def test_values_survive_the_change_of_the_classifier_bit_for_bit():
    spec = replace(variant("resnetv2_50"), num_classes=7)
    weight = torch.randn(7, 2048)
    foreign = from_native({"fc.weight": weight}, "timm_resnetv2", spec)
    assert foreign["head.fc.weight"].shape == (7, 2048, 1, 1)
    assert torch.equal(to_native(foreign, "timm_resnetv2", spec)["fc.weight"], weight)


def test_native_is_torchvisions_and_timms():
    for net in (torchvision.models.resnet18(), timm.create_model("resnet10t"), timm.create_model("test_resnet")):
        assert detect(net.state_dict()) == "native"
    tensors = {"conv1.weight": torch.ones(1)}
    assert to_native(tensors, "native", variant("resnet50")) == tensors


def test_unknown_layouts():
    with pytest.raises(WeightsError, match=r"no layout known here \(native, timm_resnetv2\): a, b"):
        detect(["a", "b"])
    with pytest.raises(WeightsError, match="there is no layout 'keras'; known: native, timm_resnetv2"):
        to_native({}, "keras", variant("resnet50"))
    with pytest.raises(WeightsError, match="is for pre-activation networks, and resnet50 is not"):
        from_native({}, "timm_resnetv2", variant("resnet50"))
    spec = variant("resnetv2_50")
    hidden = replace(spec, head=replace(spec.head, hidden=8))
    with pytest.raises(WeightsError, match=r"no name for fc\.0"):
        to_native({}, "timm_resnetv2", hidden)
