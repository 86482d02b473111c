"""Pictures to predict, from whatever names them: files, folders, patterns, lists, shards, Parquet."""

import glob
import os
from collections.abc import Iterable, Iterator
from csv import DictReader
from csv import Error as CsvError
from itertools import groupby
from pathlib import Path

import numpy as np

from isthmus.data.parquet import open_parquet
from isthmus.data.pictures import Files, Names, Pictures, Store, joined, natural
from isthmus.data.shards import open_shards
from isthmus.data.sources import holds_shards, picture_files
from isthmus.errors import DataError

__all__ = ["open_unlabelled"]

LISTS = (".txt", ".csv")


def open_unlabelled(*refs: Path | str) -> Pictures:
    """The pictures that `refs` name, in their order, each file once, without labels.

    Picture files and folders of them (at any depth); patterns with * ? [ ], ** for any depth; lists of paths: a .txt
    file of one a line, or a .csv file with the column path, relative to the list; tar shards as `open_shards` takes
    them; .parquet files with a column of picture bytes, and folders of them.
    Raises DataError for what is not there or names no pictures, MissingExtraError.
    """
    stores: list[Store] = []
    for kind, group in groupby(_kinds(map(str, refs)), key=lambda item: item[0]):
        names = [name for _, name in group]
        if kind == "files":
            stores.append(Files("", Names(dict.fromkeys(names))))
        elif kind == "parquet":
            stores.append(open_parquet(names))
        else:
            stores += [open_shards(name, labelled=False).store for name in names]
    if not stores:
        raise DataError("no pictures are named; give files, folders, patterns, lists, shards or Parquet files")
    store = joined(stores)
    return Pictures.stored(store, np.full(len(store), -1), ())


def _kinds(refs: Iterable[str]) -> Iterator[tuple[str, str]]:
    """How each name is opened, folders of pictures, patterns and lists as the files that they stand for."""
    for ref in refs:
        path = Path(ref).expanduser()
        if "://" in ref or ref.endswith(".tar") or holds_shards(path):
            yield "shards", ref if "://" in ref else str(path)
        elif ref.endswith(".parquet") and path.is_file():
            yield "parquet", str(path)
        elif inside := sorted(map(str, path.glob("*.parquet")), key=natural):
            yield from (("parquet", name) for name in inside)
        elif glob.has_magic(ref) and not path.exists():
            if not (found := sorted(glob.glob(str(path), recursive=True), key=natural)):  # noqa: PTH207 - ** as shells
                raise DataError(f"{ref} matches nothing; is the pattern quoted, and the folder right?")
            yield from _kinds(found)
        elif path.suffix.lower() in LISTS and path.is_file():
            yield from (("files", name) for name in _listed(path))
        else:
            yield from (("files", name) for name in picture_files(path))


def _listed(path: Path) -> Iterator[str]:
    """The paths in a list, seen from its folder."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                reader = DictReader(file)
                if "path" not in (columns := reader.fieldnames or []):
                    raise DataError(f"{path} has the columns {list(columns)} and lacks path; its first line names them")
                names = [row["path"] or "" for row in reader]
            else:
                names = file.read().splitlines()
    except (OSError, UnicodeDecodeError, CsvError) as error:
        raise DataError(f"{path} cannot be read as a list of paths: {error}") from error
    folder = "" if path.parent == Path() else path.parent  # so that names stay as they are listed
    found = [os.path.join(folder, name.strip()) for name in names if name.strip()]  # noqa: PTH118 - a million
    if not found:
        raise DataError(f"{path} names no pictures")
    return iter(found)
