"""Runs from data to a folder one can keep: what the Python names and the command line share."""

import csv
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isthmus import records
from isthmus.arch.preprocess import Preprocess
from isthmus.arch.spec import HeadSpec
from isthmus.atomic import atomic_write
from isthmus.data.loader import Loader
from isthmus.data.sources import DataSet, Pictures, list_pictures, open_data
from isthmus.data.transform import normalise
from isthmus.errors import DataError, RecipeError, RunError
from isthmus.evaluation.inference import Inference
from isthmus.evaluation.metrics import Tally
from isthmus.nn.fold import insert_batchnorm
from isthmus.nn.network import ResNet
from isthmus.runtime import Machine, Precision, machine, versions
from isthmus.train.features import extract, with_head
from isthmus.train.loop import train_network
from isthmus.train.probe import LINEAR, Choice, Features, Probe, apply_head, candidates, choose, fit_head
from isthmus.train.recipe import Recipe
from isthmus.train.reporter import Reporter
from isthmus.weights.load import create, load, load_weights, save_weights

__all__ = ["Prediction", "Run", "evaluate", "fit", "predict"]

MEASURED_BATCHES = 8  # pictures × batches behind the statistics of a re-inserted batch norm
MODEL, START = "model.safetensors", "start.safetensors"
RECIPE, SCORES, ENVIRONMENT = "recipe.toml", "evaluation.json", "environment.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A finished run: its folder, its scores on the validation pictures, and the seconds it took."""

    folder: Path
    scores: Tally
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One picture: its best classes with their probabilities, or why it could not be read."""

    path: Path
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str = ""


def fit(
    recipe: Recipe,
    out: Path | str = "",
    *,
    data: DataSet | None = None,
    resume: bool = False,
    device: str | None = None,
    reporter: Reporter | None = None,
) -> Run:
    """Train as `recipe` says and leave a run folder: recipe, log, checkpoint, model with metadata, scores.

    `out` defaults to the next free number under runs/. `data` takes the place of what `recipe.data` names. Raises
    RunError when `out` holds a run already (unless `resume`), Interrupted (after saving) on Ctrl-C.
    """
    reporter, began, here = reporter or Reporter(), time.perf_counter(), machine(device)
    folder = run_folder(Path(out) if out else None, resume=resume)
    data = data or open_data(recipe.data, val_fraction=recipe.val_fraction, seed=recipe.seed)
    net = starting_network(recipe, data.classes)
    counts = ", ".join(f"{count} {name}" for name, count in data.train.counts().items())
    reporter.say(f"{len(data.train)} pictures to train on ({counts}), {len(data.val)} to validate on")
    precision: Precision = here.precision if recipe.precision == "auto" else recipe.precision
    write_text(folder / RECIPE, recipe.to_toml())
    write_text(folder / ENVIRONMENT, json.dumps(environment(here, precision), indent=2))
    if recipe.freeze == "trunk":
        net, scores = fit_probe(net, data, recipe, here, precision, reporter)
    else:
        if not resume:
            net = ready_to_train(net, data, recipe, here, precision, reporter)
            save_weights(net, folder / START)
        net = train_network(load(folder / START), data, recipe, here, folder, reporter, resume=resume)
        val = Loader(pictures=data.val, record=net.preprocess, batch_size=recipe.batch_size, train=False)
        scores = Inference(net, here, precision).evaluate(val)
    seconds = time.perf_counter() - began
    net.classes = data.classes
    save_weights(net.cpu().eval(), folder / MODEL)
    write_text(folder / SCORES, json.dumps(scores.to_dict() | {"data": data.name, "seconds": seconds}, indent=2))
    return Run(folder=folder, scores=scores, seconds=seconds)


def run_folder(out: Path | None, *, resume: bool) -> Path:
    """The folder of a run, made; raises RunError when it holds another run."""
    if out is None:
        taken = {path.name for path in Path("runs").glob("*")}
        out = Path("runs") / str(next(number for number in range(1, len(taken) + 2) if str(number) not in taken))
    if resume and not (out / RECIPE).is_file():
        raise RunError(f"{out} holds no run to resume ({RECIPE} is missing)")
    if not resume and (out / RECIPE).exists():
        raise RunError(f"{out} holds a run already; choose another --out, or go on with --resume {out}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {out}: {error.strerror}") from error
    return out


def starting_network(recipe: Recipe, classes: tuple[str, ...]) -> ResNet:
    """The network before training: weights, classes, and the preprocessing that the recipe changes."""
    torch.manual_seed(recipe.seed)
    if not recipe.arch:
        net = load(recipe.weights, num_classes=len(classes), head="new")
    else:
        net = create(recipe.arch, num_classes=len(classes))
        if recipe.weights:
            load_weights(net, recipe.weights, head="new")
    net.preprocess = adapted(net.preprocess, recipe)
    net.classes = classes
    return net


def adapted(record: Preprocess, recipe: Recipe) -> Preprocess:
    """The record at the recipe's size, crop and views."""
    crop = recipe.image_size or record.crop
    return replace(record, crop=crop, resize=round(crop / recipe.crop_part), views=recipe.views)


