"""torch.compile as an offer: timed on the run's own network and batch, taken when it wins and dropped when it loses."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isthmus.messages import first_line
from isthmus.train.distributed import World

__all__ = ["Trial", "try_compiling"]

ROUNDS = 5
LEAST_GAIN = 1.02  # less is noise, and a recompilation would eat it


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What compiling brought: the seconds it took and the eager step's time over the compiled one's."""

    seconds: float = 0.0
    gain: float = 0.0
    failure: str = ""

    @property
    def wins(self) -> bool:
        """Whether the compiled network is the one to train."""
        return self.gain >= LEAST_GAIN

    def __str__(self) -> str:
        if self.failure:
            return f"torch.compile failed and is dropped: {self.failure}"
        verdict = "kept" if self.wins else "dropped"
        return f"torch.compile took {self.seconds:.0f} s and makes a step {self.gain:.2f}× as fast: {verdict}"


def try_compiling(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], device: torch.device, world: World
) -> tuple[nn.Module, Trial]:
    """The network to train and the trial behind it; weights, statistics, gradients and random numbers are left as is.

    `loss` computes that of one batch. All processes decide alike: by the one that gains least.
    """
    candidate: nn.Module = torch.compile(model)  # type: ignore[assignment]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    devices = [device] if device.type == "cuda" else []

    def seconds(net: nn.Module) -> float:
        began = time.perf_counter()
        loss(net).backward()  # type: ignore[no-untyped-call]
        if devices:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    took = gain = 0.0
    failure = ""
    try:
        with torch.random.fork_rng(devices):
            took = seconds(candidate)
            gain = statistics.median(seconds(model) / seconds(candidate) for _ in range(ROUNDS))
    except Exception as error:  # noqa: BLE001 - a compiler may fail in any way, and training goes on without it
        failure = first_line(error)
    finally:
        model.load_state_dict(before)
        model.zero_grad(set_to_none=True)
    trial = Trial(seconds=took, gain=min(world.gather(gain)), failure=failure)
    return (candidate if trial.wins else model), trial
