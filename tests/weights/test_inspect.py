"""Inspecting: what is told of a file, that headers are enough for it, and every finding on a file made to have it."""

import builtins
import io
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn

import isthmus
from isthmus.arch.variants import variant
from isthmus.errors import WeightsError
from isthmus.weights.findings import by_kind, by_values
from isthmus.weights.inspect import inspect_weights
from isthmus.weights.save import save_weights
from oracles import random_state
from small_runs import SPEC, copied, network

RESNET18 = replace(variant("resnet18"), num_classes=5)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """ResNet-18 of torchvision with random numbers, as torch.save writes it."""
    net = torchvision.models.resnet18(num_classes=5)
    net.load_state_dict(random_state(net))
    path = tmp_path_factory.mktemp("bare") / "resnet18.pth"
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in net.state_dict().items()}}, path)
    return path


# -- what is told ------------------------------------------------------------------------------------------------------


def test_a_file_of_ours(tmp_path):
    net = network()
    net.classes = tuple("abcdefg")
    save_weights(net, path := tmp_path / "a.safetensors", layout="native")
    found = inspect_weights(path)
    assert (found.format, found.bytes, found.layout) == ("safetensors", path.stat().st_size, "native")
    assert (found.network, found.candidates) == ("tiny", ())
    assert (found.classes, found.preprocess) == (net.classes, net.preprocess)
    assert found.parameters == sum(parameter.numel() for parameter in net.parameters())
    assert found.tensors == len(net.state_dict())
    assert found.dtypes == {"float32": sum(t.is_floating_point() for t in net.state_dict().values()), "int64": 9}
    assert found.metadata == {"format": "pt"}
    assert (found.findings, found.values) == ((), False)


def test_a_bare_state_dict(bare):
    found = inspect_weights(bare)
    assert (found.format, found.layout, found.network) == ("torch", "native", "")
    assert "resnet18" in found.candidates
    assert all(variant(name).stages == RESNET18.stages for name in found.candidates)
    assert found.evidence[0].layout == "native"
    assert found.evidence[0].named == found.tensors > found.evidence[1].named
    theirs = torchvision.models.resnet18(num_classes=5)
    assert found.parameters == sum(parameter.numel() for parameter in theirs.parameters())
    assert found.notes == ("tensors taken from 'state_dict'", "prefix 'module.' removed")
    assert found.preprocess is None


@pytest.mark.parametrize("layout", ["transformers", "mmpretrain", "detectron2", "timm_resnetv2"])
def test_the_layout_of_others(tmp_path, layout):
    preact = layout == "timm_resnetv2"
    spec = replace(variant("resnetv2_50" if preact else "resnet18"), num_classes=5)
    spec = replace(spec, stages=tuple(replace(stage, depth=1) for stage in spec.stages))
    save_weights(isthmus.create(spec), path := tmp_path / "a.pth", layout=layout)
    found = inspect_weights(path)
    assert (found.layout, found.evidence[0].layout) == (layout, layout)
    assert found.candidates == ()  # of such depths the table has none


def test_names_that_nobody_knows(tmp_path):
    torch.save({"a.b": torch.ones(2, 2), "c": torch.ones(1)}, path := tmp_path / "a.pth")
    found = inspect_weights(path, values=True)
    assert (found.layout, found.network, found.candidates) == ("", "", ())
    assert found.tensors == 2
    assert [finding.kind for finding in found.findings] == ["constant"]


def test_an_onnx_graph_and_a_name_of_the_catalog():
    found = inspect_weights("demo", values=True)
    assert (found.format, found.layout, found.network) == ("onnx", "onnx", "demo")
    assert found.classes == ("sfw", "nsfw")
    assert found.preprocess.channels == "BGR"
    assert [finding.kind for finding in found.findings] == ["dead-channels"]


def test_folders(tmp_path):
    net = network()
    save_weights(net, tmp_path / "model.safetensors")
    assert inspect_weights(tmp_path).network == "tiny"
    with pytest.raises(WeightsError, match="there is no file"):
        inspect_weights(tmp_path / "nothing")


def test_what_is_no_weight_file(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"nothing of the kind" * 10)
    with pytest.raises(WeightsError, match="truncated, damaged or no weight file"):
        inspect_weights(tmp_path / "a.pth")


# -- headers alone -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.h5"])
def test_headers_are_enough(tmp_path, monkeypatch, name):
    """Whatever is opened, a small part of it is read."""
    spec = replace(variant("resnet50_v1"), num_classes=5)
    spec = replace(spec, stages=tuple(replace(stage, depth=1) for stage in spec.stages))
    save_weights(isthmus.create(spec), path := tmp_path / name, layout="keras" if name == "a.h5" else "native")
    seen = []

    class Counting(io.FileIO):
        def read(self, *size):
            content = super().read(*size)
            seen.append(len(content))
            return content

        def readinto(self, buffer):
            count = super().readinto(buffer)
            seen.append(count)
            return count

    def counted(file, mode="r", buffering=-1, *rest, **options):
        if mode != "rb":
            return real(file, mode, buffering, *rest, **options)
        raw = Counting(file, "rb")
        return raw if buffering == 0 else io.BufferedReader(raw)

    real = builtins.open
    monkeypatch.setattr(io, "open", counted)
    monkeypatch.setattr(
        "isthmus.weights.published.catalog.known", lambda _: None
    )  # hashing what says nothing of itself
    assert inspect_weights(path).tensors > 50
    assert 0 < sum(seen) < path.stat().st_size / 5


