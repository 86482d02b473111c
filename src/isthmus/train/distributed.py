"""One process or many: torchrun's environment as a `World`, and what the training loop asks of it."""

import io
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import zip_longest
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from isthmus.errors import IsthmusError, RunError
from isthmus.messages import first_line, listed
from isthmus.runtime import cores
from isthmus.train.heartbeat import ADVICE, Heartbeat

__all__ = ["World", "accumulated", "joined", "parallel", "share_buffers"]

TIMEOUT = "ISTHMUS_TIMEOUT"  # the environment variable
MINUTES = 10
BUCKET = 25 * 2**20  # bytes of gradients that one sum takes, as in torch's DistributedDataParallel


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The processes of a run as one of them sees it; alone, every method gives back what it is given.

    All ranks must call the methods in the same order. `device` is what `machine` takes: this process's own.
    `restarted` says that torchrun has started the processes anew, because one failed or machines came and went.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: str | None = None
    restarted: bool = False
    heartbeat: Heartbeat | None = field(default=None, repr=False, compare=False)
    control: distributed.ProcessGroup | None = field(default=None, repr=False, compare=False)  # for CPU tensors

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
        distributed.all_reduce(total, group=self.control if total.device.type == "cpu" else None)
        return total

    def any(self, flag: bool, what: str = "the end of a step") -> bool:
        """Whether any rank says so; `what` is the place that a message about missing ranks names."""
        if self.size == 1:
            return flag
        self._reach(what)
        votes = torch.tensor(int(flag))
        distributed.all_reduce(votes, group=self.control)
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
        distributed.all_gather(lengths, torch.tensor(len(mine)), group=self.control)
        longest = int(max(lengths))
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        distributed.all_gather(texts, nn.functional.pad(mine, (0, longest - len(mine))), group=self.control)
        return [
            torch.load(io.BytesIO(text[: int(length)].numpy().tobytes()), weights_only=True, map_location="cpu")
            for text, length in zip(texts, lengths, strict=True)
        ]

    def _reach(self, what: str) -> None:
        if self.heartbeat is not None:
            self.heartbeat.reach(what)


