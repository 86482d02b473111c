"""Pictures to batches: decoded on threads ahead of the consumer, in an order that is arithmetic."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus.arch.preprocess import Preprocess
from isthmus.data.augment import Augment, augmented
from isthmus.data.cache import Resized
from isthmus.data.decode import Pixels, decode
from isthmus.data.order import Part, balanced_draw, earlier, parts_of, sample_generator
from isthmus.data.pictures import WINDOW, Pictures
from isthmus.data.transform import centred
from isthmus.errors import DataError
from isthmus.runtime import cores

__all__ = ["Batch", "Loader"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Part `part` of `parts` of a step: images uint8 (N, C, H, W) in channels_last, labels and indices int64 (N,).

    The parts of a step come one after another; an optimiser steps after the last.
    """

    step: int
    images: Tensor
    labels: Tensor
    indices: Tensor
    part: int = 0
    parts: int = 1


def _use_one_core(others: int) -> None:
    """Let torch split no work of this thread, of which there is one a core; all others keep their number.

    Teams of threads inside each of ours would wait for each other, and for the cores that the network needs.
    """
    torch.get_num_threads()  # a thread takes the common number when it is first asked
    torch.set_num_threads(1)  # this thread's, and the common one, which is put right from outside
    restore = Thread(target=torch.set_num_threads, args=(others,))
    restore.start()
    restore.join()


class _Filled(NamedTuple):
    """The picture that stands in a place, None for a gap; and why those tried before it could not be read."""

    picture: int | None
    reasons: dict[int, str]


