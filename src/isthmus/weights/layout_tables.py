"""How other libraries name the tensors of a network, and which networks they have: a table a library.

Names are templates of modules. `{layer}` counts stages from 1, `{block}` the blocks of a stage from 0, `{n}` the
convolutions or norms of a block from 1; `{at}` is the place of the shortcut's convolution in our `downsample`, and
`{pools}` how many pools stand before it. Numbers may be shifted: `{layer+1}`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from isthmus.arch.preprocess import Preprocess
from isthmus.arch.spec import HeadSpec, NetSpec

__all__ = ["COUNTER", "ELASTIC", "LAYOUTS", "Layout", "Names", "made_of"]

Names = Mapping[str, str | tuple[str, ...]]
"""Our name to theirs; where they have several, the first is written and all are read."""
Can = dict[str, tuple[Any, ...]]
COUNTER = "num_batches_tracked"  # of batches, in torch's norms: only training reads it


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a library names a network, and which networks it has.

    `modules` are the names of modules by their kind: conv, norm, linear; `deep_stem` those that differ where the stem
    is three convolutions; `leaves` are what follows a module's name. `prefix` stands before the trunk of a network
    with a classifier; those in `read_prefixes` are read and not written. `can` says, in the words of `made_of`, what
    the library builds; what it does not list is free. `norm_eps` is the one it always has, None where that is free.
    """

    name: str
    modules: Mapping[str, Names]
    leaves: Mapping[str, Names]
    can: Can
    deep_stem: Names = field(default_factory=dict)
    prefix: str = ""
    read_prefixes: tuple[str, ...] = ()
    block_order: tuple[str, ...] = ()  # endings of a block's modules as the library lists them; empty: as we do
    channels_last: bool = False  # kernels are (*size, in, out) and classifiers (in, out)
    classifier_is_conv: bool = False  # of 1×1, where ours is linear
    affine_norms: bool = False  # norms are written as a scale and a shift, without statistics
    biased: tuple[str, ...] = ()  # convolutions that have a bias there and none here
    norm_eps: float | None = None
    preprocess: Preprocess | None = None

    @property
    def same_names(self) -> bool:
        """Whether its names are ours, so that tensors pass as they are."""
        return self.modules is OURS

    @property
    def decisive(self) -> bool:
        """Whether it leaves open nothing that names and shapes cannot say."""
        return self.norm_eps is not None and all(len(self.can.get(silent, ())) == 1 for silent in SILENT)


# What a network may do otherwise with the same tensors, as one of a larger output stride does.
ELASTIC = (
    "dims", "head", "dilation", "pool of dilated shortcuts", "strides", "first stride", "later strides",
    "striding block",
)  # fmt: skip
SILENT = ("stem", "stride place", "activation", "anti-aliasing")


