"""ONNX graphs read by structure: what was written comes back, the demo computes the same, the rest is named."""

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import skimage
import sklearn
import torch
import torchvision
from PIL import Image

from isthmus.arch.plan import plan
from isthmus.arch.spec import NetSpec, StageSpec, StemSpec
from isthmus.errors import MissingExtraError, WeightsError
from isthmus.nn.network import ResNet
from isthmus.weights.load import load
from isthmus.weights.onnx.graph import read_onnx
from isthmus.weights.published import catalog
from onnx_writer import Style, onnx_parity, write_graph
from oracles import randomise

BOTTLENECKS = (StageSpec(depth=2, mid=4, out=16), StageSpec(depth=3, mid=8, out=32, stride=2))
BASIC = (StageSpec(depth=2, mid=8, out=8, block="basic"), StageSpec(depth=1, mid=16, out=16, block="basic", stride=2))
PREACT = tuple(replace(stage, block="preact_bottleneck") for stage in BOTTLENECKS)
PLAIN = NetSpec(stages=BOTTLENECKS, stem=StemSpec(widths=(8,)), num_classes=5)
KERAS_V2 = replace(
    PLAIN,
    stages=tuple(
        replace(stage, stride=stride, stride_block="last") for stage, stride in zip(PREACT, (2, 1), strict=True)
    ),
    shortcut="maxpool",
    stem=StemSpec(widths=(8,), pool="max_zero", bias=True),
)
SPECS = {
    "plain": PLAIN,
    "folded": replace(PLAIN, norm="none"),
    "epsilon": replace(PLAIN, norm_eps=1e-3),
    "basic": replace(PLAIN, stages=BASIC),
    "v1, ceil": replace(PLAIN, norm="none", stride_at="conv1", stem=StemSpec(widths=(8,), pool="max_ceil")),
    "groups": replace(PLAIN, stages=tuple(replace(stage, groups=4) for stage in BOTTLENECKS)),
    "reduce": replace(PLAIN, stages=tuple(replace(stage, reduce=6) for stage in BOTTLENECKS)),
    "deep, average": replace(PLAIN, shortcut="avg", stem=StemSpec(widths=(4, 4, 8), kernel=3)),
    "conv pool": replace(PLAIN, norm="none", stem=StemSpec(widths=(4, 4, 8), kernel=3, pool="conv")),
    "conv3": replace(PLAIN, shortcut="conv3"),
    "small pictures": replace(PLAIN, stem=StemSpec(widths=(8,), kernel=3, stride=1, pool="none")),
    "dilated": replace(PLAIN, stages=(*BOTTLENECKS, replace(BOTTLENECKS[1], mid=16, out=64))).with_output_stride(8),
    "dilated, average": replace(
        PLAIN, shortcut="avg", stages=(*BOTTLENECKS, replace(BOTTLENECKS[1], mid=16, out=64))
    ).with_output_stride(8),
    "dilated basic": replace(PLAIN, stages=(*BASIC, replace(BASIC[1], depth=2, mid=32, out=32))).with_output_stride(8),
    "stride in the last block": replace(
        PLAIN,
        stages=tuple(
            replace(stage, stride=stride, stride_block="last")
            for stage, stride in zip(BOTTLENECKS, (2, 1), strict=True)
        ),
        shortcut="maxpool",
        stem=StemSpec(widths=(8,), pool="max_ceil"),
    ),
    "grey, features": replace(PLAIN, in_channels=1, num_classes=0),
    "silu": replace(PLAIN, activation="silu"),
    "SE": replace(PLAIN, attention="se"),
    "SE of a quarter, as in RS": replace(
        PLAIN,
        attention="se",
        attention_ratio=0.25,
        shortcut="avg",
        stages=tuple(replace(stage, mid=16, out=64 * number) for number, stage in enumerate(BOTTLENECKS, 1)),
        stem=StemSpec(widths=(4, 4, 8), kernel=3, pool="conv"),
    ),
    "ECA": replace(PLAIN, attention="eca"),
    "average pools against aliasing": replace(PLAIN, anti_alias="avg"),
    "blur": replace(PLAIN, anti_alias="blur"),
    "pre-activation": replace(PLAIN, stages=PREACT),
    "pre-activation, deep, average": replace(
        PLAIN, stages=PREACT, shortcut="avg", stem=StemSpec(widths=(4, 4, 8), kernel=3)
    ),
    "pre-activation of small pictures": replace(
        PLAIN, stages=PREACT, stem=StemSpec(widths=(8,), kernel=3, stride=1, pool="none")
    ),
    "pre-activation, SE": replace(PLAIN, stages=PREACT, attention="se"),
    "Keras V2": KERAS_V2,
}


