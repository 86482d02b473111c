"""The command that writes reports of runs."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.markup import escape

from isthmus.cli.options import Device, Json
from isthmus.report.tables import console, count, print_table

__all__ = ["report"]


def report(
    *runs: Annotated[Path, Parameter(required=True)],
    out: Path | None = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write what a run reached as a page to read and pass on; of several runs, a page that compares them.

    Parameters
    ----------
    runs
        A run folder, or several to compare.
    out
        The page, ending in .html; report.html in the run folder, or comparison.html here, unless given. Its data are
        written beside it, as .json.
    """
    from isthmus.examine import diagnosis
    from isthmus.report.terminal import TerminalReporter
    from isthmus.report.write import COMPARISON, LOOKED_AT, write_comparison, write_report
    from isthmus.runtime import keep_freed_memory

    several = len(runs) > 1
    if several:
        path = write_comparison(runs, out or COMPARISON)
    else:
        keep_freed_memory()
        with TerminalReporter() as reporter:
            looked = partial(diagnosis, runs[0], pictures=LOOKED_AT, device=device, reporter=reporter)
            path = write_report(runs[0], out or "", diagnose=looked)
    data = path.with_suffix(".json")
    document = json.loads(data.read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps(document, indent=2))  # noqa: T201
        return
    if several:
        print_runs(document)
    else:
        print_findings(document)
    console.print(f"{path}: {path.stat().st_size / 1e6:.2f} MB; the same as data: {data}", soft_wrap=True, markup=False)


def print_runs(document: Mapping[str, Any]) -> None:
    """The scores of runs that were compared."""
    note = "" if document["same_pictures"] else "Perhaps not validated on the same pictures."
    print_table(
        "",
        ("run", "accuracy", "95 %", "balanced", "loss", "params", "MACs"),
        (
            (
                escape(row["name"]),
                f"{row['accuracy']['value']:.1%}",
                f"{100 * row['accuracy']['low']:.1f}–{100 * row['accuracy']['high']:.1f}",
                f"{row['balanced_accuracy']:.1%}",
                f"{row['loss']:.4f}",
                count(row["params"]),
                "–" if row["macs"] is None else count(row["macs"]),
            )
            for row in document["runs"]
        ),
        note=note,
    )


def print_findings(document: Mapping[str, Any]) -> None:
    """How good a run is, what was found in its network, and what could not be told."""
    scores = document["scores"]
    accuracy = scores["accuracy"]
    console.print(
        f"[bold]accuracy {accuracy['value']:.1%}[/] (95 % interval {accuracy['low']:.1%}–{accuracy['high']:.1%}), "
        f"{scores['correct']} of {scores['pictures']} right"
    )
    for finding in (document.get("diagnosis") or {"findings": ()})["findings"]:
        console.print(f"{finding['severity']}: {finding['where']}: {finding['found']}", soft_wrap=True, markup=False)
    for line in document["missing"]:
        console.print(f"not in the report: {line}", soft_wrap=True, markup=False)
