"""Training in less memory: gradients and statistics of the plain network, to the last digits of fp64; fewer bytes."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

from isthmus.arch.plan import plan
from isthmus.arch.spec import HeadSpec, NetSpec
from isthmus.arch.variants import variant
from isthmus.nn.batchnorm import freeze_batchnorm, synchronise_batchnorm
from isthmus.nn.block import BasicBlock, BottleneckBlock, PreActBottleneckBlock
from isthmus.nn.freeze import freeze
from isthmus.nn.layers import DropPath
from isthmus.nn.memory import Stage, save_memory, work_in_place
from isthmus.nn.network import ResNet
from oracles import picture, random_state, relative_error, saved_bytes, trimmed

MODES = ["checkpoint", "recompute"]
FAMILIES = [
    "resnet10t", "resnet18", "resnet50", "resnet50d", "resnext50_32x4d", "wide_resnet50_2", "resnet50_v1",
    "resnet50_gn",
    "seresnext26d_32x4d", "ecaresnet26t", "resnetaa50d", "resnetblur18", "resnetblur50", "resnetrs50", "senet154",
    "resnetv2_50", "resnetv2_50t", "resnetv2_50_keras", "resnet50_keras", "resnet20_cifar", "plain20_cifar",
]  # fmt: skip


def small(name: str, **changes: object) -> NetSpec:
    """The first two stages of a network of the table, of two blocks and one, and 10 classes."""
    spec = trimmed(variant(name), later=1)[0]
    return replace(spec, **({"stages": spec.stages[:2], "num_classes": 10} | changes))


def network(spec: NetSpec | str, side: int = 33) -> ResNet:
    """A network in training, every number random, in fp64."""
    net = ResNet(plan(small(spec) if isinstance(spec, str) else spec, side)).double()
    net.load_state_dict(random_state(net))
    return net.train()


def step(net: nn.Module, x: torch.Tensor, seed: int = 0, *, half: bool = False) -> tuple[torch.Tensor, ...]:
    """Logits or a map, the gradient of the input and those of the parameters, which are cleared.

    With `half` the forward pass alone is under autocast, as in training.
    """
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = net(x)
    loss = F.cross_entropy(out, torch.arange(len(x)) % 7) if out.ndim == 2 else out.square().sum()
    loss.backward()
    grads = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    net.zero_grad()
    return out, x.grad, *grads


def assert_same_step(saving: ResNet, plain: ResNet, x: torch.Tensor) -> None:
    """Equal logits and buffers, gradients equal to 1e-10, over two steps."""
    for seed in (0, 1):
        found, wanted = step(saving, x, seed), step(plain, x, seed)
        assert len(found) == len(wanted)
        assert torch.equal(found[0], wanted[0])
        assert max(relative_error(one, other) for one, other in zip(found, wanted, strict=True)) < 1e-10
        assert all(torch.equal(one, other) for one, other in zip(saving.buffers(), plain.buffers(), strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_and_statistics_are_the_plain_networks(name, mode):
    plain = network(small(name, drop_path=0.3))
    saving = copy.deepcopy(plain)
    assert save_memory(saving, mode) == ()
    assert_same_step(saving, plain, picture(3, 3, 33, 33))


@pytest.mark.parametrize("dims", [1, 3])
def test_signals_and_volumes(dims):
    plain = network(small("seresnext26d_32x4d", dims=dims), 17)
    saving = copy.deepcopy(plain)
    save_memory(saving, "recompute")
    assert_same_step(saving, plain, picture(3, 3, *(17,) * dims))


def cumulative(net):
    """Batch norms whose statistics are the mean over all batches, and one without any."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    net.layer1[0].bn2 = nn.BatchNorm2d(64, track_running_stats=False, affine=False).double()


def statistics_held(net):
    """A batch norm that was told to leave its statistics as they are."""
    net.layer1[0].bn2.track_running_stats = False


