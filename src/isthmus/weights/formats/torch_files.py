"""The three containers that torch has written pickles and storages into: zip (since 1.6), plain (0.1.10) and tar."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from isthmus.weights.formats.archives import tar_members
from isthmus.weights.formats.pickle_globals import Storage, StorageType
from isthmus.weights.formats.pickles import Budget, load
from isthmus.weights.formats.stored import MAX_DIMS, Span, Stored

__all__ = ["read_pickle", "read_tar", "read_zip"]

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001


def read_zip(file: BinaryIO, members: dict[str, Span]) -> Any:
    """What the archive's `data.pkl` stands for, its tensors still in the file."""
    name = next((name for name in members if name.endswith("data.pkl")), None)
    if name is None:
        raise ValueError("an archive of something else than tensors")
    folder, pickled = name.removesuffix("data.pkl"), members[name]
    order = members.get(f"{folder}byteorder")
    if order is not None:
        file.seek(order.start)
        _check_order(file.read(min(order.length, 8)) == b"little")

    def storage(reference: Any) -> Storage:
        _, kind, key, _location, length = reference
        span = members[f"{folder}data/{_key(key)}"]
        return _storage(kind, span, length)

    file.seek(pickled.start)
    return load(file, pickled.path, pickled.start + pickled.length, Budget(pickled.path.stat().st_size), storage)


def read_pickle(file: BinaryIO, path: Path) -> tuple[Any, bool]:
    """What a plain pickle stands for, and whether it is torch's plain container.

    That is three pickles of facts, the content, the storages' keys, and the storages. Where these lie is known only
    at the end, so the content is interpreted twice.
    """
    size = path.stat().st_size
    budget = Budget(size)
    first = load(file, path, size, budget)
    if first != MAGIC:
        return first, False
    if load(file, path, size, budget) != PROTOCOL:
        raise ValueError("an unknown version of torch's format")
    _check_order(load(file, path, size, budget).get("little_endian"))
    start = file.tell()
    sizes: dict[int, int] = {}

    def declared(reference: Any) -> Storage:
        _, kind, key, _location, length, _view = reference
        sizes[_key(key)] = _element_size(kind)
        return _storage(kind, Span(path, 0, size), length)

    load(file, path, size, budget, declared)
    keys = load(file, path, size, budget)
    spans = {_key(key): _next_storage(file, path, size, sizes[_key(key)]) for key in keys}

    def found(reference: Any) -> Storage:
        _, kind, key, _location, length, view = reference
        first = view[1] if view is not None else 0
        return _storage(kind, spans[_key(key)], length, first)

    file.seek(start)
    return load(file, path, size, Budget(size), found), True


def read_tar(file: BinaryIO, path: Path) -> Any:
    """The first container of torch: a tar archive of `storages`, `tensors` and the `pickle` that refers to them."""
    members = dict(tar_members(file, path))
    budget = Budget(path.stat().st_size)

    def pickled(end: int, persistent: Callable[[Any], Any] | None = None) -> Any:
        return load(file, path, end, budget, persistent)

    span = members["storages"]
    end = span.start + span.length
    file.seek(span.start)
    storages: dict[Any, Storage] = {}
    for _ in range(_count(pickled(end))):
        key, _location, kind = pickled(end)
        storages[_key(key)] = Storage(_next_storage(file, path, end, _element_size(kind)), kind.dtype)
    for target, root, offset, _length in pickled(end):
        whole = storages[_key(root)]
        storages[_key(target)] = whole._replace(first=whole.first + _count(offset))

    span = members["tensors"]
    end = span.start + span.length
    file.seek(span.start)
    tensors: dict[Any, Any] = dict(storages)
    for _ in range(_count(pickled(end))):
        key, storage, _type = pickled(end)
        (dims,) = struct.unpack("<i4x", file.read(8))
        if not 0 <= dims <= MAX_DIMS:
            raise ValueError(f"a tensor of {dims} dimensions")
        *numbers, offset = struct.unpack(f"<{2 * dims + 1}q", file.read(8 * (2 * dims + 1)))
        whole = storages[_key(storage)]
        tensors[_key(key)] = Stored(
            span=whole.span,
            dtype=whole.dtype,
            shape=tuple(numbers[:dims]),
            stride=tuple(numbers[dims:]),
            offset=whole.first + offset,
        )

    span = members["pickle"]
    file.seek(span.start)
    return pickled(span.start + span.length, lambda reference: tensors[_key(reference)])


def _next_storage(file: BinaryIO, path: Path, end: int, element_size: int) -> Span:
    """The storage at the position of `file`: the number of its elements, and they; the file is left behind it."""
    (length,) = struct.unpack("<q", file.read(8))
    start = file.tell()
    if not 0 <= length * element_size <= end - start:
        raise ValueError(f"a storage of {length} elements, and {end - start} bytes left")
    file.seek(start + length * element_size)
    return Span(path, start, length * element_size)


def _storage(kind: Any, span: Span, length: Any, first: Any = 0) -> Storage:
    """A storage that is as long as the pickle says; raises ValueError where the file has fewer bytes."""
    if _count(length) * _element_size(kind) > span.length:
        raise ValueError(f"a storage of {length} elements in {span.length} bytes")
    return Storage(span, kind.dtype, _count(first))


def _element_size(kind: Any) -> int:
    if not isinstance(kind, StorageType):
        raise TypeError("a storage without a type")
    return kind.dtype.itemsize


def _count(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 1 << 62:
        raise ValueError("a count that is none")
    return number


def _key(key: Any) -> int:
    """A storage's key, which torch writes as a number or as its digits."""
    if not isinstance(key, int | str):
        raise TypeError("a storage's key that is no number")
    return int(key)


def _check_order(little: Any) -> None:
    if not little:
        raise ValueError("numbers in big-endian order, which this machine does not have")
