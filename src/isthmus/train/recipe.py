"""Everything that decides a training run, in one frozen record."""

from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from typing import Literal, Self

from isthmus import records
from isthmus.arch.preprocess import View
from isthmus.data.augment import Augment
from isthmus.errors import RecipeError
from isthmus.records import FROM_0, FROM_1, Range
from isthmus.runtime import Machine, Precision

__all__ = ["Recipe", "gradient_only", "override"]


PART: Range = ("lie in [0, 1)", lambda value: 0 <= value < 1)
FACTOR: Range = ("lie in (0, 1]", lambda value: 0 < value <= 1)
ABOVE_0: Range = ("be above 0", lambda value: 0 < value < inf)
RANGES: dict[str, Range] = {
    "val_fraction": ("lie between 0 and 1", lambda value: 0 < value < 1),
    "seed": ("lie in 0..2**63 - 1", lambda value: 0 <= value < 2**63),
    **dict.fromkeys(("crop_part", "layer_decay"), FACTOR),
    **dict.fromkeys(("momentum", "label_smoothing", "drop_path", "ema"), PART),
    **dict.fromkeys(("image_size", "train_size", "start_size", "resized", "micro_batch", "save_every"), FROM_0),
    **dict.fromkeys(("weight_decay", "warmup_epochs", "clip_norm", "unfreeze_epochs"), FROM_0),
    **dict.fromkeys(("epochs", "batch_size", "ema_every"), FROM_1),
    **dict.fromkeys(("lr", "head_lr_factor"), ABOVE_0),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A run: data, start, what is frozen, and how the rest is trained. Raises RecipeError where it is made.

    `data` and `weights` are what `open_data` and `load` take; without `weights`, `arch` names a new network. Sizes are
    in pixels a side. Everything from `augment` on applies to gradient training, not to the probe.
    """

    data: str
    weights: str = ""
    arch: str = ""
    freeze: str = "trunk"  # a point of `isthmus.freeze`; at trunk, a head is trained on features computed once
    val_fraction: float = 0.25
    seed: int = 0
    image_size: int = 0  # the crop that is evaluated; 0: as the weights ask
    crop_part: float = 1.0  # of the resized side, that the crop keeps
    interpolation: Literal["", "bilinear", "bicubic"] = ""  # empty: as the weights ask
    views: tuple[View, ...] = ("identity", "hflip")  # a prediction averages over them
    head: str = "chosen"  # by cross-validation; linear; or a stage such as layer3, which a small MLP then reads
    unreadable: Literal["raise", "skip"] = "raise"  # a picture that cannot be read; skipped ones are named
    augment: Augment = Augment()
    train_size: int = 0  # the crop that is trained on; 0: the one that is evaluated (Touvron et al. 2019)
    start_size: int = 0  # the training crop grows from here (progressive resizing); 0: it does not
    resized: int = 0  # crops come from pictures kept with this shorter side, not decoded each time; 0: from the files
    epochs: int = 8
    batch_size: int = 32  # pictures of one optimiser step, over all processes
    micro_batch: int = 0  # pictures that one process holds at once; 0: its whole share of the batch
    optimizer: Literal["sgd", "adamw", "lamb"] = "sgd"
    nesterov: bool = True  # SGD only
    lr: float = 5e-3  # the peak
    layer_decay: float = 1.0  # factor of the rate from each part of the network to the one before it
    head_lr_factor: float = 1.0
    momentum: float = 0.9  # of SGD; of AdamW and LAMB the first beta
    weight_decay: float = 1e-4  # of weights; norms and biases do not decay
    schedule: Literal["cosine", "step", "linear"] = "cosine"
    drops: tuple[float, ...] = ()  # parts of the run after which the schedule `step` divides the rate by ten
    warmup_epochs: float = 1.0  # half of the run at most
    clip_norm: float = 0.0  # the gradient's norm is cut to it; 0: it is not
    loss: Literal["ce", "bce"] = "ce"
    label_smoothing: float = 0.0
    drop_path: float = 0.0  # of the last block (stochastic depth, Huang et al. 2016); 0: as the network's spec says
    balance: Literal["none", "weights", "sampling"] = "none"  # classes count alike in the loss, or come equally often
    train_norm: bool = False  # batch-norm statistics move
    sync_norm: bool = False  # and are those of the batches of all processes
    unfreeze_epochs: float = 0.0  # one more part thaws each time (Howard & Ruder 2018); 0: none does
    ema: float = 0.0  # decay of the averaged weights; 0: no average
    ema_every: int = 1  # steps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    memory: Literal["plain", "checkpoint", "recompute"] = "plain"
    compile: bool = False
    save_every: int = 0  # steps between checkpoints inside an epoch; 0: one at the end of each epoch
    name: str = ""

    def __post_init__(self) -> None:
        records.check_fields(self, RecipeError)
        crop = self.train_size or self.image_size  # 0: the network says
        wrong = {
            "data is empty; name a folder, a .csv file, hf:NAME or elpv": not self.data,
            "neither weights nor arch is given; name one": not (self.weights or self.arch),
            "a new network has nothing worth freezing; give weights, or freeze='none'": (
                not self.weights and self.freeze != "none"
            ),
            "views is empty; 'identity' is the picture as it is": not self.views,
            f"micro_batch is {self.micro_batch} and batch_size {self.batch_size}; the second must be a multiple": (
                self.micro_batch > 0 and self.batch_size % self.micro_batch != 0
            ),
            f"start_size is {self.start_size} and train_size {self.train_size}; the crop grows to train_size": (
                self.start_size > 0 and not self.start_size <= self.train_size
            ),
            f"resized is {self.resized} and the training crop {crop}; a crop is no larger than its picture": (
                0 < self.resized < crop
            ),
            "schedule is 'step' and drops is empty; say after which parts of the run the rate drops": (
                self.schedule == "step" and not self.drops
            ),
            f"drops is {self.drops}; they are parts of the run, rising between 0 and 1": (
                list(self.drops) != sorted({drop for drop in self.drops if 0 < drop < 1})
            ),
            "unfreeze_epochs thaws a network that is frozen; give freeze a point of it": (
                self.unfreeze_epochs > 0 and self.freeze == "none"
            ),
            "sync_norm synchronises statistics that do not move; set train_norm": self.sync_norm
            and not self.train_norm,
        }
        for message, found in wrong.items():
            if found:
                raise RecipeError(message)
        records.check_ranges(self, RANGES, RecipeError)

    def precision_on(self, machine: Machine) -> Precision:
        """What convolutions run in: the machine's best unless the recipe says."""
        return machine.precision if self.precision == "auto" else self.precision

    def to_toml(self) -> str:
        """The recipe as a TOML document, every setting spelled out."""
        return records.to_toml(records.to_dict(self))

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """The recipe in a TOML file; raises RecipeError naming the file."""
        try:
            return records.from_toml(cls, path.read_text(encoding="utf-8"), RecipeError)
        except (OSError, UnicodeDecodeError, RecipeError) as error:
            raise RecipeError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def gradient_only() -> set[str]:
    """Settings without a meaning where the trunk is frozen and its features are computed once."""
    names = [field.name for field in fields(Recipe)]
    return set(names[names.index("augment") : names.index("name")]) - {"batch_size", "precision"}


def override(base: Recipe, settings: tuple[str, ...]) -> Recipe:
    """The recipe with dotted settings applied, e.g. `lr=0.01` or `augment.vflip=true`."""
    return records.override(base, settings, RecipeError, example="lr=0.01")