CHANGES = {
    "frozen statistics": freeze_batchnorm,
    "synchronised statistics": synchronise_batchnorm,
    "frozen stem": lambda net: freeze(net, "stem"),
    "frozen stages": lambda net: freeze(net, "layer2"),
    "some weights frozen": lambda net: [p.requires_grad_(i % 3 == 0) for i, p in enumerate(net.layer2.parameters())],
    "weights of norms frozen": lambda net: net.layer1[0].bn2.requires_grad_(requires_grad=False),
    "other momentum": cumulative,
    "statistics held": statistics_held,
    "evaluation": nn.Module.eval,
    "channels_last": lambda net: net.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_state_the_network_is_in(change, mode):
    plain = network("resnet26d")
    CHANGES[change](plain)
    saving = copy.deepcopy(plain)
    save_memory(saving, mode)
    assert_same_step(saving, plain, picture(3, 3, 33, 33))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head", [HeadSpec(taps=("stem", "layer2", "last"), pools=("avg", "max"), norm=True, hidden=8)])
def test_heads_that_read_inner_maps(head, mode):
    plain = network(small("resnet26", head=head))
    saving = copy.deepcopy(plain)
    save_memory(saving, mode)
    assert_same_step(saving, plain, picture(3, 3, 33, 33))


class Twice(nn.Module):
    """A block of one's own, with dropout and statistics."""

    def __init__(self, in_channels, mid_channels, stride, downsample):
        super().__init__()
        out = mid_channels * 4
        self.conv = nn.Conv2d(in_channels, out, 3, stride, 1)
        self.norm, self.drop, self.downsample = nn.BatchNorm2d(out), nn.Dropout(0.3), downsample or nn.Identity()

    def forward(self, x):
        return self.downsample(x) + self.drop(self.norm(self.conv(x)).relu())


def test_blocks_of_ones_own_are_checkpointed_and_named():
    stages = tuple(
        replace(stage, block="twice") if n == 1 else stage for n, stage in enumerate(small("resnet26").stages)
    )
    plain = ResNet(plan(small("resnet26", stages=stages), 33), blocks={"twice": Twice}).double().train()
    saving = copy.deepcopy(plain)
    assert save_memory(saving, "recompute") == ("layer2.0",)
    assert_same_step(saving, plain, picture(3, 3, 33, 33))


def test_a_subclass_and_a_shortcut_of_ones_own():
    class Loud(BottleneckBlock):
        def forward(self, x):
            return 2 * super().forward(x)

    plain = network("resnet26")
    shortcut = nn.Sequential(nn.Conv2d(64, 256, 1, bias=False), nn.BatchNorm2d(256), nn.Tanh())
    plain.layer1[0] = BottleneckBlock(64, 64, downsample=shortcut).double()
    plain.layer2[0].__class__ = Loud
    saving = copy.deepcopy(plain)
    assert save_memory(saving, "recompute") == ("layer2.0",)
    assert_same_step(saving, plain, picture(3, 3, 33, 33))


class Gate(nn.Module):
    """A module of one's own."""

    def forward(self, x):
        return x * x.sigmoid()


def projecting(*last):
    """A shortcut of 64 channels to 256."""
    return nn.Sequential(nn.Conv2d(64, 256, 1, bias=False), nn.BatchNorm2d(256), *last)


def exchange(net, name, module):
    """Put a copy of `module` where `name` says."""
    parent, _, last = name.rpartition(".")
    setattr(net.get_submodule(parent), last, copy.deepcopy(module).double())


EXCHANGED = {  # in a resnet26d: the module, its name
    "no attention for one": (Gate(), "layer1.0.se"),
    "no drop path for one": (DropPath(0.3), "layer1.0.drop_path"),
    "no filter for one": (Gate(), "layer2.0.aa"),
    "a shortcut of other parts": (nn.Sequential(nn.Identity(), *projecting(nn.Tanh())), "layer1.0.downsample"),
    "a shortcut of fewer": (nn.Conv2d(64, 256, 1, bias=False), "layer1.0.downsample"),
    "a shortcut where none was": (nn.Conv2d(256, 256, 1, bias=False), "layer1.1.downsample"),
    "random numbers behind": (nn.Sequential(nn.ReLU(), nn.Dropout(0.3)), "layer1.0.act2"),
    "random numbers": (nn.RReLU(), "layer1.0.act2"),
    "random numbers inside": (nn.Dropout(0.3), "layer1.1.act1"),
    "a module of one's own": (Gate(), "layer1.1.act1"),
    "working in place": (nn.SiLU(inplace=True), "layer1.0.act1"),
    "reflected edges": (nn.Conv2d(64, 64, 3, padding=1, bias=False, padding_mode="reflect"), "layer1.0.conv2"),
    "padding in words": (nn.Conv2d(64, 64, 3, padding="same", bias=False), "layer1.0.conv2"),
    "edges of the stem": (nn.Conv2d(3, 32, 3, 2, 1, bias=False, padding_mode="circular"), "conv1.0"),
    "a pool of one's own": (nn.Sequential(nn.MaxPool2d(2), nn.Dropout(0.1)), "maxpool"),
}


@pytest.mark.parametrize("change", EXCHANGED)
def test_what_a_caller_exchanged_is_checkpointed_and_named(change):
    module, name = EXCHANGED[change]
    plain = network("resnet26d")
    exchange(plain, name, module)
    saving = copy.deepcopy(plain)
    place = ".".join(name.split(".")[:2]) if name.startswith("layer") else "stem"
    assert save_memory(saving, "recompute") == (place,)
    assert_same_step(saving, plain, picture(3, 3, 33, 33))


def test_a_stem_that_grew_is_checkpointed():
    plain = network("resnet26d")
    plain.conv1.append(nn.Dropout2d(0.3))
    saving = copy.deepcopy(plain)
    assert save_memory(saving, "recompute") == ("stem",)
    assert_same_step(saving, plain, picture(3, 3, 33, 33))


REPEATED = {
    "activations": (nn.SiLU(), "layer1.0.act1"),
    "the last activation": (nn.LeakyReLU(0.1), "layer1.0.act"),
    "group norm": (nn.GroupNorm(4, 64), "layer1.0.bn1"),
    "nothing": (nn.Identity(), "layer1.1.bn2"),
    "several": (nn.Sequential(nn.Conv2d(64, 64, 3, 1, 1), nn.GroupNorm(4, 64), nn.Tanh()), "layer1.0.conv2"),
    "pools": (nn.AvgPool2d(2), "maxpool"),
}


@pytest.mark.parametrize("change", REPEATED)
def test_what_computes_the_same_again_is_recomputed(change):
    module, name = REPEATED[change]
    plain = network("resnet26d")
    exchange(plain, name, module)
    saving = copy.deepcopy(plain)
    assert save_memory(saving, "recompute") == ()
    assert_same_step(saving, plain, picture(3, 3, 33, 33))


def test_exchanged_when_memory_was_already_saved():
    plain = network("resnet26d")
    saving = copy.deepcopy(plain)
    assert save_memory(saving, "recompute") == ()
    for net in (plain, saving):
        net.layer1[0].se, net.layer1[1].act1 = Gate(), nn.Dropout(0.3)
        net.layer2[0].act2.forward = lambda x: x.clamp(0, 1)
    assert_same_step(saving, plain, picture(3, 3, 33, 33))


def test_a_slice_of_a_stage_is_plain():
    net = network("resnet26")
    save_memory(net, "recompute")
    x = picture(2, 64, 9, 9)
    assert torch.equal(net.layer1[:1](x), nn.Sequential(net.layer1[0])(x))


@pytest.mark.parametrize("mode", MODES)
def test_hooks_inside_a_block_see_its_maps(mode):
    net = network("resnet26")
    save_memory(net, mode)
    seen = []
    net.layer2[0].bn2.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach().clone()))
    x = picture(3, 3, 33, 33)
    step(net, x)
    assert len(seen) == 2  # a checkpointed block runs twice
    assert torch.equal(*seen)


