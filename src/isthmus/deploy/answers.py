"""What is told of each picture, as the columns of a table, and the tables as files."""

import csv
import io
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from isthmus.errors import MissingExtraError, RunError, SpecError
from isthmus.messages import printable

__all__ = ["FILES", "Answers", "Table", "Wanted", "file_of"]

Table = dict[str, Any]
"""Columns of one length by name: lists of texts, float32 (N,) or (N, C). Of unreadable pictures None and NaN."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What is told: the `top` classes with their probabilities, or those of all, or pooled features of a `stage`."""

    classes: tuple[str, ...] = ()
    what: Literal["top", "probabilities"] = "top"
    top: int = 5
    stage: str = ""

    def best(self, outputs: Tensor) -> list[dict[str, float]]:
        """Of each picture the best classes with their probabilities."""
        best = outputs.softmax(1).topk(min(self.top, len(self.classes)))
        return [
            {self.classes[place]: value for place, value in zip(places, values, strict=True)}
            for places, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def table(self, answers: "Answers") -> Table:
        """Of answers, a row each."""
        told: Table = {"path": [printable(name) for name in answers.names]}
        if self.stage:
            told["features"] = answers.filled(answers.outputs.numpy())
        elif self.what == "probabilities":
            values = answers.filled(answers.outputs.softmax(1).numpy())
            told |= {f"probability_{name}": values[:, place] for place, name in enumerate(self.classes)}
        else:
            best = iter(self.best(answers.outputs))
            rows = [list(next(best).items()) if error is None else None for error in answers.errors]
            for rank in range(min(self.top, len(self.classes))):
                told[f"class_{rank + 1}"] = [row and row[rank][0] for row in rows]
                told[f"probability_{rank + 1}"] = np.array(
                    [row[rank][1] if row else np.nan for row in rows], np.float32
                )
        return told | {"error": [error and printable(error) for error in answers.errors]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """Of N pictures their names, why they cannot be read (None: they can), and the outputs of those that can."""

    names: list[str]
    errors: list[str | None]
    outputs: Tensor

    @property
    def reasons(self) -> list[str]:
        """Why those that cannot be read cannot."""
        return [error for error in self.errors if error is not None]

    def filled(self, values: NDArray[Any], gap: float = np.nan) -> NDArray[Any]:
        """Values of the readable pictures, in rows of all."""
        whole = np.full((len(self.names), *values.shape[1:]), gap, values.dtype)
        whole[[error is None for error in self.errors]] = values
        return whole


@dataclass(frozen=True, kw_only=True, slots=True)
class TableFile:
    """A kind of file: `encode` gives a table as the bytes of a file, `join` writes one file of many."""

    encode: Callable[[Table], bytes]
    join: Callable[[Sequence[Path], Path], None]
    check_installed: Callable[[], object] = lambda: None


def csv_bytes(table: Table) -> bytes:
    """Probabilities with 6 digits after the point, features with 6 in all; nothing where there is no value."""
    names, columns = [], []
    for name, values in table.items():
        if isinstance(values, np.ndarray) and values.ndim == 2:
            names += [f"{name}_{place}" for place in range(values.shape[1])]
            columns += [texts(each, "g") for each in values.T.tolist()]
        else:
            names.append(name)
            columns.append(texts(values.tolist(), "f") if isinstance(values, np.ndarray) else values)
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(names)
    writer.writerows(zip(*columns, strict=True))
    return file.getvalue().encode()


def texts(values: Iterable[float], kind: str) -> list[str]:
    """Numbers as CSV files have them."""
    return ["" if value != value else f"{value:.6{kind}}" for value in values]  # noqa: PLR0124 - not-a-number


def join_csv(parts: Sequence[Path], out: Path) -> None:
    """The rows of all under the names of one."""
    with out.open("wb") as whole:
        for place, part in enumerate(parts):
            with part.open("rb") as file:
                first = file.readline()
                while first.count(b'"') % 2:  # a name with a line break
                    first += file.readline()
                if place == 0:
                    whole.write(first)
                shutil.copyfileobj(file, whole)


def arrow() -> Any:
    """Apache Arrow; raises MissingExtraError."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet") from error
    return pyarrow


def parquet_bytes(table: Table) -> bytes:
    """Numbers in fp32, features as lists of one length; null where there is no value."""
    library = arrow()

    def column(values: Any) -> Any:
        if not isinstance(values, np.ndarray):
            return library.array(values, library.string())
        if values.ndim == 1:
            return library.array(values, from_pandas=True)  # not-a-number is null
        flat = library.array(values.reshape(-1))
        gaps = library.array(np.isnan(values).all(1))
        return library.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=gaps)

    file = io.BytesIO()
    library.parquet.write_table(library.table({name: column(values) for name, values in table.items()}), file)
    return file.getvalue()


def join_parquet(parts: Sequence[Path], out: Path) -> None:
    """A row group of each."""
    parquet = arrow().parquet
    with parquet.ParquetWriter(out, parquet.read_schema(parts[0])) as writer:
        for part in parts:
            writer.write_table(parquet.ParquetFile(part).read())


FILES: Mapping[str, TableFile] = {
    ".csv": TableFile(encode=csv_bytes, join=join_csv),
    ".parquet": TableFile(encode=parquet_bytes, join=join_parquet, check_installed=arrow),
}
"""By the suffix of the file."""


def file_of(path: Path) -> TableFile:
    """What a file's suffix asks for; raises SpecError for one that asks for nothing, RunError without its folder."""
    if path.suffix not in FILES:
        raise SpecError(f"{path} has no suffix that says what to write; known: {', '.join(FILES)}")
    if not path.parent.is_dir():
        raise RunError(f"cannot write {path}: there is no folder {path.parent}; make it first")
    kind = FILES[path.suffix]
    kind.check_installed()
    return kind
