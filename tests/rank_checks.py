"""What several processes compute together and one computes alone: `python rank_checks.py OUT` in each of them.

Every check is a function of a World; the test compares what rank 0 found in a world of many with the same function in
a world of one.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.arch.memory import Memory
from isthmus.data.loader import Loader
from isthmus.data.sources import open_pictures
from isthmus.evaluation.inference import Inference
from isthmus.evaluation.metrics import Tally
from isthmus.nn.batchnorm import BATCH_NORM, freeze_batchnorm, synchronise_batchnorm
from isthmus.nn.freeze import freeze
from isthmus.nn.memory import save_memory
from isthmus.runtime import machine
from isthmus.train.distributed import World, accumulated, joined, parallel, share_buffers
from oracles import random_state
from small_runs import SPEC, class_folders, network

BATCH, MICRO = 12, 6
SPECS = {
    "bottleneck": SPEC,
    "pre-activation": replace(SPEC, stages=tuple(replace(stage, block="preact_bottleneck") for stage in SPEC.stages)),
    "attention": replace(SPEC, attention="se", attention_ratio=0.25),
}


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def own(whole: Tensor, world: World) -> Tensor:
    """This rank's share of a batch; shares differ in size wherever that is possible."""
    cuts = [round(len(whole) * (rank / world.size) ** 1.3) for rank in range(world.size + 1)]
    return whole[cuts[world.rank] : cuts[world.rank + 1]]


def together(part: Tensor, world: World) -> Tensor:
    """The shares of all ranks, one behind the other."""
    return torch.cat(world.gather(part))


def norms(world: World) -> dict[str, Tensor]:
    """Two steps of each kind of batch norm, with all that comes out of them."""
    found = {}
    for dims, options, dtype in (
        (1, {}, torch.float64),
        (2, {"momentum": None, "eps": 1e-3}, torch.float64),
        (2, {"affine": False}, torch.float64),
        (2, {"track_running_stats": False}, torch.float64),
        (2, {}, torch.float32),
        (2, {}, torch.bfloat16),
        (3, {"momentum": 0.3}, torch.float64),
    ):
        norm = BATCH_NORM[dims](5, **options).double()
        norm.load_state_dict(random_state(norm))
        norm.to(torch.float64 if dtype == torch.float64 else torch.float32)
        assert synchronise_batchnorm(norm) == 1
        for step in range(2):
            values = torch.randn(7, 5, *(4,) * dims, generator=random(step), dtype=torch.float64) * 3 + 40
            layout = torch.channels_last if dims == 2 else torch.contiguous_format
            x = own(values, world).to(dtype).contiguous(memory_format=layout).requires_grad_()
            pull = own(torch.randn(values.shape, generator=random(9), dtype=torch.float64), world)
            y = norm(x)
            assert y.dtype == dtype
            assert y.is_contiguous(memory_format=layout)
            (y.double() * pull).sum().backward()
            assert x.grad.is_contiguous(memory_format=layout)
            for name, value in {"y": y.detach(), "dx": x.grad}.items():
                found[f"{dims} {options} {dtype} {step} {name}"] = together(value, world)
        for name, parameter in norm.named_parameters():
            found[f"{dims} {options} {dtype} {name}"] = world.sum(parameter.grad)
        for name, buffer in norm.named_buffers():
            found[f"{dims} {options} {dtype} {name}"] = buffer
    return found


def trained(
    world: World,
    spec: str = "bottleneck",
    *,
    steps: int = 4,
    until: str = "none",
    norm: str = "synchronised",
    memory: Memory = "plain",
    anew: bool = False,
) -> Tensor:
    """All weights and statistics after some steps of two micro-batches each, in fp64."""
    net = network(SPECS[spec]).double()
    freeze(net, until)
    if norm == "frozen":
        freeze_batchnorm(net)
    if norm != "plain":
        assert (synchronise_batchnorm(net) > 0) == (norm == "synchronised")
    save_memory(net, memory)
    model = parallel(net.train(), world)
    optimiser = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    for step in range(steps):
        images = torch.randn(BATCH, 3, 17, 17, generator=random(step), dtype=torch.float64)
        labels = torch.randint(0, 7, (BATCH,), generator=random(step))
        optimiser.zero_grad()
        for part in range(0, BATCH, MICRO):
            with accumulated(model, last=part + MICRO == BATCH):
                logits = model(own(images[part : part + MICRO], world))
                loss = nn.functional.cross_entropy(logits, own(labels[part : part + MICRO], world), reduction="sum")
                (loss / BATCH).backward()
        optimiser.step()
        if step == steps // 2 and anew:
            model = parallel(net, world)
        if step == steps // 2 and until == "layer1":  # one more part thaws
            freeze(net, "stem")
            model = parallel(net, world)
            optimiser = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    share_buffers(net, world)
    weights = torch.cat([value.double().flatten() for value in net.state_dict().values()])
    for other in world.gather(weights):
        assert torch.equal(other, weights)
    return weights


