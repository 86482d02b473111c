"""Blocks by hand: dropping in, shortcuts that do not fit, and a caller's own block class."""

from dataclasses import replace

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import isthmus
from isthmus.arch.block import BlockSpec
from isthmus.arch.plan import plan
from isthmus.arch.spec import NetSpec, StageSpec
from isthmus.arch.variants import variant
from isthmus.errors import ShortcutError, SpecError
from isthmus.nn.block import BasicBlock, BottleneckBlock, PreActBottleneckBlock, projection
from isthmus.nn.network import ResNet
from oracles import random_state, relative_error

BLOCKS = [BottleneckBlock, BasicBlock, PreActBottleneckBlock]


def conv_bn(width_in, width_out, stride):
    """A shortcut as torchvision's users write it."""
    return nn.Sequential(nn.Conv2d(width_in, width_out, 1, stride, bias=False), nn.BatchNorm2d(width_out))


def out_of(block, width, side=14, dims=2):
    return tuple(block.eval()(torch.randn(2, width, *(side,) * dims)).shape)


def test_drops_in():
    assert out_of(BottleneckBlock(64, 16), 64) == (2, 64, 14, 14)
    assert out_of(BottleneckBlock(64, 64, 2, projection(64, 256, 2)), 64) == (2, 256, 7, 7)
    assert out_of(BottleneckBlock(64, 64, 2, conv_bn(64, 256, 2)), 64) == (2, 256, 7, 7)
    assert out_of(BottleneckBlock(64, 64, stride=2, downsample=conv_bn(64, 256, 2)), 64, side=15) == (2, 256, 8, 8)
    assert out_of(BottleneckBlock(64, 32, out_channels=64, groups=32), 64) == (2, 64, 14, 14)
    assert out_of(BasicBlock(64, 64), 64) == (2, 64, 14, 14)
    assert out_of(BasicBlock(64, 128, 2, projection(64, 128, 2)), 64) == (2, 128, 7, 7)
    assert out_of(PreActBottleneckBlock(64, 64, 2, projection(64, 256, 2)), 64) == (2, 256, 7, 7)
    assert (BottleneckBlock.expansion, BasicBlock.expansion, PreActBottleneckBlock.expansion) == (4, 1, 4)


def test_names_are_the_fields():
    block = BottleneckBlock(64, 64, 2, projection(64, 256, 2))
    assert [name for name, _ in block.named_children() if name not in ("aa", "se", "drop_path")] == [
        "conv1", "bn1", "act1", "conv2", "bn2", "act2", "conv3", "bn3", "act", "downsample",
    ]  # fmt: skip
    assert list(block.state_dict()) == list(
        torchvision.models.resnet.Bottleneck(64, 64, 2, conv_bn(64, 256, 2)).state_dict()
    )
    assert BottleneckBlock(64, 16).downsample is None


@pytest.mark.parametrize(("kind", "theirs"), [(BottleneckBlock, "Bottleneck"), (BasicBlock, "BasicBlock")])
@pytest.mark.parametrize("training", [True, False])
def test_equals_torchvisions_block(kind, theirs, training):
    width = 64 * kind.expansion
    other = getattr(torchvision.models.resnet, theirs)(64, 64, 2, conv_bn(64, width, 2)).double()
    block = kind(64, 64, 2, conv_bn(64, width, 2)).double()
    state = random_state(other)
    other.load_state_dict(state)
    block.load_state_dict(state)
    x = torch.randn(4, 64, 9, 9, dtype=torch.float64)
    assert relative_error(block.train(training)(x), other.train(training)(x)) <= 1e-12


