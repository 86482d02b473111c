"""The command that tells what pictures show."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.markup import escape

from isthmus.cli.options import Device, Json
from isthmus.errors import RecipeError
from isthmus.messages import printable
from isthmus.records import to_dict
from isthmus.report.tables import console, print_table

__all__ = ["predict"]


def predict(
    run: str,
    *pictures: Annotated[str, Parameter(required=True)],
    out: Path | None = None,
    top: int = 5,
    probabilities: Annotated[bool, Parameter(negative="")] = False,
    features: str = "",
    engine: Literal["auto", "torch", "inductor", "onnxruntime", "openvino"] = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto",
    batch_size: int = 16,
    device: Device = None,
    cluster: str = "",
    workers: int = 0,
    as_json: Json = False,
) -> None:
    """Tell the classes of pictures: of a few in the terminal, of millions in a table.

    Parameters
    ----------
    run
        A run folder or a weight file with metadata.
    pictures
        Files, folders, patterns ('scans/**/*.jpg'), .txt or .csv lists of paths, .tar shards, .parquet files.
    out
        A .csv or .parquet file to write. Ended at any moment, the same command goes on where it was.
    top
        Classes a picture, the most probable first.
    probabilities
        The probabilities of all classes in place of the best ones.
    features
        Pooled features of a stage, such as layer4, in place of classes.
    engine
        What computes on the CPU: of 1,000 pictures and more the fastest one, of fewer torch.
    precision
        The fastest that keeps the numbers unless given; int8 is calibrated and measured on pictures of the run, or else
        on these. fp16 is for GPUs.
    batch_size
        Pictures at once.
    cluster
        A Ray cluster that shares the work: its address, auto for the one that this machine is in, or local.
    workers
        Processes of the cluster; one a machine unless given.
    """
    from isthmus.report.terminal import TerminalReporter
    from isthmus.ship import predict as tell
    from isthmus.ship import predict_table

    if out is None and (probabilities or features or cluster):
        raise RecipeError("features, all probabilities and what a cluster predicts go to a table: name one with --out")
    with TerminalReporter() as reporter:
        if out is None:
            rows = tell(
                run,
                *pictures,
                top=top,
                batch_size=batch_size,
                engine=engine,
                precision=precision,
                device=device,
                reporter=reporter,
            )
        else:
            made = predict_table(
                run,
                *pictures,
                out=out,
                top=top,
                probabilities=probabilities,
                features=features,
                batch_size=batch_size,
                engine=engine,
                precision=precision,
                device=device,
                cluster=cluster,
                workers=workers,
                reporter=reporter,
            )
    if out is not None:
        if as_json:
            print(json.dumps(to_dict(made) | {"path": str(made.path)}, indent=2))  # noqa: T201
        else:
            console.print(f"{made.path}: {made.pictures:,} rows", soft_wrap=True, markup=False)
        now = "" if made.predicted == made.pictures else " predicted now"
        tell_unreadable(made.reasons, made.unreadable, f"{made.predicted} pictures{now}")
        return
    if as_json:
        document = [
            {
                "path": str(row.path),
                "classes": dict(zip(row.classes, row.probabilities, strict=True)),
                "error": row.error,
            }
            for row in rows
        ]
        print(json.dumps(document, indent=2))  # noqa: T201
    else:
        print_table(
            f"{sum(not row.error for row in rows)} pictures",
            ("picture", "class", "probability", "next"),
            (
                (
                    escape(printable(row.path.name)),
                    escape(row.classes[0]),
                    f"{row.probabilities[0]:.1%}",
                    f"{escape(row.classes[1])} {row.probabilities[1]:.1%}" if len(row.classes) > 1 else "",
                )
                for row in rows
                if not row.error
            ),
        )
    bad = [row.error for row in rows if row.error]
    tell_unreadable(bad, len(bad), f"{len(rows)} pictures")


def tell_unreadable(reasons: Sequence[str], count: int, every: str) -> None:
    """What was left out and why; of many the first ones."""
    for reason in reasons:
        print(f"skipped {reason}", file=sys.stderr)  # noqa: T201
    if count:
        rest = "" if count == len(reasons) else "; the reasons of all are in the table"
        print(f"{count} of {every} could not be read{rest}", file=sys.stderr)  # noqa: T201
