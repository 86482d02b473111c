"""Runs from data to a folder one can keep: what the Python names and the command line share."""

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from isthmus import records
from isthmus.arch.block import FOLDED
from isthmus.arch.plan import Plan
from isthmus.arch.preprocess import Preprocess
from isthmus.arch.spec import HeadSpec
from isthmus.data.loader import Loader
from isthmus.data.pictures import Pictures
from isthmus.data.sources import DataSet, open_data
from isthmus.data.transform import normalise
from isthmus.errors import DataError, RecipeError, RunError
from isthmus.evaluation.inference import Inference
from isthmus.evaluation.metrics import Tally
from isthmus.examine import diagnosis
from isthmus.messages import listed
from isthmus.nn.fold import insert_batchnorm
from isthmus.nn.freeze import freeze
from isthmus.nn.network import ResNet
from isthmus.report.write import LOOKED_AT, PAGE, reason, write_report
from isthmus.runtime import Machine, Precision, keep_freed_memory, machine, versions
from isthmus.train.distributed import World, joined
from isthmus.train.features import extract, with_head
from isthmus.train.folder import (
    ENVIRONMENT,
    MODEL,
    RECIPE,
    SCORES,
    START,
    check_folder,
    claimed,
    evaluation_pictures,
    finished,
    free_folder,
    holds_run,
    own_pictures,
    write_text,
)
from isthmus.train.log import Log
from isthmus.train.loop import LOG, Interrupted, left_out, train_network
from isthmus.train.probe import Choice, Features, Probe, choose, fit_head, probes_of
from isthmus.train.recipe import Recipe
from isthmus.train.reporter import Reporter
from isthmus.weights.load import create, load, load_weights
from isthmus.weights.save import save_weights

__all__ = ["Run", "evaluate", "fit"]

