"""Claim: at the same depth, shortcuts keep the gradients of nearby inputs alike, and the network learns.

Networks of the table beside their plain twins, which have the same weights and no shortcuts, each with batch norm and
without any norm. The pictures are scikit-learn's 1,797 scanned digits (8×8 pixels, enlarged to 32): ten classes, real,
and learned within 200 steps by a network that learns at all. Gradients are those before training, training is 200 steps
of SGD (without norms 50, and none of the ImageNet networks) at one rate for the twins of a network. What is measured is
told in `isthmus/diagnose/depth.py`; `isthmus depth NAME --data DATA` measures it on other pictures.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from isthmus.arch.preprocess import Preprocess
from isthmus.arch.variants import variant
from isthmus.data.loader import Loader
from isthmus.data.sources import open_pictures
from isthmus.diagnose.depth import measure_twin, twins
from isthmus.report.drawing import BLUE, MARKERS, MUTED, ORANGE, save, styled
from isthmus.runtime import machine
from measure import RESULTS, spread, write_result

NETS = {  # name -> rate of all its twins, steps with batch norm and without norms
    "resnet20_cifar": (0.005, 200, 50),
    "resnet56_cifar": (0.005, 200, 50),
    "resnet110_cifar": (0.005, 200, 50),
    "resnet50": (0.0005, 200, 0),  # at ten times the rate the wide last stage, one position a picture, goes astray
    "resnet101": (0.0005, 200, 0),
    "resnet152": (0.0005, 200, 0),
}
SEEDS = range(3)
SIDE, BATCH = 32, 16
CURVES = RESULTS / "depth_curves.jsonl"
FIGURE = Path(__file__).parents[1] / "docs" / "depth.svg"
CIFAR, DEEPEST = tuple(NETS)[:3], "resnet110_cifar"
TOLD = ("1/16384", "1/1024", "1/64")
NOTE = (
    "Median of three seeds, and their range. Gradient: its size in the input of a block. Alike: correlation of the "
    "gradients of two inputs that lie such a part of the way between two pictures apart. Loss: mean of the ten steps "
    "that end there; a dash: no number any more, or not trained so long."
)
Row = dict[str, Any]


def digits(root: Path) -> Path:
    """Class folders of the digits, enlarged."""
    found = load_digits()
    for number, (pixels, label) in enumerate(zip(found.images, found.target, strict=True)):
        folder = root / str(label)
        folder.mkdir(exist_ok=True)
        picture = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
        picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return root


def measured(known: set[tuple[Any, ...]]) -> Iterator[Row]:
    """What each twin of each network shows for each seed, but for those that are known."""
    record = Preprocess(resize=SIDE, crop=SIDE, mean=(0.3,) * 3, std=(0.37,) * 3)
    with tempfile.TemporaryDirectory() as folder:
        pictures = open_pictures(str(digits(Path(folder))))
        for net, (rate, *steps) in NETS.items():
            found = twins(replace(variant(net), num_classes=len(pictures.classes)))
            for seed in SEEDS:
                loader = Loader(pictures=pictures, record=record, batch_size=BATCH, train=True, seed=seed)
                for index, twin in enumerate(found):
                    if (net, seed, twin.shortcuts, twin.norm) not in known:
                        count = steps[twin.norm == "none"]
                        row = measure_twin(found, index, loader, machine("cpu"), steps=count, lr=rate, seed=seed)
                        yield {"net": net, "seed": seed, **row.to_dict()}


def rounded(value: Any) -> Any:
    """Numbers in four digits."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def of(rows: Iterable[Row], net: str, norm: str, *, shortcuts: bool) -> list[Row]:
    """One twin's rows, a seed each."""
    return [row for row in rows if (row["net"], row["norm"], row["shortcuts"]) == (net, norm, shortcuts)]


def ratio(row: Row) -> float:
    """The gradient at the first block over that at the last."""
    sizes = list(row["gradients"].values())
    return sizes[0] / sizes[-1]


def tail(row: Row, steps: int) -> float | None:
    """The mean of the ten losses that end at a step; None where training had ended or was not to go so far."""
    last = row["losses"][steps - 10 : steps]
    return None if len(last) < 10 or None in last else statistics.fmean(last)


def middle(values: Iterable[float | None]) -> str:
    """Median, least and greatest of the seeds; a dash where one has no number."""
    found = list(values)
    if None in found:
        return "–"
    return f"{statistics.median(found):.3g} ({min(found):.3g} to {max(found):.3g})"


def table(rows: list[Row]) -> list[Row]:
    """A row a twin."""
    return [
        {
            "network": net,
            "twin": f"{'shortcuts' if shortcuts else 'plain'}, {'no' if norm == 'none' else norm} norm",
            "gradient, first / last block": middle(map(ratio, these)),
            **{f"alike at {d}": middle(row["correlations"][d] for row in these) for d in TOLD},
            **{f"loss, step {step}": middle(tail(row, step) for row in these) for step in (50, 200)},
        }
        for net in NETS
        for norm in ("batch", "none")
        for shortcuts in (True, False)
        if (these := of(rows, net, norm, shortcuts=shortcuts))
    ]


