"""Weights for another classifier or other input channels than they were trained for."""

from dataclasses import replace

import torch
from torch import Tensor

from isthmus.arch.preprocess import Preprocess

__all__ = ["adapt_input", "adapt_preprocess"]


def adapt_input(weight: Tensor, channels: int) -> Tensor:
    """A first convolution's weight (O, C, *kernel) for `channels` inputs: (O, channels, *kernel).

    The response to a grey picture, equal in all channels, is unchanged. One channel: the C are summed. Fewer than C:
    each gets the mean of the C, scaled by C / channels. More: they repeat in order, each divided by how often it occurs
    (which is timm's rule where `channels` is a multiple of C).
    """
    old = weight.shape[1]
    if channels == old:
        return weight
    if channels < old:
        mean = weight.sum(1, keepdim=True) / channels
        return mean.expand(-1, channels, *weight.shape[2:]).clone()
    index = torch.arange(channels) % old
    times = torch.bincount(index, minlength=old).to(weight.dtype)
    return weight[:, index] / times[index].view(1, -1, *(1,) * (weight.ndim - 2))


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