def network(spec, size=64):
    return randomise(ResNet(plan(spec, size))).float()


def run(path, x, *more):
    session = onnxruntime.InferenceSession(
        path if isinstance(path, bytes) else str(path), providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run(list(more) or None, {session.get_inputs()[0].name: x.numpy()})[0])


def relative(found, wanted):
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


@pytest.mark.parametrize("name", SPECS)
def test_what_was_written_comes_back(tmp_path, name):
    net = network(SPECS[name])
    path = write_graph(tmp_path / "a.onnx", net)
    found = read_onnx(path)
    assert found.spec == replace(SPECS[name], name="a")
    counted = {key for key in net.state_dict() if key.endswith("num_batches_tracked")}
    assert set(found.tensors) == set(net.state_dict())
    assert all(torch.equal(found.tensors[key], item) for key, item in net.state_dict().items() if key not in counted)
    x = torch.randn(2, net.spec.in_channels, 64, 64)
    assert relative(load(path)(x), run(path, x).flatten(1)) < 1e-4


STYLES = {
    "factors": Style(norm="factor"),
    "statistics": Style(norm="statistics"),
    "biases beside norms": Style(biased=True),
    "biases beside factors": Style(biased=True, norm="factor"),
    "pads as nodes": Style(pads="node"),
    "automatic pads": Style(pads="same"),
    "maps with channels last": Style(maps="last"),
    "factors on channels last, pads as nodes": Style(maps="last", norm="statistics", pads="node", biased=True),
    "sums": Style(addition="Sum"),
}


@pytest.mark.parametrize("name", ["plain", "pre-activation", "Keras V2", "SE", "ECA", "blur"])
@pytest.mark.parametrize("style", STYLES)
def test_every_spelling_of_a_network(tmp_path, name, style):
    net = network(SPECS[name])
    path = write_graph(tmp_path / "a.onnx", net, style=STYLES[style])
    found = read_onnx(path)
    assert found.spec == replace(SPECS[name], name="a")
    assert any("factor and a term" in note for note in found.notes) == (STYLES[style].norm != "node")
    assert onnx_parity(path, load(path)) < 1e-5


@pytest.mark.parametrize("maps", ["first", "last"])
def test_gates_of_linear_layers(tmp_path, maps):
    net = network(SPECS["SE"])
    path = write_graph(tmp_path / "a.onnx", net, style=Style(gate="matmul", maps=maps))
    assert torch.equal(read_onnx(path).tensors["layer2.0.se.fc1.weight"], net.state_dict()["layer2.0.se.fc1.weight"])
    assert onnx_parity(path, load(path)) < 1e-5


def as_node(tensor):
    """A constant as a node, by the shortest way that there is."""
    array = onnx.numpy_helper.to_array(tensor)
    word = {np.dtype("f4"): "float", np.dtype("i8"): "int"}[array.dtype]
    if array.ndim == 0:
        value = {f"value_{word}": array.item()}
    elif array.ndim == 1:
        value = {f"value_{word}s": array.tolist()}
    else:
        value = {"value": tensor}
    return onnx.helper.make_node("Constant", [], [tensor.name], **value)


def test_constants_as_nodes(tmp_path):
    net = network(SPECS["pre-activation"])
    path = write_graph(tmp_path / "a.onnx", net, style=Style(norm="statistics", pads="node"))

    def move(graph):
        nodes = [*map(as_node, graph.initializer), *graph.node]
        graph.ClearField("initializer")
        graph.ClearField("node")
        graph.node.extend(nodes)

    wanted = read_onnx(path)
    changed(path, move)
    found = read_onnx(path)
    assert found.spec == wanted.spec
    assert all(torch.equal(tensor, wanted.tensors[name]) for name, tensor in found.tensors.items())


