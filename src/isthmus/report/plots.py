"""The figures of a run's page, each with its alternative text and the same as a table."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from isthmus.evaluation.calibration import Calibration
from isthmus.report.figures import (
    Line,
    cost_figure,
    floors_figure,
    heads_figure,
    line_figure,
    reliability_figure,
)
from isthmus.report.page import Plot, interval, number, percent, plotted, thinned
from isthmus.report.tables import count, size

__all__ = ["cost_of", "curves_of", "lean", "losses", "reliability_of"]

POINTS = 400  # of a curve that are drawn


def reliability_of(calibration: Mapping[str, Any] | None) -> tuple[Plot | None, str]:
    """The reliability diagram, and whether the network is too sure."""
    if calibration is None:
        return None, ""
    found = Calibration.from_dict(calibration)
    error, bins = found.expected_error, len(found.count)
    rows = [
        (
            interval({"low": place / bins, "high": (place + 1) / bins}),
            f"{pictures:,}",
            percent(found.confidence[place] / pictures),
            percent(found.hits[place] / pictures),
        )
        for place, pictures in enumerate(found.count)
        if pictures
    ]
    figure = plotted(
        reliability_figure(found),
        "Reliability",
        f"Accuracy by confidence in {bins} bins; the mean distance from the diagonal is {percent(error)}",
        ("confidence", "pictures", "mean confidence", "came true"),
        rows,
        "Bars and points: how often predictions of a confidence came true. On the dashed line, confidence is accuracy.",
    )
    told = f"Confidence and accuracy are {percent(error)} apart (expected calibration error, {bins} bins)."
    return figure, f"{told} On the whole it is {lean(found)}."


def lean(found: Calibration) -> str:
    """Whether a network is too sure of itself, in a few words."""
    if abs(found.excess) < 0.01:
        return "as sure as it is right"
    return f"{'too sure' if found.excess > 0 else 'not sure enough'}, by {100 * abs(found.excess):.1f} points"


def curves_of(log: Mapping[str, Any], head: Sequence[str]) -> tuple[list[Plot], str]:
    """How a run learned: heads compared, or loss, validation and rate; and a sentence on it."""
    if log["heads"]:
        return [heads_plot(log["heads"], head)], (
            "The trunk stayed as it was. Heads on different stages were compared by cross-validation inside the "
            f"training part; the one on {' + '.join(head)} was then trained on all of it."
        )
    if not log["epochs"]:
        return [], ""
    best = max(log["epochs"], key=lambda row: row["val_accuracy"])
    last = log["epochs"][-1]
    told = f"{in_epochs(last['epoch'])}; validation was best after epoch {best['epoch']}, "
    told += percent(best["val_accuracy"])
    gap = best["val_accuracy"] - last["val_accuracy"]
    told += f", and ended {100 * gap:.1f} points below." if gap > 0 else ", where it ended." if best is last else "."
    return [loss_plot(log), validation_plot(log), rate_plot(log)], told


def in_epochs(number: int) -> str:
    """So many epochs."""
    return "1 epoch" if number == 1 else f"{number} epochs"


def heads_plot(heads: Sequence[dict[str, Any]], chosen: Sequence[str]) -> Plot:
    """The heads that were compared."""
    return plotted(
        heads_figure(heads, chosen),
        "Heads compared",
        f"Accuracy of {len(heads)} heads in cross-validation; the one on {' + '.join(chosen)} was chosen",
        ("head reads", "accuracy", "loss"),
        [(" + ".join(row["taps"]), percent(row["accuracy"]), f"{row['loss']:.4f}") for row in heads],
        "Blue: the head that was chosen.",
    )


def line(label: str, points: Iterable[tuple[float | None, float | None]], place: int = 0) -> Line:
    """A line of the points that are numbers, as many of them as can be told apart."""
    kept = thinned([(x, y) for x, y in points if x is not None and y is not None], POINTS)
    return Line(label=label, x=tuple(x for x, _ in kept), y=tuple(y for _, y in kept), place=place)


def epochs_at(steps: Sequence[Mapping[str, Any]]) -> list[float]:
    """The epochs done at each row of steps."""
    if not steps:
        return []
    each = steps[-1]["step"] / steps[-1]["epoch"]
    return [row["step"] / each for row in steps]


def losses(log: Mapping[str, Any]) -> list[Line]:
    """Loss over epochs: of training as it went, of validation behind each."""
    steps, epochs = log["steps"], log["epochs"]
    x = epochs_at(steps) or [row["epoch"] for row in epochs]
    train = zip(x, (row["loss"] for row in steps or epochs), strict=True)
    return [
        line("training", train),
        line("validation", ((row["epoch"], row["val_loss"]) for row in epochs), 1),
    ]


def loss_plot(log: Mapping[str, Any]) -> Plot:
    """Loss of training and of validation."""
    rows = log["epochs"]
    return plotted(
        line_figure(losses(log), across="epoch", up="loss (nats)"),
        "Loss",
        f"Training and validation loss over {in_epochs(len(rows))}; validation ends at {number(rows[-1]['val_loss'])}",
        ("epoch", "training", "validation"),
        [(row["epoch"], number(row["loss"]), number(row["val_loss"])) for row in rows],
    )


def validation_plot(log: Mapping[str, Any]) -> Plot:
    """Validation accuracy behind each epoch."""
    rows = log["epochs"]
    lines = [
        line("accuracy", ((row["epoch"], row["val_accuracy"]) for row in rows)),
        line("balanced", ((row["epoch"], row["val_balanced_accuracy"]) for row in rows), 2),
    ]
    return plotted(
        line_figure(lines, across="epoch", up="validation accuracy", percent=True),
        "Validation",
        f"Validation accuracy over {in_epochs(len(rows))}; it ends at {percent(rows[-1]['val_accuracy'])}",
        ("epoch", "accuracy", "balanced"),
        [(row["epoch"], percent(row["val_accuracy"]), percent(row["val_balanced_accuracy"])) for row in rows],
    )


def rate_plot(log: Mapping[str, Any]) -> Plot:
    """The learning rate."""
    steps = log["steps"] or log["epochs"]
    x = epochs_at(log["steps"]) or [row["epoch"] for row in steps]
    return plotted(
        line_figure([line("rate", zip(x, (row["lr"] for row in steps), strict=True), 3)], across="epoch", up="rate"),
        "Learning rate",
        f"The learning rate over the run; its peak is {max(row['lr'] for row in steps):.2g}",
        ("epoch", "rate"),
        [(f"{place:.2f}", number(row["lr"])) for place, row in zip(x, steps, strict=True)],
    )


def cost_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """What a picture costs, by stage, and the least time that it takes here."""
    network, floors = run["network"], run["floors"]
    if not network["rows"]:
        return {"summary": f"{count(network['params'])} parameters.", "figures": []}
    views = len(network["views"])
    summary = (
        f"{network['params']:,} parameters, {count(network['macs'])}MACs ({count(2 * network['macs'])}FLOPs) for a "
        f"picture of {network['size']} px"
        + (f"; a prediction is the mean of {views} views and costs that {views} times." if views > 1 else ".")
    )
    figures = [stages_plot(network["rows"])]
    if floors is None:
        summary += " The least times on this machine are told once its limits are measured: isthmus bench machine."
    else:
        figures.append(floors_plot(floors))
    return {"summary": summary, "figures": figures}


def stages_plot(rows: Sequence[dict[str, Any]]) -> Plot:
    """Multiply-adds and parameters by stage."""
    return plotted(
        cost_figure(rows),
        "By stage",
        f"Multiply-adds and parameters of {len(rows)} parts of the network",
        ("part", "channels", "map", "multiply-adds", "parameters", "activations"),
        [
            (
                row["name"],
                row["channels"],
                size(tuple(row["size"])),
                count(row["macs"]),
                count(row["params"]),
                count(row["activations"]),
            )
            for row in rows
        ],
    )


def floors_plot(floors: Mapping[str, Any]) -> Plot:
    """The least time of each stage."""
    rows, threads = floors["rows"], "1 thread" if floors["threads"] == 1 else f"{floors['threads']} threads"
    return plotted(
        floors_figure(rows),
        "Least time on this machine",
        f"The least time of {len(rows)} parts of the network: {1e3 * floors['seconds']:.2f} ms together",
        ("part", "ms", "binds", "expected ms"),
        [(row["name"], f"{1e3 * row['seconds']:.3f}", row["binds"], f"{1e3 * row['expected']:.3f}") for row in rows],
        f"{1e3 * floors['seconds']:.2f} ms for one picture in {floors['precision']} on {threads} of "
        f"{floors['machine']}, by its roofline; expect {1e3 * floors['expected']:.2f} ms of an engine "
        f"(isthmus bench times them).",
    )
