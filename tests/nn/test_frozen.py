"""Frozen batch norm and frozen networks: nothing moves, whatever `.train()` says."""

import copy

import pytest
import torch
from torch import nn

from isthmus.arch.plan import plan
from isthmus.errors import SpecError
from isthmus.nn.batchnorm import freeze_batchnorm
from isthmus.nn.freeze import freeze
from isthmus.nn.network import ResNet
from oracles import random_state

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POINTS = ["none", "stem", "layer1", "layer2", "layer3", "layer4", "trunk"]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_frozen_norm_is_the_norm_in_evaluation_bit_for_bit(dims, dtype):
    norm = NORMS[dims](6, eps=3e-4, momentum=0.3).to(dtype)
    norm.load_state_dict({key: value.to(norm.state_dict()[key].dtype) for key, value in random_state(norm).items()})
    frozen = copy.deepcopy(norm)
    assert freeze_batchnorm(frozen) == 1
    frozen.train()
    norm.eval()
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    x = torch.randn(3, 6, *(5,) * dims, dtype=dtype) * 9
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    (frozen(found) ** 2).sum().backward()
    (norm(wanted) ** 2).sum().backward()
    assert torch.equal(frozen(x), norm(x))
    assert torch.equal(found.grad, wanted.grad)
    assert torch.equal(frozen.weight.grad, norm.weight.grad)
    assert torch.equal(frozen.bias.grad, norm.bias.grad)
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())
    assert (frozen.eps, frozen.momentum) == (3e-4, 0.3)
    assert isinstance(frozen, NORMS[dims])


def test_freezing_the_norms_of_any_network_keeps_its_parameters():
    net = ResNet(plan("resnet26d", 32))
    hooked = net.bn1.register_forward_hook(lambda *_: None)
    parameters, keys = list(net.parameters()), list(net.state_dict())
    count = freeze_batchnorm(net)
    assert count == sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert freeze_batchnorm(net) == 0
    assert all(found is wanted for found, wanted in zip(net.parameters(), parameters, strict=True))
    assert list(net.state_dict()) == keys
    assert net.bn1._forward_hooks
    hooked.remove()
    net.train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net.layer1[0].bn1.weight.grad is not None  # scale and shift still train
    assert net.layer1[0].training


def trained(net, steps=3):
    """A few steps with momentum and weight decay, in training mode."""
    optimiser = torch.optim.SGD(
        (p for p in net.parameters() if p.requires_grad), lr=0.1, momentum=0.9, weight_decay=0.1
    )
    net.train()
    for seed in range(steps):
        x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), torch.arange(4)).backward()
        optimiser.step()
    return net


def frozen_until(net, until):
    """The parts with parameters from the input up to and including `until`."""
    stages = ["layer1", "layer2", "layer3", "layer4"]
    parts = ["conv1", "bn1", *stages, *["norm"] * net.spec.preact]
    if until in stages:
        return parts[: parts.index(until) + 1]
    return {"none": [], "stem": parts[:2], "trunk": parts}[until]


@pytest.mark.parametrize("name", ["resnet10t", "seresnet18", "resnetv2_50"])
@pytest.mark.parametrize("until", POINTS)
def test_frozen_parts_do_not_move_and_the_others_do(name, until):
    net = ResNet(plan(name, 64), zero_init=False)
    frozen = frozen_until(net, until)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    count = freeze(net, until)
    assert count == sum(value.numel() for key, value in net.named_parameters() if key.partition(".")[0] in frozen)
    trained(net)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]) == (key.partition(".")[0] in frozen), key
    assert all(not module.training for part in frozen for module in net.get_submodule(part).modules())
    assert net.training


def test_frozen_network_is_the_network_in_evaluation():
    net = ResNet(plan("resnet18", 64)).double()
    net.load_state_dict(random_state(net))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    wanted = net.eval()(x)
    freeze(net)
    assert torch.equal(net.train()(x), wanted)
    net.requires_grad_(requires_grad=True)
    assert torch.equal(net.train().train()(x), wanted)


def test_the_last_call_counts():
    net = ResNet(plan("resnet18", 64))
    total = sum(parameter.numel() for parameter in net.parameters())
    head = net.fc.weight.numel() + net.fc.bias.numel()
    assert freeze(net) == total - head
    assert freeze(net, until="layer1") < freeze(net, until="layer2") < total - head
    assert freeze(net, until="none") == 0
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(module.training for module in net.train().modules())
    before = net.bn1.running_mean.clone()
    trained(net, steps=1)
    assert not torch.equal(net.bn1.running_mean, before)


def test_freezing_keeps_the_mode_of_the_rest():
    net = ResNet(plan("resnet18", 64)).eval()
    freeze(net, "layer1")
    assert not any(module.training for module in net.modules())
    net.train()
    assert net.layer2.training
    assert not net.layer1.training
    copied = copy.deepcopy(net).train()
    assert not copied.layer1.training
    assert copied.layer2.training


@pytest.mark.parametrize("until", ["layer5", "", "fc", "Stem", "layer"])
def test_unknown_points(until):
    net = ResNet(plan("resnet18", 64))
    with pytest.raises(SpecError, match=r"known: none, stem, layer1, layer2, layer3, layer4, trunk"):
        freeze(net, until)
    assert all(parameter.requires_grad for parameter in net.parameters())
