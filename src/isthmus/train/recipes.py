"""The named recipes: settings, where they are from, and the accuracy that is reported of them there.

In rows with a paper or file as their source every setting is what it says. What holds of all of them: norms and biases
do not decay (in Goyal et al. and torchvision the classifier's bias does, in He et al. all do); the rate moves with each
step, not each epoch, and falls to 0 where timm stops at 1e-6; `precision` is the machine's best.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from isthmus import records
from isthmus.data.augment import Augment
from isthmus.errors import RecipeError
from isthmus.train.recipe import Recipe

__all__ = ["RECIPES", "Reported", "Row", "recipe"]


class Reported(NamedTuple):
    """What a source reports: the top-1 accuracy in percent of a network on the validation (or test) part of a set."""

    network: str
    data: str
    accuracy: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A recipe by what differs from the defaults of `Recipe`."""

    settings: dict[str, Any]
    source: str
    reported: tuple[Reported, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the augmentation spelled out."""
        settings = {
            name: records.to_dict(value) if isinstance(value, Augment) else value
            for name, value in self.settings.items()
        }
        return {"source": self.source, "reported": [each._asdict() for each in self.reported], "settings": settings}


IMAGENET_CROPS = (0.08, 1.0)  # Szegedy et al. 2014
FROM_SCRATCH = {"freeze": "none", "train_norm": True, "views": ("identity",)}
IMAGENET = FROM_SCRATCH | {"image_size": 224}
# Weights of classes in mixed pictures are taken as present above 0.2, and timm's LAMB cuts gradients to a norm of 1
# although the paper's table lists no clipping. Three copies of a picture an epoch are timm's own repeated augmentation.
STRIKES_BACK = IMAGENET | {
    "crop_part": 0.95,
    "interpolation": "bicubic",
    "batch_size": 2048,
    "optimizer": "lamb",
    "warmup_epochs": 5.0,
    "clip_norm": 1.0,
    "loss": "bce",
}


def strikes_back(magnitude: float, mixup: float, repeats: int) -> Augment:
    """The augmentation of its three recipes."""
    return Augment(
        crop_scale=IMAGENET_CROPS,
        policy="rand",
        policy_magnitude=magnitude,
        policy_spread=0.5,
        mixup=mixup,
        cutmix=1.0,
        repeats=repeats,
    )


RECIPES: dict[str, Row] = {
    # A small MLP on pooled maps of the stages that an inner cross-validation prefers.
    "probe": Row(
        settings={"freeze": "trunk"},
        source="benchmarks/elpv_probe",
        reported=(Reported("demo weights", "elpv", 88.6),),
    ),
    # The usual yardstick of frozen features: one linear layer on the last pooled map.
    "linear-probe": Row(
        settings={"freeze": "trunk", "head": "linear", "views": ("identity",)},
        source="Alain & Bengio 2016",
    ),
    # In half the time of `probe`: one view, one stage and nothing to choose. The stage before the last transfers best
    # where the new pictures are unlike the old ones (Yosinski et al. 2014).
    "quick-probe": Row(
        settings={"freeze": "trunk", "head": "layer3", "views": ("identity",)},
        source="benchmarks/elpv_time",
    ),
    # All layers, from the head that suits the frozen trunk (Kumar et al. 2022), statistics of batch norm kept. The
    # pictures are whole, as that head knows them: on crops of the solar cells its loss is three times as high.
    "finetune": Row(
        settings={
            "freeze": "none",
            "augment": Augment(crop_scale=()),
            "epochs": 5,
            "optimizer": "adamw",
            "lr": 2e-5,
            "weight_decay": 0.02,
            "label_smoothing": 0.05,
            "ema": 0.99,
        },
        source="benchmarks/elpv_finetune",
        reported=(Reported("demo weights", "elpv", 88.0),),
    ),
    # A new network on few pictures: higher rate, longer, statistics learned.
    "scratch": Row(
        settings={"freeze": "none", "train_norm": True, "epochs": 90, "lr": 0.1, "warmup_epochs": 5.0},
        source="after He et al. 2015",
    ),
    # The recipe of He et al. 2015, §3.4, as it is trained since (Goyal et al., §5.1): drops at epochs, not on plateaus,
    # and crops of any scale. For n times the pictures a step: n times the rate, and warmup_epochs 5.
    "he-90": Row(
        settings=IMAGENET
        | {
            "crop_part": 224 / 256,
            "augment": Augment(crop_scale=IMAGENET_CROPS),
            "epochs": 90,
            "batch_size": 256,
            "lr": 0.1,
            "schedule": "step",
            "drops": (30 / 90, 60 / 90, 80 / 90),
            "warmup_epochs": 0.0,
        },
        source="Goyal et al. 2017, table 1",
        reported=(Reported("resnet50", "ImageNet", 76.40),),
    ),
    # The weights IMAGENET1K_V2, by the command in pytorch/vision#6433. Its average has a decay of 0.99998, of which
    # torchvision multiplies the distance to 1 by the pictures between two updates and divides it by the epochs; it
    # begins after the warm-up, which 600 epochs forget.
    "tv-v2": Row(
        settings=IMAGENET
        | {
            "crop_part": 224 / 232,
            "augment": Augment(
                crop_scale=IMAGENET_CROPS, policy="trivial", erasing=0.1, mixup=0.2, cutmix=1.0, repeats=4
            ),
            "train_size": 176,
            "epochs": 600,
            "batch_size": 1024,
            "nesterov": False,
            "lr": 0.5,
            "weight_decay": 2e-5,
            "warmup_epochs": 5.0,
            "label_smoothing": 0.1,
            "ema": 1 - (1 - 0.99998) * 1024 * 32 / 600,
            "ema_every": 32,
        },
        source="torchvision, pytorch/vision#5201",
        reported=(Reported("resnet50", "ImageNet", 80.858),),
    ),
    "rsb-a1": Row(
        settings=STRIKES_BACK
        | {
            "augment": strikes_back(7.0, 0.2, 3),
            "epochs": 600,
            "lr": 5e-3,
            "weight_decay": 0.01,
            "label_smoothing": 0.1,  # without effect on targets that are taken as present or not, as in timm
            "drop_path": 0.05,
        },
        source="Wightman et al. 2021, table 2, A1",
        reported=(Reported("resnet50", "ImageNet", 80.4),),
    ),
    "rsb-a2": Row(
        settings=STRIKES_BACK
        | {
            "augment": strikes_back(7.0, 0.1, 3),
            "epochs": 300,
            "lr": 5e-3,
            "weight_decay": 0.02,
            "drop_path": 0.05,
        },
        source="Wightman et al. 2021, table 2, A2",
        reported=(Reported("resnet50", "ImageNet", 79.8),),
    ),
    "rsb-a3": Row(
        settings=STRIKES_BACK
        | {
            "augment": strikes_back(6.0, 0.1, 1),
            "train_size": 160,
            "epochs": 100,
            "lr": 8e-3,
            "weight_decay": 0.02,
        },
        source="Wightman et al. 2021, table 2, A3",
        reported=(Reported("resnet50", "ImageNet", 78.1),),
    ),
    # 164 epochs of 50,000 pictures are its 64,000 steps, the drops its 32,000 and 48,000. There, 110 layers begin with
    # some 400 steps at a tenth of the rate; here every branch begins at zero instead (Goyal et al. 2017).
    "cifar": Row(
        settings=FROM_SCRATCH
        | {
            "image_size": 32,
            "augment": Augment(crop_scale=(), pad=4),
            "epochs": 164,
            "batch_size": 128,
            "nesterov": False,
            "lr": 0.1,
            "schedule": "step",
            "drops": (0.5, 0.75),
            "warmup_epochs": 0.0,
        },
        source="He et al. 2015, table 6",
        reported=(
            Reported("resnet20_cifar", "CIFAR-10", 91.25),
            Reported("resnet32_cifar", "CIFAR-10", 92.49),
            Reported("resnet44_cifar", "CIFAR-10", 92.83),
            Reported("resnet56_cifar", "CIFAR-10", 93.03),
            Reported("resnet110_cifar", "CIFAR-10", 93.57),
        ),
    ),
}


def recipe(name: str, **settings: Any) -> Recipe:
    """A named recipe with some settings of one's own; raises RecipeError."""
    if name not in RECIPES:
        raise RecipeError(f"there is no recipe {name!r}; known: {', '.join(RECIPES)}")
    try:
        return Recipe(**({"name": name} | RECIPES[name].settings | settings))
    except TypeError as error:
        raise RecipeError(f"recipe {name}: {str(error).partition('() ')[2]}") from error
