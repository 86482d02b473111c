"""Runs that SIGKILL ends anywhere, alone and as two processes under torchrun, and that go on to the same bits.

The moment is a call of a Python or C function, counted from the command's start: any of them, also inside a save.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

import pytest

from isthmus.train.checkpoint import BEST, Checkpoints
from isthmus.train.log import read_log
from small_runs import SPEC, class_folders, network, same_files, weights

LIVES = """
import atexit, os, signal, sys
from pathlib import Path
import isthmus.run, isthmus.report.terminal  # the imports are the same each time
from isthmus.cli.main import main

rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
notes, fatal, calls = Path(os.environ["NOTES"]), int(os.environ["FATAL_CALL"]), 0
(notes / f"{os.getpid()}.pid").touch()
while len(found := list(notes.glob("*.pid"))) < size:
    os.sched_yield()

def count(frame, event, argument):
    global calls
    calls += 1
    if calls == fatal:
        others = {int(each.stem) for each in found} - {os.getpid()}
        for process in [os.getppid(), *others] if others else []:  # torchrun first, so that it does nothing about it
            os.kill(process, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

def report():
    sys.setprofile(None)
    (notes / "calls").write_text(str(calls))

sys.argv[0] = "isthmus"
if rank == 0:
    atexit.register(report)
    sys.setprofile(count)
main()
"""
MEASURED = ("time", "pictures_per_second", "memory")


class Runs:
    """Real processes that train the same small network on the same pictures."""

    def __init__(self, root: Path, processes: int) -> None:
        self.root, self.processes = root, processes
        pictures = class_folders(root / "pictures", {"flower": 16, "temple": 16})
        net = weights(root / "tiny.safetensors", network(replace(SPEC, num_classes=2, drop_path=0.3)))
        (root / "lives.py").write_text(LIVES)
        self.options = ["--data", str(pictures), "--weights", str(net), "--recipe", "scratch", "--head", "linear"]
        self.options += ["--epochs", "3", "--batch-size", "6", "--set", "ema=0.7", "--set", "save_every=2"]
        self.straight = root / "straight"
        whole = self.live(self.straight)
        assert whole.returncode == 0, whole.stderr
        self.calls = max(int(each.read_text()) for each in root.glob("notes*/calls"))

    def live(self, run: Path, fatal_call: int = 0) -> subprocess.CompletedProcess[str]:
        """Start `run`, or go on with it, up to a call of a function (0: to its end)."""
        many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
        command = [sys.executable, *(many if self.processes > 1 else ()), str(self.root / "lives.py"), "train"]
        begun = (run / "recipe.toml").exists()
        command += ["--resume", str(run)] if begun else [*self.options, "--out", str(run)]
        command += ["--no-report"]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ISTHMUS_CACHE": str(self.root / "cache"),
            "FATAL_CALL": str(fatal_call),
            "NOTES": mkdtemp(dir=self.root, prefix="notes"),
        }
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def killed(self, name: str, kills: int, seed: int) -> Path:
        """A run that is killed so many times at random moments, then left to finish."""
        run, draw = self.root / name, random.Random(seed)
        for _ in range(kills):
            moment = draw.randrange(1, self.calls)
            died = self.live(run, moment)
            # A run that went on near its end may have finished before that moment.
            assert died.returncode in (-signal.SIGKILL, 0), died.stderr
        finished = self.live(run)
        assert finished.returncode == 0, finished.stderr
        return run


def rows(run: Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in read_log(run / "log.jsonl")]


def assert_same_run(found: Path, wanted: Path) -> None:
    assert same_files(found / "model.safetensors", wanted / "model.safetensors")
    assert same_files(found / BEST, wanted / BEST)
    assert rows(found) == rows(wanted)
    assert [each.name for each in Checkpoints(found).files()] == [each.name for each in Checkpoints(wanted).files()]
    scores = [json.loads((run / "evaluation.json").read_text()) for run in (found, wanted)]
    assert scores[0] | {"seconds": 0} == scores[1] | {"seconds": 0}


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.long)])
def runs(tmp_path_factory, request) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), request.param)


def test_killed_twice(runs):
    assert_same_run(runs.killed("twice", 2, seed=0), runs.straight)


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_five_times(runs, seed):
    assert_same_run(runs.killed(f"five{seed}", 5, seed), runs.straight)


@pytest.mark.long
def test_a_disk_that_fills_up(runs):
    """A real one, where this process may mount one: it takes two states, and the third when there is more room."""
    disk = runs.root / "disk"
    disk.mkdir()
    if (
        not (mount := shutil.which("mount"))
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=240k", "tmpfs", disk], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("only root may mount a small file system")
    try:
        full = runs.live(disk / "run")
        assert full.returncode != 0
        assert "No space left on device" in full.stderr
        assert "isthmus/train/" not in full.stderr  # no traceback of ours; torchrun shows one of its own
        before = Checkpoints(disk / "run").files()
        assert before
        subprocess.run([mount, "-o", "remount,size=10m", disk], check=True)
        again = runs.live(disk / "run")
        assert again.returncode == 0, again.stderr
        assert_same_run(disk / "run", runs.straight)
    finally:
        subprocess.run(["umount", disk], check=True)
