"""Policies: every operation at every level gives the pixels of timm's or torchvision's; draws are spread as theirs."""

import random

import numpy as np
import pytest
from PIL import Image
from scipy.stats import kstest
from timm.data import auto_augment as theirs
from torchvision.transforms import InterpolationMode, TrivialAugmentWide
from torchvision.transforms.autoaugment import _apply_op

from isthmus.data import policies
from isthmus.data.order import sample_generator
from isthmus.data.policies import OPERATIONS, RAND, TRIVIAL, rand_augment, trivial_augment

SIDE = 64
FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
TIMM = theirs._RAND_INCREASING_TRANSFORMS
SPACE = TrivialAugmentWide()._augmentation_space(31)


@pytest.fixture(scope="module")
def photo(photos) -> Image.Image:
    return Image.open(next(path for path in photos if path.name == "chelsea.png")).convert("RGB").resize((SIDE, SIDE))


def applied(image, chance, level, sign, **look):
    return OPERATIONS[chance.operation](image, sign * chance.amount(level, SIDE), **look)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("chance", "name"), list(zip(RAND, TIMM, strict=True)), ids=TIMM)
def test_rand_is_timms_increasing_set(photo, chance, name, sign, monkeypatch):
    monkeypatch.setattr(random, "random", lambda: 1.0 if sign < 0 else 0.0)
    fill = (124, 116, 104)
    for magnitude in (0, 0.3, 1, 2.5, 4.9, 5, 6.2, 7, 8.8, 9.99, 10):
        for resample in FILTERS:
            if name.startswith("Posterize") and magnitude == 10:  # where timm asks Pillow for no bit, which it refuses
                assert chance.amount(1.0, SIDE) == 1
                continue
            look = {"fillcolor": fill, "resample": resample}
            operation = theirs.AugmentOp(
                name, prob=1.0, magnitude=magnitude, hparams={"img_mean": fill, "interpolation": resample}
            )
            found = applied(photo, chance, magnitude / 10, sign if chance.signed else 1, **look)
            assert found.tobytes() == operation(photo).tobytes(), (magnitude, resample)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("chance", "name"), list(zip(TRIVIAL, SPACE, strict=True)), ids=SPACE)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_trivial_is_torchvisions_wide_set(photo, chance, name, sign, mode):
    image = photo.convert(mode)
    amounts, signed = SPACE[name]
    assert chance.signed == signed
    for level in range(31):
        amount = float(amounts[level]) if amounts.ndim else 0.0
        if name.startswith("Translate"):
            amount = int(round(amount, 4))  # half of 32 is 15.999999 in fp32
        assert chance.amount(level / 30, SIDE) == pytest.approx(amount, rel=1e-6, abs=1e-6)
        signed_amount = sign * amount if signed else amount
        found = OPERATIONS[chance.operation](image, signed_amount, resample=FILTERS[0])
        # Theirs moves the picture by so many pixels, ours the place it is read at.
        turned = -signed_amount if name.startswith("Translate") else signed_amount
        assert found.tobytes() == _apply_op(image, name, turned, InterpolationMode.BILINEAR, fill=None).tobytes(), level


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, float]]:
    """What was done, in place of doing it."""
    made: list[tuple[str, float]] = []

    def recorder(name):
        def operation(image, amount, **_look):
            made.append((name, amount))
            return image

        return operation

    monkeypatch.setattr(policies, "OPERATIONS", {name: recorder(name) for name in OPERATIONS})
    return made


def test_rand_draws_as_timm_does(photo, calls):
    """Two of fifteen with replacement, each skipped half of the time, magnitudes normal, signs even."""
    for index in range(3000):
        rand_augment(photo, sample_generator(0, 0, index), layers=2, magnitude=7.0, spread=0.5)
    assert len(calls) == pytest.approx(3000, abs=110)  # three standard deviations of 6000 coins
    counts = {chance.operation: 0 for chance in RAND}
    for name, _ in calls:
        counts[name] += 1
    assert all(150 < count < 250 for count in counts.values()), counts
    angles = np.array([amount for name, amount in calls if name == "rotate"])
    assert 0.35 < (angles < 0).mean() < 0.65
    assert kstest((np.abs(angles) / 3 - 7) / 0.5, "norm").pvalue > 0.01
    calls.clear()
    for index in range(400):
        rand_augment(photo, sample_generator(1, 0, index), layers=3, magnitude=10.0, spread=4.0)
    assert max(abs(amount) for name, amount in calls if name == "rotate") == 30  # nothing beyond magnitude 10


def test_trivial_draws_as_torchvision_does(photo, calls):
    """One of fourteen, its level one of 31, all alike, in either sign."""
    for index in range(2800):
        trivial_augment(photo, sample_generator(0, 0, index), resample=Image.Resampling.BILINEAR)
    assert len(calls) == 2800
    counts = {chance.operation: 0 for chance in TRIVIAL}
    for name, _ in calls:
        counts[name] += 1
    assert all(150 < count < 250 for count in counts.values()), counts
    seen = {round(amount / 135 * 30) for name, amount in calls if name == "rotate"}
    assert len(seen) > 45  # of 61
    assert (min(seen), max(seen)) == (-30, 30)


def test_pictures_of_one_channel(photo):
    grey = photo.convert("L")
    for index in range(64):
        random_numbers = sample_generator(0, 0, index)
        out = rand_augment(
            grey, random_numbers, layers=4, magnitude=9.0, spread=0.5, fillcolor=120, resample=FILTERS[0]
        )
        assert (out.mode, out.size) == ("L", grey.size)
