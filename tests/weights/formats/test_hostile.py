"""No weight file may run code, end the process, exhaust memory, or raise anything but WeightsError."""

import io
import json
import pickle
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save

import hostile
from isthmus.errors import WeightsError
from isthmus.weights import files
from isthmus.weights.onnx.graph import read_onnx
from weight_files import tensors, write_shards, write_tar

HARNESS = Path(hostile.__file__)
ENVIRONMENT = {"PYTHONPATH": str(HARNESS.parent), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}


def thrown(folder, reader, start, stop, *names):
    """How the readings of damaged files ended: the harness' report, its exit status, and the last file it tried."""
    folder.mkdir(exist_ok=True)
    result = subprocess.run(
        [sys.executable, HARNESS, folder, reader, str(start), str(stop), *names],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(result.stdout) if result.returncode == 0 else {}
    return report, result.returncode, result.stderr[-2000:]


def assert_harmless(report, code, last):
    assert code == 0, last
    assert report["failures"] == []
    assert min(report["readings"], report["refusals"]) > 0, "nothing was damaged, or everything"


def test_damaged_files_of_every_kind(tmp_path):
    report, code, last = thrown(tmp_path, "ours", 0, 30)
    assert_harmless(report, code, last)
    assert report["readings"] + report["refusals"] >= 300


@pytest.mark.long
@pytest.mark.parametrize("part", range(2))
def test_thousands_of_damaged_files(tmp_path, part):
    """More than 20,000 together: 14 kinds, 1,500 damages of each."""
    report, code, last = thrown(tmp_path, "ours", 1000 + 750 * part, 1750 + 750 * part)
    assert_harmless(report, code, last)
    assert report["readings"] + report["refusals"] >= 10_000


def test_the_harness_sees_errors_of_another_kind(tmp_path):
    report, _, _ = thrown(tmp_path, "unguarded", 0, 30, "keras 3")
    assert any("ValueError" in failure for failure in report["failures"])


def test_the_harness_sees_memory(tmp_path):
    report, _, last = thrown(tmp_path, "greedy", 0, 3, "zip")
    assert report, last
    assert all("more memory than allowed" in failure for failure in report["failures"])
    assert len(report["failures"]) == 3


@pytest.mark.parametrize(("reader", "end"), [("crashing", signal.SIGSEGV), ("hanging", signal.SIGALRM)])
def test_the_harness_sees_crashes_and_hangs(tmp_path, reader, end):
    report, code, last = thrown(tmp_path, reader, 0, 3, "zip")
    assert not report
    assert code == -end
    assert last.rstrip().endswith("zip, 0")


# Code

COMMAND = "open({marker!r}, 'w').close()"


class Reduced:
    """Whose pickle holds a call."""

    def __init__(self, *reduction):
        self.reduction = reduction

    def __reduce__(self):
        return self.reduction


def programs(marker):
    """Pickles that make a file when they are loaded: by every opcode that can call something."""
    code = COMMAND.format(marker=str(marker))
    text = code.encode()
    quoted = b"S" + repr(code).encode() + b"\n"
    yield "reduce", pickle.dumps(Reduced(exec, (code,)), 2)
    yield "reduce, newer", pickle.dumps(Reduced(exec, (code,)), 4)
    yield "os.system", b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    yield "inst", b"(" + quoted + b"i__builtin__\nexec\n."
    yield "obj", b"(c__builtin__\nexec\n" + quoted + b"o."
    yield "stack global", b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c" + bytes([len(text)]) + text + b"\x85R."
    yield (
        "build",
        pickle.dumps(Reduced(Reduced, (), {"__setstate__": 1}), 2)[:-1]
        + b"0c__builtin__\nexec\n"
        + (quoted + b"\x85R."),
    )
    yield "within a list of reductions", b"\x80\x02](c__builtin__\nexec\n" + quoted + b"\x85Re."
    yield (
        "called by what we know",
        (b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(c__builtin__\nexec\nN" + quoted + b"\x85NtR."),
    )
    yield "by copyreg", b"\x80\x02ccopy_reg\n_reconstructor\n(c__builtin__\nexec\n" + quoted + b"NtR."


PROGRAMS = [name for name, _ in programs("marker")]


def hidden(content, form, path):
    """A program in each container that holds pickles."""
    match form:
        case "bare":
            path.write_bytes(content)
        case "zip":
            out = io.BytesIO()
            torch.save(tensors(), out)
            path.write_bytes(hostile.repacked(out.getvalue(), "data.pkl")(content))
        case "plain":
            torch.save(tensors(), path, _use_new_zipfile_serialization=False)
            path.write_bytes(path.read_bytes()[:25] + content)  # behind the magic number and the version
        case "tar":
            write_tar(path, tensors())
            whole = bytearray(path.read_bytes())
            place = whole.index(b"\x80\x02}", whole.index(b"\x80\x02}") + 1)  # behind that of the machine's facts
            whole[place : place + len(content)] = content
            path.write_bytes(whole)


@pytest.mark.parametrize("form", ["bare", "zip", "plain", "tar"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_code_runs(tmp_path, name, form):
    marker = tmp_path / "ran"
    content = dict(programs(marker))[name]
    path = tmp_path / "a.pth"
    hidden(content, form, path)
    for read in (files.headers, files.read):
        with pytest.raises(WeightsError):
            read(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in ("by copyreg", "called by what we know")])
def test_the_programs_do_run_elsewhere(tmp_path, name):
    marker = tmp_path / "ran"
    pickle.loads(dict(programs(marker))[name])
    assert marker.exists()


# What is declared and not there

HUGE = 1 << 50


def huge_header(path):
    text = b'{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (HUGE, 4 * HUGE)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))


def huge_shape(path):
    text = b'{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,16]}}' % HUGE
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))


def header_longer_than_the_file(path):
    path.write_bytes(struct.pack("<Q", 90 << 20) + b"{" + bytes(100))


def gap_in_the_data(path):
    content = save({"a": torch.ones(4), "b": torch.ones(4)})
    path.write_bytes(content.replace(b"[16,32]", b"[17,32]"))


def pickle_changed(path, old, new):
    torch.save({"a": torch.ones(4)}, path)
    archive = path.read_bytes()
    content = hostile.member(archive, "data.pkl")
    assert content.count(old) == 1
    path.write_bytes(hostile.repacked(archive, "data.pkl")(content.replace(old, new)))


def huge_storage(path):
    pickle_changed(path, b"K\x04t", b"\x8a\x07" + b"\x01" * 7 + b"t")


def huge_tensor(path):
    pickle_changed(path, b"K\x04\x85", b"\x8a\x07" + b"\x01" * 7 + b"\x85")


def stride_of_zero(path):
    torch.save({"a": torch.ones(1).expand(1 << 30)}, path)


def huge_array(path):
    content = pickle.dumps({"a": np.ones(4, np.float32)}, 2)
    path.write_bytes(content.replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85"))


def zip_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(300 << 20))


def hdf5_fill(path):
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"a"]
        file.create_group("a").attrs["weight_names"] = [b"a/kernel"]
        file["a"].create_dataset("a/kernel", (HUGE,), "f4", fillvalue=1)


def hdf5_bomb(path):
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"a"]
        file.create_group("a").attrs["weight_names"] = [b"a/kernel"]
        file["a"].create_dataset("a/kernel", data=np.zeros(1 << 26, np.float32), chunks=(1 << 20,), compression="gzip")


