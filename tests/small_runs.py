"""What a run needs, small enough for seconds on one core: pieces of real photos in class folders, a network."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

import isthmus
from isthmus.arch.preprocess import IMAGENET
from isthmus.arch.spec import NetSpec, StageSpec, StemSpec
from isthmus.data.pictures import Pictures
from isthmus.nn.network import ResNet
from isthmus.train.reporter import Reporter
from oracles import random_state

SIDE = 32
PHOTOS = {
    "brick": ("skimage", "data/brick.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "grass": ("skimage", "data/grass.png"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
}
SPEC = NetSpec(
    stem=StemSpec(widths=(8,), kernel=3),
    stages=(StageSpec(depth=1, mid=8, out=16), StageSpec(depth=1, mid=8, out=32, stride=2)),
    num_classes=7,
    name="tiny",
)


def class_folders(root: Path, counts: Mapping[str, int], side: int = 40) -> Path:
    """`counts` pictures a class (a name of PHOTOS), side x side, PNG and JPEG in turn, no two from the same place."""
    random = np.random.default_rng(0)
    for name, count in counts.items():
        package, inside = PHOTOS[name]
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        with Image.open(Path(spec.origin).parent / inside) as photo:
            whole = photo.convert("RGB")
        folder = root / name
        folder.mkdir(parents=True)
        for number in range(count):
            left, top = (int(random.integers(0, length - side)) for length in whole.size)
            kind = "png" if number % 2 else "jpg"
            whole.crop((left, top, left + side, top + side)).save(folder / f"{number}.{kind}")
    return root


def paths(pictures: Pictures) -> list[Path]:
    """The files of pictures that are files."""
    return [Path(pictures.name(index)) for index in range(len(pictures))]


def network(spec: NetSpec = SPEC, seed: int = 0) -> ResNet:
    """A network with every weight and statistic random, evaluating, for pictures of 32 x 32."""
    net = isthmus.create(spec)
    net.load_state_dict(random_state(net, seed))
    net.preprocess = IMAGENET.at(SIDE)
    return net.eval()


def weights(path: Path, net: ResNet | None = None) -> Path:
    """A weight file of that network."""
    isthmus.save_weights(net or network(), path)
    return path


def copied(net: torch.nn.Module) -> dict[str, Tensor]:
    """The state of a network as it is now."""
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two states are equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def same_files(one: Path, other: Path) -> bool:
    """Whether two .safetensors files hold the same bits and the same description, in any order."""
    (bits, facts), (other_bits, other_facts) = (read(one), read(other))
    return same(bits, other_bits) and facts == other_facts


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


class Recorder(Reporter):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[str, int, int]] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def progress(self, task: str, done: int, total: int, facts: Mapping[str, float] | None = None) -> None:
        self.steps.append((task, done, total))
