"""Opening folders, tables and the demo set; every way it can be wrong is named."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from isthmus.data import sources
from isthmus.data.order import stratified_folds, stratified_split
from isthmus.data.pictures import Pictures
from isthmus.data.sources import DataSet, elpv_pictures, list_pictures, open_data
from isthmus.errors import DataError, MissingExtraError
from small_runs import paths


def opened(root: Path, **options) -> DataSet:
    return open_data(str(root), **options)


def test_folder_of_classes_is_split_by_class(make):
    data = opened(make("pets", {"cat10": 8, "cat2": 4, "Ant": 4}))
    assert data.classes == ("Ant", "cat2", "cat10")
    assert data.train.counts() == {"Ant": 3, "cat2": 3, "cat10": 6}
    assert data.val.counts() == {"Ant": 1, "cat2": 1, "cat10": 2}
    assert not set(paths(data.train)) & set(paths(data.val))
    assert all(
        path.parent.name == data.classes[label] for path, label in zip(paths(data.val), data.val.labels, strict=True)
    )


def test_seed_and_fraction_decide_the_split(make):
    root = make("pets", {"a": 10, "b": 10})
    assert opened(root, seed=1) == opened(root, seed=1)
    assert opened(root, seed=1) != opened(root, seed=2)
    assert len(opened(root, val_fraction=0.5).val) == 10


def test_pictures_are_found_at_any_depth_in_natural_order(make, tmp_path: Path):
    make("pets/a", {"10": 1, "9": 11, ".hidden": 1})
    make("pets", {"b": 2, ".trash": 3})
    (tmp_path / "pets/a/notes.txt").write_text("x")
    (tmp_path / "pets/a/.2.png").write_text("x")
    (tmp_path / "pets/b/0.png").rename(tmp_path / "pets/b/A.PNG")
    found = list_pictures(tmp_path / "pets")
    names = [path.relative_to(tmp_path / "pets").as_posix() for path in found]
    assert names == [*(f"a/9/{place}.png" for place in range(11)), "a/10/0.png", "b/1.png", "b/A.PNG"]
    assert len(opened(tmp_path / "pets").train) + len(opened(tmp_path / "pets").val) == 14


@pytest.mark.parametrize("name", ["val", "Valid", "validation", "test"])
def test_train_and_val_folders(make, name):
    root = make("set/train", {"x": 3, "y": 2}).parent
    make(f"set/{name}", {"x": 1, "y": 1})
    data = open_data(str(root))
    assert (len(data.train), len(data.val)) == (5, 2)
    assert {path.parent.parent.name for path in paths(data.val)} == {name}


def test_val_comes_before_test_and_train_alone_is_split(make):
    root = make("set/train", {"x": 4, "y": 4}).parent
    assert len(opened(root).val) == 2
    make("set/test", {"x": 3, "y": 3})
    make("set/val", {"x": 1, "y": 1})
    assert {path.parent.parent.name for path in paths(opened(root).val)} == {"val"}


def test_symlinked_class_folders(make, tmp_path: Path):
    real = make("real", {"a": 2, "b": 2})
    (tmp_path / "links").mkdir()
    for name in ("a", "b"):
        (tmp_path / "links" / name).symlink_to(real / name)
    assert opened(tmp_path / "links").classes == ("a", "b")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({}, "no class folders"),
        ({"a": 2, "b": 2, "c": 0}, r"class folders \['c'\] hold no pictures"),
        ({"a": 4}, "one class"),
        ({"a": 4, "b": 1}, r"classes \['b'\] have 1 picture"),
    ],
)
def test_unusable_folders(make, tmp_path: Path, classes, message):
    (tmp_path / "set").mkdir()
    make("set", classes)
    with pytest.raises(DataError, match=message) as raised:
        open_data(str(tmp_path / "set"))
    assert str(tmp_path / "set") in str(raised.value)


def test_missing_folder_and_file_for_a_folder(tmp_path: Path):
    with pytest.raises(DataError, match="does not exist"):
        open_data(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"):
        open_data(str(tmp_path / "file"))


def test_pictures_beside_class_folders(make, tmp_path: Path):
    root = make("set", {"a": 2, "b": 2})
    (root / "a/0.png").rename(root / "loose.png")
    with pytest.raises(DataError, match=r"1 pictures beside its class folders \(loose.png\)"):
        opened(root)


def test_train_and_val_of_different_classes(make):
    root = make("set/train", {"x": 2, "y": 2}).parent
    make("set/val", {"x": 2, "z": 2})
    with pytest.raises(DataError, match=r"only in train: \['y'\]; only in val: \['z'\]"):
        opened(root)


def table(tmp_path: Path, text: str) -> str:
    for name in ("one", "two", "three", "four"):
        (tmp_path / f"{name}.png").touch()
    (tmp_path / "set.csv").write_text(text, encoding="utf-8")
    return str(tmp_path / "set.csv")


def test_csv(tmp_path: Path):
    absolute = tmp_path / "four.png"
    ref = table(tmp_path, f"\ufeffpath,label,note\none.png,b,\n\ntwo.png,a,x\nthree.png, b,\n{absolute},a,\n")
    data = open_data(ref, val_fraction=0.5)
    assert data.classes == ("a", "b")
    assert data.train.counts() == data.val.counts() == {"a": 1, "b": 1}
    assert absolute in paths(data.train) + paths(data.val)


def test_csv_with_its_own_split(tmp_path: Path):
    rows = "split,label,path\ntrain,a,one.png\nval,a,two.png\ntrain,b,three.png\nval,b,four.png\n"
    data = open_data(table(tmp_path, rows))
    assert [path.name for path in paths(data.train)] == ["one.png", "three.png"]
    assert [path.name for path in paths(data.val)] == ["two.png", "four.png"]
    assert data.val.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"lacks \['path', 'label'\]"),
        ("file,label\none.png,a\n", r"has the columns \['file', 'label'\] and lacks \['path'\]"),
        ("path,label\n", "no rows"),
        ("path,label\none.png,a\ntwo.jpg,b\n", r"line 3: there is no file .*two\.jpg"),
        ("path,label\n,a\n", "line 2: there is no file"),
        ("path,label\none.png,a\ntwo.png,\n", "line 3: the label is empty"),
        ("path,label\none.png\n", "line 2: the label is empty"),
        ("path,label\none.png,a\ntwo.png,b\none.png,b\n", "line 4: .* is also in line 2"),
        ("path,label\none.png,a\ntwo.png,b\n./one.png,b\n", "line 4: .* is also in line 2"),
        ("path,label,split\none.png,a,train\ntwo.png,b,dev\n", "split is 'dev'"),
        ("path,label,split\none.png,a,train\ntwo.png,b,val\n", "classes of train and val differ"),
        ("path,label\none.png,a\ntwo.png,a\n", "one class"),
        ("path,label\none.png,a\ntwo.png,a\nthree.png,b\n", r"classes \['b'\] have 1 picture"),
    ],
)
def test_unusable_tables(tmp_path: Path, text, message):
    ref = table(tmp_path, text)
    with pytest.raises(DataError, match=message) as raised:
        open_data(ref)
    assert ref in str(raised.value)


def test_unreadable_tables(tmp_path: Path):
    with pytest.raises(DataError, match="cannot be read"):
        open_data(str(tmp_path / "none.csv"))
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00path")
    with pytest.raises(DataError, match="UTF-8"):
        open_data(str(tmp_path / "binary.csv"))


def test_elpv_has_every_cell():
    pictures = elpv_pictures()
    assert pictures.counts() == {"defective": 821, "functional": 1803}
    assert all(path.is_file() for path in paths(pictures))


def test_elpv_splits_are_what_their_rule_makes():
    listed = json.loads(Path(sources.__file__).with_name("elpv_splits.json").read_text())["test"]
    labels = elpv_pictures().labels
    assert listed == [stratified_split(labels, 0.25, seed)[1] for seed in range(10)]
    assert len({tuple(split) for split in listed}) == 10


def test_elpv_split():
    data = open_data("elpv:3")
    assert data.name == "elpv:3"
    assert (len(data.train), len(data.val)) == (1968, 656)
    assert data.val.counts() == {"defective": 205, "functional": 451}
    assert not set(paths(data.train)) & set(paths(data.val))
    undivided, first = open_data("elpv"), open_data("elpv:0")
    assert (undivided.train, undivided.val) == (first.train, first.val)
    assert len(open_data("elpv", val_fraction=0.1, seed=5).val) == 262


def test_elpv_folds():
    pictures = elpv_pictures()
    folds = stratified_folds(pictures.labels, 10, seed=0)
    assert sorted(index for fold in folds for index in fold) == list(range(2624))
    assert {len(fold) for fold in folds} == {262, 263}
    assert {pictures.subset(fold).counts()["defective"] for fold in folds} == {82, 83}


@pytest.mark.parametrize("ref", ["elpv:10", "elpv:-1", "elpv:x"])
def test_unknown_elpv_split(ref):
    with pytest.raises(DataError, match=r"splits 0\.\.9"):
        open_data(ref)


def test_elpv_not_installed(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(sources, "distribution", absent)
    with pytest.raises(MissingExtraError, match=r'pip install "isthmus\[demo\]"'):
        open_data("elpv")


def test_elpv_is_not_imported_and_data_not_by_the_package():
    code = (
        "import sys, isthmus\n"
        "assert not {'torch', 'PIL', 'numpy', 'isthmus.data.sources'} & set(sys.modules)\n"
        "from isthmus.data.sources import open_data\n"
        "open_data('elpv:0')\n"
        "assert 'elpv_dataset' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_list_pictures(make, tmp_path: Path):
    root = make("set", {"a": 2, "b": 1})
    odd = tmp_path / "scan.raw"
    odd.touch()
    assert list_pictures(str(odd), root, root / "a/0.png") == (
        odd,
        root / "a/0.png",
        root / "a/1.png",
        root / "b/0.png",
    )
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        list_pictures(tmp_path / "bare")
    with pytest.raises(DataError, match=r"none\.png does not exist"):
        list_pictures(root, tmp_path / "none.png")


def test_both_sides_have_every_class():
    pictures = Pictures.of_files("abc", (0, 1, 0), ("x", "y"))
    with pytest.raises(DataError, match="differ"):
        DataSet(name="set", train=pictures, val=pictures.subset([0]))
