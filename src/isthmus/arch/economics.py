"""Does the strip pay? Each bottleneck stage against two plain 3×3 convolutions of the same outer width."""

from math import isqrt, sqrt
from typing import NamedTuple

from isthmus.arch.block import BlockSpec
from isthmus.arch.cost import block_cost
from isthmus.arch.plan import Plan, PlannedBlock

__all__ = ["NARROWEST", "StageEconomics", "economics"]

NARROWEST = 8  # outer width over strip width; beyond it the strip may lose information


class StageEconomics(NamedTuple):
    """The bottleneck of one stage; ratios are bottleneck over the plain pair, so below 1 is a saving.

    `reduction` is outer over strip width, `equal_basic_width` the width of a basic block of the same MACs, and
    `break_even_mid` the strip width at which the pair costs the same (0 when no width does).
    """

    name: str
    outer: int
    mid: int
    groups: int
    reduction: float
    macs: int
    pair_macs: int
    macs_ratio: float
    params_ratio: float
    equal_basic_width: int
    break_even_mid: int
    warnings: tuple[str, ...]


def economics(plan: Plan) -> tuple[StageEconomics, ...]:
    """One row a bottleneck stage, on the shape that its blocks repeat; basic and custom stages have no strip."""
    rows = []
    for number, stage in enumerate(plan.spec.stages, 1):
        if stage.block not in ("bottleneck", "preact_bottleneck"):
            continue
        size = next(block.out_size for block in reversed(plan.blocks) if block.stage == number)
        groups, kernel, dims = stage.groups, 3**plan.spec.dims, plan.spec.dims
        reduce = stage.reduce or stage.mid

        def repeated(kind: str, outer: int, mid: int, *, reduce: int = 0, groups: int = 1) -> tuple[int, int]:
            spec = BlockSpec(
                kind=kind, in_channels=outer, out_channels=outer, mid=mid, reduce=reduce, groups=groups, dims=dims
            )
            params, macs, _ = block_cost(PlannedBlock("", number, spec, size, size))
            return params, macs

        params, macs = repeated("bottleneck", stage.out, stage.mid, reduce=reduce, groups=groups)
        pair_params, pair_macs = repeated("basic", stage.out, stage.out)
        positions = pair_macs // (2 * kernel * stage.out**2)
        # Cost a position with strip m and reduce r·m: (r + 1)·outer·m + kernel·r·m²/groups = 2·kernel·outer².
        ratio = reduce / stage.mid
        a, b = kernel * ratio / groups, (ratio + 1) * stage.out
        break_even = int((sqrt(b * b + 8 * a * kernel * stage.out**2) - b) / (2 * a))
        rows.append(
            StageEconomics(
                name=f"layer{number}",
                outer=stage.out,
                mid=stage.mid,
                groups=groups,
                reduction=stage.out / stage.mid,
                macs=macs,
                pair_macs=pair_macs,
                macs_ratio=macs / pair_macs,
                params_ratio=params / pair_params,
                equal_basic_width=isqrt(macs // (2 * kernel * positions)),
                break_even_mid=break_even,
                warnings=tuple(warnings(stage.out, stage.mid, macs / pair_macs, break_even)),
            )
        )
    return tuple(rows)


def warnings(outer: int, mid: int, macs_ratio: float, break_even: int) -> list[str]:
    """What a designer should hear about a strip of `mid` channels between lands of `outer`."""
    if macs_ratio >= 1:
        return [
            f"the strip saves nothing: mid {mid} costs {macs_ratio:.2f}× two plain 3×3 of width {outer}; "
            f"below mid {break_even} it saves"
        ]
    if mid * NARROWEST < outer:
        return [
            f"the strip is narrow: mid {mid} is under 1/{NARROWEST} of the outer {outer} and may lose information; "
            f"mid {-(-outer // NARROWEST)} or more is usual"
        ]
    return []
