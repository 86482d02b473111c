"""The same depth with and without shortcuts, with and without norms: what a network is before training, and in its
first steps.

Three signs are taken of each twin, from the same weights and on the same pictures. How large the gradient is that comes
to each block (He et al. 2015, section 4.1, look at it to tell degradation from vanishing gradients). How alike the
gradients of nearby inputs are, which falls exponentially with depth in plain networks and far more slowly in residual
ones (Balduzzi et al. 2017). And the loss of the first steps of training.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus import records
from isthmus.arch.block import FOLDED, Norm, Shortcut
from isthmus.arch.plan import plan
from isthmus.arch.spec import NetSpec
from isthmus.arch.variants import name_of, variant, variants
from isthmus.data.loader import Loader
from isthmus.data.transform import normalise
from isthmus.diagnose.copies import copied
from isthmus.diagnose.signals import block_gradients
from isthmus.errors import DataError, RecipeError, SpecError
from isthmus.nn.batchnorm import precise_batchnorm
from isthmus.nn.network import ResNet
from isthmus.runtime import Machine

__all__ = [
    "DISTANCES",
    "Measured",
    "Twin",
    "gradient_correlation",
    "measure_twin",
    "measure_twins",
    "settled",
    "twin_network",
    "twins",
]

DISTANCES = tuple(4.0**-power for power in range(7, 1, -1))  # 1/16384 to 1/16
LAST = 10  # steps whose losses are averaged: one batch tells little
Tell = Callable[[str, int, int, Mapping[str, float]], object]
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Twin:
    """One of the networks that are compared: `spec` differs from the others' in what the other fields say alone."""

    shortcuts: bool
    norm: Norm
    spec: NetSpec

    def __str__(self) -> str:
        """What sets it apart."""
        norm = "no norm" if self.norm == "none" else f"{self.norm} norm"
        return f"{'shortcuts' if self.shortcuts else 'plain'}, {norm}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a twin showed. Values that are no finite numbers are kept as they came.

    `gradients` is, by block, the size of the gradient of the loss in the block's input map: its norm, rms over the
    pictures of the first batch. `correlations` is, by distance (a part of the way from one picture to another), the
    mean correlation of the gradients at both ends of it. `losses` are those before each of `steps` steps, up to the
    first that is no number.
    """

    twin: Twin
    params: int
    gradients: Mapping[str, float]
    correlations: Mapping[float, float]
    losses: tuple[float, ...]
    steps: int

    @property
    def first(self) -> float:
        """The gradient in the input of the first block."""
        return next(iter(self.gradients.values()))

    @property
    def last(self) -> float:
        """The gradient in the input of the last block."""
        return list(self.gradients.values())[-1]

    @property
    def diverged(self) -> bool:
        """Whether training ended early, at a loss that is no number."""
        return bool(self.losses) and not math.isfinite(self.losses[-1])

    @property
    def loss(self) -> float | None:
        """Mean of the last ten losses, in nats; None where no step was taken or the loss was no number."""
        tail = self.losses[-LAST:]
        return None if not tail or self.diverged else sum(tail) / len(tail)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, null for what is no finite number."""
        values = {
            "shortcuts": self.twin.shortcuts,
            "norm": self.twin.norm,
            "params": self.params,
            "gradients": dict(self.gradients),
            "correlations": {f"1/{1 / distance:g}": value for distance, value in self.correlations.items()},
            "losses": list(self.losses),
            "steps": self.steps,
            "loss": self.loss,
        }
        return records.finite(values)


def twins(spec: NetSpec) -> tuple[Twin, ...]:
    """A network with shortcuts and plain, each with its norm and with none; the one with both comes first.

    Of a folded or plain network the first is what it was before. Drop path is off in all of them, so that nothing in
    them is random. A pre-activation network has no twins without norms: its blocks begin with them.
    """
    norm: Norm = "batch" if spec.norm in FOLDED else spec.norm
    whole = replace(spec, name="", shortcut=shortcut_of(spec), norm=norm, drop_path=0.0)
    specs = [whole]
    if not spec.preact:
        specs.append(replace(whole, norm="none", head=replace(whole.head, norm=False)))
    return tuple(
        Twin(shortcuts=shortcut != "none", norm=each.norm, spec=replace(each, shortcut=shortcut))
        for each in specs
        for shortcut in (whole.shortcut, "none")
    )


def shortcut_of(spec: NetSpec) -> Shortcut:
    """The shortcut of a network; of a plain one that of its row in the table, else a projection (He et al. 2015, B)."""
    if spec.shortcut != "none":
        return spec.shortcut
    row = name_of(spec).replace("plain", "resnet", 1)
    return variant(row).shortcut if row in variants() else "conv1"


def twin_network(found: Sequence[Twin], index: int, size: int, seed: int) -> ResNet:
    """The network of a twin for pictures of `size` px; what twins have in common has the same weights in all of them.

    Initialised as He et al. 2015 with every scale 1 and every bias 0, also where there is no norm. No branch starts
    switched off (Goyal et al. 2017, `zero_init`): a block that starts as its shortcut would have nothing to compare.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        whole = ResNet(plan(found[0].spec, size), zero_init=False)
        net = whole if index == 0 else ResNet(plan(found[index].spec, size), zero_init=False)
    own = net.state_dict()
    shared = {
        name: value for name, value in whole.state_dict().items() if name in own and value.shape == own[name].shape
    }
    net.load_state_dict({**own, **shared})
    return net


def settled(net: ResNet, images: Tensor) -> ResNet:
    """A copy in evaluation whose batch norms have the statistics of `images`, so that no picture depends on another."""
    still = copied(net)
    precise_batchnorm(still, [images])
    return still


def backward_norms(net: ResNet, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The size of the gradient of the training loss in the input map of each block, by its name: rms over pictures."""
    names = [block.name for block in net.plan.blocks]
    _, found = block_gradients(copied(net).train(), images, labels, names, F.cross_entropy)
    return {each.name: each.inputs or 0.0 for each in found}


