"""Pictures in tar shards (WebDataset's format), on this machine or at any address that fsspec knows.

Local shards are read picture by picture, at the place that the index says. Of remote ones whole shards are brought into
the cache folder, ahead of their use, because a request a picture would wait on the network thousands of times (with
20 ms an answer and 100 kB a picture: 16 threads 330 pictures/s, whole shards 1,800).
"""

import errno
import hashlib
import json
import os
import posixpath
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.cache import budget, cache_folder, make_room
from isthmus.data.pictures import Identity, Names, Pictures, Store, stamp
from isthmus.data.shard_index import CLASS_FILES, INDEX, Index, load_index, save_index, scan, scanned
from isthmus.errors import DataError, IsthmusError
from isthmus.messages import first_line, listed

__all__ = ["Shards", "expand_braces", "open_shards"]

WAITS = (0.0, 0.5, 2.0, 8.0, 30.0)  # seconds before each try to bring a file
SILENCE = 60.0  # seconds without a byte after which a try has failed
GIVEN_UP = 60.0  # seconds in which a file that could not be brought is not asked for again
AT_ONCE = 4  # shards that are brought or scanned side by side
_slots = threading.Semaphore(AT_ONCE)
_coming: set[Path] = set()
_failed: dict[Path, tuple[float, DataError]] = {}  # when and how


