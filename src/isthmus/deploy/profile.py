"""Where an engine spends its time: its nodes, timed by itself, each with the layers of the network that it computes."""

import ast
import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from isthmus.arch.plan import Plan
from isthmus.arch.preprocess import IMAGENET
from isthmus.arch.roofline import Floor, LayerTime, joined
from isthmus.deploy.engines import ENGINES, EnginePrecision, Model, Work, fused, of_torch, openvino
from isthmus.deploy.predictor import choose, sample
from isthmus.deploy.program import needed
from isthmus.deploy.quantize import to_be_timed
from isthmus.errors import EngineError
from isthmus.nn.fuse import FusedBlock, Subsample
from isthmus.nn.layers import EfficientChannelAttention, SqueezeExcite
from isthmus.nn.network import ResNet

__all__ = ["PROFILERS", "Node", "Profile", "layer_times", "profile", "profiled_plan"]

SECONDS = 2.0  # of calls that count
WARM = 3  # calls before
LEAST, MOST = 5, 500
SCOPES = "pkg.torch.onnx.name_scopes"  # under which torch tells the modules that a node of ONNX comes from
WEIGHED = ("conv", "linear")
BESIDE = "engine"  # the block of what is no layer's
BETWEEN = "between the nodes"


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A node of an engine: its own name and kind, the modules whose operations it does, and its seconds a call."""

    name: str
    kind: str
    modules: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Mean seconds of a call and of each node that ran in it; engines in `faster` tell nothing of their nodes."""

    engine: str
    precision: EnginePrecision
    batch: int
    calls: int
    seconds: float
    nodes: tuple[Node, ...]
    faster: tuple[str, ...] = ()

    def __str__(self) -> str:
        beside = f" ({' and '.join(self.faster)}, faster here, tells nothing of its layers)" if self.faster else ""
        return f"{ENGINES[self.engine].title} in {self.precision}{beside}"


def profiled_plan(
    plan: Plan, *, precision: EnginePrecision = "fp32", batch: int = 1, say: Callable[[str], object] = lambda _: None
) -> Profile:
    """Where the time goes in a plan's network with random weights, by the engine that is the fastest here for a batch.

    int8 is calibrated on made-up pictures: its speed counts. Raises EngineError, PrecisionError and MissingExtraError
    as `Predictor` does.
    """
    net = ResNet(plan, zero_init=False).eval()
    if plan.spec.dims == 2:
        net.preprocess = IMAGENET.at(plan.image_size[0])
    model = Model(net)
    if precision == "int8":
        say("calibrating int8 on made-up pictures")
        model.int8 = to_be_timed(model)
    say("looking for the fastest engine")
    choice, _ = choose(model, precision=precision, hint="latency", batch_size=batch)
    usable = [row.engine for row in choice.rows if row.precision == precision and not row.refused]
    best = next((name for name in usable if name in PROFILERS), None)
    if best is None:
        raise EngineError(
            f"none of the engines that run this network here tells of its nodes ({', '.join(usable)}); install "
            f"OpenVINO or ONNX Runtime"
        )
    say(f"measuring {ENGINES[best].title}")
    found = profile(model, best, precision=precision, batch=batch)
    return replace(found, faster=tuple(ENGINES[name].title for name in usable[: usable.index(best)]))


def profile(model: Model, engine: str, *, precision: EnginePrecision = "fp32", batch: int = 1) -> Profile:
    """Where an engine spends its time on made-up pictures, one call at a time with all of torch's threads."""
    images, _ = sample(model, batch)
    calls, seconds, nodes = PROFILERS[engine](model, precision, images)
    return Profile(engine=engine, precision=precision, batch=batch, calls=calls, seconds=seconds, nodes=tuple(nodes))


Found = tuple[int, float, list[Node]]
"""Calls that counted, mean seconds of a call, and the nodes."""


def warmed(call: Callable[[], object]) -> int:
    """How many calls count, after some that do not."""
    for _ in range(WARM - 1):
        call()
    begun = time.perf_counter()
    call()
    return min(MOST, max(LEAST, round(SECONDS / (time.perf_counter() - begun))))


def by_openvino(model: Model, precision: EnginePrecision, images: NDArray[np.float32]) -> Found:
    """By OpenVINO's counters, each the mean of all calls so far in whole microseconds."""
    run = openvino(model.file(precision), precision, Work(shape=images.shape), profiled=True)
    compiled = run.compile(fixed=True)
    request = compiled.create_infer_request()

    def call() -> None:
        request.infer([images], share_inputs=True)

    def counted(calls: int) -> dict[str, float]:
        return {row.node_name: calls * row.real_time.total_seconds() for row in request.profiling_info}

    count = warmed(call)
    before, begun = counted(WARM), time.perf_counter()
    for _ in range(count):
        call()
    seconds = (time.perf_counter() - begun) / count
    after, origins, nodes = counted(WARM + count), scopes(model.onnx), []
    for each in compiled.get_runtime_model().get_ordered_ops():
        name, about = each.get_friendly_name(), each.get_rt_info()
        spent = max(0.0, after.get(name, 0.0) - before.get(name, 0.0)) / count
        said = about["originalLayersNames"] if "originalLayersNames" in about else ""  # noqa: SIM401 - it has no get()
        of = modules(text(said).split(","), origins)
        kind = text(about["layerType"])
        if spent or (of and kind != "Const"):
            nodes.append(Node(name=name, kind=kind, modules=of, seconds=spent))
    return count, seconds, nodes


