"""Pictures decoded and made smaller once: training cuts its crops from files of plain pixels in the cache folder."""

import hashlib
import json
import math
import os
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from isthmus.arch.preprocess import Preprocess
from isthmus.cache import budget, cache_folder, make_room
from isthmus.data.decode import Pixels, decode
from isthmus.data.pictures import Pictures
from isthmus.data.transform import resample
from isthmus.errors import RunError

__all__ = ["Resized"]

_HEADER = struct.Struct("<8sQIIII")  # mark, index of the picture, height, width, channels, nothing; the pixels follow
_MARK = b"pixels01"
_GRANT = 2**26  # bytes to ask room for at a time


class _Place(NamedTuple):
    """Where the pixels of a kept picture lie."""

    file: "np.memmap[Any, np.dtype[np.uint8]]"
    offset: int
    shape: tuple[int, int, int]


class Resized:
    """The pictures of a set with the shorter side at most `side` pixels, each kept when it is first asked for.

    `pixels` gives the same whether a picture is kept or not, so a run does not depend on the cache; but it differs
    from one without, as the crops come from smaller pictures: a small crop is enlarged that had detail before.

    Files are keyed by all pictures of the set, `side`, channels and filter; the one of each `rank` only grows, by the
    process that holds its lock. A record that was cut off counts as none. Where the budget or the disk ends, the rest
    is decoded each time, and `full` says why.
    """

    def __init__(self, pictures: Pictures, side: int, record: Preprocess, *, rank: int = 0) -> None:
        self.pictures, self.side, self.record = pictures, side, record
        described = [_MARK.decode(), side, record.channels == "L", record.interpolation]
        digest = hashlib.sha256(json.dumps(described).encode())
        for index in range(len(pictures)):
            digest.update(json.dumps(pictures.identity(index)).encode())
        self.key = digest.hexdigest()[:32]
        self.out = cache_folder("pictures") / f"{self.key}.{rank}"
        self.full = ""
        self._lock = FileLock(self.out.with_name(f".{self.out.name}.lock"), thread_local=False)
        self._places: dict[int, _Place] = {}
        self._read_until: dict[Path, int] = {}
        self._writing, self._granted = threading.Lock(), 0
        self._written: set[int] = set()  # here; a picture may come again before `refresh`
        self.refresh()

    @property
    def kept(self) -> int:
        """Pictures that `refresh` found kept."""
        return len(self._places)

    def refresh(self) -> None:
        """Look at what was kept since the last time, here and by other ranks."""
        for path in sorted(self.out.parent.glob(f"{self.key}.*")):
            with suppress(FileNotFoundError):  # another process made room
                start, size = self._read_until.get(path, 0), path.stat().st_size
                if size > start:
                    os.utime(path)  # the cache drops first what was used longest ago
                    self._read_until[path] = self._take_up(path, start, size)

    def _take_up(self, path: Path, start: int, size: int) -> int:
        """Note the whole records of a file from `start` on; gives where they end."""
        mapped = np.memmap(path, np.uint8, mode="c")  # nobody writes to it; torch asks that one could
        while start + _HEADER.size <= size:
            mark, index, height, width, channels, _ = _HEADER.unpack(mapped[start : start + _HEADER.size].tobytes())
            stop = start + _HEADER.size + height * width * channels
            if mark != _MARK or stop > size:
                break
            self._places.setdefault(index, _Place(mapped, start + _HEADER.size, (height, width, channels)))
            start = stop
        return start

    def pixels(self, index: int) -> Pixels:
        """The resized picture (H, W, C); raises DataError when it has to be decoded and cannot be."""
        if (place := self._places.get(index)) is not None:
            stop = place.offset + math.prod(place.shape)
            return place.file[place.offset : stop].view(np.ndarray).reshape(place.shape)
        whole = decode(self.pictures.read(index), self.record.channels, self.pictures.name(index))
        height, width, _ = whole.shape
        part = self.side / min(height, width)
        if part < 1:
            size = max(round(height * part), 1), max(round(width * part), 1)
            whole = resample(whole, (0, 0, width, height), size, self.record.interpolation)
        with self._writing:
            if not self.full and index not in self._written:
                self._keep(index, whole)
        return whole

    def _keep(self, index: int, pixels: Pixels) -> None:
        record = _HEADER.pack(_MARK, index, *pixels.shape, 0) + pixels.tobytes()
        try:
            if not self._lock.is_locked:
                self._open()
            if self._granted < len(record):
                self._ask()
            if self.full:
                return
            with self.out.open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(record) < len(record):
                    file.truncate(end)
                    self.full = "the disk is full"
            self._granted -= len(record)
            self._written.add(index)
        except (OSError, RunError) as error:
            self.full = f"{self.out.parent}: {error}"

    def _open(self) -> None:
        """Become the one that writes, behind the last whole record."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            self.full = "another process keeps the same pictures"
            return
        self.refresh()
        if self.out.exists():
            os.truncate(self.out, self._read_until.get(self.out, 0))

    def _ask(self) -> None:
        """Have room made, unless this set alone would outgrow the budget and push itself out."""
        mine = sum(path.stat().st_size for path in self.out.parent.glob(f"{self.key}.*"))
        if mine + _GRANT > budget() or not make_room(_GRANT):
            self.full = f"the cache may take {budget():,} bytes; ISTHMUS_CACHE_GB raises it"
        self._granted = _GRANT
