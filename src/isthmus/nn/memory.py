"""Training in less memory: stems and blocks that keep little for backward and run the rest a second time.

Which maps wait for backward is decided on paper (`arch.memory.kept`); here is how the operations between them run, run
again and run backward. Statistics of batch norm are kept, not taken anew, so the second run moves none.
"""
# ruff: noqa: SLF001 - batch norm's kernels, and the buffers of modules, have no public door

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from isthmus.arch.memory import Memory, Step, block_steps, kept, stem_steps
from isthmus.arch.plan import Plan
from isthmus.nn.batchnorm import FROZEN, SYNCHRONISED
from isthmus.nn.block import BLOCKS, ResidualBlock
from isthmus.nn.layers import AveragePool, BlurPool, DropPath, EfficientChannelAttention, SqueezeExcite, ZeroPad

__all__ = ["Stage", "in_memory", "save_memory", "work_in_place"]

aten = torch.ops.aten
Made = tuple[Tensor, ...]
Grads = list[Tensor | None]


class Network(Protocol):
    """What is asked of a ResNet here (`nn.network` imports this file)."""

    memory: Memory
    plan: Plan
    stages: tuple[str, ...]

    def get_submodule(self, target: str) -> nn.Module: ...


class Stage(nn.Sequential):
    """A stage whose blocks save memory; as nn.Sequential in all else, state dict and hooks included."""

    memory: Memory = "plain"  # of a slice, which is made without being told

    def forward(self, x: Tensor) -> Tensor:
        if self.memory == "plain" or torch.compiler.is_compiling():
            return cast("Tensor", super().forward(x))  # type: ignore[no-untyped-call]
        for block in self:
            x = in_memory(self.memory, block, x, parent=block, inside=(block,), steps=steps_of(block))
        return x


def save_memory(net: Network, mode: Memory) -> tuple[str, ...]:
    """Choose what the stem and the blocks of `net` keep for backward, in place; `plain` is torch's own way.

    `checkpoint` keeps each block's input and runs the whole block again (Chen et al. 2016). `recompute` also keeps what
    costly convolutions gave, and runs norms, activations and the others again. Batch-norm statistics
    move once, random numbers repeat, and gradients are those of the plain network; second derivatives raise. Without
    gradients, in evaluation and in torch.compile the network is plain. Returns the names of what has to be
    checkpointed although `recompute` was asked: a caller's own blocks, and blocks or a `stem` into which modules were
    put that cannot be run one by one. At each call so are those with hooks inside, which then run twice.
    """
    net.memory = mode
    whole: list[str] = []
    if mode == "recompute":
        steps = stem_steps(net.plan.stem, net.plan.spec.activation)
        parts = [net.get_submodule(name) for name in ("conv1", "bn1", "act1", "maxpool")]
        whole += ["stem"] * (not placed(cast("nn.Module", net), steps, parts))
    for name in net.stages:
        stage: Any = net.get_submodule(name)
        # The class alone differs, so parameters, buffers, hooks and keys stay as they are.
        stage.__class__ = nn.Sequential if mode == "plain" else Stage
        stage.memory = mode
        if mode == "recompute":
            blocks = stage.named_children()
            whole += [f"{name}.{place}" for place, block in blocks if not placed(block, steps_of(block), (block,))]
    return tuple(whole)


def work_in_place(net: nn.Module, *, on: bool = True) -> None:
    """Let ReLUs and additions write over their input, which no backward pass reads; a caller's own blocks stay as are.

    A training step on a CPU is some 6 % faster for it. Hooks on the layers before them see what they always saw, but
    what they keep without copying changes afterwards, and backward hooks there raise. `on=False` undoes it.
    """
    ours = [cast("ResidualBlock", module) for module in net.modules() if type(module) in BLOCKS.values()]
    for block in ours:
        block.in_place = on
    for parent in (net, *ours):
        for module in parent.children():
            if isinstance(module, nn.ReLU):
                module.inplace = on


def steps_of(block: nn.Module) -> tuple[Step, ...]:
    """The operations of a block on paper; none for one whose forward is not ours."""
    ours = isinstance(block, ResidualBlock) and type(block) in BLOCKS.values()
    return block_steps(cast("ResidualBlock", block).spec) if ours else ()


