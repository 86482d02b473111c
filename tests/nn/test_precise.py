"""Precise batch norm: fvcore and torch's own single batch agree, and nothing else of the network moves."""

import copy

import pytest
import torch
from fvcore.nn.precise_bn import update_bn_stats
from torch import nn

from diagnosed import SIDE, crops, made, shrunk
from isthmus.data.transform import normalise
from isthmus.errors import DataError
from isthmus.nn.batchnorm import FrozenBatchNorm2d, freeze_batchnorm, precise_batchnorm
from isthmus.nn.freeze import freeze
from small_runs import copied, same


@pytest.fixture(scope="module")
def batches(photos):
    images, _ = crops(photos, 44, seed=1)
    return list(normalise(images, made(shrunk("resnet26")).preprocess).split([16, 20, 8]))


def norms(net):
    return {name: module for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)}


@pytest.mark.parametrize("name", ["resnet50d", "seresnet50", "resnetv2_50", "resnetblur50d", "resnet34"])
def test_fvcore_agrees(batches, name):
    """Its variances are those of the population; ours are Bessel-corrected, as torch's running ones are."""
    net = made(shrunk(name))
    oracle = copy.deepcopy(net).train()
    update_bn_stats(oracle, batches, len(batches))
    sizes = {}
    handles = [
        norm.register_forward_hook(
            lambda _norm, inputs, _out, name=name: sizes.update(
                {name: sizes.get(name, 0) + inputs[0].numel() // inputs[0].shape[1]}
            )
        )
        for name, norm in norms(net).items()
    ]
    assert precise_batchnorm(net, batches) == len(norms(net))
    for handle in handles:
        handle.remove()
    for key, wanted in norms(oracle).items():
        found = norms(net)[key]
        torch.testing.assert_close(found.running_mean, wanted.running_mean, rtol=1e-4, atol=1e-5)
        bessel = sizes[key] / (sizes[key] - 1)
        torch.testing.assert_close(found.running_var, wanted.running_var * bessel, rtol=1e-4, atol=1e-6)


def test_one_batch_is_what_torch_keeps_of_it(batches):
    net = made(shrunk("resnet26"))
    oracle = copy.deepcopy(net).train()
    for norm in norms(oracle).values():
        norm.momentum = 1.0
    with torch.no_grad():
        oracle(batches[0])
    precise_batchnorm(net, batches[:1])
    for key, wanted in norms(oracle).items():
        torch.testing.assert_close(norms(net)[key].running_mean, wanted.running_mean)
        torch.testing.assert_close(norms(net)[key].running_var, wanted.running_var)


def test_unequal_batches_are_one_population():
    """For a first norm the batches do not matter; in fp64 to the last digits, where means cancel too."""
    values = torch.randn(30, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e4
    net = nn.Sequential(nn.BatchNorm2d(3)).double()
    assert precise_batchnorm(net, values.split([1, 17, 12])) == 1
    torch.testing.assert_close(net[0].running_mean, values.mean((0, 2, 3)), rtol=1e-12, atol=0)
    torch.testing.assert_close(net[0].running_var, values.transpose(0, 1).flatten(1).var(1), rtol=1e-9, atol=0)


def test_statistics_alone_move(batches):
    net = made(shrunk("resnet50", drop_path=0.5))
    net.layer1.train()  # a mode that nobody would choose, so that it is seen to stay
    net.bn1.momentum = None
    modes = {name: module.training for name, module in net.named_modules()}
    before, state = copied(net), torch.get_rng_state()
    precise_batchnorm(net, batches)
    moved = {key for key, value in copied(net).items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if key.rpartition(".")[2] in ("running_mean", "running_var")}
    assert modes == {name: module.training for name, module in net.named_modules()}
    assert net.bn1.momentum is None
    assert {norm.momentum for norm in norms(net).values()} == {None, 0.1}
    assert torch.equal(state, torch.get_rng_state())  # drop path was off
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_statistics_that_were_no_numbers_are_mended(batches):
    net, other = made(shrunk("resnet26")), made(shrunk("resnet26"))
    net.bn1.running_mean.fill_(float("nan"))
    net.bn1.running_var.fill_(float("inf"))
    precise_batchnorm(net, batches)
    precise_batchnorm(other, batches)
    assert same(copied(net), copied(other))


def test_frozen_norms_stay(batches):
    net = made(shrunk("resnet26"))
    freeze_batchnorm(net.layer2)
    freeze(net, "layer1")
    before = copied(net)
    count = precise_batchnorm(net, batches)
    after = copied(net)
    moved = {key.partition(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"layer3", "layer4"}
    assert count == sum(name.startswith(("layer3", "layer4")) for name in norms(net))
    assert isinstance(net.layer2[0].bn1, FrozenBatchNorm2d)


def test_a_network_without_norms_has_nothing_to_measure(batches):
    assert precise_batchnorm(made(shrunk("resnet26", norm="none")), batches) == 0


def test_mistakes_leave_everything_as_it_was(batches):
    net = made(shrunk("resnet26"))
    before = copied(net)
    with pytest.raises(DataError, match="no batch was given"):
        precise_batchnorm(net, [])
    with pytest.raises(DataError, match="a single value in a channel"):
        precise_batchnorm(net, [batches[0], torch.zeros(1, 3, SIDE // 2, SIDE // 2)])
    assert same(copied(net), before)
    assert not net.training
