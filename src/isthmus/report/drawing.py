"""Figures without pyplot: one palette that holds on light and dark pages, and SVG whose colours the page decides.

Functions that draw are decorated with `styled()`, which gives their artists our fonts and colours; a figure's units are
CSS pixels. Dates are left out, so that equal figures are equal files.
"""

import hashlib
import html
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isthmus.atomic import atomic_write
from isthmus.errors import RunError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "CYAN",
    "DARK",
    "DASHES",
    "GOLD",
    "GREEN",
    "GRID",
    "INK",
    "LIGHT",
    "MARKERS",
    "MUTED",
    "ORANGE",
    "PAGE",
    "PINK",
    "SERIES",
    "chart",
    "inline",
    "save",
    "styled",
]

BLUE, ORANGE, GREEN, PINK, GOLD, CYAN = "#3080d0", "#d06010", "#109070", "#c06090", "#a08000", "#2898b8"
INK, MUTED, GRID, PAGE = "#1b1f24", "#59636e", "#d9dee3", "#ffffff"
SERIES = (BLUE, ORANGE, GREEN, PINK, GOLD, CYAN)
"""Colours of things told apart, at least 3 : 1 against both pages; who cannot see them has dashes and markers."""
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")
LIGHT = {
    "blue": BLUE,
    "orange": ORANGE,
    "green": GREEN,
    "pink": PINK,
    "gold": GOLD,
    "cyan": CYAN,
    "ink": INK,
    "muted": MUTED,
    "grid": GRID,
    "page": PAGE,
}
"""Every colour of the palette by the name of its CSS variable, as it is on a light page."""
DARK = LIGHT | {"ink": "#e6e9ec", "muted": "#9ba5b0", "grid": "#343b43", "page": "#15181c"}
WIDTH, HEIGHT, DPI = 400, 270, 72  # at 72 dots an inch a point is a pixel
PNG_SCALE = 2
RC: dict[str, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 1.0,
    "axes.grid": True,
    "axes.formatter.useoffset": False,  # 1.0986 is no 0.0006 above a small +1.098
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 14,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same measures everywhere
    "font.size": 13,
    "axes.labelsize": 13,
    "xtick.labelsize": 13,
    "ytick.labelsize": 13,
    "legend.fontsize": 13,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.markersize": 5,
    "svg.fonttype": "none",  # text stays text: searchable, and in the fonts of the page
    "svg.hashsalt": "isthmus",
    "text.parse_math": False,  # a $ in the name of a class is a $
}


@contextmanager
def styled() -> Iterator[None]:
    """A context, or the decorator of a function that draws: artists made in it have our fonts and colours."""
    import matplotlib as mpl
    from cycler import cycler

    settings: Any = RC | {"axes.prop_cycle": cycler(color=SERIES)}
    with mpl.rc_context(settings), warnings.catch_warnings():
        # Letters that matplotlib's font lacks are drawn by the browser's.
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        yield


def chart(width: int = WIDTH, height: int = HEIGHT) -> "tuple[Figure, Axes]":
    """A figure of that many CSS pixels with one set of axes; for functions under `styled()`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained")
    return figure, figure.add_subplot()


def inline(figure: "Figure", alt: str) -> str:
    """The figure as an <svg> element for a page that defines the variables of LIGHT and DARK; `alt` says what it shows.

    It is as wide as it was drawn or as its place is, whichever is less.
    """
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg(figure), flags=re.DOTALL)
    head, _, body = text[text.index("<svg") :].partition(">")
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', head)
    if found is None:
        raise ValueError(head)
    width, height = map(float, found.groups())
    names = {value: name for name, value in LIGHT.items()}
    own = hashlib.sha256((alt + body).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', body))

    def mended(tag: re.Match[str]) -> str:
        """A tag in the colours and fonts of the page; its id is the figure's own, and there only if it is used."""
        made = re.sub(
            r"#[0-9a-f]{6}\b", lambda hit: f"var(--{names[hit[0]]}, {hit[0]})" if hit[0] in names else hit[0], tag[0]
        )
        made = re.sub(r"(font: [^;\"]*?px |font-family: )[^;\"]*", r"\1var(--font, sans-serif)", made)
        made = re.sub(r' id="([^"]*)"', lambda hit: f' id="{own}-{hit[1]}"' if hit[1] in used else "", made)
        return re.sub(r'(href="|url\()#', rf"\g<1>#{own}-", made)

    # Tags alone: what stands between them are the users' own words.
    body = re.sub(r"<[^>]*>", mended, body)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-label="{html.escape(alt)}" viewBox="0 0 {width:g} {height:g}" '
        f'style="width:100%;max-width:{width:g}px;height:auto;stroke-linejoin:round;stroke-linecap:butt">'
        + re.sub(r"\n\s+", "\n", body).strip()
    )


def svg(figure: "Figure") -> str:
    """The figure as matplotlib writes it, transparent and without a date."""
    buffer = io.StringIO()
    with styled():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def save(figure: "Figure", path: Path) -> None:
    """Write a figure that stands alone, on white: .svg, or .png at twice its size; raises RunError."""
    kind = path.suffix.lower()
    if kind not in (".svg", ".png"):
        raise RunError(f"{path.name} is no name for a figure; it must end in .svg or .png")
    metadata = {"Date": None} if kind == ".svg" else {"Software": None}
    with styled():
        atomic_write(
            path,
            lambda temporary: figure.savefig(
                temporary, format=kind[1:], dpi=DPI * PNG_SCALE, facecolor=PAGE, metadata=metadata
            ),
        )
