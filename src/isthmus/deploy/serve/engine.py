"""The process that holds the engine: it may be killed at any time, and another takes its place."""

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from isthmus.data.decode import Pixels
from isthmus.deploy.predictor import Choice, Predictor
from isthmus.errors import EngineError, IsthmusError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

__all__ = ["Engine"]


class Engine:
    """A process with a predictor that `make`, which can be pickled, gives it; no process runs before `start`.

    `start` and `logits` block, and raise EOFError or OSError when the process ends meanwhile: `kill` frees whoever
    waits for it.
    """

    def __init__(self, make: Callable[[], Predictor]) -> None:
        self.made = pickle.dumps(make)  # by multiprocessing the weights would need shared memory, which may be small
        self.process: BaseProcess | None = None
        self.pipe: Connection[Any, Any] | None = None
        self.ready = self.over = False

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self.ready and self.process is not None and self.process.is_alive()

    def start(self) -> Choice:
        """A new process, ready to predict; raises EngineError with what the predictor raised."""
        context = multiprocessing.get_context("spawn")  # a fork would inherit locks that threads hold
        self.pipe, there = context.Pipe()
        process = context.Process(target=work, args=(there, self.made), daemon=True, name="engine")
        process.start()
        there.close()  # else its end would never be seen
        self.process = process
        if self.over:  # `end` came before there was a process to kill
            self.kill()
        found: Choice | str = self.pipe.recv()
        if isinstance(found, str):
            raise EngineError(found)
        self.ready = True
        return found

    def logits(self, images: list[Pixels]) -> NDArray[np.float32]:
        """Logits (N, classes) of images (H, W, C)."""
        if self.pipe is None:
            raise EOFError("no process was started")
        self.pipe.send(np.stack(images))
        found: NDArray[np.float32] = self.pipe.recv()
        return found

    def kill(self) -> None:
        """End the process, whatever it does."""
        if self.process is not None:
            self.process.kill()

    def close(self) -> None:
        """End the process and give back what belonged to it."""
        self.ready = False
        self.kill()
        if self.process is not None:
            self.process.join()
        if self.pipe is not None:
            self.pipe.close()
        self.process = self.pipe = None

    def end(self) -> None:
        """Let no process be there, also where one is being started."""
        self.over = True
        self.close()


def work(pipe: "Connection[Any, Any]", made: bytes) -> None:
    """What the process does: it answers until its parent is gone."""
    for stop in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to both; the parent decides
        signal.signal(stop, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        predictor: Predictor = pickle.loads(made)()  # noqa: S301 - of the parent, through no file
        record = predictor.record
        blank = torch.zeros(predictor.batch_size, len(record.channels), record.crop, record.crop, dtype=torch.uint8)
        for count in (predictor.batch_size, 1):
            predictor.logits(blank[:count])
    except IsthmusError as error:
        pipe.send(str(error))
        return
    pipe.send(predictor.choice)
    while True:
        try:
            images = torch.from_numpy(pipe.recv()).permute(0, 3, 1, 2)
        except EOFError:
            return
        pipe.send(predictor.logits(images).numpy())


def end_with_parent() -> None:
    """Also where the parent is killed while an engine is prepared or at work."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(0)
