"""Claim: the solar-cell detector in int8 predicts what it predicts in fp32, and is faster than in bf16, or is refused.

Ten listed splits of the ELPV cells: the network of each is trained by `isthmus train`'s defaults, quantised on training
pictures, and measured on all held-out ones, with the limits that `isthmus export --precision int8` has by default.
"""

import statistics
import tempfile
from collections import deque
from itertools import repeat
from pathlib import Path

import torch

from isthmus.deploy.engines import ENGINES, Model, Work
from isthmus.deploy.predictor import Opened
from isthmus.errors import PrecisionError
from isthmus.run import fit
from isthmus.ship import quantize
from isthmus.train.recipes import recipe
from isthmus.weights.load import load
from measure import interleaved, interval, ratios, spread, write_result

SPLITS = range(10)
ROUNDS, BATCH = 10, 16


def speed(model: Model) -> dict[str, float]:
    """How many times as fast as in bf16 OpenVINO is in int8, sixteen pictures at once and a batch a core."""
    threads = torch.get_num_threads()
    images = torch.randn(BATCH, 3, model.net.preprocess.crop, model.net.preprocess.crop).numpy()

    def call(precision: str):
        opened = Opened(ENGINES["openvino"].open(model, precision, Work(threads=1, jobs=threads)), threads)
        return lambda: deque(opened.many(repeat(images, 2 * threads)), maxlen=0)

    times = interleaved({each: call(each) for each in ("bf16", "int8")}, runs=ROUNDS)
    return spread(ratios(times["bf16"], times["int8"]))


def split_row(split: int, folder: Path) -> dict[str, object]:
    """One split: what was measured, with all layers in int8 first and as it was taken in the end."""
    run = fit(recipe("probe", data=f"elpv:{split}", weights="demo"), folder, report=False).folder
    try:
        int8 = quantize(run)
    except PrecisionError as error:
        best = max(error.tried, key=lambda judged: judged.agreement)
        return {
            "split": split,
            "taken": "refused: too many classes change",
            "agreement": best.agreement,
            "drop": best.drop,
        }
    gain = speed(Model(load(run).eval(), int8))
    return {
        "split": split,
        "taken": "yes" if gain["median"] > 1 else "refused: no time is saved",
        "agreement": int8.judged.agreement,
        "drop": int8.judged.drop,
        "interval": ", ".join(f"{each:+.4f}" for each in int8.judged.interval),
        "pictures": int8.judged.pictures,
        "layers in bf16": len(int8.higher),
        "over bf16": gain,
    }


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for split in SPLITS:
            rows.append(split_row(split, Path(folder) / str(split)))
            print(rows[-1], flush=True)
    taken = [row for row in rows if row["taken"] == "yes"]
    summary = {
        "splits taken, the others refused": f"{len(taken)} of {len(rows)}",
        "agreement with fp32, mean over splits": interval([row["agreement"] for row in rows]) | {"target": ">= 0.99"},
        "accuracy lost, mean over splits": interval([row["drop"] for row in rows]),
    }
    if taken:
        gains = [row["over bf16"]["median"] for row in taken]
        summary["speed over bf16, median of the splits"] = statistics.median(gains)
        summary["least speed over bf16"] = f"{min(gains):.3f}; target > 1"
    write_result("int8_cells", __doc__, summary, rows)


if __name__ == "__main__":
    main()
