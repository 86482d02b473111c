"""Reports as single pages: they open from a disk, hold their pictures and figures, run no script and ask no host."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isthmus.evaluation.calibration import Calibration
from isthmus.report.drawing import DARK, LIGHT, inline
from isthmus.report.figures import (
    Line,
    cost_figure,
    floors_figure,
    heads_figure,
    line_figure,
    reliability_figure,
)
from isthmus.report.gather import FEW, Gathered, thinned
from isthmus.report.images import confusion_picture
from isthmus.report.tables import count, size

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

__all__ = ["Plot", "interval", "made_page", "percent", "plotted", "run_page"]

WORST = 15  # classes that are listed, where there are many
POINTS = 400  # of a curve that are drawn
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


def percent(part: float) -> str:
    """A part of 1 in percent."""
    return f"{100 * part:.1f}\N{NO-BREAK SPACE}%"


def interval(part: Mapping[str, float]) -> str:
    """The ends of an interval of a part of 1."""
    dash = "\N{WORD JOINER}–\N{WORD JOINER}"  # no line ends at it
    return f"{100 * part['low']:.1f}{dash}{100 * part['high']:.1f}\N{NO-BREAK SPACE}%"


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


def run_page(gathered: Gathered) -> str:
    """The page of one run."""
    run, images = gathered.document, gathered.images
    few = run["scores"]["classes"] <= FEW
    curves, learned = curves_of(run["log"], run["network"]["head"])
    reliability, trust = reliability_of(run["calibration"])
    mistakes = [mistake(row, images) for row in run["mistakes"]]
    diagnosis = diagnosis_of(run.get("diagnosis"))
    sections = {
        "wrong": "Where it is wrong",
        "mistakes": "Mistakes" if mistakes else "",
        "trust": "Confidence" if reliability else "",
        "why": "Diagnosis" if diagnosis else "",
        "learned": "Learning" if curves else "",
        "cost": "Cost",
        "next": "What to do next",
        "record": "How it was made",
    }
    return made_page(
        "run.html",
        title=run["run"],
        run=run,
        confusion=None if few else confusion_picture(gathered.scores.confusion.numpy()),
        verdict=verdict(run["scores"]),
        tiles=tiles(run),
        sections=[(place, name) for place, name in sections.items() if name],
        wrong=wrong(run),
        matrix=matrix(gathered) if few else None,
        confusion_alt=confusion_alt(run),
        pairs=[(row["label"], row["predicted"], row["pictures"], percent(row["part"])) for row in run["confused"]],
        classes=classes_of(run["classes"]),
        mistakes=mistakes,
        mistakes_note=mistakes_note(mistakes),
        reliability=reliability,
        trust=trust,
        diagnosis=diagnosis,
        curves=curves,
        learned=learned,
        cost=cost_of(run),
        commands=commands(run),
        recipe=recipe_of(run["recipe"]),
        machine=machine_of(run),
    )


def verdict(scores: Mapping[str, Any]) -> str:
    """Whether it is good, in two sentences."""
    accuracy, common = scores["accuracy"], scores["commonest"]
    return (
        f"{scores['correct']:,} of {scores['pictures']:,} validation pictures are right: {percent(accuracy['value'])}; "
        f"on other pictures of this kind expect {interval(accuracy)}. Always saying “{common['name']}” would be right "
        f"in {percent(common['value'])}."
    )


def tiles(run: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures that are asked for first."""
    scores, network, calibration = run["scores"], run["network"], run["calibration"]
    top5, seconds = scores["top5"], run["seconds"]
    found = [
        ("Accuracy", percent(scores["accuracy"]["value"]), f"{interval(scores['accuracy'])} (95\N{NO-BREAK SPACE}%)"),
        ("Balanced accuracy", percent(scores["balanced_accuracy"]), f"mean of {scores['classes']} classes"),
    ]
    if top5:
        found.append(("Among the first five", percent(top5["value"]), interval(top5)))
    if calibration:
        found.append(
            ("Calibration error", percent(calibration["expected_error"]), lean(Calibration.from_dict(calibration)))
        )
    found.append(
        ("Parameters", count(network["params"]), " · ".join(filter(None, (network["name"], f"{network['size']} px"))))
    )
    if network["macs"]:
        found.append(("Multiply-adds", macs(network["macs"]), f"a picture; {len(network['views'])} × in a prediction"))
    if seconds:
        found.append(("Trained in", lasting(seconds), run["environment"].get("machine", {}).get("name", "")))
    return [{"label": label, "value": value, "note": note} for label, value, note in found]