def gradient_correlation(
    net: ResNet, starts: Tensor, ends: Tensor, distances: Sequence[float] = DISTANCES
) -> dict[float, float]:
    """How alike the gradients of nearby inputs are, by distance: 1 is the same up to a factor, 0 is unrelated.

    From each picture of `starts` (N, C, *size) one goes a part of the way to that of `ends`; the gradients of the first
    output with respect to the input, at both places, are correlated over the input's values (Pearson), and the mean of
    the N correlations is taken, less those where a gradient is 0. `net` evaluates, on a copy: 1 for a linear network.
    """
    still = copied(net)
    here = input_gradients(still, starts)
    return {
        distance: correlations(here, input_gradients(still, starts.lerp(ends, distance))).nanmean().item()
        for distance in distances
    }


def input_gradients(net: nn.Module, images: Tensor) -> Tensor:
    """The gradient of the first output with respect to each picture: fp64 on the CPU (N, C × pixels)."""
    points = images.detach().requires_grad_()
    (gradients,) = torch.autograd.grad(net(points)[:, 0].sum(), points)
    return gradients.flatten(1).cpu().double()


def correlations(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's correlation of the rows of two matrices: (N,), not a number where a row is constant."""
    rows = [each - each.mean(1, keepdim=True) for each in (one, other)]
    one, other = (each / each.norm(dim=1, keepdim=True) for each in rows)
    return (one * other).sum(1)


def batches(loader: Loader, steps: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised pictures and labels of the first `steps` steps, over as many epochs as these take."""
    for batch in islice(chain.from_iterable(map(loader.epoch, count())), steps):
        images = normalise(batch.images.to(device), loader.record)
        yield images.contiguous(memory_format=torch.channels_last), batch.labels.to(device)


def training_losses(
    net: ResNet, given: Batches, lr: float, tell: Callable[[int, float], object] = lambda *_: None
) -> tuple[float, ...]:
    """The loss before each step of SGD as in He et al. 2015 at a constant rate, up to the first that is no number."""
    optimizer = torch.optim.SGD(net.train().parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    losses: list[float] = []
    for images, labels in given:
        loss = F.cross_entropy(net(images), labels)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        tell(len(losses), losses[-1])
    return tuple(losses)


def measure_twins(
    spec: NetSpec,
    loader: Loader,
    here: Machine,
    *,
    steps: int = 100,
    lr: float = 0.005,
    seed: int = 0,
    tell: Tell = lambda *_: None,
) -> Iterator[Measured]:
    """Twin after twin of a network, on the pictures of a loader that trains, whose classes the networks take.

    The random numbers of the caller stay as they are. `tell` hears of each step as a reporter does. Raises SpecError
    for a network that takes no pictures, RecipeError for an impossible setting, DataError where pictures have no
    neighbours.
    """
    if spec.dims != 2 or spec.in_channels != len(loader.record.channels):
        raise SpecError(
            f"the network takes {spec.in_channels} channels in {spec.dims} dimensions and the pictures have "
            f"{len(loader.record.channels)} in 2; change dims to 2, or in_channels"
        )
    if steps < 0 or not 0 < lr < math.inf:
        raise RecipeError(f"steps is {steps} and lr {lr}; steps must be 0 or more, and lr above 0 and finite")
    if loader.step_size < 2:
        raise DataError("a picture by itself has no neighbour; give a batch size of 2 or more")
    found = twins(replace(spec, num_classes=len(loader.pictures.classes)))
    for index in range(len(found)):
        yield measure_twin(found, index, loader, here, steps=steps, lr=lr, seed=seed, tell=tell)


def measure_twin(
    found: Sequence[Twin],
    index: int,
    loader: Loader,
    here: Machine,
    *,
    steps: int,
    lr: float,
    seed: int,
    tell: Tell = lambda *_: None,
) -> Measured:
    """One of the twins. Gradients and correlations are those of the loader's first batch, where training begins.

    For the correlations each picture of that batch goes towards the next one.
    """
    twin, device, every = found[index], here.torch_device, steps * loader.step_size
    images, labels = next(batches(loader, 1, device))
    net = twin_network(found, index, loader.record.crop, seed).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    gradients = backward_norms(net, images, labels)
    near = gradient_correlation(settled(net, images), images, images.roll(-1, 0))
    losses = training_losses(
        net,
        batches(loader, steps, device),
        lr,
        lambda step, loss: tell(str(twin), step * loader.step_size, every, {"loss": loss}),
    )
    if len(losses) < steps:
        tell(str(twin), every, every, {})
    return Measured(
        twin=twin,
        params=sum(parameter.numel() for parameter in net.parameters()),
        gradients=gradients,
        correlations=near,
        losses=losses,
        steps=steps,
    )
