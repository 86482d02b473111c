"""The engine and the tables: reversible for every network of the table, found by evidence, and refusing aloud."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision

from isthmus.arch.plan import plan
from isthmus.arch.spec import HeadSpec, NetSpec, StageSpec, StemSpec
from isthmus.arch.variants import variant, variants
from isthmus.errors import WeightsError
from isthmus.nn.network import ResNet
from isthmus.weights.layouts import (
    LAYOUTS,
    carriers,
    detect,
    evidence,
    from_native,
    has,
    preprocess_of,
    to_native,
)
from oracles import bare, trimmed

GOLDEN = Path(__file__).parents[1] / "golden" / "mmpretrain.json"
MMPRETRAIN = json.loads(GOLDEN.read_text(encoding="utf-8"))
COUNTER = "num_batches_tracked"
DEEP = {name for name in variants() if sum(stage.depth for stage in variant(name).stages) > 20}
EVERY = [pytest.param(name, marks=[pytest.mark.long] * (name in DEEP)) for name in variants()]


def numbered(spec):
    """A different value for each tensor of the state dict, in no memory at all."""
    state = bare(lambda: ResNet(plan(spec))).state_dict()
    return {
        name: torch.tensor(float(number)).expand(tensor.shape) for number, (name, tensor) in enumerate(state.items())
    }


@pytest.mark.parametrize("name", EVERY)
def test_there_and_back_is_bit_equal(name):
    """In every layout that has the network, and for the names of timm's: with no name of ours left."""
    spec = variant(name)
    native = numbered(spec)
    for layout in carriers(spec):
        table, given = LAYOUTS[layout], dict(native)
        if table.norm_eps not in (None, spec.norm_eps) and not table.affine_norms:
            continue  # variances are worked out: test_another_epsilon_is_the_same_function
        if table.affine_norms:
            still = {"running_mean": 0.0, "running_var": 1 - spec.norm_eps}
            for key in [key for key in native if key.rpartition(".")[2] in still]:
                given[key] = torch.tensor(still[key.rpartition(".")[2]]).expand(native[key].shape)
        foreign, notes = from_native(given, layout, spec)
        counted = COUNTER in table.leaves["norm"]
        assert detect(foreign) == ("native" if table.same_names else layout)
        assert not notes or table.affine_norms
        back = to_native(foreign, layout, spec).tensors
        wanted = [key for key in given if counted or not key.endswith(COUNTER)]
        assert sorted(back) == sorted(wanted), layout
        assert all(torch.equal(back[key], given[key]) for key in wanted), layout
        if table.same_names:
            assert list(back) == wanted


def test_each_library_has_what_it_builds():
    """The networks of timm by its own list; of the others, those that the tests of names build."""
    for layout, module in (("timm", "resnet"), ("timm_resnetv2", "resnetv2")):
        theirs = {name for name in timm.list_models(module=module) if name in variants()}
        assert {name for name in variants() if layout in carriers(variant(name))} == theirs
    assert {name for name in variants() if "keras" in carriers(variant(name))} == {
        f"resnet{depth}{kind}" for depth in (50, 101, 152) for kind in ("_keras", "_v1")
    }
    listed = {name for name in torchvision.models.list_models() if name in variants()}
    assert listed <= {name for name in variants() if "torchvision" in carriers(variant(name))}
    assert all("native" in carriers(variant(name)) for name in variants())


def mmpretrains(tensors):
    return [f"{key} {'x'.join(map(str, tensor.shape))}" for key, tensor in tensors.items()]


def test_the_networks_of_mmpretrain():
    assert set(MMPRETRAIN["whole"]) == {name for name in variants() if "mmpretrain" in carriers(variant(name))}


