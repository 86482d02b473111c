"""The learning rate against torch's own schedulers, and who decays at which rate."""

import pytest
import torch
from torch import nn

import isthmus
from isthmus.arch.spec import HeadSpec
from isthmus.nn.freeze import freeze
from isthmus.train.optim import learning_rate, make_optimizer, parameter_groups
from isthmus.train.recipe import Recipe
from small_runs import SPEC

START = {"data": "x", "weights": "w"}


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (1, 10), (4, 9), (7, 100), (5, 6)])
def test_rate_is_that_of_torch(warmup, total):
    peak = 0.3
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    rates = []
    if warmup > 1:
        linear = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
        for _ in range(warmup):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            linear.step()
    else:
        rates += [peak] * warmup
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warmup)
    for _ in range(total - warmup):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    found = [learning_rate(step, peak=peak, warmup=warmup, total=total) for step in range(total)]
    assert found == pytest.approx(rates, rel=1e-12, abs=1e-15)
    assert max(found) == pytest.approx(peak)
    assert min(found) > 0


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


def test_frozen_parameters_are_left_out():
    net = isthmus.create(SPEC)
    freeze(net, "layer1")
    held = {id(each) for group in parameter_groups(net, Recipe(**START)) for each in group["params"]}
    assert held == {id(each) for name, each in net.named_parameters() if name.startswith(("layer2", "fc"))}


def test_optimisers():
    net = isthmus.create(SPEC)
    sgd = make_optimizer(net, Recipe(**START, momentum=0.8, lr=0.1))
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"], sgd.defaults["lr"]) == (0.8, True, 0.1)
    assert isinstance(make_optimizer(net, Recipe(**START, momentum=0.0)), torch.optim.SGD)
    assert isinstance(make_optimizer(net, Recipe(**START, optimizer="adamw")), torch.optim.AdamW)
