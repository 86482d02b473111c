"""Requests that come one by one, predicted together."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from isthmus.data.decode import Pixels
from isthmus.deploy.serve.engine import Engine
from isthmus.deploy.serve.metrics import Metrics
from isthmus.errors import EngineError

__all__ = ["BATCH", "Batcher", "LostError"]

BATCH = 8
WINDOW = 0.004  # seconds that the first of a batch waits for others
WATCHED = 0.2  # seconds between two looks at an engine that has nothing to do
LONGEST_PAUSE = 10.0  # seconds between two starts of an engine that does not start
Logits = NDArray[np.float32]


class LostError(Exception):
    """The engine was lost while it had this picture: asked again, it may be right."""


class Batcher:
    """Gathers images for an engine that runs, and starts it anew when it ends or takes longer than `seconds`.

    The images that the engine has at that moment are given up with LostError; the others wait for the next one.
    """

    def __init__(self, engine: Engine, seconds: float, metrics: Metrics, say: Callable[[str], object]) -> None:
        self.engine, self.seconds, self.metrics, self.say = engine, seconds, metrics, say
        self.waiting: deque[tuple[Pixels, asyncio.Future[Logits]]] = deque()
        self.came = asyncio.Event()
        self.thread = ThreadPoolExecutor(1, "engine")  # for calls that block
        metrics.queue.set_function(lambda: len(self.waiting))

    async def logits(self, image: Pixels) -> Logits:
        """Logits (classes,) of an image (H, W, C); raises LostError."""
        answer: asyncio.Future[Logits] = asyncio.get_running_loop().create_future()
        self.waiting.append((image, answer))
        self.came.set()
        return await answer

    async def run(self) -> None:
        """Predict until cancelled."""
        loop, pause = asyncio.get_running_loop(), 0.0
        while True:
            batch: list[tuple[Pixels, asyncio.Future[Logits]]] = []
            try:
                if not self.engine.alive:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause + 0.5, LONGEST_PAUSE)
                    await loop.run_in_executor(self.thread, self.engine.start)
                    self.say("the engine runs again")
                batch = await self.gathered()
                if batch:
                    images = [image for image, _ in batch]
                    call = loop.run_in_executor(self.thread, self.engine.logits, images)
                    found = await asyncio.wait_for(call, self.seconds)
                    self.metrics.batches.observe(len(batch))
                    pause = 0.0
                    for (_, answer), row in zip(batch, found, strict=True):
                        if not answer.done():
                            answer.set_result(row)
            except (EOFError, OSError, TimeoutError, EngineError) as error:
                reason = str(error) or ("it hung" if isinstance(error, TimeoutError) else "its process ended")
                self.say(f"the engine is lost ({reason}): another one is started")
                self.metrics.restarts.inc()
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(LostError())
                self.engine.kill()  # not in the thread, which may wait for it
                await loop.run_in_executor(self.thread, self.engine.close)

    async def gathered(self) -> list[tuple[Pixels, "asyncio.Future[Logits]"]]:
        """The next batch, of those that are still waited for; raises EOFError when the engine ends before it comes."""
        while self.engine.alive and not self.waiting:
            self.came.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.came.wait(), WATCHED)
        if not self.engine.alive:
            raise EOFError
        if len(self.waiting) < BATCH:
            await asyncio.sleep(WINDOW)
        every = [self.waiting.popleft() for _ in range(min(BATCH, len(self.waiting)))]
        return [each for each in every if not each[1].done()]
