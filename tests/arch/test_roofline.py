"""Floors of layers: against values worked out by hand, against the tensors of networks, and against cost()."""

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

from isthmus.arch.cost import cost
from isthmus.arch.plan import plan
from isthmus.arch.roofline import Bandwidth, LayerTime, Limits, joined, merged, merged_times, roofline
from isthmus.arch.spec import HeadSpec, NetSpec, StageSpec, StemSpec
from isthmus.arch.traffic import layers_of
from isthmus.arch.variants import variants
from isthmus.errors import SpecError
from isthmus.nn.network import ResNet

MIB = 2**20
DESK = Limits(
    machine="desk",
    threads=2,
    lanes=16,
    fp32=100e9,
    bf16=200e9,
    bandwidth=(Bandwidth(size=MIB, rate=80e9), Bandwidth(size=16 * MIB, rate=8e9)),
)


def by_name(floors):
    return {floor.name: floor for floor in floors}


def test_a_convolution_worked_out_by_hand():
    found = by_name(roofline(plan("resnet50"), DESK))["layer1.0.conv2"]
    # A row of 56 positions and 3 taps each, of which two fall on the padding.
    assert found.operations == 2 * (56 * 3 - 2) ** 2 * 64 * 64 == 225_738_752
    assert found.bytes == 4 * (2 * 56 * 56 * 64 + 64 * 64 * 9) == 1_753_088
    assert found.arithmetic == pytest.approx(2.25738752e-3)
    assert found.memory == pytest.approx(1_753_088 / 80e9)
    assert (found.seconds, found.binds, found.block) == (found.arithmetic, "arithmetic", "layer1.0")
    assert found.intensity == pytest.approx(225_738_752 / 1_753_088)


def test_the_classifier_worked_out_by_hand():
    """One picture multiplies each weight once: memory binds."""
    found = by_name(roofline(plan("resnet50"), DESK, precision="bf16"))["fc"]
    assert found.operations == 2 * 2048 * 1000
    assert found.bytes == 2 * (2048 * 1000 + 1000 + 2048 + 1000)
    assert (found.seconds, found.binds) == (found.memory, "memory")


