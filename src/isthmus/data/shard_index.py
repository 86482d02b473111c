"""Where each picture lies in tar shards (WebDataset's format), read from their headers or from an index."""

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from isthmus.atomic import atomic_write
from isthmus.data.decode import extensions
from isthmus.data.pictures import Names, natural
from isthmus.errors import DataError
from isthmus.messages import first_line

__all__ = ["CLASS_FILES", "INDEX", "Index", "Sample", "load_index", "numbered", "save_index", "scan", "scanned"]

INDEX = "index.safetensors"
CLASS_FILES = ("classes.json", "classes.txt")  # the names of the classes: a list, or one a line
FORMAT = "isthmus shards 1"
ARRAYS = ("sizes", "ends", "offsets", "lengths", "labels")
LABEL_FIELDS = ("label", "cls", "class", "class_name")  # of a sample's .json; the first that is there
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # all up to the first dot of the file name is the sample's key


class Sample(NamedTuple):
    """A picture in a shard: the name of its file there, its place in bytes, its class as a number or a name."""

    member: str
    offset: int
    length: int
    label: int | str


class Index(NamedTuple):
    """N pictures in S shards.

    `names` are the shards as seen from their folder, `sizes` their bytes (S,), `ends` how many pictures there are up
    to the end of each (S,); `members`, `offsets`, `lengths` and `labels` (N,) say what `Sample` says of one. All
    arrays are int64.
    """

    names: tuple[str, ...]
    classes: tuple[str, ...]
    members: Names
    sizes: NDArray[np.int64]
    ends: NDArray[np.int64]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    labels: NDArray[np.int64]


def scan(path: Path, shown: str, *, labelled: bool = True) -> list[Sample]:
    """The pictures of one shard, in its order; errors call it `shown`.

    A sample is a run of files that share all of their name before the first dot: a picture, and its label in .cls (a
    number or a name) or in .json; without `labelled` its label is "". Raises DataError where the shard is damaged or a
    sample is not of this kind.
    """
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            groups = groupby(_members(archive), key=lambda member: member[0])
            samples = [_sample(file, key, [rest for _, *rest in group], shown, labelled) for key, group in groups]
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile itself ends silently there
                raise tarfile.ReadError(f"no header and no end at byte {archive.offset:,}")
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{shown} is damaged: {first_line(error)}; copy it again, or leave it out") from error
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror or error}; is the data complete?") from error
    if not samples:
        raise DataError(f"{shown} holds no pictures; what is looked for: KEY.jpg (or .png, ...) beside KEY.cls")
    return samples


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, extension and header of every file that belongs to a sample."""
    for member in archive:
        match = _MEMBER.fullmatch(member.name)
        if match and member.isreg() and not match[1].startswith("__"):  # WebDataset's own remarks
            yield match[1], match[2].lower(), member


def _sample(file: BinaryIO, key: str, files: list[list[Any]], shown: str, labelled: bool) -> Sample:
    by_end = dict(files)
    pictures = [end for end in by_end if f".{end}" in extensions()]
    if len(pictures) != 1 or len(by_end) != len(files):
        raise DataError(f"{shown}: the sample {key} holds {sorted(end for end, _ in files)}; it must hold one picture")
    label_file = next((end for end in ("cls", "json") if end in by_end), None)
    label: int | str | None = None if labelled else ""
    if label_file and labelled:
        file.seek(by_end[label_file].offset_data)
        label = _label(file.read(by_end[label_file].size), label_file == "json")
    if label is None:
        raise DataError(
            f"{shown}: the sample {key} has no label ({', '.join(sorted(by_end))}); add {key}.cls, a number or a name, "
            f"or {key}.json with the field {LABEL_FIELDS[0]}"
        )
    picture = by_end[pictures[0]]
    return Sample(picture.name, picture.offset_data, picture.size, label)


def _label(content: bytes, is_json: bool) -> int | str | None:
    try:
        text = content.decode().strip()
        found = json.loads(text) if is_json else text
    except ValueError:
        return None
    if isinstance(found, dict):
        found = next((found[name] for name in LABEL_FIELDS if name in found), None)
    if isinstance(found, str) and found.isdecimal():
        return int(found)
    return found if isinstance(found, str | int) and found != "" else None


def scanned(
    names: Sequence[str], shards: Sequence[list[Sample]], sizes: Sequence[int], classes: Sequence[str]
) -> Index:
    """The index of scanned shards; `classes` are the names of the numbers, empty where nobody says them."""
    samples = [sample for shard in shards for sample in shard]
    labels, known = numbered([sample.label for sample in samples], tuple(classes))
    return Index(
        names=tuple(names),
        classes=known,
        members=Names(sample.member for sample in samples),
        sizes=np.array(sizes, np.int64),
        ends=np.cumsum([len(shard) for shard in shards]),
        offsets=np.array([sample.offset for sample in samples], np.int64),
        lengths=np.array([sample.length for sample in samples], np.int64),
        labels=labels,
    )


def numbered(values: Sequence[int | str], classes: tuple[str, ...]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels as places in the classes that are returned: the given ones, or all that occur in natural order.

    Where classes are given, a number is a place in them. Raises DataError for a label that they do not have.
    """
    different = set(values)
    known = classes or tuple(sorted(map(str, different), key=natural))
    by_name = {name: place for place, name in enumerate(known)}
    # Without names, the numbers that occur are names: 3 and 7 are the first and the second class.
    places = {value: by_name.get(str(value)) if isinstance(value, str) or not classes else value for value in different}
    if unknown := [value for value, place in places.items() if place not in range(len(known))]:
        raise DataError(f"the label {unknown[0]!r} is none of the {len(known)} classes named; name every class")
    return np.array([places[value] for value in values], np.int64), known


