"""ResNet: stem, stages and head, built from a Plan."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from isthmus.arch.memory import Memory, stem_steps
from isthmus.arch.plan import Plan, PlannedBlock
from isthmus.arch.preprocess import IMAGENET, Preprocess
from isthmus.errors import SpecError
from isthmus.nn.block import BLOCKS, make_shortcut
from isthmus.nn.init import initialise
from isthmus.nn.layers import add_layer, make_layer
from isthmus.nn.memory import in_memory

__all__ = ["ResNet", "make_head"]


class ResNet(nn.Module):
    """The network of a plan: (N, in_channels, H, W) to logits (N, num_classes), or pooled features if that is 0.

    `preprocess` and `classes` travel with the weights. `blocks` maps a stage's own block name to a class with
    `from_spec(BlockSpec)` or the constructor `(in_channels, mid_channels, stride, downsample)`; raises SpecError
    when such a block is missing or gives another shape than the plan.
    """

    conv1: nn.Module
    bn1: nn.Module
    act1: nn.Module
    maxpool: nn.Module
    norm: nn.Module
    act: nn.Module
    fc: nn.Module

    def __init__(
        self, plan: Plan, *, blocks: Mapping[str, type[nn.Module]] | None = None, zero_init: bool = True
    ) -> None:
        super().__init__()
        if taken := sorted(set(blocks or {}) & set(BLOCKS)):
            raise SpecError(
                f"a block of your own cannot be called {taken[0]!r}, which is one of ours; name it otherwise"
            )
        self.plan, self.spec = plan, plan.spec
        self.preprocess: Preprocess = IMAGENET
        self.classes: tuple[str, ...] = ()
        self.frozen: tuple[str, ...] = ()
        self.memory: Memory = "plain"
        spec = plan.spec
        made: dict[str, Any] = {
            "dims": spec.dims,
            "norm": spec.norm,
            "eps": spec.norm_eps,
            "activation": spec.activation,
        }
        for layer in plan.stem:
            add_layer(self, layer.name, make_layer(layer, **made))
        for optional in ("bn1", "act1", "maxpool"):
            if not hasattr(self, optional):
                add_layer(self, optional, nn.Identity())
        for planned in plan.blocks:
            add_layer(self, planned.name, make_block(planned, dict(blocks or {})))
        self.stages = tuple(f"layer{number + 1}" for number in range(len(spec.stages)))
        for layer in plan.tail:
            add_layer(self, layer.name, make_layer(layer, **made))
        self.fc = make_head(plan)
        initialise(self, zero_init=zero_init)

    def features(self, x: Tensor, names: tuple[str, ...] | None = None, *, after: str = "") -> dict[str, Tensor]:
        """The maps of `plan.features`, all or those in `names`: (N, channels, H / stride, W / stride), rounded up.

        The average pool of an anti-aliased stem and a `max_ceil` pool round down instead. `stem` is taken before its
        pool, `last` after the final norm of a pre-activation network. Nothing beyond the last name asked for is run.
        `after` says that `x` is no picture but the map behind the stem (its pool included) or behind a stage; only
        what comes later can be asked for then. Raises SpecError for a name that is not to be had.
        """
        known = ("stem", *self.stages, "last")
        if after and after not in known[:-1]:
            raise SpecError(f"cannot go on after {after!r}; known: {', '.join(known[:-1])}")
        begin = known.index(after) + 1 if after else 0
        names = known[begin:] if names is None else names
        if unknown := [name for name in names if name not in known[begin:]]:
            raise SpecError(f"there is no feature {unknown[0]!r}; known: {', '.join(known[begin:])}")
        end = max(known.index(name) for name in names) if names else -1
        maps: dict[str, Tensor] = {}
        if not begin and end > 0 and "stem" not in names:
            x = self.stem(x)
        elif not begin:
            x = self.act1(self.bn1(self.conv1(x)))
            if "stem" in names:
                maps["stem"] = x
            if end > 0:
                x = self.maxpool(x)
        for name in self.stages[max(begin - 1, 0) : max(end, 0)]:
            x = self.get_submodule(name)(x)
            if name in names:
                maps[name] = x
        if "last" in names:
            maps["last"] = self.act(self.norm(x)) if self.spec.preact else x
        return maps

    @property
    def outputs(self) -> int:
        """Numbers that it gives of a picture: logits, or pooled features where it has no classifier."""
        return self.spec.num_classes or self.plan.num_features

    def stem(self, x: Tensor) -> Tensor:
        """The map before the first stage."""
        inside = (self.conv1, self.bn1, self.act1, self.maxpool)

        def call(x: Tensor) -> Tensor:
            for module in inside:
                x = module(x)
            return x

        if self.memory == "plain" or torch.compiler.is_compiling():
            return call(x)
        steps = stem_steps(self.plan.stem, self.spec.activation)
        return in_memory(self.memory, call, x, parent=self, inside=inside, steps=steps)

    def pooled(self, x: Tensor, *, after: str = "", known: Mapping[str, Tensor] | None = None) -> Tensor:
        """What the classifier sees: (N, plan.num_features).

        With `after`, `x` is the map behind that point and `known` holds what `pool` makes of the taps up to there.
        """
        known = known or {}
        maps = self.features(x, tuple(tap for tap in self.spec.head.taps if tap not in known), after=after)
        parts = [known[tap] if tap in known else self.pool(maps[tap]) for tap in self.spec.head.taps]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def pool(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A map (N, C, *size) pooled in every way the head asks for, side by side, in `dtype`: (N, pools × C)."""
        over = tuple(range(2, x.ndim))
        parts = [
            x.mean(over, dtype=dtype) if pool == "avg" else x.amax(over).to(dtype or x.dtype)
            for pool in self.spec.head.pools
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.pooled(x))
        return logits

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train, but what `freeze` froze stays in evaluation."""
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self


def make_head(plan: Plan) -> nn.Module:
    """The classifier of a plan, initialised; the identity when the pooled features are the output."""
    holder = nn.Module()
    for layer in plan.head:
        if layer.kind != "globalpool":
            module = make_layer(layer, dims=1, norm="batch", eps=plan.spec.norm_eps, activation="relu")
            add_layer(holder, layer.name, module)
    initialise(holder)
    return getattr(holder, "fc", nn.Identity())


def make_block(planned: PlannedBlock, own: dict[str, type[nn.Module]]) -> nn.Module:
    """The module of one planned block; a caller's own class is checked against the plan on meta tensors."""
    spec = planned.spec
    if spec.kind not in own:
        if spec.kind not in BLOCKS:
            raise SpecError(
                f"{planned.name} asks for a block {spec.kind!r}; known: {', '.join((*BLOCKS, *own))}; pass your own "
                f'as blocks={{"{spec.kind}": YourBlock}}'
            )
        return BLOCKS[spec.kind].from_spec(spec)
    kind = own[spec.kind]

    def made() -> nn.Module:
        if hasattr(kind, "from_spec"):
            block: nn.Module = kind.from_spec(spec)
            return block
        downsample = make_shortcut(
            spec.downsample, dims=spec.dims, norm=spec.norm, eps=spec.norm_eps, activation=spec.activation
        )
        return kind(spec.in_channels, spec.mid, spec.stride, downsample)

    side = 8 * spec.stride
    try:
        with torch.device("meta"), torch.no_grad():
            found = tuple(made().eval()(torch.empty(1, spec.in_channels, *(side,) * spec.dims)).shape)
    except (RuntimeError, ValueError, TypeError) as error:
        raise SpecError(f"{planned.name}: your block {spec.kind!r} fails: {str(error).splitlines()[0]}") from error
    wanted = (1, spec.out_channels, *(side // spec.stride,) * spec.dims)
    if found != wanted:
        raise SpecError(
            f"{planned.name}: your block {spec.kind!r} gives {found} where the plan says {wanted}; change the "
            f"block, or the stage's out and stride"
        )
    return made()