class _Order(NamedTuple):
    """Of each place of an epoch: which picture, and how often it has come before."""

    indices: NDArray[np.int64]
    copies: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Loader:
    """One rank's batches of each epoch; the whole state is (epoch, step), so a run resumes at any step without replay.

    `batch_size` counts the pictures of a step over all `ranks`; rank r takes the r-th contiguous share of each, in
    parts of at most `micro_batch` pictures (0: whole). Training shuffles or, `balanced`, draws every class equally
    often; it augments, and drops the last partial step (unless it is the only one), so that every rank has the same
    steps and parts of the same sizes. Evaluation has every picture once over all ranks, in order. `size` is the side
    of the images in pixels (0: the record's crop). Pictures come from `resized` where it is given. `threads` decode
    (0: one a core); they beat processes, which must copy what they decode. Without `exact`, evaluation resizes as fast
    as training does.

    An unreadable picture raises DataError naming it. With on_error="skip", `unreadable` keeps its index and reason,
    and evaluation leaves it out (a batch without any is not yielded), while training takes the next readable one in
    the order instead.
    """

    pictures: Pictures
    record: Preprocess
    batch_size: int
    train: bool
    augment: Augment | None = None
    resized: Resized | None = None
    size: int = 0
    exact: bool = True
    balanced: bool = False
    seed: int = 0
    threads: int = 0
    on_error: Literal["raise", "skip"] = "raise"
    rank: int = 0
    ranks: int = 1
    micro_batch: int = 0
    unreadable: dict[int, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        least = 2 * self.ranks if self.train else 1
        if len(self.pictures) < least:
            raise DataError(f"{len(self.pictures)} pictures to load; this needs {least} or more")
        if self.batch_size < 1 or self.threads < 0 or self.micro_batch < 0:
            raise DataError(
                f"batch size is {self.batch_size}, threads {self.threads} and micro-batch {self.micro_batch}; "
                "give at least 1, 0 and 0"
            )
        if not 0 <= self.rank < self.ranks:
            raise DataError(f"rank is {self.rank} of {self.ranks}; it must lie in 0..{self.ranks - 1}")
        if self.train and self.batch_size % self.ranks:
            raise DataError(
                f"a batch of {self.batch_size} cannot be shared alike by {self.ranks} processes; make it a multiple"
            )

    @property
    def step_size(self) -> int:
        """Pictures of a step over all ranks; the last step of an evaluation may have fewer."""
        return min(self.batch_size, len(self.pictures)) // self.ranks * self.ranks if self.train else self.batch_size

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        whole, rest = divmod(len(self.pictures), self.step_size)
        return whole if self.train else whole + (rest > 0)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The picture in each place of an epoch.

        With augment.repeats r, the first part 1/r of the shuffled pictures, each r times in a row (Hoffer et al. 2019).
        """
        count, repeats = len(self.pictures), self.augment.repeats if self.augment else 1
        if not self.train:
            return np.arange(count)
        if self.balanced:
            order = balanced_draw(self.pictures.labels, self.seed, epoch)
        else:
            order = self.pictures.shuffled(self.seed, epoch)
        return np.repeat(order[: -(-count // repeats)], repeats)[:count]

    def parts(self, step: int) -> list[Part]:
        """Which places of the order this rank takes in a step."""
        count = len(self.pictures)
        return parts_of(step, self.step_size, count, rank=self.rank, ranks=self.ranks, most=self.micro_batch)

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
        indices = self.order(epoch)
        order = _Order(indices, earlier(indices))
        record = self.record.at(self.size) if self.size else self.record
        labels = torch.from_numpy(self.pictures.labels)
        if self.resized is not None:
            self.resized.refresh()
        threads = self.threads or cores()
        pending: deque[tuple[Part, Pixels, dict[Future[list[_Filled]], slice]]] = deque()
        waiting, stop = 0, Event()
        pool = ThreadPoolExecutor(threads, "isthmus-decode", _use_one_core, (torch.get_num_threads(),))
        try:
            self.pictures.expect(indices[start * self.step_size :][:WINDOW])
            for step in range(start, self.steps):
                self.pictures.expect(indices[step * self.step_size + WINDOW :][: self.step_size])
                for part in self.parts(step):
                    places = range(part.start, part.stop)
                    pixels = np.empty((len(places), record.crop, record.crop, len(record.channels)), np.uint8)
                    # A share for each thread: handing over every picture by itself costs a tenth of the rate.
                    count = min(threads, len(places))
                    shares = [slice(first, None, count) for first in range(count)]
                    filled = {
                        pool.submit(self._fill, pixels[share], order, places[share], record, epoch, stop): share
                        for share in shares
                    }
                    pending.append((part, pixels, filled))
                    waiting += len(places)
                    # Two parts ahead, and more of the small ones, so that no thread goes hungry.
                    while len(pending) > 2 and waiting - len(pending[0][1]) >= 2 * threads:
                        waiting -= len(pending[0][1])
                        yield from self._finish(*pending.popleft(), labels)
            while pending:
                yield from self._finish(*pending.popleft(), labels)
        finally:
            stop.set()  # before the ends of shares that nobody will take
            pool.shutdown(cancel_futures=True)
        if len(self.unreadable) == len(indices):
            raise self._nothing()

    def _fill(
        self, rows: Pixels, order: _Order, places: range, record: Preprocess, epoch: int, stop: Event
    ) -> list[_Filled]:
        pairs = zip(rows, places, strict=True)
        return [self._fill_one(row, order, place, record, epoch) for row, place in pairs if not stop.is_set()]

    def _fill_one(self, row: Pixels, order: _Order, place: int, record: Preprocess, epoch: int) -> _Filled:
        count, reasons = len(order.indices), dict[int, str]()
        for turn in range(count if self.train else 1):
            index = int(order.indices[(place + turn) % count])
            copy = int(order.copies[place]) if turn == 0 else count + place  # a second one is another crop
            if index in reasons:
                continue
            try:
                pixels = self._pixels(index)
            except DataError as error:
                if self.on_error == "raise":
                    raise
                reasons[index] = str(error)
                continue
            if self.augment is None:
                row[...] = centred(pixels, record, exact=self.exact)
            else:
                random = sample_generator(self.seed, epoch, index, copy)
                row[...] = augmented(pixels, self.augment, record, random).permute(1, 2, 0).numpy()
            return _Filled(index, reasons)
        return _Filled(None, reasons)

    def _pixels(self, index: int) -> Pixels:
        if self.resized is not None:
            return self.resized.pixels(index)
        return decode(self.pictures.read(index), self.record.channels, self.pictures.name(index))

    def _finish(
        self, part: Part, pixels: Pixels, shares: dict[Future[list[_Filled]], slice], labels: Tensor
    ) -> Iterator[Batch]:
        found = [_Filled(None, {})] * len(pixels)
        for share in as_completed(shares):  # an error does not wait for the others
            found[shares[share]] = share.result()
        for each in found:
            self.unreadable.update(each.reasons)
        kept = [place for place, each in enumerate(found) if each.picture is not None]
        if len(kept) < len(found):
            if self.train:
                raise self._nothing()
            pixels = pixels[kept]
        if kept:
            indices = torch.tensor([each.picture for each in found if each.picture is not None])
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
            yield Batch(
                step=part.step,
                images=images,
                labels=labels[indices],
                indices=indices,
                part=part.part,
                parts=part.parts,
            )

    def _nothing(self) -> DataError:
        first = next(iter(self.unreadable.values()))
        return DataError(f"none of {len(self.pictures)} pictures can be read; the first: {first}")
