"""ONNX files that lie: about sizes, places and order. All end in WeightsError, before memory is taken."""

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from isthmus.arch.plan import plan
from isthmus.arch.spec import NetSpec, StageSpec, StemSpec
from isthmus.errors import WeightsError
from isthmus.nn.network import ResNet
from isthmus.weights.onnx.file import read_graph
from isthmus.weights.onnx.graph import read_onnx
from onnx_writer import write_graph
from oracles import randomise

SPEC = NetSpec(stages=(StageSpec(depth=1, mid=4, out=16),), stem=StemSpec(widths=(8,)), num_classes=5)


@pytest.fixture
def path(tmp_path):
    return write_graph(tmp_path / "a.onnx", randomise(ResNet(plan(SPEC, 32))).float())


def changed(path, change):
    """The file with a changed model."""
    model = onnx.load(str(path), load_external_data=False)
    change(model.graph)
    path.write_bytes(model.SerializeToString())
    return path


def ended(path, reason):
    """Whether reading raises, and takes no memory beyond the file's and a little."""
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match=reason):
            read_onnx(path)
        assert tracemalloc.get_traced_memory()[1] < 2 * path.stat().st_size + 40_000_000
    finally:
        tracemalloc.stop()


def first(graph, **fields):
    """The first constant with other fields."""
    tensor = graph.initializer[0]
    for name, value in fields.items():
        if name == "dims":
            tensor.dims[:] = value
        else:
            setattr(tensor, name, value)
    return tensor


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda graph: first(graph, dims=[1 << 40, 3, 7, 7]), r"bytes of data; it is damaged"),
        (lambda graph: first(graph, dims=[-8, 3, 7, 7]), "which no tensor can have"),
        (lambda graph: first(graph, dims=[1] * 9), "which no tensor can have"),
        (lambda graph: first(graph, dims=[1 << 62, 1 << 62]), "it is damaged"),
        (lambda graph: first(graph, dims=[0, 3, 7, 7], raw_data=b""), "or nothing"),
        (lambda graph: first(graph, raw_data=b"123"), "with 3 bytes of data"),
        (lambda graph: first(graph, data_type=TensorProto.DOUBLE), "it is damaged"),
        (lambda graph: first(graph, data_type=TensorProto.STRING), "type STRING; known types"),
        (lambda graph: first(graph, data_type=99), "type 99; known types"),
        (lambda graph: first(graph).ClearField("raw_data"), "with 0 values of data"),
        (lambda graph: graph.sparse_initializer.add(), "sparse constants"),
        (lambda graph: graph.output.add(name="more"), r"several outputs or none \(n\d+, more\)"),
        (lambda graph: graph.ClearField("output"), "several outputs or none"),
        (lambda graph: graph.input.add(name="more"), "takes inputs of shapes"),
        (lambda graph: graph.ClearField("node"), "it has no nodes"),
        (lambda graph: setattr(graph.input[0].type.tensor_type, "elem_type", TensorProto.UINT8), "type UINT8"),
        (lambda graph: graph.input[0].type.tensor_type.shape.dim[1].ClearField("value"), "channels is not fixed"),
    ],
)
def test_lies_about_constants_inputs_and_outputs(path, change, reason):
    ended(changed(path, change), reason)


