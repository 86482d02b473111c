"""Pictures in data sets of Hugging Face's library: by name from its hub, saved to a folder, or as Parquet files."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isthmus.data.parquet import IMAGE_NAMES
from isthmus.data.pictures import Identity, Pictures, Store, read_file, stamp
from isthmus.data.shard_index import numbered
from isthmus.errors import DataError, MissingExtraError
from isthmus.messages import first_line

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["is_saved", "open_splits", "rows_of"]

_LABEL_NAMES = ("label", "labels", "fine_label")
_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves, of several splits and of one


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows(Store):
    """The rows of a data set; two are equal when name and files (names, bytes, times of change) are."""

    shown: str
    files: Identity
    rows: "Dataset" = field(compare=False)
    column: str

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, place: int) -> bytes:
        image = self.rows[place][self.column]
        if image is None or not (image["bytes"] or image["path"]):
            raise DataError(f"{self.name(place)} holds no picture; leave the row out")
        return bytes(image["bytes"]) if image["bytes"] else read_file(image["path"])

    def name(self, place: int) -> str:
        return f"{self.shown}, row {place}"

    def identity(self, place: int) -> Identity:
        return *self.files, place


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "datasets") from error
    return datasets


def is_saved(folder: Path) -> bool:
    """Whether a folder holds Parquet files (at its top or in data/), or what `save_to_disk` wrote."""
    parquet = (next(folder.glob(pattern), None) for pattern in ("*.parquet", "data/*.parquet"))
    return any((folder / name).is_file() for name in _SAVED) or any(parquet)


def open_splits(name: str, split: str = "") -> dict[str, "Dataset"]:
    """The splits (or the one) of a data set: a name of the hub, or a folder that the library reads or has saved.

    Raises DataError with the library's reason, MissingExtraError without the library.
    """
    library = _library()
    saved = any(Path(name, file).is_file() for file in _SAVED)
    try:
        found = library.load_from_disk(name) if saved else library.load_dataset(name)
    except Exception as error:  # builders raise what they like
        raise DataError(f"{name} cannot be loaded: {first_line(error)}; check the name and the network") from error
    splits = dict(found) if isinstance(found, dict) else {"all": found}
    if split and split not in splits:
        raise DataError(f"{name} has no split {split}; it has {', '.join(splits)}")
    return {split: splits[split]} if split else splits


def rows_of(dataset: "Dataset", shown: str) -> Pictures:
    """The rows of a split, read without decoding; raises DataError where image or label column cannot be told."""
    library, features = _library(), dataset.features
    images = [name for name, kind in features.items() if isinstance(kind, library.Image)]
    classes = [name for name, kind in features.items() if isinstance(kind, library.ClassLabel)]
    column = next(iter(images), None) or next((name for name in IMAGE_NAMES if name in features), None)
    label = classes[0] if len(classes) == 1 else next((name for name in _LABEL_NAMES if name in features), None)
    if column is None or label is None:
        lacking = "an image column" if column is None else f"one column of labels (or one named {_LABEL_NAMES[0]})"
        raise DataError(f"{shown} has the columns {', '.join(features)} and lacks {lacking}; rename or add it")
    values = dataset.select_columns([label]).with_format("numpy")[:][label].tolist()
    if missing := sum(value is None or value == -1 for value in values):
        raise DataError(f"{shown}: {missing} rows have no label in {label}; name a labelled split: hf:NAME:SPLIT")
    labels, names = numbered(values, tuple(getattr(features[label], "names", None) or ()))
    try:
        rows = dataset.select_columns([column]).cast_column(column, library.Image(decode=False))
    except (NotImplementedError, TypeError, ValueError) as error:  # Arrow's own are among these
        raise DataError(f"{shown}: the column {column} holds no pictures: {first_line(error)}") from error
    files: list[str | int] = [shown]
    for name in (str(file["filename"]) for file in dataset.cache_files):
        files += [name, *stamp(name)]
    return Pictures.stored(_Rows(shown=shown, files=tuple(files), rows=rows, column=column), np.asarray(labels), names)
