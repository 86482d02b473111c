"""Batch norm folded into the convolution before it, and re-inserted again: pure functions, the input is left as it is.

In evaluation a batch norm is one scale and one shift a channel, which the convolution's weight and a bias can carry.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from isthmus.arch.block import FOLDED
from isthmus.arch.plan import Plan
from isthmus.errors import SpecError
from isthmus.nn.batchnorm import FROZEN, BatchNorm
from isthmus.nn.block import BLOCKS
from isthmus.nn.memory import Stage
from isthmus.nn.network import ResNet

__all__ = ["exchanged", "fold", "fold_tensors", "folded_or_copied", "insert_batchnorm", "merge_tensors"]

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Kinds = dict[str, tuple[type[nn.Module], str]]
# Classes that differ in training alone.
SAME: dict[type[nn.Module], type[nn.Module]] = {**FROZEN, Stage: nn.Sequential}


def fold_tensors(weight: Tensor, bias: Tensor | None, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that equals convolution and batch norm in evaluation."""
    if norm.running_mean is None or norm.running_var is None:
        raise SpecError("a batch norm without running statistics depends on its batch and cannot be folded")
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean if bias is None else bias - norm.running_mean
    folded = weight * scale.view(-1, *(1,) * (weight.ndim - 1))
    return folded.detach(), (shift * scale if norm.bias is None else shift * scale + norm.bias).detach()


def merge_tensors(
    weight: Tensor, bias: Tensor | None, other_weight: Tensor, other_bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the one convolution over [x, other] that equals the sum of a convolution of each."""
    biases = [each.detach() for each in (bias, other_bias) if each is not None]
    return torch.cat([weight, other_weight], 1).detach(), torch.stack(biases).sum(0) if biases else None


def pairs(plan: Plan) -> Iterator[tuple[str, str]]:
    """Names of each convolution and of the norm right behind it."""
    chains = [("", plan.stem)]
    for block in plan.blocks:
        chains += [(f"{block.name}.", layers) for layers in (block.spec.main, block.spec.downsample)]
    for path, layers in chains:
        for conv, norm in pairwise(layers):
            if (conv.kind, norm.kind) == ("conv", "norm"):
                yield path + conv.name, path + norm.name


def exchanged(net: ResNet) -> str:
    """The name of the first module before the classifier that is not as the plan has it; none: all are."""
    if own := [block.name for block in net.plan.blocks if block.spec.kind not in BLOCKS]:
        return own[0]
    found, wanted = kinds(net), planned_kinds(net.plan)
    names = [*found, *(name for name in wanted if name not in found)]
    return next((name or "the network" for name in names if found.get(name) != wanted.get(name)), "")


@lru_cache(maxsize=16)
def planned_kinds(plan: Plan) -> Kinds:
    """The modules of a plan's network."""
    with torch.device("meta"):
        return kinds(ResNet(plan))


def kinds(net: ResNet) -> Kinds:
    """The class of each module before the classifier and how it was made, as far as evaluation goes, by its name."""
    found: Kinds = {}
    for name, module in net.named_modules():
        kind = SAME.get(type(module), type(module))
        # Of a norm, what the class leaves open is in its tensors and its eps, which are folded as they are.
        made = "" if isinstance(module, BatchNorm) else module.extra_repr().replace("inplace=True", "")
        if name.partition(".")[0] != "fc":
            found[name] = kind, made
    return found


def sibling(net: ResNet, norm: str) -> ResNet:
    """A network of the same plan with another norm, on the same device, in the same precision and mode, as frozen.

    The classifier comes along as it is, and so do norms that both have. Raises SpecError for a network whose modules
    are not the plan's.
    """
    if changed := exchanged(net):
        raise SpecError(
            f"{changed} is not as the network's plan has it, and a network made from the plan would be another: "
            f"evaluate this one as it is"
        )
    first = next(net.parameters())
    with torch.device("meta"):
        other = ResNet(Plan(replace(net.spec, norm=norm), net.plan.image_size))  # type: ignore[arg-type]
    # Buffers that no state dict holds (blur filters) come from a real network's constructor, so they are copied too.
    other = other.to_empty(device=first.device).to(first.dtype)
    other.fc = copy.deepcopy(net.fc)
    norms = {name for name, module in other.named_modules() if isinstance(module, BatchNorm)}
    for name, module in net.named_modules():
        if name in norms and isinstance(module, BatchNorm):
            other.set_submodule(name, copy.deepcopy(module))
    buffers = dict(net.named_buffers())
    for name, buffer in other.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])
    other.preprocess, other.classes, other.frozen = net.preprocess, net.classes, net.frozen
    for name in net.frozen:
        other.get_submodule(name).requires_grad_(requires_grad=False)
    return other.train(net.training)