@dataclass(frozen=True, kw_only=True, slots=True)
class Shards(Store):
    """The pictures of an index, in shards named from the folder or address `root`.

    Two are equal when root, shards and their sizes are. A shard that is missing, or has another size than the index
    says, makes each of its pictures raise DataError naming it.
    """

    root: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    ends: NDArray[np.int64] = field(compare=False)
    members: Names = field(compare=False)
    offsets: NDArray[np.int64] = field(compare=False)
    lengths: NDArray[np.int64] = field(compare=False)

    def __len__(self) -> int:
        return len(self.members)

    def shards_of(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of the shard that each place is in."""
        return np.searchsorted(self.ends, places, side="right")

    def name(self, place: int) -> str:
        return f"{self._address(self._shard(place))}/{self.members[place]}"

    def identity(self, place: int) -> Identity:
        shard = self._shard(place)
        _, changed = (0, 0) if self.is_remote else stamp(self._address(shard))
        return self.name(place), self.sizes[shard], changed, int(self.offsets[place]), int(self.lengths[place])

    def read(self, place: int) -> bytes:
        shard = self._shard(place)
        try:
            with self._open(shard) as file:
                if (size := os.fstat(file.fileno()).st_size) != self.sizes[shard]:
                    raise DataError(
                        f"{self._address(shard)} has {size:,} bytes and its index says {self.sizes[shard]:,}; copy it "
                        f"again"
                    )
                file.seek(int(self.offsets[place]))
                return file.read(int(self.lengths[place]))
        except OSError as error:
            raise DataError(
                f"{self._address(shard)} cannot be read: {error.strerror or error}; is the data complete?"
            ) from error

    def clusters(self, places: NDArray[np.int64]) -> NDArray[np.int64] | None:
        return self.shards_of(places) if self.is_remote else None

    def expect(self, places: NDArray[np.int64]) -> None:
        if self.is_remote:
            for shard in np.unique(self.shards_of(places)).tolist():
                _bring_soon(self._address(shard), self.sizes[shard])

    @property
    def is_remote(self) -> bool:
        """Whether the shards are not files of this machine."""
        return "://" in self.root

    def _shard(self, place: int) -> int:
        return int(np.searchsorted(self.ends, place, side="right"))

    def _address(self, shard: int) -> str:
        return f"{self.root}/{self.names[shard]}"

    def _open(self, shard: int) -> FileIO:
        address = self._address(shard)
        if not self.is_remote:
            return open(address, "rb", buffering=0)  # noqa: PTH123 - the caller closes it
        while True:
            with suppress(FileNotFoundError):  # room was made in between
                return _brought(address, self.sizes[shard]).open("rb", buffering=0)


def open_shards(ref: str, *, labelled: bool = True) -> Pictures:
    """The pictures of shards: a folder or address with an index or with .tar files, or the names of these.

    Names may hold {000..123}, {a,b}, * and ?. Without an index beside them all headers are read once, and the index is
    kept in the cache folder. Classes are named by classes.txt or classes.json beside the shards, by the labels
    themselves, or else by their numbers; without `labelled` they have one. Raises DataError saying which shard is
    damaged, missing or unlabelled.
    """
    with _understood(ref):
        system, path = _system(ref)
        local = "file" in np.atleast_1d(system.protocol)
        path = path.rstrip("/")
        is_folder = not path.endswith(".tar")
        index_path = f"{path}/{INDEX}"
        has_index = is_folder and system.exists(index_path)
        patterns = [f"{path}/*.tar", f"{path}/*/*.tar"] if is_folder else expand_braces(path)
        found = [] if has_index and not local else _matching(system, patterns)
        address = (lambda path: path) if local else system.unstrip_protocol
    if has_index:
        return _indexed(address(path), address(index_path), found if local else None)
    if not found:
        raise DataError(
            f"{ref} names no .tar shards; where files cannot be listed, name them: .../train-{{000..123}}.tar"
        )
    return _unindexed(system, found, address, local=local, labelled=labelled)


def _indexed(root: str, path: str, found: Sequence[str] | None) -> Pictures:
    """The pictures of an index, which must know every shard that lies beside it."""
    index = load_index(Path(path) if found is not None else _brought(path, None), path)
    names = [name[len(root) + 1 :] for name in found or ()]
    if extra := sorted(set(names) - set(index.names)):
        raise DataError(
            f"{root}: {listed(extra)} is not in {path}; remove it, or write the shards and their index anew"
        )
    return _pictures(root, index)


def _unindexed(
    system: Any, found: Sequence[str], address: Callable[[str], str], *, local: bool, labelled: bool
) -> Pictures:
    """The pictures that the headers tell of; what was read is kept, and read again when a shard changes."""
    common = os.path.commonprefix(found) if len(found) > 1 else found[0]  # noqa: RUF071 - of addresses too
    root = posixpath.dirname(common).rstrip("/")
    names = [path[len(root) + 1 :] for path in found]
    with _understood(address(root)):
        sizes = list(system.sizes(list(found)))
        if None in sizes:
            raise DataError(f"{address(found[sizes.index(None)])}: the server does not say how many bytes it has")
        changed = [os.stat(path).st_mtime_ns for path in found] if local else []  # noqa: PTH116
        named = next((name for name in CLASS_FILES if labelled and system.exists(f"{root}/{name}")), None)
        listing = system.cat_file(f"{root}/{named}") if named else b""
    classes = _class_names(listing, f"{address(root)}/{named}")
    key = json.dumps([address(root), names, sizes, changed, classes, labelled])
    path = cache_folder("shards") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.index"
    with _kept(path):
        if not path.exists():

            def samples(place: int) -> Any:
                shard = address(found[place])
                return scan(Path(shard) if local else _brought(shard, sizes[place]), shard, labelled=labelled)

            with ThreadPoolExecutor(AT_ONCE) as pool:
                shards = list(pool.map(samples, range(len(found))))
            save_index(path, scanned(names, shards, sizes, classes))
    os.utime(path)
    return _pictures(address(root), load_index(path, str(path)))


def _pictures(root: str, index: Index) -> Pictures:
    store = Shards(
        root=root,
        names=index.names,
        sizes=tuple(index.sizes.tolist()),
        ends=index.ends,
        members=index.members,
        offsets=index.offsets,
        lengths=index.lengths,
    )
    return Pictures.stored(store, index.labels, index.classes)


def _class_names(content: bytes, shown: str) -> tuple[str, ...]:
    try:
        text = content.decode("utf-8-sig")
        names = json.loads(text) if shown.endswith(".json") else text.splitlines()
    except ValueError as error:
        raise DataError(f"{shown} cannot be read: {first_line(error)}; list the names of the classes in it") from error
    if not (isinstance(names, list) and all(isinstance(name, str) and name for name in names)):
        raise DataError(f"{shown} must be a list of the names of the classes, none of them empty")
    if len(set(names)) < len(names):
        raise DataError(f"{shown} names a class twice; make the names different")
    return tuple(names)


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern with {000..123} and {a,b} stands for, as a shell expands them."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        first, last = numbers.groups()
        padded = any(len(number) > 1 and number.startswith("0") for number in (first, last))
        width = max(len(first), len(last)) if padded else 0
        step = 1 if int(first) <= int(last) else -1
        inside = [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    elif "," in match[1]:
        inside = match[1].split(",")
    else:
        raise DataError(f"{pattern}: {match[0]} is no pattern; write {{000..123}} or {{a,b}}")
    return [
        name for each in inside for name in expand_braces(f"{pattern[: match.start()]}{each}{pattern[match.end() :]}")
    ]


def _matching(system: Any, patterns: Sequence[str]) -> list[str]:
    """The files that patterns name, each once; a name without * and ? is taken as it is."""
    found: dict[str, None] = {}
    for pattern in patterns:
        if not re.search(r"[*?]", pattern):
            found[pattern] = None
        else:
            with suppress(FileNotFoundError):  # a web server that lists no files
                found |= dict.fromkeys(sorted(system.glob(pattern)))
    return list(found)


def _system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {}
    if address.startswith(("http://", "https://")):  # whose client gives up large files after five minutes
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}  # proxies are those of the environment
    system, path = url_to_fs(address, **options)
    return system, path


@contextmanager
def _understood(address: str) -> Iterator[None]:
    """What goes wrong at an address, as a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(
            f"{error.filename or error} is not there, or cannot be reached; check the name and the connection"
        ) from error
    except (ImportError, ValueError) as error:  # the library of a protocol is missing, or the protocol is unknown
        raise DataError(f"{address} cannot be opened: {first_line(error)}") from error
    except Exception as error:  # every file system has its own
        raise DataError(f"{address} cannot be reached: {first_line(error)}; check the connection") from error


def _brought(address: str, size: int | None) -> Path:
    """A copy of a remote file in the cache folder; without a size (an index) it is brought anew each time."""
    path = _copy_of(address, size)
    if size is not None and _used(path):
        return path
    with _kept(path):
        if size is None or not _used(path):  # another process may have brought it meanwhile
            if not make_room(size or 0):
                raise DataError(
                    f"{address} has {size:,} bytes and the cache may take {budget():,}; raise ISTHMUS_CACHE_GB"
                )
            when, failure = _failed.get(path, (-GIVEN_UP, None))
            if failure and time.monotonic() - when < GIVEN_UP:  # else each picture of the shard would wait as long
                raise failure
            part = path.with_name(f".{path.name}.part")
            try:
                _download(address, part, size)
            except DataError as error:
                _failed[path] = time.monotonic(), error
                raise
            part.replace(path)
    return path


def _copy_of(address: str, size: int | None) -> Path:
    name = hashlib.sha256(f"{address} {size}".encode()).hexdigest()[:32]
    return cache_folder("shards") / f"{name}{posixpath.splitext(address)[1]}"


@contextmanager
def _kept(path: Path) -> Iterator[None]:
    """One thread of one process makes a file of the cache."""
    from filelock import FileLock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            yield
    except OSError as error:
        raise DataError(
            f"nothing can be kept in {path.parent}: {error.strerror or error}; ISTHMUS_CACHE names another folder"
        ) from error


def _used(path: Path) -> bool:
    """Whether a file is there; notes its use, so that it stays longer."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _download(address: str, part: Path, size: int | None) -> None:
    """Fill a local file; raises DataError with the address when no try succeeds, OSError for a full disk."""
    reason = ""
    for wait in WAITS:
        time.sleep(wait)
        try:
            with _understood(address):
                system, path = _system(address)
            system.get_file(path, str(part))
        except FileNotFoundError as error:
            raise DataError(f"{address} is not there, or cannot be reached; is the data complete?") from error
        except DataError:
            raise
        except Exception as error:  # every file system has its own
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
                raise
            reason = first_line(error)
        else:
            if size is None or (found := part.stat().st_size) == size:
                return
            reason = f"{found:,} of {size:,} bytes came"
    part.unlink(missing_ok=True)
    raise DataError(f"{address} could not be brought in {len(WAITS)} tries: {reason}; check the connection")


def _bring_soon(address: str, size: int) -> None:
    """Begin to bring a shard on a thread of its own; what goes wrong is told to whoever reads it."""
    path = _copy_of(address, size)
    if path in _coming or _used(path):
        return

    def bring() -> None:
        try:
            with _slots, suppress(IsthmusError):
                _brought(address, size)
        finally:
            _coming.discard(path)

    _coming.add(path)
    threading.Thread(target=bring, name="isthmus-shards", daemon=True).start()
