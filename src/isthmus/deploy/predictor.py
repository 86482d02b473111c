"""One way to run a network on this machine's CPU, by whatever engine does it best."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice, repeat
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus import records
from isthmus.atomic import atomic_write
from isthmus.cache import cache_folder
from isthmus.data.augment import views
from isthmus.data.loader import Batch
from isthmus.data.transform import normalise
from isthmus.deploy.compare import logits, made_up, network_input, relative
from isthmus.deploy.engines import CPU, ENGINES, PRECISIONS, EnginePrecision, Model, OpenVINO, Run, Work, native_bf16
from isthmus.deploy.pace import rates
from isthmus.deploy.program import input_size, quiet
from isthmus.deploy.quantize import Quantised
from isthmus.errors import EngineError, MissingExtraError, PrecisionError, RunError, SpecError
from isthmus.messages import first_line
from isthmus.nn.network import ResNet
from isthmus.runtime import machine, versions
from isthmus.weights.load import load

__all__ = ["BATCH", "HINTS", "Choice", "EngineName", "Hint", "PrecisionName", "Predictor", "Timed", "choose"]

Hint = Literal["latency", "throughput"]
HINTS: tuple[Hint, ...] = ("latency", "throughput")
EngineName = Literal["auto", "torch", "inductor", "onnxruntime", "openvino"]
PrecisionName = Literal["auto", "fp32", "bf16", "int8"]
BATCH = 16
MOST_JOBS = 8  # batches at once; more of them take memory and gain nothing
ENOUGH = 2  # batches for each job in a measurement
# How far logits may be from the network's own, in parts of the largest; of int8 from those that it gave when it was
# judged. Where it never was, only nonsense is caught.
CLOSE: Mapping[EnginePrecision, float] = {"fp32": 1e-4, "bf16": 0.05, "int8": 0.1}
NONSENSE = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """An engine in a precision: pictures a second, or the reason why it is out."""

    engine: str
    precision: EnginePrecision
    rate: float = 0.0
    refused: str = ""

    def __str__(self) -> str:
        title = f"{ENGINES[self.engine].title} {self.precision}"
        return f"{title}: {self.refused}" if self.refused else f"{title} {self.rate:.1f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What a predictor runs, and what it was chosen from: `rows` begins with the fastest, and ends with those out."""

    hint: Hint
    batch_size: int
    rows: tuple[Timed, ...]

    def __str__(self) -> str:
        best, *others = self.rows
        beside = f", the fastest of {'; '.join(map(str, self.rows))}" if others else ""
        chosen = f"{ENGINES[best.engine].title} in {best.precision}"
        return f"{chosen}: {best.rate:.1f} pictures/s, {self.batch_size} at once, for {self.hint}{beside}"


class WrongNumbersError(EngineError):
    """An engine computes something else than the network."""


