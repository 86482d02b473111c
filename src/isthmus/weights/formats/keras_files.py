"""What Keras writes into HDF5: weights of both generations and whole models, as `layer/variable` names.

The variables are `kernel`, `bias`, `gamma`, `beta`, `moving_mean` and `moving_variance`, with Keras' own axis order.
"""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from isthmus.errors import MissingExtraError, WeightsError
from isthmus.weights.formats.hdf5 import Group, read_tree
from isthmus.weights.formats.stored import Span, Stored

__all__ = ["WEIGHTS_MEMBER", "read_keras", "read_keras_archive", "write_keras"]

WEIGHTS_MEMBER = "model.weights.h5"
CONFIG_MEMBER = "config.json"
MAX_CONFIG = 1 << 21  # bytes; that of a network with 1,000 layers has half of it
ATTRIBUTE_BYTES = 64_512  # more does not fit into the header of an HDF5 object, so Keras cuts the list into pieces
NORM = ("gamma", "beta", "moving_mean", "moving_variance")
KERNEL = ("kernel", "bias")
VARIABLES = {"batch_normalization": NORM, "conv2d": KERNEL, "conv1d": KERNEL, "conv3d": KERNEL, "dense": KERNEL}
"""What Keras 3 numbers, by the kind of the layer; a layer without a bias just ends before it."""
ORDER = (*NORM, *KERNEL)
FIRST_VERSION = b"2.0.0"  # of Keras that reads what we write
ASIDE = ("optimizer", "seed_generator")  # what is no weight: the optimiser's state, and of dropout the random numbers


def read_keras(file: BinaryIO, within: Span) -> dict[str, Stored]:
    """The variables of a Keras HDF5 file; raises ValueError for any other."""
    return _variables(read_tree(file, within), {})


def read_keras_archive(file: BinaryIO, members: Mapping[str, Span]) -> dict[str, Stored]:
    """The variables of a `.keras` archive, whose configuration names the layers where the weights do not."""
    span = members.get(CONFIG_MEMBER)
    if span is None or span.length > MAX_CONFIG:
        raise ValueError(f"a Keras archive without {CONFIG_MEMBER}, or with a huge one")
    file.seek(span.start)
    names = dict(_layer_names(json.loads(file.read(span.length))))
    return _variables(read_tree(file, members[WEIGHTS_MEMBER]), names)


def _variables(root: Group, names: Mapping[str, str]) -> dict[str, Stored]:
    whole = root.members.get("model_weights")
    root = whole if isinstance(whole, Group) else root
    legacy = _texts(root, "layer_names")
    found: dict[str, Stored] = {}
    for name, stored in _legacy(root, legacy) if legacy else _numbered(root, "", names):
        if name in found:
            raise ValueError(f"two variables named {name[:80]!r}")
        found[name] = stored
    if not found:
        raise ValueError("an HDF5 file without the weights of Keras layers")
    return found


def _texts(group: Group, name: str) -> list[str]:
    """An attribute that is a list of names, or its pieces: name0, name1, ..."""
    if name in group.attributes:
        return group.attributes[name]
    pieces = takewhile(lambda piece: piece in group.attributes, (f"{name}{number}" for number in count()))
    return [text for piece in pieces for text in group.attributes[piece]]


def _legacy(root: Group, layers: list[str]) -> Iterator[tuple[str, Stored]]:
    """Keras 1 and 2, and 3 where asked: lists of the layers' names and, in each layer's group, of its variables'."""
    for layer in layers:
        group = _group(root, layer)
        names = [text.split(":")[0].split("/") for text in _texts(group, "weight_names")]
        # A network that is used as a layer: its own layers stand before the variables.
        nested = any(len(parts) > 2 for parts in names) or len({parts[-2] for parts in names if len(parts) > 1}) > 1
        for parts, text in zip(names, _texts(group, "weight_names"), strict=True):
            stored = group.at(text)
            if isinstance(stored, Group):
                raise TypeError(f"a group where the variable {text[:80]!r} should be")
            yield f"{parts[-2] if nested else layer}/{parts[-1]}", stored


