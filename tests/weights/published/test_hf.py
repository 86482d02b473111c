"""Config files of transformers and timm, both ways, against the libraries that read and write them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    ViTImageProcessor,
)

from isthmus.arch.plan import plan
from isthmus.arch.preprocess import Preprocess
from isthmus.arch.variants import variant, variants
from isthmus.data.transform import evaluation_transform, normalise
from isthmus.errors import WeightsError
from isthmus.nn.network import ResNet
from isthmus.weights import layouts
from isthmus.weights.load import load, read_network
from isthmus.weights.published import catalog, hf
from oracles import ours, picture, random_state, randomise, relative_error

EXPRESSIBLE = (
    "resnet18",
    "resnet26",
    "resnet34",
    "resnet50",
    "resnet50_v1",
    "resnet101",
    "resnet101_v1",
    "resnet152",
    "resnet152_v1",
    "resnet200",
)
SMALL = {
    "basic": {"layer_type": "basic", "hidden_sizes": [16, 32, 48], "depths": [1, 2, 1], "embedding_size": 16},
    "bottleneck": {"hidden_sizes": [32, 64], "depths": [2, 2], "embedding_size": 8, "num_labels": 5},
    "stride on the 1×1": {"hidden_sizes": [32, 64], "depths": [1, 2], "downsample_in_bottleneck": True},
    "first stage strides": {"hidden_sizes": [64, 96], "depths": [2, 1], "downsample_in_first_stage": True},
    "equal widths": {"layer_type": "basic", "hidden_sizes": [16, 16], "depths": [1, 1], "embedding_size": 16},
    "one channel, names": {"hidden_sizes": [32], "depths": [2], "num_channels": 1, "id2label": {0: "ok", 1: "broken"}},
}


# -- transformers: networks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_a_network_of_the_table_there_and_back(name):
    spec = replace(variant(name), num_classes=3, in_channels=1)
    config = hf.to_config(spec, ("a", "b", "c"))
    said = hf.from_config(json.loads(json.dumps(config)))
    assert (said.spec, said.classes) == (spec, ("a", "b", "c"))
    theirs = ResNetConfig(**config)
    assert (theirs.num_labels, theirs.id2label) == (3, {0: "a", 1: "b", 2: "c"})
    assert hf.from_config(theirs.to_dict()) == said


def test_what_transformers_cannot_express_is_named():
    for name in set(variants()) - set(EXPRESSIBLE):
        with pytest.raises(WeightsError, match=r"cannot express .* would become .*; save it with layout='native'"):
            hf.to_config(variant(name))
    with pytest.raises(WeightsError, match="cannot express seresnet50: attention is se and would become none"):
        hf.to_config(variant("seresnet50"))
    dilated = variant("resnet50").with_output_stride(16)
    with pytest.raises(WeightsError, match=r"stages.3.stride is 1 and would become 2; stages.3.dilation is 2"):
        hf.to_config(dilated)


@pytest.mark.parametrize("kind", SMALL)
def test_transformers_own_folder(kind, tmp_path):
    theirs = randomise(ResNetForImageClassification(ResNetConfig(**SMALL[kind]))).float()  # as published
    theirs.save_pretrained(tmp_path)
    net, report = read_network(tmp_path)
    assert report.layout == "transformers"
    assert not report.assumed
    pictures = picture(2, theirs.config.num_channels, 65, 65)
    with torch.no_grad():
        assert relative_error(net.double()(pictures), theirs.double()(pictures).logits) <= 1e-8
    assert net.classes == (("ok", "broken") if "names" in kind else ())


def test_a_folder_without_a_classifier(tmp_path):
    theirs = randomise(ResNetModel(ResNetConfig(**SMALL["bottleneck"]))).float()
    theirs.save_pretrained(tmp_path)
    net = load(tmp_path)
    assert net.spec.num_classes == 0
    with torch.no_grad():
        wanted = theirs.double()(picture(1, 3, 65, 65)).pooler_output.flatten(1)
        assert relative_error(net.double()(picture(1, 3, 65, 65)), wanted) <= 1e-8


@pytest.mark.parametrize("name", ["resnet18", "resnet26", "resnet50_v1"])
def test_transformers_loads_what_we_describe(name, tmp_path):
    spec = replace(variant(name), num_classes=4)
    with torch.device("meta"):
        empty = ResNet(plan(spec))
    net = ours(spec, 65, random_state(empty))
    tensors = layouts.from_native(net.state_dict(), "transformers", spec).tensors
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    (tmp_path / "config.json").write_text(json.dumps(hf.to_config(spec, "abcd")))
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert theirs.config.id2label[3] == "d"
    with torch.no_grad():
        assert relative_error(theirs(picture(1, 3, 65, 65)).logits, net(picture(1, 3, 65, 65))) <= 1e-8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; what can be read here is 'relu'"),
        ({"layer_type": "wide"}, "layer_type is 'wide'; what can be read here is bottleneck or basic"),
        ({"depths": [3, 4]}, "has 4 hidden_sizes and 2 depths"),
        ({"depths": [3, 4, 6, 0]}, r"depths is \[3, 4, 6, 0\]; what can be read here is a list of whole numbers"),
        ({"embedding_size": "64"}, "embedding_size is '64'"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label numbers its 2 classes with gaps"),
        ({"id2label": ["a"]}, "id2label is .*; it must map each class number to a name"),
    ],
)
def test_config_fields_that_cannot_be_read(change, message):
    with pytest.raises(WeightsError, match=message):
        hf.from_config(hf.to_config(variant("resnet50")) | change)


def test_another_models_config_is_nobodys():
    assert hf.from_config({"model_type": "bert"}) is None


# -- transformers: pictures ------------------------------------------------------------------------------------------

PROCESSORS = {
    "convnext": ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875),
    "convnext, 0.9": ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.9, resample=2),
    "convnext, squashed": ConvNextImageProcessor(size={"shortest_edge": 384}),
    "bit": BitImageProcessor(size={"shortest_edge": 256}, resample=2),
    "bit, squashed": BitImageProcessor(size={"height": 256, "width": 256}),
    "clip": CLIPImageProcessor(),
    "vit": ViTImageProcessor(),
    "vit, not normalised": ViTImageProcessor(do_normalize=False),
}


def photo(width: int, height: int) -> Image.Image:
    """Smooth and sharp at once: waves, an edge and noise."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 13)], -1) * 60 + 128
    waves[height // 3 :, width // 2 :] = 255 - waves[height // 3 :, width // 2 :]
    noise = np.random.default_rng(0).integers(-8, 8, waves.shape)
    return Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8))