def in_memory(
    mode: Memory,
    call: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    parent: nn.Module,
    inside: Sequence[nn.Module],
    steps: tuple[Step, ...],
) -> Tensor:
    """`call(x)` in a memory mode: `steps` are its operations by their names in `parent`, `inside` all that it runs."""
    trains = parent.training and torch.is_grad_enabled()
    needed = (x, *(parameter for module in inside for parameter in module.parameters()))
    if not trains or not any(tensor.requires_grad for tensor in needed):
        return call(x)
    modules = placed(parent, steps, inside) if mode == "recompute" else ()
    if not modules or any(is_hooked(child) for module in inside for child in module.modules()):

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), spare_buffers(inside)

        return checkpoint(call, x, use_reentrant=False, context_fn=contexts)
    chain = Chain(modules, steps, kept(steps, mode))
    return cast("Tensor", ChainFunction.apply(chain, x, *chain.parameters))


def placed(parent: nn.Module, steps: tuple[Step, ...], inside: Sequence[nn.Module]) -> tuple[nn.Module | None, ...]:
    """The module of each step, None for an addition; none at all unless they are all that runs `inside`.

    A caller may have exchanged or added modules since the network was built, and what paper does not know would be left
    out, or come out otherwise in a second run.
    """
    try:
        modules = tuple(parent.get_submodule(step.name) if step.name else None for step in steps)
    except AttributeError:
        return ()
    known = {parent, *(child for module in modules if module is not None for child in module.modules())}
    others = (child for module in inside for child in module.modules() if child not in known)
    complete = all(type(child) in (nn.Identity, nn.Sequential) for child in others)
    return modules if complete and all(module is None or runs_again(module) for module in modules) else ()


def runs_again(module: nn.Module) -> bool:
    """Whether the module of a step gives the same a second time, by an operation below."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and OPERATIONS.get(type(module)):
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if type(module) in OPERATIONS:
        return True
    return all(type(child) in REPEATABLE and not vars(child).get("inplace") for child in module.modules())


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody wants to see this module called, or put another function in place of its forward."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    everywhere = _has_any_global_hook()  # type: ignore[no-untyped-call]
    return bool(everywhere) or "forward" in vars(module) or any(getattr(module, kind) for kind in kinds)


@contextmanager
def spare_buffers(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Copies take the place of all buffers meanwhile, so that a second run moves no statistics."""
    held = [(child, dict(child._buffers)) for module in modules for child in module.modules() if child._buffers]
    try:
        for child, buffers in held:
            child._buffers.update({name: None if each is None else each.clone() for name, each in buffers.items()})
        yield
    finally:
        for child, buffers in held:
            child._buffers.update(buffers)


class Operation:
    """How a module runs in a chain. This one serves REPEATABLE modules, through torch's own autograd in the second run.

    `made` is what the first run leaves beside its map: the statistics of a norm, the samples that drop path kept.
    """

    fresh = False  # whether maps and gradients that it gives are nobody else's memory

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.graph: tuple[Tensor, Tensor] | None = None

    def run(self, x: Tensor, *, own: bool) -> tuple[Tensor, Made]:  # noqa: ARG002
        """The map and what is to be remembered; `own` says that `x` may be overwritten."""
        return self.module(x), ()

    def again(self, x: Tensor, made: Made) -> Tensor:  # noqa: ARG002
        """The map once more."""
        with torch.enable_grad(), spare_buffers((self.module,)):
            into = x.detach().requires_grad_(x.is_floating_point())
            self.graph = into, self.module(into)
        return self.graph[1].detach()

    def backward(self, dy: Tensor, back: "Back") -> tuple[Tensor | None, Grads]:
        """Gradients of the input, None where `back` does not need it, and of the parameters in their order."""
        if self.graph is None:
            self.again(back.x, back.made)
        into, out = cast("tuple[Tensor, Tensor]", self.graph)
        self.graph = None
        parameters = list(self.module.parameters())
        wanted = [*([into] if back.needs_dx else []), *(each for each in parameters if each.requires_grad)]
        found = iter(torch.autograd.grad(out, wanted, dy) if wanted else ())
        dx = next(found) if back.needs_dx else None
        return dx, [next(found) if each.requires_grad else None for each in parameters]


class Convolution(Operation):
    """A convolution with zeros around the map: backward reads its input."""

    module: nn.Conv2d
    fresh = True

    def again(self, x: Tensor, made: Made) -> Tensor:  # noqa: ARG002
        return self.run(x, own=False)[0]

    def backward(self, dy: Tensor, back: "Back") -> tuple[Tensor | None, Grads]:
        conv, bias = self.module, self.module.bias
        asked = [back.needs_dx, conv.weight.requires_grad, bias is not None and bias.requires_grad]
        dx, *grads = aten.convolution_backward(
            dy,
            back.x.to(dy.dtype),
            conv.weight.to(dy.dtype),
            None if bias is None else [conv.out_channels],
            conv.stride,
            conv.padding,
            conv.dilation,
            False,  # not transposed
            [0] * len(conv.stride),
            conv.groups,
            asked,
        )
        grads = [None if each is None else each.to(conv.weight.dtype) for each in grads]
        return dx, grads[: 1 if bias is None else 2]


