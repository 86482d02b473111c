"""Order and random numbers: arithmetic, balanced, and the same forever."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from isthmus.data.order import (
    balanced_draw,
    clustered_permutation,
    earlier,
    parts_of,
    permutation,
    sample_generator,
    stratified_folds,
    stratified_split,
)
from isthmus.errors import DataError

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=80).map(lambda few: few * 2)


def test_permutation_holds_each_place_once_and_changes_with_seed_and_epoch():
    orders = [permutation(1000, seed, epoch) for seed in (0, 1, -1) for epoch in (0, 1)]
    assert all(np.array_equal(np.sort(order), np.arange(1000)) for order in orders)
    assert len({order.tobytes() for order in orders}) == len(orders)


def test_order_is_the_same_forever():
    assert permutation(8, 0, 0).tolist() == [1, 2, 3, 5, 0, 4, 7, 6]
    assert permutation(8, 7, 3).tolist() == [6, 5, 2, 4, 3, 0, 7, 1]
    assert sample_generator(1, 2, 3).random() == pytest.approx(0.06344102965932141, abs=1e-15)


@given(st.lists(st.integers(0, 30), max_size=400), st.integers(1, 100), st.integers(0, 5))
def test_clusters_are_read_few_at_a_time(clusters, window, epoch):
    """By a second way: lay the clusters out, cut them into windows, and see every window finished before the next."""
    clusters = np.array(clusters, np.int64)
    order = clustered_permutation(clusters, window, 7, epoch)
    assert sorted(order.tolist()) == list(range(len(clusters)))
    sizes = {cluster: int((clusters == cluster).sum()) for cluster in clusters.tolist()}
    seen: list[int] = []  # clusters as they are first met
    for cluster in clusters[order].tolist():
        if cluster not in seen:
            seen.append(cluster)
    last = {cluster: place for place, cluster in enumerate(clusters[order].tolist())}
    for place, cluster in enumerate(clusters[order].tolist()):
        behind = [other for other in seen if last[other] >= place and seen.index(other) <= seen.index(cluster)]
        assert sum(sizes[other] for other in behind) < window + 2 * max(sizes.values())


def test_clusters_are_mixed_inside_their_window():
    clusters = np.repeat(np.arange(40), 25)
    one, two = (clustered_permutation(clusters, 250, 0, epoch) for epoch in (0, 1))
    assert not np.array_equal(one, two)
    for start in range(0, 1000, 250):
        inside = clusters[one[start : start + 250]]
        assert len(set(inside)) == 10
        assert len(set(inside[:25])) > 5
    assert np.array_equal(one, clustered_permutation(clusters, 250, 0, 0))


def test_samples_do_not_share_random_numbers():
    drawn = {sample_generator(*key).random() for key in np.ndindex(3, 5, 40)}
    assert len(drawn) == 3 * 5 * 40
    assert sample_generator(1, 2, 3).random() == sample_generator(1, 2, 3).random()


def test_a_picture_that_comes_again_has_other_random_numbers():
    drawn = {sample_generator(1, 2, *key).random() for key in np.ndindex(5, 7)}
    assert len(drawn) == 5 * 7
    assert sample_generator(1, 2, 3, 0).random() == sample_generator(1, 2, 3).random()


@given(st.lists(st.integers(0, 6), max_size=60))
def test_earlier_counts_what_came_before(values):
    assert earlier(np.array(values, np.int64)).tolist() == [
        values[:place].count(value) for place, value in enumerate(values)
    ]


@given(LABELS, st.integers(0, 9), st.integers(0, 9))
def test_balanced_draws_take_each_class_alike(labels, seed, epoch):
    drawn = balanced_draw(np.array(labels), seed, epoch).tolist()
    seen = Counter(labels[index] for index in drawn)
    assert set(seen) <= set(labels)
    assert max(seen.values()) - min(seen[label] for label in set(labels)) <= 1
    assert sum(seen.values()) == len(labels)


def test_balanced_draws_are_uniform_in_a_class_and_favour_no_class():
    labels = np.array([0] * 4 + [5] * 9 + [2])
    drawn = Counter(index for epoch in range(900) for index in balanced_draw(labels, 3, epoch).tolist())
    for members in ([0, 1, 2, 3], list(range(4, 13)), [13]):
        counts = [drawn[index] for index in members]
        assert sum(counts) == 900 * 14 / 3
        assert chisquare(counts).pvalue > 1e-3 or len(members) == 1


@given(
    count=st.integers(1, 200),
    size=st.integers(1, 70),
    ranks=st.integers(1, 9),
    most=st.integers(0, 20),
    train=st.booleans(),
)
def test_steps_are_dealt_alike(count, size, ranks, most, train):
    """Against lists dealt out by hand."""
    if train:
        size = max(min(size, count) // ranks, 1) * ranks
    steps = count // size if train else -(-count // size)
    for step in range(steps):
        places = list(range(count))[step * size : (step + 1) * size]
        sides = [parts_of(step, size, count, rank=rank, ranks=ranks, most=most) for rank in range(ranks)]
        dealt = [[list(range(part.start, part.stop)) for part in parts] for parts in sides]
        assert [place for side in dealt for part in side for place in part] == places
        shares = [sum(map(len, side)) for side in dealt]
        assert max(shares) - min(shares) <= (0 if train else 1)
        if train:
            assert all([len(part) for part in side] == [len(part) for part in dealt[0]] for side in dealt)
        for side, share, parts in zip(dealt, shares, sides, strict=True):
            assert len(side) == -(-share // (most or share or 1))
            assert all(0 < len(part) <= (most or share) for part in side)
            assert [(part.step, part.part, part.parts) for part in parts] == [
                (step, number, len(side)) for number in range(len(side))
            ]
            if most % 2 == 0:  # pairs that mixing makes stay together
                assert all((part[0] - side[0][0]) % 2 == 0 for part in side)


@given(LABELS, st.floats(0.01, 0.99), st.integers(0, 9))
def test_split_keeps_each_class_share(labels, fraction, seed):
    train, val = stratified_split(labels, fraction, seed)
    assert sorted(train + val) == list(range(len(labels)))
    assert (train, val) == (sorted(train), sorted(val))
    for label in set(labels):
        count, taken = labels.count(label), sum(labels[index] == label for index in val)
        assert 1 <= taken < count
        assert abs(taken - count * fraction) <= 0.5 or taken in (1, count - 1)


@given(LABELS, st.integers(0, 9))
def test_folds_are_even(labels, seed):
    count = min(labels.count(label) for label in set(labels))
    folds = stratified_folds(labels, count, seed)
    assert sorted(index for fold in folds for index in fold) == list(range(len(labels)))
    sizes = [len(fold) for fold in folds]
    assert max(sizes) - min(sizes) <= 1
    for label in set(labels):
        shares = [sum(labels[index] == label for index in fold) for fold in folds]
        assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("fraction", [0, 1, -0.2, 1.5])
def test_impossible_fraction(fraction):
    with pytest.raises(DataError, match="between 0 and 1"):
        stratified_split([0, 0, 1, 1], fraction, 0)


def test_a_class_of_one_cannot_be_split():
    with pytest.raises(DataError, match="class 1 has 1 picture"):
        stratified_split([0, 0, 1], 0.5, 0)


@pytest.mark.parametrize("folds", [1, 3])
def test_impossible_folds(folds):
    with pytest.raises(DataError, match=r"ask for 2\.\.2"):
        stratified_folds([0, 0, 0, 1, 1], folds, 0)
