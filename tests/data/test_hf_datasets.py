"""Data sets of Hugging Face's library, made by that library: read without decoding, told apart, explained when odd."""

import os
import pickle
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from isthmus.data.decode import decode
from isthmus.data.pictures import Pictures
from isthmus.data.sources import open_data, open_pictures
from isthmus.errors import DataError, MissingExtraError
from small_runs import class_folders

COUNTS = {"flower": 6, "temple": 8}


@pytest.fixture(autouse=True, scope="module")
def library(tmp_path_factory):
    """The library, without a network and with a cache of its own."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(home))
        patch.setenv("HF_HUB_OFFLINE", "1")
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        datasets.disable_progress_bars()
        yield datasets


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return class_folders(tmp_path_factory.mktemp("pictures") / "set", COUNTS)


@pytest.fixture(scope="module")
def rows(folder) -> list[tuple[bytes, int]]:
    pictures = open_pictures(str(folder))
    return [(pictures.read(index), int(pictures.labels[index])) for index in range(len(pictures))]


def made(library, rows, label=None, image=None):
    """A data set of these rows in memory."""
    label = library.ClassLabel(names=list(COUNTS)) if label is None else label
    features = library.Features({"image": image or library.Image(), "label": label})
    images = [None if inside is None else {"bytes": inside, "path": None} for inside, _ in rows]
    return library.Dataset.from_dict({"image": images, "label": [each for _, each in rows]}, features=features)


def shown(pictures: Pictures) -> list[tuple[bytes, str]]:
    return [(pictures.read(index), pictures.classes[pictures.labels[index]]) for index in range(len(pictures))]


@pytest.fixture
def wanted(rows) -> list[tuple[bytes, str]]:
    return [(inside, list(COUNTS)[label]) for inside, label in rows]


def test_saved_to_disk(library, rows, wanted, tmp_path):
    made(library, rows).save_to_disk(str(tmp_path / "one"))
    pictures = open_pictures(str(tmp_path / "one"))
    assert shown(pictures) == wanted
    assert pictures.classes == ("flower", "temple")
    assert pictures.name(3) == f"{tmp_path / 'one'}, row 3"
    assert shown(pickle.loads(pickle.dumps(pictures))) == wanted
    assert pictures == open_pictures(str(tmp_path / "one"))
    assert open_data(str(tmp_path / "one"), val_fraction=0.5).val.counts() == {"flower": 3, "temple": 4}


def test_pictures_are_what_the_library_decodes(library, rows, tmp_path):
    made(library, rows).save_to_disk(str(tmp_path / "one"))
    theirs = library.load_from_disk(str(tmp_path / "one"))
    ours = open_pictures(str(tmp_path / "one"))
    for index, row in enumerate(theirs):
        assert decode(ours.read(index)).tobytes() == row["image"].convert("RGB").tobytes()
        assert ours.labels[index] == row["label"]


@pytest.mark.parametrize("val", ["validation", "test"])
def test_splits(library, rows, wanted, tmp_path, val):
    halves = {"train": rows[::2], val: rows[1::2]}
    splits = library.DatasetDict({name: made(library, half) for name, half in halves.items()})
    splits.save_to_disk(str(tmp_path / "both"))
    (tmp_path / "parquet/data").mkdir(parents=True)
    for name, split in splits.items():
        split.to_parquet(str(tmp_path / f"parquet/data/{name}-00000-of-00001.parquet"))
    for ref in (str(tmp_path / "both"), f"hf:{tmp_path / 'both'}", str(tmp_path / "parquet")):
        data = open_data(ref)
        assert (shown(data.train), shown(data.val)) == (wanted[::2], wanted[1::2]), ref
        assert data.name == ref
    assert shown(open_pictures(f"hf:{tmp_path / 'both'}:{val}")) == wanted[1::2]
    with pytest.raises(DataError, match=rf"has no split dev; it has train, {val}"):
        open_data(f"hf:{tmp_path / 'parquet'}:dev")


def test_a_folder_of_pictures_by_the_library(folder, wanted):
    assert sorted(shown(open_pictures(f"hf:{folder}"))) == sorted(wanted)


def test_rows_in_another_order(library, rows, wanted, tmp_path):
    order = [3, 0, 13, 7]
    made(library, rows).select(order).save_to_disk(str(tmp_path / "some"))
    assert shown(open_pictures(str(tmp_path / "some"))) == [wanted[place] for place in order]


@pytest.mark.parametrize("kind", ["names", "numbers"])
def test_labels_without_classes(library, rows, wanted, tmp_path, kind):
    if kind == "names":
        found = made(library, [(inside, list(COUNTS)[label]) for inside, label in rows], library.Value("string"))
    else:
        found = made(library, [(inside, 10 - label) for inside, label in rows], library.Value("int64"))
    found.save_to_disk(str(tmp_path / "one"))
    pictures = open_pictures(str(tmp_path / "one"))
    assert pictures.classes == (("flower", "temple") if kind == "names" else ("9", "10"))
    names = {"flower": "10", "temple": "9"} if kind == "numbers" else {name: name for name in COUNTS}
    assert shown(pictures) == [(inside, names[name]) for inside, name in wanted]


def test_bytes_without_the_library_s_own_type(library, rows, wanted, tmp_path):
    """As other programs write Parquet: a structure of bytes and path, no word of images."""
    plain = {"bytes": library.Value("binary"), "path": library.Value("string")}
    made(library, rows, image=plain).save_to_disk(str(tmp_path / "one"))
    assert shown(open_pictures(str(tmp_path / "one"))) == wanted


def test_identity_changes_with_the_files(library, rows, tmp_path):
    path = tmp_path / "one"
    made(library, rows).save_to_disk(str(path))
    before = open_pictures(str(path))
    assert len({before.identity(index) for index in range(len(before))}) == len(before)
    for file in path.glob("*.arrow"):
        os.utime(file, (1, 1))
    after = open_pictures(str(path))
    assert before.identity(0) != after.identity(0)
    assert before != after


def test_unusable_data_sets(library, rows, tmp_path):
    def opened(found) -> None:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        found.save_to_disk(str(path))
        open_data(str(path))

    whole = made(library, rows)
    with pytest.raises(DataError, match=r"columns label and lacks an image column"):
        opened(whole.remove_columns("image"))
    with pytest.raises(DataError, match=r"columns image and lacks one column of labels \(or one named label\)"):
        opened(whole.remove_columns("label"))
    two = whole.rename_column("label", "x").add_column("y", [0] * 14)
    with pytest.raises(DataError, match="lacks one column of labels"):
        opened(two.cast_column("y", library.ClassLabel(names=["a"])))
    with pytest.raises(DataError, match="1 rows have no label in label"):
        opened(made(library, [*rows, (rows[0][0], -1)]))
    with pytest.raises(DataError, match="the column image holds no pictures"):
        opened(whole.remove_columns("image").add_column("image", list(range(14))))
    halves = library.DatasetDict({"left": whole, "right": whole})
    with pytest.raises(DataError, match=r"splits left, right and none called train; name one: hf:NAME:SPLIT"):
        opened(halves)


def test_a_row_without_a_picture_is_named(library, rows, tmp_path):
    made(library, [*rows, (None, 0)]).save_to_disk(str(tmp_path / "one"))
    pictures = open_pictures(str(tmp_path / "one"))
    with pytest.raises(DataError, match="one, row 14 holds no picture"):
        pictures.read(14)


def test_what_cannot_be_reached_is_said_in_the_library_s_words():
    with pytest.raises(DataError, match=r"nobody/nothing cannot be loaded: .*nobody/nothing.*; check the name"):
        open_data("hf:nobody/nothing")


def test_the_library_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r'pip install "isthmus\[datasets\]"'):
        open_data("hf:nobody/nothing")


def test_other_sources_import_no_library(folder):
    code = (
        "import sys\n"
        "from isthmus.data.sources import open_data\n"
        "open_data(sys.argv[1])\n"
        "assert not {'datasets', 'fsspec', 'pyarrow', 'safetensors'} & set(sys.modules), sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(folder)], check=True)


def test_pictures_are_not_decoded_to_be_read(library, tmp_path):
    """Bytes come back as they were saved, whatever they are."""
    buffer = BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    found = [(buffer.getvalue(), 0), (b"no picture", 1)]
    made(library, found).save_to_disk(str(tmp_path / "one"))
    assert open_pictures(str(tmp_path / "one")).read(1) == b"no picture"
