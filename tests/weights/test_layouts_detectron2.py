"""detectron2 cannot be installed beside current versions; its networks are written here from its source.

`Net` follows detectron2/modeling/backbone/resnet.py (commit 0af92994bc09): names by its modules, a norm inside each
convolution, stride in the first 1×1 or the 3×3. `caffe2_logits` computes from Caffe2's blobs, whose names are those
that detectron2/checkpoint/c2_model_loading.py (commit 31542d62eaba) reads, with norms that are a scale and a shift.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.arch.plan import plan
from isthmus.arch.variants import variant, variants
from isthmus.nn.network import ResNet
from isthmus.weights.layouts import carriers, detect, from_native, pairs, to_native
from oracles import bare, ours, picture, random_state, randomise, relative_error, seed_of, small

DETECTRON2 = [
    pytest.param(name, marks=[pytest.mark.long] * (sum(stage.depth for stage in variant(name).stages) > 20))
    for name in variants()
    if "detectron2" in carriers(variant(name)) and variant(name).norm == "batch"
]
TOLERANCE = 1e-8


class Conv(nn.Conv2d):
    """A convolution without bias, and its norm inside it."""

    def __init__(self, width_in, width_out, kernel, stride=1, groups=1):
        super().__init__(width_in, width_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(width_out)

    def forward(self, x):
        return self.norm(super().forward(x))


class Block(nn.Module):
    def __init__(self, width_in, stage, stride, stride_at):
        super().__init__()
        mid, out = stage.mid, stage.out
        if width_in != out:
            self.shortcut = Conv(width_in, out, 1, stride)
        if stage.block == "basic":
            self.conv1, self.conv2 = Conv(width_in, out, 3, stride), Conv(out, out, 3)
        else:
            first, second = (stride, 1) if stride_at == "conv1" else (1, stride)
            self.conv1 = Conv(width_in, mid, 1, first)
            self.conv2 = Conv(mid, mid, 3, second, stage.groups)
            self.conv3 = Conv(mid, out, 1)

    def forward(self, x):
        y = self.conv2(F.relu(self.conv1(x)))
        if hasattr(self, "conv3"):
            y = self.conv3(F.relu(y))
        return F.relu(y + (self.shortcut(x) if hasattr(self, "shortcut") else x))


class Net(nn.Module):
    """ResNet of detectron2 with `num_classes`."""

    def __init__(self, spec):
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1 = Conv(spec.in_channels, spec.stem.widths[0], 7, 2)
        width, self.stages = spec.stem.widths[0], []
        for number, stage in enumerate(spec.stages, 2):
            blocks = nn.Sequential()
            for index in range(stage.depth):
                blocks.append(Block(width, stage, 1 if index else stage.stride, spec.stride_at))
                width = stage.out
            self.add_module(f"res{number}", blocks)
            self.stages.append(f"res{number}")
        self.linear = nn.Linear(width, spec.num_classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem.conv1(x)), 3, 2, 1)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.linear(x.mean((2, 3)))


def caffe2_logits(blobs: dict[str, Tensor], x: Tensor, groups: int = 1, strided: str = "branch2a") -> Tensor:
    """What Caffe2 computes from its blobs: convolution, scale and shift, the stride in a block's first 1×1."""

    def layer(x, name, stride, norm=None, groups=1):
        weight = blobs[f"{name}_w"]
        x = F.conv2d(x, weight, blobs.get(f"{name}_b"), stride, weight.shape[-1] // 2, groups=groups)
        scale, shift = (blobs[f"{norm or f'{name}_bn'}_{part}"].view(1, -1, 1, 1) for part in "sb")
        return x * scale + shift

    x = F.max_pool2d(F.relu(layer(x, "conv1", 2, "res_conv1_bn")), 3, 2, 1)
    for stage in range(2, 6):
        block = 0
        while (name := f"res{stage}_{block}_branch2a") + "_w" in blobs:
            path = name.removesuffix("branch2a")
            stride = 2 if stage > 2 and block == 0 else 1
            y = F.relu(layer(x, name, stride if strided == "branch2a" else 1))
            y = F.relu(layer(y, f"{path}branch2b", stride if strided == "branch2b" else 1, groups=groups))
            y = layer(y, f"{path}branch2c", 1)
            x = F.relu(y + (layer(x, f"{path}branch1", stride) if block == 0 else x))
            block += 1
    return F.linear(x.mean((2, 3)), blobs["fc1000_w"], blobs["fc1000_b"])


@pytest.mark.parametrize("name", DETECTRON2)
def test_names_and_shapes_are_detectron2s(name):
    spec = variant(name)
    theirs, native = bare(lambda: Net(spec)).state_dict(), bare(lambda: ResNet(plan(spec))).state_dict()
    found = from_native(native, "detectron2", spec).tensors
    assert {key: item.shape for key, item in found.items()} == {key: item.shape for key, item in theirs.items()}


@torch.inference_mode()
@pytest.mark.parametrize(
    "name", ["resnet18", "resnet34", "resnet50", "resnet50_v1", "resnext50_32x4d", "wide_resnet50_2"]
)
def test_detectron2(name):
    """Theirs, random, to ours; then ours, random, to theirs; a detector's prefix and a converted classifier's name."""
    spec = small(variant(name))
    theirs, x = randomise(bare(lambda: Net(spec)), seed_of(name)), picture(1, 3, 33, 33)
    state = to_native(theirs.state_dict(), "detectron2", spec).tensors
    assert relative_error(ours(spec, 33, state)(x), theirs(x)) <= TOLERANCE
    detector = {f"backbone.bottom_up.{key}": tensor for key, tensor in theirs.state_dict().items()}
    converted = {key.replace("linear.", "stem.fc."): tensor for key, tensor in theirs.state_dict().items()}
    for other in (detector, converted):
        assert detect(other) == "detectron2"
        found = to_native(other, "detectron2", spec).tensors
        assert all(torch.equal(found[key], state[key]) for key in state)
    state = random_state(bare(lambda: ResNet(plan(spec))), 1)
    theirs.load_state_dict(from_native(state, "detectron2", spec).tensors, assign=True)
    assert relative_error(ours(spec, 33, state)(x), theirs(x)) <= TOLERANCE
    if "bottleneck" in spec.stages[0].block:
        other = {"conv1": "conv2", "conv2": "conv1"}[spec.stride_at]
        assert relative_error(ours(replace(spec, stride_at=other), 33, state)(x), theirs(x)) > 1e-4


@torch.inference_mode()
@pytest.mark.long
def test_a_whole_network():
    spec, x = variant("resnet50_v1"), picture(1, 3, 224, 224)
    theirs = randomise(bare(lambda: Net(spec)))
    state = to_native(theirs.state_dict(), "detectron2", spec).tensors
    assert relative_error(ours(spec, 224, state)(x), theirs(x)) <= TOLERANCE
    wanted = caffe2_logits(from_native(state, "detectron2_msra", spec).tensors, x)
    assert relative_error(wanted, theirs(x)) <= TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "groups", "strided"),
    [
        ("resnet50_v1", 1, "branch2a"),
        ("resnet50_keras", 1, "branch2a"),  # another epsilon, which a scale and a shift do not have
        ("resnext50_32x4d", 32, "branch2b"),
        ("resnext101_32x8d", 32, "branch2b"),
    ],
)
def test_caffe2(name, groups, strided):
    """Our statistics become part of a scale and a shift, and theirs get statistics that are the identity."""
    spec = small(variant(name))
    norms = sum(
        layer.kind == "norm" for block in plan(spec).blocks for layer in block.spec.main + block.spec.downsample
    )
    state, x = random_state(bare(lambda: ResNet(plan(spec))), seed_of(name)), picture(1, 3, 33, 33)
    blobs, notes = from_native(state, "detectron2_msra", spec)
    assert notes == (f"statistics of {norms + 1} norms are part of their scale and shift, and not kept apart",)
    assert {key.rpartition("_")[2] for key in blobs} == {"w", "s", "b"}
    wanted = caffe2_logits(blobs, x, groups, strided)
    assert relative_error(ours(spec, 33, state)(x), wanted) <= TOLERANCE
    back, notes = to_native(blobs, "detectron2_msra", spec)
    assert notes == (
        f"{norms + 1} norms are a scale and a shift: mean 0 and variance 1 - {spec.norm_eps:g} make them so",
    )
    assert relative_error(ours(spec, 33, back)(x), wanted) <= TOLERANCE
    for dtype in (torch.float64, torch.float32, torch.bfloat16):  # a second time nothing is left to work out
        once = to_native({key: blob.to(dtype) for key, blob in blobs.items()}, "detectron2_msra", spec).tensors
        again = from_native(once, "detectron2_msra", spec).tensors
        assert all(torch.equal(again[key], blob.to(dtype)) for key, blob in blobs.items())
    other = {"branch2a": "branch2b", "branch2b": "branch2a"}[strided]
    assert relative_error(caffe2_logits(blobs, x, groups, other), wanted) > 1e-4


