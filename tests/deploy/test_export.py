"""Files for other engines: what their own engines compute of real photographs, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import functional as TF

import isthmus
from isthmus.arch.plan import plan
from isthmus.arch.preprocess import IMAGENET, Preprocess
from isthmus.arch.spec import NetSpec
from isthmus.arch.variants import variant
from isthmus.deploy import graph, program
from isthmus.deploy.export import export
from isthmus.deploy.formats import FORMATS
from isthmus.errors import ExportError, IsthmusError, RunError, SpecError, WeightsError
from isthmus.nn.network import ResNet
from oracles import random_state, relative_error, trimmed
from small_runs import SPEC, network

TWENTY = """
    resnet18d resnet26t resnet34 resnet50 resnet50_gn resnet50_v1 resnet50d resnet50_keras resnext50_32x4d senet154
    wide_resnet50_2 ecaresnet26t seresnet50 seresnext26d_32x4d resnetaa50 resnetblur50 resnetrs50 resnetv2_50
    resnetv2_50d resnet20_cifar
"""
ALL_FORMATS = ("resize and crop", "blue first, two views")
RECORDS = {
    "resize and crop": Preprocess(resize=43, crop=38),
    "an odd border": Preprocess(resize=45, crop=38),
    "bicubic": Preprocess(resize=40, crop=40, interpolation="bicubic"),
    "squashed": Preprocess(resize=40, crop=36, squash=True),
    "blue first, two views": Preprocess(resize=40, crop=36, channels="BGR", views=("identity", "hflip")),
}
PREPARED = [  # the graph is the same for all formats
    pytest.param(name, suffix, marks=[pytest.mark.long] * (suffix != ".onnx" and name not in ALL_FORMATS))
    for name in RECORDS
    for suffix in FORMATS
]


def run(path: Path, batch: np.ndarray) -> torch.Tensor:
    """What the engine that a file is for makes of a batch, by that engine's own names."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        found = session.run(["logits"], {session.get_inputs()[0].name: batch})[0]
    elif path.suffix == ".xml":
        found = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(batch)[0]
    else:
        found = torch.export.load(path).module()(torch.from_numpy(batch)).numpy()
    return torch.from_numpy(np.array(found))


def by_torchvision(path: Path, record: Preprocess) -> torch.Tensor:
    """A photograph as torchvision's evaluation transforms give it, in the record's own order of channels."""
    image = Image.open(path).convert("RGB")
    mode = {"bilinear": TF.InterpolationMode.BILINEAR, "bicubic": TF.InterpolationMode.BICUBIC}[record.interpolation]
    size = [record.resize] * (2 if record.squash else 1)
    x = TF.to_tensor(TF.center_crop(TF.resize(image, size, mode), record.crop))
    x = x.flip(0) if record.channels == "BGR" else x
    return TF.normalize(x, record.mean, record.std)[None]


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))


@pytest.fixture(scope="module")
def net() -> ResNet:
    made = network()
    made.classes = tuple(f"kind {index}" for index in range(made.spec.num_classes))
    return made


@pytest.mark.usefixtures("exported_once")
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_computes_what_the_network_does(suffix, net, tmp_path):
    made = export(net, tmp_path / f"net{suffix}")
    assert len(made.compared) == 4
    for shape in ((1, 3, 32, 32), (5, 3, 47, 61)):  # neither number nor size is one that the export compared
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            assert relative_error(run(made.path, x.numpy()), net(x)) <= 1e-5


@pytest.mark.usefixtures("exported_once")
@pytest.mark.parametrize(("name", "suffix"), PREPARED)
def test_pictures_are_prepared_inside(suffix, name, net, photos, tmp_path):
    other = network()
    other.preprocess = record = RECORDS[name]
    made = export(other, tmp_path / f"net{suffix}", preprocessing=True, pictures=[pixels(photos[0])])
    for path in photos[:3]:
        x = by_torchvision(path, record)
        views = [x, x.flip(-1)] if len(record.views) > 1 else [x]
        with torch.no_grad():
            wanted = torch.stack([other(view) for view in views]).mean(0)
        assert relative_error(run(made.path, pixels(path)[None]), wanted) <= 0.02


