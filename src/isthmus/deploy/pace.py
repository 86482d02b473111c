"""Pictures a second: engines timed turn by turn, and the most that this machine's cores could do."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import TypeVar

import torch

from isthmus.deploy.engines import EnginePrecision

__all__ = ["limit", "rates"]

K = TypeVar("K", bound=Hashable)
LEAST_ROUNDS, MOST_ROUNDS = 2, 5  # beside the first
ENOUGH = 4.0  # seconds of rounds
BEHIND = 1.4  # times the fastest
QUIET = 0.1  # seconds that an engine's threads may still spin after its last call, and take a core from the next
LEAST = 0.15  # seconds of a round, so that one interruption is not all of it
PICTURES = 16
# 3×3 convolutions by channels and side of the output, without padding, which nobody multiplies by: oneDNN runs the
# better of them at the rate of the multiply-add units themselves.
SHAPES = ((256, 14), (64, 54))


def rates(calls: Mapping[K, Callable[[], object]], pictures: int) -> dict[K, float]:
    """Pictures a second of each call, which does so many: medians of rounds A B A B.

    Those that are far behind after a first round are not timed again, and short calls more often than long ones.
    """
    times = {key: [seconds(call)] for key, call in calls.items()}
    repeats = {key: max(1, round(LEAST / first)) for key, (first,) in times.items()}
    for key, count in repeats.items():
        if count > 1:  # too short to tell by one
            times[key] = [seconds(calls[key], count)]
    best = min(times.values())[0]
    near = [key for key, (first,) in times.items() if first <= BEHIND * best]
    for _ in range(min(MOST_ROUNDS, max(LEAST_ROUNDS, round(ENOUGH / (best * max(repeats.values())))))):
        for key in near:
            times[key].append(seconds(calls[key], repeats[key]))
    return {key: pictures / statistics.median(took) for key, took in times.items()}


def seconds(call: Callable[[], object], repeats: int = 1) -> float:
    """The time of a call, the mean of so many."""
    time.sleep(QUIET)
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begun) / repeats


def limit(precision: EnginePrecision) -> float | None:
    """Operations (multiplications and additions) a second that all cores reach in a precision, measured here.

    None where torch has no such convolution for this CPU.
    """
    try:
        calls = {shape: CONVOLUTIONS[precision](*shape) for shape in SHAPES}
        for convolution in calls.values():
            convolution()  # the first call packs the weights
    except (AttributeError, RuntimeError):
        return None
    with torch.inference_mode():
        found = rates(calls, PICTURES)
    return max(found[channels, side] * 2 * side**2 * channels**2 * 9 for channels, side in SHAPES)


def floating(channels: int, side: int, dtype: torch.dtype) -> Callable[[], object]:
    """A convolution in a floating-point precision."""
    x = torch.randn(PICTURES, channels, side + 2, side + 2, dtype=dtype).contiguous(memory_format=torch.channels_last)
    conv = torch.nn.Conv2d(channels, channels, 3, dtype=dtype).to(memory_format=torch.channels_last)
    return lambda: conv(x)


def eight_bits(channels: int, side: int) -> Callable[[], object]:
    """A convolution in 8 bits, by the operation that torch's compiler emits."""
    ops, ones, none = torch.ops.onednn, [1, 1], torch.zeros(channels, dtype=torch.long)
    scales = torch.full((channels,), 0.01)
    x = torch.randint(255, (PICTURES, channels, side + 2, side + 2), dtype=torch.uint8)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-127, 127, (channels, channels, 3, 3), dtype=torch.int8)
    packed = ops.qconv_prepack(weight, scales, 0.02, 0, ones, [0, 0], ones, 1, list(x.shape))
    return lambda: ops.qconv2d_pointwise(
        x, 0.02, 0, packed, scales, none, None, ones, [0, 0], ones, 1, 0.05, 0, torch.uint8, "relu", [], ""
    )


CONVOLUTIONS: dict[EnginePrecision, Callable[[int, int], Callable[[], object]]] = {
    "fp32": partial(floating, dtype=torch.float32),
    "bf16": partial(floating, dtype=torch.bfloat16),
    "int8": eight_bits,
}
