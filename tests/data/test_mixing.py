"""Mixup and cutmix: timm's pixels and targets, one draw a step, and the same however the step is divided."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from timm.data.mixup import Mixup, cutmix_bbox_and_lam
from torch.nn import functional as F

from isthmus.data.augment import Augment
from isthmus.data.mixing import box, mix
from isthmus.data.order import step_generator

CLASSES = 5


def batch(count=8, side=12, dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, side, side + 3, generator=random, dtype=dtype)
    return images.contiguous(memory_format=torch.channels_last), torch.arange(count) % CLASSES


def mixed(augment, images, labels, step=0, **settings):
    return mix(
        images.clone(), labels, augment, **({"classes": CLASSES, "seed": 0, "epoch": 0, "step": step} | settings)
    )


class Drawn:
    """Stands for numpy's random module: gives timm the share and the box that the step itself draws."""

    def __init__(self, augment, step, size):
        generator = step_generator(0, 0, step)
        if augment.mixup and augment.cutmix:
            self.cuts = generator.random() < 0.5
        else:
            self.cuts = bool(augment.cutmix)
        alpha = augment.cutmix if self.cuts else augment.mixup
        self.share = generator.beta(alpha, alpha)
        self.centres = [generator.integers(length) for length in size]

    def rand(self):
        return 0.0 if self.cuts else 0.99

    def beta(self, a, b):
        return self.share

    def randint(self, low, high, size=None):
        return self.centres.pop(0)


@pytest.mark.parametrize("step", range(12))
@pytest.mark.parametrize(
    "augment",
    [Augment(mixup=0.3), Augment(cutmix=1.0), Augment(mixup=0.2, cutmix=1.0)],
    ids=["mixup", "cutmix", "both"],
)
def test_every_pair_is_mixed_as_timm_mixes_a_batch_of_two(augment, step, monkeypatch):
    images, labels = batch()
    found, targets = mixed(augment, images, labels, step)
    for first in range(0, len(images), 2):
        drawn = Drawn(augment, step, images.shape[-2:])
        monkeypatch.setattr(np, "random", drawn)
        timm = Mixup(augment.mixup, augment.cutmix, switch_prob=0.5, label_smoothing=0.0, num_classes=CLASSES)
        pair, both = images[first : first + 2].clone(), labels[first : first + 2]
        wanted, wanted_targets = timm(pair, both)
        monkeypatch.undo()
        assert torch.allclose(found[first : first + 2], wanted, rtol=0, atol=1e-6)
        assert torch.allclose(targets[first : first + 2], wanted_targets, rtol=0, atol=1e-6)
    assert targets.sum(1) == pytest.approx(np.ones(8))
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_boxes_are_timms(share, monkeypatch):
    for index in range(50):
        rows, columns = box(33, 47, share, step_generator(0, 0, index))
        drawn = Drawn(Augment(cutmix=1.0), index, (33, 47))
        generator = step_generator(0, 0, index)
        drawn.centres = [generator.integers(length) for length in (33, 47)]
        monkeypatch.setattr(np, "random", drawn)
        (top, bottom, left, right), _ = cutmix_bbox_and_lam((3, 33, 47), share)
        monkeypatch.undo()
        assert (rows.start, rows.stop, columns.start, columns.stop) == (top, bottom, left, right)


@pytest.mark.parametrize("parts", [(8,), (4, 4), (2, 2, 2, 2), (6, 2)])
def test_a_divided_step_is_the_undivided_one(parts):
    augment = Augment(mixup=0.4, cutmix=1.0)
    images, labels = batch()
    for step in range(8):
        whole = mixed(augment, images, labels, step)
        pieces = [
            mixed(augment, some, tags, step)
            for some, tags in zip(images.split(parts), labels.split(parts), strict=True)
        ]
        for wanted, found in zip(whole, zip(*pieces, strict=True), strict=True):
            assert torch.equal(wanted, torch.cat(found))


@pytest.mark.parametrize("repeats", [2, 3, 4])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_no_picture_is_mixed_with_a_copy_of_itself(repeats, first):
    """Copies come in a row, and a step may begin among them."""
    count = 4 * repeats
    numbers = torch.arange(count * repeats).repeat_interleave(repeats)[first : first + count]
    images = torch.zeros(count, 1, 4, 4) + numbers.view(-1, 1, 1, 1)
    augment = Augment(mixup=1.0, repeats=repeats)
    shares = mix(images, numbers, augment, classes=count * repeats, seed=0, epoch=0, step=0)[1]
    assert ((shares > 0).sum(1) == 2).all()
    parts = [
        mix(half, tags, augment, classes=count * repeats, seed=0, epoch=0, step=0)[1]
        for half, tags in zip(images.chunk(2), numbers.chunk(2), strict=True)
    ]
    assert torch.equal(torch.cat(parts), shares)


def test_the_last_of_an_odd_number_stays():
    images, labels = batch(5)
    found, targets = mixed(Augment(mixup=1.0), images, labels)
    assert torch.equal(found[4], images[4])
    assert torch.equal(targets[4], F.one_hot(labels[4], CLASSES).float())
    assert not torch.equal(found[3], images[3])
    images, labels = batch(1)
    assert torch.equal(mixed(Augment(mixup=1.0), images, labels)[0], images)


def test_draws_follow_seed_epoch_and_step():
    images, labels = batch()
    augment = Augment(mixup=1.0)
    first = mixed(augment, images, labels)[0]
    assert torch.equal(first, mixed(augment, images, labels)[0])
    for other in ({"step": 1}, {"epoch": 1}, {"seed": 1}):
        assert not torch.equal(first, mixed(augment, images, labels, **other)[0])


def test_shares_are_beta_and_half_of_the_batches_are_cut():
    images, labels = batch(2)
    shares = []
    for step in range(600):
        found, targets = mixed(Augment(mixup=0.4, cutmix=1.0), images, labels, step)
        if torch.isin(found, images).all():  # cut: every value is one of a picture
            continue
        shares.append(float(targets[0, 0]))
    assert len(shares) == pytest.approx(300, abs=40)
    assert kstest(shares, "beta", args=(0.4, 0.4)).pvalue > 0.01


def test_targets_of_several_labels_are_mixed_too():
    images, labels = batch(4)
    several = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1]], dtype=torch.float32)
    _, targets = mixed(Augment(mixup=1.0), images, several)
    hard, shares = mixed(Augment(mixup=1.0), images, labels)
    share = float(shares[0, 0])
    assert torch.allclose(targets[0], share * several[0] + (1 - share) * several[1])
    assert torch.allclose(targets[3], share * several[3] + (1 - share) * several[2])
    assert hard.shape == images.shape
    assert several.max() == 1  # the caller's own are as they were


def test_without_mixing_nothing_is_touched():
    images, labels = batch()
    found, targets = mix(images, labels, Augment(), classes=CLASSES, seed=0, epoch=0, step=0)
    assert found is images
    assert targets is labels