def save_index(path: Path, index: Index) -> None:
    """Write an index in one step."""
    from safetensors.numpy import save_file

    arrays = {name: getattr(index, name) for name in ARRAYS} | {
        "members": np.frombuffer(index.members.packed, np.uint8),
        "member_ends": index.members.ends,
    }
    about = {"names": index.names, "classes": index.classes}  # as one entry: several are written in any order
    atomic_write(path, lambda temporary: save_file(arrays, temporary, {FORMAT: json.dumps(about)}))


def load_index(path: Path, shown: str) -> Index:
    """The index in a file; raises DataError naming it as `shown` where it is none, or contradicts itself."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {})[FORMAT])
            arrays = {name: file.get_tensor(name) for name in (*ARRAYS, "members", "member_ends")}
        index = Index(
            names=tuple(about["names"]),
            classes=tuple(about["classes"]),
            members=Names.of(arrays.pop("members").tobytes(), arrays.pop("member_ends")),
            **arrays,
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{shown} is no index of shards: {first_line(error)}; delete it, or write it anew") from error
    if not _is_sound(index):
        raise DataError(f"{shown} contradicts itself; delete it, or write it anew")
    return index


def _is_sound(index: Index) -> bool:
    """Whether every picture lies inside its shard and its label inside the classes."""
    count, members = len(index.members), index.members
    arrays = (index.offsets, index.lengths, index.labels, members.ends, index.sizes, index.ends)
    if any(each.dtype != np.int64 or each.ndim != 1 for each in arrays) or {len(each) for each in arrays[:4]} != {
        count
    }:
        return False
    if not len(index.names) == len(index.sizes) == len(index.ends) > 0 or not count == index.ends[-1] > 0:
        return False
    if np.any(np.diff(index.ends) < 0) or np.any(np.diff(members.ends) < 0) or members.ends[-1] != len(members.packed):
        return False
    shard = np.searchsorted(index.ends, np.arange(count), side="right")
    inside = (index.offsets >= 0) & (index.lengths >= 0) & (index.offsets + index.lengths <= index.sizes[shard])
    labelled = (index.labels >= 0) & (index.labels < len(index.classes))
    return bool(np.all(inside & labelled))
