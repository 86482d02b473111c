"""Who decays at which rate, against timm's groups; optimisers against torch's plain loops."""

import io

import pytest
import timm
import timm.optim
import torch
from timm.models import group_parameters
from torch import nn

import isthmus
from isthmus.arch.spec import HeadSpec
from isthmus.nn.freeze import freeze
from isthmus.train.optim import make_optimizer, parameter_groups
from isthmus.train.recipe import Recipe
from small_runs import SPEC, copied, network

START = {"data": "x", "weights": "w"}


def decaying(net: nn.Module) -> set[str]:
    """The weights of convolutions and linear layers, found by the kind of their module."""
    kinds = (nn.Conv2d, nn.Conv1d, nn.Linear)
    return {f"{name}.weight" for name, module in net.named_modules() if isinstance(module, kinds)}


@pytest.mark.parametrize("name", ["test_resnet", "seresnet50", "resnet50_gn", "resnetv2_50", "ecaresnet50t"])
def test_norms_and_biases_do_not_decay(name):
    with torch.device("meta"):
        net = isthmus.create(name, num_classes=3)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = parameter_groups(net, Recipe(**START, weight_decay=0.5, head_lr_factor=3.0))
    found = {names[id(each)] for group in groups if group["weight_decay"] == 0.5 for each in group["params"]}
    assert found == decaying(net)
    assert {group["weight_decay"] for group in groups} == {0.5, 0.0}
    held = [id(each) for group in groups for each in group["params"]]
    assert sorted(held) == sorted(names)  # each once


def test_head_has_a_rate_of_its_own():
    net = isthmus.create(isthmus.NetSpec(stages=SPEC.stages, stem=SPEC.stem, head=HeadSpec(hidden=5), num_classes=3))
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = parameter_groups(net, Recipe(**START, head_lr_factor=10.0))
    quick = {names[id(each)] for group in groups if group["lr_factor"] == 10.0 for each in group["params"]}
    assert quick == {name for name in names.values() if name.startswith("fc.")}
    assert len(quick) == 4


def timm_scales(name: str, layer_decay: float) -> dict[str, float]:
    """Factor of the rate of each parameter in timm, its stages as one layer each."""
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=3)
    layers = group_parameters(net, net.group_matcher(coarse=True), reverse=True)
    return {key: layer_decay ** (max(layers.values()) - layer) for key, layer in layers.items()}


@pytest.mark.parametrize("name", ["resnet18", "resnet26t", "seresnet50"])
def test_rates_fall_from_stage_to_stage_as_in_timm(name):
    with torch.device("meta"):
        net = isthmus.create(name, num_classes=3)
    names = {id(parameter): key for key, parameter in net.named_parameters()}
    groups = parameter_groups(net, Recipe(**START, layer_decay=0.6))
    found = {names[id(each)]: group["lr_factor"] for group in groups for each in group["params"]}
    assert found == pytest.approx(timm_scales(name, 0.6), rel=1e-12)
    assert len(set(found.values())) == 6  # stem, four stages, head


def test_the_final_norm_goes_with_the_last_stage():
    with torch.device("meta"):
        net = isthmus.create("resnetv2_50", num_classes=3)
    names = {id(parameter): key for key, parameter in net.named_parameters()}
    groups = parameter_groups(net, Recipe(**START, layer_decay=0.5, head_lr_factor=3.0))
    found = {names[id(each)]: group["lr_factor"] for group in groups for each in group["params"]}
    assert found["norm.weight"] == found["layer4.0.conv1.weight"] == 0.5
    assert found["fc.weight"] == 3.0
    assert found["conv1.weight"] == 0.5**5


OPTIMISERS = {
    "sgd": (
        {"optimizer": "sgd", "nesterov": False},
        lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, foreach=False, fused=False),
    ),
    "nesterov": (
        {"optimizer": "sgd"},
        lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True, foreach=False, fused=False),
    ),
    "no momentum": (
        {"optimizer": "sgd", "momentum": 0.0},
        lambda groups: torch.optim.SGD(groups, lr=0.05, foreach=False, fused=False),
    ),
    "adamw": (
        {"optimizer": "adamw", "momentum": 0.8},
        lambda groups: torch.optim.AdamW(groups, lr=0.05, betas=(0.8, 0.999), foreach=False, fused=False),
    ),
    "lamb": (
        {"optimizer": "lamb", "momentum": 0.8},
        lambda groups: timm.optim.Lamb(groups, lr=0.05, betas=(0.8, 0.999), max_grad_norm=None, foreach=False),
    ),
}


def trained(net, optimizer, steps=4, thaw=2) -> list[torch.Tensor]:
    """Parameters after some steps on the same pictures; `layer1` and what is before it thaws after `thaw` of them."""
    net = net.train().to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for step in range(steps):
        freeze(net, "layer1" if step < thaw else "none")
        optimizer.zero_grad()
        net(images.contiguous(memory_format=torch.channels_last)).square().mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in net.parameters()]


@pytest.mark.parametrize("name", OPTIMISERS)
def test_steps_are_those_of_the_plain_loop(name):
    """In fp64, channels_last, with parts that decay, that do not, and that thaw on the way."""
    settings, make = OPTIMISERS[name]
    recipe = Recipe(**START, lr=0.05, weight_decay=0.02, **settings)
    thaw = 0 if name == "lamb" else 2  # timm counts the steps of a group, not of its parameters: see test_lamb.py
    net, other = network().double(), network().double()
    wanted = trained(other, make(parameter_groups(other, recipe)), thaw=thaw)
    found = trained(net, make_optimizer(net, recipe), thaw=thaw)
    for start, one, two in zip(network().double().parameters(), found, wanted, strict=True):
        assert not torch.equal(start, two)
        assert torch.allclose(one, two, rtol=1e-9, atol=1e-9)  # Adam divides rounding errors by tiny gradients


def test_frozen_parameters_stay_as_they_are():
    net = network()
    freeze(net, "layer1")
    before = copied(net)
    optimizer = make_optimizer(net, Recipe(**START, weight_decay=0.5))
    net.train()(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))).sum().backward()
    optimizer.step()
    moved = {name.partition(".")[0] for name, value in copied(net).items() if not torch.equal(value, before[name])}
    assert moved == {"layer2", "fc"}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb"])
def test_the_state_of_an_optimiser_survives_saving(optimizer):
    """Also with parameters that have no state yet."""
    recipe = Recipe(**START, optimizer=optimizer, lr=0.01)
    net, other = network().double(), network().double()
    one, two = make_optimizer(net, recipe), make_optimizer(other, recipe)
    trained(net, one, steps=2)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": one.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["net"])
    two.load_state_dict(saved["optimizer"])
    for a, b in zip(trained(net, one), trained(other, two), strict=True):
        assert torch.equal(a, b)
