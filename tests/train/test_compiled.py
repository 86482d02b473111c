"""The offer of torch.compile: nothing moves while it is tried, failures are told, the slower one is dropped."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import isthmus.train.compiled
from isthmus.train.compiled import LEAST_GAIN, Trial, try_compiling
from isthmus.train.distributed import World
from small_runs import SPEC, copied, network, same

CPU = torch.device("cpu")
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Clock:
    """A clock that both networks move on by their own seconds, so that which one is faster is known."""

    def __init__(self, monkeypatch, *, eager: float, compiled: float) -> None:
        self.now, self.seconds = 0.0, {False: eager, True: compiled}
        monkeypatch.setattr(isthmus.train.compiled.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch, "compile", Wrapped)

    def loss(self, net):
        self.now += self.seconds[isinstance(net, Wrapped)]
        return net(IMAGES).square().sum()


class Wrapped(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


def fresh():
    return network(replace(SPEC, num_classes=2, drop_path=0.5)).train()


@pytest.mark.parametrize(("compiled", "wins"), [(0.5, True), (0.99, False), (1.0, False), (2.0, False)])
def test_the_faster_one_is_taken_and_nothing_has_moved(monkeypatch, compiled, wins):
    net, clock = fresh(), Clock(monkeypatch, eager=1.0, compiled=compiled)
    before, random = copied(net), torch.get_rng_state()
    model, trial = try_compiling(net, clock.loss, CPU, World())
    assert trial == Trial(seconds=compiled, gain=pytest.approx(1 / compiled))
    assert (trial.wins, isinstance(model, Wrapped)) == (wins, wins)
    assert (trial.gain >= LEAST_GAIN) is wins
    assert ("kept" in str(trial)) is wins
    assert same(before, copied(net))
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_compiler_that_fails_is_told_of(monkeypatch):
    def broken(_model):
        def call(_images):
            raise RuntimeError("no C++ compiler found\nand so on")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    net = fresh()
    before = copied(net)
    model, trial = try_compiling(net, lambda each: each(IMAGES).sum(), CPU, World())
    assert model is net
    assert str(trial) == "torch.compile failed and is dropped: no C++ compiler found"
    assert same(before, copied(net))


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # of the compiler
def test_the_real_compiler():
    net = network(replace(SPEC, num_classes=2)).train()
    before = copied(net)
    model, trial = try_compiling(net, lambda each: each(IMAGES).square().sum(), CPU, World())
    assert not trial.failure
    assert trial.seconds > 0
    assert trial.gain > 0
    assert (model is net) != trial.wins
    assert same(before, copied(net))
