"""Trained networks in use: what the Python names and the command line share."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from isthmus.arch.spec import HeadSpec
from isthmus.data.decode import decode
from isthmus.data.pictures import Pictures
from isthmus.data.sources import open_data
from isthmus.data.unlabelled import open_unlabelled
from isthmus.deploy.answers import Wanted
from isthmus.deploy.cluster import spread
from isthmus.deploy.engines import Model
from isthmus.deploy.export import NOT_BOTH, Exported, export
from isthmus.deploy.formats import format_of
from isthmus.deploy.job import Job
from isthmus.deploy.predict import PART, Low, Order, Pace, answered
from isthmus.deploy.predictor import BATCH, EngineName, PrecisionName, Predictor
from isthmus.deploy.quantize import CALIBRATION, INT8_ENGINES, Limits, Quantised, quantized
from isthmus.deploy.serve import batcher, server
from isthmus.deploy.serve.engine import Engine
from isthmus.deploy.serve.guard import Bounds
from isthmus.errors import DataError, RecipeError, RunError, SpecError
from isthmus.nn.network import ResNet
from isthmus.train.features import with_head
from isthmus.train.folder import evaluation_pictures, holds_run, known, own_pictures
from isthmus.train.reporter import Reporter
from isthmus.weights.load import load

__all__ = ["Predicted", "Prediction", "export_run", "predict", "predict_table", "quantize", "serve"]

COMPARED = 20  # pictures on which an exported file is compared with its network
MEASURED = 500  # unlabelled pictures on which int8 is measured
TOLD = 20  # unreadable pictures that are named


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One picture: its best classes with their probabilities, or why it could not be read."""

    path: Path
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """A written table: its pictures; and of those predicted now their number, the speed and what was unreadable."""

    path: Path
    pictures: int
    predicted: int
    unreadable: int
    reasons: tuple[str, ...]
    seconds: float
    rate: float


def predict(
    run: Path | str,
    *pictures: Path | str,
    top: int = 5,
    batch_size: int = BATCH,
    engine: EngineName = "auto",
    precision: Low = "auto",
    device: str | None = None,
    reporter: Reporter | None = None,
) -> list[Prediction]:
    """The `top` classes of every picture, in order; `pictures` are named as `open_unlabelled` says.

    A picture that cannot be read has its reason in `error`, and the rest goes on; DataError where none can be read.
    For more pictures than memory holds rows of: `predict_table`.
    """
    reporter = reporter or Reporter()
    order = order_of(run, pictures, Wanted(top=top), batch_size, engine, precision, device, reporter.say)
    rows: list[Prediction] = []
    tell = partial(reporter.progress, "predicting")
    for answers in answered(order, order.reader(reporter.say), range(order.parts), Pace(), tell):
        best = iter(order.wanted.best(answers.outputs))
        for name, error in zip(answers.names, answers.errors, strict=True):
            found = next(best) if error is None else {}
            classes, values = tuple(found), tuple(found.values())
            rows.append(Prediction(path=Path(name), classes=classes, probabilities=values, error=error or ""))
    if all(row.error for row in rows):
        raise DataError(f"none of {len(rows)} pictures can be read; the first: {rows[0].error}")
    return rows


