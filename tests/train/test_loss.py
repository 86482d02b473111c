"""Losses against torch's and timm's, and that a step may be divided anyhow."""

import pytest
import torch
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy
from torch.nn import functional as F

from isthmus.train.loss import Objective, class_weights

PICTURES, CLASSES = 12, 5
RANDOM = torch.Generator().manual_seed(0)
LOGITS = torch.randn(PICTURES, CLASSES, generator=RANDOM, dtype=torch.float64)
LABELS = torch.arange(PICTURES) % CLASSES
WEIGHTS = torch.rand(CLASSES, generator=RANDOM, dtype=torch.float64) + 0.5


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(smoothing):
    found = Objective(smoothing=smoothing)(LOGITS, LABELS) / PICTURES
    assert found == pytest.approx(float(F.cross_entropy(LOGITS, LABELS, label_smoothing=smoothing)), rel=1e-12)
    weighted = Objective(smoothing=smoothing, weights=WEIGHTS)(LOGITS, LABELS) / WEIGHTS[LABELS].sum()
    wanted = F.cross_entropy(LOGITS, LABELS, weight=WEIGHTS, label_smoothing=smoothing)
    assert weighted == pytest.approx(float(wanted), rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("share", [1.0, 0.7, 0.05])
def test_cross_entropy_of_mixed_pictures_is_timms(share, smoothing):
    mixed = mixup_target(LABELS, CLASSES, share).double()
    smooth = mixup_target(LABELS, CLASSES, share, smoothing).double()
    wanted = -(smooth * LOGITS.log_softmax(1)).sum(1).mean()  # timm's SoftTargetCrossEntropy
    found = Objective(smoothing=smoothing)(LOGITS, mixed) / PICTURES
    assert found == pytest.approx(float(wanted), rel=1e-6)  # timm's targets are fp32


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_is_timms(smoothing):
    found = Objective(kind="bce", smoothing=smoothing)(LOGITS, LABELS) / PICTURES
    assert found == pytest.approx(float(BinaryCrossEntropy(smoothing)(LOGITS, LABELS)), rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("share", [1.0, 0.79, 0.7, 0.5, 0.21, 0.19, 0.05])
def test_binary_cross_entropy_of_mixed_pictures_is_timms(share, smoothing):
    """Its training script smooths where it mixes, and takes as present what is above the threshold."""
    timm = BinaryCrossEntropy(0.0, target_threshold=0.2)
    wanted = timm(LOGITS, mixup_target(LABELS, CLASSES, share, smoothing).double())
    mixed = mixup_target(LABELS, CLASSES, share).double()
    found = Objective(kind="bce", smoothing=smoothing)(LOGITS, mixed) / PICTURES
    assert found == pytest.approx(float(wanted), rel=1e-12)


def test_several_labels_a_picture():
    several = (torch.rand(PICTURES, CLASSES, generator=torch.Generator().manual_seed(1)) < 0.4).double()
    wanted = F.binary_cross_entropy_with_logits(LOGITS, several, weight=WEIGHTS)
    found = Objective(kind="bce", weights=WEIGHTS)(LOGITS, several.float()) / PICTURES
    assert found == pytest.approx(float(wanted), rel=1e-12)


@pytest.mark.parametrize("kind", ["ce", "bce"])
@pytest.mark.parametrize("targets", [LABELS, F.one_hot(LABELS, CLASSES).double()], ids=["labels", "shares"])
def test_parts_of_a_step_add_up(kind, targets):
    objective = Objective(kind=kind, smoothing=0.1, weights=WEIGHTS)
    whole = LOGITS.clone().requires_grad_()
    objective(whole, targets).backward()
    divided = LOGITS.clone().requires_grad_()
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        objective(divided[start:stop], targets[start:stop]).backward()
    assert torch.allclose(whole.grad, divided.grad, rtol=1e-13, atol=0)


def test_half_precision_logits_are_summed_in_full():
    for half in (torch.bfloat16, torch.float16):
        found = Objective()(LOGITS.to(half), LABELS)
        assert found.dtype == torch.float32
        assert float(found) == pytest.approx(float(Objective()(LOGITS.to(half).double(), LABELS)), rel=1e-6)


def test_class_weights_average_to_one_over_the_pictures():
    counts = [3, 7, 90]
    weights = class_weights(counts)
    assert sum(weight * count for weight, count in zip(weights, counts, strict=True)) == pytest.approx(sum(counts))
    assert weights * torch.tensor(counts) == pytest.approx([100 / 3] * 3)


@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_a_class_without_pictures_is_no_infinite_weight(kind):
    weights = class_weights([3, 0, 9])
    assert weights.tolist() == pytest.approx([2.0, 1.0, 2 / 3])
    labels = torch.tensor([0, 2])
    assert Objective(kind=kind, smoothing=0.1, weights=weights)(torch.zeros(2, 3), labels).isfinite()
