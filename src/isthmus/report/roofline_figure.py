"""The roofline of a network: how fast its layers run beside what the machine allows, and where the time goes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from isthmus.arch.roofline import LayerTime, Limits, Precision, merged_times
from isthmus.report.drawing import BLUE, GRID, INK, MARKERS, MUTED, ORANGE, SERIES, chart, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["roofline_figure"]

WIDTH, ROOF, BAR = 560, 360, 26  # pixels
MOST_BLOCKS = 30  # more of them are shown by stage
LEAST_SHOWN = 0.002  # of the whole time; what takes less has no point
LEAST_INTENSITY = 0.1  # operations a byte; what has fewer moves bytes and hardly computes
LARGEST = 400  # square pixels of the layer that takes longest


@styled()
def roofline_figure(times: Sequence[LayerTime], limits: Limits, precision: Precision) -> "Figure":
    """Above, operations a second of each layer over its operations a byte, below the roofs; a point's area is its time.

    Below, the floor and the measured time of each block.
    """
    blocks = merged_times(times, "block")
    blocks = blocks if len(blocks) <= MOST_BLOCKS else merged_times(times, "stage")
    height = 60 + BAR * len(blocks)
    figure, above = chart(WIDTH, ROOF + height)
    grid = figure.add_gridspec(2, 1, height_ratios=(ROOF, height))
    above.set_subplotspec(grid[0])
    draw_roof(above, times, limits, precision)
    draw_bars(figure.add_subplot(grid[1]), blocks)
    return figure


def draw_roof(axes: "Axes", times: Sequence[LayerTime], limits: Limits, precision: Precision) -> None:
    """Layers below the roofs of arithmetic, of the caches and of main memory."""
    peak, whole = limits.operations(precision), sum(each.seconds for each in times)
    shown = [
        (each, each.floor)
        for each in times
        if each.floor and each.floor.intensity >= LEAST_INTENSITY and each.seconds > LEAST_SHOWN * whole
    ]
    stages = list(dict.fromkeys(floor.block.partition(".")[0] for _, floor in shown))
    longest = max((each.seconds for each, _ in shown), default=1.0)
    for place, stage in enumerate(stages):
        mine = [(each, floor) for each, floor in shown if floor.block.partition(".")[0] == stage]
        axes.scatter(
            [floor.intensity for _, floor in mine],
            [floor.operations / each.seconds / 1e9 for each, floor in mine],
            s=[max(12.0, LARGEST * each.seconds / longest) for each, _ in mine],
            color=SERIES[place % len(SERIES)],
            marker=MARKERS[place % len(MARKERS)],
            alpha=0.75,
            label=stage,
        )
    slowest, fastest = limits.bandwidth[-1].rate, limits.bandwidth[0].rate
    found = [floor.intensity for _, floor in shown] or [1.0]
    low, high = min(*found, peak / fastest) / 12, max(*found, peak / slowest) * 2
    for rate, dash in ((fastest, "--"), (slowest, "-")):
        knee = peak / rate
        axes.plot(
            [low, knee, high], [low * rate / 1e9, peak / 1e9, peak / 1e9], color=INK, linestyle=dash, linewidth=1.5
        )
    words = f"main memory, {slowest / 1e9:.0f} GB/s", f"caches, {fastest / 1e9:.0f} GB/s ", f"{peak / 1e9:.0f} GFLOP/s"
    told(axes, words[0], (low, low * slowest / 1e9), (6, 0), va="top")
    told(axes, words[1], (peak / fastest, peak / 1e9), (-4, 4), ha="right")
    told(axes, f"{words[2]} in {precision}", (peak / fastest, peak / 1e9), (4, 4))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(top=2 * peak / 1e9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(lambda *_: "")
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("GFLOP/s")
    axes.legend(loc="lower right", markerscale=0.7, ncols=2)


def told(axes: "Axes", words: str, at: tuple[float, float], apart: tuple[int, int], **how: Any) -> None:
    """Words beside a point."""
    axes.annotate(words, at, xytext=apart, textcoords="offset points", color=MUTED, **how)


def draw_bars(axes: "Axes", blocks: Sequence[LayerTime]) -> None:
    """Floor and measured time of each block, and the part of the limit that was reached."""
    places = list(range(len(blocks)))
    axes.barh(places, [each.seconds * 1e3 for each in blocks], height=0.75, color=BLUE, label="measured")
    floors = [each.floor.seconds * 1e3 if each.floor else 0.0 for each in blocks]
    axes.barh(places, floors, height=0.35, color=ORANGE, label="floor")
    for place, each in zip(places, blocks, strict=True):
        part = f"{each.share:.0%}" if each.share else ""
        axes.annotate(
            part,
            (max(each.seconds * 1e3, floors[place]), place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=MUTED,
        )
    axes.set_yticks(places, [each.name for each in blocks])
    axes.set_ylim(len(blocks) - 0.5, -0.5)
    axes.set_xlim(0, 1.1 * max(*floors, *(each.seconds * 1e3 for each in blocks)))
    axes.grid(visible=True, axis="x", color=GRID)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("milliseconds a batch; beside the bars, the part of the limit")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