def _numbered(group: Group, path: str, names: Mapping[str, str]) -> Iterator[tuple[str, Stored]]:
    """Keras 3: groups named after the layers' classes, in each a group `vars` that numbers its variables."""
    variables = group.members.get("vars")
    if isinstance(variables, Group) and variables.members:
        layer = (variables.attributes.get("name") or [names.get(path, "")])[0]
        if not layer:
            raise WeightsError(
                f"the Keras weights do not name their layers ({path.strip('/') or 'the model itself'}); "
                f"save the whole model, model.save('model.keras'), which does"
            )
        known = _variable_names(path, layer, len(variables.members))
        for name, number in zip(known, sorted(variables.members, key=int), strict=True):
            stored = variables.members[number]
            if isinstance(stored, Group):
                raise TypeError(f"a group where variable {number[:80]} of {layer!r} should be")
            yield f"{layer}/{name}", stored
    for name, member in group.members.items():
        if isinstance(member, Group) and name != "vars" and _kind(name) not in ASIDE:
            yield from _numbered(member, f"{path}/{name}", names)


def _variable_names(path: str, layer: str, number: int) -> tuple[str, ...]:
    known = VARIABLES.get(_kind(path.rpartition("/")[2]))
    if known is None:  # of a kind that no residual network has: the reader of the names will say so
        return tuple(str(index) for index in range(number))
    if number > len(known) or (known is NORM and number < len(known)):
        raise WeightsError(
            f"the Keras layer {layer!r} has {number} variables and not {', '.join(known)}, and the file only numbers "
            f"them; save a legacy file, which names them: a batch norm needs center=True and scale=True"
        )
    return known[:number]


def _kind(group: str) -> str:
    """The class of a layer from the name of its group: `conv2d_12` is a `conv2d`."""
    return re.sub(r"_\d+$", "", group)


def _group(root: Group, path: str) -> Group:
    found = root.at(path)
    if not isinstance(found, Group):
        raise TypeError(f"no group {path[:80]!r}")
    return found


def _layer_names(config: Any, path: str = "/layers") -> Iterator[tuple[str, str]]:
    """Path of the group and name of every layer of a configuration: classes in snake case, counted from the second."""
    seen: dict[str, int] = {}
    for layer in config.get("config", {}).get("layers", []):
        words = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", layer["class_name"])
        kind = re.sub(r"([a-z])([A-Z])", r"\1_\2", words).lower()
        group = f"{path}/{kind}" + (f"_{seen[kind]}" if kind in seen else "")
        seen[kind] = seen.get(kind, 0) + 1
        yield group, layer["config"]["name"]
        yield from _layer_names(layer, f"{group}/layers")


def write_keras(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A legacy weights file, which `keras.Model.load_weights` reads by order of layers or `by_name=True`.

    Names are `layer/variable`; layers keep the order of the names, which without `by_name` must be the model's.
    Raises MissingExtraError without h5py, and WeightsError for a type that NumPy does not have.
    """
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError("h5py", "keras") from error
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, variable = name.rpartition("/")
        if not layer or tensor.dtype == torch.bfloat16:
            raise WeightsError(
                f"{name!r} ({tensor.dtype}) cannot be a Keras variable: they are named layer/variable, and bfloat16 "
                f"becomes float32 by tensor.float()"
            )
        layers.setdefault(layer, {})[variable] = tensor
    with h5py.File(path, "w") as file:
        file.attrs.update({"backend": b"tensorflow", "keras_version": FIRST_VERSION})
        _write_texts(file, "layer_names", list(layers))
        for layer, variables in layers.items():
            group = file.create_group(layer)
            ordered = sorted(variables, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
            _write_texts(group, "weight_names", [f"{layer}/{name}" for name in ordered])
            for name in ordered:
                group.create_dataset(f"{layer}/{name}", data=variables[name].detach().cpu().numpy())


def _write_texts(group: Any, name: str, texts: list[str]) -> None:
    """A list of names as an attribute, in pieces where it would not fit into the header of an object."""
    encoded = [text.encode() for text in texts]
    fit = max(ATTRIBUTE_BYTES // max(map(len, encoded)), 1)
    if len(encoded) <= fit:
        group.attrs[name] = encoded
        return
    for number, start in enumerate(range(0, len(encoded), fit)):
        group.attrs[f"{name}{number}"] = encoded[start : start + fit]
