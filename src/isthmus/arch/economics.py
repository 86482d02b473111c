"""Does the strip pay? Each bottleneck stage against two plain 3×3 convolutions of the same outer width."""

from math import isqrt
from typing import NamedTuple

from isthmus.arch.block import BlockSpec
from isthmus.arch.cost import block_cost
from isthmus.arch.plan import Plan, PlannedBlock

__all__ = ["NARROWEST", "StageEconomics", "economics"]

NARROWEST = 8  # outer width over strip width; beyond it the strip may lose information


class StageEconomics(NamedTuple):
    """The bottleneck of one stage; ratios are bottleneck over the plain pair, so below 1 is a saving.

    `reduction` is outer over strip width, `equal_basic_width` the width of a basic block of the same MACs, and
    `break_even_mid` the least strip width at which nothing is saved.
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
        groups, kernel = stage.groups, 3**plan.spec.dims
        reduce = stage.reduce or stage.mid
        params, macs = repeated_cost("bottleneck", stage.out, size, mid=stage.mid, reduce=reduce, groups=groups)
        pair_params, pair_macs = repeated_cost("basic", stage.out, size, mid=stage.out)
        positions = pair_macs // (2 * kernel * stage.out**2)
        even = break_even(stage.out, stage.mid, reduce, groups, kernel)
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
                break_even_mid=even,
                warnings=tuple(warnings(stage.out, stage.mid, macs / pair_macs, even)),
            )
        )
    return tuple(rows)


def break_even(outer: int, mid: int, reduce: int, groups: int, kernel: int) -> int:
    """The least strip width, a multiple of `groups`, that costs the pair's MACs or more; reduce : mid stays."""
    # A position with strip m costs (reduce/mid + 1)·outer·m + kernel·(reduce/mid)·m²/groups, the pair 2·kernel·outer².
    a, b, c = kernel * reduce, groups * outer * (reduce + mid), 2 * kernel * outer**2 * mid * groups
    even = (isqrt(b * b + 4 * a * c) - b) // (2 * a) // groups * groups
    while a * even**2 + b * even < c:
        even += groups
    return even


def repeated_cost(kind: str, outer: int, size: tuple[int, ...], **strip: int) -> tuple[int, int]:
    """Parameters and MACs of a block that keeps `outer` channels and the map's size."""
    spec = BlockSpec(kind=kind, in_channels=outer, out_channels=outer, dims=len(size), **strip)  # type: ignore[arg-type]
    params, macs, _ = block_cost(PlannedBlock("", 0, spec, size, size))
    return params, macs


def warnings(outer: int, mid: int, macs_ratio: float, break_even: int) -> list[str]:
    """What a designer should hear about a strip of `mid` channels between lands of `outer`."""
    if macs_ratio >= 1:
        found = f"the strip saves nothing: mid {mid} costs {macs_ratio:.2f}× two plain 3×3 of width {outer}"
        return [f"{found}; below mid {break_even} it saves"]
    if mid * NARROWEST < outer:
        found = f"the strip is narrow: mid {mid} is under 1/{NARROWEST} of the outer {outer} and may lose information"
        return [f"{found}; mid {-(-outer // NARROWEST)} or more is usual"]
    return []
