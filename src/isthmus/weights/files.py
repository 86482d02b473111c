"""Weight files to named tensors and back. No code in a file is ever run."""

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from isthmus.atomic import atomic_write
from isthmus.errors import WeightsError

__all__ = ["TensorFile", "metadata", "read", "unwrap", "write"]

WRAPPERS = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network",
    "model_ema", "state_dict_ema", "ema_state_dict", "ema",
)  # fmt: skip
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
HEADS = ("fc.", "head.", "classifier.")  # what may stand beside a `backbone.`
UNSAFE = re.compile(r"GLOBAL (\S+)|class (\S+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorFile:
    """What a weight file holds; `notes` say what was unwrapped, renamed or left aside."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    format: Literal["safetensors", "pickle"]
    notes: tuple[str, ...] = ()


def read(path: Path | str) -> TensorFile:
    """The tensors of a .safetensors, .pth, .pt, .bin or .tar file, on the CPU. Its first bytes decide, not its name.

    Wrappers around the state dict and prefixes before its keys are removed. Raises WeightsError saying what is wrong
    with the file and how to mend it.
    """
    path = Path(path)
    start = _first_bytes(path)
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        tensors, facts = _safetensors(path)
        found, notes = unwrap(tensors, str(path))
        return TensorFile(tensors=found, metadata=facts, format="safetensors", notes=notes)
    found, notes = unwrap(_unpickled(path), str(path))
    return TensorFile(tensors=found, metadata={}, format="pickle", notes=notes)


def metadata(path: Path | str) -> dict[str, str]:
    """The text that a .safetensors file carries beside its tensors, without reading those; raises WeightsError."""
    path = Path(path)
    _first_bytes(path)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def write(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Save tensors and text as safetensors, whole or not at all; raises RunError when the disk will not take it."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def save(target: Path) -> None:
        try:
            save_file(ready, target, dict(metadata))
        except SafetensorError as error:
            raise OSError(str(error)) from error

    atomic_write(Path(path), save)


def unwrap(content: Any, name: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict inside wrappers, its keys without prefixes, and notes on both; raises WeightsError."""
    notes: list[str] = []
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = [key for key in WRAPPERS if isinstance(content.get(key), Mapping) and content[key]]
        if not inner:
            break
        notes.append(f"tensors taken from {inner[0]!r}")
        if len(inner) > 1:
            notes[-1] += f"; {', '.join(map(repr, inner[1:]))} left aside"
        content = content[inner[0]]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        held = f"the keys {', '.join(map(str, list(content)[:5]))}" if isinstance(content, Mapping) else type(content)
        raise WeightsError(
            f"{name} holds no named tensors, but {held}; save a network's own: "
            f"torch.save(net.state_dict(), 'weights.pth')"
        )
    tensors = {str(key): value.detach() for key, value in content.items() if isinstance(value, Tensor)}
    if other := [str(key) for key in content if str(key) not in tensors]:
        notes.append(f"{len(other)} entries that are no tensors left aside: {', '.join(other[:3])}")
    while prefix := _prefix(tensors):
        notes.append(f"prefix {prefix!r} removed")
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key != "n_averaged"}
    return tensors, tuple(notes)


def _prefix(tensors: Mapping[str, Tensor]) -> str:
    """A known prefix that every key has, apart from a head beside a backbone and AveragedModel's counter."""
    keys = [key for key in tensors if key != "n_averaged"]
    for prefix in PREFIXES:
        bare = [key for key in keys if not key.startswith(prefix)]
        if len(bare) < len(keys) and all(key.startswith(HEADS) for key in bare):
            return prefix
    return ""


def _first_bytes(path: Path) -> bytes:
    """The beginning of a file; raises WeightsError for what is plainly no weight file."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}; check the path") from error
    if not start:
        raise WeightsError(f"{path} is empty; download or save it again")
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a Git LFS pointer and not the weights; fetch them with `git lfs pull`")
    if start.lstrip()[:1] == b"<":
        raise WeightsError(f"{path} is a web page and not a weight file; download the file itself")
    return start


def _damaged(path: Path, error: Exception) -> WeightsError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return WeightsError(f"{path} is truncated, damaged or no weight file ({reason}); download or save it again")


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _unpickled(path: Path) -> Any:
    # Training scripts save their arguments beside the weights; a Namespace is attributes and nothing else.
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # of pickle protocols and old storages: what counts is raised below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = UNSAFE.search(str(error))
        if found is None:
            raise _damaged(path, ValueError("not the pickle that torch writes")) from error
        raise WeightsError(
            f"{path} holds Python objects ({found[1] or found[2]}) and not only tensors; reading them could run any "
            f"code, so it is refused. Where it was made, save tensors: torch.save(net.state_dict(), 'weights.pth'), "
            f"or better safetensors.torch.save_file(net.state_dict(), 'weights.safetensors')"
        ) from error
    except Exception as error:  # a damaged pickle raises anything: EOFError, KeyError, RuntimeError, ...
        raise _damaged(path, error) from error
