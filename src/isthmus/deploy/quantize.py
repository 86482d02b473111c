"""A network in 8 bits: calibrated on pictures, measured on others, and given only when it predicts as it did.

Weights have a scale for each output channel, maps one each, as nncf chooses them (Jacob et al. 2017); batch norm is
folded before. The layers whose rounding moves the logits most stay in higher precision, as many as it takes.
"""

import hashlib
import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus import records
from isthmus.atomic import atomic_write
from isthmus.cache import cache_folder, make_room
from isthmus.data.augment import views
from isthmus.data.loader import Loader
from isthmus.data.pictures import Pictures
from isthmus.data.transform import normalise
from isthmus.deploy import qdq
from isthmus.deploy.compare import FEW, logits, made_up, network_input
from isthmus.deploy.engines import ENGINES, Model, Run, Work, onnxruntime
from isthmus.deploy.program import input_size, needed, quiet
from isthmus.errors import DataError, PrecisionError, RunError, SpecError
from isthmus.messages import listed
from isthmus.nn.network import ResNet
from isthmus.runtime import machine, versions
from isthmus.weights.digest import network_digest

__all__ = ["CALIBRATION", "INT8_ENGINES", "Judged", "Limits", "Quantised", "judge", "quantized", "to_be_timed"]

CALIBRATION = 300  # pictures; nncf's own default
INT8_ENGINES = tuple(name for name, engine in ENGINES.items() if "int8" in engine.precisions)
RANKED = 16  # pictures that the layers are ranked on
LESS = 4  # each try leaves so much less of the rounding's power than the one before
TRIES = 4
BATCH = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a lower precision may cost on held-out pictures: accuracy (where they have labels), and other classes."""

    max_drop: float = 0.01
    min_agreement: float = 0.99


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """Predictions in a lower precision beside those in fp32, on the same held-out pictures.

    `agreement` is the share with the same class; `drop` how much accuracy is lost, with the 95 % interval of the
    paired difference, both absent without labels.
    """

    pictures: int
    agreement: float
    accuracy: float | None = None
    drop: float | None = None
    interval: tuple[float, float] | None = None

    def within(self, limits: Limits) -> bool:
        """Whether that is allowed."""
        return self.agreement >= limits.min_agreement and (self.drop or 0.0) <= limits.max_drop

    def __str__(self) -> str:
        said = f"{self.agreement:.2%} of {self.pictures} held-out pictures keep their class"
        if self.drop is None or self.accuracy is None or self.interval is None:
            return said
        low, high = self.interval
        return f"{said}, accuracy {self.accuracy:.2%}, {-self.drop:+.2%} (95 % interval {-high:+.2%} to {-low:+.2%})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """Held-out pictures and what the network says of them in fp32."""

    loader: Loader
    logits: Tensor
    labels: Tensor
    labelled: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantised:
    """An ONNX file in 8 bits for some engines, the layers in it that stay in higher precision, and how it predicts.

    `network` is the digest of what it was made from; `images` (N, C, *size) and their `logits` (N, classes) are what an
    engine is tried on. One that was never judged is there to be timed.
    """

    onnx: bytes
    engines: tuple[str, ...]
    network: str
    images: NDArray[np.float32]
    logits: NDArray[np.float32]
    higher: tuple[str, ...] = ()
    judged: Judged | None = None

    def __str__(self) -> str:
        kept = f"; in higher precision stay {listed(self.higher)}" if self.higher else ""
        return f"int8: {self.judged or 'not measured'}{kept}"


def quantized(
    model: Model,
    calibration: Pictures,
    held_out: Pictures,
    limits: Limits | None = None,
    *,
    engine: str = "openvino",
    say: Callable[[str], object] = lambda _: None,
) -> Quantised:
    """A network in 8 bits for an engine; `calibration` needs no labels, and `held_out` must be other pictures.

    What was made before of the same network and pictures comes from the cache. Raises PrecisionError with the figures
    and the layers at fault when the limits cannot be kept, DataError without pictures, MissingExtraError.
    """
    limits = limits or Limits()
    if engine not in INT8_ENGINES:
        raise SpecError(f"{engine} does not compute in int8 here; known: {', '.join(INT8_ENGINES)}")
    ENGINES[engine].check_installed()
    place = cache_folder("int8") / key(model.net, engine, calibration, held_out, limits)
    if kept := read(place):
        say(f"{kept}, as made before")
        return kept
    if model.net.spec.dims != 2 or model.net.spec.in_channels != len(model.net.preprocess.channels):
        raise SpecError("int8 is calibrated on pictures, and this network takes none: stay with bf16")
    if model.net.spec.num_classes < 2:
        raise SpecError("int8 is measured by the classes that it predicts, and this network tells none apart")
    allowed = 1 - limits.min_agreement  # of the pictures, so that one of them must be no more than that
    if allowed > 0 and 0 < len(held_out) < (least := math.ceil(round(1 / allowed, 6))):
        raise DataError(
            f"{len(held_out)} pictures cannot show that {limits.min_agreement:g} of all keep their class: give {least} "
            f"or more, or lower --min-agreement"
        )
    wanted = reference(model, held_out, say)
    images = list(samples(calibration, model.net, say))
    original = needed("onnx", "onnx").load_from_string(model.onnx)
    whole = calibrated(original, images)
    few, network = np.concatenate(images[:FEW]), network_digest(model.net)
    known = np.zeros((len(few), model.net.spec.num_classes), np.float32)
    names, higher, told, tried = qdq.layers(original, whole), list[str](), list[str](), list[Judged]()
    errors: dict[str, float] = {}
    for turn in range(TRIES):
        if turn == 1:
            say("looking for the layers that cost it")
            errors = ranked(original, whole, images[:RANKED])
        if errors:
            allowed = sum(errors.values()) / LESS**turn
            higher = worst(errors, allowed)
        file = bytes(qdq.mixed(original, whole, higher).SerializeToString()) if higher else whole.SerializeToString()
        low = Quantised(
            onnx=file,
            engines=(engine,),
            network=network,
            images=few,
            logits=known,
            higher=tuple(names[each] for each in higher),
        )
        run = ENGINES[engine].open(Model(model.net, low), "int8", Work())
        judged = judge(run, wanted)
        tried.append(judged)
        told.append(f"{judged}" + (f" with {len(higher)} of {len(names)} layers in higher precision" if higher else ""))
        say(f"int8: {told[-1]}")
        if judged.within(limits):
            low = replace(low, judged=judged, logits=run(few))
            write(place, low)
            return low
    fault = listed(f"{names[each]} ({errors[each] / sum(errors.values()):.0%})" for each in errors)
    raise PrecisionError(
        f"int8 changes more than --max-drop {limits.max_drop:g} and --min-agreement {limits.min_agreement:g} allow: "
        f"{'; '.join(told)}. Most of the error comes from {fault}. Calibrate on pictures like those that it will see, "
        f"allow more, or stay with bf16",
        tuple(tried),
    )


def key(net: ResNet, engine: str, calibration: Pictures, held_out: Pictures, limits: Limits) -> str:
    """What decides a network in 8 bits, as a name in the cache."""
    facts = [network_digest(net), engine, machine("cpu").name, versions(), records.to_dict(limits)]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for pictures in (calibration, held_out):
        rows = [(pictures.identity(place), label) for place, label in enumerate(pictures.labels.tolist())]
        digest.update(json.dumps(rows).encode())
    return digest.hexdigest()[:32]


def read(place: Path) -> Quantised | None:
    """What was kept; none where there is none, or none that can be read."""
    try:
        about = json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))
        file, tried = place.with_suffix(".onnx"), np.load(place.with_suffix(".npz"))
        for each in (file, place.with_suffix(".npz")):
            os.utime(each)  # used, so that it stays longer
        return Quantised(
            onnx=file.read_bytes(),
            network=about["network"],
            images=tried["images"],
            logits=tried["logits"],
            engines=tuple(about["engines"]),
            higher=tuple(about["higher"]),
            judged=records.from_dict(Judged, about["judged"]),
        )
    except (OSError, ValueError, KeyError, TypeError, SpecError):
        return None


def write(place: Path, made: Quantised) -> None:
    """Keep it where there is room; a cache that takes nothing is no reason to stop."""
    about = {
        "engines": made.engines,
        "network": made.network,
        "higher": made.higher,
        "judged": records.to_dict(made.judged),
    }
    tried = io.BytesIO()
    np.savez(tried, images=made.images, logits=made.logits)
    with suppress(RunError, OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        if make_room(len(made.onnx)):
            atomic_write(place.with_suffix(".onnx"), lambda temporary: temporary.write_bytes(made.onnx))
            atomic_write(place.with_suffix(".npz"), lambda temporary: temporary.write_bytes(tried.getvalue()))
            text = json.dumps(about)
            atomic_write(place.with_suffix(".json"), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def to_be_timed(model: Model) -> Quantised:
    """Calibrated on made-up pictures and never judged: as fast as the real one, and for nothing else."""
    images = network_input(model.net, input_size(model.net), made_up(model.net.preprocess))
    whole = calibrated(needed("onnx", "onnx").load_from_string(model.onnx), np.split(images.numpy(), FEW))
    return Quantised(
        onnx=whole.SerializeToString(),
        engines=INT8_ENGINES,
        network=network_digest(model.net),
        images=images.numpy(),
        logits=logits(model.reference, images).numpy(),
    )


def calibrated(original: Any, images: Sequence[NDArray[np.float32]]) -> Any:
    """The ONNX model with every layer in 8 bits that an engine has in 8 bits."""
    os.environ.setdefault("NNCF_CI", "1")  # nncf tells its makers of each use otherwise
    with redirect_stdout(io.StringIO()), quiet("torch.utils.cpp_extension"):  # bars; that there is no GPU
        nncf = needed("nncf", "int8")
        nncf.set_log_level(logging.ERROR)
        (entry,) = original.graph.input
        data = nncf.Dataset(images, lambda image: {entry.name: image})
        ranges = nncf.quantization.range_estimator.RangeEstimatorParametersSet.MINMAX
        return nncf.quantize(
            original,
            data,
            # Zero in its own place for maps that have both signs, and no clipping: both keep more classes as they were.
            preset=nncf.QuantizationPreset.MIXED,
            advanced_parameters=nncf.AdvancedQuantizationParameters(activations_range_estimator_params=ranges),
            subset_size=len(images),
        )


def ranked(original: Any, whole: Any, images: Sequence[NDArray[np.float32]]) -> dict[str, float]:
    """What each node's rounding alone adds to the power of the logits' error, the worst first.

    The errors of single layers nearly add up to that of all, so that leaving the worst out is worth its figure.
    """
    every = set(qdq.layers(original, whole))
    batch = np.concatenate(images)

    def logits(model: Any) -> NDArray[np.float64]:
        found = onnxruntime(model.SerializeToString())(batch).astype(np.float64)
        centred: NDArray[np.float64] = found - found.mean(1, keepdims=True)
        return centred  # what is added to all classes changes none of them

    def power(node: str) -> float:
        found = logits(qdq.mixed(original, whole, every - {node}))
        scale = (found * wanted).sum() / (wanted**2).sum()  # nor does what all logits are multiplied by
        return float(((found - scale * wanted) ** 2).sum())

    wanted = logits(original)
    return dict(sorted(((node, power(node)) for node in every), key=lambda item: -item[1]))


def worst(errors: dict[str, float], allowed: float) -> list[str]:
    """The fewest nodes without which the others' errors together are no more than `allowed`."""
    left, chosen = sum(errors.values()), []
    for name, error in errors.items():
        if left <= allowed:
            break
        chosen.append(name)
        left -= error
    return chosen


