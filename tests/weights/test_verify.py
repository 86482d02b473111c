"""Verifying: what counts as equal, each library as the reference, and that nothing is equal unless it was compared."""

from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
import torchvision
from torch import nn

import isthmus
from isthmus.arch.preprocess import IMAGENET, Preprocess
from isthmus.arch.spec import NetSpec
from isthmus.arch.variants import variant
from isthmus.errors import DataError, SpecError, WeightsError
from isthmus.weights import files, layouts, references
from isthmus.weights.compare import agreement, compare_tensors, pictures
from isthmus.weights.load import create, load, load_weights
from isthmus.weights.save import save_weights
from isthmus.weights.source import Source
from isthmus.weights.verify import verify
from oracles import random_state
from small_runs import SPEC, class_folders

SMALL = IMAGENET.at(64)


def written(path, spec, layout="native", preprocess=SMALL):
    """A file of ours with random numbers, for small pictures."""
    net = isthmus.create(spec)
    net.load_state_dict(random_state(net))
    net.preprocess = preprocess
    save_weights(net, path, layout=layout)
    return path


# -- what counts as equal ----------------------------------------------------------------------------------------------


def outputs(*rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("mine", "theirs", "relative", "same_top1", "equal"),
    [
        ([[1.0, 4.0]], [[1.0, 4.0]], 0.0, 1, True),
        ([[1.0, 4.0], [0.0, 1.0]], [[1.0, 4.0], [2.0, 1.0]], 0.5, 1, False),
        ([[1.0, 4.0]], [[1.04, 4.0]], 0.01, 1, True),  # the tolerance itself
        ([[1.0, 4.0]], [[1.05, 4.0]], 0.0125, 1, False),
        ([[0.0, 0.0]], [[0.0, 0.0]], 0.0, 1, True),
        ([[float("nan"), 4.0]], [[1.0, 4.0]], float("nan"), 0, False),
        ([[1.0, 4.0]], [[1.0, float("inf")]], float("nan"), 1, False),
    ],
)
def test_agreement(mine, theirs, relative, same_top1, equal):
    found = agreement(outputs(*mine), outputs(*theirs), precision=torch.float64, tolerance=0.01 + 1e-12)
    assert found.relative == pytest.approx(relative, nan_ok=True)
    assert (found.pictures, found.same_top1, found.equal) == (len(mine), same_top1, equal)


def test_outputs_of_other_shapes_cannot_be_compared():
    with pytest.raises(WeightsError, match=r"outputs of \(1, 2\) and of \(1, 3\)"):
        agreement(outputs([1, 2]), outputs([1, 2, 3]), precision=torch.float64, tolerance=1)


def test_tensors_side_by_side():
    first = {
        "same": torch.ones(2),
        "bit": torch.ones(2),
        "shape": torch.ones(2),
        "kind": torch.ones(2),
        "a": torch.ones(1),
    }
    second = {
        "same": torch.ones(2),
        "bit": torch.tensor([1.0, 1.0 + 2**-23]),
        "shape": torch.ones(3),
        "kind": torch.ones(2).double(),
        "b": torch.ones(1),
    }
    found = compare_tensors(first, second)
    assert (found.equal, found.different) == (1, ("bit", "shape", "kind"))
    assert (found.only_first, found.only_second) == (("a",), ("b",))
    assert (found.largest, found.where, found.same) == (2**-23, "bit", False)
    assert compare_tensors(first, first).same


def test_bits_are_compared_and_not_numbers():
    nan, zero = torch.tensor([float("nan")]), torch.zeros(())
    assert compare_tensors({"a": nan}, {"a": nan.clone()}).same
    assert compare_tensors({"a": zero}, {"a": -zero}).different == ("a",)


@pytest.mark.parametrize(
    ("record", "channels", "dims", "shape"),
    [
        (SMALL, 3, 2, (4, 3, 64, 64)),
        (replace(SMALL, channels="L", mean=(0.5,), std=(0.1,)), 1, 2, (4, 1, 64, 64)),
        (SMALL, 5, 2, (4, 5, 64, 64)),
        (SMALL, 2, 1, (4, 2, 64)),
        (SMALL, 1, 3, (4, 1, 32, 32, 32)),
    ],
)
def test_pictures_are_the_same_each_time_and_none_like_another(record, channels, dims, shape):
    drawn = pictures(record, channels, dims)
    assert drawn.shape == shape
    assert torch.equal(drawn, pictures(record, channels, dims))
    planes = drawn.flatten(0, 1)
    assert len({plane.numpy().tobytes() for plane in planes}) == len(planes)
    assert (planes.flatten(1).std(1) > 0.1).all()
    if len(record.channels) == channels and dims == 2:
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (record.mean, record.std))
        scaled = drawn * std + mean
        assert -1e-6 <= scaled.min() < 0.05
        assert 0.95 < scaled.max() <= 1 + 1e-6


