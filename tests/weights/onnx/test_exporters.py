"""Graphs as the exporters of torch, Keras and TensorFlow write them: the known network comes back, and its logits."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from isthmus.arch.plan import plan
from isthmus.arch.spec import NetSpec, StageSpec, StemSpec
from isthmus.arch.variants import variant
from isthmus.errors import MissingExtraError, WeightsError
from isthmus.nn.network import ResNet
from isthmus.weights.load import load
from isthmus.weights.onnx.graph import read_onnx
from isthmus.weights.onnx.parity import onnx_outputs
from onnx_writer import onnx_parity
from oracles import randomise, relative_error

EXPORTER = Path(__file__).parents[2] / "keras_exporter.py"
TOLERANCE = 1e-4  # the graph's arithmetic and ours are single precision

V1 = NetSpec(
    stages=(StageSpec(depth=2, mid=4, out=16), StageSpec(depth=2, mid=8, out=32, stride=2)),
    stride_at="conv1",
    num_classes=5,
)
V2 = replace(
    V1,
    stages=(
        StageSpec(depth=2, mid=4, out=16, block="preact_bottleneck", stride=2, stride_block="last"),
        StageSpec(depth=2, mid=8, out=32, block="preact_bottleneck", stride_block="last"),
    ),
    stride_at="conv2",
    shortcut="maxpool",
    stem=StemSpec(pool="max_zero", bias=True),
)
KERAS = {
    "v1": V1,
    "v2": V2,
    # Its norms come spelled out, without an epsilon, so it is the table's.
    "resnet50v2": replace(variant("resnetv2_50_keras"), num_classes=5),
}


def export(module, path, *, exporter, separate=False, size=64):
    """A graph by torch's exporter of TorchScript's days or by the current one, its norms folded or as they are."""
    x = (torch.randn(1, 3, size, size),)
    if exporter == "script":
        how = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False} if separate else {}
        axes = {"x": {0: "batch"}}
        torch.onnx.export(module, x, str(path), dynamo=False, input_names=["x"], dynamic_axes=axes, **how)
    else:
        shapes = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(
            module, x, str(path), dynamo=True, dynamic_shapes=shapes, optimize=not separate, verbose=False
        )
    return path


def single(name, **options):
    """One block a stage and ten classes: timm's network, and our spec."""
    spec = variant(name)
    module = timm.create_model(name, layers=(1,) * len(spec.stages), num_classes=10, **options)
    spec = replace(spec, stages=tuple(replace(stage, depth=1) for stage in spec.stages), num_classes=10)
    return randomise(module).float(), spec


CASES = [
    ("resnet18", "script", False),
    ("resnet18", "script", True),
    ("resnext50_32x4d", "script", False),
    ("ecaresnet26t", "script", False),
    ("resnetblur18", "script", True),
    ("seresnet18", "script", False),
    ("resnetv2_50", "script", True),
    ("resnetv2_50d", "script", False),
    ("resnet10t", "current", False),
    ("seresnet18", "current", True),
]
LONG = [
    (name, exporter, separate)
    for name in (
        "resnetv2_50d",
        "resnet26d",
        "resnetaa34d",
        "resnetrs50",
        "seresnet50t",
        "ecaresnet50d",
        "resnetblur50",
    )
    for exporter in ("script", "current")
    for separate in (False, True)
    if (name, exporter, separate) not in CASES
]


@pytest.mark.parametrize(
    ("name", "exporter", "separate"), [*CASES, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)]
)
@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.onnx", "ignore::UserWarning:torch.onnx")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")  # torch.export speaking to itself
def test_torch(tmp_path, name, exporter, separate):
    module, spec = single(name)
    net = load(export(module, tmp_path / "a.onnx", exporter=exporter, separate=separate))
    folded = not separate and not spec.preact
    assert net.spec == replace(
        spec, name="resnet10t" if name == "resnet10t" else "a", norm="none" if folded else "batch"
    )
    assert onnx_parity(tmp_path / "a.onnx", net) < TOLERANCE
    x = torch.randn(2, 3, 64, 64)
    assert relative_error(net(x), module(x)) < TOLERANCE


