"""Claim: the engine that `Predictor` chooses is as fast as the best one set up by hand, in every precision.

Four networks, one and sixteen pictures at once, for latency and for throughput, against torchvision or timm eager,
Inductor with frozen weights, ONNX Runtime and OpenVINO, each as its documentation says, in the same precision and for
the same purpose. Peers that are far behind in a first round are not run again: the best of the others counts.
"""

import gc
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import nncf
import numpy as np
import onnxruntime
import openvino
import timm
import torch
import torchvision
from onnxruntime import quantization

import isthmus
from isthmus.deploy.engines import Model
from isthmus.deploy.limits import measured_limits
from isthmus.deploy.predictor import Predictor
from isthmus.deploy.quantize import to_be_timed
from measure import interleaved, ratios, spread, write_result

CASES = {
    "resnet50": [(count, hint) for count in (1, 16) for hint in ("latency", "throughput")],
    "resnet101": [(1, "latency")],
    "resnext50_32x4d": [(16, "latency")],
    "resnet50d": [(1, "throughput")],
}
ROUNDS = 10
BEHIND = 1.3
PAUSE = 0.1  # ONNX Runtime's threads spin for some 50 ms after a call
IN_A_ROW = 4  # single pictures of a round for latency
THREADS = torch.get_num_threads()
Call = Callable[[np.ndarray], object]


def eager(name: str, dtype: torch.dtype, layout: torch.memory_format) -> Call:
    make = getattr(torchvision.models, name, None)
    net = make(weights=None) if make else timm.create_model(name)
    net = net.eval().to(dtype).to(memory_format=layout)

    def call(batch: np.ndarray) -> object:
        with torch.inference_mode():
            return net(torch.from_numpy(batch).to(dtype).contiguous(memory_format=layout))

    return call


def inductor(name: str, dtype: torch.dtype) -> Call:
    make = getattr(torchvision.models, name, None)
    net = (make(weights=None) if make else timm.create_model(name)).eval().to(dtype)
    compiled = torch.compile(net.to(memory_format=torch.channels_last), dynamic=False, options={"freezing": True})

    def call(batch: np.ndarray) -> object:
        with torch.no_grad():
            return compiled(torch.from_numpy(batch).to(dtype).contiguous(memory_format=torch.channels_last))

    return call


def by_onnxruntime(path: Path, hint: str) -> Call:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS if hint == "latency" else 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {"images": batch})


def by_openvino(model: openvino.Model, count: int, hint: str, precision: str) -> openvino.CompiledModel:
    model.reshape([count, 3, 224, 224])
    wanted = {"PERFORMANCE_HINT": hint.upper(), "INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" else "bf16"}
    return openvino.Core().compile_model(model, "CPU", wanted)


class Reader(quantization.CalibrationDataReader):
    """Random images, for the speed alone."""

    def __init__(self) -> None:
        self.images = iter([np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)] * 4)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.images, None)
        return None if image is None else {"images": image}


def files(name: str, folder: Path) -> dict[str, object]:
    """What people make by hand of a torchvision or timm network: ONNX, its int8, and nncf's int8 for OpenVINO."""
    make = getattr(torchvision.models, name, None)
    net = (make(weights=None) if make else timm.create_model(name)).eval()
    full, low = folder / f"{name}.onnx", folder / f"{name}.int8.onnx"
    sizes = ({0: "batch"},)
    torch.onnx.export(
        net, (torch.zeros(2, 3, 224, 224),), full, dynamo=True, input_names=["images"], dynamic_shapes=sizes
    )
    unsigned = quantization.QuantType.QUInt8  # twice to four times as fast on x86 as its default, signed activations
    quantization.quantize_static(full, low, Reader(), per_channel=True, activation_type=unsigned)
    images = [image["images"] for image in iter(Reader().get_next, None)]
    return {
        "onnx": {"fp32": full, "int8": low},
        "openvino": lambda: openvino.Core().read_model(full),
        "nncf": lambda: nncf.quantize(openvino.Core().read_model(full), nncf.Dataset(images), subset_size=len(images)),
    }


