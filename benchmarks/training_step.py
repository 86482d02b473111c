"""A training step of ResNet-50 in a run of ours, loader and loop included, against steps that scripts write by hand.

python benchmarks/training_step.py [--batch 16] [--steps 6] [--rounds 4] [--device cpu]
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import isthmus
from isthmus.data.augment import Augment
from isthmus.data.sources import DataSet, open_pictures
from isthmus.runtime import machine
from isthmus.train.recipe import Recipe
from isthmus.train.reporter import Reporter
from measure import ratios, spread, write_result
from photographs import write_photographs

OURS, ALONE = "a run of ours", "our network alone"
BEST, PLAIN = "by hand, best eager setting", "by hand, NCHW fp32"
Steps = Callable[[int], float]
"""Takes so many steps and gives the mean seconds of one, the first left out."""


class Stopwatch(Reporter):
    """Notes when each step of a run has been taken."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def progress(self, task: str, *_others: Any) -> None:
        if task == "train":
            self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Mean of the steps after the first."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def by_hand(
    make: Callable[[], nn.Module],
    batch: int,
    device: str,
    *,
    precision: str = "fp32",
    mode: str = "",
    fused: bool = False,
) -> Steps:
    """SGD with momentum on one batch that lies ready; channels_last and autocast below fp32, compiled in `mode`."""
    layout = torch.channels_last if precision != "fp32" else torch.contiguous_format
    net = make().to(device, memory_format=layout).train()
    model = torch.compile(net, mode=mode) if mode else net
    x = torch.randn(batch, 3, 224, 224, device=device).contiguous(memory_format=layout)
    labels = torch.randint(1000, (batch,), device=device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=fused)

    def steps(count: int) -> float:
        watch = Stopwatch()
        for _ in range(count):
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                loss = F.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            if device != "cpu":
                torch.cuda.synchronize()
            watch.progress("train")
        return watch.seconds

    return steps


def a_run(pictures: Path, batch: int, device: str, precision: Any, memory: Any = "plain") -> Steps:
    """The same network and optimiser in a run: pictures from files, cropped and flipped, log, look-out for NaN."""
    every = open_pictures(str(pictures))

    def steps(count: int) -> float:
        # One picture of each class to validate on, so that a run's own evaluation is short.
        train, val = (
            every.subset(range(count * batch)),
            every.subset(np.unique(every.labels, return_index=True)[1].tolist()),
        )
        data = DataSet(name=str(pictures), train=train, val=val)
        recipe = Recipe(
            data=str(pictures),
            arch="resnet50",
            freeze="none",
            augment=Augment(hflip=True, crop_scale=(0.08, 1.0)),
            epochs=1,
            batch_size=batch,
            nesterov=False,
            lr=0.01,
            train_norm=True,
            warmup_epochs=0.0,
            precision=precision,
            memory=memory,
        )
        watch = Stopwatch()
        with tempfile.TemporaryDirectory() as folder:
            isthmus.fit(recipe, Path(folder) / "run", data=data, device=device, reporter=watch, report=False)
        return watch.seconds

    return steps


SCRIPTS: dict[str, Steps] = {}  # in the process of the scripts


def write_scripts(batch: int, device: str, precision: str) -> None:
    """Make ready what is written by hand, in a process whose memory is managed as torch finds it."""
    stock = partial(by_hand, partial(torchvision.models.resnet50, weights=None), batch, device)
    SCRIPTS[BEST] = stock(precision=precision)
    SCRIPTS[PLAIN] = stock()
    if device != "cpu":  # there, compiling takes a minute and loses
        for mode in ("default", "max-autotune"):
            SCRIPTS[f"by hand, torch.compile {mode}"] = stock(precision=precision, mode=mode)


def names() -> list[str]:
    """What is written by hand."""
    return list(SCRIPTS)


def take(name: str, steps: int) -> float:
    """Steps of a script; the slow one is information, not a rival, and takes fewer."""
    return SCRIPTS[name](min(steps, 3) if name == PLAIN else steps)


def main() -> None:
    """Measure and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    batch, device, precision = options.batch, options.device, machine(options.device).precision
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, spawn.Pool(1, write_scripts, (batch, device, precision)) as scripts:
        write_photographs(Path(folder), options.steps * batch)
        make = partial(isthmus.create, "resnet50")
        peers = {
            OURS: a_run(Path(folder), batch, device, precision),
            ALONE: by_hand(make, batch, device, precision=precision, fused=True),
            **{name: partial(scripts.apply, take) for name in scripts.apply(names)},
        }
        seconds: dict[str, list[float]] = {name: [] for name in peers}
        for turn in range(options.rounds + 1):
            for name, steps in peers.items():
                taken = steps((name, options.steps)) if name not in (OURS, ALONE) else steps(options.steps)
                if turn:
                    seconds[name].append(taken)
    ours, alone, best, plain = (seconds[name] for name in (OURS, ALONE, BEST, PLAIN))
    write_result(
        "training_step" if device == "cpu" else f"training_step_{device}",
        "A whole run trains as fast as a bare step by hand\n\n"
        f"ResNet-50, 224 × 224, batch {batch}, {precision}, {device}.",
        {
            "best eager step by hand / a run of ours, loader and loop included": {
                **spread(ratios(best, ours)),
                "target": "≥ 1.0, reaching for 1.1",
            },
            "a run of ours / our network alone: loop and loader": {**spread(ratios(ours, alone)), "target": "≤ 1.03"},
            "plain script, NCHW fp32 / a run of ours": spread(ratios(plain, ours)),
        },
        [
            {
                "step": name,
                "pictures/s": spread([batch / each for each in found]),
                "ms": spread([1e3 * s for s in found]),
            }
            for name, found in seconds.items()
        ],
        note=(
            "By hand: torchvision's network in a bare loop on one batch in memory, nothing decoded and nothing logged. "
            f"Best eager setting: channels_last, {precision} autocast. Our network alone: the same bare loop, in the "
            "process of the run, which keeps the memory that it frees; the scripts have a process of their own. A run "
            "of ours decodes, crops and flips JPEGs of 500 × 375. The first step of each round is left out."
        ),
    )


if __name__ == "__main__":
    main()
