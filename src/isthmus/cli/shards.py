"""The command that writes tar shards."""

import json
import sys
from pathlib import Path

from isthmus.cli.options import Json
from isthmus.records import to_dict
from isthmus.report.tables import console, print_table

__all__ = ["shards"]


def shards(data: str, out: Path, *, pictures_per_shard: int = 1000, resize: int = 0, as_json: Json = False) -> None:
    """Write pictures into tar shards with an index, which train from any disk or address.

    Parameters
    ----------
    data
        Pictures as `isthmus train` takes them; where they are divided into train and val, the shards are too.
    out
        The folder to write. Stopped, the same command goes on.
    pictures_per_shard
        Pictures in one tar file.
    resize
        Pixels of the shorter side that larger pictures get, as JPEGs; 0 copies every picture as it is.
    """
    from isthmus.data.shard_writer import write_shards
    from isthmus.data.sources import open_sides
    from isthmus.report.terminal import TerminalReporter

    train, val = open_sides(data)
    sides = {"all": train} if val is None else {"train": train, "val": val}
    with TerminalReporter() as reporter:
        try:
            written = write_shards(
                sides, out, source=data, per_shard=pictures_per_shard, resize=resize, progress=reporter.progress
            )
        except KeyboardInterrupt:
            reporter.say("stopped; the same command goes on")
            sys.exit(130)
    if as_json:
        print(json.dumps({"out": str(out), "sides": [to_dict(side) for side in written]}, indent=2))  # noqa: T201
    else:
        print_table(
            f"{len(train.classes)} classes",
            ("side", "shards", "pictures", "MB"),
            ((each.side, each.shards, each.pictures, f"{each.bytes / 1e6:.1f}") for each in written),
        )
        console.print(f"Train on it: isthmus train --data {out}", soft_wrap=True, markup=False)
    reasons = [reason for side in written for reason in side.left_out]
    for reason in reasons:
        print(f"left out {reason}", file=sys.stderr)  # noqa: T201
    if len(reasons) > 1:
        whole = len(reasons) + sum(side.pictures for side in written)
        print(f"{len(reasons)} of {whole} pictures could not be read", file=sys.stderr)  # noqa: T201