class BatchNorm(Operation):
    """A batch norm in any state: backward reads its input and the statistics of the first run."""

    module: nn.BatchNorm2d
    fresh = True

    def run(self, x: Tensor, *, own: bool) -> tuple[Tensor, Made]:  # noqa: ARG002
        norm = self.module
        factor, by_batch = norm.momentum or 0.0, norm.training or norm.running_mean is None
        tracks = norm.track_running_stats or not norm.training
        if by_batch and x.numel() == x.shape[1]:
            raise ValueError(f"batch norm needs more than 1 value per channel when training; got {tuple(x.shape)}")
        if norm.training and tracks and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:
                factor = 1 / float(norm.num_batches_tracked)
        # What torch.batch_norm calls, but with the statistics and the kernel that it chose.
        y, *made, self.kernel = torch._batch_norm_impl_index(
            x,
            norm.weight,
            norm.bias,
            norm.running_mean if tracks else None,
            norm.running_var if tracks else None,
            by_batch,
            factor,
            norm.eps,
            torch.backends.cudnn.enabled,
        )
        return y, tuple(made) if by_batch else ()

    def again(self, x: Tensor, made: Made) -> Tensor:
        if not made:
            return super().run(x, own=False)[0]
        mean, scale, _ = made
        return F.batch_norm(x, mean, scale.pow(-2), self.module.weight, self.module.bias, eps=0.0)

    def backward(self, dy: Tensor, back: "Back") -> tuple[Tensor | None, Grads]:
        norm = self.module
        mean, scale, reserve = back.made or (None, None, dy.new_empty(0))
        given = [each for each in (norm.weight, norm.bias) if each is not None]
        asked = [back.needs_dx, *(each is not None and each.requires_grad for each in (norm.weight, norm.bias))]
        dx, *grads = aten._batch_norm_impl_index_backward(
            self.kernel,
            back.x,
            dy,
            norm.weight,
            norm.running_mean,
            norm.running_var,
            mean,
            scale,
            bool(back.made),
            norm.eps,
            asked,
            reserve,
        )
        return dx, grads[: len(given)]


class Rectifier(Operation):
    """ReLU: backward reads its output."""

    fresh = True

    def run(self, x: Tensor, *, own: bool) -> tuple[Tensor, Made]:
        return x.relu_() if own else x.relu(), ()

    def again(self, x: Tensor, made: Made) -> Tensor:  # noqa: ARG002
        return x.relu()

    def backward(self, dy: Tensor, back: "Back") -> tuple[Tensor | None, Grads]:
        return aten.threshold_backward(dy, back.y, 0), []


class Drop(Operation):
    """Drop path: backward needs to know who was kept."""

    module: DropPath

    def run(self, x: Tensor, *, own: bool) -> tuple[Tensor, Made]:  # noqa: ARG002
        made = (self.module.kept(x),) if self.module.training else ()
        return self.again(x, made), made

    def again(self, x: Tensor, made: Made) -> Tensor:
        return self.module.scaled(x, *made) if made else x

    def backward(self, dy: Tensor, back: "Back") -> tuple[Tensor | None, Grads]:
        return self.again(dy, back.made), []


OPERATIONS: dict[type[nn.Module], type[Operation]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), Convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), BatchNorm),
    **dict.fromkeys(FROZEN.values(), BatchNorm),
    nn.ReLU: Rectifier,
    DropPath: Drop,
}
# What computes the same whenever it is called with the same input; what it may hold inside is in here too.
REPEATABLE: frozenset[type[nn.Module]] = frozenset(
    {
        *(set(OPERATIONS) - {DropPath}), *SYNCHRONISED.values(),
        SqueezeExcite, EfficientChannelAttention, AveragePool, BlurPool, ZeroPad,
        nn.Identity, nn.Sequential, nn.GroupNorm,
        nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
        nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
        nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
        nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
        nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
        nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
        nn.SiLU, nn.GELU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.ReLU6, nn.LeakyReLU, nn.PReLU,
        nn.ELU, nn.Sigmoid, nn.Tanh,
    }
)  # fmt: skip


class Back(NamedTuple):
    """What backward of one operation may read: maps are run again only when they are read."""

    chain: "Chain"
    place: int
    needs_dx: bool
    made: Made

    @property
    def x(self) -> Tensor:
        """The input of the operation."""
        return self.chain.value(self.chain.steps[self.place - 1].inputs[0])

    @property
    def y(self) -> Tensor:
        """Its output."""
        return self.chain.value(self.place)


