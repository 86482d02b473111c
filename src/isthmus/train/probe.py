"""A head for a frozen trunk: candidates compared by cross-validation on the training features, then trained on all.

Several small MLPs are trained side by side and then merged into one wide one that gives their mean logits: the
classifier of an ordinary ResNet, with the standardisation of the features as its batch norm.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.arch.spec import HeadSpec
from isthmus.data.order import stratified_folds
from isthmus.errors import RecipeError
from isthmus.evaluation.metrics import Tally
from isthmus.train.schedule import learning_rate

__all__ = ["LINEAR", "Choice", "Features", "FittedHead", "Probe", "candidates", "choose", "fit_head", "probes_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """Pooled features of every picture in every view, (views, N, features), by the head that reads them all."""

    values: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    head: HeadSpec
    widths: dict[str, int]

    def read_by(self, head: HeadSpec) -> Tensor:
        """The columns that `head` reads: (views, N, its features)."""
        columns, start = {}, 0
        for tap in self.head.taps:
            for pool in self.head.pools:
                columns[tap, pool] = self.values[..., start : start + self.widths[tap]]
                start += self.widths[tap]
        return torch.cat([columns[tap, pool] for tap in head.taps for pool in head.pools], dim=-1)

    def at(self, indices: Sequence[int]) -> "Features":
        """The features of some pictures."""
        chosen = torch.as_tensor(indices)
        return replace(self, values=self.values[:, chosen], labels=self.labels[chosen])


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """How a head is trained: `members` MLPs of `hidden` units each, side by side; 0 units for a linear head."""

    taps: tuple[str, ...]
    pools: tuple[Literal["avg", "max"], ...] = ("avg", "max")
    hidden: int = 128
    members: int = 4
    dropout: float = 0.5
    lr: float = 2e-3
    weight_decay: float = 1e-2
    epochs: int = 30
    batch_size: int = 128

    @property
    def head(self) -> HeadSpec:
        """What the merged head reads and how wide it is."""
        return HeadSpec(taps=self.taps, pools=self.pools, norm=True, hidden=self.hidden * self.members)


LEAST_STEPS = 300  # a hundred pictures are one batch, and thirty steps would not take the weights anywhere
LINEAR = Probe(taps=("last",), pools=("avg",), hidden=0, members=1, dropout=0.0, lr=1e-2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A candidate and how it did on the held-out folds of the training part."""

    probe: Probe
    accuracy: float
    loss: float


def probes_of(head: str, stages: tuple[str, ...]) -> tuple[Probe, ...]:
    """The probes that `Recipe.head` stands for, several where one is to be chosen; raises RecipeError."""
    if head not in ("chosen", "linear", *stages):
        raise RecipeError(f"head is {head!r}; known: chosen, linear, {', '.join(stages)}")
    return (LINEAR,) if head == "linear" else candidates(stages) if head == "chosen" else (Probe(taps=(head,)),)


def candidates(stages: tuple[str, ...]) -> tuple[Probe, ...]:
    """An MLP each on the last map, on the one before it (often the better one to transfer), on two, on all before."""
    *early, _ = stages
    readings = (("last",), tuple(early[-1:]), tuple(early[-2:]), tuple(early))
    return tuple(Probe(taps=taps) for taps in dict.fromkeys(readings) if taps)


