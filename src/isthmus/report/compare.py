"""Several runs side by side: scores with their intervals, curves over each other, and what set the runs apart."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from isthmus.errors import RunError
from isthmus.report.figures import Line, interval_figure, line_figure
from isthmus.report.gather import SCHEMA
from isthmus.report.page import Plot, interval, lasting, made_page, number, percent, plotted, told
from isthmus.report.plots import losses
from isthmus.report.tables import count

__all__ = ["comparison", "comparison_page"]

CLASSES = 20  # in which the runs differ most
SCORES = (
    "run",
    "accuracy",
    "95 % interval",
    "balanced",
    "top 5",
    "loss",
    "calibration error",
    "pictures",
    "parameters",
    "MACs",
    "trained in",
)
Documents = Sequence[Mapping[str, Any]]


def comparison(runs: Documents) -> dict[str, Any]:
    """What sets runs apart, as plain data; raises RunError where one is named twice."""
    folders = [run["run"] for run in runs]
    if len(set(folders)) < len(folders):
        raise RunError("a run is named twice; name different runs")
    names = labels(folders)
    return {
        "schema": SCHEMA,
        "runs": [row_of(name, run) for name, run in zip(names, runs, strict=True)],
        "same_pictures": same_pictures(runs),
        "classes": class_differences(runs),
        "settings": setting_differences(runs),
        "versions": differences([run["environment"].get("versions", {}) for run in runs]),
        "machines": differences([machine(run["environment"]) for run in runs]),
        "missing": [f"{name}: {line}" for name, run in zip(names, runs, strict=True) for line in run["missing"]],
    }


def labels(folders: Sequence[str]) -> list[str]:
    """The runs' folders, without what all of them begin with."""
    parts = [PurePath(folder).parts for folder in folders]
    common = 0
    while all(len(each) > common + 1 for each in parts) and len({each[common] for each in parts}) == 1:
        common += 1
    return [str(PurePath(*each[common:])) for each in parts]


def row_of(name: str, run: Mapping[str, Any]) -> dict[str, Any]:
    """The scores and the cost of a run."""
    scores, network, calibration = run["scores"], run["network"], run["calibration"]
    return {
        "name": name,
        "run": run["run"],
        "pictures": scores["pictures"],
        "accuracy": scores["accuracy"],
        "balanced_accuracy": scores["balanced_accuracy"],
        "top5": scores["top5"],
        "loss": scores["loss"],
        "expected_error": calibration and calibration["expected_error"],
        "params": network["params"],
        "macs": network["macs"],
        "views": len(network["views"]),
        "seconds": run["seconds"],
    }


def same_pictures(runs: Documents) -> bool:
    """Whether the runs were validated on the same pictures, as far as their recipes and counts tell."""
    keys = ("data", "val_fraction", "seed")
    counts = [{row["name"]: row["pictures"] for row in run["classes"]} for run in runs]
    asked = [[run["recipe"]["settings"].get(key) for key in keys] for run in runs]
    return all(each == counts[0] for each in counts) and all(each == asked[0] for each in asked)


def class_differences(runs: Documents) -> list[dict[str, Any]]:
    """What part of each class the runs find, the class in which they differ most first."""
    found = [{row["name"]: row["found"]["value"] for row in run["classes"]} for run in runs]
    names = dict.fromkeys(name for each in found for name in each)
    rows: list[dict[str, Any]] = [{"name": name, "found": [each.get(name) for each in found]} for name in names]

    def apart(row: Mapping[str, Any]) -> float:
        values: list[float] = [value for value in row["found"] if value is not None]
        return max(values) - min(values)

    return sorted(rows, key=apart, reverse=True)


