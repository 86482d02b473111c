"""Decoding against Pillow."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageCms, ImageOps

from isthmus.data.decode import decode, extensions
from isthmus.errors import DataError


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    red, green, blue = x * 255 // (width - 1), y * 255 // (height - 1), (x + y) % 256
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(gradient(), kind, exif=exif)
    with Image.open(io.BytesIO(content)) as image:
        reference = ImageOps.exif_transpose(image).convert("RGB")
    assert reference.size == ((40, 30) if orientation < 5 else (30, 40))
    assert np.array_equal(decode(content), np.asarray(reference))


def test_damaged_exif_leaves_the_picture_upright():
    plain = gradient()
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03\0\0"  # promises five tags and ends inside the first
    content = encode(plain, "JPEG", exif=exif, quality=95)
    assert np.array_equal(decode(content), np.asarray(decode(encode(plain, "JPEG", quality=95))))


def test_cmyk_with_adobe_inversion():
    picture = gradient()
    content = encode(picture.convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in content
    assert np.abs(np.asarray(decode(content), int) - np.asarray(picture, int)).mean() < 6


@pytest.mark.parametrize(("kind", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("TIFF", "<i4")])
def test_deep_grey_is_scaled(kind, dtype):
    deep = np.arange(0, 65536, 16, dtype=dtype).reshape(64, 64)
    grey = decode(encode(Image.fromarray(deep), kind), "L")[..., 0]
    assert np.array_equal(grey, np.rint(deep / 257).astype(np.uint8))


def test_sixteen_bit_pgm_is_scaled():
    deep = np.arange(0, 65536, 16).astype(">u2").reshape(64, 64)
    grey = decode(b"P5 64 64 65535\n" + deep.tobytes(), "L")[..., 0]
    assert np.array_equal(grey, np.rint(deep / 257).astype(np.uint8))


@pytest.mark.parametrize("full", [1, 255, 65535])
def test_float_tiff_is_scaled(full):
    shape = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    grey = decode(encode(Image.fromarray(shape * np.float32(full)), "TIFF"), "L")[..., 0].astype(int)
    assert np.abs(grey - np.rint(shape * 255)).max() <= 1


@pytest.mark.parametrize("value", [-3.0, 1e6, np.nan, np.inf])
def test_float_tiff_without_a_scale_is_refused(value):
    pixels = np.full((4, 4), 0.5, np.float32)
    pixels[1, 1] = value
    with pytest.raises(DataError, match=r"its pixels run from .* 0\.\.65535"):
        decode(encode(Image.fromarray(pixels), "TIFF"))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_modes_become_rgb_and_grey(mode):
    content = encode(gradient().convert(mode), "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    with Image.open(io.BytesIO(content)) as image:
        rgb, grey = image.convert("RGB"), image.convert("L")
    assert np.array_equal(decode(content), np.asarray(rgb))
    if mode not in ("LA", "RGBA"):  # these go by way of RGBA
        assert np.array_equal(decode(content, "L")[..., 0], np.asarray(grey))
    assert decode(content, "L").shape == (30, 40, 1)


def test_transparency_is_laid_on_white():
    halves = Image.new("RGBA", (4, 2), (200, 10, 10, 255))
    halves.paste((0, 80, 0, 0), (2, 0, 4, 2))
    pixels = np.asarray(decode(encode(halves, "PNG")))
    assert (pixels[:, :2] == (200, 10, 10)).all()
    assert (pixels[:, 2:] == 255).all()


@pytest.mark.parametrize("mask", [1, bytes([255, 0, 255])], ids=["one index", "a value each"])
def test_transparent_palette(mask):
    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for place in range(3):
        palette.putpixel((place, 0), place)
    pixels = np.asarray(decode(encode(palette, "PNG", transparency=mask)))
    assert pixels[0].tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]


def test_transparent_colour_of_a_plain_picture():
    picture = Image.new("RGB", (2, 1), (1, 2, 3))
    picture.putpixel((1, 0), (9, 9, 9))
    assert np.asarray(decode(encode(picture, "PNG", transparency=(9, 9, 9))))[0].tolist() == [[1, 2, 3], [255] * 3]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (decode(content) == (255, 0, 0)).all()


def test_grey_feeds_three_channels_by_repetition():
    grey = gradient().convert("L")
    rgb = np.asarray(decode(encode(grey, "PNG")))
    assert (rgb == np.asarray(grey)[..., None]).all()


def png(width: int, height: int) -> bytes:
    """A PNG whose header promises any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def test_decompression_bomb():
    with pytest.raises(DataError, match=r"more than .* pixels"):
        decode(png(60_000, 60_000))


