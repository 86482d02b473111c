"""Gradient training, top to bottom: one loop for one process and for many, exact on resume, that saves itself."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isthmus.data.cache import Resized
from isthmus.data.loader import Batch, Loader
from isthmus.data.rate import loader_rate
from isthmus.data.sources import DataSet
from isthmus.errors import MissingExtraError, RecipeError
from isthmus.evaluation.inference import Inference
from isthmus.evaluation.metrics import Tally
from isthmus.messages import listed
from isthmus.nn.batchnorm import freeze_batchnorm, synchronise_batchnorm
from isthmus.nn.freeze import freeze, frozen_sums, require_unmoved
from isthmus.nn.memory import save_memory, work_in_place
from isthmus.nn.network import ResNet
from isthmus.runtime import Machine, Precision
from isthmus.train.checkpoint import BEST, Checkpoints
from isthmus.train.compiled import try_compiling
from isthmus.train.distributed import World, accumulated, parallel
from isthmus.train.log import Log, write_tensorboard
from isthmus.train.outputs import PrefixOutputs
from isthmus.train.pace import Pace, binding
from isthmus.train.prefix import Prefix, frozen_at
from isthmus.train.recipe import Recipe
from isthmus.train.reporter import Reporter
from isthmus.train.schedule import rate, training_size
from isthmus.train.state import RunState
from isthmus.train.step import Behind, Forward, move
from isthmus.train.watch import Watch, first_not_finite, memory_explained, memory_in_use, not_finite

__all__ = ["LOG", "Interrupted", "left_out", "train_network"]

LOG = "log.jsonl"
ROWS = 20  # of an epoch in the log
LOOK = 10  # micro-batches before the run says whether loader or network binds


class Interrupted(KeyboardInterrupt):
    """The run was told to stop, and its state is saved."""


def train_network(
    net: ResNet,
    data: DataSet,
    recipe: Recipe,
    machine: Machine,
    run: Path,
    reporter: Reporter,
    world: World | None = None,
    *,
    resume: bool = False,
) -> tuple[ResNet, Tally]:
    """Train `net` in place; the network to use (the averaged one with `recipe.ema`, else `net`) and its scores.

    Writes in the folder `run`: `log.jsonl` (and TensorBoard's files from it, where that is installed),
    `best.safetensors`, and `checkpoints/` at the end of every epoch, every `recipe.save_every` steps, and on Ctrl-C or
    SIGTERM. Raises Interrupted after saving, RunError when the loss is not a number, the memory does not suffice, or
    the state cannot be saved or read.
    """
    world, device = world or World(), machine.torch_device
    precision: Precision = machine.precision if recipe.precision == "auto" else recipe.precision
    torch.manual_seed(recipe.seed + world.rank)
    net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, child in net.named_children():
        if name != "fc" and not recipe.train_norm:  # the head's own norm follows its features as they move
            freeze_batchnorm(child)
    if recipe.sync_norm:
        synchronise_batchnorm(net)
    work_in_place(net)
    if plain_only := save_memory(net, recipe.memory):
        reporter.say(f"{listed(plain_only)} cannot recompute its parts and is run twice as a whole")
    forward = Forward.of(net, data, recipe, machine, precision)
    state = RunState.start(net, recipe, device, scaled=precision == "fp16")
    checkpoints, saved = Checkpoints(run), None
    if resume and (saved := checkpoints.latest(reporter)):
        state.restore(saved, world)
    elif resume:
        reporter.say(f"{run} holds no checkpoint; training begins anew")
    log = Log(run / LOG, saved["log"] if saved else 0, reporter) if world.main else None
    watch = Watch(device, gradients=precision != "fp16")
    resized = Resized(data.train, recipe.resized, net.preprocess, rank=world.rank) if recipe.resized else None
    scores, prefix, outputs, alone = Tally(data.classes), None, None, None

    with stop_signals(reporter) as stop, memory_explained(net, recipe, machine, precision, world.size):
        for epoch in range(state.epoch, recipe.epochs):
            train = training_loader(data, recipe, net, epoch, world, resized)
            require_statistics(net, recipe, train)
            until = frozen_at(recipe, net.stages, epoch)
            name, size, every = f"epoch {epoch + 1}/{recipe.epochs}", train.step_size, -(-train.steps // ROWS)
            if prefix is None:
                reporter.say(
                    f"{recipe.epochs} epochs of {train.steps} steps of {size} pictures, {train.size} px, peak rate "
                    f"{recipe.lr:g}, on {machine.device} in {precision}; the run is in {run}"
                )
            if prefix is None or prefix.until != until:
                freeze(net, until)
                before, prefix, outputs = frozen_sums(net), Prefix(net, until, machine, precision), None
                trained: nn.Module = Behind(net)
                if state.compiled:  # not tried again: noise could decide otherwise, and the bits would be others
                    trained = torch.compile(trained)  # type: ignore[assignment]
                model, compiling = parallel(trained, world), recipe.compile and state.compiled is None
            if outputs is None or recipe.start_size:
                outputs = PrefixOutputs.where_possible(net, prefix, train, reporter)
                if prefix.after and epoch == state.epoch:
                    kept = "its outputs are kept" if outputs else "its outputs are computed each time"
                    reporter.say(f"frozen until {until}: {kept}")
            if alone is None and train.steps > LOOK and outputs is None:
                alone = loader_rate(train)
            batches = outputs.batches(train, epoch, state.step) if outputs else train.epoch(epoch, state.step)
            pace, taken, row = Pace(), list[Batch](), dict[str, Any]()
            net.train()
            for batch in pace.over(batches):
                inputs, taken = forward.inputs(batch, prefix, epoch), [*taken, batch]
                if compiling:
                    trained, trial = try_compiling(trained, partial(forward.loss, inputs=inputs), device, world)
                    model, state.compiled, compiling = parallel(trained, world), trial.wins, False
                    reporter.say(str(trial))
                last = batch.part == batch.parts - 1
                with accumulated(model, last=last):
                    loss = forward.loss(model, inputs)
                    state.losses += loss.detach()
                    watch.take(state.losses[0])
                    state.scaler.scale(loss / size).backward()  # type: ignore[no-untyped-call]
                if not last:
                    continue
                if world.any(not watch.fine(net), "a look at the loss"):
                    again = (forward.loss(Behind(net), forward.inputs(each, prefix, epoch)) for each in taken)
                    names = [data.train.name(index) for each in taken for index in each.indices.tolist()]
                    raise not_finite(
                        world.gather((*first_not_finite(net, again), names)),
                        loss=watch.loss(),
                        epoch=epoch + 1,
                        step=state.step + 1,
                        lr=recipe.lr,
                        checkpoint=next(iter(checkpoints.files()), None),
                    )
                (lr, norm), taken = move(state, recipe, train.steps), []
                done, ends = epoch * train.steps + state.step, state.step == train.steps
                if state.step % every == 0 or ends:
                    row = {
                        "epoch": epoch + 1,
                        "step": done,
                        "loss": state.recent_loss(world, size * ((state.step - 1) % every + 1)),
                        "lr": lr,
                    }
                    row |= {"pictures_per_second": pace.rate * world.size, "memory": memory_in_use(device)}
                    row |= {} if norm is None else {"gradient_norm": float(norm)}
                    if log is not None:
                        log.add(row)
                whole_run = recipe.epochs * train.steps * size
                reporter.progress("train", done * size, whole_run, row | {"epoch": epoch + 1})
                if alone and pace.batches >= LOOK:
                    reporter.say(binding(alone * world.size, pace.step_rate * world.size))
                    alone = 0.0
                stopped = world.any(bool(stop))
                if stopped or ends or (recipe.save_every and state.step % recipe.save_every == 0):
                    whole = state.to_dict(world)
                    if log is not None:
                        checkpoints.save(whole | {"log": log.length()}, step=done)
                if stopped:
                    raise Interrupted(f"stopped in epoch {epoch + 1} after {state.step} of {train.steps} steps")

            require_unmoved(before, net)
            if resized is not None and resized.full and epoch == 0:
                reporter.say(f"not every picture is kept resized: {resized.full}")
            val = validation_loader(data, recipe, net, world)
            scores = Inference(state.used, machine, precision).evaluate(val, world)
            left_out(train, "train", world, reporter)
            left_out(val, "validation", world, reporter)
            row = {
                "epoch": epoch + 1,
                "loss": state.mean_loss(world, train.steps * size),
                "lr": rate(recipe, (epoch + 1) * train.steps - 1, train.steps),
                "pictures_per_second": pace.rate * world.size,
                "val_accuracy": scores.accuracy,
                "val_balanced_accuracy": scores.balanced_accuracy,
                "val_loss": scores.loss,
            }
            if log is not None:
                log.add(row)
                checkpoints.save_best(state.used, log.rows)
                with suppress(MissingExtraError):
                    write_tensorboard(log.rows, run / "tensorboard")
            state.begin_epoch(epoch + 1)
            reporter.say(
                f"{name}: loss {row['loss']:.3f}, validation {scores.accuracy:.1%} "
                f"(balanced {scores.balanced_accuracy:.1%}), {row['pictures_per_second']:.1f} pictures/s"
            )
    if log is not None:
        best = max((row for row in log.rows if "val_accuracy" in row), key=lambda row: float(row["val_accuracy"]))
        if best["val_accuracy"] > scores.accuracy:
            reporter.say(
                f"epoch {best['epoch']} validated best, {best['val_accuracy']:.1%}: its weights are in {run / BEST}"
            )
    return state.used, scores


def training_loader(
    data: DataSet, recipe: Recipe, net: ResNet, epoch: int, world: World, resized: Resized | None
) -> Loader:
    """The pictures of an epoch as this process sees them."""
    return Loader(
        pictures=data.train,
        record=net.preprocess,
        batch_size=recipe.batch_size,
        train=True,
        augment=recipe.augment,
        size=training_size(recipe, epoch, net.preprocess.crop),
        balanced=recipe.balance == "sampling",
        seed=recipe.seed,
        resized=resized,
        rank=world.rank,
        ranks=world.size,
        micro_batch=recipe.micro_batch,
        on_error=recipe.unreadable,
    )


def require_statistics(net: ResNet, recipe: Recipe, train: Loader) -> None:
    """Raise RecipeError where the head's batch norm would see a single picture, of which there is no variance."""
    least = min(part.stop - part.start for part in train.parts(0)) * (train.ranks if recipe.sync_norm else 1)
    if least == 1 and any(isinstance(module, nn.BatchNorm1d) for module in net.fc.modules()):
        raise RecipeError(
            f"a process would hold a single picture at once, and the head's batch norm needs two: batch_size is "
            f"{train.step_size}, micro_batch {recipe.micro_batch}, processes {train.ranks}; take larger ones, fewer "
            f"processes, or head=linear"
        )


def validation_loader(data: DataSet, recipe: Recipe, net: ResNet, world: World) -> Loader:
    """This process's share of the validation pictures."""
    return Loader(
        pictures=data.val,
        record=net.preprocess,
        batch_size=recipe.batch_size,
        micro_batch=recipe.micro_batch,
        train=False,
        on_error=recipe.unreadable,
        rank=world.rank,
        ranks=world.size,
    )


def left_out(loader: Loader, part: str, world: World, reporter: Reporter) -> set[int]:
    """The pictures that a process could not read and left out; the reporter is told why."""
    reasons = {index: reason for rank in world.gather(loader.unreadable) for index, reason in rank.items()}
    if reasons:
        listing = listed(reasons.values(), separator="; ")
        reporter.say(f"left out of the {part} pictures, {len(reasons)} that cannot be read: {listing}")
    return set(reasons)


@contextmanager
def stop_signals(reporter: Reporter) -> Iterator[list[int]]:
    """A list that Ctrl-C and SIGTERM write themselves into, so that the loop can stop between two steps.

    A second Ctrl-C ends the process at once. A second SIGTERM does not: schedulers and torchrun both send one.
    """
    received: list[int] = []
    handlers: dict[int, Any] = {}

    def receive(number: int, _frame: Any) -> None:
        received.append(number)
        reporter.say("stopping behind this step, to save it; Ctrl-C again ends the run at once")
        signal.signal(signal.SIGINT, handlers[signal.SIGINT])

    try:
        for wanted in (signal.SIGINT, signal.SIGTERM):
            handlers[wanted] = signal.signal(wanted, receive)
    except ValueError:  # not the main thread: the caller handles signals
        pass
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
