"""Diagnoses of runs, weight files and networks at hand, on pictures from where they are named."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import isthmus
from diagnosed import CLASSES, SIDE, class_crops, of_class_crops, shrunk
from isthmus.data.sources import open_pictures
from isthmus.diagnose.diagnosis import diagnose
from isthmus.errors import DataError, RunError
from isthmus.examine import as_trained, diagnosis, mean_loss, optimizer_at_peak, seen_at_once, some
from isthmus.run import fit
from isthmus.train.recipe import Recipe
from isthmus.train.recipes import recipe
from small_runs import Recorder, class_folders, copied, network, same, weights


@pytest.fixture(scope="module")
def folder(photos, tmp_path_factory):
    return class_crops(tmp_path_factory.mktemp("pictures"), photos, 96, seed=6)


@pytest.fixture(scope="module")
def net(photos):
    return of_class_crops(photos)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run from nothing whose statistics moved, in batches of 6 pictures."""
    made = recipe("scratch", data=str(folder), arch="test_resnet", image_size=32, epochs=4, batch_size=6, lr=0.02)
    return fit(replace(made, precision="fp32"), tmp_path_factory.mktemp("runs") / "run", report=False).folder


def test_a_network_at_hand(net, folder):
    """As `diagnose` on the same pictures, and it stays as it is."""
    before, recorder = copied(net), Recorder()
    found = diagnosis(net, str(folder), pictures=48, reporter=recorder)
    assert found.healthy
    assert found.pictures == 48
    assert repr(found) == repr(diagnosis(net, open_pictures(str(folder)), pictures=48))
    assert all(row.gradient is not None for row in found.blocks)
    assert same(before, copied(net))
    with pytest.raises(RunError, match="name the pictures with data"):
        diagnosis(net)
    with pytest.raises(RunError, match=r"is diagnosed where it is; leave out device, or move it by net\.to"):
        diagnosis(net, str(folder), device="cpu")


def test_more_pictures_than_there_are(net, folder):
    assert diagnosis(net, str(folder), pictures=1000).pictures == 96
    with pytest.raises(DataError, match="pictures is 1; a diagnosis needs 2 or more"):
        diagnosis(net, str(folder), pictures=1)


def test_loose_pictures_and_those_of_other_classes_have_no_labels(net, folder):
    recorder = Recorder()
    found = diagnosis(net, str(folder / "class1"), reporter=recorder)
    assert found.healthy
    assert recorder.lines[0].startswith("the pictures count as unlabelled: ")  # and why
    assert "class1" in recorder.lines[0]
    assert [each.reason for each in found.unchecked if "gradients" in each.what] == ["the pictures have no labels"]
    net = isthmus.create(shrunk("resnet26"), weights=net)
    net.classes = ("cat", "dog", "cow", "hen")
    net.preprocess = net.preprocess.at(SIDE)
    found = diagnosis(net.eval(), str(folder), reporter=recorder)
    assert any("gradients" in each.what for each in found.unchecked)
    assert recorder.lines[-1] == ("the pictures count as unlabelled: the network does not know the class 'class0'")


def test_a_weight_file(net, folder, tmp_path):
    path = weights(tmp_path / "net.safetensors", net)
    found = diagnosis(path, str(folder), pictures=48)
    assert repr(found) == repr(diagnosis(net, str(folder), pictures=48))
    with pytest.raises(RunError, match="name the pictures with --data"):
        diagnosis(path)


def test_a_run_on_its_own_validation_pictures(run, folder):
    recorder = Recorder()
    found = diagnosis(run, reporter=recorder)
    assert recorder.lines == ["25 of 25 validation pictures of the run"]
    assert found.pictures == 25
    assert "batch size" in found.checked
    small = next(each for each in found.findings if each.kind == "small_batch")
    assert small.severity == "warning"
    assert small.found.startswith("Batch norms see batches of 6 in training")
    assert all(row.update is not None for row in found.blocks)
    assert repr(diagnosis(run, str(folder))) == repr(found)