def choose(
    features: Features, probes: Sequence[Probe], *, folds: int = 3, seed: int = 0, progress: Callable[[str], None]
) -> list[Choice]:
    """Every candidate with its cross-validated scores, the best first: by accuracy, then by loss."""
    parts = stratified_folds(features.labels.tolist(), folds, seed)
    choices = []
    for probe in probes:
        tally, single = Tally(features.classes), replace(probe, members=1)  # one member ranks them as well as all
        for held in parts:
            inside = set(held)
            rest = [index for index in range(len(features.labels)) if index not in inside]
            head, out = fit_head(features.at(rest), single, seed), features.at(held)
            tally.add(head.logits(out.read_by(single.head)).mean(0), out.labels)
        choices.append(Choice(probe=probe, accuracy=tally.accuracy, loss=tally.loss))
        progress(f"head on {' + '.join(probe.taps)}: {tally.accuracy:.1%} in {folds} folds of the training part")
    return sorted(choices, key=lambda choice: (-choice.accuracy, choice.loss))


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedHead:
    """A trained head: the standardisation of the features, then weight and bias of each linear layer."""

    mean: Tensor
    std: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...]

    def logits(self, x: Tensor) -> Tensor:
        """Logits of features (…, features)."""
        x = (x - self.mean) / self.std
        for index, (weight, bias) in enumerate(self.layers):
            x = F.linear(F.relu(x) if index else x, weight, bias)
        return x

    @torch.no_grad()
    def fill(self, fc: nn.Module) -> None:
        """Put the head into the classifier of a network made with the probe's HeadSpec."""
        norm, *rest = fc.children()
        if not isinstance(norm, nn.BatchNorm1d) or norm.running_mean is None or norm.running_var is None:
            raise TypeError(type(norm))
        norm.running_mean.copy_(self.mean)
        norm.running_var.copy_(torch.where(self.std.isfinite(), self.std.square(), 1))
        norm.weight.copy_((norm.running_var + norm.eps).sqrt() / self.std)  # eps undone: some deviations are tiny
        linears = [module for module in rest if isinstance(module, nn.Linear)]
        for linear, (weight, bias) in zip(linears, self.layers, strict=True):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)


def fit_head(features: Features, probe: Probe, seed: int = 0) -> FittedHead:
    """The merged head of a probe, trained on a random view of each picture each epoch.

    AdamW, 5 % warm-up, cosine; the same seed gives the same head.
    """
    x, random = features.read_by(probe.head), torch.Generator().manual_seed(seed)
    mean, std = x.mean((0, 1)), x.std((0, 1))
    # A feature that is constant here says nothing, and divided by next to nothing it would shout elsewhere.
    std = torch.where(std > 1e-4 * std.mean(), std, torch.inf)
    x = (x - mean) / std
    views, count, width = x.shape
    members, batch = probe.members, min(probe.batch_size, count)
    widths = [width, *([probe.hidden] if probe.hidden else []), len(features.classes)]
    layers = [
        (
            ((torch.rand(members, into, out, generator=random) * 2 - 1) / into**0.5).requires_grad_(),
            torch.zeros(members, 1, out, requires_grad=True),
        )
        for into, out in pairwise(widths)
    ]
    optimizer = torch.optim.AdamW(
        [tensor for layer in layers for tensor in layer], betas=(0.9, 0.99), weight_decay=probe.weight_decay, fused=True
    )
    steps = count // batch
    epochs = max(probe.epochs, -(-LEAST_STEPS // steps))
    total, step = steps * epochs, 0
    for _ in range(epochs):
        order = torch.stack([torch.randperm(count, generator=random) for _ in range(members)])
        view = torch.randint(views, (members, count), generator=random)
        for start in range(0, steps * batch, batch):
            at = order[:, start : start + batch]
            out = x[view[:, start : start + batch], at]
            for index, (weight, bias) in enumerate(layers):
                if index:
                    kept = torch.rand(out.shape, generator=random) >= probe.dropout
                    out = F.relu(out) * kept / (1 - probe.dropout)
                out = torch.baddbmm(bias, out, weight)
            loss = F.cross_entropy(out.flatten(0, 1), features.labels[at].flatten()) * members
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, peak=probe.lr, warmup=max(total // 20, 1), total=total)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
    return FittedHead(mean=mean, std=std, layers=merged([(weight.detach(), bias.detach()) for weight, bias in layers]))


def merged(layers: list[tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Members (members, in, out) as one head: hidden units side by side, logits averaged."""
    (weight, bias), *rest = layers
    if not rest:
        return ((weight.mean(0).T.contiguous(), bias.mean((0, 1))),)
    ((last, last_bias),) = rest
    return (
        (weight.transpose(1, 2).flatten(0, 1).contiguous(), bias.flatten()),
        (last.flatten(0, 1).T.contiguous() / len(weight), last_bias.mean((0, 1))),
    )
