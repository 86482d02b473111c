"""Claim: 85 % on the solar cells (elpv:0) from the demo weights sooner than plain torch gets there.

Whole processes, from their start to their end, imports included, nothing cached: `isthmus train --recipe quick-probe`
(which also leaves a run folder), plain_probe.py (the same features and head in plain torch), and once plain_finetune.py
(all layers at timm's defaults), which is stopped at five times our time if it has not got there.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import ratios, spread, write_result

HERE = Path(__file__).parent
TARGET, ROUNDS, LIMIT = 0.85, 3, 5.0


def ours() -> float:
    """The accuracy of a run with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).with_name("isthmus")), "train", "--data", "elpv:0", "--weights", "demo"]
        command += ["--recipe", "quick-probe", "--no-report", "--out", f"{folder}/run", "--json"]
        environment = os.environ | {"ISTHMUS_CACHE": f"{folder}/cache"}
        done = subprocess.run(command, capture_output=True, check=True, text=True, env=environment)
        return json.loads(done.stdout)["accuracy"]


def plain(workers: int) -> float:
    """The accuracy that the plain script prints."""
    done = subprocess.run(
        [sys.executable, HERE / "plain_probe.py"],
        capture_output=True,
        check=True,
        text=True,
        env=os.environ | {"WORKERS": str(workers)},
    )
    return float(done.stdout)


def finetuned(limit: float) -> float | None:
    """The accuracy of the fine-tuning script, None when it did not get there in time."""
    try:
        command = [sys.executable, HERE / "plain_finetune.py", str(TARGET)]
        done = subprocess.run(command, capture_output=True, check=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    return float(done.stdout)


def main() -> None:
    peers = {
        "ours": ours,
        **{f"plain, {workers} workers": lambda workers=workers: plain(workers) for workers in (1, 2)},
    }
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    accuracy: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, run in peers.items():
            begun = time.perf_counter()
            accuracy[name] = run()
            seconds[name].append(time.perf_counter() - begun)
            if accuracy[name] < TARGET:
                raise SystemExit(f"{name} reaches {accuracy[name]:.2%}")
    best = min(peers, key=lambda name: spread(seconds[name])["median"] if name != "ours" else float("inf"))
    limit = LIMIT * spread(seconds["ours"])["median"]
    begun = time.perf_counter()
    reached = finetuned(limit)
    took = time.perf_counter() - begun
    write_result(
        "elpv_time",
        __doc__,
        {
            f"{best} / ours": {**spread(ratios(seconds[best], seconds["ours"])), "target": ">= 1.5"},
            "fine-tuning / ours": (f"> {LIMIT:g}" if reached is None else f"{took * LIMIT / limit:.2f}")
            + "; target >= 5",
            **{f"seconds, {name}": {**spread(values), "unit": "s"} for name, values in seconds.items()},
            **{f"accuracy, {name}": value for name, value in accuracy.items()},
        },
    )


if __name__ == "__main__":
    main()
