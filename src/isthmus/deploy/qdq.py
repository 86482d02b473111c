"""Quantised ONNX graphs: which nodes compute in 8 bits, and the same graph with some of them left alone."""

from collections.abc import Collection
from typing import Any

from isthmus.deploy.program import needed

__all__ = ["layers", "mixed"]


def layers(original: Any, quantised: Any) -> dict[str, str]:
    """The nodes that compute in 8 bits, in their order, each with its layer, or what it does behind which layer."""
    made_by = {name: node.op_type for node in quantised.graph.node for name in node.output}
    low = {node.name for node in quantised.graph.node if "DequantizeLinear" in map(made_by.get, node.input)}
    found: dict[str, str] = {}
    behind: dict[str, str] = {}  # the layer that a tensor comes out of
    for node in original.graph.node:
        layer = next((name.removesuffix(".weight") for name in node.input if name.endswith(".weight")), "")
        before = next((behind[name] for name in node.input if name in behind), "the input")
        behind |= dict.fromkeys(node.output, layer or before)
        if node.name in low:
            found[node.name] = layer or f"{node.op_type.lower()} behind {before}"
    return found


def mixed(original: Any, quantised: Any, higher: Collection[str]) -> Any:
    """The quantised graph with the nodes named in `higher` as they are in the original: other inputs, other weights."""
    model = needed("onnx", "onnx").ModelProto()
    model.CopyFrom(quantised)
    made_by = {name: node for node in model.graph.node for name in node.output}
    weights = {each.name: each for each in original.graph.initializer}
    nodes = {node.name: node for node in original.graph.node}
    for node in model.graph.node:
        if node.name not in higher:
            continue
        for place, name in enumerate(node.input):
            was = nodes[node.name].input[place]
            node.input[place] = f"{was}_higher" if was in weights else source(name, made_by)
            if was in weights and node.input[place] not in {each.name for each in model.graph.initializer}:
                copied = model.graph.initializer.add()
                copied.CopyFrom(weights[was])
                copied.name = node.input[place]
    return pruned(model)


def source(name: str, made_by: dict[str, Any]) -> str:
    """The tensor that a chain of quantising and dequantising carries; of a constant, the name that it had."""
    node = made_by.get(name)
    while node is not None and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        name = node.input[0]
        node = made_by.get(name)
    return name


def pruned(model: Any) -> Any:
    """The graph without the nodes and constants that nothing reads any more."""
    read = {each.name for each in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if read.intersection(node.output):
            kept.append(node)
            read.update(node.input)
    constants = [each for each in model.graph.initializer if each.name in read]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(reversed(kept))
    model.graph.initializer.extend(constants)
    return model
