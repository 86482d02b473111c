"""What the loader's rate counts, by a clock that the test turns."""

import itertools

import pytest

from isthmus.arch.preprocess import Preprocess
from isthmus.data import rate
from isthmus.data.augment import Augment
from isthmus.data.cache import Resized
from isthmus.data.loader import Loader
from isthmus.data.rate import loader_rate
from isthmus.data.sources import open_pictures

RECORD = Preprocess(resize=10, crop=8)


@pytest.fixture
def loader(make, tmp_path, monkeypatch) -> Loader:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    clock = itertools.count(step=0.25)
    monkeypatch.setattr(rate.time, "perf_counter", lambda: next(clock))  # each look at it is a quarter of a second
    pictures = open_pictures(str(make("set", {"a": 7, "b": 8})))
    return Loader(pictures=pictures, record=RECORD, batch_size=5, train=True, augment=Augment(), threads=2)


@pytest.mark.parametrize("floats", [False, True])
def test_batches_of_five_every_quarter_second_over_several_epochs(loader, floats):
    assert loader_rate(loader, 1.0, floats=floats) == 20
    assert loader_rate(loader, 30.0, floats=floats) == 20


def test_resized_pictures_are_kept_before_they_are_measured(loader):
    resized = Resized(loader.pictures, 10, RECORD)
    measured = Loader(
        pictures=loader.pictures, record=RECORD, batch_size=5, train=True, augment=Augment(), resized=resized
    )
    assert loader_rate(measured, 0.5) == 20
    resized.refresh()
    assert resized.kept >= 10
