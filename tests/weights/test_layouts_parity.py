"""Networks of torchvision, timm and transformers compute the same from the same tensors, in both directions."""

from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel

from isthmus.arch.plan import plan
from isthmus.arch.spec import StemSpec
from isthmus.arch.variants import variant, variants
from isthmus.nn.network import ResNet
from isthmus.weights.layouts import carriers, detect, from_native, to_native
from oracles import bare, ours, picture, random_state, randomise, relative_error, seed_of, small, timm_net, trimmed

TOLERANCE = 1e-8
TRANSFORMERS = [name for name in variants() if "transformers" in carriers(variant(name))]
TORCHVISION = [name for name in variants() if "torchvision" in carriers(variant(name))]
TIMM_RESNETV2 = [name for name in variants() if "timm_resnetv2" in carriers(variant(name))]


def each(names):
    """Names of networks; those of more than 20 blocks, whose names only go on, are for `make test-all`."""
    deep = {name for name in names if sum(stage.depth for stage in variant(name).stages) > 20}
    return [pytest.param(name, marks=[pytest.mark.long] * (name in deep)) for name in names]


def transformers_net(spec, kind=ResNetForImageClassification):
    config = ResNetConfig(
        num_channels=spec.in_channels,
        embedding_size=spec.stem.widths[0],
        hidden_sizes=[stage.out for stage in spec.stages],
        depths=[stage.depth for stage in spec.stages],
        layer_type=spec.stages[0].block,
        downsample_in_first_stage=spec.stages[0].stride == 2,
        downsample_in_bottleneck=spec.stride_at == "conv1",
        num_labels=spec.num_classes,
    )
    return bare(lambda: kind(config))


def torchvision_net(spec):
    resnet = torchvision.models.resnet
    first = spec.stages[0]
    norm = {"batch": None, "group": lambda width: torch.nn.GroupNorm(32, width)}[spec.norm]
    return bare(
        lambda: resnet.ResNet(
            resnet.BasicBlock if first.block == "basic" else resnet.Bottleneck,
            [stage.depth for stage in spec.stages],
            groups=first.groups,
            width_per_group=first.mid // first.groups,
            norm_layer=norm,
        )
    )


def sizes(state):
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def logits(output):
    return output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)


def assert_the_same_function(theirs, layout, spec, size=33):
    """Theirs, random, to ours; then ours, random, to theirs."""
    x = picture(1, spec.in_channels, size, size)
    randomise(theirs, seed_of(spec.name))
    found = theirs.state_dict()
    assert detect(found) == ("native" if layout in ("torchvision", "timm") else layout)
    tensors, notes = to_native(found, layout, spec)
    net = ours(spec, size, tensors)
    assert notes == ()
    with torch.inference_mode():
        assert relative_error(net(x), logits(theirs(x))) <= TOLERANCE
        state = random_state(net, seed_of(layout))
        theirs.load_state_dict(from_native(state, layout, spec).tensors, assign=True)
        assert relative_error(ours(spec, size, state)(x), logits(theirs(x))) <= TOLERANCE


@pytest.mark.parametrize("name", each(TORCHVISION))
def test_names_and_shapes_are_torchvisions(name):
    spec = variant(name)
    found = from_native(bare(lambda: ResNet(plan(spec))).state_dict(), "torchvision", spec).tensors
    assert sizes(found) == sizes(torchvision_net(spec).state_dict())


@pytest.mark.parametrize("name", each(TIMM_RESNETV2))
def test_names_and_shapes_are_timms(name):
    """Of the post-activation family, in their order: tests/nn/test_parity.py."""
    found = from_native(bare(lambda: ResNet(plan(name))).state_dict(), "timm_resnetv2", variant(name)).tensors
    assert sizes(found) == sizes(timm_net(name).state_dict())


@pytest.mark.parametrize("name", each(TRANSFORMERS))
def test_names_and_shapes_are_transformers(name):
    spec = variant(name)
    native = bare(lambda: ResNet(plan(spec))).state_dict()
    found = from_native(native, "transformers", spec).tensors
    assert sizes(found) == sizes(transformers_net(spec).state_dict())
    headless = {key: tensor for key, tensor in native.items() if not key.startswith("fc.")}
    found = from_native(headless, "transformers", replace(spec, num_classes=0)).tensors
    assert sizes(found) == sizes(transformers_net(spec, ResNetModel).state_dict())


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet50", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2"],
)
def test_torchvision(name):
    spec, _ = trimmed(variant(name), later=1)
    assert_the_same_function(torchvision_net(spec), "torchvision", spec)


@pytest.mark.parametrize(
    "name",
    ["resnet18d", "resnet26t", "resnext50d_32x4d", "seresnet50", "ecaresnet50t", "resnetaa50d", "resnetrs50"],
)
def test_timm(name):
    spec, options = trimmed(variant(name), later=1)
    assert_the_same_function(timm_net(name, **options), "timm", spec)


