"""The fast form of a network for evaluation: folded, and on CPUs each convolution fused with what follows it.

Eager torch reads and writes a whole map for every activation and once more for the addition of the shortcut. oneDNN's
convolution does both before it writes its map: the operations that torch's compiler emits, without the compiling. A
shortcut that is a 1×1 convolution is not even that: it becomes part of the block's last, which reads both its inputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from isthmus.arch.block import FOLDED
from isthmus.nn.block import ResidualBlock
from isthmus.nn.fold import exchanged, folded_or_copied, merge_tensors
from isthmus.nn.layers import DropPath
from isthmus.nn.network import ResNet

__all__ = ["fast_form"]


def fast_form(net: ResNet, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> ResNet:
    """A copy of `net` for its maps `names` in evaluation, without classifier or later stages; not to train or save.

    Group-normalised networks, a caller's own blocks and networks in which modules were exchanged cannot fold and are
    copied as they are.
    """
    form = folded_or_copied(net)
    fused = fuses(device, dtype) and form.spec.dims == 2 and form.spec.norm in FOLDED and not exchanged(form)
    deepest = (
        len(net.stages)
        if "last" in names
        else max((net.stages.index(name) + 1 for name in names if name != "stem"), default=0)
    )
    form.fc = nn.Identity()
    for stage in net.stages[deepest:]:
        form.add_module(stage, nn.Identity())
    if fused:  # before anything is rounded
        merge_projections(form)
    form = form.eval().requires_grad_(requires_grad=False).to(device, dtype)
    if form.spec.dims == 2:
        form.to(memory_format=torch.channels_last)
    if fused:
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
        if isinstance(module, ResidualBlock) and adds_last(module):
            make_fused(module, leads=form.spec.preact)


def make_fused(block: ResidualBlock, *, leads: bool) -> None:
    """Let a block whose convolutions are fused run as FusedBlock; `leads` says that it begins with a norm."""
    children = block.named_children()
    left = {name: child for name, child in children if not isinstance(child, nn.Identity | DropPath)}
    left.pop("downsample", None)
    names = {"lead": ("bn1", "act1") if leads else (), "behind": ("act",)}
    parts = {part: tuple(left.pop(name) for name in those if name in left) for part, those in names.items()}
    for part, modules in (*parts.items(), ("path", tuple(left.values()))):
        setattr(block, part, modules)
    block.__class__ = FusedBlock


def adds_last(block: ResidualBlock) -> bool:
    """Whether the addition of the shortcut stands right behind the last convolution."""
    return block.adds and block.spec.attention == "none"


def merge_projections(form: ResNet) -> None:
    """Put each 1×1 convolution that ends a block's shortcut into that which ends its main path, in place."""
    for block in [module for module in form.modules() if isinstance(module, ResidualBlock) and adds_last(module)]:
        ends = [layers[-1] for layers in (block.spec.main, block.spec.downsample) if layers and layers[-1].kernel == 1]
        convs = [conv for layer in ends if isinstance(conv := block.get_submodule(layer.name), nn.Conv2d)]
        if len(convs) == 2:
            expand, project = convs
            weight, bias = merge_tensors(expand.weight, expand.bias, project.weight, project.bias)
            expand.weight, expand.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
            block.set_submodule(ends[1].name, Subsample(ends[1].stride))


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
        ops, relu = torch.ops.mkldnn._convolution_pointwise, "relu" if self.relu else None  # noqa: SLF001
        if added is None:
            out: Tensor = ops(x, self.weight, self.bias, *self.how, relu or "none", [], "")
        else:
            out = ops.binary(x, added, self.weight, self.bias, *self.how, "add", None, relu, [], "")
        return out


class Subsample(nn.Module):
    """Every `stride`-th position: what a strided 1×1 convolution reads."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H / stride, W / stride), rounded up."""
        return x[:, :, :: self.stride, :: self.stride]


class FusedBlock(ResidualBlock):
    """A folded block whose last convolution joins main path and shortcut; what became an identity is not called."""

    lead: tuple[nn.Module, ...]  # what main path and projection both begin with
    path: tuple[nn.Module, ...]
    behind: tuple[nn.Module, ...]

    def forward(self, x: Tensor) -> Tensor:
        begun = called(self.lead, x)
        *path, last = self.path
        out, shortcut = called(path, begun), self.shortcut(begun if self.projects else x)
        merged = isinstance(self.downsample, nn.Sequential) and isinstance(self.downsample[-1], Subsample)
        out = last(torch.cat([out, shortcut], 1)) if merged else last(out, shortcut)
        return called(self.behind, out)


def called(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """What modules in a row make of `x`."""
    for module in modules:
        x = module(x)
    return x
