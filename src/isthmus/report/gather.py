"""What a run folder tells, as plain data: the source of its page, of `report.json` and of comparisons.

What a folder does not hold is named under `missing`, with the reason; nothing is put in its place.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus import records
from isthmus.arch.cost import cost
from isthmus.arch.plan import plan
from isthmus.arch.roofline import Precision, merged, roofline
from isthmus.deploy.limits import kept_limits
from isthmus.errors import IsthmusError, RunError, SpecError
from isthmus.evaluation.metrics import Tally, wilson
from isthmus.messages import first_line
from isthmus.nn.network import ResNet
from isthmus.train.folder import ENVIRONMENT, RECIPE, SCORES, finished
from isthmus.train.log import read_log
from isthmus.train.loop import LOG
from isthmus.train.recipe import Recipe, gradient_only
from isthmus.weights.load import load

__all__ = ["FEW", "SCHEMA", "Gathered", "class_rows", "gather"]

SCHEMA = 1
FEW = 12  # classes whose confusion matrix is a table to read
PAIRS = 20  # of confused classes that are named


@dataclass(frozen=True, kw_only=True, slots=True)
class Gathered:
    """A run as plain data, with its network, its scores, and the pictures that go with them by name as data URIs."""

    document: dict[str, Any]
    net: ResNet
    scores: Tally
    images: dict[str, str]


def gather(folder: Path) -> Gathered:
    """What the folder of a finished run tells by itself; raises RunError for any other folder."""
    if not folder.is_dir():
        raise RunError(f"{folder} is no folder; name a run folder, which isthmus train leaves")
    scores = finished(folder)
    if scores is None:
        raise RunError(f"{folder} holds no finished run; name one, or go on with isthmus train --resume {folder}")
    net, missing = load(folder), list[str]()
    environment = environment_of(folder, missing)
    written = json.loads((folder / SCORES).read_text(encoding="utf-8"))
    if scores.calibration is None:
        missing.append("the run was scored before confidences were counted: no calibration and no mistakes by name")
    document = {
        "schema": SCHEMA,
        "run": str(folder),
        "data": written.get("data", ""),
        "seconds": written.get("seconds"),
        "scores": headline(scores),
        "classes": class_rows(scores),
        "confused": confused(scores),
        "mistakes": written.get("mistakes", []),
        "calibration": None if scores.calibration is None else scores.calibration.to_dict(),
        "log": log_of(folder, missing),
        "network": network_of(net, missing),
        "floors": floors_of(net, environment.get("precision", "fp32")),
        "recipe": recipe_of(folder, missing),
        "environment": environment,
        "missing": missing,
    }
    return Gathered(document=document, net=net, scores=scores, images={})


def headline(scores: Tally) -> dict[str, Any]:
    """The scores of all classes together; parts of the pictures with their 95 % intervals (Wilson 1927)."""
    seen, five = scores.seen, scores.top5
    common = max(scores.per_class(), key=lambda row: row.support)
    return {
        "pictures": seen,
        "correct": scores.correct,
        "classes": len(scores.classes),
        "accuracy": part(scores.correct, seen),
        "top5": None if five is None else part(round(five * seen), seen),
        "balanced_accuracy": scores.balanced_accuracy,
        "loss": scores.loss,
        "commonest": {"name": common.name, **part(common.support, seen)},
    }


def part(hits: int, count: int) -> dict[str, float]:
    """A part of some pictures, and its interval."""
    low, high = wilson(hits, count)
    return {"value": hits / count, "low": low, "high": high}


def class_rows(scores: Tally) -> list[dict[str, Any]]:
    """A row a class that has pictures: what part is found, and what part is right when said; the least found first."""
    said, hits = scores.confusion.sum(0).tolist(), scores.confusion.diagonal().tolist()
    rows = [
        {
            "name": row.name,
            "pictures": row.support,
            "found": part(hit, row.support),
            "said": guesses,
            "precision": part(hit, guesses) if guesses else None,
        }
        for row, guesses, hit in zip(scores.per_class(), said, hits, strict=True)
        if row.support
    ]
    return sorted(rows, key=lambda row: (row["found"]["value"], -row["pictures"]))


def confused(scores: Tally) -> list[dict[str, Any]]:
    """The classes that are most often taken for each other: how many pictures of one were taken for the other."""
    table = scores.confusion.clone()
    support = table.sum(1)
    table.fill_diagonal_(0)
    counts, places = table.flatten().topk(min(PAIRS, table.numel()))
    rows = []
    for count, place in zip(counts.tolist(), places.tolist(), strict=True):
        label, guess = divmod(place, len(scores.classes))
        if count:
            names = {"label": scores.classes[label], "predicted": scores.classes[guess]}
            rows.append({**names, "pictures": count, "part": count / int(support[label])})
    return rows


def log_of(folder: Path, missing: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The rows of the log by what they are of: steps, epochs, heads that were compared."""
    try:
        rows = read_log(folder / LOG)
    except RunError as error:
        missing.append(f"no curves: {error}")
        rows = []
    return {
        "steps": [row for row in rows if "step" in row],
        "epochs": [row for row in rows if "epoch" in row and "step" not in row],
        "heads": [row for row in rows if "taps" in row and "accuracy" in row],
    }


