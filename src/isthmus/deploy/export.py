"""A network as a file for other engines, compared with the network before it counts."""

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.arch.preprocess import Preprocess
from isthmus.data.augment import views
from isthmus.data.decode import Pixels
from isthmus.data.transform import centred, normalise
from isthmus.deploy.formats import FORMATS, Format, Program, Run, trace
from isthmus.deploy.graph import FromPictures, FromPixels, ready
from isthmus.errors import ExportError, IsthmusError, RunError, SpecError
from isthmus.messages import first_line
from isthmus.nn.network import ResNet
from isthmus.weights.save import description

__all__ = ["Compared", "Exported", "export"]

AXES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
PICTURE_AXES = {0: "batch", 1: "height", 2: "width"}
BATCHES = (1, 3)
MORE = 32  # pixels that the second size of a comparison has more
LOGITS = 1e-4  # of the largest logit, where both sides are given the same numbers
LEVELS = 2.001  # grey levels before the first convolution
LOGITS_OF_PICTURES = 0.05  # of the largest logit, where pixels may differ by so many levels


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A comparison of a file with its network: what was compared, the largest difference, and what is allowed."""

    what: str
    difference: float
    limit: float

    def __str__(self) -> str:
        """In a line."""
        return f"{self.what}: {self.difference:.2g} (at most {self.limit:g})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """A file that computes what its network does, and the comparisons that show it."""

    path: Path
    title: str
    bytes: int
    compared: tuple[Compared, ...]


def export(net: ResNet, path: Path | str, *, preprocessing: bool = False, pictures: Sequence[Pixels] = ()) -> Exported:
    """Write a network in evaluation, folded and in fp32, as .onnx, .xml (OpenVINO) or .pt2 (torch.export).

    The file takes normalised float32 images (N, C, *size) of any number and size, or with `preprocessing` uint8
    pictures (N, H, W, C) as they are decoded, of any size, and averages over the views of a prediction; it gives logits
    (N, classes). It carries spec, class names and preprocessing. It is run on `pictures` (made-up ones, unless given)
    in two batch sizes and two picture sizes beside the network, and is there only when both agree: raises ExportError
    when they do not, SpecError for a network that cannot be exported, MissingExtraError, RunError when the disk will
    not take it.
    """
    path = Path(path)
    kind = FORMATS.get(path.suffix)
    if kind is None:
        known = ", ".join(f"{suffix} ({each.title})" for suffix, each in FORMATS.items())
        raise SpecError(f"{path} has no suffix that says what to write; known: {known}")
    if preprocessing and net.spec.dims != 2:
        raise SpecError(f"a network for {net.spec.dims} dimensions takes no pictures: export it without preprocessing")
    form, reference = ready(net), copy.deepcopy(net).cpu().float()
    pictures = pictures or made_up(net.preprocess)
    with put_in_place(path, kind) as temporary:
        if preprocessing:
            compared = [
                *compare_pixels(kind, temporary.with_stem("pixels"), form.preprocess, pictures),
                *compare_pictures(written(kind, temporary, program_of_pictures(form)), reference, pictures),
            ]
        else:
            compared = list(compare_images(written(kind, temporary, program_of_images(form)), reference, pictures))
        if wrong := [str(each) for each in compared if not each.difference <= each.limit]:
            raise ExportError(
                f"{kind.title} does not compute what the network does ({'; '.join(wrong)}); {path} was not written: "
                f"try another format, or other versions of torch and {kind.title}"
            )
    size = sum(path.with_suffix(suffix).stat().st_size for suffix in (path.suffix, *kind.beside))
    return Exported(path=path, title=kind.title, bytes=size, compared=tuple(compared))


def input_size(net: ResNet) -> tuple[int, ...]:
    """What a network is usually given."""
    return (net.preprocess.crop,) * 2 if net.spec.dims == 2 else net.plan.image_size


def program_of_images(form: ResNet) -> Program:
    """From normalised images to logits."""
    names = AXES[form.spec.dims]
    sides = [side + MORE * place for place, side in enumerate(input_size(form))]  # unlike, so that none is tied
    example = torch.zeros(2, form.spec.in_channels, *sides)
    axes = {0: "batch", **dict(enumerate(names, 2))}
    return traced(form, example, "images", axes, form)


def program_of_pictures(form: ResNet) -> Program:
    """From pictures to logits."""
    return traced(FromPictures(form), picture_example(form.preprocess), "pictures", PICTURE_AXES, form)


def picture_example(record: Preprocess) -> Tensor:
    """A batch of pictures, of a size that ties no side to another or to the record."""
    return torch.zeros(
        2, record.resize + MORE + 1, record.resize + 2 * MORE + 3, len(record.channels), dtype=torch.uint8
    )


def traced(module: nn.Module, example: Tensor, name: str, axes: dict[int, str], form: ResNet) -> Program:
    """A program with the description of its network; raises SpecError naming what torch cannot trace."""
    try:
        return trace(module.eval(), example, name, axes, description(form, "native", {}))
    except Exception as error:  # of torch.export, which has no base for its own
        raise SpecError(f"torch cannot trace this network: {first_line(error)}") from error


def written(kind: Format, path: Path, program: Program) -> Run:
    """The file as its own engine runs it; raises ExportError when that cannot write or read it."""
    try:
        kind.write(program, path)
        return kind.open(path)
    except (IsthmusError, OSError):
        raise
    except Exception as error:  # each engine has its own
        raise ExportError(
            f"{kind.title} cannot express this network: {first_line(error)}; try another format"
        ) from error


def compare_images(run: Run, reference: ResNet, pictures: Sequence[Pixels]) -> Iterator[Compared]:
    """Logits in every size of batch and picture."""
    for more in (0, MORE):
        sides = tuple(side + more for side in input_size(reference))
        images = network_input(reference, sides, pictures)
        for count in BATCHES:
            yield Compared(
                what=f"logits of {count} images of {' × '.join(map(str, sides))}",
                difference=relative(run(images[:count].numpy()), logits(reference, images[:count])),
                limit=LOGITS,
            )


def compare_pixels(kind: Format, path: Path, record: Preprocess, pictures: Sequence[Pixels]) -> Iterator[Compared]:
    """What the engine makes of pictures before the first convolution."""
    program = trace(FromPixels(record), picture_example(record), "pictures", PICTURE_AXES, "")
    run, std = written(kind, path, program), torch.tensor(record.std).mul(255)[:, None, None]
    most = max(
        float((torch.from_numpy(run(each[None])) - network_pixels(each, record)).mul(std).abs().max())
        for each in pictures
    )
    yield Compared(what=f"grey levels of {len(pictures)} pictures before the network", difference=most, limit=LEVELS)


def compare_pictures(run: Run, reference: ResNet, pictures: Sequence[Pixels]) -> Iterator[Compared]:
    """Logits of pictures in every size of batch; the best class must be the same wherever it is clear."""
    record = reference.preprocess
    for count in BATCHES:
        worst, others = 0.0, 0
        for each in pictures:
            batch = np.stack([each, each[:, ::-1], each[::-1]][:count])
            found = torch.from_numpy(run(batch))
            seen = views(torch.cat([network_pixels(one, record) for one in batch]), record.views)
            wanted = torch.stack([logits(reference, view) for view in seen]).mean(0)
            difference = relative(found.numpy(), wanted)
            worst = max(worst, difference)
            best = wanted.topk(min(2, wanted.shape[1])).values
            clear = (best[:, 0] - best[:, -1]) > 2 * difference * wanted.abs().max()
            others += int(((found.argmax(1) != wanted.argmax(1)) & clear).sum())
        yield Compared(what=f"logits of pictures, {count} at once", difference=worst, limit=LOGITS_OF_PICTURES)
        yield Compared(what=f"other classes, {count} at once", difference=others, limit=0)


def network_pixels(pixels: Pixels, record: Preprocess) -> Tensor:
    """A picture as a prediction of ours sees it: (1, C, crop, crop)."""
    return normalise(torch.from_numpy(centred(np.ascontiguousarray(pixels), record))[None].permute(0, 3, 1, 2), record)


def network_input(reference: ResNet, sides: tuple[int, ...], pictures: Sequence[Pixels]) -> Tensor:
    """As many images as the largest batch asks for: pictures in their order, and numbers at random in 1D and 3D."""
    channels, record = reference.spec.in_channels, reference.preprocess
    if len(sides) != 2 or channels != len(record.channels):
        return torch.randn(max(BATCHES), channels, *sides, generator=torch.Generator().manual_seed(0))
    images = [network_pixels(each, record.at(max(sides))) for each in pictures[: max(BATCHES)]]
    images = [F.interpolate(each, size=sides) if each.shape[2:] != sides else each for each in images]
    return torch.cat([images[place % len(images)] for place in range(max(BATCHES))]).contiguous()


def made_up(record: Preprocess) -> list[Pixels]:
    """Smooth colours and sharp noise, wide and tall, larger and smaller than the network's input."""
    random = torch.Generator().manual_seed(0)
    sizes = [(record.resize * 3 // 2, record.resize * 2), (record.resize * 5 // 4, record.resize), (record.crop,) * 2]
    pictures = []
    for height, width in sizes:
        coarse = torch.rand(1, len(record.channels), 8, 8, generator=random)
        smooth = F.interpolate(coarse, size=(height, width), mode="bicubic")
        noise = torch.rand(1, len(record.channels), height, width, generator=random)
        mixed = (smooth * 200 + noise * 55).clamp(0, 255).to(torch.uint8)
        pictures.append(np.ascontiguousarray(mixed[0].permute(1, 2, 0).numpy()))
    return pictures


@torch.no_grad()
def logits(net: ResNet, images: Tensor) -> Tensor:
    """Of normalised images, (N, classes)."""
    found: Tensor = net(images)
    return found


def relative(found: object, wanted: Tensor) -> float:
    """The largest difference over the largest value; not-a-number when either side holds one."""
    found = torch.as_tensor(found)
    if found.shape != wanted.shape:
        return float("inf")
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


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