def predict_table(
    run: Path | str,
    *pictures: Path | str,
    out: Path | str,
    top: int = 5,
    probabilities: bool = False,
    features: str = "",
    batch_size: int = BATCH,
    engine: EngineName = "auto",
    precision: Low = "auto",
    device: str | None = None,
    cluster: str = "",
    workers: int = 0,
    reporter: Reporter | None = None,
) -> Predicted:
    """Write a .csv or .parquet table with a row a picture: its `top` classes, all probabilities, or pooled `features`.

    Features are those of a stage, such as "layer4". However many pictures there are, memory stays the same. Parts of
    the table are kept beside it until it is whole, so that the same call goes on where another was ended. With
    `cluster` the machines of a Ray cluster predict them (see `spread`), and the rows are the same.
    Raises RunError for parts of another job.
    """
    if probabilities and features:
        raise RecipeError("features and the probabilities of all classes are two tables: ask for one of them")
    if workers < 0 or (workers and not cluster):
        raise RecipeError(f"workers is {workers}; give 1 or more to a cluster, or leave it out")
    reporter, job = reporter or Reporter(), Job(Path(out))
    wanted = Wanted(top=top, what="probabilities" if probabilities else "top", stage=features)
    with job.claimed(reporter.say):
        if begun := job.kept.get("reader"):  # rows of one table come from one engine
            engine = begun[0] if engine == "auto" else engine
            precision = begun[1] if precision == "auto" else precision
        order = order_of(run, pictures, wanted, batch_size, engine, precision, device, reporter.say)
        reader = order.reader(reporter.say)
        order = order.settled(reader)
        job.begin(order.about(reader), order.parts)
        missing = job.missing()
        if len(missing) < job.parts:
            reporter.say(f"{job.parts - len(missing)} of {job.parts} parts are done already")
        pace, reasons = Pace(), list[str]()
        tell = partial(reporter.progress, "predicting")
        if cluster:
            made = spread(order, missing, job.file.encode, cluster, workers, pace, tell)
        else:
            every = answered(order, reader, missing, pace, tell)
            tables = ((answers, job.file.encode(order.wanted.table(answers))) for answers in every)
            made = ((part, table, answers.reasons) for part, (answers, table) in zip(missing, tables, strict=True))
        for part, table, bad in made:
            job.keep(part, table)
            reasons += bad[: TOLD - len(reasons)]
        if missing:
            reporter.say(str(pace))
        job.finish()
    return Predicted(
        path=job.out,
        pictures=len(order.pictures),
        predicted=pace.pictures,
        unreadable=pace.unreadable,
        reasons=tuple(reasons),
        seconds=pace.seconds,
        rate=pace.pictures / pace.seconds,
    )


