"""What looks wrong with the tensors of a weight file: some of it is seen by kind and shape, the rest by values."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from isthmus.messages import listed
from isthmus.weights.layout_tables import COUNTER
from isthmus.weights.source import precision

__all__ = ["STATISTICS", "Finding", "by_kind", "by_values"]

MEAN_OF = {"running_var": "running_mean", "moving_variance": "moving_mean", "_riv": "_rm"}  # by libraries' endings
SCALE_OF = {"running_var": "weight", "moving_variance": "gamma", "_riv": "_s"}
VARIANCES = tuple(MEAN_OF)
STATISTICS = (*MEAN_OF, *MEAN_OF.values(), COUNTER)
BIAS_OF = {".weight": ".bias", "/kernel": "/bias", "_w": "_b"}
HUGE = 1e6  # of a variance: its activations lie in the thousands
NOTHING = 1e-6  # of a channel's weights, beside the largest of all channels


@dataclass(frozen=True, slots=True)
class Finding:
    """A word for programs, the same in a few for people, and the tensors it was found in."""

    kind: str
    words: str
    tensors: tuple[str, ...]

    def __str__(self) -> str:
        """What, in how many tensors, and in which."""
        many = "s" if len(self.tensors) > 1 else ""
        return f"{self.words} in {len(self.tensors)} tensor{many}: {listed(self.tensors, 3)}"


class Check(NamedTuple):
    """A look at one tensor: it is listed where `applies` to its name and itself, and `holds`."""

    kind: str
    words: str
    applies: Callable[[str, Tensor], bool]
    holds: Callable[[Tensor], bool]


def by_kind(tensors: Mapping[str, Tensor]) -> list[Finding]:
    """Findings that need no values, so that tensors may be on the meta device."""
    found = []
    floats = {name: precision(tensor.dtype) for name, tensor in tensors.items() if tensor.is_floating_point()}
    (usual, _), *others = Counter(floats.values()).most_common() or [("", 0)]
    for kind, _ in others:
        names = tuple(name for name in floats if floats[name] == kind)
        found.append(Finding("mixed-dtypes", f"{kind} where the others are {usual}", names))
    whole = tuple(name for name in tensors if name not in floats and not name.endswith(COUNTER))
    if whole:
        found.append(Finding("whole-numbers", "whole numbers, as quantised weights are,", whole))
    if empty := tuple(name for name, tensor in tensors.items() if not tensor.numel()):
        found.append(Finding("empty", "no element", empty))
    return found


def by_values(tensors: Mapping[str, Tensor], classifiers: Iterable[str] = ()) -> list[Finding]:
    """Findings that need every value; `classifiers` are the names that the last layer's weight may have."""
    filled = {name: tensor for name, tensor in tensors.items() if tensor.numel() and tensor.is_floating_point()}
    found = [
        Finding(check.kind, check.words, held)
        for check in CHECKS
        if (held := tuple(name for name, one in filled.items() if check.applies(name, one) and check.holds(one)))
    ]
    fresh = tuple(name for name in classifiers if name in filled and _as_initialised(name, filled))
    if fresh:
        found.append(Finding("fresh-head", "a classifier as it is initialised, before training,", fresh))
    return [*found, *_norms(filled), *_dead_channels(filled), *_repeated(filled)]


def _variance(name: str, _: Tensor) -> bool:
    return name.endswith(VARIANCES)


def _kernel(_: str, tensor: Tensor) -> bool:
    return tensor.ndim > 1


def _any(_: str, __: Tensor) -> bool:
    return True


def _constant(tensor: Tensor) -> bool:
    low, high = torch.aminmax(tensor)
    return bool(low == high) and bool(low != 0) and tensor.numel() > 1


CHECKS = (
    Check("not-finite", "values that are not finite", _any, lambda t: not bool(torch.isfinite(t).all())),
    Check("negative-variance", "variances below 0", _variance, lambda t: bool((t < 0).any())),
    Check("zero-variance", "variances of 0", _variance, lambda t: bool((t == 0).any())),
    Check("huge-variance", f"variances above {HUGE:.0e}", _variance, lambda t: bool((t > HUGE).any())),
    Check("all-zero", "nothing but 0", _kernel, lambda t: not bool(t.any())),
    Check("constant", "one value throughout", _kernel, _constant),
)


def _norms(tensors: Mapping[str, Tensor]) -> Iterable[Finding]:
    """Norms whose statistics never saw a batch, and norms that are switched off."""
    fresh, off = [], []
    for name, variance in tensors.items():
        ending = next((end for end in VARIANCES if name.endswith(end)), None)
        if ending is None:
            continue
        stem = name.removesuffix(ending)
        mean, scale = tensors.get(stem + MEAN_OF[ending]), tensors.get(stem + SCALE_OF[ending])
        if mean is not None and not bool(mean.any()) and bool((variance == 1).all()):
            fresh.append(name)
        if scale is not None and not bool(scale.any()):
            off.append(stem + SCALE_OF[ending])
    if fresh:
        yield Finding("fresh-statistics", "statistics that never saw a batch (mean 0, variance 1)", tuple(fresh))
    if off:
        yield Finding("zero-scale", "a norm's scale of 0 throughout, as blocks begin training,", tuple(off))


def _as_initialised(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a classifier has a bias of zeros, or weight and bias as torch draws them: uniform in ±1 / √fan in."""
    ending = next((end for end in BIAS_OF if name.endswith(end)), "")
    bias = tensors.get(name.removesuffix(ending) + BIAS_OF.get(ending, ""))
    if bias is None or name == ending:
        return False
    weight = tensors[name]
    bound = (weight.numel() / bias.numel()) ** -0.5
    drawn = abs(float(weight.double().std(correction=0)) / bound * 3**0.5 - 1) < 0.05
    inside = max(float(weight.abs().max()), float(bias.abs().max())) <= bound * 1.001
    return not bool(bias.any()) or (drawn and inside)


def _dead_channels(tensors: Mapping[str, Tensor]) -> Iterable[Finding]:
    """Output channels whose kernel is next to nothing beside the others'."""
    dead: dict[str, int] = {}
    for name, tensor in tensors.items():
        if tensor.ndim > 2 and bool(tensor.any()):
            channels = tensor.movedim(-1, 0) if name.endswith("kernel") else tensor  # Keras has them last
            largest = channels.flatten(1).abs().amax(1)
            if count := int((largest <= NOTHING * largest.max()).sum()):
                dead[name] = count
    if dead:
        yield Finding("dead-channels", f"{sum(dead.values())} output channels without weights", tuple(dead))


def _repeated(tensors: Mapping[str, Tensor]) -> Iterable[Finding]:
    """Kernels of the same content: tied, or copied by mistake."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.ndim > 1 and bool(tensor.any()) and not _constant(tensor):
            content = tensor.contiguous().flatten().view(torch.uint8).numpy().data
            key = tensor.dtype, tuple(tensor.shape), hashlib.blake2b(content, digest_size=16).digest()
            groups.setdefault(key, []).append(name)
    for names in groups.values():
        if len(names) > 1:
            yield Finding("repeated", "the same content", tuple(names))
