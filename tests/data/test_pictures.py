"""Pictures as arrays: what they say of themselves, and that a million of them are small."""

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.data.pictures import Files, Names, Pictures, Store, joined, natural
from isthmus.errors import DataError
from small_runs import paths


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=9)))
def test_names_come_back(names):
    packed = Names(names)
    assert [packed[place] for place in range(len(packed))] == names
    assert packed == pickle.loads(pickle.dumps(packed))


def test_a_name_that_is_not_unicode(tmp_path: Path):
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(b"x")
    assert Pictures.of_files([tmp_path / name], [0], ["a"]).read(0) == b"x"


def test_many_names_are_their_bytes_and_eight_more():
    names = Names(f"n{number % 1000:08d}/n{number % 1000:08d}_{number}.JPEG" for number in range(200_000))
    pictures = Pictures.stored(Files("/data/train", names), np.zeros(len(names), np.int64), ["all"])
    assert pictures.name(199_999) == "/data/train/n00000999/n00000999_199999.JPEG"
    arrays = names.ends.nbytes + pictures.labels.nbytes + pictures.places.nbytes
    assert arrays + sys.getsizeof(names.packed) < 60 * len(names)


def test_subset_and_counts():
    pictures = Pictures.of_files("abc", (0, 1, 0), ("x", "y"))
    assert pictures.subset([2, 0]) == pictures.subset(np.array([2, 0]))
    assert paths(pictures.subset([2, 0])) == [Path("c"), Path("a")]
    assert pictures.subset([0]).counts() == {"x": 1, "y": 0}
    assert len(pictures.subset([])) == 0
    assert Pictures.unlabelled("abc").labels.tolist() == [-1, -1, -1]
    assert Pictures.unlabelled("abc").counts() == {}


def test_equality():
    pictures = Pictures.of_files("abc", (0, 1, 0), ("x", "y"))
    assert pictures == Pictures.of_files(map(Path, "abc"), [0, 1, 0], ["x", "y"])
    assert pictures == pickle.loads(pickle.dumps(pictures))
    for other in (
        Pictures.of_files("abd", (0, 1, 0), ("x", "y")),
        Pictures.of_files("abc", (0, 1, 1), ("x", "y")),
        Pictures.of_files("abc", (0, 1, 0), ("x", "z")),
        pictures.subset([0, 2, 1]),
    ):
        assert pictures != other


def test_sums():
    """Of one store, of two, and of two that name other classes; each picture keeps its file and its class."""
    whole = Pictures.of_files("abcd", (0, 1, 0, 1), ("x", "y"))
    assert whole.subset([0, 1]) + whole.subset([2, 3]) == whole
    reversed_classes = Pictures.of_files("ef", (0, 1), ("y", "x"))
    kept = whole + Pictures.of_files("ef", (0, 1), ("x", "y"))
    assert kept.classes == ("x", "y")
    other = whole + reversed_classes + Pictures.of_files("g", [0], ["x10", "unused"])
    assert other.classes == ("x", "x10", "y")
    assert [other.classes[label] for label in other.labels] == ["x", "y", "x", "y", "y", "x", "x10"]
    assert paths(other) == [Path(name) for name in "abcdefg"]
    assert [other.subset([6]).name(0), other.subset([1, 4]).name(1)] == ["g", "e"]
    assert whole.under(("y", "z", "x")).labels.tolist() == [2, 0, 2, 0]


def test_reading_and_identity(tmp_path: Path):
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode())
    one, two = (Pictures.unlabelled([tmp_path / name]) for name in "ab")
    both = one + two
    assert [both.read(0), both.read(1)] == [b"a", b"b"]
    assert both.identity(1) == two.identity(0) != one.identity(0)
    before = both.identity(1)
    (tmp_path / "b").write_bytes(b"changed")
    assert both.identity(1) != before
    (tmp_path / "b").unlink()
    with pytest.raises(DataError, match=r"/b cannot be read: No such file"):
        both.read(1)
    assert both.identity(1) not in (before, both.identity(0))


def test_natural_order():
    names = ["cell10", "Cell2", "cell2", "b", "cell2b", "10", "9"]
    assert sorted(names, key=natural) == ["9", "10", "b", "Cell2", "cell2", "cell2b", "cell10"]


class Listening(Store):
    """Ten pictures in the cloud."""

    def __init__(self, letter: str) -> None:
        self.letter, self.heard = letter, list[int]()

    def __len__(self) -> int:
        return 10

    def read(self, place: int) -> bytes:
        return f"{self.letter}{place}".encode()

    def name(self, place: int) -> str:
        return f"{self.letter}{place}"

    def identity(self, place: int) -> tuple[str, ...]:
        return (self.name(place),)

    def expect(self, places: np.ndarray) -> None:
        self.heard += places.tolist()


def test_stores_side_by_side_hear_what_is_read_soon():
    a, b, c = map(Listening, "abc")
    every = Pictures.stored(joined([joined([a, b]), c]), np.zeros(30), ["all"])
    assert [every.name(place) for place in (0, 9, 10, 20, 29)] == ["a0", "a9", "b0", "c0", "c9"]
    every.subset([29, 10, 19, 3]).expect(np.arange(3))
    assert (a.heard, sorted(b.heard), c.heard) == ([], [0, 9], [9])


def test_thousands_of_stores():
    """Named one by one, as a shell expands shards/*.tar."""
    every = sum((Pictures.unlabelled([f"{number}"]) for number in range(1, 2000)), Pictures.unlabelled(["0"]))
    assert [every.name(place) for place in range(2000)] == [str(place) for place in range(2000)]
    assert every == pickle.loads(pickle.dumps(every))
