"""Where weights come from: files, folders, the catalog, the hub, a URL or a network in memory, read into one form.

A file of ours carries under the key `isthmus` of its metadata, as JSON: `schema`, `spec`, `layout`, `preprocess`,
`classes` and `extra`. Schema 1 stays readable for ever.
"""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from torch import Tensor, nn

from isthmus.arch.preprocess import Preprocess
from isthmus.arch.spec import NetSpec
from isthmus.arch.variants import variants
from isthmus.errors import IsthmusError, RunError, WeightsError
from isthmus.messages import listed
from isthmus.nn.network import ResNet
from isthmus.records import from_dict
from isthmus.weights import files, layouts
from isthmus.weights.adopt import timm_preprocess
from isthmus.weights.onnx.graph import read_onnx
from isthmus.weights.published import catalog, hf, hub

__all__ = ["SCHEMA", "Origin", "Source", "open_source", "precision"]

SCHEMA = 1
MALFORMED = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)  # JSON of other shape
PINNED = re.compile(r"(?P<url>[^#]+)(#sha256=(?P<sha256>[0-9a-f]{8,64}))?")

Origin = str | Path | Mapping[str, Any] | nn.Module
"""Where weights come from, each as users write it:

- a weight file, a run folder, or a folder as the Hugging Face hub keeps it (`config.json` beside the weights)
- a name of the catalog: `demo`, `torchvision:resnet50.v2`, `hf:timm/resnet50.a1_in1k`
- a repository of the hub: `hf:owner/name`, `hf:owner/name@revision`, `hf:owner/name:file.safetensors`
- a URL: `https://…`, `https://…#sha256=…` with the hash of the content or its beginning, `file:///…`
- a state dict, or a network in memory: ours, timm's, torchvision's
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Tensors with all that is known of the network they are from.

    `path` is the weight file; `extra` what a file of ours carries beside its network, or licence, source and metrics of
    a record; `module` the network in memory.
    """

    name: str
    tensors: dict[str, Tensor]
    layout: str
    spec: NetSpec | None = None
    preprocess: Preprocess | None = None
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    path: Path | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None


def open_source(origin: Origin, layout: str | None, *, values: bool = True) -> Source:
    """Whatever weights may come from, as tensors with what is known of them; raises WeightsError or RunError.

    Without `values` a file's headers alone are read, its tensors are on the meta device, and a layout that nobody knows
    is the empty one.
    """
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
        inside = (module for module in origin.modules() if module.state_dict().keys() == tensors.keys())
        origin = next(inside, origin)  # not what torch.compile or DataParallel put around it
        return Source(
            name=f"the {type(origin).__name__} in memory",
            tensors=tensors,
            layout=layout or layouts.detect(tensors),
            preprocess=timm_preprocess(origin),
            notes=notes,
            module=origin,
        )
    if isinstance(origin, Mapping):
        tensors, notes = files.unwrap(origin, "the state dict")
        return Source(name="the state dict", tensors=tensors, layout=layout or layouts.detect(tensors), notes=notes)
    if not isinstance(origin, str | Path):
        raise WeightsError(
            f"weights come from a file, a name, a state dict or a network, and not a {type(origin).__name__}"
        )
    text = str(origin)
    record = catalog.CATALOG.get(text)
    if text.startswith(hub.PREFIX):
        repo = f"{hub.PREFIX}{hub.Reference.parse(text).repo}"
        known = catalog.CATALOG.get(repo)
        return replace(_file(hub.fetch(text), layout, known, beside=True, values=values), name=text)
    if record is not None:
        return replace(_file(catalog.find(record), layout, record, values=values), name=text)
    if "://" in text:
        return replace(_address(text, layout, values=values), name=text)
    path = Path(origin)
    return _file(_found(path), layout, beside=path.is_dir(), values=values)


def _found(path: Path) -> Path:
    """The weight file at a path or in a folder; raises WeightsError, or RunError for a folder without one."""
    if path.is_dir():
        found = next((path / name for name in hub.WEIGHTS if (path / name).is_file()), None)
        if found is None:
            best = next(path.glob("best.safetensors"), None)
            instead = f"; the run is not finished: take {best}, or go on with it" if best else ""
            raise RunError(
                f"{path} has no {hub.WEIGHTS[0]}{instead or '; is it a run folder, and did the run finish?'}"
            )
        return found
    if path.exists():
        return path
    if str(path) in variants():
        names = [record.name for record in catalog.of_network(str(path))]
        raise WeightsError(
            f"{path} is a network and names no weights; published ones differ in kind, not only in accuracy, so name "
            f"yours: {listed(names, 5) or 'none are known here'}"
        )
    near = difflib.get_close_matches(str(path), catalog.CATALOG, n=3, cutoff=0.7)
    raise WeightsError(
        f"there is no file {path}, and no published weights of that name"
        + (f"; did you mean {', '.join(near)}?" if near else "; `isthmus weights list` lists those that are known")
    )


def _address(text: str, layout: str | None, *, values: bool) -> Source:
    """What lies at a URL; raises WeightsError."""
    if text.startswith("file:"):
        path = Path(url2pathname(urlsplit(text).path))
        return _file(_found(path), layout, beside=path.is_dir(), values=values)
    pinned = PINNED.fullmatch(text)
    if pinned is None:
        raise WeightsError(f"{text}: what stands behind # must be sha256= and 8 to 64 of its digits in small letters")
    url, sha256 = pinned["url"], pinned["sha256"] or ""
    record = next((record for record in catalog.CATALOG.values() if record.place == url), None)
    path = hub.download(url, sha256 or (record.sha256 if record else ""))
    source = _file(path, layout, record, values=values)
    if sha256 or source.extra:  # pinned, or in the catalog
        return source
    note = f"nobody said what it must hold: pin it with {url}#sha256={hub.sha256(path)}"
    return replace(source, notes=(*source.notes, note))


