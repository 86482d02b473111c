"""Twenty kinds of files that are named like pictures and cannot be read, as they turn up in large collections."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["broken"]


def encoded(kind: str, size: tuple[int, int] = (64, 48)) -> bytes:
    """A sound picture of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def png(width: int, height: int, depth: int = 8) -> bytes:
    """A PNG that says it is so large, and holds nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    empty = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + empty + chunk(b"IEND", b"")


def broken(folder: Path) -> dict[str, Path]:
    """The files by kind; those that need no content are a folder, a dangling link and a file that nobody wrote."""
    jpeg, sound_png = encoded("JPEG"), encoded("PNG")
    header = jpeg.index(b"\xff\xc0")
    contents = {
        "empty": b"",
        "one byte": b"\xff",
        "text": b"this is no picture",
        "web page": b"<!DOCTYPE html><html><body>404</body></html>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        "zip": b"PK\x03\x04" + bytes(40),
        "zeros": bytes(4096),
        "noise": np.random.default_rng(1).bytes(4096),
        "jpeg cut in its header": jpeg[:40],
        "jpeg cut in the middle": jpeg[: len(jpeg) // 2],
        "jpeg of no size": jpeg[: header + 5] + bytes(4) + jpeg[header + 9 :],
        "jpeg magic alone": b"\xff\xd8\xff\xe0",
        "png cut in the middle": sound_png[: len(sound_png) // 2],
        "png of a wrong checksum": sound_png[:40] + b"\0\0\0\0" + sound_png[44:],
        "decompression bomb": png(60_000, 60_000),
        "gif cut in its header": encoded("GIF")[:12],
        "webp cut in the middle": encoded("WEBP")[:200],
        "tiff cut in the middle": encoded("TIFF")[:100],
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for number, (kind, content) in enumerate(contents.items()):
        files[kind] = folder / f"broken_{number:02d}.jpg"
        files[kind].write_bytes(content)
    files["dangling link"] = folder / "broken_link.jpg"
    files["dangling link"].symlink_to(folder / "gone.jpg")
    return files