FOLDS = 3  # of the cross-validation that chooses a head
MEASURED_BATCHES = 8  # pictures × batches behind the statistics of a re-inserted batch norm


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A finished run: its folder, its scores on the validation pictures, and the seconds it took."""

    folder: Path
    scores: Tally
    seconds: float


def fit(
    recipe: Recipe,
    out: Path | str = "",
    *,
    data: DataSet | None = None,
    resume: bool = False,
    device: str | None = None,
    reporter: Reporter | None = None,
    report: bool = True,
) -> Run:
    """Train as `recipe` says and leave a run folder: recipe, log, checkpoints, model with metadata, scores, report.

    `out` defaults to the next free number under runs/. `data` takes the place of what `recipe.data` names. Under
    torchrun every process calls this, one of them writes, and a process that was started anew resumes. Raises RunError
    when `out` holds a run already (unless `resume`, which takes the run's own recipe), Interrupted (after saving) on
    Ctrl-C. Nothing is written before data, recipe and weights are known to be sound. Whatever fails in the `report`
    (`isthmus.report.write`) is told, and the run is whole without it; `resume` makes one that a finished run lacks.
    """
    keep_freed_memory()
    with joined(device) as world:
        return fit_in(world, recipe, out, data, reporter or Reporter(), resume=resume, report=report)


def fit_in(
    world: World,
    recipe: Recipe,
    out: Path | str,
    data: DataSet | None,
    reporter: Reporter,
    *,
    resume: bool,
    report: bool,
) -> Run:
    """`fit` as one of the processes of `world`."""
    began, here = time.perf_counter(), machine(world.device)
    if data is not None:  # so that a later `evaluate` does not take other pictures for these
        recipe = replace(recipe, data=data.name)
    if out:
        resume = resume or (world.restarted and holds_run(Path(out)))
        check_folder(Path(out), recipe, resume=resume)
    if resume and (scores := finished(Path(out))):
        reporter.say(f"{out} is finished; to train on, begin another run from it: --weights {out}")
        if world.main and report and not (Path(out) / PAGE).exists():  # it was stopped before that
            reported(Path(out), data, here, reporter)
        return Run(folder=Path(out), scores=scores, seconds=time.perf_counter() - began)
    data = data or open_data(recipe.data, val_fraction=recipe.val_fraction, seed=recipe.seed)
    net = starting_network(recipe, data.classes)
    check_sizes(recipe, net.preprocess, data, world)
    folder = Path(out) if out else free_folder(world)
    with claimed(folder, world, reporter):
        run = fit_there(world, recipe, folder, data, net, here, reporter, began, resume=resume)
    if world.main and report:
        reported(folder, data, here, reporter)
    return run


def fit_there(
    world: World,
    recipe: Recipe,
    folder: Path,
    data: DataSet,
    net: ResNet,
    here: Machine,
    reporter: Reporter,
    began: float,
    *,
    resume: bool,
) -> Run:
    """Train in the folder, which is this run's own, since the time `began`."""
    precision = recipe.precision_on(here)
    begins = not (resume and (folder / START).exists())
    world.barrier("the start")  # what one process makes would be there already to another
    if world.main:
        write_text(folder / RECIPE, recipe.to_toml())
        write_text(folder / ENVIRONMENT, json.dumps(environment(here, precision, world), indent=2))
    world.barrier("the folder of the run")
    if not holds_run(folder):
        raise RunError(f"{folder} is not to be seen from {platform.node()}; name an --out that all machines share")
    counts = listed((f"{count} {name}" for name, count in data.train.counts().items()), 10)
    reporter.say(f"{len(data.train)} pictures to train on ({counts}), {len(data.val)} to validate on")
    try:
        if recipe.freeze == "trunk":
            net, scores, choices = fit_probe(net, data, recipe, here, precision, reporter, world)
            if world.main:
                log = Log(folder / LOG)
                for row in probe_rows(net, scores, choices):
                    log.add(row)
        else:
            if begins:
                net = ready_to_train(net, data, recipe, here, precision, reporter, world)
                if world.main:
                    save_weights(net, folder / START)
            world.barrier("the network to start from")
            net = load(folder / START)
            if recipe.freeze not in ("none", "stem", *net.stages):  # the chosen head does not read so deep
                recipe = replace(recipe, freeze="trunk")
            net, scores = train_network(net, data, recipe, here, folder, reporter, world, resume=resume)
    except KeyboardInterrupt as stop:
        raise Interrupted(f"{str(stop) or 'stopped'}; go on with: isthmus train --resume {folder}") from stop
    seconds = time.perf_counter() - began
    if world.main:
        metrics = {"validation accuracy": scores.accuracy, "validation balanced accuracy": scores.balanced_accuracy}
        save_weights(net.cpu().eval(), folder / MODEL, extra={"metrics": metrics})
        write_text(folder / SCORES, json.dumps(scores.to_dict() | {"data": data.name, "seconds": seconds}, indent=2))
    return Run(folder=folder, scores=scores, seconds=seconds)


def reported(folder: Path, data: DataSet | None, here: Machine, reporter: Reporter) -> None:
    """Write the report of a finished run; whatever fails there, the run is whole, and the reason is told.

    Without `data` its recipe says where the pictures are.
    """
    try:
        val = None if data is None else data.val
        looked = partial(diagnosis, folder, "" if val is None else val, pictures=LOOKED_AT, device=here.device)
        reporter.say(f"report: {write_report(folder, val=val, diagnose=looked)}")
    except Exception as error:  # noqa: BLE001 - the run took hours
        reporter.say(f"the run is whole, but not its report: {reason(error)}; once mended: isthmus report {folder}")


def check_sizes(recipe: Recipe, record: Preprocess, data: DataSet, world: World) -> None:
    """Raise RecipeError or DataError for sizes that the loaders of a run would refuse once its folder is there."""
    if 0 < recipe.resized < (crop := recipe.train_size or record.crop):
        raise RecipeError(f"resized is {recipe.resized} and crops have {crop} px; a crop is no larger than its picture")
    Loader(
        pictures=data.train,
        record=record,
        batch_size=recipe.batch_size,
        train=recipe.freeze != "trunk",
        rank=world.rank,
        ranks=world.size,
    )


def starting_network(recipe: Recipe, classes: tuple[str, ...]) -> ResNet:
    """The network before training: weights, classes, and the preprocessing that the recipe changes."""
    torch.manual_seed(recipe.seed)
    if not recipe.arch:
        net = load(recipe.weights, num_classes=len(classes), head="new")
    else:
        net = create(recipe.arch, num_classes=len(classes))
        if recipe.weights:
            load_weights(net, recipe.weights, head="new")
    if recipe.drop_path:
        net = with_drop_path(net, recipe.drop_path)
    net.preprocess = adapted(net.preprocess, recipe)
    net.classes = classes
    freeze(net, recipe.freeze)  # here already, so that an unknown name is found before anything is written
    probes_of(recipe.head, net.stages)
    return net


def with_drop_path(net: ResNet, rate: float) -> ResNet:
    """The same network with stochastic depth, up to `rate` at the last block."""
    other = ResNet(Plan(replace(net.spec, drop_path=rate), net.plan.image_size))
    other.load_state_dict(net.state_dict())
    other.preprocess = net.preprocess
    return other


def adapted(record: Preprocess, recipe: Recipe) -> Preprocess:
    """The record at the recipe's size, crop, interpolation and views."""
    crop, interpolation = recipe.image_size or record.crop, recipe.interpolation or record.interpolation
    resize = round(crop / recipe.crop_part)
    return replace(record, crop=crop, resize=resize, interpolation=interpolation, views=recipe.views)


def ready_to_train(
    net: ResNet, data: DataSet, recipe: Recipe, here: Machine, precision: Precision, reporter: Reporter, world: World
) -> ResNet:
    """The network that gradient training starts from.

    A pretrained trunk gets the head that suits it frozen, so that the first steps do not spoil it (Kumar et al. 2022),
    and batch norm that was folded away comes back, with statistics of the new pictures.
    """
    if recipe.weights and recipe.head != "linear":
        net, scores, _ = fit_probe(net, data, recipe, here, precision, reporter, world)
        reporter.say(f"frozen trunk: validation {scores.accuracy:.1%}; from here on the other layers train too")
    if net.spec.norm not in FOLDED:
        return net
    loader = Loader(
        pictures=data.train,
        record=net.preprocess,
        batch_size=recipe.batch_size,
        train=True,
        seed=recipe.seed,
        on_error=recipe.unreadable,
    )
    steps = zip(range(MEASURED_BATCHES), loader.epoch(0), strict=False)
    return insert_batchnorm(net, (normalise(batch.images, net.preprocess) for _, batch in steps))


def fit_probe(
    net: ResNet, data: DataSet, recipe: Recipe, here: Machine, precision: Precision, reporter: Reporter, world: World
) -> tuple[ResNet, Tally, list[Choice]]:
    """The network with a head chosen and trained on features computed once, its validation scores, and the choices."""
    every, places = data.val, np.arange(len(data.val))
    if recipe.unreadable == "skip":
        data, places = readable(data, net.preprocess, world, reporter)
    probes = probes_of(recipe.head, net.stages)
    taps = tuple(dict.fromkeys(tap for probe in probes for tap in probe.taps))
    everything = HeadSpec(taps=taps, pools=("avg", "max"))
    both = data.train + data.val
    reader = with_head(net, everything, 0)
    features = Features(
        values=shared_features(reader, both, here, precision, reporter, world),
        labels=torch.tensor(both.labels),
        classes=data.classes,
        head=everything,
        widths={feature.name: feature.channels for feature in reader.plan.features},
    )
    train = features.at(range(len(data.train)))
    val = features.at(range(len(data.train), len(both)))
    choices = compared(train, probes, recipe, reporter)
    probe = choices[0].probe if choices else probes[0]
    head = fit_head(train, probe, recipe.seed)
    scores = Tally(data.classes, every.name)
    scores.add(head.logits(val.read_by(probe.head)).mean(0), val.labels, torch.from_numpy(places))
    chosen = with_head(net, probe.head, len(data.classes))
    if unread := net.stages[len(chosen.stages) :]:
        reporter.say(f"the head reads {' + '.join(probe.taps)}, so {' and '.join(unread)} is left out")
    head.fill(chosen.fc)
    return chosen, scores, choices


def readable(data: DataSet, record: Preprocess, world: World, reporter: Reporter) -> tuple[DataSet, NDArray[np.int64]]:
    """The pictures that can be read, and the places of those that validate among all of these.

    All are decoded to find out, each process its share.
    """

    def kept(part: str, pictures: Pictures) -> NDArray[np.int64]:
        loader = Loader(
            pictures=pictures,
            record=record,
            batch_size=32 * world.size,
            train=False,
            on_error="skip",
            rank=world.rank,
            ranks=world.size,
        )
        for _ in loader.epoch(0):
            pass
        gone = left_out(loader, part, world, reporter)
        return np.setdiff1d(np.arange(len(pictures)), np.array(sorted(gone), np.int64))

    train, val = kept("train", data.train), kept("validation", data.val)
    return replace(data, train=data.train.subset(train), val=data.val.subset(val)), val


def shared_features(
    net: ResNet,
    pictures: Pictures,
    here: Machine,
    precision: Precision,
    reporter: Reporter,
    world: World,
) -> torch.Tensor:
    """What `extract` gives, each process having computed its share."""
    mine = range(world.rank, len(pictures), world.size)
    values = extract(net, pictures.subset(mine), here, precision, reporter)
    whole = torch.zeros(len(values), len(pictures), values.shape[-1])
    whole[:, mine] = values
    return world.sum(whole)


def compared(train: Features, probes: Sequence[Probe], recipe: Recipe, reporter: Reporter) -> list[Choice]:
    """The candidates as cross-validation on the training part ranks them; none when there is nothing to choose."""
    if len(probes) == 1:
        return []
    counts = torch.bincount(train.labels).tolist()
    if min(counts) < FOLDS:
        raise DataError(
            f"the class {train.classes[counts.index(min(counts))]!r} has {min(counts)} pictures to train on, and "
            f"choosing a head needs {FOLDS}; give it more, or take --head linear"
        )
    return choose(train, probes, folds=FOLDS, seed=recipe.seed, progress=reporter.say)


def probe_rows(net: ResNet, scores: Tally, choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """The log of a probe: what cross-validation said of each candidate, then how the chosen one validates."""
    rows = [{"taps": list(each.probe.taps), "accuracy": each.accuracy, "loss": each.loss} for each in choices]
    chosen = {
        "taps": list(net.spec.head.taps),
        "val_accuracy": scores.accuracy,
        "val_balanced_accuracy": scores.balanced_accuracy,
        "val_loss": scores.loss,
    }
    return [*rows, chosen]


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
    net, own = load(run), own_pictures(folder, data)
    pictures = evaluation_pictures(folder, net.classes, data)
    kind = f"validation pictures of {own.data}" if own else f"pictures, all of {data}"
    reporter.say(f"{len(pictures)} {kind}")
    loader = Loader(
        pictures=pictures,
        record=net.preprocess,
        batch_size=batch_size,
        train=False,
        on_error=own.unreadable if own else "raise",
    )
    scores = Inference(net, here, precision).evaluate(loader, progress=partial(reporter.progress, "evaluate"))
    left_out(loader, "validation", World(), reporter)
    return scores


def environment(here: Machine, precision: Precision, world: World) -> dict[str, Any]:
    """Machine and versions, for the run folder."""
    return {
        "machine": records.to_dict(here),
        "processes": world.size,
        "precision": precision,
        "versions": versions(),
    }
