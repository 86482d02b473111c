"""Which picture comes when, and with which random numbers: pure functions of (seed, epoch, index).

All of it rests on the raw words of Philox (Salmon et al. 2011), a generator whose n-th word is computed, not reached;
so no order depends on threads, on what was drawn before, or on the numpy release.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import DataError

__all__ = [
    "Part",
    "balanced_draw",
    "clustered_permutation",
    "earlier",
    "parts_of",
    "permutation",
    "sample_generator",
    "step_generator",
    "stratified_folds",
    "stratified_split",
]

_SAMPLE, _EPOCH, _SPLIT, _STEP, _CLUSTER, _DRAW = range(6)


def _philox(seed: int, stream: int, index: int, purpose: int, copy: int = 0) -> np.random.Philox:
    key = np.array([seed % 2**64, stream], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, copy, purpose, index], np.uint64))


def _shuffled(count: int, seed: int, stream: int, purpose: int) -> NDArray[np.int64]:
    return np.argsort(_philox(seed, stream, 0, purpose).random_raw(count), kind="stable")


def sample_generator(seed: int, epoch: int, index: int, copy: int = 0) -> np.random.Generator:
    """The random numbers of one picture in one epoch, the `copy`-th time after its first that it comes."""
    return np.random.Generator(_philox(seed, epoch, index, _SAMPLE, copy))


def step_generator(seed: int, epoch: int, step: int) -> np.random.Generator:
    """The random numbers of one step, the same in every process and for every part of its batch."""
    return np.random.Generator(_philox(seed, epoch, step, _STEP))


def permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of `count` pictures in one epoch: each of 0..count-1 once."""
    return _shuffled(count, seed, epoch, _EPOCH)


def clustered_permutation(clusters: NDArray[np.int64], window: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """An order of all pictures that reads few clusters at a time: `clusters` (N,) says which one each is in.

    The clusters are shuffled, consecutive ones of about `window` pictures are taken together, and the pictures of
    these are shuffled.
    """
    counts = np.bincount(clusters)
    order = _shuffled(len(counts), seed, epoch, _CLUSTER)
    first = np.empty(len(counts), np.int64)  # place of each cluster's first picture, had it come unmixed
    first[order] = np.cumsum(counts[order]) - counts[order]
    mixed = permutation(len(clusters), seed, epoch)
    return mixed[np.argsort((first // window)[clusters[mixed]], kind="stable")]


def balanced_draw(labels: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """As many indices as `labels`, with replacement: each class that occurs equally often, or once more."""
    values, which, counts = np.unique(labels, return_inverse=True, return_counts=True)
    members, first = np.argsort(which, kind="stable"), np.cumsum(counts) - counts
    chosen = (permutation(len(labels), seed, epoch) + epoch) % len(values)
    words = _philox(seed, epoch, 0, _DRAW).random_raw(len(labels)) % counts[chosen].astype(np.uint64)
    drawn: NDArray[np.int64] = members[first[chosen] + words.astype(np.int64)]
    return drawn


def earlier(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each entry has come before."""
    sorting = np.argsort(order, kind="stable")
    values, places = order[sorting], np.arange(len(order))
    first = np.maximum.accumulate(np.where(np.diff(values, prepend=-1) != 0, places, 0))
    times = np.empty_like(order)
    times[sorting] = places - first
    return times


class Part(NamedTuple):
    """Part `part` of `parts` of a step on one rank: places start..stop of the epoch's order."""

    step: int
    part: int
    parts: int
    start: int
    stop: int


def parts_of(step: int, size: int, count: int, *, rank: int = 0, ranks: int = 1, most: int = 0) -> list[Part]:
    """The rank-th contiguous share of a step of `size` of the `count` places, in as few even parts as hold `most` each.

    Neighbours (2k, 2k + 1) stay in one part where `most` and the shares are even, because mixing pairs them.
    """
    begin = step * size
    held = min(size, count - begin)
    start, stop = (begin + held * side // ranks for side in (rank, rank + 1))
    if start == stop:
        return []
    most = min(most or held, stop - start)
    unit = 1 if most % 2 else 2
    units = -(-(stop - start) // unit)
    parts = -(-units // (most // unit))
    edges = [min(start + unit * (units * part // parts), stop) for part in range(parts + 1)]
    return [Part(step, part, parts, edges[part], edges[part + 1]) for part in range(parts)]


def _shuffled_classes(labels: Sequence[int] | NDArray[np.int64], seed: int) -> list[NDArray[np.int64]]:
    """The indices of each class that occurs, smallest label first, in an order that the seed decides."""
    values = np.asarray(labels, np.int64)
    members = [(label, np.flatnonzero(values == label)) for label in np.unique(values).tolist()]
    return [indices[_shuffled(len(indices), seed, label, _SPLIT)] for label, indices in members]


def stratified_split(
    labels: Sequence[int] | NDArray[np.int64], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Sorted train and val indices; val takes `fraction` of every class, rounded, and leaves at least one on each side.

    Raises DataError when the fraction is not between 0 and 1 or a class has a single picture.
    """
    if not 0 < fraction < 1:
        raise DataError(f"the fraction of pictures for validation is {fraction}; it must lie between 0 and 1")
    train: list[int] = []
    val: list[int] = []
    for members in _shuffled_classes(labels, seed):
        if len(members) == 1:
            label = labels[members[0]]
            raise DataError(f"class {label} has 1 picture; splitting needs 2 or more: one to train and one to validate")
        cut = min(max(round(len(members) * fraction), 1), len(members) - 1)
        val += members[:cut].tolist()
        train += members[cut:].tolist()
    return sorted(train), sorted(val)


def stratified_folds(labels: Sequence[int] | NDArray[np.int64], folds: int, seed: int) -> list[list[int]]:
    """The sorted test indices of each fold; fold sizes, and each class's share of them, differ by at most one picture.

    Raises DataError for fewer than two folds, or more folds than a class has pictures.
    """
    members = _shuffled_classes(labels, seed)
    smallest = min(map(len, members), default=0)
    if not 2 <= folds <= smallest:
        raise DataError(f"{folds} folds of a set whose smallest class has {smallest} pictures; ask for 2..{smallest}")
    dealt = np.concatenate(members)  # dealt like cards, class after class, so that no fold collects the remainders
    return [sorted(dealt[fold::folds].tolist()) for fold in range(folds)]
