"""Counts against figures that others published: torchvision's metadata, timm's benchmark table, the papers."""

import json
from pathlib import Path

import pytest

from isthmus.arch.cost import cost
from isthmus.arch.variants import variants

GOLDEN = Path(__file__).parents[1] / "golden"
TORCHVISION = json.loads((GOLDEN / "torchvision.json").read_text())["models"]
TIMM = json.loads((GOLDEN / "timm_family.json").read_text())["models"]

# He et al. 2015 table 6 and He et al. 2016 tables 1-4, in millions as printed there.
PAPERS = {
    "resnet20_cifar": "0.27",
    "resnet32_cifar": "0.46",
    "resnet44_cifar": "0.66",
    "resnet56_cifar": "0.85",
    "resnet110_cifar": "1.7",
    "resnet164_cifar": "1.7",
    "resnet1001_cifar": "10.2",
    "resnetv2_164_cifar": "1.7",
    "resnetv2_1001_cifar": "10.2",
}


def test_files_name_their_source_and_hold_only_networks_of_the_table():
    for name, models in (("torchvision", TORCHVISION), ("timm_family", TIMM)):
        assert json.loads((GOLDEN / f"{name}.json").read_text())["source"]
        assert set(models) <= set(variants())


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    found, published = cost(name), TORCHVISION[name]
    assert found.params == published["params"]
    assert round(found.macs / 1e9, 3) == published["gmacs"]


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    for row in TIMM[name]:
        found = cost(name, row["image_size"])
        assert round(found.params / 1e6, 2) == row["params_m"]
        assert round(found.activations / 1e6, 2) == row["mact"]
        # Its counter adds batch norm and pooling; the last half digit is its rounding.
        assert found.macs / 1e9 - 0.005 <= row["gmacs"] <= found.macs / 1e9 * 1.016 + 0.005


@pytest.mark.parametrize("name", PAPERS)
def test_papers(name):
    # The papers left batch norm out of their counts: without it every printed digit agrees.
    millions = sum(row.params for row in cost(name, 32).rows if row.kind != "norm") / 1e6
    digits = len(PAPERS[name].partition(".")[2])
    assert f"{millions:.{digits}f}" == PAPERS[name]


@pytest.mark.parametrize("name", [name for name in PAPERS if "v2" not in name])
def test_plain_twins_are_the_same_without_shortcuts(name):
    plain, residual = cost(name.replace("resnet", "plain"), 32), cost(name, 32)
    projections = sum(row.params for row in residual.rows if ".downsample" in row.name)
    assert plain.params == residual.params - projections
    assert bool(projections) == (residual.plan.blocks[0].spec.kind == "bottleneck")


def test_macs_and_flops_are_named_apart():
    found = cost("resnet50")
    assert (found.macs, found.flops) == (4_089_184_256, 2 * 4_089_184_256)
    assert 3.8e9 < cost("resnet50_v1").macs < 3.9e9  # the papers' 3.8
    assert sum(row.macs for row in found.rows) == found.macs
    for level in ("stage", "block", "layer"):
        rows = found.by(level)
        assert sum(row.params for row in rows) == found.params
        assert sum(row.macs for row in rows) == found.macs
        assert sum(row.activations for row in rows) == found.activations
        assert all(row.flops == 2 * row.macs for row in rows)