def test_names_of_msras_file():
    """The blobs of MSRA's ResNet-50: a stem, 16 blocks of three convolutions, four shortcuts and a classifier."""
    spec = variant("resnet50_v1")
    blobs = from_native(bare(lambda: ResNet(plan(spec))).state_dict(), "detectron2_msra", spec).tensors
    wanted = {"conv1_w": (64, 3, 7, 7), "res_conv1_bn_s": (64,), "res_conv1_bn_b": (64,)}
    for stage, (depth, mid) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], 2):
        for block in range(depth):
            before = (64 if stage == 2 else 2 * mid) if block == 0 else 4 * mid
            convolutions = {
                "branch2a": (mid, before, 1, 1),
                "branch2b": (mid, mid, 3, 3),
                "branch2c": (4 * mid, mid, 1, 1),
            }
            if block == 0:
                convolutions["branch1"] = (4 * mid, before, 1, 1)
            for branch, shape in convolutions.items():
                name = f"res{stage}_{block}_{branch}"
                wanted |= {f"{name}_w": shape, f"{name}_bn_s": shape[:1], f"{name}_bn_b": shape[:1]}
    wanted |= {"fc1000_w": (1000, 2048), "fc1000_b": (1000,)}
    assert {key: tuple(blob.shape) for key, blob in blobs.items()} == wanted


