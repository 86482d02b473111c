"""One folder and one budget for everything that is kept."""

import os
from pathlib import Path

import pytest

from isthmus.cache import budget, cache_folder, make_room
from isthmus.errors import RunError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(path: Path, size: int, used: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (used, used))
    return path


def test_what_was_used_longest_ago_goes_first(folder, monkeypatch):
    monkeypatch.setenv("ISTHMUS_CACHE_GB", "0.000001")  # a thousand bytes
    names = {"b": f"{'0' * 32}.rows", "a": f"{'f' * 32}.0", "c": f"{'7' * 32}.index"}
    old, new, newest = (fill(folder / kind / name, 400, used) for used, (kind, name) in enumerate(names.items(), 1))
    lock = fill(folder / "b" / ".lock", 400, 0)
    assert make_room(200)
    assert [path.exists() for path in (old, new, newest, lock)] == [False, True, True, True]
    assert make_room(200)
    assert new.exists()
    assert not make_room(1001)
    assert new.exists()
    assert make_room(1000)
    assert not new.exists()
    assert not newest.exists()


def test_files_of_others_stay_and_do_not_count(folder, monkeypatch):
    monkeypatch.setenv("ISTHMUS_CACHE_GB", "0.000001")
    others = [fill(folder / name, 900, 0) for name in ("thesis.pdf", "pictures/cat.jpg", "pictures/old/1.jpg")]
    mine = fill(folder / "pictures" / f"{'0' * 32}.0", 400, 1)
    assert make_room(600)
    assert mine.exists()
    assert make_room(601)
    assert not mine.exists()
    assert all(path.exists() for path in others)


def test_the_usual_budget_is_a_part_of_the_disk(folder, monkeypatch):
    monkeypatch.delenv("ISTHMUS_CACHE_GB", raising=False)
    stat = os.statvfs(folder.parent)
    assert 0 < budget() < stat.f_frsize * stat.f_blocks / 4
    for said in ("much", "inf"):
        monkeypatch.setenv("ISTHMUS_CACHE_GB", said)
        with pytest.raises(RunError, match=f"'{said}'; it must be a number of gigabytes"):
            budget()


def test_where_it_is(folder, monkeypatch, tmp_path):
    assert cache_folder("shards") == folder / "shards"
    monkeypatch.delenv("ISTHMUS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "isthmus"
