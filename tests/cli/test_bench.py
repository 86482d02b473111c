"""The command bench: what it measures, for people and for scripts."""

import json
import threading

import pytest

from small_runs import class_folders


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    return class_folders(tmp_path / "set", {"flower": 5, "temple": 4})


def bench(isthmus, folder, *more):
    options = ("--arch", "resnet10t", "--batch-size", "4", "--image-size", "32", "--seconds", "0.05", "--device", "cpu")
    return isthmus("bench", "data", str(folder), *options, *more)


def test_data_json(isthmus, folder):
    found = json.loads(bench(isthmus, folder, "--json").out)
    assert (found["unit"], found["arch"], found["device"]) == ("pictures/s", "resnet10t", "cpu")
    assert [row["loader"] for row in found["rows"]] == [
        "uint8 batches",
        "normalised batches",
        "normalised, from resized pictures",
    ]
    for row in found["rows"]:
        assert row["binds"] == ("loader" if row["loader_alone"] < row["step_alone"] else "step")
        together = 1 / row["loader_alone"] + 1 / row["step_alone"]  # one after the other, as they share the cores
        assert row["together"] == pytest.approx(1 / together)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("isthmus-decode")]


def test_data_table(isthmus, folder):
    (folder / "flower" / "0.jpg").write_bytes(b"no picture")
    result = bench(isthmus, folder)
    assert (result.status, result.err) == (0, "")
    assert "resnet10t at 32 px, 4 a step" in result.out
    assert "pictures that could not be read: 1" in result.out


def test_data_without_pictures(isthmus, tmp_path):
    result = bench(isthmus, tmp_path / "none")
    assert result.status == 2
    assert "does not exist" in result.err
