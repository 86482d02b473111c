"""The command that lists the named recipes."""

import json

from rich.markup import escape

from isthmus.cli.options import Json
from isthmus.report.tables import print_table

__all__ = ["recipes"]


def recipes(*, as_json: Json = False) -> None:
    """List the named recipes, where they are from and the accuracy that is reported of them there."""
    from isthmus.train.recipes import RECIPES, recipe

    if as_json:
        print(json.dumps([{"name": name, **row.to_dict()} for name, row in RECIPES.items()], indent=2))  # noqa: T201
        return
    lines = []
    for name, row in RECIPES.items():
        made = recipe(name, data="any", weights="any")
        trained = (made.epochs, made.batch_size) if made.freeze != "trunk" else ("–",) * 2
        best = f"{row.reported[-1].network} {row.reported[-1].accuracy:g} %" if row.reported else "–"
        lines.append((name, *trained, best, escape(row.source)))
    print_table(
        f"{len(RECIPES)} recipes",
        ("recipe", "epochs", "batch", "reported top-1", "source"),
        lines,
        note="Train by one: isthmus train --recipe NAME. Every setting, and every network reported: --json.",
    )
