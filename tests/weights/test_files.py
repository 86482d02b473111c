"""Weight files: what is read, what is unwrapped, and what is refused without running anything."""

import argparse
import errno
import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
import torchvision
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from isthmus.errors import RunError, WeightsError
from isthmus.weights import files
from weight_files import write_shards

TENSORS = {"conv1.weight": torch.randn(4, 3, 3, 3), "fc.bias": torch.randn(5)}


def equal(found, wanted):
    return list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_safetensors_round_trip_with_metadata(tmp_path):
    path = tmp_path / "a.safetensors"
    files.write(path, TENSORS, {"who": "we"})
    found = files.read(path)
    assert equal(found.tensors, TENSORS)
    assert (found.format, found.metadata, found.notes) == ("safetensors", {"who": "we"}, ())
    assert files.headers(path).metadata == {"who": "we"}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.bin", "a.tar"])
def test_pickled_state_dict_of_either_generation(tmp_path, name, zipped):
    torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert equal(files.read(tmp_path / name).tensors, TENSORS)


def test_content_decides_and_not_the_name(tmp_path):
    save_file(TENSORS, tmp_path / "a.pth")
    assert files.read(tmp_path / "a.pth").format == "safetensors"
    torch.save(TENSORS, tmp_path / "a.safetensors")
    assert files.read(tmp_path / "a.safetensors").format == "torch"