def made_of(spec: NetSpec) -> dict[str, tuple[Any, ...]]:
    """What a network is made of, in the words of `Layout.can`: of each property the values that occur."""
    stem, stages = spec.stem, spec.stages
    convolution = f"{stem.kernel}×{stem.kernel}/{stem.stride}"
    striding = [stage for stage in stages if stage.stride > 1]
    wide = [stage for stage in striding if stage.block != "basic"]
    dilated = any(stage.dilation > 1 for stage in stages)
    basic = any(stage.block == "basic" for stage in stages)
    facts: dict[str, list[Any]] = {
        "dims": [spec.dims],
        "block": [" and ".join(sorted({stage.block for stage in stages}))],
        "stem": [f"{convolution} {stem.pool}" if len(stem.widths) == 1 else f"three {convolution} {stem.pool}"],
        "stem width": list(stem.widths),
        "tiered stem": [len(stem.widths) == 3 and tuple(stem.widths) != (stem.widths[2] // 2,) * 2 + stem.widths[2:]],
        "stem bias": [stem.bias],
        "shortcut": [spec.shortcut],
        "pool of dilated shortcuts": [dilated and spec.shortcut == "avg"],
        "stride place": [spec.stride_at for stage in wide if stage.groups == 1],
        "stride place of groups": [spec.stride_at for stage in wide if stage.groups > 1],
        "striding block": [stage.stride_block for stage in striding if stage.depth > 1],
        "strides": [tuple(stage.stride for stage in stages)],
        "first stride": [stages[0].stride],
        "later strides": [stage.stride for stage in stages[1:]],
        "dilation": [stage.dilation for stage in stages],
        "groups": [stage.groups for stage in stages],
        "expansion": [stage.out / stage.mid for stage in stages if stage.block != "basic"],
        "basic expansion": [stage.out / stage.mid for stage in stages if stage.block == "basic"],
        "narrower first 1×1": [stage.reduce not in (0, stage.mid) for stage in stages],
        "norm": [spec.norm],
        "activation": [spec.activation],
        "attention": [f"{spec.attention} in basic blocks" if basic and spec.attention == "se" else spec.attention],
        "anti-aliasing": [spec.anti_alias],
        "head": ["linear" if spec.head == HeadSpec() else "of its own"],
    }
    return {name: tuple(dict.fromkeys(values)) for name, values in facts.items()}


TORCH: dict[str, Names] = {
    "conv": {"weight": ".weight", "bias": ".bias"},
    "norm": {name: f".{name}" for name in ("weight", "bias", "running_mean", "running_var", COUNTER)},
    "linear": {"weight": ".weight", "bias": ".bias"},
}
KERAS: dict[str, Names] = {
    "conv": {"weight": "/kernel", "bias": "/bias"},
    "norm": {
        "weight": "/gamma",
        "bias": "/beta",
        "running_mean": "/moving_mean",
        "running_var": "/moving_variance",
    },
    "linear": {"weight": "/kernel", "bias": "/bias"},
}
CAFFE2: dict[str, Names] = {
    "conv": {"weight": "_w", "bias": "_b"},
    "norm": {
        "weight": ("_s", "_gamma"),
        "bias": ("_b", "_beta"),
        "running_mean": ("_running_mean", "_rm"),
        "running_var": ("_running_var", "_riv"),
    },
    "linear": {"weight": "_w", "bias": "_b"},
}

OURS: dict[str, Names] = {
    kind: {name: name for name in names}
    for kind, names in {
        "conv": (
            "conv1",
            "conv1.0",
            "conv1.3",
            "conv1.6",
            "maxpool.0",
            "layer{layer}.{block}.conv{n}",
            "layer{layer}.{block}.se.fc{n}",
            "layer{layer}.{block}.se.conv",
            "layer{layer}.{block}.downsample.{at}",
        ),
        "norm": (
            "bn1",
            "conv1.1",
            "conv1.4",
            "maxpool.1",
            "layer{layer}.{block}.bn{n}",
            "layer{layer}.{block}.downsample.{at+1}",
            "norm",
        ),
        "linear": ("fc",),
    }.items()
}

# What most libraries have; below, each adds and takes away.
PLAIN: Can = {
    "dims": (2,),
    "block": ("basic", "bottleneck"),
    "stem": ("7×7/2 max",),
    "stem bias": (False,),
    "shortcut": ("conv1",),
    "pool of dilated shortcuts": (False,),
    "striding block": ("first",),
    "basic expansion": (1,),
    "narrower first 1×1": (False,),
    "norm": ("batch",),
    "activation": ("relu",),
    "attention": ("none",),
    "anti-aliasing": ("none",),
    "head": ("linear",),
}
ON_3X3: Can = {"stride place": ("conv2",), "stride place of groups": ("conv2",)}
ONE_STRIP: Can = {"groups": (1,), "dilation": (1,), "expansion": (4,)}  # of a quarter of the width
DEEP: Can = {"stem": ("7×7/2 max", "three 3×3/2 max")}

NATIVE = Layout(name="native", modules=OURS, leaves=TORCH, can={})
# torchvision/models/resnet.py
TORCHVISION = Layout(name="torchvision", modules=OURS, leaves=TORCH, can=PLAIN | ON_3X3 | {"norm": ("batch", "group")})
# timm/models/resnet.py
TIMM = Layout(
    name="timm",
    modules=OURS,
    leaves=TORCH,
    can=PLAIN
    | ON_3X3
    | {
        "block": (*PLAIN["block"], "basic and bottleneck"),
        "stem": ("7×7/2 max", "three 3×3/2 max", "7×7/2 conv", "three 3×3/2 conv"),
        "shortcut": ("conv1", "conv3", "avg"),
        "pool of dilated shortcuts": (False, True),
        "narrower first 1×1": (False, True),
        "norm": ("batch", "group"),
        "activation": ("relu", "silu"),
        "attention": ("none", "se", "se in basic blocks", "eca"),
        "anti-aliasing": ("none", "avg", "blur"),
    },
)
# timm/models/resnetv2.py
TIMM_RESNETV2 = Layout(
    name="timm_resnetv2",
    modules={
        "conv": {
            "conv1": "stem.conv",
            "conv1.0": "stem.conv1",
            "conv1.3": "stem.conv2",
            "conv1.6": "stem.conv3",
            "layer{layer}.{block}.conv{n}": "stages.{layer-1}.blocks.{block}.conv{n}",
            "layer{layer}.{block}.downsample.{at}": "stages.{layer-1}.blocks.{block}.downsample.conv",
        },
        "norm": {
            "conv1.1": "stem.norm1",
            "conv1.4": "stem.norm2",
            "layer{layer}.{block}.bn{n}": "stages.{layer-1}.blocks.{block}.norm{n}",
            "norm": "norm",
        },
        "linear": {"fc": "head.fc"},
    },
    leaves=TORCH,
    can=PLAIN
    | ON_3X3
    | DEEP
    | {
        "block": ("preact_bottleneck",),
        "shortcut": ("conv1", "avg"),
        "pool of dilated shortcuts": (False, True),
        "groups": (1,),
        "expansion": (4,),
        "norm": ("batch", "group"),
        "activation": ("relu", "silu"),
    },
    classifier_is_conv=True,
)
# transformers/models/resnet/modeling_resnet.py; without a classifier it is a ResNetModel
TRANSFORMERS = Layout(
    name="transformers",
    modules={
        "conv": {
            "conv1": "embedder.embedder.convolution",
            "layer{layer}.{block}.conv{n}": "encoder.stages.{layer-1}.layers.{block}.layer.{n-1}.convolution",
            "layer{layer}.{block}.downsample.{at}": "encoder.stages.{layer-1}.layers.{block}.shortcut.convolution",
        },
        "norm": {
            "bn1": "embedder.embedder.normalization",
            "layer{layer}.{block}.bn{n}": "encoder.stages.{layer-1}.layers.{block}.layer.{n-1}.normalization",
            "layer{layer}.{block}.downsample.{at+1}": "encoder.stages.{layer-1}.layers.{block}.shortcut.normalization",
        },
        "linear": {"fc": "classifier.1"},
    },
    leaves=TORCH,
    can=PLAIN | ONE_STRIP | {"first stride": (1, 2), "later strides": (2,)},
    prefix="resnet.",
    norm_eps=1e-5,
)
# detectron2/modeling/backbone/resnet.py; `stem.fc` is what tools/convert-torchvision-to-d2.py makes of a classifier
DETECTRON2 = Layout(
    name="detectron2",
    modules={
        "conv": {
            "conv1": "stem.conv1",
            "layer{layer}.{block}.conv{n}": "res{layer+1}.{block}.conv{n}",
            "layer{layer}.{block}.downsample.{at}": "res{layer+1}.{block}.shortcut",
        },
        "norm": {
            "bn1": "stem.conv1.norm",
            "layer{layer}.{block}.bn{n}": "res{layer+1}.{block}.conv{n}.norm",
            "layer{layer}.{block}.downsample.{at+1}": "res{layer+1}.{block}.shortcut.norm",
        },
        "linear": {"fc": ("linear", "stem.fc")},
    },
    leaves=TORCH,
    can=PLAIN | {"norm": ("batch", "group")},
    read_prefixes=("backbone.bottom_up.", "backbone."),
    norm_eps=1e-5,
)
# Caffe2's blobs, as detectron2/checkpoint/c2_model_loading.py reads them; grouped networks, trained in Caffe2 and not
# converted, stride on the 3×3 (configs/COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml).
DETECTRON2_MSRA = Layout(
    name="detectron2_msra",
    modules={
        "conv": {
            "conv1": "conv1",
            "layer{layer}.{block}.conv1": "res{layer+1}_{block}_branch2a",
            "layer{layer}.{block}.conv2": "res{layer+1}_{block}_branch2b",
            "layer{layer}.{block}.conv3": "res{layer+1}_{block}_branch2c",
            "layer{layer}.{block}.downsample.{at}": "res{layer+1}_{block}_branch1",
        },
        "norm": {
            "bn1": "res_conv1_bn",
            "layer{layer}.{block}.bn1": "res{layer+1}_{block}_branch2a_bn",
            "layer{layer}.{block}.bn2": "res{layer+1}_{block}_branch2b_bn",
            "layer{layer}.{block}.bn3": "res{layer+1}_{block}_branch2c_bn",
            "layer{layer}.{block}.downsample.{at+1}": "res{layer+1}_{block}_branch1_bn",
        },
        "linear": {"fc": ("fc1000", "pred")},
    },
    leaves=CAFFE2,
    can=PLAIN | {"block": ("bottleneck",), "stride place": ("conv1",), "stride place of groups": ("conv2",)},
    affine_norms=True,
    norm_eps=1e-5,
    preprocess=Preprocess(channels="BGR", mean=(103.53 / 255, 116.28 / 255, 123.675 / 255), std=(1 / 255,) * 3),
)
# mmpretrain/models/backbones/resnet.py, resnext.py, seresnet.py, resnet_cifar.py, and heads/linear_head.py
MMPRETRAIN = Layout(
    name="mmpretrain",
    modules={
        "conv": {
            "conv1": "conv1",
            "conv1.0": "stem.0.conv",
            "conv1.3": "stem.1.conv",
            "conv1.6": "stem.2.conv",
            "layer{layer}.{block}.conv{n}": "layer{layer}.{block}.conv{n}",
            "layer{layer}.{block}.se.fc{n}": "layer{layer}.{block}.se_layer.conv{n}.conv",
            "layer{layer}.{block}.downsample.{at}": "layer{layer}.{block}.downsample.{pools}",
        },
        "norm": {
            "bn1": "bn1",
            "conv1.1": "stem.0.bn",
            "conv1.4": "stem.1.bn",
            "layer{layer}.{block}.bn{n}": "layer{layer}.{block}.bn{n}",
            "layer{layer}.{block}.downsample.{at+1}": "layer{layer}.{block}.downsample.{pools+1}",
        },
        "linear": {"fc": "head.fc"},
    },
    deep_stem={"bn1": "stem.2.bn"},
    leaves=TORCH,
    can=PLAIN
    | {
        "stem": (*DEEP["stem"], "3×3/1 none"),
        "tiered stem": (False,),
        "shortcut": ("conv1", "avg"),
        "attention": ("none", "se"),
    },
    prefix="backbone.",
)
# keras/src/applications/resnet.py; preprocess_input in its modes "caffe" and "tf"
KERAS_V1 = Layout(
    name="keras",
    modules={
        "conv": {
            "conv1": "conv1_conv",
            "layer{layer}.{block}.conv{n}": "conv{layer+1}_block{block+1}_{n}_conv",
            "layer{layer}.{block}.downsample.{at}": "conv{layer+1}_block{block+1}_0_conv",
        },
        "norm": {
            "bn1": "conv1_bn",
            "layer{layer}.{block}.bn{n}": "conv{layer+1}_block{block+1}_{n}_bn",
            "layer{layer}.{block}.downsample.{at+1}": "conv{layer+1}_block{block+1}_0_bn",
        },
        "linear": {"fc": "predictions"},
    },
    leaves=KERAS,
    can=PLAIN
    | ONE_STRIP
    | {"block": ("bottleneck",), "stem width": (64,), "strides": ((1, 2, 2, 2),), "stride place": ("conv1",)},
    block_order=("_1_conv", "_1_bn", "_2_conv", "_2_bn", "_0_conv", "_3_conv", "_0_bn", "_3_bn"),
    channels_last=True,
    biased=("conv1", "layer{layer}.{block}.conv{n}", "layer{layer}.{block}.downsample.{at}"),
    norm_eps=1.001e-5,
    preprocess=Preprocess(channels="BGR", mean=(103.939 / 255, 116.779 / 255, 123.68 / 255), std=(1 / 255,) * 3),
)
KERAS_V2 = Layout(
    name="keras_v2",
    modules={
        "conv": KERAS_V1.modules["conv"],
        "norm": {
            "layer{layer}.{block}.bn1": "conv{layer+1}_block{block+1}_preact_bn",
            "layer{layer}.{block}.bn2": "conv{layer+1}_block{block+1}_1_bn",
            "layer{layer}.{block}.bn3": "conv{layer+1}_block{block+1}_2_bn",
            "norm": "post_bn",
        },
        "linear": KERAS_V1.modules["linear"],
    },
    leaves=KERAS,
    can=KERAS_V1.can
    | ON_3X3
    | {
        "block": ("preact_bottleneck",),
        "stem": ("7×7/2 max_zero",),
        "stem bias": (True,),
        "shortcut": ("maxpool",),
        "strides": ((2, 2, 2, 1),),
        "striding block": ("last",),
    },
    block_order=("_preact_bn", "_1_conv", "_1_bn", "_2_conv", "_2_bn", "_0_conv", "_3_conv"),
    channels_last=True,
    biased=("layer{layer}.{block}.conv3", "layer{layer}.{block}.downsample.{at}"),
    norm_eps=1.001e-5,
    preprocess=Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3),
)

POST_ACTIVATION = (NATIVE, TORCHVISION, TIMM, TRANSFORMERS, DETECTRON2, DETECTRON2_MSRA, MMPRETRAIN, KERAS_V1)
PRE_ACTIVATION = (TIMM_RESNETV2, KERAS_V2)
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (*POST_ACTIVATION, *PRE_ACTIVATION)}
