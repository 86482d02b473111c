"""Where weights come from: a file, a run folder, a name of the catalog or a network in memory, read into one form.

A file of ours carries under the key `isthmus` of its metadata, as JSON: `schema`, `spec`, `layout`, `preprocess`,
`classes` and `extra`. Schema 1 stays readable for ever.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from isthmus.arch.preprocess import Preprocess
from isthmus.arch.spec import NetSpec
from isthmus.errors import IsthmusError, RunError, WeightsError
from isthmus.nn.network import ResNet
from isthmus.records import from_dict
from isthmus.weights import catalog, files, layouts
from isthmus.weights.adopt import timm_preprocess
from isthmus.weights.onnx_graph import read_onnx

__all__ = ["SCHEMA", "Origin", "Source", "listed", "open_source"]

SCHEMA = 1
MODEL_FILE = "model.safetensors"

Origin = str | Path | nn.Module
"""A weight file, a run folder, a name of the catalog, or a network in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Tensors with all that is known of the network they are from."""

    name: str
    tensors: dict[str, Tensor]
    layout: str
    spec: NetSpec | None = None
    preprocess: Preprocess | None = None
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    module: nn.Module | None = None


def open_source(origin: Origin, layout: str | None) -> Source:
    """Whatever weights may come from, as tensors with what is known of them; raises WeightsError or RunError."""
    if isinstance(origin, ResNet):
        return Source(
            name="the network in memory",
            tensors=dict(origin.state_dict()),
            layout="native",
            spec=origin.spec,
            preprocess=origin.preprocess,
            classes=origin.classes,
        )
    if isinstance(origin, nn.Module):
        tensors, notes = files.unwrap(origin.state_dict(), "the network in memory")
        return Source(
            name=f"the {type(origin).__name__} in memory",
            tensors=tensors,
            layout=layout or layouts.detect(tensors),
            preprocess=timm_preprocess(origin),
            notes=notes,
            module=origin,
        )
    path = Path(origin)
    if (record := catalog.CATALOG.get(str(origin))) is not None:
        path = catalog.find(record)
        return replace(_onnx(path, record), name=record.name)
    if path.is_dir():
        path /= MODEL_FILE
        if not path.is_file():
            raise RunError(f"{path.parent} has no {MODEL_FILE}; is it a run folder, and did the run finish?")
    if not path.exists():
        raise WeightsError(
            f"there is no file {path}, and no published weights of that name; known: {', '.join(catalog.CATALOG)}"
        )
    if path.suffix == ".onnx":
        return _onnx(path, catalog.known(path))
    content = files.read(path)
    source = Source(name=str(path), tensors=content.tensors, layout=layout or "", notes=content.notes)
    if "isthmus" in content.metadata:
        return _ours(source, content.metadata["isthmus"])
    return source if layout else replace(source, layout=layouts.detect(content.tensors))


def _onnx(path: Path, record: catalog.Record | None) -> Source:
    graph = read_onnx(path)
    source = Source(name=str(path), tensors=graph.tensors, layout="onnx", spec=graph.spec, notes=graph.notes)
    if record is None:
        note = "its preprocessing is not in the file: set net.preprocess"
        return replace(source, notes=(*graph.notes, note))
    spec = replace(graph.spec, name=record.name)
    notes = (*graph.notes, f"{record.note}; {record.licence}; {record.source}")
    return replace(source, spec=spec, preprocess=record.preprocess, classes=record.classes, notes=notes)


def _ours(source: Source, text: str) -> Source:
    """A source with what the metadata of our own files says; raises WeightsError."""
    try:
        described = json.loads(text)
        schema = described["schema"]
        if schema > SCHEMA:
            raise ValueError(f"it has schema {schema} and this isthmus reads up to {SCHEMA}: upgrade isthmus")  # noqa: TRY301
        spec = from_dict(NetSpec, described["spec"])
        preprocess = from_dict(Preprocess, described["preprocess"])
        classes = tuple(map(str, described["classes"]))
        layout = str(described["layout"])
    except (IsthmusError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{source.name}: its description cannot be read: {error}") from error
    if classes and len(classes) != spec.num_classes:
        raise WeightsError(f"{source.name} names {len(classes)} classes for {spec.num_classes} outputs; save it again")
    return replace(source, layout=layout, spec=spec, preprocess=preprocess, classes=classes)


def listed(names: Iterable[str], count: int = 4) -> str:
    """The first few of many names, and how many more there are."""
    every = list(names)
    rest = f" and {len(every) - count} more" if len(every) > count else ""
    return ", ".join(every[:count]) + rest
