"""Where labelled pictures come from: class folders, tables, shards, Hugging Face data sets, the demo set."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from csv import DictReader
from csv import Error as CsvError
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from itertools import chain
from pathlib import Path
from typing import cast

import numpy as np

from isthmus.data.decode import extensions
from isthmus.data.hf_datasets import is_saved, open_splits, rows_of
from isthmus.data.order import stratified_split
from isthmus.data.pictures import Files, Names, Pictures, Store, natural
from isthmus.data.shards import Shards, open_shards
from isthmus.errors import DataError, MissingExtraError

__all__ = [
    "DataSet",
    "elpv_pictures",
    "holds_shards",
    "list_pictures",
    "open_data",
    "open_pictures",
    "open_sides",
    "picture_files",
]

VAL_NAMES = ("val", "valid", "validation", "test")  # the first that there is validates
_ELPV_SPLITS = Path(__file__).with_name("elpv_splits.json")

Sides = tuple[Pictures, Pictures | None]
"""Pictures to train on and to validate on; all of them and None where a source comes undivided."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """Pictures to train on and pictures to validate on, of the same classes; `name` is what the user asked for.

    Raises DataError when there are fewer than two classes, or when a side lacks a class.
    """

    name: str
    train: Pictures
    val: Pictures

    def __post_init__(self) -> None:
        train, val = ({name for name, count in side.counts().items() if count} for side in (self.train, self.val))
        if train != val:
            raise DataError(
                f"{self.name}: the classes of train and val differ (only in train: {sorted(train - val)}; "
                f"only in val: {sorted(val - train)}); give both sides pictures of every class"
            )
        if len(self.classes) < 2:
            raise DataError(f"{self.name} has one class, {list(self.classes)}; telling classes apart needs two or more")

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the labels."""
        return self.train.classes


def open_data(ref: str, *, val_fraction: float = 0.25, seed: int = 0) -> DataSet:
    """The data set that a user names.

    A folder of class folders, or of train and val (valid, validation, test) folders that hold these; a .csv table; tar
    shards in a folder, at an address or by name (`open_shards`); a folder of Parquet files or of a saved Hugging Face
    data set; one by name, "hf:NAME" or "hf:NAME:SPLIT"; the demo set, "elpv" or "elpv:3" (its split 3). A source that
    comes undivided is split by class: `val_fraction` of each class validates, `seed` says which.
    Raises DataError saying what is wrong with it and how to mend it, MissingExtraError for a library that is missing.
    """
    train, val = open_sides(ref)
    if val is None:
        return _divided(ref, train, val_fraction, seed)
    return DataSet(name=ref, train=train, val=val)


def open_pictures(ref: str) -> Pictures:
    """Every labelled picture of what `open_data` takes, undivided: also of a single class, and one of a class."""
    train, val = open_sides(ref)
    return train if val is None else train + val


def open_sides(ref: str) -> Sides:
    """The pictures of what `open_data` takes: to train on and to validate on, or all and None where undivided."""
    train, val = _opened(ref)
    if val is None:
        return train, None
    both, cut = train + val, len(train)  # under one list of classes, so that a class on one side only is seen as such
    return both.subset(range(cut)), both.subset(range(cut, len(both)))


def _opened(ref: str) -> Sides:
    if ref.partition(":")[0] == "elpv":
        return _elpv(ref)
    if ref.startswith("hf:"):
        return _hf_sides(ref, *ref.removeprefix("hf:").split(":", 1))
    if "://" in ref or ref.endswith(".tar"):
        return _shard_sides(open_shards(ref))
    path = Path(ref).expanduser()
    if ref.lower().endswith(".csv"):
        return _csv_sides(path)
    if holds_shards(path):
        return _shard_sides(open_shards(str(path)))
    if is_saved(path):
        return _hf_sides(ref, str(path))
    return _folder_sides(path)


def holds_shards(folder: Path) -> bool:
    """Whether a folder holds tar shards, in it or in its folder train."""
    return any(next(folder.glob(pattern), None) for pattern in ("*.tar", "[Tt]rain/*.tar"))


def _train_and_val(names: Iterable[str]) -> tuple[str | None, str | None]:
    """Which of the names of parts (folders, shards, splits) stand for the two sides; None where there is no such."""
    known = set(names)
    return "train" if "train" in known else None, next((name for name in VAL_NAMES if name in known), None)


