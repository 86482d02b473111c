"""Tallies against scikit-learn, and that parts add up to the whole."""

import json

import numpy as np
import pytest
import torch
from sklearn import metrics

from isthmus.errors import DataError
from isthmus.evaluation.metrics import Tally
from isthmus.evaluation.mistakes import KEPT


def made(count: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=random)
    logits = torch.randn(count, classes, generator=random)
    logits[torch.arange(count), labels] += 1.0
    return logits, labels, tuple(f"class {place}" for place in range(classes))


def tallied(
    logits: torch.Tensor, labels: torch.Tensor, classes: tuple[str, ...], places: torch.Tensor | None = None
) -> Tally:
    tally = Tally(classes)
    tally.add(logits, labels, places)
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
    whole = tallied(logits, labels, names, torch.arange(101))
    in_place, total = Tally(names), Tally(names)
    for part in torch.arange(101).split([1, 60, 33, 7]):
        in_place.add(logits[part], labels[part], part)
        total = total + tallied(logits[part], labels[part], names, part)
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
    first = ["pictures", "loss", "accuracy", "top5", "balanced_accuracy", "calibration"]
    assert list(values) == [*first, "per_class", "confusion"]
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


def test_the_most_confident_mistakes():
    logits, labels, names = made(300, 4)
    tally = Tally(names, lambda index: f"picture {index}")
    tally.add(logits, labels, torch.arange(300) + 7)
    confidence, guess = logits.softmax(1).max(1)
    wrong = [place for place in range(300) if guess[place] != labels[place]]
    wanted = sorted(wrong, key=lambda place: -float(confidence[place]))[:KEPT]
    found = tally.mistakes
    assert [row.index for row in found] == [place + 7 for place in wanted]
    assert [row.name for row in found] == [f"picture {place + 7}" for place in wanted]
    assert [row.label for row in found] == [names[labels[place]] for place in wanted]
    assert [row.predicted for row in found] == [names[guess[place]] for place in wanted]
    assert [row.confidence for row in found] == pytest.approx([float(confidence[place]) for place in wanted])


def test_equal_mistakes_come_in_the_order_of_their_pictures():
    logits = torch.tensor([[9.0, 0.0]]).repeat(40, 1)
    places = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    parts = [Tally(("a", "b")) for _ in range(3)]
    for tally, part in zip(parts, places.split(15), strict=True):
        tally.add(logits[part], torch.ones(len(part), dtype=torch.int64), part)
    assert [row.index for row in (parts[2] + parts[0] + parts[1]).mistakes] == list(range(KEPT))


def test_few_mistakes_and_none():
    logits = torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0]])
    tally = Tally(("a", "b"))
    tally.add(logits, torch.tensor([0, 1, 1]), torch.tensor([4, 5, 6]))
    assert [(row.index, row.label, row.predicted) for row in tally.mistakes] == [(6, "b", "a")]
    right = Tally(("a", "b"))
    right.add(logits, torch.tensor([0, 1, 0]), torch.arange(3))
    assert right.mistakes == []
    assert "mistakes" not in right.to_dict()


def test_classes_that_share_a_name_are_told_apart():
    tally = Tally(("crane", "wheel", "crane"))
    tally.add(torch.tensor([[0.0, 0.0, 9.0], [9.0, 0.0, 1.0]]), torch.tensor([1, 2]), torch.arange(2))
    again = Tally.from_dict(json.loads(json.dumps(tally.to_dict())))
    for each in (tally, again, Tally(tally.classes) + again):
        assert [(row.label, row.predicted, row.places) for row in each.mistakes] == [
            ("wheel", "crane", (1, 2)),
            ("crane", "crane", (2, 0)),
        ]


def test_scores_come_back():
    logits, labels, names = made(200, 6)
    tally = Tally(names, str)
    tally.add(logits, labels, torch.arange(200))
    again = Tally.from_dict(json.loads(json.dumps(tally.to_dict())))
    assert again.to_dict() == tally.to_dict() | {"loss": pytest.approx(tally.loss)}


def test_scores_of_older_files_come_back_without_what_they_lack():
    logits, labels, names = made(200, 6)
    tally = Tally(names, str)
    tally.add(logits, labels, torch.arange(200))
    old = {name: value for name, value in tally.to_dict().items() if name not in ("calibration", "mistakes")}
    again = Tally.from_dict(old)
    assert again.calibration is None
    assert again.to_dict() == old | {"loss": pytest.approx(tally.loss)}
