"""Keras' ResNet and ResNetV2 compute the same from the same tensors, in both directions.

In double precision, but for Keras' batch norm, which computes in single whatever it is given.
"""

import os
from dataclasses import replace

import pytest
import torch

from isthmus.arch.plan import plan
from isthmus.arch.spec import StemSpec
from isthmus.arch.variants import variant
from isthmus.nn.network import ResNet
from isthmus.weights.layouts import detect, from_native, to_native
from oracles import bare, ours, picture, random_state, relative_error, seed_of

os.environ["KERAS_BACKEND"] = "torch"
keras = pytest.importorskip("keras")

TOLERANCE = 1e-5
WHOLE = {
    "resnet50_keras": "ResNet50",
    "resnet101_keras": "ResNet101",
    "resnet152_keras": "ResNet152",
    "resnetv2_50_keras": "ResNet50V2",
    "resnetv2_101_keras": "ResNet101V2",
    "resnetv2_152_keras": "ResNet152V2",
}
SMALL = [
    *(("keras", depths) for depths in [(2, 1, 1, 1), (1, 3, 1, 1), (1, 1, 2, 1)]),
    *(("keras_v2", depths) for depths in [(2, 2, 2, 2), (3, 2, 2, 2), (2, 3, 4, 2)]),
]


@pytest.fixture(autouse=True)
def double_precision():
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx(before)


def small_spec(layout, depths):
    """Half as wide."""
    spec = variant({"keras": "resnet50_keras", "keras_v2": "resnetv2_50_keras"}[layout])
    stages = tuple(
        replace(stage, depth=depth, mid=stage.mid // 2, out=stage.out // 2)
        for stage, depth in zip(spec.stages, depths, strict=True)
    )
    return replace(spec, stages=stages, num_classes=7)


def keras_net(layout, spec, side):
    """Keras' own constructor with the depths of `spec`; the blocks of its ResNet50 are functions of its module."""
    from keras.src.applications import resnet

    stack = {"keras": resnet.stack_residual_blocks_v1, "keras_v2": resnet.stack_residual_blocks_v2}[layout]

    def stacks(x):
        for number, stage in enumerate(spec.stages, 2):
            x = stack(x, stage.mid, stage.depth, stride1=stage.stride, name=f"conv{number}")
        return x

    return resnet.ResNet(
        stacks,
        preact=layout == "keras_v2",
        use_bias=True,
        weights=None,
        input_shape=(side, side, spec.in_channels),
        classes=spec.num_classes,
        classifier_activation=None,
    )


def tensors_of(model):
    return {variable.path: variable.value.detach() for variable in model.variables}


def fill(model, tensors):
    """Give a model tensors by name, all of them."""
    assert {variable.path for variable in model.variables} == set(tensors)
    for variable in model.variables:
        variable.assign(tensors[variable.path])


def randomise(model, seed):
    """Random numbers for every variable, biases and statistics too."""
    random = torch.Generator().manual_seed(seed)
    ranges = {"gamma": (0.5, 1.0), "moving_variance": (0.5, 1.5), "kernel": None}
    for variable in model.variables:
        low, high = ranges.get(variable.path.rpartition("/")[2], (-0.5, 0.5)) or (-1.0, 1.0)
        value = torch.empty(tuple(variable.shape), dtype=torch.float64).uniform_(low, high, generator=random)
        fan = value[..., 0].numel() if value.ndim > 1 else 3
        variable.assign(value * (3 / fan) ** 0.5)


def logits(model, x):
    with torch.no_grad():
        return model(x.movedim(1, -1), training=False)


def sizes(tensors):
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * ("152" in name or "101" in name)) for name in WHOLE]
)
def test_names_and_shapes_are_keras(name):
    """In Keras' order, by which it reads a file of weights."""
    layout = "keras_v2" if "v2" in name else "keras"
    theirs = getattr(keras.applications, WHOLE[name])(weights=None, input_shape=(64, 64, 3))
    native = bare(lambda: ResNet(plan(name))).state_dict()
    found = sizes(from_native(native, layout, variant(name)).tensors)
    assert list(found.items()) == list(sizes(tensors_of(theirs)).items())


def test_a_trunk_without_classifier():
    theirs = keras.applications.ResNet50(include_top=False, weights=None, input_shape=(64, 64, 3))
    spec = replace(variant("resnet50_keras"), num_classes=0)
    native = bare(lambda: ResNet(plan(spec))).state_dict()
    assert sizes(from_native(native, "keras", spec).tensors) == sizes(tensors_of(theirs))
    assert detect(tensors_of(theirs)) == "keras"