def test_large_pictures_pass_without_a_warning(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decode(encode(gradient(), "PNG")).shape == (30, 40, 3)
    with pytest.raises(DataError, match="more than 2,000 pixels"):
        decode(encode(gradient(50, 50), "PNG"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"<html>404</html>", r"is not a picture \(what can be read: JPEG, PNG.*\); copy it again or leave it out"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a picture"),
        (encode(gradient(), "PNG")[:90], "cannot be decoded"),
        (encode(gradient(), "JPEG")[:-200], "cannot be decoded"),
    ],
    ids=["empty", "web page", "PostScript", "cut PNG", "cut JPEG"],
)
def test_what_is_no_picture_is_named(content, reason, tmp_path: Path):
    path = tmp_path / "shot.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as raised:
        decode(path)
    assert str(path) in str(raised.value)


def test_missing_file_and_folder_are_named(tmp_path: Path):
    for path in (tmp_path / "none.png", tmp_path, f"{tmp_path}\0.png"):
        with pytest.raises(DataError, match="cannot be read"):
            decode(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000"])
def test_damage_anywhere_raises_only_our_error(kind):
    whole = encode(gradient(), kind)
    random = np.random.default_rng(1)
    damaged = [whole[:cut] for cut in range(0, len(whole), max(1, len(whole) // 60))]
    for _ in range(150):
        content = bytearray(whole)
        for place in random.integers(0, min(len(whole), 400), 4):
            content[place] = random.integers(256)
        damaged.append(bytes(content))
    refused = 0
    for content in damaged:
        try:
            decode(content)
        except DataError:
            refused += 1
    assert refused > 20


def test_other_peoples_warnings_still_sound():
    decode(encode(gradient(), "PNG"))
    with pytest.warns(UserWarning, match="mine"):
        warnings.warn("mine", UserWarning, stacklevel=1)


def test_extensions():
    assert {".jpg", ".jpeg", ".png", ".gif", ".webp", ".tif", ".tiff", ".bmp"} <= extensions()
    assert not {".eps", ".pdf", ".txt", ".csv", ".h5"} & extensions()


def test_plain_jpegs_are_pillows_bit_for_bit(photos, monkeypatch):
    """All kinds that cameras and libraries write; none of them goes by way of Pillow."""
    options = [
        {"quality": 75, "subsampling": 2},
        {"quality": 90, "subsampling": 1},
        {"quality": 95, "subsampling": 0},
        {"quality": 60, "subsampling": "4:1:1"},
        {"quality": 85, "progressive": True},
        {"quality": 85, "restart_marker_rows": 2},
        {"quality": 85, "keep_rgb": True},
        {"quality": 85, "icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()},
    ]
    for place, path in enumerate(photos):
        with Image.open(path) as image:
            whole = image.convert("RGB")
        odd = whole.crop((0, 0, whole.width - 3, whole.height - 5))  # no whole blocks
        for picture in (odd, odd.convert("L")):
            content = encode(picture, "JPEG", **options[place % len(options)])
            with Image.open(io.BytesIO(content)) as image:
                reference = np.asarray(image.convert("RGB"))
            with monkeypatch.context() as patch:
                patch.setattr(Image, "open", lambda *_, **__: pytest.fail("this one is Pillow's"))
                assert np.array_equal(decode(content), reference)


def test_grey_jpegs_as_one_channel():
    for mode in ("L", "RGB"):
        content = encode(gradient().convert(mode), "JPEG", quality=90)
        with Image.open(io.BytesIO(content)) as image:
            assert np.array_equal(decode(content, "L")[..., 0], np.asarray(image.convert("L")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_in_xmp(orientation):
    tag = f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/>'
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="r">{tag}</rdf:RDF></x:xmpmeta>'
    content = encode(gradient(), "JPEG", xmp=xmp.encode())
    with Image.open(io.BytesIO(content)) as image:
        reference = ImageOps.exif_transpose(image)
    assert reference.size == ((40, 30) if orientation < 5 else (30, 40))
    assert np.array_equal(decode(content), np.asarray(reference))


def test_words_of_pillow_for_damage_that_it_forgives():
    """Bytes too many before the end: libjpeg warns, Pillow does not mind."""
    content = encode(gradient(), "JPEG", quality=95)
    padded = content[:-2] + bytes(9) + content[-2:]
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(padded)
    assert np.array_equal(decode(padded), decode(content))
