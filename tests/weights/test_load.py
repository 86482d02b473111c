"""Loading: everything is loaded or said, nothing is half done, and a file by us describes itself."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from isthmus.arch.plan import plan
from isthmus.arch.preprocess import IMAGENET, Preprocess
from isthmus.arch.spec import HeadSpec, NetSpec, StageSpec, StemSpec
from isthmus.arch.variants import variant
from isthmus.errors import RunError, SpecError, WeightsError
from isthmus.nn.network import ResNet
from isthmus.weights.adapt import adapt_preprocess
from isthmus.weights.files import headers, write
from isthmus.weights.layouts import LAYOUTS, from_native
from isthmus.weights.load import create, load, load_weights, read_network
from isthmus.weights.save import save_weights
from isthmus.weights.source import SCHEMA
from oracles import randomise

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = NetSpec(
    stem=StemSpec(widths=(8,)),
    stages=(StageSpec(depth=1, mid=4, out=16), StageSpec(depth=2, mid=8, out=32, stride=2)),
    num_classes=3,
    name="tiny",
)
PREACT = replace(TINY, stages=tuple(replace(stage, block="preact_bottleneck") for stage in TINY.stages))
GREY = Preprocess(channels="L", mean=(0.4,), std=(0.2,), resize=64, crop=64)


def network(spec=TINY, seed=0):
    return randomise(ResNet(plan(spec, 64)), seed).float()


def state(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(first, second):
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def saved(tmp_path):
    net = network()
    save_weights(net, tmp_path / "a.safetensors")
    return net, tmp_path / "a.safetensors"


# -- files of our own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        TINY,
        replace(TINY, num_classes=0),
        replace(TINY, attention="se", anti_alias="blur"),
        replace(TINY, norm="none", stem=StemSpec(widths=(8,), pool="max_ceil"), stride_at="conv1"),
        replace(PREACT, norm="leading"),
        replace(TINY, head=HeadSpec(taps=("layer1", "last"), pools=("avg", "max"), hidden=6)),
        replace(TINY, dims=1, in_channels=2),
        replace(TINY, shortcut="avg", stem=StemSpec(widths=(4, 4, 8), kernel=3)),
    ],
)
def test_saved_and_loaded(tmp_path, spec):
    net = network(spec)
    net.preprocess, net.classes = replace(IMAGENET, crop=200), ("a", "b", "c")[: spec.num_classes]
    save_weights(net, tmp_path / "a.safetensors", extra={"epoch": 7})
    found, report = read_network(tmp_path / "a.safetensors")
    assert (found.spec, found.preprocess, found.classes) == (net.spec, net.preprocess, net.classes)
    assert same(state(found), state(net))
    assert not found.training
    assert all(parameter.requires_grad for parameter in found.parameters())
    x = torch.randn(2, spec.in_channels, *(64,) * spec.dims)
    torch.testing.assert_close(found(x), net(x))
    assert report.parameters == sum(parameter.numel() for parameter in net.parameters())
    assert report.loaded == tuple(net.state_dict())
    assert (report.assumed, report.computed, report.initialised, report.dropped) == ((), {}, {}, ())
    assert json.loads(headers(tmp_path / "a.safetensors").metadata["isthmus"])["extra"] == {"epoch": 7}


def test_another_layout_is_inverted_on_loading(tmp_path):
    net = network(PREACT)
    save_weights(net, tmp_path / "a.safetensors", layout="timm_resnetv2")
    found, report = read_network(tmp_path / "a.safetensors")
    assert same(state(found), state(net))
    assert report.layout == "timm_resnetv2"


def test_the_first_schema_is_read_for_ever():
    """tests/golden/schema1.safetensors was written once, by schema 1; it is never written again."""
    wanted = json.loads((GOLDEN / "schema1.json").read_text())
    net = load(GOLDEN / "schema1.safetensors")
    x = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64).sin()
    torch.testing.assert_close(net(x)[0], torch.tensor(wanted["logits"]), rtol=1e-4, atol=1e-5)
    assert list(net.classes) == wanted["classes"]
    assert list(net.preprocess.mean) == wanted["mean"]
    assert net.preprocess.interpolation == "bicubic"


def test_a_run_folder(tmp_path, saved):
    net, path = saved
    (tmp_path / "run").mkdir()
    with pytest.raises(RunError, match=r"run has no model\.safetensors; is it a run folder"):
        load(tmp_path / "run")
    path.rename(tmp_path / "run" / "model.safetensors")
    assert same(state(load(tmp_path / "run")), state(net))
    assert load_weights(network(seed=1), tmp_path / "run").parameters


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema": 2}, "it has schema 2 and this isthmus reads up to 1: upgrade isthmus"),
        ({"spec": {"stages": []}}, "at least one stage"),
        ({"spec": {"colour": 1}}, "unknown setting colour"),
        ({"preprocess": {"crop": -1}}, "crop"),
        ({"classes": None}, "cannot be read"),
        ({"classes": ["a"]}, "names 1 classes for 3 outputs"),
        ({"layout": "darknet"}, "no layout 'darknet'"),
    ],
)
def test_descriptions_that_make_no_sense(tmp_path, saved, change, reason):
    net, path = saved
    described = json.loads(headers(path).metadata["isthmus"]) | change
    write(path, net.state_dict(), {"isthmus": json.dumps(described)})
    with pytest.raises(WeightsError, match=reason):
        load(path)
    write(path, net.state_dict(), {"isthmus": "{"})
    with pytest.raises(WeightsError, match="its description cannot be read"):
        load(path)


def test_full_disk_while_saving_leaves_the_old_file(tmp_path, saved, monkeypatch):
    net, path = saved
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot write .*a\.safetensors: No space left on device"):
        save_weights(network(seed=3), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    assert same(state(load(path)), state(net))


def test_classes_that_do_not_count_are_not_saved(tmp_path):
    net = network()
    net.classes = ("a", "b")
    with pytest.raises(WeightsError, match="3 outputs and 2 class names"):
        save_weights(net, tmp_path / "a.safetensors")


def test_blocks_of_the_callers_own(tmp_path):
    class Own(nn.Sequential):
        def __init__(self, width, mid, stride, downsample):
            super().__init__(nn.Conv2d(width, 16 if mid == 4 else 32, 3, stride, padding=1))

    spec = replace(TINY, stages=tuple(replace(stage, block="own") for stage in TINY.stages))
    net = randomise(ResNet(plan(spec), blocks={"own": Own})).float()
    save_weights(net, tmp_path / "a.safetensors")
    assert same(state(load(tmp_path / "a.safetensors", blocks={"own": Own})), state(net))
    with pytest.raises(SpecError, match="asks for a block 'own'"):
        load(tmp_path / "a.safetensors")


# -- bare state dicts ------------------------------------------------------------------------------------------------


def test_a_bare_state_dict_names_no_network(tmp_path):
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "a.pth")
    with pytest.raises(WeightsError) as raised:
        load(tmp_path / "a.pth")
    text = str(raised.value)
    assert "resnet50, resnet50_v1, resnet50_keras, resnetaa50, resnetblur50" in text
    assert "Say it with --arch resnet50, in Python arch='resnet50'" in text


def test_candidates_of_a_foreign_layout_and_of_no_network(tmp_path):
    torch.save(timm.create_model("resnetv2_50d", num_classes=7, in_chans=1).state_dict(), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"fit resnetv2_50d\. Say it"):
        load(tmp_path / "a.pth")
    torch.save(network().state_dict(), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="no network of the table has its names and shapes"):
        load(tmp_path / "a.pth")


def test_a_bare_state_dict_and_what_it_is_for(tmp_path):
    theirs = timm.create_model("resnet10t", num_classes=7, in_chans=1)
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    net, report = read_network(tmp_path / "a.pth", arch="resnet10t")
    assert (net.spec.num_classes, net.spec.in_channels, net.training) == (7, 1, False)
    x = torch.randn(1, 1, 33, 33)
    torch.testing.assert_close(net(x), theirs.eval()(x))
    assert "activation relu" in report.assumed
    assert load(tmp_path / "a.pth", arch=variant("resnet10t"), num_classes=2, dims=1).fc.out_features == 2
    torch.save({name: item for name, item in theirs.state_dict().items() if "fc" not in name}, tmp_path / "b.pth")
    assert load(tmp_path / "b.pth", arch="resnet10t").spec.num_classes == 0
    with pytest.raises(WeightsError, match=r"does not fit resnet18: .*they fit resnet10t"):
        load(tmp_path / "a.pth", arch="resnet18")


def test_a_network_that_its_layout_decides(tmp_path):
    """Keras has one network of these names and shapes; its stride place, epsilon and preprocessing never vary."""
    spec = replace(variant("resnet50_keras"), num_classes=5, in_channels=1)
    with torch.device("meta"):
        shapes = ResNet(plan(spec)).state_dict()
    tensors = {name: torch.rand(item.shape).half() for name, item in shapes.items() if item.is_floating_point()}
    write(tmp_path / "a.safetensors", from_native(tensors, "keras", spec).tensors, {})
    net, report = read_network(tmp_path / "a.safetensors")
    assert net.spec == spec
    assert torch.equal(net.layer3[0].conv2.weight, tensors["layer3.0.conv2.weight"].float())
    assert any("resnet50_keras, as layout keras has one network" in note for note in report.notes)
    assert report.assumed == ()
    assert net.preprocess == adapt_preprocess(LAYOUTS["keras"].preprocess, 1)
    report = load_weights(create(spec), tmp_path / "a.safetensors")
    assert report.assumed == ()


def test_what_a_layout_says_is_not_assumed(tmp_path):
    net = network(replace(TINY, stages=tuple(replace(stage, out=4 * stage.mid) for stage in TINY.stages)))
    write(tmp_path / "a.safetensors", from_native(net.state_dict(), "transformers", net.spec).tensors, {})
    report = load_weights(network(net.spec, 1), tmp_path / "a.safetensors")
    assert report.assumed == ("stride on the 3×3", "preprocessing")


def test_what_keys_cannot_say_is_assumed_and_said(tmp_path):
    torch.save(network().state_dict(), tmp_path / "a.pth")
    report = load_weights(network(replace(TINY, stride_at="conv1"), 1), tmp_path / "a.pth")
    assert report.assumed[0] == "stride on the first 1×1"
    assert "preprocessing" in report.assumed
    assert "assumed, as the source cannot say: stride on the first 1×1" in str(report)


def test_old_files_without_batch_counters_and_half_precision(tmp_path):
    tensors = {name: item.half() for name, item in network().state_dict().items() if "num_batches" not in name}
    torch.save({"state_dict": {f"module.{name}": item for name, item in tensors.items()}}, tmp_path / "a.pth")
    net = network(seed=1)
    report = load_weights(net, tmp_path / "a.pth")
    assert net.fc.weight.dtype == torch.float32
    assert torch.equal(net.fc.weight, tensors["fc.weight"].float())
    assert report.notes[:2] == ("tensors taken from 'state_dict'", "prefix 'module.' removed")
    assert all(name.endswith("num_batches_tracked") for name in report.initialised)
    assert int(net.bn1.num_batches_tracked) == 0


def test_values_that_are_not_finite_are_noted(tmp_path):
    tensors = state(network())
    tensors["bn1.weight"][3] = float("nan")
    tensors["fc.bias"][0] = float("inf")
    torch.save(tensors, tmp_path / "a.pth")
    notes = load_weights(network(), tmp_path / "a.pth").notes
    assert notes == ("warning: 2 tensors hold values that are not finite: bn1.weight, fc.bias",)


# -- strictness ------------------------------------------------------------------------------------------------------


def spoil(change):
    tensors = state(network())
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (spoil(lambda t: t.pop("layer1.0.conv2.weight")), r"1 tensors missing \(layer1\.0\.conv2\.weight\)"),
        (spoil(lambda t: t.update(extra=torch.ones(1))), r"1 tensors unexpected \(extra\)"),
        (
            spoil(lambda t: t.update({"bn1.bias": torch.ones(9)})),
            r"1 tensors of another shape \(bn1\.bias is \(9,\) and must be \(8,\)\)",
        ),
        (
            spoil(lambda t: t.update({"bn1.bias": torch.ones(8, dtype=torch.int8)})),
            r"1 tensors of another kind \(bn1\.bias is torch\.int8\)",
        ),
        (
            spoil(lambda t: t.update({"fc.weight": torch.ones(5, 32), "fc.bias": torch.ones(5)})),
            r"\(5, 32\).*\(3, 32\)",
        ),
        (spoil(lambda t: (t.pop("fc.weight"), t.pop("fc.bias"))), "its classifier is absent"),
        (
            spoil(lambda t: t.update({"conv1.weight": torch.ones(8, 1, 7, 7)})),
            "takes 1 input channels and the network 3",
        ),
        (state(network(replace(TINY, attention="se"))), r"6 tensors unexpected|12 tensors unexpected"),
    ],
)
def test_what_does_not_fit_is_an_error_and_nothing_is_written(tmp_path, tensors, reason):
    torch.save(tensors, tmp_path / "a.pth")
    net = network(seed=1)
    before = state(net)
    with pytest.raises(WeightsError, match=f"does not fit.*{reason}"):
        load_weights(net, tmp_path / "a.pth")
    assert same(state(net), before)


def test_many_faults_are_counted_and_the_right_network_is_named(tmp_path):
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "a.pth")
    with pytest.raises(WeightsError) as raised:
        load_weights(create("resnet18"), tmp_path / "a.pth")
    assert "96 tensors unexpected (layer1.2.conv1.weight, layer1.2.bn1.weight, layer1.2.bn1.bias and 93 more)" in str(
        raised.value
    )
    assert str(raised.value).endswith("they fit resnet34")


def test_another_network_is_named_before_its_classifier(tmp_path, saved):
    other = replace(TINY, stages=(TINY.stages[0],), num_classes=5)
    torch.save(network(other).state_dict(), tmp_path / "b.pth")
    with pytest.raises(WeightsError, match="does not fit tiny: 42 tensors missing"):
        load_weights(network(), tmp_path / "b.pth")
    with pytest.raises(WeightsError, match=r"42 tensors unexpected .*; they fit tiny"):
        load_weights(network(replace(other, name="other")), saved[1])


def test_tensors_that_the_caller_names_are_ignored(tmp_path):
    torch.save(spoil(lambda t: t.update({"aux.weight": torch.ones(1)})), tmp_path / "a.pth")
    assert load_weights(network(), tmp_path / "a.pth", ignore=("aux.",)).dropped == ("aux.weight",)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"head": "fresh"}, "head is 'fresh'; known: 'keep', 'adapt', 'new'"),
        ({"adapt_dims": "center"}, "adapt_dims is 'center'; known: None, 'mean', 'centre'"),
    ],
)
def test_unknown_exceptions(saved, options, reason):
    _, path = saved
    with pytest.raises(WeightsError, match=reason):
        load_weights(network(), path, **options)


def test_unknown_references():
    with pytest.raises(WeightsError, match="there is no file nowhere, and no published weights of that name; `isthmus"):
        load("nowhere")


# -- adapting --------------------------------------------------------------------------------------------------------


def test_a_new_head(saved):
    before, path = saved
    net, report = read_network(path, num_classes=7)
    assert net.fc.weight.shape == (7, 32)
    assert report.initialised == dict.fromkeys(["fc.weight", "fc.bias"], "a new classifier for 7 classes instead of 3")
    assert report.dropped == ("fc.weight", "fc.bias")
    assert "fc.weight" not in report.loaded
    assert torch.equal(net.conv1.weight, before.conv1.weight)
    assert read_network(path, num_classes=3)[1].initialised == {}
    assert not load(path, num_classes=3, head="new").fc.bias.any()
    kept = network(seed=1)
    report = load_weights(kept, path, head="new")
    assert report.initialised
    assert not kept.fc.bias.any()


def test_classes_go_with_the_head(tmp_path):
    net = network()
    net.classes = ("a", "b", "c")
    save_weights(net, tmp_path / "a.safetensors")
    assert load(tmp_path / "a.safetensors").classes == ("a", "b", "c")
    assert load(tmp_path / "a.safetensors", num_classes=2).classes == ()
    features, report = read_network(tmp_path / "a.safetensors", num_classes=0)
    assert features.classes == ()
    assert set(report.dropped) == {"fc.weight", "fc.bias"}
    assert features(torch.randn(1, 3, 64, 64)).shape == (1, 32)


def test_other_input_channels(saved):
    before, path = saved
    net, report = read_network(path, in_channels=1)
    torch.testing.assert_close(net.conv1.weight, before.conv1.weight.sum(1, keepdim=True))
    assert report.computed == {
        "conv1.weight": "3 to 1 input channels, their sum: the same response to channels equal after normalisation"
    }
    assert "conv1.weight" not in report.loaded
    assert net.preprocess.channels == "L"
    grey = torch.randn(1, 1, 64, 64)
    torch.testing.assert_close(net(grey), before(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    assert "no preprocessing is known for 5 channels" in str(read_network(path, in_channels=5)[1])


def test_create_adapts_to_what_it_is_told(saved):
    _, path = saved
    net = create(TINY, num_classes=9, in_channels=4, weights=path)
    assert (net.spec.num_classes, net.spec.in_channels, net.fc.out_features) == (9, 4, 9)
    with pytest.raises(WeightsError, match="its classifier"):
        create(replace(TINY, num_classes=9), weights=path)


def test_create():
    net = create("resnet18", num_classes=0)
    assert net(torch.randn(1, 3, 64, 64)).shape == (1, 512)
    assert create(TINY, in_channels=1).conv1.in_channels == 1
    with pytest.raises(SpecError, match="did you mean"):
        create("resnet51")


def test_a_source_that_knows_its_network_must_be_of_the_same_kind(saved):
    _, path = saved
    with pytest.raises(WeightsError, match="stride_at is conv2 there and conv1 here"):
        load_weights(network(replace(TINY, stride_at="conv1")), path)
    with pytest.raises(WeightsError, match=r"demo is for another network: stem .*'max_ceil'.*norm is none there"):
        load_weights(create("resnet50"), "demo")
    assert load_weights(network(replace(TINY, drop_path=0.1)), path).notes == ()
    dilated = replace(TINY, stages=(TINY.stages[0], replace(TINY.stages[1], stride=1, dilation=2)))
    assert load_weights(network(dilated), path).notes[0].startswith("layer2 has {'stride': 1,")


def test_the_demo_with_a_report():
    net, report = read_network("demo", num_classes=5)
    assert (report.layout, report.source, net.spec.stem.pool) == ("onnx", "demo", "max_ceil")
    assert report.parameters == sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in net.fc.parameters())
    text = str(report)
    for part in (
        "demo (onnx): 106 of 108 tensors as they are",
        "trained to moderate images",
        "BSD-2-Clause",
        "5 classes instead of 2",
    ):
        assert part in text
    into = create(replace(net.spec, num_classes=2))
    load_weights(into, "demo")
    assert into.preprocess.channels == "BGR"
    assert into.classes == ("sfw", "nsfw")


# -- networks in memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("resnet18", torchvision.models.resnet18),
        ("resnet50", torchvision.models.resnet50),
        ("resnet10t", lambda: timm.create_model("resnet10t")),
        ("test_resnet", lambda: timm.create_model("test_resnet")),
        ("resnet26d", lambda: timm.create_model("resnet26d")),
        ("ecaresnet26t", lambda: timm.create_model("ecaresnet26t")),
        ("resnetblur18", lambda: timm.create_model("resnetblur18")),
        ("resnetv2_50", lambda: timm.create_model("resnetv2_50")),
    ],
)
def test_adopted_networks_compute_the_same(name, make):
    theirs = make().train()
    net = create(name)
    report = load_weights(net, theirs)
    assert theirs.training, "the network was changed by being adopted"
    x = torch.randn(1, 3, 97, 97)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x), theirs.eval()(x), rtol=1e-3, atol=1e-4)
    assert report.parameters == sum(p.numel() for p in theirs.parameters())
    assert "tried on random parameters" in report.notes[-1]
    if type(theirs).__module__.startswith("timm"):
        said = timm.data.resolve_model_data_config(theirs)
        assert (net.preprocess.mean, net.preprocess.std) == (said["mean"], said["std"])
        assert (net.preprocess.crop, net.preprocess.interpolation) == (said["input_size"][1], said["interpolation"])
        assert net.preprocess.resize == int(said["input_size"][1] / said["crop_pct"])  # down, as timm does
    assert report.assumed == (() if type(theirs).__module__.startswith("timm") else ("preprocessing",))


def refused(net, module, reason):
    before = state(net)
    with pytest.raises(WeightsError, match=reason):
        load_weights(net, module)
    assert same(state(net), before)


def test_other_functions_with_equal_tensors_are_refused():
    fits = "fit, but it computes something else"
    spec = variant("resnet14t")
    theirs = timm.create_model("resnet14t")
    v1 = create(replace(spec, stride_at="conv1"))
    refused(v1, theirs, rf"{fits}: layer2\.0\.conv1 has stride \(1, 1\) there and \(2, 2\) here.*with_output_stride")
    dilated = timm.create_model("resnet14t", output_stride=16)
    refused(create(spec), dilated, rf"{fits}: layer4\.0\.conv2 has stride \(1, 1\) there and \(2, 2\) here")
    load_weights(create(spec.with_output_stride(16)), dilated)
    refused(create(replace(spec, anti_alias="avg")), theirs, fits)
    refused(create(replace(spec, activation="silu")), theirs, "something else")
    refused(create(replace(spec, norm_eps=1e-3)), theirs, r"conv1\.1 has eps 1e-05 there and 0\.001 here")


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net, "maxpool", nn.MaxPool2d(3, 2, ceil_mode=True)),
        lambda net: setattr(net.layer1[0], "relu", nn.SiLU()),
        lambda net: setattr(net, "avgpool", nn.AdaptiveMaxPool2d(1)),
    ],
)
def test_what_no_layer_tells_is_found_by_trying(change):
    theirs = torchvision.models.resnet18()
    change(theirs)
    refused(create("resnet18"), theirs, "something else .relative difference .*likely another stride place")


def test_modules_that_are_no_such_network():
    refused(create("resnet18"), torchvision.models.squeezenet1_1(), "in no layout known here")
    theirs = torchvision.models.resnet18()
    theirs.forward = None
    refused(create("resnet18"), theirs, "cannot be tried on a 97 px picture")


def test_adopting_adapts_too():
    theirs = timm.create_model("resnet10t", num_classes=10)
    report = load_weights(create("resnet10t", num_classes=4, in_channels=1), theirs, head="adapt", adapt_input=True)
    assert set(report.computed) == {"conv1.0.weight"}
    assert set(report.initialised) == {"fc.weight", "fc.bias"}
    theirs = torchvision.models.resnet18()
    theirs.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 5))
    report = load_weights(create("resnet18"), theirs, head="new")
    assert report.dropped == ("fc.1.weight", "fc.1.bias")


def test_adopting_one_of_ours():
    theirs = network()
    theirs.preprocess, theirs.classes = replace(IMAGENET, crop=200), ("a", "b", "c")
    net = network(seed=1)
    load_weights(net, theirs)
    assert same(state(net), state(theirs))
    assert (net.preprocess, net.classes) == (theirs.preprocess, theirs.classes)
    refused(network(replace(TINY, stride_at="conv1")), theirs, "stride_at")


class Allocated(TorchDispatchMode):
    """The storages that operations bring into being, by address; they are kept, so that none is used again."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else [result]:
            if isinstance(item, torch.Tensor) and item.device.type == "cpu":
                self.storages[item.untyped_storage().data_ptr()] = item.untyped_storage()
        return result


