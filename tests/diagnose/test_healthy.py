"""A healthy network has neither a fault nor a warning, and no network is touched by being diagnosed."""

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import isthmus
from diagnosed import CLASSES, NAMES, SIDE, TRAINED, crops, healthy, made, settled, shrunk
from isthmus.data.transform import normalise
from isthmus.diagnose.copies import undisturbed_random
from isthmus.diagnose.diagnosis import diagnose
from isthmus.errors import DataError, SpecError
from isthmus.nn.batchnorm import BatchNorm, precise_batchnorm, synchronise_batchnorm
from isthmus.nn.fold import fold
from isthmus.nn.freeze import freeze
from isthmus.nn.memory import save_memory, work_in_place
from small_runs import copied, same

HEALTHY = (*NAMES, "group norm", "plain", "drop path", "SiLU", *(f"{name} trained" for name in TRAINED))


@pytest.mark.parametrize("name", HEALTHY)
def test_no_fault_and_no_warning(settling, shown, name):
    net = healthy(*settling)[name]()
    found = diagnose(net, *shown, batch=32)
    assert [(each.kind, each.severity, each.found) for each in found.findings if each.severity != "note"] == []
    assert found.healthy
    assert found.pictures == len(shown[0])
    assert [row.name for row in found.blocks] == [block.name for block in net.plan.blocks]
    norms = {key for key, module in net.named_modules() if isinstance(module, BatchNorm)}
    assert {row.name for row in found.norms} == norms
    assert all(row.gradient and row.input_gradient and row.update and row.scale > 0 for row in found.blocks)


def test_every_healthy_network_was_tried(settling):
    assert set(HEALTHY) == set(healthy(*settling))
    assert len(HEALTHY) >= 20


def state_of(net):
    """Everything of a network that somebody could notice: values, gradients, modes, hooks, and what asks for one."""
    return {
        "values": copied(net) | {name: buffer.clone() for name, buffer in net.named_buffers()},
        "places": {name: each.data_ptr() for name, each in (*net.named_parameters(), *net.named_buffers())},
        "asks": {name: each.requires_grad for name, each in net.named_parameters()},
        "grads": {name: None if each.grad is None else each.grad.clone() for name, each in net.named_parameters()},
        "modes": {name: module.training for name, module in net.named_modules()},
        "kinds": {name: type(module) for name, module in net.named_modules()},
        "hooks": {
            name: [(key, dict(value)) for key, value in vars(module).items() if "hooks" in key and value]
            for name, module in net.named_modules()
        },
        "rest": (net.frozen, net.memory, net.preprocess, net.classes),
    }


def assert_same_state(one, other):
    for part in ("values", "grads"):
        assert one[part].keys() == other[part].keys()
        for name, value in one[part].items():
            found = other[part][name]
            assert value is found or torch.equal(value.nan_to_num(7.0), found.nan_to_num(7.0)), name
    assert {part: one[part] for part in one if part not in ("values", "grads")} == {
        part: other[part] for part in other if part not in ("values", "grads")
    }


def random_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002


def prepared(kind, images):
    """Networks in states that a diagnosis could upset."""
    net = settled(made(shrunk("resnet50d", drop_path=0.3)), images)
    if kind == "in training":
        net.train()
    if kind == "frozen":
        freeze(net, "layer2")
    if kind == "half mixed":
        net.layer1.train()
        net.bn1.momentum = None
    if kind == "memory saved":
        save_memory(net, "recompute")
        work_in_place(net)
    if kind == "broken":
        with torch.no_grad():
            net.layer2[0].conv2.weight[0, 0, 0, 0] = float("nan")
    if kind == "folded":
        net = fold(net)
    if kind == "double":
        net = net.double()
    return net


