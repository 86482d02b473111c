"""All checks of a network on real pictures, on copies of it: nothing of the caller's network moves."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.diagnose.audit import (
    adrift,
    batch_findings,
    drifts,
    mode_findings,
    mode_of,
    momentum_findings,
    stale_finding,
    zero_variance_findings,
)
from isthmus.diagnose.copies import check_pictures, copied, inputs, undisturbed_random
from isthmus.diagnose.findings import (
    BlockSignals,
    Diagnosis,
    Finding,
    Mode,
    NormDrift,
    StripUse,
    Unchecked,
    worst_first,
)
from isthmus.diagnose.hypotheses import FAR, behind_strides, preprocessing_finding, stride_finding, strided, twin
from isthmus.diagnose.moments import Moments, Pass, batch_norms, norm_moments
from isthmus.diagnose.signals import Loss, MakeOptimizer, Step, gradient_findings, signals, take_steps
from isthmus.diagnose.strips import strip_findings, strip_unchecked, strip_uses, watched_strips
from isthmus.messages import listed
from isthmus.nn.network import ResNet

__all__ = ["diagnose"]

AT_ONCE = 32  # pictures a pass
ENOUGH = 16  # pictures that statistics are judged on
STEPS, OF = 3, 12  # steps that gradients are measured over, and the most pictures of each
RATE = 5e-3  # of the steps where nothing else is said: the recipes' usual one
LONG = 16  # blocks in a row without a shortcut: those of the plain network of 34 layers that He et al. 2015 train


def usual_optimizer(net: nn.Module) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum at the usual rate, as `Recipe` has it."""
    return torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9, nesterov=True)


def diagnose(
    net: ResNet,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    batch: int = 0,
    make_optimizer: MakeOptimizer = usual_optimizer,
    loss: Loss = F.cross_entropy,
) -> Diagnosis:
    """What ails a network, measured on pictures.

    `images` are uint8 (N, C, H, W) as the loader gives them, which `net.preprocess` prepares, or floats as the network
    takes them; 64 or so tell enough. `labels` int64 (N,) are needed for gradients. `batch` is how many pictures a batch
    norm sees at once in training (0: not known); the steps are those of `make_optimizer` on the mean `loss`. The
    network, its gradients, hooks and modes and all random numbers stay as they are, bit for bit. Raises DataError or
    SpecError for pictures that it cannot take.
    """
    check_pictures(net, images, labels)
    with undisturbed_random(next(net.parameters()).device), torch.inference_mode(mode=False), torch.enable_grad():
        return Examination(net, images, labels, batch).diagnosis(make_optimizer, loss)


