"""What this machine does best: device, precision, threads, versions."""

import ctypes
import os
import platform
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Literal

from isthmus.errors import RecipeError

if TYPE_CHECKING:
    import torch

__all__ = ["Machine", "Precision", "cores", "keep_freed_memory", "machine", "torch_dtype", "versions"]

Precision = Literal["fp32", "bf16", "fp16"]
LIBRARIES = (
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "safetensors",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "nncf",
    "timm",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Where and how networks run: `precision` is the fastest that training accuracy survives here."""

    device: str
    name: str
    precision: Precision
    cores: int
    memory: int  # bytes

    @property
    def torch_device(self) -> "torch.device":
        """The device as torch names it."""
        import torch

        return torch.device(self.device)

    def autocast(self, precision: Precision | None = None) -> "torch.autocast":
        """A context in which convolutions run in `precision` (this machine's best by default)."""
        import torch

        chosen = precision or self.precision
        return torch.autocast(self.torch_device.type, dtype=torch_dtype(chosen), enabled=chosen != "fp32")


def torch_dtype(precision: Precision) -> "torch.dtype":
    """A precision as torch names it."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


@cache
def machine(device: str | None = None) -> Machine:
    """This machine: `device` (cpu, cuda, cuda:1, mps), or the best there is; raises RecipeError if it is absent."""
    import torch

    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    chosen = device or found
    kind = chosen.partition(":")[0]
    try:
        count = torch.cuda.device_count() if kind == "cuda" else 1
        known = kind in ("cpu", found) and (torch.device(chosen).index or 0) < count
    except RuntimeError:
        known = False
    if not known:
        raise RecipeError(f"device {chosen!r} is not available here; this machine has {found}")
    return Machine(
        device=chosen,
        name=torch.cuda.get_device_name(chosen) if kind == "cuda" else cpu_name(),
        precision=best_precision(kind),
        cores=cores(),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0,
    )


def cores() -> int:
    """Cores that this process may use; those that torchrun starts on one machine share them."""
    every = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, every // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def best_precision(kind: str) -> Precision:
    """bf16 where the hardware multiplies it natively; software bf16 is slower than fp32."""
    import torch

    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if kind == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
    return "fp32"


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 - no pathlib gain on a system file
            names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
            return next(names, platform.processor() or platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for the next step's maps; returns whether glibc does so.

    By its defaults glibc gives every large map back to the system, which then clears each page of the next one anew.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    library = ctypes.CDLL(None)
    return bool(library.mallopt(mmap_threshold, 2**30) and library.mallopt(trim_threshold, -1))


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that decide results; absent ones are left out."""
    found = {"python": platform.python_version(), "isthmus": metadata.version("isthmus")}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found
