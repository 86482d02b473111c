"""What is kept for next time: one folder, one budget; what was used longest ago goes first."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from isthmus.errors import RunError

__all__ = ["budget", "cache_folder", "make_room"]

SHARE = 4  # the usual budget is the disk's free bytes over this
KEPT = f"*/{'[0-9a-f]' * 32}.*"  # KIND/HASH.END; locks and what is being written are hidden, others' files named freely


def cache_folder(kind: str = "") -> Path:
    """Where things of a kind are kept: below $ISTHMUS_CACHE, or isthmus in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ISTHMUS_CACHE") or Path(base) / "isthmus") / kind


def budget() -> int:
    """Bytes that all caches together may take: $ISTHMUS_CACHE_GB, or a quarter of what is free or taken by them.

    Raises RunError for a number that is none.
    """
    said = os.environ.get("ISTHMUS_CACHE_GB", "")
    try:
        if said:
            return int(float(said) * 1e9)
    except (ValueError, OverflowError) as error:
        raise RunError(f"ISTHMUS_CACHE_GB is {said!r}; it must be a number of gigabytes") from error
    disk = next(folder for folder in (cache_folder(), *cache_folder().absolute().parents) if folder.exists())
    return (shutil.disk_usage(disk).free + sum(size for _, size, _ in _kept())) // SHARE


def make_room(size: int) -> bool:
    """Remove what was used longest ago (by modification time) until `size` more bytes fit the budget.

    False, and nothing removed, where they fit in no case.
    """
    allowed = budget() - size
    if allowed < 0:
        return False
    kept = sorted(_kept())
    taken = sum(bytes_ for _, bytes_, _ in kept)
    for _, bytes_, path in kept:
        if taken <= allowed:
            break
        path.unlink(missing_ok=True)
        taken -= bytes_
    return True


def _kept() -> list[tuple[int, int, Path]]:
    """Time of last use, bytes and path of every file that is ours: the user may have named a folder with others."""
    found = []
    for path in cache_folder().glob(KEPT):
        with suppress(FileNotFoundError):  # another process made room
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    return found
