"""The fast form for evaluation gives the network's own maps, and leaves the network as it is."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from isthmus.arch.plan import plan
from isthmus.arch.spec import NetSpec, StageSpec
from isthmus.arch.variants import variant
from isthmus.nn.batchnorm import freeze_batchnorm, synchronise_batchnorm
from isthmus.nn.block import BottleneckBlock
from isthmus.nn.fold import fold
from isthmus.nn.fuse import FusedBlock, FusedConv, fast_form, fuses
from isthmus.nn.memory import save_memory, work_in_place
from isthmus.nn.network import ResNet
from oracles import ours, picture, random_state, relative_error, trimmed

CPU = torch.device("cpu")
# Name, and whether the last convolution adds the shortcut: not before an attention, nor where there is none.
STRUCTURES = {
    "resnet18": True,
    "resnet26d": True,
    "resnet50_v1": True,
    "wide_resnet50_2": True,
    "resnext50_32x4d": True,
    "resnetaa34d": True,
    "resnetblur50d": True,
    "resnet20_cifar": True,
    "resnet164_cifar": True,
    "plain20_cifar": False,
    "test_resnet": True,
    "resnetv2_50": True,
    "resnetv2_50t": True,
    "resnetv2_50_keras": True,
    "resnetv2_164_cifar": True,
    "plainv2_164_cifar": False,
    "seresnet18": False,
    "ecaresnet26t": False,
    "resnetrs50": False,
    "senet154": False,
}
needs_onednn = pytest.mark.skipif(not fuses(CPU, torch.float32), reason="torch is built without oneDNN")
needs_bf16 = pytest.mark.skipif(not fuses(CPU, torch.bfloat16), reason="the machine has no bf16 convolutions")


def random_net(spec: NetSpec | str, size: int = 64) -> ResNet:
    return ours(spec, size, random_state(ResNet(plan(spec, size)))).float()


def maps(form: ResNet, net: ResNet, x: torch.Tensor, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each map of the form beside that of the network in double precision."""
    with torch.no_grad():
        found, wanted = form.features(x.to(dtype)), copy.deepcopy(net).double().features(x.double())
    return [(found[name].double(), wanted[name]) for name in wanted]


@needs_onednn
@pytest.mark.parametrize("name", STRUCTURES)
def test_the_same_maps(name):
    net = random_net(trimmed(variant(name))[0])
    before = copy.deepcopy(net.state_dict())
    form = fast_form(net, ("stem", *net.stages), CPU, torch.float32)
    for shape in ((2, 3, 64, 64), (1, 3, 33, 47)):  # the weights are packed for the first and must serve the second
        for found, wanted in maps(form, net, picture(*shape).float(), torch.float32):
            assert relative_error(found, wanted) <= 1e-5
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(
        type(module) is nn.Conv2d for stage in form.stages for module in form.get_submodule(stage).children()
    )
    assert {isinstance(block, FusedBlock) for block in form.layer1} == {STRUCTURES[name]}
    assert isinstance(form.layer2[0].conv1, FusedConv)


@needs_onednn
@pytest.mark.parametrize(
    ("name", "merged"),
    [
        ("resnet50", [128, 384, 768, 1536]),  # the strip's width and the input's
        ("resnet50d", [128, 384, 768, 1536]),
        ("resnext50_32x4d", [192, 512, 1024, 2048]),
        ("resnetv2_50", [128, 384, 768, 1536]),
        ("resnet18", [64, 128, 256, 512]),  # 3×3 at the end of the main path
        ("resnet50_v1", [128, 384, 768, 1536]),
    ],
)
def test_a_projection_is_merged_into_the_expansion(name, merged):
    """The width that the last convolution of each stage's first block reads."""
    net = random_net(trimmed(variant(name), later=1)[0])
    form = fast_form(net, ("last",), CPU, torch.float32)
    blocks = [form.get_submodule(stage)[0] for stage in net.stages]
    assert [getattr(block, "conv3", block.conv2).weight.shape[1] for block in blocks] == merged


@needs_onednn
@pytest.mark.parametrize("name", ["resnet26d", "resnetv2_50"])
def test_another_activation(name):
    net = random_net(replace(trimmed(variant(name))[0], activation="silu"))
    form, x = fast_form(net, ("last",), CPU, torch.float32), picture(2, 3, 64, 64).float()
    with torch.no_grad():
        assert relative_error(form.features(x)["last"], net.features(x)["last"]) <= 1e-5


def test_what_cannot_fold_is_copied():
    net = random_net(trimmed(variant("resnet50_gn"))[0])
    form = fast_form(net, ("last",), CPU, torch.float32)
    x = picture(2, 3, 64, 64).float()
    with torch.no_grad():
        assert relative_error(form.features(x)["last"], net.features(x)["last"]) <= 1e-5
    assert form.conv1.weight.data_ptr() != net.conv1.weight.data_ptr()


@needs_bf16
@pytest.mark.parametrize("name", ["resnet18", "resnet26d", "seresnet18", "resnext50_32x4d", "resnetv2_50"])
def test_no_less_exact_in_bf16_than_eager(name):
    """What is fused is rounded once less often."""
    net = random_net(trimmed(variant(name))[0])
    x = picture(4, 3, 64, 64).float()
    forms = fast_form(net, ("last",), CPU, torch.bfloat16), fold(net).bfloat16()
    fast, eager = (
        [float((found - wanted).square().mean()) for found, wanted in maps(form, net, x, torch.bfloat16)]
        for form in forms
    )
    assert all(this <= 1.1 * that for this, that in zip(fast, eager, strict=True))


