"""Gradient training, top to bottom: one loop for one process and for many, exact on resume, that saves itself."""

import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from isthmus.data.cache import Resized
from isthmus.data.loader import Batch, Loader
from isthmus.data.rate import loader_rate
from isthmus.data.sources import DataSet
from isthmus.errors import MissingExtraError, RecipeError, RunError
from isthmus.evaluation.inference import Inference
from isthmus.evaluation.metrics import Tally
from isthmus.messages import listed
from isthmus.nn.batchnorm import freeze_batchnorm, synchronise_batchnorm
from isthmus.nn.freeze import freeze, frozen_sums, require_unmoved
from isthmus.nn.memory import save_memory, work_in_place
from isthmus.nn.network import ResNet
from isthmus.runtime import Machine
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
from isthmus.train.step import Behind, Forward, Inputs, move
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
    world, scores = world or World(), Tally(data.classes)
    training = Training(net, data, recipe, machine, run, reporter, world, resume=resume)
    if training.state.epoch >= recipe.epochs:
        raise RunError(f"{run} has trained {training.state.epoch} epochs, and the recipe asks for {recipe.epochs} only")
    with stop_signals(reporter) as stop, memory_explained(net, recipe, machine, training.precision, world.size):
        for epoch in range(training.state.epoch, recipe.epochs):
            train = training.begin(epoch)
            pace = training.run_epoch(train, epoch, stop)
            scores = training.end(train, epoch, pace)
    training.name_best(scores)
    for each in (net, training.state.used):  # as a caller expects them: hooks and second derivatives work
        work_in_place(each, on=False)
        save_memory(each, "plain")
    return training.state.used, scores


