"""Claim: a run that kill -9 ends at random moments goes on to the weights of a run that nobody ended, bit for bit.

Runs of a ResNet-10 on solar cells, each ended five times (SIGKILL to all its processes, torchrun included), by one
process and by two under torchrun. A state is saved behind every step, so that many moments lie inside a save: those
that left a half-written state behind are counted. The first moment of a run lies in the command's start.
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from isthmus.data.sources import elpv_pictures
from isthmus.train.checkpoint import Checkpoints
from measure import write_result

RUNS, KILLS = 4, 5  # for one process, and for two
PICTURES, EPOCHS, BATCH = 128, 3, 16
STEPS = EPOCHS * (PICTURES * 3 // 4 // BATCH)
SETTINGS = ("ema=0.9", "save_every=1", "precision=fp32", "drop_path=0.1", "augment.mixup=0.2")


def started(run: Path, data: Path, processes: int) -> subprocess.Popen[bytes]:
    """The command that a person types: a new run, or to go on with it."""
    many = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}") if processes > 1 else ()
    begun = (run / "recipe.toml").exists()
    new = ("--data", data, "--arch=resnet10t", "--image-size=64", f"--epochs={EPOCHS}", f"--batch-size={BATCH}")
    settings = [each for setting in SETTINGS for each in ("--set", setting)]
    options = ("--resume", run) if begun else (*new, *settings, "--out", run)
    return subprocess.Popen(
        [sys.executable, *many, "-m", "isthmus", "train", *options, "--no-report"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=(run.parent / f"{run.name}.txt").open("ab"),
    )


def family(process: int) -> list[int]:
    """A process and all that it started, itself first (Linux)."""
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [process, *(each for task in tasks for child in task.read_text().split() for each in family(int(child)))]


def steps_taken(run: Path) -> int:
    """Steps in the log."""
    log = run / "log.jsonl"
    return log.read_bytes().count(b'"step"') if log.exists() else 0


def killed(run: Path, data: Path, processes: int, steps: float, seconds: float) -> dict[str, object]:
    """End the run once the log has so many steps and then some seconds have passed."""
    began, process = time.perf_counter(), started(run, data, processes)
    while steps_taken(run) < steps and process.poll() is None:
        time.sleep(0.001)
    time.sleep(seconds)
    for each in family(process.pid):
        os.kill(each, signal.SIGKILL)
    process.wait()
    saved = Checkpoints(run).files()
    return {
        "seconds after the start": round(time.perf_counter() - began, 2),
        "steps in the log": steps_taken(run),
        "last whole state": saved[0].stem if saved else "none",
        "half-written state": bool(list((run / "checkpoints").glob(".*.tmp"))),
    }


def finished(run: Path, data: Path, processes: int) -> dict[str, torch.Tensor]:
    """Let the run come to its end; the final weights."""
    if code := started(run, data, processes).wait():
        raise SystemExit((run.parent / f"{run.name}.txt").read_text()[-2000:] + f"\nexit status {code}")
    return load_file(run / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--runs", type=int, default=RUNS, help="of each number of processes")
    arguments = parser.parse_args()
    draw, rows, summary = random.Random(arguments.seed), [], {"seed": arguments.seed}
    with tempfile.TemporaryDirectory() as folder:
        root, cells = Path(folder), elpv_pictures()
        with (root / "cells.csv").open("w", newline="") as file:
            labelled = ([cells.name(index), cells.classes[cells.labels[index]]] for index in range(PICTURES))
            csv.writer(file).writerows([["path", "label"], *labelled])
        for processes in (1, 2):
            straight, began = root / f"straight{processes}", time.perf_counter()
            wanted = finished(straight, root / "cells.csv", processes)
            step = (time.perf_counter() - began) / STEPS / 4
            survived = 0
            for number in range(arguments.runs):
                run = root / f"run{processes}.{number}"
                moments = [0.0, *sorted(draw.uniform(1, STEPS - 1) for _ in range(KILLS - 1))]
                kills = [
                    killed(run, root / "cells.csv", processes, int(moment), draw.uniform(0, step if moment else 4))
                    for moment in moments
                ]
                found = finished(run, root / "cells.csv", processes)
                equal = found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
                survived += KILLS * equal
                rows += [{"processes": processes, "run": number} | kill | {"bit-equal": equal} for kill in kills]
                print(rows[-KILLS:], flush=True)
            summary[f"survived, processes: {processes}"] = f"{survived} of {arguments.runs * KILLS}"
    summary["moments inside a save"] = sum(row["half-written state"] for row in rows)
    write_result("kill_resume", __doc__, summary, rows)


if __name__ == "__main__":
    main()
