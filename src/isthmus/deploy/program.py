"""A network as torch.export sees it, with its sizes left open, and its translation to ONNX."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from isthmus.arch.preprocess import Preprocess
from isthmus.deploy.graph import FromPictures, FromPixels
from isthmus.errors import MissingExtraError, SpecError
from isthmus.messages import first_line
from isthmus.nn.network import ResNet
from isthmus.weights.save import description

__all__ = [
    "KEY",
    "MORE",
    "Program",
    "Translated",
    "input_size",
    "needed",
    "of_images",
    "of_pictures",
    "of_pixels",
    "quiet",
]

KEY = "isthmus"  # under which the metadata of a file describes its network
AXES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
PICTURE_AXES = {0: "batch", 1: "height", 2: "width"}
MORE = 32  # pixels that one side of an example has more than another


@dataclass(frozen=True, kw_only=True)
class Program:
    """An exported network: its input's name, the names of the axes that stay open, and a description."""

    exported: ExportedProgram
    input: str
    axes: Mapping[int, str]
    description: str

    @cached_property
    def onnx(self) -> bytes:
        """Torch's own translation to ONNX, weights and description inside."""
        needed("onnxscript", "onnx")
        with warnings.catch_warnings(), quiet("torch.fx.experimental.symbolic_shapes"):
            warnings.simplefilter("ignore")  # the exporter warns of its own insides
            found: Any = torch.onnx.export(
                self.exported,
                dynamo=True,
                input_names=[self.input],
                output_names=["logits"],
                dynamic_shapes=(dict(self.axes),),
                verbose=False,
            )
        model = found.model_proto
        model.metadata_props.add(key=KEY, value=self.description)
        return bytes(model.SerializeToString())


@dataclass(frozen=True, kw_only=True, slots=True)
class Translated:
    """A network that is an ONNX file already: one in 8 bits."""

    onnx: bytes
    description: str


def needed(library: str, extra: str) -> Any:
    """An optional library; raises MissingExtraError."""
    try:
        return import_module(library)
    except ModuleNotFoundError as error:
        raise MissingExtraError(library, extra) from error


def input_size(net: ResNet) -> tuple[int, ...]:
    """What a network is usually given."""
    return (net.preprocess.crop,) * 2 if net.spec.dims == 2 else net.plan.image_size


def of_images(form: ResNet) -> Program:
    """From normalised images to logits."""
    names = AXES[form.spec.dims]
    sides = [side + MORE * place for place, side in enumerate(input_size(form))]  # unlike, so that none is tied
    axes = {0: "batch", **dict(enumerate(names, 2))}
    return traced(form, torch.zeros(2, form.spec.in_channels, *sides), "images", axes, description(form, "native", {}))


def of_pictures(form: ResNet) -> Program:
    """From pictures to logits."""
    text = description(form, "native", {})
    return traced(FromPictures(form), picture_example(form.preprocess), "pictures", PICTURE_AXES, text)


def of_pixels(record: Preprocess) -> Program:
    """From pictures to what the network takes."""
    return traced(FromPixels(record), picture_example(record), "pictures", PICTURE_AXES, "")


def picture_example(record: Preprocess) -> Tensor:
    """A batch of pictures, of a size that ties no side to another or to the record."""
    return torch.zeros(
        2, record.resize + MORE + 1, record.resize + 2 * MORE + 3, len(record.channels), dtype=torch.uint8
    )


def traced(module: nn.Module, example: Tensor, name: str, axes: Mapping[int, str], text: str) -> Program:
    """The program of a module, with the sizes of `axes` left open; raises SpecError saying what torch cannot trace."""
    try:
        with quiet("torch.fx.experimental.symbolic_shapes"):  # it tells at length which ranges it leaves unsimplified
            exported = torch.export.export(module.eval(), (example,), dynamic_shapes=(dict.fromkeys(axes, Dim.AUTO),))
    except Exception as error:  # of torch.export, which has no base for its own
        raise SpecError(f"torch cannot trace this network: {first_line(error)}") from error
    return Program(exported=exported, input=name, axes=axes, description=text)


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Hears nothing below an error of these loggers meanwhile."""
    found = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(found, levels, strict=True):
            logger.setLevel(level)
