"""Where weights come from: the catalog, URLs, the hub and folders, and what each says of them."""

import hashlib
import json
from dataclasses import replace

import pytest
import timm
import torch
from timm.models._hub import save_for_hf
from transformers import (
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
)

from isthmus.arch.preprocess import IMAGENET
from isthmus.arch.variants import variant
from isthmus.errors import RunError, WeightsError
from isthmus.weights import files
from isthmus.weights.inspect import inspect_weights
from isthmus.weights.load import create, load, load_weights, read_network
from isthmus.weights.published import catalog
from isthmus.weights.save import save_weights
from isthmus.weights.source import open_source
from oracles import picture, randomise, relative_error

NAME = "torchvision:resnet18.v1"


@pytest.fixture(scope="module")
def theirs():
    """The smallest network that timm publishes, as its users get it."""
    return randomise(timm.create_model("test_resnet")).float()


@pytest.fixture
def published(theirs, web, tmp_path, monkeypatch):
    """A record of torchvision's, with small weights of its own behind it."""
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    content = (tmp_path / "weights.pth").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    file = f"models/test_resnet-{sha256[:8]}.pth"
    web.files[f"/{file}"] = content
    record = replace(
        catalog.CATALOG[NAME], network="test_resnet", sha256=sha256[:8], place=f"https://download.pytorch.org/{file}"
    )
    monkeypatch.setitem(catalog.CATALOG, NAME, record)
    return record


def assert_computes_as(net, theirs):
    with torch.no_grad():
        found, wanted = net.double()(picture(1, 3, 97, 97)), theirs.double()(picture(1, 3, 97, 97))
    theirs.float()
    assert relative_error(found, wanted) <= 1e-8


