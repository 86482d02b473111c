"""The commands plan --roofline and bench machine: what they print, and what they refuse."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from isthmus import records
from isthmus.arch.cost import cost
from isthmus.arch.plan import plan
from isthmus.arch.roofline import Bandwidth, Limits, roofline
from isthmus.deploy import limits, predictor, profile
from isthmus.deploy.engines import ENGINES
from small_runs import SPEC

DESK = Limits(
    machine="desk",
    threads=1,
    lanes=16,
    fp32=1e11,
    bf16=2e11,
    bandwidth=(Bandwidth(size=2**20, rate=4e10), Bandwidth(size=2**26, rate=1e10)),
)
FLOOR = ["name", "kind", "operations", "bytes", "intensity", "floor_seconds", "binds", "expected_seconds"]
KEYS = ["limits", "precision", "batch", "floor_seconds", "pictures_per_second", "expected_seconds"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def kept():
    """A machine that was measured before."""
    limits.place().parent.mkdir(parents=True)
    limits.place().write_text(json.dumps(records.to_dict(DESK)), encoding="utf-8")


def test_floors_as_json(isthmus, kept):
    found = json.loads(isthmus("plan", "resnet50", "--roofline", "--batch", "4", "--json").out)["roofline"]
    assert list(found) == [*KEYS, "rows"]
    assert (found["precision"], found["batch"], found["limits"]) == ("fp32", 4, records.to_dict(DESK))
    assert [list(row) for row in found["rows"]] == [FLOOR] * 6
    assert 0.95 < sum(row["operations"] for row in found["rows"]) / (4 * cost("resnet50").flops) < 1  # padding
    assert found["floor_seconds"] == pytest.approx(sum(row["floor_seconds"] for row in found["rows"]))
    assert found["pictures_per_second"] == pytest.approx(4 / found["floor_seconds"])
    assert found["expected_seconds"] == pytest.approx(sum(row["expected_seconds"] for row in found["rows"]))


@pytest.mark.parametrize(("by", "rows"), [("stage", 6), ("block", 18), ("layer", 1 + 1 + 16 * 3 + 4 + 2)])
def test_floors_by(isthmus, kept, by, rows):
    arguments = ("plan", "resnet50", "--roofline", "--by", by, "--precision", "bf16")
    found = json.loads(isthmus(*arguments, "--json").out)["roofline"]["rows"]
    wanted = roofline(plan("resnet50"), DESK, precision="bf16")
    assert len(found) == rows
    assert sum(row["bytes"] for row in found) == sum(floor.bytes for floor in wanted)
    result = isthmus(*arguments)
    assert (result.status, result.err) == (0, "")
    assert "Roofline: 1 picture in bf16, 1 thread of desk" in result.out
    seconds = sum(floor.seconds for floor in wanted)
    assert f"floor {1e3 * seconds:.2f} ms: at most {1 / seconds:.1f} pictures/s" in result.out
    seconds = sum(floor.expected for floor in wanted)
    assert f"expected {1e3 * seconds:.2f} ms: {1 / seconds:.1f} pictures/s" in result.out


def test_without_it_nothing_is_measured_or_shown(isthmus, tmp_path):
    assert "roofline" not in json.loads(isthmus("plan", "resnet18", "--batch", "2", "--json").out)
    assert not (tmp_path / "cache").exists()


def test_floors_from_kept_limits_load_no_torch(kept):
    code = (
        "import sys; from isthmus.cli.main import main;"
        "sys.argv = ['isthmus', 'plan', 'resnet50', '--roofline']; main();"
        "sys.exit(f'loaded: {sorted(heavy)}' if (heavy := {'torch', 'numpy'} & set(sys.modules)) else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert result.returncode == 0, result.stderr
    assert "Roofline" in result.stdout


@pytest.fixture
def measured(monkeypatch):
    """A machine that is measured in no time."""
    monkeypatch.setattr(limits, "SIZES", (2**15, 2**17))
    monkeypatch.setattr(limits, "LEAST", 1e-3)
    monkeypatch.setattr("isthmus.deploy.pace.limit", {"fp32": 1e11, "bf16": 2e11, "int8": None}.get)


def test_limits_are_measured_where_there_are_none(isthmus, measured):
    result = isthmus("plan", "resnet18", "--roofline")
    assert "measuring this machine's limits, once" in result.err
    assert isthmus("plan", "resnet18", "--roofline").err == ""


def test_bench_machine(isthmus, kept, measured):
    found = json.loads(isthmus("bench", "machine", "--json").out)
    assert found["fp32"] == 1e11
    assert [each["size"] for each in found["bandwidth"]] == [2**15, 2**17]
    assert limits.kept_limits() == records.from_dict(Limits, found)  # in place of those of the desk
    table = isthmus("bench", "machine").out
    assert "32 KiB" in table
    assert f"A vector holds {found['lanes']} sums." in " ".join(table.split())
    assert "100" in table


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A small network in a file, and engines that are neither compiled nor timed for long."""
    monkeypatch.setattr(profile, "SECONDS", 0.02)
    monkeypatch.delitem(ENGINES, "inductor")
    rates = {"torch": 10.0, "onnxruntime": 20.0, "openvino": 30.0}
    monkeypatch.setattr(predictor, "measured", lambda opened, _: {pair: rates[pair[0]] for pair in opened})
    path = tmp_path / "tiny.toml"
    path.write_text(replace(SPEC, name="").to_toml(), encoding="utf-8")
    return path