@pytest.mark.parametrize("into", [False, True])
def test_no_tensor_of_a_file_is_held_twice(tmp_path, into):
    net = create("resnet18")
    save_weights(net, tmp_path / "a.safetensors")
    size = sum(tensor.nbytes for tensor in net.state_dict().values())
    own = {tensor.untyped_storage().data_ptr() for tensor in net.state_dict().values()}
    with Allocated() as allocated:
        load_weights(net, tmp_path / "a.safetensors") if into else load(tmp_path / "a.safetensors")
    found = sum(storage.nbytes() for address, storage in allocated.storages.items() if address not in own)
    assert size <= found <= 1.02 * size


def test_what_weights_bring_is_not_drawn(saved):
    _, path = saved
    before = torch.get_rng_state()
    create(TINY, weights=path)
    assert torch.equal(torch.get_rng_state(), before)
    create(TINY, weights=path, num_classes=2)
    assert not torch.equal(torch.get_rng_state(), before)


def test_parameters_share_no_memory(tmp_path):
    tensors, flat = state(network()), torch.rand(12)
    tensors |= {"bn1.bias": tensors["bn1.weight"], "layer1.0.bn1.weight": flat[:4], "layer1.0.bn1.bias": flat[2:6]}
    torch.save(tensors, tmp_path / "a.pth")
    theirs = network()
    for net in (create(TINY, weights=tmp_path / "a.pth"), create(TINY, weights=theirs)):
        every = (*net.state_dict().values(), *theirs.state_dict().values())
        assert len({tensor.untyped_storage().data_ptr() for tensor in every}) == len(every)
        assert net.training