def differences(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The settings that are not the same in all, with the value of each; null where one has none."""
    names = dict.fromkeys(name for each in settings for name in each)
    rows = [{"name": name, "values": [each.get(name) for each in settings]} for name in names]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"])]


def setting_differences(runs: Documents) -> list[dict[str, Any]]:
    """The settings that set runs apart; one that has no meaning in some counts where another run changed it."""
    changed = {name for run in runs for name in run["recipe"]["changed"]}
    rows = differences([run["recipe"]["settings"] for run in runs])
    return [row for row in rows if row["name"] in changed or None not in row["values"]]


def machine(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Where a run was trained."""
    return {
        **environment.get("machine", {}),
        "precision": environment.get("precision"),
        "processes": environment.get("processes"),
    }


def comparison_page(found: Mapping[str, Any], runs: Documents) -> str:
    """The page of a comparison; `runs` are what it was made of."""
    rows = found["runs"]
    names = [row["name"] for row in rows]
    best = max(rows, key=lambda row: row["accuracy"]["value"])
    five = any(row["top5"] for row in rows)
    return made_page(
        "comparison.html",
        title=" · ".join(names),
        found=found,
        names=names,
        verdict=verdict(rows, best),
        columns=[name for name in SCORES if five or name != "top 5"],
        scores=[score_row(row, five=five) for row in rows],
        figure=accuracy_plot(rows),
        curves=curves(names, runs),
        classes=[
            (row["name"], *("–" if value is None else percent(value) for value in row["found"]))
            for row in found["classes"][:CLASSES]
        ],
        shown=min(CLASSES, len(found["classes"])),
        settings=[(row["name"], *map(shown, row["values"])) for row in found["settings"]],
        machines=[(row["name"], *map(shown, row["values"])) for row in (*found["machines"], *found["versions"])],
    )


def shown(value: object) -> str:
    """A setting, or that a run has none."""
    return "–" if value is None else told(value)


def verdict(rows: Documents, best: Mapping[str, Any]) -> str:
    """Which run is best, and whether the intervals leave it open."""
    part = best["accuracy"]
    alike = [row["name"] for row in rows if row["accuracy"]["value"] == part["value"]]
    rest = [row for row in rows if row["name"] not in alike]
    close = [row["name"] for row in rest if row["accuracy"]["high"] >= part["low"]]
    one = len(alike) == 1
    lead = f"{best['name']} is right most often" if one else f"{' and '.join(alike)} are right equally often"
    lead += f": {percent(part['value'])} ({interval(part)})."
    if not rest:
        return lead
    own = "Its interval overlaps" if one else "Their interval overlaps"
    if close:
        return f"{lead} {own} with that of {', '.join(close)}, so these pictures alone do not settle it."
    return f"{lead} {own} with no other."


def score_row(row: Mapping[str, Any], *, five: bool) -> tuple[str, ...]:
    """A run's scores and cost in words, in the order of SCORES."""
    macs = "–" if row["macs"] is None else f"{count(row['macs'])}" + (f" × {row['views']}" if row["views"] > 1 else "")
    return (
        row["name"],
        percent(row["accuracy"]["value"]),
        interval(row["accuracy"]),
        percent(row["balanced_accuracy"]),
        *((("–" if row["top5"] is None else percent(row["top5"]["value"])),) if five else ()),
        number(row["loss"]),
        "–" if row["expected_error"] is None else percent(row["expected_error"]),
        f"{row['pictures']:,}",
        count(row["params"]),
        macs,
        "–" if row["seconds"] is None else lasting(row["seconds"]),
    )


def accuracy_plot(rows: Documents) -> Plot:
    """Accuracy of every run with its interval."""
    return plotted(
        interval_figure([(row["name"], row["accuracy"]) for row in rows], "validation accuracy, 95 % interval"),
        "Accuracy",
        "Validation accuracy with 95 % intervals: "
        + "; ".join(f"{row['name']} {percent(row['accuracy']['value'])}" for row in rows),
        ("run", "accuracy", "interval"),
        [(row["name"], percent(row["accuracy"]["value"]), interval(row["accuracy"])) for row in rows],
    )


def curves(names: Sequence[str], runs: Documents) -> list[Plot]:
    """Training and validation over epochs, one line a run; runs with a frozen trunk have no epochs."""
    logs = [(place, name, run["log"]) for place, (name, run) in enumerate(zip(names, runs, strict=True))]
    logs = [each for each in logs if each[2]["epochs"]]
    if not logs:
        return []
    made = []
    for title, up, key, in_percent in (
        ("Validation accuracy", "validation accuracy", "val_accuracy", True),
        ("Validation loss", "loss (nats)", "val_loss", False),
        ("Training loss", "loss (nats)", "loss", False),
    ):
        lines = [over_epochs(place, name, log, key) for place, name, log in logs]
        last = "; ".join(
            f"{line.label} {percent(line.y[-1]) if in_percent else number(line.y[-1])}" for line in lines if line.y
        )
        most = max(len(log["epochs"]) for _, _, log in logs)
        table = [
            (
                epoch + 1,
                *(number(log["epochs"][epoch][key]) if epoch < len(log["epochs"]) else "–" for _, _, log in logs),
            )
            for epoch in range(most)
        ]
        made.append(
            plotted(
                line_figure(lines, across="epoch", up=up, percent=in_percent),
                title if len(lines) > 1 else f"{title} of {lines[0].label}",
                f"{title} over the epochs; at the end: {last}",
                ("epoch", *(name for _, name, _ in logs)),
                table,
            )
        )
    return made


def over_epochs(place: int, name: str, log: Mapping[str, Any], key: str) -> Line:
    """A figure of a run behind each epoch; of its training loss as it went."""
    if key == "loss":
        train = losses(log)[0]
        return Line(label=name, x=train.x, y=train.y, place=place)
    points = [(float(row["epoch"]), float(row[key])) for row in log["epochs"] if row[key] is not None]
    return Line(label=name, x=tuple(x for x, _ in points), y=tuple(y for _, y in points), place=place)
