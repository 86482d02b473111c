"""isthmus export, as people call it."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from isthmus.run import predict
from small_runs import class_folders, weights


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
