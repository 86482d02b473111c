"""Pictures a second, and what holds them up: the loader or the network."""

import time
from collections.abc import Iterable, Iterator

from isthmus.data.loader import Batch

__all__ = ["Pace", "binding"]


class Pace:
    """Seconds since it was made, those spent waiting for the loader, and the pictures that came."""

    def __init__(self) -> None:
        self.began, self.waited, self.seen = time.perf_counter(), 0.0, 0

    def over(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches as they come, the wait for each counted."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            self.seen += len(batch.labels)
            yield batch

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self.began

    @property
    def rate(self) -> float:
        """Pictures a second, all told."""
        return self.seen / max(self.seconds, 1e-9)

    @property
    def step_rate(self) -> float:
        """Pictures a second of the network alone."""
        return self.seen / max(self.seconds - self.waited, 1e-9)


def binding(loader: float, step: float) -> str:
    """Which of the two rates, in pictures a second, binds."""
    slower = "the loader" if loader < step else "the network"
    return f"loader alone {loader:.0f} pictures/s, step alone {step:.0f} pictures/s: {slower} binds"
