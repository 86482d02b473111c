"""The whole family as one table: a name, its depths, and what sets it apart from ResNet-50.

Names are timm's where timm has one. `_v1` strides on the first 1×1 (He et al. 2015 as released); everything else
strides on the 3×3 (Goyal et al. 2017). `_keras` are Keras' own: its ResNet strides as v1, its ResNetV2 in a stage's
last block, and both have another epsilon. The `cifar` nets are those of He et al. 2015 §4.2 and 2016; `plain…` are the
same without shortcuts.
"""

import difflib
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from isthmus.arch.spec import NetSpec, StageSpec, StemSpec
from isthmus.errors import SpecError

__all__ = ["name_of", "variant", "variants"]

DEEP = StemSpec(widths=(32, 32, 64), kernel=3)  # He et al. 2018 (bag of tricks): C and D
TIERED = StemSpec(widths=(24, 32, 64), kernel=3)  # timm's T
WIDE_DEEP = StemSpec(widths=(64, 64, 128), kernel=3)  # S, and SENet-154
RS_STEM = StemSpec(widths=(32, 32, 64), kernel=3, pool="conv")  # Bello et al. 2021
KERAS_STEM = StemSpec(pool="max_zero", bias=True)
CIFAR_STEM = StemSpec(widths=(16,), kernel=3, stride=1, pool="none")

C: dict[str, Any] = {"stem": DEEP}
D: dict[str, Any] = {"stem": DEEP, "shortcut": "avg"}
T: dict[str, Any] = {"stem": TIERED, "shortcut": "avg"}
S: dict[str, Any] = {"stem": WIDE_DEEP}
SE: dict[str, Any] = {"attention": "se"}
ECA: dict[str, Any] = {"attention": "eca"}
AA: dict[str, Any] = {"anti_alias": "avg"}
BLUR: dict[str, Any] = {"anti_alias": "blur"}
RS: dict[str, Any] = {"stem": RS_STEM, "shortcut": "avg", "attention": "se", "attention_ratio": 0.25}
V1: dict[str, Any] = {"stride_at": "conv1"}
BASIC: dict[str, Any] = {"block": "basic"}
PREACT: dict[str, Any] = {"block": "preact_bottleneck"}
KERAS: dict[str, Any] = {"norm_eps": 1.001e-5}
KERAS_V2: dict[str, Any] = {
    "stem": KERAS_STEM,
    "shortcut": "maxpool",
    "strides": (2, 2, 2, 1),
    "stride_block": "last",
}
X4: dict[str, Any] = {"groups": 32, "base_width": 4}  # Xie et al. 2016 (ResNeXt)
X8: dict[str, Any] = {"groups": 32, "base_width": 8}
X64: dict[str, Any] = {"groups": 64, "base_width": 4}

D18, D26, D34, D50 = (2, 2, 2, 2), (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 6, 3)
D101, D152, D200, D269 = (3, 4, 23, 3), (3, 8, 36, 3), (3, 24, 36, 3), (3, 30, 48, 8)

