"""Many pictures to predictions: decoding and network side by side, in parts that are told as they are done."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from isthmus.arch.preprocess import Preprocess
from isthmus.data.loader import Batch, Loader
from isthmus.data.pictures import Pictures
from isthmus.deploy.answers import Answers
from isthmus.deploy.predictor import EngineName, PrecisionName, Predictor
from isthmus.deploy.quantize import Quantised
from isthmus.errors import DataError, EngineError
from isthmus.evaluation.inference import Inference
from isthmus.nn.network import ResNet
from isthmus.runtime import Machine

__all__ = ["FEW", "Pace", "Reader", "answered", "names_digest", "part_size", "reader_of"]

FEW = 1000  # pictures that are predicted sooner than all engines are timed
PART = 1024  # pictures, about: what is lost at most when a job is killed


class Reader(Protocol):
    """What predicts batches: a `Predictor`, or `Inference`, which runs torch on any device."""

    record: Preprocess
    kind: tuple[str, str, str]
    """Engine, precision and device."""

    def run(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Batches of uint8 images, each with its logits, averaged over the views of a prediction."""


@dataclass(slots=True)
class Pace:
    """How long a job took, and how much of it the network waited for pictures."""

    pictures: int = 0
    unreadable: int = 0
    waited: float = 0.0
    begun: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self.begun

    def of(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; the time until each comes counts as waiting."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def __str__(self) -> str:
        part = self.waited / (seconds := self.seconds)
        binds = "reading pictures binds" if part > 0.5 else "the network binds"
        rate = self.pictures / seconds
        return f"{self.pictures:,} pictures in {seconds:.1f} s, {rate:.1f} a second; {binds}: it waited {part:.0%}"


def reader_of(
    net: ResNet,
    count: int,
    here: Machine,
    *,
    engine: EngineName = "auto",
    precision: PrecisionName | Literal["fp16"] = "auto",
    batch_size: int,
    int8: Quantised | None = None,
) -> Reader:
    """What predicts so many pictures on a machine: torch for few of them and on a GPU, else the fastest engine."""
    on_cpu = here.torch_device.type == "cpu"
    if not on_cpu and (engine not in ("auto", "torch") or precision == "int8"):
        raise EngineError(f"on {here.device} torch predicts, in fp32, bf16 or fp16; add --device cpu for other engines")
    by_torch = not on_cpu or engine == "torch" or (engine == "auto" and count < FEW)
    if precision != "int8" and by_torch:
        return Inference(net, here, None if precision == "auto" else precision)
    if precision == "fp16":
        raise EngineError("fp16 is for GPUs; on a CPU take fp32, bf16 or int8")
    return Predictor(net, engine=engine, precision=precision, batch_size=batch_size, int8=int8)


def part_size(batch_size: int) -> int:
    """Pictures of a part, whole batches of them: so that each batch has the same pictures, whoever predicts it."""
    return batch_size * max(1, PART // batch_size)


def names_digest(pictures: Pictures) -> str:
    """A hash of the pictures' names, in their order."""
    digest = hashlib.sha256()
    for index in range(len(pictures)):
        digest.update(pictures.name(index).encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()


def answered(
    reader: Reader,
    pictures: Pictures,
    parts: Sequence[int],
    outputs: int,
    *,
    batch_size: int,
    pace: Pace,
    tell: Callable[[int, int, Mapping[str, float]], object] = lambda *_: None,
) -> Iterator[tuple[int, Answers]]:
    """The answers of the parts with these numbers, in their order; `outputs` is how many there are of a picture.

    `tell` hears how many pictures of all are done, and the part of the time that was waited. Pictures that cannot be
    read have their reason. Memory stays the same however many there are.
    """
    size = part_size(batch_size)
    if not parts:
        return
    places = np.concatenate([np.arange(each * size, min((each + 1) * size, len(pictures))) for each in parts])
    chosen = pictures.subset(places)
    loader = Loader(pictures=chosen, record=reader.record, batch_size=batch_size, train=False, on_error="skip")
    found: list[Tensor] = []
    done = 0

    def part() -> Answers:
        inside = range(done * size, min((done + 1) * size, len(chosen)))
        errors = [loader.unreadable.pop(place, None) for place in inside]
        pace.pictures += len(inside)
        pace.unreadable += sum(error is not None for error in errors)
        values = torch.cat(found) if found else torch.empty(0, outputs)
        found.clear()
        return Answers(names=[chosen.name(place) for place in inside], errors=errors, outputs=values)

    try:
        for batch, logits in reader.run(pace.of(loader.epoch(0))):
            while done < batch.step * batch_size // size:
                yield parts[done], part()
                done += 1
            found.append(logits)
            tell(min((batch.step + 1) * batch_size, len(chosen)), len(chosen), {"waited": pace.waited / pace.seconds})
    except DataError:
        if len(loader.unreadable) < len(chosen):  # else all of them, which the rows tell
            raise
    while done < len(parts):
        yield parts[done], part()
        done += 1
    tell(len(chosen), len(chosen), {})
