"""Weight files: what is read, what is unwrapped, and what is refused without running anything."""

import argparse
import errno
import pickle
import struct
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from isthmus.errors import RunError, WeightsError
from isthmus.weights import files

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


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state", "ema"])
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
        (b"hello, this is a text", "truncated"),
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
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(RunError, match=r"cannot write .*a\.safetensors: .*No space left on device"):
        files.write(tmp_path / "a.safetensors", TENSORS, {})
    assert not list(tmp_path.iterdir())


def test_any_memory_format_is_written(tmp_path):
    tensors = {"a": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), "b": torch.ones(1).expand(7)}
    files.write(tmp_path / "a.safetensors", tensors, {})
    found = files.read(tmp_path / "a.safetensors").tensors
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
