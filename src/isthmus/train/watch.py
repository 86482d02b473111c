"""What stops a run: losses and gradients that are no numbers, found where they begin, and memory that is not enough."""

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.arch.memory import Memory, largest_batch, training_memory
from isthmus.arch.plan import plan
from isthmus.errors import RunError, SpecError
from isthmus.messages import first_line, listed
from isthmus.nn.network import ResNet
from isthmus.runtime import Machine, Precision
from isthmus.train.recipe import Recipe

__all__ = ["Watch", "first_not_finite", "memory_explained", "memory_in_use", "not_finite"]

MODES: tuple[Memory, ...] = (
    "plain",
    "recompute",
    "checkpoint",
)  # each holds less and computes more than the one before
EVERY = 50  # steps between two looks at gradients that lie on a GPU


class Watch:
    """Whether the loss and the gradients of a step are numbers, known before the weights move.

    A GPU is not held up: its loss is on the way to the host while backward runs, and its gradients are looked at now
    and then. A gradient that is no number reaches all layers before the one it comes from, so the first is enough.
    With fp16 the gradients are the scaler's business: it skips the steps in which they overflow.
    """

    def __init__(self, device: torch.device, *, gradients: bool = True) -> None:
        cuda = device.type == "cuda"
        self.gradients = gradients
        self.copy = torch.zeros((), pin_memory=cuda)
        self.arrived = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        self.steps = 0

    def take(self, loss: Tensor) -> None:
        """The loss of a step (any shape () tensor), before its last backward pass begins."""
        self.copy.copy_(loss.detach(), non_blocking=True)
        if self.arrived is not None:
            self.arrived.record()

    def loss(self) -> float:
        """The loss last taken."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return float(self.copy)

    def fine(self, net: nn.Module) -> bool:
        """Whether the optimiser may go on; called once a step."""
        self.steps += 1
        if not math.isfinite(self.loss()):
            return False
        if not self.gradients or (self.arrived is not None and self.steps % EVERY):
            return True
        first = next((parameter.grad for parameter in net.parameters() if parameter.grad is not None), None)
        return first is None or bool(first.isfinite().all())


def first_not_finite(net: nn.Module, losses: Iterable[Tensor]) -> tuple[str, int]:
    """Where a value that is no finite number first appears while the batch of `losses` runs again, in words.

    Each loss is computed by `net` itself (not by a compiled or wrapped form of it) when it is asked for, and runs
    backward here. Empty when everything is finite this time. The weights stay as they are; gradients do not. The number
    says how many values were looked at before: synchronised batch norm carries one process's numbers to all others.
    """
    if stored := [name for name, parameter in net.named_parameters() if not finite(parameter)]:
        return f"in the weights before this step: {listed(stored)}", 0
    found: list[tuple[str, int]] = []
    looks = itertools.count()

    def check(where: str, *values: Any) -> None:
        look = next(looks)
        if not found and not all(finite(tensor) for tensor in tensors(values)):
            found.append((where, look))

    def before(name: str, _: nn.Module, inputs: Any) -> None:
        check(f"in the input of {name or 'the network'}", inputs)

    def behind(name: str, _: nn.Module, __: Any, output: Any) -> None:
        check(f"in the output of {name or 'the network'}", output)
        if not name:
            for tensor in tensors(output):
                back("the loss", tensor)

    def into(name: str, _: nn.Module, inputs: Any) -> None:
        for tensor in tensors(inputs):
            back(name, tensor)

    def back(name: str, tensor: Tensor) -> None:
        if tensor.requires_grad:
            tensor.register_hook(partial(check, f"in the gradient that comes out of {name}"))  # type: ignore[no-untyped-call]

    with ExitStack() as hooks:
        for name, module in net.named_modules():
            hooks.callback(module.register_forward_pre_hook(partial(before, name)).remove)
            hooks.callback(module.register_forward_hook(partial(behind, name)).remove)
        for name, module in blocks(net):
            hooks.callback(module.register_forward_pre_hook(partial(into, name)).remove)
        net.zero_grad()
        for loss in losses:
            check("in the loss, of logits that are finite", loss)
            if not found:
                loss.backward()  # type: ignore[no-untyped-call]
            if found:
                return found[0]
    names = [name for name, parameter in net.named_parameters() if not finite(parameter.grad)]
    return (f"in the gradient of {names[-1]}" if names else ""), next(looks)


def not_finite(
    found: Sequence[tuple[str, int, list[str]]],
    *,
    loss: float,
    epoch: int,
    step: int,
    lr: float,
    checkpoint: Path | None,
) -> RunError:
    """The error of a step (both counted from 1) whose loss or gradients are no numbers.

    `found` holds of each process what `first_not_finite` gave, and the names of its pictures.
    """
    place, _, names = min(found, key=lambda each: (not each[0], each[1]))
    what = "the gradients are not finite" if math.isfinite(loss) else f"the loss is {loss}"
    begins = place or "nowhere when the same pictures ran again: the cause is random numbers, or the hardware"
    saved = f"the last state before it is {checkpoint}" if checkpoint else "no state was saved before it"
    return RunError(
        f"{what} in step {step} of epoch {epoch}; the first value that is no finite number lies {begins}; the pictures "
        f"were {listed(names, 8)}; lower --lr (now {lr:.3g}), or look at these pictures; {saved}"
    )


def blocks(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a network that run one after another: its children, those of a stage in its place."""
    for name, child in net.named_children():
        if isinstance(child, nn.Sequential):
            yield from ((f"{name}.{place}", block) for place, block in child.named_children())
        else:
            yield name, child