@pytest.mark.parametrize(
    "kind", ["as it is", "in training", "frozen", "half mixed", "memory saved", "broken", "folded", "double"]
)
def test_nothing_of_the_network_moves(settling, shown, kind):
    net, calls = prepared(kind, settling[0]), []
    kept = net.layer1[0].conv1(torch.zeros(1, 16, 4, 4, dtype=next(net.parameters()).dtype))
    net.layer1[0].map = kept  # a map with its graph, as some hooks leave one
    net.layer1[0].register_forward_hook(lambda *_: calls.append("forward"))
    net.layer1[1].register_full_backward_hook(lambda *_: calls.append("backward"))
    next(net.layer3.parameters()).grad = torch.ones_like(next(net.layer3.parameters()))
    images, labels = shown[0].clone(), shown[1].clone()
    before, numbers = state_of(net), random_states()
    first = diagnose(net, images, labels, batch=8)
    assert_same_state(before, state_of(net))
    assert random_states() == numbers
    assert calls == []
    assert net.layer1[0].map is kept
    assert torch.equal(images, shown[0])
    assert torch.equal(labels, shown[1])
    torch.rand(3)
    assert repr(diagnose(net, images, labels, batch=8)) == repr(first)  # whatever numbers the caller has drawn


class Own(nn.Module):
    """A block of the user's own, with a norm and a dropout in it."""

    def __init__(self, in_channels, mid_channels, stride, downsample):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4 * mid_channels, 3, stride, 1)
        self.norm, self.drop, self.downsample = nn.BatchNorm2d(4 * mid_channels), nn.Dropout(0.1), downsample

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        return (self.drop(self.norm(self.conv(x))) + shortcut).relu()


def test_own_blocks(settling, shown):
    spec = shrunk("resnet26")
    spec = replace(spec, stages=tuple(replace(stage, block="own", out=4 * stage.mid) for stage in spec.stages))
    net = isthmus.create(spec, blocks={"own": Own})
    net.preprocess = net.preprocess.at(SIDE)
    precise_batchnorm(net, [normalise(settling[0], net.preprocess)])
    found = diagnose(net.eval(), *shown)
    assert found.healthy
    assert found.strips == ()
    assert any("where an own block has its strip is not known" in each.reason for each in found.unchecked)
    assert {row.name for row in found.norms} == {
        name for name, module in net.named_modules() if isinstance(module, BatchNorm)
    }


def test_folded_networks_say_what_cannot_be_judged(settling, shown):
    found = diagnose(fold(settled(made(shrunk("resnet50")), settling[0])), *shown)
    assert found.healthy
    assert found.norms == ()
    (why,) = (each for each in found.unchecked if "preprocessing" in each.what)
    assert "only statistics of batch norms tell, and the network has none (norm 'none')" in why.reason


