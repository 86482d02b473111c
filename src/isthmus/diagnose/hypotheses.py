"""What the running statistics say of how the network was trained: its preprocessing, and where its blocks stride.

Neither is in the keys or shapes of weights. The statistics of a batch norm are a fingerprint of the pictures and the
layers before it, so the hypothesis under which the pictures give those statistics is the true one.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from isthmus.arch.preprocess import IMAGENET, ChannelOrder, Preprocess
from isthmus.arch.variants import name_of
from isthmus.diagnose.copies import inputs
from isthmus.diagnose.findings import Finding
from isthmus.diagnose.moments import Moments, batch_norms
from isthmus.messages import listed
from isthmus.nn.batchnorm import BatchNorm
from isthmus.nn.network import ResNet

__all__ = [
    "FAR",
    "Fit",
    "behind_strides",
    "compared",
    "fit_of_strides",
    "fits_of_preprocessing",
    "hypotheses",
    "preprocessing_finding",
    "stride_finding",
    "strided",
    "twin",
]

FAR = 1 / 3  # deviations: pictures of another kind may be so far off, and a hypothesis that is true is not
SURE = 3.0  # standard errors
BEHIND = {"bottleneck": "bn2", "preact_bottleneck": "bn3"}  # the norm behind the 3×3

Scale = tuple[tuple[float, ...], tuple[float, ...]]
# Mean and deviation of red, green and blue on the scale of 0 to 1, under the words that tell them.
SCALES: dict[str, Scale] = {
    "scaled to 0..1": ((0.0,) * 3, (1.0,) * 3),
    "left at 0..255": ((0.0,) * 3, (1 / 255,) * 3),
    "scaled to -1..1 (mean and std 0.5)": ((0.5,) * 3, (0.5,) * 3),
    "normalised by ImageNet's mean and std": (IMAGENET.mean, IMAGENET.std),
    "left at 0..255 minus Caffe's mean": ((123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255,) * 3),
}


def hypotheses(record: Preprocess) -> dict[str, Preprocess]:
    """Other ways in which pictures are often prepared, by their words: scales, and red and blue exchanged."""
    found: dict[str, Preprocess] = {}
    if record.channels == "L":
        for words, (mean, std) in SCALES.items():
            made = replace(record, mean=mean[:1], std=std[:1])
            if len(set(mean)) == 1 and made != record:
                found[words] = made
        return found
    other: ChannelOrder = "BGR" if record.channels == "RGB" else "RGB"
    orders: tuple[ChannelOrder, ...] = (record.channels, other)
    found = {f"as they are, but in {other} order": replace(record, channels=other, mean=record.mean, std=record.std)}
    for words, (mean, std) in SCALES.items():
        for order in orders:
            turned = (mean, std) if order == "RGB" else (mean[::-1], std[::-1])
            made = replace(record, channels=order, mean=turned[0], std=turned[1])
            if made not in (record, *found.values()):
                found[words if order == record.channels else f"{words}, in {order} order"] = made
    return found


class _ReachedError(Exception):
    """The norm that was waited for; the rest of the network need not run."""


@torch.no_grad()
def moments_before(net: nn.Module, norm: str, x: Tensor) -> Moments:
    """Moments of what a norm is given of `x`; nothing behind it runs."""
    kept: list[Tensor] = []

    def stop(_norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        kept.append(given[0])
        raise _ReachedError

    handle = net.get_submodule(norm).register_forward_pre_hook(stop)
    try:
        net(x)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return Moments.of(kept[0])


class Fit(NamedTuple):
    """How far two sets of moments are from the same norms' running statistics, and whose those are.

    `own` and `other` are root mean squares over channels of the distance: that of the mean in running deviations and
    that of the log deviation. `part` is how far the statistics lie on the way from the first set (0) to the second (1),
    and `error` its standard error were channels independent.
    """

    own: float
    other: float
    part: float
    error: float

    @property
    def favours_other(self) -> bool:
        """Whether the statistics are clearly on the second set's half of the way."""
        return self.part - SURE * self.error > 0.5


def distances(norm: BatchNorm, moments: Moments) -> Tensor:
    """Of each channel: the shift of its mean in running deviations, and that of its log deviation; fp64 (2, C)."""
    mean, var = (norm.get_buffer(name).cpu().double() for name in ("running_mean", "running_var"))
    spread = var + norm.eps
    return torch.stack([(moments.mean - mean) / spread.sqrt(), ((moments.variance + norm.eps) / spread).log() / 2])


def compared(rows: Sequence[tuple[BatchNorm, Moments, Moments]]) -> Fit:
    """The fit of two sets of moments to norms: each with its own moments and the other's."""
    own = torch.cat([distances(norm, moments) for norm, moments, _ in rows], 1)
    other = torch.cat([distances(norm, moments) for norm, _, moments in rows], 1)
    way = own - other
    length = way.square().sum()
    far, near = (float(each.square().sum(0).mean().sqrt()) for each in (own, other))
    if not length > 0:
        return Fit(far, near, 0.0, math.inf)
    part = (own * way).sum() / length
    error = ((own - part * way).square().mean() / length).sqrt()
    return Fit(far, near, float(part), float(error))


