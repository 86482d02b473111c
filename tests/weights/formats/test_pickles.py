"""The pickle interpreter: every protocol of NumPy's and torch's own writers, and what it will not do."""

import argparse
import collections
import datetime as dt
import pathlib
import pickle
import struct
import types

import numpy as np
import pytest
import torch

from isthmus.errors import WeightsError
from isthmus.weights import files
from isthmus.weights.formats.pickle_globals import ForeignError, Inert
from isthmus.weights.formats.pickles import FREE_STEPS, Budget, load

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def loaded(content, path, **options):
    path.write_bytes(content)
    with path.open("rb") as file:
        return load(file, path, len(content), Budget(len(content)), **options)


class Attributes:
    pass


PLAIN = {
    "numbers": [0, 1, -1, 255, 65_535, 1 << 31, -(1 << 40), 1 << 90, 0.5, -1e300, True, False, None],
    "texts": ["", "a", "größer als 🙂", "x" * 300],
    "nested": {"a": [{"b": [[]]}, {}], 3: {"c": ()}, "tuples": [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]},
    None: 1,
    2.5: 1,
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_content_as_pickle_reads_it(tmp_path, protocol):
    shared = ["one"]
    content = PLAIN | {"ordered": collections.OrderedDict(a=1, b=2), "shared": [shared, shared]}
    found = loaded(pickle.dumps(content, protocol), tmp_path / "a")
    assert found == content
    assert found["shared"][0] is found["shared"][1]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_scripts_store_beside_weights_stands_aside(tmp_path, protocol):
    content = {
        "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(a=1)),
        "simple": types.SimpleNamespace(a=1),
        "path": pathlib.PurePosixPath("/a/b"),
        "when": dt.datetime(2020, 1, 2),  # noqa: DTZ001
        "counts": collections.defaultdict(list, {"a": [1]}),
        "counter": collections.Counter("aab"),
        "range": range(3),
        "set": {1},
        "frozen": frozenset({1}),
        "scalar": np.float64(0.5),
        "objects": np.array([None, "a"], dtype=object),
        "words": np.array(["a", "b"]),
    }
    found = loaded(pickle.dumps(content, protocol), tmp_path / "a")
    assert found["args"] == Inert("argparse.Namespace")
    assert (found["counts"], found["counter"]) == ({"a": [1]}, {"a": 2, "b": 1})
    assert (found["set"], found["frozen"]) == ([1], [1])
    assert {type(found[name]) for name in ("path", "when", "simple", "scalar", "range")} == {Inert}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "i8", "u1", "?", "c8"])
def test_arrays_of_every_protocol(tmp_path, protocol, dtype):
    random = np.random.default_rng(0)
    arrays = {
        "small": random.integers(0, 2, 3).astype(dtype),
        "large": random.integers(0, 100, (40, 50, 3)).astype(dtype),
        "columns": np.asfortranarray(random.integers(0, 100, (40, 50)).astype(dtype)),
        "scalar": np.asarray(1, dtype),
        "empty": np.zeros((0, 3), dtype),
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}, protocol))
    found = files.read(tmp_path / "a.pkl")
    assert (found.format, found.notes) == ("pickle", ("tensors taken from 'model'",))
    assert all(np.array_equal(found.tensors[name].numpy(), array) for name, array in arrays.items())
    shapes = {name: header.shape for name, header in files.headers(tmp_path / "a.pkl").entries.items()}
    assert shapes == {name: array.shape for name, array in arrays.items()}