def fold(net: ResNet) -> ResNet:
    """A network without batch norm that computes what `net` computes in evaluation (norm `none`, biased convolutions).

    Pre-activation networks keep the norms that no convolution stands right before (norm `leading`): the first of each
    block and the last of all. Raises SpecError for networks that are not batch-normalised, for a caller's own blocks,
    and for one in which modules were exchanged.
    """
    kinds = {stage.block for stage in net.spec.stages}
    if net.spec.norm != "batch" or not kinds <= set(BLOCKS):
        raise SpecError(
            f"cannot fold a network with norm {net.spec.norm!r} and blocks {', '.join(sorted(kinds))}: only batch norm "
            f"behind a convolution folds"
        )
    folded = sibling(net, "leading" if net.spec.preact else "none")
    state, modules = net.state_dict(), dict(net.named_modules())
    for conv, norm in pairs(net.plan):
        weight, bias = fold_tensors(state[f"{conv}.weight"], state.get(f"{conv}.bias"), modules[norm])
        state[f"{conv}.weight"], state[f"{conv}.bias"] = weight, bias
        for key in [key for key in state if key.startswith(f"{norm}.")]:
            del state[key]
    folded.load_state_dict(state)
    return folded


def folded_or_copied(net: ResNet) -> ResNet:
    """What `fold` gives; a copy of group-normalised and changed networks, which cannot fold.

    Half precision becomes single before: folding in it would round every weight once more.
    """
    if any(each.dtype in (torch.float16, torch.bfloat16) for each in net.parameters()):
        net = copy.deepcopy(net).float()
    try:
        return fold(net)
    except SpecError:
        return copy.deepcopy(net)


@torch.no_grad()
def insert_batchnorm(net: ResNet, batches: Iterable[Tensor]) -> ResNet:
    """The inverse of `fold`: batch norm behind every biased convolution, the function in evaluation unchanged.

    The running statistics are those of `batches` (each (N, C, H, W), preprocessed), so that training mode starts
    close to evaluation mode; scale and shift undo them exactly. Weights are rescaled to the size of He et al. 2015's
    initialisation, which batch norm undoes too: a stem that was trained on pixels of 0..255 has weights so small that
    one step at a usual rate would overwrite them. Raises SpecError unless the norm is `none` or `leading` and every
    module the plan's.
    """
    if net.spec.norm not in FOLDED:
        raise SpecError(
            f"batch norm can be inserted into a network with norm 'none' or 'leading'; this one has {net.spec.norm!r}"
        )
    normed = sibling(net, "batch")
    convs = {name: module for name, module in net.named_modules() if isinstance(module, Conv)}
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}

    def record(name: str, output: Tensor) -> None:
        values = output.double().transpose(0, 1).flatten(1)
        count, total, squares = sums.get(name, (0, torch.zeros(1), torch.zeros(1)))
        sums[name] = count + values.shape[1], total + values.sum(1), squares + values.square().sum(1)

    handles = [
        module.register_forward_hook(lambda _module, _input, output, name=name: record(name, output))
        for name, module in convs.items()
    ]
    mode = net.training
    try:
        net.eval()
        for batch in batches:
            net.features(batch)  # the head may read no further than some stage
    finally:
        net.train(mode)
        for handle in handles:
            handle.remove()
    if not sums:
        raise SpecError("no batch was given to measure batch-norm statistics on")
    state, target = dict(net.state_dict()), normed.state_dict()
    modules = dict(normed.named_modules())
    for conv, norm in pairs(normed.plan):
        count, total, squares = sums[conv]
        bias = state.pop(f"{conv}.bias")
        mean = total / count
        var = (squares / count - mean.square()).clamp_min(0) * (count / max(count - 1, 1))
        weight, eps = state[f"{conv}.weight"], modules[norm].eps
        usual = (2 / (weight[0, 0].numel() * weight.shape[0] / modules[conv].groups)) ** 0.5
        scale = usual / weight.square().mean().sqrt().clamp_min(1e-12)
        state[f"{conv}.weight"] = weight * scale
        # The hook saw the bias too: the mean behind a bias-free convolution is less by just that.
        target[f"{norm}.running_mean"].copy_((mean - bias) * scale)
        target[f"{norm}.running_var"].copy_(var * scale**2)
        target[f"{norm}.weight"].copy_((var + eps / scale**2).sqrt())
        target[f"{norm}.bias"].copy_(mean)
        target[f"{norm}.num_batches_tracked"].zero_()
        if f"{conv}.bias" in target:  # a stem with both: the norm undoes it
            target[f"{conv}.bias"].zero_()
    for key, value in state.items():
        target[key].copy_(value)
    return normed
