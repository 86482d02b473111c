"""Augmentation: what it may change, how often, and that it follows its random numbers."""

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.arch.preprocess import Preprocess
from isthmus.data.augment import VIEWS, Augment, augmented, random_box, views
from isthmus.data.order import sample_generator
from isthmus.data.transform import evaluation_transform
from isthmus.errors import RecipeError

RECORD = Preprocess(resize=20, crop=16)
STILL = Augment(hflip=False, crop_scale=())


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8))


def drawn(picture: Image.Image, augment: Augment, count: int = 64) -> list[torch.Tensor]:
    return [augmented(picture, augment, RECORD, sample_generator(0, 0, index)) for index in range(count)]


def test_nothing_asked_is_the_evaluation_transform(picture):
    plain = evaluation_transform(RECORD)(picture)
    assert all(torch.equal(image, plain) for image in drawn(picture, STILL, 4))


@pytest.mark.parametrize(
    ("augment", "expected"),
    [
        (Augment(hflip=True, crop_scale=()), ["identity", "hflip"]),
        (Augment(hflip=False, vflip=True, crop_scale=()), ["identity", "vflip"]),
        (Augment(hflip=True, vflip=True, crop_scale=()), ["identity", "hflip", "vflip", "rot180"]),
    ],
)
def test_flips_come_equally_often(picture, augment, expected):
    plain = evaluation_transform(RECORD)(picture)
    possible = views(plain, expected)
    seen = [
        next(place for place, view in enumerate(possible) if torch.equal(image, view))
        for image in drawn(picture, augment)
    ]
    counts = np.bincount(seen, minlength=len(expected))
    assert counts.min() > 64 / len(expected) / 2


def test_quarter_turns(picture):
    plain = evaluation_transform(RECORD)(picture)
    possible = [torch.rot90(plain, turns, (1, 2)) for turns in range(4)]
    images = drawn(picture, Augment(hflip=False, rotate90=True, crop_scale=()))
    assert all(any(torch.equal(image, turn) for image in images) for turn in possible)
    assert all(any(torch.equal(image, turn) for turn in possible) for image in images)


@pytest.mark.parametrize("size", [(300, 200), (97, 97), (40, 1000), (3, 2), (1, 1)], ids=str)
def test_random_boxes_lie_inside_with_the_asked_area_and_shape(size):
    width, height = size
    areas = []
    for index in range(300):
        left, top, right, bottom = random_box(width, height, (0.2, 0.9), sample_generator(0, 0, index))
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert 0.74 < (right - left) / (bottom - top) < 1.34
        areas.append((right - left) * (bottom - top) / (width * height))
    assert max(areas) < 0.91
    if max(size) < 4 * min(size):
        assert min(areas) > 0.19
        assert max(areas) - min(areas) > 0.6


def test_crops_follow_their_random_numbers_only(picture):
    everything = Augment(hflip=True, vflip=True, rotate90=True, crop_scale=(0.2, 1.0))
    once, again = drawn(picture, everything, 16), drawn(picture, everything, 16)[::-1][::-1]
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert len({image.numpy().tobytes() for image in once}) == 16
    assert once[0].shape == (3, 16, 16)
    assert once[0].dtype == torch.uint8


def test_whole_picture_crop_is_a_plain_resize():
    square = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))

    class Middle:
        def uniform(self, low, high):
            return (low + high) / 2

    assert random_box(24, 24, (1.0, 1.0), Middle()) == pytest.approx((0, 0, 24, 24))
    whole = evaluation_transform(Preprocess(resize=16, crop=16))(square)
    assert np.array_equal(whole.permute(1, 2, 0), square.resize((16, 16), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.9, 0.5), (0.5, 1.5)])
def test_impossible_scales(scale):
    with pytest.raises(RecipeError, match="crop_scale"):
        Augment(crop_scale=scale)


def test_views_are_what_they_say_and_their_own_inverse():
    images = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    seen = views(images, list(VIEWS))
    assert torch.equal(seen[0], images)
    assert torch.equal(seen[1], torch.from_numpy(images.numpy()[..., ::-1].copy()))
    assert torch.equal(seen[2], torch.from_numpy(images.numpy()[..., ::-1, :].copy()))
    assert torch.equal(seen[3], torch.rot90(images, 2, (2, 3)))
    for name, view in zip(VIEWS, seen, strict=True):
        assert torch.equal(views(view, [name])[0], images)


@pytest.mark.parametrize("names", [[], ["identity", "rot45"]])
def test_unknown_views(names):
    with pytest.raises(RecipeError, match="identity, hflip, vflip, rot180"):
        views(torch.zeros(1, 3, 2, 2), names)