@pytest.mark.parametrize("mode", MODES)
def test_hooks_on_all_modules_see_those_inside(mode):
    net = network("resnet26")
    save_memory(net, mode)
    seen = []
    handle = register_module_forward_hook(lambda module, _inputs, _output: seen.append(module))
    try:
        step(net, picture(3, 3, 33, 33))
    finally:
        handle.remove()
    assert {id(module) for module in seen} == {id(module) for module in net.modules()}


@pytest.mark.parametrize("mode", MODES)
def test_gradients_add_up_over_parts_of_a_batch(mode):
    plain = network("resnet26d")
    saving = copy.deepcopy(plain)
    save_memory(saving, mode)
    for net in (saving, plain):
        for part in picture(6, 3, 33, 33).split(3):
            net(part).square().sum().backward()
    for found, wanted in zip(saving.parameters(), plain.parameters(), strict=True):
        assert relative_error(found.grad, wanted.grad) < 1e-10


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode):
    """bf16 rounds differently wherever the order differs, so fp64 judges both: the saver may err no more."""
    true = network("resnet26d")
    plain = copy.deepcopy(true).float()
    saving = copy.deepcopy(plain)
    save_memory(saving, mode)
    x = picture(8, 3, 33, 33)
    wanted = step(true, x)
    found, usual = step(saving, x.float(), half=True), step(plain, x.float(), half=True)
    assert_no_worse(found, usual, wanted)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("mode", ["plain", *MODES])