@pytest.mark.long
@pytest.mark.parametrize("suffix", FORMATS)
def test_twenty_photographs_before_the_first_convolution(suffix, photos, tmp_path):
    FORMATS[suffix].write(program.of_pixels(IMAGENET), tmp_path / f"pixels{suffix}")
    std = torch.tensor(IMAGENET.std)[:, None, None]
    for path in photos[:20]:
        found = run(tmp_path / f"pixels{suffix}", pixels(path)[None])
        assert float(((found - by_torchvision(path, IMAGENET)) * std).abs().max()) * 255 <= 2.001, path


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long) for name in TWENTY.split()])
def test_twenty_networks(suffix, name, tmp_path):
    spec, _ = trimmed(variant(name), later=1)
    net = random_network(spec, 65)
    made = export(net, tmp_path / f"net{suffix}")
    assert max(each.difference for each in made.compared) <= 1e-4
    for shape in ((1, 3, 65, 65), (4, 3, 96, 128)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            assert relative_error(run(made.path, x.numpy()), net(x)) <= 1e-4


def random_network(spec: NetSpec, size: int) -> ResNet:
    net = ResNet(plan(spec, size))
    net.load_state_dict(random_state(net))
    net.preprocess = IMAGENET.at(size)
    return net.eval()


@pytest.mark.parametrize(("dims", "shape"), [(1, (2, 3, 90)), (3, (2, 3, 20, 33, 40))])
def test_signals_and_volumes(dims, shape, tmp_path):
    net = random_network(replace(SPEC, dims=dims), 32)
    made = export(net, tmp_path / "net.onnx")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert relative_error(run(made.path, x.numpy()), net(x)) <= 1e-5
    with pytest.raises(SpecError, match="takes no pictures"):
        export(net, tmp_path / "other.onnx", preprocessing=True)


@pytest.mark.usefixtures("exported_once")
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_says_what_it_is(suffix, net, tmp_path):
    said = json.loads(FORMATS[suffix].read(export(net, tmp_path / f"net{suffix}").path))
    assert said["classes"] == list(net.classes)
    assert said["preprocess"]["crop"] == net.preprocess.crop
    assert said["spec"]["norm"] == "none"  # folded


@pytest.mark.usefixtures("exported_once")
def test_onnx_reads_back(net, tmp_path):
    there = export(net, tmp_path / "net.onnx").path
    back = isthmus.load(there).eval()
    assert (back.classes, back.preprocess, back.spec.name) == (net.classes, net.preprocess, net.spec.name)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert relative_error(back(x), net(x)) <= 1e-5


# Faults: each is refused, and no file is left


class Brighter(nn.Module):
    """Another function than the network's, in a hundredth."""

    def __init__(self, form: ResNet) -> None:
        super().__init__()
        self.form = form

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.form(images * 1.01)


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_engine_that_gives_wrong_numbers(suffix, net, tmp_path, monkeypatch):
    real = program.traced
    monkeypatch.setattr(program, "traced", lambda form, *others: real(Brighter(form), *others))
    (tmp_path / f"net{suffix}").write_text("an older file")
    with pytest.raises(ExportError, match="does not compute what the network does"):
        export(net, tmp_path / f"net{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == [f"net{suffix}"]
    assert (tmp_path / f"net{suffix}").read_text() == "an older file"


def test_a_resize_that_is_not_antialiased(net, photos, tmp_path, monkeypatch):
    real = graph.F.interpolate
    monkeypatch.setattr(graph.F, "interpolate", lambda x, **how: real(x, **how | {"antialias": False}))
    with pytest.raises(ExportError, match="grey levels of 2 pictures before the network"):
        export(net, tmp_path / "net.onnx", preprocessing=True, pictures=[pixels(path) for path in photos[:2]])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fault", "error", "reason"),
    [
        (lambda net, _: net.train(), SpecError, "training mode"),
        (lambda _, path: path.with_suffix(".h5"), SpecError, "no suffix that says what to write"),
        (lambda _, path: path.parent / "nowhere" / path.name, RunError, "cannot write"),
    ],
)
def test_mistakes(fault, error, reason, tmp_path):
    net, path = network(), tmp_path / "net.onnx"
    found = fault(net, path)
    with pytest.raises(error, match=reason) as caught:
        export(net, found if isinstance(found, Path) else path)
    assert isinstance(caught.value, IsthmusError)
    assert not list(tmp_path.iterdir())


def test_an_engine_that_fails_with_a_file_is_told(tmp_path):
    """torch.export ties the length of a signal to the one that it saw."""
    signal = network(replace(SPEC, dims=1))
    with pytest.raises(ExportError, match=r"torch\.export cannot express or run this network: .*; try another format"):
        export(signal, tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


def test_channels_that_pictures_do_not_have(tmp_path):
    with pytest.raises(
        SpecError, match="takes 5 channels, and pictures in RGB have 3: export it without preprocessing"
    ):
        export(network(replace(SPEC, in_channels=5)), tmp_path / "net.onnx", preprocessing=True)


@pytest.mark.usefixtures("exported_once")
@pytest.mark.parametrize(("suffix", "whose"), [(".xml", "OpenVINO"), (".pt2", r"torch\.export")])
def test_files_for_engines_are_not_loaded_as_weights(suffix, whose, tmp_path):
    export(network(), tmp_path / f"net{suffix}")
    with pytest.raises(WeightsError, match=rf"is a file for {whose}; load what it was exported from"):
        isthmus.load(tmp_path / f"net{suffix}")
