"""Gradient training, top to bottom: one loop, exact on resume, that saves itself when it is told to stop."""

import json
import math
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from isthmus.atomic import atomic_write
from isthmus.data.loader import Loader
from isthmus.data.sources import DataSet
from isthmus.data.transform import normalise
from isthmus.errors import RunError
from isthmus.evaluation.inference import Inference
from isthmus.nn.batchnorm import freeze_batchnorm
from isthmus.nn.freeze import freeze
from isthmus.nn.network import ResNet
from isthmus.runtime import Machine, Precision
from isthmus.train.checkpoint import load_state, random_state, restore_random_state, save_state
from isthmus.train.optim import learning_rate, make_optimizer
from isthmus.train.recipe import Recipe
from isthmus.train.reporter import Reporter

__all__ = ["CHECKPOINT", "LOG", "Interrupted", "train_network", "write_log"]

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"


class Interrupted(KeyboardInterrupt):
    """The run was told to stop, and its state is saved."""


def train_network(
    net: ResNet,
    data: DataSet,
    recipe: Recipe,
    machine: Machine,
    run: Path,
    reporter: Reporter,
    *,
    resume: bool = False,
) -> ResNet:
    """Train `net` in place and return the network to use: the averaged one with `recipe.ema`, else `net` itself.

    Writes `log.jsonl` and, at the end of every epoch and on Ctrl-C or SIGTERM, `checkpoint.pt` in the folder `run`.
    Raises Interrupted after saving, RunError when the loss is not a number or the state cannot be saved or read.
    """
    device = machine.torch_device
    precision: Precision = machine.precision if recipe.precision == "auto" else recipe.precision
    train = Loader(
        pictures=data.train,
        record=net.preprocess,
        batch_size=recipe.batch_size,
        train=True,
        augment=recipe.augment,
        seed=recipe.seed,
    )
    val = Loader(pictures=data.val, record=net.preprocess, batch_size=recipe.batch_size, train=False)
    total = recipe.epochs * train.steps
    warmup = min(round(recipe.warmup_epochs * train.steps), total // 2)  # however short the run, it also cools down

    net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, child in net.named_children():
        if name != "fc" and not recipe.train_norm:  # the head's own norm follows its features as they move
            freeze_batchnorm(child)
    freeze(net, recipe.freeze)
    optimizer = make_optimizer(net, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    blend = get_ema_multi_avg_fn(recipe.ema)  # type: ignore[no-untyped-call]
    average = AveragedModel(net, multi_avg_fn=blend, use_buffers=True) if recipe.ema else None
    parts: dict[str, Any] = {"net": net, "optimizer": optimizer, "scaler": scaler} | (
        {"average": average} if average else {}
    )
    weights = class_weights(data, device) if recipe.balance == "weights" else None
    checkpoint = run / CHECKPOINT
    first_epoch = step = seen = 0
    losses = torch.zeros((), device=device)
    rows: list[dict[str, Any]] = []
    torch.manual_seed(recipe.seed)
    if resume:
        state = load_state(checkpoint)
        try:
            for name, part in parts.items():
                part.load_state_dict(state[name])
        except (KeyError, ValueError, RuntimeError) as error:
            raise RunError(f"{checkpoint} is of another network or recipe than this run; start the run anew") from error
        restore_random_state(state["random"], device)
        first_epoch, step, seen, rows = state["epoch"], state["step"], state["seen"], state["log"]
        losses = state["losses"].to(device)

    with stop_signals() as stop:
        for epoch in range(first_epoch, recipe.epochs):
            net.train()
            began, before = time.perf_counter(), seen
            for batch in train.epoch(epoch, step):
                rate = learning_rate(epoch * train.steps + batch.step, peak=recipe.lr, warmup=warmup, total=total)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["lr_factor"]
                images = normalise(batch.images.to(device), net.preprocess).contiguous(
                    memory_format=torch.channels_last
                )
                with machine.autocast(precision):
                    logits = net(images)
                loss = F.cross_entropy(
                    logits.float(), batch.labels.to(device), weight=weights, label_smoothing=recipe.label_smoothing
                )
                optimizer.zero_grad()
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                scaler.step(optimizer)
                scaler.update()
                if average is not None:
                    average.update_parameters(net)
                seen, losses = seen + len(images), losses + loss.detach() * len(images)
                reporter.progress(
                    f"epoch {epoch + 1}/{recipe.epochs}",
                    batch.step * recipe.batch_size + len(images),
                    min(train.steps * recipe.batch_size, len(data.train)),
                )
                step = batch.step + 1
                if stop:
                    break
            speed = (seen - before) / (time.perf_counter() - began)
            mean_loss = float(losses) / max(seen, 1)
            if not math.isfinite(mean_loss):
                raise RunError(
                    f"the training loss is {mean_loss} in epoch {epoch + 1}; lower --lr (now {recipe.lr}); the state "
                    f"before this epoch is in {checkpoint}"
                    if epoch
                    else f"the training loss is {mean_loss} in the first epoch; lower --lr (now {recipe.lr})"
                )
            states: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
            place = {"epoch": epoch, "step": step, "seen": seen, "losses": losses, "log": rows}
            save_state(checkpoint, states | place | {"random": random_state(device)})
            if stop:
                raise Interrupted(f"stopped in epoch {epoch + 1} after {step} of {train.steps} steps")
            step, seen, losses = 0, 0, torch.zeros((), device=device)
            used = averaged(average) if average is not None else net
            scores = Inference(used, machine, precision).evaluate(val)
            row = {
                "epoch": epoch + 1,
                "loss": mean_loss,
                "lr": learning_rate((epoch + 1) * train.steps - 1, peak=recipe.lr, warmup=warmup, total=total),
                "pictures_per_second": speed,
                "val_accuracy": scores.accuracy,
                "val_balanced_accuracy": scores.balanced_accuracy,
                "val_loss": scores.loss,
            }
            rows = [*rows, row]
            write_log(run / LOG, rows)
            reporter.say(
                f"epoch {epoch + 1}/{recipe.epochs}: loss {mean_loss:.3f}, validation {scores.accuracy:.1%} "
                f"(balanced {scores.balanced_accuracy:.1%}), {speed:.1f} pictures/s"
            )
    return averaged(average) if average is not None else net


def averaged(average: AveragedModel) -> ResNet:
    """The network that holds the averaged weights."""
    return cast("ResNet", average.module)


def class_weights(data: DataSet, device: torch.device) -> Tensor:
    """Weights of the loss under which every class counts alike: pictures / (classes × pictures of the class)."""
    counts = torch.tensor(list(data.train.counts().values()), dtype=torch.float32, device=device)
    return counts.sum() / (len(counts) * counts)


def write_log(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON line a row, all rows anew, so that the log never tells of steps that the saved state has not taken."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that Ctrl-C and SIGTERM write themselves into, so that the loop can stop between two steps."""
    received: list[int] = []
    handlers = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, lambda signum, _frame: received.append(signum))
    except ValueError:  # not the main thread: the caller handles signals
        pass
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
