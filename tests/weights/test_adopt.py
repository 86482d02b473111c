"""Which network tensors are of, in every layout; and networks of other libraries in memory tried beside ours."""

from dataclasses import replace

import pytest
import timm
import torchvision
import transformers
from torch import nn

from isthmus.arch.plan import plan
from isthmus.arch.variants import variant
from isthmus.errors import WeightsError
from isthmus.nn.network import ResNet
from isthmus.weights.adopt import candidates, check_same_function, decided
from isthmus.weights.layouts import carriers, from_native
from isthmus.weights.load import create, load_weights
from oracles import bare, trimmed


def foreign(name, layout, **changes):
    """The tensors of a network of the table in a layout, in no memory at all."""
    spec = replace(variant(name), **changes)
    state = bare(lambda: ResNet(plan(spec))).state_dict()
    return from_native({key: tensor.to("meta") for key, tensor in state.items()}, layout, spec).tensors


@pytest.mark.parametrize(
    ("layout", "name", "found", "known"),
    [
        ("native", "resnet50", "resnet50 resnet50_v1 resnet50_keras resnetaa50 resnetblur50", False),
        ("torchvision", "resnet50", "resnet50", False),  # the epsilon may still be another
        ("timm", "resnet50", "resnet50 resnetaa50 resnetblur50", False),
        ("timm_resnetv2", "resnetv2_50", "resnetv2_50", False),
        ("transformers", "resnet50", "resnet50 resnet50_v1", False),
        ("transformers", "resnet18", "resnet18", False),
        ("detectron2", "resnet50", "resnet50 resnet50_v1", False),
        ("detectron2_msra", "resnet50_v1", "resnet50_v1", True),
        ("detectron2_msra", "resnet101_v1", "resnet101_v1", True),
        ("detectron2_msra", "resnext101_32x8d", "resnext101_32x8d", True),
        ("mmpretrain", "seresnet50", "seresnet50", False),
        ("mmpretrain", "resnet18d", "resnet18d", False),
        ("keras", "resnet50_keras", "resnet50_keras", True),
        ("keras", "resnet152_keras", "resnet152_keras", True),
        ("keras_v2", "resnetv2_101_keras", "resnetv2_101_keras", True),
    ],
)
def test_candidates(layout, name, found, known):
    """Also for other classes and channels, and for a trunk alone."""
    for changes in ({}, {"num_classes": 7, "in_channels": 4}, {"num_classes": 0}):
        tensors = foreign(name, layout, **changes)
        assert candidates(tensors, layout) == found.split()
        assert decided(tensors, layout) == (name if known else None)


@pytest.mark.parametrize(
    "name", ["senet154", "ecaresnet26t", "resnetrs50", "resnet50_gn", "resnet20_cifar", "plain20_cifar"]
)
def test_networks_with_tensors_of_every_kind_are_found(name):
    for layout in carriers(variant(name)):
        assert name in candidates(foreign(name, layout), layout)


def test_no_candidates():
    tensors = foreign("resnet50", "transformers")
    del tensors["resnet.embedder.embedder.convolution.weight"]
    assert candidates(tensors, "transformers") == []
    tensors = foreign("resnet50_keras", "keras")
    tensors["predictions/kernel"] = tensors["predictions/kernel"][:-1]
    assert candidates(tensors, "keras") == []
    assert decided(tensors, "keras") is None


def narrow(name, stride_at="conv2"):
    """One block a stage, an eighth as wide."""
    spec = variant(name)
    stages = tuple(replace(stage, depth=1, mid=stage.mid // 8, out=stage.out // 8) for stage in spec.stages)
    return replace(spec, stages=stages, stride_at=stride_at)


@pytest.mark.parametrize("kind", [transformers.ResNetForImageClassification, transformers.ResNetModel])
@pytest.mark.parametrize("stride_at", ["conv1", "conv2"])
def test_networks_of_transformers_in_memory(kind, stride_at):
    spec = narrow("resnet50", stride_at)
    config = transformers.ResNetConfig(
        hidden_sizes=[stage.out for stage in spec.stages],
        depths=[1, 1, 1, 1],
        num_labels=3,
        downsample_in_bottleneck=stride_at == "conv1",
    )
    theirs = kind(config)
    assert check_same_function(ResNet(plan(spec)), theirs, "transformers") < 1e-5
    other = narrow("resnet50", {"conv1": "conv2", "conv2": "conv1"}[stride_at])
    with pytest.raises(WeightsError, match=r"layer2\.0\.conv1 has stride .* there and .* here; layer2\.0\.conv2"):
        check_same_function(ResNet(plan(other)), theirs, "transformers")


def test_networks_of_timm_and_torchvision_in_memory():
    assert check_same_function(ResNet(plan("resnet10t")), timm.create_model("resnet10t"), "native") < 1e-5
    theirs = torchvision.models.resnet18()
    theirs.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 5))
    assert check_same_function(ResNet(plan("resnet18")), theirs, "native") < 1e-5
    spec, options = trimmed(variant("resnetv2_50"))
    theirs = timm.create_model("resnetv2_50", **options)
    assert check_same_function(ResNet(plan(spec)), theirs, "timm_resnetv2") < 1e-5


def test_what_gives_no_map_to_compare():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torchvision.models.resnet18()

        def state_dict(self):
            return self.net.state_dict()

        def forward(self, x):
            return {"logits": "none"}

    with pytest.raises(WeightsError, match="cannot be tried on a 97 px picture"):
        check_same_function(ResNet(plan("resnet18")), Odd(), "native")


@pytest.mark.parametrize("name", ["module", "_orig_mod", "backbone"])  # DataParallel, torch.compile, people
def test_what_is_put_around_a_network_in_memory(name):
    report = load_weights(create("test_resnet"), nn.ModuleDict({name: timm.create_model("test_resnet")}))
    assert "tried on random parameters" in str(report)
    assert "prefix" in str(report)


def test_networks_that_give_maps():
    report = load_weights(create("resnet10t", num_classes=0), timm.create_model("resnet10t", features_only=True))
    assert "tried on random parameters" in str(report)
    fcn = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=2)
    net = create(variant("resnet50").with_output_stride(8), num_classes=0)
    assert "tried on random parameters" in str(load_weights(net, fcn.backbone))
    with pytest.raises(WeightsError, match=r"or leave them out: load_weights\(..., ignore=\('classifier.',\)\)"):
        load_weights(net, fcn)
    with pytest.raises(WeightsError, match=r"gives \(1, 2\) before its classifier and ours \(1, 2048\)"):
        load_weights(net, fcn, ignore=("classifier.",))
