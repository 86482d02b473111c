"""The whole state of a training run in one file, written in one step and read without running code."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from isthmus.atomic import atomic_write
from isthmus.errors import RunError

__all__ = ["load_state", "random_state", "restore_random_state", "save_state"]

SCHEMA = 1


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers and text; raises RunError when the disk will not take them, and `path` stays as it was."""
    buffer = io.BytesIO()
    torch.save(state | {"schema": SCHEMA}, buffer)
    atomic_write(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote; raises RunError for a missing, damaged or newer file."""
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise RunError(f"there is no {path}; nothing to go on from") from error
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise RunError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); it is damaged or no checkpoint"
        ) from error
    if state.get("schema") != SCHEMA:
        raise RunError(f"{path} has schema {state.get('schema')}; this version reads schema {SCHEMA}")
    return state


def random_state() -> dict[str, torch.Tensor]:
    """The state of torch's generators on this machine."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda:{index}": each for index, each in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_random_state(state: dict[str, torch.Tensor]) -> None:
    """Put torch's generators back to `state`."""
    torch.set_rng_state(state["cpu"])
    for device, each in state.items():
        if device != "cpu":
            torch.cuda.set_rng_state(each, device)