@pytest.mark.parametrize("kind", ["conv1", "conv3", "avg", "pad"])
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("widths", "stride"), [((8, 16), 2), ((8, 8), 2), ((8, 16), 1), ((8, 16), 3)])
def test_projections_fit_every_block(kind, norm, dims, widths, stride):
    shortcut = projection(*widths, stride, kind=kind, norm=norm, dims=dims)
    block = BottleneckBlock(widths[0], 4, stride, shortcut, out_channels=widths[1], dims=dims)
    for side in (9, 8):
        assert out_of(block, widths[0], side, dims) == (2, widths[1], *(-(-side // stride),) * dims)
    assert any(
        isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) for module in shortcut.modules()
    ) == (norm == "batch" and kind != "pad")


MISFITS = {
    "the identity cannot grow": (lambda: BottleneckBlock(64, 64), 64, 256, 1),
    "the identity cannot stride": (lambda: BottleneckBlock(64, 16, 2), 64, 64, 2),
    "too few channels": (lambda: BottleneckBlock(64, 64, 2, projection(64, 128, 2)), 64, 256, 2),
    "no stride": (lambda: BottleneckBlock(64, 64, 2, projection(64, 256)), 64, 256, 2),
    "too much stride": (lambda: BottleneckBlock(64, 64, 1, conv_bn(64, 256, 2)), 64, 256, 1),
    "another input": (lambda: BottleneckBlock(64, 64, 2, conv_bn(32, 256, 2)), 64, 256, 2),
    "a floor pool": (
        lambda: BottleneckBlock(64, 64, 2, nn.Sequential(nn.AvgPool2d(2), conv_bn(64, 256, 1))), 64, 256, 2,
    ),
    "another dimension": (lambda: BottleneckBlock(64, 64, 2, nn.Conv1d(64, 256, 1, 2)), 64, 256, 2),
    "basic": (lambda: BasicBlock(64, 128, 2), 64, 128, 2),
    "pre-activation": (lambda: PreActBottleneckBlock(64, 64), 64, 256, 1),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_misfits_name_the_shapes_and_the_call_that_mends_them(case):
    make, width_in, width_out, stride = MISFITS[case]
    with pytest.raises(ShortcutError) as caught:
        make()
    message = str(caught.value)
    assert str(width_in) in message
    assert str(width_out) in message
    call = message.partition("downsample=")[2].partition(")")[0] + ")"
    mended = eval(call, {"isthmus": isthmus})
    kind = BasicBlock if case == "basic" else PreActBottleneckBlock if case == "pre-activation" else BottleneckBlock
    mid = width_out // kind.expansion
    for side in (8, 9):
        assert out_of(kind(width_in, mid, stride, mended), width_in, side) == (2, width_out, *(-(-side // stride),) * 2)


def test_both_shapes_are_named():
    with pytest.raises(ShortcutError, match=r"main path gives \(1, 256, 8, 8\) and downsample gives \(1, 128, 8, 8\)"):
        BottleneckBlock(64, 64, 2, conv_bn(64, 128, 2))


def test_a_kind_of_ones_own_has_no_layers():
    class Half(BottleneckBlock):
        kind = "half"

    with pytest.raises(SpecError, match=r"Half calls its kind 'half'.*leave `kind` as its base has it"):
        Half(64, 16)
    with pytest.raises(SpecError, match="leave `kind`"):
        Half.from_spec(BlockSpec(kind="half", in_channels=64, mid=16, out_channels=64))


def test_the_probe_leaves_the_shortcut_alone():
    shortcut = conv_bn(64, 256, 2).train()
    before = {key: value.clone() for key, value in shortcut.state_dict().items()}
    block = BottleneckBlock(64, 64, 2, shortcut)
    assert block.downsample is shortcut
    assert shortcut.training
    assert all(torch.equal(value, before[key]) for key, value in shortcut.state_dict().items())
    assert next(shortcut.parameters()).device.type == "cpu"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 3}, "3 groups do not divide"),
        ({"norm": "group"}, "group norm needs widths divisible by 32"),
        ({"out_channels": 0}, "widths must be at least 1"),
        ({"anti_alias": "blur", "stride_at": "conv1"}, "stride must be at conv2"),
    ],
)
def test_other_mistakes_are_spec_errors(options, message):
    with pytest.raises(SpecError, match=message):
        BottleneckBlock(64, 16, **options)


@given(
    kind=st.sampled_from(BLOCKS),
    dims=st.integers(1, 3),
    stride=st.integers(1, 3),
    shortcut=st.sampled_from(["none", "conv1", "conv3", "avg"]),
    attention=st.sampled_from(["none", "se", "eca"]),
    norm=st.sampled_from(["batch", "none"]),
    dilation=st.integers(1, 2),
    drop_path=st.sampled_from([0.0, 0.5]),
    side=st.integers(3, 7),
)
def test_any_block_from_its_spec(kind, side, dims, stride, **options):
    if kind is PreActBottleneckBlock:
        options["norm"] = "batch"
    spec = BlockSpec(kind=kind.kind, in_channels=8, mid=8, out_channels=16, dims=dims, stride=stride, **options)
    block = kind.from_spec(spec).train()
    assert tuple(block(torch.randn(2, 8, *(side + 2,) * dims)).shape) == (2, 16, *(-(-(side + 2) // stride),) * dims)


def own_spec(name="own", widths=((16, 64), (32, 128)), block="own"):
    stages = tuple(StageSpec(depth=2, mid=mid, out=out, block=block, stride=2) for mid, out in widths)
    return NetSpec(stages=stages, num_classes=10, name=name)


def test_torchvisions_bottleneck_as_an_own_block():
    spec = variant("resnet50")
    foreign = replace(spec, stages=tuple(replace(stage, block="tv") for stage in spec.stages))
    net = ResNet(plan(foreign, 64), blocks={"tv": torchvision.models.resnet.Bottleneck}).double().eval()
    assert isinstance(net.layer1[0], torchvision.models.resnet.Bottleneck)
    ours = ResNet(plan(spec, 64)).double().eval()
    state = random_state(ours)
    ours.load_state_dict(state)
    net.load_state_dict(state)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        assert relative_error(net(x), ours(x)) <= 1e-12


def test_torchvisions_basic_block_as_an_own_block():
    spec = own_spec(widths=((64, 64), (128, 128)))
    net = ResNet(plan(spec, 64), blocks={"own": torchvision.models.resnet.BasicBlock})
    assert net(torch.zeros(2, 3, 64, 64)).shape == (2, 10)


class FromSpec(nn.Module):
    """An own block that reads the whole spec."""

    def __init__(self, spec):
        super().__init__()
        self.conv = nn.Conv2d(spec.in_channels, spec.out_channels, 3, spec.stride, 1, groups=spec.groups)

    @classmethod
    def from_spec(cls, spec):
        return cls(spec)

    def forward(self, x):
        return self.conv(x).relu()


def test_own_block_from_spec_trains_beside_ours():
    spec = replace(own_spec(), stages=(own_spec().stages[0], replace(own_spec().stages[1], block="bottleneck")))
    net = ResNet(plan(spec, 32), blocks={"own": FromSpec})
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert [feature.channels for feature in net.plan.features] == [
        value.shape[1] for value in net.features(torch.zeros(1, 3, 32, 32)).values()
    ]


def test_own_block_has_no_cost_on_paper_but_by_tracing():
    from isthmus.arch.cost import cost
    from isthmus.nn.trace import trace_cost

    laid_out = plan(own_spec(), 32)
    with pytest.raises(SpecError, match=r"layer1.0 is a block of your own kind 'own'.*trace_cost"):
        cost(laid_out).totals  # noqa: B018
    net = ResNet(laid_out, blocks={"own": FromSpec})
    assert sum(row.params for row in trace_cost(net, (3, 32, 32))) == sum(p.numel() for p in net.parameters())


class Wrong(FromSpec):
    """Forgets the stride."""

    def __init__(self, spec):
        super().__init__(replace(spec, stride=1, shortcut="conv1"))


class Narrow(FromSpec):
    """Forgets the outer width."""

    def __init__(self, spec):
        super().__init__(replace(spec, out_channels=spec.mid))


class NoArguments(nn.Module):
    """Cannot be built with a block's arguments."""

    def __init__(self):
        super().__init__()


class Fails(FromSpec):
    """Runs into torch's own complaint."""

    def forward(self, x):
        return self.conv(torch.cat([x, x], 1))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({}, r"layer1.0 asks for a block 'own'; known: bottleneck, basic, preact_bottleneck; pass your own as blocks="),
        ({"other": FromSpec}, "known: bottleneck, basic, preact_bottleneck, other"),
        ({"own": Wrong}, r"layer1.0: your block 'own' gives \(1, 64, 16, 16\) where the plan says \(1, 64, 8, 8\)"),
        ({"own": Narrow}, r"gives \(1, 16, 8, 8\) where the plan says \(1, 64, 8, 8\)"),
        ({"own": NoArguments}, "layer1.0: your block 'own' fails"),
        ({"own": Fails}, "layer1.0: your block 'own' fails: .*channel"),
    ],
)
def test_wrong_own_blocks_are_spec_errors(blocks, message):
    with pytest.raises(SpecError, match=message):
        ResNet(plan(own_spec(), 32), blocks=blocks)