def test_a_run_whose_trunk_was_frozen(net, folder, tmp_path):
    start = weights(tmp_path / "net.safetensors", net)
    out = fit(recipe("linear-probe", data=str(folder), weights=str(start)), tmp_path / "run", report=False).folder
    found = diagnosis(out)
    assert found.healthy
    assert any(each.reason == "every block is frozen" for each in found.unchecked)
    assert {row.mode for row in found.norms} == {"frozen"}  # also that of the head, which no batch has moved
    assert any(row.name.startswith("fc.") for row in found.norms)
    assert "batch size" not in {each.what for each in found.unchecked}


def test_what_was_frozen_at_the_end_of_a_run():
    base = Recipe(data="x", weights="y", freeze="layer1", epochs=4)
    found = as_trained(network(), base)
    assert found.frozen == ("conv1", "bn1", "act1", "maxpool", "layer1")
    assert all(
        type(each).__name__ == "FrozenBatchNorm2d" for each in found.modules() if isinstance(each, nn.BatchNorm2d)
    )
    thawed = as_trained(network(), replace(base, unfreeze_epochs=1.0, train_norm=True))
    assert thawed.frozen == ()
    assert not any(type(each).__name__ == "FrozenBatchNorm2d" for each in thawed.modules())
    assert "layer2" in as_trained(network(), replace(base, freeze="layer4")).frozen  # which this network has not


@pytest.mark.parametrize(
    ("settings", "processes", "wanted"),
    [
        ({"batch_size": 32}, None, 32),
        ({"batch_size": 32}, 4, 8),
        ({"batch_size": 32, "micro_batch": 4}, 4, 4),
        ({"batch_size": 32, "sync_norm": True, "train_norm": True}, 4, 32),
        ({"batch_size": 32, "freeze": "trunk"}, 1, 0),
        ({"batch_size": 32, "freeze": "trunk", "unfreeze_epochs": 1.0}, 1, 32),
    ],
)
def test_pictures_that_a_norm_saw_at_once(settings, processes, wanted, tmp_path):
    if processes:
        (tmp_path / "environment.json").write_text(json.dumps({"processes": processes}))
    made = Recipe(**{"data": "x", "weights": "y", "freeze": "none", **settings})
    assert seen_at_once(made, tmp_path) == wanted


def test_steps_are_those_of_the_recipe(folder):
    made = Recipe(
        data="x",
        weights="y",
        freeze="none",
        lr=0.25,
        layer_decay=0.5,
        head_lr_factor=4.0,
        label_smoothing=0.1,
        balance="weights",
    )
    optimizer = optimizer_at_peak(network(), made)
    assert {group["lr"] for group in optimizer.param_groups} == {1.0, 0.125, 0.0625, 0.03125}
    found = open_pictures(str(folder))
    logits, labels = torch.randn(6, CLASSES), torch.tensor([0, 1, 2, 3, 0, 1])
    counts = torch.tensor(list(found.counts().values()), dtype=torch.float32)
    each = F.cross_entropy(
        logits, labels, weight=counts.sum() / (CLASSES * counts), label_smoothing=0.1, reduction="sum"
    )
    assert float(mean_loss(made, found, logits, labels)) == pytest.approx(float(each) / 6)


def test_unreadable_pictures_are_left_out_where_the_run_left_them_out(tmp_path):
    data = class_folders(tmp_path / "data", {"flower": 24, "temple": 24})
    made = recipe("scratch", data=str(data), arch="test_resnet", image_size=32, epochs=1, batch_size=16)
    out = fit(replace(made, precision="fp32", unreadable="skip"), tmp_path / "run", report=False).folder
    val = isthmus.data.sources.open_data(str(data), val_fraction=made.val_fraction, seed=made.seed).val
    with open(val.name(0), "wb") as file:  # noqa: PTH123 - a name is a text
        file.write(b"no picture")
    assert diagnosis(out).pictures == len(val) - 1


def test_the_same_as_by_hand(net, folder):
    """`diagnosis` draws pictures and does nothing else of its own."""
    found = open_pictures(str(folder)).under(net.classes)
    images, labels = some(found, net, 48)
    assert repr(diagnose(net, images, labels)) == repr(diagnosis(net, str(folder), pictures=48))
