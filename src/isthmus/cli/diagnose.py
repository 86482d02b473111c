"""The command that tells what ails a network."""

import json

from rich.markup import escape

from isthmus.cli.options import Device, Json
from isthmus.diagnose.findings import BlockSignals, Diagnosis, NormDrift, Spread
from isthmus.report.tables import console, print_report, print_table

__all__ = ["diagnose"]

COLOURS = {"fault": "bold red", "warning": "yellow", "note": "cyan"}
NORMS = 12  # rows in the terminal; --json has all


def diagnose(
    run: str,
    *,
    data: str = "",
    pictures: int = 64,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Tell what ails a network: strips, batch norms, preprocessing, strides and gradients, measured on pictures.

    Parameters
    ----------
    run
        A run folder or a weight file with metadata.
    data
        Pictures as `isthmus train` or `isthmus predict` take them; without labels gradients are left out. The run's own
        validation pictures unless given.
    pictures
        How many of them are drawn.
    """
    from isthmus.examine import diagnosis
    from isthmus.report.terminal import TerminalReporter

    with TerminalReporter() as reporter:
        found = diagnosis(run, data, pictures=pictures, device=device, reporter=reporter)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))  # noqa: T201
        return
    print_findings(found)
    print_figures(found)


def print_findings(found: Diagnosis) -> None:
    """The findings, worst first; then what was and was not looked at."""
    if found.healthy:
        console.print("[green]healthy[/]: neither a fault nor a warning")
    for finding in found.findings:
        console.print(f"[{COLOURS[finding.severity]}]{finding.severity}[/] {escape(finding.where)}", soft_wrap=True)
        print_report(f"  {finding.found}\n  To mend: {finding.mend}")
    print_report(f"Looked at on {found.pictures} pictures: {', '.join(found.checked)}.")
    print_report("\n".join(f"Not looked at: {each.what} ({each.reason})." for each in found.unchecked))


def print_figures(found: Diagnosis) -> None:
    """A row a block and strip, and those norms that are furthest off; nothing where what is no number spoils it all."""
    if not found.blocks:
        return
    print_table(
        "Blocks",
        ("block", "weights", "output", "gradient", "at its input", "|dw| / |w|"),
        (block_row(row) for row in found.blocks),
    )
    print_report(
        "Norm of the weights; rms of the output; norm of the gradient in the weights, and in the input map of a "
        "picture; length of a step over that of the weights; ± over steps."
    )
    if found.strips:
        print_table(
            "Strips",
            ("block", "width", "effective rank", "of width", "dead", "positions"),
            (
                (
                    row.name,
                    row.width,
                    f"{row.rank:.1f}{'' if row.enough else '?'}",
                    f"{row.rank / row.width:.0%}{'' if row.enough else '?'}",
                    row.dead,
                    f"{row.samples:,}",
                )
                for row in found.strips
            ),
        )
        if not all(row.enough for row in found.strips):
            print_report("A question mark: too few positions for the width to tell.")
    if found.norms:
        furthest = sorted(found.norms, key=lambda row: row.distance, reverse=True)[:NORMS]
        more = len(found.norms) - len(furthest)
        print_table(
            "Batch norms, furthest off first",
            ("norm", "mode", "shift", "variance", "least", "values", "noise"),
            (norm_row(row) for row in furthest),
        )
        print_report(
            "Mean and variance that the running statistics would leave the pictures with: right are 0 and 1. Least "
            "running variance. Values of a channel in a batch, and the noise of their mean."
            + (f" {more} more are nearer; --json has all." if more else "")
        )


def block_row(row: BlockSignals) -> tuple[str, ...]:
    """A block as the table has it."""
    signals = (row.gradient, row.input_gradient, row.update)
    return row.name, f"{row.weight:.3g}", f"{row.scale:.3g}", *map(told, signals)


def told(spread: Spread | None) -> str:
    """A mean, and the spread in percent of it."""
    if spread is None:
        return "–"
    part = spread.deviation / spread.mean if spread.mean else 0.0
    return f"{spread.mean:.2g} ±{part:.0%}"


def norm_row(row: NormDrift) -> tuple[str, ...]:
    """A norm as the table has it."""
    values = "–" if row.values is None else str(row.values)
    noise = "–" if row.noise is None else f"{row.noise:.2f}"
    return row.name, row.mode, f"{row.shift:.2f}", f"{row.ratio:.2g}×", f"{row.least_variance:.1g}", values, noise
