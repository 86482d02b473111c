"""The command diagnose: findings first, then figures, in 80 columns; JSON; and how it refuses."""

import json

import pytest
import torch

from diagnosed import class_crops, of_class_crops
from isthmus.report.tables import console
from small_runs import weights


@pytest.fixture(scope="module")
def folder(photos, tmp_path_factory):
    return class_crops(tmp_path_factory.mktemp("pictures"), photos, 64, seed=7)


@pytest.fixture(scope="module")
def net(photos):
    return of_class_crops(photos)


def test_a_healthy_network(isthmus, net, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(console, "width", 80)
    path = weights(tmp_path / "net.safetensors", net)
    told = isthmus("diagnose", str(path), "--data", str(folder))
    assert told.status == 0
    assert told.out.startswith("healthy: neither a fault nor a warning\n")
    assert "Looked at on 64 pictures: " in told.out
    assert "Not looked at: batch size (how many pictures a step has is not known)." in told.out
    for word in ("layer1.0", "layer4.1", "effective rank", "Batch norms, furthest off first", "--json has all"):
        assert word in told.out
    assert max(len(line) for line in told.out.splitlines()) <= 80
    assert told.err.strip().splitlines()[0] == "64 of 64 pictures"


def test_findings_come_first(isthmus, net, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(console, "width", 80)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    net.layer1[0].bn1.running_var[0] = 0.0
    path = weights(tmp_path / "net.safetensors", net)
    net.load_state_dict(state)
    told = isthmus("diagnose", str(path), "--data", str(folder))
    assert told.status == 0  # findings are no error
    assert told.out.startswith("fault layer1.0.bn1\n  1 channels have a running variance below")
    assert "  To mend: Measure the statistics again: isthmus.precise_batchnorm(net," in told.out
    assert max(len(line) for line in told.out.splitlines()) <= 80


def test_json_is_all_of_the_output(isthmus, net, folder, tmp_path):
    path = weights(tmp_path / "net.safetensors", net)
    document = json.loads(isthmus("diagnose", str(path), "--data", str(folder), "--pictures", "32", "--json").out)
    assert document["pictures"] == 32
    assert document["healthy"] is True
    assert len(document["norms"]) == sum(isinstance(each, torch.nn.BatchNorm2d) for each in net.modules())


def test_what_cannot_be(isthmus, net, folder, tmp_path):
    path = weights(tmp_path / "net.safetensors", net)
    told = isthmus("diagnose", str(path))
    assert told.status == 2
    assert "name the pictures with --data" in told.err
    told = isthmus("diagnose", str(path), "--data", str(tmp_path / "nowhere"))
    assert told.status == 2
    assert "nowhere" in told.err
    assert isthmus("diagnose", str(tmp_path / "none.safetensors"), "--data", str(folder)).status == 2