def ready_to_train(
    net: ResNet, data: DataSet, recipe: Recipe, here: Machine, precision: Precision, reporter: Reporter
) -> ResNet:
    """The network that gradient training starts from.

    A pretrained trunk gets the head that suits it frozen, so that the first steps do not spoil it (Kumar et al. 2022),
    and batch norm that was folded away comes back, with statistics of the new pictures.
    """
    if recipe.weights and recipe.head == "chosen":
        net, scores = fit_probe(net, data, recipe, here, precision, reporter)
        reporter.say(f"frozen trunk: validation {scores.accuracy:.1%}; from here on the other layers train too")
    if net.spec.norm != "none":
        return net
    loader = Loader(
        pictures=data.train, record=net.preprocess, batch_size=recipe.batch_size, train=True, seed=recipe.seed
    )
    steps = zip(range(MEASURED_BATCHES), loader.epoch(0), strict=False)
    return insert_batchnorm(net, (normalise(batch.images, net.preprocess) for _, batch in steps))


def fit_probe(
    net: ResNet, data: DataSet, recipe: Recipe, here: Machine, precision: Precision, reporter: Reporter
) -> tuple[ResNet, Tally]:
    """The network with a head chosen and trained on features computed once, and its validation scores."""
    probes = (LINEAR,) if recipe.head == "linear" else candidates(net.stages)
    taps = tuple(dict.fromkeys(tap for probe in probes for tap in probe.taps))
    everything = HeadSpec(taps=taps, pools=("avg", "max"))
    both = Pictures(
        paths=data.train.paths + data.val.paths, labels=data.train.labels + data.val.labels, classes=data.classes
    )
    reader = with_head(net, everything, 0)
    features = Features(
        values=extract(reader, both, here, precision, recipe.batch_size, reporter),
        labels=torch.tensor(both.labels),
        classes=data.classes,
        head=everything,
        widths={feature.name: feature.channels for feature in reader.plan.features},
    )
    train = features.at(range(len(data.train)))
    val = features.at(range(len(data.train), len(both)))
    probe = best_probe(train, probes, recipe, reporter)
    layers = fit_head(train, probe, recipe.seed)
    scores = Tally(data.classes)
    scores.add(apply_head(layers, val.read_by(probe.head)).mean(0), val.labels)
    chosen = with_head(net, probe.head, len(data.classes))
    linears = [module for module in chosen.fc.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for linear, (weight, bias) in zip(linears, layers, strict=True):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
    return chosen, scores


def best_probe(train: Features, probes: Sequence[Probe], recipe: Recipe, reporter: Reporter) -> Probe:
    """The candidate that cross-validation on the training part prefers; with one there is nothing to choose."""
    if len(probes) == 1:
        return probes[0]
    if min(torch.bincount(train.labels).tolist()) < 3:
        raise DataError("a class has fewer than 3 pictures to train on, too few to choose a head; use --head linear")
    choices: list[Choice] = choose(train, probes, seed=recipe.seed, progress=reporter.say)
    return choices[0].probe


def evaluate(
    run: Path | str,
    data: str = "",
    *,
    batch_size: int = 32,
    precision: Precision | None = None,
    device: str | None = None,
    reporter: Reporter | None = None,
) -> Tally:
    """Scores of a run: on the validation pictures of its own data, or on every picture of other data.

    Raises DataError when the data has classes that the network does not know.
    """
    reporter, here, folder = reporter or Reporter(), machine(device), Path(run)
    net = load(run)
    pictures = evaluation_pictures(folder, net.classes, data)
    reporter.say(f"{len(pictures)} pictures")
    loader = Loader(pictures=pictures, record=net.preprocess, batch_size=batch_size, train=False)
    tally = Tally(net.classes)
    for batch, logits in Inference(net, here, precision).run(loader):
        tally.add(logits, batch.labels)
        reporter.progress("evaluating", tally.seen, len(pictures))
    return tally


def evaluation_pictures(folder: Path, classes: tuple[str, ...], data: str) -> Pictures:
    """The pictures to evaluate, with labels in the order of the network's classes."""
    path = folder / RECIPE
    recipe = Recipe.from_file(path) if path.is_file() else None
    if recipe is not None and data in ("", recipe.data):
        found = open_data(recipe.data, val_fraction=recipe.val_fraction, seed=recipe.seed).val
    elif data:
        both = open_data(data)
        found = Pictures(
            paths=both.train.paths + both.val.paths, labels=both.train.labels + both.val.labels, classes=both.classes
        )
    else:
        raise RunError(f"{folder} does not say what it was trained on; name the pictures with --data")
    unknown = sorted(set(found.classes) - set(classes))
    if unknown:
        raise DataError(f"the network does not know the classes {unknown}; it knows {', '.join(classes) or 'none'}")
    places = [classes.index(name) for name in found.classes]
    return Pictures(paths=found.paths, labels=tuple(places[label] for label in found.labels), classes=classes)


def predict(
    run: Path | str,
    *pictures: Path | str,
    out: Path | str = "",
    top: int = 5,
    batch_size: int = 32,
    precision: Precision | None = None,
    device: str | None = None,
    reporter: Reporter | None = None,
) -> list[Prediction]:
    """The `top` classes of every picture (files and folders), in order; `out` names a CSV file to write them to.

    A picture that cannot be read has its reason in `error`, and the rest goes on.
    """
    reporter, here = reporter or Reporter(), machine(device)
    net = load(run)
    paths = list_pictures(*pictures)
    classes = net.classes or tuple(f"class {index}" for index in range(net.spec.num_classes))
    if not classes:
        raise RecipeError(f"{run} has no classifier, so it predicts no classes; train it first")
    loader = Loader(
        pictures=Pictures.unlabelled(paths), record=net.preprocess, batch_size=batch_size, train=False, on_error="skip"
    )
    found: dict[int, Prediction] = {}
    for batch, logits in Inference(net, here, precision).run(loader):
        values, places = logits.softmax(1).topk(min(top, len(classes)))
        for index, row, place in zip(batch.indices.tolist(), values.tolist(), places.tolist(), strict=True):
            names = tuple(classes[each] for each in place)
            found[index] = Prediction(path=paths[index], classes=names, probabilities=tuple(row))
        reporter.progress("predicting", len(found) + len(loader.unreadable), len(paths))
    rows = [
        found.get(index) or Prediction(path=path, error=loader.unreadable[path]) for index, path in enumerate(paths)
    ]
    if out:
        write_predictions(Path(out), rows, min(top, len(classes)))
    return rows


def write_predictions(path: Path, rows: Sequence[Prediction], top: int) -> None:
    """A CSV file of one row a picture: path, class_1, probability_1, …, error."""
    columns = [f"{name}_{rank}" for rank in range(1, top + 1) for name in ("class", "probability")]

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["path", *columns, "error"])
            for row in rows:
                pairs: list[Any] = [
                    value
                    for name, probability in zip(row.classes, row.probabilities, strict=True)
                    for value in (name, f"{probability:.6f}")
                ]
                table.writerow([row.path, *(pairs or [""] * len(columns)), row.error])

    atomic_write(path, write)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    atomic_write(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def environment(here: Machine, precision: Precision) -> dict[str, Any]:
    """Machine and versions, for the run folder."""
    return {"machine": records.to_dict(here), "precision": precision, "versions": versions()}
