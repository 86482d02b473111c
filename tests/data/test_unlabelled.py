"""Pictures to predict are those that are named, in their order, with the bytes that lie there."""

import csv
import os
import pickle
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from isthmus.data.pictures import Pictures
from isthmus.data.shard_writer import write_shards
from isthmus.data.sources import open_sides
from isthmus.data.unlabelled import open_unlabelled
from isthmus.errors import DataError, MissingExtraError
from small_runs import class_folders


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return class_folders(tmp_path_factory.mktemp("data") / "photos", {"brick": 4, "flower": 12})


def contents(pictures: Pictures) -> list[bytes]:
    return [pictures.read(index) for index in range(len(pictures))]


def names(pictures: Pictures) -> list[str]:
    return [pictures.name(index) for index in range(len(pictures))]


def files(photos: Path) -> list[Path]:
    """All, in natural order."""
    return [
        photos / kind / f"{number}.{'png' if number % 2 else 'jpg'}"
        for kind, count in (("brick", 4), ("flower", 12))
        for number in range(count)
    ]


def test_files_folders_and_patterns(photos, monkeypatch):
    found = open_unlabelled(photos)
    assert names(found) == list(map(str, files(photos)))
    assert contents(found) == [path.read_bytes() for path in files(photos)]
    assert (found.classes, set(found.labels.tolist())) == ((), {-1})
    some = [photos / "flower" / "2.jpg", photos / "brick", photos / "flower" / "2.jpg"]
    assert names(open_unlabelled(*some)) == [str(some[0]), *map(str, files(photos)[:4])]  # each once
    pattern = str(photos / "**" / "*.png")
    assert sorted(names(open_unlabelled(pattern))) == sorted(map(str, photos.glob("**/*.png")))
    monkeypatch.chdir(photos)
    assert names(open_unlabelled("flower/1*.jpg")) == ["flower/10.jpg"]
    assert names(open_unlabelled(".")) == [str(path.relative_to(photos)) for path in files(photos)]


def test_a_name_with_the_signs_of_a_pattern_is_a_name(photos, tmp_path):
    odd = tmp_path / "odd[1]*.jpg"
    odd.write_bytes(files(photos)[0].read_bytes())
    assert names(open_unlabelled(odd)) == [str(odd)]


def test_lists(photos, tmp_path, monkeypatch):
    chosen = files(photos)[3:9]
    (tmp_path / "some.txt").write_text("\n".join(os.path.relpath(path, tmp_path) for path in chosen) + "\n\n")
    with (tmp_path / "some.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "path"], *([place, path] for place, path in enumerate(chosen))])
    for name in ("some.txt", "some.csv"):
        assert contents(open_unlabelled(tmp_path / name)) == [path.read_bytes() for path in chosen]
    monkeypatch.chdir(tmp_path)
    assert names(open_unlabelled("some.txt")) == (tmp_path / "some.txt").read_text().split()  # as they are listed


def test_shards_with_and_without_labels(photos, tmp_path):
    write_shards({"": open_sides(str(photos))[0]}, tmp_path / "labelled", per_shard=5)
    found = open_unlabelled(tmp_path / "labelled")
    assert sorted(contents(found)) == sorted(path.read_bytes() for path in files(photos))
    assert (found.classes, set(found.labels.tolist())) == ((), {-1})
    bare = tmp_path / "bare.tar"
    with tarfile.open(bare, "w") as archive:
        for place, path in enumerate(files(photos)):
            archive.add(path, f"{place:04d}{path.suffix}")
    for ref in (bare, tmp_path / "*.tar"):
        assert contents(open_unlabelled(ref)) == [path.read_bytes() for path in files(photos)]
    assert names(open_unlabelled(bare))[2] == f"{bare}/0002.jpg"
    with pytest.raises(DataError, match="no label"):
        open_sides(str(bare))


def rows(photos: Path) -> list[bytes]:
    return [path.read_bytes() for path in files(photos)]


@pytest.mark.parametrize("written", ["bytes", "large bytes", "datasets"])
def test_parquet(photos, tmp_path, written):
    """As Arrow writes columns of bytes, and as Hugging Face's library writes pictures; in row groups of three."""
    path, content = tmp_path / "rows.parquet", rows(photos)
    if written == "datasets":
        made = datasets.Dataset.from_dict({"photo": list(map(str, files(photos))), "label": [0] * len(content)})
        made = made.cast_column("photo", datasets.Image())
        made.to_parquet(str(path), batch_size=3)
    else:
        kind = pa.binary() if written == "bytes" else pa.large_binary()
        columns = {"id": range(len(content)), "shot": pa.array(content, kind)}
        parquet.write_table(pa.table(columns), path, row_group_size=3)
    found = open_unlabelled(path)
    assert contents(found) == content
    assert [found.read(place) for place in (15, 0, 7)] == [content[place] for place in (15, 0, 7)]
    assert contents(pickle.loads(pickle.dumps(found))) == content
    assert found.name(5) == f"{path}, row 5"
    assert len({found.identity(place) for place in range(16)}) == 16


def test_several_parquet_files_and_rows_without_a_picture(photos, tmp_path):
    content: list[bytes | None] = [*rows(photos)]
    content[4] = None
    folder = tmp_path / "rows.parquet"  # as Spark writes
    folder.mkdir()
    for place in range(2):
        parquet.write_table(pa.table({"image": content[place * 8 :][:8]}), folder / f"{place}.parquet")
    for refs in ([folder], [folder / "0.parquet", folder / "1.parquet"]):
        found = open_unlabelled(*refs)
        assert found.name(9) == f"{folder / '1.parquet'}, row 1"
        assert [found.read(place) for place in range(16) if place != 4] == [each for each in content if each]
        with pytest.raises(DataError, match=r"0\.parquet, row 4 holds no picture"):
            found.read(4)


def test_kinds_side_by_side(photos, tmp_path):
    parquet.write_table(pa.table({"image": rows(photos)[:2]}), tmp_path / "a.parquet")
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        archive.add(files(photos)[5], "5.jpg")
    found = open_unlabelled(photos / "brick", tmp_path / "a.parquet", tmp_path / "b.tar", files(photos)[7])
    content = rows(photos)
    assert contents(found) == [*content[:4], *content[:2], content[5], content[7]]


def test_what_names_no_pictures(photos, tmp_path, monkeypatch):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "other.csv").write_text("file\na.jpg\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    parquet.write_table(pa.table({"a": [b""], "b": [b""]}), tmp_path / "two.parquet")
    parquet.write_table(pa.table({"a": [1.5]}), tmp_path / "none.parquet")
    (tmp_path / "bare").mkdir()
    for name, message in {
        "gone.jpg": "does not exist",
        "gone.parquet": "does not exist",
        "*.jpg": "matches nothing",
        "empty.txt": "names no pictures",
        "other.csv": r"has the columns \['file'\] and lacks path",
        "broken.parquet": "cannot be read as Parquet",
        "two.parquet": "columns a, b, and it cannot be told which holds pictures",
        "none.parquet": "columns a, and it cannot be told which holds pictures",
        "bare": "holds no pictures",
    }.items():
        with pytest.raises(DataError, match=message):
            open_unlabelled(tmp_path / name)
    with pytest.raises(DataError, match="no pictures are named"):
        open_unlabelled()
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"isthmus\[parquet\]"):
        open_unlabelled(tmp_path / "two.parquet")