def test_a_norm_of_the_head_does_not_tell_what_went_in(settling, shown):
    """Behind a whole folded trunk; nor is there any behind the strides."""
    spec = shrunk("resnet50")
    net = settled(made(replace(spec, head=replace(spec.head, norm=True))), settling[0] // 16)
    found = diagnose(fold(net), *shown)
    assert [row.name for row in found.norms] == ["fc.0"]
    assert not {"preprocessing", "place of strides"} & set(found.checked)
    reasons = {each.what: each.reason for each in found.unchecked}
    assert reasons["preprocessing"] == "the first batch norm is the head's (fc.0), behind the whole trunk"
    assert "behind the 3×3" in reasons["place of strides"]


def test_one_of_many_processes_may_diagnose_by_itself(settling, shown, monkeypatch):
    """Its synchronised norms would wait for the others."""
    net = settled(made(shrunk("resnet26")), settling[0])
    wanted = diagnose(net, *shown, batch=16)
    synchronise_batchnorm(net)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather", lambda *_: pytest.fail("asks the others"))
    assert repr(diagnose(net, *shown, batch=16)) == repr(wanted)
    assert {type(module).__name__ for module in net.modules() if isinstance(module, BatchNorm)} == {
        "SynchronisedBatchNorm2d"
    }


def test_of_several_gpus_the_networks_own_numbers_are_kept(monkeypatch):
    generators = torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    before, drawn = [each.get_state() for each in generators], []
    for _ in range(2):
        numbers = random_states()
        with undisturbed_random(torch.device("cuda:1")):
            torches = [torch.rand(2, generator=each).tolist() for each in (torch.default_generator, generators[1])]
            drawn.append((torches, np.random.rand(2).tolist(), random.random()))  # noqa: NPY002
        assert random_states() == numbers
        assert all(torch.equal(each.get_state(), state) for each, state in zip(generators, before, strict=True))
        _ = torch.rand(1), np.random.rand(1), random.random()  # noqa: NPY002
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("dims", [1, 3])
def test_signals_and_volumes(dims):
    net = made(shrunk("resnet26", dims=dims, in_channels=2))
    sides = {1: (256,), 3: (32, 32, 32)}[dims]
    x = torch.randn(20, 2, *sides, generator=torch.Generator().manual_seed(0))
    precise_batchnorm(net, [x])
    found = diagnose(net, x, torch.arange(20) % CLASSES)
    assert found.healthy
    assert len(found.strips) == len(found.blocks)
    assert any(each.what == "preprocessing" for each in found.unchecked)


def test_without_labels_or_classes_there_are_no_gradients(settling, shown):
    net = settled(made(shrunk("resnet26")), settling[0])
    found = diagnose(net, shown[0])
    assert found.healthy
    assert [each.reason for each in found.unchecked if "gradients" in each.what] == ["the pictures have no labels"]
    assert all(row.gradient is None and row.update is None for row in found.blocks)
    features = settled(made(replace(shrunk("resnet26"), num_classes=0)), settling[0])
    assert any(each.reason == "the network has no classifier" for each in diagnose(features, shown[0]).unchecked)
    freeze(net, "trunk")
    assert any(each.reason == "every block is frozen" for each in diagnose(net, *shown).unchecked)


def test_inside_inference_mode(settling, shown):
    net = settled(made(shrunk("resnet26")), settling[0])
    with torch.inference_mode():
        images = shown[0] + 0
        assert diagnose(net, images, shown[1]).healthy


def test_few_and_odd_numbers_of_pictures(settling, photos):
    net = settled(made(shrunk("resnet26")), settling[0])
    for count in (2, 3, 33):
        found = diagnose(net, *crops(photos, count, seed=5))
        assert found.pictures == count
        assert len(found.norms) == len([1 for module in net.modules() if isinstance(module, BatchNorm)])


@pytest.mark.parametrize(
    ("images", "labels", "error", "says"),
    [
        (torch.zeros(8, 1, 64, 64, dtype=torch.uint8), None, DataError, r"torch.uint8 \(N, 3, H, W\)"),
        (torch.zeros(8, 3, 64, 64, dtype=torch.int64), None, DataError, "torch.int64"),
        (torch.zeros(8, 3, 64), None, DataError, r"\(8, 3, 64\)"),
        (torch.zeros(1, 3, 64, 64), None, DataError, "two pictures or more"),
        (torch.zeros(8, 3, 64, 64), torch.arange(8), DataError, "labels must be 8 whole numbers from 0 to 3"),
        (torch.zeros(8, 3, 64, 64), torch.zeros(7, dtype=torch.int64), DataError, r"\(7,\)"),
        (torch.zeros(8, 3, 64, 64), torch.zeros(8), DataError, "torch.float32"),
    ],
)
def test_pictures_that_do_not_fit(images, labels, error, says):
    with pytest.raises(error, match=says):
        diagnose(made(shrunk("resnet26")), images, labels)


def test_pictures_too_small_for_the_network():
    with pytest.raises(SpecError, match="enlarge the image"):
        diagnose(made(shrunk("resnetblur50d")), torch.zeros(4, 3, 2, 2, dtype=torch.uint8))


def test_a_diagnosis_is_plain_data(settling, shown):
    net = settled(made(shrunk("resnet26")), settling[0])
    document = diagnose(net, *shown).to_dict()
    assert document["healthy"] is True
    assert document["pictures"] == 48
    assert {"findings", "blocks", "strips", "norms", "checked", "unchecked"} < set(document)
    assert document["blocks"][0]["gradient"].keys() == {"mean", "deviation"}


def test_a_copy_is_judged_as_its_original(settling, shown):
    net = settled(made(shrunk("resnet26")), settling[0])
    assert repr(diagnose(net, *shown)) == repr(diagnose(copy.deepcopy(net), *shown))
    assert same(copied(net), copied(copy.deepcopy(net)))
