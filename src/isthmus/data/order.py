"""Which picture comes when, and with which random numbers: pure functions of (seed, epoch, index).

All of it rests on the raw words of Philox (Salmon et al. 2011), a generator whose n-th word is computed, not reached;
so no order depends on threads, on what was drawn before, or on the numpy release.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import DataError

__all__ = [
    "clustered_permutation",
    "permutation",
    "sample_generator",
    "step_generator",
    "stratified_folds",
    "stratified_split",
]

_SAMPLE, _EPOCH, _SPLIT, _STEP, _CLUSTER = range(5)


def _philox(seed: int, stream: int, index: int, purpose: int) -> np.random.Philox:
    key = np.array([seed % 2**64, stream], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, purpose, index], np.uint64))


def _shuffled(count: int, seed: int, stream: int, purpose: int) -> NDArray[np.int64]:
    return np.argsort(_philox(seed, stream, 0, purpose).random_raw(count), kind="stable")


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one picture in one epoch."""
    return np.random.Generator(_philox(seed, epoch, index, _SAMPLE))


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
    values, which, counts = np.unique(clusters, return_inverse=True, return_counts=True)
    order = _shuffled(len(values), seed, epoch, _CLUSTER)
    first = np.empty(len(values), np.int64)  # place of each cluster's first picture, had it come unmixed
    first[order] = np.cumsum(counts[order]) - counts[order]
    mixed = permutation(len(clusters), seed, epoch)
    return mixed[np.argsort((first // window)[which[mixed]], kind="stable")]


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
