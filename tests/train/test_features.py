"""Features of a frozen trunk: those of the network itself, whatever the order, the cache or an interruption did."""

from dataclasses import replace

import pytest
import torch

import isthmus
from isthmus.arch.spec import HeadSpec
from isthmus.cache import cache_folder
from isthmus.data.decode import decode
from isthmus.data.pictures import Pictures
from isthmus.data.transform import evaluation_transform, normalise
from isthmus.errors import DataError
from isthmus.train import outputs
from isthmus.train.features import extract, with_head
from isthmus.train.outputs import PrefixOutputs
from isthmus.train.prefix import Prefix
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
        return extract(net, pictures, here, precision, reporter or Reporter())

    return call


@pytest.fixture
def counted(monkeypatch):
    """How many pictures (in views) went through a network."""
    seen, run = [], PrefixOutputs._run
    monkeypatch.setattr(PrefixOutputs, "_run", lambda self, images: seen.append(len(images)) or run(self, images))
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
    assert len(list(cache_folder("features").glob("*.rows"))) == 1
    for path in cache_folder("features").glob("*.rows"):
        path.unlink()
    assert torch.equal(read(pictures=data.train.subset(order)), found[:, order])


def test_a_second_call_runs_no_network(read, counted, data):
    found = read()
    assert sum(counted) == 2 * len(data.train)
    counted.clear()
    assert torch.equal(read(), found)
    assert not counted


def test_an_interrupted_extraction_goes_on(read, counted, data, monkeypatch):
    """Whatever the pictures it has left, and with whom these go through the network."""
    monkeypatch.setattr(outputs, "CHUNK", 6)

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
    for path in cache_folder("features").glob("*.rows"):
        path.unlink()
    assert torch.equal(read(), found)


def changed(path, change) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


DAMAGE = {
    "empty": (lambda path: path.write_bytes(b""), 40),
    "text": (lambda path: path.write_text("no rows"), 40),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-200]), 1),
    "a bit of the last row": (lambda path: changed(path, lambda content: content.__setitem__(-5, content[-5] ^ 1)), 1),
    "zeros": (lambda path: path.write_bytes(bytes(path.stat().st_size)), 40),
    "noise": (lambda path: path.write_bytes(bytes(range(1, 251)) * (path.stat().st_size // 250 + 1)), 40),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_ignored(read, counted, data, damage):
    found = read()
    (path,) = cache_folder("features").glob("*.rows")
    damage_it, lost = DAMAGE[damage]
    damage_it(path)
    counted.clear()
    assert torch.equal(read(), found)
    assert sum(counted) == lost
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


def test_whatever_decides_them_makes_another_key(reader, data, here, tmp_path):
    def key(net=reader, pictures=data.train, precision="fp32", turns=(0, 4)):
        return outputs.fingerprint(net, Prefix(net, "trunk", here, precision), pictures, net.preprocess, turns)

    usual = key()
    assert key() == usual
    keys = {"usual": usual, "precision": key(precision="bf16"), "fewer": key(pictures=data.train.subset(range(5)))}
    keys["turns"] = key(turns=(4, 0))
    for name, tensor in reader.state_dict().items():
        if tensor.is_floating_point() and name in ("conv1.weight", "layer2.0.bn3.running_var"):
            before = tensor.flatten()[0].clone()
            tensor.view(-1)[0] = torch.nextafter(before, before + 1)
            keys[name] = key()
            tensor.view(-1)[0] = before
    assert key() == usual
    record = reader.preprocess
    for change in ({"interpolation": "bicubic"}, {"mean": (0.5, 0.5, 0.5)}, {"resize": 40}):
        reader.preprocess = replace(record, **change)
        keys[str(change)] = key()
    reader.preprocess = record
    other = with_head(network(), HeadSpec(taps=("last",)), 0)
    other.preprocess = record
    keys["head"] = key(other)
    copy = tmp_path / "copy.png"
    copy.write_bytes(data.train.read(0))
    paths = [str(copy), *(data.train.name(index) for index in range(1, len(data.train)))]

    def copied_key():
        return key(pictures=Pictures.of_files(paths, data.train.labels, data.train.classes))

    keys["path"] = copied_key()
    copy.write_bytes(data.train.read(1) + b" ")
    keys["content"] = copied_key()
    assert len(set(keys.values())) == len(keys), keys
    assert len(keys) == 12


def test_what_does_not_decide_them_makes_no_other_key(here, data):
    """The head and what lies behind the end of the prefix."""
    spec = isthmus.variant("resnet18")

    def key(change, until):
        net = isthmus.create(replace(spec, **change))
        net.load_state_dict({name: torch.ones_like(value) for name, value in net.state_dict().items()})
        return outputs.fingerprint(net, Prefix(net, until, here, "fp32"), data.train, net.preprocess, (0,))

    assert key({}, "layer2") == key({"num_classes": 3, "name": "other", "drop_path": 0.1}, "layer2")
    assert key({}, "layer2") == key({"stages": spec.stages[:3]}, "layer2")
    assert key({}, "layer2") != key({}, "layer3")
    assert key({}, "layer3") != key({"stages": spec.stages[:3]}, "layer3")  # there the pooled values are enough


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
