"""The files that other engines read: how each is written from one exported program, opened, and described."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import Dim, ExportedProgram

from isthmus.errors import MissingExtraError

__all__ = ["FORMATS", "Format", "Program", "Run", "trace"]

KEY = "isthmus"  # under which the metadata of a file describes its network
Run = Callable[[NDArray[Any]], NDArray[np.float32]]
"""From the one input of a file to its one output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A network as torch.export sees it: its input's name, the names of the axes that stay open, and a description."""

    exported: ExportedProgram
    input: str
    axes: Mapping[int, str]
    description: str


def trace(module: torch.nn.Module, example: torch.Tensor, name: str, axes: Mapping[int, str], text: str) -> Program:
    """The program of a module whose forward takes `example`, with the sizes of `axes` left open."""
    exported = torch.export.export(module, (example,), dynamic_shapes=(dict.fromkeys(axes, Dim.AUTO),))
    return Program(exported=exported, input=name, axes=axes, description=text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A kind of file: `write` makes it, `open` runs it, `read` gives its description.

    `beside` are the suffixes of files that belong to it and carry its name.
    """

    title: str
    write: Callable[[Program, Path], object]
    open: Callable[[Path], Run]
    read: Callable[[Path], str]
    beside: tuple[str, ...] = ()


def needed(library: str, extra: str) -> Any:
    """An optional library; raises MissingExtraError."""
    try:
        return import_module(library)
    except ModuleNotFoundError as error:
        raise MissingExtraError(library, extra) from error


def onnx_bytes(program: Program) -> bytes:
    """Torch's own translation to ONNX, weights inside."""
    needed("onnxscript", "onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own insides
        found: Any = torch.onnx.export(
            program.exported,
            dynamo=True,
            input_names=[program.input],
            output_names=["logits"],
            dynamic_shapes=(dict(program.axes),),
            verbose=False,
        )
    model = found.model_proto
    model.metadata_props.add(key=KEY, value=program.description)
    return bytes(model.SerializeToString())


def open_onnx(path: Path) -> Run:
    """ONNX Runtime on the CPU."""
    session = needed("onnxruntime", "onnx").InferenceSession(path, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    return lambda batch: session.run(None, {entry.name: batch})[0]


def read_onnx(path: Path) -> str:
    """The description in an ONNX file, empty without one."""
    model = needed("onnx", "onnx").load(path, load_external_data=False)
    return next((each.value for each in model.metadata_props if each.key == KEY), "")


def write_openvino(program: Program, path: Path) -> None:
    """OpenVINO's .xml and .bin in fp32, read from the ONNX translation.

    OpenVINO leaves out the antialiasing that ONNX asks of a resize, and has Pillow's own resize instead.
    """
    openvino = needed("openvino", "openvino")
    model = openvino.Core().read_model(onnx_bytes(program))
    for node in [each for each in model.get_ordered_ops() if each.get_type_name() == "Interpolate"]:
        kind = {"linear_onnx": "bilinear", "cubic": "bicubic"}[node.get_attributes()["mode"]]
        image, sizes, *_ = node.input_values()  # of all four axes, and Pillow's way is for two
        ops, sides = openvino.opset11, [2, 3]
        picture = ops.gather(sizes, sides, 0)
        other = ops.interpolate(image, picture, f"{kind}_pillow", "sizes", axes=sides)
        node.output(0).replace(other.output(0))
    model.set_rt_info(program.description, KEY)
    openvino.save_model(model, path, compress_to_fp16=False)


def open_openvino(path: Path) -> Run:
    """OpenVINO on the CPU, in fp32: left alone, it would take bf16 where the CPU has it."""
    compiled = needed("openvino", "openvino").Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda batch: compiled(batch)[0]


def read_openvino(path: Path) -> str:
    """The description in an .xml file, empty without one."""
    model = needed("openvino", "openvino").Core().read_model(path)
    return str(model.get_rt_info(KEY).value) if model.has_rt_info(KEY) else ""


def write_program(program: Program, path: Path) -> None:
    """torch.export's own archive."""
    with path.open("wb") as file:
        torch.export.save(program.exported, file, extra_files={KEY: program.description})


def open_program(path: Path) -> Run:
    """Torch itself."""
    module = torch.export.load(path).module()
    return lambda batch: module(torch.from_numpy(batch)).numpy()


def read_program(path: Path) -> str:
    """The description in an archive, empty without one."""
    extra = {KEY: ""}
    torch.export.load(path, extra_files=extra)
    return extra[KEY]


FORMATS = {
    ".onnx": Format(
        title="ONNX",
        write=lambda program, path: path.write_bytes(onnx_bytes(program)),
        open=open_onnx,
        read=read_onnx,
    ),
    ".xml": Format(title="OpenVINO", write=write_openvino, open=open_openvino, read=read_openvino, beside=(".bin",)),
    ".pt2": Format(title="torch.export", write=write_program, open=open_program, read=read_program),
}
"""By the suffix of the file."""
