"""Tensors still in their files: where they lie, of what type and shape, checked before memory is asked for."""

import codecs
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

__all__ = ["MAX_DIMS", "Span", "Stored", "check_apart", "read_all"]

MAX_DIMS = 32
PIECE = 1 << 20  # bytes of text that are decoded at once


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file: `length` from `start` on. `text` ones are latin-1 characters, written as UTF-8."""

    path: Path
    start: int
    length: int
    text: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A tensor in a file: elements of `dtype`, `offset` of them into `span`, a C-ordered `shape` or one with `stride`.

    Offset and strides count elements. Raises ValueError when it would reach beyond its bytes.
    """

    span: Span
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    offset: int = 0

    def __post_init__(self) -> None:
        stride = self.shape if self.stride is None else self.stride
        if len(self.shape) > MAX_DIMS or len(stride) != len(self.shape):
            raise ValueError("a tensor with too many dimensions, or with other strides than dimensions")
        if any(type(number) is not int or number < 0 for number in (*self.shape, *stride, self.offset)):
            raise ValueError("a tensor with an impossible shape")
        held = self.span.length // self.dtype.itemsize
        last = self.numel - 1
        if self.stride is not None:
            last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        if self.numel and (self.offset + last >= held or self.numel > held):
            raise ValueError(f"a tensor of {self.numel} elements in {self.span.length} bytes")

    @property
    def numel(self) -> int:
        """How many elements the shape has."""
        return prod(self.shape)


def read_all(stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """The tensors, in memory of their own; those that share bytes in the file share them here too.

    One read for each run of bytes and nothing between, so the memory is that of the tensors. Raises ValueError when
    bytes are missing or tensors overlap.
    """
    spans = {one.span for one in stored.values() if one.numel}
    check_apart(spans)
    held = {}
    for path in {span.path for span in spans}:
        with path.open("rb", buffering=0) as file:
            held.update({span: _read(file, span) for span in spans if span.path == path})
    return {name: _tensor(one, held) for name, one in stored.items()}


def check_apart(spans: Iterable[Span]) -> None:
    """Raises ValueError when two spans overlap: read apart, they would take more memory than the file has bytes."""
    for one, other in pairwise(sorted(spans, key=lambda span: (span.path, span.start, span.length))):
        if one.path == other.path and one.start + one.length > other.start:
            raise ValueError(f"two contents share the bytes from {other.start} on")


def _read(file: BinaryIO, span: Span) -> Tensor:
    buffer = torch.empty(span.length, dtype=torch.uint8)
    view = buffer.numpy().data
    file.seek(span.start)
    done = 0
    if span.text:
        decode = codecs.getincrementaldecoder("utf-8")().decode
        for start in range(0, span.length, PIECE):
            piece = decode(file.read(min(PIECE, span.length - start))).encode("latin-1")
            view[done : done + len(piece)] = piece
            done += len(piece)
        return buffer[:done]
    while done < span.length and (count := file.readinto(view[done:])):  # type: ignore[attr-defined]
        done += count
    if done < span.length:
        raise ValueError(f"{span.length - done} bytes are missing")
    return buffer


def _tensor(one: Stored, held: Mapping[Span, Tensor]) -> Tensor:
    if not one.numel:
        return torch.empty(one.shape, dtype=one.dtype)
    buffer = held[one.span]
    whole = buffer[: buffer.numel() // one.dtype.itemsize * one.dtype.itemsize].view(one.dtype)
    if whole.numel() < one.numel:  # only text can be shorter than its span
        raise ValueError(f"a tensor of {one.numel} elements in {buffer.numel()} bytes")
    if one.stride is None:
        return whole[one.offset : one.offset + one.numel].view(one.shape)
    return whole.as_strided(one.shape, one.stride, one.offset)
