"""The engines that run a network on the CPU: what each computes, and how it is opened."""

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from isthmus.deploy import program
from isthmus.deploy.graph import check_mode, ready
from isthmus.deploy.program import needed
from isthmus.errors import PrecisionError
from isthmus.evaluation.inference import TrunkAndHead
from isthmus.nn.fuse import fast_form
from isthmus.nn.network import ResNet
from isthmus.runtime import machine
from isthmus.weights.digest import network_digest

if TYPE_CHECKING:
    from isthmus.deploy.quantize import Quantised

__all__ = [
    "CPU",
    "ENGINES",
    "PRECISIONS",
    "Engine",
    "EnginePrecision",
    "Model",
    "Run",
    "Work",
    "native_bf16",
    "onnxruntime",
    "openvino",
]

EnginePrecision = Literal["fp32", "bf16", "int8"]
PRECISIONS: tuple[EnginePrecision, ...] = ("fp32", "bf16", "int8")
Run = Callable[[NDArray[Any]], NDArray[np.float32]]
"""From the one input of a network to its logits."""
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """How the cores are shared: `jobs` calls at once, each with so many `threads`; most batches have `shape`.

    Unless given, one call at a time with all of torch's threads.
    """

    threads: int = field(default_factory=torch.get_num_threads)
    jobs: int = 1
    shape: tuple[int, ...] = ()


class Model:
    """A network in evaluation in the forms that engines take, each made when it is first asked for."""

    def __init__(self, net: ResNet, int8: "Quantised | None" = None) -> None:
        check_mode(net)
        if int8 and int8.network != network_digest(net):
            raise PrecisionError(
                "this int8 was made of another network, or of this one before it changed: quantize anew"
            )
        self.net, self.int8 = net, int8

    @cached_property
    def reference(self) -> ResNet:
        """As it is, in fp32 on the CPU: what engines are compared with."""
        return copy.deepcopy(self.net).cpu().float()

    @cached_property
    def form(self) -> ResNet:
        """Folded, in fp32."""
        return ready(self.net)

    @cached_property
    def onnx(self) -> bytes:
        """From normalised images to logits, in fp32."""
        return program.of_images(self.form).onnx

    def file(self, precision: EnginePrecision) -> bytes:
        """The ONNX file that engines compute in `precision` from."""
        return self.int8.onnx if precision == "int8" and self.int8 else self.onnx


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """An engine: its name for people, its precisions, the libraries it needs, the extra that brings them.

    `parallel` says that it may be called several times at once, `compiles` that every new shape takes it long.
    """

    title: str
    precisions: tuple[EnginePrecision, ...]
    open: Callable[[Model, EnginePrecision, Work], Run]
    libraries: Sequence[str] = ()
    extra: str = ""
    parallel: bool = False
    compiles: bool = False

    def check_installed(self) -> None:
        """Raise MissingExtraError unless its libraries are here."""
        for library in self.libraries:
            needed(library, self.extra)


def native_bf16() -> bool:
    """Whether this CPU multiplies bf16 itself."""
    return machine("cpu").precision == "bf16"


def open_torch(model: Model, precision: EnginePrecision, work: Work) -> Run:
    """Our fast form, eager."""
    return of_torch(fused(model, precision), work)


def fused(model: Model, precision: EnginePrecision) -> TrunkAndHead:
    """Our fast form as a module: convolutions fused by oneDNN with what follows them."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    trunk = fast_form(model.net, model.net.spec.head.taps, CPU, dtype)
    return TrunkAndHead(trunk, model.form.fc, dtype)


def open_inductor(model: Model, precision: EnginePrecision, work: Work) -> Run:
    """The folded network compiled by Inductor with its weights frozen, once for each shape that it meets."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    trunk = ready(model.net).to(dtype)
    trunk.fc = nn.Identity()
    if trunk.spec.dims == 2:
        trunk.to(memory_format=torch.channels_last)
    compiled: Any = torch.compile(TrunkAndHead(trunk, model.form.fc, dtype), dynamic=False, options={"freezing": True})
    return of_torch(compiled, work)


def of_torch(module: Callable[[torch.Tensor], torch.Tensor], work: Work) -> Run:
    """A torch module on arrays."""

    def run(batch: NDArray[Any]) -> NDArray[np.float32]:
        others = torch.get_num_threads()  # of the whole process
        try:
            if others != work.threads:
                torch.set_num_threads(work.threads)
            with torch.no_grad():
                found: NDArray[np.float32] = module(torch.from_numpy(batch)).numpy()
                return found
        finally:
            if others != work.threads:
                torch.set_num_threads(others)

    return run


