"""Does the strip pay: warnings where they belong, and the two widths of equal cost found again by brute force."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from isthmus.arch.economics import economics
from isthmus.arch.plan import plan
from isthmus.arch.spec import NetSpec, StageSpec
from isthmus.arch.variants import variant, variants

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def stage_of(mid, *, outer=256, groups=1, reduce=0, dims=2, block="bottleneck"):
    """The economics of one stage."""
    stage = StageSpec(depth=2, mid=mid, out=outer, groups=groups, reduce=reduce, block=block)
    (found,) = economics(plan(NetSpec(stages=(stage,), dims=dims), 16))
    return found


def flops(dims, *convs):
    """Torch's own count for a chain of (in, out, kernel, groups) on a 4-pixel map."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        x = torch.empty(1, convs[0][0], *(4,) * dims)
        for width_in, width_out, kernel, groups in convs:
            x = CONV[dims](width_in, width_out, kernel, padding=kernel // 2, groups=groups, bias=False)(x)
    return counter.get_total_flops()


def bottleneck_flops(outer, mid, *, groups=1, reduce=0, dims=2):
    reduce = reduce or mid
    return flops(dims, (outer, reduce, 1, 1), (reduce, mid, 3, groups), (mid, outer, 1, 1))


def basic_flops(width, dims=2):
    return flops(dims, (width, width, 3, 1), (width, width, 3, 1))


@pytest.mark.parametrize("name", variants())
def test_no_row_of_the_table_warns(name):
    spec = variant(name)
    strips = economics(plan(spec))
    assert [strip.name for strip in strips] == [
        f"layer{number}" for number, stage in enumerate(spec.stages, 1) if stage.block != "basic"
    ]
    for strip in strips:
        assert strip.warnings == ()
        assert strip.macs_ratio < 1
        assert strip.params_ratio < 1
        assert strip.mid < strip.break_even_mid


@pytest.mark.parametrize(
    ("outer", "groups", "dims"),
    [(256, 1, 2), (64, 1, 2), (100, 1, 2), (7, 1, 2), (256, 32, 2), (96, 4, 2), (64, 1, 1), (64, 1, 3), (96, 8, 3)],
)
def test_break_even_by_brute_force(outer, groups, dims):
    pair = basic_flops(outer, dims)
    mids = range(groups, 4 * outer * groups, groups)
    smallest = next(mid for mid in mids if bottleneck_flops(outer, mid, groups=groups, dims=dims) >= pair)
    for mid in (groups, smallest - groups, smallest):
        if mid:
            found = stage_of(mid, outer=outer, groups=groups, dims=dims)
            assert found.break_even_mid == smallest
            assert found.macs_ratio == pytest.approx(bottleneck_flops(outer, mid, groups=groups, dims=dims) / pair)
            assert any("saves nothing" in warning for warning in found.warnings) == (mid >= smallest)


def test_break_even_with_a_reduced_first_convolution():
    """SENet-154's first 1x1 is half as wide as its strip: every width below saves, no width from there on does."""
    pair = basic_flops(256)
    even = stage_of(128, groups=64, reduce=64).break_even_mid
    for mid in range(128, 2000, 128):
        costs = bottleneck_flops(256, mid, groups=64, reduce=mid // 2)
        assert (costs >= pair) == (mid >= even)


@pytest.mark.parametrize("block", ["bottleneck", "preact_bottleneck"])
@pytest.mark.parametrize(("outer", "mid", "groups"), [(256, 64, 1), (512, 256, 32), (64, 3, 1), (256, 300, 1)])
def test_equal_basic_width_by_brute_force(block, outer, mid, groups):
    costs = bottleneck_flops(outer, mid, groups=groups)
    widest = max(width for width in range(1, 2 * outer) if basic_flops(width) <= costs)
    assert stage_of(mid, outer=outer, groups=groups, block=block).equal_basic_width == widest


def test_resnet50():
    first = economics(plan("resnet50"))[0]
    assert (first.outer, first.mid, first.reduction, first.groups) == (256, 64, 4.0, 1)
    assert first.macs == 56 * 56 * (256 * 64 + 9 * 64 * 64 + 64 * 256)
    assert first.pair_macs == 56 * 56 * 2 * 9 * 256 * 256
    norms = 2 * (64 + 64 + 256), 2 * (256 + 256)
    assert first.params_ratio == pytest.approx((2 * 256 * 64 + 9 * 64 * 64 + norms[0]) / (18 * 256 * 256 + norms[1]))


@pytest.mark.parametrize(("part", "warns"), [(4, False), (8, False), (16, True), (32, True)])
def test_narrow_strips_warn(part, warns):
    spec = variant("resnet50")
    stages = tuple(replace(stage, mid=stage.out // part) for stage in spec.stages)
    for strip in economics(plan(replace(spec, stages=stages))):
        assert [warning.partition(":")[0] for warning in strip.warnings] == ["the strip is narrow"] * warns
        assert not warns or f"mid {strip.outer // 8} or more is usual" in strip.warnings[0]


def test_wide_strips_warn():
    even = stage_of(64).break_even_mid
    assert stage_of(even - 1).warnings == ()
    (warning,) = stage_of(even).warnings
    assert warning.startswith(f"the strip saves nothing: mid {even} costs 1.0")
    assert f"below mid {even} it saves" in warning
    assert stage_of(even + 1).warnings[0].startswith("the strip saves nothing")