TABLE: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "resnet10t": ((1, 1, 1, 1), BASIC | T),
    "resnet14t": ((1, 1, 1, 1), T),
    "resnet18": (D18, BASIC),
    "resnet18d": (D18, BASIC | D),
    "resnet26": (D26, {}),
    "resnet26d": (D26, D),
    "resnet26t": (D26, T),
    "resnet34": (D34, BASIC),
    "resnet34d": (D34, BASIC | D),
    "resnet50": (D50, {}),
    "resnet50_gn": (D50, {"norm": "group"}),
    "resnet50_v1": (D50, V1),
    "resnet50c": (D50, C),
    "resnet50d": (D50, D),
    "resnet50s": (D50, S),
    "resnet50t": (D50, T),
    "resnet50_keras": (D50, V1 | KERAS),
    "resnet101": (D101, {}),
    "resnet101_v1": (D101, V1),
    "resnet101c": (D101, C),
    "resnet101d": (D101, D),
    "resnet101s": (D101, S),
    "resnet101_keras": (D101, V1 | KERAS),
    "resnet152": (D152, {}),
    "resnet152_v1": (D152, V1),
    "resnet152c": (D152, C),
    "resnet152d": (D152, D),
    "resnet152s": (D152, S),
    "resnet152_keras": (D152, V1 | KERAS),
    "resnet200": (D200, {}),
    "resnet200d": (D200, D),
    "wide_resnet50_2": (D50, {"base_width": 128}),
    "wide_resnet101_2": (D101, {"base_width": 128}),
    "resnext50_32x4d": (D50, X4),
    "resnext50d_32x4d": (D50, X4 | D),
    "resnext101_32x4d": (D101, X4),
    "resnext101_32x8d": (D101, X8),
    "resnext101_32x16d": (D101, {"groups": 32, "base_width": 16}),
    "resnext101_32x32d": (D101, {"groups": 32, "base_width": 32}),
    "resnext101_64x4d": (D101, X64),
    "ecaresnet26t": (D26, ECA | T),
    "ecaresnet50d": (D50, ECA | D),
    "ecaresnet50t": (D50, ECA | T),
    "ecaresnet101d": (D101, ECA | D),
    "ecaresnet200d": (D200, ECA | D),
    "ecaresnet269d": (D269, ECA | D),
    "ecaresnetlight": ((1, 1, 11, 3), ECA | {"shortcut": "avg"}),
    "ecaresnext26t_32x4d": (D26, X4 | ECA | T),
    "ecaresnext50t_32x4d": (D50, X4 | ECA | T),
    "seresnet18": (D18, BASIC | SE),
    "seresnet34": (D34, BASIC | SE),
    "seresnet50": (D50, SE),
    "seresnet50t": (D50, SE | T),
    "seresnet101": (D101, SE),
    "seresnet152": (D152, SE),
    "seresnet152d": (D152, SE | D),
    "seresnet200d": (D200, SE | D),
    "seresnet269d": (D269, SE | D),
    "seresnext26d_32x4d": (D26, X4 | SE | D),
    "seresnext26t_32x4d": (D26, X4 | SE | T),
    "seresnext50_32x4d": (D50, X4 | SE),
    "seresnext101_32x4d": (D101, X4 | SE),
    "seresnext101_32x8d": (D101, X8 | SE),
    "seresnext101_64x4d": (D101, X64 | SE),
    "seresnext101d_32x8d": (D101, X8 | SE | D),
    "senet154": (D152, X64 | SE | S | {"shortcut": "conv3", "halve_reduce": True}),
    "resnetaa34d": (D34, BASIC | AA | D),
    "resnetaa50": (D50, AA),
    "resnetaa50d": (D50, AA | D),
    "resnetaa101d": (D101, AA | D),
    "seresnetaa50d": (D50, SE | AA | D),
    "seresnextaa101d_32x8d": (D101, X8 | SE | AA | D),
    "seresnextaa201d_32x8d": ((3, 24, 36, 4), X8 | SE | AA | D | S),
    "resnetblur18": (D18, BASIC | BLUR),
    "resnetblur50": (D50, BLUR),
    "resnetblur50d": (D50, BLUR | D),
    "resnetblur101d": (D101, BLUR | D),
    "resnetrs50": (D50, RS),
    "resnetrs101": (D101, RS),
    "resnetrs152": (D152, RS),
    "resnetrs200": (D200, RS),
    "resnetrs270": ((4, 29, 53, 4), RS),
    "resnetrs350": ((4, 36, 72, 4), RS),
    "resnetrs420": ((4, 44, 87, 4), RS),
    "resnetv2_50": (D50, PREACT),
    "resnetv2_50d": (D50, PREACT | D),
    "resnetv2_50t": (D50, PREACT | T),
    "resnetv2_50_keras": (D50, PREACT | KERAS | KERAS_V2),
    "resnetv2_101": (D101, PREACT),
    "resnetv2_101d": (D101, PREACT | D),
    "resnetv2_101_keras": (D101, PREACT | KERAS | KERAS_V2),
    "resnetv2_152": (D152, PREACT),
    "resnetv2_152d": (D152, PREACT | D),
    "resnetv2_152_keras": (D152, PREACT | KERAS | KERAS_V2),
    "test_resnet": (
        (1, 1, 1, 1),
        {
            "stem": StemSpec(widths=(16, 16, 32), kernel=3),
            "shortcut": "avg",
            "planes": (32, 48, 48, 96),
            "block": ("basic", "basic", "bottleneck", "basic"),
        },
    ),
}

