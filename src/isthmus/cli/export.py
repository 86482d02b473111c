"""The command that writes a network for other engines."""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from isthmus.cli.options import Json
from isthmus.records import to_dict
from isthmus.report.tables import console, print_table

__all__ = ["export"]


def export(
    run: str,
    out: Path,
    *,
    preprocessing: Annotated[bool, Parameter(negative="")] = False,
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
    pictures
        Files and folders to compare file and network on; the run's validation pictures unless given.
    """
    from isthmus.run import export_run

    made = export_run(run, out, preprocessing=preprocessing, pictures=pictures)
    if as_json:
        print(json.dumps(to_dict(made) | {"path": str(made.path)}, indent=2))  # noqa: T201
        return
    rows = ((each.what, f"{each.difference:.2g}", f"{each.limit:g}") for each in made.compared)
    print_table(f"{made.title} beside the network", ("largest difference in", "found", "allowed"), rows)
    console.print(f"{made.path}: {made.bytes / 1e6:.1f} MB", soft_wrap=True, markup=False)
