"""A trained network ready to run: in its fast form, channels_last, in the machine's best precision."""

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from isthmus.data.augment import views as seen_in
from isthmus.data.loader import Batch, Loader
from isthmus.data.transform import normalise
from isthmus.evaluation.metrics import Ranks, Tally
from isthmus.nn.fuse import fast_form
from isthmus.nn.network import ResNet
from isthmus.runtime import Machine, Precision, torch_dtype

__all__ = ["Inference"]


class Inference:
    """Runs the trunk of a network in `precision` and its pooling and classifier in fp32; the network is not touched.

    Logits are the mean over the views that the network's preprocessing names.
    """

    def __init__(self, net: ResNet, machine: Machine, precision: Precision | None = None) -> None:
        self.machine, self.record = machine, net.preprocess
        self.precision: Precision = precision or machine.precision
        self.dtype = torch_dtype(self.precision)
        self.head: nn.Module = copy.deepcopy(net.fc).eval().to(machine.torch_device)
        self.trunk = fast_form(net, net.spec.head.taps, machine.torch_device, self.dtype)

    @torch.inference_mode()
    def pooled(self, images: Tensor) -> Tensor:
        """What the classifier sees of uint8 images (N, C, H, W), in one view: fp32 (N, features)."""
        x = normalise(images.to(self.machine.torch_device), self.record)
        x = x.to(self.dtype, memory_format=torch.channels_last)
        taps = self.trunk.spec.head.taps
        maps = self.trunk.features(x, taps)
        return torch.cat([self.trunk.pool(maps[name], torch.float32) for name in taps], dim=1)

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Logits of uint8 images (N, C, H, W), averaged over the views: fp32 (N, classes)."""
        views: Sequence[Tensor] = seen_in(images, self.record.views)
        total: Tensor = sum(self.head(self.pooled(view)) for view in views)
        return total / len(views)

    def run(self, loader: Loader) -> Iterator[tuple[Batch, Tensor]]:
        """Batches of an evaluation loader, each with its logits on the CPU."""
        for batch in loader.epoch(0):
            yield batch, self.logits(batch.images).cpu()

    def evaluate(
        self, loader: Loader, ranks: Ranks | None = None, *, progress: Callable[[int, int], object] | None = None
    ) -> Tally:
        """The scores on a labelled loader; with `ranks`, on what the loaders of all processes read together.

        `progress` is told the pictures done and all of them.
        """
        tally, every = Tally(loader.pictures.classes), len(loader.pictures)
        for batch, logits in self.run(loader):
            tally.add(logits, batch.labels)
            if progress is not None:
                progress(min((batch.step + 1) * loader.step_size, every), every)
        return tally.over(ranks) if ranks else tally