OURS = {
    "pad": replace(
        V1,
        stages=(
            StageSpec(depth=1, mid=8, out=8, block="basic"),
            StageSpec(depth=1, mid=16, out=16, block="basic", stride=2),
        ),
        stride_at="conv2",
        shortcut="pad",
        stem=StemSpec(widths=(8,), kernel=3, stride=1, pool="none"),
    ),
    "dilated average": replace(
        V1, stride_at="conv2", shortcut="avg", stages=(*V1.stages, StageSpec(depth=2, mid=8, out=64, stride=2))
    ).with_output_stride(8),
    "Keras V2": V2,
    "silu, ECA": replace(V1, activation="silu", attention="eca"),
}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.onnx", "ignore::UserWarning:torch.onnx")
def test_our_own_networks_through_torch(tmp_path, name):
    """What no other library here makes; with every norm as it is, all tensors come back to the bit."""
    net = randomise(ResNet(plan(OURS[name], 65))).float()
    path = export(net, tmp_path / "a.onnx", exporter="script", separate=True, size=65)
    found = read_onnx(path)
    assert found.spec == replace(OURS[name], name="a")
    state = net.state_dict()
    assert set(found.tensors) == set(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in found.tensors.items() if tensor.is_floating_point())
    path = export(net, tmp_path / "folded.onnx", exporter="script", size=65)
    assert onnx_parity(path, load(path)) < TOLERANCE


@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.onnx")
def test_a_network_of_the_table_gets_its_name_and_other_activations_are_found(tmp_path):
    module = randomise(timm.create_model("resnet26t", num_classes=7)).float()
    net = load(export(module, tmp_path / "a.onnx", exporter="script"))
    assert net.spec == replace(variant("resnet26t"), num_classes=7, norm="none")
    module, spec = single("resnet26t", act_layer="silu")
    net = load(export(module, tmp_path / "a.onnx", exporter="script"))
    assert net.spec == replace(spec, name="a", activation="silu", norm="none")
    assert onnx_parity(tmp_path / "a.onnx", net) < TOLERANCE


def keras_graphs(folder, backend, cases):
    """Graphs by Keras in a process of its own."""
    environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(EXPORTER), str(folder), *cases],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return Path(folder)


def check_keras(folder, name, way):
    path = folder / f"{name}_{way}.onnx"
    net = load(path)
    assert replace(net.spec, name=KERAS[name].name) == KERAS[name]
    assert net.spec.name == (KERAS[name].name or path.stem)
    pictures = torch.from_numpy(np.load(folder / "pictures.npy")).permute(0, 3, 1, 2)
    mine, theirs = onnx_outputs(path, net, pictures)
    assert relative_error(mine, theirs) < TOLERANCE
    assert relative_error(mine, torch.from_numpy(np.load(folder / f"{name}.npy")).double()) < TOLERANCE


TF2ONNX = [(name, way) for name in ("v1", "v2") for way in ("from_keras", "from_function", "channels_first")]
TF2ONNX += [("resnet50v2", "from_keras")]  # a whole network of the table
needs_tensorflow = pytest.mark.skipif(
    not (find_spec("tensorflow") and find_spec("tf2onnx")), reason="TensorFlow or tf2onnx is not installed"
)


@pytest.fixture(scope="session")
def by_torch(tmp_path_factory):
    return keras_graphs(tmp_path_factory.mktemp("torch"), "torch", ["v1:export", "v2:export"])


@pytest.fixture(scope="session")
def by_tensorflow(tmp_path_factory):
    return keras_graphs(tmp_path_factory.mktemp("tensorflow"), "tensorflow", ["v1:export", "v2:export"])


@pytest.fixture(scope="session")
def by_tf2onnx(tmp_path_factory):
    return keras_graphs(tmp_path_factory.mktemp("tf2onnx"), "tensorflow", [f"{name}:{way}" for name, way in TF2ONNX])


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_keras_on_torch(by_torch, name):
    check_keras(by_torch, name, "export")


@needs_tensorflow
@pytest.mark.parametrize("name", ["v1", "v2"])
def test_keras_on_tensorflow(by_tensorflow, name):
    check_keras(by_tensorflow, name, "export")


@needs_tensorflow
@pytest.mark.long
@pytest.mark.parametrize(("name", "way"), TF2ONNX)
def test_tf2onnx(by_tf2onnx, name, way):
    check_keras(by_tf2onnx, name, way)


def test_parity_is_far_off_for_another_network_and_refused_for_one_of_other_classes(by_torch):
    path = by_torch / "v1_export.onnx"
    net = load(path)
    assert onnx_parity(path, net) < TOLERANCE
    net.layer2[1].bn3.weight.data.mul_(1.5)
    assert onnx_parity(path, net) > 100 * TOLERANCE
    assert net.training is False
    with pytest.raises(WeightsError, match="num_classes 5 and the network 3"):
        onnx_parity(path, ResNet(load(path, num_classes=3, head="adapt").plan))


def test_parity_without_onnxruntime(monkeypatch, by_torch):
    net = load(by_torch / "v1_export.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match="onnxruntime is needed here and not installed"):
        onnx_parity(by_torch / "v1_export.onnx", net)