@pytest.mark.parametrize(
    ("size", "seconds"),
    [
        (0, 0.0),
        (MIB // 2, MIB / 2 / 80e9),
        (16 * MIB, 16 * MIB / 80e9),
        (20 * MIB, 16 * MIB / 80e9 + 4 * MIB / 8e9),
    ],
)
def test_what_a_cache_may_hold_comes_at_its_rate(size, seconds):
    assert DESK.seconds(size) == pytest.approx(seconds, rel=1e-12)


def test_one_rate_for_all_sizes():
    flat = replace(DESK, bandwidth=(Bandwidth(size=MIB, rate=8e9),))
    assert flat.seconds(64 * MIB) == pytest.approx(64 * MIB / 8e9)


@pytest.mark.parametrize("name", variants())
def test_operations_are_those_that_cost_counts_but_for_padding(name):
    laid_out = plan(name, 64)
    floors, known = roofline(laid_out, DESK, batch=3), {row.name: 3 * row.flops for row in cost(laid_out).rows}
    assert 0.7 * sum(known.values()) < sum(floor.operations for floor in floors) <= sum(known.values())
    padded = {layer.name for layer in laid_out.stem if layer.padding}
    for block in laid_out.blocks:
        layers = (*block.spec.main, *block.spec.downsample)
        padded |= {f"{block.name}.{layer.name}" for layer in layers if layer.padding and layer.kind == "conv"}
    for floor in floors:
        gate = sum(flops for each, flops in known.items() if each.startswith(f"{floor.name}."))
        assert floor.name in padded or floor.operations == (known.get(floor.name, 0) or gate), floor
    assert len(by_name(floors)) == len(floors)
    for level in ("block", "stage"):
        rows = merged(floors, level)
        assert [row.name for row in rows] == [row.name for row in cost(laid_out).by(level)]
        for key in ("operations", "bytes", "seconds", "expected"):
            assert sum(getattr(row, key) for row in rows) == pytest.approx(sum(getattr(each, key) for each in floors))


BASE = NetSpec(
    stem=StemSpec(widths=(32,)),
    stages=(StageSpec(depth=2, mid=32, out=64), StageSpec(depth=1, mid=32, out=96, stride=2)),
    num_classes=5,
)
SPECS = {
    "plain": BASE,
    "deep stem, pooled shortcut": replace(BASE, stem=StemSpec(widths=(16, 16, 32), kernel=3), shortcut="avg"),
    "strided first, grouped": replace(
        BASE, stride_at="conv1", stages=tuple(replace(stage, groups=8) for stage in BASE.stages)
    ),
    "blurred": replace(BASE, anti_alias="blur"),
    "averaged": replace(BASE, anti_alias="avg"),
    "squeezed": replace(BASE, attention="se"),
    "over channels": replace(BASE, attention="eca"),
    "group norm": replace(BASE, norm="group"),
    "pre-activation": replace(
        BASE,
        shortcut="maxpool",
        stages=(
            StageSpec(depth=2, mid=32, out=64, block="preact_bottleneck"),
            StageSpec(depth=1, mid=32, out=64, block="preact_bottleneck", stride=2),
        ),
    ),
    "a convolution for a pool": replace(BASE, stem=StemSpec(widths=(32,), pool="conv")),
    "taps and a hidden layer": replace(BASE, head=HeadSpec(taps=("layer1", "last"), pools=("avg", "max"), hidden=8)),
    "signals": replace(BASE, dims=1),
    "volumes": replace(BASE, dims=3),
    "dilated": BASE.with_output_stride(4),
    "no shortcut": replace(BASE, shortcut="none"),
    "projected pre-activation": replace(
        BASE, stages=tuple(replace(stage, block="preact_bottleneck") for stage in BASE.stages)
    ),
    "pre-activation with group norm": replace(
        BASE, norm="group", stages=tuple(replace(stage, block="preact_bottleneck") for stage in BASE.stages)
    ),
    "folded": replace(BASE, norm="none"),
}
ALONE = (nn.modules.conv._ConvNd, nn.Linear, nn.GroupNorm, nn.modules.pooling._MaxPoolNd)
NAMED = ("AveragePool", "BlurPool", "SqueezeExcite", "EfficientChannelAttention")


def multiplied(conv, shape):
    """Multiply-adds of a convolution but for those on padding: with ones everywhere each adds 1."""
    with torch.no_grad():
        ones = torch.ones_like(conv.weight)
        maps = conv._conv_forward(torch.ones(shape), ones, None)
    return round(float(maps.double().sum()))


@pytest.mark.parametrize("name", SPECS)
def test_no_operation_is_on_padding(name):
    net, wanted = ResNet(plan(SPECS[name], 33)).eval(), {}
    for each, module in net.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd) and ".se." not in each:
            module.register_forward_hook(
                lambda conv, inputs, _, each=each: wanted.update({each: 2 * multiplied(conv, inputs[0].shape)})
            )
    with torch.no_grad():
        net(torch.zeros(2, net.spec.in_channels, *net.plan.image_size))
    found = {floor.name: floor.operations for floor in roofline(net.plan, DESK, batch=2) if floor.kind == "conv"}
    assert found == wanted


def traced_bytes(net, batch):
    """Bytes of every layer of its own from the tensors that go through it, by its name."""
    found = {}

    def note(name):
        def hook(module, inputs, output):
            read = inputs[0]
            kernel, stride = getattr(module, "kernel_size", 0), getattr(module, "stride", 0)
            size = kernel if isinstance(kernel, int) else max(kernel)
            step = stride if isinstance(stride, int) else max(stride)
            if size and step > size:  # positions that no output needs
                read = read[(slice(None), slice(None), *(slice(None, None, step),) * (read.ndim - 2))]
            weights = sum(each.numel() for each in module.parameters())
            found[name] = 4 * (read.numel() + output.numel() + weights)

        return hook

    inside = [name for name, module in net.named_modules() if type(module).__name__ in NAMED]
    for name, module in net.named_modules():
        alone = isinstance(module, ALONE) or type(module).__name__ in NAMED
        if alone and not any(name.startswith(f"{other}.") for other in inside):
            module.register_forward_hook(note(name))
    with torch.no_grad():
        net(torch.zeros(batch, net.spec.in_channels, *net.plan.image_size))
    return found