def half_precision(world: World) -> Tensor:
    """Gradients of one step under autocast."""
    net = network()
    synchronise_batchnorm(net)
    model = parallel(net.train().to(memory_format=torch.channels_last), world)
    images = torch.randn(BATCH, 3, 17, 17, generator=random(0)).contiguous(memory_format=torch.channels_last)
    with accumulated(model, last=True):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(own(images, world))
        logits.float().square().sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


def scores(world: World) -> dict[str, Any]:
    """A tally of pictures that are divided unevenly."""
    logits = torch.randn(101, 7, generator=random(0))
    tally = Tally(tuple("abcdefg"), str)
    labels = torch.randint(0, 7, (101,), generator=random(1))
    tally.add(own(logits, world), own(labels, world), own(torch.arange(101), world))
    return tally.over(world).to_dict()


def evaluated(world: World) -> dict[str, Any]:
    """The scores of a network on 23 pictures, of which each process reads its share."""
    with TemporaryDirectory() as folder:
        pictures = open_pictures(str(class_folders(Path(folder) / "pictures", {"brick": 5, "flower": 10, "grass": 8})))
        net = network(replace(SPEC, num_classes=3))
        loader = Loader(
            pictures=pictures, record=net.preprocess, batch_size=6, train=False, rank=world.rank, ranks=world.size
        )
        found = Inference(net, machine("cpu"), "fp32").evaluate(loader, world).to_dict()
        assert found["mistakes"]
        names = [
            str(Path(row["name"]).relative_to(folder)) for row in found["mistakes"]
        ]  # each rank has its own folder
        rows = [row | {"name": name} for row, name in zip(found["mistakes"], names, strict=True)]
        return found | {"mistakes": rows}


def words(world: World) -> dict[str, Any]:
    """What ranks tell each other, in a form that does not depend on their number."""
    mine = {"rank": world.rank, "text": "é" * world.rank, "state": torch.arange(world.rank + 1)}
    every = world.gather(mine)
    assert [each["rank"] for each in every] == list(range(world.size))
    assert all(torch.equal(each["state"], torch.arange(place + 1)) for place, each in enumerate(every))
    world.barrier("the middle")
    kept = torch.ones(2)
    total = world.sum(kept)
    assert total.tolist() == [world.size] * 2
    return {
        "some": world.any(world.rank == world.size - 1),
        "none": world.any(False),
        "untouched": kept.tolist(),
        "mains": sum(world.gather(world.main)),
        "threads": torch.get_num_threads() if world.size > 1 else 1,
    }


RUNS: dict[str, Callable[[World], Tensor]] = {
    "bottleneck, twenty steps": lambda world: trained(world, steps=20),
    "pre-activation": lambda world: trained(world, "pre-activation"),
    "attention": lambda world: trained(world, "attention"),
    "frozen stem": lambda world: trained(world, until="stem"),
    "thawing": lambda world: trained(world, until="layer1"),
    "recomputed": lambda world: trained(world, memory="recompute"),
    "checkpointed": lambda world: trained(world, memory="checkpoint"),
    "wrapped anew": lambda world: trained(world, "pre-activation", anew=True),
    "frozen norms": lambda world: trained(world, norm="frozen"),
}
CHECKS: dict[str, Callable[[World], Any]] = RUNS | {
    "norms": norms,
    "half precision": half_precision,
    "plain norms": lambda world: trained(world, norm="plain"),
    "scores": scores,
    "evaluated": evaluated,
    "words": words,
}

if __name__ == "__main__":
    with joined() as world:
        found = {name: check(world) for name, check in CHECKS.items()}
        if world.main:
            torch.save(found, Path(sys.argv[1]))
