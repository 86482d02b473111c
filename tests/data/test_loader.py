"""The loader: every picture once, the same bits for any thread count, resumable, and its threads end."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.arch.preprocess import Preprocess
from isthmus.data import loader as module
from isthmus.data.augment import Augment, augmented
from isthmus.data.decode import decode
from isthmus.data.loader import Batch, Loader
from isthmus.data.order import permutation, sample_generator
from isthmus.data.pictures import Pictures
from isthmus.data.sources import list_pictures
from isthmus.data.transform import centred, evaluation_transform
from isthmus.errors import DataError
from small_runs import paths

RECORD = Preprocess(resize=10, crop=8)
AUGMENT = Augment(vflip=True, rotate90=True)


@pytest.fixture
def pictures(make) -> Pictures:
    files = list_pictures(make("set", {"a": 12, "b": 11}))
    return Pictures.of_files(files, (0,) * 12 + (1,) * 11, ("a", "b"))


def training(pictures: Pictures, **options) -> Loader:
    defaults = {"batch_size": 4, "train": True, "augment": AUGMENT, "threads": 2}
    return Loader(pictures=pictures, record=RECORD, **{**defaults, **options})


def evaluating(pictures: Pictures, **options) -> Loader:
    return Loader(pictures=pictures, record=RECORD, **{"batch_size": 4, "train": False, "threads": 2, **options})


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert [batch.step for batch in ours] == [batch.step for batch in theirs]
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.labels, two.labels)
        assert torch.equal(one.indices, two.indices)
        assert (one.part, one.parts) == (two.part, two.parts)


def decoding_threads() -> int:
    return sum(thread.name.startswith("isthmus-decode") for thread in threading.enumerate())


def test_evaluation_sees_every_picture_once_in_order(pictures):
    batches = list(evaluating(pictures).epoch(0))
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(23))
    assert torch.cat([batch.labels for batch in batches]).tolist() == pictures.labels.tolist()
    assert [len(batch.images) for batch in batches] == [4, 4, 4, 4, 4, 3]
    transform = evaluation_transform(RECORD)
    for batch in batches:
        for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
            assert torch.equal(image, transform(decode(pictures.name(index))))


@pytest.mark.parametrize("exact", [True, False])
def test_evaluation_resizes_exactly_or_fast(pictures, exact):
    for batch in evaluating(pictures, exact=exact).epoch(0):
        for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
            wanted = centred(decode(pictures.name(index)), RECORD, exact=exact)
            assert np.array_equal(image.permute(1, 2, 0), wanted)


def test_batches_are_uint8_channels_last(pictures):
    batch = next(evaluating(pictures).epoch(0))
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (4, 3, 8, 8)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    grey = Preprocess(resize=8, crop=8, channels="L", mean=(0.5,), std=(0.5,))
    assert next(Loader(pictures=pictures, record=grey, batch_size=2, train=False).epoch(0)).images.shape == (2, 1, 8, 8)


def test_training_order_and_augmentation_are_arithmetic(pictures):
    batches = list(training(pictures, seed=3).epoch(5))
    indices = torch.cat([batch.indices for batch in batches]).tolist()
    assert indices == permutation(23, 3, 5)[:20].tolist()
    images = torch.cat([batch.images for batch in batches])
    for image, index in zip(images, indices, strict=True):
        random = sample_generator(3, 5, index)
        assert torch.equal(image, augmented(decode(pictures.name(index)), AUGMENT, RECORD, random))


def test_epochs_differ(pictures):
    loader = training(pictures)
    first, second = next(loader.epoch(0)), next(loader.epoch(1))
    assert not torch.equal(first.indices, second.indices)


@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("start", [0, 2, 4, 5])
def test_starting_at_a_step_equals_skipping_to_it(pictures, threads, start):
    whole = list(training(pictures, threads=1).epoch(2))
    assert_same(list(training(pictures, threads=threads).epoch(2, start_step=start)), whole[start:])


@pytest.mark.parametrize(("count", "batch_size", "sizes"), [(23, 4, [4] * 5), (9, 8, [8]), (3, 8, [3]), (8, 4, [4, 4])])
def test_training_has_no_last_batch_of_one(pictures, count, batch_size, sizes):
    loader = training(pictures.subset(range(count)), batch_size=batch_size)
    assert [len(batch.images) for batch in loader.epoch(0)] == sizes
    assert loader.steps == len(sizes)


def test_impossible_loaders(pictures):
    with pytest.raises(DataError, match="2 or more"):
        training(pictures.subset([0]))
    with pytest.raises(DataError, match="0 pictures"):
        evaluating(pictures.subset([]))
    with pytest.raises(DataError, match="batch size is 0"):
        evaluating(pictures, batch_size=0)
    with pytest.raises(DataError, match="step 7 of 6"):
        evaluating(pictures).epoch(0, start_step=7)


def test_an_unreadable_picture_is_named(pictures):
    Path(pictures.name(13)).write_bytes(b"no picture")
    with pytest.raises(DataError, match="is not a picture") as raised:
        list(evaluating(pictures).epoch(0))
    assert pictures.name(13) in str(raised.value)
    assert decoding_threads() == 0


def test_an_unreadable_picture_can_be_skipped(pictures):
    bad = [5, 8, 9, 10, 11]  # one in a batch, and a whole batch
    for place in bad:
        Path(pictures.name(place)).write_bytes(b"")
    loader = evaluating(pictures, on_error="skip")
    batches = list(loader.epoch(0))
    assert torch.cat([batch.indices for batch in batches]).tolist() == [
        place for place in range(23) if place not in bad
    ]
    assert [batch.step for batch in batches] == [0, 1, 3, 4, 5]
    assert batches[1].images.is_contiguous(memory_format=torch.channels_last)
    assert set(loader.unreadable) == set(bad)
    assert all("is empty" in reason for reason in loader.unreadable.values())
    assert_same(list(evaluating(pictures, on_error="skip").epoch(0, start_step=2)), batches[2:])


def test_training_takes_the_next_readable_picture_instead(pictures):
    bad = {2, 3, 11, 17}
    for place in bad:
        Path(pictures.name(place)).write_bytes(b"")
    order = training(pictures).order(1).tolist()
    readable = [index for index in order if index not in bad]
    after = [next(index for index in order[place:] + readable if index not in bad) for place in range(20)]
    loader = training(pictures, on_error="skip")
    batches = list(loader.epoch(1))
    assert torch.cat([batch.indices for batch in batches]).tolist() == after
    assert torch.cat([batch.labels for batch in batches]).tolist() == pictures.labels[after].tolist()
    assert set(loader.unreadable) == bad & set(order[:20])
    assert_same(list(training(pictures, on_error="skip", threads=5).epoch(1, start_step=3)), batches[3:])
    images = torch.cat([batch.images for batch in batches])
    twice = [place for place in range(20) if order[place] in bad]
    assert all(not torch.equal(images[place], images[after.index(after[place], place + 1)]) for place in twice[:-1])


def test_nothing_readable_is_an_error(pictures):
    for path in paths(pictures):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of 23 pictures can be read"):
        list(evaluating(pictures, on_error="skip").epoch(0))
    with pytest.raises(DataError, match="none of 23 pictures can be read"):
        list(training(pictures, on_error="skip").epoch(0))


@pytest.mark.parametrize("micro_batch", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_and_parts_together_are_one_whole_batch(pictures, ranks, micro_batch):
    options = {"batch_size": 8, "seed": 1}
    whole = list(training(pictures, **options).epoch(3))
    sides = [
        list(training(pictures, rank=rank, ranks=ranks, micro_batch=micro_batch, **options).epoch(3))
        for rank in range(ranks)
    ]
    for each in whole:
        shares = [[batch for batch in side if batch.step == each.step] for side in sides]
        assert torch.equal(torch.cat([batch.images for share in shares for batch in share]), each.images)
        assert torch.equal(torch.cat([batch.labels for share in shares for batch in share]), each.labels)
        for share in shares:
            assert [batch.part for batch in share] == list(range(share[0].parts))
            assert [batch.indices.shape for batch in share] == [batch.indices.shape for batch in shares[0]]


def test_evaluation_has_every_picture_once_over_all_ranks(pictures):
    sides = [
        [batch.indices for batch in evaluating(pictures, batch_size=9, rank=rank, ranks=4).epoch(0)]
        for rank in range(4)
    ]
    assert torch.cat([torch.cat(side) for side in sides]).sort().values.tolist() == list(range(23))


def test_impossible_shares(pictures):
    with pytest.raises(DataError, match="a batch of 9 cannot be shared alike by 2 processes"):
        training(pictures, batch_size=9, ranks=2)
    with pytest.raises(DataError, match="rank is 2 of 2"):
        training(pictures, rank=2, ranks=2)
    with pytest.raises(DataError, match="3 pictures to load; this needs 4"):
        training(pictures.subset(range(3)), ranks=2)


def test_repeats_are_other_crops_of_fewer_pictures(pictures):
    repeated = Augment(crop_scale=(0.1, 0.5), repeats=3)
    loader = training(pictures, augment=repeated, batch_size=6)
    order = loader.order(2)
    assert order.tolist() == np.repeat(permutation(23, 0, 2)[:8], 3)[:23].tolist()
    batches = list(loader.epoch(2))
    once = next(training(pictures, augment=replace(repeated, repeats=1), batch_size=23).epoch(2))
    for batch in batches:
        assert len({image.numpy().tobytes() for image in batch.images}) == 6
        for first in (0, 3):  # the first time is that of an epoch without repeats
            place = once.indices.tolist().index(int(batch.indices[first]))
            assert torch.equal(batch.images[first], once.images[place])
    assert_same(list(loader.epoch(2, start_step=1)), batches[1:])


def test_balanced_sampling_draws_every_class_alike(pictures):
    uneven = pictures.subset([*range(12), 12, 13])
    loader = training(uneven, balanced=True, batch_size=7)
    seen = torch.cat([batch.indices for batch in loader.epoch(0)])
    labels = torch.cat([batch.labels for batch in loader.epoch(0)])
    assert labels.bincount().tolist() == [7, 7]
    assert torch.equal(labels, torch.from_numpy(uneven.labels)[seen])
    images = torch.cat([batch.images for batch in loader.epoch(0)])
    assert len({image.numpy().tobytes() for image in images}) == 14  # a picture that comes again is another crop


def test_size_changes_the_crop_and_nothing_else(pictures):
    large = next(training(pictures, size=13, augment=Augment(crop_scale=(0.3, 1.0), hflip=False)).epoch(0))
    assert large.images.shape == (4, 3, 13, 13)
    still = Augment(crop_scale=(), hflip=False)
    smaller = next(training(pictures, size=5, augment=still).epoch(0))
    transform = evaluation_transform(RECORD.at(5))
    for image, index in zip(smaller.images, smaller.indices.tolist(), strict=True):
        assert torch.equal(image, transform(decode(pictures.read(index))))


def test_threads_end_with_the_epoch_and_when_the_consumer_stops(pictures):
    for _ in evaluating(pictures).epoch(0):
        assert decoding_threads() > 0
    assert decoding_threads() == 0
    for _ in evaluating(pictures).epoch(0):
        break
    assert decoding_threads() == 0
    batches = evaluating(pictures).epoch(0)
    next(batches)
    batches.close()
    assert decoding_threads() == 0
    with pytest.raises(ZeroDivisionError):
        [1 / 0 for _ in evaluating(pictures).epoch(0)]
    assert decoding_threads() == 0


def test_torch_splits_no_work_of_the_decoding_threads(pictures, monkeypatch):
    seen: set[int] = set()
    fill = Loader._fill
    monkeypatch.setattr(Loader, "_fill", lambda self, *rest: (seen.add(torch.get_num_threads()), fill(self, *rest))[1])
    torch.set_num_threads(2)
    try:
        list(training(pictures, threads=4).epoch(0))
        with ThreadPoolExecutor(1) as new:
            assert (seen, torch.get_num_threads(), new.submit(torch.get_num_threads).result()) == ({1}, 2, 2)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(("batch_size", "threads", "ahead"), [(4, 2, 12), (1, 4, 9)])
def test_look_ahead_is_bounded(pictures, monkeypatch, batch_size, threads, ahead):
    """Three parts, or as many more as give every thread two pictures beside the one that is taken."""
    handed: list[int] = []

    class Counting(ThreadPoolExecutor):
        def submit(self, call, rows, *rest):
            handed.append(len(rows))
            return super().submit(call, rows, *rest)

    monkeypatch.setattr(module, "ThreadPoolExecutor", Counting)
    batches = evaluating(pictures.subset([0] * 400), batch_size=batch_size, threads=threads).epoch(0)
    next(batches)
    assert sum(handed) == ahead
    next(batches)
    assert sum(handed) == ahead + batch_size


@pytest.fixture
def begun(monkeypatch) -> list[int]:
    """The places that were begun; each picture from place 8 on is held back until the threads are told to end."""
    places: list[int] = []
    ending, fill = threading.Event(), Loader._fill_one

    def fill_slowly(self, row, order, place, *rest):
        places.append(place)
        if place >= 8:
            ending.wait(5)
        return fill(self, row, order, place, *rest)

    class Told(ThreadPoolExecutor):
        def shutdown(self, **options):
            ending.set()
            super().shutdown(**options)

    monkeypatch.setattr(Loader, "_fill_one", fill_slowly)
    monkeypatch.setattr(module, "ThreadPoolExecutor", Told)
    return places


def test_closing_waits_for_pictures_and_not_for_shares(pictures, begun):
    batches = evaluating(pictures, batch_size=8).epoch(0)
    next(batches)
    batches.close()
    assert len(begun) <= 8 + 2  # one in each thread


def test_an_error_waits_for_pictures_and_not_for_shares(pictures, begun):
    Path(pictures.name(1)).write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        list(evaluating(pictures, batch_size=23).epoch(0))
    assert set(begun) <= {0, 2, 4, 6, 8, 1}  # of the other thread's share no more than the first that is held back


def test_an_abandoned_epoch_does_not_hang_the_interpreter(pictures, tmp_path: Path):
    code = (
        "import sys\n"
        "from isthmus.arch.preprocess import IMAGENET\n"
        "from isthmus.data.loader import Loader\n"
        "from isthmus.data.sources import Pictures, list_pictures\n"
        "pictures = Pictures.unlabelled(list_pictures(sys.argv[1]))\n"
        "batches = Loader(pictures=pictures, record=IMAGENET, batch_size=2, train=False).epoch(0)\n"
        "print(next(batches).labels.tolist())\n"
        "sys.stdout.flush()\n"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "set")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[-1, -1]\n"
    assert done.stderr == ""
