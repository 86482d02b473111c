"""The limits of this machine, measured once and kept: multiply-adds by precision, bandwidth by working set.

Importing this loads no torch; measuring does.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING, Any

from isthmus import records
from isthmus.arch.roofline import Bandwidth, Limits
from isthmus.atomic import atomic_write
from isthmus.cache import cache_folder
from isthmus.errors import RunError, SpecError
from isthmus.runtime import cores, cpu_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["bandwidth", "kept_limits", "limits", "measured_limits"]

SIZES = tuple(2**power for power in range(15, 29))  # bytes of all threads together: of the first cache up to memory
ROUNDS = 5
LEAST = 0.02  # seconds of a round, so that what starts the threads is nothing beside it
BUSY = 0.75  # processes at work for each core
ITEM = 4  # bytes of fp32
VECTORS = {"AVX512": 16, "AVX2": 8, "SVE256": 8}  # sums of 32 bits in one of a CPU that torch names so; else 4
Pass = tuple[Callable[[int], object], int]
"""What goes over a thread's part so many times in one call, without Python between; and its bytes each time."""


def limits(*, say: Callable[[str], object] = lambda _: None) -> Limits:
    """The limits that were kept of this machine, else measured now, which `say` is told."""
    kept = kept_limits()
    if kept is None:
        say("measuring this machine's limits, once")
        return measured_limits(say=say)
    return kept


def kept_limits() -> Limits | None:
    """What was measured before on this machine with as many threads; loads no torch."""
    try:
        found = records.from_dict(Limits, json.loads(place().read_text(encoding="utf-8")))
    except (OSError, ValueError, SpecError):
        return None
    torch = sys.modules.get("torch")  # where it is loaded it may have been given other threads
    return found if torch is None or torch.get_num_threads() == found.threads else None


def place() -> Path:
    """Where limits are kept: they depend on CPU, cores, threads and on the kernels that torch brings."""
    threads = [os.environ.get(name, "") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")]
    facts = [cpu_name(), cores(), threads, metadata.version("torch")]
    return cache_folder("limits") / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.json"


def measured_limits(*, say: Callable[[str], object] = lambda _: None) -> Limits:
    """The limits of this machine, measured now and kept in place of older ones; `say` is told what spoils them."""
    import torch

    from isthmus.deploy.engines import PRECISIONS, native_bf16
    from isthmus.deploy.pace import limit

    busy, count = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, cores()
    if busy > BUSY * count:
        say(
            f"this machine is busy (load {busy:.1f} on {count} cores), so that its limits come out too low: measure "
            f"again by `isthmus bench machine` when it is idle"
        )
    has = [each for each in PRECISIONS if each != "bf16" or native_bf16()]
    rates = {each: rate for each in has if (rate := limit(each))}
    threads = torch.get_num_threads()
    lanes = VECTORS.get(torch.backends.cpu.get_cpu_capability(), 4)
    found = Limits(machine=cpu_name(), threads=threads, lanes=lanes, bandwidth=bandwidth(threads), **rates)
    text = json.dumps(records.to_dict(found))
    with suppress(RunError, OSError):  # a cache that takes nothing is no reason to stop
        place().parent.mkdir(parents=True, exist_ok=True)
        atomic_write(place(), lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return found


def bandwidth(threads: int) -> tuple[Bandwidth, ...]:
    """Bytes a second that so many threads read and write together, each going over its own part again and again.

    The faster of two ways: one that only reads, and one that reads two numbers for each that it writes.
    """
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for size in SIZES:
            part = max(size // threads, 4096)
            rates.append(max(rate(pool, threads, way, part) for way in (reads, updates)))
    # A smaller working set is at least as fast; where it seems slower something else ran.
    least = list(accumulate(reversed(rates), max))[::-1]
    return tuple(Bandwidth(size=size, rate=each) for size, each in zip(SIZES, least, strict=True))


def rate(pool: ThreadPoolExecutor, threads: int, way: "Callable[[int], Pass]", part: int) -> float:
    """Bytes a second of the best round; the threads of a round begin together, and the last to end counts."""
    together = Barrier(threads)
    passes_of = [way(part) for _ in range(threads)]
    calls, moved = [call for call, _ in passes_of], sum(each for _, each in passes_of)

    def seconds(passes: int) -> float:
        def timed(call: Callable[[int], object]) -> tuple[float, float]:
            together.wait()
            begun = time.perf_counter()
            call(passes)
            return begun, time.perf_counter()

        spans = list(pool.map(timed, calls))
        return max(ended for _, ended in spans) - min(begun for begun, _ in spans)

    seconds(1)  # the pages are there from now on
    passes = max(1, round(LEAST / seconds(1)))
    passes = max(1, round(passes * LEAST / seconds(passes)))
    return max(passes * moved / seconds(passes) for _ in range(ROUNDS))


def reads(part: int) -> Pass:
    """The maximum of numbers."""
    import numpy as np

    values = np.ones(part // ITEM, np.float32)
    return lambda passes: np.maximum.reduce(repeated(values, passes), axis=1), values.nbytes


def updates(part: int) -> Pass:
    """A sum in place: two numbers read, one of them written."""
    import numpy as np

    values, sums = np.ones(part // ITEM // 2, np.float32), np.zeros(part // ITEM // 2, np.float32)
    return lambda passes: np.add.reduce(repeated(values, passes), axis=0, out=sums), 3 * values.nbytes


def repeated(values: "NDArray[np.float32]", passes: int) -> "NDArray[Any]":
    """The same numbers in so many rows."""
    import numpy as np

    return np.broadcast_to(values, (passes, len(values)))
