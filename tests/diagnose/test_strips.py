"""How much of its strip a block uses: against a direct singular value decomposition, and by hand."""

import math
from dataclasses import replace

import pytest
import torch

from diagnosed import SIDE, crops, made, settled, shrunk
from isthmus.data.transform import normalise
from isthmus.diagnose.strips import (
    MOST,
    Strip,
    effective_rank,
    strip_findings,
    strip_unchecked,
    strip_uses,
    watched_strips,
)


def rank_by_svd(rows):
    """Roy & Vetterli 2007 as it is written: of the singular values of the centred activations themselves."""
    values = torch.linalg.svdvals(rows.double() - rows.double().mean(0))
    parts = values / values.sum()
    return math.exp(-sum(float(part) * math.log(part) for part in parts.tolist() if part > 0))


@pytest.fixture(scope="module")
def images(photos):
    return crops(photos, 24, seed=3)[0]


@pytest.mark.parametrize("width", [1, 2, 7, 64])
def test_rank_of_independent_channels_is_their_number(width):
    assert effective_rank(torch.eye(width, dtype=torch.float64)) == pytest.approx(width)


def test_rank_by_a_direct_decomposition():
    random = torch.Generator().manual_seed(0)
    mixed = torch.randn(500, 9, generator=random) @ torch.randn(9, 9, generator=random) + 5
    assert effective_rank(torch.cov(mixed.double().T)) == pytest.approx(rank_by_svd(mixed), rel=1e-9)
    low = torch.randn(500, 2, generator=random) @ torch.randn(2, 9, generator=random)
    assert effective_rank(torch.cov(low.double().T)) == pytest.approx(rank_by_svd(low), rel=1e-5)
    assert effective_rank(torch.cov(low.double().T)) <= 2 + 1e-5
    assert effective_rank(torch.zeros(4, 4)) == 0


@pytest.mark.parametrize(("name", "activation"), [("resnet50d", "act2"), ("resnetv2_50", "act3")])
def test_strips_are_those_behind_the_3x3(images, name, activation):
    """Batches add up to the activations of all pictures, kept here by hooks of the test's own."""
    net, kept = settled(made(shrunk(name)), images), {}
    x = normalise(images, net.preprocess)
    for block in net.plan.blocks:
        net.get_submodule(f"{block.name}.{activation}").register_forward_hook(
            lambda _module, _inputs, output, name=block.name: kept.setdefault(name, []).append(output)
        )
    with watched_strips(net) as strips, torch.no_grad():
        for batch in x.split(10):
            net(batch)
    uses = {use.name: use for use in strip_uses(strips)}
    assert list(uses) == [block.name for block in net.plan.blocks]
    for block in net.plan.blocks:
        rows = torch.cat(kept[block.name]).permute(0, 2, 3, 1).flatten(0, 2)
        found = uses[block.name]
        assert (found.width, found.samples) == (block.spec.mid, len(rows))
        assert found.rank == pytest.approx(rank_by_svd(rows), rel=1e-6)
        assert found.dead == int((rows.amax(0) <= 0).sum())
        assert found.enough == (len(rows) >= 10 * block.spec.mid)


def test_of_many_positions_some_count():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(8, 6, 64, 64, generator=random)
    x[3, 2, 5, 6] = 40.0  # the highest value is found wherever it is
    strip = Strip(name="layer1.0", width=6)
    strip.add(x - 35)
    assert len(x) * 64 * 64 / 3 == pytest.approx(strip.samples, rel=1e-3)
    assert strip.samples <= MOST
    assert strip.use.dead == 5


def test_dead_channels_are_told_and_many_of_them_warned_of(images):
    net = settled(made(shrunk("resnet26")), images)
    with torch.no_grad():
        net.layer2[0].bn2.bias[:10] = -50.0
        net.layer2[1].bn2.bias[:2] = -50.0
        with watched_strips(net) as strips:
            net(normalise(images, net.preprocess))
    (found,) = strip_findings(net, strip_uses(strips), len(images))
    assert (found.kind, found.severity) == ("dead_channels", "warning")
    assert found.where == "layer2.0, layer2.1"
    assert "10 of the 16 channels of layer2.0's strip never rise above 0 on 24 pictures" in found.found


def test_strips_that_vary_in_few_dimensions_are_noted(images):
    net = settled(made(shrunk("resnet26")), images)
    with torch.no_grad():
        net.layer2[0].conv2.weight[:] = net.layer2[0].conv2.weight[:1].clone()
        settled(net, images)
        net.layer2[0].bn2.weight.fill_(1.0)
        net.layer2[0].bn2.bias.zero_()
        with watched_strips(net) as strips:
            net(normalise(images, net.preprocess))
    (found,) = strip_findings(net, strip_uses(strips), len(images))
    assert (found.kind, found.severity, found.where) == ("unused_strip", "note", "layer2.0")
    assert "16 channels of layer2.0's strip vary in 1.0 dimensions" in found.found


def test_too_few_positions_are_said(images):
    net = settled(made(shrunk("resnet26")), images)
    with watched_strips(net) as strips, torch.no_grad():
        net(normalise(images[:4], net.preprocess))
    (found,) = strip_unchecked(net, strip_uses(strips))
    assert found.what == "ranks of strips"
    assert f"{4 * math.ceil(SIDE / 32) ** 2} positions for 64 channels" in found.reason


def test_basic_blocks_have_no_strip(images):
    net = settled(made(shrunk("resnet34")), images)
    with watched_strips(net) as strips, torch.no_grad():
        net(normalise(images, net.preprocess))
    assert strips == []
    assert strip_unchecked(net, ()) == []


def test_strips_that_no_head_reads(images):
    spec = shrunk("resnet26")
    net = settled(made(replace(spec, head=replace(spec.head, taps=("layer2",)))), images)
    with watched_strips(net) as strips, torch.no_grad():
        net(normalise(images, net.preprocess))
    uses = strip_uses(strips)
    assert [use.name for use in uses] == ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]
    (found,) = strip_unchecked(net, uses)
    assert found.reason == "layer3.0, layer3.1, layer4.0, layer4.1: the head reads no map behind them"
