"""Grad-CAM against captum called by itself and against gradients taken by hand; the network stays as it was."""

from dataclasses import replace

import pytest
import torch
from captum.attr import LayerGradCam
from torch.nn import functional as F

from isthmus.arch.spec import HeadSpec, StageSpec
from isthmus.nn.freeze import freeze
from isthmus.nn.network import ResNet
from isthmus.report.heat import deepest_map, heat_maps
from small_runs import SPEC, copied, network, same

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([0, 5, 2])
PREACT = tuple(StageSpec(depth=1, mid=8, out=width, stride=2, block="preact_bottleneck") for width in (16, 32))
SPECS = {
    "last map": (SPEC, "layer2", "last"),
    "two stages": (replace(SPEC, head=HeadSpec(taps=("layer2", "layer1"), pools=("avg", "max"))), "layer2", "layer2"),
    "stage and last": (replace(SPEC, head=HeadSpec(taps=("layer1", "last"), hidden=12)), "layer2", "last"),
    "stem": (replace(SPEC, stages=SPEC.stages[:1], head=HeadSpec(taps=("stem",))), "act1", "stem"),
    "pre-activation": (replace(SPEC, stages=PREACT), "act", "last"),
    "with norm": (replace(SPEC, head=HeadSpec(taps=("layer1",), pools=("avg", "max"), norm=True)), "layer1", "layer1"),
}


def by_hand(net: ResNet, tap: str) -> torch.Tensor:
    """Weights are mean gradients of the class's logit over the map, as in the paper's equations 1 and 2."""
    maps = net.features(IMAGES, tuple(dict.fromkeys((*net.spec.head.taps, tap))))
    logits = net.fc(torch.cat([net.pool(maps[each]) for each in net.spec.head.taps], dim=1))
    (gradient,) = torch.autograd.grad(logits.gather(1, TARGETS[:, None]).sum(), maps[tap])
    weights = gradient.mean((2, 3), keepdim=True)
    heat = F.interpolate((weights * maps[tap]).sum(1, keepdim=True).relu(), (32, 32), mode="bilinear")[:, 0]
    peak = heat.amax((1, 2), keepdim=True)
    return (heat / torch.where(peak > 0, peak, 1)).detach()


@pytest.mark.parametrize("name", SPECS)
def test_equals_captum_and_gradients_by_hand(name):
    spec, module, tap = SPECS[name]
    net = network(spec)
    assert deepest_map(net) == module
    found = heat_maps(net, IMAGES, TARGETS)
    assert found.shape == (3, 32, 32)
    assert torch.allclose(found, by_hand(net, tap), atol=1e-5)
    assert found.amax() == 1
    if name == "last map":
        raw = LayerGradCam(net, net.layer2).attribute(IMAGES.clone().requires_grad_(), target=TARGETS).relu()
        raw = F.interpolate(raw, (32, 32), mode="bilinear")[:, 0].detach()
        assert torch.allclose(found, raw / raw.amax((1, 2), keepdim=True).clamp(min=1e-12), atol=1e-5)


def test_the_network_is_as_before():
    net = network().train()
    net.layer1.eval()
    net.conv1.weight.grad = torch.ones_like(net.conv1.weight)
    before, modes = copied(net), [module.training for module in net.modules()]
    hooks = [len(module._forward_hooks) + len(module._backward_hooks) for module in net.modules()]
    images = IMAGES.clone()
    heat_maps(net, images, TARGETS)
    assert same(before, copied(net))
    assert [module.training for module in net.modules()] == modes
    assert [len(module._forward_hooks) + len(module._backward_hooks) for module in net.modules()] == hooks
    assert torch.equal(net.conv1.weight.grad, torch.ones_like(net.conv1.weight))
    assert net.layer2[0].conv1.weight.grad is None
    assert torch.equal(images, IMAGES)
    assert not images.requires_grad


def test_a_frozen_network_has_heat_maps_too():
    net = network()
    wanted = heat_maps(net, IMAGES, TARGETS)
    freeze(net, "trunk")
    assert torch.allclose(heat_maps(net, IMAGES, TARGETS), wanted, atol=1e-6)


def test_nothing_that_speaks_for_a_class_is_no_heat():
    net = network()
    with torch.no_grad():
        net.fc.weight.fill_(-1.0)
    assert not heat_maps(net, IMAGES, TARGETS).any()
