"""Pictures into tar shards with an index: sound ones only, shard by shard, so that an interrupted job goes on."""

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

from PIL import Image

from isthmus.atomic import atomic_write
from isthmus.data.decode import decode
from isthmus.data.order import permutation
from isthmus.data.pictures import Pictures
from isthmus.data.shard_index import CLASS_FILES, INDEX, Sample, save_index, scan, scanned
from isthmus.errors import DataError, RunError
from isthmus.runtime import cores

__all__ = ["Written", "write_shards"]

UNFINISHED = "unfinished.json"
QUALITY = 95  # of resized JPEGs
_ENDS = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2", "TIFF": "tif", "DIB": "bmp"}  # else the format's own name


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """One side of a data set in shards: how many, of how many pictures and bytes, and why others were left out."""

    side: str
    shards: int
    pictures: int
    bytes: int
    left_out: tuple[str, ...]


class _NoneReadableError(Exception):
    """No picture of a shard can be read; why not the first."""


def write_shards(
    sides: Mapping[str, Pictures],
    out: Path,
    *,
    source: str = "",
    per_shard: int = 1000,
    resize: int = 0,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> list[Written]:
    """Write each side, shuffled, into SIDE-000000.tar and so on, with the names of the classes and an index.

    A sample is KEY.jpg (or as the picture is encoded) and KEY.cls, KEY being its number in its side. With `resize`,
    the shorter side of larger pictures becomes so many pixels, and they become JPEGs; others are copied. Pictures that
    cannot be decoded are left out. Stopped at any time, the same call goes on, and the shards are the same bytes.
    Raises DataError where `out` holds other shards or lies in the folder `source` that the pictures come from, or
    nothing can be read, RunError where it cannot be written.
    """
    if per_shard < 1 or resize < 0:
        raise DataError(
            f"{per_shard} pictures a shard and resize {resize} make no shards; give 1 or more, and 0 or more"
        )
    for side, pictures in sides.items():
        if not len(pictures):
            raise DataError(f"there are no pictures for {side}; give it some, or leave the division out")
    _begin(out, _fingerprint(sides, per_shard, resize), source)
    classes = next(iter(sides.values())).classes
    atomic_write(out / CLASS_FILES[0], lambda path: path.write_text(json.dumps(classes, indent=0), encoding="utf-8"))
    names: list[str] = []
    shards: list[list[Sample]] = []
    report = []
    for side, pictures in sides.items():
        order = permutation(len(pictures), 0, 0)  # so that readers of streams find the classes mixed
        found: list[list[Sample]] = []
        reason = ""
        for start in range(0, len(order), per_shard):
            path = out / f"{side}-{start // per_shard:06d}.tar"
            progress(f"writing {side}", start, len(order))
            if not path.exists():
                chosen = order[start : start + per_shard].tolist()
                try:
                    atomic_write(path, partial(_fill, pictures=pictures, chosen=chosen, resize=resize))
                except _NoneReadableError as error:
                    reason = reason or str(error)
                    continue
            names.append(path.name)
            found.append(scan(path, str(path)))
        if not found:
            raise DataError(f"none of {len(order)} pictures can be read; the first: {reason}")
        progress(f"writing {side}", len(order), len(order))
        shards += found
        kept = {int(sample.member.partition(".")[0]) for shard in found for sample in shard}
        left_out = tuple(_why_left_out(pictures, index) for index in range(len(pictures)) if index not in kept)
        size = sum((out / name).stat().st_size for name in names[-len(found) :])
        report.append(Written(side=side, shards=len(found), pictures=len(kept), bytes=size, left_out=left_out))
    save_index(out / INDEX, scanned(names, shards, [(out / name).stat().st_size for name in names], classes))
    (out / UNFINISHED).unlink()
    return report


def _fingerprint(sides: Mapping[str, Pictures], per_shard: int, resize: int) -> str:
    """A hash of all that decides the shards."""
    digest = hashlib.sha256(json.dumps([per_shard, resize, QUALITY]).encode())
    for side, pictures in sides.items():
        digest.update(json.dumps([side, pictures.classes]).encode() + pictures.labels.tobytes())
        for index in range(len(pictures)):
            digest.update(json.dumps(pictures.identity(index)).encode())
    return digest.hexdigest()


def _begin(out: Path, job: str, source: str) -> None:
    """Claim the folder for a job; raises DataError where it holds another's, or lies among the pictures."""
    mark = out / UNFINISHED
    if mark.exists():
        if json.loads(mark.read_text(encoding="utf-8")) != {"job": job}:
            raise DataError(
                f"{out} holds the beginning of other shards (other pictures or options); choose another folder"
            )
        for left in out.glob(".*.tmp"):  # of a process that was killed
            left.unlink()
    elif (out / INDEX).exists() or next(out.glob("*.tar"), None):
        raise DataError(f"{out} holds shards already; choose another folder")
    elif source and (root := Path(source).expanduser()).is_dir() and out.resolve().is_relative_to(root.resolve()):
        raise DataError(f"shards in {out} would lie among the pictures of {source}; choose another folder")
    else:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make the folder {out}: {error.strerror}; choose another") from error
        atomic_write(mark, lambda path: path.write_text(json.dumps({"job": job}), encoding="utf-8"))


def _why_left_out(pictures: Pictures, index: int) -> str:
    """Found anew, because the job may have been stopped since."""
    name = pictures.name(index)
    try:
        decode(pictures.read(index), "RGB", name)
    except DataError as error:
        return str(error)
    return f"{name} could not be read when its shard was written"


def _fill(path: Path, pictures: Pictures, chosen: list[int], resize: int) -> None:
    """Write one shard; raises _NoneReadableError where that holds of its pictures."""
    reason = ""
    count = 0
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for index, (end, content) in zip(chosen, _encoded(pictures, chosen, resize), strict=True):
            if not end:
                reason = reason or content.decode()
                continue
            count += 1
            for name, inside in ((end, content), ("cls", str(pictures.labels[index]).encode())):
                member = tarfile.TarInfo(f"{index:08d}.{name}")
                member.size = len(inside)
                archive.addfile(member, BytesIO(inside))
    if not count:
        raise _NoneReadableError(reason)


def _encoded(pictures: Pictures, chosen: list[int], resize: int) -> Iterator[tuple[str, bytes]]:
    """Extension and content of each picture, in order; an empty extension and the reason where it cannot be read."""

    def encode(index: int) -> tuple[str, bytes]:
        try:
            content = pictures.read(index)
            pixels = decode(content, "RGB", pictures.name(index))
        except DataError as error:
            return "", str(error).encode()
        if not 0 < resize < min(pixels.shape[:2]):
            with Image.open(BytesIO(content)) as image:
                kind = image.format or ""
            return _ENDS.get(kind, kind.lower()), content
        height, width = (round(length * resize / min(pixels.shape[:2])) for length in pixels.shape[:2])
        buffer = BytesIO()
        resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        resized.save(buffer, "JPEG", quality=QUALITY)
        return "jpg", buffer.getvalue()

    pool = ThreadPoolExecutor(cores(), thread_name_prefix="isthmus-shards")
    try:
        yield from pool.map(encode, chosen)
    finally:
        pool.shutdown(cancel_futures=True)