def seen_by_us(record: Preprocess, image: Image.Image) -> torch.Tensor:
    return normalise(evaluation_transform(record)(np.asarray(image))[None], record)


def steps_apart(record: Preprocess, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """How far each pixel is, in steps of 1/255 of the picture."""
    assert ours.shape == theirs.shape
    return ((ours - theirs) * torch.tensor(record.std).view(1, -1, 1, 1)).abs() * 255


def assert_equal_but_for_rounding(record: Preprocess, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Torchvision's and Pillow's filters round twice each, in another order: a step for most pixels, two for a few."""
    steps = steps_apart(record, ours, theirs)
    assert steps.max() < 2.01
    assert (steps > 1.01).float().mean() < 1e-3
    assert steps.mean() < 0.25


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_processor_of_transformers(kind):
    theirs = PROCESSORS[kind]
    record = hf.from_preprocessor(json.loads(theirs.to_json_string()))
    image = photo(480, 320)
    wanted = theirs(image, return_tensors="pt")["pixel_values"]
    assert_equal_but_for_rounding(record, seen_by_us(record, image), wanted)


RECORDS = (
    Preprocess(),
    Preprocess(resize=232, crop=224),
    Preprocess(resize=236, crop=224, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3),
    Preprocess(resize=288, crop=288, interpolation="bicubic"),
    Preprocess(resize=256, crop=224, squash=True),
)


@pytest.mark.parametrize("record", RECORDS, ids=str)
def test_transformers_loads_our_preprocessing(record, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(hf.to_preprocessor(record)))
    theirs = AutoImageProcessor.from_pretrained(tmp_path)
    image = photo(480, 320)
    through_pillow = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    wanted = through_pillow(image, return_tensors="pt")["pixel_values"]
    assert steps_apart(record, seen_by_us(record, image), wanted).max() < 1e-3
    wanted = theirs(image, return_tensors="pt")["pixel_values"]
    assert_equal_but_for_rounding(record, seen_by_us(record, image), wanted)
    assert hf.from_preprocessor(hf.to_preprocessor(record)) == record
    assert hf.from_preprocessor(json.loads(theirs.to_json_string())) == record


def test_the_files_that_microsofts_repositories_hold():
    """microsoft/resnet-50's own, written in 2022: one number as the size, a name of then."""
    said = hf.from_preprocessor(
        {
            "crop_pct": 0.875,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "ConvNextFeatureExtractor",
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "resample": 3,
            "size": 224,
        }
    )
    assert said == catalog.CATALOG["hf:microsoft/resnet-50"].preprocess


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image_processor_type": "DetrImageProcessor"},
            "is for DetrImageProcessor, and what can be read here is ConvN",
        ),
        ({"do_resize": False}, "do_resize is False; what can be read here is True"),
        ({"do_rescale": False}, "do_rescale is False"),
        ({"rescale_factor": 1 / 127.5}, r"rescale_factor is 0.0078.*; what can be read here is 1/255"),
        ({"resample": 1}, "resample is 1; what can be read here is 2 or 3"),
        ({"size": {"height": 224, "width": 200}}, "size is .*; what can be read here is one number, a shortest_edge"),
        ({"do_center_crop": False}, "do_center_crop is False; what can be read here is true where"),
        ({"image_mean": [0.5]}, "preprocessor_config.json: preprocess has 1 means"),
        ({"crop_size": 512}, "preprocessor_config.json: preprocess crops 512 px out of 256 px"),
    ],
)
def test_preprocessor_fields_that_cannot_be_read(change, message):
    with pytest.raises(WeightsError, match=message):
        hf.from_preprocessor(hf.to_preprocessor(Preprocess()) | change)


