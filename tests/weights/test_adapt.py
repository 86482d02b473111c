"""Other input channels, other classes, other dimensions: each by what must stay equal."""

from dataclasses import replace
from itertools import permutations

import pytest
import timm
import torch
from timm.models import adapt_input_conv
from torch import nn
from torch.nn import functional as F

from isthmus.arch.plan import plan
from isthmus.arch.preprocess import IMAGENET, Preprocess
from isthmus.arch.spec import HeadSpec, NetSpec, StageSpec, StemSpec
from isthmus.arch.variants import variant
from isthmus.errors import SpecError, WeightsError
from isthmus.nn.network import ResNet
from isthmus.weights.adapt import adapt_dims, adapt_input, adapt_preprocess
from isthmus.weights.load import create, load, load_weights, read_network
from isthmus.weights.save import save_weights
from oracles import picture, randomise, relative_error, trimmed

TOLERANCE = 1e-8
TINY = NetSpec(
    stem=StemSpec(widths=(8,)),
    stages=(StageSpec(depth=1, mid=4, out=16), StageSpec(depth=2, mid=8, out=32, stride=2)),
    num_classes=4,
    name="tiny",
)
ANIMALS = ("tabby cat", "tiger cat", "tiger shark", "crane")


def network(spec, seed=0):
    return randomise(ResNet(plan(spec, 33)), seed)


