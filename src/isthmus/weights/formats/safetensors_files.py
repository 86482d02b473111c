"""safetensors: one file, or shards under an index, and a writer whose bytes depend on the content alone."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from isthmus.errors import WeightsError
from isthmus.weights.formats.stored import Span, Stored

__all__ = ["HEADER", "INDEXES", "read_index", "read_safetensors", "save_file"]

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
HEADER = b"{"  # begins it, behind the eight bytes of its length
MAX_HEADER = 1 << 22  # bytes; one of 10,000 tensors has a megabyte
MAX_INDEX = 1 << 21  # bytes; JSON in memory can be thirty times as large
ALIGNMENT = 8  # of the data's beginning
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors' places and the text beside them; raises SafetensorError or ValueError for a damaged file."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    if start > MAX_HEADER:
        raise ValueError(f"a header of {start} bytes")
    stored = {}
    with safe_open(path, framework="pt") as file:  # which checks that the data has neither gaps nor overlaps
        for name in file.offset_keys():
            header = file.get_slice(name)
            if (dtype := DTYPES.get(header.get_dtype())) is None:
                raise ValueError(f"{name[:80]!r} is of the type {header.get_dtype()}, which is not supported")
            shape = tuple(header.get_shape())
            length = torch.Size(shape).numel() * dtype.itemsize
            stored[name] = Stored(span=Span(path, start, length), dtype=dtype, shape=shape)
            start += length
        return stored, dict(file.metadata() or {})


def read_index(path: Path) -> dict[str, Path]:
    """The shard of every tensor, as a `*.index.json` says; raises WeightsError for one that is no plain index.

    A shard is a file beside the index: any other path could point anywhere on this machine.
    """
    if path.stat().st_size > MAX_INDEX:
        raise WeightsError(f"{path} is larger than {MAX_INDEX} bytes, so it is no index of shards; download it again")
    with path.open(encoding="utf-8") as file:
        shards = json.load(file).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError("an index without a weight_map of names and files")
    for shard in set(shards.values()):
        plain = PurePosixPath(shard).name == shard == PureWindowsPath(shard).name
        if not plain or not shard.strip(".") or shard.endswith(".json"):
            raise WeightsError(
                f"{path} refers to {shard[:80]!r}, which is no weight file beside it; an index may name those of its "
                f"own folder only. Download the folder again from a source that you trust"
            )
    return {name: path.parent / shard for name, shard in shards.items()}


def save_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors of the CPU as a .safetensors file; the same content gives the same bytes.

    The format is a header's length in 8 bytes, the header as JSON, and the data without gaps. The library's own writer
    orders the metadata by chance.
    """
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)  # so that every number is aligned
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        if tensor.dtype not in NAMES:
            raise WeightsError(f"{name} is of the type {tensor.dtype}, which safetensors does not hold; convert it")
        end += tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            content = tensors[name].view(-1)
            file.write(content.view(torch.uint8).numpy().data)
