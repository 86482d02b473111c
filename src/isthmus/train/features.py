"""Features of a frozen trunk: every picture and view goes through the network once, and never again while cached."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from isthmus import records
from isthmus.arch.plan import plan
from isthmus.arch.spec import HeadSpec
from isthmus.data.augment import views as seen_in
from isthmus.data.loader import Loader
from isthmus.data.pictures import Pictures
from isthmus.errors import RunError
from isthmus.evaluation.inference import Inference
from isthmus.nn.network import ResNet
from isthmus.runtime import Machine, Precision, versions
from isthmus.train.checkpoint import load_state, save_state
from isthmus.train.reporter import Reporter

__all__ = ["cache_folder", "extract", "with_head"]


def cache_folder() -> Path:
    """Where features are kept: $ISTHMUS_CACHE, or isthmus in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ISTHMUS_CACHE") or Path(base) / "isthmus") / "features"


def with_head(net: ResNet, head: HeadSpec, num_classes: int) -> ResNet:
    """The same trunk under another head, its weights shared, stages that the head does not need left out."""
    depth = max((net.stages.index(tap) + 1 if tap in net.stages else 1) for tap in head.taps)  # at least one stage
    stages = net.spec.stages if "last" in head.taps else net.spec.stages[:depth]
    if net.spec.preact:  # the final norm fits the last stage alone
        stages = net.spec.stages
    spec = replace(net.spec, head=head, num_classes=num_classes, stages=stages)
    other = ResNet(plan(spec, net.plan.image_size))
    state = other.state_dict()
    for key, value in net.state_dict().items():
        if key in state and not key.startswith("fc."):
            state[key] = value
    other.load_state_dict(state, assign=True)
    other.preprocess, other.classes = net.preprocess, net.classes
    return other.train(net.training)


def extract(
    net: ResNet, pictures: Pictures, machine: Machine, precision: Precision, batch_size: int, reporter: Reporter
) -> Tensor:
    """Pooled features (views, N, features) of `pictures` in the views of `net.preprocess`, fp32.

    They are cached by weights, preprocessing, precision and pictures; interrupted, the pictures done so far are kept.
    """
    order = sorted(range(len(pictures)), key=pictures.name)
    ordered = pictures.subset(order)
    views = net.preprocess.views
    path = cache_folder() / f"{fingerprint(net, ordered, precision)}.pt"
    done, values = read_cache(path, (len(views), len(ordered), net.plan.num_features))
    if done < len(ordered):
        runner = Inference(net, machine, precision)
        loader = Loader(
            pictures=ordered.subset(range(done, len(ordered))),
            record=net.preprocess,
            batch_size=batch_size,
            train=False,
        )
        try:
            for batch in loader.epoch(0):
                rows = slice(done, done + len(batch.images))
                for place, view in enumerate(seen_in(batch.images, views)):
                    values[place, rows] = runner.pooled(view).cpu()
                done = rows.stop
                reporter.progress(f"features in {len(views)} views", done, len(ordered))
        finally:
            if done:
                write_cache(path, done, values, reporter)
    return values[:, torch.tensor(order).argsort()]


def fingerprint(net: ResNet, pictures: Pictures, precision: Precision) -> str:
    """A hash of all that decides the features: network, weights, preprocessing, precision, pictures."""
    described = {
        "spec": records.to_dict(net.spec),
        "preprocess": records.to_dict(net.preprocess),
        "precision": precision,
        "versions": versions(),
        "pictures": [pictures.identity(index) for index in range(len(pictures))],
    }
    digest = hashlib.sha256(json.dumps(described).encode())
    for key, value in net.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def read_cache(path: Path, shape: tuple[int, ...]) -> tuple[int, Tensor]:
    """How many pictures are cached, and room for all with these filled in; an unreadable cache counts as none."""
    try:
        found = load_state(path)
        done, values = found["done"], found["values"]
    except (RunError, KeyError):
        return 0, torch.empty(shape)
    return (done, values) if values.shape == shape else (0, torch.empty(shape))


def write_cache(path: Path, done: int, values: Tensor, reporter: Reporter) -> None:
    """Keep the features of the first `done` pictures; where that is not possible, say so and go on."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_state(path, {"done": done, "values": values})
    except (OSError, RunError) as error:
        reporter.say(f"the features are not kept for next time ({error}); $ISTHMUS_CACHE names another place")
