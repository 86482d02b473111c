"""HDF5 files as trees of groups, attributes and datasets, read without the HDF5 library and without their data.

The library can loop for ever on a damaged file, and nothing can interrupt it; a few bit flips in a small Keras file
are enough. What Keras writes is a small part of the format, and this is it: the first generation's groups, attributes
of text, contiguous datasets of numbers. The rest (links to other places, chunks, filters, virtual datasets, and the
groups of HDF5 1.8 and later, which h5py writes where it is asked to) is refused.
Layout and names of the structures: the HDF5 File Format Specification, version 3.0, The HDF Group.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import BinaryIO

import torch

from isthmus.weights.formats.stored import Span, Stored

__all__ = ["SIGNATURE", "Group", "read_tree"]

SIGNATURE = b"\x89HDF\r\n\x1a\n"
NOWHERE = (1 << 64) - 1  # the undefined address
MAX_DEPTH = 32  # groups in groups
READS = 4  # how many times the file's size may be read in structures, which ends every cycle
MEMORY = 50 << 20  # bytes that groups and texts may take; those of a network with 1,000 layers take one
OBJECT, TEXT = 500, 100  # bytes of memory for an empty one, roughly

MESSAGE = struct.Struct("<HHB3x")  # of an object header: its kind, the length of its content, flags
# Kinds of header messages.
DATASPACE, DATATYPE, EXTERNAL_FILES, LAYOUT = 0x01, 0x03, 0x07, 0x08
ATTRIBUTE, CONTINUATION, SYMBOL_TABLE = 0x0C, 0x10, 0x11
LATER = (0x02, 0x06, 0x15)  # how later generations keep links and attributes
NEWER = "a link to another file, or structures newer than those of Keras; load the weights there and save them again"

FLOATS = {(2, 5): torch.float16, (2, 8): torch.bfloat16, (4, 8): torch.float32, (8, 11): torch.float64}
"""By bytes and bits of the exponent."""
INTEGERS = {
    (1, True): torch.int8, (2, True): torch.int16, (4, True): torch.int32, (8, True): torch.int64,
    (1, False): torch.uint8, (2, False): torch.uint16, (4, False): torch.uint32, (8, False): torch.uint64,
}  # fmt: skip
"""By bytes and sign."""


@dataclass(slots=True)
class Group:
    """A group: what it holds by name, and its attributes of text, each a list."""

    attributes: dict[str, list[str]] = field(default_factory=dict)
    members: "dict[str, Group | Stored]" = field(default_factory=dict)

    def at(self, path: str) -> "Group | Stored":
        """What lies under a path of names with slashes between; raises ValueError where there is nothing."""
        found: Group | Stored = self
        for name in path.strip("/").split("/"):
            if not isinstance(found, Group) or name not in found.members:
                raise ValueError(f"nothing under {path[:80]!r}")
            found = found.members[name]
        return found


def read_tree(file: BinaryIO, within: Span) -> Group:
    """The root group of an HDF5 file that takes the bytes `within`, with all below it; data stays where it is.

    Raises ValueError for what is damaged, and for what no Keras weight file has.
    """
    return _Reader(file, within).root()


@dataclass(frozen=True, slots=True)
class _Type:
    """A datatype: of numbers (`number`), or of text of `size` bytes, `far` where the text is in the global heap."""

    size: int
    number: torch.dtype | None = None
    text: bool = False
    far: bool = False


class _Reader:
    def __init__(self, file: BinaryIO, within: Span) -> None:
        self.file, self.within = file, within
        self.left = READS * within.length + (1 << 16)
        self.memory = MEMORY
        self.heaps: dict[int, dict[int, bytes]] = {}

    def at(self, address: int, length: int) -> bytes:
        """Bytes of the file; raises ValueError outside it, and when structures are read over and over."""
        if address < 0 or length < 0 or address + length > self.within.length:
            raise ValueError(f"{length} bytes at {address}, beyond the end")
        self.left -= length + 16
        if self.left < 0:
            raise ValueError("structures that go round in circles")
        self.file.seek(self.within.start + address)
        return self.file.read(length)

    def spend(self, memory: int) -> None:
        """Count what is kept: a small file can declare a million objects in one place."""
        self.memory -= memory
        if self.memory < 0:
            raise ValueError("more groups and names than weights need")

    def signed(self, address: int, length: int, signature: bytes) -> bytes:
        """As `at`, for a structure that begins with its signature."""
        content = self.at(address, length)
        if content[:4] != signature:
            raise ValueError(f"no {signature.decode()} at {address}")
        return content

    # Groups and datasets

    def root(self) -> Group:
        version = self.at(0, 9)[8]
        if version not in (0, 1):
            raise ValueError(NEWER)
        sizes = self.at(13, 2)
        base, _, end, _, _, root = struct.unpack("<6Q", self.at(24 if version == 0 else 28, 48))
        if sizes != b"\x08\x08" or base != 0:
            raise ValueError("an HDF5 file with other addresses than of 64 bits from its beginning on")
        if end > self.within.length:
            raise ValueError(f"{end - self.within.length} bytes are missing")
        found = self.object(root, 0)
        if not isinstance(found, Group):
            raise TypeError("a root that is no group")
        return found

    def object(self, address: int, depth: int) -> Group | Stored:
        """The group or dataset whose header is at `address`."""
        if depth > MAX_DEPTH:
            raise ValueError(f"groups in groups, {MAX_DEPTH} deep")
        self.spend(OBJECT)
        found: dict[int, list[bytes]] = {}
        for kind, content in self.messages(address):
            found.setdefault(kind, []).append(content)
        attributes = dict(self.attributes(found))
        if LAYOUT in found:
            return self.dataset(found, attributes)
        group = Group(attributes)
        for name, target in self.links(found):
            if name in group.members:
                raise ValueError(f"{name[:80]!r} twice in one group")
            group.members[name] = self.object(target, depth + 1)
        return group

    def dataset(self, found: Mapping[int, list[bytes]], attributes: Mapping[str, list[str]]) -> Stored:
        shape = _shape(found[DATASPACE][0])
        dtype = _datatype(found[DATATYPE][0])
        layout = found[LAYOUT][0]
        if EXTERNAL_FILES in found:
            raise ValueError("a dataset in another file")
        if layout[0] not in (3, 4) or layout[1] != 1:
            kind = {0: "compact", 2: "chunked", 3: "virtual"}.get(layout[1], "unknown") if layout[0] > 2 else "old"
            raise ValueError(f"a dataset of {kind} layout; `h5repack -f NONE -l CONTI` makes it a plain one")
        address, length = struct.unpack_from("<QQ", layout, 2)
        number = torch.bfloat16 if attributes.get("dtype") == ["bfloat16"] and dtype.size == 2 else dtype.number
        if number is None or shape is None:
            raise ValueError("a dataset that holds no numbers")
        if address == NOWHERE:
            address = length = 0
        if address + length > self.within.length:
            raise ValueError(f"a dataset of {length} bytes at {address}, beyond the end")
        span = Span(self.within.path, self.within.start + address, length)
        return Stored(span=span, dtype=number, shape=shape)

    # Object headers

    def messages(self, address: int) -> Iterator[tuple[int, bytes]]:
        """Number and content of every message of an object header."""
        start = self.at(address, 16)
        if start[0] != 1:
            raise ValueError(NEWER if start[:4] == b"OHDR" else f"no object header at {address}")
        blocks = [(address + 16, int.from_bytes(start[8:12], "little"))]
        for begin, length in blocks:  # which grows while it is walked
            block, position = self.at(begin, length), 0
            while position + MESSAGE.size <= length:
                kind, size, flags = MESSAGE.unpack_from(block, position)
                position += MESSAGE.size
                content = block[position : position + size]
                if len(content) < size:
                    raise ValueError("a header message without its end")
                position += size
                if kind == CONTINUATION:
                    blocks.append(struct.unpack_from("<QQ", content))
                elif kind in LATER:
                    raise ValueError(NEWER)
                elif kind:
                    if flags & 2:
                        raise ValueError("a message shared with another object")
                    yield kind, content

    def links(self, found: Mapping[int, list[bytes]]) -> Iterator[tuple[str, int]]:
        """Name and header address of every member of a group."""
        for content in found.get(SYMBOL_TABLE, []):
            tree, heap = struct.unpack_from("<QQ", content)
            header = self.signed(heap, 32, b"HEAP")
            size, _, start = struct.unpack_from("<QQQ", header, 8)
            yield from self.symbols(tree, self.at(start, size), None)

    def symbols(self, address: int, names: bytes, level: int | None) -> Iterator[tuple[str, int]]:
        """Name and header address of every entry of an old group's B-tree."""
        header = self.signed(address, 24, b"TREE")
        kind, found, count = struct.unpack_from("<BBH", header, 4)
        if kind != 0 or level not in (None, found):
            raise ValueError("a B-tree that is no group")
        children = struct.unpack(f"<{2 * count}Q", self.at(address + 24, 16 * count))[1::2]
        for child in children:
            if found:
                yield from self.symbols(child, names, found - 1)
                continue
            (entries,) = struct.unpack_from("<6xH", self.signed(child, 8, b"SNOD"))
            table = self.at(child + 8, 40 * entries)
            for position in range(0, len(table), 40):
                name, target, cache = struct.unpack_from("<QQI", table, position)
                if cache == 2 or target == NOWHERE:
                    raise ValueError("a link to another place")
                yield names[name : names.index(b"\0", name)].decode(), target

    # Attributes

    def attributes(self, found: Mapping[int, list[bytes]]) -> Iterator[tuple[str, list[str]]]:
        """Name and texts of every attribute of text."""
        for content in found.get(ATTRIBUTE, []):
            version, flags, *sizes = struct.unpack_from("<BB3H", content)
            if version not in (1, 2, 3) or (version > 1 and flags):
                raise ValueError("an attribute of a kind that Keras does not write")
            position, parts = 8 + (version == 3), []
            for size in sizes:
                parts.append(content[position : position + size])
                position += -(-size // 8) * 8 if version == 1 else size
            kind, shape = _datatype(parts[1]), _shape(parts[2])
            if kind.text and shape is not None:
                yield parts[0].rstrip(b"\0").decode(), self.texts(content[position:], kind, prod(shape))

    def texts(self, content: bytes, kind: _Type, count: int) -> list[str]:
        if kind.size < 1 or count * kind.size > len(content):
            raise ValueError("an attribute without its end")
        self.spend(TEXT * count + 4 * len(content))
        pieces = [content[start : start + kind.size] for start in range(0, count * kind.size, kind.size)]
        if kind.far:
            pieces = [self.global_object(*struct.unpack("<IQI", piece)) for piece in pieces]
        return [piece.split(b"\0")[0].decode() for piece in pieces]

    def global_object(self, length: int, address: int, index: int) -> bytes:
        """A text of variable length, which lies in a global heap."""
        if not length:
            return b""
        if address not in self.heaps:
            (size,) = struct.unpack_from("<8xQ", self.signed(address, 16, b"GCOL"))
            collection, position = self.at(address, size), 16
            objects: dict[int, bytes] = {}
            while position + 16 <= size:
                number, extent = struct.unpack_from("<H6xQ", collection, position)
                if number == 0:
                    break
                objects[number] = collection[position + 16 : position + 16 + extent]
                position += 16 + -(-extent // 8) * 8
            self.heaps[address] = objects
        found = self.heaps[address][index]
        self.spend(4 * length)
        if len(found) < length:
            raise ValueError("a text without its end")
        return found[:length]


def _shape(content: bytes) -> tuple[int, ...] | None:
    """The sizes of a dataspace; None for one that holds nothing."""
    version, rank = content[0], content[1]
    if version not in (1, 2) or rank > 32:
        raise ValueError("an impossible dataspace")
    if version == 2 and content[3] == 2:
        return None
    return struct.unpack_from(f"<{rank}Q", content, 8 if version == 1 else 4)


def _datatype(content: bytes) -> _Type:
    kind, bits = content[0] & 15, content[1]
    (size,) = struct.unpack_from("<I", content, 4)
    if kind == 0 and not bits & 1:
        return _Type(size, INTEGERS.get((size, bool(bits & 8))))
    if kind == 1 and not bits & 1:
        return _Type(size, FLOATS.get((size, content[13])))
    return _Type(size, text=kind == 3 or (kind == 9 and bits & 15 == 1), far=kind == 9)
