"""A network to a weight file that carries all that is known of it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isthmus.errors import WeightsError
from isthmus.nn.network import ResNet
from isthmus.records import to_dict
from isthmus.weights import files, layouts
from isthmus.weights.source import SCHEMA

__all__ = ["save_weights"]


def save_weights(
    net: ResNet, path: Path | str, *, layout: str = "native", extra: Mapping[str, Any] | None = None
) -> None:
    """Save a network as safetensors that `load` reads back, whole or not at all; `extra` must be plain JSON values.

    Raises RunError when the disk will not take it, WeightsError when classes and classifier disagree or the layout
    cannot name the network.
    """
    if net.classes and len(net.classes) != net.spec.num_classes:
        raise WeightsError(
            f"the network has {net.spec.num_classes} outputs and {len(net.classes)} class names; mend net.classes"
        )
    described = {
        "schema": SCHEMA,
        "spec": to_dict(net.spec),
        "layout": layout,
        "preprocess": to_dict(net.preprocess),
        "classes": list(net.classes),
        "extra": dict(extra or {}),
    }
    tensors = layouts.from_native(net.state_dict(), layout, net.spec)
    files.write(path, tensors, {"format": "pt", "isthmus": json.dumps(described)})
