"""Many workers write the rows that one process writes, also when one of them is killed."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from broken_pictures import broken
from isthmus import ship
from isthmus.ship import predict_table
from small_runs import class_folders, weights

ON_TWO = """
import sys
from isthmus import ship
ship.PART = 4
ship.predict_table(*sys.argv[2:], out=sys.argv[1], batch_size=4, engine="onnxruntime", precision="fp32",
                   cluster="local", workers=2)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def given(tmp_path, monkeypatch) -> list[str]:
    """A network and pictures, and the table that one process makes of them."""
    pictures = class_folders(tmp_path / "pictures", {"flower": 57, "temple": 44})
    broken(tmp_path / "broken")
    net = weights(tmp_path / "net.safetensors")
    monkeypatch.setattr(ship, "PART", 4)
    given = [str(net), str(pictures), str(tmp_path / "broken")]
    predict_table(*given, out=tmp_path / "one.csv", batch_size=4, engine="onnxruntime", precision="fp32")
    return given


def test_two_workers_write_what_one_process_writes(given, tmp_path):
    """In a process of its own, because a cluster leaves threads and handlers behind."""
    command = [sys.executable, "-c", ON_TWO, str(tmp_path / "two.csv"), *given]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


@pytest.mark.long
def test_a_killed_worker_is_replaced(given, tmp_path):
    command = [sys.executable, "-c", ON_TWO, str(tmp_path / "two.csv"), *given]
    killed = 0
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not any(Path(tmp_path).glob("two.csv.parts/0*")):
            pass
        for child in psutil.Process(process.pid).children(recursive=True):
            if not killed and "MapWorker" in " ".join(child.cmdline()):
                child.kill()
                killed += 1
    assert (killed, process.returncode) == (1, 0)
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


def test_no_cluster_is_told(tmp_path):
    pictures = class_folders(tmp_path / "pictures", {"flower": 2})
    net = weights(tmp_path / "net.safetensors")
    command = [sys.executable, "-m", "isthmus", "predict", str(net), str(pictures), "--out", str(tmp_path / "out.csv")]
    nowhere = os.environ | {"RAY_TMPDIR": str(tmp_path)}  # where clusters of this machine would be found
    told = subprocess.run([*command, "--cluster", "auto"], check=False, capture_output=True, text=True, env=nowhere)
    assert told.returncode == 2
    assert "isthmus: there is no Ray cluster at auto: " in told.stderr
    assert told.stderr.endswith("begin one by `ray start`\n")