# -- findings ----------------------------------------------------------------------------------------------------------


def state(**changes):
    """The tensors of a sound network with some of them changed."""
    net = network()
    tensors = copied(net)
    for name, change in changes.items():
        key = name.replace("__", ".")
        tensors[key] = change(tensors[key])
    return tensors


def put(place, value):
    def change(tensor):
        tensor[place] = value
        return tensor

    return change


def found_in(tensors):
    return {finding.kind: finding.tensors for finding in (*by_kind(tensors), *by_values(tensors, ["fc.weight"]))}


def test_a_sound_network_has_no_findings():
    assert found_in(state()) == {}


@pytest.mark.parametrize(
    ("changes", "findings"),
    [
        ({"conv1__weight": put((0, 0, 0, 0), float("nan"))}, {"not-finite": ("conv1.weight",)}),
        ({"fc__bias": put(0, float("inf"))}, {"not-finite": ("fc.bias",)}),
        ({"bn1__running_var": put(0, -1e-3)}, {"negative-variance": ("bn1.running_var",)}),
        ({"bn1__running_var": put(0, 0.0)}, {"zero-variance": ("bn1.running_var",)}),
        ({"bn1__running_var": put(0, 1e7)}, {"huge-variance": ("bn1.running_var",)}),
        ({"layer1__0__conv2__weight": torch.zeros_like}, {"all-zero": ("layer1.0.conv2.weight",)}),
        ({"layer1__0__conv2__weight": torch.ones_like}, {"constant": ("layer1.0.conv2.weight",)}),
        ({"layer1__0__conv2__weight": put(3, 0.0)}, {"dead-channels": ("layer1.0.conv2.weight",)}),
        ({"layer1__0__conv2__weight": put(3, 1e-12)}, {"dead-channels": ("layer1.0.conv2.weight",)}),
        ({"layer1__0__bn3__weight": torch.zeros_like}, {"zero-scale": ("layer1.0.bn3.weight",)}),
        (
            {"bn1__running_var": torch.ones_like, "bn1__running_mean": torch.zeros_like},
            {"fresh-statistics": ("bn1.running_var",)},
        ),
        ({"bn1__running_mean": torch.zeros_like}, {}),
        ({"fc__bias": torch.zeros_like}, {"fresh-head": ("fc.weight",)}),
        ({"conv1__weight": torch.Tensor.half}, {"mixed-dtypes": ("conv1.weight",)}),
        ({"fc__weight": lambda t: (100 * t).to(torch.int8)}, {"whole-numbers": ("fc.weight",)}),
        ({"fc__bias": lambda t: t[:0]}, {"empty": ("fc.bias",)}),
    ],
)
def test_findings(changes, findings):
    assert found_in(state(**changes)) == findings


def test_the_same_content_twice():
    tensors = state()
    tensors["layer2.0.conv2.weight"] = tensors["layer1.0.conv2.weight"].clone()
    assert found_in(tensors) == {"repeated": ("layer1.0.conv2.weight", "layer2.0.conv2.weight")}


def test_classifiers_as_libraries_draw_them():
    """A linear layer of torch and of ours; a step of training makes the difference."""
    torch.manual_seed(0)
    linear = nn.Linear(512, 10)
    kept = {"fc.weight": linear.weight.detach(), "fc.bias": linear.bias.detach()}
    assert found_in(kept) == {"fresh-head": ("fc.weight",)}
    ours = isthmus.create(SPEC).fc.state_dict()
    assert found_in({f"fc.{name}": tensor for name, tensor in ours.items()}) == {"fresh-head": ("fc.weight",)}
    loss = linear(torch.randn(64, 512)).square().mean()
    loss.backward()
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.sub_(parameter.grad)
    trained = {"fc.weight": linear.weight.detach(), "fc.bias": linear.bias.detach()}
    assert found_in(trained) == {}


@pytest.mark.parametrize("layout", ["transformers", "keras", "timm_resnetv2"])
def test_findings_in_the_names_of_others(tmp_path, layout):
    name = {"timm_resnetv2": "resnetv2_50", "keras": "resnet50_keras"}.get(layout, "resnet18")
    spec = replace(variant(name), num_classes=5)
    net = isthmus.create(replace(spec, stages=tuple(replace(stage, depth=1) for stage in spec.stages)))
    net.load_state_dict(random_state(net))
    norm = "layer2.0.bn2"
    with torch.no_grad():
        net.get_submodule(norm).running_var[0] = -1
        net.fc.bias.zero_()
        net.layer1[0].conv2.weight[0] = 0
    save_weights(net, path := tmp_path / ("a.h5" if layout == "keras" else "a.safetensors"), layout=layout)
    kinds = {finding.kind for finding in inspect_weights(path, values=True).findings}
    assert kinds == {"negative-variance", "fresh-head", "dead-channels"}