def small(name, dims=2):
    """A variant at half its widths and at most two blocks a stage: what it has, in a fraction of the time."""
    spec, _ = trimmed(variant(name))
    stem = replace(spec.stem, widths=tuple(width // 2 for width in spec.stem.widths))
    stages = tuple(
        replace(stage, mid=stage.mid // 2, out=stage.out // 2, reduce=stage.reduce // 2) for stage in spec.stages
    )
    return replace(spec, stem=stem, stages=stages, dims=dims, num_classes=10)


# -- input channels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [1, 3, 4])
@pytest.mark.parametrize("new", range(1, 9))
def test_channels_that_hold_one_map_give_the_same_response(old, new):
    weight = torch.randn(8, old, 7, 7, dtype=torch.float64)
    adapted = adapt_input(weight, new)
    assert adapted.shape == (8, new, 7, 7)
    x = picture(2, 1, 19, 19)
    found, wanted = (F.conv2d(x.expand(-1, part.shape[1], -1, -1), part) for part in (adapted, weight))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("new", [1, 3, 6, 9])
def test_as_timm_where_channels_repeat_whole(new):
    weight = torch.randn(8, 3, 7, 7)
    torch.testing.assert_close(adapt_input(weight, new), adapt_input_conv(new, weight))


@pytest.mark.parametrize("new", [2, 4, 5])
def test_elsewhere_timm_repeats_some_channels_and_keeps_no_response(new):
    weight = torch.randn(8, 3, 7, 7)
    assert (adapt_input_conv(new, weight).sum(1) - weight.sum(1)).abs().max() > 0.1


def test_half_precision_is_summed_in_single():
    weight = torch.randn(8, 3, 7, 7).half()
    assert torch.equal(adapt_input(weight, 1), weight.float().sum(1, keepdim=True))


def test_signals_and_volumes():
    assert adapt_input(torch.randn(8, 3, 7), 5).shape == (8, 5, 7)
    assert adapt_input(torch.randn(8, 3, 7, 7, 7), 2).shape == (8, 2, 7, 7, 7)


def test_preprocessing_follows():
    grey = adapt_preprocess(IMAGENET, 1)
    assert grey is not None
    assert (grey.channels, grey.mean, grey.resize) == ("L", (pytest.approx(0.449, abs=1e-3),), IMAGENET.resize)
    colour = adapt_preprocess(Preprocess(channels="L", mean=(0.5,), std=(0.2,)), 3)
    assert colour is not None
    assert (colour.channels, colour.mean) == ("RGB", (0.5, 0.5, 0.5))
    assert adapt_preprocess(IMAGENET, 3) is IMAGENET
    assert adapt_preprocess(IMAGENET, 5) is None


# -- dimensions ------------------------------------------------------------------------------------------------------


def repeat_padding(net, axes):
    """Let every convolution of `net` pad the first `axes` dimensions by repeating the border instead of with zeros."""

    def pad(module, inputs):
        return F.pad(inputs[0], module.repeats, mode="replicate")

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and any(module.padding):
            dims, size = len(module.padding), module.padding[0]
            module.repeats = (0, 0) * (dims - axes) + (size, size) * axes
            module.padding = (0,) * axes + (size,) * (dims - axes)
            module.register_forward_pre_hook(pad)
    return net


def adapted(net, dims, how="mean"):
    """A network of other dimensions with the weights of `net`."""
    other = ResNet(plan(replace(net.spec, dims=dims), 33)).double().eval()
    load_weights(other, net, adapt_dims=how)
    return other


@torch.inference_mode()
def difference(net, other, *, repeats):
    """Relative error of the logits of two networks, fed one random input that is constant along what one lacks."""
    lesser, larger = sorted((net, other), key=lambda one: one.spec.dims)
    few, many = lesser.spec.dims, larger.spec.dims
    if repeats:
        repeat_padding(larger, many - few)
    x = picture(2, net.spec.in_channels, *(40, 33)[:few])
    wide = x[(slice(None), slice(None), *(None,) * (many - few))].expand(-1, -1, *(9,) * (many - few), *x.shape[2:])
    return relative_error(larger(wide), lesser(x))


KINDS = [
    "resnet18",
    "resnet26",
    "resnet26d",
    "resnet50_v1",
    "resnet50_gn",
    "resnext50_32x4d",
    "seresnet18",
    "ecaresnet26t",
    "resnetv2_50",
    "resnetv2_50d",
    "resnet20_cifar",
    *(pytest.param(name, marks=pytest.mark.long) for name in ("resnetrs50", "senet154", "seresnext50_32x4d")),
]


@pytest.mark.parametrize("how", ["mean", "centre"])
@pytest.mark.parametrize("name", KINDS)
def test_a_clip_of_one_repeated_picture_has_the_pictures_logits(name, how):
    flat = network(small(name))
    assert difference(flat, adapted(flat, 3, how), repeats=how == "mean") <= TOLERANCE


def test_zero_padding_is_seen_by_the_mean():
    flat = network(TINY)
    assert difference(flat, adapted(flat, 3), repeats=False) > 1e-3


@pytest.mark.parametrize(("old", "new"), list(permutations((1, 2, 3), 2)))
@pytest.mark.parametrize("name", ["resnet10t", "ecaresnet26t"])
def test_from_any_dimensions_to_any(name, old, new):
    net = network(small(name, old))
    assert difference(net, adapted(net, new), repeats=True) <= TOLERANCE


@pytest.mark.parametrize("how", ["mean", "centre"])
def test_there_and_back(how):
    flat = network(TINY)
    back = adapted(adapted(flat, 3, how), 2)
    for name, tensor in flat.state_dict().items():
        if how == "centre":
            assert torch.equal(back.state_dict()[name], tensor), name
        torch.testing.assert_close(back.state_dict()[name], tensor)


def test_a_kernel_by_hand():
    weight = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    assert torch.equal(adapt_dims(weight[0], (3, 3), "mean") * 3, weight.expand(1, 1, 3, 3))
    centre = torch.tensor([[[[0.0, 0, 0], [1, 2, 3], [0, 0, 0]]]])
    assert torch.equal(adapt_dims(weight[0], (3, 3), "centre"), centre)
    assert torch.equal(adapt_dims(centre, (3,), "mean"), weight[0])


def test_a_file_for_volumes(tmp_path):
    flat = network(TINY).float()
    flat.preprocess = replace(IMAGENET, crop=200)
    save_weights(flat, tmp_path / "a.safetensors")
    net, report = read_network(tmp_path / "a.safetensors", dims=3, in_channels=1, num_classes=2)
    assert net(torch.zeros(1, 1, 8, 33, 33)).shape == (1, 2)
    assert (net.spec.dims, net.preprocess.channels) == (3, "L")
    wanted = flat.conv1.weight.sum(1, keepdim=True).unsqueeze(2).expand(-1, -1, 7, -1, -1) / 7
    torch.testing.assert_close(net.conv1.weight, wanted)
    how = "2D to 3D, repeated over depth and divided by its size"
    assert report.computed["layer1.0.conv2.weight"] == how
    assert report.computed["conv1.weight"].startswith(f"{how}; 3 to 1 input channels")
    assert {name for name, tensor in net.state_dict().items() if tensor.ndim == 5} == set(report.computed)
    assert f"computed: {how} (layer1.0.conv1.weight, layer1.0.conv2.weight," in str(report)
    assert "its preprocessing is of pictures" in str(report)
    every = [*report.loaded, *report.computed, *report.initialised]
    assert sorted(every) == sorted(net.state_dict())
    signal = create(TINY, dims=1, weights=tmp_path / "a.safetensors").eval()
    assert signal(torch.zeros(1, 3, 100)).shape == (1, 4)


def test_a_network_in_memory_for_volumes():
    theirs = timm.create_model("resnet10t")
    net = create("resnet10t", dims=3)
    report = load_weights(net, theirs, adapt_dims="centre")
    assert any("computes as the network in memory" in note for note in report.notes)
    assert set(report.computed.values()) == {"2D to 3D, in the middle of depth, zeros around"}


def test_dimensions_are_asked_for(tmp_path):
    flat = network(TINY).float()
    net = ResNet(plan(replace(TINY, dims=3)))
    with pytest.raises(WeightsError, match=r"is for 2D inputs and the network for 3D; .*adapt_dims='mean'"):
        load_weights(net, flat)
    torch.save(flat.state_dict(), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"is for 2D inputs and the network for 3D; .*adapt_dims='mean'"):
        load_weights(net, tmp_path / "a.pth")
    save_weights(network(replace(TINY, anti_alias="blur")), tmp_path / "a.safetensors")
    with pytest.raises(SpecError, match="anti-aliasing is defined for pictures"):
        load(tmp_path / "a.safetensors", dims=3)


# -- classes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    net = network(TINY).float()
    net.classes = ANIMALS
    save_weights(net, tmp_path / "a.safetensors")
    return net, tmp_path / "a.safetensors"


@pytest.mark.parametrize(
    ("chosen", "rows"), [(("crane", "tiger cat"), [3, 1]), ((3, 1), [3, 1]), (("tabby cat", 2, "crane"), [0, 2, 3])]
)
def test_rows_of_chosen_classes_stay(saved, chosen, rows):
    before, path = saved
    net, report = read_network(path, classes=chosen)
    x = torch.randn(2, 3, 33, 33)
    torch.testing.assert_close(net(x), before(x)[:, rows])
    assert net.classes == tuple(ANIMALS[row] for row in rows)
    assert net.spec.num_classes == len(rows)
    how = f"rows of {len(rows)} of 4 classes kept: {', '.join(net.classes)}"
    assert report.computed == dict.fromkeys(["fc.weight", "fc.bias"], how)
    assert (report.initialised, report.dropped) == ({}, ())
    other = create(TINY, num_classes=len(rows))
    load_weights(other, path, classes=chosen)
    assert torch.equal(other.fc.weight, net.fc.weight)
    assert other.classes == net.classes


@pytest.mark.parametrize("head", [HeadSpec(hidden=5), HeadSpec(norm=True), HeadSpec(hidden=5, norm=True)])
def test_of_a_deeper_head_the_last_layer_is_cut(tmp_path, head):
    before = network(replace(TINY, head=head)).float()
    save_weights(before, tmp_path / "a.safetensors")
    net, report = read_network(tmp_path / "a.safetensors", classes=(2, 0))
    x = torch.randn(2, 3, 33, 33)
    torch.testing.assert_close(net(x), before(x)[:, [2, 0]])
    assert len(report.computed) == 2
    assert net.classes == ()


def test_a_head_with_a_norm_is_new_where_the_source_has_none(saved):
    _, path = saved
    net = create(replace(TINY, head=HeadSpec(norm=True)))
    report = load_weights(net, path, head="adapt")
    assert set(report.initialised) == {name for name in net.state_dict() if name.startswith("fc.")}
    assert report.dropped == ("fc.weight", "fc.bias")


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        (("crane", "tabby"), r"a.safetensors has no class 'tabby'; did you mean 'tabby cat'\?"),
        (("Tiger",), r"no class 'Tiger'; did you mean 'tiger cat', 'tiger shark'\?"),
        (("cranes",), r"no class 'cranes'; did you mean 'crane'\?"),
        (("zebra",), r"no class 'zebra'; it has 'tabby cat', "),
        ((4,), r"there is no class 4 in .*indices in 0\.\.3"),
        ((-1,), "there is no class -1"),
        ((True,), "there is no class True"),
        ((1, "tiger cat"), "class 1 of .* is chosen twice"),
        ((), r"classes is \(\); give the names or indices to keep"),
        ("crane", "classes is 'crane'; give the names or indices to keep"),
    ],
)
def test_classes_that_cannot_be_meant(saved, chosen, reason):
    _, path = saved
    with pytest.raises(WeightsError, match=reason):
        load(path, classes=chosen)


def test_classes_beside_what_contradicts_them(saved, tmp_path):
    before, path = saved
    with pytest.raises(WeightsError, match="classes says how many classes stay, and num_classes starts another"):
        load(path, classes=("crane",), num_classes=1)
    with pytest.raises(WeightsError, match="classes keeps rows of the classifier and head='new' starts another"):
        load(path, classes=("crane",), head="new")
    with pytest.raises(WeightsError, match=r"1 classes are chosen and the network has 4 outputs; .*num_classes=1"):
        load_weights(create(TINY), path, classes=("crane",))
    torch.save(before.state_dict(), tmp_path / "b.pth")
    with pytest.raises(
        WeightsError, match=r"b.pth does not name its classes, so 'crane' cannot be found; give indices"
    ):
        load_weights(create(TINY, num_classes=1), tmp_path / "b.pth", classes=("crane",))
    save_weights(network(replace(TINY, num_classes=0)), tmp_path / "c.safetensors")
    with pytest.raises(WeightsError, match=r"has no classifier \(fc.weight\) whose rows could be kept"):
        load(tmp_path / "c.safetensors", classes=(0,))


def test_a_name_of_two_classes_is_refused(tmp_path):
    net = network(TINY)
    net.classes = ("crane", "cat", "dog", "crane")  # ImageNet has two, a bird and a machine
    save_weights(net, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"'crane' names the classes 0, 3 of .*; give an index"):
        load(tmp_path / "a.safetensors", classes=("crane",))
    assert load(tmp_path / "a.safetensors", classes=(3,)).classes == ("crane",)