@pytest.mark.parametrize(("layout", "depths"), SMALL)
def test_keras(layout, depths):
    """Theirs, random, to ours; then ours, random, to theirs; biases folded away are zero on the way back."""
    spec, side = small_spec(layout, depths), 33
    theirs, x = keras_net(layout, spec, side), picture(1, 3, side, side)
    randomise(theirs, seed_of(str(depths)))
    found = tensors_of(theirs)
    assert detect(found) == layout
    state, notes = to_native(found, layout, spec)
    biased = [key for key in found if key.endswith("_conv/bias") and (layout == "keras" or key != "conv1_conv/bias")]
    assert notes == (f"biases of {len(biased)} convolutions taken off the means of the norms that read them",)
    assert relative_error(ours(spec, side, with_counters(spec, state))(x), logits(theirs, x)) <= TOLERANCE

    native = random_state(bare(lambda: ResNet(plan(spec))), 1)
    foreign, notes = from_native(native, layout, spec)
    assert notes == ()
    assert all(not foreign[key].any() for key in biased)
    fill(theirs, foreign)
    assert relative_error(ours(spec, side, native)(x), logits(theirs, x)) <= TOLERANCE


def with_counters(spec, state):
    """With the counters of batches, which Keras does not have."""
    keys = bare(lambda: ResNet(plan(spec))).state_dict()
    return {key: state.get(key, torch.tensor(0)) for key in keys}


@pytest.mark.long
@pytest.mark.parametrize("name", ["resnet50_keras", "resnetv2_50_keras"])
def test_whole_networks(name):
    layout, spec = "keras_v2" if "v2" in name else "keras", variant(name)
    theirs = getattr(keras.applications, WHOLE[name])(weights=None, classifier_activation=None)
    randomise(theirs, seed_of(name))
    x, state = picture(1, 3, 224, 224), to_native(tensors_of(theirs), layout, spec).tensors
    assert relative_error(ours(spec, 224, with_counters(spec, state))(x), logits(theirs, x)) <= TOLERANCE


def test_a_network_of_another_epsilon_is_the_same_function_in_keras():
    spec = replace(small_spec("keras", (2, 1, 1, 1)), norm_eps=1e-2, name="mine")
    theirs, x = keras_net("keras", spec, 33), picture(1, 3, 33, 33)
    state = random_state(bare(lambda: ResNet(plan(spec))))
    foreign, notes = from_native(state, "keras", spec)
    assert notes == ("variances of 20 norms changed by 0.00999, for epsilon 1.001e-05",)
    fill(theirs, foreign)
    assert relative_error(ours(spec, 33, state)(x), logits(theirs, x)) <= TOLERANCE


@pytest.mark.parametrize(
    ("layout", "change"),
    [
        ("keras", {"stride_at": "conv2"}),
        ("keras", {"norm_eps": 1e-2}),
        ("keras", {"stem": StemSpec(pool="max_ceil")}),
        ("keras_v2", {"stride_at": "conv1"}),
        ("keras_v2", {"norm_eps": 1e-2}),
        ("keras_v2", {"stem": StemSpec(pool="max", bias=True)}),
        ("keras_v2", {"stages": "first"}),
        ("keras", "unfolded"),
        ("keras_v2", "unfolded"),
        ("keras_v2", "stream unfolded"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_mutations_fail(layout, change):
    spec, side = small_spec(layout, (2, 2, 2, 2)), 33
    theirs, x = keras_net(layout, spec, side), picture(1, 3, side, side)
    randomise(theirs, 0)
    wanted, found = logits(theirs, x), tensors_of(theirs)
    if change == "unfolded":
        found = {key: torch.zeros_like(item) if key.endswith("_conv/bias") else item for key, item in found.items()}
    elif change == "stream unfolded":
        found = {key: torch.zeros_like(item) if key.endswith("_3_conv/bias") else item for key, item in found.items()}
    state, mutant = with_counters(spec, to_native(found, layout, spec).tensors), spec
    if isinstance(change, dict):
        if change.get("stages") == "first":
            change = {"stages": tuple(replace(stage, stride_block="first") for stage in spec.stages)}
        mutant = replace(spec, **change)
    assert relative_error(ours(mutant, side, state)(x), wanted) > 1e-3
