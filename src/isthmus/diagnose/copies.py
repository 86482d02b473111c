"""What a diagnosis works on: a copy of the network, its pictures ready for it, and random numbers of its own."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.arch.plan import plan
from isthmus.arch.preprocess import Preprocess
from isthmus.data.transform import normalise
from isthmus.errors import DataError
from isthmus.nn.batchnorm import separate_batchnorm
from isthmus.nn.memory import save_memory, work_in_place
from isthmus.nn.network import ResNet

__all__ = ["check_pictures", "copied", "inputs", "undisturbed_random"]


def copied(net: ResNet) -> ResNet:
    """A copy in evaluation, without anybody's hooks, in single precision at least, nothing saved or done in place or
    together with other processes.
    """
    # What deepcopy finds here it takes as copied already: no hooks, which may hold anything, and no graph of a map
    # that somebody kept in a module.
    memo: dict[int, Any] = {}
    for module in net.modules():
        for name, value in vars(module).items():
            if isinstance(value, dict) and "_hooks" in name:
                memo[id(value)] = type(value)()
            elif isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach()
    other = copy.deepcopy(net, memo)
    separate_batchnorm(other)  # other processes may be doing something else
    save_memory(other, "plain")
    work_in_place(other, on=False)
    if any(each.dtype in (torch.float16, torch.bfloat16) for each in other.parameters()):
        other = other.float()
    if net.spec.dims == 2:
        other = other.to(memory_format=torch.channels_last)
    return other.eval()


@contextmanager
def undisturbed_random(device: torch.device) -> Iterator[None]:
    """A context with random numbers of its own, the same each time; those of the caller go on as if it were not there.

    Covers torch on the CPU and on `device`, numpy and Python.
    """
    generators = [torch.default_generator, *generators_of(device)]
    python, numbers, states = random.getstate(), np.random.get_state(), [each.get_state() for each in generators]  # noqa: NPY002
    try:
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - an own block may draw from it
        for each in generators:
            each.manual_seed(0)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002
        for each, state in zip(generators, states, strict=True):
            each.set_state(state)


def generators_of(device: torch.device) -> list[torch.Generator]:
    """What a network on `device` draws random numbers from, beside the CPU's; of several GPUs its own."""
    if device.type == "cuda":
        return [torch.cuda.default_generators[device.index]]
    return [torch.mps._get_default_mps_generator()] if device.type == "mps" else []  # noqa: SLF001


def check_pictures(net: ResNet, images: Tensor, labels: Tensor | None) -> None:
    """Raise DataError or SpecError for pictures that the network cannot take, or labels that do not belong to them."""
    spec = net.spec
    pixels = images.dtype == torch.uint8
    channels = len(net.preprocess.channels) if pixels else spec.in_channels
    fits = images.ndim == spec.dims + 2 and images.shape[1] == channels and (images.is_floating_point() or pixels)
    if not fits or (pixels and spec.dims != 2):
        raise DataError(
            f"a diagnosis of this network takes pictures as torch.uint8 (N, {channels}, H, W), or what it takes itself "
            f"as floats (N, {spec.in_channels}, {', '.join('DHW'[-spec.dims :])}); got {images.dtype} "
            f"{tuple(images.shape)}"
        )
    if len(images) < 2:
        raise DataError("a diagnosis needs two pictures or more, better 64; give more")
    if labels is not None:
        whole = labels.shape == images.shape[:1] and not labels.is_floating_point()
        if not whole or (len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < max(spec.num_classes, 1)):
            raise DataError(
                f"labels must be {len(images)} whole numbers from 0 to {spec.num_classes - 1}; got {labels.dtype} "
                f"{tuple(labels.shape)}"
            )
    _ = plan(spec, tuple(images.shape[2:])).blocks  # where nothing is left of a map, it says so


def inputs(net: nn.Module, images: Tensor, record: Preprocess) -> Tensor:
    """What the network takes: pictures prepared as `record` says, on its device, in its precision and layout."""
    first = next(net.parameters())
    ready = normalise(images.to(first.device), record) if images.dtype == torch.uint8 else images
    ready = ready.to(first.device, first.dtype)
    ready = ready.clone() if ready.is_inference() else ready  # so that gradients can go through it
    return ready.contiguous(memory_format=torch.channels_last) if ready.ndim == 4 else ready
