"""The operations of an ONNX graph laid beside the layers of a plan: what fits becomes tensors, the rest an error."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from isthmus.arch.block import Layer
from isthmus.arch.plan import Plan
from isthmus.weights.onnx.blocks import Parts
from isthmus.weights.onnx.file import Array
from isthmus.weights.onnx.op import Op

__all__ = ["ENDINGS", "Layers"]

ENDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(1),
    "logsoftmax": lambda logits: logits.log_softmax(1),
    "sigmoid": torch.sigmoid,
}
"""What may follow the logits in a graph, and is left out of the network."""

ONNX_NAMES = {
    "conv": "Conv",
    "norm": "BatchNormalization",
    "act": "Relu",
    "maxpool": "MaxPool",
    "avgpool": "AveragePool",
}
PARTLY = "some norms were already folded into convolutions; norms of mean 0 and variance 1 - epsilon hold their biases"
SPELLED = "norms are spelled out as a factor and a term; norms of mean 0 and variance 1 - epsilon hold them"
BIASED = "biases beside a norm, or in a pre-activation stream, are taken up by the means of the norms behind them"


class Layers:
    """Lays operations beside the layers of a plan and collects their tensors; raises WeightsError where they differ.

    A bias that no layer holds is an offset per channel of all that follows. It moves on through pools and additions
    to the next norm, which takes it up in its mean.
    """

    def __init__(self, net: Plan) -> None:
        self.net, self.spec = net, net.spec
        self.tensors: dict[str, Tensor] = {}
        self.notes: set[str] = set()

    def lay(self, found: Parts) -> None:
        """All operations. Only a pre-activation network's residual stream may carry an offset from block to block."""
        end = found.blocks[-1].add
        stream = self.chain(found.stem, self.net.stem, "", found.blocks[0].add, None)
        for block, planned in zip(found.blocks, self.net.blocks, strict=True):
            prefix, spec = f"{planned.name}.", planned.spec
            main = self.chain([*block.lead, *block.main], spec.main, prefix, block.add, stream)
            side = self.chain(block.shortcut, spec.downsample, prefix, block.add, None if block.lead else stream)
            stream = main if side is None else side if main is None else main + side
            if stream is not None and not found.preact:
                block.add.node.fail("before it stands a bias that no norm takes up")
        cut = len(self.net.tail)
        self.chain(found.tail[:cut], self.net.tail, "", end, stream)
        self.head(found.tail[cut:], end)

    def chain(
        self, ops: Sequence[Op], layers: Sequence[Layer], prefix: str, end: Op, offset: Array | None
    ) -> Array | None:
        """A chain of operations as a chain of layers; the offset that is left behind them."""
        left = [part for op in ops for part in (op.parts if op.kind == "gate" else (op,))]
        for layer in layers:
            name, wanted = prefix + layer.name, self.kind(layer)
            if layer.kind == "avgpool" and layer.kernel == 1:
                continue
            if layer.kind == "pad":
                left = self.padded(left, layer, name, end)
                continue
            if layer.kind == "norm" and (not left or left[0].kind != "norm"):
                self.norm(None, layer, name, offset)
                offset = None
                continue
            if not left or left[0].kind != wanted:
                culprit = left[0] if left else end
                culprit.node.fail(f"{ONNX_NAMES.get(wanted, wanted)} was expected here, as layer {name}")
            op = left.pop(0)
            if layer.kind == "norm":
                self.norm(op, layer, name, offset)
                offset = None
            elif layer.kind == "conv" and layer.domain == "map":
                offset = self.conv(op, layer, name)
            elif offset is not None and wanted != "maxpool":
                op.node.fail("before it stands a bias that no norm takes up")
            elif layer.kind == "conv":
                self.gate(op, layer, name)
            elif layer.kind in ("maxpool", "avgpool", "blur", "zeropad"):
                _check_window(op, layer, name)
        if left:
            left[0].node.fail(f"it stands behind the last of the layers {prefix}*, and nothing there can be built")
        return offset

    def kind(self, layer: Layer) -> str:
        """The operation of the normal form that a layer is."""
        if layer.kind == "act":
            return "silu" if self.spec.activation == "silu" else "act"
        return {"pooled": "linear", "channels": "eca"}.get(layer.domain, layer.kind)

    def conv(self, op: Op, layer: Layer, name: str) -> Array | None:
        """A convolution's tensors; the offset that its bias is where the layer has none."""
        window = op.window
        facts = {
            "weight shape": (
                op.weight.shape,
                (layer.out_channels, layer.in_channels // layer.groups, layer.kernel, layer.kernel),
            ),
            "strides": (window.strides, (layer.stride,) * 2),
            "pads": (window.pads, (layer.padding,) * 4),
            "dilations": (window.dilations, (layer.dilation,) * 2),
            "group": (window.groups, layer.groups),
        }
        for fact, (found, wanted) in facts.items():
            if found != wanted:
                op.node.fail(f"{fact} {found}; as layer {name} it would be {wanted}, and no other can be built")
        self.tensors[f"{name}.weight"] = _tensor(op.weight)
        bias = op.constants.get("bias")
        if layer.bias:
            self.tensors[f"{name}.bias"] = _tensor(np.zeros(layer.out_channels, np.float32) if bias is None else bias)
            return None
        return bias

    def norm(self, op: Op | None, layer: Layer, name: str, offset: Array | None) -> None:
        """A norm's tensors, its mean less by the offset before it; without an operation, one that adds the offset."""
        width, eps = layer.out_channels, self.spec.norm_eps
        if op is not None and (op.channels != width or op.eps not in (None, eps)):
            op.node.fail(f"it has {op.channels} channels and epsilon {op.eps}; the network's other norms have {eps}")
        found = op.constants if op is not None else {}
        constants: dict[str, Array] = {
            "weight": np.ones(width, np.float32),
            "bias": np.zeros(width, np.float32),
            "running_mean": np.zeros(width, np.float32),
            "running_var": np.full(width, 1 - eps),
        } | found
        if offset is not None:
            constants["running_mean"] = constants["running_mean"] - offset.astype(np.float64)
        for part, constant in constants.items():
            self.tensors[f"{name}.{part}"] = _tensor(constant)
        self.tensors[f"{name}.num_batches_tracked"] = torch.tensor(0)
        if op is None:
            self.notes.add(PARTLY)
        elif op.eps is None:
            self.notes.add(SPELLED)
        elif offset is not None:
            self.notes.add(BIASED)

    def gate(self, op: Op, layer: Layer, name: str) -> None:
        """Tensors of channel attention: the linear layers of SE as 1×1 convolutions, or ECA's filter."""
        se = layer.domain == "pooled"
        weight = op.weight[:, :, None, None] if se else op.weight
        wanted = (layer.out_channels, layer.in_channels, 1, 1) if se else (1, 1, layer.kernel)
        if weight.shape != wanted:
            op.node.fail(f"weight shape {weight.shape}; as layer {name} it would be {wanted}")
        self.tensors[f"{name}.weight"] = _tensor(weight)
        if layer.bias:
            self.tensors[f"{name}.bias"] = _tensor(op.constants.get("bias", np.zeros(len(weight), np.float32)))

    def padded(self, ops: list[Op], layer: Layer, name: str, end: Op) -> list[Op]:
        """The shortcut that picks positions and adds channels of zeros (He et al. 2015, option A); what follows it."""
        left = list(ops)
        picked = left.pop(0).window.strides if left and left[0].kind == "subsample" else (1, 1)
        channels = left.pop(0).channels if left and left[0].kind == "padchannels" else layer.in_channels
        if picked != (layer.stride,) * 2 or channels != layer.out_channels:
            (ops[0] if ops else end).node.fail(
                f"it picks by {picked} and makes {channels} channels; as layer {name} it would be "
                f"{(layer.stride,) * 2} and {layer.out_channels}"
            )
        return left

    def head(self, ops: list[Op], end: Op) -> None:
        """The classifier's tensors; raises WeightsError unless the head is a mean over the map and one linear layer."""
        classes = self.spec.num_classes
        wanted: list[Collection[str]] = [{"pool"}, {"linear"}, ENDINGS] if classes else [{"pool"}]
        for op, kinds in zip(ops, wanted, strict=False):
            if op.kind not in kinds:
                op.node.fail("a head is a mean over the map, then one linear layer; this cannot be expressed")
        if len(ops) not in ((2, 3) if classes else (1,)):
            (ops[-1] if ops else end).node.fail("the graph does not end in a mean over the map and a linear layer")
        if classes:
            bias = ops[1].constants.get("bias", np.zeros(classes, np.float32))
            self.tensors |= {"fc.weight": _tensor(ops[1].weight), "fc.bias": _tensor(bias)}


def _check_window(op: Op, layer: Layer, name: str) -> None:
    """Raise WeightsError unless a pool, a filter or a pad slides as the plan says."""
    window, size = op.window, op.inputs[0].size
    found, wanted = (window.kernel, window.strides), ((layer.kernel,) * 2, (layer.stride,) * 2)
    pads = (layer.padding,) * 4
    if layer.ceil and layer.kind == "maxpool":
        pads = (0, 0, 1, 1) if not window.ceil else pads  # the same windows, said otherwise
    elif layer.kind == "avgpool" and layer.stride == 1:
        pads = (0, 0, layer.kernel - 1, layer.kernel - 1)  # so that the size stays; the zeros count
    if found != wanted or window.pads != pads or window.dilations != (1, 1):
        op.node.fail(
            f"kernel and strides are {found} and pads {window.pads}; as layer {name} they would be {wanted} and {pads}"
        )
    if layer.kind == "avgpool":
        whole = replace(window, ceil=layer.ceil).out_size(size) == window.out_size(size)
        counted = window.counts_pads if layer.stride == 1 else not (window.counts_pads and window.ceil)
        divided = all(isinstance(side, int) and (side - layer.kernel) % layer.stride == 0 for side in size)
        if not ((whole and counted) or (divided and not any(pads))):
            op.node.fail(f"it treats the edge otherwise than layer {name}: maps of odd sizes would differ")


def _tensor(array: Array) -> Tensor:
    """A constant as a tensor of its own, in single precision."""
    return torch.from_numpy(np.array(array, np.float32, order="C"))
