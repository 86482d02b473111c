"""The command line under the real torchrun: the run that it is alone, restarted, and stopped."""

import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from isthmus.train.checkpoint import Checkpoints
from isthmus.train.log import read_log
from oracles import relative_error
from processes import environment, torchrun
from small_runs import SPEC, class_folders, network, same_files, weights

pytestmark = pytest.mark.long

# `python -m isthmus`, in which a rank sends a signal to itself or to torchrun when it takes its n-th step.
STRUCK = """
import os, signal, sys
from isthmus.cli.main import main

rank, steps, number = (int(each) for each in os.environ["STRUCK"].split())
taken = 0

def count(frame, event, argument):
    global taken
    if event == "call" and frame.f_code.co_name == "move" and frame.f_code.co_filename.endswith("step.py"):
        taken += 1
        if taken == steps:
            os.kill(os.getpid() if number == signal.SIGKILL else os.getppid(), number)

if os.environ["RANK"] == str(rank) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    sys.setprofile(count)
sys.argv[0] = "isthmus"
main()
"""


class Runs:
    """Runs of one small recipe."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.script = root / "struck.py"
        self.script.write_text(STRUCK)
        pictures = class_folders(root / "pictures", {"flower": 16, "temple": 19})
        net = weights(root / "tiny.safetensors", network(replace(SPEC, num_classes=2)))
        options = ["--data", str(pictures), "--weights", str(net), "--recipe", "scratch", "--head", "linear"]
        settings = ["sync_norm=true", "precision=fp32", "save_every=2", "ema=0.7"]
        self.options = [*options, "--epochs", "3", "--batch-size", "8"]
        self.options += [part for setting in settings for part in ("--set", setting)]
        self.settings = {"ISTHMUS_CACHE": str(root / "cache")}

    def alone(self, name: str) -> Path:
        command = [
            sys.executable,
            "-m",
            "isthmus",
            "train",
            *self.options,
            "--no-report",
            "--out",
            str(self.root / name),
        ]
        subprocess.run(command, env=environment(**self.settings), check=True, capture_output=True)
        return self.root / name

    def many(self, name: str, *, restarts: int = 0, struck: str = "9 0 0", resume: bool = False) -> tuple[str, str]:
        """Standard output and error of two processes; "rank steps signal" says who is struck when."""
        run = str(self.root / name)
        what = ["--resume", run] if resume else [*self.options, "--out", run]
        what += ["--no-report"] if restarts or resume or name != "straight" else []
        process = torchrun(str(self.script), "train", *what, restarts=restarts, STRUCK=struck, **self.settings)
        out, error = process.communicate(timeout=300)
        self.status = process.returncode
        return out, error


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def straight(runs) -> Path:
    out, error = runs.many("straight")
    assert runs.status == 0, error
    assert out.count("accuracy") == 1
    assert error.count("epoch 3/3") == 1
    assert error.count("report: ") == 1
    assert (runs.root / "straight" / "report.html").is_file()
    return runs.root / "straight"


def test_the_run_of_one_process(runs, straight):
    """But for the order of its sums in fp32."""
    alone = runs.alone("alone")
    one, two = (load_file(run / "model.safetensors") for run in (alone, straight))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert relative_error(two[key].double(), value.double()) <= 1e-4, key
    for here, there in zip(read_log(alone / "log.jsonl"), read_log(straight / "log.jsonl"), strict=True):
        assert there["loss"] == pytest.approx(here["loss"], rel=1e-4)
        assert there.get("val_accuracy") == here.get("val_accuracy")


def test_a_killed_process_restarts_all(runs, straight):
    _, error = runs.many("restarted", restarts=1, struck=f"1 6 {signal.SIGKILL.value}")
    assert runs.status == 0, error
    assert same_files(runs.root / "restarted" / "model.safetensors", straight / "model.safetensors")


def test_a_killed_process_ends_all(runs, straight):
    _, error = runs.many("ended", struck=f"1 6 {signal.SIGKILL.value}")
    assert runs.status == 1
    lines = [line for line in error.splitlines() if line.startswith("isthmus: ")]
    assert len(lines) == 1
    assert re.match(r"isthmus: rank 1 on \S+ gave no more sign of life; the last checkpoint is whole", lines[0])
    assert Checkpoints(runs.root / "ended").files()
    runs.many("ended", resume=True)
    assert runs.status == 0
    assert same_files(runs.root / "ended" / "model.safetensors", straight / "model.safetensors")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_once(runs, straight, number):
    name = number.name
    _, error = runs.many(name, struck=f"0 5 {number.value}")
    assert runs.status != 0
    assert error.count("stopped in epoch") == 1, error
    runs.many(name, resume=True)
    assert runs.status == 0
    assert same_files(runs.root / name / "model.safetensors", straight / "model.safetensors")