# -- beside the library ------------------------------------------------------------------------------------------------


def test_bare_weights_beside_torchvision(tmp_path):
    net = torchvision.models.resnet18(num_classes=5)
    net.load_state_dict(random_state(net))
    torch.save(net.state_dict(), path := tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="does not say which network"):
        verify(path)
    found = verify(path, arch="resnet18")
    assert found.against == f"torchvision {version('torchvision')}"
    assert found.agreement.equal
    assert (found.agreement.pictures, found.agreement.same_top1, found.agreement.precision) == (4, 4, "float64")
    assert found.agreement.tolerance == 1e-8


@pytest.mark.parametrize(
    ("name", "layout", "library"),
    [
        ("resnet10t", "native", "timm"),
        ("resnet18", "transformers", "transformers"),
        *(
            pytest.param(*row, marks=pytest.mark.long)
            for row in (
                ("resnext50_32x4d", "native", "torchvision"),
                ("wide_resnet50_2", "torchvision", "torchvision"),
                ("resnet26d", "native", "timm"),
                ("seresnet50", "timm", "timm"),
                ("resnetblur18", "native", "timm"),
                ("resnetv2_50", "timm_resnetv2", "timm"),
                ("resnet50_v1", "transformers", "transformers"),
            )
        ),
    ],
)
def test_the_library_whose_names_they_have(tmp_path, name, layout, library):
    spec = replace(variant(name), num_classes=5)
    found = verify(written(tmp_path / "a.safetensors", spec, layout))
    assert found.against == f"{library} {version(library)}"
    assert found.agreement.equal
    assert found.tensors is None


def test_a_folder_and_features_beside_transformers(tmp_path):
    spec = replace(variant("resnet18"), num_classes=0)
    found = verify(written(tmp_path / "folder", spec, "transformers"))
    assert found.against.startswith("transformers")
    assert found.agreement.equal


def test_an_onnx_graph_beside_onnxruntime():
    found = verify("demo")
    assert found.against == f"onnxruntime {version('onnxruntime')}"
    assert found.agreement.equal
    assert 0 < found.agreement.relative < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("name", ["resnet50_keras", "resnetv2_50_keras"])
def test_keras_weights_beside_keras(tmp_path, name):
    spec = replace(variant(name), num_classes=5)
    net = isthmus.create(spec)
    net.load_state_dict(random_state(net))
    save_weights(net, path := tmp_path / "a.h5", layout="keras_v2" if "v2" in name else "keras")
    found = verify(path, arch=name)
    assert found.against.startswith("keras 3")
    assert found.agreement.equal
    assert 0 < found.agreement.relative < 1e-5


@pytest.mark.long
def test_a_file_that_keras_refuses(tmp_path):
    """Its layers are in another order: by name it is whole, and Keras reads by order."""
    net = isthmus.create(replace(variant("resnet50_keras"), num_classes=5))
    tensors = dict(layouts.from_native(net.state_dict(), "keras", net.spec).tensors)
    first = {name: tensors.pop(name) for name in list(tensors) if name.startswith("predictions/")}
    files.write(path := tmp_path / "a.h5", first | tensors, {})
    with pytest.raises(WeightsError, match=r"Keras' own ResNet50 refuses .*a\.h5: Shape mismatch"):
        verify(path, arch="resnet50_keras")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda net: setattr(net.layer2[0].conv1, "stride", (1, 1)) or setattr(net.layer2[0].conv2, "stride", (2, 2)),
        lambda net: setattr(net.layer3[0].bn1, "eps", 1e-3),
        lambda net: net.layer1[0].conv1.weight.data[0, 0].mul_(1.001),
        lambda net: setattr(net, "act1", nn.SiLU()),
    ],
    ids=["stride", "epsilon", "weight", "activation"],
)
def test_a_network_that_computes_something_else_is_different(tmp_path, monkeypatch, spoil):
    path = written(tmp_path / "a.safetensors", replace(variant("resnet10t"), num_classes=5))

    def spoilt(*arguments, **options):
        net, report = real(*arguments, **options)
        spoil(net)
        return net, report

    from isthmus.weights import verify as module

    real = module.read_network
    monkeypatch.setattr(module, "read_network", spoilt)
    found = verify(path)
    assert not found.agreement.equal
    assert found.agreement.relative > 1e-7


def test_without_a_reference_nothing_counts_as_verified(tmp_path, monkeypatch):
    tiny = written(tmp_path / "tiny.safetensors", SPEC)
    with pytest.raises(
        WeightsError, match="was not verified: no library known here has tiny under the names of layout"
    ):
        verify(tiny)

    def absent(name):
        if name in ("timm", "torchvision"):
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(references, "version", absent)
    with pytest.raises(WeightsError, match=r"torchvision or timm could be the reference .* pip install torchvision"):
        verify(tiny)


