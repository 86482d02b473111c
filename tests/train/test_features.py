"""Features of a frozen trunk: those of the network itself, whatever the order, the cache or an interruption did."""

from dataclasses import replace

import pytest
import torch

import isthmus
from isthmus.arch.spec import HeadSpec
from isthmus.data.decode import decode
from isthmus.data.pictures import Pictures
from isthmus.data.transform import evaluation_transform, normalise
from isthmus.errors import DataError
from isthmus.evaluation.inference import Inference
from isthmus.train import features
from isthmus.train.features import cache_folder, extract, with_head
from isthmus.train.reporter import Reporter
from small_runs import Recorder, copied, network, paths, same

BOTH = HeadSpec(taps=("layer1", "last"), pools=("avg", "max"))


@pytest.fixture
def reader():
    net = with_head(network(), BOTH, 0)
    net.preprocess = replace(net.preprocess, views=("identity", "hflip"))
    return net


@pytest.fixture
def read(reader, data, here):
    """Extracts in fp32, from a given network and pictures or from the usual ones."""

    def call(net=reader, pictures: Pictures = data.train, reporter: Reporter | None = None, precision="fp32"):
        return extract(net, pictures, here, precision, 4, reporter or Reporter())

    return call


@pytest.fixture
def counted(monkeypatch):
    """How many pictures (in views) went through a network."""
    seen, pooled = [], Inference.pooled
    monkeypatch.setattr(Inference, "pooled", lambda self, images: seen.append(len(images)) or pooled(self, images))
    return seen


def test_equal_to_pooling_the_maps(read, reader, data):
    found = read()
    transform = evaluation_transform(reader.preprocess)
    for index, path in enumerate(paths(data.train)):
        image = normalise(transform(decode(path))[None], reader.preprocess)
        for view, x in enumerate((image, image.flip(-1))):
            with torch.no_grad():
                maps = reader.features(x, ("layer1", "last"))
            wanted = [value for each in maps.values() for value in (each.mean((2, 3)), each.flatten(2).max(2).values)]
            assert torch.allclose(found[view, index], torch.cat(wanted, 1)[0], rtol=1e-4, atol=1e-5)
    assert found.shape == (2, len(data.train), 2 * (16 + 32))
    assert found.dtype == torch.float32


def test_order_of_pictures_is_irrelevant(read, data, cache):
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0)).tolist()
    found = read()
    again = read(pictures=data.train.subset(order))
    assert torch.equal(again, found[:, order])
    assert len(list(cache_folder().iterdir())) == 1
    for path in cache_folder().iterdir():
        path.unlink()
    assert torch.equal(read(pictures=data.train.subset(order)), found[:, order])


def test_a_second_call_runs_no_network(read, counted, data):
    found = read()
    assert sum(counted) == 2 * len(data.train)
    counted.clear()
    assert torch.equal(read(), found)
    assert not counted


def test_an_interrupted_extraction_goes_on(read, counted, data, reader):
    class Stops(Reporter):
        def progress(self, task, done, total):
            if done == 12:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(reporter=Stops())
    assert sum(counted) == 2 * 12
    counted.clear()
    recorder = Recorder()
    found = read(reporter=recorder)
    assert sum(counted) == 2 * (len(data.train) - 12)
    assert recorder.steps[-1] == ("features in 2 views", len(data.train), len(data.train))
    for path in cache_folder().iterdir():
        path.unlink()
    assert torch.equal(read(), found)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no checkpoint"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "a number": lambda path: torch.save(3, path),
    "another file": lambda path: torch.save({"schema": 1}, path),
    "other pictures": lambda path: torch.save({"schema": 1, "done": 2, "values": torch.zeros(1, 2, 3)}, path),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_ignored(read, counted, data, damage):
    found = read()
    (path,) = cache_folder().iterdir()
    DAMAGE[damage](path)
    counted.clear()
    assert torch.equal(read(), found)
    assert sum(counted) == 2 * len(data.train)
    counted.clear()
    assert torch.equal(read(), found)  # and it was replaced
    assert not counted


