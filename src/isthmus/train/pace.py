"""Pictures a second, and what holds them up: the loader or the network."""

import time
from collections.abc import Iterable, Iterator

import torch
from torch.nn import functional as F

from isthmus.data.loader import Batch
from isthmus.nn.network import ResNet
from isthmus.runtime import Machine, Precision

__all__ = ["Pace", "binding", "step_rate"]

FIRST = 2  # steps that are slower than the rest: kernels are chosen, memory is taken


class Pace:
    """Seconds since it was made, those spent waiting for the loader, and the pictures that came."""

    def __init__(self) -> None:
        self.began, self.waited, self.seen, self.batches = time.perf_counter(), 0.0, 0, 0
        self.steady = self.began, self.waited, self.seen  # when the first steps were done

    def over(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches as they come, the wait for each counted."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            if self.batches == FIRST:
                self.steady = asked, self.waited, self.seen
            batch = next(iterator, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            self.seen, self.batches = self.seen + len(batch.labels), self.batches + 1
            yield batch

    @property
    def rate(self) -> float:
        """Pictures a second, all told."""
        return self.seen / max(time.perf_counter() - self.began, 1e-9)

    @property
    def step_rate(self) -> float:
        """Pictures a second of the network alone, its first steps left out."""
        began, waited, seen = self.steady
        return (self.seen - seen) / max(time.perf_counter() - began - (self.waited - waited), 1e-9)


def step_rate(
    net: ResNet,
    machine: Machine,
    *,
    batch_size: int,
    size: int,
    seconds: float = 2.0,
    precision: Precision | None = None,
) -> float:
    """Pictures a second of the training step alone: forward, backward and SGD on made-up pictures of `size` pixels.

    `net` is trained on them, so let it be one that nobody needs.
    """
    device = machine.torch_device
    net.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    images = torch.randn(batch_size, net.spec.in_channels, size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9)
    begun, steps = 0.0, -FIRST
    while steps <= 0 or time.perf_counter() - begun < seconds:
        with machine.autocast(precision):
            logits = net(images)
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        steps += 1
        if steps == 0:
            begun = time.perf_counter()
    return batch_size * steps / (time.perf_counter() - begun)


def binding(loader: float, step: float) -> str:
    """Which of the two rates, in pictures a second, binds."""
    slower = "the loader" if loader < step else "the network"
    return f"loader alone {loader:.0f} pictures/s, step alone {step:.0f} pictures/s: {slower} binds"