@pytest.mark.parametrize(("size", "pool"), [(64, "max_ceil"), (65, "max")])
def test_automatic_pads_are_worked_out(tmp_path, size, pool):
    """TensorFlow's SAME depends on the size: of an even map it pads only the end, of an odd one both sides."""
    spec = replace(PLAIN, stem=StemSpec(widths=(8,), kernel=3, pool=pool, stride=1))
    path = write_graph(tmp_path / "a.onnx", network(spec, size))

    def automatic(graph):
        pool = node(graph, "MaxPool")
        pool.attribute.remove(next(item for item in pool.attribute if item.name == "pads"))
        pool.attribute.append(onnx.helper.make_attribute("auto_pad", "SAME_UPPER"))

    changed(path, automatic)
    found = read_onnx(path)
    assert found.spec.stem.pool == pool
    assert any("automatic pads" in note for note in found.notes)
    assert onnx_parity(path, load(path)) < 1e-5
    changed(path, lambda graph: graph.input[0].type.tensor_type.shape.dim[2].ClearField("dim_value"))
    with pytest.raises(WeightsError, match="automatic padding depends on the picture's size"):
        read_onnx(path)


def test_half_precision(tmp_path):
    net = network(PLAIN)
    path = write_graph(tmp_path / "a.onnx", net)

    def halve(graph):
        for tensor in graph.initializer:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype("f2"), tensor.name))
        for value in (graph.input[0], graph.output[0]):
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16

    changed(path, halve)
    found = load(path)
    assert torch.equal(found.fc.weight, net.fc.weight.half().float())
    assert any("float16" in note for note in read_onnx(path).notes)
    assert onnx_parity(path, found) < 5e-3


def test_nodes_out_of_order(tmp_path):
    """ONNX Runtime takes them, and its converter to half precision puts the casts of the input last."""
    path = write_graph(tmp_path / "a.onnx", network(PLAIN), channels_last=True)

    def shuffle(graph):
        nodes = list(graph.node)
        graph.ClearField("node")
        graph.node.extend(nodes[::-1])

    wanted = read_onnx(path).tensors
    changed(path, shuffle)
    assert run(path, torch.randn(1, 64, 64, 3)).shape == (1, 5)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in read_onnx(path).tensors.items())


HEADS = [*product(("global", "window", "mean", "mean_last", "mean_flat"), ("gemm", "gemm_plain", "matmul"))]
HEADS += [("global", "conv"), ("mean", "conv")]  # a convolution needs axes of one for H and W


@pytest.mark.parametrize(("pool", "classifier"), HEADS)
def test_heads(tmp_path, pool, classifier):
    net = network(PLAIN)
    path = write_graph(tmp_path / "a.onnx", net, pool=pool, classifier=classifier, channels_last=True)
    found = read_onnx(path)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(found.tensors["fc.weight"], net.fc.weight)
    assert "(N, H, W, C)" in found.notes[0]
    assert relative(net(x), run(path, x.permute(0, 2, 3, 1).contiguous())) < 1e-4


@pytest.mark.parametrize("ending", ["Softmax", "LogSoftmax", "Sigmoid"])
def test_what_follows_the_logits_is_dropped_and_said(tmp_path, ending):
    path = write_graph(tmp_path / "a.onnx", network(PLAIN), ending=ending)
    found = read_onnx(path)
    assert found.spec.num_classes == 5
    assert (found.ending, found.notes) == (
        ending.lower(),
        (f"the graph ends in a {ending.lower()}; the network gives the logits before it",),
    )
    assert onnx_parity(path, load(path)) < 1e-5


def test_activations_of_one_node(tmp_path):
    path = write_graph(tmp_path / "a.onnx", network(PLAIN))
    wanted = read_onnx(path)
    changed(path, lambda graph: [rename(graph, "Relu", "Swish") for item in list(graph.node) if item.op_type == "Relu"])
    assert read_onnx(path).spec == replace(wanted.spec, activation="silu")


@pytest.mark.parametrize("eps", [1e-12, 1.001e-5, 0.1])
def test_any_epsilon_comes_back(tmp_path, eps):
    """As it was written, and not as single precision holds it."""
    spec = replace(PLAIN, norm_eps=eps)
    assert read_onnx(write_graph(tmp_path / "a.onnx", network(spec))).spec.norm_eps == eps


