"""Pages of reports: templates, figures in them, and numbers as they are told there."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isthmus.report.drawing import DARK, LIGHT, inline

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

__all__ = ["Plot", "interval", "lasting", "made_page", "number", "percent", "plotted", "thinned", "told"]

ROWS = 60  # of a curve that are listed
Rows = Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """A figure of a page: its title, the SVG, what to know, and the same as a table."""

    title: str
    svg: str
    note: str
    columns: tuple[str, ...]
    rows: Rows


def plotted(
    figure: "Figure", title: str, alt: str, columns: tuple[str, ...], rows: Iterable[Sequence[object]], note: str = ""
) -> Plot:
    """A figure for a page; `alt` says in a sentence what it shows."""
    from markupsafe import Markup

    svg = Markup(inline(figure, alt))  # noqa: S704 - texts in it were escaped by matplotlib and by `inline`
    lines = [tuple(map(str, row)) for row in rows]
    return Plot(title=title, svg=svg, note=note, columns=columns, rows=thinned(lines, ROWS))


def thinned(rows: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the rows, evenly, with the first and the last."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(place * (len(rows) - 1) / (most - 1))] for place in range(most)]


def percent(part: float) -> str:
    """A part of 1 in percent."""
    return f"{100 * part:.1f}\N{NO-BREAK SPACE}%"


def interval(part: Mapping[str, float]) -> str:
    """The ends of an interval of a part of 1."""
    dash = "\N{WORD JOINER}–\N{WORD JOINER}"  # no line ends at it
    return f"{100 * part['low']:.1f}{dash}{100 * part['high']:.1f}\N{NO-BREAK SPACE}%"


def number(value: float | None) -> str:
    """A value in four digits, or that there is none."""
    return "–" if value is None else f"{value:.4g}"


def lasting(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def told(value: object) -> str:
    """A setting's value as `--set` takes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@cache
def environment() -> "Environment":
    """The templates; what comes from users is escaped in all of them."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("pages")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"pct": percent, "span": interval}
    return made


def made_page(template: str, **values: Any) -> str:
    """A page of that template."""
    colours = {
        name: "".join(f"--{key}: {value}; " for key, value in each.items())
        for name, each in (("light", LIGHT), ("dark", {key: DARK[key] for key in DARK if DARK[key] != LIGHT[key]}))
    }
    return environment().get_template(template).render(version=metadata.version("isthmus"), **colours, **values)
