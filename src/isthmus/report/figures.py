"""The figures of reports: curves, heads that were compared, reliability, cost; each drawn from plain data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isthmus.evaluation.calibration import Calibration
from isthmus.report.drawing import BLUE, DASHES, GREEN, INK, MARKERS, MUTED, ORANGE, SERIES, chart, styled
from isthmus.report.tables import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Line",
    "cost_figure",
    "floors_figure",
    "heads_figure",
    "interval_figure",
    "line_figure",
    "reliability_figure",
]

BAR = 26  # pixels of height a bar takes
POINTS = 30  # lines of more points have no markers


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line of a figure; lines of one `place` among several share colour, dash and marker."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    place: int = 0


@styled()
def line_figure(lines: Sequence[Line], *, across: str, up: str, percent: bool = False) -> "Figure":
    """Lines over a common axis of whole numbers; a legend where there are several."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = chart()
    for line in lines:
        place = line.place % len(SERIES)
        axes.plot(
            line.x,
            line.y,
            color=SERIES[place],
            linestyle=DASHES[place],
            marker=MARKERS[place] if len(line.x) <= POINTS else "",
            label=line.label,
        )
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if percent:
        in_percent(axes, "y")
    if len(lines) > 1:
        columns = 2 if max(len(line.label) for line in lines) < 20 else 1
        figure.legend(loc="outside upper left", ncols=columns)
    return figure


@styled()
def heads_figure(heads: Sequence[dict[str, Any]], chosen: Sequence[str]) -> "Figure":
    """The cross-validated accuracy of each head that was compared, the chosen one set off."""
    figure, axes = chart(height=80 + BAR * len(heads))
    for place, row in enumerate(heads):
        mine = row["taps"] == list(chosen)
        axes.plot(
            [row["accuracy"]], [place], marker="o", markersize=10 if mine else 7, color=BLUE if mine else MUTED, ls=""
        )
        axes.annotate(
            f"{100 * row['accuracy']:.1f} %",
            (row["accuracy"], place),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            weight="bold" if mine else "normal",
        )
    axes.set_yticks(range(len(heads)), [" + ".join(row["taps"]) for row in heads])
    axes.set_ylim(len(heads) - 0.5, -0.5)
    values = [row["accuracy"] for row in heads]
    room = max(max(values) - min(values), 0.01)
    axes.set_xlim(min(values) - 0.2 * room, max(values) + 0.45 * room)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("accuracy in cross-validation")
    in_percent(axes, "x")
    return figure


@styled()
def reliability_figure(found: Calibration) -> "Figure":
    """How often predictions of each confidence come true, and the line on which they should lie; below, how many."""
    figure, axes = chart(height=340)
    grid = figure.add_gridspec(2, 1, height_ratios=(3, 1))
    axes.set_subplotspec(grid[0])
    below = figure.add_subplot(grid[1], sharex=axes)
    bins = len(found.count)
    filled = [place for place in range(bins) if found.count[place]]
    middles = [(place + 0.5) / bins for place in filled]
    seen = [found.count[place] for place in filled]
    hits = [found.hits[place] / found.count[place] for place in filled]
    sure = [found.confidence[place] / found.count[place] for place in filled]
    axes.bar(middles, hits, width=0.9 / bins, color=BLUE)
    axes.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1.5)
    axes.plot(sure, hits, marker="o", color=ORANGE, linestyle="", markersize=6)
    axes.set_ylabel("came true")
    axes.set_ylim(0, 1.02)
    axes.set_xlim(0, 1)
    in_percent(axes, "y")
    axes.tick_params(labelbottom=False)
    below.bar(middles, seen, width=0.9 / bins, color=MUTED)
    below.set_ylabel("pictures")
    below.set_xlabel("confidence")
    below.grid(visible=False, axis="x")
    in_percent(below, "x")
    return figure


@styled()
def cost_figure(rows: Sequence[dict[str, Any]]) -> "Figure":
    """The part of multiply-adds and of parameters that each stage has."""
    figure, axes = chart(height=70 + 2 * BAR * len(rows))
    for offset, key, colour, label in ((-0.19, "macs", BLUE, "multiply-adds"), (0.19, "params", GREEN, "parameters")):
        every = max(sum(row[key] for row in rows), 1)
        parts = [row[key] / every for row in rows]
        places = [place + offset for place in range(len(rows))]
        axes.barh(places, parts, height=0.34, color=colour, label=label)
        for place, part, row in zip(places, parts, rows, strict=True):
            axes.annotate(
                f"{100 * part:.0f} % · {count(row[key])}",
                (part, place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
            )
    bare(axes, [row["name"] for row in rows])
    axes.set_xlim(0, 1.45 * max(parts_of(rows)))
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def parts_of(rows: Sequence[dict[str, Any]]) -> list[float]:
    """The parts of both costs."""
    return [row[key] / max(sum(each[key] for each in rows), 1) for key in ("macs", "params") for row in rows]


@styled()
def floors_figure(rows: Sequence[dict[str, Any]]) -> "Figure":
    """The least milliseconds of each stage, by what binds it."""
    figure, axes = chart(height=70 + BAR * len(rows))
    sides = {"arithmetic": BLUE, "memory": ORANGE}
    for side, colour in sides.items():
        places = [place for place, row in enumerate(rows) if row["binds"] == side]
        axes.barh(places, [1e3 * rows[place]["seconds"] for place in places], height=0.6, color=colour, label=side)
    for place, row in enumerate(rows):
        at = (1e3 * row["seconds"], place)
        axes.annotate(f"{at[0]:.2g} ms", at, xytext=(5, 0), textcoords="offset points", va="center")
    bare(axes, [row["name"] for row in rows])
    axes.set_xlim(0, 1.25 * 1e3 * max(row["seconds"] for row in rows))
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def bare(axes: "Axes", names: Sequence[str]) -> None:
    """Axes of bars that say their values themselves."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.grid(visible=False)
    axes.tick_params(bottom=False, labelbottom=False, left=False)
    axes.spines["bottom"].set_visible(False)


@styled()
def interval_figure(rows: Sequence[tuple[str, dict[str, float]]], across: str) -> "Figure":
    """Parts of pictures with their intervals, a row a name."""
    figure, axes = chart(height=80 + BAR * len(rows))
    for place, (_, part) in enumerate(rows):
        colour = SERIES[place % len(SERIES)]
        axes.plot([part["low"], part["high"]], [place, place], color=colour, linewidth=3, solid_capstyle="round")
        axes.plot([part["value"]], [place], color=colour, marker=MARKERS[place % len(MARKERS)], markersize=9)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(across)
    in_percent(axes, "x")
    return figure


def in_percent(axes: "Axes", which: str) -> None:
    """Parts of 1 told in percent."""
    from matplotlib.ticker import PercentFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(PercentFormatter(1, decimals=None, symbol=" %"))