CIFAR: dict[str, tuple[int, str, int]] = {  # name -> blocks a stage, block, expansion
    "resnet20_cifar": (3, "basic", 1),
    "resnet32_cifar": (5, "basic", 1),
    "resnet44_cifar": (7, "basic", 1),
    "resnet56_cifar": (9, "basic", 1),
    "resnet110_cifar": (18, "basic", 1),
    "resnet164_cifar": (18, "bottleneck", 4),
    "resnet1001_cifar": (111, "bottleneck", 4),
    "resnetv2_164_cifar": (18, "preact_bottleneck", 4),
    "resnetv2_1001_cifar": (111, "preact_bottleneck", 4),
}


def imagenet_spec(
    name: str,
    depths: tuple[int, ...],
    *,
    block: str | tuple[str, ...] = "bottleneck",
    planes: tuple[int, ...] = (64, 128, 256, 512),
    groups: int = 1,
    base_width: int = 64,
    halve_reduce: bool = False,
    strides: tuple[int, ...] = (1, 2, 2, 2),
    stride_block: Literal["first", "last"] = "first",
    **network: Any,
) -> NetSpec:
    """A row of TABLE as a spec: strip = planes × base_width / 64 × groups, outer = planes × expansion."""
    blocks = (block,) * len(depths) if isinstance(block, str) else block
    stages = []
    for depth, kind, plane, stride in zip(depths, blocks, planes, strides, strict=True):
        mid = plane * base_width // 64 * groups
        stages.append(
            StageSpec(
                depth=depth,
                mid=mid,
                out=plane if kind == "basic" else plane * 4,
                block=kind,
                stride=stride,
                stride_block=stride_block,
                groups=groups,
                reduce=mid // 2 if halve_reduce else 0,
            )
        )
    return NetSpec(name=name, stages=tuple(stages), **network)


def cifar_spec(name: str, depth: int, block: str, expansion: int) -> NetSpec:
    """A network for 32×32 pictures: stages of 16, 32 and 64 planes, and zero-padded shortcuts for basic blocks."""
    stages = tuple(
        StageSpec(depth=depth, mid=width, out=width * expansion, block=block, stride=stride)
        for width, stride in ((16, 1), (32, 2), (64, 2))
    )
    shortcut: Any = "pad" if block == "basic" else "conv1"
    return NetSpec(name=name, stem=CIFAR_STEM, stages=stages, shortcut=shortcut, num_classes=10)


def variant(name: str) -> NetSpec:
    """The spec of a named network; raises SpecError with the nearest names."""
    if name in TABLE:
        depths, options = TABLE[name]
        return imagenet_spec(name, depths, **options)
    if name in CIFAR:
        return cifar_spec(name, *CIFAR[name])
    if name.startswith("plain") and (twin := name.replace("plain", "resnet", 1)) in CIFAR:
        return replace(cifar_spec(name, *CIFAR[twin]), shortcut="none")
    near = difflib.get_close_matches(name, variants(), n=3) or ["resnet50"]
    raise SpecError(f"there is no network named {name!r}; did you mean {', '.join(near)}? `isthmus models` lists all")


def name_of(spec: NetSpec) -> str:
    """The name of the network of the table that this is but for classes, channels and drop path; empty if none."""

    def is_row(name: str) -> bool:
        row = variant(name)
        return row == replace(
            spec,
            name=name,
            num_classes=row.num_classes,
            in_channels=row.in_channels,
            drop_path=row.drop_path,
        )

    own = [spec.name] if spec.name in variants() else []  # where two rows are equal, its own name goes first
    return next((name for name in (*own, *variants()) if is_row(name)), "")


def variants(pattern: str = "*") -> list[str]:
    """Names of the table in its order; `pattern` is a shell pattern, or a part of the name."""
    names = [*TABLE, *CIFAR, *(name.replace("resnet", "plain", 1) for name in CIFAR)]
    if any(character in pattern for character in "*?["):
        return [name for name in names if fnmatchcase(name, pattern)]
    return [name for name in names if pattern in name]