def network_of(net: ResNet, missing: list[str]) -> dict[str, Any]:
    """The network, and what it costs for one picture of the size that it sees."""
    record = net.preprocess
    seen = plan(net.spec, record.crop)
    document: dict[str, Any] = {
        "name": net.spec.name,
        "stages": [stage.depth for stage in net.spec.stages],
        "head": list(net.spec.head.taps),
        "size": record.crop,
        "views": list(record.views),
        "preprocess": str(record),
        "params": sum(each.numel() for each in net.parameters()),
        "macs": None,
        "rows": [],
    }
    try:
        costs = cost(seen)
        rows = costs.by("stage")
    except SpecError as error:
        missing.append(f"no cost by stage: {first_line(error)}")
        return document
    return document | {
        "macs": costs.macs,
        "activations": costs.activations,
        "receptive_field": costs.receptive_field,
        "rows": [
            {
                "name": row.name,
                "channels": row.out_channels,
                "size": list(row.out_size),
                "params": row.params,
                "macs": row.macs,
                "activations": row.activations,
            }
            for row in rows
        ],
    }


def floors_of(net: ResNet, precision: str) -> dict[str, Any] | None:
    """The least time of each stage on this machine, for one picture; None where its limits were never measured."""
    here = kept_limits()
    if here is None:
        return None
    known: Precision = "bf16" if precision == "bf16" and here.bf16 else "fp32"
    try:
        floors = merged(roofline(plan(net.spec, net.preprocess.crop), here, precision=known), "stage")
    except SpecError:  # a block of the caller's own, of which the costs by stage are told to be missing already
        return None
    return {
        "machine": here.machine,
        "threads": here.threads,
        "precision": known,
        "seconds": sum(each.seconds for each in floors),
        "expected": sum(each.expected for each in floors),
        "rows": [
            {"name": each.name, "seconds": each.seconds, "binds": each.binds, "expected": each.expected}
            for each in floors
        ],
    }


def recipe_of(folder: Path, missing: list[str]) -> dict[str, Any]:
    """Every setting that had a meaning in the run, and the names of those that are not as they usually are."""
    try:
        recipe = Recipe.from_file(folder / RECIPE)
    except IsthmusError as error:
        missing.append(f"no recipe: {first_line(error)}")
        return {"settings": {}, "changed": []}
    idle = gradient_only() if recipe.freeze == "trunk" else set()
    usual = flat(records.to_dict(Recipe(data=recipe.data, weights="any"))) | {"weights": ""}
    settings = {
        name: value for name, value in flat(records.to_dict(recipe)).items() if name.partition(".")[0] not in idle
    }
    changed = [name for name, value in settings.items() if name == "data" or value != usual.get(name)]
    return {"settings": settings, "changed": changed}


def flat(settings: Mapping[str, Any], inside: str = "") -> dict[str, Any]:
    """Settings by dotted names, as `isthmus train --set` takes them."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{inside}{name}.")
        else:
            found[inside + name] = value
    return found


def environment_of(folder: Path, missing: list[str]) -> dict[str, Any]:
    """Machine, precision and versions."""
    try:
        found: dict[str, Any] = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        missing.append(f"no machine and versions: {ENVIRONMENT} cannot be read ({first_line(error)})")
        return {}
    return found
