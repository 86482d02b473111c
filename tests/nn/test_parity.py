"""Every row of the table against a foreign implementation with the same random weights, in fp64."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision

from isthmus.arch.plan import plan
from isthmus.arch.spec import NetSpec
from isthmus.arch.variants import variant, variants
from isthmus.nn.network import ResNet
from oracles import bare, ours, picture, random_state, relative_error, seed_of, timm_net, trimmed

OTHERS = ("v1", "v2", "cifar", "keras")
TIMM = [name for name in variants() if not any(part in name for part in OTHERS)]
TORCHVISION = list(json.loads((Path(__file__).parents[1] / "golden/torchvision.json").read_text())["models"])
TOLERANCE = 1e-8


def error_against_timm(name: str, size: int) -> float:
    return error(timm_net(name), variant(name), size, seed_of(name))


@torch.inference_mode()
def error(theirs: torch.nn.Module, spec: NetSpec, size: int, seed: int = 0) -> float:
    """Relative error of our logits when both networks hold the same random state."""
    state = random_state(theirs, seed)
    theirs.load_state_dict(state, assign=True)
    x = picture(1, spec.in_channels, size, size)
    found, wanted = ours(spec, size, state)(x), theirs.double().eval()(x)
    assert wanted.abs().max() > 1e-3
    return relative_error(found, wanted)


def test_the_table_is_timms_family():
    assert len(TIMM) == 79
    family = {name for name in timm.list_models(module="resnet") if "_pruned" not in name}
    assert set(TIMM) == family


# Of 160 million parameters and more, which take a tenth of the suite and no kind of layer of their own: at 224 alone.
GIANTS = ("resnext101_32x16d", "resnext101_32x32d", "resnetrs350", "resnetrs420")


@pytest.mark.parametrize("name", [name for name in TIMM if name not in GIANTS])
def test_timm_at_97(name):
    assert error_against_timm(name, 97) <= TOLERANCE


@pytest.mark.long
@pytest.mark.parametrize("name", TIMM)
def test_timm_at_224(name):
    assert error_against_timm(name, 224) <= TOLERANCE


@pytest.mark.parametrize("name", TIMM)
def test_timm_keys_and_shapes_in_their_order(name):
    with torch.device("meta"):
        theirs, net = timm.create_model(name), ResNet(plan(name, 97))
    layout = [
        [(key, tuple(value.shape), value.dtype) for key, value in part.state_dict().items()] for part in (net, theirs)
    ]
    assert layout[0] == layout[1]
    assert [key for key, _ in net.named_parameters()] == [key for key, _ in theirs.named_parameters()]


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_at_97(name):
    theirs = bare(lambda: torchvision.models.get_model(name, weights=None))
    assert list(theirs.state_dict()) == list(bare(lambda: ResNet(plan(name))).state_dict())
    assert error(theirs, variant(name), 97, seed_of(name)) <= TOLERANCE


@pytest.mark.long
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_at_224(name):
    theirs = bare(lambda: torchvision.models.get_model(name, weights=None))
    assert error(theirs, variant(name), 224, seed_of(name)) <= TOLERANCE


def transformers_net(spec: NetSpec) -> torch.nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=spec.stem.widths[0],
        hidden_sizes=[stage.out for stage in spec.stages],
        depths=[stage.depth for stage in spec.stages],
        layer_type="bottleneck",
        downsample_in_bottleneck=True,
        num_labels=spec.num_classes,
    )
    return bare(lambda: ResNetForImageClassification(config))


def transformers_key(key: str) -> str:
    """Where transformers keeps what we call `key`."""
    if key.startswith("fc."):
        return f"classifier.1.{key.removeprefix('fc.')}"
    parts = key.split(".")
    kinds = {"conv": "convolution", "bn": "normalization"}
    if parts[0] in ("conv1", "bn1"):
        return ".".join(["resnet.embedder.embedder", kinds[parts[0][:-1]], *parts[1:]])
    place = f"resnet.encoder.stages.{int(parts[0][5:]) - 1}.layers.{parts[1]}"
    if parts[2] == "downsample":
        return ".".join([place, "shortcut", ("convolution", "normalization")[int(parts[3])], *parts[4:]])
    number = int(parts[2][-1]) - 1
    return ".".join([f"{place}.layer.{number}", kinds[parts[2][:-1]], *parts[3:]])


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, 97) for name in ("resnet50_v1", "resnet101_v1", "resnet152_v1")),
        *(pytest.param(name, 224, marks=pytest.mark.long) for name in ("resnet50_v1", "resnet101_v1", "resnet152_v1")),
    ],
)
def test_v1_against_transformers(name, size):
    spec = variant(name)
    theirs = transformers_net(spec)
    state = random_state(bare(lambda: ResNet(plan(spec))), seed_of(name))
    theirs.load_state_dict({transformers_key(key): value for key, value in state.items()}, assign=True)
    x = picture(1, 3, size, size)
    wanted = theirs.double().eval()(x).logits
    assert relative_error(ours(spec, size, state)(x), wanted) <= TOLERANCE
    # The stride's place is in no key: the same state in v1.5 is another function.
    assert relative_error(ours(replace(spec, stride_at="conv2"), size, state)(x), wanted) > 1e-3


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("resnet50", {"stride_at": "conv1"}),
        ("resnet50", {"anti_alias": "avg"}),
        ("resnet50", {"anti_alias": "blur"}),
        ("resnet50", {"norm_eps": 1e-3}),
        ("resnet50", {"activation": "silu"}),
        ("resnet50", {"attention": "se"}),
        ("resnet50", {"attention": "eca"}),
        ("resnet50", {"shortcut": "avg"}),
        ("resnet50", {"shortcut": "conv3"}),
        ("resnet50", {"shortcut": "none"}),
        ("resnet50", {"norm": "group"}),
        ("resnet50", {"stem": {"pool": "max_ceil"}}),
        ("resnet50", {"stem": {"pool": "none"}}),
        ("resnet50", {"stage": {"groups": 2}}),
        ("resnet50", {"stage": {"stride": 1}}),
        ("resnet50", {"stage": {"stride_block": "last"}}),
        ("resnet50", {"stage": {"dilation": 2}}),
        ("resnet50", {"stage": {"first_dilation": 2}}),
        ("resnet50", {"head": {"pools": ("max",)}}),
        ("resnet50d", {"shortcut": "conv1"}),
        ("resnet18d", {"shortcut": "conv1"}),
        ("resnext50_32x4d", {"stage": {"groups": 16}}),
        ("seresnet50", {"attention": "none"}),
        ("seresnet50", {"attention_ratio": 0.25}),
        ("ecaresnet50t", {"attention": "se"}),
        ("ecaresnet50t", {"attention": "none"}),
        ("resnetaa50", {"anti_alias": "none"}),
        ("resnetaa50", {"anti_alias": "blur"}),
        ("resnetaa34d", {"anti_alias": "none"}),
        ("resnetblur50", {"anti_alias": "avg"}),
        ("resnetrs50", {"stem": {"pool": "max"}}),
        ("resnetaa50", {"stem": {"stride": 1}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{key}={value[key]}" for key in value),
)
def test_mutations_fail(name, change):
    """Any part of the spec changed on our side shows: weights that do not fit, or another function."""
    spec = variant(name)
    for part in ("stem", "head"):
        if part in change:
            change = {part: replace(getattr(spec, part), **change[part])}
    if "stage" in change:
        third = replace(spec.stages[2], **change["stage"])
        change = {"stages": (*spec.stages[:2], third, spec.stages[3])}
    theirs = timm_net(name)
    try:
        assert error(theirs, replace(spec, **change), 97) > 1e-4
    except RuntimeError as misfit:
        assert "state_dict" in str(misfit)  # noqa: PT017 - a misfit is one of the two good ends


@torch.inference_mode()
@pytest.mark.parametrize(
    "name", ["resnet18", "resnet26t", "seresnet50", "ecaresnet26t", "resnetaa34d", "resnetrs50", "senet154"]
)
def test_silu_against_timm(name):
    spec, options = trimmed(variant(name))
    assert error(timm_net(name, act_layer="silu", **options), replace(spec, activation="silu"), 97) <= TOLERANCE


@pytest.mark.parametrize("in_channels", [1, 5])
def test_input_channels_and_pooled_features_against_timm(in_channels):
    spec = replace(variant("resnet26d"), in_channels=in_channels, num_classes=0)
    theirs = timm_net("resnet26d", in_chans=in_channels, num_classes=0)
    assert error(theirs, spec, 97) <= TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize("name", ["resnet50", "resnet34d", "resnetaa50d", "resnetrs50"])
@pytest.mark.parametrize("size", [97, 224])
def test_features_against_timm(name, size):
    theirs = timm_net(name)
    state = random_state(theirs)
    theirs.load_state_dict(state, assign=True)
    theirs = theirs.double().eval()
    x = picture(1, 3, size, size)
    maps = ours(name, size, state).features(x)
    wanted = theirs.forward_intermediates(x, intermediates_only=True)
    assert list(maps) == ["stem", "layer1", "layer2", "layer3", "layer4", "last"]
    for found, other in zip(maps.values(), [*wanted, theirs.forward_features(x)], strict=True):
        assert relative_error(found, other) <= TOLERANCE
