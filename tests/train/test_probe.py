"""The head of a frozen trunk: merged it is the mean of its members, repeatable, and no worse than the usual one."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from sklearn import datasets
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from isthmus.arch.plan import plan
from isthmus.arch.spec import HeadSpec, NetSpec, StageSpec
from isthmus.errors import RecipeError
from isthmus.nn.network import make_head
from isthmus.train import probe as module
from isthmus.train.probe import LINEAR, Features, FittedHead, Probe, candidates, choose, fit_head, probes_of

SMALL = Probe(taps=("last",), pools=("avg",), hidden=16, members=3)


def table(name: str, views: int = 1) -> Features:
    """A table of scikit-learn's as the features of one map, its rows shuffled; further views are a little noisy."""
    loaded = getattr(datasets, f"load_{name}")()
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(len(loaded.target), generator=random)
    x = torch.tensor(loaded.data, dtype=torch.float32)[order]
    noise = torch.randn(views, *x.shape, generator=random) * torch.arange(views)[:, None, None] * 0.01
    return Features(
        values=x + noise,
        labels=torch.tensor(loaded.target)[order],
        classes=tuple(map(str, loaded.target_names)),
        head=HeadSpec(),
        widths={"last": x.shape[1]},
    )


def halves(features: Features) -> tuple[Features, Features]:
    cut = len(features.labels) * 3 // 4
    return features.at(range(cut)), features.at(range(cut, len(features.labels)))


def accuracy(head: FittedHead, features: Features) -> float:
    guesses = head.logits(features.read_by(LINEAR.head)).mean(0).argmax(1)
    return float((guesses == features.labels).float().mean())


@pytest.mark.parametrize("probe", [SMALL, LINEAR, Probe(taps=("last",), pools=("avg",), hidden=0, members=4)])
def test_merged_head_is_the_mean_of_its_members(monkeypatch, probe):
    features, seen = table("wine", views=2), []
    merged = module.merged
    monkeypatch.setattr(module, "merged", lambda *given: seen.append(given) or merged(*given))
    head = fit_head(features, probe)
    ((layers,),) = seen
    standard = (features.values - features.values.mean((0, 1))) / features.values.std((0, 1))
    assert torch.allclose(head.mean, features.values.mean((0, 1)))
    assert torch.allclose(head.std, features.values.std((0, 1)))
    logits = []
    for member in range(probe.members):
        x = standard
        for index, (weight, bias) in enumerate(layers):
            x = (F.relu(x) if index else x) @ weight[member] + bias[member, 0]
        logits.append(x)
    assert torch.allclose(head.logits(features.values), torch.stack(logits).mean(0), rtol=1e-4, atol=1e-4)
    assert probe.members == 1 or not torch.allclose(logits[0], logits[1], atol=1e-2)  # so the mean says something


def test_shapes_are_those_of_the_head():
    layers = fit_head(table("wine"), SMALL).layers
    assert [tuple(weight.shape) for weight, _ in layers] == [(48, 13), (3, 48)]
    assert [tuple(bias.shape) for _, bias in layers] == [(48,), (3,)]
    assert SMALL.head == HeadSpec(taps=("last",), pools=("avg",), norm=True, hidden=48)
    assert LINEAR.head == HeadSpec(norm=True)


@pytest.mark.parametrize("probe", [SMALL, LINEAR])
def test_a_network_with_the_head_gives_its_logits(probe):
    """Also where a feature hardly varies, so that batch norm's epsilon would show, and where one is constant."""
    features = table("wine", views=2)
    features.values[..., 2] *= 1e-4
    features.values[..., 4] = 7.0
    stage = StageSpec(depth=1, mid=4, out=features.values.shape[-1], block="basic")
    fc = make_head(plan(NetSpec(stages=(stage,), head=probe.head, num_classes=3))).double().eval()
    head = fit_head(features, probe)
    head.fill(fc)
    found, wanted = fc(features.values[0].double()), head.logits(features.values[0])
    assert torch.allclose(found.float(), wanted, rtol=1e-3, atol=1e-3)


