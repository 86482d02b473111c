"""Reports as single pages: they open from a disk, hold their pictures and figures, run no script and ask no host."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from isthmus.evaluation.calibration import Calibration
from isthmus.report.gather import FEW, Gathered
from isthmus.report.images import confusion_picture
from isthmus.report.page import interval, lasting, made_page, number, percent, told
from isthmus.report.plots import cost_of, curves_of, lean, reliability_of
from isthmus.report.tables import count

__all__ = ["run_page"]

WORST = 15  # classes that are listed, where there are many


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
        found.append(("Multiply-adds", count(network["macs"]), f"a picture; {len(network['views'])} × in a prediction"))
    if seconds:
        found.append(("Trained in", lasting(seconds), run["environment"].get("machine", {}).get("name", "")))
    return [{"label": label, "value": value, "note": note} for label, value, note in found]


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