@contextmanager
def joined(device: str | None = None) -> Iterator[World]:
    """The processes that torchrun started, joined for the length of the context; a single one without torchrun.

    Sums of CPU tensors go over gloo, of CUDA tensors over NCCL; a process has the GPU of its local rank, and its part
    of the cores. A collective that waits longer than ISTHMUS_TIMEOUT seconds (10 minutes unless given) fails. When
    that happens, or a process ends, the others raise RunError naming it. A message that several processes would give
    is given by one of them; the others leave with exit status 2.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if size == 1:
        yield World(device=device, restarted=again)
        return
    limit = timedelta(seconds=timeout())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = device in (None, "cuda") and torch.cuda.is_available()
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise RunError(f"there are {torch.cuda.device_count()} GPUs here; give torchrun no more --nproc-per-node")
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
    again |= rank == 0 and store.check(["offer"])  # of an earlier start; not every torchrun counts every restart
    store = PrefixStore(meeting(store, rank, size, limit.total_seconds()), store)
    heartbeat = Heartbeat(PrefixStore("isthmus", store), rank, size)
    heartbeat.start()
    reason, told = "", False
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=2 * limit if cuda else limit,  # NCCL aborts the process, so gloo must come first and tell why
        )
        world = World(
            rank=rank,
            size=size,
            local_rank=local_rank,
            device=device,
            heartbeat=heartbeat,
            control=cast("distributed.ProcessGroup", distributed.new_group(backend="gloo", timeout=limit)),
        )
        yield replace(world, restarted=world.any(again, "the start"))
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


def meeting(store: Store, rank: int, size: int, limit: float) -> str:
    """A name that these processes share and those of no earlier start: torchrun's store outlives restarts.

    What earlier processes wrote may still be read, so rank 0 offers a name together with what every rank has said of
    itself, until each has found itself there. Raises RunError naming the ranks that have not after `limit` seconds.
    """
    mine, began = uuid.uuid4().hex, time.monotonic()
    store.set(f"hello {rank}", mine)
    others = [f"{mine} {other}" for other in range(1, size)]
    while True:
        if rank == 0:
            said = [
                store.get(key).decode() if store.check([key]) else "" for key in map("hello {}".format, range(size))
            ]
            store.set("offer", json.dumps(said))
            if store.check(others):
                return mine
        elif store.check(["offer"]):
            said = json.loads(store.get("offer"))
            if rank < len(said) and said[rank] == mine:
                store.set(f"{said[0]} {rank}", "here")
                return str(said[0])
        if time.monotonic() - began > limit:
            absent = [key.rpartition(" ")[2] for key in others if not store.check([key])] if rank == 0 else ["0"]
            raise RunError(f"after {limit:.0f} s these ranks have not joined: {listed(absent)}; {TIMEOUT} allows more")
        time.sleep(0.02)


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
        with undisturbed():
            missing = heartbeat.missing(late="timed out" in str(error).lower() or "timeout" in str(error).lower())
    except RuntimeError:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        missing = f"the process at {where}, where all others meet, does not answer any more; {ADVICE}"
    return RunError(missing) if missing else None


@contextmanager
def undisturbed() -> Iterator[None]:
    """SIGTERM is not heard: torchrun sends it to all when one process has died, before they can tell which."""
    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN) if here else None
    try:
        yield
    finally:
        if here:
            signal.signal(signal.SIGTERM, before)


def said_first(message: str, heartbeat: Heartbeat) -> bool:
    """Whether this rank is the one to say `message`; where nobody can be asked, it is."""
    try:
        return heartbeat.first_to_say(message)
    except RuntimeError:
        return True


class Bucket:
    """Gradients of some parameters in one piece of memory, in the memory format of the weights."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        sizes = [each.numel() for each in parameters]
        self.flat = torch.empty(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        pieces = zip(torch.split_with_sizes(self.flat, sizes), parameters, strict=True)
        self.views = [piece.as_strided(each.shape, each.stride()) for piece, each in pieces]

    def taken(self) -> Tensor:
        """The memory, filled with the gradients as they are."""
        for view, parameter in zip(self.views, self.parameters, strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(parameter.grad)
        return self.flat

    def give(self) -> None:
        """Let what the memory holds be the gradients."""
        for view, parameter in zip(self.views, self.parameters, strict=True):
            parameter.grad = view


class Parallel(nn.Module):
    """A module whose gradients are *summed* over the ranks, so that a loss is divided by the global batch once.

    The sums run beside the rest of backward, in buckets of last layers first. Their layout is that of the parameters,
    in every step and after every restart, and so are the bits of the sums: torch's DistributedDataParallel lays its
    buckets out anew after its first step. Weights and buffers start as rank 0's. From then on buffers are each rank's
    own, because training does not read them: `share_buffers` before anything does. A parameter without a gradient
    counts as zero. Wrap anew after freezing or unfreezing.
    """

    def __init__(self, module: nn.Module, world: World) -> None:
        super().__init__()
        self.module, self.world = module, world
        with torch.no_grad():
            for tensor in module.state_dict().values():
                distributed.broadcast(tensor, 0)
        self.buckets: list[Bucket] = []
        parameters: list[nn.Parameter] = []
        trainable = [each for each in module.parameters() if each.requires_grad]
        for parameter, following in zip_longest(reversed(trainable), reversed(trainable[:-1])):
            parameters.append(parameter)
            parameter.register_post_accumulate_grad_hook(self._ready)
            full = sum(each.nbytes for each in parameters) >= BUCKET
            if full or following is None or following.dtype != parameter.dtype:
                self.buckets.append(Bucket(parameters))
                parameters = []
        self.summing = False
        self.ready: set[Tensor] = set()
        self.sums: list[distributed.Work] = []

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What the module gives."""
        return self.module(*inputs, **options)

    @contextmanager
    def step(self) -> Iterator[None]:
        """The forward and backward pass behind which the sums are in the gradients."""
        self.world._reach("a forward pass")  # noqa: SLF001
        self.summing = True
        try:
            yield
            for bucket in self.buckets:
                self.ready.update(bucket.parameters)
            self._sum()
            for bucket, work in zip(self.buckets, self.sums, strict=True):
                work.wait()
                bucket.give()
        finally:
            self.summing = False
            self.ready.clear()
            self.sums.clear()

    def _ready(self, parameter: Tensor) -> None:
        if self.summing:
            self.ready.add(parameter)
            self._sum()

    def _sum(self) -> None:
        """Begin with the buckets that are complete, in their order, which is the same on all ranks."""
        while len(self.sums) < len(self.buckets):
            bucket = self.buckets[len(self.sums)]
            if not self.ready.issuperset(bucket.parameters):
                break
            self.sums.append(distributed.all_reduce(bucket.taken(), async_op=True))


def parallel(module: nn.Module, world: World) -> nn.Module:
    """`module` as it trains in `world`: itself where it is alone or has nothing to train."""
    alone = world.size == 1 or not any(parameter.requires_grad for parameter in module.parameters())
    return module if alone else Parallel(module, world)


def accumulated(module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """A context for forward and backward of one micro-batch: gradients are summed over ranks behind the last alone."""
    return module.step() if last and isinstance(module, Parallel) else nullcontext()


def share_buffers(module: nn.Module, world: World) -> None:
    """Give every rank the buffers of rank 0, such as batch-norm statistics."""
    if world.size > 1:
        for buffer in module.buffers():
            distributed.broadcast(buffer, 0)
