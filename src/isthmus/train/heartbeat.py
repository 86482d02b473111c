"""Signs of life between the processes of a run, so that the one that went missing can be named."""

import contextlib
import json
import socket
import threading
from dataclasses import dataclass, field
from typing import Any

from torch.distributed.distributed_c10d import Store

from isthmus.messages import listed

__all__ = ["ADVICE", "Heartbeat"]

ADVICE = "the last checkpoint is whole: go on from it with --resume, or let torchrun do so with --max-restarts"
BEAT = 1.0  # seconds
PATIENCE = 4  # beats without a sign after which a process counts as lost
Sign = dict[str, Any] | None


@dataclass
class Heartbeat:
    """A context: a thread writes where this rank is into the common store, and why it ended, if by an error.

    Threads beat while the main one waits in a collective, so a silent rank is a dead one, and a rank that beats at an
    earlier place than the others is one that hangs.
    """

    store: Store
    rank: int
    size: int
    places: int = field(default=0, init=False)
    what: str = field(default="the start", init=False)
    reason: str | None = field(default=None, init=False)
    told: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.host = socket.gethostname()
        self.beats = 0
        self.stopped = threading.Event()
        self.own = self.store.clone()  # a connection of its own: one that waits is locked
        self.thread = threading.Thread(target=self._run, name="isthmus-heartbeat", daemon=True)

    def start(self) -> None:
        """Say that this rank is here, and go on saying it."""
        self._beat()
        self.thread.start()

    def stop(self, reason: str = "", *, told: bool = False) -> None:
        """End the beats; `reason`, where there is one, is what the others hear, and `told` whether the user has."""
        self.reason, self.told = reason, told
        self.stopped.set()
        self.thread.join()

    def reach(self, what: str) -> None:
        """This rank has come to `what`, as all ranks do in the same order."""
        self.places, self.what = self.places + 1, what

    def first_to_say(self, message: str) -> bool:
        """Whether no other rank has claimed `message`; each is said once."""
        return bool(self.store.add(f"said {message}", 1) == 1)

    def missing(self, *, late: bool) -> str:
        """Which ranks failed, left early, fell silent or, if `late`, hang; empty if none does. Takes some seconds.

        An error that the user has been told of is given as it was told.
        """
        before = self._signs()
        threading.Event().wait(BEAT * PATIENCE)
        after = self._signs()
        fates: dict[str, list[str]] = {}
        for rank, sign in after.items():
            if sign and sign["told"]:
                return str(sign["reason"])
            if fate := self._fate(sign, before[rank], late=late):
                fates.setdefault(fate, []).append(f"rank {rank} on {sign['host']}" if sign else f"rank {rank}")
        return "; ".join([f"{listed(names)} {fate}" for fate, names in fates.items()] + [ADVICE] * bool(fates))

    def _fate(self, sign: Sign, before: Sign, *, late: bool) -> str:
        """What the last sign of a rank, and one from some beats before, say of it."""
        if sign is None:
            return "never joined"
        if sign["reason"]:
            return f"stopped: {sign['reason']}"
        behind = sign["places"] < self.places
        if sign["reason"] is not None:  # it ended, and not by an error
            return f"left after {sign['what']}" if behind else ""
        if sign["beat"] == (before or {}).get("beat"):
            return "gave no more sign of life"
        return f"hangs after {sign['what']}" if late and behind else ""

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone: whoever needs it will say so
            while not self.stopped.wait(BEAT):
                self._beat()
            self._beat()

    def _beat(self) -> None:
        self.beats += 1
        sign = {
            "beat": self.beats,
            "host": self.host,
            "reason": self.reason,
            "told": self.told,
            "places": self.places,
            "what": self.what,
        }
        self.own.set(f"sign {self.rank}", json.dumps(sign))

    def _signs(self) -> dict[int, Sign]:
        """The last sign of every other rank."""
        keys = {rank: f"sign {rank}" for rank in range(self.size) if rank != self.rank}
        return {
            rank: json.loads(self.store.get(key)) if self.store.check([key]) else None for rank, key in keys.items()
        }
