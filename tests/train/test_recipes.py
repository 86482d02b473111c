"""The table of recipes: numbers of the sources, in their own words, against the settings; and each row trains."""

import json
import math
from pathlib import Path

import pytest
from timm.data.auto_augment import rand_augment_transform
from timm.models import get_pretrained_cfg

import isthmus
from isthmus.data.augment import Augment
from isthmus.data.policies import RAND
from isthmus.run import adapted, fit
from isthmus.train.optim import parameter_groups
from isthmus.train.recipe import Recipe
from isthmus.train.recipes import RECIPES, recipe
from isthmus.train.schedule import rate
from small_runs import class_folders

TESTS = Path(__file__).parents[1]
GOLDEN = json.loads((TESTS / "golden" / "recipes.json").read_text())
RESULTS = TESTS.parent / "benchmarks" / "results"
START = {"data": "pictures", "arch": "resnet50"}
IMAGENET_CROPS = Augment(crop_scale=(0.08, 1.0))


def reported(name: str) -> dict[str, float]:
    return {each.network: each.accuracy for each in RECIPES[name].reported}


def sizes(made: Recipe) -> tuple[int, int, int]:
    """Pixels a side: of the training crop, of the evaluation's resize and of its crop."""
    record = adapted(isthmus.create("test_resnet").preprocess, made)
    return made.train_size or record.crop, record.resize, record.crop


def drops(made: Recipe, steps_per_epoch: int) -> list[int]:
    """The steps that a rate of a tenth begins at."""
    rates = [rate(made, step, steps_per_epoch) for step in range(made.epochs * steps_per_epoch)]
    found = [step for step in range(1, len(rates)) if rates[step] != rates[step - 1]]
    assert all(rates[step] == pytest.approx(rates[step - 1] / 10) for step in found)
    return found


def test_he_90_is_goyal_et_al():
    golden, made = GOLDEN["he-90"], recipe("he-90", **START)
    assert golden["optimizer"] == "SGD, Nesterov momentum 0.9"
    assert (made.optimizer, made.nesterov, made.momentum) == ("sgd", True, 0.9)
    assert (made.batch_size, made.epochs) == (golden["mini-batch"], golden["epochs"])
    assert rate(made, 0, 5004) == made.lr == golden["rate"]
    assert drops(made, 7) == [7 * epoch for epoch in golden["divided by ten after epochs"]]
    assert made.weight_decay == golden["weight decay"]
    assert sizes(made) == (golden["training crop"], golden["test resize"], golden["test crop"])
    assert made.augment == IMAGENET_CROPS
    assert (made.loss, made.label_smoothing, made.ema, made.clip_norm, made.drop_path) == ("ce", 0, 0, 0, 0)
    assert reported("he-90") == {key: pytest.approx(100 - error) for key, error in golden["top-1 error"].items()}


def test_tv_v2_is_torchvisions_command():
    golden, made = GOLDEN["tv-v2"], recipe("tv-v2", **START)
    assert (made.optimizer, made.nesterov, made.momentum) == (golden["opt"], False, golden["momentum"])
    assert made.batch_size == golden["gpus"] * golden["batch-size"]
    assert (made.lr, made.epochs, made.warmup_epochs) == (golden["lr"], golden["epochs"], golden["lr-warmup-epochs"])
    assert (made.schedule, golden["lr-scheduler"]) == ("cosine", "cosineannealinglr")
    assert made.augment == Augment(
        crop_scale=(0.08, 1.0),
        policy={"ta_wide": "trivial"}[golden["auto-augment"]],
        erasing=golden["random-erase"],
        mixup=golden["mixup-alpha"],
        cutmix=golden["cutmix-alpha"],
        repeats=golden["ra-reps"],
    )
    assert (made.loss, made.label_smoothing) == ("ce", golden["label-smoothing"])
    assert made.weight_decay == golden["weight-decay"]
    net = isthmus.create("test_resnet")
    norms = {id(each) for name, each in net.named_parameters() if "bn" in name}
    for group in parameter_groups(net, made):
        if norms & {id(each) for each in group["params"]}:
            assert group["weight_decay"] == golden["norm-weight-decay"]
    assert sizes(made) == (golden["train-crop-size"], golden["val-resize-size"], golden["val-crop-size"])
    # The training script's own arithmetic.
    adjust = golden["gpus"] * golden["batch-size"] * golden["model-ema-steps"] / golden["epochs"]
    assert made.ema == pytest.approx(1 - min(1.0, (1 - golden["model-ema-decay"]) * adjust), rel=1e-12)
    assert made.ema_every == golden["model-ema-steps"]
    weights = json.loads((TESTS / "golden" / "torchvision.json").read_text())["models"]["resnet50"]["weights"]
    assert reported("tv-v2") == {"resnet50": weights["IMAGENET1K_V2"]["top1"]}