def peers(name: str, made: dict, precision: str, count: int, hint: str) -> dict[str, Callable[[], object]]:
    """Each peer's work of a round."""
    images = np.random.default_rng(0).standard_normal((count, 3, 224, 224)).astype(np.float32)
    batches = in_a_row(count, hint)
    found: dict[str, Callable[[], object]] = {}

    def one_by_one(call: Call) -> Callable[[], object]:
        return lambda: [call(images) for _ in range(batches)]

    if precision != "int8":
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        found["eager"] = one_by_one(eager(name, dtype, torch.contiguous_format))
        found["eager, channels_last"] = one_by_one(eager(name, dtype, torch.channels_last))
        found["Inductor, frozen"] = one_by_one(inductor(name, dtype))
    if precision in made["onnx"]:
        call = by_onnxruntime(made["onnx"][precision], hint)
        pool = ThreadPoolExecutor(THREADS)
        many = lambda: list(pool.map(call, repeat(images, batches)))  # noqa: E731
        found["ONNX Runtime"] = one_by_one(call) if hint == "latency" else many
    model = made["nncf" if precision == "int8" else "openvino"]()
    compiled = by_openvino(model, count, hint, precision)
    if hint == "latency":
        found["OpenVINO"] = one_by_one(compiled)
    else:
        queue = openvino.AsyncInferQueue(compiled)

        def start() -> None:
            for _ in range(batches):
                queue.start_async(images)
            queue.wait_all()

        found["OpenVINO"] = start
    return found


def in_a_row(count: int, hint: str) -> int:
    """Batches of a round."""
    if hint == "throughput":
        return (4 if count == 1 else 2) * THREADS
    return IN_A_ROW if count == 1 else 1


def case(name: str, made: dict, model: Model, precision: str, count: int, hint: str) -> dict[str, object]:
    """Ours beside the peers, in pictures a second."""
    begun = time.perf_counter()
    int8 = model.int8 if precision == "int8" else None
    ours = Predictor(model.net, precision=precision, hint=hint, batch_size=count, int8=int8)
    chosen = time.perf_counter() - begun
    images = torch.randn(count, 3, 224, 224)
    batches = in_a_row(count, hint)
    calls = {"ours": lambda: deque(ours.stream(repeat(images, batches)), maxlen=0)}
    calls |= peers(name, made, precision, count, hint)
    for call in calls.values():
        call()
    first = {who: min(times) for who, times in interleaved(calls, runs=2, warm_up=0, pause=PAUSE).items()}
    others = [who for who in calls if who != "ours"]
    least = min(first[who] for who in others)
    near = {who: calls[who] for who in calls if who == "ours" or first[who] <= BEHIND * least}
    times = interleaved(near, runs=ROUNDS, warm_up=0, pause=PAUSE)
    medians = {who: statistics.median(each) for who, each in times.items()}
    best = min((who for who in near if who != "ours"), key=medians.__getitem__)
    pictures = count * batches
    row = {
        "network": name,
        "precision": precision,
        "batch": count,
        "hint": hint,
        "chosen": str(ours.choice.rows[0]).rpartition(" ")[0],
        "ours, pictures/s": pictures / medians["ours"],
        "best by hand": best,
        "ours over best": spread(ratios(times[best], times["ours"])),
        "others": {who: round(pictures / first[who], 1) for who in others},
        "seconds to choose": chosen,
    }
    print(row, flush=True)
    return row


def main() -> None:
    limits, rows = measured_limits(), []  # before the engines keep the machine busy
    with tempfile.TemporaryDirectory() as folder:
        for name, ways in CASES.items():
            model, made = Model(isthmus.create(name).eval()), files(name, Path(folder))
            model.int8 = to_be_timed(model)
            for count, hint in ways:
                for precision in ("fp32", "bf16", "int8"):
                    rows.append(case(name, made, model, precision, count, hint))
                    torch.compiler.reset()
                    gc.collect()
    least = min(row["ours over best"]["median"] for row in rows)
    found = {(row["network"], row["precision"], row["batch"], row["hint"]): row for row in rows}

    def gain(count: int, hint: str, layout: str) -> float:
        fp32 = found["resnet50", "fp32", count, hint]["others"][layout]
        return found["resnet50", "int8", count, hint]["ours, pictures/s"] / fp32

    summary = {
        "least of all cases, ours over the best by hand": f"{least:.3f} of {len(rows)} cases; target >= 0.95 in each",
        "int8 over torchvision eager fp32, b16": f"{gain(16, 'latency', 'eager'):.2f}; target >= 5",
        "int8 over torchvision eager fp32, b1 in throughput": f"{gain(1, 'throughput', 'eager'):.2f}; target >= 5",
        "int8 over torchvision eager fp32, b1 latency": f"{gain(1, 'latency', 'eager'):.2f}",
        "the same beside channels_last": ", ".join(
            f"{gain(*way, 'eager, channels_last'):.2f}" for way in ((16, "latency"), (1, "throughput"), (1, "latency"))
        ),
        "limit of this machine, GOP/s": {
            each: round(rate / 1e9) for each in ("fp32", "bf16", "int8") if (rate := getattr(limits, each))
        },
    }
    note = (
        "Peers in int8 are ONNX Runtime (QDQ, per channel, unsigned activations) and OpenVINO with nncf's defaults; "
        "Inductor has none here."
    )
    write_result("engines", __doc__, summary, rows, note)


if __name__ == "__main__":
    main()
