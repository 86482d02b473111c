"""Pictures as bytes in a column of Parquet files."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.data.pictures import Identity, Store, read_file, stamp
from isthmus.errors import DataError, MissingExtraError
from isthmus.messages import first_line

__all__ = ["IMAGE_NAMES", "ParquetRows", "open_parquet"]

IMAGE_NAMES = ("image", "img")  # the usual ones of a column of pictures
_AT_HAND = 3  # row groups in memory: readers that run ahead are in the next one already
_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetRows(Store):
    """The rows of Parquet files; `groups` names the file and number of each row group, `ends` the rows up to its end.

    Row groups are read whole, so that pictures should be asked for in their order.
    """

    files: tuple[str, ...]
    column: str
    groups: tuple[tuple[int, int], ...] = field(compare=False, repr=False)
    ends: NDArray[np.int64] = field(compare=False, repr=False)
    starts: NDArray[np.int64] = field(compare=False, repr=False)  # the first row of each file

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, place: int) -> bytes:
        group = int(np.searchsorted(self.ends, place, side="right"))
        start = self.ends[group - 1] if group else 0
        file, number = self.groups[group]
        with _lock:  # else every thread would read the next one
            column = _row_group(self.files[file], stamp(self.files[file]), number, self.column)
        found = column[int(place - start)].as_py()
        content = found.get("bytes") if isinstance(found, dict) else found
        if content is None and isinstance(found, dict) and found.get("path"):
            return read_file(Path(self.files[file]).parent / found["path"])
        if content is None:
            raise DataError(f"{self.name(place)} holds no picture; leave the row out")
        return bytes(content)

    def name(self, place: int) -> str:
        file = self._file(place)
        return f"{self.files[file]}, row {place - self.starts[file]}"

    def identity(self, place: int) -> Identity:
        return self.name(place), *stamp(self.files[self._file(place)])

    def _file(self, place: int) -> int:
        return int(np.searchsorted(self.starts, place, side="right")) - 1


def open_parquet(paths: Iterable[Path | str]) -> ParquetRows:
    """The pictures of Parquet files: a column of bytes, or of structs with bytes and path as Hugging Face writes them.

    Raises DataError where a file cannot be read or its column of pictures cannot be told, MissingExtraError.
    """
    files = tuple(map(str, paths))
    shapes = [_shape(file) for file in files]
    columns = {column for column, _ in shapes}
    if len(columns) > 1:
        raise DataError(f"the pictures of {files[0]} and others lie in columns of other names: {sorted(columns)}")
    rows = [sizes for _, sizes in shapes]
    every = np.fromiter(chain.from_iterable(rows), np.int64)
    if not every.sum():
        raise DataError(f"{', '.join(files)} has no rows")
    return ParquetRows(
        files=files,
        column=columns.pop(),
        groups=tuple((file, number) for file, sizes in enumerate(rows) for number in range(len(sizes))),
        ends=np.cumsum(every),
        starts=np.cumsum([0, *map(sum, rows)])[:-1],
    )


def _library() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet") from error
    return parquet


def _shape(file: str) -> tuple[str, list[int]]:
    """The column of pictures, and the rows of each row group."""
    library = _library()
    try:
        with library.ParquetFile(file) as opened:
            schema, about = opened.schema_arrow, opened.metadata
            sizes = [about.row_group(place).num_rows for place in range(about.num_row_groups)]
    except (OSError, ValueError) as error:  # Arrow's own are among these
        raise DataError(f"{file} cannot be read as Parquet: {first_line(error)}") from error
    columns = [each.name for each in schema if _holds_bytes(each.type)]
    column = next((name for name in IMAGE_NAMES if name in columns), columns[0] if len(columns) == 1 else None)
    if column is None:
        raise DataError(
            f"{file} has the columns {', '.join(schema.names)}, and it cannot be told which holds pictures as bytes; "
            f"name that {IMAGE_NAMES[0]}"
        )
    return column, sizes


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(kind.field(place).name == "bytes" for place in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


@lru_cache(maxsize=_AT_HAND)
def _row_group(file: str, _changed: tuple[int, int], number: int, column: str) -> Any:
    try:
        with _library().ParquetFile(file) as opened:
            return opened.read_row_group(number, columns=[column]).column(0)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as Parquet: {first_line(error)}") from error