@pytest.mark.parametrize("name", ["rsb-a1", "rsb-a2", "rsb-a3"])
def test_rsb_is_table_2(name):
    golden, made = GOLDEN[name], recipe(name, **START)
    train, resize, crop = sizes(made)
    assert (train, crop) == (golden["train res"], golden["test res"])
    assert resize == pytest.approx(crop / golden["test crop ratio"], abs=0.5)
    assert (made.epochs, made.batch_size) == (golden["epochs"], golden["batch size"])
    assert (made.optimizer, made.lr, made.weight_decay) == ("lamb", golden["LR"], golden["weight decay"])
    assert (made.schedule, made.warmup_epochs) == (golden["LR decay"], golden["warmup epochs"])
    assert (made.loss.upper(), made.label_smoothing) == (golden["loss"], golden["label smoothing"])
    assert made.drop_path == golden["stoch. depth"]
    assert made.augment.repeats == (3 if golden["repeated aug"] else 1)
    assert (made.augment.mixup, made.augment.cutmix) == (golden["mixup alpha"], golden["cutmix alpha"])
    assert made.augment.erasing == golden["erasing prob."]
    assert made.augment.crop_scale == (0.08, 1.0)
    assert made.clip_norm == 1.0  # the default of timm's Lamb
    assert made.interpolation == get_pretrained_cfg(f"resnet50.{name.removeprefix('rsb-')}_in1k").interpolation
    timm = rand_augment_transform(golden["policy"], {})
    assert made.augment.policy == "rand"
    assert (made.augment.policy_layers, len(RAND)) == (timm.num_layers, len(timm.ops))
    assert {op.magnitude for op in timm.ops} == {made.augment.policy_magnitude}
    assert {op.magnitude_std for op in timm.ops} == {made.augment.policy_spread}
    assert reported(name) == {"resnet50": golden["top-1 acc."]}


def test_cifar_is_he_et_al():
    golden, made = GOLDEN["cifar"], recipe("cifar", data="pictures", arch="resnet20_cifar")
    assert (made.optimizer, made.nesterov, made.momentum) == ("sgd", False, golden["momentum"])
    assert (made.batch_size, made.lr, made.weight_decay) == (
        golden["mini-batch"],
        golden["rate"],
        golden["weight decay"],
    )
    steps = golden["pictures"] // golden["mini-batch"]
    assert made.epochs * steps == pytest.approx(golden["iterations"], rel=1e-3)
    assert rate(made, 0, steps) == golden["rate"]
    assert drops(made, steps) == pytest.approx(golden["divided by ten after iterations"], rel=1e-3)
    assert made.augment == Augment(crop_scale=(), pad=golden["padding"])
    assert sizes(made) == (golden["crop"],) * 3
    assert reported("cifar") == {key: pytest.approx(100 - error) for key, error in golden["error"].items()}
    assert set(golden["error"]) <= set(isthmus.variants())


@pytest.mark.parametrize(
    ("name", "figure"), [("probe", "mean accuracy"), ("finetune", "finetune accuracy")], ids=["probe", "finetune"]
)
def test_what_our_own_benchmarks_report_is_what_they_measured(name, figure):
    result = json.loads((RESULTS / f"{Path(RECIPES[name].source).name}.json").read_text())
    assert reported(name) == {"demo weights": pytest.approx(100 * result["summary"][figure]["mean"], abs=0.05)}


def test_new_networks_are_not_frozen_and_learn_their_statistics():
    for name in (*GOLDEN, "scratch"):
        made = recipe(name, **START)
        assert (made.freeze, made.train_norm) == ("none", True)
        assert math.isfinite(rate(made, 0, 1))
    assert all(recipe(name, **START).views == ("identity",) for name in GOLDEN)  # single crops are what they report


@pytest.mark.parametrize("name", [*GOLDEN, "scratch"])
def test_every_row_trains(name, tmp_path):
    """Two steps on real pictures; sizes are small and everything else is as the row says."""
    pictures = class_folders(tmp_path / "pictures", {"brick": 8, "flower": 8})
    whole = recipe(name, **START)
    small = {"image_size": 32, "train_size": whole.train_size and 24, "epochs": 1, "batch_size": 6, "ema_every": 1}
    arch = "resnet20_cifar" if name == "cifar" else "test_resnet"
    made = recipe(name, data=str(pictures), arch=arch, precision="fp32", **small)
    run = fit(made, tmp_path / "run", device="cpu", report=False)
    assert run.scores.seen == 4
    rows = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert math.isfinite(rows[-1]["loss"])
    assert isthmus.load(run.folder).spec.drop_path == whole.drop_path
