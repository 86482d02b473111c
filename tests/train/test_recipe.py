"""Recipes: TOML there and back, every impossible setting named, overrides, and the table of names."""

import math

import pytest

from isthmus.data.augment import Augment
from isthmus.errors import RecipeError
from isthmus.train.recipe import Recipe, override
from isthmus.train.recipes import RECIPES, recipe

START = {"data": "pictures", "weights": "demo"}


@pytest.mark.parametrize("name", RECIPES)
def test_toml_there_and_back(name, tmp_path):
    made = recipe(name, **START)
    path = tmp_path / "recipe.toml"
    path.write_text(made.to_toml())
    assert Recipe.from_file(path) == made
    assert made.name == name


def test_every_setting_survives_toml(tmp_path):
    made = Recipe(
        data='a "quoted" \\ folder\n',
        weights="w",
        arch="resnet50",
        freeze="layer2",
        val_fraction=0.1,
        seed=2**63 - 1,
        image_size=96,
        crop_part=0.875,
        interpolation="bicubic",
        views=("identity", "rot180"),
        head="linear",
        augment=Augment(hflip=False, vflip=True, rotate90=True, crop_scale=(0.5, 0.75)),
        train_size=80,
        start_size=48,
        resized=96,
        unreadable="skip",
        epochs=3,
        batch_size=15,
        micro_batch=5,
        optimizer="adamw",
        nesterov=False,
        lr=1e-7,
        layer_decay=0.7,
        head_lr_factor=10.0,
        momentum=0.0,
        weight_decay=0.0,
        schedule="step",
        drops=(0.5, 0.75),
        warmup_epochs=0.5,
        clip_norm=1.0,
        loss="bce",
        label_smoothing=0.1,
        drop_path=0.1,
        balance="weights",
        train_norm=True,
        sync_norm=True,
        unfreeze_epochs=0.5,
        ema=0.999,
        ema_every=32,
        precision="fp32",
        memory="recompute",
        compile=True,
        save_every=100,
        name="mine",
    )
    usual = Recipe(**START)
    for name in Recipe.__slots__:
        assert getattr(made, name) != getattr(usual, name), f"{name} is not tried here"
    path = tmp_path / "recipe.toml"
    path.write_text(made.to_toml())
    assert Recipe.from_file(path) == made


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": ""}, "data is empty; name a folder"),
        ({"weights": "", "freeze": "none"}, "neither weights nor arch is given"),
        ({"weights": "", "arch": "resnet50"}, "a new network has nothing worth freezing"),
        ({"val_fraction": 0.0}, "val_fraction is 0.0; it must lie between 0 and 1"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"val_fraction": math.nan}, "val_fraction is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"image_size": -1}, "image_size is -1"),
        ({"crop_part": 0.0}, "crop_part is 0.0"),
        ({"crop_part": 1.1}, "crop_part is 1.1"),
        ({"views": ()}, "views is empty"),
        ({"views": ("sideways",)}, "views is ('sideways',); it must be a list of one of identity, hflip"),
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"epochs": 2.5}, "epochs is 2.5; it must be a whole number"),
        ({"epochs": True}, "epochs is True; it must be a whole number"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"optimizer": "lion"}, "optimizer is 'lion'; it must be one of sgd, adamw"),
        ({"lr": 0.0}, "lr is 0.0; it must be above 0"),
        ({"lr": math.inf}, "lr is inf"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": "fast"}, "lr is 'fast'; it must be a number"),
        ({"head_lr_factor": 0.0}, "head_lr_factor is 0.0"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"weight_decay": -1e-4}, "weight_decay is -0.0001"),
        ({"warmup_epochs": -1.0}, "warmup_epochs is -1.0"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"drop_path": 1.0}, "drop_path is 1.0; it must lie in [0, 1)"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"ema": -0.5}, "ema is -0.5"),
        ({"precision": "int8"}, "precision is 'int8'"),
        ({"augment": 3}, "augment is 3; it must be a Augment"),
        ({"balance": "yes"}, "balance is 'yes'; it must be one of none, weights, sampling"),
        ({"micro_batch": 5}, "micro_batch is 5 and batch_size 32; the second must be a multiple"),
        ({"start_size": 96}, "start_size is 96 and train_size 0; the crop grows to train_size"),
        ({"resized": 64, "train_size": 96}, "resized is 64 and the training crop 96; a crop is no larger"),
        ({"resized": 32, "image_size": 64}, "resized is 32 and the training crop 64; a crop is no larger"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0; it must lie in (0, 1]"),
        ({"schedule": "step"}, "drops is empty"),
        ({"drops": (0.75, 0.5)}, "drops is (0.75, 0.5); they are parts of the run, rising"),
        ({"drops": (0.5, 1.0)}, "drops is (0.5, 1.0)"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0; it must be 0 or more"),
        ({"unfreeze_epochs": 1.0, "freeze": "none"}, "unfreeze_epochs thaws a network that is frozen"),
        ({"sync_norm": True}, "sync_norm synchronises statistics that do not move; set train_norm"),
        ({"ema_every": 0}, "ema_every is 0; it must be at least 1"),
        ({"memory": "none"}, "memory is 'none'; it must be one of plain, checkpoint, recompute"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(RecipeError) as raised:
        Recipe(**(START | settings))
    assert message in str(raised.value)


def test_a_small_crop_may_come_from_small_pictures():
    Recipe(**START, image_size=96, train_size=64, resized=64)


@pytest.mark.parametrize("fraction", [0.0, 1e-9, 0.999])
def test_what_lies_just_inside_is_taken(fraction):
    Recipe(**START, label_smoothing=fraction, ema=fraction, momentum=fraction, weight_decay=fraction)


def test_overrides_reach_nested_settings():
    found = override(Recipe(**START), ("augment.vflip=true", "lr=0.01", 'views=["identity"]', "optimizer=adamw"))
    assert found.augment == Augment(vflip=True)
    assert (found.lr, found.views, found.optimizer) == (0.01, ("identity",), "adamw")
    assert override(found, ()) == found
    assert override(found, ("augment.crop_scale=[0.5, 1.0]",)).augment.crop_scale == (0.5, 1.0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr", "'lr' is not of the form field=value, e.g. lr=0.01"),
        ("views.0=hflip", "'views.0=hflip': give the whole list, e.g. views=['identity', 'hflip']"),
        ("speed=3", "there is no 'speed'"),
        ("augment.sideways=true", "there is no 'sideways'; known: hflip"),
        ("augment.vflip=perhaps", "vflip is 'perhaps'"),
        ("lr=quick", "lr is 'quick'; it must be a number"),
        ("augment.crop_scale=[2.0, 3.0]", "crop_scale is (2.0, 3.0)"),
    ],
)
def test_bad_overrides_are_named(setting, message):
    with pytest.raises(RecipeError) as raised:
        override(Recipe(**START), (setting,))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('data = "x"\nweights = "w"\nspeed = 3\n', "unknown setting speed; known: data"),
        ('data = "x"\nweights = "w"\n[augment]\nsideways = true\n', "unknown setting augment.sideways"),
        ('data = "x"\nweights = "w"\nlr = 0\n', "lr is 0; it must be above 0"),
        ('weights = "w"\n', "missing 1 required keyword-only argument: 'data'"),
        ("data = \n", "not a TOML document"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as raised:
        Recipe.from_file(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert message in str(raised.value)


def test_a_file_that_is_missing_or_no_text(tmp_path):
    path = tmp_path / "mine.toml"
    with pytest.raises(RecipeError) as raised:
        Recipe.from_file(path)
    assert str(raised.value) == f"{path}: No such file or directory"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"mine\.toml"):
        Recipe.from_file(path)


def test_names_of_the_table():
    with pytest.raises(
        RecipeError,
        match="there is no recipe 'magic'; known: probe, linear-probe, quick-probe, finetune, scratch, he-90",
    ):
        recipe("magic", **START)
    with pytest.raises(RecipeError, match="recipe probe: got an unexpected keyword argument 'speed'"):
        recipe("probe", **START, speed=3)
    assert recipe("scratch", data="x", arch="resnet50", epochs=2).epochs == 2  # its warm-up of five shortens itself
