"""The three containers that torch has written pickles and storages into: zip (since 1.6), plain (0.1.10) and tar."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from isthmus.weights.pickle_globals import ForeignError, Storage, StorageType
from isthmus.weights.pickles import Budget, load
from isthmus.weights.stored import Span, Stored, check_apart

__all__ = ["archive_members", "is_tar", "read_pickle", "read_tar", "read_zip"]

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
TAR_BLOCK = 512
MAX_TAIL = 22 + (1 << 16) + 20  # bytes: the end of a zip archive, its comment, and where the larger kind of end is
MAX_DIRECTORY = 1 << 22  # bytes; an archive of 10,000 tensors has a megabyte
TOO_LARGE = (1 << 32) - 1
CENTRAL_HEADER = struct.Struct("<4s4xHH8xIIHHH8xI")  # flags, method, sizes, lengths of name, extra, comment; place
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, and the lengths of its name and extra field


def archive_members(file: BinaryIO, path: Path) -> dict[str, Span]:
    """The members of a zip archive by name; they must be stored as they are, which torch and Keras do.

    Raises ValueError for members that are compressed, encrypted, twice there, over one another or beyond the file, and
    ForeignError for a program. (The standard library's reader keeps a kilobyte of memory for every member declared.)
    """
    size = path.stat().st_size
    members: dict[str, Span] = {}
    entries = list(_directory(file, size))
    if any(name.endswith("/constants.pkl") for name, *_ in entries):
        raise ForeignError("TorchScript", "a TorchScript program; load it where you trust it, take its state_dict()")
    for name, stored, header, length in entries:
        if not stored:
            raise ValueError(f"the member {name[:80]!r} is compressed or encrypted")
        if name in members:
            raise ValueError(f"the member {name[:80]!r} is there twice")
        file.seek(header)
        signature, *extents = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
        start = header + LOCAL_HEADER.size + sum(extents)
        if signature != b"PK\3\4" or start + length > size:
            raise ValueError(f"the member {name[:80]!r} is not where the archive says")
        members[name] = Span(path, start, length)
    check_apart(members.values())
    return members


def _directory(file: BinaryIO, size: int) -> Iterator[tuple[str, bool, int, int]]:
    """Name, whether stored as it is, place of the header and length of every member, from the archive's end.

    Layout: PKWARE's .ZIP File Format Specification, 4.3.12 to 4.3.16 and 4.5.3.
    """
    begin = max(size - MAX_TAIL, 0)
    file.seek(begin)
    tail = file.read(MAX_TAIL)
    end = tail.rindex(b"PK\5\6")
    extent, start = struct.unpack_from("<12xII", tail, end)
    if tail[end - 20 : end - 16] == b"PK\6\7":  # the larger kind of end, which torch always writes
        (place,) = struct.unpack_from("<8xQ", tail, end - 20)
        file.seek(place)
        signature, extent, start = struct.unpack("<4s36xQQ", file.read(56))
        if signature != b"PK\6\6":
            raise ValueError("an archive without its end")
    if extent > MAX_DIRECTORY or start + extent > size:
        raise ValueError(f"a directory of {extent} bytes at {start}")
    file.seek(start)
    directory, position = file.read(extent), 0
    while position < extent:
        entry = CENTRAL_HEADER.unpack_from(directory, position)
        signature, flags, method, packed, length, name, extra, comment, header = entry
        if signature != b"PK\1\2":
            raise ValueError("a directory that is none")
        position += CENTRAL_HEADER.size
        text = directory[position : position + name].decode()
        fields = directory[position + name : position + name + extra]
        position += name + extra + comment
        length, packed, header = _large((length, packed, header), fields)
        yield text, method == 0 and not flags & 1 and packed == length, header, length


def _large(numbers: tuple[int, ...], extra: bytes) -> Iterator[int]:
    """Sizes and place of a member; those that 32 bits do not hold are in its extra fields, one after the other."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        position += 4
        if kind == 1:
            break
        position += length
    for number in numbers:
        if number == TOO_LARGE:
            yield struct.unpack_from("<Q", extra, position)[0]
            position += 8
        else:
            yield number


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


def is_tar(start: bytes) -> bool:
    """Whether a file that begins so is a tar archive."""
    return start[257:262] == b"ustar"


def read_tar(file: BinaryIO, path: Path) -> Any:
    """The first container of torch: a tar archive of `storages`, `tensors` and the `pickle` that refers to them."""
    members = dict(_tar_members(file, path))
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
        if not 0 <= dims <= TAR_BLOCK:
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


def _tar_members(file: BinaryIO, path: Path) -> Iterator[tuple[str, Span]]:
    """The plain files of a tar archive; the extended headers beside them (times, owners) say nothing about weights."""
    size, start = path.stat().st_size, 0
    while start + TAR_BLOCK <= size:
        file.seek(start)
        header = file.read(TAR_BLOCK)
        if not header.strip(b"\0"):
            return
        length = int(header[124:136].strip(b" \0") or b"0", 8)
        start += TAR_BLOCK
        if length < 0 or start + length > size:
            raise ValueError("a member reaches beyond the archive")
        if header[156:157] in (b"0", b"\0"):
            yield header[:100].rstrip(b"\0").decode(), Span(path, start, length)
        start += -(-length // TAR_BLOCK) * TAR_BLOCK


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
