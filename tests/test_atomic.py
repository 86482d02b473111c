"""Files that are there whole or not at all."""

import errno
import os

import pytest

from isthmus.atomic import atomic_write
from isthmus.errors import RunError


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "a.txt"
    atomic_write(path, lambda target: target.write_text("one"))
    atomic_write(path, lambda target: target.write_text("two"))
    assert path.read_text() == "two"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()

    def private(target):
        target.unlink()
        os.close(os.open(target, os.O_CREAT, 0o600))

    atomic_write(tmp_path / "a", private)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failure_leaves_the_old_file_alone(tmp_path, monkeypatch, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
        atomic_write(path, lambda target: target.write_text("new"))
    if isinstance(error, OSError):
        assert str(raised.value) == f"cannot write {path}: No space left on device; nothing was changed"
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_missing_folder(tmp_path):
    with pytest.raises(RunError, match="No such file or directory"):
        atomic_write(tmp_path / "no" / "a", lambda target: target.write_text("x"))