class Opened:
    """An engine that has a network open, for as many calls at once as it was opened for."""

    def __init__(self, run: Run, jobs: int) -> None:
        self.run, self.jobs = run, jobs
        self.pool = ThreadPoolExecutor(jobs) if jobs > 1 and not isinstance(run, OpenVINO) else None

    def one(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of a batch, shared by all jobs."""
        jobs = min(self.jobs, len(images))
        return np.concatenate(list(self.many(np.array_split(images, jobs)))) if jobs > 1 else self.run(images)

    def many(self, batches: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        """Logits of batches, in their order, a job each."""
        if self.jobs == 1:
            yield from map(self.run, batches)
        elif isinstance(self.run, OpenVINO):  # it has threads of its own, and needs none that wait for them
            yield from self.run.many(batches)
        elif self.pool:
            yield from self.pooled(self.pool, batches)

    def pooled(self, pool: Executor, batches: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        """By threads; as many batches again as are in work wait."""
        waiting: deque[Future[NDArray[np.float32]]] = deque()
        for batch in batches:
            if len(waiting) == 2 * self.jobs:
                yield waiting.popleft().result()
            waiting.append(pool.submit(self.run, batch))
        while waiting:
            yield waiting.popleft().result()


class Predictor:
    """Logits of a network by the engine that is the fastest here of those that compute what the network does.

    `run` is a network in evaluation, a run folder or a weight file. Engines are tried and timed once for a network,
    `batch_size` and `hint` (one batch as soon as possible, or many at once), which is kept in the cache; `choice` tells
    of it. With precision "auto" bf16 counts where the CPU has it, and `int8` where it is given, as `quantize` made it.
    Raises SpecError for a network in training mode, EngineError when no engine gives the right numbers, PrecisionError
    for an int8 that saves no time, MissingExtraError for an engine that is asked for and not installed.
    """

    def __init__(
        self,
        run: ResNet | Path | str,
        *,
        engine: EngineName = "auto",
        precision: PrecisionName = "auto",
        hint: Hint = "throughput",
        batch_size: int = BATCH,
        int8: Quantised | None = None,
    ) -> None:
        model = Model(run if isinstance(run, ResNet) else load(run).eval(), int8)
        self.net, self.record, self.batch_size = model.net, model.net.preprocess, batch_size
        self.choice, self.opened = choose(model, engine=engine, precision=precision, hint=hint, batch_size=batch_size)
        best = self.choice.rows[0]
        self.kind: tuple[str, str, str] = best.engine, best.precision, CPU.type

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of normalised float32 images (N, C, *size), of any number and size."""
        batch = array(images, self.net)
        return torch.from_numpy(self.opened.one(batch)) if len(batch) else torch.empty(0, self.net.outputs)

    def stream(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Logits of batches in their order; several are in work at once where throughput is asked for."""
        return map(torch.from_numpy, self.opened.many(array(batch, self.net) for batch in batches))

    def logits(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of uint8 images (N, C, H, W), averaged over the record's views; of any number.

        An engine that compiles for every number is asked for one or for whole batches.
        """
        count = len(images)
        gap = -count % self.batch_size if count > 1 and ENGINES[self.kind[0]].compiles else 0
        whole = torch.cat([images, images.new_zeros(gap, *images.shape[1:])]) if gap else images
        every = [self(normalise(view, self.record)) for view in views(whole, self.record.views)]
        return torch.stack(every).mean(0)[:count]

    def run(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Batches of uint8 images as loaders give them, each with its logits, averaged over the record's views.

        Smaller batches are filled up: for another size an engine would compile the network once more, and may round
        in another way.
        """
        busy: deque[Batch] = deque()

        def images() -> Iterator[NDArray[np.float32]]:
            for batch in batches:
                busy.append(batch)
                for view in views(batch.images, self.record.views):
                    whole = torch.empty(self.batch_size, *view.shape[1:])  # zeros would cost more than normalising
                    normalise(view, self.record, whole[: len(view)])
                    whole[len(view) :] = 0
                    yield whole.numpy()

        found = self.opened.many(images())
        for first in found:
            every = [first, *islice(found, len(self.record.views) - 1)]
            batch = busy.popleft()
            yield batch, torch.from_numpy(np.mean(every, axis=0)[: len(batch.images)])


def array(images: Tensor, net: ResNet) -> NDArray[np.float32]:
    """Images as engines take them; raises EngineError for what is no batch of a network's normalised images."""
    if not isinstance(images, Tensor):
        raise EngineError(f"images are {type(images).__name__}; give a torch.Tensor")
    if not images.is_floating_point():
        raise EngineError(f"images are {images.dtype}; normalise them first, as the network's preprocessing says")
    wanted = ("N", net.spec.in_channels, *("height", "width", "depth")[: net.spec.dims])
    if images.ndim != len(wanted) or images.shape[1] != net.spec.in_channels:
        raise EngineError(f"images are {tuple(images.shape)}; they must be ({', '.join(map(str, wanted))})")
    found: NDArray[np.float32] = images.detach().float().cpu().numpy()
    return found


def choose(
    model: Model,
    *,
    engine: EngineName = "auto",
    precision: PrecisionName = "auto",
    hint: Hint = "throughput",
    batch_size: int = BATCH,
    again: bool = False,
) -> tuple[Choice, Opened]:
    """The engine to run a network in, open, and what it was chosen from: from the cache, unless `again`."""
    pairs = wanted(model, engine, precision)
    if batch_size < 1:
        raise EngineError(f"batch_size is {batch_size}; it must be 1 or more")
    place = cache_folder("engines") / f"{key(model, pairs, hint, batch_size)}.json"
    images, known = sample(model, batch_size)
    work = replace(shared_work(hint), shape=images.shape)

    def tried(name: str, precision: EnginePrecision) -> Opened:
        if precision == "int8" and model.int8:
            places = [place % len(model.int8.images) for place in range(batch_size)]
            of_int8 = model.int8.images[places], torch.from_numpy(model.int8.logits[places])
            close = CLOSE[precision] if model.int8.judged else NONSENSE
            return opened(model, name, precision, work, *of_int8, close)
        return opened(model, name, precision, work, images, known, CLOSE[precision])

    if not again and (kept := read(place)):
        with suppress(EngineError, MissingExtraError):  # not what it was: chosen anew
            return kept, tried(kept.rows[0].engine, kept.rows[0].precision)
    open_now: dict[tuple[str, EnginePrecision], Opened] = {}
    refused: list[Timed] = []
    wrong = False
    for pair in pairs:
        try:
            open_now[pair] = tried(*pair)
        except MissingExtraError:
            if engine != "auto":
                raise
            refused.append(Timed(engine=pair[0], precision=pair[1], refused="not installed"))
        except EngineError as error:
            refused.append(Timed(engine=pair[0], precision=pair[1], refused=str(error)))
            wrong |= isinstance(error, WrongNumbersError)
    if not open_now:
        raise EngineError(f"no engine can run this network here: {'; '.join(map(str, refused))}")
    found = measured(open_now, images)
    rows = [Timed(engine=name, precision=low, rate=rate) for (name, low), rate in found.items()]
    rows.sort(key=lambda row: -row.rate)
    if precision == "int8" and rows[0].precision != "int8":
        timed = any(row.precision == "int8" for row in rows)
        reason = "saves no time here" if timed else "cannot be used here"
        raise PrecisionError(f"int8 {reason} ({'; '.join(map(str, [*rows, *refused]))}): use {rows[0].precision}")
    choice = Choice(hint=hint, batch_size=batch_size, rows=(*rows, *refused))
    if not wrong:  # that depends on the weights, and what is kept is for all networks of this shape
        write(place, choice)
        if (
            precision == "auto" and model.int8 and not model.int8.judged
        ):  # timed for a table: what a predictor without int8 asks for, too
            plain = Model(model.net)
            place = cache_folder("engines") / f"{key(plain, wanted(plain, engine, precision), hint, batch_size)}.json"
            write(place, replace(choice, rows=tuple(row for row in choice.rows if row.precision != "int8")))
    return choice, open_now[rows[0].engine, rows[0].precision]


def wanted(model: Model, engine: EngineName, precision: PrecisionName) -> list[tuple[str, EnginePrecision]]:
    """The engines and precisions to try; for int8 the others too, which it must beat. Raises EngineError for none."""
    for what, found, known in (("engine", engine, ENGINES), ("precision", precision, PRECISIONS)):
        if found not in ("auto", *known):
            raise EngineError(f"there is no {what} {found!r}; known: auto, {', '.join(known)}")
    if precision == "int8" and model.int8 is None:
        raise EngineError("int8 needs pictures to be calibrated and measured on: make it by quantize() first")
    names = list(ENGINES) if engine == "auto" else [engine]
    low: tuple[EnginePrecision, ...] = (precision,) if precision in ("fp32", "bf16") else PRECISIONS
    pairs = [
        (name, each)
        for name in names
        for each in low
        if each in ENGINES[name].precisions
        and (each != "bf16" or native_bf16())
        and (each != "int8" or (model.int8 is not None and name in model.int8.engines))
    ]
    if not pairs:
        bf16 = "" if precision != "bf16" or native_bf16() else "; this CPU does not multiply bf16 itself"
        raise EngineError(f"{engine} does not compute in {precision} here{bf16}: try auto")
    return pairs


def shared_work(hint: Hint) -> Work:
    """One call with all of torch's threads, or as many calls at once as pay."""
    every = torch.get_num_threads()
    threads = -(-every // MOST_JOBS) if hint == "throughput" else every
    return Work(threads=threads, jobs=every // threads)


def sample(model: Model, count: int) -> tuple[NDArray[np.float32], Tensor]:
    """Images to try an engine on, and what the network itself says of them, in fp32."""
    few = network_input(model.reference, input_size(model.net), made_up(model.net.preprocess))
    known = logits(model.reference, few)
    places = [place % len(few) for place in range(count)]
    return few[places].numpy(), known[places]


def opened(
    model: Model,
    name: str,
    precision: EnginePrecision,
    work: Work,
    images: NDArray[np.float32],
    known: Tensor,
    close: float,
) -> Opened:
    """An engine that gives the right numbers; raises EngineError with the reason for one that does not."""
    engine = ENGINES[name]
    engine.check_installed()
    jobs = work.jobs if engine.parallel else 1
    work = work if engine.parallel else Work(shape=work.shape)
    try:
        with quiet("torch.utils.cpp_extension"):  # Inductor's, that there is no GPU
            run = engine.open(model, precision, work)
            found = run(images)
    except Exception as error:  # each engine has its own
        raise EngineError(f"cannot run this network: {first_line(error)}") from error
    if not (difference := relative(found, known)) <= close:
        raise WrongNumbersError(
            f"gives wrong numbers: logits differ by {difference:.2g} of the largest, and may by {close:g}"
        )
    return Opened(run, jobs)


def measured(
    engines: Mapping[tuple[str, EnginePrecision], Opened], images: NDArray[np.float32]
) -> dict[tuple[str, EnginePrecision], float]:
    """Pictures a second of each, in the way that it is opened for."""
    batches = ENOUGH * most if (most := max(each.jobs for each in engines.values())) > 1 else 1

    def call(each: Opened) -> Callable[[], object]:
        return lambda: deque(each.many(repeat(images, batches)), maxlen=0)

    return rates({pair: call(each) for pair, each in engines.items()}, len(images) * batches)


def key(model: Model, pairs: list[tuple[str, EnginePrecision]], hint: Hint, batch_size: int) -> str:
    """What the speed of an engine depends on, as a name in the cache; the weights do not."""
    here = machine("cpu")
    facts = {
        "machine": [here.name, here.cores, torch.get_num_threads()],
        "versions": versions(),
        "network": records.to_dict(model.net.spec),
        "size": input_size(model.net),
        "int8": hashlib.sha256(model.int8.onnx).hexdigest() if model.int8 else "",
        "asked": [pairs, hint, batch_size],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def read(place: Path) -> Choice | None:
    """A choice that was kept; none where there is none, or none that can be read."""
    try:
        found = records.from_dict(Choice, json.loads(place.read_text(encoding="utf-8")))
    except (OSError, ValueError, SpecError):
        return None
    return found if found.rows and isinstance(found.rows[0], Timed) else None


def write(place: Path, choice: Choice) -> None:
    """Keep a choice; a cache that takes nothing is no reason to stop."""
    text = json.dumps(records.to_dict(choice))
    with suppress(RunError, OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(place, lambda temporary: temporary.write_text(text, encoding="utf-8"))
