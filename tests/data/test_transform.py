"""Resize and crop and normalisation against torchvision, crops of training against Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import ResNet50_Weights
from torchvision.transforms import InterpolationMode, functional
from torchvision.transforms._presets import ImageClassification

from isthmus.arch.preprocess import IMAGENET, Preprocess
from isthmus.data.decode import decode
from isthmus.data.transform import centred, cut_out, evaluation_transform, mirrored, normalise
from isthmus.errors import DataError

V2 = Preprocess(resize=232)
PRESETS = [
    pytest.param(IMAGENET, ResNet50_Weights.IMAGENET1K_V1.transforms(), id="V1"),
    pytest.param(V2, ResNet50_Weights.IMAGENET1K_V2.transforms(), id="V2"),
    pytest.param(
        Preprocess(resize=235, crop=224, interpolation="bicubic"),
        ImageClassification(crop_size=224, resize_size=235, interpolation=InterpolationMode.BICUBIC),
        id="bicubic",
    ),
]
SIZES = [(97, 113), (640, 33), (31, 500), (225, 224), (256, 300), (232, 232), (5, 5), (1, 7)]


def assert_same_input(image: Image.Image, record: Preprocess, preset: ImageClassification) -> None:
    ours = normalise(evaluation_transform(record)(np.asarray(image))[None], record)[0]
    theirs = preset(image)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-5  # far below one grey value, 1/255 of the scale


@pytest.mark.parametrize(("record", "preset"), PRESETS)
def test_photographs_equal_torchvision(record, preset, photos):
    for path in photos:
        with Image.open(path) as image:
            reference = image.convert("RGB")
        ours = decode(path)
        assert np.array_equal(np.asarray(ours), np.asarray(reference)), path
        assert_same_input(reference, record, preset)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("record", "preset"), PRESETS)
def test_odd_and_small_sizes_equal_torchvision(record, preset, size, photos):
    assert_same_input(Image.fromarray(decode(photos[0])).resize(size), record, preset)


def test_squash_resizes_both_sides():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    whole = evaluation_transform(Preprocess(resize=32, crop=32, squash=True))(pixels)
    assert np.array_equal(whole.permute(1, 2, 0), Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR))


def test_a_sliver_does_not_become_a_giant():
    sliver = Image.new("RGB", (2, 40_001))
    sliver.paste((7, 8, 9), (0, 19_990, 2, 20_010))
    pixels = evaluation_transform(IMAGENET)(np.asarray(sliver))
    assert pixels.shape == (3, 224, 224)
    assert pixels.unique().tolist() == [7, 8, 9]


@pytest.mark.parametrize("record", [IMAGENET, V2, Preprocess(resize=200, crop=200, squash=True)], ids=str)
@pytest.mark.parametrize("channels", ["RGB", "L"])
def test_the_fast_way_is_the_exact_one_to_a_grey_level(record, channels, photos):
    levels = []
    for path in photos:
        pixels = decode(path, channels)
        exact = centred(pixels, record).astype(int)
        fast = centred(pixels, record, exact=False)
        assert fast.shape == exact.shape
        levels.append(np.abs(exact - fast).ravel())
    assert 0 < (np.concatenate(levels) > 0).mean() < 0.02
    assert np.concatenate(levels).max() == 1


def test_one_channel_network(photos):
    record = Preprocess(resize=16, crop=16, channels="L", mean=(0.5,), std=(0.25,))
    pixels = evaluation_transform(record)(decode(photos[0], "L"))
    assert pixels.shape == (1, 16, 16)
    assert torch.allclose(normalise(pixels[None], record), (pixels[None] / 255 - 0.5) / 0.25, atol=1e-6)


def test_bgr_is_the_mirror_of_rgb():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    bgr = Preprocess(channels="BGR", mean=(0.406, 0.456, 0.485), std=(0.225, 0.224, 0.229))
    ours = normalise(images, bgr)
    assert torch.equal(ours, normalise(images, IMAGENET).flip(1))
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert ours.dtype == torch.float32


def test_normalise_refuses_what_was_normalised():
    with pytest.raises(DataError, match="normalised once"):
        normalise(torch.zeros(1, 3, 4, 4), IMAGENET)
    with pytest.raises(DataError, match="3 channels"):
        normalise(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), IMAGENET)


def test_normalise_first_called_under_inference_mode_serves_training_later():
    record = Preprocess(mean=(0.1, 0.2, 0.3))
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    with torch.inference_mode():
        normalise(images, record)
    weight = torch.ones(3, 1, 1, requires_grad=True)
    (normalise(images, record) * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_are_pillows_to_a_grey_level(interpolation, photos):
    """One or two values in a hundred are off by a level; bicubic, less than one in ten thousand by more."""
    differences = []
    for number, path in enumerate(photos):
        pixels, random = decode(path), np.random.default_rng(number)
        for _ in range(4):
            height, width, _ = pixels.shape
            left, top = (int(random.integers(side // 2)) for side in (width, height))
            right, bottom = int(random.integers(left + 20, width)) + 1, int(random.integers(top + 20, height)) + 1
            record = Preprocess(crop=int(random.integers(30, 260)), resize=260, interpolation=interpolation)
            ours = cut_out(pixels, (left, top, right, bottom), record)
            part = Image.fromarray(pixels[top:bottom, left:right])
            filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
            theirs = part.resize((record.crop, record.crop), filters[interpolation])
            differences.append(np.abs(ours.astype(int) - np.asarray(theirs)).ravel())
    levels = np.concatenate(differences)
    assert (levels > 0).mean() < (0.02 if interpolation == "bilinear" else 0.025)
    assert (levels > 1).mean() <= (0.0 if interpolation == "bilinear" else 1e-4)


def test_one_channel_crops_are_pillows_to_a_grey_level(photos):
    pixels = decode(photos[0], "L")
    record = Preprocess(crop=50, resize=50, channels="L", mean=(0.5,), std=(0.5,))
    theirs = Image.fromarray(pixels[10:200, 30:130, 0]).resize((50, 50), Image.Resampling.BILINEAR)
    assert np.abs(cut_out(pixels, (30, 10, 130, 200), record)[..., 0].astype(int) - np.asarray(theirs)).max() <= 1


def test_crops_and_flips_keep_the_channels_of_a_pixel_together(photos):
    """In any other memory order, putting them into a batch costs more than making them."""
    crop = cut_out(decode(photos[0]), (3, 5, 200, 300), Preprocess())
    assert crop.flags.c_contiguous
    assert mirrored(crop).flags.c_contiguous


def test_mirrored():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(mirrored(pixels), pixels[:, ::-1])
    assert np.array_equal(mirrored(pixels[::2, :, :1]), pixels[::2, ::-1, :1])


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 3, 4, 4), (3, 1, 4, 6), (2, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_normalising_is_torchvisions_in_any_layout_and_into_a_buffer(shape, layout):
    images = torch.randint(0, 256, shape, dtype=torch.uint8).contiguous(memory_format=layout)
    channels = shape[1]
    record = IMAGENET if channels == 3 else Preprocess(channels="L", mean=(0.4,), std=(0.2,))
    theirs = functional.normalize(images / 255, record.mean, record.std)
    found = normalise(images, record)
    assert (found - theirs).abs().max() < 2e-6
    buffer = torch.full_like(found, torch.nan)
    assert normalise(images, record, out=buffer) is buffer
    assert torch.equal(buffer, found)
