"""isthmus shards, as people call it."""

import json

import pytest

from isthmus.data import shard_writer
from isthmus.data.sources import open_data, open_pictures
from small_runs import class_folders


@pytest.fixture
def folder(tmp_path):
    root = class_folders(tmp_path / "set/train", {"flower": 5, "temple": 4}).parent
    class_folders(root / "val", {"flower": 2, "temple": 3})
    return root


def test_shards(isthmus, folder, tmp_path):
    (folder / "train/temple/0.jpg").write_bytes(b"no picture")
    out = tmp_path / "out"
    result = isthmus("shards", str(folder), str(out), "--pictures-per-shard", "3")
    assert result.status == 0
    assert "2 classes" in result.out
    assert f"Train on it: isthmus train --data {out}" in result.out
    assert result.err.startswith(f"left out {folder}/train/temple/0.jpg is not a picture (what can be read: JPEG, ")
    assert result.err.endswith("); copy it again or leave it out\n")
    assert result.err.count("\n") == 1
    data = open_data(str(out))
    assert (data.train.counts(), data.val.counts()) == ({"flower": 5, "temple": 3}, {"flower": 2, "temple": 3})


def test_what_is_left_out_of_both_sides_is_counted(isthmus, folder, tmp_path):
    (folder / "train/temple/0.jpg").write_bytes(b"")
    whole = (folder / "val/flower/0.jpg").read_bytes()
    (folder / "val/flower/0.jpg").write_bytes(whole[: len(whole) // 2])
    result = isthmus("shards", str(folder), str(tmp_path / "out"))
    first, second, total = result.err.splitlines()
    assert first == f"left out {folder}/train/temple/0.jpg is empty; copy it again or leave it out"
    assert second.startswith(f"left out {folder}/val/flower/0.jpg cannot be decoded: ")
    assert total == "2 of 14 pictures could not be read"


@pytest.mark.parametrize(
    "out", ["set", "set/train", "set/shards", "set/train/temple/deep/er", "set/../set/x", "link/x"]
)
def test_a_folder_among_the_pictures_is_refused(isthmus, folder, tmp_path, out):
    (tmp_path / "link").symlink_to(folder)
    before = sorted(tmp_path.rglob("*"))
    result = isthmus("shards", str(folder), f"{tmp_path}/{out}")
    assert (result.status, result.out) == (2, "")
    assert f"{out} would lie among the pictures of {folder}; choose another folder" in result.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_beside_the_pictures_is_taken(isthmus, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isthmus("shards", "set", "set-shards").status == 0
    assert len(open_pictures("set-shards")) == 14


def test_stopped(isthmus, folder, tmp_path, monkeypatch):
    fill, left = shard_writer._fill, [1]

    def stopping(path, **rest):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        fill(path, **rest)

    monkeypatch.setattr(shard_writer, "_fill", stopping)
    command = ("shards", str(folder), str(tmp_path / "out"), "--pictures-per-shard", "3")
    stopped = isthmus(*command)
    assert (stopped.status, stopped.err) == (130, "stopped; the same command goes on\n")
    monkeypatch.setattr(shard_writer, "_fill", fill)
    assert isthmus(*command).status == 0
    assert len(open_data(str(tmp_path / "out")).train) == 9


def test_json(isthmus, folder, tmp_path):
    out = tmp_path / "out"
    told = json.loads(isthmus("shards", str(folder / "train"), str(out), "--json").out)
    (side,) = told["sides"]
    assert told["out"] == str(out)
    assert side == {
        "side": "all",
        "shards": 1,
        "pictures": 9,
        "bytes": (out / "all-000000.tar").stat().st_size,
        "left_out": [],
    }
    assert len(open_pictures(str(out))) == 9


def test_a_folder_in_use(isthmus, folder, tmp_path):
    isthmus("shards", str(folder), str(tmp_path / "out"))
    again = isthmus("shards", str(folder), str(tmp_path / "out"))
    assert (again.status, again.err) == (
        2,
        f"isthmus: {tmp_path / 'out'} holds shards already; choose another folder\n",
    )
    assert isthmus("shards", str(folder), str(tmp_path / "new"), "--pictures-per-shard", "0").status == 2
