"""A look inside networks on pictures from where they are named: what the Python names and the command line share."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from isthmus.data.loader import Loader
from isthmus.data.order import permutation
from isthmus.data.pictures import Pictures
from isthmus.data.sources import open_pictures
from isthmus.data.unlabelled import open_unlabelled
from isthmus.diagnose.diagnosis import diagnose
from isthmus.diagnose.findings import Diagnosis
from isthmus.errors import DataError, RunError
from isthmus.messages import first_line
from isthmus.nn.batchnorm import freeze_batchnorm
from isthmus.nn.freeze import freeze
from isthmus.nn.network import ResNet
from isthmus.runtime import keep_freed_memory, machine
from isthmus.train.folder import ENVIRONMENT, evaluation_pictures, own_pictures
from isthmus.train.loss import Objective, class_weights
from isthmus.train.optim import make_optimizer
from isthmus.train.prefix import frozen_at
from isthmus.train.recipe import Recipe
from isthmus.train.reporter import Reporter
from isthmus.weights.load import load

__all__ = ["as_trained", "diagnosis"]

PICTURES = 64  # tell a channel's mean to an eighth of its deviation between pictures, in seconds


def diagnosis(
    run: Path | str | ResNet,
    data: str | Pictures = "",
    *,
    pictures: int = PICTURES,
    device: str | None = None,
    reporter: Reporter | None = None,
) -> Diagnosis:
    """What ails the network of a run, of a weight file or at hand, measured on `pictures` of the pictures named.

    `data` names them as `open_data` or `open_unlabelled` take them; without it they are the run's own validation
    pictures. Of a run, what it froze counts as frozen, and steps are those of its recipe at the peak rate. A network at
    hand stays as it is, bit for bit, and where it is: `device` is of the others. Tensors:
    `isthmus.diagnose.diagnosis.diagnose`. Raises RunError where no pictures are named.
    """
    keep_freed_memory()
    reporter = reporter or Reporter()
    if pictures < 2:
        raise DataError(f"pictures is {pictures}; a diagnosis needs 2 or more, better {PICTURES}")
    if isinstance(run, ResNet):
        if device is not None:
            raise RunError("a network at hand is diagnosed where it is; leave out device, or move it by net.to(device)")
        if isinstance(data, str) and not data:
            raise RunError("a network at hand does not say what it was trained on; name the pictures with data")
        found = labelled(data, run, reporter) if isinstance(data, Pictures) else pictures_of(data, run, reporter)
        return diagnose(run, *some(found, run, pictures))
    folder, net = Path(run), load(run).to(machine(device).torch_device)
    recipe = own_pictures(folder, "")
    own = isinstance(data, str) and own_pictures(folder, data) is not None
    if isinstance(data, Pictures):
        found = labelled(data, net, reporter)
    elif own or not data:
        found = evaluation_pictures(folder, net.classes, data)
    else:
        found = pictures_of(data, net, reporter)
    kind = "validation pictures of the run" if own else "pictures"
    reporter.say(f"{min(pictures, len(found))} of {len(found)} {kind}")
    skips = (own or isinstance(data, Pictures)) and recipe is not None and recipe.unreadable == "skip"
    images, labels = some(found, net, pictures, skips=skips)
    if recipe is None:
        return diagnose(net, images, labels)
    return diagnose(
        as_trained(net, recipe),
        images,
        labels,
        batch=seen_at_once(recipe, folder),
        make_optimizer=lambda net: optimizer_at_peak(net, recipe),
        loss=lambda logits, labels: mean_loss(recipe, found, logits, labels),
    )


def pictures_of(data: str, net: ResNet, reporter: Reporter) -> Pictures:
    """The pictures that are named, labelled where they are and the network knows their classes."""
    try:
        found = open_pictures(data)
    except DataError as error:
        loose = open_unlabelled(data)
        reporter.say(f"the pictures count as unlabelled: {first_line(error)}")
        return loose
    return labelled(found, net, reporter)


def labelled(found: Pictures, net: ResNet, reporter: Reporter) -> Pictures:
    """Pictures under the network's classes, unlabelled where it does not know them all."""
    if found.classes == net.classes or (not net.classes and len(found.classes) == net.spec.num_classes):
        return found
    unknown = [name for name in found.used() if name not in net.classes]
    if not unknown:
        return found.under(net.classes)
    reporter.say(f"the pictures count as unlabelled: the network does not know the class {unknown[0]!r}")
    return Pictures.stored(found.store, [-1] * len(found.store), ()).subset(found.places)


def some(found: Pictures, net: ResNet, count: int, *, skips: bool = False) -> tuple[Tensor, Tensor | None]:
    """`count` pictures drawn from all: uint8 (N, C, H, W), and their labels where every one has one."""
    drawn = found.subset(permutation(len(found), 0, 0)[:count])
    loader = Loader(
        pictures=drawn, record=net.preprocess, batch_size=count, train=False, on_error="skip" if skips else "raise"
    )
    batches = list(loader.epoch(0))
    labels = torch.cat([batch.labels for batch in batches])
    return torch.cat([batch.images for batch in batches]), labels if bool((labels >= 0).all()) else None


def as_trained(net: ResNet, recipe: Recipe) -> ResNet:
    """A run's network with frozen what was frozen at its end, in place: layers, and statistics that did not move.

    Those in the head of a probe are of the features that it was fitted to, once.
    """
    until = frozen_at(recipe, net.stages, recipe.epochs - 1)
    freeze(net, until if until in ("none", "stem", *net.stages) else "trunk")
    for name, child in net.named_children():
        if is_probe(recipe) if name == "fc" else not recipe.train_norm:
            freeze_batchnorm(child)
    return net


def is_probe(recipe: Recipe) -> bool:
    """Whether a run fits a head on features that are computed once."""
    return recipe.freeze == "trunk" and not recipe.unfreeze_epochs


def seen_at_once(recipe: Recipe, folder: Path) -> int:
    """Pictures that a batch norm saw at once; 0 for a probe, which fits its head on all features."""
    if is_probe(recipe):
        return 0
    try:
        processes = int(json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))["processes"])
    except (OSError, ValueError, KeyError, TypeError):  # a run of before, or a folder without it: it was one process
        processes = 1
    share = recipe.micro_batch or recipe.batch_size // processes
    return share * (processes if recipe.sync_norm else 1)


def optimizer_at_peak(net: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser with the rate of each group at its peak."""
    assert isinstance(net, ResNet)  # noqa: S101 - a copy of one
    optimizer = make_optimizer(net, recipe)
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr * group["lr_factor"]
    return optimizer


def mean_loss(recipe: Recipe, found: Pictures, logits: Tensor, labels: Tensor) -> Tensor:
    """The recipe's loss, the classes weighted as it says."""
    balanced = recipe.balance == "weights" and len(found.classes) == logits.shape[1]
    weights = class_weights(list(found.counts().values())).to(logits.device) if balanced else None
    objective = Objective(kind=recipe.loss, smoothing=recipe.label_smoothing, weights=weights)
    return objective(logits, labels) / len(labels)