def reference(model: Model, held_out: Pictures, say: Callable[[str], object]) -> Reference:
    """What the network says of pictures in fp32; raises DataError without any."""
    loader = reader(held_out, model.net, "measure")
    logits, labels = predictions(ENGINES["torch"].open(model, "fp32", Work()), loader)
    tell_unreadable(loader, say)
    return Reference(loader=loader, logits=logits, labels=labels, labelled=bool(held_out.classes))


def predictions(run: Run, loader: Loader) -> tuple[Tensor, Tensor]:
    """Logits, averaged over the views of the loader's preprocessing, and labels of all pictures that can be read."""
    logits, labels, record = [], [], loader.record
    for batch in loader.epoch(0):
        seen = [run(normalise(view, record).numpy()) for view in views(batch.images, record.views)]
        logits.append(torch.from_numpy(np.mean(seen, axis=0)))
        labels.append(batch.labels)
    return torch.cat(logits), torch.cat(labels)


def judge(run: Run, wanted: Reference) -> Judged:
    """How an engine predicts beside fp32."""
    logits, labels = predictions(run, wanted.loader)
    found, known = logits.argmax(1), wanted.logits.argmax(1)
    agreement = float((found == known).double().mean())
    if not wanted.labelled:
        return Judged(pictures=len(found), agreement=agreement)
    lost = ((known == labels).double() - (found == labels).double()).numpy()
    drop, reach = float(lost.mean()), 1.96 * float(lost.std()) / len(lost) ** 0.5
    return Judged(
        pictures=len(found),
        agreement=agreement,
        accuracy=float((found == labels).double().mean()),
        drop=drop,
        interval=(drop - reach, drop + reach),
    )


def samples(pictures: Pictures, net: ResNet, say: Callable[[str], object]) -> Iterator[NDArray[np.float32]]:
    """CALIBRATION of the pictures at most, evenly spread, as the network takes them, one by one."""
    places = np.unique(np.linspace(0, len(pictures) - 1, min(CALIBRATION, len(pictures))).astype(int))
    loader = reader(pictures.subset(places), net, "calibrate")
    for batch in loader.epoch(0):
        yield from np.split(normalise(batch.images, net.preprocess).contiguous().numpy(), len(batch.images))
    tell_unreadable(loader, say)


def reader(pictures: Pictures, net: ResNet, purpose: str) -> Loader:
    """Pictures as the network takes them; raises DataError without any."""
    if not len(pictures):
        raise DataError(f"there are no pictures to {purpose} int8 on; give --data")
    return Loader(pictures=pictures, record=net.preprocess, batch_size=BATCH, train=False, on_error="skip")


def tell_unreadable(loader: Loader, say: Callable[[str], object]) -> None:
    """Say what was left out."""
    if loader.unreadable:
        names = listed(f"{loader.pictures.name(index)}: {reason}" for index, reason in loader.unreadable.items())
        say(f"{len(loader.unreadable)} pictures cannot be read and are left out: {names}")
