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
# A 5×5 convolution by pictures, channels and side of the output, without padding, which nobody multiplies by: of many
# shapes oneDNN runs this one nearest to the rate of the multiply-add units, on Zen 4 at 99 % of a loop of them alone.
PICTURES, CHANNELS, SIDE, KERNEL = 4, 128, 112, 5
TRIES = 10  # at most, of which the fastest counts: what slows a try down is not the machine's


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
        convolution = CONVOLUTIONS[precision]()
        convolution()  # the first call packs the weights
    except (AttributeError, RuntimeError):
        return None
    with torch.inference_mode():
        times = [seconds(convolution)]
        repeats = max(1, round(LEAST / times[0]))
        while len(times) <= TRIES and sum(times) * repeats < ENOUGH:
            times.append(seconds(convolution, repeats))
    return 2 * PICTURES * SIDE**2 * CHANNELS**2 * KERNEL**2 / min(times)


def floating(dtype: torch.dtype) -> Callable[[], object]:
    """The convolution in a floating-point precision."""
    side = SIDE + KERNEL - 1
    x = torch.randn(PICTURES, CHANNELS, side, side).to(dtype, memory_format=torch.channels_last)
    conv = torch.nn.Conv2d(CHANNELS, CHANNELS, KERNEL, dtype=dtype).to(memory_format=torch.channels_last)
    return lambda: conv(x)


def eight_bits() -> Callable[[], object]:
    """The convolution in 8 bits, by the operation that torch's compiler emits."""
    ops, ones, none, side = torch.ops.onednn, [1, 1], torch.zeros(CHANNELS, dtype=torch.long), SIDE + KERNEL - 1
    scales = torch.full((CHANNELS,), 0.01)
    x = torch.randint(255, (PICTURES, CHANNELS, side, side), dtype=torch.uint8)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-127, 127, (CHANNELS, CHANNELS, KERNEL, KERNEL), dtype=torch.int8)
    packed = ops.qconv_prepack(weight, scales, 0.02, 0, ones, [0, 0], ones, 1, list(x.shape))
    return lambda: ops.qconv2d_pointwise(
        x, 0.02, 0, packed, scales, none, None, ones, [0, 0], ones, 1, 0.05, 0, torch.uint8, "relu", [], ""
    )


CONVOLUTIONS: dict[EnginePrecision, Callable[[], Callable[[], object]]] = {
    "fp32": partial(floating, torch.float32),
    "bf16": partial(floating, torch.bfloat16),
    "int8": eight_bits,
}