def test_a_header_whose_length_looks_like_a_web_page(tmp_path):
    length = int.from_bytes(b" <\0", "little")
    empty = int.from_bytes(save({"a": torch.ones(2)}, {"text": ""})[:8], "little")
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"text": "x" * (length - empty)})
    assert (tmp_path / "a.safetensors").read_bytes().startswith(b" <\0")
    assert list(files.read(tmp_path / "a.safetensors").tensors) == ["a"]


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state", "ema", "teacher"])
@pytest.mark.parametrize("prefix", ["module.", "backbone.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_and_prefixes_go_and_are_said(tmp_path, wrapper, prefix):
    prefixed = {prefix + name: tensor for name, tensor in TENSORS.items()}
    torch.save({wrapper: prefixed, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pth")
    found = files.read(tmp_path / "a.pth")
    assert equal(found.tensors, TENSORS)
    assert f"tensors taken from '{wrapper}'" in found.notes
    assert len(found.notes) == 1 + prefix.count(".")


def test_of_several_wrappers_the_others_are_named(tmp_path):
    torch.save({"model": TENSORS, "ema": TENSORS}, tmp_path / "a.pth")
    assert files.read(tmp_path / "a.pth").notes == ("tensors taken from 'model'; 'ema' left aside",)


def test_a_mapping_that_holds_itself():
    holds: dict = {}
    holds |= dict.fromkeys(files.WRAPPERS, holds)
    with pytest.raises(WeightsError, match="holds no named tensors, but the keys state_dict, "):
        files.unwrap(holds, "it")


def test_head_beside_a_backbone_and_the_counter_of_an_average():
    tensors, _ = files.unwrap({"backbone.conv1.weight": TENSORS["conv1.weight"], "fc.bias": TENSORS["fc.bias"]}, "it")
    assert equal(tensors, TENSORS)
    averaged = {"n_averaged": torch.tensor(3)} | {"module." + name: tensor for name, tensor in TENSORS.items()}
    assert equal(files.unwrap(averaged, "it")[0], TENSORS)


def test_prefix_of_some_keys_only_stays():
    tensors = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert files.unwrap(tensors, "it") == (tensors, ())


def test_entries_that_are_no_tensors_are_named():
    assert files.unwrap(TENSORS | {"epoch": 3}, "it")[1] == ("1 entries that are no tensors left aside: epoch",)


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("save", ["torch", "torch_old", "pickle"])
def test_pickle_with_code_is_refused_and_the_code_does_not_run(tmp_path, save):
    marker, path = tmp_path / "ran", tmp_path / "a.pth"
    content = TENSORS | {"surprise": Hostile(marker)}
    if save == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=save == "torch")
    with pytest.raises(WeightsError, match=r"a\.pth holds Python objects \(\S+\).*torch\.save\(net\.state_dict\(\)"):
        files.read(path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if save != "pickle" else pickle.loads(path.read_bytes())
    assert marker.exists(), "the file was harmless, so the test proves nothing"


def test_pickled_network_is_refused_with_the_mend(tmp_path):
    torch.save(torchvision.models.resnet18(), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"torchvision\.models\.resnet\.ResNet.*net\.state_dict\(\)"):
        files.read(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize("part", [0.9, 0.5, 0.01])
def test_truncated(tmp_path, name, part):
    path = tmp_path / name
    save_file(TENSORS, path) if name.endswith("safetensors") else torch.save(TENSORS, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(WeightsError, match=r"is truncated, damaged or no weight file .*; download or save it again"):
        files.read(path)


def test_truncated_pickle_of_the_old_generation(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(WeightsError, match="truncated"):
        files.read(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"PK\x03\x04 nothing behind it", "truncated"),
        (b"\x89HDF\r\n\x1a\n", "truncated"),
        (b"hello, this is a text", r"truncated.*refers to what it does not hold"),
        (struct.pack("<Q", 1 << 60) + b"{", "truncated"),
        (struct.pack("<Q", 9) + b"{not json", "truncated"),
        (pickle.dumps([1, 2], protocol=2), "no weight file"),
        (pickle.dumps({"a": 1}, protocol=5), "no weight file"),
    ],
)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_no_weight_file(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=reason) as raised:
        files.read(tmp_path / name)
    assert name in str(raised.value)


def test_no_tensors_inside(tmp_path):
    torch.save({"optimizer": {"lr": 0.1}, "epoch": 1}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"holds no named tensors, but the keys optimizer, epoch; save"):
        files.read(tmp_path / "a.pth")
    torch.save(torch.ones(3), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="holds no named tensors"):
        files.read(tmp_path / "a.pth")


def test_missing_or_a_folder(tmp_path):
    with pytest.raises(WeightsError, match="No such file"):
        files.read(tmp_path / "none.pth")
    with pytest.raises(WeightsError, match="Is a directory"):
        files.read(tmp_path)


def test_full_disk_while_the_tensors_are_written(tmp_path, monkeypatch):
    def full(path, tensors, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(files.WRITERS, ".safetensors", full)
    with pytest.raises(RunError, match=r"cannot write .*a\.safetensors: .*No space left on device"):
        files.write(tmp_path / "a.safetensors", TENSORS, {})
    assert not list(tmp_path.iterdir())


def test_the_same_content_gives_the_same_bytes(tmp_path):
    many = {f"key {number}": str(number) for number in range(20)}
    for suffix in ("safetensors", "pth", "pkl"):
        for name, metadata in (("a", many), ("b", dict(reversed(many.items())))):
            files.write(tmp_path / f"{name}.{suffix}", TENSORS, metadata)
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_safetensors_as_the_library_reads_them(tmp_path):
    dtypes = (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex64)
    tensors = {f"größe {dtype}": torch.arange(7).to(dtype) for dtype in dtypes} | {"none": torch.ones(0, 3)}
    files.write(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for found in (load_file(tmp_path / "a.safetensors"), files.read(tmp_path / "a.safetensors").tensors):
        assert set(found) == set(tensors)
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        assert all(found[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_every_suffix_that_is_written_is_read(tmp_path):
    for name in ("a.safetensors", "a.pth", "a.pt", "a.pkl", "a"):
        files.write(tmp_path / name, TENSORS, {})
        assert equal(files.read(tmp_path / name).tensors, TENSORS)
    theirs = torch.load(tmp_path / "a.pth", weights_only=True)
    assert equal(theirs, TENSORS)
    arrays = pickle.loads((tmp_path / "a.pkl").read_bytes())
    assert set(arrays) == {"model", "__author__", "matching_heuristics"}
    assert all(torch.equal(torch.from_numpy(arrays["model"][name]), TENSORS[name]) for name in TENSORS)
    assert b"_core" not in (tmp_path / "a.pkl").read_bytes(), "a name of NumPy 2 alone"
    with pytest.raises(WeightsError, match=r"newer format; call it a\.h5, which load_weights reads"):
        files.write(tmp_path / "a.weights.h5", TENSORS, {})
    with pytest.raises(WeightsError, match=r"must end in \.safetensors, \.pth, \.pt, \.pkl, \.h5"):
        files.write(tmp_path / "a.onnx", TENSORS, {})


def test_a_view_is_saved_without_the_rest_of_its_storage(tmp_path):
    files.write(tmp_path / "a.pth", {"a": torch.zeros(1_000_000)[:10]}, {})
    assert (tmp_path / "a.pth").stat().st_size < 10_000


def test_tensors_are_their_own_when_the_file_is_gone(tmp_path):
    for name in ("a.safetensors", "a.pth"):
        files.write(tmp_path / name, TENSORS, {})
        found = files.read(tmp_path / name).tensors
        with (tmp_path / name).open("r+b") as file:  # in its place, which a mapping of the file would show
            file.write(bytes((tmp_path / name).stat().st_size))
            file.truncate(1)
        assert equal(found, TENSORS)
        found["fc.bias"].fill_(1)


def test_shards(tmp_path):
    index = write_shards(tmp_path, TENSORS)
    for path in (index, tmp_path):
        found = files.read(path)
        assert equal(found.tensors, TENSORS)
        assert (found.format, found.metadata) == ("safetensors", {"format": "pt"})
    shards = [path for path in tmp_path.iterdir() if path != index]
    seen = files.headers(index)
    assert seen.bytes == sum(path.stat().st_size for path in shards)
    assert seen.entries["conv1.weight"] == ((4, 3, 3, 3), "float32")


@pytest.mark.long
def test_shards_that_transformers_writes(tmp_path):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_labels=3)
    net = transformers.ResNetForImageClassification(config)
    net.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    found = files.read(tmp_path).tensors
    assert set(found) == set(net.state_dict())
    assert all(torch.equal(found[name], tensor) for name, tensor in net.state_dict().items())


def test_shards_of_torch(tmp_path):
    torch.save({"conv1.weight": TENSORS["conv1.weight"]}, tmp_path / "one.bin")
    torch.save({"fc.bias": TENSORS["fc.bias"]}, tmp_path / "two.bin")
    places = {"conv1.weight": "one.bin", "fc.bias": "two.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert equal(files.read(tmp_path).tensors, TENSORS)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda places: places | {"extra": places["fc.bias"]}, r"names 'extra' in .*, which lacks it"),
        (
            lambda places: {"fc.bias": places["fc.bias"]} | {"conv1.weight": places["fc.bias"]},
            "index and shards",
        ),
        (
            lambda places: places | {"fc.bias": "../b.safetensors"},
            r"refers to '\.\./b\.safetensors', which is no weight file",
        ),
        (lambda places: places | {"fc.bias": "/etc/passwd"}, "which is no weight file beside it"),
        (lambda places: places | {"fc.bias": "sub\\b.safetensors"}, "which is no weight file beside it"),
        (lambda places: places | {"fc.bias": ".."}, "which is no weight file beside it"),
        (lambda places: places | {"fc.bias": "c:b.safetensors"}, "which is no weight file beside it"),
        (
            lambda places: places | {"fc.bias": "missing.safetensors"},
            r"names the shard missing\.safetensors, which is not beside it",
        ),
        (lambda places: places | {"fc.bias": "model.safetensors.index.json"}, "which is no weight file"),
        (lambda places: places | {"fc.bias": 3}, "without a weight_map of names and files"),
        (lambda _: [], "without a weight_map"),
        (lambda _: {}, "without shards"),
    ],
)
def test_indexes_that_fit_no_shards(tmp_path, change, reason):
    index = write_shards(tmp_path, TENSORS)
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"weight_map": change(content["weight_map"])}))
    with pytest.raises(WeightsError, match=reason):
        files.read(index)


def test_a_tensor_that_the_index_does_not_name(tmp_path):
    index = write_shards(tmp_path, TENSORS | {"extra": torch.ones(1)})
    content = json.loads(index.read_text())
    del content["weight_map"]["extra"]
    index.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=r"does not name 'extra' of .*model-00001"):
        files.read(index)


def test_headers_say_what_read_returns(tmp_path):
    torch.save({"state_dict": {"module." + name: one for name, one in TENSORS.items()}, "epoch": 3}, tmp_path / "a.pth")
    found, seen = files.read(tmp_path / "a.pth"), files.headers(tmp_path / "a.pth")
    assert seen.entries == {name: (tuple(one.shape), "float32") for name, one in TENSORS.items()}
    assert (seen.notes, seen.format, seen.metadata) == (found.notes, found.format, found.metadata)


def test_headers_do_not_read_the_tensors(tmp_path):
    for name in ("a.safetensors", "a.pth"):
        files.write(tmp_path / name, {"a": torch.zeros(1 << 24)}, {})
        before = Path("/proc/self/io").read_text() if Path("/proc/self/io").exists() else "rchar: 0"
        files.headers(tmp_path / name)
        after = Path("/proc/self/io").read_text() if Path("/proc/self/io").exists() else "rchar: 0"
        read = [int(text.split("rchar: ")[1].split()[0]) for text in (before, after)]
        assert read[1] - read[0] < 1 << 20


def test_an_average_beside_a_tensor_of_its_own(tmp_path):
    """A loss beside the state dict is no state dict, and a configuration under `model` is no network."""
    torch.save({"state_dict": TENSORS, "loss": torch.tensor(0.5), "model": {"name": "resnet50"}}, tmp_path / "a.pth")
    found = files.read(tmp_path / "a.pth")
    assert equal(found.tensors, TENSORS)
    assert found.notes == ("tensors taken from 'state_dict'",)


def test_a_prefix_that_would_make_two_names_one_stays():
    both = {"backbone.fc.weight": torch.ones(1), "fc.weight": torch.zeros(1)}
    assert files.unwrap(both, "it") == (both, ())


def test_any_memory_format_is_written(tmp_path):
    tensors = {"a": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), "b": torch.ones(1).expand(7)}
    files.write(tmp_path / "a.safetensors", tensors, {})
    found = files.read(tmp_path / "a.safetensors").tensors
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