def test_measured(isthmus, kept, tiny, tmp_path):
    figure = tmp_path / "roofline.svg"
    arguments = ("plan", str(tiny), "--image-size", "32", "--measure", "--batch", "2")
    found = json.loads(isthmus(*arguments, "--by", "layer", "--json").out)["roofline"]
    assert list(found) == [*KEYS, "engine", "measured_seconds", "measured_pictures_per_second", "rows"]
    assert found["engine"] == "openvino"
    with_floors = [row for row in found["rows"] if "operations" in row]
    assert [list(row) for row in with_floors] == [[*FLOOR, "measured_seconds", "share"]] * len(with_floors)
    assert sum(row["floor_seconds"] for row in with_floors) == pytest.approx(found["floor_seconds"])
    assert sum(row["measured_seconds"] for row in found["rows"]) == pytest.approx(found["measured_seconds"])
    for row in with_floors:
        if row["measured_seconds"]:
            assert row["share"] == pytest.approx(row["floor_seconds"] / row["measured_seconds"])
    assert "between the nodes" in {row["name"] for row in found["rows"]}
    result = isthmus(*arguments, "--by", "block", "--figure", str(figure))
    assert "measured" in result.out
    assert "ms in OpenVINO in fp32" in result.out
    for words in ("main memory", "caches", "GFLOP/s", "layer1.0", "milliseconds a batch"):
        assert words in figure.read_text(encoding="utf-8")


MISTAKES = {
    "a figure of nothing": (["--figure", "f.svg"], "a figure shows what was measured: give --measure too"),
    "no such figure": (["--measure", "--figure", "f.pdf"], "f.pdf is no name for a figure"),
    "no pictures": (["--roofline", "--batch", "0"], "batch is 0; it must be at least 1"),
    "half precision": (["--roofline", "--precision", "fp16"], "engines for CPUs do not multiply fp16"),
    "training in int8": (["--train", "--precision", "int8"], "training holds no int8"),
    "not in hardware": (["--roofline", "--precision", "int8"], "desk does not multiply int8 itself; it has fp32, bf16"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(isthmus, kept, mistake):
    arguments, words = MISTAKES[mistake]
    result = isthmus("plan", "resnet18", *arguments)
    assert (result.status, result.out) == (2, "")
    assert words in result.err
