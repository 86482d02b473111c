"""What changes while a run trains: all of it is in a checkpoint, so that a run goes on to the same bits."""

from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from isthmus.errors import RunError
from isthmus.nn.network import ResNet
from isthmus.train.checkpoint import random_state, restore_random_state
from isthmus.train.distributed import World, share_buffers
from isthmus.train.optim import make_optimizer
from isthmus.train.recipe import Recipe

__all__ = ["RunState"]


@dataclass(kw_only=True, slots=True)
class RunState:
    """Network, optimiser, scaler and average, and the place in the run: `step` steps into `epoch`.

    `losses` are sums over the pictures of this process: of the epoch, and since the last row of the log. `compiled` is
    None before torch.compile was tried.
    """

    net: ResNet
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None
    losses: Tensor
    epoch: int = 0
    step: int = 0
    compiled: bool | None = None

    @classmethod
    def start(cls, net: ResNet, recipe: Recipe, device: torch.device, *, scaled: bool) -> Self:
        """The state before the first step of `net`, which is on `device`; `scaled` for gradients in fp16."""
        blend = get_ema_multi_avg_fn(recipe.ema)  # type: ignore[no-untyped-call]
        return cls(
            net=net,
            optimizer=make_optimizer(net, recipe),
            scaler=torch.amp.GradScaler(device.type, enabled=scaled),
            average=AveragedModel(net, multi_avg_fn=blend, use_buffers=True) if recipe.ema else None,
            losses=torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device),
        )

    @property
    def used(self) -> ResNet:
        """The network to evaluate and to keep: the averaged one where there is one."""
        return self.net if self.average is None else cast("ResNet", self.average.module)

    def recent_loss(self, world: World, pictures: int) -> float:
        """The mean loss of all processes since it was last asked for, over so many pictures."""
        total, _ = float(world.sum(self.losses[1])), self.losses[1].zero_()
        return total / pictures

    def mean_loss(self, world: World, pictures: int) -> float:
        """The mean loss of all processes in this epoch, over so many pictures."""
        return float(world.sum(self.losses[0])) / pictures

    def begin_epoch(self, epoch: int) -> None:
        """Go to the first step of an epoch."""
        self.epoch, self.step = epoch, 0
        self.losses.zero_()

    def parts(self) -> dict[str, Any]:
        """What has a state of its own."""
        parts = {"net": self.net, "optimizer": self.optimizer, "scaler": self.scaler, "average": self.average}
        return {name: part for name, part in parts.items() if part is not None}

    def to_dict(self, world: World) -> dict[str, Any]:
        """Tensors and plain values, the same on every rank; all ranks must call it."""
        device = self.losses.device
        for part in (self.net, self.average):
            if part is not None:
                share_buffers(part, world)
        ranks = world.gather({"random": random_state(device), "losses": self.losses})
        place = {"epoch": self.epoch, "step": self.step, "compiled": self.compiled, "ranks": ranks}
        return {name: part.state_dict() for name, part in self.parts().items()} | place

    def restore(self, saved: dict[str, Any], world: World) -> None:
        """Take over what `to_dict` gave; raises RunError when it is of another run.

        Where the number of processes has changed, random numbers start anew: the bits are not those of before.
        """
        try:
            for name, part in self.parts().items():
                part.load_state_dict(saved[name])
        except (KeyError, ValueError, RuntimeError) as error:
            raise RunError("the run was started with another network or recipe; start it anew") from error
        self.epoch, self.step, self.compiled = saved["epoch"], saved["step"], saved["compiled"]
        ranks = saved["ranks"]
        if len(ranks) == world.size:
            self.losses.copy_(ranks[world.rank]["losses"])
            restore_random_state(ranks[world.rank]["random"], self.losses.device)
        elif world.main:
            self.losses.copy_(sum(rank["losses"] for rank in ranks))
