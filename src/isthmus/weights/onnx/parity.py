"""An ONNX graph beside the network that was read from it: what ONNX Runtime computes, and what we do."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from isthmus.errors import MissingExtraError, WeightsError
from isthmus.messages import first_line
from isthmus.nn.network import ResNet
from isthmus.weights.onnx.graph import OnnxNetwork, read_onnx
from isthmus.weights.onnx.layers import ENDINGS

__all__ = ["onnx_outputs"]

PICTURES = 2  # in one batch where the graph takes any; a graph of fixed batch gets that
TYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}


def onnx_outputs(path: Path | str, net: ResNet, pictures: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What a network in evaluation and a graph give for `pictures` (N, C, H, W), or for a few fixed ones: (N, classes).

    Logits, or what the graph makes of them at its end. A size that the graph leaves open is the network's.
    Raises MissingExtraError without ONNX Runtime, WeightsError where it refuses the file or the pictures have
    a size that the graph does not take, or the network has other classes or input channels.
    """
    graph = read_onnx(path)
    for what in ("in_channels", "num_classes"):
        there, here = getattr(graph.spec, what), getattr(net.spec, what)
        if there != here:
            raise WeightsError(f"{path} has {what} {there} and the network {here}: they cannot be compared")
    pictures = _pictures(graph, net) if pictures is None else pictures
    batch = graph.shape[0] if isinstance(graph.shape[0], int) else len(pictures)
    theirs = _run(path, (pictures.permute(0, 2, 3, 1) if graph.channels_last else pictures).split(batch))  # type: ignore[no-untyped-call]
    first, training = next(net.parameters()), net.training
    try:
        with torch.no_grad():
            mine = net.eval()(pictures.to(first.device, first.dtype)).cpu().double()
    finally:
        net.train(training)
    return ENDINGS[graph.ending](mine) if graph.ending else mine, theirs


def _pictures(graph: OnnxNetwork, net: ResNet) -> Tensor:
    """Normal numbers, the same every time, in the shape that the graph wants: (N, C, H, W)."""
    shape = [graph.shape[axis] for axis in ((0, 3, 1, 2) if graph.channels_last else (0, 1, 2, 3))]
    open_ = (PICTURES, graph.spec.in_channels, *net.plan.image_size)
    size = [found if isinstance(found, int) else ours for found, ours in zip(shape, open_, strict=True)]
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def _run(path: Path | str, batches: Iterable[Tensor]) -> Tensor:
    """What ONNX Runtime gives for batches of pictures in the graph's own layout: (N, classes)."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnxruntime", "onnx") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (entry,) = session.get_inputs()
        arrays = (batch.contiguous().numpy().astype(TYPES[entry.type]) for batch in batches)
        found = np.concatenate([session.run(None, {entry.name: array})[0] for array in arrays])
    except Exception as error:  # its own family has no base but this
        raise WeightsError(f"ONNX Runtime refuses {path}: {first_line(error)}") from error
    return torch.from_numpy(np.asarray(found, np.float64)).flatten(1)