def test_loading_keeps_the_parameters_that_an_optimiser_holds(saved):
    _, path = saved
    net = network(seed=1)
    before = {name: id(parameter) for name, parameter in net.named_parameters()}
    load_weights(net, path)
    assert before == {name: id(parameter) for name, parameter in net.named_parameters()}
    assert SCHEMA == 1


def test_a_state_dict_loads_as_a_file_of_it_does(tmp_path):
    tensors = torchvision.models.resnet18().state_dict()
    net, other = create("resnet18"), create("resnet18")
    report = load_weights(net, {"state_dict": tensors})
    torch.save(tensors, tmp_path / "a.pth")
    load_weights(other, tmp_path / "a.pth")
    assert same(state(net), state(other))
    assert report.source == "the state dict"


def test_what_is_none_of_ours_or_no_weights_is_said():
    theirs = torchvision.models.resnet18()
    with pytest.raises(WeightsError, match=r"torchvision\.models\.resnet\.ResNet is no network of ours"):
        load_weights(theirs, theirs.state_dict())
    with pytest.raises(WeightsError, match=r"is no network of ours; make one of it: create"):
        save_weights(theirs, "never.safetensors")
    with pytest.raises(WeightsError, match="and not a NoneType"):
        load_weights(create("resnet18"), None)


def test_ignore_takes_one_name_or_many_and_every_one_must_be_there():
    tensors = dict(torchvision.models.resnet18().state_dict(), **{"aux.weight": torch.ones(1)})
    for ignore in ("aux.", ["aux."], ("aux.",)):
        assert load_weights(create("resnet18"), tensors, ignore=ignore).dropped == ("aux.weight",)
    with pytest.raises(WeightsError, match=r"ignore='fc\.\*' is the beginning of no tensor's name.*layer4\., fc\."):
        load_weights(create("resnet18"), tensors, ignore=("aux.", "fc.*"))


def test_a_spec_file_is_a_network_too(tmp_path):
    (tmp_path / "mine.toml").write_text(TINY.to_toml())
    assert create(str(tmp_path / "mine.toml")).spec == TINY
