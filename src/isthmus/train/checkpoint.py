"""The whole state of a training run in one file, written in one step and read without running code."""

import io
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
        state: Any = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise RunError(f"there is no {path}; nothing to go on from") from error
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle raises anything: EOFError, KeyError, RuntimeError, ...
        raise RunError(f"{path} is damaged or no checkpoint of isthmus; remove it and start the run anew") from error
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        found = state.get("schema") if isinstance(state, dict) else None
        raise RunError(f"{path} has schema {found}; this version of isthmus reads schema {SCHEMA}")
    return dict(state)


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
