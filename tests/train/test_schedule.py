"""The learning rate against torch's own schedulers, and the size of the training crop."""

import pytest
import torch
from torch import nn

from isthmus.train.recipe import Recipe
from isthmus.train.schedule import learning_rate, rate, training_size

START = {"data": "x", "weights": "w", "freeze": "none"}


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


def stepped(make, steps: int, peak: float) -> list[float]:
    """The rates of a scheduler of torch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_linear_is_that_of_torch():
    wanted = stepped(lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 50), 50, 0.3)
    found = [learning_rate(step, peak=0.3, warmup=0, total=50, schedule="linear") for step in range(50)]
    assert found == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("steps_per_epoch", [1, 7, 5004])
def test_drops_come_with_the_epochs_of_goyal_et_al(steps_per_epoch):
    """30, 60 and 80 of 90 epochs, whole whatever the rounding of 1/3."""
    recipe = Recipe(**START, schedule="step", drops=(30 / 90, 60 / 90, 80 / 90), epochs=90, lr=0.1, warmup_epochs=0.0)
    make = torch.optim.lr_scheduler.MultiStepLR
    wanted = stepped(lambda optimizer: make(optimizer, [30, 60, 80], 0.1), 90, 0.1)
    for epoch, expected in enumerate(wanted):
        first = epoch * steps_per_epoch
        for step in (first, first + steps_per_epoch - 1):
            assert rate(recipe, step, steps_per_epoch) == pytest.approx(expected, rel=1e-12)


def test_warm_up_takes_half_of_the_run_at_most():
    recipe = Recipe(**START, epochs=2, lr=1.0, warmup_epochs=5.0)
    rates = [rate(recipe, step, 4) for step in range(8)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] > 0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "step"])
def test_warm_up_leads_to_the_peak_of_every_schedule(schedule):
    drops = (0.5,) if schedule == "step" else ()
    recipe = Recipe(**START, epochs=10, lr=0.4, warmup_epochs=1.5, schedule=schedule, drops=drops)
    rates = [rate(recipe, step, 10) for step in range(100)]
    assert rates[:15] == pytest.approx([0.4 * (step + 1) / 15 for step in range(15)])
    assert rates[15] == pytest.approx(0.4)
    assert max(rates) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({}, [224] * 5),
        ({"train_size": 176}, [176] * 5),
        ({"train_size": 224, "start_size": 128}, [128, 128, 160, 192, 224]),  # 128, 152, 176, 200 and 224, stepwise
        ({"train_size": 100, "start_size": 32}, [32, 32, 64, 64, 100]),
        ({"train_size": 64, "start_size": 64}, [64] * 5),
    ],
)
def test_training_crops_grow_in_steps(settings, sizes):
    made = Recipe(data="pictures", weights="w", epochs=5, **settings)
    assert [training_size(made, epoch, 224) for epoch in range(5)] == sizes