def macs(number: int) -> str:
    """Multiply-adds in three digits."""
    scale, unit = next((each for each in ((1e9, "G"), (1e6, "M")) if number >= each[0]), (1e3, "k"))
    return f"{number / scale:.3g}\N{NO-BREAK SPACE}{unit}"


def lean(found: Calibration) -> str:
    """Whether a network is too sure of itself, in a few words."""
    if abs(found.excess) < 0.01:
        return "as sure as it is right"
    return f"{'too sure' if found.excess > 0 else 'not sure enough'}, by {100 * abs(found.excess):.1f} points"


def lasting(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def wrong(run: Mapping[str, Any]) -> str:
    """Which classes are weak, in a sentence."""
    worst, pairs = run["classes"][0], run["confused"]
    if not pairs:
        return "No validation picture is wrong."
    return (
        f"“{worst['name']}” is found least: {percent(worst['found']['value'])} of its {worst['pictures']:,} pictures. "
        f"The commonest mistake is “{pairs[0]['label']}” taken for “{pairs[0]['predicted']}”, "
        f"{pairs[0]['pictures']:,} times."
    )


def matrix(gathered: Gathered) -> dict[str, Any]:
    """The confusion matrix as cells."""
    names, table = gathered.scores.classes, gathered.scores.confusion.tolist()
    return {
        "names": names,
        "rows": [
            {
                "name": name,
                "cells": [
                    {"count": value, "part": value / max(sum(row), 1), "right": place == other}
                    for other, value in enumerate(row)
                ],
            }
            for place, (name, row) in enumerate(zip(names, table, strict=True))
        ],
    }


def confusion_alt(run: Mapping[str, Any]) -> str:
    """What the picture of a confusion matrix shows."""
    scores = run["scores"]
    return (
        f"Confusion matrix of {scores['classes']} classes: {percent(scores['accuracy']['value'])} of the pictures lie "
        f"on the diagonal; the classes most often confused are in the table below"
    )


def classes_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The classes, or the worst of many."""
    many = len(rows) > WORST
    return {
        "title": f"The {WORST} classes that are found least" if many else "By class",
        "caption": (f"Of {len(rows)} classes. " if many else "")
        + "Found: the part of its pictures that got its name, with the 95\N{NO-BREAK SPACE}% interval.",
        "rows": rows[:WORST],
    }


def short(name: str) -> str:
    """The end of a picture's name, which tells it from the others: two parts of a path."""
    return "/".join(name.replace("\\", "/").split("/")[-2:])


def mistake(row: Mapping[str, Any], images: Mapping[str, str]) -> dict[str, Any]:
    """A mistake with its pictures, where they are at hand."""
    picture, heat = (f"{kind} {row['index']}" for kind in ("picture", "heat"))
    return {**row, "short": short(row["name"]), "picture": images.get(picture), "heat": images.get(heat)}


def mistakes_note(mistakes: Sequence[Mapping[str, Any]]) -> str:
    """What can be learned from mistakes, and what their heat maps show."""
    shown = any(row.get("picture") for row in mistakes)
    return (
        "Look whether the label or the network is wrong: wrong labels, two classes in one picture and pictures of "
        "something else gather here."
        + (" Beside each picture, what speaks for the class that was said glows (Grad-CAM, last map)." if shown else "")
    )


def reliability_of(calibration: Mapping[str, Any] | None) -> tuple[Plot | None, str]:
    """The reliability diagram, and whether the network is too sure."""
    if calibration is None:
        return None, ""
    found = Calibration.from_dict(calibration)
    error, bins = found.expected_error, len(found.count)
    rows = [
        (
            interval({"low": place / bins, "high": (place + 1) / bins}),
            f"{number:,}",
            percent(found.confidence[place] / number),
            percent(found.hits[place] / number),
        )
        for place, number in enumerate(found.count)
        if number
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
    told = f"{last['epoch']} epochs; validation was best after epoch {best['epoch']}, {percent(best['val_accuracy'])}"
    gap = best["val_accuracy"] - last["val_accuracy"]
    told += f", and ended {100 * gap:.1f} points below." if gap > 0 else ", where it ended." if best is last else "."
    return [loss_plot(log), validation_plot(log), rate_plot(log)], told


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
        f"Training and validation loss over {len(rows)} epochs; validation ends at {number(rows[-1]['val_loss'])}",
        ("epoch", "training", "validation"),
        [(row["epoch"], number(row["loss"]), number(row["val_loss"])) for row in rows],
    )


def number(value: float | None) -> str:
    """A value in four digits, or that there is none."""
    return "–" if value is None else f"{value:.4g}"


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
        f"Validation accuracy over {len(rows)} epochs; it ends at {percent(rows[-1]['val_accuracy'])}",
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
        ("part", "ms", "binds"),
        [(row["name"], f"{1e3 * row['seconds']:.3f}", row["binds"]) for row in rows],
        f"{1e3 * floors['seconds']:.2f} ms for one picture in {floors['precision']} on {threads} of "
        f"{floors['machine']}, by its roofline; an engine takes longer (isthmus bench tells how long).",
    )


