"""torch's three containers, and what a zip archive may not be."""

import struct
import zipfile

import pytest
import torch

from isthmus.errors import WeightsError
from isthmus.weights import files
from isthmus.weights.formats.archives import zip_members
from weight_files import tensors, write_tar


def equal(found, wanted):
    return set(found) == set(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_first_container_as_torch_reads_it(tmp_path):
    """Which torch itself reads it only with code switched on."""
    wanted = tensors() | {"count": torch.tensor([3]), "half": torch.ones(3, dtype=torch.float16)}
    write_tar(tmp_path / "a.pth", wanted)
    theirs = torch.load(tmp_path / "a.pth", weights_only=False)
    assert equal(theirs, wanted), "it is no such file"
    found = files.read(tmp_path / "a.pth")
    assert equal(found.tensors, wanted)
    assert found.format == "torch"


def test_headers_are_those_of_the_tensors_and_need_no_data(tmp_path):
    wanted = {name: (tuple(tensor.shape), "float32") for name, tensor in tensors().items()}
    torch.save(tensors(), tmp_path / "zip.pth")
    torch.save(tensors(), tmp_path / "plain.pth", _use_new_zipfile_serialization=False)
    write_tar(tmp_path / "tar.pth", tensors())
    for name in ("zip.pth", "plain.pth", "tar.pth"):
        found = files.headers(tmp_path / name)
        assert found.entries == wanted
        assert (found.format, found.bytes) == ("torch", (tmp_path / name).stat().st_size)


def rewritten(path, change, **options):
    """The zip archive again, its members changed by a function of name and content."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))


def test_sizes_and_places_of_64_bits(tmp_path, monkeypatch):
    """As members beyond 4 GB have them; the standard library writes them here for every one."""
    path = tmp_path / "a.pth"
    torch.save(tensors(), path)
    plain = path.read_bytes()
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 0)
    rewritten(path, lambda _, content: content)
    assert path.read_bytes().count(b"\xff\xff\xff\xff") > plain.count(b"\xff\xff\xff\xff")
    assert equal(files.read(path).tensors, tensors())
    with path.open("rb") as file:
        found = zip_members(file, path)
    with zipfile.ZipFile(path) as archive:
        wanted = {name: archive.read(name) for name in archive.namelist()}
    content = path.read_bytes()
    assert {name: content[span.start :][: span.length] for name, span in found.items()} == wanted


def test_an_archive_with_a_comment_and_one_of_pictures(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(tensors(), path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"x" * 60_000
    assert equal(files.read(path).tensors, tensors())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat.jpg", b"miaow")
    with pytest.raises(WeightsError, match="an archive of something else than tensors"):
        files.read(path)


def test_compressed_archives_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(1_000_000)}, path)
    rewritten(path, lambda _, content: content, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000
    with pytest.raises(WeightsError, match=r"the member '.*' is compressed or encrypted"):
        files.read(path)


def test_storages_with_fewer_bytes_than_declared_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(tensors(), path)
    rewritten(path, lambda name, content: content[:-1] if name.endswith("/data/0") else content)
    with pytest.raises(WeightsError, match="a storage of 108 elements in 431 bytes"):
        files.read(path)


def test_numbers_of_another_byte_order_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(tensors(), path)
    rewritten(path, lambda name, content: b"big" if name.endswith("byteorder") else content)
    with pytest.raises(WeightsError, match="big-endian"):
        files.read(path)


@pytest.mark.parametrize("shift", [0, 64])
def test_records_over_one_another_are_refused(tmp_path, shift):
    """Else a thousand tensors of a small file could each take all of it."""
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(1000), "b": torch.ones(1000)}, path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        places = {info.filename: info.header_offset for info in archive.infolist()}
    entry = content.rindex(b"/data/1") - len("a") - 4  # of the central directory, whose field is the header's offset
    assert content[entry : entry + 4] == struct.pack("<I", places["a/data/1"])
    if shift:  # into the data of the other, with a header of its own
        header = places["a/data/1"]
        content[places["a/data/0"] + 256 : places["a/data/0"] + 384] = content[header : header + 128]
        places["a/data/0"] += 256
    content[entry : entry + 4] = struct.pack("<I", places["a/data/0"])
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="two contents share the bytes"):
        files.read(path)


def test_scripted_networks_are_refused_with_the_mend(tmp_path):
    with pytest.warns(FutureWarning, match="jit"):
        torch.jit.script(torch.nn.Linear(2, 3)).save(tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"a TorchScript program; .*, take its state_dict\(\) and save again"):
        files.read(tmp_path / "a.pt")
