"""The command that writes a network for other engines."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from isthmus.cli.options import Json
from isthmus.records import to_dict
from isthmus.report.tables import console, print_report, print_table

__all__ = ["export"]


def export(
    run: str,
    out: Path,
    *,
    preprocessing: Annotated[bool, Parameter(negative="")] = False,
    precision: Literal["fp32", "int8"] = "fp32",
    data: str = "",
    max_drop: float = 0.01,
    min_agreement: float = 0.99,
    pictures: Annotated[tuple[Path, ...], Parameter(negative="")] = (),
    as_json: Json = False,
) -> None:
    """Write a network for ONNX Runtime, OpenVINO or torch.export, and prove that the file computes the same.

    Parameters
    ----------
    run
        A run folder or a weight file with metadata.
    out
        The file: .onnx, .xml (OpenVINO, with a .bin beside it) or .pt2 (torch.export).
    preprocessing
        Take 8-bit pictures of any size as they are decoded, and resize, crop and normalise them inside.
    precision
        int8 is calibrated and measured on pictures, and refused where it changes too much or saves no time.
    data
        Labelled pictures for int8, as `isthmus train` takes them; those of the run unless given.
    max_drop
        The accuracy that int8 may lose, of 1.
    min_agreement
        The part of the held-out pictures that must keep their class in int8.
    pictures
        Files and folders to compare file and network on, and to make int8 with; the run's own unless given.
    """
    from isthmus.deploy.quantize import Limits
    from isthmus.report.terminal import TerminalReporter
    from isthmus.ship import export_run

    with TerminalReporter() as reporter:
        made = export_run(
            run,
            out,
            preprocessing=preprocessing,
            precision=precision,
            data=data,
            limits=Limits(max_drop=max_drop, min_agreement=min_agreement),
            pictures=pictures,
            reporter=reporter,
        )
    if as_json:
        int8 = {"higher": made.int8.higher, "judged": to_dict(made.int8.judged)} if made.int8 else {}
        said = to_dict(replace(made, int8=None)) | {"path": str(made.path)}
        print(json.dumps(said | ({"int8": int8} if int8 else {}), indent=2))  # noqa: T201
        return
    if made.int8:
        print_report(f"{made.int8}\n{made.speed}")
    rows = ((each.what, f"{each.difference:.2g}", f"{each.limit:g}") for each in made.compared)
    print_table(f"{made.title} beside the network", ("largest difference in", "found", "allowed"), rows)
    console.print(f"{made.path}: {made.bytes / 1e6:.1f} MB", soft_wrap=True, markup=False)