def _folder_sides(root: Path) -> Sides:
    """A folder with a folder for each class; or with `train` and `val` (valid, validation, test) that hold these.

    Pictures may lie at any depth below their class; hidden files and other files are left out.
    """
    inner = {path.name.casefold(): path for path in _folders(root)}
    train, val = _train_and_val(inner)
    if train is None:
        return _class_folders(root), None
    return _class_folders(inner[train]), None if val is None else _class_folders(inner[val])


def _shard_sides(pictures: Pictures) -> Sides:
    """The sides that the names of shards tell: train-000.tar and val-000.tar, or folders of these names."""
    store = cast("Shards", pictures.store)
    words = [re.split(r"[^a-z]+", name.casefold()) for name in store.names]
    train, val = _train_and_val(chain.from_iterable(words))
    if train is None:
        return pictures, None
    shards = store.shards_of(pictures.places)
    side = {name: np.array([name in each for each in words])[shards] for name in (train, val) if name}
    rest = pictures.subset(np.flatnonzero(side[val])) if val else None
    return pictures.subset(np.flatnonzero(side[train])), rest


def _hf_sides(ref: str, name: str, split: str = "") -> Sides:
    """The sides of a data set of Hugging Face's library, or one split of it."""
    splits = open_splits(name, split)
    train, val = _train_and_val(splits)
    if train is None and len(splits) == 1:
        train, val = next(iter(splits)), None
    if train is None:
        raise DataError(f"{ref} has the splits {', '.join(splits)} and none called train; name one: hf:NAME:SPLIT")
    return rows_of(splits[train], ref), None if val is None else rows_of(splits[val], ref)


def _csv_sides(path: Path) -> Sides:
    """A table with the columns path, label and, where it is divided already, split (train or val) in its first line.

    Paths are relative to the table's folder. Raises DataError naming the file and line of what does not fit.
    """
    pictures, sides = _csv_rows(path)
    if not sides:
        return pictures, None
    train, val = ([index for index, side in enumerate(sides) if side == name] for name in ("train", "val"))
    return pictures.subset(train), pictures.subset(val)


