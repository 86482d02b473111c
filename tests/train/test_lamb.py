"""LAMB against timm's, and where the two differ on purpose."""

import pytest
import timm.optim
import torch
from torch import nn

from isthmus.train.lamb import Lamb

SETTINGS = {"betas": (0.8, 0.95), "eps": 1e-5}


def parameters() -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    shapes = ((6, 4), (3, 2, 3, 3), (5,))
    made = [nn.Parameter(torch.randn(shape, generator=random, dtype=torch.float64)) for shape in shapes]
    return [*made, nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))]  # no norm yet: its ratio is 1


def run(optimizer, tensors, steps=6, thaw=0) -> None:
    """Gradients are a function of the step; the last two parameters have none before step `thaw`."""
    for step in range(steps):
        random = torch.Generator().manual_seed(step)
        for place, tensor in enumerate(tensors):
            gradient = torch.randn(tensor.shape, generator=random, dtype=torch.float64)
            tensor.grad = None if place >= 2 and step < thaw else gradient
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / (step + 1)
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
def test_steps_are_timms(weight_decay):
    ours, theirs = parameters(), parameters()
    run(Lamb(ours, lr=0.05, weight_decay=weight_decay, **SETTINGS), ours)
    run(timm.optim.Lamb(theirs, lr=0.05, weight_decay=weight_decay, max_grad_norm=None, **SETTINGS), theirs)
    for one, two, start in zip(ours, theirs, parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-15)
        assert not torch.equal(two, start)


def test_clipping_before_the_step_is_timms_clipping_in_it():
    ours, theirs = parameters(), parameters()
    optimizer = Lamb(ours, lr=0.05, weight_decay=0.02)
    step = optimizer.step

    def clipped(closure=None):
        nn.utils.clip_grad_norm_(ours, 1.0)
        return step(closure)

    optimizer.step = clipped
    run(optimizer, ours)
    run(timm.optim.Lamb(theirs, lr=0.05, weight_decay=0.02, max_grad_norm=1.0), theirs)
    for one, two in zip(ours, theirs, strict=True):
        assert torch.allclose(one, two, rtol=1e-6, atol=1e-9)  # torch adds 1e-6 to the norm


def test_a_parameter_that_thaws_begins_its_own_count_of_steps():
    """Timm counts the steps of the group, so its first step of a late parameter would be far too long."""
    together, alone = parameters(), parameters()
    run(Lamb(together, lr=0.05, weight_decay=0.02), together, steps=6, thaw=3)
    run(timm.optim.Lamb(alone[:2], lr=0.05, weight_decay=0.02, max_grad_norm=None), alone)
    assert all(torch.allclose(one, two, rtol=1e-12) for one, two in zip(together[:2], alone[:2], strict=True))
    late = list(parameters()[2:])
    optimizer = timm.optim.Lamb(late, lr=0.05, weight_decay=0.02, max_grad_norm=None)
    for step in range(3, 6):
        random = torch.Generator().manual_seed(step)
        gradients = [torch.randn(each.shape, generator=random, dtype=torch.float64) for each in parameters()]
        for tensor, gradient in zip(late, gradients[2:], strict=True):
            tensor.grad = gradient
        optimizer.param_groups[0]["lr"] = 0.05 / (step + 1)
        optimizer.step()
    assert all(torch.allclose(one, two, rtol=1e-12) for one, two in zip(together[2:], late, strict=True))
