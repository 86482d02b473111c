"""What a training step of ResNet-50 holds and takes in each memory mode, against torch's own autograd.

python benchmarks/training_memory.py [--batch 8] [--rounds 5] [--device cpu]
"""

import argparse
import multiprocessing
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from isthmus.arch.memory import Memory, training_memory
from isthmus.arch.plan import plan
from isthmus.nn.memory import save_memory
from isthmus.nn.network import ResNet
from isthmus.runtime import keep_freed_memory
from measure import interleaved, ratios, spread, write_result

MODES: tuple[Memory, ...] = ("plain", "checkpoint", "recompute")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGETS = {"fp32": "≤ 1.15", "bf16": "≤ 1.25"}


def network(mode: Memory, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ResNet:
    """ResNet-50 in training, the same weights at every call, no branch switched off at the start."""
    torch.manual_seed(0)
    net = ResNet(plan("resnet50"), zero_init=False).to(device, dtype, memory_format=torch.channels_last).train()
    save_memory(net, mode)
    return net


def pictures(batch: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random pictures, channels last."""
    torch.manual_seed(1)
    return torch.randn(batch, 3, 224, 224, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)


def stepping(mode: Memory, precision: str, batch: int, device: str) -> Callable[[], None]:
    """A training step with momentum, ready to be called."""
    net, x = network(mode, device), pictures(batch, device)
    labels = torch.arange(batch, device=device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, fused=True)

    def step() -> None:
        with torch.autocast(device, TYPES[precision], enabled=precision != "fp32"):
            logits = net(x)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device != "cpu":
            torch.cuda.synchronize()

    return step


def saved_bytes(mode: Memory, precision: str, batch: int) -> int:
    """Bytes of all storages that wait for backward, parameters and statistics left out."""
    net, x = network(mode), pictures(batch)
    own = {each.untyped_storage().data_ptr() for each in (*net.parameters(), *net.buffers())}
    waiting: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        waiting.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    cast = torch.autocast("cpu", TYPES[precision], enabled=precision != "fp32")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), cast:
        net(x)
    return sum(each.untyped_storage().nbytes() for place, each in waiting.items() if place not in own)


def peak(mode: Memory, precision: str, batch: int, device: str) -> int:
    """Bytes that three steps held beyond a process with network and pictures, at most: resident, or on the GPU."""
    step = stepping(mode, precision, batch, device)
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            step()
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    for _ in range(3):
        step()
    return resident("VmHWM") - before


def resident(which: str) -> int:
    """Resident bytes of this process now (VmRSS) or at most (VmHWM); getrusage's maximum is inherited from a parent."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))


def gradient_error(mode: Memory) -> tuple[float, bool]:
    """Largest relative error of a parameter's gradient in fp64, and whether statistics are equal to the last bit."""
    found, wanted = network(mode, dtype=torch.float64), network("plain", dtype=torch.float64)
    x = pictures(2, dtype=torch.float64)
    for net in (found, wanted):
        F.cross_entropy(net(x), torch.arange(2)).backward()
    errors = [
        float((one.grad - other.grad).abs().max() / other.grad.abs().max())
        for one, other in zip(found.parameters(), wanted.parameters(), strict=True)
        if one.grad is not None and other.grad is not None
    ]
    return max(errors), all(
        torch.equal(one, other) for one, other in zip(found.buffers(), wanted.buffers(), strict=True)
    )


def main() -> None:
    """Measure and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    batch, device = options.batch, options.device
    keep_freed_memory()
    summary: dict[str, Any] = {}
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
        for precision in TYPES:
            held = {mode: saved_bytes(mode, precision, batch) for mode in MODES}
            peaks = {mode: processes.apply(peak, (mode, precision, batch, device)) for mode in MODES}
            steps = {mode: stepping(mode, precision, batch, device) for mode in MODES}
            seconds = interleaved(steps, runs=options.rounds, warm_up=2)
            for mode in MODES:
                told = training_memory(plan("resnet50"), batch=batch, precision=precision, memory=mode)
                rows.append(
                    {
                        "precision": precision,
                        "memory": mode,
                        "saved MB": held[mode] / 1e6,
                        "of plain": held[mode] / held["plain"],
                        "predicted / measured": told.saved / held[mode],
                        "peak MB": peaks[mode] / 1e6,
                        "peak of plain": peaks[mode] / peaks["plain"],
                        "step s": statistics.median(seconds[mode]),
                        "time of plain": statistics.median(ratios(seconds[mode], seconds["plain"])),
                    }
                )
            summary[f"bytes saved for backward, recompute / plain, {precision}"] = {
                "ratio": held["recompute"] / held["plain"],
                "target": "≤ 0.40",
            }
            summary[f"step time, recompute / plain, {precision}"] = {
                **spread(ratios(seconds["recompute"], seconds["plain"])),
                "target": TARGETS[precision],
            }
            summary[f"peak memory of a step, recompute / plain, {precision}"] = peaks["recompute"] / peaks["plain"]
    for mode in ("checkpoint", "recompute"):
        error, equal = gradient_error(mode)
        summary[f"fp64 gradients, {mode} against plain"] = {"largest relative error": error, "target": "≤ 1e-10"}
        summary[f"batch-norm statistics, {mode} against plain"] = "identical" if equal else "DIFFERENT"
    write_result(
        "training_memory" if device == "cpu" else f"training_memory_{device}",
        f"ResNet-50 trains in two fifths of the memory\n\n224 × 224, batch {batch}, channels_last, {device}.",
        summary,
        rows,
        note=(
            "Saved: storages seen by torch.autograd.graph.saved_tensors_hooks, each once, without parameters and "
            "statistics, on the CPU. Peak: what three steps added to a process of their own that held the network and "
            "its pictures, gradients and momentum included; resident memory on the CPU, allocated on a GPU. "
            "plain is torch's own autograd."
        ),
    )


if __name__ == "__main__":
    main()
