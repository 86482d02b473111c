"""The whole network: features, heads, and what torch does with modules: compile, export, copy, pickle, meta."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.arch.plan import plan
from isthmus.arch.spec import HeadSpec, NetSpec
from isthmus.arch.variants import variant
from isthmus.errors import SpecError
from isthmus.nn.freeze import freeze
from isthmus.nn.network import ResNet

STRUCTURES = ["resnet18", "resnet26d", "seresnet18", "ecaresnet26t", "resnetaa34d", "resnetblur18", "resnetrs50"]
STRUCTURES += ["resnet50_gn", "resnetv2_50", "resnet20_cifar", "plain20_cifar"]


def small(name: str) -> NetSpec:
    """One block a stage and ten classes."""
    spec = variant(name)
    return replace(spec, stages=tuple(replace(stage, depth=1) for stage in spec.stages), num_classes=10)


def network(name: str, size: int = 64) -> ResNet:
    torch.manual_seed(0)
    return ResNet(plan(small(name), size), zero_init=False).eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", STRUCTURES)
def test_compiles_whole(name, x):
    net = network(name)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), net(x))
        torch.testing.assert_close(compiled(x[:1]), net(x[:1]))


@pytest.mark.parametrize("name", ["resnet26d", "resnetblur18", "seresnet18"])
def test_training_compiles_whole(name, x):
    net = network(name).train()
    other = copy.deepcopy(net)
    torch._dynamo.reset()
    torch.compile(net, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    other(x).square().sum().backward()
    for (key, found), wanted in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-3, atol=1e-4, msg=key)
    for (key, found), wanted in zip(net.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(found, wanted, msg=key)


def test_drop_path_compiles_whole(x):
    torch._dynamo.reset()
    net = ResNet(plan(replace(small("resnet18"), drop_path=0.5), 64)).train()
    assert torch.compile(net, fullgraph=True, backend="eager")(x).shape == (2, 10)


def test_features_compile_whole(x):
    torch._dynamo.reset()
    net = network("resnet26d")
    with torch.no_grad():
        maps = torch.compile(lambda x: net.features(x, ("stem", "layer2")), fullgraph=True, backend="eager")(x)
        for name, value in net.features(x, ("stem", "layer2")).items():
            torch.testing.assert_close(maps[name], value)


@pytest.mark.long
@pytest.mark.parametrize("name", STRUCTURES)
def test_inductor(name, x):
    net = network(name)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, fullgraph=True)(x), net(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", STRUCTURES)
def test_exports(name, strict, x):
    net = network(name)
    with torch.no_grad():
        program = torch.export.export(net, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), net(x))
    assert set(program.state_dict) == set(net.state_dict())


def test_exports_with_any_batch(x):
    net = network("resnet26d")
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},)).module()
        for size in (1, 5):
            torch.testing.assert_close(program(x[:1].expand(size, -1, -1, -1)), net(x[:1].expand(size, -1, -1, -1)))


@pytest.mark.parametrize("name", STRUCTURES)
def test_copies_and_pickles(name, x):
    net = network(name)
    freeze(net, "layer1")
    net.classes = tuple("abcdefghij")
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)):
        assert other.plan == net.plan
        assert (other.classes, other.frozen, other.preprocess) == (net.classes, net.frozen, net.preprocess)
        with torch.no_grad():
            assert torch.equal(other(x), net(x))
        other.train()
        assert not other.layer1.training
        assert other.layer2.training


@pytest.mark.parametrize("name", [name for name in STRUCTURES if "blur" not in name])
def test_meta_and_back(name, x):
    net = network(name)
    with torch.device("meta"):
        other = ResNet(net.plan)
    assert all(parameter.is_meta for parameter in other.parameters())
    assert other(x.to("meta")).shape == (2, 10)
    other = other.to_empty(device="cpu").eval()
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), net(x))


@pytest.mark.parametrize("name", [*STRUCTURES, "test_resnet", "resnet50_v1"])
@pytest.mark.parametrize("size", [64, 97, 225, (48, 80)])
def test_features_are_those_of_the_plan(name, size):
    net = ResNet(plan(small(name), size)).eval()
    with torch.inference_mode():
        maps = net.features(torch.zeros(1, 3, *net.plan.image_size))
    assert [(key, *value.shape[1:]) for key, value in maps.items()] == [
        (feature.name, feature.channels, *feature.size) for feature in net.plan.features
    ]


def test_features_by_name(x):
    net = network("resnet26d")
    with torch.no_grad():
        every = net.features(x)
        some = net.features(x, ("layer3", "stem"))
    assert list(some) == ["stem", "layer3"]
    assert all(torch.equal(value, every[key]) for key, value in some.items())
    assert net.features(x, ()) == {}
    with pytest.raises(
        SpecError, match="there is no feature 'layer9'; known: stem, layer1, layer2, layer3, layer4, last"
    ):
        net.features(x, ("stem", "layer9"))


def test_nothing_beyond_the_last_name_is_computed(x):
    net = network("resnet26d")
    net.layer3.register_forward_hook(lambda *_: pytest.fail("layer3 ran"))
    assert list(net.features(x, ("layer2",))) == ["layer2"]
    net.maxpool.register_forward_hook(lambda *_: pytest.fail("the pool ran"))
    assert list(net.features(x, ("stem",))) == ["stem"]


@pytest.mark.parametrize("name", ["resnet26d", "resnetv2_50", "resnetrs50", "resnet20_cifar"])
def test_going_on_from_a_map(x, name):
    net = network(name)
    with torch.no_grad():
        every = net.features(x)
        for place, point in enumerate(("stem", *net.stages)):
            begun = net.maxpool(every[point]) if point == "stem" else every[point]
            rest = net.features(begun, after=point)
            assert list(rest) == list(every)[place + 1 :]
            assert all(torch.equal(value, every[key]) for key, value in rest.items())
            assert torch.equal(net.fc(net.pooled(begun, after=point)), net(x))
            with pytest.raises(SpecError, match=f"no feature '{point}'; known: .*last"):
                net.features(begun, (point,), after=point)
    with pytest.raises(SpecError, match="cannot go on after 'last'; known: stem, layer1"):
        net.features(x, after="last")


def test_taps_that_are_known_already(x):
    head = HeadSpec(taps=("layer1", "last", "stem"), pools=("max", "avg"))
    net = ResNet(plan(replace(small("resnet26d"), head=head), 64)).eval()
    with torch.no_grad():
        maps = net.features(x)
        known = {name: net.pool(maps[name]) for name in ("stem", "layer1")}
        assert torch.equal(net.fc(net.pooled(maps["layer2"], after="layer2", known=known)), net(x))
        known["last"] = net.pool(maps["last"])
        assert torch.equal(net.fc(net.pooled(x[:, :0], after="layer4", known=known)), net(x))


@pytest.mark.parametrize("in_channels", [1, 5])
@pytest.mark.parametrize("name", ["resnet18", "resnet26d", "resnetv2_50", "resnet20_cifar"])
def test_input_channels(name, in_channels):
    net = ResNet(plan(replace(small(name), in_channels=in_channels), 64))
    assert net(torch.zeros(2, in_channels, 64, 64)).shape == (2, 10)
    with pytest.raises(RuntimeError, match="channels"):
        net(torch.zeros(2, 3, 64, 64))


@pytest.mark.parametrize("name", ["resnet18", "resnet26d", "resnetv2_50", "resnet20_cifar"])
def test_no_classes_is_pooled_features(name, x):
    net = ResNet(plan(replace(small(name), num_classes=0), 64)).eval()
    assert not any(key.startswith("fc") for key in net.state_dict())
    with torch.no_grad():
        found = net(x)
        torch.testing.assert_close(found, net.features(x)["last"].mean((2, 3)))
        torch.testing.assert_close(found, net.pooled(x))
    assert found.shape == (2, net.plan.num_features)


def test_taps_and_pools(x):
    head = HeadSpec(taps=("layer2", "last"), pools=("avg", "max"), hidden=6)
    net = ResNet(plan(replace(small("resnet26d"), head=head), 64)).eval()
    with torch.no_grad():
        maps = net.features(x)
        parts = [reduce for name in head.taps for reduce in (maps[name].mean((2, 3)), maps[name].amax((2, 3)))]
        torch.testing.assert_close(net.pooled(x), torch.cat(parts, 1))
        fc = net.fc
        torch.testing.assert_close(net(x), fc[2](fc[0](net.pooled(x)).relu()))
    assert [key for key in net.state_dict() if key.startswith("fc")] == [
        "fc.0.weight",
        "fc.0.bias",
        "fc.2.weight",
        "fc.2.bias",
    ]


def test_channels_last_is_the_same_function(x):
    for name in STRUCTURES:
        net = network(name)
        with torch.no_grad():
            wanted = net(x)
            last = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(last, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", STRUCTURES)
def test_gradients_and_hooks_work(name, x):
    """No activation is shared or changed in place, so full backward hooks see every one of them."""
    net = network(name).train()
    seen = []
    for key, module in net.named_modules():
        if isinstance(module, torch.nn.ReLU):
            module.register_full_backward_hook(lambda *_, key=key: seen.append(key))
    x = x.clone().requires_grad_()
    net(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    relus = [key for key, module in net.named_modules() if isinstance(module, torch.nn.ReLU)]
    assert sorted(seen) == sorted(relus)
    assert len(seen) == len(set(seen))
    assert all(parameter.grad is not None for parameter in net.parameters())


@given(st.integers(17, 80), st.integers(17, 80))
@settings(max_examples=15)
def test_any_size_whatever_the_plan_was_made_for(height, width):
    net = network("resnetaa34d", 224)
    with torch.inference_mode():
        assert net(torch.zeros(1, 3, height, width)).shape == (1, 10)
        found = net.features(torch.zeros(1, 3, height, width))
    laid_out = plan(net.spec, (height, width))
    assert [tuple(value.shape[2:]) for value in found.values()] == [feature.size for feature in laid_out.features]