def _file(
    path: Path, layout: str | None, record: catalog.Record | None = None, *, beside: bool = False, values: bool
) -> Source:
    """A weight file with what itself, the config files `beside` it, and its record or else its hash say of it."""
    if path.suffix == ".onnx":
        return _onnx(path, record or catalog.known(path))
    content = files.read(path) if values else _outline(path)
    source = Source(name=str(path), tensors=content.tensors, layout=layout or "", notes=content.notes, path=path)
    if "isthmus" in content.metadata:
        return _ours(source, content.metadata["isthmus"])
    try:
        source = replace(source, layout=layout or layouts.detect(content.tensors))
    except WeightsError:
        if values:
            raise
    if not layout and source.layout not in ("", "native"):
        best, second, *_ = layouts.evidence(content.tensors)
        source = replace(source, notes=(*source.notes, f"layout {best}, before {second}"))
    config = _json(path.parent / hub.CONFIG) if beside else None
    if config is not None:
        source = _described(source, config, _json(path.parent / hub.PREPROCESSOR))
    # Hashing takes longer than reading, and torch's own files are the only ones here whose hash was published.
    hashed = content.format == "torch" and config is None
    return _recorded(source, record or (catalog.known(path) if hashed else None))


def _outline(path: Path) -> files.TensorFile:
    """A weight file by its headers alone."""
    found = files.headers(path)
    tensors = {
        name: torch.empty(header.shape, dtype=getattr(torch, header.dtype), device="meta")
        for name, header in found.entries.items()
    }
    return files.TensorFile(tensors=tensors, metadata=found.metadata, format=found.format, notes=found.notes)


def _json(path: Path) -> Mapping[str, Any] | None:
    """What a config file holds, None where there is none; raises WeightsError."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, *MALFORMED) as error:
        raise WeightsError(f"{path} cannot be read: {error}; download or write it again") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds no table of settings; download or write it again")
    return content


def _described(source: Source, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None) -> Source:
    """A source with what the config files of its folder say; raises WeightsError."""
    try:
        said = hf.from_config(config)
        if said is None:
            return replace(source, notes=(*source.notes, "the config.json beside it is of no ResNet and was not used"))
        preprocess = said.preprocess or (hf.from_preprocessor(preprocessor) if preprocessor else None)
    except (WeightsError, *MALFORMED) as error:
        reason = error if isinstance(error, WeightsError) else f"a config file beside it cannot be read: {error!r}"
        raise WeightsError(f"{source.name}: {reason}") from error
    notes = () if preprocess else ("its preprocessing is in no file beside it: set net.preprocess",)
    return replace(source, spec=said.spec, preprocess=preprocess, classes=said.classes, notes=(*source.notes, *notes))


def _recorded(source: Source, record: catalog.Record | None) -> Source:
    """A source with what the catalog knows of it; what the file says itself goes before."""
    if record is None:
        return source
    spec = source.spec or record.spec
    named = record.classes if spec and spec.num_classes == record.num_classes else ()
    return replace(
        source,
        spec=spec,
        preprocess=source.preprocess or record.preprocess,
        classes=source.classes or named,
        notes=(*source.notes, str(record)),
        extra=record.about,
    )


def _onnx(path: Path, record: catalog.Record | None) -> Source:
    graph = read_onnx(path)
    source = Source(name=str(path), tensors=graph.tensors, layout="onnx", spec=graph.spec, notes=graph.notes, path=path)
    if "isthmus" in graph.metadata:
        said = _ours(source, graph.metadata["isthmus"])
        return replace(
            source,
            spec=replace(graph.spec, name=said.spec.name if said.spec else ""),
            preprocess=said.preprocess,
            classes=said.classes,
            extra=said.extra,
        )
    if record is None:
        note = "its preprocessing is not in the file: set net.preprocess"
        return replace(source, notes=(*graph.notes, note))
    return _recorded(replace(source, spec=replace(graph.spec, name=record.name)), record)


def _ours(source: Source, text: str) -> Source:
    """A source with what the metadata of our own files says; raises WeightsError."""
    try:
        described = json.loads(text)
        schema, layout = described["schema"], described["layout"]
        if schema > SCHEMA:
            raise ValueError(f"it has schema {schema} and this isthmus reads up to {SCHEMA}: upgrade isthmus")
        if layout not in layouts.LAYOUTS:
            raise ValueError(f"there is no layout {layout!r}; known: {', '.join(layouts.LAYOUTS)}")
        spec = from_dict(NetSpec, described["spec"])
        preprocess = from_dict(Preprocess, described["preprocess"])
        classes = tuple(map(str, described["classes"]))
        extra = dict(described.get("extra", {}))
    except (IsthmusError, *MALFORMED) as error:
        raise WeightsError(f"{source.name}: its description cannot be read: {error}") from error
    if classes and len(classes) != spec.num_classes:
        raise WeightsError(f"{source.name} names {len(classes)} classes for {spec.num_classes} outputs; save it again")
    return replace(source, layout=layout, spec=spec, preprocess=preprocess, classes=classes, extra=extra)


def precision(kind: torch.dtype) -> str:
    """The name of a kind of numbers, such as float32."""
    return str(kind).removeprefix("torch.")
