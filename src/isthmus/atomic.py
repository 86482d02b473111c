"""Files that are there whole or not at all."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path

from isthmus.errors import RunError

__all__ = ["atomic_write"]


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, bring it to the disk, and put it in its place in one step.

    Whatever goes wrong, `path` stays as it was and the temporary file is removed. Raises RunError naming the file and
    the reason when `write` or the disk raises OSError: a full disk, a missing folder, no permission.
    """
    # In the same folder, because a rename is one step on one file system only.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        try:
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            write(temporary)
            temporary.chmod(mode)  # some writers make files that nobody else can read
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error


def _sync_folder(folder: Path) -> None:
    """Bring the rename itself to the disk, where folders can be opened (not on Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