def text(said: object) -> str:
    """A fact of OpenVINO's about a node."""
    return str(getattr(said, "value", said))


def by_onnxruntime(model: Model, precision: EnginePrecision, images: NDArray[np.float32]) -> Found:
    """By ONNX Runtime's own record of every node of every call; its optimised graph says what the nodes were."""
    runtime, onnx = needed("onnxruntime", "onnx"), needed("onnx", "onnx")
    with tempfile.TemporaryDirectory() as folder:
        graph, options = Path(folder) / "graph.onnx", runtime.SessionOptions()
        options.intra_op_num_threads = Work().threads
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        options.optimized_model_filepath = str(graph)
        options.log_severity_level = 3  # that such a graph is for this machine alone
        session = runtime.InferenceSession(model.file(precision), options, providers=["CPUExecutionProvider"])
        (entry,) = session.get_inputs()

        def call() -> None:
            session.run(None, {entry.name: images})

        count = warmed(call)
        for _ in range(count):
            call()
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        optimised = onnx.load(graph).graph
    weights = {each.name for each in optimised.initializer}
    tensors = {node.name: [*weights.intersection(node.input), *node.output] for node in optimised.node}
    runs = sorted((event["ts"], event["dur"]) for event in events if event["name"] == "model_run")[-count:]
    origins, spent, kinds = scopes(model.onnx), defaultdict[str, float](float), dict[str, str]()
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= runs[0][0]:
            name = event["name"].removesuffix("_kernel_time")
            spent[name] += event["dur"] / 1e6 / count
            kinds[name] = event["args"]["op_name"]
    nodes = []
    for name, seconds in spent.items():
        parts = [RENAMED.sub("", name), *tensors.get(name, ())]
        of = () if kinds[name] in REORDERS else modules(parts, origins)
        nodes.append(Node(name=name, kind=kinds[name], modules=of, seconds=seconds))
    return count, sum(took for _, took in runs) / 1e6 / count, nodes