def order_of(
    run: Path | str,
    refs: Sequence[Path | str],
    wanted: Wanted,
    batch_size: int,
    engine: EngineName,
    precision: Low,
    device: str | None,
    say: Callable[[str], object],
) -> Order:
    """What the arguments of a prediction ask for; raises RecipeError for what cannot be told."""
    if wanted.top < 1:
        raise RecipeError(f"top is {wanted.top}; it must be 1 or more")
    if batch_size < 1:
        raise RecipeError(f"batch size is {batch_size}; it must be 1 or more")
    net, stage = load(run).eval(), wanted.stage
    if stage:
        if precision == "int8":
            raise RecipeError("int8 is measured by the classes that it predicts: take features in bf16 or fp32")
        if stage not in net.stages:
            raise RecipeError(f"there is no stage {stage!r} to take features of; known: {', '.join(net.stages)}")
        net = with_head(net, HeadSpec(taps=(stage,)), 0)
    classes = classes_of(net)
    if not (classes or stage):
        raise RecipeError(f"{run} has no classifier, so it predicts no classes: ask for features, or train it first")
    pictures, int8 = open_unlabelled(*refs), None
    if precision == "int8":
        engine = "openvino" if engine == "auto" else engine
        few = np.unique(np.linspace(0, len(pictures) - 1, 2 * MEASURED).astype(int))
        at_hand = None if own_pictures(Path(run), "") else pictures.subset(few)
        int8 = int8_of(net, Path(run), "", at_hand, engine, Limits(), say)
    return Order(
        net=net,
        pictures=pictures,
        wanted=replace(wanted, classes=classes),
        batch_size=batch_size,
        size=batch_size * max(1, PART // batch_size),
        engine=engine,
        precision=precision,
        device=device,
        int8=int8,
    )


def classes_of(net: ResNet) -> tuple[str, ...]:
    """The names of its classes, with their numbers where several share one; without names the numbers alone."""
    shared = {name for name, count in Counter(net.classes).items() if count > 1}
    named = tuple(f"{name} ({index})" if name in shared else name for index, name in enumerate(net.classes))
    return named or tuple(f"class {index}" for index in range(net.spec.num_classes))


def quantize(
    run: Path | str,
    data: str = "",
    *,
    engine: str = "openvino",
    limits: Limits | None = None,
    pictures: Sequence[Path | str] = (),
    reporter: Reporter | None = None,
) -> Quantised:
    """The network of a run in 8 bits for an engine, calibrated on its training pictures and measured on the others.

    `data` names other labelled pictures, as for training; `pictures`, named as `open_unlabelled` says, have no labels,
    so that agreement alone is measured, on every second of them. Raises as `quantized` does.
    """
    net, unlabelled = load(run).eval(), open_unlabelled(*pictures) if pictures else None
    return int8_of(net, Path(run), data, unlabelled, engine, limits or Limits(), (reporter or Reporter()).say)


def int8_of(
    net: ResNet,
    folder: Path,
    data: str,
    unlabelled: Pictures | None,
    engine: str,
    limits: Limits,
    say: Callable[[str], object],
) -> Quantised:
    """The network of a run folder in 8 bits, made with unlabelled pictures if there are some, else with its data."""
    if unlabelled:
        calibration, held_out = (unlabelled.subset(range(start, len(unlabelled), 2)) for start in (0, 1))
    else:
        recipe = own_pictures(folder, data)
        if not (recipe or data):
            raise RunError(
                f"int8 is calibrated and measured on pictures, and {folder} names none; give --data or --pictures"
            )
        both = open_data(recipe.data, val_fraction=recipe.val_fraction, seed=recipe.seed) if recipe else open_data(data)
        calibration, held_out = both.train, known(both.val, net.classes)
    say(f"int8: calibrating on {min(len(calibration), CALIBRATION)} pictures, measuring on {len(held_out)}")
    return quantized(Model(net), calibration, held_out, limits, engine=engine, say=say)


def export_run(
    run: Path | str,
    out: Path | str,
    *,
    preprocessing: bool = False,
    precision: Literal["fp32", "int8"] = "fp32",
    data: str = "",
    limits: Limits | None = None,
    pictures: Sequence[Path | str] = (),
    reporter: Reporter | None = None,
) -> Exported:
    """Export the network of a run, compared on pictures (files and folders), else on the run's validation pictures.

    Int8 is made as `quantize` makes it. Raises as `export` and `quantize` do, and DataError for pictures that cannot
    be read.
    """
    net, folder, int8 = load(run).eval(), Path(run), None
    if precision == "int8":
        if preprocessing:
            raise SpecError(NOT_BOTH)
        kind = format_of(Path(out))
        if kind.engine not in INT8_ENGINES:
            raise SpecError(f"{kind.title} has no int8 here: write .onnx or .xml")
        int8 = quantize(run, data, engine=kind.engine, limits=limits, pictures=pictures, reporter=reporter)
    if pictures:
        found: Pictures | None = open_unlabelled(*pictures)
    else:
        found = evaluation_pictures(folder, net.classes, "") if holds_run(folder) else None
    places = np.linspace(0, len(found) - 1, min(COMPARED, len(found))).astype(int) if found else ()
    channels = net.preprocess.channels
    pixels = [decode(found.read(place), channels, found.name(place)) for place in places] if found else []
    return export(net, out, preprocessing=preprocessing, int8=int8, pictures=pixels)


def serve(
    run: Path | str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    top: int = 5,
    engine: EngineName = "auto",
    precision: PrecisionName = "auto",
    bounds: Bounds | None = None,
    reporter: Reporter | None = None,
) -> None:
    """Tell over HTTP the `top` classes of pictures, until a signal comes.

    Raises RunError where the port is taken, and for int8 of a network that names no pictures of its own; EngineError.
    """
    if top < 1:
        raise RecipeError(f"top is {top}; it must be 1 or more")
    reporter, net, int8 = reporter or Reporter(), load(run).eval(), None
    if not (classes := classes_of(net)):
        raise RecipeError(f"{run} has no classifier, so it predicts no classes: train it first")
    if precision == "int8":
        if not own_pictures(Path(run), ""):
            raise RunError(f"int8 is calibrated on the pictures of a run, and {run} names none: take bf16 or fp32")
        engine = "openvino" if engine == "auto" else engine
        int8 = int8_of(net, Path(run), "", None, engine, Limits(), reporter.say)
    process = Engine(
        partial(Predictor, net, engine=engine, precision=precision, hint="latency", batch_size=batcher.BATCH, int8=int8)
    )
    record = net.preprocess
    del net, int8  # the engine has what it needs
    wanted, bounds = Wanted(classes=classes, top=top), bounds or Bounds()
    server.serve(process, record, wanted, host=host, port=port, bounds=bounds, say=reporter.say)