@pytest.mark.parametrize("name", SPECS)
def test_bytes_are_those_of_the_tensors(name):
    side = 32 if name == "averaged" else 33  # its pool leaves the last row of an odd map alone
    net = ResNet(plan(SPECS[name], side)).eval()
    floors, wanted = by_name(roofline(net.plan, DESK, batch=2)), traced_bytes(net, 2)
    head = net.spec.head
    maps = net.features(torch.zeros(2, 3, *net.plan.image_size), head.taps)
    wanted["pool"] = 4 * (sum(each.numel() for each in maps.values()) + 2 * net.plan.num_features)
    assert {each: floor.bytes for each, floor in floors.items()} == wanted


def test_batch_norms_activations_and_additions_count_nothing():
    plain, grouped = (roofline(plan(SPECS[name], 64), DESK) for name in ("plain", "group norm"))
    assert {floor.kind for floor in plain} == {"conv", "maxpool", "globalpool", "linear"}
    assert {floor.name for floor in grouped} - {floor.name for floor in plain} == {
        floor.name for floor in grouped if floor.kind == "norm"
    }


SWIFT = replace(DESK, fp32=1e30, bf16=1e30, int8=1e30, bandwidth=(Bandwidth(size=MIB, rate=1e30),))


@pytest.mark.parametrize(
    ("name", "layer", "precision", "times"),
    [
        ("resnext50_32x4d", "layer1.0.conv2", "fp32", 4),  # 4 of 16 sums
        ("resnext50_32x4d", "layer2.0.conv2", "bf16", 2),
        ("resnet50", "layer1.0.conv2", "fp32", 1),
        ("resnet50", "conv1", "fp32", 1),
        ("resnet50", "conv1", "bf16", 4 / 3),  # 2 products at once: 3 planes take as long as 4
        ("resnext50_32x4d", "layer1.0.conv2", "int8", 4),
        ("resnet50", "fc", "fp32", 1008 / 1000),
        ("resnetblur50", "maxpool.1", "fp32", 1),  # depthwise: 16 of 64 groups
        ("resnetblur50", "maxpool.1", "bf16", 2),
    ],
)
def test_vectors_are_multiplied_whole(name, layer, precision, times):
    limits = replace(SWIFT, **{precision: 1e9})
    found = by_name(roofline(plan(name), limits, precision=precision))[layer]
    assert found.expected == pytest.approx(times * found.arithmetic)


def test_bytes_come_from_the_cache_that_still_holds_them():
    """The block's input lies 176,128 bytes back where it is added, and weights a whole pass."""
    near, far = 8e9, 1e9
    limits = replace(SWIFT, bandwidth=(Bandwidth(size=100_000, rate=near), Bandwidth(size=MIB, rate=far)))
    found = by_name(roofline(plan(BASE, 64), limits))["layer1.1.conv3"]
    strip, land, weights = 16 * 16 * 32 * 4, 16 * 16 * 64 * 4, 32 * 64 * 4
    assert found.expected == pytest.approx((land + weights) / far + (strip + land) / near)
    wide = replace(limits, bandwidth=(replace(limits.bandwidth[0], size=180_000), limits.bandwidth[1]))
    found = by_name(roofline(plan(BASE, 64), wide))["layer1.1.conv3"]
    assert found.expected == pytest.approx(weights / far + (land + strip + land) / near)