def finite(tensor: Tensor | None) -> bool:
    """Whether all of it is finite numbers."""
    return tensor is None or bool(tensor.detach().isfinite().all())


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in what a module takes or gives."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors(each)


@contextmanager
def memory_explained(net: ResNet, recipe: Recipe, machine: Machine, precision: Precision, ranks: int) -> Iterator[None]:
    """A context in which running out of memory raises a RunError that says which batch or memory mode would do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        share = recipe.micro_batch or recipe.batch_size // ranks
        ways = ", or ".join(fitting(net, recipe, machine, precision, ranks)) or "take a smaller network or picture"
        raise RunError(
            f"{machine.device} has no memory left for {share} pictures at once ({first_line(error)}); {ways}; what was "
            f"saved last is whole"
        ) from error


def fitting(net: ResNet, recipe: Recipe, machine: Machine, precision: Precision, ranks: int) -> list[str]:
    """Settings that fit by calculation when those of the recipe did not, the one that computes least first.

    The batch stays; it is divided into the largest equal parts that fit into nine tenths of the memory.
    """
    drawn = plan(net.spec, recipe.train_size or net.preprocess.crop)
    how: dict[str, Any] = {"precision": precision, "optimizer": recipe.optimizer, "ema": recipe.ema > 0}
    share = recipe.batch_size // ranks
    try:
        tried = training_memory(drawn, batch=recipe.micro_batch or share, memory=recipe.memory, **how).total
        limit = min(device_memory(machine), tried) * 9 // 10
        most = {
            memory: largest_batch(drawn, limit, memory=memory, **how) for memory in MODES[MODES.index(recipe.memory) :]
        }
    except SpecError:  # blocks of one's own, which paper does not know
        most = {recipe.memory: (recipe.micro_batch or share) // 2}
    ways = []
    for memory, pictures in most.items():
        if part := next((part for part in range(min(pictures, share), 0, -1) if share % part == 0), 0):
            settings = (f"micro_batch={part}" * (part < share), f"memory={memory}" * (memory != recipe.memory))
            ways.append("try " + " ".join(f"--set {setting}" for setting in settings if setting))
    return ways


def device_memory(machine: Machine) -> int:
    """Bytes of the GPU, else of this machine."""
    if machine.torch_device.type == "cuda":
        return torch.cuda.get_device_properties(machine.torch_device).total_memory
    return machine.memory


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the device or of this process does not suffice."""
    # Of torch on the CPU, of oneDNN, of CUDA and MPS, of Windows.
    words = ("allocate memory", "could not create a primitive", "out of memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(each in str(error).lower() for each in words)
    )


def memory_in_use(device: torch.device) -> int:
    """The most bytes that tensors have taken of a CUDA device, or that this process has held (0: unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    from resource import RUSAGE_SELF, getrusage

    peak = getrusage(RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