def many_lists(path):
    path.write_bytes(b"\x80\x04" + b"]" * (10 << 20))


def many_texts(path):
    path.write_bytes(b"\x80\x04" + b"\x8c\x01a\x94" * (3 << 20))


def many_wide_texts(path):
    text = "🙂".encode() + b"x" * 4000  # one character that makes every other take four bytes
    path.write_bytes(b"\x80\x04" + (b"X" + struct.pack("<I", len(text)) + text) * 8000)


def many_arrays(path):
    path.write_bytes(b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n\x94" + b"h\0)R" * (2 << 20))


# A list that holds ten times the one before, a hundred times over: nobody may print or compare it.
LAUGHS = b"\x80\x02]q\0" + (b"](" + b"h\0" * 10 + b"eq\0") * 100


def laughing_key(path):
    torch.save({"a": torch.ones(4)}, path)
    content = LAUGHS + b"(U\x07storagectorch\nFloatStorage\nh\0U\x03cpuK\x04tQ."
    path.write_bytes(hostile.repacked(path.read_bytes(), "data.pkl")(content))


def laughing_encoding(path):
    path.write_bytes(LAUGHS + b"c_codecs\nencode\n(X\x01\0\0\0ah\0tR.")


def laughing_array(path):
    path.write_bytes(LAUGHS + b"cnumpy\nndarray\n(h\0cnumpy\ndtype\n(U\x02f4tRh\0tR.")


def laughing_tuple(path):
    path.write_bytes(LAUGHS + b"cbuiltins\nset\n(h\0tR}h\0h\0s.")


def many_members(path):
    entry = struct.pack("<4s4xHH8xIIHHH8xI", b"PK\1\2", 0, 0, 0, 0, 8, 0, 0, 0)
    directory = b"".join(entry + b"%08x" % number for number in range(1 << 16))
    end = struct.pack("<4s8xIIH", b"PK\5\6", len(directory), 64, 0)
    path.write_bytes(b"PK\3\4" + bytes(60) + directory + end)


def many_headers(path):
    one = b'"%06x":{"dtype":"U8","shape":[],"data_offsets":[%d,%d]}'
    text = b"{" + b",".join(one % (number, number, number + 1) for number in range(60_000)) + b"}"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(60_000))


def many_names(path):
    with h5py.File(path, "w") as file:
        for number in range(200):
            file.attrs[f"names{number}"] = np.zeros(60_000, "S1")


def by_name(*makers):
    return {make.__name__: make for make in makers}


