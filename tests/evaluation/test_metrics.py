"""Tallies against scikit-learn, and that parts add up to the whole."""

import json

import numpy as np
import pytest
import torch
from sklearn import metrics

from isthmus.errors import DataError
from isthmus.evaluation.metrics import Tally


def made(count: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=random)
    logits = torch.randn(count, classes, generator=random)
    logits[torch.arange(count), labels] += 1.0
    return logits, labels, tuple(f"class {place}" for place in range(classes))


def tallied(logits: torch.Tensor, labels: torch.Tensor, classes: tuple[str, ...]) -> Tally:
    tally = Tally(classes)
    tally.add(logits, labels)
    return tally


@pytest.mark.parametrize("classes", [2, 4, 5, 13])
def test_equals_scikit_learn(classes):
    logits, labels, names = made(500, classes)
    tally = tallied(logits, labels, names)
    truth, guess = labels.numpy(), logits.argmax(1).numpy()
    assert tally.seen == 500
    assert tally.confusion.dtype == torch.int64
    assert np.array_equal(tally.confusion, metrics.confusion_matrix(truth, guess, labels=range(classes)))
    assert tally.accuracy == pytest.approx(metrics.accuracy_score(truth, guess))
    assert tally.balanced_accuracy == pytest.approx(metrics.balanced_accuracy_score(truth, guess))
    assert tally.loss == pytest.approx(
        metrics.log_loss(truth, logits.double().softmax(1), labels=range(classes)), rel=1e-6
    )
    precision, recall, _, support = metrics.precision_recall_fscore_support(truth, guess, labels=range(classes))
    rows = tally.per_class()
    assert [row.name for row in rows] == list(names)
    assert [row.precision for row in rows] == pytest.approx(precision.tolist())
    assert [row.recall for row in rows] == pytest.approx(recall.tolist())
    assert [row.support for row in rows] == support.tolist()
    if classes > 5:
        assert tally.top5 == pytest.approx(metrics.top_k_accuracy_score(truth, logits, k=5, labels=range(classes)))
    else:
        assert tally.top5 == (1.0 if classes == 5 else None)


def test_uneven_parts_add_up_to_the_whole():
    logits, labels, names = made(101, 7)
    whole = tallied(logits, labels, names)
    in_place, total = Tally(names), Tally(names)
    for part in torch.arange(101).split([1, 60, 33, 7]):
        in_place.add(logits[part], labels[part])
        total = total + tallied(logits[part], labels[part], names)
    for tally in (in_place, total):
        assert torch.equal(tally.confusion, whole.confusion)
        assert tally.loss == pytest.approx(whole.loss, rel=1e-12)
        assert tally.to_dict() == {**whole.to_dict(), "loss": pytest.approx(whole.loss)}


def test_classes_without_pictures_or_predictions():
    logits = torch.tensor([[9.0, 0, 0], [9, 0, 0], [0, 9, 0]])
    tally = tallied(logits, torch.tensor([0, 1, 0]), ("seen", "missed", "absent"))
    seen, missed, absent = tally.per_class()
    assert (seen.precision, seen.recall, seen.support) == (0.5, 0.5, 2)
    assert (missed.precision, missed.recall, missed.support) == (0.0, 0.0, 1)
    assert (absent.precision, absent.recall, absent.support) == (0.0, 0.0, 0)
    assert tally.balanced_accuracy == 0.25


def test_half_precision_and_gradients():
    logits, labels, names = made(40, 6)
    tally = tallied(logits.bfloat16().requires_grad_(), labels, names)
    assert tally.seen == 40
    assert tally.loss > 0


def test_to_dict_is_json():
    logits, labels, names = made(30, 6)
    values = json.loads(json.dumps(tallied(logits, labels, names).to_dict(), allow_nan=False))
    assert list(values) == ["pictures", "loss", "accuracy", "top5", "balanced_accuracy", "per_class", "confusion"]
    assert values["per_class"][2]["name"] == "class 2"
    assert sum(map(sum, values["confusion"])) == values["pictures"] == 30


def test_nothing_counted_has_no_score():
    for name in ("accuracy", "loss", "balanced_accuracy"):
        with pytest.raises(DataError, match="no picture was evaluated"):
            getattr(Tally(("a", "b")), name)


def test_shapes_and_classes_must_fit():
    logits, labels, names = made(8, 4)
    for wrong_logits, wrong_labels in [(logits[:, :3], labels), (logits, labels[:7]), (logits[0], labels)]:
        with pytest.raises(DataError, match=r"must be \(N, 4\) and \(N,\)"):
            Tally(names).add(wrong_logits, wrong_labels)
    with pytest.raises(DataError, match="classes must agree"):
        Tally(("a", "b")) + Tally(("b", "a"))