@pytest.mark.parametrize("name", SPECS)
def test_all_that_is_moved_is_what_the_network_reads_and_writes(name):
    """Beside the bytes of floors: the other path of each block, maps that are read twice, norms of no convolution."""
    net, beside = ResNet(plan(SPECS[name], 33)).eval(), []
    leading = {f"{block.name}.{block.spec.main[0].name}" for block in net.plan.blocks if net.spec.preact} | {"norm"}
    paths = {block.name for block in net.plan.blocks if block.spec.shortcut != "none"}
    for each, module in net.named_modules():
        twice = isinstance(module, nn.GroupNorm) or type(module).__name__ in ("SqueezeExcite", *NAMED[3:])
        alone = each in leading and not twice
        if each in paths or alone or twice:
            times = 2 if alone else 1
            module.register_forward_hook(
                lambda _, inputs, output, times=times: beside.append(times * 4 * output.numel())
            )
    with torch.no_grad():
        net(torch.zeros(2, net.spec.in_channels, *net.plan.image_size))
    floors = roofline(net.plan, replace(SWIFT, bandwidth=(Bandwidth(size=MIB, rate=1.0),)), batch=2)
    assert sum(each.expected for each in floors) == pytest.approx(sum(each.bytes for each in floors) + sum(beside))


def lru_seconds(layers, held, near, far):
    """Seconds of a second pass over chunks of 64 numbers in a cache of `held` bytes: what is in it comes at `near`."""
    cache, chunk = OrderedDict(), 4 * 64

    def missing(which, size):
        missed = 0
        for part in range(-(-size // chunk)):
            missed += (which, part) not in cache
            cache[which, part] = None
            cache.move_to_end((which, part))
            if len(cache) > held // chunk:
                cache.popitem(last=False)
        return min(missed * chunk, size)

    for _ in range(2):
        seconds, seen = 0.0, set()
        for place, layer in enumerate(layers):
            *reads, write = [(move.map, 4 * 2 * move.numbers) for move in layer.moves]
            for which, size in (*reads, (f"weights {place}", 4 * layer.params), write):
                missed = missing(which, size)
                if which not in seen and not isinstance(which, str):  # a new map: a place for it has to be had
                    missed = 0 if size <= held else size
                seconds += missed / far + (size - missed) / near
                seen.add(which)
    return seconds


@pytest.mark.parametrize("held", [30_000, 120_000, 500_000])
@pytest.mark.parametrize(
    "name", ["plain", "squeezed", "group norm", "pre-activation", "projected pre-activation", "no shortcut"]
)
def test_what_a_cache_holds_is_what_was_used_last(name, held):
    """Beside a cache whose least recently used parts go first."""
    laid_out, near, far = plan(SPECS[name], 32), 8e9, 1e9
    limits = replace(SWIFT, bandwidth=(Bandwidth(size=held, rate=near), Bandwidth(size=64 * MIB, rate=far)))
    found = sum(each.expected for each in roofline(laid_out, limits, batch=2))
    assert found == pytest.approx(lru_seconds(list(layers_of(laid_out)), held, near, far), rel=0.02)


def reads(net, layer):
    """The maps that a layer reads."""
    (found,) = [each for each in layers_of(plan(net, 64)) if each.name == layer]
    return [move.map for move in found.moves[:-1]]


def writes(net, layer):
    """The map that a layer writes."""
    (found,) = [each for each in layers_of(plan(net, 64)) if each.name == layer]
    return found.moves[-1].map


def test_which_maps_are_read():
    # The shortcut of a pre-activation block is projected from what its first norm wrote, and else the raw map.
    raw, _, active = reads("resnetv2_50", "layer1.0.conv1")
    assert reads("resnetv2_50", "layer1.0.downsample.0")[0] == active
    assert reads("resnetv2_50", "layer1.1.conv3")[-1] == reads("resnetv2_50", "layer1.1.conv1")[0]
    assert raw == writes("resnetv2_50", "maxpool")
    # What ends later adds the other path; the next block reads the sum.
    both = writes("resnet50", "maxpool"), writes("resnet50", "layer1.0.conv3")
    land = writes("resnet50", "layer1.0.downsample.0")
    assert reads("resnet50", "layer1.0.downsample.0") == [*both]
    assert reads("resnet50", "layer1.1.conv1") == [land]
    assert reads("resnet50", "layer1.1.conv3") == [writes("resnet50", "layer1.1.conv2"), land]
    plain = replace(BASE, shortcut="none")
    assert reads(plain, "layer1.1.conv3") == [writes(plain, "layer1.1.conv2")]
    # A head reads the maps of its taps.
    taps = SPECS["taps and a hidden layer"]
    assert reads(taps, "pool") == [writes(taps, "layer1.1.conv3"), writes(taps, "layer2.0.downsample.0")]


def test_zeros_of_a_padded_shortcut_are_nowhere():
    (found,) = [each for each in layers_of(plan("resnet20_cifar", 32)) if each.name == "layer2.0.conv2"]
    assert [move.numbers for move in found.moves] == [32 * 16 * 16, 16 * 16 * 16, 32 * 16 * 16]


@pytest.mark.parametrize(("precision", "item"), [("fp32", 4), ("bf16", 2)])
def test_lower_precision_moves_fewer_bytes(precision, item):
    whole = sum(floor.bytes for floor in roofline(plan(BASE, 64), DESK))
    assert sum(floor.bytes for floor in roofline(plan(BASE, 64), DESK, precision=precision)) == whole * item // 4


def test_weights_move_once_for_a_batch():
    one, four = (by_name(roofline(plan(BASE, 64), DESK, batch=batch))["fc"].bytes for batch in (1, 4))
    assert four - one == 3 * 4 * (96 + 5)


def test_layers_that_are_computed_as_one():
    floors = by_name(roofline(plan("resnet50"), DESK))
    both = floors["layer1.0.conv3"], floors["layer1.0.downsample.0"]
    found = joined(both)
    assert found.name == "layer1.0.conv3 + layer1.0.downsample.0"
    assert found.operations == sum(each.operations for each in both)
    assert found.seconds == pytest.approx(sum(each.arithmetic for each in both))
    assert found.expected == sum(each.expected for each in both)
    assert joined(both[:1]) == both[0]


def test_measured_times_by_block():
    floors = roofline(plan(BASE, 64), DESK)
    times = [LayerTime(each.name, each.kind, each.block, 2 * each.seconds, each) for each in floors]
    times.append(LayerTime("reorder", "", "engine", 1.0, None))
    rows = merged_times(times, "stage")
    assert [row.name for row in rows] == ["stem", "layer1", "layer2", "head", "engine"]
    assert [row.share for row in rows] == [pytest.approx(0.5)] * 4 + [None]
    assert sum(row.seconds for row in rows) == pytest.approx(1 + 2 * sum(each.seconds for each in floors))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bandwidth": ()}, "a bandwidth for one or more working sets"),
        ({"bandwidth": DESK.bandwidth[::-1]}, "the larger come later and are no faster"),
        ({"fp32": 0.0}, "limits need lanes and rates above 0"),
        ({"lanes": 0}, "limits need lanes and rates above 0"),
        ({"threads": "two"}, "threads is 'two'; it must be a whole number"),
    ],
)
def test_limits_that_are_none(change, words):
    with pytest.raises(SpecError, match=words):
        replace(DESK, **change)


def test_what_cannot_be_asked():
    with pytest.raises(SpecError, match="batch is 0; it must be at least 1"):
        roofline(plan(BASE, 64), DESK, batch=0)
    with pytest.raises(SpecError, match="desk does not multiply int8 itself; it has fp32, bf16"):
        roofline(plan(BASE, 64), DESK, precision="int8")
    own = replace(BASE, stages=(replace(BASE.stages[0], block="mine"),))
    with pytest.raises(SpecError, match="block of your own kind 'mine'"):
        roofline(plan(own, 64), DESK)