@pytest.mark.parametrize(
    ("names", "kept"), [((), 0), (("stem",), 0), (("layer2", "layer1"), 2), (("layer1", "last"), 4), (("last",), 4)]
)
def test_later_stages_are_left_out(names, kept):
    net = random_net("resnet18")
    form = fast_form(net, names, CPU, torch.float64)
    assert [len(list(form.get_submodule(stage).children())) > 0 for stage in net.stages] == [
        number < kept for number in range(4)
    ]
    x = picture(1, 3, 64, 64)
    with torch.no_grad():
        wanted = net.double().features(x, names)
        for name, found in form.features(x, names).items():
            assert relative_error(found, wanted[name]) <= 1e-6
    assert not list(form.fc.parameters())


def test_training_and_dropped_paths_do_not_matter():
    spec = replace(trimmed(variant("resnet26"))[0], drop_path=0.5)
    net = random_net(spec).train()
    form, x = fast_form(net, ("last",), CPU, torch.float32), picture(2, 3, 64, 64).float()
    assert net.training
    with torch.no_grad():
        assert relative_error(form.features(x)["last"], net.eval().features(x)["last"]) <= 1e-5


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims):
    net = random_net(NetSpec(stages=(StageSpec(depth=2, mid=4, out=16),), dims=dims), 16)
    x = picture(2, 3, *(16,) * dims).float()
    with torch.no_grad():
        found = fast_form(net, ("last",), CPU, torch.float32).features(x)["last"]
        assert relative_error(found, net.features(x)["last"]) <= 1e-5


def test_own_blocks_are_copied():
    class Own(nn.Module):
        def __init__(self, width_in, mid, stride, downsample):
            super().__init__()
            self.conv = nn.Conv2d(width_in, mid, 3, stride, 1)

        def forward(self, x):
            return self.conv(x)

    spec = NetSpec(stages=(StageSpec(depth=1, mid=8, out=8, block="own"),))
    net, x = ResNet(plan(spec, 32), blocks={"own": Own}).eval(), picture(1, 3, 32, 32).float()
    with torch.no_grad():
        found = fast_form(net, ("last",), CPU, torch.float32).features(x)["last"]
        assert relative_error(found, net.features(x)["last"]) <= 1e-5


class Loud(BottleneckBlock):
    """A block of one's own, with the modules of ours."""

    def forward(self, x):
        return self.act(0.5 * self.main(x) + self.shortcut(x))

    def main(self, x):
        out = self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))
        return self.bn3(self.conv3(out))


def reflect(net):
    net.layer1[0].conv2.padding_mode = "reflect"
    net.layer1[0].conv2._reversed_padding_repeated_twice = [1, 1, 1, 1]


def dilate(net):
    net.layer1[0].conv2.dilation = net.layer1[0].conv2.padding = (2, 2)


CHANGES = {
    "own class": lambda net: setattr(net.layer1[0], "__class__", Loud),
    "no pool": lambda net: setattr(net, "maxpool", nn.Identity()),
    "activation": lambda net: setattr(net.layer1[0], "act1", nn.SiLU()),
    "activation of the stem": lambda net: setattr(net, "act1", nn.LeakyReLU()),
    "attention": lambda net: setattr(net.layer1[0], "se", nn.Sigmoid()),
    "norm": lambda net: setattr(net.layer1[0], "bn2", nn.GroupNorm(4, 64)),
    "edges": reflect,
    "dilation": dilate,
}


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_network_is_copied_with_its_changes(change, norm):
    net = random_net(replace(trimmed(variant("resnet26"))[0], norm=norm))
    before = copy.deepcopy(net)
    CHANGES[change](net)
    x = picture(2, 3, 64, 64).float()
    with torch.no_grad():
        found, wanted = (each.features(x)["last"] for each in (fast_form(net, ("last",), CPU, torch.float32), net))
        assert relative_error(found, wanted) <= 1e-5
        unchanged = before.features(x)["last"]
        assert unchanged.shape != wanted.shape or relative_error(unchanged, wanted) > 1e-4


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_a_subclass_of_ones_own_is_copied(norm):
    stages = tuple(replace(stage, block="loud") for stage in trimmed(variant("resnet26"))[0].stages)
    spec = replace(variant("resnet26"), stages=stages, norm=norm)
    net = ResNet(plan(spec, 64), blocks={"loud": Loud})
    net.load_state_dict(random_state(net))
    net, x = net.float().eval(), picture(2, 3, 64, 64).float()
    with torch.no_grad():
        found = fast_form(net, ("last",), CPU, torch.float32).features(x)["last"]
        assert relative_error(found, net.features(x)["last"]) <= 1e-5


@needs_onednn
def test_what_changes_nothing_in_evaluation_is_still_fused():
    net = random_net(trimmed(variant("resnet26"))[0])
    freeze_batchnorm(net.layer1)
    synchronise_batchnorm(net.layer2)
    work_in_place(net)
    save_memory(net, "recompute")
    net.fc = nn.Sequential(nn.Dropout(0.5), nn.Linear(2048, 3))
    net.layer3[0].bn1.momentum = 0.01
    net.eval()
    form, x = fast_form(net, ("last",), CPU, torch.float32), picture(2, 3, 64, 64).float()
    assert isinstance(form.layer1[0], FusedBlock)
    with torch.no_grad():
        assert relative_error(form.features(x)["last"], net.features(x)["last"]) <= 1e-5
