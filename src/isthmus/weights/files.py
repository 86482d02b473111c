"""Weight files to named tensors and back. No code in a file is ever run.

Whatever the format, a file first becomes names with the places of their tensors (`stored`); `headers` stops there, and
`read` reads what is wanted of them, each run of bytes once.
"""

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from isthmus.atomic import atomic_write
from isthmus.errors import IsthmusError, WeightsError
from isthmus.messages import first_line
from isthmus.weights.formats.archives import is_tar, zip_members
from isthmus.weights.formats.hdf5 import SIGNATURE
from isthmus.weights.formats.keras_files import WEIGHTS_MEMBER, read_keras, read_keras_archive, write_keras
from isthmus.weights.formats.pickle_globals import ForeignError
from isthmus.weights.formats.safetensors_files import HEADER, INDEXES, read_index, read_safetensors, save_file
from isthmus.weights.formats.stored import Span, Stored, read_all
from isthmus.weights.formats.torch_files import read_pickle, read_tar, read_zip

__all__ = [
    "FileHeaders",
    "Format",
    "Header",
    "TensorFile",
    "first_bytes",
    "headers",
    "read",
    "unwrap",
    "write",
    "writer",
]

Format = Literal["safetensors", "torch", "pickle", "keras"]
Writer = Callable[[Path, Mapping[str, Tensor], Mapping[str, str]], None]

WRAPPERS = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "blobs",
    "model_ema", "state_dict_ema", "ema_state_dict", "ema", "teacher", "student", "weights",
)  # fmt: skip
EXPORTED = {".xml": "OpenVINO", ".pt2": "torch.export"}  # what is written for engines, and is not read back
MAX_WRAPPERS = 3  # in one another; a dict can hold itself
PREFIXES = ("module.", "_orig_mod.", "model.", "timm_model.", "backbone.", "encoder.", "net.")
HEADS = ("fc.", "head.", "classifier.")  # what may stand beside a `backbone.`
MOMENTUM = "_momentum"  # what Caffe2 keeps beside each of its blobs


class Header(NamedTuple):
    """Shape and type of a tensor; `dtype` is named as torch does, without its `torch.`."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorFile:
    """What a weight file holds; `notes` say what was unwrapped, renamed or left aside."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    format: Format
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class FileHeaders:
    """As TensorFile, without the tensors' values; `bytes` is the size of the file, or of all its shards."""

    entries: dict[str, Header]
    metadata: dict[str, str]
    format: Format
    bytes: int
    notes: tuple[str, ...] = ()


class _Content(NamedTuple):
    """A file's tensors as it has them, still wrapped, and the files they are in."""

    found: Any
    metadata: dict[str, str]
    format: Format
    paths: tuple[Path, ...]


def read(path: Path | str) -> TensorFile:
    """The tensors of a weight file, on the CPU and in memory of their own. Its first bytes decide, not its name.

    Read are safetensors and shards under a `*.index.json` (or a folder with one), torch's .pth, .pt, .bin and .tar of
    every age, pickles of NumPy arrays as Caffe2 and detectron2 write, and Keras' .h5, .weights.h5 and .keras. Wrappers
    around the state dict and prefixes before its keys are removed. Raises WeightsError saying what is wrong with the
    file and how to mend it.
    """
    path = Path(path)
    content = _content(path)
    stored, notes = unwrap(content.found, str(path))
    with _guarded(path):
        tensors = read_all(stored)
    return TensorFile(tensors=tensors, metadata=content.metadata, format=content.format, notes=notes)


def headers(path: Path | str) -> FileHeaders:
    """Names, shapes and types that `read` would return, without reading the numbers; raises WeightsError."""
    path = Path(path)
    content = _content(path)
    stored, notes = unwrap(content.found, str(path))
    entries = {name: Header(one.shape, str(one.dtype).removeprefix("torch.")) for name, one in stored.items()}
    size = sum(part.stat().st_size for part in content.paths)
    return FileHeaders(entries=entries, metadata=content.metadata, format=content.format, bytes=size, notes=notes)


