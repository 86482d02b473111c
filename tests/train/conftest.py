"""A small data set of real pictures, and a place of its own for cached features."""

from pathlib import Path

import pytest

from isthmus.data.sources import DataSet, open_data
from isthmus.runtime import Machine, machine
from small_runs import class_folders


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ISTHMUS_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> DataSet:
    root = class_folders(tmp_path_factory.mktemp("pictures"), {"flower": 10, "temple": 16})
    return open_data(str(root))


@pytest.fixture
def here() -> Machine:
    return machine("cpu")