class Examination:
    """One network on its pictures, and what was found so far. `net` is a copy, `own` the caller's."""

    def __init__(self, own: ResNet, images: Tensor, labels: Tensor | None, batch: int) -> None:
        self.own, self.net = own, copied(own)
        self.images, self.batch = images, batch
        self.labels = None if labels is None else labels.cpu()
        self.blocks = [block.name for block in own.plan.blocks]
        self.findings: list[Finding] = []
        self.checked: list[str] = []
        self.unchecked: list[Unchecked] = []

    def diagnosis(self, make_optimizer: MakeOptimizer, loss: Loss) -> Diagnosis:
        """Every check in turn."""
        self.shortcuts()
        batches = list(torch.split(inputs(self.net, self.images, self.net.preprocess), AT_ONCE))
        if len(batches[-1]) == 1:  # of which there is no variance
            batches[-2:] = [torch.cat(batches[-2:])]
        self.findings += not_finite(self.net)
        if any(each.kind == "not_finite" for each in self.findings):
            return self.result((), (), (), spoilt=True)
        with watched_strips(self.net) as strips:
            scales, evaluating = self.run(batches)
        if broken := [name for name, scale in scales.items() if not math.isfinite(scale)]:
            self.findings.append(
                Finding(
                    kind="not_finite",
                    severity="fault",
                    where=listed(broken),
                    found=f"All weights are numbers, and yet {broken[0]} gives some that are none on these pictures.",
                    mend="Look for maps that grow from block to block: statistics or scales of norms that are far too "
                    "large; in half precision, take bf16 or single.",
                )
            )
            return self.result((), (), (), spoilt=True)
        uses = strip_uses(strips)
        self.findings += strip_findings(self.own, uses, len(self.images))
        self.unchecked += strip_unchecked(self.own, uses)
        self.checked += ["strips"] if uses else []
        norms = self.norms(batches, evaluating)
        return self.result(self.signals(scales, make_optimizer, loss), uses, norms)

    @torch.no_grad()
    def run(self, batches: Sequence[Tensor]) -> tuple[dict[str, float], Tensor]:
        """In evaluation: the rms of each block's output, and the network's outputs (N, outputs)."""
        squares = dict.fromkeys(self.blocks, 0.0)

        def add(name: str, output: Tensor) -> None:
            squares[name] += float(output.square().mean()) * len(output) / len(self.images)

        handles = [
            self.net.get_submodule(name).register_forward_hook(
                lambda _block, _inputs, output, name=name: add(name, output)
            )
            for name in self.blocks
        ]
        try:
            outputs = torch.cat([self.net(batch) for batch in batches])
        finally:
            for handle in handles:
                handle.remove()
        return {name: math.sqrt(value) if value >= 0 else math.nan for name, value in squares.items()}, outputs

    def shortcuts(self) -> None:
        """Note rows of blocks without shortcuts."""
        self.checked.append("shortcuts")
        longest, row = list[str](), list[str]()
        for block in self.own.plan.blocks:
            row = [*row, block.name] if block.spec.shortcut == "none" else []
            longest = max(longest, row, key=len)
        if len(longest) >= LONG:
            self.findings.append(
                Finding(
                    kind="missing_shortcut",
                    severity="note",
                    where=f"{longest[0]} to {longest[-1]}",
                    found=f"{len(longest)} blocks in a row have no shortcut; a plain network of {LONG} trains "
                    f"to a higher error than one of 8 (He et al. 2015, figure 4: 34 layers and 18).",
                    mend="Give them one: shortcut=conv1 in the spec, or fewer blocks.",
                )
            )

    @torch.no_grad()
    def norms(self, batches: Sequence[Tensor], evaluating: Tensor) -> tuple[NormDrift, ...]:
        """The audit of the batch norms, with what their statistics tell of preprocessing and strides."""
        norms = batch_norms(self.net)
        if not any(norm.running_mean is not None for norm in norms.values()):
            why = "they keep no statistics" if norms else f"the network has none (norm {self.own.spec.norm!r})"
            parts = "statistics of batch norm, preprocessing, place of strides"
            self.unchecked.append(Unchecked(what=parts, reason=f"only statistics of batch norms tell, and {why}"))
        with batchwise(self.own, self.net):
            normed = norm_moments(self.net, batches)
        moments = normed.moments
        self.checked.append("modes")
        self.findings += mode_findings(self.own, evaluating, self.as_it_is(batches, normed))
        self.findings += momentum_findings(self.own)
        rows = drifts(self.own, moments, self.batch)
        if not rows:
            return ()
        self.checked.append("statistics of batch norm")
        self.findings += zero_variance_findings(self.own, moments)
        if self.batch:
            self.findings += batch_findings(rows, self.batch)
            self.checked.append("batch size")
        elif any(row.mode != "frozen" for row in rows):
            self.unchecked.append(Unchecked(what="batch size", reason="how many pictures a step has is not known"))
        if len(self.images) < ENOUGH:
            why = f"{len(self.images)} pictures are too few, {ENOUGH} or more tell"
            self.unchecked.append(Unchecked(what="stale statistics, preprocessing, place of strides", reason=why))
            return rows
        told = [*self.preprocessing(rows, moments), *self.strides(batches, normed)]
        self.findings += told
        if told:
            again = (
                f"judged once {' and '.join(each.where for each in told)} is mended, for the drift may be due to that"
            )
            self.unchecked.append(Unchecked(what="stale statistics", reason=again))
        elif any(map(adrift, rows)):
            exact = self.with_statistics(moments)
            outputs = torch.cat([exact(batch) for batch in batches])
            self.findings += stale_finding(self.own, rows, evaluating=evaluating, precise=outputs, labels=self.labels)
        return rows

    def as_it_is(self, batches: Sequence[Tensor], normed: Pass) -> Tensor:
        """The outputs where those norms alone normalise by the batch that do so in the caller's network."""
        modes = {mode_of(self.own, name) for name in batch_norms(self.own)}
        if not modes >= {"training", "evaluating"}:
            return normed.outputs
        with batchwise(self.own, self.net, ("training",)):
            return norm_moments(self.net, batches, ()).outputs

    def with_statistics(self, moments: Mapping[str, Moments]) -> ResNet:
        """The network with exact statistics in every norm that is not frozen; its weights are shared."""
        other = copy.deepcopy(self.net, {id(each): each for each in self.net.parameters()})
        for name, norm in batch_norms(other).items():
            if name in moments and norm.running_mean is not None and mode_of(self.own, name) != "frozen":
                norm.get_buffer("running_mean").copy_(moments[name].mean)
                norm.get_buffer("running_var").copy_(moments[name].variance)
        return other

    def preprocessing(self, rows: Sequence[NormDrift], moments: Mapping[str, Moments]) -> list[Finding]:
        """Whether the pictures fit the first norm better when they are prepared otherwise.

        The first norm makes good most of it, so where the others are off too, it is the statistics that are.
        """
        if self.images.dtype != torch.uint8:
            self.unchecked.append(Unchecked(what="preprocessing", reason="the pictures came prepared, not as uint8"))
            return []
        first = next(iter(moments))  # in the order of the run
        if first.partition(".")[0] == "fc":  # whatever goes in, the trunk leaves little of it
            why = f"the first batch norm is the head's ({first}), behind the whole trunk"
            self.unchecked.append(Unchecked(what="preprocessing", reason=why))
            return []
        if all(row.name != first for row in rows):
            self.unchecked.append(Unchecked(what="preprocessing", reason="the first norm keeps no statistics"))
            return []
        self.checked.append("preprocessing")
        if median([row.distance for row in rows if row.name != first] or [0.0]) > FAR:
            return []
        pictures = self.images[:: len(self.images) // ENOUGH][:ENOUGH]
        return preprocessing_finding(self.net, pictures, first, moments[first])

    def strides(self, batches: Sequence[Tensor], normed: Pass) -> list[Finding]:
        """Whether the statistics fit strides on the blocks' other convolutions better."""
        if not strided(self.own):
            return []
        behind = behind_strides(self.own)
        if not behind:
            why = "no batch norm behind the 3×3 of a strided block keeps statistics"
            self.unchecked.append(Unchecked(what="place of strides", reason=why))
            return []
        self.checked.append("place of strides")
        other = twin(self.net)
        with batchwise(self.own, other):
            flipped = norm_moments(other, batches[:1], behind)
        built = {name: normed.batches[name][0] for name in flipped.batches}
        return stride_finding(self.net, built, flipped.moments)

    def signals(self, scales: dict[str, float], make_optimizer: MakeOptimizer, loss: Loss) -> tuple[BlockSignals, ...]:
        """Gradients and updates of a few steps on a copy, in training mode as the caller's network has it."""
        trains = any(each.requires_grad for name in self.blocks for each in self.net.get_submodule(name).parameters())
        reason = (
            "the network has no classifier"
            if not self.own.spec.num_classes
            else "the pictures have no labels"
            if self.labels is None
            else "every block is frozen"
            if not trains
            else ""
        )
        steps, labels = list[Step](), self.labels
        if reason or labels is None:
            self.unchecked.append(Unchecked(what="gradients and updates", reason=reason))
        else:
            self.checked.append("gradients and updates")
            trained = copy.deepcopy(self.net).train()
            count = max(1, min(STEPS, len(self.images) // 2))
            shares = [torch.arange(first, len(self.images), count)[:OF] for first in range(count)]
            device = next(trained.parameters()).device
            pairs = (
                (inputs(trained, self.images[share], trained.preprocess), labels[share].to(device)) for share in shares
            )
            steps = take_steps(trained, pairs, self.blocks, loss, make_optimizer)
        rows = signals(self.net, self.blocks, scales, steps)
        if steps:
            self.findings += gradient_findings(rows, len(steps))
        return rows

    def result(
        self,
        blocks: tuple[BlockSignals, ...],
        strips: tuple[StripUse, ...],
        norms: tuple[NormDrift, ...],
        *,
        spoilt: bool = False,
    ) -> Diagnosis:
        """The diagnosis as it stands; `spoilt` by what is no number."""
        if spoilt:
            self.unchecked.append(Unchecked(what="everything else", reason="what is no number spoils every figure"))
        return Diagnosis(
            findings=worst_first(self.findings),
            blocks=blocks,
            strips=strips,
            norms=norms,
            checked=tuple(self.checked),
            unchecked=tuple(self.unchecked),
            pictures=len(self.images),
        )


@contextmanager
def batchwise(own: ResNet, net: ResNet, modes: tuple[Mode, ...] = ("training", "evaluating")) -> Iterator[None]:
    """A context in which the norms of `net`, a copy of `own`, that have these modes there normalise by the batch, of
    which they keep the statistics until the next; the rest of it evaluates. Behind it all is as before.
    """
    norms = [norm for name, norm in batch_norms(net).items() if mode_of(own, name) in modes]
    held = [(norm.momentum, [(each, each.clone()) for each in norm.buffers()]) for norm in norms]
    try:
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        yield
    finally:
        for norm, (momentum, buffers) in zip(norms, held, strict=True):
            norm.eval()
            norm.momentum = momentum
            for buffer, before in buffers:
                buffer.copy_(before)


def not_finite(net: nn.Module) -> list[Finding]:
    """Weights and statistics that are no finite numbers."""
    state = [*net.named_parameters(), *net.named_buffers()]
    bad = [name for name, each in state if each.is_floating_point() and not bool(each.isfinite().all())]
    if not bad:
        return []
    return [
        Finding(
            kind="not_finite",
            severity="fault",
            where=listed(bad),
            found=f"{len(bad)} of {len(state)} tensors of the network hold NaN or infinity.",
            mend="Go back to a checkpoint from before training diverged, and take a lower rate, or clip_norm=1.",
        )
    ]
