"""The whole state of a training run in one file, written in one step and read without running code."""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from isthmus.atomic import atomic_write
from isthmus.errors import RunError
from isthmus.nn.network import ResNet
from isthmus.train.reporter import Reporter
from isthmus.weights.save import save_weights

__all__ = ["BEST", "Checkpoints", "load_state", "random_state", "restore_random_state", "save_state"]

SCHEMA = 2
BEST = "best.safetensors"


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors, numbers and text; raises RunError when the disk will not take them, and `path` stays as it was."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            try:
                torch.save({**state, "schema": SCHEMA}, file)
            except RuntimeError as error:  # of the archive that cannot be finished; the disk's own comes before it
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    atomic_write(path, write)


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote; raises RunError for a missing, damaged or newer file."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # every record against its CRC-32, which torch writes and does not check
        state: Any = None if damaged else torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise RunError(f"there is no {path}; nothing to go on from") from error
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged archive or pickle raises anything: EOFError, KeyError, zlib.error, ...
        raise RunError(f"{path} is damaged or no checkpoint of isthmus") from error
    if damaged:
        raise RunError(f"{path} is damaged: {damaged} does not have its checksum")
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        found = state.get("schema") if isinstance(state, dict) else None
        raise RunError(f"{path} has schema {found}; this version of isthmus reads schema {SCHEMA}")
    return dict(state)


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The last `keep` states of the run in the folder `run`, and the weights that validate best.

    One process writes. A state is there whole or not at all; its file is named by the steps taken.
    """

    run: Path
    keep: int = 3

    @property
    def folder(self) -> Path:
        """Where the states lie."""
        return self.run / "checkpoints"

    def files(self) -> list[Path]:
        """The states, the newest first."""
        return sorted(self.folder.glob("step-*.pt"), reverse=True)

    def save(self, state: Mapping[str, Any], *, step: int) -> Path:
        """Write the state after `step` steps, then let the oldest go; raises RunError, the older ones kept."""
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make the folder {self.folder}: {error.strerror}") from error
        path = self.folder / f"step-{step:09d}.pt"
        save_state(path, state)
        # Later states are those that could not be read when the run went on from an earlier one.
        rest = [each for each in self.files() if each < path]
        stale = [each for each in self.files() if each > path]
        left = [*self.folder.glob(".*.tmp"), *self.run.glob(".*.tmp")]  # by a killed process
        for file in [*rest[self.keep - 1 :], *stale, *left]:
            file.unlink(missing_ok=True)
        return path

    def latest(self, reporter: Reporter) -> dict[str, Any] | None:
        """The newest state that is whole, None where there is none; tells of damaged newer ones.

        Raises RunError when none of them can be read.
        """
        files, reasons = self.files(), []
        for file in files:
            try:
                state = load_state(file)
            except RunError as error:
                reasons.append(str(error))
                continue
            for reason in reasons:
                reporter.say(f"{reason}; going on from {file.name}")
            return state
        if files:
            raise RunError(
                f"{'; '.join(reasons)}; there is nothing to go on from, start the run anew in another folder"
            )
        if (old := self.run / "checkpoint.pt").exists():
            raise RunError(f"{old} is of an earlier version of isthmus, which this one cannot go on with; start anew")
        return None

    def save_best(self, net: ResNet, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Keep the weights when the last row of the log that has a `val_accuracy` has the highest of all."""
        *before, last = [row for row in rows if "val_accuracy" in row]
        if any(row["val_accuracy"] >= last["val_accuracy"] for row in before):
            return False
        metrics = {"validation accuracy": last["val_accuracy"]}
        save_weights(net, self.run / BEST, extra={"metrics": metrics, "epoch": last["epoch"]})
        return True


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of torch's generators that a process on `device` draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def restore_random_state(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Put them back to `state`; on another kind of device than it was taken on, the CPU's alone."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type])