def test_other_channels_have_no_processor():
    for record in (Preprocess(channels="BGR"), Preprocess(channels="L", mean=(0.5,), std=(0.5,))):
        with pytest.raises(WeightsError, match=f"give RGB, and this network takes {record.channels}; save it with"):
            hf.to_preprocessor(record)


# -- timm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet10t", {}),
        ("resnet18", {"num_classes": 7, "in_chans": 1}),
        ("seresnet18", {"num_classes": 3}),
        ("resnet26d", {"output_stride": 16}),
        ("resnetv2_50", {"num_classes": 2}),
    ],
)
def test_a_folder_of_timm(name, options, tmp_path):
    theirs = timm.create_model(name, **options)
    randomise(theirs).float()
    save_for_hf(theirs, tmp_path, safe_serialization=True)
    net, report = read_network(tmp_path)
    assert not report.assumed or options.get("in_chans")
    assert net.spec.name == name
    shape = (1, net.spec.in_channels, 97, 97)
    with torch.no_grad():
        assert relative_error(net.double()(picture(*shape)), theirs.double()(picture(*shape))) <= 1e-8


@pytest.mark.parametrize("tag", ["resnet18.a1_in1k", "resnet10t.c3_in1k", "resnet50.tv2_in1k", "resnetv2_50.a1h_in1k"])
def test_timms_preprocessing(tag):
    cfg = timm.models.get_pretrained_cfg(tag).to_dict()
    record = hf.from_pretrained_cfg(cfg)
    theirs = timm.data.create_transform(
        **{name: cfg[name] for name in ("input_size", "interpolation", "crop_pct", "mean", "std")}, is_training=False
    )
    image = photo(480, 320)
    assert steps_apart(record, seen_by_us(record, image), theirs(image)[None]).max() < 1e-3


def test_timms_labels():
    config = {"architecture": "resnet18", "num_classes": 2, "pretrained_cfg": {"tag": "mine"} | PRETRAINED}
    assert hf.from_config(config | {"label_names": ["cat", "dog"]}).classes == ("cat", "dog")
    assert hf.from_config(config).classes == ()
    one_level = {"architecture": "resnet18", "num_classes": 1000, "tag": "a1_in1k"} | PRETRAINED
    assert hf.from_config(one_level).classes == catalog.IMAGENET_CLASSES


PRETRAINED = {
    "input_size": [3, 224, 224],
    "interpolation": "bicubic",
    "crop_pct": 0.95,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "resnet51"}, "there is no network named 'resnet51'; did you mean"),
        (
            {"model_args": {"act_layer": "silu"}},
            "model_args has act_layer; what can be read here is in_chans, num_classes",
        ),
        ({"global_pool": "max"}, "global_pool is 'max'; what can be read here is 'avg'"),
        ({"pretrained_cfg": PRETRAINED | {"crop_mode": "border"}}, "crop_mode is 'border'"),
        ({"pretrained_cfg": PRETRAINED | {"interpolation": "random"}}, "pretrained_cfg: interpolation is 'random'"),
        (
            {"pretrained_cfg": PRETRAINED | {"input_size": [3, 224, 192]}},
            "input_size is .*; what can be read here is square",
        ),
        ({"pretrained_cfg": {"input_size": [3, 224, 224]}}, "pretrained_cfg has no 'crop_pct'; set net.preprocess"),
    ],
)
def test_timm_fields_that_cannot_be_read(change, message):
    with pytest.raises(WeightsError, match=message):
        hf.from_config({"architecture": "resnet18", "pretrained_cfg": PRETRAINED} | change)
