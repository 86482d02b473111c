"""Converting: what is written reads back the same, the proof can fail, and a failure leaves everything as it was."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import isthmus
from isthmus.arch.preprocess import IMAGENET
from isthmus.arch.spec import NetSpec, StageSpec, StemSpec
from isthmus.arch.variants import variant
from isthmus.errors import RunError, WeightsError
from isthmus.weights import convert as converting
from isthmus.weights.convert import convert
from isthmus.weights.load import load, load_weights, read_network
from isthmus.weights.save import save_weights
from isthmus.weights.source import open_source
from isthmus.weights.verify import shown
from oracles import random_state, relative_error
from small_runs import copied, same

SPEC = NetSpec(
    stem=StemSpec(widths=(64,)),
    stages=tuple(StageSpec(depth=1, mid=out // 4, out=out, stride=1 + (out > 32)) for out in (32, 64, 128, 256)),
    stride_at="conv1",
    norm_eps=1.001e-5,
    num_classes=3,
    name="own",
)
EXTRA = {"licence": "MIT", "source": "somewhere"}


@pytest.fixture
def source(tmp_path):
    net = isthmus.create(SPEC)
    net.load_state_dict(random_state(net))
    net.preprocess, net.classes = IMAGENET.at(64), ("ant", "bee", "cat")
    save_weights(net, path := tmp_path / "source.safetensors", extra=EXTRA)
    return path


def again(path, layout):
    net = isthmus.create(SPEC)
    load_weights(net, path, layout=layout)
    return net.eval()


@pytest.mark.parametrize(
    ("layout", "name", "counters", "exact"),
    [
        ("native", "out.safetensors", True, True),
        ("native", "out.pth", True, True),
        ("mmpretrain", "out.pth", True, True),
        ("keras", "out.h5", False, True),
        ("detectron2_msra", "out.pkl", False, False),
        ("transformers", "out", True, True),
    ],
)
def test_it_reads_back_the_same(tmp_path, source, layout, name, counters, exact):
    done = convert(source, tmp_path / name, layout)
    assert done.path == tmp_path / name
    assert done.tensors.same == exact
    assert (done.agreement is None) == exact
    assert exact or (done.agreement.equal and done.agreement.pictures == 4)
    assert any("counters of batches" in note for note in done.notes) != counters
    ours, back = load(source), load(done.path) if name == "out" else again(done.path, layout)
    if exact:
        learnt, found = (
            {name: tensor for name, tensor in copied(net).items() if counters or "num_batches" not in name}
            for net in (ours, back)
        )
        assert same(learnt, found)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        mine, theirs = ours.double()(x), back.double()(x)
    assert float((mine - theirs).abs().max() / mine.abs().max()) < 1e-6
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["source.safetensors", name])


def test_another_epsilon_goes_into_the_variances(tmp_path, source):
    """Where they are small it counts: transformers' norms have 1e-5 and these 1.001e-5."""
    net = load(source)
    for name, buffer in net.named_buffers():
        if name.endswith("running_var"):
            buffer.mul_(1e-4)
    save_weights(net, source)
    convert(source, tmp_path / "out", "transformers")
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "out").double().eval()
    with torch.no_grad():
        assert relative_error(theirs(x).logits, net.double()(x)) < 1e-6
        for module in theirs.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eps = 1.001e-5
        assert relative_error(theirs(x).logits, net(x)) > 1e-6


def test_safetensors_keep_all_that_is_known(tmp_path, source):
    done = convert(source, tmp_path / "out.safetensors", "mmpretrain")
    ours, back = load(source), load(done.path)
    assert (back.spec, back.preprocess, back.classes) == (ours.spec, ours.preprocess, ours.classes)
    assert open_source(done.path, None).extra == EXTRA
    assert done.notes == ()


def test_what_a_bare_file_leaves_open_is_written_down_as_assumed(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "a.pth")
    done = convert(tmp_path / "a.pth", tmp_path / "folder", "transformers", arch="resnet18")
    assert "preprocessing" in done.report.assumed
    card = (tmp_path / "folder" / "README.md").read_text()
    assert f"assumed, as their source did not say: {', '.join(done.report.assumed)}" in card
    again = convert(tmp_path / "folder", tmp_path / "a.safetensors", "native")
    assert open_source(again.path, None).extra["assumed"] == list(done.report.assumed)


def test_formats_that_hold_tensors_alone_say_what_is_lost(tmp_path, source):
    (note,) = convert(source, tmp_path / "out.pth", "native").notes
    assert "a .pth file does not say which network it is (own: read it with arch=), preprocessing and 3 class" in note
    assert str(IMAGENET.at(64)) in note
    (note,) = convert(source, out := tmp_path / "out.h5", "keras").notes[:1]
    assert "; readers take that of keras: " in note
    assert "BGR" in str(read_network(out, arch=SPEC)[1])


