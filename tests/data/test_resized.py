"""Resized pictures: the same pixels kept or not, continued after any cut, within the budget."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.arch.preprocess import IMAGENET, Preprocess
from isthmus.data import cache as module
from isthmus.data.augment import Augment
from isthmus.data.cache import Resized
from isthmus.data.decode import decode
from isthmus.data.loader import Loader
from isthmus.data.pictures import Pictures
from isthmus.data.sources import open_pictures
from isthmus.errors import DataError
from small_runs import paths

RECORD = Preprocess(resize=10, crop=8)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_GRANT", 4096)
    return tmp_path / "cache" / "pictures"


@pytest.fixture
def pictures(make, cache) -> Pictures:
    make("set", {"a": 9}, size=(12, 20))
    return open_pictures(str(make("set", {"b": 4}, size=(31, 16))))


def everything(resized: Resized) -> list[bytes]:
    return [resized.pixels(index).tobytes() for index in range(len(resized.pictures))]


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("[!.]*"))


def test_photographs_are_pillows_to_one_grey_level(photos, cache):
    pictures = Pictures.unlabelled(photos)
    resized = Resized(pictures, 128, IMAGENET)
    for index, path in enumerate(photos):
        whole, found = decode(path), resized.pixels(index)
        theirs = Image.fromarray(whole).resize(found.shape[1::-1], Image.Resampling.BILINEAR)
        assert min(found.shape[:2]) == 128
        assert abs(found.shape[1] / found.shape[0] * whole.shape[0] / whole.shape[1] - 1) < 0.01
        assert np.abs(found.astype(int) - np.asarray(theirs)).max() <= 1


def test_small_pictures_stay_as_they_are(pictures):
    resized = Resized(pictures, 12, RECORD)
    assert np.array_equal(resized.pixels(0), decode(pictures.read(0)))
    assert resized.pixels(12).shape == (23, 12, 3)


def test_kept_pictures_are_the_same_and_need_no_files(pictures, cache):
    cold = Resized(pictures, 10, RECORD)
    options = {"batch_size": 5, "train": True, "augment": Augment(), "record": RECORD, "pictures": pictures}
    loader = Loader(resized=cold, **options)
    first = [batch.images for batch in loader.epoch(0)]
    everything(cold)
    everything(cold)  # before `refresh` they are made again, and kept once
    warm = Resized(pictures, 10, RECORD)
    assert warm.kept == 13
    assert not cold.full
    assert sum(path.stat().st_size for path in files(cache)) == sum(32 + len(pixels) for pixels in everything(warm))
    for path in paths(pictures):
        path.unlink()
    again = [batch.images for batch in Loader(resized=warm, **options).epoch(0)]
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    cold.refresh()
    assert everything(cold) == everything(warm)


def test_crops_are_those_of_the_smaller_picture(pictures):
    """Against a folder that holds the smaller pictures."""
    resized = Resized(pictures, 10, RECORD)
    for index, path in enumerate(paths(pictures)):
        Image.fromarray(resized.pixels(index)).save(path)
    options = {"batch_size": 13, "train": True, "augment": Augment(), "record": RECORD, "pictures": pictures}
    through, plain = next(Loader(resized=resized, **options).epoch(0)), next(Loader(**options).epoch(0))
    assert torch.equal(through.images, plain.images)


def test_a_cut_at_any_byte_loses_no_whole_picture(pictures, cache):
    wanted = everything(Resized(pictures, 10, RECORD))
    (path,) = files(cache)
    content = path.read_bytes()
    ends = [0]
    for pixels in wanted:
        ends.append(ends[-1] + 32 + len(pixels))
    assert ends[-1] == len(content)
    for cut in range(0, len(content), 97):
        path.write_bytes(content[:cut])
        resized = Resized(pictures, 10, RECORD)
        assert resized.kept == sum(end <= cut for end in ends[1:])
        assert everything(resized) == wanted
        assert path.read_bytes() == content
        del resized


def test_ranks_share_what_they_keep(pictures, cache):
    first, second = (Resized(pictures, 10, RECORD, rank=rank) for rank in range(2))
    even = [first.pixels(index).tobytes() for index in range(0, 13, 2)]
    odd = [second.pixels(index).tobytes() for index in range(1, 13, 2)]
    assert len(files(cache)) == 2
    for each in (first, second):
        each.refresh()
        assert each.kept == 13
        assert everything(each)[::2] == even
        assert everything(each)[1::2] == odd


def test_one_process_writes_a_file_and_others_go_on_without(pictures, cache):
    writer, other = Resized(pictures, 10, RECORD), Resized(pictures, 10, RECORD)
    wanted = everything(writer)
    assert everything(other) == wanted
    assert other.full == "another process keeps the same pictures"
    assert not writer.full
    assert sum(path.stat().st_size for path in files(cache)) == sum(32 + len(pixels) for pixels in wanted)


def test_the_budget_ends_it_and_changes_nothing(pictures, cache, monkeypatch):
    wanted = everything(Resized(pictures, 10, RECORD))
    files(cache)[0].unlink()
    monkeypatch.setenv("ISTHMUS_CACHE_GB", "6e-6")
    old = cache.parent / "features" / f"{'0' * 32}.rows"
    old.parent.mkdir()
    old.write_bytes(bytes(3000))
    os.utime(old, (1, 1))
    resized = Resized(pictures, 10, RECORD)
    assert everything(resized) == wanted
    assert resized.full == "the cache may take 6,000 bytes; ISTHMUS_CACHE_GB raises it"
    resized.refresh()
    assert 0 < resized.kept < 13
    assert everything(resized) == wanted
    assert not old.exists()  # what was used longest ago went first
    assert sum(path.stat().st_size for path in files(cache)) <= 6000


def test_a_full_disk_ends_it_and_changes_nothing(pictures, cache):
    wanted = everything(Resized(pictures, 10, RECORD))
    files(cache)[0].unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, limits[1]))
    try:
        resized = Resized(pictures, 10, RECORD)
        assert everything(resized) == wanted
        assert resized.full
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resized.refresh()
    assert 0 < resized.kept < 13
    assert everything(resized) == wanted


def test_other_pictures_sides_and_channels_are_kept_apart(pictures, cache):
    grey = Preprocess(resize=10, crop=8, channels="L", mean=(0.5,), std=(0.5,))
    keys = {Resized(pictures, *each).key for each in ((10, RECORD), (11, RECORD), (10, grey))}
    keys.add(Resized(pictures.subset(range(12)), 10, RECORD).key)
    os.utime(paths(pictures)[3], (1, 1))
    keys.add(Resized(pictures, 10, RECORD).key)
    assert len(keys) == 5
    resized = Resized(pictures, 10, grey)
    assert resized.pixels(0).shape == (10, 17, 1)


def test_an_unreadable_picture_is_named(pictures):
    Path(pictures.name(4)).write_bytes(b"no picture")
    with pytest.raises(DataError, match="is not a picture"):
        Resized(pictures, 10, RECORD).pixels(4)


def test_a_missing_picture_is_left_to_who_reads_it(pictures):
    """With on_error="skip" a run goes on without it, resized pictures or not."""
    Path(pictures.name(4)).unlink()
    resized = Resized(pictures, 10, RECORD)
    loader = Loader(
        pictures=pictures, record=RECORD, batch_size=13, train=False, resized=resized, on_error="skip", threads=1
    )
    (batch,) = loader.epoch(0)
    assert batch.indices.tolist() == [0, 1, 2, 3, *range(5, 13)]
    assert list(loader.unreadable) == [4]


def test_room_made_by_another_process_meanwhile_hurts_nobody(pictures, cache, monkeypatch):
    wanted = everything(Resized(pictures, 10, RECORD))
    resized = Resized(pictures, 10, RECORD, rank=1)
    listing = Path.glob

    def evicting(self, pattern):
        found = list(listing(self, pattern))
        for path in listing(cache, "[!.]*"):
            path.unlink()
        return found

    with monkeypatch.context() as patched:
        patched.setattr(Path, "glob", evicting)
        again = Resized(pictures, 10, RECORD)
    assert again.kept == 0
    assert everything(again) == everything(resized) == wanted


KEEP = """
import sys
from isthmus.arch.preprocess import IMAGENET
from isthmus.data.cache import Resized
from isthmus.data.sources import open_pictures
resized = Resized(open_pictures(sys.argv[1]), 64, IMAGENET)
for index in range(resized.kept, len(resized.pictures)):
    resized.pixels(index)
    print(index, flush=True)
"""


@pytest.mark.long
def test_killed_processes_leave_what_they_kept(make, cache, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("ISTHMUS_CACHE", str(cache.parent))
    folder = make("many", {"a": 300}, size=(80, 100))
    pictures, random = open_pictures(str(folder)), np.random.default_rng(0)
    wanted = [Resized(pictures, 64, IMAGENET, rank=1).pixels(index).tobytes() for index in range(300)]
    files(cache)[0].unlink()
    kept = 0
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", KEEP, str(folder)], stdout=subprocess.PIPE) as process:
            told = [process.stdout.readline() for _ in range(int(random.integers(1, 60)))]
            process.send_signal(signal.SIGKILL)
        found = Resized(pictures, 64, IMAGENET)
        assert found.kept >= kept + sum(map(bool, told))
        kept = found.kept
        del found
    assert everything(Resized(pictures, 64, IMAGENET)) == wanted