@pytest.mark.parametrize("name", MMPRETRAIN["two_blocks"])
def test_names_and_shapes_are_mmpretrains(name):
    lines = MMPRETRAIN["two_blocks"][name]
    spec = variant(name)
    spec = replace(spec, stages=tuple(replace(stage, depth=1) for stage in spec.stages[:2]))
    native = bare(lambda: ResNet(plan(spec))).state_dict()
    assert sorted(mmpretrains(from_native(native, "mmpretrain", spec).tensors)) == sorted(lines)
    trunk = [line.removeprefix("backbone.") for line in lines if not line.startswith("head.")]
    headless = {key: tensor for key, tensor in native.items() if not key.startswith("fc.")}
    found = from_native(headless, "mmpretrain", replace(spec, num_classes=0)).tensors
    assert sorted(mmpretrains(found)) == sorted(trunk)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in DEEP)) for name in MMPRETRAIN["whole"]]
)
def test_names_and_shapes_of_whole_networks_are_mmpretrains(name):
    native = bare(lambda: ResNet(plan(name))).state_dict()
    lines = sorted(mmpretrains(from_native(native, "mmpretrain", variant(name)).tensors))
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == MMPRETRAIN["whole"][name]


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("native", "resnet18"),
        ("timm_resnetv2", "resnetv2_50d"),
        ("transformers", "resnet50"),
        ("detectron2", "resnext50_32x4d"),
        ("detectron2_msra", "resnet50_v1"),
        ("mmpretrain", "seresnet50"),
        ("keras", "resnet50_keras"),
        ("keras_v2", "resnetv2_50_keras"),
    ],
)
def test_evidence(layout, name):
    """A trunk alone, a prefix taken off or put before, and strange tensors beside it change nothing."""
    spec = trimmed(variant(name))[0]
    keys = list(from_native(numbered(spec), layout, spec).tensors)
    table = LAYOUTS[layout]
    trunk = [key.removeprefix(table.prefix) for key in keys if "fc" not in key and "predictions" not in key]
    bare_name = "native" if layout == "mmpretrain" and not any(".se_layer." in key for key in trunk) else layout
    assert detect(keys) == layout
    assert detect(trunk) == bare_name
    for prefix in table.read_prefixes:
        assert detect([prefix + key for key in keys]) == layout
    assert detect([*keys, *(f"proposal_generator.{number}.weight" for number in range(len(keys) // 2))]) == layout
    best, second, *_ = evidence(keys)
    assert (best.layout, best.named, best.total) == (layout, len(keys), len(keys))
    assert not second.whole or second.named < best.named
    assert str(best) == f"{layout} ({len(keys)} of {len(keys)} names)"


def test_a_trunk_of_mmpretrain_without_prefix_is_ours_where_the_names_are():
    for name, found in (("resnet18", "native"), ("resnet18d", "mmpretrain"), ("seresnet50", "mmpretrain")):
        spec = replace(trimmed(variant(name))[0], num_classes=0)
        assert detect(from_native(numbered(spec), "mmpretrain", spec).tensors) == found


def test_what_cannot_be_told():
    with pytest.raises(WeightsError, match=r"in no layout known here \(native, torchvision, timm, .*\): a, b"):
        detect(["a", "b"])
    with pytest.raises(WeightsError, match="in no layout known here"):
        detect(["conv1.weight", "fc.weight"])  # of a stem and a classifier alone
    v1, v2 = (trimmed(variant(name))[0] for name in ("resnet50_v1", "resnet50"))
    first = list(from_native(numbered(v1), "detectron2_msra", v1).tensors)
    second = [key for key in from_native(numbered(v2), "transformers", v2).tensors if COUNTER not in key]
    with pytest.raises(
        WeightsError, match=r"may be in the layouts transformers \((\d+) of \d+ names\), detectron2_msra \(\1 of"
    ):
        detect([*first, *second[: len(first)]])


def test_one_tensor_twice():
    spec = trimmed(variant("resnet50_v1"))[0]
    foreign = from_native(numbered(spec), "detectron2_msra", spec).tensors
    foreign["pred_w"] = foreign["fc1000_w"]
    with pytest.raises(WeightsError, match=r"two tensors are fc\.weight in layout detectron2_msra, one of them pred_w"):
        to_native(foreign, "detectron2_msra", spec)


@pytest.mark.parametrize(
    ("layout", "name", "reason"),
    [
        ("transformers", "seresnet50", "attention is se here and none there"),
        ("transformers", "resnext50_32x4d", "groups is 32 here and 1 there; expansion is 2.0 here and 4 there"),
        ("transformers", "resnet50d", r"stem is three 3×3/2 max here and 7×7/2 max there.*shortcut is avg here"),
        ("detectron2", "resnetv2_50", "block is preact_bottleneck here and basic or bottleneck there"),
        ("detectron2_msra", "resnet50", "stride place is conv2 here and conv1 there"),
        ("detectron2_msra", "resnet50_gn", "norm is group here and batch there"),
        ("mmpretrain", "ecaresnet50d", "attention is eca here and none or se there"),
        ("mmpretrain", "seresnet18", "attention is se in basic blocks here"),
        ("mmpretrain", "resnet50t", "tiered stem is True here and False there"),
        ("keras", "resnet50", "stride place is conv2 here and conv1 there; layouts that have: native, torchvision"),
        ("keras_v2", "resnetv2_50", "shortcut is conv1 here and maxpool there"),
        ("torchvision", "resnetblur50", "anti-aliasing is blur here and none there"),
        ("torchvision", "resnet50_v1", "stride place is conv1 here"),
        ("timm", "resnetv2_50", r"block is preact.*layouts that have: native, timm_resnetv2$"),
        ("timm_resnetv2", "resnet50", "block is bottleneck here and preact_bottleneck there"),
        ("timm", "resnet20_cifar", "stem is 3×3/1 none here"),
    ],
)
def test_what_a_library_does_not_have_is_refused_both_ways(layout, name, reason):
    for translate in (to_native, from_native):
        with pytest.raises(WeightsError, match=rf"layout {layout} has no network like {name}: .*{reason}"):
            translate({}, layout, variant(name))


@pytest.mark.parametrize("name", ["resnet50", "resnetv2_50", "resnetv2_50_keras"])
def test_a_folded_network_is_ours_alone(name):
    spec = variant(name)
    folded = replace(spec, norm="leading" if spec.preact else "none")
    assert [layout for layout in LAYOUTS if has(layout, folded)] == ["native"]
    assert len([layout for layout in LAYOUTS if has(layout, spec)]) > 1


def test_writing_refuses_what_reading_leaves_to_the_network():
    """A trunk of other stride, dimensions or head takes a file's tensors; a file of that trunk would lie."""
    spec = variant("resnet50_keras")
    elastic = {
        "dims is 1": replace(spec, dims=1),
        "dilation is 2": spec.with_output_stride(16),
        "head is of its own": replace(spec, head=HeadSpec(hidden=8)),
    }
    for reason, changed in elastic.items():
        assert to_native({}, "keras", changed).tensors == {}
        with pytest.raises(WeightsError, match=reason):
            from_native({}, "keras", changed)


def test_unknown_layouts_and_names():
    with pytest.raises(WeightsError, match="there is no layout 'darknet'; known: native, torchvision, timm, transf"):
        to_native({}, "darknet", variant("resnet50"))
    with pytest.raises(WeightsError, match=r"transformers has no name for extra\.weight; use layout='native'"):
        from_native({"extra.weight": torch.ones(1)}, "transformers", variant("resnet50"))


def test_the_classifier_of_a_file_is_found_whatever_head_the_network_has():
    spec = trimmed(variant("resnet18"))[0]
    foreign = from_native(numbered(spec), "transformers", spec).tensors
    for changed in (replace(spec, num_classes=0), replace(spec, head=HeadSpec(hidden=8))):
        assert {"fc.weight", "fc.bias"} <= set(to_native(foreign, "transformers", changed).tensors)


def test_a_bias_that_no_norm_reads_is_not_lost():
    """It stays where loading finds it and says that it has no place."""
    spec, bias = trimmed(variant("resnetv2_50"))[0], torch.ones(64)
    foreign = from_native(numbered(spec), "timm_resnetv2", spec).tensors | {"stem.conv.bias": bias}
    found, notes = to_native(foreign, "timm_resnetv2", spec)
    assert found["conv1.bias"] is bias
    assert notes == ()


def test_values_survive_the_change_of_the_classifier_bit_for_bit():
    spec = replace(variant("resnetv2_50"), num_classes=7)
    weight = torch.randn(7, 2048)
    foreign = from_native({"fc.weight": weight}, "timm_resnetv2", spec).tensors
    assert foreign["head.fc.weight"].shape == (7, 2048, 1, 1)
    assert torch.equal(to_native(foreign, "timm_resnetv2", spec).tensors["fc.weight"], weight)


def test_names_that_are_ours_pass_as_they_are():
    for net in (torchvision.models.resnet18(), timm.create_model("resnet10t"), timm.create_model("test_resnet")):
        assert detect(net.state_dict()) == "native"
    tensors = {"conv1.weight": torch.ones(1), "mine.gate": torch.ones(1)}
    own = NetSpec(stages=(StageSpec(depth=1, mid=8, out=8, block="my_own"),), stem=StemSpec(widths=(8,)))
    assert to_native(tensors, "native", own) == from_native(tensors, "native", own) == (tensors, ())


def test_kernels_of_keras_lie_the_other_way_round():
    spec = variant("resnet50_keras")
    kernel = torch.arange(2 * 3 * 64 * 64.0).reshape(64, 64, 3, 2)  # sides apart, so that they cannot be mixed up
    dense = torch.randn(5, 2048)
    foreign = from_native({"layer1.0.conv2.weight": kernel, "fc.weight": dense}, "keras", spec).tensors
    found = foreign["conv2_block1_2_conv/kernel"]
    assert found.shape == (3, 2, 64, 64)
    assert found[1, 0, 5, 9] == kernel[9, 5, 1, 0]
    assert torch.equal(foreign["conv2_block1_2_conv/bias"], torch.zeros(64))
    assert torch.equal(foreign["predictions/kernel"], dense.T)
    assert to_native(foreign, "keras", spec).tensors["layer1.0.conv2.weight"].is_contiguous()


def test_preprocessing_that_all_weights_of_a_layout_share():
    caffe = preprocess_of("keras", variant("resnet50_keras"))
    assert (caffe.channels, caffe.crop) == ("BGR", 224)
    assert [round(255 * mean, 3) for mean in caffe.mean] == [103.939, 116.779, 123.68]
    assert [255 * std for std in caffe.std] == [1, 1, 1]
    msra = preprocess_of("detectron2_msra", variant("resnet50_v1"))
    assert [round(255 * mean, 3) for mean in msra.mean] == [103.53, 116.28, 123.675]
    assert preprocess_of("detectron2_msra", variant("resnext101_32x8d")) is None
    assert preprocess_of("keras_v2", variant("resnetv2_50_keras")).mean == (0.5, 0.5, 0.5)
    assert preprocess_of("timm", variant("resnet50")) is None