def test_the_same_seed_gives_the_same_bits():
    one, two, other = (fit_head(table("wine", views=2), SMALL, seed) for seed in (3, 3, 4))
    pairs = [
        (a, b) for mine, theirs in zip(one.layers, two.layers, strict=True) for a, b in zip(mine, theirs, strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.layers[0][0], other.layers[0][0])


def test_units_are_dropped_in_training():
    """The same random numbers, so that nothing but the dropping differs."""
    one, other = (fit_head(table("wine"), replace(SMALL, dropout=dropout)) for dropout in (0.0, 0.5))
    assert not torch.allclose(one.layers[0][0], other.layers[0][0], atol=1e-3)


@pytest.mark.parametrize("name", ["iris", "wine", "breast_cancer", "digits"])
def test_linear_head_is_close_to_logistic_regression(name):
    train, test = halves(table(name))
    usual = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    usual.fit(train.values[0].numpy(), train.labels.numpy())
    wanted = usual.score(test.values[0].numpy(), test.labels.numpy())
    assert accuracy(fit_head(train, LINEAR), test) >= wanted - 0.06  # a few pictures of the small tables
    assert accuracy(fit_head(train, Probe(taps=("last",), pools=("avg",))), test) >= wanted - 0.06


def test_few_pictures_still_take_many_steps():
    """One batch an epoch: thirty steps alone left iris at two thirds."""
    train, _ = halves(table("iris"))
    assert accuracy(fit_head(train, LINEAR), train) > 0.9


def test_a_constant_feature_counts_for_nothing():
    features = table("wine")
    features.values[..., 4] = 7.0
    head = fit_head(features, SMALL)
    assert all(bool(torch.isfinite(tensor).all()) for layer in head.layers for tensor in layer)
    elsewhere = features.values.clone()
    elsewhere[..., 4] = 1e6
    assert torch.equal(head.logits(features.values), head.logits(elsewhere))


def test_choose_uses_only_what_it_is_given():
    features, lines = table("digits"), []
    first = features.at(range(600))
    wide = Probe(taps=("last",), pools=("avg",), hidden=64)
    choices = choose(first, [LINEAR, wide], folds=3, seed=1, progress=lines.append)
    assert len(lines) == 2
    assert all("last" in line for line in lines)
    assert [choice.accuracy for choice in choices] == sorted((choice.accuracy for choice in choices), reverse=True)
    assert choices[0].accuracy > 0.85
    chance = Features(
        values=first.values,
        labels=first.labels[torch.randperm(600, generator=torch.Generator().manual_seed(1))],
        classes=first.classes,
        head=first.head,
        widths=first.widths,
    )
    for choice in choose(chance, [LINEAR, wide], folds=3, seed=1, progress=lambda _: None):
        assert abs(choice.accuracy - 0.1) < 0.05  # held-out pictures were not trained on


def test_equal_accuracy_is_decided_by_loss(monkeypatch):
    features = table("iris")
    sure, unsure = (
        FittedHead(
            mean=torch.zeros(4), std=torch.ones(4), layers=((torch.zeros(3, 4), torch.tensor([size, 0.0, 0.0])),)
        )
        for size in (9.0, 0.1)
    )
    heads = iter([sure] * 3 + [unsure] * 3)
    monkeypatch.setattr(module, "fit_head", lambda *_: next(heads))
    first, second = choose(features, [LINEAR, SMALL], progress=lambda _: None)
    assert first.accuracy == second.accuracy
    assert first.probe == SMALL
    assert first.loss < second.loss


def test_reading_picks_the_right_columns():
    widths, head = (
        {"layer1": 2, "layer2": 3, "last": 4},
        HeadSpec(taps=("layer1", "layer2", "last"), pools=("avg", "max")),
    )
    names = [
        (tap, pool, column) for tap in head.taps for pool in head.pools for column in range(widths[tap])
    ]  # in the order in which a network pools
    values = torch.arange(len(names), dtype=torch.float32).expand(2, 5, -1)
    features = Features(values=values, labels=torch.zeros(5), classes=("a", "b"), head=head, widths=widths)
    for taps in [order for size in (1, 2, 3) for order in permutations(head.taps, size)]:
        for pools in [order for size in (1, 2) for order in permutations(head.pools, size)]:
            found = features.read_by(HeadSpec(taps=taps, pools=pools))
            wanted = [(tap, pool, column) for tap in taps for pool in pools for column in range(widths[tap])]
            assert [names[int(value)] for value in found[1, 3]] == wanted
            assert found.shape[:2] == (2, 5)


def test_candidates_read_what_the_network_has():
    for stages in [("layer1",), ("layer1", "layer2"), ("layer1", "layer2", "layer3", "layer4")]:
        taps = [probe.taps for probe in candidates(stages)]
        assert ("last",) in taps
        assert len(set(taps)) == len(taps)
        assert {tap for each in taps for tap in each} <= {*stages[:-1], "last"}
        assert all(taps)


def test_the_probes_that_a_head_stands_for():
    stages = ("layer1", "layer2", "layer3")
    assert probes_of("chosen", stages) == candidates(stages)
    assert probes_of("linear", stages) == (LINEAR,)
    assert [probe.taps for probe in probes_of("layer2", stages)] == [("layer2",)]
    with pytest.raises(RecipeError, match="head is 'layer4'; known: chosen, linear, layer1, layer2, layer3"):
        probes_of("layer4", stages)
