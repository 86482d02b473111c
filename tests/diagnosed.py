"""Networks to diagnose: small rows of the table, with the true statistics of real pictures."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.arch.plan import plan
from isthmus.arch.preprocess import IMAGENET, Preprocess
from isthmus.arch.spec import NetSpec
from isthmus.arch.variants import variant
from isthmus.data.transform import normalise
from isthmus.nn.batchnorm import BatchNorm, precise_batchnorm
from isthmus.nn.network import ResNet
from oracles import seed_of

SIDE = 48
CLASSES = 4
HALF = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3).at(SIDE)
CAFFE = Preprocess(
    channels="BGR", mean=(103.939 / 255, 116.779 / 255, 123.68 / 255), std=(1 / 255,) * 3, resize=SIDE, crop=SIDE
)
# Rows of the table that differ in family: stems, shortcuts, groups, widths, attention, filters, strides, block kinds.
NAMES = (
    "resnet26",
    "resnet50",
    "resnet50_v1",
    "resnet50c",
    "resnet50d",
    "resnet50t",
    "resnet34",
    "wide_resnet50_2",
    "resnext50_32x4d",
    "seresnet50",
    "ecaresnet50d",
    "seresnext26d_32x4d",
    "senet154",
    "resnetaa50",
    "resnetblur50d",
    "resnetrs50",
    "resnetv2_50",
    "resnetv2_50d",
    "resnet20_cifar",
    "resnet164_cifar",
)
TRAINED = ("resnet26", "resnet50d", "resnetv2_50")


def crops(photos: Sequence[Path], count: int, seed: int, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Square pieces of photographs, resized to `side`: uint8 (N, 3, side, side), and labels by photo."""
    random, images, labels = np.random.default_rng(seed), [], []
    opened = {}
    for number in range(count):
        place = number % len(photos)
        if place not in opened:
            with Image.open(photos[place]) as photo:
                opened[place] = photo.convert("RGB")
        whole = opened[place]
        part = round(min(whole.size) * random.uniform(0.4, 1.0))
        left, top = (int(random.integers(0, length - part + 1)) for length in whole.size)
        piece = whole.crop((left, top, left + part, top + part)).resize((side, side), Image.Resampling.BILINEAR)
        images.append(torch.from_numpy(np.array(piece)).permute(2, 0, 1))
        labels.append(place % CLASSES)
    order = torch.from_numpy(random.permutation(count))
    return torch.stack(images)[order], torch.tensor(labels)[order]


def class_crops(root: Path, photos: Sequence[Path], count: int, seed: int) -> Path:
    """Such pieces as files in class folders."""
    for place, (image, label) in enumerate(zip(*crops(photos, count, seed), strict=True)):
        (root / f"class{label}").mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / f"class{label}" / f"{place}.png")
    return root


def shrunk(name: str, **changes: object) -> NetSpec:
    """A row of the table with an eighth of its widths and at most two blocks a stage; groups stay as wide."""
    spec = variant(name)
    if "cifar" in name:
        stages = tuple(replace(stage, depth=1) for stage in spec.stages)
        return replace(spec, stages=stages, num_classes=CLASSES, **changes)
    stages = tuple(
        replace(
            stage,
            depth=min(stage.depth, 2),
            mid=stage.mid // 8,
            out=stage.out // 8,
            reduce=stage.reduce // 8,
            groups=max(stage.groups // 8, 1),
        )
        for stage in spec.stages
    )
    stem = replace(spec.stem, widths=tuple(width // 4 for width in spec.stem.widths))
    return replace(spec, stages=stages, stem=stem, num_classes=CLASSES, **changes)


def made(spec: NetSpec, record: Preprocess | None = None) -> ResNet:
    """A network with random weights that evaluates, its norms' scales and shifts random too."""
    torch.manual_seed(seed_of(spec.name))
    net = ResNet(plan(spec, SIDE), zero_init=False)
    for module in net.modules():
        if isinstance(module, BatchNorm | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    net.preprocess = record or IMAGENET.at(SIDE)
    return net.eval()


def settled(net: ResNet, images: Tensor, record: Preprocess | None = None) -> ResNet:
    """The network with the exact statistics of pictures, prepared as `record` says, in place."""
    precise_batchnorm(net, normalise(images, record or net.preprocess).split(64))
    return net


def of_class_crops(photos: Sequence[Path]) -> ResNet:
    """A healthy network that knows the classes of `class_crops`."""
    net = settled(made(shrunk("resnet26")), crops(photos, 128, seed=1)[0])
    net.classes = tuple(f"class{label}" for label in range(CLASSES))
    return net


def trained(net: ResNet, images: Tensor, labels: Tensor, *, steps: int = 12, rate: float = 0.02) -> ResNet:
    """The network after a few steps of SGD, in place and evaluating again; its statistics have moved as they do."""
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    net.train()
    for step in range(steps):
        share = torch.arange(step % 4, len(images), 4)
        optimizer.zero_grad()
        F.cross_entropy(net(normalise(images[share], net.preprocess)), labels[share]).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return net.eval()


def healthy(images: Tensor, labels: Tensor) -> dict[str, Callable[[], ResNet]]:
    """Twenty and more healthy networks by name, each made anew when it is called: nothing in them is wrong."""
    found = {name: lambda name=name: settled(made(shrunk(name)), images) for name in NAMES}
    found["group norm"] = lambda: made(grouped())
    found["plain"] = lambda: settled(made(shrunk("plain20_cifar")), images)
    found["drop path"] = lambda: settled(made(shrunk("resnet50", drop_path=0.2)), images)
    found["SiLU"] = lambda: settled(made(shrunk("resnet50", activation="silu")), images)
    for name in TRAINED:
        found[f"{name} trained"] = lambda name=name: settled(
            trained(settled(made(shrunk(name)), images), images, labels), images
        )
    return found


def grouped() -> NetSpec:
    """A small group-normalised network: widths are multiples of 32."""
    spec = variant("resnet50_gn")
    stages = tuple(replace(stage, depth=1, mid=32, out=128) for stage in spec.stages)
    return replace(spec, stages=stages, stem=replace(spec.stem, widths=(32,)), num_classes=CLASSES)
