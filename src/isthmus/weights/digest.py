"""Networks told apart by what they compute."""

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor

from isthmus import records
from isthmus.nn.network import ResNet

__all__ = ["add_tensors", "network_digest"]


def network_digest(net: ResNet) -> str:
    """A hash of a network's spec, preprocessing, classes and weights."""
    facts = [records.to_dict(net.spec), records.to_dict(net.preprocess), net.classes]
    digest = hashlib.sha256(json.dumps(facts).encode())
    add_tensors(digest, net.state_dict().items())
    return digest.hexdigest()


def add_tensors(digest: "hashlib._Hash", tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Names and values, bit for bit."""
    for key, value in tensors:
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