DECLARED = by_name(
    huge_header, huge_shape, header_longer_than_the_file, gap_in_the_data, huge_storage, huge_tensor, stride_of_zero,
    huge_array, zip_bomb, hdf5_fill, hdf5_bomb,
)  # fmt: skip
LAUGHING = by_name(laughing_key, laughing_encoding, laughing_array, laughing_tuple)
MANY = by_name(many_lists, many_texts, many_wide_texts, many_arrays, many_members, many_headers, many_names)

MEASURED = """
import sys
from pathlib import Path
import hostile
for path in map(Path, sys.argv[1:]):
    hostile.limit_memory(path.stat().st_size)
    try:
        hostile.files.headers(path)
        hostile.files.read(path)
        print(path.name, "read")
    except hostile.WeightsError as error:
        print(path.name, "short of memory" if hostile.short_of_memory(error) else "refused")
"""


def measured(folder, makers):
    """How the reading of each file ended, with no more memory than twice the file and the slack."""
    for name, make in makers.items():
        make(folder / name)
    paths = [folder / name for name in makers]
    command = [sys.executable, "-c", MEASURED, *paths]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return dict(line.split(maxsplit=1) for line in result.stdout.splitlines())


def test_what_declares_more_than_there_is_is_refused_without_memory_for_it(tmp_path):
    makers = DECLARED | LAUGHING
    assert measured(tmp_path, makers) == dict.fromkeys(makers, "refused")


@pytest.mark.long
def test_what_would_grow_in_memory_is_refused_in_time(tmp_path):
    assert measured(tmp_path, MANY) == dict.fromkeys(MANY, "refused") | {"many_headers": "read"}


HONEST = """
import sys
from pathlib import Path
import hostile

def memory(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(which))

for path in map(Path, sys.argv[1:]):
    hostile.files.headers(path)  # what is imported late is imported now
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    found = hostile.files.read(path)
    print(path.name, (memory("VmHWM") - before) / sum(one.nbytes for one in found.tensors.values()))
    del found
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of memory")
def test_good_files_take_the_memory_of_their_tensors(tmp_path):
    content = {f"layer{number}/kernel": torch.zeros(1 << 20) for number in range(12)}
    paths = [tmp_path / name for name in ("a.safetensors", "a.pth", "plain.pth", "a.pkl", "a.h5")]
    for path in paths:
        if path.stem == "plain":
            torch.save(content, path, _use_new_zipfile_serialization=False)
        else:
            files.write(path, content, {})
    command = [sys.executable, "-c", HONEST, *paths]
    given_back = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what one file took is not there for the next
    result = subprocess.run(command, env=ENVIRONMENT | given_back, capture_output=True, text=True, check=True)
    ratios = dict(line.split() for line in result.stdout.splitlines())
    assert set(ratios) == {path.name for path in paths}
    assert all(0.9 < float(ratio) < 1.1 for ratio in ratios.values()), ratios


# Ways out of the folder


def outside(path):
    """A secret that no weight file may read."""
    path.write_bytes(save({"secret": torch.ones(3)}))
    return path


def test_shards_stay_in_their_folder(tmp_path):
    outside(tmp_path / "secret.safetensors")
    folder = tmp_path / "net"
    folder.mkdir()
    index = write_shards(folder, tensors())
    for target in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), "./../secret.safetensors"):
        index.write_text(json.dumps({"weight_map": {"secret": target}}))
        with pytest.raises(WeightsError, match="which is no weight file beside it"):
            files.read(index)


def test_hdf5_stays_in_its_file(tmp_path):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["x"] = np.ones(3, np.float32)
    for name in ("external", "storage", "virtual"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file.attrs["layer_names"] = [b"a"]
            group = file.create_group("a")
            group.attrs["weight_names"] = [b"x"]
            if name == "external":
                group["x"] = h5py.ExternalLink("secret.h5", "x")
            elif name == "storage":
                group.create_dataset("x", (3,), "f4", external=[(str(tmp_path / "secret.h5"), 0, 12)])
            else:
                layout = h5py.VirtualLayout((3,), "f4")
                layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "x", shape=(3,))
                group.create_virtual_dataset("x", layout)
        with h5py.File(tmp_path / f"{name}.h5") as file:
            assert file["a/x"].shape == (3,), "the library itself does not follow it"
        with pytest.raises(WeightsError, match=r"a link to another file|in another file|virtual layout"):
            files.read(tmp_path / f"{name}.h5")


@pytest.mark.parametrize("target", ["../secret.bin", "{folder}/secret.bin", "net/../../secret.bin"])
def test_onnx_stays_in_its_folder(tmp_path, target):
    (tmp_path / "secret.bin").write_bytes(np.ones(4 * 3 * 7 * 7, np.float32).tobytes())
    folder = tmp_path / "net"
    folder.mkdir()
    (folder / "a.onnx").write_bytes(hostile.small_onnx(folder))
    model = onnx.load(folder / "a.onnx")
    constant = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    constant.ClearField("raw_data")
    constant.data_location = onnx.TensorProto.EXTERNAL
    entry = constant.external_data.add()
    entry.key, entry.value = "location", target.format(folder=tmp_path)
    (folder / "a.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(WeightsError):
        read_onnx(folder / "a.onnx")
