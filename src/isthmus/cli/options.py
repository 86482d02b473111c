"""Options that several commands share."""

from typing import Annotated

from cyclopts import Parameter

__all__ = ["Device", "Json", "Settings"]

Json = Annotated[bool, Parameter(name="--json", negative="", show_default=False, help="Print JSON instead of tables.")]
Settings = Annotated[tuple[str, ...], Parameter(name="--set", negative="", show_default=False)]
Device = Annotated[str | None, Parameter(help="cpu, cuda, cuda:1 or mps; the best there is unless given.")]
