"""Damaged and hostile files, thousands of them, thrown at a reader in a process of its own with little memory.

As a script, `python hostile.py FOLDER READER START STOP KIND...` damages a small file of each kind once for every
number from START to STOP and prints as JSON how each reading ended. A number gives the same damage for ever.
"""

import dataclasses
import io
import json
import random
import signal
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from isthmus.arch.plan import plan
from isthmus.arch.spec import NetSpec, StageSpec, StemSpec
from isthmus.errors import WeightsError
from isthmus.nn.network import ResNet
from isthmus.weights import files
from isthmus.weights.formats import hdf5
from isthmus.weights.onnx.graph import read_onnx
from onnx_writer import write_graph
from weight_files import keras_tensors, tensors, write_arrays, write_keras3, write_shards, write_tar

SLACK = 100 << 20  # bytes of memory beyond twice the file
SECONDS = 20  # a reading that takes longer hangs: the files are of some kilobytes
NUMBERS = [bytes(8), b"\xff" * 8, *(struct.pack("<Q", 1 << bits) for bits in (8, 16, 24, 31, 32, 40, 62, 63))]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A file to damage: the bytes that are damaged, and how a file is made of them."""

    name: str
    content: bytes
    build: Callable[[bytes], bytes] = bytes


def small_onnx(folder: Path) -> bytes:
    """One block, 2 kilobytes of weights."""
    spec = NetSpec(stages=(StageSpec(depth=1, mid=2, out=4),), stem=StemSpec(widths=(4,)), num_classes=3)
    net = ResNet(plan(spec, 32)).eval()
    return write_graph(folder / "a.onnx", net).read_bytes()


def repacked(archive: bytes, member: str) -> Callable[[bytes], bytes]:
    """A zip archive again and again with another content of one member, so that damage gets past the zip itself."""
    with zipfile.ZipFile(io.BytesIO(archive)) as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    (name,) = [name for name in members if name.endswith(member)]

    def build(content: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as new:
            for other, kept in members.items():
                new.writestr(other, content if other == name else kept)
        return out.getvalue()

    return build


def member(archive: bytes, ending: str) -> bytes:
    """The content of the one member whose name ends so."""
    with zipfile.ZipFile(io.BytesIO(archive)) as whole:
        return next(whole.read(name) for name in whole.namelist() if name.endswith(ending))


def kinds(folder: Path) -> Iterator[Kind]:
    """One small file of every format that we read, and the inner parts of those that wrap others."""

    def written(write: Callable[[Path], object]) -> bytes:
        write(folder / "a.h5")
        return (folder / "a.h5").read_bytes()

    plain = save(tensors(), {"format": "pt"})
    length = 8 + int.from_bytes(plain[:8], "little")
    yield Kind("safetensors", plain)
    yield Kind("safetensors header", plain[8:length], lambda text: struct.pack("<Q", len(text)) + text + plain[length:])
    yield Kind("index", write_shards(folder, tensors()).read_bytes())
    archive = written(lambda path: torch.save({"state_dict": tensors(), "epoch": 3}, path))
    yield Kind("zip", archive)
    yield Kind("pickle in zip", member(archive, "data.pkl"), repacked(archive, "data.pkl"))
    yield Kind("plain", written(lambda path: torch.save(tensors(), path, _use_new_zipfile_serialization=False)))
    yield Kind("tar", written(lambda path: write_tar(path, tensors())))
    yield Kind("arrays 2", written(lambda path: write_arrays(path, tensors(), 2)))
    yield Kind("arrays 4", written(lambda path: write_arrays(path, tensors(), 4)))
    yield Kind("keras legacy", written(lambda path: files.write(path, keras_tensors(), {})))
    numbered = written(lambda path: write_keras3(path, keras_tensors()))
    yield Kind("keras 3", numbered)
    config = {"config": {"layers": [{"class_name": "Conv2D", "config": {"name": "conv"}}]}}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as whole:
        whole.writestr("config.json", json.dumps(config))
        whole.writestr("model.weights.h5", numbered)
    yield Kind("keras archive", out.getvalue())
    yield Kind(
        "configuration in archive", member(out.getvalue(), "config.json"), repacked(out.getvalue(), "config.json")
    )
    yield Kind("onnx", small_onnx(folder))


def damaged(content: bytes, number: int) -> bytes:
    """One of three cuts, and else one to four bytes changed, numbers overwritten, pieces lost, doubled or moved."""
    dice = random.Random(number)
    if number % 3 == 0:  # ever other places, from the first byte to the last
        return content[: number // 3 * 7919 % len(content)]
    found = bytearray(content)
    for _ in range(dice.choice([1, 1, 2, 4])):
        place = dice.randrange(max(len(found), 1))
        other = dice.randrange(max(len(found), 1))
        size = dice.choice([1, 1, 2, 4, 8, 16, 100])
        match dice.randrange(7):
            case 0:
                found[place : place + 1] = bytes([found[place] ^ 1 << dice.randrange(8)]) if found else b""
            case 1:
                found[place : place + 1] = bytes([dice.randrange(256)])
            case 2:
                found[place : place + size] = b""
            case 3:
                found[place:place] = dice.randbytes(size)
            case 4:
                found[place:place] = found[other : other + size]
            case 5:
                value = dice.choice([*NUMBERS, struct.pack("<Q", other)])[: dice.choice([1, 2, 4, 8])]
                found[place : place + len(value)] = value
            case 6:
                digits = dice.choice([b"0", b"-1", b"99999999999999999999", b"4294967296", b'"', b"[", b"{}", b"null"])
                found[place : place + 1] = digits
    return bytes(found)


# Readers


def ours(path: Path) -> None:
    """What users call."""
    if path.suffix == ".onnx":
        read_onnx(path)
    else:
        files.headers(path)
        files.read(path)


def unguarded(path: Path) -> None:
    """A reader that lets its parsers' errors out."""
    with path.open("rb") as file:
        hdf5.read_tree(file, hdf5.Span(path, 0, path.stat().st_size))


