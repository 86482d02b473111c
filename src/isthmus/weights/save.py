"""A network to a weight file, or to a folder of the Hugging Face hub, with all that is known of it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isthmus.errors import WeightsError
from isthmus.nn.network import ResNet
from isthmus.records import to_dict
from isthmus.weights import files, layouts
from isthmus.weights.published.hf_folder import write_folder
from isthmus.weights.source import SCHEMA

__all__ = ["check_place", "description", "makes_folder", "save_weights"]


def save_weights(
    net: ResNet, path: Path | str, *, layout: str = "native", extra: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """Save a network in the names of `layout`, whole or not at all; `extra` must be plain JSON values.

    Returned are sentences on what the file keeps otherwise or not at all.

    The suffix of `path` says the format: .safetensors carries spec, preprocessing, classes and `extra`, so that `load`
    reads it back; .pth, .pkl and .h5 hold tensors alone. With layout transformers and none of these suffixes, `path` is
    a folder as the Hugging Face hub keeps it. Raises RunError when the disk will not take it, WeightsError when classes
    and classifier disagree, the layout cannot name the network, or `extra` is no JSON.
    """
    if not isinstance(net, ResNet):
        raise WeightsError(
            f"a {type(net).__module__}.{type(net).__name__} is no network of ours; make one of it: "
            f"create('resnet50', weights=net)"
        )
    path = Path(path)
    if net.classes and len(net.classes) != net.spec.num_classes:
        raise WeightsError(
            f"the network has {net.spec.num_classes} outputs and {len(net.classes)} class names; mend net.classes"
        )
    check_place(path, layout)
    metadata = {"format": "pt", "isthmus": description(net, layout, extra or {})}
    tensors, notes = layouts.from_native(net.state_dict(), layout, net.spec)
    if makes_folder(path, layout):
        write_folder(net, path, tensors, metadata, extra or {})
        return notes
    files.write(path, tensors, metadata)
    if path.suffix in ("", ".safetensors"):
        return notes
    known = f"which network it is ({net.spec.name or 'a spec of your own'}: read it with arch=), preprocessing"
    named = f" and {len(net.classes)} class names" if net.classes else ""
    usual = layouts.preprocess_of(layout, net.spec)
    taken = f"; readers take that of {layout}: {usual}" if usual not in (None, net.preprocess) else ""
    return (*notes, f"a {path.suffix} file does not say {known}{named}: {net.preprocess}{taken}")


def makes_folder(path: Path, layout: str) -> bool:
    """Whether weights in `layout` at `path` are a folder as the Hugging Face hub keeps it."""
    return layout == "transformers" and (path.is_dir() or not path.suffix)


def check_place(path: Path, layout: str) -> None:
    """Raise WeightsError for a name that asks for no format, or for one that `layout` cannot have."""
    if makes_folder(path, layout):
        return
    files.writer(path)
    if path.suffix == ".h5" and not layout.startswith("keras"):
        raise WeightsError(f"a .h5 file is for Keras' layouts, keras and keras_v2; write {layout} as .safetensors")


def description(net: ResNet, layout: str, extra: Mapping[str, Any]) -> str:
    """What the metadata of our files says of a network, as JSON; raises WeightsError for an `extra` that is none."""
    described = {
        "schema": SCHEMA,
        "spec": to_dict(net.spec),
        "layout": layout,
        "preprocess": to_dict(net.preprocess),
        "classes": list(net.classes),
    }
    try:
        return json.dumps(described | {"extra": dict(extra)}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"extra cannot be saved ({error}); it must be plain JSON: text, finite numbers, true, false, none, lists, "
            f"and tables with names as keys"
        ) from error