def test_arrays_of_the_first_protocol_are_refused_by_name(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": np.ones(3)}, 0))
    with pytest.raises(WeightsError, match="as protocol 0 of pickle writes"):
        files.read(tmp_path / "a.pkl")


def python2(arrays):
    """The pickle that Python 2 wrote of a dict of float32 arrays in protocol 2: its strings are bytes."""

    def text(content):
        length = len(content)
        return (b"U" + bytes([length]) if length < 256 else b"T" + struct.pack("<i", length)) + content

    out = b"\x80\x02}("
    for name, array in arrays.items():
        sizes = b"".join(b"J" + struct.pack("<i", size) for size in array.shape)
        out += text(name.encode()) + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R"
        out += (
            b"(K\x01("
            + sizes
            + b"tcnumpy\ndtype\nU\x02f4K\0K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        )
        out += b"\x89" + text(array.tobytes()) + b"tb"
    return out + b"u."


def test_pickle_of_python_2_as_caffe2_models_are(tmp_path):
    random = np.random.default_rng(0)
    arrays = {
        "conv1_w": random.random((4, 3, 7, 7), np.float32),
        "conv1_w_momentum": random.random((4, 3, 7, 7), np.float32),
        "res_conv1_bn_s": random.random(4, np.float32),
    }
    content = python2(arrays)
    wanted = pickle.loads(content, encoding="latin1")
    assert all(np.array_equal(wanted[name], array) for name, array in arrays.items()), "it is no such pickle"
    (tmp_path / "R-50.pkl").write_bytes(content)
    found = files.read(tmp_path / "R-50.pkl")
    assert set(found.tensors) == {"conv1_w", "res_conv1_bn_s"}
    assert found.notes == ("1 momenta of the optimiser left aside",)
    assert all(np.array_equal(tensor.numpy(), arrays[name]) for name, tensor in found.tensors.items())


def test_equal_arrays_do_not_share_memory(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": np.zeros(3), "b": np.zeros(3)}, 2))
    found = files.read(tmp_path / "a.pkl").tensors
    found["a"].fill_(1)
    assert found["b"].tolist() == [0, 0, 0]


def test_big_endian_arrays_are_refused(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": np.zeros(3, ">f4")}, 4))
    with pytest.raises(WeightsError, match="big-endian"):
        files.read(tmp_path / "a.pkl")


class Reduced:
    def __init__(self, *reduction):
        self.reduction = reduction

    def __reduce__(self):
        return self.reduction


FOREIGN = [
    b"cos\nsystem\n.",
    b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    b"(ios\nsystem\n.",
    b"(cos\nsystem\nS'x'\no.",
    b"\x80\x02\x82\x01.",
    b"\x80\x02cbuiltins\ngetattr\n.",
    b"\x80\x02ctorch\nload\n.",
    b"\x80\x02cnumpy\nload\n.",
    b"\x80\x02cisthmus.weights.formats.pickles\nload\n.",
    b"\x80\x02]}b.",  # attributes of a list
    b"\x80\x02K\x01)R.",  # a call of a number
    b"\x80\x02cargparse\nNamespace\n)R)R.",  # a call of an instance
]


@pytest.mark.parametrize("content", FOREIGN)
def test_objects_that_are_no_data_are_refused_by_name(tmp_path, content):
    with pytest.raises(ForeignError):
        loaded(content, tmp_path / "a")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", ValueError),
        (b"\x80\x02", ValueError),
        (b"\x80\x02]", ValueError),
        (b"\x80\x02\x1f.", ValueError),  # no opcode
        (b".", IndexError),
        (b"t.", IndexError),
        (b"h\x05.", KeyError),
        (b"\x80\x02U\xffshort.", ValueError),
        (b"\x80\x02T\xff\xff\xff\xff.", ValueError),
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".", ValueError),
        (b"\x80\x02}(K\x01\x85K\x02u.", ValueError),  # a tuple as a key
        (b"\x80\x02}(K\x01u.", ForeignError),  # a key without a value
        (b"\x80\x02K\x01Q.", ValueError),  # a reference that nobody can follow
        (b"\x97.", ValueError),  # a buffer outside the pickle
        (b"I" + b"9" * 5000 + b"\n.", ValueError),
        (b"S'" + b"x" * 70_000 + b"'\n.", ValueError),
    ],
)
def test_damaged_pickles_end_in_an_error(tmp_path, content, error):
    with pytest.raises(error):
        loaded(content, tmp_path / "a")


@pytest.mark.parametrize(
    "content",
    [
        b"]" * (FREE_STEPS + 60_000),  # 57 bytes of memory for one
        b"\x80\x04]\x94(" + b"N" * 2000 + b"e" + b"cbuiltins\ntuple\nh\x00\x85R" * 2000 + b".",  # that is copied
        b"\x80\x04(" + b"N" * 2000 + b"t\x94" + b"cnumpy\nndarray\nh\0\x85R" * 2000 + b".",  # that is walked
    ],
)
def test_what_costs_far_more_memory_than_bytes_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match="more objects than weights need"):
        loaded(content, tmp_path / "a")


