"""Calibration against scikit-learn, by hand, and by a second way; and intervals of parts."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve

from isthmus.errors import DataError
from isthmus.evaluation.calibration import BINS, Calibration, binned
from isthmus.evaluation.metrics import Tally, wilson


def made(count: int = 2000, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor, Tally]:
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (count,), generator=random)
    logits = 2 * torch.randn(count, classes, generator=random)
    logits[torch.arange(count), labels] += 1.5
    tally = Tally(tuple("abcdefgh"[:classes]))
    tally.add(logits, labels)
    return logits, labels, tally


def test_equals_scikit_learn():
    logits, labels, tally = made()
    confidence, guess = logits.softmax(1).max(1)
    true, mean = calibration_curve((guess == labels).numpy(), confidence.double().numpy(), n_bins=BINS)
    found = tally.calibration
    filled = [place for place in range(BINS) if found.count[place]]
    assert [found.hits[place] / found.count[place] for place in filled] == pytest.approx(true.tolist())
    assert [found.confidence[place] / found.count[place] for place in filled] == pytest.approx(mean.tolist())
    assert sum(found.count) == tally.seen
    assert sum(found.hits) == tally.correct


def test_the_expected_error_by_a_second_way():
    """Bin by bin as in the paper: part of the pictures times |accuracy - confidence|."""
    logits, labels, tally = made()
    confidence, guess = (each.numpy() for each in logits.softmax(1).double().max(1))
    hit = guess == labels.numpy()
    total = 0.0
    for place in range(BINS):
        inside = (confidence > place / BINS) & (confidence <= (place + 1) / BINS)
        if inside.any():
            total += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    assert tally.calibration.expected_error == pytest.approx(total, rel=1e-9)
    assert tally.calibration.excess == pytest.approx(confidence.mean() - hit.mean(), abs=1e-6)


def test_three_predictions_by_hand():
    sums = binned(torch.tensor([0.5, 0.95, 0.96], dtype=torch.float64), torch.tensor([True, True, False]))
    found = Calibration.of(sums)
    assert {place: each for place, each in enumerate(found.count) if each} == {7: 1, 14: 2}
    assert found.expected_error == pytest.approx((abs(1 - 0.5) + abs(1 - 1.91)) / 3)
    assert found.excess == pytest.approx((2.41 - 2) / 3)


def test_the_ends_belong_to_the_bins_below():
    edges = torch.tensor([1 / 15, 2 / 15, 1.0], dtype=torch.float64)
    assert Calibration.of(binned(edges, torch.ones(3, dtype=torch.bool))).count == (1, 1, *[0] * 12, 1)


def test_calibration_is_json_and_comes_back():
    found = made()[2].calibration
    assert Calibration.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    with pytest.raises(ValueError, match="has 15 bins, not 1, 15 and 15"):
        Calibration.from_dict(found.to_dict() | {"count": [3]})
    with pytest.raises(DataError, match="nothing to believe"):
        _ = Calibration.of(torch.zeros(3, BINS)).expected_error


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (5, 5), (582, 656), (1, 1), (50_000, 100_000)])
def test_intervals_are_wilsons(hits, count):
    wanted = binomtest(hits, count).proportion_ci(0.95, "wilson")
    assert wilson(hits, count, 1.959963984540054) == pytest.approx((wanted.low, wanted.high))
    assert wilson(hits, count) == pytest.approx((wanted.low, wanted.high), abs=1e-4)


def test_no_trials_have_no_interval():
    with pytest.raises(DataError, match="one trial or more"):
        wilson(0, 0)


def test_sums_do_not_depend_on_the_order():
    """Confidences of single precision add up in double precision without rounding."""
    confidence = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    hit, turned = confidence > 0.3, np.random.default_rng(0).permutation(5000)
    whole = binned(confidence.double(), hit)
    assert torch.equal(whole, binned(confidence[turned].double(), hit[turned]))
