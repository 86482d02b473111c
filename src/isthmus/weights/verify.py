"""Whether weights compute what they should: beside another file, or beside the library whose names they have."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from isthmus.arch.preprocess import Preprocess
from isthmus.arch.spec import NetSpec
from isthmus.data.decode import decode
from isthmus.data.sources import list_pictures
from isthmus.data.transform import evaluation_transform, normalise
from isthmus.errors import WeightsError
from isthmus.weights.compare import Agreement, TensorComparison, agreement, compare_logits, compare_tensors, pictures
from isthmus.weights.load import read_network
from isthmus.weights.onnx.parity import onnx_outputs
from isthmus.weights.references import reference
from isthmus.weights.source import open_source

__all__ = ["Verification", "verify"]

ONNX_TOLERANCE = 1e-4
TOLERANCE = 1e-5  # between two files; folding batch norm in single precision costs about a tenth of it


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What `source` was compared with, and how it came out; `tensors` only where two files were."""

    source: str
    against: str
    agreement: Agreement
    tensors: TensorComparison | None = None
    notes: tuple[str, ...] = ()


def verify(
    origin: str | Path,
    *,
    against: str | Path | None = None,
    folder: Path | None = None,
    arch: str | NetSpec | None = None,
) -> Verification:
    """Compare the network that `origin` describes with `against`, else with the library its names are from.

    Pictures are those of `folder`, else four drawn ones. A library computes in double precision where it can, from the
    file by its own loading. Raises WeightsError when there is nothing to compare with: nothing counts as verified then.
    """
    net, report = read_network(origin, arch=arch)
    record, spec = net.preprocess, net.spec
    if folder is not None and (spec.in_channels, spec.dims) != (len(record.channels), 2):
        raise WeightsError(
            f"{report.source} takes {spec.in_channels} channels in {spec.dims}D, which pictures do not give; use "
            f"drawn ones"
        )
    given = None if folder is None else shown(folder, record)
    if against is None:
        source = open_source(origin, None)  # anew: tensors shared with ours would hide what was done to them
        if source.layout == "onnx" and source.path is not None:
            mine, theirs = onnx_outputs(source.path, net, given)
            found = agreement(mine, theirs, precision=torch.float32, tolerance=ONNX_TOLERANCE)
            return Verification(source=source.name, against=f"onnxruntime {version('onnxruntime')}", agreement=found)
        other = reference(source, spec)
        batch = pictures(record, spec.in_channels, spec.dims) if given is None else given
        found = compare_logits(net, other.logits, batch, precision=other.precision, tolerance=other.tolerance)
        return Verification(source=source.name, against=other.name, agreement=found)
    second, second_report = read_network(against, arch=arch)
    sides = [
        f"{read.source} takes {one.in_channels} channels in {one.dims}D and gives {one.num_classes} outputs"
        for read, one in ((report, spec), (second_report, second.spec))
    ]
    if any(getattr(spec, name) != getattr(second.spec, name) for name in ("in_channels", "dims", "num_classes")):
        raise WeightsError(f"{' and '.join(sides)}: no picture compares them")
    tensors = compare_tensors(net.state_dict(), second.state_dict())
    notes = ["their preprocessing differs; both were given that of the first"] * (record != second.preprocess)
    notes += ["their class names differ"] * (net.classes != second.classes)
    batch = pictures(record, spec.in_channels, spec.dims) if given is None else given
    found = compare_logits(net, second.double(), batch, precision=torch.float64, tolerance=TOLERANCE)
    return Verification(
        source=report.source, against=second_report.source, agreement=found, tensors=tensors, notes=tuple(notes)
    )


def shown(folder: Path, record: Preprocess) -> Tensor:
    """The pictures in a folder as the record prepares them: (N, C, crop, crop); raises DataError."""
    transform = evaluation_transform(record)
    found = [transform(decode(path, record.channels)) for path in list_pictures(folder)]
    return normalise(torch.stack(found), record)
