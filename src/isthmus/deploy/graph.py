"""What an exported file computes: a folded network, and in front of it, at wish, the way from pixels to its input."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.arch.preprocess import Preprocess
from isthmus.data.augment import views
from isthmus.errors import SpecError
from isthmus.nn.fold import folded_or_copied
from isthmus.nn.network import ResNet

__all__ = ["FromPictures", "FromPixels", "check_mode", "ready"]


def check_mode(net: ResNet) -> None:
    """Raise SpecError for a network in training mode."""
    if training := [name for name, module in net.named_modules() if module.training]:
        where = f"its {training[0]} is" if training[0] else "the network is"
        raise SpecError(
            f"{where} in training mode, and would run other batch norms than it was measured with: "
            f"call net.eval() first"
        )


def ready(net: ResNet) -> ResNet:
    """A copy in fp32 on the CPU, folded where it can be, for evaluation; raises SpecError for one in training mode."""
    check_mode(net)
    return folded_or_copied(net).cpu().float().eval().requires_grad_(requires_grad=False)


class FromPixels(nn.Module):
    """Pictures as decoders give them to a network's input, as Pillow resizes: uint8 (N, H, W, C) to (N, C, crop, crop).

    In 8 bits after each direction, like Pillow, whose result is missed by one level in a value of a hundred.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, record: Preprocess) -> None:
        super().__init__()
        self.record = record
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(record, name)).mul(255)[:, None, None])

    def forward(self, pictures: Tensor) -> Tensor:
        """Normalised images; all sizes stay open in a graph."""
        record, x = self.record, pictures.permute(0, 3, 1, 2).float()
        height, width = x.shape[2:]
        shorter: Any = torch.sym_min(height, width)
        size = [record.resize if record.squash else record.resize * side // shorter for side in (height, width)]
        for then in ((height, size[1]), size):
            x = F.interpolate(x, size=then, mode=record.interpolation, antialias=True).round().clamp(0, 255)
        # Half of what is over, and of a half the even neighbour: round(), for graphs.
        # By index: a slice is traced as all or as a part, and the graph would take either square pictures or others.
        for axis, over in enumerate((side - record.crop for side in size), 2):
            x = x.index_select(axis, torch.arange(record.crop) + (over // 2 + over % 4 // 3))
        x = x.flip(1) if record.channels == "BGR" else x
        return (x - self.mean) / self.std


class FromPictures(nn.Module):
    """Pictures (N, H, W, C) to logits (N, classes), the mean over the views that the network's preprocessing names."""

    def __init__(self, net: ResNet) -> None:
        super().__init__()
        self.pixels, self.net, self.names = FromPixels(net.preprocess), net, net.preprocess.views

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits (N, classes)."""
        seen = views(self.pixels(pictures), self.names)
        total: Tensor = sum(self.net(view) for view in seen)
        return total / len(seen)
