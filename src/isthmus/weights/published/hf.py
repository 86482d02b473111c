"""What a repository on the Hugging Face hub says of its weights: transformers' and timm's config files, both ways.

`config.json` names the network and its classes, `preprocessor_config.json` (timm: `pretrained_cfg`) how a picture
becomes its input. What our records cannot express is an error that names the field.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from isthmus.arch.preprocess import Preprocess
from isthmus.arch.spec import NetSpec, StageSpec, StemSpec
from isthmus.arch.variants import name_of, variant
from isthmus.errors import SpecError, WeightsError
from isthmus.messages import listed
from isthmus.records import to_dict
from isthmus.weights.published.catalog import IMAGENET_CLASSES

__all__ = ["Described", "from_config", "from_preprocessor", "from_pretrained_cfg", "to_config", "to_preprocessor"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """What a `config.json` says: the network, its preprocessing where that is in the same file, and its classes."""

    spec: NetSpec
    preprocess: Preprocess | None = None
    classes: tuple[str, ...] = ()


def from_config(config: Mapping[str, Any]) -> Described | None:
    """The network that a `config.json` of transformers' ResNet or of timm describes; None where it is another's.

    Raises WeightsError.
    """
    if config.get("model_type") == "resnet":
        return _from_transformers(config)
    return _from_timm(config) if "architecture" in config else None


# transformers' ResNet: https://github.com/huggingface/transformers, models/resnet/modeling_resnet.py


def _from_transformers(config: Mapping[str, Any]) -> Described:
    say = _Fields(config, "config.json")
    say.must("hidden_act", "relu", default="relu")  # another one would stand after a block and ReLU inside it
    block = say.one_of("layer_type", ("bottleneck", "basic"), default="bottleneck")
    widths = say.numbers("hidden_sizes", (256, 512, 1024, 2048))
    depths = say.numbers("depths", (3, 4, 6, 3))
    if len(widths) != len(depths):
        raise WeightsError(f"config.json has {len(widths)} hidden_sizes and {len(depths)} depths; they must be as many")
    first = 2 if config.get("downsample_in_first_stage", False) else 1
    early = config.get("downsample_in_bottleneck", False) and block == "bottleneck"
    classes = _id2label(config)
    headless = any(not name.endswith("ForImageClassification") for name in config.get("architectures") or ())
    spec = NetSpec(
        stem=StemSpec(widths=(say.number("embedding_size", 64),)),
        stages=tuple(
            StageSpec(
                depth=depth,
                mid=width // 4 if block == "bottleneck" else width,
                out=width,
                block=block,
                stride=2 if index else first,
            )
            for index, (depth, width) in enumerate(zip(depths, widths, strict=True))
        ),
        stride_at="conv1" if early else "conv2",
        in_channels=say.number("num_channels", 3),
        num_classes=0 if headless else len(classes),
    )
    return Described(spec=replace(spec, name=name_of(spec)), classes=() if headless else _own(classes))


def _own(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of classes, none where they are those that transformers makes up."""
    return () if all(name == f"LABEL_{index}" for index, name in enumerate(names)) else names


