"""Batch norms: the mode they are in, statistics that are stale, next to 0 or never move, and batches too small."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.diagnose.findings import Finding, Mode, NormDrift
from isthmus.diagnose.moments import Moments, batch_norms
from isthmus.messages import listed
from isthmus.nn.batchnorm import FROZEN, BatchNorm
from isthmus.nn.layers import DropPath
from isthmus.nn.network import ResNet

__all__ = [
    "adrift",
    "batch_findings",
    "changed",
    "drifts",
    "mode_findings",
    "mode_of",
    "momentum_findings",
    "stale_finding",
    "zero_variance_findings",
]

SHIFT, RATIO = 1.0, 4.0  # standard deviations; times the variance, either way
BLOWN = 100.0  # variance that a norm gives a channel whose running variance is below its eps
FEW, SOME = 8, 16  # pictures a batch: Wu & He 2018, table 2, lose 1.2 points at 8, 0.1 at 16
GIVEN = 0.1  # part of the predictions


def mode_of(net: ResNet, name: str) -> Mode:
    """What a norm does: `frozen` where `.train()` does not reach it."""
    norm = net.get_submodule(name)
    if type(norm) in FROZEN.values() or name.partition(".")[0] in net.frozen:
        return "frozen"
    return "training" if norm.training else "evaluating"


def normalised(norm: BatchNorm, moments: Moments) -> tuple[Tensor, Tensor]:
    """Mean and variance that the running statistics would give each channel: fp64 (C,) each, 0 and 1 if they are right.

    Scale and shift of the norm do not count.
    """
    mean, var = (norm.get_buffer(name).cpu().double() for name in ("running_mean", "running_var"))
    spread = var + norm.eps
    return (moments.mean - mean) / spread.sqrt(), (moments.variance + norm.eps) / spread


def blown(norm: BatchNorm, moments: Moments) -> Tensor:
    """Which channels vary on the pictures and have next to no running variance: bool (C,)."""
    _, variance = normalised(norm, moments)
    return (norm.get_buffer("running_var").cpu() < norm.eps) & (variance > BLOWN)


def drifts(net: ResNet, moments: Mapping[str, Moments], batch: int) -> tuple[NormDrift, ...]:
    """One row a norm that has statistics and was run; `net` is the caller's own, `batch` 0 where it is not known."""
    rows = []
    for name, norm in batch_norms(net).items():
        if name not in moments or norm.running_var is None:
            continue
        mode, found = mode_of(net, name), moments[name]
        shift, variance = normalised(norm, found)
        sound = ~blown(norm, found)
        sound = sound if bool(sound.any()) else torch.ones_like(sound)
        counts = batch if batch and mode != "frozen" else 0
        rows.append(
            NormDrift(
                name=name,
                channels=norm.num_features,
                shift=float(shift[sound].square().mean().sqrt()),
                ratio=float(variance[sound].log().mean().exp()),
                least_variance=float(norm.running_var.min()),
                momentum=norm.momentum,
                mode=mode,
                values=counts * found.values if counts else None,
                noise=found.noise(counts) if counts else None,
            )
        )
    return tuple(rows)


def adrift(row: NormDrift) -> bool:
    """Whether running statistics are far from those of the pictures."""
    return row.shift > SHIFT or not 1 / RATIO < row.ratio < RATIO


def changed(outputs: Tensor, others: Tensor) -> int:
    """On how many pictures the first guess differs."""
    return int((outputs.argmax(1) != others.argmax(1)).sum())


def difference(net: ResNet, outputs: Tensor, others: Tensor) -> tuple[float, str]:
    """How much of what comes out is another: of the predictions or, without classes, of its size; and in words."""
    if net.spec.num_classes > 1:
        moved = changed(outputs, others)
        return moved / len(outputs), f"{moved} of {len(outputs)} predictions change"
    part = float((outputs - others).norm() / others.norm().clamp_min(1e-30))
    return part, f"what comes out changes by {part:.0%} of its size"