def diagnosis_of(diagnosis: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The diagnosis in the words of a page."""
    if diagnosis is None:
        return None
    found, pictures = diagnosis["findings"], diagnosis["pictures"]
    serious = sum(each["severity"] != "note" for each in found)
    told = f"{serious} of {len(found)} findings need a look." if serious else "Neither a fault nor a warning was found."
    return {
        "summary": f"{told} Looked at on {pictures} pictures: {', '.join(diagnosis['checked'])}.",
        "findings": found,
        "unchecked": diagnosis["unchecked"],
        "tables": [each for each in (blocks_of(diagnosis), strips_of(diagnosis), norms_of(diagnosis)) if each["rows"]],
    }


def blocks_of(diagnosis: Mapping[str, Any]) -> dict[str, Any]:
    """Signals by block."""
    return {
        "title": "Signals by block",
        "caption": "Norms of the gradients in a block's parameters and in its input, and a step beside the weights",
        "columns": ("block", "output (RMS)", "gradient", "gradient of the input", "step / weights"),
        "rows": [
            (
                row["name"],
                number(row["scale"]),
                *(spread(row.get(key)) for key in ("gradient", "input_gradient", "update")),
            )
            for row in diagnosis["blocks"]
        ],
    }


def spread(value: Mapping[str, float | None] | None) -> str:
    """A mean with its deviation."""
    if value is None:
        return "–"
    return "no number" if None in value.values() else f"{value['mean']:.3g} ± {value['deviation']:.1g}"


def strips_of(diagnosis: Mapping[str, Any]) -> dict[str, Any]:
    """How much of each strip is used."""
    return {
        "title": "How much of its strip each block uses",
        "caption": "Effective rank of the activations behind the 3×3 (Roy & Vetterli 2007), and channels that stay 0",
        "columns": ("block", "width", "effective rank", "dead channels", "positions"),
        "rows": [
            (
                row["name"],
                str(row["width"]),
                f"{row['rank']:.1f}" + ("" if row["enough"] else " (too few positions)"),
                str(row["dead"]),
                f"{row['samples']:,}",
            )
            for row in diagnosis["strips"]
        ],
    }


def norms_of(diagnosis: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics of the batch norms beside those of the pictures."""
    return {
        "title": "Batch-norm statistics beside those of the pictures",
        "caption": "With statistics that fit, the shift is 0 and the ratio of variances 1",
        "columns": ("norm", "mode", "shift (deviations)", "variance ratio", "least variance"),
        "rows": [
            (row["name"], row["mode"], number(row["shift"]), number(row["ratio"]), number(row["least_variance"]))
            for row in diagnosis["norms"]
        ],
    }


def commands(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What one does with a run."""
    name, settings = shlex.quote(run["run"]), run["recipe"]["settings"]
    found = [
        (f"isthmus predict {name} PICTURES", "use it"),
        (f"isthmus serve {name}", "answer over HTTP, with a page to drop pictures on"),
        (f"isthmus export {name} model.onnx", "a file for other engines, compared with the network"),
        (f"isthmus bench {name}", "how fast each engine runs it here"),
        (f"isthmus report {name} OTHER_RUN", "compare it"),
    ]
    if settings.get("freeze") == "trunk":
        data = shlex.quote(str(settings["data"]))
        found.insert(1, (f"isthmus train --data {data} --weights {name} --freeze none", "train every layer from here"))
    return found


def told(value: object) -> str:
    """A setting's value as `--set` takes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def recipe_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, and those that are not as usual."""
    rows = [(name, told(value)) for name, value in recipe["settings"].items()]
    changed = set(recipe["changed"])
    return {"rows": rows, "changed": [row for row in rows if row[0] in changed]}


def machine_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """Machine, precision, time, versions."""
    found = run["environment"]
    if not found:
        return {"rows": [], "versions": []}
    here = found["machine"]
    rows = [
        ("machine", f"{here['name']}, {here['cores']} cores, {here['memory'] / 2**30:.0f} GiB"),
        ("device", here["device"]),
        ("precision", found["precision"]),
        ("processes", str(found["processes"])),
    ]
    return {"rows": rows, "versions": list(found["versions"].items())}