def _id2label(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes in their order; LABEL_0, … where there are none."""
    given = config.get("id2label")
    if given is None:
        return tuple(f"LABEL_{index}" for index in range(config.get("num_labels", 2)))  # 2 is transformers' default
    try:
        names = {int(index): str(name) for index, name in given.items()}
    except (AttributeError, ValueError) as error:
        raise WeightsError(f"config.json: id2label is {given!r}; it must map each class number to a name") from error
    if sorted(names) != list(range(len(names))):
        raise WeightsError(f"config.json: id2label numbers its {len(names)} classes with gaps; they must run from 0")
    return tuple(names[index] for index in range(len(names)))


def to_config(spec: NetSpec, classes: Sequence[str] = ()) -> dict[str, Any]:
    """The `config.json` of a network for transformers' ResNet; raises WeightsError naming what that cannot express."""
    names = classes or [f"LABEL_{index}" for index in range(spec.num_classes)]
    config = {
        "architectures": ["ResNetForImageClassification" if spec.num_classes else "ResNetModel"],
        "model_type": "resnet",
        "num_channels": spec.in_channels,
        "embedding_size": spec.stem.widths[-1],
        "hidden_sizes": [stage.out for stage in spec.stages],
        "depths": [stage.depth for stage in spec.stages],
        "layer_type": "basic" if spec.stages[0].block == "basic" else "bottleneck",
        "hidden_act": "relu",
        "downsample_in_first_stage": spec.stages[0].stride == 2,
        "downsample_in_bottleneck": spec.stride_at == "conv1",
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }
    # What was written says what would be read; all that differs is what transformers has no word for.
    wanted = _flat(to_dict(replace(spec, name="", drop_path=0.0)))
    read = _flat(to_dict(replace(_from_transformers(config).spec, name="")))
    if lost := [name for name in wanted if wanted[name] != read.get(name)]:
        raise WeightsError(
            f"transformers' ResNet cannot express {spec.name or 'this network'}: "
            + listed(
                (f"{name} is {wanted[name]} and would become {read.get(name, 'nothing')}" for name in lost), 3, "; "
            )
            + "; save it with layout='native'"
        )
    return config


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    """Every single setting of nested tables and lists, under its dotted path."""
    if not isinstance(values, dict | list):
        return {path: values}
    rows = values.items() if isinstance(values, dict) else enumerate(values)
    return {key: value for name, row in rows for key, value in _flat(row, f"{path}.{name}".lstrip(".")).items()}


_PROCESSORS = ("ConvNext", "Bit", "ViT", "CLIP")  # the first crops by a ratio, the others by fields
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def from_preprocessor(config: Mapping[str, Any]) -> Preprocess:
    """The record of a `preprocessor_config.json` of transformers' ConvNext, Bit, ViT or CLIP processor.

    Pixels are equal to theirs but for rounding, and for one pixel of shift where an odd rest is cut off. Raises
    WeightsError.
    """
    say = _Fields(config, "preprocessor_config.json")
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
    if not kind.startswith(_PROCESSORS):
        raise WeightsError(
            f"preprocessor_config.json is for {kind}, and what can be read here is {', '.join(_PROCESSORS)}; load the "
            f"weight file alone and set net.preprocess"
        )
    say.must("do_resize", True, default=True)
    say.must("do_rescale", True, default=True)
    if not math.isclose(config.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise say.unsupported("rescale_factor", "1/255")
    resize, squash = _size("size", say, square=kind.startswith("ViT"))
    crop = resize
    if kind.startswith("ConvNext"):
        squash = resize >= 384
        resize = resize if squash else int(resize / (config.get("crop_pct") or 224 / 256))
    elif config.get("do_center_crop", False):
        crop, _ = _size("crop_size", say, square=True)
    elif not squash:
        raise say.unsupported("do_center_crop", "true where size is the shortest_edge")
    normalises = config.get("do_normalize", True)
    try:
        return Preprocess(
            resize=resize,
            crop=crop,
            squash=squash,
            interpolation=_RESAMPLE[say.one_of("resample", tuple(_RESAMPLE))],  # type: ignore[arg-type]
            mean=tuple(config["image_mean"]) if normalises else (0.0, 0.0, 0.0),
            std=tuple(config["image_std"]) if normalises else (1.0, 1.0, 1.0),
        )
    except KeyError as error:
        raise say.unsupported(error.args[0], "three numbers") from error
    except (SpecError, TypeError) as error:
        raise WeightsError(f"preprocessor_config.json: {error}") from error


def _size(name: str, say: "_Fields", *, square: bool) -> tuple[int, bool]:
    """Pixels, and whether both sides get them."""
    given = say.values.get(name)
    if isinstance(given, int):
        return given, square
    if isinstance(given, Mapping):
        if isinstance(side := given.get("shortest_edge"), int) and not given.get("longest_edge"):
            return side, False
        if isinstance(side := given.get("height"), int) and side == given.get("width"):
            return side, True
    raise say.unsupported(name, "one number, a shortest_edge, or an equal height and width")


def to_preprocessor(preprocess: Preprocess) -> dict[str, Any]:
    """The `preprocessor_config.json` of a record, for transformers' BitImageProcessor; raises WeightsError.

    The `views` that a prediction averages over are left out: transformers has no such thing.
    """
    if preprocess.channels != "RGB":
        raise WeightsError(
            f"transformers' processors give RGB, and this network takes {preprocess.channels}; save it with "
            f"layout='native' (`isthmus weights convert` can turn BGR round)"
        )
    side = preprocess.resize
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side} if preprocess.squash else {"shortest_edge": side},
        "resample": {name: number for number, name in _RESAMPLE.items()}[preprocess.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": preprocess.crop, "width": preprocess.crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


# timm: https://github.com/huggingface/pytorch-image-models, timm/models/_hub.py and timm/data/transforms_factory.py


_TRAINING_ONLY = ("num_classes", "drop_rate", "drop_path_rate", "drop_block_rate", "zero_init_last")


def _from_timm(config: Mapping[str, Any]) -> Described:
    cfg = config.get("pretrained_cfg", config)  # older files have one level
    args = dict(config.get("model_args") or {})
    try:
        spec = variant(str(config["architecture"]))
        if "output_stride" in args:
            spec = spec.with_output_stride(args.pop("output_stride"))
    except SpecError as error:
        raise WeightsError(f"config.json: {error}") from error
    classes = config.get("num_classes", cfg.get("num_classes", 1000))
    channels = args.pop("in_chans", cfg.get("input_size", (3,))[0])
    pool = args.pop("global_pool", config.get("global_pool", "avg"))
    if classes and pool != "avg":
        raise WeightsError(f"config.json: global_pool is {pool!r}; what can be read here is 'avg'")
    if others := [name for name in args if name not in _TRAINING_ONLY]:  # each may change what the network computes
        raise WeightsError(
            f"config.json: model_args has {', '.join(others)}; what can be read here is in_chans, num_classes, "
            f"global_pool and output_stride"
        )
    return Described(
        spec=replace(spec, num_classes=classes, in_channels=channels),
        preprocess=from_pretrained_cfg(cfg) if channels == 3 else None,
        classes=_label_names(config.get("label_names", cfg.get("label_names")), classes, str(cfg.get("tag", ""))),
    )


def _label_names(given: Any, count: int, tag: str) -> tuple[str, ...]:
    """Names of the classes: as given, or ImageNet's where timm's tag says that the weights end there."""
    if given:
        values = given.values() if isinstance(given, Mapping) else given
        return _own(tuple(map(str, values))) if len(given) == count else ()
    return IMAGENET_CLASSES if count == 1000 and "in1k" in tag else ()


def from_pretrained_cfg(cfg: Mapping[str, Any]) -> Preprocess:
    """The record of timm's `pretrained_cfg`, at its `input_size` and not at `test_input_size`; raises WeightsError."""
    say = _Fields(cfg, "pretrained_cfg")
    mode = say.one_of("crop_mode", ("center", "squash"), default="center")
    try:
        _, height, width = cfg["input_size"]
        if height != width:
            raise say.unsupported("input_size", f"square, and is {height}×{width}")
        return Preprocess(
            resize=math.floor(height / cfg["crop_pct"]),  # down, as timm does
            crop=height,
            squash=mode == "squash",
            interpolation=cfg["interpolation"],
            mean=tuple(cfg["mean"]),
            std=tuple(cfg["std"]),
        )
    except KeyError as error:
        raise WeightsError(f"pretrained_cfg has no {error.args[0]!r}; set net.preprocess yourself") from error
    except (SpecError, TypeError, ValueError, ArithmeticError) as error:
        raise WeightsError(f"pretrained_cfg: {error}") from error


@dataclass(frozen=True)
class _Fields:
    """Fields of a config file, each checked where it is read."""

    values: Mapping[str, Any]
    file: str

    def unsupported(self, name: str, wanted: str) -> WeightsError:
        return WeightsError(f"{self.file}: {name} is {self.values.get(name)!r}; what can be read here is {wanted}")

    def must(self, name: str, wanted: Any, *, default: Any) -> None:
        if self.values.get(name, default) != wanted:
            raise self.unsupported(name, repr(wanted))

    def one_of(self, name: str, choices: tuple[Any, ...], *, default: Any = None) -> Any:
        value = self.values.get(name, default)
        if value not in choices:
            raise self.unsupported(name, " or ".join(map(str, choices)))
        return value

    def number(self, name: str, default: int) -> int:
        value = self.values.get(name, default)
        if type(value) is not int or value < 1:
            raise self.unsupported(name, "a whole number above 0")
        return value

    def numbers(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        value = self.values.get(name, default)
        if not isinstance(value, list | tuple) or not value or any(type(n) is not int or n < 1 for n in value):
            raise self.unsupported(name, "a list of whole numbers above 0")
        return tuple(value)
