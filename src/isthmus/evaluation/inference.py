"""A trained network ready to run: in its fast form, channels_last, in the machine's best precision."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from isthmus.data.augment import views as seen_in
from isthmus.data.loader import Batch, Loader
from isthmus.data.transform import normalise
from isthmus.evaluation.metrics import Ranks, Tally
from isthmus.nn.fuse import fast_form
from isthmus.nn.network import ResNet
from isthmus.runtime import Machine, Precision, torch_dtype

__all__ = ["Inference", "TrunkAndHead"]


class TrunkAndHead(nn.Module):
    """A trunk in `dtype`, its pooling and classifier in fp32: normalised fp32 images (N, C, *size) to logits."""

    def __init__(self, trunk: ResNet, head: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.trunk, self.head, self.dtype = trunk, head, dtype
        self.layout = torch.channels_last if trunk.spec.dims == 2 else torch.preserve_format

    def pooled(self, x: Tensor) -> Tensor:
        """What the classifier sees: fp32 (N, features)."""
        taps = self.trunk.spec.head.taps
        maps = self.trunk.features(x.to(self.dtype, memory_format=self.layout), taps)
        return torch.cat([self.trunk.pool(maps[name], torch.float32) for name in taps], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        logits: Tensor = self.head(self.pooled(x))
        return logits


class Inference:
    """Runs the trunk of a network in `precision` and its pooling and classifier in fp32; the network is not touched.

    Logits are the mean over the views that the network's preprocessing names.
    """

    def __init__(self, net: ResNet, machine: Machine, precision: Precision | None = None) -> None:
        self.machine, self.record = machine, net.preprocess
        self.precision: Precision = precision or machine.precision
        self.kind: tuple[str, str, str] = "torch", self.precision, machine.torch_device.type
        dtype, device = torch_dtype(self.precision), machine.torch_device
        head: nn.Module = copy.deepcopy(net.fc).eval().to(device)
        self.net = TrunkAndHead(fast_form(net, net.spec.head.taps, device, dtype), head, dtype)

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Logits of uint8 images (N, C, H, W), averaged over the views: fp32 (N, classes)."""
        views: Sequence[Tensor] = seen_in(images, self.record.views)
        images_of = (normalise(view.to(self.machine.torch_device), self.record) for view in views)
        total: Tensor = sum(self.net(images) for images in images_of)
        return total / len(views)

    def run(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Batches, each with its logits on the CPU."""
        for batch in batches:
            yield batch, self.logits(batch.images).cpu()

    def evaluate(
        self, loader: Loader, ranks: Ranks | None = None, *, progress: Callable[[int, int], object] | None = None
    ) -> Tally:
        """The scores on a labelled loader; with `ranks`, on what the loaders of all processes read together.

        `progress` is told the pictures done and all of them.
        """
        tally, every = Tally(loader.pictures.classes, loader.pictures.name), len(loader.pictures)
        for batch, logits in self.run(loader.epoch(0)):
            tally.add(logits, batch.labels, batch.indices)
            if progress is not None:
                progress(min((batch.step + 1) * loader.step_size, every), every)
        return tally.over(ranks) if ranks else tally
