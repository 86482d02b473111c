"""isthmus export, as people call it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from isthmus.ship import predict
from small_runs import SPEC, class_folders, network, weights


@pytest.fixture
def net(tmp_path) -> Path:
    return weights(tmp_path / "net.safetensors")


def test_a_file_that_takes_pictures_predicts_what_predict_does(isthmus, net, tmp_path):
    photos, out = class_folders(tmp_path / "photos", {"flower": 3, "temple": 3}, side=60), tmp_path / "net.onnx"
    result = isthmus("export", str(net), str(out), "--preprocessing", "--pictures", str(photos), "--json")
    said = json.loads(result.out)
    assert said["path"] == str(out)
    assert all(each["difference"] <= each["limit"] for each in said["compared"])
    session = onnxruntime.InferenceSession(out)
    for row in predict(net, photos, precision="fp32"):
        pixels = np.array(Image.open(row.path).convert("RGB"))
        (logits,) = session.run(["logits"], {"pictures": pixels[None]})[0]
        assert row.classes[0] == f"class {logits.argmax()}"


def test_the_comparisons_are_shown(isthmus, net, tmp_path):
    result = isthmus("export", str(net), str(tmp_path / "net.onnx"))
    assert result.status == 0
    assert "logits of 3 images of 64 × 64" in result.out
    assert f"{tmp_path / 'net.onnx'}:" in result.out


def test_a_suffix_that_says_nothing(isthmus, net, tmp_path):
    result = isthmus("export", str(net), str(tmp_path / "net.tflite"))
    assert result.status == 2
    assert "known: .onnx (ONNX), .xml (OpenVINO), .pt2 (torch.export)" in result.err


@pytest.fixture
def quick8(monkeypatch, tmp_path):
    """A machine on which int8 saves time."""
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    rates = {"fp32": 1.0, "bf16": 2.0, "int8": 3.0}
    monkeypatch.setattr(
        "isthmus.deploy.predictor.measured", lambda opened, _: {pair: rates[pair[1]] for pair in opened}
    )


def test_int8_is_measured_on_labelled_pictures(isthmus, quick8, tmp_path):
    photos = class_folders(tmp_path / "photos", {"flower": 12, "temple": 12}, side=60)
    made = network(replace(SPEC, num_classes=2))
    made.classes = ("flower", "temple")
    net, out = weights(tmp_path / "net.safetensors", made), tmp_path / "net.onnx"
    asked = ("--precision", "int8", "--data", str(photos), "--max-drop", "1", "--min-agreement", "0.5")
    said = json.loads(isthmus("export", str(net), str(out), *asked, "--json").out)
    assert said["int8"]["judged"]["pictures"] == 6  # a quarter is held out
    assert 0.5 <= said["int8"]["judged"]["agreement"] <= 1
    assert said["speed"]["rows"][0]["precision"] == "int8"
    assert out.stat().st_size > 0
    result = isthmus("export", str(net), str(out), *asked)
    assert "held-out pictures keep their class, accuracy" in result.out
    assert "ONNX Runtime in int8: 3.0 pictures/s" in result.out
    assert "int8: calibrating on 18 pictures, measuring on 6" in result.err


def test_int8_on_pictures_without_labels(isthmus, quick8, net, tmp_path):
    photos = class_folders(tmp_path / "photos", {"flower": 6, "temple": 6}, side=60)
    asked = ("--precision", "int8", "--pictures", str(photos), "--min-agreement", "0.1")
    result = isthmus("export", str(net), str(tmp_path / "net.xml"), *asked)
    assert result.status == 0, result.err
    assert "of 6 held-out pictures keep their class; in" in result.out or "keep their class\n" in result.out


def test_int8_that_cannot_keep_its_limits(isthmus, quick8, net, tmp_path):
    photos = class_folders(tmp_path / "photos", {"flower": 6, "temple": 6}, side=60)
    asked = ("--precision", "int8", "--pictures", str(photos), "--min-agreement", "1.1")
    result = isthmus("export", str(net), str(tmp_path / "net.onnx"), *asked)
    assert result.status == 2
    assert "Most of the error comes from" in result.err
    assert not list(tmp_path.glob("net.onnx*"))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ((), "names none; give --data or --pictures"),
        (("--preprocessing",), "cannot be had together"),
    ],
)
def test_int8_that_cannot_be_made(isthmus, net, tmp_path, more, reason):
    result = isthmus("export", str(net), str(tmp_path / "net.onnx"), "--precision", "int8", *more)
    assert (result.status, result.out) == (2, "")
    assert reason in result.err
