"""Many workers write the rows that one process writes, also when one of them is killed."""

import pickle
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from broken_pictures import broken
from isthmus import ship
from isthmus.errors import MissingExtraError
from isthmus.ship import predict_table
from small_runs import class_folders, weights

ON_TWO = """
import sys
from isthmus import ship
from isthmus.cli.main import main

ship.PART = 4
sys.argv = ["isthmus", "predict", *sys.argv[1:], "--cluster", "local", "--workers", "2"]
main()
"""
THREE_TIMES = """
import os, sys
from dataclasses import replace
import ray
from ray._private import services
from isthmus import ship
from isthmus.cli.main import main
from isthmus.deploy.answers import FILES

nowhere, *given = sys.argv[1:]
services._find_address_from_flag = lambda flag: set()  # other programs of this machine may have some

def status(cluster):
    sys.argv = ["isthmus", "predict", *given, "--cluster", cluster, "--workers", "2"]
    try:
        main()
    except SystemExit as ended:
        return ended.code
    return 0

def no_room(table):
    raise OSError("no room")

ship.PART = 4
os.environ["RAY_TMPDIR"] = nowhere  # where the last one is noted
assert status("auto") == 2
del os.environ["RAY_TMPDIR"]
assert status("127.0.0.1:1") == 2
csv = FILES[".csv"]
FILES[".csv"] = replace(csv, encode=no_room)
assert status("local") == 2
assert not ray.is_initialized()
FILES[".csv"] = csv
ray.init("local", include_dashboard=False, log_to_driver=False)
assert status("local") == 0
assert ray.is_initialized()
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def given(tmp_path, monkeypatch) -> list[str]:
    """A network and pictures to predict into two.csv; one.csv is the table that one process makes of them."""
    pictures = class_folders(tmp_path / "pictures", {"flower": 57, "temple": 44})
    broken(tmp_path / "broken")
    net = weights(tmp_path / "net.safetensors")
    monkeypatch.setattr(ship, "PART", 4)
    given = [str(net), str(pictures), str(tmp_path / "broken")]
    predict_table(*given, out=tmp_path / "one.csv", batch_size=4, engine="torch", precision="fp32")
    return [*given, "--out", str(tmp_path / "two.csv"), "--batch-size", "4", "--engine", "torch", "--precision", "fp32"]


def test_two_workers_write_what_one_process_writes(given, tmp_path):
    """In a process of its own, because a cluster leaves threads and handlers behind.

    A cluster that is not there and workers that fail are told, and the job goes on; a cluster of others stays.
    """
    command = [sys.executable, "-c", THREE_TIMES, str(tmp_path), *given]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    told = [line for line in ended.stderr.splitlines() if line.startswith("isthmus: ")]
    assert len(told) == 3
    assert told[0].startswith("isthmus: there is no Ray cluster at auto: ")
    assert told[0].endswith("begin one by `ray start`")
    assert "there is no Ray cluster at 127.0.0.1:1: [Errno 111] Connection refused; begin one" in told[1]
    assert told[2] == "isthmus: a worker of the Ray cluster cannot predict: OSError: no room"
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


def test_what_a_worker_lacks_comes_home():
    error = pickle.loads(pickle.dumps(MissingExtraError("pyarrow", "parquet")))
    assert str(error) == 'pyarrow is needed here and not installed: pip install "isthmus[parquet]"'


@pytest.mark.long
def test_a_killed_worker_is_replaced(given, tmp_path):
    command = [sys.executable, "-c", ON_TWO, *given]
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