def node(op, inputs, output, **attributes):
    return helper.make_node(op, inputs, [output], name="culprit", **attributes)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([node("Relu", ["out"], "out")], "no node makes its input 'out'"),
        ([node("Relu", ["b"], "a"), node("Relu", ["a"], "b")], "no node makes its input 'b'"),
        ([node("Relu", ["picture"], "a"), node("Relu", ["picture"], "a")], "what it makes is there already"),
        ([helper.make_node("Relu", ["picture"], [], name="culprit")], "there already, or has no name"),
        ([node("Constant", [], "a")], "a constant of this kind cannot be read"),
        ([node("Constant", [], "a", value_string="x")], "a constant of this kind"),
        ([node("ConstantOfShape", ["huge"], "a")], "out of nothing"),
        ([node("Expand", ["one", "huge"], "a")], "out of nothing"),
        ([node("Add", ["column", "line"], "a")], "out of nothing"),
        ([node("Gather", ["table", "line64"], "a")], "out of nothing"),
        ([node("Tile", ["one", "huge"], "a")], "in a way that is not known"),
        ([node("Loop", ["one", "one", "picture"], "a")], "no place in a network of this family"),
        ([node("Reshape", ["picture", "huge"], "a")], "whose order it would change"),
        ([node("Reshape", ["one", "huge"], "a")], "do not fit it"),
        ([node("Pad", ["picture", "pads"], "a")], r"adds \d+ channels"),
        ([node("Transpose", ["picture"], "a", perm=[0, 0, 1, 2])], "perm .* does not fit"),
        ([node("DequantizeLinear", ["one", "one", "one"], "a")], "quantised"),
        ([node("QuantizeLinear", ["picture", "one", "one"], "a")], "holds a network in 8 bits"),
        ([node("Cast", ["picture"], "a", to=3)], "quantised graphs"),
        ([node("FusedConv", ["picture", "one"], "a", domain="com.microsoft")], r"\(com.microsoft.FusedConv\)"),
        ([node("Constant", [], "a", value_ints=[1] * 5000)], "of 5000 numbers; store them as a tensor"),
        ([node("Relu", ["picture"], str(number)) for number in range(50_001)], "has 50001 nodes"),
    ],
)
def test_lies_about_nodes(tmp_path, nodes, reason):
    constants = {
        "one": np.ones(1, np.float32),
        "huge": np.array([1 << 20, 1 << 20]),
        "line": np.ones((1, 100_000), np.float32),
        "column": np.ones((100_000, 1), np.float32),
        "table": np.ones((1, 100_000), np.float32),
        "line64": np.zeros(100_000, np.int64),
        "pads": np.array([0, 0, 0, 0, 0, 1 << 40, 0, 0]),
    }
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("picture", TensorProto.FLOAT, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    path = tmp_path / "a.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    ended(path, reason)


def test_folded_constants_have_a_budget(tmp_path):
    nodes = [node("Neg", ["big"] if number == 0 else [str(number)], str(number + 1)) for number in range(200)]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("picture", TensorProto.FLOAT, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.zeros(1 << 18, np.float32), "big")],
    )
    (tmp_path / "a.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    ended(tmp_path / "a.onnx", "take too much memory")


def external(path, **told):
    """The file's first constant as one that lies in another file."""
    model = onnx.load(str(path))
    tensor = model.graph.initializer[0]
    (path.parent / "data").write_bytes(tensor.raw_data)
    told = {"location": "data", **told}
    helper.set_model_props(model, {})
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in told.items():
        tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_is_read(path):
    wanted = read_onnx(path).tensors["conv1.weight"]
    assert (read_onnx(external(path)).tensors["conv1.weight"] == wanted).all()


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"location": ""}, "outside the file's folder"),
        ({"location": "../data"}, "outside the file's folder"),
        ({"location": "a/../../data"}, "outside the file's folder"),
        ({"location": "/etc/passwd"}, "outside the file's folder"),
        ({"location": "data\0"}, "outside the file's folder"),
        ({"location": "x" * 5000}, "outside the file's folder|not there"),
        ({"location": "."}, "not there"),
        ({"location": "gone"}, "not there"),
        ({"offset": 4}, "needs more of 'data'"),
        ({"offset": -4}, "it is damaged"),
        ({"offset": 1 << 62}, "damaged|needs more"),
        ({"offset": "four"}, "it is damaged"),
        ({"length": 4}, "it is damaged"),
        ({"length": 1 << 62}, "it is damaged"),
    ],
)
def test_external_data_outside_or_beyond(path, told, reason):
    ended(external(path, **told), reason)


def test_external_data_behind_a_link(path, tmp_path):
    """A link out of the folder is refused; links as the hub's cache has them, all into one folder, are followed."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    external(path)
    (folder / "a.onnx").symlink_to(path)
    (folder / "data").symlink_to(tmp_path / "data")
    assert read_onnx(folder / "a.onnx").spec.num_classes == 5
    (folder / "a.onnx").unlink()
    (folder / "a.onnx").write_bytes(path.read_bytes())
    ended(folder / "a.onnx", "outside the file's folder")


def test_one_external_file_is_not_read_for_many_tensors(path):
    external(path)

    def repeat(graph):
        for number in range(50):
            graph.initializer.add().CopyFrom(graph.initializer[0])
            graph.initializer[-1].name = f"more {number}"

    ended(changed(path, repeat), r"needs more of 'data'")


def test_every_type_of_constant(tmp_path):
    wanted = np.array([[1.5, -2.0], [0.25, 4.0]])
    kinds = {"FLOAT": np.float32, "DOUBLE": np.float64, "FLOAT16": np.float16, "INT64": np.int64, "INT8": np.int8}
    tensors = []
    for name, kind in kinds.items():
        tensors.append(numpy_helper.from_array(wanted.astype(kind), f"{name} raw"))
        tensors.append(
            helper.make_tensor(f"{name} list", TensorProto.DataType.Value(name), (2, 2), wanted.astype(kind))
        )
    tensors.append(helper.make_tensor("BFLOAT16 list", TensorProto.BFLOAT16, (2, 2), wanted.reshape(-1)))
    tensors.append(helper.make_tensor("BOOL list", TensorProto.BOOL, (2, 2), wanted.reshape(-1) > 0))
    graph = helper.make_graph(
        [helper.make_node("Relu", ["picture"], ["out"])],
        "graph",
        [helper.make_tensor_value_info("picture", TensorProto.FLOAT, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        tensors,
    )
    path = Path(tmp_path / "a.onnx")
    path.write_bytes(helper.make_model(graph).SerializeToString())
    found = read_graph(path).constants
    for tensor in tensors:
        assert (found[tensor.name] == numpy_helper.to_array(tensor).astype(found[tensor.name].dtype)).all(), tensor.name
    assert found["BFLOAT16 list"].dtype == np.float32


def test_web_pages_and_empty_files_are_told_from_graphs(tmp_path):
    for content, reason in ((b"", "is empty"), (b"<!DOCTYPE html>", "web page")):
        (tmp_path / "a.onnx").write_bytes(content)
        ended(tmp_path / "a.onnx", reason)
