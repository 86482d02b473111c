"""The fast form of a network for evaluation: folded, and on CPUs each convolution fused with what follows it.

Eager torch reads and writes a whole map for every activation and once more for the addition of the shortcut. oneDNN's
convolution does both before it writes its map: the operations that torch's compiler emits, without the compiling.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from isthmus.nn.block import ResidualBlock
from isthmus.nn.fold import exchanged, folded_or_copied
from isthmus.nn.layers import DropPath
from isthmus.nn.network import ResNet

__all__ = ["fast_form"]


def fast_form(net: ResNet, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> ResNet:
    """A copy of `net` for its maps `names` in evaluation, without classifier or later stages; not to train or save.

    Pre-activation and group-normalised networks, a caller's own blocks and networks in which modules were exchanged
    cannot fold and are copied as they are.
    """
    form = folded_or_copied(net)
    known = form.spec.norm == "none" and not form.spec.preact and not exchanged(form)
    deepest = (
        len(net.stages)
        if "last" in names
        else max((net.stages.index(name) + 1 for name in names if name != "stem"), default=0)
    )
    form.fc = nn.Identity()
    for stage in net.stages[deepest:]:
        form.add_module(stage, nn.Identity())
    form = form.eval().requires_grad_(requires_grad=False).to(device, dtype)
    if form.spec.dims == 2:
        form.to(memory_format=torch.channels_last)
    if known and fuses(device, dtype):
        fuse(form)
    return form


def fuses(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in this precision here, by the operations that torch's compiler emits."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")  # type: ignore[no-untyped-call]
    if device.type != "cpu" or not there:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001


def fuse(form: ResNet) -> None:
    """Fuse the convolutions of a folded network in place."""
    if isinstance(form.conv1, nn.Sequential):
        form.conv1.add_module("act1", form.act1)
        form.act1 = nn.Identity()
    for module in list(form.modules()):
        if isinstance(module, nn.Sequential | ResidualBlock | ResNet):
            fuse_pairs(module)
        if isinstance(module, ResidualBlock) and isinstance(module.act, nn.Identity):
            module.__class__ = FusedBlock  # its activation went into the last convolution, and so must the addition


def fuse_pairs(parent: nn.Module) -> None:
    """Fuse each convolution among the children with an activation right behind it."""
    children = [child for child in parent.named_children() if not isinstance(child[1], nn.Identity | DropPath)]
    for (name, child), (behind, activation) in zip(children, [*children[1:], ("", None)], strict=True):
        if type(child) is nn.Conv2d:
            parent.add_module(name, FusedConv(child, relu=isinstance(activation, nn.ReLU)))
            if isinstance(activation, nn.ReLU):
                parent.add_module(behind, nn.Identity())


class FusedConv(nn.Module):
    """A convolution that adds another map to its output and applies ReLU before it writes it."""

    def __init__(self, conv: nn.Conv2d, *, relu: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.relu = conv.weight.detach(), conv.bias, relu
        self.how = list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups
        self.packed = False

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """(N, C, H, W) to (N, out, H / stride, W / stride), rounded up; `added` has the shape of the output."""
        if not self.packed:  # into the order that the kernel for maps of this size reads
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.how, list(x.shape))  # noqa: SLF001
            self.packed = True
        ops, activation = torch.ops.mkldnn._convolution_pointwise, "relu" if self.relu else "none"  # noqa: SLF001
        if added is None:
            out: Tensor = ops(x, self.weight, self.bias, *self.how, activation, [], "")
        else:
            out = ops.binary(x, added, self.weight, self.bias, *self.how, "add", None, activation, [], "")
        return out


class FusedBlock(ResidualBlock):
    """A folded bottleneck or basic block whose last convolution adds the shortcut and applies the activation."""

    def forward(self, x: Tensor) -> Tensor:
        filters = () if isinstance(self.aa, nn.Identity) else (self.aa,)
        *first, last = [child for child in self.children() if isinstance(child, FusedConv) or child in filters]
        out = x
        for child in first:
            out = child(out)
        result: Tensor = last(out, self.shortcut(x)) if self.adds else last(out)
        return result
