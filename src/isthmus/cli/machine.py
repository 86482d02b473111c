"""Commands about this machine."""

import json

from isthmus import records
from isthmus.cli.options import Json
from isthmus.report.tables import console, print_table
from isthmus.runtime import machine, versions

__all__ = ["env"]


def env(*, as_json: Json = False) -> None:
    """Show this machine, what isthmus will use on it, and the versions that decide results."""
    here = machine()
    if as_json:
        print(json.dumps({"machine": records.to_dict(here), "versions": versions()}, indent=2))  # noqa: T201
        return
    console.print(f"[bold]{here.name}[/], {here.cores} cores, {here.memory / 2**30:.0f} GiB")
    console.print(f"  networks run on {here.device} in {here.precision}, channels_last")
    print_table("", ("library", "version"), versions().items())
