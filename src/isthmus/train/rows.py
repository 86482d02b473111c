"""Rows of equal size in one file that outlives the run: written by any process, in any order, killed at any moment."""

import errno
import os
import weakref
import zlib
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from isthmus.cache import budget, make_room
from isthmus.train.reporter import Reporter

__all__ = ["Rows"]

PAGE = 4096


class Rows:
    """`count` rows of `width` bytes in the file `path`, as many of them as the cache's budget holds.

    Before the rows lies a CRC-32 of each, 0 where there is none. A row counts when its sum is right: one that was
    torn when the machine went down, or damaged since, is absent and will be written again. Processes may share the
    file, as long as they write the same bytes into the same row. Without a path none are kept.
    """

    def __init__(self, path: Path | None, count: int, width: int, what: str, reporter: Reporter) -> None:
        self.path, self.width, self.reporter = path, width, reporter
        self.start = -(-4 * count // PAGE) * PAGE
        self.held = 0  # rows from here on have no place in the file
        self.known = np.zeros(count, bool)  # read and found whole, or written by this process
        if path is None:
            return
        self.held = min(count, max(0, (budget() - self.start) // width))
        try:
            self._open(path, count)
        except OSError as error:
            self._give_up(error)
        else:
            if self.held < count:
                reporter.say(
                    f"{what} take {(self.start + count * width) / 1e9:.2g} GB, and the cache has room for "
                    f"{self.held / count:.0%} of it; the rest is computed each time; $ISTHMUS_CACHE_GB gives more room"
                )

    def _open(self, path: Path, count: int) -> None:
        found = path.stat().st_size if path.is_file() else 0
        self.held = max(self.held, min(count, (found - self.start) // self.width))
        if not self.held:
            return
        size = self.start + self.held * self.width
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(".lock")):  # or another process shrinks it again, or removes it meanwhile
            path.touch()  # used just now, so others go first when room is made
            if (found := path.stat().st_size) < size:
                make_room(size - found)
                os.truncate(path, size)
            self.file = path.open("r+b", buffering=0)
        weakref.finalize(self, self.file.close)
        self.sums = np.memmap(self.file, np.uint32, "r", shape=(count,))
        self.rows = np.memmap(self.file, np.uint8, "r", offset=self.start, shape=(self.held, self.width))

    def _give_up(self, error: OSError) -> None:
        self.held = 0
        self.reporter.say(
            f"what was computed is not kept for next time ({self.path}: {error.strerror or error}); $ISTHMUS_CACHE "
            f"names another place"
        )

    def have(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these rows are there, whole."""
        for row in rows[~self.known[rows] & (rows < self.held)]:
            if self.sums[row]:
                self.known[row] = checksum(self.rows[row]) == self.sums[row]
        return self.known[rows]

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Rows that are there: (N, width)."""
        found: NDArray[np.uint8] = self.rows[rows]
        return found

    def write(self, row: int, values: NDArray[np.uint8]) -> None:
        """Keep a row (width,); one that has no place is left out, and a disk that will not take it is reported once.

        Raises ValueError for a row of another width, which would run into the next.
        """
        if len(values) != self.width:
            raise ValueError(f"a row of {len(values)} bytes among rows of {self.width}")
        if row >= self.held:
            return
        try:
            self._put(self.start + row * self.width, values.tobytes())
            self._put(4 * row, np.uint32(checksum(values)).tobytes())
        except OSError as error:
            self._give_up(error)
        else:
            self.known[row] = True

    def _put(self, start: int, data: bytes) -> None:
        # Not through the map: there a full disk ends the process, here it is an error.
        self.file.seek(start)
        if self.file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def checksum(values: NDArray[np.uint8]) -> int:
    """CRC-32, with 1 for 0, which means absent."""
    return zlib.crc32(values.data) or 1