def greedy(path: Path) -> None:
    """A reader that believes what a file declares."""
    size = int.from_bytes(path.read_bytes()[:8], "little") % (1 << 32) or 1 << 30
    try:
        torch.empty(max(size, 1 << 30), dtype=torch.uint8).fill_(1)
    except RuntimeError as error:
        raise WeightsError("no memory") from error


def crashing(path: Path) -> None:
    """A reader that takes the process with it."""
    signal.raise_signal(signal.SIGSEGV)


def hanging(path: Path) -> None:
    """A reader that never ends."""
    signal.alarm(1)
    while True:
        pass


READERS: dict[str, Callable[[Path], None]] = {
    reader.__name__: reader for reader in (ours, unguarded, greedy, crashing, hanging)
}


def short_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is an allocation that failed."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return True
        error = error.__cause__
    return False


def limit_memory(size: int) -> None:
    """From here on, no more than `SLACK` and twice the file beyond what the process has now."""
    import resource

    with Path("/proc/self/statm").open() as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + SLACK + 2 * size, resource.RLIM_INFINITY))


def main(folder: Path, reader: str, start: int, stop: int, names: list[str]) -> None:
    """Read damaged files of these kinds; how it went is printed even when the process dies in between."""
    chosen = [kind for kind in kinds(folder) if not names or kind.name in names]
    read = READERS[reader]
    endings: dict[str, Any] = {"readings": 0, "refusals": 0, "failures": []}
    suffixes = {"onnx": ".onnx", "index": ".index.json", "safetensors": ".safetensors"}
    paths = {kind.name: folder / f"damaged{suffixes.get(kind.name, '.pth')}" for kind in chosen}
    if reader == "ours":
        for kind in chosen:  # all of them are good files, and what is imported late is imported now
            paths[kind.name].write_bytes(kind.build(kind.content))
            read(paths[kind.name])
    if sys.platform == "linux":
        limit_memory(max(len(kind.content) for kind in chosen))
    for kind in chosen:
        path = paths[kind.name]
        for number in range(start, stop):
            path.write_bytes(kind.build(damaged(kind.content, number)))
            sys.stderr.write(f"{kind.name}, {number}\n")  # the last one is what a crash was about
            signal.alarm(SECONDS)
            try:
                read(path)
                endings["readings"] += 1
            except WeightsError as error:
                endings["refusals"] += 1
                if short_of_memory(error):
                    endings["failures"].append(f"{kind.name}, {number}: more memory than allowed")
            except Exception as error:  # noqa: BLE001
                endings["failures"].append(f"{kind.name}, {number}: {type(error).__name__}: {str(error)[:200]}")
            signal.alarm(0)
    sys.stdout.write(json.dumps(endings))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
