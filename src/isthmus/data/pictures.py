"""Labelled pictures as arrays: where each lies in its store, and what it shows."""

import os
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from isthmus.data.order import clustered_permutation, permutation
from isthmus.errors import DataError

__all__ = ["WINDOW", "Files", "Identity", "Names", "Pictures", "Store", "joined", "natural", "read_file", "stamp"]

WINDOW = 16_384  # pictures of remote shards that are mixed at a time; readers of streams mix a few thousand
Identity = tuple[str | int, ...]
"""What tells a picture from every other, and from itself after a change: plain values for the key of a cache."""


class Store(ABC):
    """Numbered pictures that can be read in any order, by any thread and, pickled, by any process."""

    __slots__ = ()

    @abstractmethod
    def __len__(self) -> int:
        """How many."""

    @abstractmethod
    def read(self, place: int) -> bytes:
        """The encoded picture (JPEG, PNG, ...); raises DataError naming it where it cannot be read."""

    @abstractmethod
    def name(self, place: int) -> str:
        """What a person finds the picture by."""

    @abstractmethod
    def identity(self, place: int) -> Identity:
        """Its name, and what changes with its content, also when it is gone."""

    def clusters(self, places: NDArray[np.int64]) -> NDArray[np.int64] | None:  # noqa: ARG002 - for those that are
        """The number of the cluster that each place is in, where pictures of one should be read together; else None."""
        return None

    def expect(self, places: NDArray[np.int64]) -> None:  # noqa: B027 - most stores need not
        """Hear that these places will be read soon."""


class Names:
    """Many short texts packed into one: a million of them take their own bytes and eight more each."""

    __slots__ = ("ends", "packed")

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.packed = b"".join(encoded)
        self.ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)))

    @classmethod
    def of(cls, packed: bytes, ends: NDArray[np.int64]) -> Self:
        """Names packed before: all of them, and where each ends."""
        names = cls(())
        names.packed, names.ends = packed, ends
        return names

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, place: int) -> str:
        start = self.ends[place - 1] if place else 0
        return os.fsdecode(self.packed[start : self.ends[place]])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Names) and self.packed == other.packed and bool(np.array_equal(self.ends, other.ends))

    __hash__ = None  # type: ignore[assignment]