def write(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Save tensors in the format of the name's suffix, whole or not at all.

    `.safetensors` (or no suffix) carries the text in `metadata`; `.pth` and `.pt` are torch's, `.pkl` is detectron2's,
    `.h5` are Keras' legacy weights. Raises RunError when the disk will not take it, and WeightsError for an unknown
    suffix.
    """
    path = Path(path)
    save = writer(path)
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    atomic_write(path, lambda target: save(target, ready, metadata))


def writer(path: Path) -> Writer:
    """What writes the format that a name asks for; raises WeightsError where there is none."""
    if path.name.endswith(".weights.h5"):
        raise WeightsError(
            f"cannot write {path.name}: Keras takes what ends so for its newer format; call it "
            f"{path.name.removesuffix('.weights.h5')}.h5, which load_weights reads as well"
        )
    save = WRITERS.get(path.suffix or ".safetensors")
    if save is None:
        raise WeightsError(
            f"cannot write {path.name}: the format follows from the name, which must end in {', '.join(WRITERS)}"
        )
    return save


def unwrap(content: Any, name: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The state dict inside wrappers, its keys without prefixes, and notes on both; raises WeightsError."""
    unwrapped = _state_dict(content)
    if unwrapped is None:
        held = (
            f"the keys {', '.join(map(str, list(content)[:5]))}" if isinstance(content, Mapping) else "something else"
        )
        raise WeightsError(
            f"{name} holds no named tensors, but {held}; save a network's own: "
            f"torch.save(net.state_dict(), 'weights.pth')"
        )
    found, notes = unwrapped
    tensors = {str(key): value for key, value in found.items() if isinstance(value, Tensor | Stored)}
    if other := [str(key) for key in found if str(key) not in tensors]:
        notes.append(f"{len(other)} entries that are no tensors left aside: {', '.join(other[:3])}")
    if momenta := [key for key in tensors if key.endswith(MOMENTUM) and key.removesuffix(MOMENTUM) in tensors]:
        notes.append(f"{len(momenta)} momenta of the optimiser left aside")
        tensors = {key: value for key, value in tensors.items() if key not in set(momenta)}
    while prefix := _prefix(tensors):
        notes.append(f"prefix {prefix!r} removed")
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key != "n_averaged"}
    return {key: value.detach() if isinstance(value, Tensor) else value for key, value in tensors.items()}, tuple(notes)


def _state_dict(content: Any, depth: int = 0) -> tuple[Mapping[Any, Any], list[str]] | None:
    """The mapping that holds the tensors, and notes on the wrappers around it; None where there is none."""
    if not isinstance(content, Mapping) or depth > MAX_WRAPPERS:
        return None
    inside = {key: found for key in WRAPPERS if (found := _state_dict(content.get(key), depth + 1))}
    if inside:
        first, *others = inside
        tensors, notes = inside[first]
        aside = f"; {', '.join(map(repr, others))} left aside" if others else ""
        return tensors, [f"tensors taken from {first!r}{aside}", *notes]
    return (content, []) if any(isinstance(value, Tensor | Stored) for value in content.values()) else None


def _prefix(tensors: Mapping[str, Any]) -> str:
    """A known prefix that every key has, apart from a head beside a backbone and AveragedModel's counter."""
    keys = [key for key in tensors if key != "n_averaged"]
    for prefix in PREFIXES:
        bare = [key for key in keys if not key.startswith(prefix)]
        if len(bare) < len(keys) and all(key.startswith(HEADS) and prefix + key not in tensors for key in bare):
            return prefix
    return ""


@contextmanager
def _guarded(path: Path) -> Iterator[None]:
    """Whatever reading a damaged file raises becomes a WeightsError naming it."""
    try:
        yield
    except IsthmusError:
        raise
    except ForeignError as error:
        if error.mend:
            raise WeightsError(f"{path} holds {error.mend} and save again") from error
        raise WeightsError(
            f"{path} holds Python objects ({error.name}) and not only tensors; reading them could run any "
            f"code, so it is refused. Where it was made, save tensors: torch.save(net.state_dict(), 'weights.pth'), "
            f"or better safetensors.torch.save_file(net.state_dict(), 'weights.safetensors')"
        ) from error
    except Exception as error:  # a parser meets nonsense as anything: EOFError, KeyError, struct.error, ...
        reason = first_line(error)[:200]
        if isinstance(error, LookupError):  # whose text is a bare key
            reason = "it refers to what it does not hold"
        raise WeightsError(
            f"{path} is truncated, damaged or no weight file ({reason}); download or save it again"
        ) from error


