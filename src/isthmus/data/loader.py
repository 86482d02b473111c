"""Pictures to batches: decoded on threads ahead of the consumer, in an order that is arithmetic."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus.arch.preprocess import Preprocess
from isthmus.data.augment import Augment, augmented
from isthmus.data.decode import decode
from isthmus.data.order import permutation, sample_generator
from isthmus.data.pictures import Pictures
from isthmus.data.transform import evaluation_transform
from isthmus.errors import DataError
from isthmus.runtime import cores

__all__ = ["Batch", "Loader"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Step `step` of an epoch: images uint8 (N, C, H, W) in channels_last, labels and picture indices int64 (N,)."""

    step: int
    images: Tensor
    labels: Tensor
    indices: Tensor


class _Pending(NamedTuple):
    """A batch that threads are filling; a future yields why its picture is missing, or None."""

    step: int
    indices: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    reasons: list[Future[str | None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Loader:
    """The batches of each epoch; the whole state is (epoch, step), so a run resumes at any step without replay.

    Training shuffles, augments and drops the last partial batch (unless it is the only one). Evaluation yields every
    picture once, in order. `threads` decode (0: one a core). An unreadable picture raises DataError naming it; with
    on_error="skip" it is left out, its batch is smaller, and `unreadable` keeps its index and reason; a batch left
    without pictures (in training: with one, which batch norm cannot use) is not yielded.
    """

    pictures: Pictures
    record: Preprocess
    batch_size: int
    train: bool
    augment: Augment | None = None
    seed: int = 0
    threads: int = 0
    on_error: Literal["raise", "skip"] = "raise"
    unreadable: dict[int, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        least = 2 if self.train else 1
        if len(self.pictures) < least:
            raise DataError(f"{len(self.pictures)} pictures to load; this needs {least} or more")
        if self.batch_size < 1 or self.threads < 0:
            raise DataError(f"batch size is {self.batch_size} and threads {self.threads}; give at least 1 and 0")

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(len(self.pictures), self.batch_size)
        return whole if self.train and whole else whole + (rest > 0)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from `start_step` on; stop at any time, the threads end with the iterator.

        Raises DataError when the start lies outside the epoch.
        """
        if not 0 <= start_step <= self.steps:
            raise DataError(
                f"cannot start at step {start_step} of {self.steps}; have the pictures or batch size changed?"
            )
        return self._batches(epoch, start_step)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        count = len(self.pictures)
        order = permutation(count, self.seed, epoch) if self.train else np.arange(count)
        labels = torch.tensor(self.pictures.labels)
        threads = self.threads or cores()
        ahead = max(2, -(-2 * threads // self.batch_size))  # small batches must not starve the threads
        pending: deque[_Pending] = deque()
        pool = ThreadPoolExecutor(threads, thread_name_prefix="isthmus-decode")
        try:
            for step in range(start, self.steps):
                indices = order[step * self.batch_size : (step + 1) * self.batch_size]
                pending.append(self._begin(pool, epoch, step, indices))
                if len(pending) > ahead:
                    yield from self._finish(pending.popleft(), labels)
            while pending:
                yield from self._finish(pending.popleft(), labels)
        finally:
            pool.shutdown(cancel_futures=True)
        if len(self.unreadable) == count:
            raise DataError(f"none of {count} pictures can be read; the first: {next(iter(self.unreadable.values()))}")

    def _begin(self, pool: ThreadPoolExecutor, epoch: int, step: int, indices: NDArray[np.int64]) -> _Pending:
        side = self.record.crop
        pixels = np.empty((len(indices), side, side, len(self.record.channels)), np.uint8)
        reasons = [
            pool.submit(self._fill, row, epoch, index) for row, index in zip(pixels, indices.tolist(), strict=True)
        ]
        return _Pending(step, indices, pixels, reasons)

    def _fill(self, row: NDArray[np.uint8], epoch: int, index: int) -> str | None:
        try:
            image = decode(self.pictures.read(index), self.record.channels, self.pictures.name(index))
        except DataError as error:
            if self.on_error == "raise":
                raise
            return str(error)
        if self.augment is None:
            pixels = evaluation_transform(self.record)(image)
        else:
            pixels = augmented(image, self.augment, self.record, sample_generator(self.seed, epoch, index))
        row[...] = pixels.permute(1, 2, 0).numpy()
        return None

    def _finish(self, batch: _Pending, labels: Tensor) -> Iterator[Batch]:
        kept: list[int] = []
        for place, future in enumerate(batch.reasons):
            reason = future.result()
            if reason is None:
                kept.append(place)
            else:
                self.unreadable[int(batch.indices[place])] = reason
        if len(kept) < (2 if self.train and self.batch_size > 1 else 1):
            return
        chosen: Any = kept if len(kept) < len(batch.indices) else slice(None)
        indices = torch.from_numpy(batch.indices[chosen])
        images = torch.from_numpy(batch.pixels[chosen]).permute(0, 3, 1, 2)
        yield Batch(step=batch.step, images=images, labels=labels[indices], indices=indices)