class Training:
    """A run under way, as one of its processes sees it."""

    def __init__(
        self,
        net: ResNet,
        data: DataSet,
        recipe: Recipe,
        machine: Machine,
        run: Path,
        reporter: Reporter,
        world: World,
        *,
        resume: bool,
    ) -> None:
        self.net, self.data, self.recipe, self.machine = net, data, recipe, machine
        self.run, self.reporter, self.world, self.device = run, reporter, world, machine.torch_device
        self.precision = recipe.precision_on(machine)
        self.make_ready()
        self.forward = Forward.of(net, data, recipe, machine, self.precision)
        self.state = RunState.start(net, recipe, self.device, scaled=self.precision == "fp16")
        self.checkpoints, saved = Checkpoints(run), None
        if resume and (saved := self.checkpoints.latest(reporter)):
            self.state.restore(saved, world)
            reporter.say(f"going on in epoch {self.state.epoch + 1} after {self.state.step} of its steps")
        elif resume:
            reporter.say(f"{run} holds no checkpoint; training begins anew")
        self.log = Log(run / LOG, saved["log"] if saved else 0, reporter) if world.main else None
        self.watch = Watch(self.device, gradients=self.precision != "fp16")
        self.resized = Resized(data.train, recipe.resized, net.preprocess, rank=world.rank) if recipe.resized else None
        self.prefix: Prefix | None = None
        self.outputs: PrefixOutputs | None = None
        self.size = 0  # of the pictures that the outputs are of
        self.loader_rate: float | None = None  # of this process, 0 once it was told

    def make_ready(self) -> None:
        """Bring the network to its device, with batch norms and memory as the recipe says."""
        recipe = self.recipe
        torch.manual_seed(recipe.seed + self.world.rank)
        self.net.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for name, child in self.net.named_children():
            if name != "fc" and not recipe.train_norm:  # the head's own norm follows its features as they move
                freeze_batchnorm(child)
        if recipe.sync_norm:
            synchronise_batchnorm(self.net)
        work_in_place(self.net)
        if plain_only := save_memory(self.net, recipe.memory):
            self.reporter.say(f"{listed(plain_only)} cannot recompute its parts and is run twice as a whole")

    def begin(self, epoch: int) -> Loader:
        """Freeze and thaw what an epoch asks for; the loader of its pictures."""
        recipe, net = self.recipe, self.net
        train = training_loader(self.data, recipe, net, epoch, self.world, self.resized)
        require_statistics(net, recipe, train)
        until, first = frozen_at(recipe, net.stages, epoch), self.prefix is None
        if first:
            self.reporter.say(
                f"epochs: {recipe.epochs} of {train.steps} steps of {train.step_size} pictures, {train.size} px, peak "
                f"rate {recipe.lr:g}, on {self.machine.device} in {self.precision}; the run is in {self.run}"
            )
        if self.prefix is None or self.prefix.until != until:
            freeze(net, until)
            self.frozen, self.outputs = frozen_sums(net), None
            self.prefix = Prefix(net, until, self.machine, self.precision)
            if not first:
                self.reporter.say(f"epoch {epoch + 1}: frozen until {until}; what lies behind it trains")
            self.trained: nn.Module = Behind(net)
            if self.state.compiled:  # not tried again: noise could decide otherwise, and the bits would be others
                self.trained = torch.compile(self.trained)  # type: ignore[assignment]
            self.model = parallel(self.trained, self.world)
        if self.outputs is None or train.size != self.size:
            self.size = train.size
            self.outputs = PrefixOutputs.where_possible(net, self.prefix, train, self.reporter)
            if self.prefix.after and first:
                kept = "its outputs are kept" if self.outputs else "its outputs are computed each time"
                self.reporter.say(f"frozen until {until}: {kept}")
        if self.loader_rate is None and train.steps > LOOK and self.outputs is None:
            self.loader_rate = loader_rate(train)
        return train

    def run_epoch(self, train: Loader, epoch: int, stop: list[int]) -> Pace:
        """The steps of an epoch from where the state stands, and the pace that they went at.

        Raises Interrupted when a process was told to stop, its state saved.
        """
        recipe, state, prefix = self.recipe, self.state, cast("Prefix", self.prefix)
        batches = self.outputs.batches(train, epoch, state.step) if self.outputs else train.epoch(epoch, state.step)
        pace, taken, row = Pace(), list[Batch](), dict[str, Any]()
        size, every, whole_run = train.step_size, -(-train.steps // ROWS), recipe.epochs * train.steps * train.step_size
        self.net.train()
        for batch in pace.over(batches):
            inputs, taken = self.forward.inputs(batch, prefix, epoch), [*taken, batch]
            if recipe.compile and state.compiled is None:
                self.try_compiling(inputs)
            last = batch.part == batch.parts - 1
            with accumulated(self.model, last=last):
                loss = self.forward.loss(self.model, inputs)
                state.losses += loss.detach()
                self.watch.take(state.losses[0])
                state.scaler.scale(loss / size).backward()  # type: ignore[no-untyped-call]
            if not last:
                continue
            if self.world.any(not self.watch.fine(self.net), "a look at the loss"):
                raise self.explained(taken, epoch)
            (lr, norm), taken = move(state, recipe, train.steps), []
            done, ends = epoch * train.steps + state.step, state.step == train.steps
            if state.step % every == 0 or ends:
                row = {
                    "epoch": epoch + 1,
                    "step": done,
                    "loss": state.recent_loss(self.world, size * ((state.step - 1) % every + 1)),
                    "lr": lr,
                    "pictures_per_second": pace.rate * self.world.size,
                    "memory": memory_in_use(self.device),
                }
                row |= {} if norm is None else {"gradient_norm": float(norm)}
                self.note(row)
            self.reporter.progress("train", done * size, whole_run, row | {"epoch": epoch + 1})
            if self.loader_rate and pace.batches >= LOOK:
                self.reporter.say(binding(self.loader_rate * self.world.size, pace.step_rate * self.world.size))
                self.loader_rate = 0.0
            stopped = self.world.any(bool(stop))
            if stopped or ends or (recipe.save_every and state.step % recipe.save_every == 0):
                self.save(done)
            if stopped:
                raise Interrupted(f"stopped in epoch {epoch + 1} after {state.step} of {train.steps} steps")
        return pace

    def end(self, train: Loader, epoch: int, pace: Pace) -> Tally:
        """Check, validate and tell; the scores on the validation pictures."""
        recipe, state, world, reporter = self.recipe, self.state, self.world, self.reporter
        require_unmoved(self.frozen, self.net)
        if self.resized is not None and self.resized.full and epoch == 0:
            reporter.say(f"not every picture is kept resized: {self.resized.full}")
        val = validation_loader(self.data, recipe, self.net, world)
        told = partial(reporter.progress, "validate")
        scores = Inference(state.used, self.machine, self.precision).evaluate(val, world, progress=told)
        left_out(train, "train", world, reporter)
        left_out(val, "validation", world, reporter)
        row = {
            "epoch": epoch + 1,
            "loss": state.mean_loss(world, train.steps * train.step_size),
            "lr": rate(recipe, (epoch + 1) * train.steps - 1, train.steps),
            "pictures_per_second": pace.rate * world.size if pace.seen else None,  # resumed behind the last step
            "val_accuracy": scores.accuracy,
            "val_balanced_accuracy": scores.balanced_accuracy,
            "val_loss": scores.loss,
        }
        self.note(row)
        if self.log is not None:
            self.checkpoints.save_best(state.used, self.log.rows)
            with suppress(MissingExtraError):
                write_tensorboard(self.log.rows, self.run / "tensorboard")
        state.begin_epoch(epoch + 1)
        reporter.say(
            f"epoch {epoch + 1}/{recipe.epochs}: loss {row['loss']:.3f}, validation {scores.accuracy:.1%} "
            f"(balanced {scores.balanced_accuracy:.1%})"
            + (f", {row['pictures_per_second']:.1f} pictures/s" if pace.seen else "")
        )
        return scores

    def try_compiling(self, inputs: Inputs) -> None:
        """Train the compiled network from here on where it wins on this batch."""
        self.trained, trial = try_compiling(
            self.trained, partial(self.forward.loss, inputs=inputs), self.device, self.world
        )
        self.model, self.state.compiled = parallel(self.trained, self.world), trial.wins
        self.reporter.say(str(trial))

    def explained(self, taken: list[Batch], epoch: int) -> RunError:
        """Why the step of these batches gave no numbers; they run again for it."""
        prefix = cast("Prefix", self.prefix)
        again = (self.forward.loss(Behind(self.net), self.forward.inputs(each, prefix, epoch)) for each in taken)
        names = [self.data.train.name(index) for each in taken for index in each.indices.tolist()]
        return not_finite(
            self.world.gather((*first_not_finite(self.net, again), names)),
            loss=self.watch.loss(),
            epoch=epoch + 1,
            step=self.state.step + 1,
            lr=self.recipe.lr,
            checkpoint=next(iter(self.checkpoints.files()), None),
        )

    def note(self, row: dict[str, Any]) -> None:
        """Write a row of the log, where this process writes it."""
        if self.log is not None:
            self.log.add(row)

    def save(self, step: int) -> None:
        """Write a checkpoint; all processes give their part."""
        whole = self.state.to_dict(self.world)
        if self.log is not None:
            self.checkpoints.save(whole | {"log": self.log.length()}, step=step)

    def name_best(self, scores: Tally) -> None:
        """Say where the best weights are when the last ones are not the best."""
        if self.log is None:
            return
        best = max((row for row in self.log.rows if "val_accuracy" in row), key=lambda row: float(row["val_accuracy"]))
        if best["val_accuracy"] > scores.accuracy:
            self.reporter.say(
                f"epoch {best['epoch']} validated best, {best['val_accuracy']:.1%}: "
                f"its weights are in {self.run / BEST}"
            )


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
        alike = Counter(reasons.values())
        lines = (reason if count == 1 else f"{reason} ({count} pictures)" for reason, count in alike.items())
        listing = listed(lines, separator="; ")
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
        signal.signal(signal.SIGINT, handlers[signal.SIGINT])
        received.append(number)
        reporter.say("stopping behind this step, to save it; Ctrl-C ends the run at once")

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
