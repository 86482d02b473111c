"""Many pictures to predictions: decoding and network side by side, in parts that are told as they are done."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from isthmus.arch.preprocess import Preprocess
from isthmus.data.loader import Batch, Loader
from isthmus.data.pictures import Pictures
from isthmus.data.transform import shows_grey_levels
from isthmus.deploy.answers import Answers, Wanted
from isthmus.deploy.predictor import EngineName, PrecisionName, Predictor
from isthmus.deploy.quantize import Quantised
from isthmus.errors import DataError, EngineError
from isthmus.evaluation.inference import Inference
from isthmus.nn.network import ResNet
from isthmus.runtime import keep_freed_memory, machine
from isthmus.weights.digest import network_digest

__all__ = ["FEW", "PART", "Low", "Order", "Pace", "Reader", "Tell", "answered"]

Low = PrecisionName | Literal["fp16"]
Tell = Callable[[int, int, Mapping[str, float]], object]
FEW = 1000  # pictures that are predicted sooner than all engines are timed
PART = 1024  # pictures, about: what is lost at most when a job is killed


def nobody(_done: int, _total: int, _facts: Mapping[str, float]) -> None:
    """Hears nothing."""


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
    waited: float | None = None
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
            self.waited = (self.waited or 0.0) + time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def __str__(self) -> str:
        seconds = self.seconds
        said = f"{self.pictures:,} pictures in {seconds:.1f} s, {self.pictures / seconds:.1f} a second"
        if self.waited is None:
            return said
        part = self.waited / seconds
        binds = "reading pictures binds" if part > 0.5 else "the network binds"
        return f"{said}; {binds}: the network waited {part:.0%} of the time"


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What is predicted: pictures, by a network in an engine, and what is told of each.

    A part has `size` pictures, whole batches of them: so that each batch has the same pictures, whoever predicts it.
    """

    net: ResNet
    pictures: Pictures
    wanted: Wanted
    batch_size: int
    size: int
    engine: EngineName = "auto"
    precision: Low = "auto"
    device: str | None = None
    int8: Quantised | None = None

    @property
    def parts(self) -> int:
        """How many there are."""
        return -(-len(self.pictures) // self.size)

    def places(self, part: int) -> range:
        """The pictures of a part."""
        return range(part * self.size, min((part + 1) * self.size, len(self.pictures)))

    def reader(self, say: Callable[[str], object] = lambda _: None) -> Reader:
        """What predicts: torch, for few pictures and on a GPU, else the fastest engine. Raises as `Predictor` does."""
        keep_freed_memory()
        here, engine, precision = machine(self.device), self.engine, self.precision
        on_cpu = here.torch_device.type == "cpu"
        if not on_cpu and (engine not in ("auto", "torch") or precision == "int8"):
            raise EngineError(f"on {here.device} torch predicts, in fp32, bf16 or fp16; for others add --device cpu")
        by_torch = not on_cpu or engine == "torch" or (engine == "auto" and len(self.pictures) < FEW)
        if precision != "int8" and by_torch:
            return Inference(self.net, here, None if precision == "auto" else precision)
        if precision == "fp16":
            raise EngineError("fp16 is for GPUs; on a CPU take fp32, bf16 or int8")
        say("preparing engines; which is the fastest is found out once for a network")
        made = Predictor(self.net, engine=engine, precision=precision, batch_size=self.batch_size, int8=self.int8)
        say(str(made.choice))
        return made

    def settled(self, reader: Reader) -> "Order":
        """The same by no other engine and kind of device than that of a reader, wherever it runs."""
        engine, precision, device = reader.kind
        return replace(self, engine=engine, precision=precision, device=device)  # type: ignore[arg-type]

    def about(self, reader: Reader) -> dict[str, Any]:
        """All that decides the rows, as JSON has it."""
        names = hashlib.sha256()
        for index in range(len(self.pictures)):
            names.update(self.pictures.name(index).encode(errors="surrogateescape") + b"\0")
        return {
            "network": network_digest(self.net),
            "pictures": names.hexdigest(),
            "told": [self.wanted.what, self.wanted.top, self.wanted.stage],
            "reader": list(reader.kind),
            "int8": hashlib.sha256(self.int8.onnx).hexdigest() if self.int8 else "",
            "batch_size": self.batch_size,
        }


def answered(
    order: Order, reader: Reader, parts: Sequence[int], pace: Pace, tell: Tell = nobody, *, threads: int = 0
) -> Iterator[Answers]:
    """The answers of the parts with these numbers, in their order; so many `threads` decode, or one a core.

    `tell` hears how many pictures of all are done, and the part of the time that was waited. Pictures that cannot be
    read have their reason. Memory stays the same however many there are.
    """
    if not parts:
        return
    chosen = order.pictures.subset(np.concatenate([order.places(part) for part in parts]))
    loader = Loader(
        pictures=chosen,
        record=reader.record,
        batch_size=order.batch_size,
        train=False,
        exact=shows_grey_levels(reader.kind[1]),
        threads=threads,
        on_error="skip",
    )
    found: list[Tensor] = []
    ends = np.cumsum([len(order.places(part)) for part in parts]).tolist()
    begin = done = 0

    def part() -> Answers:
        inside = range(begin, ends[done])
        errors = [loader.unreadable.pop(place, None) for place in inside]
        pace.pictures += len(inside)
        pace.unreadable += sum(error is not None for error in errors)
        outputs = torch.cat(found) if found else torch.empty(0, order.net.outputs)
        found.clear()
        return Answers(names=[chosen.name(place) for place in inside], errors=errors, outputs=outputs)

    try:
        for batch, outputs in reader.run(pace.of(loader.epoch(0))):
            while ends[done] <= batch.step * order.batch_size:
                yield part()
                begin, done = ends[done], done + 1
            found.append(outputs)
            ready = min((batch.step + 1) * order.batch_size, len(chosen))
            tell(ready, len(chosen), {"waited": (pace.waited or 0.0) / pace.seconds})
    except DataError:
        if len(loader.unreadable) < len(chosen):  # else all of them, which the rows tell
            raise
    while done < len(parts):
        yield part()
        begin, done = ends[done], done + 1
    tell(len(chosen), len(chosen), {})
