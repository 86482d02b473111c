"""What a run measures, as JSON lines: the one place it is written to, and TensorBoard's files made from it."""

import io
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from isthmus.atomic import atomic_write
from isthmus.errors import MissingExtraError, RunError
from isthmus.train.reporter import Reporter

__all__ = ["Log", "read_log", "write_tensorboard"]


class Log:
    """The rows of a run; rows with a `step` tell of one step, rows with an `epoch` alone of a whole epoch.

    Opened at the `length` in bytes that a checkpoint holds, the file loses what came after: those steps are taken anew.
    Raises RunError when the disk will not take a row.
    """

    def __init__(self, path: Path, length: int = 0, reporter: Reporter | None = None) -> None:
        self.path = path
        try:
            with path.open("ab+") as file:
                file.seek(0)
                kept = whole_lines(file.read(length))
                file.truncate(len(kept))
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}") from error
        if reporter and len(kept) < length:
            reporter.say(f"{path} has lost {length - len(kept)} of the {length} bytes that it had; going on without")
        self.rows = parsed(kept, path)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row and the `time` (seconds since 1970); a number that is not finite becomes null."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        } | {"time": round(time.time(), 3)}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror}; free some space, then go on") from error
        self.rows.append(finite)

    def length(self) -> int:
        """Bytes of the log, all of them on the disk now: what a checkpoint remembers."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, also of one that is being written; raises RunError."""
    try:
        return parsed(whole_lines(path.read_bytes()), path)
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error


def whole_lines(content: bytes) -> bytes:
    """Without the last line where a killed process did not finish it."""
    return content[: content.rfind(b"\n") + 1]


def parsed(lines: bytes, path: Path) -> list[dict[str, Any]]:
    """A row a line; raises RunError naming the first line that is none."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RunError(f"line {number} of {path} is no JSON; remove that line") from error
        if not isinstance(row, dict):
            raise RunError(f"line {number} of {path} is no table of names and values; remove that line")
        rows.append(row)
    return rows


def write_tensorboard(rows: Iterable[Mapping[str, Any]], folder: Path) -> Path:
    """The numbers of a log as one event file: `step/loss` over steps, `epoch/val_accuracy` over epochs, and so on.

    The file depends on the rows alone, so that more rows make it grow at its end, where an open TensorBoard looks.
    Raises MissingExtraError without the extra, RunError when the disk will not take it.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "tensorboard") from error

    buffer = io.BytesIO()
    records = RecordWriter(buffer)
    records.write(Event(file_version="brain.Event:2").SerializeToString())
    for row in rows:
        over = "step" if "step" in row else "epoch"
        values = [
            Summary.Value(tag=f"{over}/{name}", simple_value=value)
            for name, value in row.items()
            if isinstance(value, int | float) and name not in ("epoch", "step", "time")
        ]
        if over in row and values:
            event = Event(wall_time=row["time"], step=row[over], summary=Summary(value=values))
            records.write(event.SerializeToString())
    path, content = folder / "events.out.tfevents.0.isthmus", buffer.getvalue()
    try:
        folder.mkdir(exist_ok=True)
        there = path.read_bytes() if path.exists() else b""
        if there and content.startswith(there):
            with path.open("ab") as file:
                file.write(content[len(there) :])
        else:
            atomic_write(path, lambda temporary: temporary.write_bytes(content))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error
    return path
