"""Gradients and updates of blocks: against autograd and torch's optimiser, by hand."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

import isthmus
from diagnosed import crops, made, settled, shrunk
from isthmus.data.transform import normalise
from isthmus.diagnose.findings import BlockSignals, Spread
from isthmus.diagnose.signals import block_gradients, gradient_findings, signals, take_steps


@pytest.fixture(scope="module")
def data(photos):
    images, labels = crops(photos, 24, seed=4)
    net = settled(made(shrunk("resnet26")), images).double()
    return net, normalise(images, net.preprocess).double(), labels


@pytest.mark.parametrize("training", [False, True])
def test_gradients_by_hand(data, training):
    net, x, labels = data
    net = copy.deepcopy(net).train(training)
    blocks = [block.name for block in net.plan.blocks]
    loss, rows = block_gradients(net, x, labels, blocks, F.cross_entropy)
    assert [row.name for row in rows] == blocks
    twin = copy.deepcopy(net)
    maps = {}
    for name in blocks:  # each block's input, written down by the block itself
        block = twin.get_submodule(name)
        block.forward = lambda y, forward=block.forward, name=name: forward(maps.setdefault(name, y))
    wanted = F.cross_entropy(twin(x), labels, reduction="sum")
    assert loss == pytest.approx(float(wanted.detach()) / len(x))
    for row in rows:
        parameters = list(twin.get_submodule(row.name).parameters())
        grads = torch.autograd.grad(wanted, [*parameters, maps[row.name]], retain_graph=True)
        flat = torch.cat([grad.flatten() for grad in grads[:-1]]) / len(x)
        assert row.parameters == pytest.approx(float(flat.norm()), rel=1e-9)
        # Of the sum, a picture's own part of the gradient is that of the picture's own loss.
        each = grads[-1].flatten(1).norm(dim=1)
        assert row.inputs == pytest.approx(float(each.square().mean().sqrt()), rel=1e-9)


def test_updates_by_torchs_own_optimiser(data):
    net, x, labels = data

    def sgd(net):
        return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)

    blocks = ["layer1.0", "layer3.1"]
    trained, twin = copy.deepcopy(net).train(), copy.deepcopy(net).train()
    steps = take_steps(trained, zip(x.split(8), labels.split(8), strict=True), blocks, F.cross_entropy, sgd)
    assert len(steps) == 3
    optimizer = sgd(twin)
    for step, batch, wanted in zip(steps, x.split(8), labels.split(8), strict=True):
        before = {name: torch.nn.utils.parameters_to_vector(twin.get_submodule(name).parameters()) for name in blocks}
        before = {name: vector.detach().clone() for name, vector in before.items()}
        optimizer.zero_grad()
        loss = F.cross_entropy(twin(batch), wanted)
        loss.backward()
        optimizer.step()
        assert step.loss == pytest.approx(float(loss.detach()))
        for name in blocks:
            after = torch.nn.utils.parameters_to_vector(twin.get_submodule(name).parameters()).detach()
            assert step.updates[name] == pytest.approx(float((after - before[name]).norm() / before[name].norm()))
    rows = signals(net, blocks, dict.fromkeys(blocks, 1.0), steps)
    values = torch.tensor([step.updates["layer3.1"] for step in steps], dtype=torch.float64)
    assert rows[1].update == Spread(
        mean=pytest.approx(float(values.mean())), deviation=pytest.approx(float(values.std(correction=0)))
    )
    assert rows[1].weight == pytest.approx(
        float(torch.nn.utils.parameters_to_vector(net.get_submodule("layer3.1").parameters()).detach().norm())
    )


def test_what_is_frozen_has_none(data):
    net, x, labels = data
    net = copy.deepcopy(net)
    for name in ("conv1", "bn1", "layer1", "layer2"):
        net.get_submodule(name).requires_grad_(requires_grad=False)
    blocks = [block.name for block in net.plan.blocks]
    steps = take_steps(
        net, [(x, labels)], blocks, F.cross_entropy, lambda net: torch.optim.SGD(net.parameters(), lr=0.1)
    )
    rows = {row.name: row for row in signals(net, blocks, dict.fromkeys(blocks, 1.0), steps)}
    for name in blocks:
        frozen = name < "layer3"
        assert (rows[name].gradient is None) == (rows[name].update is None) == frozen
        assert (rows[name].input_gradient is None) == (name <= "layer3.0")
    assert gradient_findings(list(rows.values()), 1) == []


def test_a_loss_that_is_no_number_ends_the_steps(data):
    net, x, labels = data
    net = copy.deepcopy(net).train()
    steps = take_steps(
        net,
        zip(x.split(6), labels.split(6), strict=True),
        ["layer1.0"],
        lambda logits, labels: F.cross_entropy(logits, labels) * math.nan,
        lambda net: torch.optim.SGD(net.parameters(), lr=0.1),
    )
    assert len(steps) == 1


def rows(gradients, inputs=None, updates=None):
    """Blocks with these figures."""

    def spread(value):
        return None if value is None else Spread(mean=value, deviation=0.0)

    inputs, updates = inputs or [1.0] * len(gradients), updates or [1e-3] * len(gradients)
    return [
        BlockSignals(
            name=f"layer1.{place}",
            weight=1.0,
            scale=1.0,
            gradient=spread(gradient),
            input_gradient=spread(into),
            update=spread(update),
        )
        for place, (gradient, into, update) in enumerate(zip(gradients, inputs, updates, strict=True))
    ]


@pytest.mark.parametrize(
    ("figures", "kinds"),
    [
        (rows([1.0, 1.0, 1.0]), []),
        (rows([1.0, 1.0, 1.0], inputs=[5e-5, 1e-2, 1.0]), ["vanishing_gradient"]),
        (rows([1.0, 1.0, 1.0], inputs=[2e4, 1e2, 1.0]), ["exploding_gradient"]),
        (rows([1.0, 1.0, 1.0], inputs=[3.2e3, 1e2, 1.0]), []),
        (rows([1.0, 0.0, 1.0]), ["no_gradient"]),
        (rows([1.0, math.nan, 1.0]), ["no_gradient"]),
        (rows([1.0, 1.0, 1.0], updates=[1e-3, 0.4, 2.0]), ["large_updates"]),
        (rows([1.0, 1.0, 1.0], updates=[1e-9, 1e-3, 1e-3]), []),
        (rows([1.0, 1.0, 1.0], updates=[1e-9, 1e-10, 1e-12]), ["small_updates"]),
        (rows([0.0, 0.0, 0.0], inputs=[0.0, 0.0, 0.0], updates=[0.0, 0.0, 0.0]), ["small_updates"]),
    ],
)
def test_figures_far_off_are_found(figures, kinds):
    found = gradient_findings(figures, 3)
    assert [finding.kind for finding in found] == kinds
    assert all(finding.severity == "warning" for finding in found)


def test_findings_say_what_was_measured():
    (found,) = gradient_findings(rows([1.0, 1.0], updates=[0.02, 0.5]), 3)
    assert found.where == "layer1.1"
    assert "changes the weights of layer1.1 by 50% of their length (|dw| / |w|, mean over 3 steps)" in found.found
    assert found.mend.startswith("Divide lr by 10,")


def test_gradients_that_are_no_numbers_are_a_finding(data):
    net, x, labels = data
    blocks = [block.name for block in net.plan.blocks]
    steps = take_steps(
        copy.deepcopy(net).train(),
        zip(x.split(8), labels.split(8), strict=True),
        blocks,
        F.cross_entropy,
        lambda net: torch.optim.SGD(net.parameters(), lr=1e300),
    )
    assert len(steps) > 1
    assert math.isnan(steps[-1].loss)
    (finding,) = gradient_findings(signals(net, blocks, dict.fromkeys(blocks, 1.0), steps), len(steps))
    assert finding.kind == "no_gradient"
    assert finding.found == f"The gradient in the weights of layer1.0 is nan over {len(steps)} steps, as in all blocks."
    assert finding.mend.startswith("Lower the rate")


@pytest.mark.parametrize(
    ("name", "kinds"), [("resnetv2_164_cifar", []), ("resnet164_cifar", []), ("plain110_cifar", ["exploding_gradient"])]
)
def test_deep_networks_before_training(photos, name, kinds):
    """He et al. 2016 train the first two as they are; without shortcuts batch norm lets gradients grow."""
    images, labels = crops(photos, 12, seed=5, side=16)
    torch.manual_seed(0)
    net = isthmus.create(name, num_classes=4)
    blocks = [block.name for block in net.plan.blocks]
    steps = take_steps(
        net,
        [(normalise(images, net.preprocess), labels)],
        blocks,
        F.cross_entropy,
        lambda net: torch.optim.SGD(net.parameters(), lr=1e-4),
    )
    found = gradient_findings(signals(net, blocks, dict.fromkeys(blocks, 1.0), steps), 1)
    assert [each.kind for each in found if "gradient" in each.kind] == kinds