def mode_findings(net: ResNet, evaluating: Tensor, training: Tensor) -> list[Finding]:
    """What is wrong with the modes of a network that is to predict; the outputs are those with all norms evaluating,
    and those with norms in the modes that they have (all by the batch, where these are all alike).
    """
    modes = {name: mode_of(net, name) for name in batch_norms(net)}
    trains = [name for name, mode in modes.items() if mode == "training"]
    rests = [name for name, mode in modes.items() if mode == "evaluating"]
    drops = [
        name
        for name, module in net.named_modules()
        if module.training and isinstance(module, DropPath | nn.modules.dropout._DropoutNd)  # noqa: SLF001 - the base
    ]
    effect = (
        f"normalised by the batch, {changed(evaluating, training)} of {len(evaluating)} predictions are others than in "
        "evaluation"
        if net.spec.num_classes > 1
        else "what comes out for a picture depends on those beside it"
    )
    if trains and (rests or not net.training):
        left = "evaluates" if not net.training else "trains"
        return [
            Finding(
                kind="mixed_mode",
                severity="fault",
                where=listed(trains if not net.training else rests),
                found=f"The network {left}, and of its {len(modes)} batch norms {len(trains)} train and {len(rests)} "
                f"evaluate: {effect}.",
                mend="Call net.eval() to predict. To keep statistics as they are in training, freeze: isthmus.freeze("
                "net, until) or isthmus.nn.batchnorm.freeze_batchnorm(net).",
            )
        ]
    effect = effect if trains else "what comes out for a picture changes from call to call"
    if trains or drops:
        whole = "The network is" if net.training else "Parts of the network are"
        what = f"{len(trains)} batch norms" if trains else f"{len(drops)} drop paths"
        return [
            Finding(
                kind="training_mode",
                severity="fault",
                where="the network",
                found=f"{whole} in training mode, and {what} act so: {effect}.",
                mend="Call net.eval() before it predicts.",
            )
        ]
    if net.training and rests:
        return [
            Finding(
                kind="mixed_mode",
                severity="warning",
                where=listed(rests),
                found=f"The network trains and {len(rests)} batch norms evaluate, but they are not frozen: the next "
                f"net.train() sets them going.",
                mend="Freeze them: isthmus.freeze(net, until) or isthmus.nn.batchnorm.freeze_batchnorm(net).",
            )
        ]
    if net.training:
        return [
            Finding(
                kind="training_mode",
                severity="note",
                where="the network",
                found="The network is in training mode, though nothing in it acts otherwise than in evaluation.",
                mend="Call net.eval() before it predicts; Predictor and export ask for it.",
            )
        ]
    return []


def momentum_findings(net: ResNet) -> list[Finding]:
    """Norms that keep no statistics, or whose statistics cannot follow."""
    norms = {name: norm for name, norm in batch_norms(net).items() if mode_of(net, name) != "frozen"}
    found = []
    if without := [name for name, norm in norms.items() if norm.running_mean is None]:
        found.append(
            Finding(
                kind="no_statistics",
                severity="warning",
                where=listed(without),
                found=f"{len(without)} batch norms keep no running statistics: in evaluation too they use those of the "
                f"batch, and what comes out for a picture depends on those beside it.",
                mend="Make them with track_running_stats=True and give them statistics: isthmus.precise_batchnorm("
                "net, batches).",
            )
        )
    keeps = {name: norm.momentum for name, norm in norms.items() if norm.running_mean is not None}
    told = {
        0.0: "the statistics of training never reach evaluation",
        1.0: "the statistics that stay are those of the last batch alone",
    }
    for momentum, harm in told.items():
        if those := [name for name, each in keeps.items() if each == momentum]:
            found.append(
                Finding(
                    kind="momentum",
                    severity="warning",
                    where=listed(those),
                    found=f"{len(those)} of {len(norms)} batch norms have momentum {momentum:g}: {harm}.",
                    mend="Set momentum to 0.1 (or None for the mean of all batches), then train on, or call "
                    "isthmus.precise_batchnorm(net, batches). To keep statistics on purpose, freeze them.",
                )
            )
    return found


def zero_variance_findings(net: ResNet, moments: Mapping[str, Moments]) -> list[Finding]:
    """Channels that vary and have next to no running variance."""
    counts: dict[str, int] = {}
    worst: tuple[float, str, float, float] | None = None
    for name, norm in batch_norms(net).items():
        if name not in moments or norm.running_var is None:
            continue
        which = blown(norm, moments[name])
        if not bool(which.any()):
            continue
        counts[name] = int(which.sum())
        _, variance = normalised(norm, moments[name])
        place = int(torch.where(which, variance, -1.0).argmax())
        row = float(variance[place]), name, float(norm.running_var[place]), float(moments[name].variance[place])
        worst = row if worst is None else max(worst, row)
    if worst is None:
        return []
    factor, name, stored, measured = worst
    return [
        Finding(
            kind="zero_variance",
            severity="fault",
            where=listed(counts),
            found=f"{sum(counts.values())} channels have a running variance below their norm's eps and do vary on the "
            f"pictures; at {name} one has {stored:.1g} and varies by {measured:.2g}, so that it leaves the norm "
            f"{math.sqrt(factor):,.0f} times as large as it should.",
            mend="Measure the statistics again: isthmus.precise_batchnorm(net, batches). If the file holds zeros, it "
            "was written before training or converted wrongly.",
        )
    ]


