"""ResNet: stem, stages and head, built from a Plan."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from isthmus.arch.plan import Plan, PlannedBlock
from isthmus.arch.preprocess import IMAGENET, Preprocess
from isthmus.errors import SpecError
from isthmus.nn.block import BLOCKS, make_shortcut
from isthmus.nn.init import initialise
from isthmus.nn.layers import add_layer, make_layer

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

    def features(self, x: Tensor, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        """The maps of `plan.features`, all or those in `names`: (N, channels, H / stride, W / stride), rounded up.

        The average pool of an anti-aliased stem and a `max_ceil` pool round down instead. `stem` is taken before its
        pool, `last` after the final norm of a pre-activation network. Nothing beyond the last name asked for is run.
        """
        known = ("stem", *self.stages, "last")
        names = known if names is None else names
        if unknown := [name for name in names if name not in known]:
            raise SpecError(f"there is no feature {unknown[0]!r}; known: {', '.join(known)}")
        end = max(known.index(name) for name in names) if names else -1
        maps: dict[str, Tensor] = {}
        x = self.act1(self.bn1(self.conv1(x)))
        if "stem" in names:
            maps["stem"] = x
        if end > 0:
            x = self.maxpool(x)
        for name in self.stages[: max(end, 0)]:
            x = self.get_submodule(name)(x)
            if name in names:
                maps[name] = x
        if "last" in names:
            maps["last"] = self.act(self.norm(x)) if self.spec.preact else x
        return maps

    def pooled(self, x: Tensor) -> Tensor:
        """What the classifier sees: (N, plan.num_features)."""
        maps = self.features(x, self.spec.head.taps)
        return self.pool([maps[name] for name in self.spec.head.taps])

    def pool(self, maps: list[Tensor]) -> Tensor:
        """Maps (N, C, *size) pooled as the head asks, side by side: (N, plan.num_features)."""
        head = self.spec.head
        parts = [x.flatten(2).mean(2) if pool == "avg" else x.flatten(2).amax(2) for x in maps for pool in head.pools]
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