def test_a_classifier_that_pads_is_refused(tmp_path):
    path = write_graph(tmp_path / "a.onnx", network(PLAIN), classifier="conv")
    last = sum(item.op_type == "Conv" for item in onnx.load(path).graph.node) - 1
    changed(path, lambda graph: set_attribute(graph, "Conv", "pads", [1, 1, 1, 1], last))
    with pytest.raises(WeightsError, match=r"'culprit'.*must be a plain 1×1"):
        read_onnx(path)


@pytest.mark.parametrize(("name", "options"), [("resnet18", {}), ("resnet50", {}), ("resnext50_32x4d", {})])
@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.onnx")
def test_a_plain_export_of_torchvision(tmp_path, name, options):
    theirs = randomise(torchvision.models.get_model(name, weights=None)).float()
    x = torch.randn(1, 3, 64, 64)
    torch.onnx.export(theirs, (x,), str(tmp_path / "a.onnx"), dynamo=False)
    net = load(tmp_path / "a.onnx")
    assert relative(net(x), theirs(x)) < 1e-4


def photos():
    folder, other = Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images"
    return [folder / name for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")] + [
        other / "china.jpg"
    ]


def test_the_demo_computes_as_onnxruntime_on_five_photos():
    path = catalog.find(catalog.CATALOG["demo"])
    model = onnx.load(str(path))
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    model.graph.output.append(onnx.helper.make_tensor_value_info(softmax.input[0], onnx.TensorProto.FLOAT, None))
    net = load("demo")
    record = net.preprocess
    pixels = []
    for photo in photos():
        image = Image.open(photo).convert("RGB").resize((record.resize,) * 2, Image.Resampling.BILINEAR)
        edge = (record.resize - record.crop) // 2
        pixels.append(np.asarray(image)[edge : edge + record.crop, edge : edge + record.crop])
    # Theirs: BGR in 0..255 minus the mean, channels last. Ours: the record's own terms.
    raw = torch.from_numpy(np.stack(pixels)).float()
    theirs = raw.flip(-1) - torch.tensor([104.0, 117.0, 123.0])
    mean, std = (torch.tensor(values)[:, None, None] for values in (record.mean, record.std))
    mine = (raw.flip(-1).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        found = net(mine)
    wanted = run(model.SerializeToString(), theirs, softmax.input[0])
    assert (record.channels, record.squash, net.classes) == ("BGR", True, ("sfw", "nsfw"))
    assert relative(found, wanted) <= 1e-5


def changed(path, change):
    model = onnx.load(str(path))
    change(model.graph)
    onnx.save(model, str(path))


def node(graph, op, index=0):
    return [item for item in graph.node if item.op_type == op][index]


def rename(graph, op, to, index=0):
    found = node(graph, op, index)
    found.op_type, found.name = to, "culprit"


def set_attribute(graph, op, name, value, index=0):
    found = node(graph, op, index)
    found.name = "culprit"
    for item in [item for item in found.attribute if item.name == name]:
        found.attribute.remove(item)
    found.attribute.append(onnx.helper.make_attribute(name, value))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda graph: rename(graph, "Relu", "Sigmoid"), "Sigmoid.*Relu was expected here, as layer act1"),
        (lambda graph: rename(graph, "Relu", "Sigmoid", 3), "a ReLU or SiLU must follow a block"),
        (lambda graph: rename(graph, "Relu", "LeakyRelu", 3), "LeakyRelu.*no place in a network of this family"),
        (lambda graph: rename(graph, "Add", "Mul"), "the two ways of a residual block"),
        (lambda graph: rename(graph, "GlobalAveragePool", "GlobalMaxPool"), "no place in a network of this family"),
        (lambda graph: rename(graph, "Gemm", "Softmax"), "the graph does not end in a mean over the map"),
        (lambda graph: set_attribute(graph, "Conv", "pads", [2, 2, 3, 3]), r"pads \(2, 2, 3, 3\); as layer conv1"),
        (lambda graph: set_attribute(graph, "Conv", "auto_pad", "SAME_UPPER"), r"pads \(2, 2, 3, 3\); as layer conv1"),
        (lambda graph: set_attribute(graph, "MaxPool", "pads", [1, 1, 0, 0]), "fit neither of the stem pools"),
        (lambda graph: set_attribute(graph, "MaxPool", "kernel_shape", [2, 2]), r"kernel and strides are \(\(2, 2\)"),
        (lambda graph: set_attribute(graph, "Conv", "dilations", [3, 3], 2), r"layer1\.0\.conv2 it would be"),
        (lambda graph: set_attribute(graph, "Conv", "strides", [2, 1], 2), "strides"),
        (lambda graph: set_attribute(graph, "Gemm", "alpha", 2.0), "scaled"),
        (lambda graph: [rename(graph, "Relu", "Swish"), set_attribute(graph, "Swish", "alpha", 2.0)], "alpha is 2.0"),
        (lambda graph: [rename(graph, "MaxPool", "Pad"), node(graph, "Pad").ClearField("attribute")], "it has no pads"),
        (lambda graph: set_attribute(graph, "BatchNormalization", "epsilon", 0.1, 1), "epsilon"),
    ],
)
def test_what_cannot_be_expressed_is_an_error_naming_the_node(tmp_path, change, reason):
    path = write_graph(tmp_path / "a.onnx", network(PLAIN))
    changed(path, change)
    with pytest.raises(WeightsError, match=f"'culprit' .*{reason}"):
        read_onnx(path)


