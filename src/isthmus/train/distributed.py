"""One process or many: torchrun's environment as a `World`, and what the training loop asks of it."""

import io
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from isthmus.errors import IsthmusError, RunError
from isthmus.messages import first_line
from isthmus.runtime import cores
from isthmus.train.heartbeat import ADVICE, Heartbeat

__all__ = ["World", "accumulated", "joined", "parallel", "restarted", "share_buffers"]

TIMEOUT = "ISTHMUS_TIMEOUT"  # the environment variable
MINUTES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The processes of a run as one of them sees it; alone, every method gives back what it is given.

    All ranks must call the methods in the same order. `device` is what `machine` takes: this process's own.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: str | None = None
    heartbeat: Heartbeat | None = field(default=None, repr=False, compare=False)

    @property
    def main(self) -> bool:
        """Whether this rank writes files and speaks to the terminal."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's `tensor`, the same bits on all."""
        if self.size == 1:
            return tensor
        self._reach("a sum")
        total = tensor.detach().clone()
        distributed.all_reduce(total)
        return total

    def any(self, flag: bool, what: str = "the end of a step") -> bool:
        """Whether any rank says so; `what` is the place that a message about missing ranks names."""
        if self.size == 1:
            return flag
        self._reach(what)
        votes = torch.tensor(int(flag))
        distributed.all_reduce(votes)
        return bool(votes)

    def barrier(self, what: str) -> None:
        """Wait until every rank is here."""
        self.any(False, what)

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, in the order of ranks, on all of them: numbers, text, tensors, lists, dicts."""
        if self.size == 1:
            return [value]
        self._reach("a gathering")
        # Not torch's own all_gather_object, whose pickles could run code.
        buffer = io.BytesIO()
        torch.save(value, buffer)
        mine = torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)
        lengths = [torch.zeros((), dtype=torch.int64) for _ in range(self.size)]
        distributed.all_gather(lengths, torch.tensor(len(mine)))
        longest = int(max(lengths))
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        distributed.all_gather(texts, nn.functional.pad(mine, (0, longest - len(mine))))
        return [
            torch.load(io.BytesIO(text[: int(length)].numpy().tobytes()), weights_only=True, map_location="cpu")
            for text, length in zip(texts, lengths, strict=True)
        ]

    def _reach(self, what: str) -> None:
        if self.heartbeat is not None:
            self.heartbeat.reach(what)


def restarted() -> bool:
    """Whether torchrun has started this process anew after another one failed; the run goes on where it was saved."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def joined(device: str | None = None) -> Iterator[World]:
    """The processes that torchrun started, joined for the length of the context; a single one without torchrun.

    Sums of CPU tensors go over gloo, of CUDA tensors over NCCL; a process has the GPU of its local rank, and its part
    of the cores. A collective that waits longer than ISTHMUS_TIMEOUT seconds (10 minutes unless given) fails. When
    that happens, or a process ends, the others raise RunError naming it. A message that several processes would give
    is given by one of them; the others leave with exit status 2.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device=device)
        return
    limit = timedelta(seconds=timeout())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun sets 1; any other number is the user's choice
        torch.set_num_threads(cores())
    try:
        store, rank, size = next(rendezvous("env://", timeout=limit))
    except (ValueError, RuntimeError) as error:
        raise RunError(
            f"WORLD_SIZE is {size}, but the processes cannot meet: {first_line(error)}; start them with torchrun"
        ) from error
    heartbeat = Heartbeat(PrefixStore("isthmus", store), rank, size)
    heartbeat.start()
    reason, told = "", False
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=limit,
        )
        yield World(rank=rank, size=size, local_rank=local_rank, device=device, heartbeat=heartbeat)
    except (IsthmusError, RuntimeError) as error:
        reason = first_line(error)
        failure = error if isinstance(error, IsthmusError) else explained(error, heartbeat)
        if failure is None:
            raise
        reason, told = str(failure), True
        if not said_first(reason, heartbeat):
            raise SystemExit(2) from error
        if failure is error:
            raise
        raise failure from error
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise
    finally:
        heartbeat.stop(reason, told=told)
        if distributed.is_initialized():
            distributed.destroy_process_group()


def timeout() -> float:
    """Seconds that a process waits for the others; raises RunError when the environment's are none."""
    text = os.environ.get(TIMEOUT, str(MINUTES * 60))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise RunError(f"{TIMEOUT} is {text!r}; it must be seconds above 0")
    return seconds


def explained(error: RuntimeError, heartbeat: Heartbeat) -> RunError | None:
    """The failure of a collective as the story of the processes that are missing; None when none of them is."""
    try:
        missing = heartbeat.missing(late="timed out" in str(error).lower() or "timeout" in str(error).lower())
    except RuntimeError:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        missing = f"the process at {where}, where all others meet, does not answer any more; {ADVICE}"
    return RunError(missing) if missing else None


def said_first(message: str, heartbeat: Heartbeat) -> bool:
    """Whether this rank is the one to say `message`; where nobody can be asked, it is."""
    try:
        return heartbeat.first_to_say(message)
    except RuntimeError:
        return True


def parallel(module: nn.Module, world: World) -> nn.Module:
    """`module` as it trains in `world`: backward leaves the *sum* of the ranks' gradients, overlapped with computing.

    So a loss is divided by the global batch, once, on every rank. Every parameter that requires a gradient must take
    part in each forward pass; wrap anew after freezing or unfreezing. Every forward pass starts from the buffers of
    rank 0, such as batch-norm statistics, and leaves each rank its own: `share_buffers` before anything reads them.
    """
    if world.size == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
        return module
    wrapped = DistributedDataParallel(module, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(None, _summed)
    wrapped.register_forward_pre_hook(lambda *_: world._reach("a forward pass"))  # noqa: SLF001
    return wrapped


def _summed(_: None, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Torch's own hook takes the mean; dividing by three and multiplying again would not give the same bits."""
    work = distributed.all_reduce(bucket.buffer(), async_op=True)
    future: torch.futures.Future[list[Tensor]] = work.get_future()
    return future.then(lambda done: done.value()[0])


def accumulated(module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """A context for forward and backward of one micro-batch: gradients are summed over ranks behind the last alone."""
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()


def share_buffers(module: nn.Module, world: World) -> None:
    """Give every rank the buffers of rank 0, such as batch-norm statistics."""
    if world.size > 1:
        for buffer in module.buffers():
            distributed.broadcast(buffer, 0)