def fits_of_preprocessing(net: ResNet, images: Tensor, norm: str) -> dict[str, Fit]:
    """The first norm's statistics between the pictures as the network's record prepares them and each hypothesis."""
    module = batch_norms(net)[norm]
    own = moments_before(net, norm, inputs(net, images, net.preprocess))
    return {
        words: compared([(module, own, moments_before(net, norm, inputs(net, images, record)))])
        for words, record in hypotheses(net.preprocess).items()
    }


def preprocessing_finding(net: ResNet, images: Tensor, norm: str, moments: Moments) -> list[Finding]:
    """The hypothesis that fits the statistics of the first norm clearly better than the network's own record.

    `moments` are those of all pictures, prepared as the record says; where they fit, no hypothesis is tried.
    """
    module = batch_norms(net)[norm]
    if compared([(module, moments, moments)]).own < FAR:
        return []
    fits = fits_of_preprocessing(net, images, norm)
    words = min(fits, key=lambda each: fits[each].other)
    fit = fits[words]
    if not fit.favours_other or fit.other > min(FAR, fit.own / 2) or fit.own < FAR:
        return []
    record = hypotheses(net.preprocess)[words]
    return [
        Finding(
            kind="preprocessing",
            severity="fault",
            where="preprocessing",
            found=f"The statistics of {norm} are those of pictures {words}: prepared so they are {fit.other:.2f} "
            f"standard deviations off (rms of mean and log deviation), as net.preprocess says {fit.own:.2f}.",
            mend=f"Set net.preprocess = dataclasses.replace(net.preprocess, channels={record.channels!r}, "
            f"mean={rounded(record.mean)}, std={rounded(record.std)}) and save it: isthmus.save_weights(net, path).",
        )
    ]


def rounded(values: tuple[float, ...]) -> tuple[float, ...]:
    """To five digits, as they are typed."""
    return tuple(float(f"{value:.5g}") for value in values)


def strided(net: ResNet) -> list[str]:
    """The bottleneck blocks whose stride could as well sit on the other convolution."""
    return [
        block.name
        for block in net.plan.blocks
        if block.spec.kind in BEHIND and block.spec.stride > 1 and not block.spec.smooths
    ]


def twin(net: ResNet) -> ResNet:
    """The network with the stride of each strided block on its other convolution; the weights are shared."""
    memo: dict[int, Any] = {id(each): each for each in (*net.parameters(), *net.buffers())}
    other = copy.deepcopy(net, memo)
    for name in strided(net):
        first: Any = other.get_submodule(f"{name}.conv1")
        second: Any = other.get_submodule(f"{name}.conv2")
        first.stride, second.stride = second.stride, first.stride
    return other


def behind_strides(net: ResNet) -> list[str]:
    """The norms behind the 3×3 of these blocks that keep statistics."""
    kinds, norms = {block.name: block.spec.kind for block in net.plan.blocks}, batch_norms(net)
    names = [f"{block}.{BEHIND[kinds[block]]}" for block in strided(net)]
    return [name for name in names if name in norms and norms[name].running_mean is not None]


def fit_of_strides(net: ResNet, built: Mapping[str, Moments], flipped: Mapping[str, Moments]) -> Fit | None:
    """The norms behind the 3×3 of strided blocks between the network as built and its twin; None where none tells."""
    norms = batch_norms(net)
    rows = [(norms[name], built[name], flipped[name]) for name in behind_strides(net) if name in built]
    return compared(rows) if rows else None


def stride_finding(net: ResNet, built: Mapping[str, Moments], flipped: Mapping[str, Moments]) -> list[Finding]:
    """The other place of the strides, where its twin's moments are clearly those of the statistics."""
    fit = fit_of_strides(net, built, flipped)
    if fit is None or fit.other > FAR or not fit.favours_other:
        return []
    now = net.spec.stride_at
    other: Literal["conv1", "conv2"] = "conv1" if now == "conv2" else "conv2"
    place = {"conv1": "first 1×1", "conv2": "3×3"}
    name = name_of(replace(net.spec, stride_at=other))
    how = f"arch={name!r}" if name else f"arch=dataclasses.replace(net.spec, stride_at={other!r})"
    return [
        Finding(
            kind="stride_place",
            severity="fault",
            where=listed(strided(net)),
            found=f"Blocks stride on their {place[now]}, and the statistics behind the 3×3 are those of a stride on "
            f"the {place[other]}: with it the pictures are {fit.other:.2f} standard deviations off (rms of mean and "
            f"log deviation), as built {fit.own:.2f}.",
            mend=f"Load the weights into the other network: isthmus.load(path, {how}).",
        )
    ]