class Chain:
    """Operations in a row, with a shortcut: one forward pass that keeps some values, and one backward from those."""

    def __init__(self, modules: Sequence[nn.Module | None], steps: tuple[Step, ...], keep: frozenset[int]) -> None:
        self.steps, self.keep = steps, sorted(keep)
        self.operations = [None if each is None else OPERATIONS.get(type(each), Operation)(each) for each in modules]
        self.parameters = [parameter for each in modules if each is not None for parameter in each.parameters()]
        self.last_read = {value: place for place, step in enumerate(steps, 1) for value in step.inputs}
        self.values: dict[int, Tensor] = {}
        self.dtypes: list[torch.dtype] = []  # of the values: autocast leaves them in several
        self.made: list[Made] = []

    def is_own(self, value: int, place: int) -> bool:
        """Whether the operation at `place` may overwrite a value: it is the last to read it."""
        operation = self.operations[value - 1] if value else None
        made_here = value > 0 and (operation is None or operation.fresh)
        return made_here and self.last_read[value] == place and value not in self.keep

    def run(self, x: Tensor) -> Tensor:
        """The output; what is to be kept stays in `values` and `made`."""
        self.values, self.made, self.dtypes = {0: x}, [], [x.dtype]
        for place, (step, operation) in enumerate(zip(self.steps, self.operations, strict=True), 1):
            own = self.is_own(step.inputs[0], place)
            made: Made = ()
            first, *others = (self.values[value] for value in step.inputs)
            if operation is not None:
                self.values[place], made = operation.run(first, own=own)
            else:
                self.values[place] = (
                    first.add_(*others) if own and first.dtype == others[0].dtype else first + others[0]
                )
            self.made.append(made)
            self.dtypes.append(self.values[place].dtype)
            for value in step.inputs:
                if self.last_read[value] == place and value not in self.keep:
                    self.values.pop(value, None)
        return self.values[len(self.steps)]

    def value(self, place: int) -> Tensor:
        """A value that was kept, or is run again with what it needs."""
        if place not in self.values:
            step, operation = self.steps[place - 1], self.operations[place - 1]
            first, *others = (self.value(value) for value in step.inputs)
            made = self.made[place - 1]
            self.values[place] = first + others[0] if operation is None else operation.again(first, made)
        return self.values[place]

    def backward(self, dy: Tensor, *, needs_dx: bool) -> tuple[Tensor | None, Grads]:
        """Gradients of the input and of the parameters."""
        grads = {len(self.steps): dy}
        of_parameters: Grads = []
        for place in range(len(self.steps), 0, -1):
            step, operation, found = self.steps[place - 1], self.operations[place - 1], grads.pop(place)
            fresh = operation is not None and operation.fresh
            if operation is not None:
                needed = needs_dx or step.inputs[0] > 0
                dx, others = operation.backward(found, Back(self, place, needed, self.made[place - 1]))
                of_parameters[:0] = others
                if dx is None:  # nobody asks for the gradient of the chain's input
                    continue
                found = dx
            self.values.pop(place, None)
            for value in step.inputs:
                grad = found.to(self.dtypes[value])
                if value in grads:
                    grad = grad.add_(grads[value]) if fresh else grad + grads[value]
                grads[value] = grad
        return grads.get(0), of_parameters


class ChainFunction(torch.autograd.Function):
    """A chain as one operation of autograd, all that is kept known to it: hooks and checks of saved tensors work."""

    @staticmethod
    def forward(ctx: Any, chain: Chain, x: Tensor, *_parameters: Tensor) -> Tensor:
        out = chain.run(x)
        kind = x.device.type
        ctx.chain = chain
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.save_for_backward(
            *(chain.values[value] for value in chain.keep), *(each for made in chain.made for each in made)
        )
        ctx.made = [len(made) for made in chain.made]
        chain.values, chain.made = {}, []
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        chain, saved = ctx.chain, iter(ctx.saved_tensors)
        chain.values = {value: next(saved) for value in chain.keep}
        chain.made = [tuple(next(saved) for _ in range(count)) for count in ctx.made]
        kind, dtype, enabled = ctx.autocast
        x = chain.values[0]
        # A gradient that was expanded or permuted would send every kernel below to its slow path.
        layout = (
            torch.channels_last
            if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
            else torch.contiguous_format
        )
        with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
            dx, grads = chain.backward(dy.contiguous(memory_format=layout), needs_dx=ctx.needs_input_grad[1])
        chain.values, chain.made = {}, []
        return None, dx, *grads