def _csv_rows(path: Path) -> tuple[Pictures, list[str]]:
    """The pictures of a table, and the side of each where it has a column for it."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = DictReader(file)
            columns = reader.fieldnames or []
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, CsvError) as error:
        raise DataError(f"{path} cannot be read as a UTF-8 CSV table: {error}") from error
    missing = [name for name in ("path", "label") if name not in columns]
    if missing:
        raise DataError(f"{path} has the columns {list(columns)} and lacks {missing}; its first line must name them")
    if not rows:
        raise DataError(f"{path} has no rows below its first line; give one row a picture")

    first: dict[str, int] = {}
    for line, row in rows:
        picture = path.parent / (row["path"] or "").strip()
        if not (row["label"] or "").strip():
            raise DataError(f"{path}, line {line}: the label is empty; name the class of the picture")
        if not picture.is_file():
            raise DataError(f"{path}, line {line}: there is no file {picture}; paths start at the table's folder")
        if (before := first.setdefault(str(picture), line)) != line:
            raise DataError(f"{path}, line {line}: {picture} is also in line {before}; keep one of the two")
        if "split" in columns and row["split"] not in ("train", "val"):
            raise DataError(f"{path}, line {line}: split is {row['split']!r}; it must be train or val")

    pictures = _named(Files("", Names(first)), [row["label"].strip() for _, row in rows])
    return pictures, [row["split"] for _, row in rows] if "split" in columns else []


def _elpv(ref: str) -> Sides:
    """The ELPV solar cells (Buerhop-Lutz et al. 2018), whole or in one of ten listed 75/25 splits, stratified by class.

    `elpv_splits.json` lists the test places of each; split s is what `stratified_split` makes of seed s.
    """
    _, colon, split = ref.partition(":")
    if not colon:
        return elpv_pictures(), None
    listed: list[list[int]] = json.loads(_ELPV_SPLITS.read_text())["test"]
    if not (split.isdecimal() and int(split) < len(listed)):
        raise DataError(f"elpv has the splits 0..{len(listed) - 1}; elpv:0 is the first one")
    pictures = elpv_pictures()
    val = np.array(listed[int(split)])
    return pictures.subset(np.setdiff1d(np.arange(len(pictures)), val)), pictures.subset(val)


def elpv_pictures() -> Pictures:
    """All 2,624 cells (300 x 300, grey); `defective` where the experts' defect probability is above 0.5.

    The package is found, not imported: its import reads every picture. Raises MissingExtraError without it.
    """
    try:
        table = Path(str(distribution("elpv-dataset").locate_file("elpv_dataset/data/labels.csv")))
    except PackageNotFoundError as error:
        raise MissingExtraError("elpv-dataset", "demo") from error
    try:
        rows = [line.split() for line in table.read_text().splitlines()]
    except OSError as error:
        raise DataError(f"{table} cannot be read: {error.strerror}; reinstall elpv-dataset") from error
    names = ["defective" if float(probability) > 0.5 else "functional" for _, probability, _ in rows]
    return _named(Files(str(table.parent), Names(path for path, _, _ in rows)), names)


def list_pictures(*paths: Path | str) -> tuple[Path, ...]:
    """The pictures to predict: files as they are named, folders searched at any depth, each picture once.

    Raises DataError for a path that does not exist and a folder without pictures.
    """
    return tuple(map(Path, dict.fromkeys(chain.from_iterable(map(picture_files, paths)))))


def picture_files(path: Path | str) -> list[str]:
    """A picture file, or those in a folder at any depth in natural order; raises DataError where there is none."""
    root = Path(path)
    if not root.exists():
        raise DataError(f"{path} does not exist; name picture files or folders of pictures")
    if not root.is_dir():
        return [str(root)]
    start = "" if root == Path() else f"{root}{os.sep}"
    if not (inside := [f"{start}{name}" for name in _pictures_below(root)]):
        raise DataError(f"{path} holds no pictures; what is looked for: {' '.join(sorted(extensions()))}")
    return inside


def _named(store: Store, names: Sequence[str]) -> Pictures:
    classes = sorted(set(names), key=natural)
    places = {name: label for label, name in enumerate(classes)}
    return Pictures.stored(store, [places[name] for name in names], classes)


def _divided(name: str, pictures: Pictures, fraction: float, seed: int) -> DataSet:
    lonely = [name for name, count in pictures.counts().items() if count == 1]
    if lonely:
        raise DataError(
            f"{name}: the classes {lonely} have 1 picture; give them 2 or more: train and val need one each"
        )
    train, val = stratified_split(pictures.labels, fraction, seed)
    return DataSet(name=name, train=pictures.subset(train), val=pictures.subset(val))


def _class_folders(root: Path) -> Pictures:
    loose = [path for path in root.iterdir() if path.is_file() and _is_picture(path.name)]
    classes = sorted((path.name for path in _folders(root)), key=natural)
    if not classes:
        raise DataError(f"{root} has no class folders; put the pictures of each class into a folder named after it")
    if loose:
        raise DataError(
            f"{root} has {len(loose)} pictures beside its class folders ({loose[0].name}); move them into one"
        )
    inside = [[f"{name}{os.sep}{rest}" for rest in _pictures_below(root / name)] for name in classes]
    empty = [name for name, pictures in zip(classes, inside, strict=True) if not pictures]
    if empty:
        raise DataError(f"{root}: the class folders {empty} hold no pictures; fill them or remove them")
    labels = np.repeat(np.arange(len(classes)), [len(pictures) for pictures in inside])
    return Pictures.stored(Files(str(root), Names(chain.from_iterable(inside))), labels, classes)


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise DataError(f"{root} {found}; name a folder of pictures or shards, a .csv table, hf:NAME, or elpv")
    return [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _pictures_below(root: Path, inside: str = "") -> Iterator[str]:
    """Every picture at any depth, named from the root, in natural order; hidden files and folders are left out."""
    try:
        with os.scandir(root / inside) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
    for entry in sorted(shown, key=lambda entry: natural(entry.name)):
        if entry.is_dir():
            if not entry.is_symlink():  # one that points upwards would never end
                yield from _pictures_below(root, f"{inside}{entry.name}{os.sep}")
        elif _is_picture(entry.name):
            yield inside + entry.name


def _is_picture(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in extensions()  # noqa: PTH122 - per file