def test_a_cache_that_cannot_be_written_is_said(read, cache):
    cache.write_text("a file where the folder should be")
    recorder = Recorder()
    found = read(reporter=recorder)
    assert bool(torch.isfinite(found).all())
    assert "not kept" in recorder.lines[0]
    assert "ISTHMUS_CACHE" in recorder.lines[0]
    assert len(recorder.lines) == 1


def test_whatever_decides_them_makes_another_key(reader, data, tmp_path):
    def key(net=reader, pictures=data.train, precision="fp32"):
        return features.fingerprint(net, pictures, precision)

    usual = key()
    assert key() == usual
    keys = {"usual": usual, "precision": key(precision="bf16"), "fewer": key(pictures=data.train.subset(range(5)))}
    for name, tensor in reader.state_dict().items():
        if tensor.is_floating_point() and name in ("conv1.weight", "layer2.0.bn3.running_var"):
            before = tensor.flatten()[0].clone()
            tensor.view(-1)[0] = torch.nextafter(before, before + 1)
            keys[name] = key()
            tensor.view(-1)[0] = before
    assert key() == usual
    record = reader.preprocess
    for change in ({"interpolation": "bicubic"}, {"views": ("identity",)}, {"mean": (0.5, 0.5, 0.5)}, {"resize": 40}):
        reader.preprocess = replace(record, **change)
        keys[str(change)] = key()
    reader.preprocess = record
    other = with_head(network(), HeadSpec(taps=("last",)), 0)
    other.preprocess = record
    keys["head"] = key(other)
    copy = tmp_path / "copy.png"
    files = paths(data.train)
    moved = Pictures.of_files((copy, *files[1:]), data.train.labels, data.train.classes)
    copy.write_bytes(files[0].read_bytes())
    keys["path"] = key(pictures=moved)
    copy.write_bytes(files[1].read_bytes() + b" ")
    keys["content"] = key(pictures=moved)
    assert len(set(keys.values())) == len(keys), keys
    assert len(keys) == 12


def test_a_picture_that_is_gone_is_named(read, data, tmp_path):
    files = (tmp_path / "gone.png", *paths(data.train)[1:])
    gone = Pictures.of_files(files, data.train.labels, data.train.classes)
    with pytest.raises(DataError, match=r"gone\.png"):
        read(pictures=gone)


@pytest.mark.parametrize(
    ("head", "stages"),
    [
        (HeadSpec(taps=("stem",)), 1),
        (HeadSpec(taps=("layer1",), pools=("max",)), 1),
        (HeadSpec(taps=("layer2", "layer1"), pools=("avg", "max")), 2),
        (HeadSpec(taps=("layer1", "last")), 4),
        (HeadSpec(hidden=6), 4),
    ],
)
def test_another_head_on_the_same_trunk(head, stages):
    net = isthmus.create("test_resnet").eval()
    before = copied(net)
    other = with_head(net, head, 5)
    assert len(other.stages) == stages
    assert same(before, copied(net))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(other.pooled(x), pooled(net, x, head))
        assert other(x).shape == (2, 5)
    shared = {name: tensor.data_ptr() for name, tensor in net.state_dict().items()}
    for name, tensor in other.state_dict().items():
        assert name.startswith("fc.") or tensor.data_ptr() == shared[name], name
    assert (other.preprocess, other.training) == (net.preprocess, False)


def pooled(net, x, head):
    """By a second way: every map of the network, pooled here."""
    maps = net.features(x)
    ways = {"avg": lambda each: each.flatten(2).mean(2), "max": lambda each: each.amax((2, 3))}
    return torch.cat([ways[pool](maps[tap]) for tap in head.taps for pool in head.pools], 1)


def test_a_preactivation_trunk_keeps_its_final_norm():
    net = isthmus.create(
        replace(isthmus.variant("resnetv2_50"), stages=isthmus.variant("resnetv2_50").stages[:2])
    ).eval()
    other = with_head(net, HeadSpec(taps=("layer1", "last")), 3)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(other.pooled(x), pooled(net, x, other.spec.head))
        assert torch.equal(
            with_head(net, HeadSpec(taps=("layer1",)), 3).pooled(x), pooled(net, x, HeadSpec(taps=("layer1",)))
        )


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache" / "features"
    monkeypatch.delenv("ISTHMUS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "isthmus" / "features"
