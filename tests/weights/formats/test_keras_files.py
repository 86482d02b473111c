"""Every kind of file that Keras writes, read back as the network's own variables, and what we write into Keras."""

import json
import sys
import zipfile

import h5py
import keras
import numpy as np
import pytest
import torch
from keras import layers
from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group

from isthmus.errors import MissingExtraError, WeightsError
from isthmus.weights import files

# Keras' variables do not know NumPy 2's `copy` yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
KINDS = ["a.weights.h5", "a.keras", "whole.h5", "legacy.h5"]


def small(prefix=""):
    """A network with each kind of layer that has weights, and another network as a layer."""
    picture = keras.Input((9, 9, 3))
    x = layers.Conv2D(4, 3, use_bias=False, name=f"{prefix}first")(layers.ZeroPadding2D(1)(picture))
    x = layers.BatchNormalization(name=f"{prefix}first_bn")(x)
    x = layers.Conv2D(6, 3, name=f"{prefix}second")(x)
    x = layers.BatchNormalization(name=f"{prefix}second_bn")(x)
    x = layers.Dropout(0.5)(layers.GlobalAveragePooling2D()(x))
    inner = keras.Sequential([layers.Dense(3, name="hidden"), layers.BatchNormalization(name="hidden_bn")], name="in")
    return randomised(keras.Model(picture, layers.Dense(5, name="predictions")(inner(x))))


def randomised(model):
    random = np.random.default_rng(0)
    model.set_weights([random.random(weight.shape).astype(np.float32) for weight in model.get_weights()])
    return model


def variables(model):
    """Every variable by the names of its layer and its own, as Keras has them in memory."""
    found = {}
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            found |= variables(layer)
        else:
            # Of a layer only, without the networks around it.
            found |= {f"{layer.name}/{one.name}": one.numpy() for one in layer.weights if "seed" not in one.name}
    return found


def saved(model, path):
    if path.name == "legacy.h5":
        with h5py.File(path, "w") as file:
            save_weights_to_hdf5_group(file, model)
    elif path.name.endswith(".weights.h5"):
        model.save_weights(path)
    else:
        model.save(path)
    return path


@pytest.fixture(scope="module")
def model():
    return small()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_holds_the_variables_of_the_network(model, tmp_path, kind):
    path = saved(model, tmp_path / kind)
    found, wanted = files.read(path), variables(model)
    assert found.format == "keras"
    assert set(found.tensors) == set(wanted)
    assert all(np.array_equal(found.tensors[name].numpy(), wanted[name]) for name in wanted)
    entries = files.headers(path).entries
    assert entries == {name: (value.shape, "float32") for name, value in wanted.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_trunk_under_a_new_head(tmp_path, kind):
    """Transfer learning: the trunk is a model of its own, whose variables are not named after it."""
    picture = keras.Input((9, 9, 3))
    x = layers.BatchNormalization(name="bn")(layers.Conv2D(4, 3, name="conv")(picture))
    trunk = keras.Model(picture, layers.GlobalAveragePooling2D()(x), name="trunk")
    model = randomised(keras.Sequential([keras.Input((9, 9, 3)), trunk, layers.Dense(2, name="head")]))
    found, wanted = files.read(saved(model, tmp_path / kind)).tensors, variables(model)
    assert set(found) == set(wanted)
    assert all(np.array_equal(found[name].numpy(), wanted[name]) for name in wanted)


def test_optimiser_state_is_no_weight(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, name="only")])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    for name in ("a.keras", "whole.h5"):
        model.save(tmp_path / name)
        assert set(files.read(tmp_path / name).tensors) == {"only/kernel", "only/bias"}