@pytest.mark.parametrize("name", ["resnetv2_50", "resnetv2_50d", "resnetv2_50t"])  # of 101 layers they only repeat
def test_timm_resnetv2(name):
    spec, options = trimmed(variant(name), later=1)
    assert_the_same_function(timm_net(name, **options), "timm_resnetv2", spec)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet50_v1"])
def test_transformers(name):
    spec = small(variant(name))
    assert_the_same_function(transformers_net(spec), "transformers", spec)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet50_v1"])
def test_transformers_of_another_shape(name):
    """Three stages, narrow, for one channel and seven classes, the first stage striding too."""
    spec = variant(name)
    stages = tuple(replace(stage, depth=2, mid=stage.mid // 4, out=stage.out // 4, stride=2) for stage in spec.stages)
    spec = replace(spec, stages=stages[:3], stem=StemSpec(widths=(24,)), in_channels=1, num_classes=7)
    assert_the_same_function(transformers_net(spec), "transformers", spec)


@pytest.mark.parametrize(
    ("layout", "make"),
    [
        ("torchvision", lambda: torchvision_net(variant("resnet101"))),
        ("timm", lambda: timm.create_model("resnet101")),
        ("transformers", lambda: transformers_net(variant("resnet101"))),
    ],
)
@pytest.mark.long
def test_whole_networks(layout, make):
    assert_the_same_function(make(), layout, variant("resnet101"), 224)


@pytest.mark.long
def test_a_whole_pre_activation_network():
    assert_the_same_function(timm_net("resnetv2_50"), "timm_resnetv2", variant("resnetv2_50"), 224)


@torch.inference_mode()
def test_a_trunk_of_transformers_without_classifier():
    spec = replace(small(variant("resnet50")), num_classes=0)
    theirs = randomise(transformers_net(spec, ResNetModel))
    assert detect(theirs.state_dict()) == "transformers"
    net = ours(spec, 33, to_native(theirs.state_dict(), "transformers", spec).tensors)
    x = picture(1, 3, 33, 33)
    assert relative_error(net(x), theirs(x).pooler_output.flatten(1)) <= TOLERANCE


@torch.inference_mode()
def test_another_epsilon_is_the_same_function():
    """A network of Keras' epsilon in transformers, whose epsilon is another: its variances make up for it."""
    spec = small(replace(variant("resnet50"), norm_eps=1e-2))
    theirs, x = transformers_net(spec), picture(1, 3, 33, 33)
    state = random_state(bare(lambda: ResNet(plan(spec))))
    foreign, notes = from_native(state, "transformers", spec)
    assert notes == ("variances of 20 norms changed by 0.00999, for epsilon 1e-05",)
    theirs.load_state_dict(foreign, assign=True)
    wanted = theirs.double().eval()(x).logits
    assert relative_error(ours(spec, 33, state)(x), wanted) <= TOLERANCE
    back, notes = to_native(foreign, "transformers", spec)
    assert notes == ("variances of 20 norms changed by -0.00999, for epsilon 0.01",)
    assert relative_error(ours(spec, 33, back)(x), wanted) <= TOLERANCE
    # Without it the difference shows.
    raw = to_native(foreign, "transformers", replace(spec, norm_eps=1e-5)).tensors
    assert relative_error(ours(spec, 33, raw)(x), wanted) > 1e-4


@torch.inference_mode()
@pytest.mark.parametrize(
    ("layout", "name", "change"),
    [
        ("timm_resnetv2", "resnetv2_50", {"stride_at": "conv1"}),
        ("timm_resnetv2", "resnetv2_50", {"stem": StemSpec(pool="max_ceil")}),
        ("timm_resnetv2", "resnetv2_50", {"norm_eps": 1e-2}),
        ("timm_resnetv2", "resnetv2_50", {"activation": "silu"}),
        ("timm_resnetv2", "resnetv2_50d", {"stem": replace(variant("resnetv2_50d").stem, pool="max_ceil")}),
        ("transformers", "resnet50", {"stride_at": "conv1"}),
        ("transformers", "resnet50_v1", {"stride_at": "conv2"}),
        ("transformers", "resnet50", {"norm_eps": 1e-2}),
        ("transformers", "resnet50", {"anti_alias": "blur"}),
        ("transformers", "resnet18", {"stem": StemSpec(pool="max_ceil")}),
    ],
)
def test_mutations_fail(layout, name, change):
    """What the keys cannot say still shows in the outputs, so the parity above proves it."""
    if layout == "timm_resnetv2":
        spec, options = trimmed(variant(name), later=1)
        theirs = timm_net(name, **options)
    else:
        spec = small(variant(name))
        theirs = transformers_net(spec)
    randomise(theirs, seed_of(name))
    state = to_native(theirs.state_dict(), layout, spec).tensors
    x = picture(1, 3, 33, 33)
    assert relative_error(ours(replace(spec, **change), 33, state)(x), logits(theirs(x))) > 1e-4