def folder_of(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


# -- the catalog -----------------------------------------------------------------------------------------------------


def test_a_name_of_the_catalog(published, theirs, web):
    net, report = read_network(NAME)
    assert_computes_as(net, theirs)
    assert (net.preprocess, net.classes) == (IMAGENET, catalog.IMAGENET_CLASSES)
    assert report.source == NAME
    assert f"{NAME}; 69.758 % top-1 on ImageNet-1k; bsd-3-clause; https://github.com/pytorch/vision" in report.notes[-1]
    assert not report.assumed
    load(NAME)
    assert web.count("GET") == 1


def test_the_same_by_its_address_or_by_its_hash_alone(published, tmp_path):
    wanted = open_source(NAME, None)
    for origin in (published.place, tmp_path / "weights.pth"):
        found = open_source(origin, None)
        assert (found.spec, found.preprocess, found.classes) == (wanted.spec, wanted.preprocess, wanted.classes)
        assert found.notes == wanted.notes
        assert found.name == str(origin)


def test_a_known_file_does_not_go_into_another_network(published, tmp_path):
    with pytest.raises(WeightsError, match=r"is for another network: stride_at is conv2 there and conv1 here"):
        load_weights(create(replace(variant("test_resnet"), stride_at="conv1")), tmp_path / "weights.pth")


def test_a_network_is_not_weights():
    with pytest.raises(
        WeightsError,
        match=r"resnet50 is a network and names no weights; .* name yours: torchvision:resnet50.v1, "
        r"torchvision:resnet50.v2, hf:microsoft/resnet-50, .* and \d+ more",
    ):
        load("resnet50")
    with pytest.raises(WeightsError, match="name yours: none are known here"):
        load("resnet164_cifar")
    with pytest.raises(WeightsError, match=r"no published weights .* did you mean torchvision:resnet50.v[12], "):
        load("torchvision:resnet50.v3")


# -- URLs ------------------------------------------------------------------------------------------------------------


def test_an_address_that_nobody_pinned_says_how(web, theirs, tmp_path):
    torch.save(theirs.state_dict() | {"conv1.0.weight": theirs.conv1[0].weight * 2}, tmp_path / "mine.pth")
    web.files["/mine.pth"] = content = (tmp_path / "mine.pth").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    url = f"{web.address}/mine.pth"
    source = open_source(url, None)
    assert source.spec is None
    assert source.notes[-1] == f"nobody said what it must hold: pin it with {url}#sha256={sha256}"
    assert not open_source(f"{url}#sha256={sha256}", None).notes
    with pytest.raises(WeightsError, match=r"sent has the sha256 .* and must have 00000000"):
        open_source(f"{url}#sha256={'0' * 8}", None)
    for wrong in ("#sha256=xyz", "#sha256=", "#md5=0000000000"):
        with pytest.raises(WeightsError, match="what stands behind # must be sha256= and 8 to 64"):
            open_source(url + wrong, None)


def test_addresses_of_files(tmp_path, theirs):
    save_for_hf(theirs, tmp_path / "a folder", safe_serialization=True)
    for path in (tmp_path / "a folder", tmp_path / "a folder" / "model.safetensors"):
        assert len(open_source(path.as_uri(), None).tensors) == len(theirs.state_dict())
    with pytest.raises(WeightsError, match=r"there is no file .*gone"):
        open_source((tmp_path / "gone").as_uri(), None)


# -- the hub and folders like its own --------------------------------------------------------------------------------


def test_timms_weights_on_the_hub(web, theirs, tmp_path):
    save_for_hf(theirs, tmp_path / "net", safe_serialization=True)
    web.publish("timm/test_resnet.r160_in1k", folder_of(tmp_path / "net"))
    net, report = read_network("hf:timm/test_resnet.r160_in1k")
    assert_computes_as(net, theirs)
    record = catalog.CATALOG["hf:timm/test_resnet.r160_in1k"]
    assert (net.spec.name, net.preprocess, net.classes) == ("test_resnet", record.preprocess, catalog.IMAGENET_CLASSES)
    assert "apache-2.0" in report.notes[-1]
    assert report.source == "hf:timm/test_resnet.r160_in1k"


def test_a_record_names_no_classes_of_another_classifier(web, tmp_path):
    save_for_hf(timm.create_model("test_resnet", num_classes=3), tmp_path / "net", safe_serialization=True)
    web.publish("timm/test_resnet.r160_in1k", folder_of(tmp_path / "net"))
    net = load("hf:timm/test_resnet.r160_in1k")
    assert (net.spec.num_classes, net.classes) == (3, ())


def test_transformers_weights_on_the_hub_in_parts(web, tmp_path):
    config = ResNetConfig(hidden_sizes=[32, 64], depths=[1, 1], id2label={0: "ok", 1: "broken"})
    model = randomise(ResNetForImageClassification(config)).float()
    model.save_pretrained(tmp_path / "net", max_shard_size="60KB")
    ConvNextImageProcessor(size={"shortest_edge": 64}, resample=2).save_pretrained(tmp_path / "net")
    files = folder_of(tmp_path / "net")
    assert "model.safetensors.index.json" in files
    web.publish("me/net", files, revision="v2")
    net = load("hf:me/net@v2")
    with torch.no_grad():
        wanted = model.double()(picture(1, 3, 65, 65)).logits
        assert relative_error(net.double()(picture(1, 3, 65, 65)), wanted) <= 1e-8
    assert net.classes == ("ok", "broken")
    assert (net.preprocess.resize, net.preprocess.crop, net.preprocess.interpolation) == (73, 64, "bilinear")


def test_a_network_of_timm_inside_transformers(theirs, tmp_path):
    cfg = timm.models.get_pretrained_cfg("test_resnet.r160_in1k").to_dict()
    config = TimmWrapperConfig(architecture="test_resnet", num_labels=1000, pretrained_cfg=cfg)
    wrapper = TimmWrapperForImageClassification(config)
    wrapper.timm_model.load_state_dict(theirs.state_dict())
    wrapper.save_pretrained(tmp_path)
    TimmWrapperImageProcessor(cfg).save_pretrained(tmp_path)
    net = load(tmp_path)
    assert_computes_as(net, theirs)
    assert net.preprocess == catalog.CATALOG["hf:timm/test_resnet.r160_in1k"].preprocess


def test_a_file_of_a_repository_is_described_by_its_config(web, theirs, tmp_path):
    save_for_hf(theirs, tmp_path / "net")
    files = folder_of(tmp_path / "net")
    web.publish("me/net", {"config.json": files["config.json"], "epoch 9.bin": files["pytorch_model.bin"]})
    assert_computes_as(load("hf:me/net:epoch 9.bin"), theirs)


def test_a_folder_with_older_weights(theirs, tmp_path):
    save_for_hf(theirs, tmp_path)
    assert (tmp_path / "pytorch_model.bin").is_file()
    assert_computes_as(load(tmp_path), theirs)
    with pytest.raises(RunError, match=r"has no model.safetensors; is it a run folder"):
        load(tmp_path.parent)


def test_our_own_description_goes_before_the_config(tmp_path):
    net = create("test_resnet", num_classes=2)
    net.classes = ("a", "b")
    save_weights(net, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "resnet50"}')
    found = load(tmp_path)
    assert (found.spec, found.classes) == (net.spec, ("a", "b"))


def test_a_config_of_another_model_is_said_and_left_aside(theirs, tmp_path):
    save_for_hf(theirs, tmp_path, safe_serialization=True)
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    with pytest.raises(WeightsError, match=r"does not say which network it is for; .* test_resnet"):
        load(tmp_path)
    report = load_weights(create("test_resnet"), tmp_path)
    assert "the config.json beside it is of no ResNet and was not used" in report.notes


def test_preprocessing_that_is_missing_is_said(tmp_path):
    model = ResNetForImageClassification(ResNetConfig(hidden_sizes=[32], depths=[1]))
    model.save_pretrained(tmp_path)
    assert "its preprocessing is in no file beside it: set net.preprocess" in open_source(tmp_path, None).notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"model_type": "resnet", "hidden_act": "gelu"}), r"model.safetensors: config.json: hidden_act is"),
        ("{", "config.json cannot be read: .*; download or write it again"),
        ("[]", "config.json holds no table of settings"),
        ("[" * 100_000, "config.json cannot be read"),
        (json.dumps({"model_type": "resnet", "architectures": [3]}), "a config file beside it cannot be read"),
        (json.dumps({"architecture": "resnet18", "pretrained_cfg": []}), "a config file beside it cannot be read"),
        (json.dumps({"architecture": "resnet18", "pretrained_cfg": {"input_size": [3, 8, 8], "crop_pct": 0}}), "zero"),
    ],
)
def test_a_config_that_cannot_be_read(theirs, tmp_path, text, message):
    save_for_hf(theirs, tmp_path, safe_serialization=True)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=message):
        load(tmp_path)
    load_weights(create("test_resnet"), tmp_path / "model.safetensors")  # the file alone, as the message would have it


@pytest.mark.parametrize("description", ["[" * 100_000, '{"schema": 1, "layout": "nonsense"}', "3", '{"schema": "1"}'])
def test_a_description_that_cannot_be_read(tmp_path, description):
    files.write(path := tmp_path / "a.safetensors", {"conv1.weight": torch.zeros(1)}, {"isthmus": description})
    for read in (load, inspect_weights):
        with pytest.raises(WeightsError, match="its description cannot be read"):
            read(path)
