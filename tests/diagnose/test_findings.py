"""The kinds of findings are one table: what is made is in it, the guide tells of each, and the worst comes first."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import isthmus
from isthmus.diagnose.findings import KINDS, SEVERITIES, Finding, NormDrift, worst_first
from isthmus.diagnose.hypotheses import behind_strides, stride_finding
from isthmus.diagnose.moments import Moments, batch_norms, norm_moments

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src" / "isthmus" / "diagnose").glob("*.py"))


def made():
    """The kinds that the sources write, in strings of the calls that make a Finding."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
                (kind,) = (each.value for each in node.keywords if each.arg == "kind")
                choices = [kind.body, kind.orelse] if isinstance(kind, ast.IfExp) else [kind]
                yield from (choice.value for choice in choices)


def test_every_kind_is_made_and_none_beside():
    assert set(made()) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_guide_tells_of_every_kind(kind):
    assert f"`{kind}`" in (ROOT / "docs" / "diagnosis.md").read_text(encoding="utf-8")


def test_worst_first():
    findings = [
        Finding(kind=kind, severity=severity, where="", found="", mend="")
        for kind in ("dead_channels", "training_mode", "small_batch")
        for severity in reversed(SEVERITIES)
    ]
    told = [(each.severity, each.kind) for each in worst_first(findings)]
    kinds = ("training_mode", "small_batch", "dead_channels")
    assert told == [(severity, kind) for severity in ("fault", "warning", "note") for kind in kinds]


@pytest.mark.parametrize(
    ("shift", "ratio", "wanted"), [(0.5, 1.0, 0.5), (0.0, 9.0, 1.0986), (0.1, 1 / 9, 1.0986), (0.0, 0.0, 34.54)]
)
def test_how_far_a_norm_is_off(shift, ratio, wanted):
    row = NormDrift(
        name="bn1", channels=4, shift=shift, ratio=ratio, least_variance=1.0, momentum=0.1, mode="evaluating"
    )
    assert row.distance == pytest.approx(wanted, rel=1e-3)


def test_a_network_of_the_table_with_the_other_stride_is_named():
    """The mend for ResNet-50 is a name that `isthmus models` has."""
    with torch.device("meta"):
        net = isthmus.ResNet(isthmus.plan("resnet50"))
    for name in behind_strides(net):
        net.set_submodule(name, torch.nn.BatchNorm2d(net.get_submodule(name).num_features))
    random = torch.Generator().manual_seed(0)

    def moments(norm, off):
        count = norm.num_features
        means = off * torch.randn(count, dtype=torch.float64, generator=random)
        return Moments(mean=means, variance=torch.ones(count, dtype=torch.float64), pictures=means[None], values=4)

    norms = batch_norms(net)
    built, flipped = ({name: moments(norms[name], off) for name in behind_strides(net)} for off in (0.5, 0.01))
    (finding,) = stride_finding(net, built, flipped)
    assert "isthmus.load(path, arch='resnet50_v1')" in finding.mend
    assert finding.where == "layer2.0, layer3.0, layer4.0"
    assert "Blocks stride on their 3×3" in finding.found
    assert stride_finding(net, flipped, built) == []


@pytest.mark.parametrize("training", [True, False])
def test_moments_of_several_batches_are_those_of_all(training):
    """In double precision too, in which a norm's own buffers could be taken for what was kept of them."""
    values = torch.randn(30, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e4
    net = nn.Sequential(nn.BatchNorm2d(3, momentum=1.0)).double().train(training)
    found = norm_moments(net, values.split([2, 17, 11])).moments["0"]
    torch.testing.assert_close(found.mean, values.mean((0, 2, 3)), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.variance, values.transpose(0, 1).flatten(1).var(1), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.pictures, values.mean((2, 3)), rtol=1e-12, atol=0)