def by_torch(model: Model, precision: EnginePrecision, images: NDArray[np.float32]) -> Found:
    """By the modules of our fast form, each timed as it is called."""
    module = fused(model, precision)
    run, spent, kinds, begun = of_torch(module, Work()), defaultdict[str, float](float), dict[str, str](), list[float]()

    def start(*_: object) -> None:
        begun.append(time.perf_counter())

    def timed(path: str) -> Callable[..., None]:
        def stop(*_: object) -> None:
            spent[path] += time.perf_counter() - begun.pop()

        return stop

    for path, child in timed_modules(module.trunk, module.head):
        kinds[path] = type(child).__name__
        child.register_forward_pre_hook(start)
        child.register_forward_hook(timed(path))
    pool, kinds["pool"] = module.trunk.pool, "pool"

    def pooled(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        start()
        found = pool(x, dtype)
        timed("pool")()
        return found

    module.trunk.pool = pooled  # type: ignore[method-assign]
    count = warmed(lambda: run(images))
    spent.clear()
    from_here = time.perf_counter()
    for _ in range(count):
        run(images)
    seconds = (time.perf_counter() - from_here) / count
    merged = merged_projections(module.trunk)
    nodes = [
        Node(name=path, kind=kinds[path], modules=(path, *merged.get(path, ())), seconds=took / count)
        for path, took in spent.items()
    ]
    return count, seconds, nodes


def timed_modules(trunk: ResNet, head: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that compute, and their paths in the network; attention is one."""
    named = [*trunk.named_modules(), *((f"fc.{path}".rstrip("."), child) for path, child in head.named_modules())]
    gates = [path for path, child in named if isinstance(child, SqueezeExcite | EfficientChannelAttention)]
    inside = tuple(f"{path}." for path in gates)
    for path, child in named:
        computes = path in gates or not (list(child.children()) or isinstance(child, nn.Identity | nn.Dropout))
        if computes and not path.startswith(inside):
            yield path, child


def merged_projections(trunk: ResNet) -> dict[str, tuple[str, ...]]:
    """The last convolution of a block, and the projection of the shortcut that it computes too."""
    found: dict[str, tuple[str, ...]] = {}
    for path, child in trunk.named_modules():
        block = path.rpartition(".downsample")[0]
        if isinstance(child, Subsample) and isinstance(whole := trunk.get_submodule(block), FusedBlock):
            found[f"{block}.{whole.spec.main[-1].name}"] = (path,)
    return found


Profiler = Callable[[Model, EnginePrecision, NDArray[np.float32]], Found]
PROFILERS: Mapping[str, Profiler] = {"openvino": by_openvino, "onnxruntime": by_onnxruntime, "torch": by_torch}
"""By the engine's name; the compiled torch tells nothing of its layers."""
REORDERS = ("ReorderInput", "ReorderOutput", "Transpose")  # of ONNX Runtime, which may carry a layer's tensor
RENAMED = re.compile(r"^fused |(_nchwc)?(_token_\d+)?$")  # what ONNX Runtime makes of the names of nodes


def scopes(file: bytes) -> dict[str, str]:
    """The module that each node, tensor and weight of our ONNX translation comes from."""
    graph = needed("onnx", "onnx").load_from_string(file).graph
    weights = {each.name for each in graph.initializer}
    found: dict[str, str] = {}
    for node in graph.node:
        of = [name.rpartition(".")[0] for name in node.input if name in weights and name.endswith((".weight", ".bias"))]
        said = next((each.value for each in node.metadata_props if each.key == SCOPES), "")
        stack = [*ast.literal_eval(said)][:-1] if said else []
        if of or stack:
            found |= dict.fromkeys((node.name, *node.output), of[0] if of else stack[-1])
        found |= {name: name.rpartition(".")[0] for name in node.input if name in weights and "." in name}
    return found


def modules(names: Iterable[str], origins: Mapping[str, str]) -> tuple[str, ...]:
    """The modules of those names that are known, each once."""
    return tuple(dict.fromkeys(origins[name] for name in names if name in origins))


def layer_times(found: Profile, floors: Sequence[Floor]) -> tuple[LayerTime, ...]:
    """The time of each layer beside its floor; together all of the engine's call.

    What is fused into a convolution counts to it, and layers that are computed as one have one row. Nodes of no such
    layer have rows of their own: in their block where they come from one, else below the block "engine".
    """
    known = {floor.name: floor for floor in floors}
    groups: list[tuple[set[str], float]] = []
    beside: dict[tuple[str, str, str], list[float]] = {}
    for node in found.nodes:
        names = layers_of(node, known)
        if names:
            touched = [group for group in groups if group[0] & names]
            groups = [group for group in groups if not group[0] & names]
            groups.append((names.union(*(group[0] for group in touched)), node.seconds + sum(s for _, s in touched)))
        elif node.seconds:
            beside.setdefault(own_row(node, known), []).append(node.seconds)
    groups += [({name}, 0.0) for name in known.keys() - set[str]().union(*(names for names, _ in groups))]
    rows = []
    for names, seconds in groups:
        floor = joined(tuple(each for each in floors if each.name in names))
        rows.append(LayerTime(floor.name, floor.kind, floor.block, seconds, floor))
    for (block, name, kind), times in beside.items():
        shown = f"{name} ×{len(times)}" if len(times) > 1 else name
        rows.append(LayerTime(shown, kind, block, sum(times), None))
    if (left := found.seconds - sum(node.seconds for node in found.nodes)) > 0:
        rows.append(LayerTime(BETWEEN, "", BESIDE, left, None))
    blocks = [*dict.fromkeys(floor.block for floor in floors), BESIDE]
    order = {floor.name: place for place, floor in enumerate(floors)}
    rows.sort(key=lambda row: (blocks.index(row.block), order.get(row.name.partition(" + ")[0], len(order))))
    return tuple(rows)


def layers_of(node: Node, known: Mapping[str, Floor]) -> set[str]:
    """The layers that a node computes: convolutions where it has any."""
    names = {name for module in node.modules if (name := layer_of(module, known))}
    return {name for name in names if known[name].kind in WEIGHED} or names


def layer_of(module: str, known: Collection[str]) -> str:
    """The layer that a module belongs to; the network itself pools. Empty where it belongs to none."""
    path = module or "pool"
    while path and path not in known:
        path = path.rpartition(".")[0]
    return path


def own_row(node: Node, known: Mapping[str, Floor]) -> tuple[str, str, str]:
    """Block, name and kind of the row of a node that computes no layer."""
    if not node.modules:
        return BESIDE, node.kind, ""
    module = max(node.modules, key=len)
    blocks = {floor.block for floor in known.values()}
    parts = module.split(".")
    block = next((name for end in (2, 1) if (name := ".".join(parts[:end])) in blocks), "")
    return block or ("stem" if parts[0] in STEM else "head"), module, node.kind


STEM = ("conv1", "bn1", "act1", "maxpool")  # what a network calls the parts of its stem
