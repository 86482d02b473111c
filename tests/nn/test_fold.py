"""Batch norm folded into convolutions and put back: the same function, and the network given is left alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from isthmus.arch.plan import plan
from isthmus.arch.spec import HeadSpec, NetSpec, StageSpec, StemSpec
from isthmus.arch.variants import variant, variants
from isthmus.errors import SpecError
from isthmus.nn.batchnorm import FrozenBatchNorm2d, freeze_batchnorm
from isthmus.nn.fold import fold, fold_tensors, insert_batchnorm, merge_tensors
from isthmus.nn.freeze import freeze
from isthmus.nn.network import ResNet
from oracles import ours, picture, random_state, relative_error, trimmed

STRUCTURES = [
    "resnet18", "resnet18d", "resnet26", "resnet26t", "resnet50_v1", "resnet50c", "resnet50s", "wide_resnet50_2",
    "resnext50_32x4d", "seresnet18", "seresnext26d_32x4d", "ecaresnet26t", "ecaresnetlight", "senet154", "resnetaa34d",
    "resnetaa50", "resnetblur18", "resnetblur50d", "resnetrs50", "resnet20_cifar", "resnet164_cifar", "plain20_cifar",
    "plain164_cifar", "test_resnet", "resnetv2_50", "resnetv2_50t", "resnetv2_50_keras", "resnetv2_164_cifar",
    "plainv2_164_cifar",
]  # fmt: skip
# Rows of the table in which a batch norm stands behind an addition, so that no convolution can carry it.
PREACT = [
    "resnetv2_50", "resnetv2_50d", "resnetv2_50t", "resnetv2_50_keras", "resnetv2_101", "resnetv2_101d",
    "resnetv2_101_keras", "resnetv2_152", "resnetv2_152d", "resnetv2_152_keras", "resnetv2_164_cifar",
    "resnetv2_1001_cifar", "plainv2_164_cifar", "plainv2_1001_cifar",
]  # fmt: skip
GROUP_NORM = ["resnet50_gn"]
TOLERANCE = 1e-10


def norms_of(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)]


def random_net(spec: NetSpec, size: int = 64) -> ResNet:
    net = ResNet(plan(spec, size))
    return ours(spec, size, random_state(net))


def snapshot(net):
    return {key: value.clone() for key, value in net.state_dict().items()}, [
        module.training for module in net.modules()
    ]


def unchanged(net, before):
    state, modes = snapshot(net)
    assert list(state) == list(before[0])
    assert all(torch.equal(value, before[0][key]) for key, value in state.items())
    assert modes == before[1]
    assert not any(module._forward_hooks for module in net.modules())


def some_and_all(some: list[str]) -> list[object]:
    """Some rows, and in the long run every row that folds."""
    rest = [name for name in variants() if name not in (*some, *GROUP_NORM)]
    return [*some, *(pytest.param(name, marks=pytest.mark.long) for name in rest)]


@pytest.mark.parametrize("name", some_and_all(STRUCTURES))
def test_fold_is_the_same_function(name):
    net = random_net(trimmed(variant(name))[0])
    before, x = snapshot(net), picture(2, 3, 64, 64)
    folded = fold(net)
    unchanged(net, before)
    assert folded.spec == replace(net.spec, norm="leading" if name in PREACT else "none")
    with torch.inference_mode():
        assert relative_error(folded(x), net(x)) <= TOLERANCE
        for found, wanted in zip(folded.features(x).values(), net.features(x).values(), strict=True):
            assert relative_error(found, wanted) <= TOLERANCE


@pytest.mark.parametrize("name", variants())
def test_which_norms_remain(name):
    with torch.device("meta"):
        net = ResNet(plan(trimmed(variant(name))[0], 64))
    if name in GROUP_NORM:
        with pytest.raises(SpecError, match="cannot fold a network with norm 'group'"):
            fold(net)
        return
    blocks = [f"layer{number}.{index}" for number in range(1, len(net.stages) + 1) for index in range(2)]
    known = [name for name, _ in net.named_modules()]
    leading = [*(f"{block}.bn1" for block in blocks if block in known), "norm"]
    assert norms_of(fold(net)) == (leading if name in PREACT else [])


@pytest.mark.parametrize("name", STRUCTURES)
def test_insert_batchnorm_is_the_same_function(name):
    spec = replace(trimmed(variant(name))[0], norm="leading" if name in PREACT else "none")
    net = random_net(spec)
    before = snapshot(net)
    normed = insert_batchnorm(net, [picture(2, 3, 64, 64, seed=seed) for seed in range(2)])
    unchanged(net, before)
    assert normed.spec == replace(spec, norm="batch")
    with torch.inference_mode():
        x = picture(2, 3, 64, 64, seed=99)
        assert relative_error(normed.eval()(x), net(x)) <= TOLERANCE
        again = fold(normed)
        assert relative_error(again(x), net(x)) <= TOLERANCE
    assert list(again.state_dict()) == list(net.state_dict())
    for key, value in again.state_dict().items():
        assert relative_error(value, net.state_dict()[key]) <= TOLERANCE, key


@pytest.mark.parametrize("name", ["resnet18", "resnet26d", "seresnet18", "resnetblur18"])
def test_training_starts_where_evaluation_is(name):
    """On the batch that the statistics were measured on, training mode differs by the variance's n / (n - 1) alone."""
    net = random_net(replace(variant(name), norm="none"), 64)
    batch = picture(16, 3, 64, 64)
    normed = insert_batchnorm(net, [batch])
    with torch.no_grad():
        assert relative_error(normed.train()(batch), net(batch)) < 0.05
        stem = normed.features(batch, ("stem",))["stem"]
        assert relative_error(stem, net.features(batch, ("stem",))["stem"]) < 1e-4
    statistics = [module for module in normed.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all((module.running_var >= 0).all() for module in statistics)


def test_a_stem_with_bias_and_norm_folds_both_ways():
    spec = trimmed(variant("resnet18"))[0]
    net = random_net(replace(spec, stem=replace(spec.stem, bias=True, pool="max_zero")))
    x = picture(2, 3, 64, 64)
    with torch.inference_mode():
        folded = fold(net)
        assert relative_error(folded(x), net(x)) <= TOLERANCE
        assert relative_error(insert_batchnorm(folded, [x])(x), net(x)) <= TOLERANCE


def test_statistics_are_those_of_all_batches():
    net = random_net(NetSpec(stages=(StageSpec(depth=1, mid=4, out=16),), stem=StemSpec(widths=(8,)), norm="none"), 32)
    batches = [picture(size, 3, 32, 32, seed=size) for size in (3, 5, 1)]
    normed = insert_batchnorm(net, iter(batches))
    with torch.no_grad():
        values = torch.cat([normed.conv1(batch) for batch in batches]).transpose(0, 1).flatten(1)
    assert relative_error(normed.bn1.running_mean, values.mean(1)) <= TOLERANCE
    assert relative_error(normed.bn1.running_var, values.var(1)) <= TOLERANCE


def test_norms_of_stages_that_the_head_does_not_read():
    spec = replace(trimmed(variant("resnetv2_50"))[0], norm="leading", head=HeadSpec(taps=("layer1",)))
    net, x = random_net(spec), picture(2, 3, 64, 64)
    normed = insert_batchnorm(net, [x]).eval()
    with torch.inference_mode():
        for found, wanted in zip(normed.features(x).values(), net.features(x).values(), strict=True):
            assert relative_error(found, wanted) <= TOLERANCE


def test_training_mode_given_is_given_back():
    net = random_net(replace(variant("resnet18"), norm="none")).train()
    assert insert_batchnorm(net, [picture(2, 3, 64, 64)]).training
    assert net.training
    assert fold(random_net(variant("resnet18")).train()).training


def test_dead_channels_survive():
    """A channel that is always the same has variance 0, and still comes out as it was."""
    net = random_net(replace(variant("resnet18"), norm="none"))
    with torch.no_grad():
        net.conv1.weight[3] = 0
    x = picture(2, 3, 64, 64)
    normed = insert_batchnorm(net, [x]).eval()
    with torch.inference_mode():
        assert relative_error(normed(x), net(x)) <= TOLERANCE
        assert torch.isfinite(normed.train()(x)).all()


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("name", ["resnet26d", "resnetv2_50t"])
def test_other_dimensions(name, dims):
    net = random_net(replace(trimmed(variant(name), later=1)[0], dims=dims, in_channels=2), 32)
    x = picture(2, 2, *(32,) * dims)
    with torch.inference_mode():
        assert relative_error(fold(net)(x), net(x)) <= TOLERANCE
        assert relative_error(insert_batchnorm(fold(net), [x])(x), net(x)) <= TOLERANCE


def test_what_travels_with_weights_travels_on():
    net = random_net(replace(variant("resnet18"), num_classes=2))
    net.classes, net.preprocess = ("cat", "dog"), net.preprocess.at(112)
    folded = fold(net)
    assert (folded.classes, folded.preprocess) == (net.classes, net.preprocess)
    normed = insert_batchnorm(folded, [picture(2, 3, 64, 64)])
    assert (normed.classes, normed.preprocess) == (net.classes, net.preprocess)


@pytest.mark.parametrize("name", ["resnet18", "resnetaa50d", "seresnext26d_32x4d", "resnetv2_50"])
def test_a_frozen_network_folds(name):
    net = random_net(trimmed(variant(name))[0])
    freeze(net)
    folded, x = fold(net.train()), picture(2, 3, 64, 64)
    with torch.inference_mode():
        assert relative_error(folded(x), net(x)) <= TOLERANCE
    assert not any(parameter.requires_grad for name, parameter in folded.named_parameters() if "fc." not in name)


def test_frozen_norms_that_remain_are_frozen():
    net = random_net(trimmed(variant("resnetv2_50"))[0])
    freeze_batchnorm(net)
    folded = fold(net.train())
    assert {type(folded.get_submodule(name)) for name in norms_of(folded)} == {FrozenBatchNorm2d}
    x = picture(2, 3, 64, 64)
    with torch.inference_mode():
        assert relative_error(folded(x), net(x)) <= TOLERANCE


def test_a_head_with_a_norm_behind_channel_attention():
    """The last convolution of such a network is the gate's, and the next norm the head's: they are no pair."""
    spec = replace(trimmed(variant("seresnet18"))[0], head=HeadSpec(norm=True))
    net, x = random_net(spec), picture(2, 3, 64, 64)
    folded = fold(net)
    assert norms_of(folded) == ["fc.0"]
    with torch.inference_mode():
        assert relative_error(folded(x), net(x)) <= TOLERANCE
        assert relative_error(insert_batchnorm(folded, [x]).eval()(x), net(x)) <= TOLERANCE


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_two_convolutions_become_one_over_both_inputs(biases):
    torch.manual_seed(0)
    convs = [nn.Conv2d(width, 7, 1, bias=bias).double() for width, bias in zip((3, 5), biases, strict=True)]
    strip, other = picture(2, 3, 9, 8), picture(2, 5, 9, 8, seed=2)
    weight, bias = merge_tensors(*(each for conv in convs for each in (conv.weight, conv.bias)))
    found = nn.functional.conv2d(torch.cat([strip, other], 1), weight, bias)
    assert relative_error(found, convs[0](strip) + convs[1](other)) <= TOLERANCE
    assert (bias is None) == (not any(biases))
    assert not weight.requires_grad


def test_what_cannot_be_refolded_or_renormed():
    folded = fold(random_net(variant("resnet18")))
    with pytest.raises(SpecError, match="cannot fold a network with norm 'none'"):
        fold(folded)
    with pytest.raises(SpecError, match="no batch was given"):
        insert_batchnorm(folded, [])
    for name in ("resnet18", "resnet50_gn"):
        with pytest.raises(SpecError, match="into a network with norm 'none' or 'leading'"):
            insert_batchnorm(ResNet(plan(name, 64)), [torch.zeros(1, 3, 64, 64)])
    with pytest.raises(SpecError, match="without running statistics"):
        fold_tensors(torch.ones(2, 2, 1, 1), None, nn.BatchNorm2d(2, track_running_stats=False))


def test_own_blocks_do_not_fold():
    class Own(nn.Module):
        def __init__(self, width_in, mid, stride, downsample):
            super().__init__()
            self.conv = nn.Conv2d(width_in, mid, 3, stride, 1)

        def forward(self, x):
            return self.conv(x)

    spec = NetSpec(stages=(StageSpec(depth=1, mid=8, out=8, block="own"),))
    with pytest.raises(SpecError, match="blocks own"):
        fold(ResNet(plan(spec, 32), blocks={"own": Own}))


EXCHANGED = {
    "maxpool": nn.Identity(),
    "layer1.0.act1": nn.SiLU(),
    "layer1.1.se": nn.Sigmoid(),
    "layer2.0.conv1": nn.Conv2d(64, 128, 3, 2, 1, bias=False, padding_mode="reflect"),
    "layer2.0.extra": nn.Identity(),
}


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("name", EXCHANGED)
def test_exchanged_modules_are_named(name, norm):
    net = random_net(replace(variant("resnet18"), norm=norm))
    parent, _, last = name.rpartition(".")
    net.get_submodule(parent).add_module(last, EXCHANGED[name])
    with pytest.raises(SpecError, match=f"^{name} is not as the network's plan has it"):
        fold(net) if norm == "batch" else insert_batchnorm(net, [picture(2, 3, 64, 64)])


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_50"])
def test_a_norm_and_a_head_of_ones_own_fold_as_they_are(name):
    net = random_net(trimmed(variant(name))[0])
    for norm in (net.layer1[0].bn1, net.layer1[0].bn2):  # the first of a pre-activation block stays
        norm.eps, norm.momentum = 0.1, None
    net.fc = nn.Sequential(nn.Dropout(0.5), nn.Linear(net.plan.num_features, 3)).double().eval()
    x = picture(2, 3, 64, 64)
    with torch.inference_mode():
        assert relative_error(fold(net)(x), net(x)) <= TOLERANCE
