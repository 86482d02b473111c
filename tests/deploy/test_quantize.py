"""Eight bits: what is measured is what the engine does on held-out pictures, and what spoils them is found."""

import copy
import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from scipy import stats

import isthmus
from isthmus.data.loader import Loader
from isthmus.data.pictures import Pictures
from isthmus.data.sources import open_pictures
from isthmus.data.transform import normalise
from isthmus.deploy import qdq
from isthmus.deploy.engines import Model
from isthmus.deploy.export import export
from isthmus.deploy.formats import FORMATS
from isthmus.deploy.quantize import Limits, calibrated, quantized, samples, to_be_timed
from isthmus.errors import DataError, PrecisionError, SpecError, WeightsError
from isthmus.nn.network import ResNet
from small_runs import PHOTOS, SIDE, SPEC, class_folders, network

LOOSE = Limits(max_drop=1.0, min_agreement=0.0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Pictures:
    return open_pictures(str(class_folders(tmp_path_factory.mktemp("photos"), dict.fromkeys(PHOTOS, 40), SIDE)))


@pytest.fixture(scope="module")
def net(pictures) -> ResNet:
    """A random trunk and a head fitted by least squares, so that classes are decided by more than rounding."""
    made = network(replace(SPEC, num_classes=len(pictures.classes)))
    loader = Loader(pictures=pictures, record=made.preprocess, batch_size=len(pictures), train=False)
    (batch,) = loader.epoch(0)
    with torch.no_grad():
        features = made.pooled(normalise(batch.images, made.preprocess))
        wanted = torch.nn.functional.one_hot(batch.labels).float()
        ones = torch.ones(len(features), 1)
        found = torch.linalg.lstsq(torch.cat([features, ones], 1), wanted).solution
        made.fc.weight.copy_(found[:-1].T)
        made.fc.bias.copy_(found[-1])
    made.classes = pictures.classes
    return made


@pytest.fixture(scope="module")
def halves(pictures) -> tuple[Pictures, Pictures]:
    return pictures.subset(range(0, len(pictures), 2)), pictures.subset(range(1, len(pictures), 2))


@pytest.fixture(scope="module")
def graphs(net, halves):
    """The graph in fp32, and in 8 bits."""
    original = onnx.load_from_string(Model(net).onnx)
    return original, calibrated(original, list(samples(halves[0], net, print)))


def by_onnxruntime(model, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {"images": images})[0]


IMAGES = np.random.default_rng(0).standard_normal((4, 3, SIDE, SIDE)).astype(np.float32)


def test_every_convolution_and_the_classifier_are_in_8_bits(graphs, net):
    found = list(qdq.layers(*graphs).values())
    convolutions = [name for name, module in net.named_modules() if isinstance(module, torch.nn.Conv2d)]
    assert set(found) >= {*convolutions, "fc"}
    assert "add behind layer1.0.conv3" in found


def test_no_layer_is_left_alone_or_every_one(graphs):
    original, low = graphs
    every = qdq.layers(original, low)
    np.testing.assert_array_equal(by_onnxruntime(qdq.mixed(original, low, ()), IMAGES), by_onnxruntime(low, IMAGES))
    whole = qdq.mixed(original, low, every)
    np.testing.assert_allclose(by_onnxruntime(whole, IMAGES), by_onnxruntime(original, IMAGES), rtol=1e-4, atol=1e-4)
    assert not {node.op_type for node in whole.graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    onnx.checker.check_model(whole)


def test_one_layer_left_alone(graphs):
    original, low = graphs
    every = qdq.layers(original, low)
    (stem,) = [node for node, name in every.items() if name == "conv1"]
    mixed = qdq.mixed(original, low, [stem])
    assert set(qdq.layers(original, mixed)) == set(every) - {stem}
    wanted = by_onnxruntime(original, IMAGES)
    errors = [np.square(by_onnxruntime(each, IMAGES) - wanted).mean() for each in (mixed, low)]
    assert errors[0] != errors[1]


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_what_is_told_is_what_the_file_does(engine, net, halves):
    found = quantized(Model(net), *halves, LOOSE, engine=engine)
    (batch,) = Loader(pictures=halves[1], record=net.preprocess, batch_size=999, train=False).epoch(0)
    images = normalise(batch.images, net.preprocess)
    with torch.no_grad():
        before = (net(images).argmax(1) == batch.labels).double()
        known = net(images).argmax(1)
    low = torch.from_numpy(by_onnxruntime(onnx.load_from_string(found.onnx), images.contiguous().numpy())).argmax(1)
    after = (low == batch.labels).double()
    slack = 0.0 if engine == "onnxruntime" else 0.05  # two engines round a few values differently
    assert found.judged.pictures == len(halves[1])
    assert found.judged.agreement == pytest.approx(float((low == known).double().mean()), abs=slack)
    assert found.judged.accuracy == pytest.approx(float(after.mean()), abs=slack)
    if engine == "onnxruntime":
        lost = (before - after).numpy()
        assert found.judged.drop == pytest.approx(lost.mean())
        wanted = stats.norm.interval(0.95, lost.mean(), lost.std() / len(lost) ** 0.5) if lost.any() else (0, 0)
        assert found.judged.interval == pytest.approx(wanted, abs=1e-3)
    assert found.judged.agreement > 0.9
    assert not found.higher


def test_without_labels_agreement_alone(net, halves):
    bare = [Pictures.stored(half.store, np.full(len(half.store), -1), ()).subset(half.places) for half in halves]
    judged = quantized(Model(net), *bare, LOOSE, engine="onnxruntime").judged
    assert (judged.accuracy, judged.drop, judged.interval) == (None, None, None)
    assert judged.agreement > 0.9
    assert str(judged).endswith("held-out pictures keep their class")


def with_an_outlier(net: ResNet) -> ResNet:
    """The same function, with one channel of a strip a thousand times as large as the others, and undone behind it."""
    other = network(net.spec)
    other.load_state_dict(net.state_dict())
    other.preprocess, other.classes = net.preprocess, net.classes
    block = other.get_submodule("layer2")[0]
    with torch.no_grad():
        block.bn1.weight[3] *= 1000
        block.bn1.bias[3] = block.bn1.bias[3].abs() * 1000
        block.conv2.weight[:, 3] /= 1000
    return other


def test_a_layer_that_8_bits_spoil_stays_in_higher_precision(net, halves):
    spoiled = with_an_outlier(net)
    told: list[str] = []
    plain = judge_all(spoiled, halves)
    found = quantized(
        Model(spoiled), *halves, Limits(max_drop=1.0, min_agreement=0.95), engine="onnxruntime", say=told.append
    )
    assert plain.agreement < 0.95 <= found.judged.agreement
    assert "layer2.0.conv2" in found.higher
    assert told[1] == "looking for the layers that cost it"
    assert "in higher precision stay" in str(found)


def judge_all(net, halves):
    return quantized(Model(net), *halves, LOOSE, engine="onnxruntime").judged


def test_calibration_that_saturates_is_refused_with_the_layers(net, halves, monkeypatch):
    """Ranges from pictures a hundredth as bright: every map overflows its 8 bits on real ones."""
    from isthmus.deploy import quantize

    real = samples
    monkeypatch.setattr(quantize, "samples", lambda *how: (image * np.float32(0.01) for image in real(*how)))
    with pytest.raises(
        PrecisionError, match=r"int8 changes more than --max-drop 0.01 and --min-agreement 0.98 allow"
    ) as error:
        quantized(Model(net), *halves, Limits(min_agreement=0.98), engine="onnxruntime")
    assert "Most of the error comes from" in str(error.value)
    assert len(error.value.tried) == quantize.TRIES
    assert error.value.tried[0].agreement < 0.8


@pytest.mark.parametrize(("suffix", "engine"), [(".onnx", "onnxruntime"), (".xml", "openvino")])
def test_a_file_in_8_bits(suffix, engine, net, halves, tmp_path):
    int8 = quantized(Model(net), *halves, LOOSE, engine=engine)
    made = export_fast(net, tmp_path / f"net{suffix}", int8)
    assert made.int8 == int8
    assert made.speed.rows[0].precision == "int8"
    assert json.loads(FORMATS[suffix].read(made.path))["classes"] == list(net.classes)
    if suffix == ".xml":
        kinds = {node.get_type_name() for node in openvino.Core().read_model(made.path).get_ops()}
        assert "FakeQuantize" in kinds
    else:
        assert (
            by_onnxruntime(onnx.load(made.path), IMAGES).tolist()
            == by_onnxruntime(onnx.load_from_string(int8.onnx), IMAGES).tolist()
        )


def export_fast(net, path, int8):
    """The export, on a machine where int8 saves time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "isthmus.deploy.predictor.measured", lambda opened, _: {pair: 1.0 + (pair[1] == "int8") for pair in opened}
        )
        return export(net, path, int8=int8)


def test_int8_that_saves_no_time_leaves_no_file(net, halves, tmp_path, monkeypatch):
    int8 = quantized(Model(net), *halves, LOOSE, engine="onnxruntime")
    monkeypatch.setattr(
        "isthmus.deploy.predictor.measured", lambda opened, _: {pair: 2.0 - (pair[1] == "int8") for pair in opened}
    )
    with pytest.raises(PrecisionError, match="int8 saves no time here"):
        export(net, tmp_path / "net.onnx", int8=int8)
    assert not list(tmp_path.glob("net*"))


def test_unreadable_pictures_are_told_and_left_out(net, halves, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    both = [half + Pictures.of_files([broken], [0], half.classes) for half in halves]
    told: list[str] = []
    judged = quantized(Model(net), *both, LOOSE, engine="onnxruntime", say=told.append).judged
    assert judged.pictures == len(halves[1])
    assert len([line for line in told if "1 pictures cannot be read and are left out" in line]) == 2


def test_what_int8_cannot_be_written_as(net, halves, tmp_path):
    timed = to_be_timed(Model(net))
    for suffix in (".onnx", ".pt2"):
        with pytest.raises(SpecError, match="was not measured in the engine"):
            export(net, tmp_path / f"net{suffix}", int8=timed)
    with pytest.raises(SpecError, match="cannot be had together"):
        export(net, tmp_path / "net.onnx", int8=timed, preprocessing=True)
    with pytest.raises(SpecError, match="torch does not compute in int8 here; known: onnxruntime, openvino"):
        quantized(Model(net), *halves, engine="torch")
    for empty in ((halves[0].subset([]), halves[1]), (halves[0], halves[1].subset([]))):
        with pytest.raises(DataError, match="there are no pictures to"):
            quantized(Model(net), *empty, LOOSE)


def test_int8_belongs_to_the_network_that_it_was_made_of(net, halves, tmp_path):
    """Not to one that was trained on since, whose figures it does not have."""
    int8 = quantized(Model(net), *halves, LOOSE)
    other = copy.deepcopy(net)
    other.fc.bias.data[0] += 0.3
    for use in (
        lambda: Model(other, int8),
        lambda: isthmus.Predictor(other, int8=int8),
        lambda: export(other, tmp_path / "net.xml", int8=int8),
    ):
        with pytest.raises(PrecisionError, match="made of another network, or of this one before it changed"):
            use()


def test_what_cannot_be_shown_is_not_quantised(net, halves):
    with pytest.raises(
        DataError, match=r"80 pictures cannot show that 0\.99 of all keep their class: give 100 or more"
    ):
        quantized(Model(net), *halves)
    for count in (0, 1):
        with pytest.raises(SpecError, match="this network tells none apart"):
            quantized(Model(network(replace(SPEC, num_classes=count))), *halves, LOOSE)
    with pytest.raises(SpecError, match="calibrated on pictures, and this network takes none"):
        quantized(Model(network(replace(SPEC, in_channels=5))), *halves, LOOSE)


def test_a_file_in_8_bits_is_not_loaded_as_weights(net, halves, tmp_path):
    (tmp_path / "net.onnx").write_bytes(quantized(Model(net), *halves, LOOSE, engine="onnxruntime").onnx)
    with pytest.raises(
        WeightsError, match="holds a network in 8 bits, which is for engines; load what it was made from"
    ):
        isthmus.load(tmp_path / "net.onnx")
