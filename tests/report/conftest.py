"""Runs whose reports are looked at: one of each kind, with classes whose names are hostile."""

from dataclasses import replace
from pathlib import Path

import pytest

from isthmus.run import fit
from isthmus.train.recipes import recipe
from report_pages import HOSTILE, PROBE, TUNED
from small_runs import SPEC, class_folders, network, weights


@pytest.fixture(scope="session")
def mixed(tmp_path_factory) -> Path:
    """Pictures of three classes, one of which has a name that is HTML; some lie in the wrong folder, for mistakes."""
    root = class_folders(tmp_path_factory.mktemp("data") / "pictures", {"flower": 14, "temple": 18, "grass": 12})
    (root / "grass").rename(root / HOSTILE)
    for number in (1, 3, 5):
        (root / "temple" / f"{number}.png").rename(root / "flower" / f"moved {number}.png")
    return root


@pytest.fixture(scope="session")
def runs(tmp_path_factory, mixed) -> dict[str, Path]:
    """A probe whose head was chosen, and a network that was trained, with their reports."""
    folder = tmp_path_factory.mktemp("runs")
    start = weights(folder / "start.safetensors", network(replace(SPEC, num_classes=7)))
    settings = {"data": str(mixed), "weights": str(start), "precision": "fp32", "val_fraction": 0.4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISTHMUS_CACHE", str(folder / "cache"))
        fit(recipe("probe", **settings), folder / PROBE)
        fit(recipe("finetune", head="linear", epochs=2, batch_size=6, lr=1e-3, **settings), folder / TUNED)
    return {name: folder / name for name in (PROBE, TUNED)}