def natural(name: str) -> tuple[list[str | int], str]:
    """A key that sorts cell2 before cell10; the name itself decides between equals."""
    parts = re.split(r"(\d+)", name.casefold())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def read_file(path: Path | str) -> bytes:
    """The content of a picture file; raises DataError naming it and the reason."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {reason}; check the path and its permissions") from error


def stamp(path: str) -> tuple[int, int]:
    """Bytes and time of the last change of a file, which change with its content; zeros when it cannot be seen."""
    try:
        status = os.stat(path)  # noqa: PTH116 - a million times
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


@dataclass(frozen=True, slots=True)
class Files(Store):
    """Picture files, named from `root`, which may be empty."""

    root: str
    names: Names

    def __len__(self) -> int:
        return len(self.names)

    def read(self, place: int) -> bytes:
        return read_file(self.name(place))

    def name(self, place: int) -> str:
        return os.path.join(self.root, self.names[place])  # noqa: PTH118 - a million times

    def identity(self, place: int) -> Identity:
        name = self.name(place)
        return name, *stamp(name)


@dataclass(frozen=True, slots=True)
class _Joined(Store):
    """The pictures of several stores, one after another; `ends` counts them up to the end of each."""

    stores: tuple[Store, ...]
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return self.ends[-1]

    def _start(self, number: int) -> int:
        return self.ends[number - 1] if number else 0

    def _find(self, place: int) -> tuple[Store, int]:
        number = bisect_right(self.ends, place)
        return self.stores[number], place - self._start(number)

    def read(self, place: int) -> bytes:
        store, place = self._find(place)
        return store.read(place)

    def name(self, place: int) -> str:
        store, place = self._find(place)
        return store.name(place)

    def identity(self, place: int) -> Identity:
        store, place = self._find(place)
        return store.identity(place)

    def expect(self, places: NDArray[np.int64]) -> None:
        numbers = np.searchsorted(self.ends, places, side="right")
        for number in np.unique(numbers).tolist():
            self.stores[number].expect(places[numbers == number] - self._start(number))


def joined(stores: Iterable[Store]) -> Store:
    """One store of the pictures of several, in their order."""
    flat = [part for store in stores for part in (store.stores if isinstance(store, _Joined) else (store,))]
    return flat[0] if len(flat) == 1 else _Joined(tuple(flat), tuple(accumulate(map(len, flat))))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pictures:
    """N pictures of a store: the place of each in it, its label as a place in `classes`, and the classes' names.

    `places` and `labels` are int64 (N,). Two are equal when store, places, labels and classes are.
    """

    store: Store
    places: NDArray[np.int64]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    @classmethod
    def stored(cls, store: Store, labels: Sequence[int] | NDArray[np.int64], classes: Sequence[str]) -> Self:
        """Every picture of a store, in its order; `labels` are places in `classes`."""
        return cls(
            store=store,
            places=np.arange(len(store)),
            labels=np.asarray(labels, np.int64).reshape(len(store)),
            classes=tuple(classes),
        )

    @classmethod
    def of_files(
        cls, paths: Iterable[Path | str], labels: Sequence[int] | NDArray[np.int64], classes: Sequence[str]
    ) -> Self:
        """Picture files and their labels."""
        return cls.stored(Files("", Names(map(str, paths))), labels, classes)

    @classmethod
    def unlabelled(cls, paths: Iterable[Path | str]) -> Self:
        """Picture files to predict: no classes, every label -1."""
        store = Files("", Names(map(str, paths)))
        return cls.stored(store, np.full(len(store), -1), ())

    def __len__(self) -> int:
        return len(self.places)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Pictures)
            and self.classes == other.classes
            and bool(np.array_equal(self.labels, other.labels))
            and bool(np.array_equal(self.places, other.places))
            and self.store == other.store
        )

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: "Pictures") -> "Pictures":
        """The pictures of both, under the classes of both; where these are the same, in their order."""
        apart = self.store != other.store
        places = other.places + len(self.store) if apart else other.places
        both = self.classes, other.classes
        classes = self.classes if both[0] == both[1] else tuple(sorted({*self.used(), *other.used()}, key=natural))
        return Pictures(
            store=joined((self.store, other.store)) if apart else self.store,
            places=np.concatenate([self.places, places]),
            labels=np.concatenate([self.under(classes).labels, other.under(classes).labels]),
            classes=classes,
        )

    def used(self) -> tuple[str, ...]:
        """The classes that have pictures."""
        return tuple(name for name, count in self.counts().items() if count)

    def under(self, classes: tuple[str, ...]) -> "Pictures":
        """The same pictures, labelled as places in other `classes`, which have all names that are used."""
        if classes == self.classes:
            return self
        places = {name: label for label, name in enumerate(classes)}
        table = np.array([places.get(name, -1) for name in self.classes], np.int64)
        return Pictures(store=self.store, places=self.places, labels=table[self.labels], classes=classes)

    def subset(self, indices: Iterable[int] | NDArray[np.int64]) -> "Pictures":
        """The pictures at these places, in this order, with the same classes."""
        chosen = np.asarray(indices if isinstance(indices, Sequence | np.ndarray) else list(indices), np.int64)
        return Pictures(store=self.store, places=self.places[chosen], labels=self.labels[chosen], classes=self.classes)

    def counts(self) -> dict[str, int]:
        """Class name -> number of pictures, in the order of the classes, zeros included."""
        seen = np.bincount(self.labels[self.labels >= 0], minlength=len(self.classes))
        return dict(zip(self.classes, seen.tolist(), strict=False))

    def shuffled(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The order of an epoch: every index once, a pure function of (seed, epoch).

        Where reading picture by picture is slow (remote shards), those of the same few shards stay near each other.
        """
        clusters = self.store.clusters(self.places)
        if clusters is None:
            return permutation(len(self), seed, epoch)
        return clustered_permutation(clusters, WINDOW, seed, epoch)

    def expect(self, indices: NDArray[np.int64]) -> None:
        """Say that these pictures will be read soon: remote shards begin to come; WINDOW pictures ahead is well."""
        self.store.expect(self.places[indices])

    def read(self, index: int) -> bytes:
        """The encoded picture; raises DataError naming it where it cannot be read."""
        return self.store.read(int(self.places[index]))

    def name(self, index: int) -> str:
        """What a person finds the picture by: its path, or its shard and key."""
        return self.store.name(int(self.places[index]))

    def identity(self, index: int) -> Identity:
        """Its name and what changes with its content, for the key of a cache."""
        return self.store.identity(int(self.places[index]))