def test_a_bare_state_dict_takes_its_classes_and_channels_along(tmp_path):
    net = torchvision.models.resnet18(num_classes=5)
    net.conv1 = torch.nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    net.load_state_dict(random_state(net))
    torch.save(net.state_dict(), bare := tmp_path / "bare.pth")
    with pytest.raises(WeightsError, match="does not say which network"):
        convert(bare, tmp_path / "out.safetensors", "native")
    convert(bare, tmp_path / "out.safetensors", "native", arch="resnet18")
    back = load(tmp_path / "out.safetensors")
    assert back.spec == replace(variant("resnet18"), num_classes=5, in_channels=1)
    assert same(copied(back), dict(net.state_dict()))


def test_published_weights_take_their_licence_along(tmp_path):
    convert("demo", tmp_path / "out.safetensors", "native")
    extra = open_source(tmp_path / "out.safetensors", None).extra
    assert (extra["source"], extra["licence"]) == ("demo", "BSD-2-Clause")


def test_a_network_of_bgr_becomes_one_that_takes_the_pictures_of_transformers(tmp_path, source):
    net = load(source)
    net.preprocess = replace(net.preprocess, resize=64, channels="BGR", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    save_weights(net, bgr := tmp_path / "bgr.safetensors")
    done = convert(bgr, tmp_path / "folder", "transformers")
    assert "has its channels turned round" in done.notes[0]
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    given = AutoImageProcessor.from_pretrained(done.path)(photo, return_tensors="pt")
    theirs = AutoModelForImageClassification.from_pretrained(done.path).eval()
    photo.save(tmp_path / "photo.png")
    with torch.no_grad():
        wanted = net(shown(tmp_path / "photo.png", net.preprocess))
        assert relative_error(theirs(**given).logits, wanted) < 1e-5
        assert relative_error(theirs(given["pixel_values"].flip(1)).logits, wanted) > 1e-2


# -- when it goes wrong ------------------------------------------------------------------------------------------------


@pytest.fixture
def before(tmp_path):
    """A file and a folder that are there already."""
    (tmp_path / "out.safetensors").write_bytes(b"as it was")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")

    def state():
        return {path.relative_to(tmp_path): path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    return state


@pytest.mark.parametrize(("layout", "name"), [("native", "out.safetensors"), ("transformers", "out")])
def test_what_reads_back_otherwise_is_not_left_there(tmp_path, source, before, monkeypatch, layout, name):
    then = before()

    def spoilt(*arguments):
        net = real(*arguments)
        with torch.no_grad():
            net.layer1[0].conv1.weight[0, 0] += 0.1
        return net

    real = converting._read_back
    monkeypatch.setattr(converting, "_read_back", spoilt)
    with pytest.raises(WeightsError, match=r"was not written: read back, its outputs differ by .* use --to native"):
        convert(source, tmp_path / name, layout)
    assert before() == then


@pytest.mark.parametrize(
    ("layout", "name", "error", "reason"),
    [
        ("keras_v2", "out.safetensors", WeightsError, "layout keras_v2 has no network like own"),
        ("nonsense", "out.safetensors", WeightsError, "there is no layout 'nonsense'"),
        ("native", "out.onnx", WeightsError, r"the format follows from the name"),
        ("native", "no/folder/out.safetensors", RunError, "cannot write .*No such file or directory"),
        ("native", "out", RunError, "cannot write .*: Is a directory"),
    ],
)
def test_refusals_leave_everything_as_it_was(tmp_path, source, before, layout, name, error, reason):
    then = before()
    with pytest.raises(error, match=reason):
        convert(source, tmp_path / name, layout)
    assert before() == then


def test_a_folder_that_was_there_is_renewed(tmp_path, source, before):
    convert(source, tmp_path / "out", "transformers")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "resnet"
    assert load(tmp_path / "out").classes == ("ant", "bee", "cat")


def test_the_folder_where_one_is(tmp_path, source, monkeypatch):
    (folder := tmp_path / "here").mkdir()
    monkeypatch.chdir(folder)
    convert(source, ".", "transformers")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json"
    ]  # fmt: skip
    assert "# here\n" in (folder / "README.md").read_text()


def test_numbers_that_are_none_are_kept_as_they_are(tmp_path, source):
    net = load(source)
    net.fc.weight.data[0, 0] = float("nan")
    save_weights(net, broken := tmp_path / "broken.safetensors")
    done = convert(broken, tmp_path / "out.safetensors", "native")
    assert done.tensors.same
    assert "not finite" in str(done.report)


def test_what_is_read_is_never_written_over(source):
    before = Path(source).read_bytes()
    with pytest.raises(WeightsError, match="is what is read, and was left as it is"):
        convert(source, source, "native")
    assert Path(source).read_bytes() == before
