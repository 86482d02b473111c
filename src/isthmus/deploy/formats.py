"""The files that other engines read: how each is written, opened, and described."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from isthmus.deploy.engines import EnginePrecision, Run, onnxruntime, openvino
from isthmus.deploy.program import KEY, Program, Translated, needed
from isthmus.errors import SpecError

__all__ = ["FORMATS", "Format", "format_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A kind of file: `write` makes it, `open` runs it in `engine`, `read` gives its description.

    `beside` are the suffixes of files that belong to it and carry its name.
    """

    title: str
    engine: str
    write: Callable[[Program | Translated, Path], object]
    open: Callable[[Path, EnginePrecision], Run]
    read: Callable[[Path], str]
    beside: tuple[str, ...] = ()


def read_onnx(path: Path) -> str:
    """The description in an ONNX file, empty without one."""
    model = needed("onnx", "onnx").load(path, load_external_data=False)
    return next((each.value for each in model.metadata_props if each.key == KEY), "")


def write_openvino(program: Program | Translated, path: Path) -> None:
    """OpenVINO's .xml and .bin, read from the ONNX translation, its precisions as they are.

    OpenVINO leaves out the antialiasing that ONNX asks of a resize, and has Pillow's own resize instead.
    """
    vino = needed("openvino", "openvino")
    model = vino.Core().read_model(program.onnx)
    for node in [each for each in model.get_ordered_ops() if each.get_type_name() == "Interpolate"]:
        kind = {"linear_onnx": "bilinear", "cubic": "bicubic"}[node.get_attributes()["mode"]]
        image, sizes, *_ = node.input_values()  # of all four axes, and Pillow's way is for two
        ops, sides = vino.opset11, [2, 3]
        picture = ops.gather(sizes, sides, 0)
        other = ops.interpolate(image, picture, f"{kind}_pillow", "sizes", axes=sides)
        node.output(0).replace(other.output(0))
    model.set_rt_info(program.description, KEY)
    vino.save_model(model, path, compress_to_fp16=False)


def read_openvino(path: Path) -> str:
    """The description in an .xml file, empty without one."""
    model = needed("openvino", "openvino").Core().read_model(path)
    return str(model.get_rt_info(KEY).value) if model.has_rt_info(KEY) else ""


def write_program(program: Program | Translated, path: Path) -> None:
    """torch.export's own archive; raises SpecError for what is an ONNX file already."""
    if isinstance(program, Translated):
        raise SpecError("torch.export has no int8 here: write .onnx or .xml")
    with path.open("wb") as file:
        torch.export.save(program.exported, file, extra_files={KEY: program.description})


def open_program(path: Path, _precision: EnginePrecision) -> Run:
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
        engine="onnxruntime",
        write=lambda program, path: path.write_bytes(program.onnx),
        open=onnxruntime,
        read=read_onnx,
    ),
    ".xml": Format(
        title="OpenVINO",
        engine="openvino",
        write=write_openvino,
        open=openvino,
        read=read_openvino,
        beside=(".bin",),
    ),
    ".pt2": Format(title="torch.export", engine="torch", write=write_program, open=open_program, read=read_program),
}
"""By the suffix of the file."""


def format_of(path: Path) -> Format:
    """What a file's suffix asks for; raises SpecError for one that asks for nothing."""
    if path.suffix not in FORMATS:
        known = ", ".join(f"{suffix} ({each.title})" for suffix, each in FORMATS.items())
        raise SpecError(f"{path} has no suffix that says what to write; known: {known}")
    return FORMATS[path.suffix]
