"""Claim: freezing pays. A ResNet-50 frozen until layer3, batches of 16 at 224 px, one optimiser step.

Each peer is a process of its own (memory settings are a process's), and they step in turn. From a uint8 batch in
memory, or with `cached outputs` from the disk, to the weights after SGD with momentum; loading is not counted.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

import torch
import torchvision
from torch.nn import functional as F

import isthmus
from isthmus.data.augment import Augment
from isthmus.data.loader import Loader
from isthmus.data.sources import DataSet, elpv_pictures
from isthmus.runtime import keep_freed_memory, machine
from isthmus.train.outputs import PrefixOutputs, turns_of
from isthmus.train.prefix import Prefix
from isthmus.train.recipe import Recipe
from isthmus.train.reporter import Reporter
from isthmus.train.state import RunState
from isthmus.train.step import Behind, Forward, move
from measure import ratios, spread, write_result

BATCH, FROZEN, CLASSES = 16, ("conv1", "bn1", "layer1", "layer2", "layer3"), 2
AUGMENT = Augment(crop_scale=())
ROUNDS, WARM_UP = 11, 3


def by_hand(*, fast: bool):
    """What a good script does: torchvision's network, frozen parts in evaluation, without gradients."""
    net = torchvision.models.resnet50(num_classes=CLASSES)
    if fast:
        net.to(memory_format=torch.channels_last)
    net.train()
    for name in FROZEN:
        net.get_submodule(name).eval().requires_grad_(requires_grad=False)
    optimizer = torch.optim.SGD(
        [p for p in net.parameters() if p.requires_grad], lr=1e-3, momentum=0.9, weight_decay=1e-4
    )
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    pictures, labels = (
        torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8),
        torch.randint(0, CLASSES, (BATCH,)),
    )

    def step() -> None:
        images = ((pictures / 255) - mean) / std
        if fast:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            logits = net(images)
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return step


def ours(*, cached: bool):
    """The pieces of `isthmus train --freeze layer3`."""
    keep_freed_memory()
    here, pictures = machine("cpu"), elpv_pictures().subset(range(4 * BATCH))
    recipe = Recipe(
        data="elpv", weights="demo", freeze="layer3", batch_size=BATCH, augment=AUGMENT, epochs=10**6, train_norm=True
    )
    net = isthmus.create("resnet50", num_classes=CLASSES).to(memory_format=torch.channels_last).train()
    isthmus.freeze(net, "layer3")
    model = Behind(net)
    forward = Forward.of(net, DataSet(name="elpv", train=pictures, val=pictures), recipe, here, here.precision)
    state = RunState.start(net, recipe, here.torch_device, scaled=False)
    prefix = Prefix(net, "layer3", here, here.precision)
    loader = Loader(pictures=pictures, record=net.preprocess, batch_size=BATCH, train=True, augment=AUGMENT)
    outputs = PrefixOutputs(net, prefix, pictures, net.preprocess, turns_of(AUGMENT), Reporter())
    if cached:
        for _ in outputs.all():
            pass
        batches = (batch for epoch in range(10**6) for batch in outputs.batches(loader, epoch))
    else:
        kept = list(loader.epoch(0))
        batches = (batch for _ in range(10**6) for batch in kept)

    def step() -> None:
        inputs = forward.inputs(next(batches), prefix, 0)
        (forward.loss(model, inputs) / BATCH).backward()
        move(state, recipe, loader.steps)

    return step


PEERS = {
    "the usual script": lambda: by_hand(fast=False),
    "by hand": lambda: by_hand(fast=True),
    "ours": lambda: ours(cached=False),
    "ours, cached outputs": lambda: ours(cached=True),
}


def serve(peer: str) -> None:
    """Step when told to, and say how long it took."""
    torch.set_num_threads(machine("cpu").cores)
    torch.manual_seed(0)
    step = PEERS[peer]()
    print("ready", flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        step()
        print(time.perf_counter() - begun, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", choices=PEERS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    if arguments.peer:
        serve(arguments.peer)
        return
    seconds: dict[str, list[float]] = {name: [] for name in PEERS}
    with tempfile.TemporaryDirectory() as cache:
        workers = {
            name: subprocess.Popen(
                [sys.executable, __file__, "--peer", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"ISTHMUS_CACHE": cache},
            )
            for name in PEERS
        }
        for worker in workers.values():
            worker.stdout.readline()
        for turn in range(WARM_UP + arguments.rounds):
            for name, worker in workers.items():
                worker.stdin.write("step\n")
                worker.stdin.flush()
                took = float(worker.stdout.readline())
                if turn >= WARM_UP:
                    seconds[name].append(took)
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    script, hand, computed, cached = seconds.values()
    write_result(
        "freeze",
        __doc__,
        {
            "by hand (channels_last, bf16 autocast) / ours": {**spread(ratios(hand, computed)), "target": ">= 1"},
            "the usual script (NCHW, fp32) / ours": {**spread(ratios(script, computed)), "target": ">= 2"},
            "the usual script / ours with cached outputs": {**spread(ratios(script, cached)), "target": ">= 4.5"},
            **{f"one step, {name}": {**spread(values), "unit": "s"} for name, values in seconds.items()},
        },
    )


if __name__ == "__main__":
    main()
