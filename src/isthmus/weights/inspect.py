"""What a weight file holds: by its headers alone, or by every number in it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from isthmus.arch.preprocess import Preprocess
from isthmus.weights import files, layouts
from isthmus.weights.adopt import candidates
from isthmus.weights.findings import STATISTICS, Finding, by_kind, by_values
from isthmus.weights.fit import layout_of, preprocess_of
from isthmus.weights.source import Source, open_source, precision

__all__ = ["Inspection", "inspect_weights"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """What is known of weights.

    `network` is what they say they are for, empty where they do not; `candidates` are the networks of the table that
    their names and shapes fit. `parameters` are the numbers that training learns, statistics aside; `dtypes` counts
    tensors. `evidence` are layouts, the likeliest first. `values` tells whether findings come from every number.
    """

    source: str
    format: str
    bytes: int
    layout: str
    evidence: tuple[layouts.Match, ...]
    network: str
    candidates: tuple[str, ...]
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]
    classes: tuple[str, ...]
    preprocess: Preprocess | None
    metadata: Mapping[str, str]
    notes: tuple[str, ...]
    findings: tuple[Finding, ...]
    values: bool


def inspect_weights(origin: str | Path, *, values: bool = False) -> Inspection:
    """Look into weights without building their network: at headers alone where the format allows, or at all `values`.

    Raises WeightsError for what is no weight file; what merely looks wrong is among the findings.
    """
    source = open_source(origin, None, values=False)
    graph = source.layout == "onnx"
    format_, size, metadata = _file(source)
    tensors = source.tensors
    findings = by_kind(tensors)
    if values:
        if not graph and source.path is not None:
            tensors = files.read(source.path).tensors
        classifiers = layouts.weight_keys(layout_of(source), "fc") if source.layout else ()
        findings += by_values(tensors, classifiers)
    named = source.spec is None and source.layout
    return Inspection(
        source=source.name,
        format=format_,
        bytes=size,
        layout=source.layout,
        evidence=() if graph else layouts.evidence(tensors)[:2],
        network=source.spec.name or "a network of its own" if source.spec else "",
        candidates=tuple(candidates(source.tensors, source.layout)) if named else (),
        tensors=len(tensors),
        parameters=sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith(STATISTICS)),
        dtypes=_dtypes(tensors),
        classes=source.classes,
        preprocess=preprocess_of(source, source.spec) if source.spec else source.preprocess,
        metadata=metadata,
        notes=source.notes,
        findings=tuple(findings),
        values=values,
    )


def _file(source: Source) -> tuple[str, int, Mapping[str, str]]:
    """Format, bytes and metadata of the file, the part that `load` reads aside."""
    if source.path is None:
        return "", 0, {}
    if source.layout == "onnx":
        return "onnx", source.path.stat().st_size, {}
    found = files.headers(source.path)
    return found.format, found.bytes, {key: text for key, text in found.metadata.items() if key != "isthmus"}


def _dtypes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    kinds = Counter(precision(tensor.dtype) for tensor in tensors.values())
    return dict(kinds.most_common())