@torch.inference_mode()
def test_a_bias_beside_a_scale_and_a_shift():
    """As in the stem of MSRA's ResNet-50; and `pred` for the classifier."""
    spec = small(variant("resnet50_v1"))
    state, x = random_state(bare(lambda: ResNet(plan(spec)))), picture(1, 3, 33, 33)
    blobs = from_native(state, "detectron2_msra", spec).tensors | {"conv1_b": picture(64)}
    wanted = caffe2_logits(blobs, x)
    renamed = {key.replace("fc1000", "pred"): blob for key, blob in blobs.items()}
    found, notes = to_native(renamed, "detectron2_msra", spec)
    assert notes[1] == "biases of 1 convolutions taken off the means of the norms that read them"
    assert relative_error(ours(spec, 33, found)(x), wanted) <= TOLERANCE
    del renamed["conv1_b"]
    dropped = to_native(renamed, "detectron2_msra", spec).tensors
    assert relative_error(ours(spec, 33, dropped)(x), wanted) > 1e-4


@pytest.mark.parametrize(
    "spelling",
    [
        {"weight": "gamma", "bias": "beta", "running_mean": "running_mean", "running_var": "running_var"},
        {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"},
    ],
)
def test_norms_with_statistics_keep_them(spelling):
    """The spellings of statistics that c2_model_loading.py reads."""
    spec = small(variant("resnet50_v1"))
    state = random_state(bare(lambda: ResNet(plan(spec))))
    blobs = from_native(state, "detectron2_msra", spec).tensors
    for pair in pairs("detectron2_msra", spec):
        if pair.kind == "norm":
            del blobs[f"{pair.foreign[0]}_s"], blobs[f"{pair.foreign[0]}_b"]
            blobs |= {
                f"{pair.foreign[0]}_{theirs}": state[f"{pair.native}.{leaf}"] for leaf, theirs in spelling.items()
            }
    assert detect(blobs) == "detectron2_msra"
    found, notes = to_native(blobs, "detectron2_msra", spec)
    assert notes == ()
    assert set(found) == {key for key in state if not key.endswith("num_batches_tracked")}
    assert all(torch.equal(found[key], state[key]) for key in found)
