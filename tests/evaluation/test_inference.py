"""A network ready to run gives the logits of the plain one, and the plain one stays as it is."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.arch.preprocess import IMAGENET
from isthmus.arch.spec import HeadSpec, StageSpec
from isthmus.data.loader import Loader
from isthmus.data.pictures import Pictures
from isthmus.data.transform import normalise
from isthmus.errors import DataError
from isthmus.evaluation.inference import Inference
from isthmus.nn.fold import fold
from isthmus.nn.network import ResNet
from isthmus.runtime import machine
from oracles import relative_error
from small_runs import SPEC, copied, network, same

IMAGES = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PREACT = tuple(StageSpec(depth=1, mid=8, out=width, stride=2, block="preact_bottleneck") for width in (16, 32))
SPECS = {
    "batch norm": SPEC,
    "basic blocks": replace(SPEC, stages=tuple(replace(stage, block="basic", out=stage.mid) for stage in SPEC.stages)),
    "pre-activation": replace(SPEC, stages=PREACT),
    "group norm": replace(
        SPEC,
        norm="group",
        stem=replace(SPEC.stem, widths=(32,)),
        stages=tuple(replace(stage, mid=32, out=64) for stage in SPEC.stages),
    ),
    "attention": replace(SPEC, attention="se", attention_ratio=0.25),
    "anti-alias": replace(SPEC, anti_alias="blur"),
    "deep head": replace(SPEC, head=HeadSpec(taps=("layer1", "last"), pools=("avg", "max"), hidden=12)),
    "drop path": replace(SPEC, drop_path=0.5),
}


def plain(net: ResNet, images: torch.Tensor) -> torch.Tensor:
    """The network itself, evaluating, in fp32, averaged over its views."""
    flips = {"identity": (), "hflip": (-1,), "vflip": (-2,), "rot180": (-1, -2)}
    with torch.no_grad():
        views = [net.eval()(normalise(images.flip(flips[view]), net.preprocess)) for view in net.preprocess.views]
    return torch.stack(views).mean(0)


@pytest.mark.parametrize("views", [("identity",), ("identity", "hflip"), ("hflip", "vflip", "rot180")])
@pytest.mark.parametrize("name", SPECS)
def test_logits_are_those_of_the_plain_network(name, views):
    net = network(SPECS[name])
    net.preprocess = replace(net.preprocess, views=views)
    before, mode = copied(net), net.train().training
    runner = Inference(net, machine("cpu"), "fp32")
    assert same(before, copied(net))
    assert net.training is mode
    assert all(parameter.requires_grad for parameter in net.parameters())
    found = runner.logits(IMAGES)
    assert relative_error(found, plain(net, IMAGES)) <= 1e-5
    assert same(before, copied(net))
    assert found.dtype == torch.float32


def test_a_folded_network_runs_too():
    net = network()
    assert relative_error(Inference(fold(net), machine("cpu"), "fp32").logits(IMAGES), plain(net, IMAGES)) <= 1e-5


def test_a_later_change_of_the_network_is_not_seen():
    net = network()
    runner = Inference(net, machine("cpu"), "fp32")
    before = runner.logits(IMAGES)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.zero_()
    assert torch.equal(runner.logits(IMAGES), before)


@pytest.mark.parametrize("name", ["batch norm", "pre-activation", "group norm"])
def test_half_precision_is_close(name):
    net = network(SPECS[name])
    found = Inference(net, machine("cpu"), "bf16").logits(IMAGES)
    assert found.dtype == torch.float32
    assert 0 < relative_error(found, plain(net, IMAGES)) < 0.05


def test_pooled_is_what_the_classifier_sees():
    net = network(SPECS["deep head"])
    with torch.no_grad():
        wanted = net.pooled(normalise(IMAGES, net.preprocess))
        found = Inference(net, machine("cpu"), "fp32").net.pooled(normalise(IMAGES, net.preprocess))
    assert relative_error(found, wanted) <= 1e-5


def test_grey_pictures_and_other_channel_orders():
    grey = network(replace(SPEC, in_channels=1))
    grey.preprocess = replace(IMAGENET.at(32), channels="L", mean=(0.5,), std=(0.2,))
    images = IMAGES[:, :1]
    assert relative_error(Inference(grey, machine("cpu"), "fp32").logits(images), plain(grey, images)) <= 1e-5
    colour = network()
    colour.preprocess = replace(colour.preprocess, channels="BGR")
    runner = Inference(colour, machine("cpu"), "fp32")
    assert relative_error(runner.logits(IMAGES), plain(colour, IMAGES)) <= 1e-5
    with pytest.raises(DataError, match="3 channels"):
        runner.logits(images)


def test_a_loader_gives_batches_and_scores(tmp_path):
    paths = []
    for index, image in enumerate(IMAGES):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(paths[-1])
    net = network(replace(SPEC, num_classes=3))
    net.preprocess = replace(net.preprocess, resize=32, crop=32)
    wanted = plain(net, IMAGES)
    labels = wanted.argmax(1)
    labels[0] = (labels[0] + 1) % 3
    pictures = Pictures.of_files(paths, labels.tolist(), ("a", "b", "c"))
    loader = Loader(pictures=pictures, record=net.preprocess, batch_size=2, train=False)
    runner = Inference(net, machine("cpu"), "fp32")
    found = list(runner.run(loader.epoch(0)))
    assert torch.cat([batch.indices for batch, _ in found]).tolist() == list(range(5))
    assert relative_error(torch.cat([logits for _, logits in found]), wanted) <= 1e-5
    tally = runner.evaluate(loader)
    assert (tally.correct, tally.seen) == (4, 5)
    assert tally.loss == pytest.approx(float(torch.nn.functional.cross_entropy(wanted, labels)), rel=1e-5)