def summary(rows: list[Row]) -> dict[str, Any]:
    """The deepest network with batch norm, beside its twin."""
    found = {}
    for name, shortcuts in (("with shortcuts", True), ("plain", False)):
        these = of(rows, DEEPEST, "batch", shortcuts=shortcuts)
        found |= {
            f"110 layers, {name}: alike at 1/1024": spread([row["correlations"]["1/1024"] for row in these]),
            f"110 layers, {name}: gradient, first / last block": spread(list(map(ratio, these))),
            f"110 layers, {name}: loss, step 200 (chance: 2.303)": spread([tail(row, 200) for row in these]),
        }
    return found


@styled()
def draw(rows: list[Row]) -> Any:
    """Three panels: how alike gradients are by distance, how large they are by block, and the loss by step."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(900 / 72, 340 / 72), dpi=72, layout="constrained")
    alike, size, loss = figure.subplots(1, 3)
    for shortcuts, colour, dash in ((True, BLUE, "-"), (False, ORANGE, "--")):
        for net, marker in zip(CIFAR, MARKERS, strict=False):
            these = of(rows, net, "batch", shortcuts=shortcuts)
            distances = [1 / int(d.partition("/")[2]) for d in these[0]["correlations"]]
            values = medians(row["correlations"].values() for row in these)
            alike.semilogx(distances, values, color=colour, ls=dash, marker=marker)
        deepest = of(rows, DEEPEST, "batch", shortcuts=shortcuts)
        sizes = medians(row["gradients"].values() for row in deepest)
        size.semilogy(range(1, len(sizes) + 1), sizes, color=colour, ls=dash)
        for row in deepest:
            means = [statistics.fmean(row["losses"][step - 10 : step]) for step in range(10, 201, 10)]
            loss.plot(range(10, 201, 10), means, color=colour, ls=dash, alpha=0.9)
    places = [4.0**-power for power in (7, 5, 3)]
    alike.set_xticks(places, ["1/16384", "1/1024", "1/64"])
    alike.minorticks_off()
    alike.set(title="Gradients of two inputs", ylabel="correlation", xlim=(4e-5, 0.25), ylim=(-0.1, 1.05))
    alike.set_xlabel("how far apart they are, as part of\nthe way from picture to picture")
    end = 1 / 16 * 1.35  # behind the last points
    for x, y, words, colour in (
        (1 / 50, 0.84, "20 layers", BLUE),
        (end, 0.2, "56", BLUE),
        (end, 0.11, "110", BLUE),
        (end, 0.03, "20", ORANGE),
        (1 / 800, 0.06, "56, 110", ORANGE),
    ):
        alike.text(x, y, words, color=colour)
    powers = range(-2, 6)
    size.set_yticks([10.0**power for power in powers], ["0.01", "", "1", "", "100", "", "10,000", ""])
    size.minorticks_off()
    size.set(title="Size of the gradient", xlabel="block, counted from the input\n(110 layers)")
    loss.axhline(math.log(10), color=MUTED, lw=1)
    loss.text(200, 2.36, "guessing", color=MUTED, ha="right", va="bottom")
    loss.set(title="Training loss", xlabel="step\n(110 layers, three seeds)", ylim=(0, None))
    named = ((BLUE, "-", "with shortcuts"), (ORANGE, "--", "plain: the same weights, no shortcuts"))
    handles = [Line2D([], [], color=colour, ls=dash, label=name) for colour, dash, name in named]
    figure.legend(handles=handles, loc="outside upper left", ncols=2)
    return figure


def medians(seeds: Iterable[Iterable[float]]) -> list[float]:
    """The median of the seeds, place by place."""
    return [statistics.median(each) for each in zip(*seeds, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--resume", action="store_true", help="go on with the rows that an earlier run left")
    parser.add_argument("--draw", action="store_true", help="measure nothing; draw what is kept")
    arguments = parser.parse_args()
    if not (arguments.resume or arguments.draw):
        CURVES.unlink(missing_ok=True)
    rows = [json.loads(line) for line in CURVES.read_text().splitlines()] if CURVES.exists() else []
    if not arguments.draw:
        known = {(row["net"], row["seed"], row["shortcuts"], row["norm"]) for row in rows}
        for row in measured(known):
            rows.append(rounded(row))
            with CURVES.open("a", encoding="utf-8") as file:  # an interrupted run is not lost
                file.write(json.dumps(rows[-1]) + "\n")
            print(row["net"], row["seed"], row["shortcuts"], row["norm"], row["loss"], flush=True)
        write_result("depth", __doc__, summary(rows), table(rows), NOTE)
    save(draw(rows), FIGURE)


if __name__ == "__main__":
    main()