def _content(path: Path) -> _Content:
    """What a file holds, by its first bytes."""
    if path.is_dir():
        path = next((path / name for name in INDEXES if (path / name).is_file()), path)
    start = first_bytes(path)
    with _guarded(path):
        if path.name.endswith(".index.json"):
            return _sharded(path)
        if start[8:9] == HEADER:
            stored, metadata = read_safetensors(path)
            return _Content(stored, metadata, "safetensors", (path,))
        with path.open("rb") as file:
            if start.startswith(SIGNATURE):
                whole = Span(path, 0, path.stat().st_size)
                return _Content(read_keras(file, whole), {}, "keras", (path,))
            if start.startswith(b"PK\3\4"):
                members = zip_members(file, path)
                if WEIGHTS_MEMBER in members:
                    return _Content(read_keras_archive(file, members), {}, "keras", (path,))
                return _Content(read_zip(file, members), {}, "torch", (path,))
            if is_tar(start):
                return _Content(read_tar(file, path), {}, "torch", (path,))
            found, by_torch = read_pickle(file, path)
            if not by_torch and _state_dict(found) is None:
                raise ValueError("a pickle without named arrays")
            return _Content(found, {}, "torch" if by_torch else "pickle", (path,))


def _sharded(index: Path) -> _Content:
    """The tensors of all shards, which must be those that the index names."""
    places = read_index(index)
    if absent := [path.name for path in dict.fromkeys(places.values()) if not path.is_file()]:
        raise WeightsError(f"{index} names the shard {absent[0]}, which is not beside it; download it too")
    shards = {path: _content(path) for path in dict.fromkeys(places.values())}
    if not shards:
        raise ValueError("an index without shards")
    for path, shard in shards.items():
        named = {name for name, place in places.items() if place == path}
        held = set(shard.found) if isinstance(shard.found, Mapping) else set()
        if named != held:
            odd = min(map(str, named ^ held))
            where = (
                f"names {odd!r} in {path.name}, which lacks it" if odd in named else f"does not name {odd!r} of {path}"
            )
            raise WeightsError(f"{index} {where}; index and shards are not of one piece, so download the folder again")
    found = {name: shards[place].found[name] for name, place in places.items()}
    metadata = {key: text for shard in shards.values() for key, text in shard.metadata.items()}
    return _Content(found, metadata, next(iter(shards.values())).format, tuple(shards))


def first_bytes(path: Path) -> bytes:
    """The beginning of a file; raises WeightsError for what is plainly no weight file."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}; check the path") from error
    if not start:
        raise WeightsError(f"{path} is empty; download or save it again")
    if path.suffix.lower() in EXPORTED:
        raise WeightsError(f"{path} is a file for {EXPORTED[path.suffix.lower()]}; load what it was exported from")
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a Git LFS pointer and not the weights; fetch them with `git lfs pull`")
    if start.lstrip()[:1] == b"<" and start[8:9] != HEADER:  # the length of a header may be any bytes
        raise WeightsError(f"{path} is a web page and not a weight file; download the file itself")
    return start


def _save_torch(path: Path, tensors: Mapping[str, Tensor], _metadata: Mapping[str, str]) -> None:
    # A view would bring its whole storage along; an open file keeps the temporary name out of the archive.
    plain = {
        name: one if one.untyped_storage().nbytes() == one.nbytes else one.clone() for name, one in tensors.items()
    }
    with path.open("wb") as file:
        torch.save(plain, file)


def _save_detectron2(path: Path, tensors: Mapping[str, Tensor], _metadata: Mapping[str, str]) -> None:
    if odd := next((name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16), None):
        raise WeightsError(f"{odd!r} is bfloat16, which NumPy does not have; make it float32 by tensor.float()")
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    with path.open("wb") as file:
        _ArrayPickler(file, protocol=4).dump({"model": arrays, "__author__": "Isthmus", "matching_heuristics": True})


class _ArrayPickler(pickle.Pickler):
    """Writes arrays by their public class: the name NumPy 2 would write is not known to NumPy 1."""

    def reducer_override(self, one: Any) -> Any:
        """An array as a call with shape, type and bytes."""
        return (
            (np.ndarray, (one.shape, one.dtype, bytearray(one.tobytes())))
            if isinstance(one, np.ndarray)
            else NotImplemented
        )


WRITERS: dict[str, Writer] = {
    ".safetensors": save_file,
    ".pth": _save_torch,
    ".pt": _save_torch,
    ".pkl": _save_detectron2,
    ".h5": lambda path, tensors, _: write_keras(path, tensors),
}