@pytest.mark.parametrize("block", [BasicBlock(64, 64), BottleneckBlock(64, 16), PreActBottleneckBlock(64, 16)])
def test_autocast_of_a_map_in_full_precision(block, mode, in_place):
    """The identity shortcut is wider there than what is added to it, forward and backward."""
    plain = copy.deepcopy(block).float()
    plain.load_state_dict({key: value.float() for key, value in random_state(plain).items()})
    saving = Stage(copy.deepcopy(plain))
    saving.memory = mode
    work_in_place(saving, on=in_place)
    x = picture(4, 64, 9, 9)
    found, usual = step(saving, x.float(), half=True), step(plain, x.float(), half=True)
    assert_no_worse(found, usual, step(plain.double(), x))


def assert_no_worse(found, usual, wanted):
    """The same output to the bit, and gradients of the same types, no farther from those of fp64."""
    assert torch.equal(found[0], usual[0])
    assert [one.dtype for one in found] == [one.dtype for one in usual]

    def error(step):
        pairs = zip(step[1:], wanted[1:], strict=True)
        return sum(float((one.double() - other).norm() / other.norm()) for one, other in pairs)

    assert error(found) < 1.2 * error(usual)  # bf16 rounds elsewhere, now better and now worse


@pytest.mark.parametrize("mode", MODES)
def test_the_network_stays_a_network(mode):
    net = network("resnet26")
    keys, parameters = list(net.state_dict()), list(net.parameters())
    x = picture(2, 3, 33, 33)
    wanted = net.eval()(x)
    save_memory(net, mode)
    assert list(net.state_dict()) == keys
    assert all(one is other for one, other in zip(net.parameters(), parameters, strict=True))
    assert torch.equal(net(x), wanted)
    assert net(x.clone().requires_grad_()).grad_fn is not None
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), wanted)
    assert torch.equal(torch.export.export(net, (x,)).module()(x), wanted)
    save_memory(net, "plain")
    assert type(net.layer1) is nn.Sequential
    whole = saved_bytes(net.train(), x)
    save_memory(net, mode)
    assert saved_bytes(net, x) < 0.5 * whole


def test_compiled_it_is_the_plain_network():
    net = network("resnet26")
    x = picture(2, 3, 33, 33)
    wanted = net(x)
    save_memory(net, "recompute")
    assert relative_error(torch.compile(net, backend="eager", fullgraph=True)(x), wanted) < 1e-12


def test_second_derivatives_are_refused():
    net = network("resnet26")
    save_memory(net, "recompute")
    x = picture(2, 3, 33, 33).requires_grad_()
    (grad,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_one_value_per_channel_is_refused_as_the_plain_network_does():
    net = network("resnet26", 8)
    save_memory(net, "recompute")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        net(picture(1, 3, 8, 8))


def test_resnet50_holds_two_fifths():
    net = ResNet(plan("resnet50")).train().to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 224, 224)
    whole = saved_bytes(net, x)
    save_memory(net, "recompute")
    assert saved_bytes(net, x) <= 0.40 * whole


@pytest.mark.parametrize("mode", ["plain", *MODES])
@pytest.mark.parametrize("name", FAMILIES)
def test_working_in_place_changes_no_bit(name, mode):
    plain = network(name)
    other = copy.deepcopy(plain)
    work_in_place(other)
    assert any(module.inplace for module in other.modules() if isinstance(module, nn.ReLU))
    save_memory(plain, mode)
    save_memory(other, mode)
    x = picture(2, 3, 33, 33)
    for found, wanted in zip(step(other, x), step(plain, x), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet50d"])
def test_working_in_place_without_norm(name):
    plain = network(small(name, norm="none"))
    other = copy.deepcopy(plain)
    work_in_place(other)
    x = picture(2, 3, 33, 33)
    for found, wanted in zip(step(other, x), step(plain, x), strict=True):
        assert torch.equal(found, wanted)


def test_working_in_place_is_undone():
    net = network("resnet26")
    work_in_place(net)
    work_in_place(net, on=False)
    hooked = []
    for norm in (net.layer1[0].bn2, net.layer1[0].bn3):  # an activation or an addition in place would raise behind it
        norm.register_full_backward_hook(lambda *_: hooked.append(1))
    step(net, picture(2, 3, 33, 33))
    assert len(hooked) == 2