def onnxruntime(file: bytes | Path, _precision: EnginePrecision = "fp32", work: Work | None = None) -> Run:
    """ONNX Runtime on the CPU, in the file's own precisions; with all cores where `work` says nothing."""
    runtime = needed("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = work.threads if work else 0
    session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    return lambda batch: session.run(None, {entry.name: np.ascontiguousarray(batch)})[0]


def openvino(
    file: bytes | Path, precision: EnginePrecision = "fp32", work: Work | None = None, *, profiled: bool = False
) -> "OpenVINO":
    """OpenVINO on the CPU; what int8 leaves over in bf16 where the CPU has it. With all cores where `work` is None."""
    low = precision != "fp32" and native_bf16()
    wanted: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "bf16" if low else "f32", "PERF_COUNT": profiled}
    if work:
        wanted |= {
            "PERFORMANCE_HINT": "LATENCY" if work.jobs == 1 else "THROUGHPUT",
            "NUM_STREAMS": work.jobs,
            "INFERENCE_NUM_THREADS": work.threads * work.jobs,
        }
    return OpenVINO(file, wanted, work.jobs if work else 1, work.shape if work else ())


class OpenVINO:
    """A network open in OpenVINO, compiled for batches of `shape`, and for any other when the first of these comes.

    With open sizes a single picture in int8 takes 5 % longer.
    """

    def __init__(self, file: bytes | Path, wanted: dict[str, Any], jobs: int, shape: tuple[int, ...]) -> None:
        self.core, self.file, self.wanted = needed("openvino", "openvino").Core(), file, wanted
        self.jobs, self.shape, self.lock = jobs, shape, threading.Lock()
        self.compiled: dict[bool, Any] = {}
        self.free: dict[bool, list[Any]] = {True: [], False: []}  # requests that nobody uses
        self.compile(fixed=bool(shape))

    def compile(self, *, fixed: bool) -> Any:
        """The compiled network, of one shape or of all."""
        with self.lock:
            if fixed not in self.compiled:
                model = self.core.read_model(self.file)
                if fixed:
                    model.reshape(list(self.shape))
                # On a thread of its own: the plugin gives the one that compiles an alternate signal stack, and may free
                # it there, so that the next Ctrl-C on the main thread would end the process.
                with ThreadPoolExecutor(1) as aside:
                    self.compiled[fixed] = aside.submit(self.core.compile_model, model, "CPU", self.wanted).result()
            return self.compiled[fixed]

    def request(self, *, fixed: bool) -> Any:
        """One that nobody uses: calls may come from several threads."""
        try:
            return self.free[fixed].pop()
        except IndexError:
            return self.compile(fixed=fixed).create_infer_request()

    def __call__(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        request = self.request(fixed=batch.shape == self.shape)
        found: NDArray[np.float32] = request.infer([np.ascontiguousarray(batch)], share_inputs=True)[0]
        self.free[batch.shape == self.shape].append(request)
        return found

    def many(self, batches: Iterable[NDArray[Any]]) -> Iterator[NDArray[np.float32]]:
        """Logits of batches, in their order; as many again as are in work wait, so that no core does."""
        busy: deque[tuple[Any, bool, NDArray[Any]]] = deque()  # with what a request reads, which must live as long

        def first() -> NDArray[np.float32]:
            request, fixed, _ = busy.popleft()
            request.wait()
            found: NDArray[np.float32] = request.get_output_tensor(0).data.copy()
            self.free[fixed].append(request)
            return found

        for batch in batches:
            if len(busy) == 2 * self.jobs:
                yield first()
            fixed = batch.shape == self.shape
            busy.append((self.request(fixed=fixed), fixed, np.ascontiguousarray(batch)))
            busy[-1][0].start_async([busy[-1][2]], share_inputs=True)
        while busy:
            yield first()


ENGINES: dict[str, Engine] = {
    "torch": Engine(title="torch, fused", precisions=("fp32", "bf16"), open=open_torch),
    "inductor": Engine(title="torch, compiled", precisions=("fp32", "bf16"), open=open_inductor, compiles=True),
    "onnxruntime": Engine(
        title="ONNX Runtime",
        precisions=("fp32", "int8"),
        open=lambda model, precision, work: onnxruntime(model.file(precision), precision, work),
        libraries=("onnx", "onnxscript", "onnxruntime"),
        extra="onnx",
        parallel=True,
    ),
    "openvino": Engine(
        title="OpenVINO",
        precisions=("fp32", "bf16", "int8"),
        open=lambda model, precision, work: openvino(model.file(precision), precision, work),
        libraries=("onnx", "onnxscript", "openvino"),
        extra="openvino",
        parallel=True,
    ),
}
"""By the name that commands take."""
