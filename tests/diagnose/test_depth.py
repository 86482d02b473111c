"""Twins with and without shortcuts and norms: alike in all else, and measured as by hand."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from isthmus.arch.cost import cost
from isthmus.arch.preprocess import IMAGENET
from isthmus.arch.spec import NetSpec, StageSpec, StemSpec
from isthmus.arch.variants import variant
from isthmus.data.loader import Loader
from isthmus.data.sources import open_pictures
from isthmus.diagnose.depth import (
    Measured,
    backward_norms,
    batches,
    gradient_correlation,
    measure_twins,
    settled,
    training_losses,
    twin_network,
    twins,
)
from isthmus.errors import DataError, RecipeError, SpecError
from isthmus.runtime import machine
from small_runs import SPEC, class_folders, copied, network, same

HERE = machine("cpu")


def deep(blocks: int, width: int = 8, **options) -> NetSpec:
    """A narrow network of basic blocks for small pictures: 2 × 3 × `blocks` + 2 layers, as those of He et al. 2015."""
    stages = tuple(
        StageSpec(depth=blocks, mid=width * times, out=width * times, block="basic", stride=stride)
        for times, stride in ((1, 1), (2, 2), (4, 2))
    )
    stem = StemSpec(widths=(width,), kernel=3, stride=1, pool="none")
    return NetSpec(stages=stages, stem=stem, shortcut="pad", num_classes=4, **options)


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    """Sixteen pieces of each of four photographs, 16 px a side."""
    counts = dict.fromkeys(("brick", "flower", "grass", "temple"), 16)
    folder = class_folders(tmp_path_factory.mktemp("depth"), counts)
    return Loader(pictures=open_pictures(str(folder)), record=IMAGENET.at(16), batch_size=16, train=True)


@pytest.fixture(scope="module")
def images(loader):
    return next(batches(loader, 1, torch.device("cpu")))[0]


def sides(spec: NetSpec) -> list[tuple[bool, str]]:
    return [(twin.shortcuts, twin.norm) for twin in twins(spec)]


@pytest.mark.parametrize("name", ["resnet56_cifar", "resnet50", "seresnet50t", "resnetblur18"])
def test_twins_differ_in_shortcuts_and_norm_alone(name):
    spec = variant(name)
    assert sides(spec) == [(True, "batch"), (False, "batch"), (True, "none"), (False, "none")]
    for twin in twins(spec):
        assert twin.shortcuts == (twin.spec.shortcut != "none")
        assert replace(twin.spec, shortcut=spec.shortcut, norm=spec.norm, name=name) == spec
    assert str(twins(spec)[0]) == "shortcuts, batch norm"
    assert str(twins(spec)[3]) == "plain, no norm"


def test_twins_are_those_of_the_table():
    found = twins(variant("resnet56_cifar"))
    assert found[1].spec == replace(variant("plain56_cifar"), name="")
    assert twins(variant("plain56_cifar")) == found  # whichever side one comes from
    assert twins(replace(variant("plain56_cifar"), num_classes=3))[0].spec.shortcut == "pad"
    assert twins(replace(variant("resnet56_cifar"), norm="none")) == found  # folded
    assert twins(replace(variant("resnet56_cifar"), drop_path=0.2)) == found
    assert twins(replace(SPEC, shortcut="none"))[0].spec.shortcut == "conv1"  # none of the table's


def test_a_group_norm_stays_one_and_a_preactivation_network_keeps_its_norms():
    assert sides(variant("resnet50_gn")) == [(True, "group"), (False, "group"), (True, "none"), (False, "none")]
    assert sides(variant("resnetv2_50")) == [(True, "batch"), (False, "batch")]
    assert sides(replace(variant("resnetv2_50"), norm="leading")) == [(True, "batch"), (False, "batch")]


def test_a_head_loses_its_norm_too():
    found = twins(replace(SPEC, head=replace(SPEC.head, norm=True)))
    assert [twin.spec.head.norm for twin in found] == [True, True, False, False]
    for index in range(4):
        net = twin_network(found, index, 32, 0)
        assert any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules()) == (index < 2)


@pytest.mark.parametrize("spec", [deep(2), SPEC, variant("test_resnet"), variant("resnetv2_164_cifar")])
def test_what_twins_have_in_common_has_the_same_weights(spec):
    found = twins(spec)
    nets = [twin_network(found, index, 32, 3) for index in range(len(found))]
    whole = nets[0].state_dict()
    for twin, net in zip(found, nets, strict=True):
        state = net.state_dict()
        assert sum(parameter.numel() for parameter in net.parameters()) == cost(twin.spec, 32).params
        assert all(torch.equal(value, whole[name]) for name, value in state.items() if name in whole)
        only = {name for name in state if name not in whole}
        assert only == (
            set() if twin.norm != "none" else {name for name in state if name.endswith("bias")} - set(whole)
        )
        assert not any(state[name].any() for name in only)
        # Nothing is switched off: every scale is 1, and every convolution is He et al.'s.
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert (module.weight == 1).all()
    assert all("downsample" not in name for name in nets[1].state_dict())
    again = twin_network(found, 1, 32, 3)
    assert same(copied(again), copied(nets[1]))
    assert not same(copied(twin_network(found, 1, 32, 4)), copied(nets[1]))


def test_correlation_is_numpys_of_gradients_by_hand():
    net, random = network(), torch.Generator().manual_seed(1)
    starts, ends = (torch.randn(3, 3, 32, 32, generator=random) for _ in range(2))
    found = gradient_correlation(net.float(), starts, ends, (0.1, 1.0))

    def gradient(picture: torch.Tensor) -> np.ndarray:
        point = picture[None].clone().requires_grad_()
        net(point)[0, 0].backward()
        return point.grad.flatten().double().numpy()

    for distance, value in found.items():
        by_hand = [
            np.corrcoef(gradient(one), gradient(one + distance * (other - one)))[0, 1]
            for one, other in zip(starts, ends, strict=True)
        ]
        assert value == pytest.approx(np.mean(by_hand), abs=1e-5)
    assert found[0.1] > found[1.0]


def test_a_linear_network_has_one_gradient(images):
    net = twin_network(twins(deep(3)), 0, 16, 0)
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.ReLU):
            net.set_submodule(name, nn.Identity())
    found = gradient_correlation(settled(net, images), images, images.roll(-1, 0), (1 / 64, 1.0, 100.0))
    assert list(found.values()) == pytest.approx([1.0] * 3, abs=1e-6)


def test_at_no_distance_gradients_are_the_same_and_dead_ones_do_not_count(images):
    net = twin_network(twins(deep(1)), 0, 16, 0).eval()
    assert gradient_correlation(net, images, images.roll(-1, 0), (0.0,))[0.0] == pytest.approx(1, abs=1e-6)
    nn.init.zeros_(net.fc.weight)
    assert math.isnan(gradient_correlation(net, images, images.roll(-1, 0), (0.5,))[0.5])


def test_settled_statistics_are_those_of_the_pictures(images):
    net = twin_network(twins(deep(2)), 0, 16, 0)
    before, mode = copied(net), net.training
    still = settled(net, images)
    assert same(copied(net), before)
    assert net.training == mode
    assert not still.training
    maps = net.conv1(images)
    torch.testing.assert_close(still.bn1.running_mean, maps.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(still.bn1.running_var, maps.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    # A picture does not depend on its batch, and the whole is what training sees.
    torch.testing.assert_close(still(images[:1]), still(images)[:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(still(images), net.train()(images), rtol=0.1, atol=0.01)


def test_gradient_norms_are_those_of_autograd(images):
    net = twin_network(twins(deep(2)), 0, 16, 0)
    labels = torch.arange(16) % 4
    before = copied(net)
    found = backward_norms(net, images, labels)
    assert same(copied(net), before)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert list(found) == [block.name for block in net.plan.blocks]
    x, wanted = net.train().stem(images), {}
    for name in found:
        x.retain_grad()
        wanted[name] = x
        x = net.get_submodule(name)(x)
    F.cross_entropy(net.fc(net.pool(x)), labels, reduction="sum").backward()  # each picture's own loss
    sizes = {name: each.grad.flatten(1).norm(dim=1).square().mean().sqrt().item() for name, each in wanted.items()}
    assert found == pytest.approx(sizes, rel=1e-4)


def test_losses_are_those_of_steps_by_hand(loader):
    net = twin_network(twins(deep(1)), 0, 16, 0)
    other = twin_network(twins(deep(1)), 0, 16, 0).train()
    heard: list[tuple[int, float]] = []
    given = list(batches(loader, 6, torch.device("cpu")))
    found = training_losses(net, given, 0.1, lambda step, loss: heard.append((step, loss)))
    wanted, speed = [], [torch.zeros_like(parameter) for parameter in other.parameters()]
    for images, labels in given:
        loss = F.cross_entropy(other(images), labels)
        wanted.append(loss.item())
        gradients = torch.autograd.grad(loss, list(other.parameters()))
        with torch.no_grad():
            for parameter, gradient, velocity in zip(other.parameters(), gradients, speed, strict=True):
                velocity.mul_(0.9).add_(gradient + 1e-4 * parameter)
                parameter.sub_(0.1 * velocity)
    assert found == pytest.approx(wanted, rel=1e-4)
    assert heard == list(enumerate(found, 1))


def test_batches_go_on_over_epochs(loader):
    given = list(batches(loader, 5, torch.device("cpu")))
    assert loader.steps == 4
    assert [len(labels) for _, labels in given] == [16] * 5
    first = [batch.labels for epoch in (0, 1) for batch in loader.epoch(epoch)]
    assert all(torch.equal(labels, wanted) for (_, labels), wanted in zip(given, first, strict=False))
    assert given[0][0].is_contiguous(memory_format=torch.channels_last)


def test_nothing_of_the_callers_moves(loader):
    torch.manual_seed(5)
    state, grad = torch.get_rng_state(), torch.is_grad_enabled()
    heard = []
    found = list(measure_twins(deep(1), loader, HERE, steps=2, tell=lambda *told: heard.append(told)))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() == grad
    assert [told[:3] for told in heard] == [(str(each.twin), 16 * step, 32) for each in found for step in (1, 2)]
    again = list(measure_twins(deep(1), loader, HERE, steps=2))
    assert [each.to_dict() for each in again] == [each.to_dict() for each in found]


def test_a_twin_that_diverges_says_so(loader):
    heard = []
    found = list(measure_twins(deep(1), loader, HERE, steps=12, lr=1e12, tell=lambda *told: heard.append(told)))
    lost = [each for each in found if each.diverged]
    assert lost
    for each in lost:
        assert each.loss is None
        assert 1 < len(each.losses) < 12
        assert not math.isfinite(each.losses[-1])
        assert all(map(math.isfinite, each.losses[:-1]))
        assert each.to_dict()["losses"][-1] is None
        assert [told[1] for told in heard if told[0] == str(each.twin)][-1] == 12 * 16  # the bar ends
    json.dumps([each.to_dict() for each in found], allow_nan=False)


def test_loss_is_the_mean_of_the_last_ten():
    twin = twins(deep(1))[0]
    made = {"twin": twin, "params": 1, "gradients": {"a": 4.0, "b": 2.0}, "correlations": {}}
    some = Measured(**made, losses=tuple(map(float, range(30))), steps=30)
    assert some.loss == pytest.approx(24.5)
    assert (some.first, some.last) == (4.0, 2.0)
    none = Measured(**made, losses=(), steps=0)
    assert none.loss is None
    assert not none.diverged


def test_impossible_settings(loader):
    for spec in (replace(deep(1), in_channels=1), replace(deep(1), dims=1)):
        with pytest.raises(SpecError, match="channels in"):
            next(measure_twins(spec, loader, HERE))
    for steps, lr in ((-1, 0.1), (1, 0.0), (1, math.nan), (1, math.inf)):
        with pytest.raises(RecipeError, match="steps must be 0 or more"):
            next(measure_twins(deep(1), loader, HERE, steps=steps, lr=lr))
    with pytest.raises(DataError, match="batch size of 2"):
        next(measure_twins(deep(1), replace(loader, batch_size=1), HERE))


@pytest.fixture(scope="module")
def deep_ones(loader):
    """The four twins of 56 layers before training."""
    return list(measure_twins(deep(9), loader, HERE, steps=0))


def test_shortcuts_keep_the_gradients_of_nearby_inputs_alike(deep_ones):
    """Balduzzi et al. 2017: with batch norm those of a plain network are noise, those of its residual twin are not."""
    shortcuts, plain, *_ = deep_ones
    assert shortcuts.correlations[1 / 64] > 0.4
    assert abs(plain.correlations[1 / 64]) < 0.15
    # And the further apart, the less alike.
    assert list(shortcuts.correlations.values()) == sorted(shortcuts.correlations.values(), reverse=True)


def test_shallow_plain_networks_are_not_shattered_yet(loader, deep_ones):
    shallow = list(measure_twins(deep(1), loader, HERE, steps=0))
    for index in (0, 1):
        assert shallow[index].correlations[1 / 64] > deep_ones[index].correlations[1 / 64] + 0.1


def test_gradients_vanish_or_explode_without_shortcuts_or_norms(deep_ones):
    """From the last block back to the first. With batch norm alone they grow with depth (Yang et al. 2019)."""
    shortcuts, plain, no_norm, neither = (each.first / each.last for each in deep_ones)
    assert 1 < shortcuts < 300
    assert plain > 20 * shortcuts
    assert no_norm > 3 * shortcuts
    assert neither < 0.05
