"""A network as a file for other engines, compared with the network before it counts."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from isthmus.data.decode import Pixels
from isthmus.deploy.compare import (
    Compared,
    compare_images,
    compare_pictures,
    compare_pixels,
    compare_runs,
    made_up,
)
from isthmus.deploy.engines import ENGINES, EnginePrecision, Model, Run, Work
from isthmus.deploy.formats import Format, format_of
from isthmus.deploy.predictor import Choice, choose
from isthmus.deploy.program import Program, Translated, of_images, of_pictures, of_pixels
from isthmus.deploy.quantize import Quantised
from isthmus.errors import ExportError, IsthmusError, RunError, SpecError
from isthmus.messages import first_line
from isthmus.nn.network import ResNet
from isthmus.weights.save import description

__all__ = ["NOT_BOTH", "Exported", "export"]

NOT_BOTH = "int8 and preprocessing inside cannot be had together: leave one out"


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """A file that computes what its network does, and the comparisons that show it.

    Of int8 also how it predicts, and its speed beside that of fp32 and bf16.
    """

    path: Path
    title: str
    bytes: int
    compared: tuple[Compared, ...]
    int8: Quantised | None = None
    speed: Choice | None = None


def export(
    net: ResNet,
    path: Path | str,
    *,
    preprocessing: bool = False,
    int8: Quantised | None = None,
    pictures: Sequence[Pixels] = (),
) -> Exported:
    """Write a network in evaluation, folded and in fp32, as .onnx, .xml (OpenVINO) or .pt2 (torch.export).

    The file takes normalised float32 images (N, C, *size) of any number and size, or with `preprocessing` uint8
    pictures (N, H, W, C) as they are decoded, of any size, and averages over the views of a prediction; it gives logits
    (N, classes). It carries spec, class names and preprocessing. It is run on `pictures` (made-up ones, unless given)
    in two batch sizes and two picture sizes beside the network, and is there only when both agree: raises ExportError
    when they do not, SpecError for a network that cannot be exported, MissingExtraError, RunError when the disk will
    not take it. What `quantize` gave as `int8` is written instead of fp32 where it is faster than fp32 and bf16 in the
    file's own engine; PrecisionError where it is not.
    """
    path = Path(path)
    kind = format_of(path)
    if preprocessing and net.spec.dims != 2:
        raise SpecError(f"a network for {net.spec.dims} dimensions takes no pictures: export it without preprocessing")
    if int8 and preprocessing:
        raise SpecError(NOT_BOTH)
    if int8 and (kind.engine not in int8.engines or not int8.judged):
        raise SpecError(f"this int8 was not measured in the engine of {path.suffix}: quantize for {kind.engine}")
    if preprocessing and net.spec.in_channels != len(net.preprocess.channels):
        raise SpecError(
            f"the network takes {net.spec.in_channels} channels, and pictures in {net.preprocess.channels} have "
            f"{len(net.preprocess.channels)}: export it without preprocessing"
        )
    model, pictures = Model(net, int8), pictures or made_up(net.preprocess)
    with put_in_place(path, kind) as temporary:
        speed = None
        with blamed(kind):
            if int8:
                speed, _ = choose(model, engine=kind.engine, precision="int8")  # type: ignore[arg-type]
                program = Translated(onnx=int8.onnx, description=description(model.form, "native", {}))
                run, judged = (
                    written(kind, temporary, program, "int8"),
                    ENGINES[kind.engine].open(model, "int8", Work()),
                )
                compared = [compare_runs(run, judged, model.reference, pictures)]
            elif preprocessing:
                pixels = written(kind, temporary.with_stem("pixels"), of_pixels(net.preprocess))
                whole = written(kind, temporary, of_pictures(model.form))
                compared = [
                    *compare_pixels(pixels, net.preprocess, pictures),
                    *compare_pictures(whole, model.reference, pictures),
                ]
            else:
                run = written(kind, temporary, of_images(model.form))
                compared = list(compare_images(run, model.reference, pictures))
        if wrong := [str(each) for each in compared if not each.difference <= each.limit]:
            raise ExportError(
                f"{kind.title} does not compute what the network does ({'; '.join(wrong)}); {path} was not written: "
                f"try another format, or other versions of torch and {kind.title}"
            )
    size = sum(path.with_suffix(suffix).stat().st_size for suffix in (path.suffix, *kind.beside))
    return Exported(path=path, title=kind.title, bytes=size, compared=tuple(compared), int8=int8, speed=speed)


def written(kind: Format, path: Path, program: Program | Translated, precision: EnginePrecision = "fp32") -> Run:
    """The file as its own engine runs it."""
    kind.write(program, path)
    return kind.open(path, precision)


@contextmanager
def blamed(kind: Format) -> Iterator[None]:
    """What goes wrong with a file, written, opened or run, as an ExportError."""
    try:
        yield
    except (IsthmusError, OSError):
        raise
    except Exception as error:  # each engine has its own
        raise ExportError(
            f"{kind.title} cannot express or run this network: {first_line(error)}; try another format"
        ) from error


@contextmanager
def put_in_place(path: Path, kind: Format) -> Iterator[Path]:
    """A path in a folder beside `path`; what is written there takes its place at the end, unless something fails."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            temporary = Path(folder) / path.name
            yield temporary
            for suffix in (*kind.beside, path.suffix):  # the file itself last: it is what people look for
                temporary.with_suffix(suffix).replace(path.with_suffix(suffix))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error