def test_windows_that_do_not_cover_the_map(tmp_path):
    path = write_graph(tmp_path / "a.onnx", network(PLAIN), pool="window")
    changed(path, lambda graph: set_attribute(graph, "AveragePool", "kernel_shape", [2, 2]))
    with pytest.raises(WeightsError, match=r"window of \(2, 2\) on a map of \(8, 8\)"):
        read_onnx(path)
    with pytest.raises(WeightsError, match="a fixed window over a map of any size"):
        read_onnx(write_graph(tmp_path / "a.onnx", network(PLAIN), pool="window", any_size=True))


def test_plain_networks_have_no_blocks(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "w"], ["y"]), onnx.helper.make_node("Relu", ["y"], ["z"])],
        "graph",
        [onnx.helper.make_tensor_value_info("x", 1, [1, 3, 8, 8])],
        [onnx.helper.make_tensor_value_info("z", 1, None)],
        [onnx.numpy_helper.from_array(model[0].weight.detach().numpy(), "w")],
    )
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "a.onnx"))
    with pytest.raises(WeightsError, match=r"logits \(N, classes\) were expected"):
        read_onnx(tmp_path / "a.onnx")
    graph.node.append(onnx.helper.make_node("GlobalAveragePool", ["z"], ["logits"]))
    graph.output[0].name = "logits"
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "a.onnx"))
    with pytest.raises(WeightsError, match="holds no residual network"):
        read_onnx(tmp_path / "a.onnx")


@pytest.mark.parametrize("part", [0, 0.3, 0.9])
def test_truncated(tmp_path, part):
    path = write_graph(tmp_path / "a.onnx", network(PLAIN))
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(WeightsError, match=r"a\.onnx"):
        read_onnx(path)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r'pip install "isthmus\[onnx\]"'):
        read_onnx("a.onnx")


def test_missing(tmp_path):
    with pytest.raises(WeightsError, match="No such file"):
        read_onnx(tmp_path / "a.onnx")


def external(path, location):
    model = onnx.load(str(path))
    onnx.external_data_helper.convert_model_to_external_data(model, location="a.data", size_threshold=0)
    onnx.save(model, str(path))
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(model, str(path))


def test_tensors_in_files_of_their_own_stay_in_the_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    net = network(PLAIN)
    path = write_graph(folder / "a.onnx", net)
    external(path, "a.data")
    assert torch.equal(read_onnx(path).tensors["fc.weight"], net.fc.weight)
    (folder / "a.data").rename(tmp_path / "a.data")
    for location in ("../a.data", str(tmp_path / "a.data")):
        path = write_graph(folder / "a.onnx", net)
        external(path, location)
        with pytest.raises(WeightsError, match="lies outside the file's folder"):
            read_onnx(path)
        (folder / "a.data").unlink()
    path = write_graph(folder / "a.onnx", net)
    external(path, "gone.data")
    with pytest.raises(WeightsError, match=r"a\.onnx"):
        read_onnx(path)
