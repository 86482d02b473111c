"""The report of a run, written: `report.html` for people and `report.json` with the same as plain data."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from isthmus.atomic import atomic_write
from isthmus.data.loader import Loader
from isthmus.data.pictures import Pictures
from isthmus.data.transform import normalise
from isthmus.diagnose.findings import Diagnosis
from isthmus.errors import IsthmusError, RunError
from isthmus.messages import first_line
from isthmus.nn.network import ResNet
from isthmus.report.compare import comparison, comparison_page
from isthmus.report.gather import Gathered, gather
from isthmus.report.heat import heat_maps
from isthmus.report.html import run_page
from isthmus.report.images import heated, jpeg
from isthmus.train.folder import ENVIRONMENT, SCORES, evaluation_pictures

__all__ = ["COMPARISON", "LOOKED_AT", "PAGE", "write_comparison", "write_report"]

PAGE, COMPARISON = "report.html", "comparison.html"
LOOKED_AT = 16  # pictures of a diagnosis, which is to take seconds


def write_report(
    run: Path | str,
    out: Path | str = "",
    *,
    val: Pictures | None = None,
    diagnose: Callable[[], Diagnosis] | None = None,
) -> Path:
    """Write the page of a finished run, report.html in its folder unless `out` names another; its data lie beside it.

    `val` are the validation pictures where they are at hand; otherwise the recipe says where they are. What cannot be
    told (pictures that are gone, scores of an older version, a diagnosis that failed) is named in the page with the
    reason. Raises RunError.
    """
    folder = Path(run)
    out = page_path(Path(out) if out else folder / PAGE)
    gathered = gather(folder)
    add_diagnosis(gathered.document, diagnose)
    add_pictures(gathered, folder, val)
    write(out, run_page(gathered), gathered.document)
    return out


def page_path(out: Path) -> Path:
    """The path of a page; raises RunError where it names none, or its data would take the place of a run's file."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise RunError(f"{out} is no name for a page; it must end in .html")
    if (data := out.with_suffix(".json")).name in (SCORES, ENVIRONMENT):
        raise RunError(f"the page's data would be written as {data}, which a run's folder has; choose another --out")
    return out


def write(out: Path, page: str, document: Mapping[str, Any]) -> None:
    """Write a page and, under the same name, its data."""
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    atomic_write(out.with_suffix(".json"), lambda temporary: temporary.write_bytes(encoded(text)))
    atomic_write(out, lambda temporary: temporary.write_bytes(encoded(page)))


def encoded(text: str) -> bytes:
    """UTF-8; names of files may hold bytes that are no text, which are spelt out."""
    return text.encode("utf-8", "backslashreplace")


def add_diagnosis(document: dict[str, Any], diagnose: Callable[[], Diagnosis] | None) -> None:
    """Put what ails the network into a report."""
    document["diagnosis"] = None
    if diagnose is None:
        return
    try:
        document["diagnosis"] = diagnose().to_dict()
    except Exception as error:  # noqa: BLE001 - a GPU without memory, a bug: the scores and pictures are worth more
        document["missing"].append(f"the diagnosis: {reason(error)}")


def reason(error: Exception) -> str:
    """What an error says, in a line; one that no user can mend by what it says has its type before it."""
    return first_line(error) if isinstance(error, IsthmusError) else f"{type(error).__name__}: {first_line(error)}"


def add_pictures(gathered: Gathered, folder: Path, val: Pictures | None) -> None:
    """Put the pictures of the mistakes into a report, with their heat maps."""
    document, net = gathered.document, gathered.net
    if not document["mistakes"]:
        return
    try:
        pictures = evaluation_pictures(folder, net.classes, "") if val is None else val
        rows = [row for row in document["mistakes"] if is_there(row, pictures)]
        if rows:
            gathered.images.update(mistake_images(net, rows, pictures))
        lost = len(document["mistakes"]) - sum(f"picture {row['index']}" in gathered.images for row in rows)
        if lost:
            document["missing"].append(
                f"{lost} pictures of mistakes: they cannot be read, or others are in their places"
            )
    except Exception as error:  # noqa: BLE001 - as above
        document["missing"].append(f"the pictures of mistakes: {reason(error)}")


def is_there(row: Mapping[str, Any], pictures: Pictures) -> bool:
    """Whether the picture of a mistake is still where it was."""
    index: int = row["index"]
    return index < len(pictures) and pictures.name(index) == str(row["name"])


def mistake_images(net: ResNet, rows: Sequence[Mapping[str, Any]], pictures: Pictures) -> dict[str, str]:
    """Pictures of mistakes as the network sees them ("picture 7" by index), and what speaks for the wrong class."""
    images: dict[str, str] = {}
    chosen = pictures.subset([row["index"] for row in rows])
    loader = Loader(pictures=chosen, record=net.preprocess, batch_size=len(rows), train=False, on_error="skip")
    for batch in loader.epoch(0):
        seen = [rows[place] for place in batch.indices.tolist()]
        targets = torch.tensor([row["places"][1] for row in seen])
        heats = heat_maps(net, normalise(batch.images, net.preprocess), targets)
        for row, image, heat in zip(seen, batch.images, heats, strict=True):
            pixels = image.permute(1, 2, 0).numpy()
            images[f"picture {row['index']}"] = jpeg(pixels)
            if heat.any():
                images[f"heat {row['index']}"] = jpeg(heated(pixels, heat.numpy()))
    return images


def write_comparison(runs: Sequence[Path | str], out: Path | str = COMPARISON) -> Path:
    """Write a page that compares finished runs, and its data beside it; raises RunError."""
    out = page_path(Path(out))
    documents = [gather(Path(run)).document for run in runs]
    found = comparison(documents)
    write(out, comparison_page(found, documents), found)
    return out
