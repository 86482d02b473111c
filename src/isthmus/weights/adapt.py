"""Weights for other classes, other input channels or other dimensions than they were trained for: pure functions."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from typing import Literal

import torch
from torch import Tensor

from isthmus.arch.preprocess import Preprocess
from isthmus.errors import WeightsError

__all__ = ["Inflate", "adapt_dims", "adapt_input", "adapt_preprocess", "class_rows"]

Inflate = Literal["mean", "centre"]


def adapt_input(weight: Tensor, channels: int) -> Tensor:
    """A first convolution's weight (O, C, *kernel) for `channels` inputs: (O, channels, *kernel).

    The sum over inputs stays. So where all `channels` normalised channels hold one map, the response is what it was
    where all C held that map; of other inputs, a grey photograph under each colour's own mean and deviation among them,
    nothing is promised. One channel: the C are summed. Fewer than C: each gets the mean of the C, scaled by
    C / channels. More: they repeat in order, each divided by how often it occurs (which is timm's rule where `channels`
    is a multiple of C).
    """
    old = weight.shape[1]
    if channels == old:
        return weight
    weight = _exact(weight)
    if channels < old:
        mean = weight.sum(1, keepdim=True) / channels
        return mean.expand(-1, channels, *weight.shape[2:]).clone()
    index = torch.arange(channels) % old
    times = torch.bincount(index, minlength=old).to(weight)
    return weight[:, index] / times[index].view(1, -1, *(1,) * (weight.ndim - 2))


def adapt_dims(weight: Tensor, kernel: Sequence[int], inflate: Inflate) -> Tensor:
    """A convolution's weight (O, C, *its kernel) for a kernel of more or fewer dimensions: (O, C, *kernel).

    The dimensions that come or go are the first ones: depth, then height. Those that go are summed over. Along those
    that come, `mean` repeats the weight and divides it by their size (Carreira & Zisserman 2017, I3D), and `centre`
    puts it into the middle of zeros. Either way the sum along them is the weight in fewer dimensions: a network answers
    to an input that is constant along them as the other does to one slice of it, where padding along them repeats the
    input. Under zero padding `mean` differs at the borders; `centre` does not, as all taps that reach there are 0.
    """
    weight = _exact(weight)
    come = len(kernel) - (weight.ndim - 2)
    if come <= 0:
        return weight.sum(tuple(range(2, 2 - come))) if come else weight
    new = tuple(kernel[:come])
    inflated = weight.new_zeros((*weight.shape[:2], *new, *weight.shape[2:]))
    slices = inflated.flatten(2, 1 + come)  # (O, C, all that come, *its kernel)
    if inflate == "mean":
        slices += weight.unsqueeze(2) / prod(new)
    else:
        slices[:, :, prod(new) // 2] = weight  # the middle of each, as their sizes are odd
    return inflated


def adapt_preprocess(record: Preprocess, channels: int) -> Preprocess | None:
    """The preprocessing for another number of channels: for grey, means over colours; None if none can say."""
    if channels == len(record.channels):
        return record
    if channels == 1:
        mean, std = (sum(values) / len(values) for values in (record.mean, record.std))
        return replace(record, channels="L", mean=(mean,), std=(std,))
    if channels == 3:
        return replace(record, channels="RGB", mean=record.mean * 3, std=record.std * 3)
    return None


def class_rows(chosen: Iterable[str | int], names: Sequence[str], count: int, source: str) -> tuple[int, ...]:
    """Rows of a classifier of `count` classes: by name where `names` has it, or by index from 0; raises WeightsError.

    A name must be whole, as the source has it; one that several classes share is refused, as is a row chosen twice.
    """
    if names and len(names) != count:
        raise WeightsError(
            f"{source} names {len(names)} classes for {count} outputs; choose by index from a file without"
        )
    rows: list[int] = []
    for item in chosen:
        if isinstance(item, str):
            rows.append(_row(item, names, source))
        elif isinstance(item, int) and not isinstance(item, bool) and 0 <= item < count:
            rows.append(item)
        else:
            raise WeightsError(
                f"there is no class {item!r} in {source}; classes are names, or indices in 0..{count - 1}"
            )
    if twice := [row for row in rows if rows.count(row) > 1]:
        raise WeightsError(f"class {twice[0]} of {source} is chosen twice; a row can be kept once")
    return tuple(rows)


def _row(name: str, names: Sequence[str], source: str) -> int:
    found = [row for row, other in enumerate(names) if other == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise WeightsError(f"{name!r} names the classes {', '.join(map(str, found))} of {source}; give an index")
    if not names:
        raise WeightsError(f"{source} does not name its classes, so {name!r} cannot be found; give indices")
    near = [other for other in names if name.casefold() in other.casefold()][:3]
    near += [other for other in difflib.get_close_matches(name, names, n=3) if other not in near]
    few = ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")
    said = f"did you mean {', '.join(map(repr, near))}?" if near else f"it has {few}"
    raise WeightsError(f"{source} has no class {name!r}; {said}")


def _exact(weight: Tensor) -> Tensor:
    """In single precision at least: sums of half-precision numbers lose digits."""
    return weight if weight.dtype == torch.float64 else weight.float()
