"""Initialisation as He et al., zero-init gamma, and drop path."""

import math
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn

from isthmus.arch.plan import plan
from isthmus.arch.variants import variant
from isthmus.nn.layers import DropPath
from isthmus.nn.network import ResNet


def seeded(spec, **options):
    torch.manual_seed(0)
    return ResNet(plan(spec, 64), **options)


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d", "resnet26t", "resnetv2_50", "resnet20_cifar"])
def test_convolutions_are_he_normal(name):
    for key, module in seeded(name).named_modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight
            fan_out = weight.shape[0] * weight[0, 0].numel()  # as torch counts it, groups or not
            wanted = math.sqrt(2 / fan_out)
            spread = 5 / math.sqrt(2 * weight.numel())  # five standard errors of a standard deviation
            assert weight.std().item() == pytest.approx(wanted, rel=spread), key
            assert abs(weight.mean().item()) < 5 * wanted / math.sqrt(weight.numel()), key


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions_are_he_normal_too(dims):
    weight = seeded(replace(variant("resnet50"), dims=dims)).layer4[0].conv2.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (512 * 3**dims)), rel=0.02)


def test_classifier_and_biases():
    net = seeded(replace(variant("resnet18"), norm="none"))
    assert net.fc.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not net.fc.bias.any()
    assert not any(module.bias.any() for module in net.modules() if isinstance(module, nn.Conv2d))


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("resnet50", "bn3"),
        ("resnet18", "bn2"),
        ("resnet50_gn", "bn3"),
        ("seresnet18", "bn2"),
        ("resnet20_cifar", "bn2"),
    ],
)
def test_zero_init_gamma_makes_a_block_its_shortcut(name, last):
    net = seeded(name)
    for key, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            zero = key.startswith("layer") and key.endswith(f".{last}")
            assert torch.equal(module.weight, torch.full_like(module.weight, float(not zero))), key
            assert not module.bias.any()
    block = net.layer1[1].eval()
    x = torch.randn(1, block.spec.in_channels, 8, 8)
    assert torch.equal(block(x), x.relu())
    assert all(
        module.weight.all() for module in seeded(name, zero_init=False).modules() if isinstance(module, nn.BatchNorm2d)
    )


@pytest.mark.parametrize(
    "name", ["plain20_cifar", "plain164_cifar", "plainv2_164_cifar", "resnetv2_50", "resnetv2_164_cifar"]
)
def test_plain_and_preactivation_networks_are_not_switched_off(name):
    net = seeded(name).eval()
    assert all(module.weight.all() for module in net.modules() if isinstance(module, nn.BatchNorm2d))
    maps = net.features(torch.randn(1, 3, 32, 32))
    assert all(value.std() > 1e-6 for value in maps.values())


def test_statistics_start_at_zero_and_one():
    for module in seeded("resnet18").modules():
        if isinstance(module, nn.BatchNorm2d):
            assert not module.running_mean.any()
            assert (module.running_var == 1).all()


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("shape", [(4000, 3), (4000, 3, 2), (4000, 1, 2, 2)])
def test_drop_path_is_torchvisions_stochastic_depth(rate, shape):
    layer, x = DropPath(rate), torch.randn(shape) + 2
    torch.manual_seed(7)
    found = layer.train()(x)
    torch.manual_seed(7)
    wanted = torchvision.ops.stochastic_depth(x, rate, mode="row", training=True)
    torch.testing.assert_close(found, wanted)
    kept = (found != 0).flatten(1).all(1)
    assert torch.equal(kept, (found != 0).flatten(1).any(1))  # a sample is dropped whole, or not at all
    assert kept.float().mean().item() == pytest.approx(1 - rate, abs=0.04)
    torch.testing.assert_close(found[kept], x[kept] / (1 - rate))
    assert found.mean().item() == pytest.approx(x.mean().item(), rel=0.1)
    assert torch.equal(layer.eval()(x), x)


def test_drop_path_grows_with_depth_and_rests_in_evaluation():
    spec = replace(variant("resnet26"), drop_path=0.7)
    net = seeded(spec, zero_init=False)
    rates = [module.rate for module in net.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.1 * step for step in range(1, 8)])
    assert isinstance(net.layer1[0].drop_path, nn.Identity)
    x = torch.randn(2, 3, 64, 64)
    without = seeded(variant("resnet26"), zero_init=False).eval()
    without.load_state_dict(net.state_dict())
    assert torch.equal(net.eval()(x), without(x))
    torch.manual_seed(1)
    net.train()
    assert not torch.equal(net(x), net(x))
