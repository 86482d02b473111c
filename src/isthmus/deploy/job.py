"""A long job in parts: what is done is on the disk, and is not done again."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from isthmus.atomic import atomic_write
from isthmus.deploy.answers import file_of
from isthmus.errors import RunError

__all__ = ["Job"]

ABOUT = "job.json"


class Job:
    """A table file in the making: beside it, until it is whole, lies the folder FILE.parts with parts of it.

    `about` says what decides the rows; a folder that was begun for other rows is refused.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.file, self.parts = out, file_of(out), 0
        self.folder = out.with_name(f"{out.name}.parts")

    @contextmanager
    def claimed(self, say: Callable[[str], object]) -> Iterator[None]:
        """A context in which no other command works on the job; raises RunError for a folder that cannot be made.

        The system gives the lock back when its process ends, however it ends.
        """
        lock = FileLock(self.folder / ".lock")
        try:
            self.folder.mkdir(exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RunError(f"another command writes {self.out} now; wait for it, or choose another --out") from error
        except NotImplementedError:
            say(f"the file system of {self.out} has no locks: let no other command write it")
        except OSError as error:
            raise RunError(f"cannot make {self.folder}: {error.strerror}; choose another --out") from error
        try:
            yield
        finally:
            if not (self.folder / ABOUT).exists():  # nothing was begun, or all is done
                shutil.rmtree(self.folder, ignore_errors=True)
            lock.release()

    @property
    def kept(self) -> Mapping[str, Any]:
        """What an earlier command began; empty where there was none."""
        try:
            found = json.loads((self.folder / ABOUT).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RunError(f"{self.folder / ABOUT} cannot be read ({error}); remove {self.folder}") from error
        return found if isinstance(found, dict) else {}

    def begin(self, about: Mapping[str, Any], parts: int) -> None:
        """Say what decides the rows, and how many parts there are; raises RunError where parts of other rows lie."""
        kept, self.parts = self.kept, parts
        if other := [name for name in about if kept and kept.get(name) != about[name]]:
            raise RunError(
                f"{self.folder} holds parts of another job ({', '.join(other)} differ); give what that was begun with, "
                f"remove the folder, or choose another --out"
            )
        if not kept:  # parts without it are what an interrupted removal left
            for number in range(self.parts):
                self.part(number).unlink(missing_ok=True)
        self.write(self.folder / ABOUT, json.dumps(about, indent=2).encode())

    def missing(self) -> list[int]:
        """The numbers of the parts that are still to be done."""
        return [number for number in range(self.parts) if not self.part(number).exists()]

    def part(self, number: int) -> Path:
        """The file of a part."""
        return self.folder / f"{number:08d}{self.out.suffix}"

    def keep(self, number: int, content: bytes) -> None:
        """A part that is done."""
        self.write(self.part(number), content)

    def finish(self) -> None:
        """The whole file, in one step, and no parts any more."""
        parts = [self.part(number) for number in range(self.parts)]
        atomic_write(self.out, lambda temporary: self.file.join(parts, temporary))
        (self.folder / ABOUT).unlink()  # without which parts count for nothing

    def write(self, path: Path, content: bytes) -> None:
        """Write in one step."""
        atomic_write(path, lambda temporary: temporary.write_bytes(content))
