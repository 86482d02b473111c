"""Networks of other libraries holding the tensors of the same file: what ours are compared with."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.arch.spec import NetSpec
from isthmus.arch.variants import name_of
from isthmus.errors import WeightsError
from isthmus.weights.layouts import LAYOUTS, from_native
from isthmus.weights.published.hf import to_config
from isthmus.weights.source import Source

__all__ = ["Reference", "reference"]

KERAS = {
    "resnet50_keras": "ResNet50",
    "resnet101_keras": "ResNet101",
    "resnet152_keras": "ResNet152",
    "resnetv2_50_keras": "ResNet50V2",
    "resnetv2_101_keras": "ResNet101V2",
    "resnetv2_152_keras": "ResNet152V2",
}

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A library's own network: pictures (N, C, *size) in `precision` to outputs; `name` has the library's version."""

    name: str
    logits: Logits
    precision: torch.dtype
    tolerance: float


class Library(NamedTuple):
    """A library, the layouts that are its own, and how it makes the network of a source; None: it has no such one."""

    name: str
    layouts: tuple[str, ...]
    make: Callable[[Source, NetSpec], Logits | None]
    precision: torch.dtype = torch.float64
    tolerance: float = 1e-8


def reference(source: Source, spec: NetSpec) -> Reference:
    """The first library that has this network under the names of this file; raises WeightsError when there is none."""
    absent = []
    for library in LIBRARIES:
        if source.layout not in library.layouts:
            continue
        try:
            name = f"{library.name} {version(library.name)}"
        except PackageNotFoundError:
            absent.append(library.name)
            continue
        if (logits := library.make(source, spec)) is not None:
            return Reference(name=name, logits=logits, precision=library.precision, tolerance=library.tolerance)
    reason = (
        f"{' or '.join(absent)} could be the reference and is not installed: pip install {absent[0]}"
        if absent
        else f"no library known here has {spec.name or 'this network'} under the names of layout {source.layout}"
    )
    raise WeightsError(f"{source.name} was not verified: {reason}; or compare it with another file: --against FILE")


def _torchvision(source: Source, spec: NetSpec) -> Logits | None:
    from torchvision import models

    name = name_of(spec)
    if name not in models.list_models(module=models) or spec.in_channels != 3 or not spec.num_classes:
        return None
    return filled(models.get_model(name, weights=None, num_classes=spec.num_classes), source)


def _timm(source: Source, spec: NetSpec) -> Logits | None:
    import timm

    name = name_of(spec)
    if not timm.is_model(name):
        return None
    if spec.preact and source.layout == "native":  # whose names timm has for post-activation networks alone
        source = replace(source, tensors=from_native(source.tensors, "timm_resnetv2", spec).tensors)
    return filled(timm.create_model(name, num_classes=spec.num_classes, in_chans=spec.in_channels), source)


def _transformers(source: Source, spec: NetSpec) -> Logits | None:
    from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel

    as_theirs = replace(spec, norm_eps=LAYOUTS["transformers"].norm_eps or spec.norm_eps)
    config = ResNetConfig.from_dict(to_config(as_theirs, source.classes))
    if not spec.num_classes:
        headless = filled(ResNetModel(config), source)
        return lambda x: headless(x).pooler_output.flatten(1)
    whole = filled(ResNetForImageClassification(config), source)
    return lambda x: whole(x).logits


def _keras(source: Source, spec: NetSpec) -> Logits | None:
    name = KERAS.get(name_of(spec))
    if name is None or spec.in_channels != 3:
        return None
    os.environ.setdefault("KERAS_BACKEND", "torch")  # read once, when keras is first imported
    import keras  # type: ignore[import-untyped]

    # With a classifier of its own it would want one size of pictures, and end in a softmax.
    model = getattr(keras.applications, name)(weights=None, include_top=False, pooling="avg")
    if spec.num_classes:
        logits_of = keras.layers.Dense(spec.num_classes, name="predictions")
        model = keras.Model(model.input, logits_of(model.output))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for every layer, where the error says it once
            model.load_weights(source.path)
    except Exception as error:  # it has no family of its own: ValueError, KeyError, OSError, ...
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise WeightsError(f"Keras' own {name} refuses {source.name}: {reason}") from error

    def logits(x: Tensor) -> Tensor:
        found = model(x.permute(0, 2, 3, 1).contiguous().numpy(), training=False)
        return found.cpu() if isinstance(found, Tensor) else torch.from_numpy(np.asarray(found))  # of another backend

    return logits


def filled(module: nn.Module, source: Source) -> nn.Module:
    """A library's network with the tensors of a source, by its own strict loading, in double precision."""
    try:
        module.load_state_dict(source.tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(f"{source.name} does not fit the library's own network: {reason}") from error
    return module.double().eval()


LIBRARIES = (
    Library("transformers", ("transformers",), _transformers),
    Library("keras", ("keras", "keras_v2"), _keras, torch.float32, 1e-5),
    Library("torchvision", ("native", "torchvision"), _torchvision),
    Library("timm", ("native", "torchvision", "timm", "timm_resnetv2"), _timm),
)