def test_deep_nesting_is_no_recursion(tmp_path):
    depth = 100_000
    found = loaded(b"\x80\x02" + b"(" * depth + b"l" * depth + b".", tmp_path / "a")
    for _ in range(depth - 1):
        (found,) = found
    assert found == []
    key = b"\x80\x02}" + b")" + b"\x85" * depth + b"Ns."  # whose hash would need a C stack as deep
    with pytest.raises(ValueError, match="a key of type tuple"):
        loaded(key, tmp_path / "a")


def test_a_dict_that_holds_itself(tmp_path):
    content = {"epoch": 3}
    content["model"] = content
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(WeightsError, match="a pickle without named arrays"):
        files.read(tmp_path / "a.pkl")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.uint16,
    ],
)  # fmt: skip
def test_tensors_as_torch_loads_them(tmp_path, dtype, zipped):
    base = torch.arange(60).to(dtype)
    shared = torch.zeros(8, dtype=dtype)
    content = {
        "whole": base.clone().view(3, 4, 5),
        "turned": base.clone().view(3, 20).T,
        "part": base[7:19],
        "other": base[20:40].view(4, 5)[:, 1:3],
        "a": shared,
        "b": shared,
        "scalar": base[3].clone(),
        "empty": torch.zeros((0, 3), dtype=dtype),
        "parameter": torch.nn.Parameter(base.clone(), requires_grad=False),
    }
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found = files.read(tmp_path / "a.pth")
    assert found.format == "torch"
    for name, tensor in content.items():
        same = found.tensors[name]
        assert (same.dtype, same.shape, same.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
        assert torch.equal(same.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    found.tensors["a"].view(torch.uint8)[0] = 1
    assert torch.equal(found.tensors["a"].view(torch.uint8), found.tensors["b"].view(torch.uint8))


@pytest.mark.parametrize(
    ("make", "mend"),
    [
        (lambda: torch.ones(1).expand(1000), "1000 elements in 4 bytes"),
        (lambda: torch.eye(3).to_sparse(), r"a sparse tensor; call to_dense\(\) and save again"),
        (
            lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            r"a quantised tensor; dequantise\(\) it",
        ),
        (lambda: torch.ones(3, dtype=torch.complex64).conj(), r"conjugated .*; call resolve_conj\(\)"),
        (lambda: torch.ones(3, dtype=torch.complex64).conj().imag, r"negated tensor; call .*resolve_neg\(\)"),
        (lambda: torch.ones(3, device="meta"), "a tensor on the meta device, which has no values"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # that sparse and quantised tensors are on their way out
def test_tensors_of_another_kind_are_refused_by_name(tmp_path, make, mend):
    torch.save({"a": make()}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=mend):
        files.read(tmp_path / "a.pth")


class Tensor(torch.Tensor):
    pass


def test_tensors_with_attributes_and_checkpoints_of_a_whole_training(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimiser = torch.optim.AdamW(net.parameters())
    net(torch.ones(2, 3, 5, 5)).sum().backward()
    optimiser.step()
    net[0].weight.a_note = "kept by torch in a state"
    content = {
        "state_dict": net.state_dict(),
        "optimizer": optimiser.state_dict(),
        "loss": torch.tensor(0.5),
        "random": torch.get_rng_state(),
        "numpy": np.zeros(4),
        "args": argparse.Namespace(lr=0.1),
    }
    torch.save(content, tmp_path / "a.pth")
    found = files.read(tmp_path / "a.pth")
    assert found.notes == ("tensors taken from 'state_dict'",)
    assert list(found.tensors) == list(net.state_dict())
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in net.state_dict().items())
