"""Run folders of many classes and pictures that nobody trained: scores of random logits, a log, a small network."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import isthmus
from isthmus.arch.preprocess import IMAGENET
from isthmus.data.pictures import Pictures
from isthmus.data.sources import DataSet
from isthmus.evaluation.metrics import Tally
from isthmus.train.recipes import recipe
from small_runs import SPEC, network

STEPS, PART = 20, 5_000


def made_up_run(
    folder: Path, photos: Sequence[Path], *, classes: int = 1_000, pictures: int = 50_000, epochs: int = 100
) -> DataSet:
    """A finished run in `folder`, and its pictures, which are the same few photos over and over."""
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    names = tuple(f"<b>class</b> {place} & “{chr(97 + place % 26) * 12}”" for place in range(classes))
    labels = torch.randint(0, classes, (pictures,), generator=random)
    held = Pictures.of_files([photos[place % len(photos)] for place in range(pictures)], labels.numpy(), names)
    scores = Tally(names, held.name)
    for places in torch.arange(pictures).split(PART):
        logits = torch.randn(len(places), classes, generator=random)
        logits[torch.arange(len(places)), labels[places]] += 3.5
        scores.add(logits, labels[places], places)
    net = network(replace(SPEC, num_classes=classes))
    net.classes, net.preprocess = names, IMAGENET  # pictures as large as usual
    isthmus.save_weights(net, folder / "model.safetensors")
    written = scores.to_dict() | {"data": "made up", "seconds": 90_000.0}
    (folder / "evaluation.json").write_text(json.dumps(written))
    (folder / "recipe.toml").write_text(recipe("scratch", data="made up", arch="resnet50", epochs=epochs).to_toml())
    machine = {"device": "cpu", "name": "a <fast> one", "precision": "fp32", "cores": 2, "memory": 2**34}
    about = {"machine": machine, "processes": 8, "precision": "fp32", "versions": {"torch": "2.9"}}
    (folder / "environment.json").write_text(json.dumps(about))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log(epochs)))
    return DataSet(name="made up", train=held, val=held)


def log(epochs: int) -> list[dict[str, float]]:
    """The rows of a run whose loss falls and whose accuracy rises."""
    rows: list[dict[str, float]] = []
    for epoch in range(1, epochs + 1):
        for step in range(1, STEPS + 1):
            done = epoch - 1 + step / STEPS
            row = {
                "epoch": epoch,
                "step": round(done * STEPS),
                "loss": 7 / (1 + done / 5),
                "lr": 0.1 * (1 - done / epochs),
            }
            rows.append(row | {"pictures_per_second": 900.0, "memory": 2**30, "time": 0.0})
        rows.append(
            {
                "epoch": epoch,
                "loss": 7 / (1 + epoch / 5),
                "lr": 0.1 * (1 - epoch / epochs),
                "pictures_per_second": 900.0,
                "val_accuracy": 0.7 * epoch / epochs,
                "val_balanced_accuracy": 0.69 * epoch / epochs,
                "val_loss": 7 / (1 + epoch / 6),
                "time": 0.0,
            }
        )
    return rows