def batch_findings(rows: Sequence[NormDrift], batch: int) -> list[Finding]:
    """Batches whose statistics are noise."""
    moving = [row for row in rows if row.noise is not None]
    if not moving or batch >= SOME:
        return []
    noisiest = max(moving, key=lambda row: row.noise or 0.0)
    fewest = min(moving, key=lambda row: row.values or 0)
    batches = "single pictures" if batch == 1 else f"batches of {batch}"
    return [
        Finding(
            kind="small_batch",
            severity="fault" if batch == 1 else "warning" if batch < FEW else "note",
            where="the network",
            found=f"Batch norms see {batches} in training: the mean that {noisiest.name} takes from one is off by "
            f"{noisiest.noise:.2f} standard deviations (rms), and {fewest.name} has {fewest.values} values a channel.",
            mend=f"Give them {SOME} pictures or more at once (batch_size, micro_batch, fewer processes or "
            "sync_norm=true); or leave statistics as they are (train_norm=false), or take group norm (norm=group).",
        )
    ]


def stale_finding(
    net: ResNet,
    rows: Sequence[NormDrift],
    *,
    evaluating: Tensor,
    precise: Tensor,
    labels: Tensor | None,
) -> list[Finding]:
    """Running statistics that are not those of the pictures: outputs with the running and with exact statistics."""
    frozen = [row for row in rows if row.mode == "frozen" and adrift(row)]
    off = [row for row in rows if row.mode != "frozen" and adrift(row)]
    found = []
    if frozen:
        worst = furthest(frozen)
        found.append(
            Finding(
                kind="frozen_statistics",
                severity="note",
                where=listed(row.name for row in frozen),
                found=f"{len(frozen)} of {len(rows)} batch norms have frozen statistics that are not those of the "
                f"pictures, {told(worst)}. That is as it should be where the layers were trained with them.",
                mend="Nothing, while scores are good; training with moving statistics (train_norm=true, batches of "
                f"{SOME} or more) adapts them to these pictures.",
            )
        )
    if off:
        worst, (part, effect) = furthest(off), difference(net, evaluating, precise)
        proven = labels is not None and fits_better(evaluating, precise, labels)
        found.append(
            Finding(
                kind="stale_statistics",
                severity="note" if proven else "fault" if part > GIVEN else "warning",
                where=listed(row.name for row in off),
                found=f"{len(off)} of {len(rows)} batch norms have running statistics that are not those of the "
                f"pictures, {told(worst)}{left_over(net, worst.name)}. With exact ones {effect}"
                + (", and no more of them are right." if proven else "."),
                mend="isthmus.precise_batchnorm(net, batches) measures them exactly, on pictures prepared as in "
                "training; then isthmus.save_weights(net, path).",
            )
        )
    return found


def furthest(rows: Sequence[NormDrift]) -> NormDrift:
    """The norm that is furthest off."""
    return max(rows, key=lambda row: row.distance)


def told(row: NormDrift) -> str:
    """How far a norm is off, in words."""
    return f"furthest at {row.name}: {row.shift:.1f} standard deviations off the mean, {row.ratio:.2g}× the variance"


def left_over(net: ResNet, name: str) -> str:
    """What a norm's counter says of how much is left of the values it began with; empty where that is little."""
    norm: Any = net.get_submodule(name)
    steps, momentum = int(norm.num_batches_tracked or 0), norm.momentum
    rest = (1 - momentum) ** steps if momentum else 0.0
    return f" (after {steps} batches, {rest:.0%} of it is what it was before them)" if steps and rest > 0.05 else ""


def fits_better(evaluating: Tensor, precise: Tensor, labels: Tensor) -> bool:
    """Whether running statistics serve: the network is right far above chance with them, no less than with exact ones.

    Then they belong to its weights, however far the pictures are from them (a trunk that was trained on others).
    """
    right, other = (int((outputs.argmax(1).cpu() == labels).sum()) for outputs in (evaluating, precise))
    chance, count = float(labels.bincount().max()) / len(labels), len(labels)
    return right >= other and right > chance * count + 3 * math.sqrt(count * chance * (1 - chance))
