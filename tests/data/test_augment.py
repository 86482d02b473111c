"""Augmentation: what it may change, how often, and that it follows its random numbers; torchvision as the oracle."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import RandomErasing, v2

from isthmus.arch.preprocess import IMAGENET, Preprocess
from isthmus.data.augment import VIEWS, Augment, altered, augmented, random_box, views
from isthmus.data.decode import Pixels
from isthmus.data.order import sample_generator
from isthmus.data.transform import centred, evaluation_transform, normalise
from isthmus.errors import RecipeError

RECORD = Preprocess(resize=20, crop=16)
STILL = Augment(hflip=False, crop_scale=())


@pytest.fixture
def picture() -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)


def drawn(picture: Pixels, augment: Augment, count: int = 64) -> list[torch.Tensor]:
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
        wide, high = right - left, bottom - top
        assert (wide - 0.5) / (high + 0.5) < 4 / 3  # to the nearest pixel
        assert (wide + 0.5) / (high - 0.5) > 3 / 4
        areas.append(wide * high / (width * height))
    if min(size) > 40:
        assert max(areas) < 0.91
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
    square = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)

    class Middle:
        def uniform(self, low, high):
            return (low + high) / 2

        def integers(self, high):
            return high // 2

    assert random_box(24, 24, (1.0, 1.0), Middle()) == (0, 0, 24, 24)
    whole = evaluation_transform(Preprocess(resize=16, crop=16))(square)
    assert np.array_equal(whole.permute(1, 2, 0), Image.fromarray(square).resize((16, 16), Image.Resampling.BILINEAR))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_scale": (0.0, 1.0)}, "crop_scale is (0.0, 1.0)"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale is (0.9, 0.5)"),
        ({"crop_scale": (0.5, 1.5)}, "crop_scale is (0.5, 1.5)"),
        ({"crop_scale": (0.5,)}, "crop_scale is (0.5,)"),
        ({"vflip": "yes"}, "vflip is 'yes'; it must be true or false"),
        ({"pad": -1, "crop_scale": ()}, "pad is -1"),
        ({"pad": 4}, "pad and crop_scale both place the crop"),
        ({"erasing": -0.5}, "erasing is -0.5"),
        ({"policy": "auto"}, "policy is 'auto'; it must be one of none, rand, trivial"),
        ({"policy_layers": 0}, "policy_layers is 0"),
        ({"policy_magnitude": 10.5}, "policy_magnitude is 10.5; it must lie in 0..10"),
        ({"policy_spread": -1.0}, "policy_spread is -1.0"),
        ({"policy_spread": float("nan")}, "policy_spread is nan"),
        ({"erasing": 1.1}, "erasing is 1.1; it must lie in 0..1"),
        ({"mixup": -0.1}, "mixup is -0.1"),
        ({"cutmix": float("inf")}, "cutmix is inf"),
        ({"repeats": 0}, "repeats is 0"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(RecipeError) as raised:
        Augment(**settings)
    assert message in str(raised.value)


@pytest.mark.parametrize("channels", ["RGB", "L"])
def test_padding_is_torchvisions_random_crop(picture, channels):
    """Every picture is the padded one cut out somewhere, and every place comes."""
    record = Preprocess(resize=20, crop=16, channels=channels, mean=(0.5,) * len(channels), std=(1.0,) * len(channels))
    square = centred(picture[..., : len(channels)], record)
    padded = v2.functional.pad(torch.from_numpy(square).permute(2, 0, 1), [1], fill=128)
    crops = [v2.functional.crop(padded, top, left, 16, 16) for top in range(3) for left in range(3)]
    augment = Augment(hflip=False, crop_scale=(), pad=1)
    seen = [altered(square, augment, record, sample_generator(0, 0, index)) for index in range(128)]
    places = [next(place for place, crop in enumerate(crops) if torch.equal(image, crop)) for image in seen]
    assert np.bincount(places, minlength=9).min() > 0


def test_erasing_covers_one_rectangle_as_torchvisions_does():
    """How often, of which areas and shapes, and where; in the colour that normalises to nothing."""
    record, side, count = IMAGENET.at(96), 96, 400
    white = np.full((side, side, 3), 255, np.uint8)
    fill = [round(255 * mean) for mean in record.mean]
    augment = Augment(hflip=False, erasing=0.6)
    ours = []
    for index in range(count):
        image = altered(white, augment, record, sample_generator(0, 0, index)).permute(1, 2, 0).numpy()
        covered = (image == np.array(fill)).all(-1)
        assert (image[~covered] == 255).all()
        if covered.any():
            rows, columns = (np.flatnonzero(covered.any(axis)) for axis in (1, 0))
            assert covered[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            ours.append((rows[0], columns[0], len(rows), len(columns)))
    assert len(ours) == pytest.approx(0.6 * count, abs=30)
    torch.manual_seed(0)
    picture = torch.zeros(3, side, side)
    theirs = [RandomErasing.get_params(picture, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(count)]
    for quantity in (
        lambda top, left, high, wide: high * wide,
        lambda top, left, high, wide: high / wide,
        lambda top, left, high, wide: top / (side - high),
        lambda top, left, high, wide: left / (side - wide),
    ):
        assert ks_2samp([quantity(*box) for box in ours], [quantity(*box) for box in theirs]).pvalue > 0.01
    colour = torch.tensor(fill, dtype=torch.uint8).view(1, 3, 1, 1)
    assert (normalise(colour, record).flatten().abs() < 0.5 / 255 / torch.tensor(record.std)).all()


def test_everything_at_once_keeps_shape_and_follows_its_random_numbers_only(picture):
    for policy in ("rand", "trivial"):
        augment = Augment(vflip=True, rotate90=True, policy=policy, erasing=0.5)
        once, again = drawn(picture, augment, 32), drawn(picture, augment, 32)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
        assert len({image.numpy().tobytes() for image in once}) == 32
        assert {(image.shape, image.dtype) for image in once} == {((3, 16, 16), torch.uint8)}


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