def unnamed(path):
    """A `.keras` file as the first releases of Keras 3 wrote it: groups by class, without the layers' names."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    plain = path.with_name("plain.h5")
    plain.write_bytes(members["model.weights.h5"])
    with h5py.File(plain, "a") as file:
        file.visititems(lambda _, one: one.attrs.pop("name", None) and None)
    members["model.weights.h5"] = plain.read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return plain


def test_layers_are_named_by_the_configuration_where_the_weights_do_not(model, tmp_path):
    path = saved(model, tmp_path / "a.keras")
    plain = unnamed(path)
    found, wanted = files.read(path).tensors, variables(model)
    assert set(found) == set(wanted)
    assert all(np.array_equal(found[name].numpy(), wanted[name]) for name in wanted)
    with pytest.raises(WeightsError, match=r"do not name their layers .*; save the whole model, model\.save"):
        files.read(plain)


def test_numbered_variables_of_an_unusual_layer(tmp_path):
    picture = keras.Input((4,))
    model = keras.Model(picture, layers.BatchNormalization(scale=False, name="odd")(picture))
    model.save_weights(tmp_path / "a.weights.h5")
    with pytest.raises(WeightsError, match=r"'odd' has 3 variables and not gamma, beta, .* save a legacy file"):
        files.read(tmp_path / "a.weights.h5")
    assert set(files.read(saved(model, tmp_path / "legacy.h5")).tensors) == {
        "odd/beta", "odd/moving_mean", "odd/moving_variance",
    }  # fmt: skip


@pytest.mark.parametrize("by_name", [True, False])
def test_keras_loads_what_we_write(model, tmp_path, by_name):
    wanted = {
        name: torch.from_numpy(value) for name, value in variables(model).items() if not name.startswith("hidden")
    }
    files.write(tmp_path / "a.h5", wanted, {})
    flat = [layer for layer in model.layers if not isinstance(layer, keras.Model)]
    fresh = keras.Sequential([layer.__class__.from_config(layer.get_config()) for layer in flat if layer.weights])
    for layer in fresh.layers:
        layer.build({"first": (1, 9, 9, 3), "second": (1, 9, 9, 4), "first_bn": (1, 9, 9, 4)}.get(
            layer.name, (1, 9, 9, 6) if layer.name == "second_bn" else (1, 3)
        ))  # fmt: skip
    fresh.load_weights(tmp_path / "a.h5", **({"by_name": True} if by_name else {}))
    found = variables(fresh)
    assert set(found) == set(wanted)
    assert all(np.array_equal(found[name], wanted[name].numpy()) for name in wanted)


@pytest.mark.long
def test_keras_applications_resnet50_both_ways(tmp_path):
    model = randomised(keras.applications.ResNet50(weights=None))
    wanted = variables(model)
    for kind in KINDS:
        found = files.read(saved(model, tmp_path / kind)).tensors
        assert set(found) == set(wanted)
        assert all(np.array_equal(found[name].numpy(), wanted[name]) for name in wanted)
    in_order = [f"{layer.name}/{one.name}" for layer in model.layers for one in layer.weights]
    files.write(tmp_path / "ours.h5", {name: torch.from_numpy(wanted[name]) for name in in_order}, {})
    for options in ({}, {"by_name": True}):
        model.set_weights([np.zeros(weight.shape, np.float32) for weight in model.get_weights()])
        model.load_weights(tmp_path / "ours.h5", **options)
        assert all(np.array_equal(value, wanted[name]) for name, value in variables(model).items())


def test_so_many_layers_that_keras_cuts_the_list_of_names(tmp_path):
    names = [f"layer_{'long' * 60}_{number}/kernel" for number in range(600)]
    tensors = {name: torch.full((2,), float(number)) for number, name in enumerate(names)}
    files.write(tmp_path / "a.h5", tensors, {})
    with h5py.File(tmp_path / "a.h5") as file:
        assert {"layer_names0", "layer_names1"} <= set(file.attrs)
    found = files.read(tmp_path / "a.h5").tensors
    assert list(found) == names
    assert all(torch.equal(found[name], tensors[name]) for name in names)


def test_what_keras_cannot_hold_is_said(tmp_path):
    for tensors in ({"fc.weight": torch.ones(2)}, {"fc/kernel": torch.ones(2, dtype=torch.bfloat16)}):
        with pytest.raises(WeightsError, match=r"cannot be a Keras variable: they are named layer/variable"):
            files.write(tmp_path / "a.h5", tensors, {})
    assert not list(tmp_path.iterdir())


def test_the_library_is_needed_for_writing_alone(model, tmp_path, monkeypatch):
    path = saved(model, tmp_path / "whole.h5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert files.read(path).tensors
    with pytest.raises(MissingExtraError, match=r'pip install "isthmus\[keras\]"'):
        files.write(tmp_path / "a.h5", {"fc/kernel": torch.ones(2)}, {})


def test_an_hdf5_file_of_something_else(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["measurements"] = np.ones(3)
    with pytest.raises(WeightsError, match="without the weights of Keras layers"):
        files.read(tmp_path / "a.h5")


def test_a_keras_archive_without_its_parts(model, tmp_path):
    path = saved(model, tmp_path / "a.keras")
    with zipfile.ZipFile(path) as archive:
        weights = archive.read("model.weights.h5")
    for config in (None, json.dumps({"config": {"layers": [3]}}), "[" * 100_000):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model.weights.h5", weights)
            if config is not None:
                archive.writestr("config.json", config)
        with pytest.raises(WeightsError, match="truncated, damaged"):
            files.read(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", weights)
    with pytest.raises(WeightsError, match="is compressed or encrypted"):
        files.read(path)
