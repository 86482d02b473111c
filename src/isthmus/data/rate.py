"""Pictures a second that a loader gives when nobody keeps it waiting."""

import time
from collections.abc import Iterator
from itertools import takewhile

import torch

from isthmus.data.loader import Batch, Loader
from isthmus.data.transform import normalise

__all__ = ["loader_rate"]

_FIRST = 2  # batches while threads and buffers come into being


def loader_rate(loader: Loader, seconds: float = 2.0, *, floats: bool = False) -> float:
    """Pictures a second of this rank's loader alone, measured for about `seconds` after the first two batches.

    With `floats`, as normalised float32 batches. A loader with resized pictures is given as many seconds to keep some
    of them first, and is measured on these. Raises DataError when a picture cannot be read and is not to be skipped.
    """
    steps = _steps_in(loader, seconds) if loader.resized is not None else loader.steps
    buffer, begun, now, seen = torch.empty(0), 0.0, 0.0, 0
    for number, batch in enumerate(_over_and_over(loader, steps)):
        if floats:
            if buffer.shape != batch.images.shape:
                buffer = torch.empty_like(batch.images, dtype=torch.float32)
            normalise(batch.images, loader.record, out=buffer)
        now = time.perf_counter()
        if number < _FIRST:
            begun = now
            continue
        seen += len(batch.images)
        if now - begun >= seconds:
            break
    return seen / (now - begun)


def _steps_in(loader: Loader, seconds: float) -> int:
    begun, step = time.perf_counter(), 0
    for batch in loader.epoch(0):
        step = batch.step
        if time.perf_counter() - begun >= seconds:
            break
    return step + 1


def _over_and_over(loader: Loader, steps: int) -> Iterator[Batch]:
    while True:
        yield from takewhile(lambda batch: batch.step < steps, loader.epoch(0))
