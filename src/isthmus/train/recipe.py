"""Everything that decides a training run, in one frozen record, and the named recipes as a table."""

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, Literal, Self

from isthmus import records
from isthmus.arch.preprocess import View
from isthmus.data.augment import Augment
from isthmus.errors import RecipeError

__all__ = ["RECIPES", "Recipe", "recipe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A run: data, start, what is frozen, and how the rest is trained. Raises RecipeError where it is made.

    `data` and `weights` are what `open_data` and `load` take; without `weights`, `arch` names a new network.
    `freeze` is a point of `isthmus.freeze`; at `trunk` the head is chosen and trained on features computed once.
    `image_size` is the crop in pixels (0: as the weights ask) and `crop_part` the part of the resized side it keeps.
    `views` are the flips a prediction averages over. `train_norm` lets batch-norm statistics move. `ema` is the decay
    of the averaged weights, 0 for none. The warm-up takes half of the steps at most. Epochs, rate and what follows
    apply to gradient training, not to the probe.
    """

    data: str
    weights: str = ""
    arch: str = ""
    freeze: str = "trunk"
    val_fraction: float = 0.25
    seed: int = 0
    image_size: int = 0
    crop_part: float = 1.0
    views: tuple[View, ...] = ("identity", "hflip")
    head: Literal["chosen", "linear"] = "chosen"
    augment: Augment = Augment()
    epochs: int = 8
    batch_size: int = 32
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 5e-3
    head_lr_factor: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.0
    balance: bool = False
    train_norm: bool = False
    ema: float = 0.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    name: str = ""

    def __post_init__(self) -> None:
        records.check_fields(self, RecipeError)
        records.check_fields(self.augment, RecipeError)
        wrong = {
            "data is empty; name a folder, a .csv file or elpv": not self.data,
            "neither weights nor arch is given; name one": not (self.weights or self.arch),
            "a new network has nothing worth freezing; give weights, or freeze='none'": (
                not self.weights and self.freeze != "none"
            ),
            f"val_fraction is {self.val_fraction}; it must lie between 0 and 1": not 0 < self.val_fraction < 1,
            f"image_size is {self.image_size}; it must be 0 or more": self.image_size < 0,
            f"crop_part is {self.crop_part}; it must lie in (0, 1]": not 0 < self.crop_part <= 1,
            f"epochs is {self.epochs}; it must be at least 1": self.epochs < 1,
            f"batch_size is {self.batch_size}; it must be at least 1": self.batch_size < 1,
            f"seed is {self.seed}; it must lie in 0..2**63 - 1": not 0 <= self.seed < 2**63,
            f"lr is {self.lr}; it must be above 0": not 0 < self.lr < inf,
            f"head_lr_factor is {self.head_lr_factor}; it must be above 0": not 0 < self.head_lr_factor < inf,
            f"momentum is {self.momentum}; it must lie in [0, 1)": not 0 <= self.momentum < 1,
            f"weight_decay is {self.weight_decay}; it must be 0 or more": not 0 <= self.weight_decay < inf,
            f"warmup_epochs is {self.warmup_epochs}; it must be 0 or more": not 0 <= self.warmup_epochs < inf,
            "views is empty; 'identity' is the picture as it is": not self.views,
            f"label_smoothing is {self.label_smoothing}; it must lie in [0, 1)": not 0 <= self.label_smoothing < 1,
            f"ema is {self.ema}; it must lie in [0, 1)": not 0 <= self.ema < 1,
        }
        for message, holds in wrong.items():
            if holds:
                raise RecipeError(message)

    def to_toml(self) -> str:
        """The recipe as a TOML document, every setting spelled out."""
        return records.to_toml(records.to_dict(self))

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """The recipe in a TOML file; raises RecipeError naming the file."""
        try:
            return records.from_toml(cls, path.read_text(encoding="utf-8"), RecipeError)
        except (OSError, UnicodeDecodeError, RecipeError) as error:
            raise RecipeError(f"{path}: {error}") from error


RECIPES: dict[str, dict[str, Any]] = {
    # A small MLP on pooled maps of the stages that an inner cross-validation prefers.
    "probe": {"freeze": "trunk"},
    # The usual yardstick of frozen features (Alain & Bengio 2016): one linear layer on the last pooled map.
    "linear-probe": {"freeze": "trunk", "head": "linear", "views": ("identity",)},
    # All layers, from the head that suits the frozen trunk (Kumar et al. 2022), statistics of batch norm kept. The
    # pictures are whole, as that head knows them: on crops of the solar cells its loss is three times as high.
    "finetune": {
        "freeze": "none",
        "augment": Augment(crop_scale=()),
        "epochs": 5,
        "optimizer": "adamw",
        "lr": 2e-5,
        "weight_decay": 0.02,
        "label_smoothing": 0.05,
        "ema": 0.99,
    },
    # A new network on few pictures: higher rate, longer, statistics learned (He et al. 2015 §3.4).
    "scratch": {"freeze": "none", "train_norm": True, "epochs": 90, "lr": 0.1, "warmup_epochs": 5.0},
}


GRADIENT_ONLY = {
    *("augment", "epochs", "optimizer", "lr", "head_lr_factor", "momentum", "weight_decay", "warmup_epochs"),
    *("label_smoothing", "balance", "train_norm", "ema"),
}
"""Settings without a meaning where the trunk is frozen and its features are computed once."""


def recipe(name: str, **settings: Any) -> Recipe:
    """A named recipe with some settings of one's own; raises RecipeError."""
    if name not in RECIPES:
        raise RecipeError(f"there is no recipe {name!r}; known: {', '.join(RECIPES)}")
    try:
        return Recipe(**({"name": name} | RECIPES[name] | settings))
    except TypeError as error:
        raise RecipeError(f"recipe {name}: {str(error).partition('() ')[2]}") from error


def override(base: Recipe, settings: tuple[str, ...]) -> Recipe:
    """The recipe with dotted settings applied, e.g. `lr=0.01` or `augment.vflip=true`."""
    return records.override(base, settings, RecipeError)
