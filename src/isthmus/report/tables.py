"""Rows to the terminal."""

import textwrap
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["console", "count", "print_facts", "print_report", "print_table", "size"]

console = Console(highlight=False)
SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def count(value: float) -> str:
    """A count in three to four digits, e.g. 4.089 G."""
    for scale, suffix in SUFFIXES:
        if abs(value) >= scale:
            return f"{value / scale:.{3 if scale == 1e9 else 2}f} {suffix}"
    return f"{value:g}"


def size(pixels: tuple[int, ...]) -> str:
    """A map size, e.g. 56×56."""
    return "×".join(map(str, pixels))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, note: str = "") -> None:
    """A table whose first column is left-aligned and the rest right-aligned, with a note below it."""
    table = Table(
        title=title or None, title_justify="left", title_style="bold", caption=note or None, box=box.SIMPLE_HEAD
    )
    table.caption_justify, table.caption_style = "left", "dim"
    lines = [list(map(str, row)) for row in rows]
    longest = max((len(line[0]) for line in lines), default=0)
    for index, column in enumerate(columns):
        # Names stay whole, unless they would take the terminal.
        least = min(longest, console.width // 3) if index == 0 else None
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold", min_width=least)
    for line in lines:
        table.add_row(*line)
    console.print(table)


def print_report(text: str) -> None:
    """Lines as they are, long ones wrapped under themselves. Nothing is read as markup."""
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        wrapped = textwrap.fill(line, console.width, subsequent_indent=indent + "  ", break_on_hyphens=False)
        console.print(wrapped, soft_wrap=True, markup=False)


def print_facts(title: str, facts: Iterable[tuple[str, str]]) -> None:
    """What a thing is: its name, then a line a fact, long ones wrapped under themselves. Nothing is read as markup."""
    console.print(f"[bold]{escape(title)}[/]", soft_wrap=True)
    table = Table.grid(padding=(0, 0, 0, 2), pad_edge=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, fact in facts:
        table.add_row(label, escape(fact))
    console.print(table)
