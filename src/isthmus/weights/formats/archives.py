"""The members of zip and tar archives by name, without reading them and without trust in what the archive declares."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from isthmus.weights.formats.pickle_globals import ForeignError
from isthmus.weights.formats.stored import Span, check_apart

__all__ = ["is_tar", "tar_members", "zip_members"]

TAR_BLOCK = 512
MAX_TAIL = 22 + (1 << 16) + 20  # bytes: the end of a zip archive, its comment, and where the larger kind of end is
MAX_DIRECTORY = 1 << 22  # bytes; an archive of 10,000 tensors has a megabyte
TOO_LARGE = (1 << 32) - 1
CENTRAL_HEADER = struct.Struct("<4s4xHH8xIIHHH8xI")  # flags, method, sizes, lengths of name, extra, comment; place
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, and the lengths of its name and extra field


def zip_members(file: BinaryIO, path: Path) -> dict[str, Span]:
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


def is_tar(start: bytes) -> bool:
    """Whether a file that begins so is a tar archive."""
    return start[257:262] == b"ustar"


def tar_members(file: BinaryIO, path: Path) -> Iterator[tuple[str, Span]]:
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