def test_tensors_that_the_library_refuses():
    source = Source(name="a.pth", tensors={"weight": torch.ones(2, 3)}, layout="native")
    with pytest.raises(WeightsError, match=r"a\.pth does not fit the library's own network: .*Missing key.*bias"):
        references.filled(nn.Linear(3, 2), source)


# -- beside other weights ----------------------------------------------------------------------------------------------


def test_the_same_weights_in_other_names(tmp_path):
    spec = replace(variant("resnet18"), num_classes=5)
    path = written(tmp_path / "a.safetensors", spec)
    save_weights(load(path), other := tmp_path / "b.safetensors", layout="mmpretrain")
    found = verify(path, against=other)
    assert (found.source, found.against) == (str(path), str(other))
    assert found.tensors.same
    assert found.agreement.difference == 0
    assert found.notes == ()


def test_folded_weights_compute_the_same_with_other_tensors(tmp_path):
    path = written(tmp_path / "a.safetensors", SPEC)
    save_weights(isthmus.fold(load(path)), other := tmp_path / "b.safetensors")
    found = verify(path, against=other)
    assert found.agreement.equal
    assert 0 < found.agreement.relative < 1e-6
    assert not found.tensors.same
    assert "bn1.weight" in found.tensors.only_first
    assert "conv1.bias" in found.tensors.only_second


def test_one_number_changed(tmp_path):
    path = written(tmp_path / "a.safetensors", SPEC)
    net = load(path)
    with torch.no_grad():
        net.layer1[0].conv1.weight[0, 0] += 0.1
    net.preprocess, net.classes = Preprocess(), tuple("abcdefg")
    save_weights(net, other := tmp_path / "b.safetensors")
    found = verify(path, against=other)
    assert not found.agreement.equal
    assert found.tensors.different == ("layer1.0.conv1.weight",)
    assert found.tensors.largest == pytest.approx(0.1)
    assert found.notes == (
        "their preprocessing differs; both were given that of the first",
        "their class names differ",
    )


def test_a_bare_file_beside_a_described_one_needs_the_network(tmp_path):
    path = written(tmp_path / "a.safetensors", variant("resnet18"))
    torch.save(load(path).state_dict(), bare := tmp_path / "b.pth")
    with pytest.raises(WeightsError, match="does not say which network"):
        verify(path, against=bare)
    assert verify(path, against=bare, arch="resnet18").tensors.same


@pytest.mark.parametrize("changes", [{"num_classes": 6}, {"in_channels": 1}, {"dims": 1}])
def test_networks_that_no_picture_compares(tmp_path, changes):
    first = written(tmp_path / "a.safetensors", SPEC)
    second = written(tmp_path / "b.safetensors", replace(SPEC, **changes))
    with pytest.raises(WeightsError, match="no picture compares them"):
        verify(first, against=second)


def test_an_unknown_network_is_named(tmp_path):
    with pytest.raises(SpecError, match="there is no network named 'resnet5'"):
        verify(written(tmp_path / "a.safetensors", SPEC), arch="resnet5")


def test_pictures_of_ones_own(tmp_path):
    path = written(tmp_path / "a.safetensors", SPEC, preprocess=IMAGENET.at(32))
    photos = class_folders(tmp_path / "photos", {"flower": 2, "temple": 3})
    save_weights(load(path), other := tmp_path / "b.safetensors")
    found = verify(path, against=other, folder=photos)
    assert (found.agreement.pictures, found.agreement.same_top1) == (5, 5)
    with pytest.raises(DataError, match="does not exist"):
        verify(path, against=other, folder=tmp_path / "nothing")
    assert verify("demo", folder=photos).agreement.equal


@pytest.mark.parametrize("changes", [{"in_channels": 5}, {"dims": 1}])
def test_pictures_for_a_network_that_takes_none(tmp_path, changes):
    path = written(tmp_path / "a.safetensors", replace(SPEC, **changes))
    with pytest.raises(WeightsError, match="which pictures do not give"):
        verify(path, against=path, folder=class_folders(tmp_path / "photos", {"flower": 1}))


def test_networks_of_other_dimensions(tmp_path):
    spec = NetSpec(stages=SPEC.stages, stem=SPEC.stem, num_classes=4, dims=3, in_channels=1)
    path = written(tmp_path / "a.safetensors", spec)
    net = isthmus.create(spec)
    load_weights(net, path)
    save_weights(net, other := tmp_path / "b.safetensors")
    assert verify(path, against=other).agreement.difference == 0


def test_a_pre_activation_network_under_our_names_beside_timm(tmp_path):
    spec = replace(variant("resnetv2_50"), num_classes=3)
    net = create(spec)
    net.load_state_dict(random_state(net))
    save_weights(net, tmp_path / "a.safetensors")
    found = verify(tmp_path / "a.safetensors")
    assert found.agreement.equal
    assert found.against.startswith("timm ")
