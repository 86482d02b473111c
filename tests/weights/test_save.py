"""Saving: each format reads back, the hub's folder is what transformers loads, and what is refused writes nothing."""

import json
import math
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

import isthmus
from isthmus.arch.preprocess import Preprocess
from isthmus.arch.spec import NetSpec, StageSpec, StemSpec
from isthmus.errors import RunError, WeightsError
from isthmus.weights.files import headers
from isthmus.weights.load import create, load_weights, read_network
from isthmus.weights.published.hf_folder import push
from isthmus.weights.save import save_weights
from isthmus.weights.source import open_source
from oracles import picture, randomise, relative_error
from small_runs import class_folders, copied, network, same

FOLDER = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
BOTTLENECK = NetSpec(
    stem=StemSpec(widths=(8,)),
    stages=(StageSpec(depth=2, mid=4, out=16), StageSpec(depth=1, mid=8, out=32, stride=2)),
    num_classes=3,
)
BASIC = replace(
    BOTTLENECK,
    stages=tuple(StageSpec(depth=2, mid=out, out=out, block="basic", stride=out // 16) for out in (16, 32)),
)
RECORD = Preprocess(resize=73, crop=64, interpolation="bicubic", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
EXTRA = {"licence": "BSD-3-Clause", "source": 'a: "quoted" place', "metrics": {"accuracy": 0.875}}


def saved_as(spec, classes=("ant", "bee: with a colon", "cat")):
    net = randomise(isthmus.create(spec)).float()
    net.preprocess, net.classes = RECORD, classes
    return net


# -- formats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".pkl"])
@pytest.mark.parametrize("layout", ["native", "torchvision", "transformers", "mmpretrain", "detectron2"])
def test_every_format_reads_back_to_the_last_bit(tmp_path, layout, suffix):
    net = saved_as(BOTTLENECK)
    save_weights(net, path := tmp_path / f"net{suffix}", layout=layout)
    again = create(net.spec)
    load_weights(again, path)
    assert same(copied(again), copied(net))


def test_safetensors_say_all_that_is_known(tmp_path):
    net = saved_as(BOTTLENECK)
    save_weights(net, path := tmp_path / "net.safetensors", layout="transformers", extra=EXTRA)
    again, _ = read_network(path)
    assert (again.spec, again.preprocess, again.classes) == (net.spec, net.preprocess, net.classes)
    assert open_source(path, None).extra == EXTRA
    assert same(copied(again), copied(net))


def test_a_file_is_the_same_bytes_each_time(tmp_path):
    net = saved_as(BOTTLENECK)
    for name in ("a", "b"):
        save_weights(net, tmp_path / f"{name}.safetensors", extra=EXTRA)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


# -- refusals ----------------------------------------------------------------------------------------------------------


def circle():
    inner = {}
    inner["itself"] = inner
    return inner


@pytest.mark.parametrize(
    "value",
    [torch.ones(2), {1, 2}, object(), b"bytes", math.nan, -math.inf, circle(), {("a", "b"): 1}],
    ids=["tensor", "set", "object", "bytes", "nan", "infinite", "circle", "key"],
)
def test_extra_that_is_no_json_is_refused_before_anything_is_written(tmp_path, value):
    with pytest.raises(WeightsError, match=r"extra cannot be saved .*; it must be plain JSON"):
        save_weights(network(), tmp_path / "a.safetensors", extra={"value": value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spec", "changes", "reason"),
    [
        (replace(BOTTLENECK, attention="se"), {}, "layout transformers has no network like this one: attention is se"),
        (
            BOTTLENECK,
            {"preprocess": replace(RECORD, channels="BGR")},
            "processors give RGB, and this network takes BGR",
        ),
        (BOTTLENECK, {"classes": ("a", "b")}, "has 3 outputs and 2 class names"),
    ],
)
def test_what_a_folder_cannot_hold_is_refused_before_anything_is_written(tmp_path, spec, changes, reason):
    net = saved_as(spec)
    for name, value in changes.items():
        setattr(net, name, value)
    with pytest.raises(WeightsError, match=reason):
        save_weights(net, tmp_path / "folder", layout="transformers")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_a_format_does_not_have(tmp_path):
    with pytest.raises(WeightsError, match=r"bfloat16, which NumPy does not have; make it float32"):
        save_weights(saved_as(BOTTLENECK).bfloat16(), tmp_path / "a.pkl", layout="detectron2")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot make the folder"):
        save_weights(saved_as(BOTTLENECK), tmp_path / "file", layout="transformers")


# -- a folder of the hub -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [BOTTLENECK, replace(BOTTLENECK, stride_at="conv1"), BASIC], ids=["1.5", "1", "basic"])
def test_transformers_loads_the_folder(tmp_path, spec):
    net = saved_as(spec)
    save_weights(net, folder := tmp_path / "folder", layout="transformers")
    assert sorted(path.name for path in folder.iterdir()) == FOLDER
    theirs = AutoModelForImageClassification.from_pretrained(folder).double().eval()
    assert theirs.config.id2label == dict(enumerate(net.classes))
    x = picture(2, 3, 65, 65)
    with torch.no_grad():
        assert relative_error(theirs(x).logits, net.double()(x)) <= 1e-8
    processor = AutoImageProcessor.from_pretrained(folder)
    assert processor(torch.zeros(3, 90, 80), return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)


def test_transformers_loads_a_network_without_a_classifier(tmp_path):
    net = saved_as(replace(BOTTLENECK, num_classes=0), classes=())
    save_weights(net, folder := tmp_path / "folder", layout="transformers")
    theirs = AutoModel.from_pretrained(folder).double().eval()
    x = picture(1, 3, 65, 65)
    with torch.no_grad():
        assert relative_error(theirs(x).pooler_output.flatten(1), net.double()(x)) <= 1e-8


def test_the_folder_loads_as_it_was_saved_and_from_its_config_alone(tmp_path):
    net = saved_as(BOTTLENECK)
    save_weights(net, folder := tmp_path / "folder", layout="transformers", extra=EXTRA)
    again = isthmus.load(folder)
    assert (again.spec, again.preprocess, again.classes) == (net.spec, net.preprocess, net.classes)
    # Without our description, as a folder by transformers itself: the configs say the same.
    AutoModelForImageClassification.from_pretrained(folder).save_pretrained(folder)
    assert "isthmus" not in headers(folder / "model.safetensors").metadata
    again = isthmus.load(folder)
    assert (again.spec, again.preprocess, again.classes) == (net.spec, net.preprocess, net.classes)
    assert same(copied(again), copied(net))


def test_the_model_card(tmp_path):
    save_weights(saved_as(BOTTLENECK), folder := tmp_path / "folder", layout="transformers", extra=EXTRA)
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "license": "bsd-3-clause",
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["resnet", "isthmus"],
        "metrics": ["accuracy"],
    }
    told = ("ant, bee: with a colon, cat", EXTRA["source"], "0.875", "73 px (bicubic)", "64×64", "(0.4, 0.5, 0.6)")
    assert [text for text in told if text not in card.text] == []
    assert "1,000 classes" not in card.text


def test_pushed_to_the_hub_and_used_from_there(tmp_path, web):
    net = saved_as(BOTTLENECK)
    save_weights(net, folder := tmp_path / "folder", layout="transformers")
    assert push(folder, "someone/small") == f"{web.address}/someone/small"
    assert next(path for method, path, _ in web.asked if method == "POST") == "/api/repos/create"
    sent = {name.rpartition("/")[2]: content for name, content in web.files.items() if "/resolve/main/" in name}
    assert sent == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert same(copied(isthmus.load("hf:someone/small")), copied(net))
    photos = class_folders(tmp_path / "photos", {"flower": 1})
    (row,) = isthmus.predict("hf:someone/small", photos, device="cpu")
    assert sorted(row.classes) == sorted(net.classes)


@pytest.mark.parametrize(
    ("errors", "repo", "reason"),
    [
        ({"/api/repos/create": (401, "")}, "someone/small", "401"),
        ({"/api/models/": (403, "")}, "someone/small", "403"),
        ({}, "some one/small", "is no name of a hub repository"),
    ],
)
def test_a_push_that_is_refused_says_why(tmp_path, web, errors, repo, reason):
    save_weights(saved_as(BOTTLENECK), folder := tmp_path / "folder", layout="transformers")
    web.errors.update(errors)
    with pytest.raises(WeightsError, match=reason):
        push(folder, repo)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "resnet"


def test_names_that_ask_for_no_format_are_refused(tmp_path):
    net = network()
    for name, layout, reason in (
        ("a.h5", "native", "for Keras' layouts, keras and keras_v2; write native as .safetensors"),
        ("a.weights.h5", "keras", r"call it a\.h5"),
        ("a.safetensor", "transformers", "must end in"),
        ("a.onnx", "native", "must end in"),
    ):
        with pytest.raises(WeightsError, match=reason):
            save_weights(net, tmp_path / name, layout=layout)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "cat.jpg").write_bytes(b"a picture")
    with pytest.raises(WeightsError, match=r"holds other files .cat\.jpg., so nothing was written; name a new folder"):
        save_weights(create("resnet18"), tmp_path, layout="transformers")
    assert [path.name for path in tmp_path.iterdir()] == ["cat.jpg"]
