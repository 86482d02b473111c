"""What a frozen prefix gives: the maps of the network, equal bits from the disk and computed, in the loader's order."""

import importlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import nn

import isthmus
from isthmus.arch.plan import plan
from isthmus.arch.spec import HeadSpec
from isthmus.arch.variants import variant
from isthmus.cache import cache_folder, make_room
from isthmus.data.augment import Augment
from isthmus.data.loader import Loader
from isthmus.data.order import sample_generator
from isthmus.data.transform import normalise
from isthmus.errors import RunError
from isthmus.nn.batchnorm import freeze_batchnorm, synchronise_batchnorm
from isthmus.nn.block import BottleneckBlock
from isthmus.nn.freeze import freeze, frozen_sums, require_unmoved
from isthmus.nn.memory import save_memory, work_in_place
from isthmus.nn.network import ResNet
from isthmus.train import outputs as module
from isthmus.train import rows as rows_module
from isthmus.train.features import extract, with_head
from isthmus.train.outputs import PrefixOutputs, turned, turns_of
from isthmus.train.prefix import Prefix, frozen_at
from isthmus.train.recipe import Recipe
from isthmus.train.reporter import Reporter
from isthmus.train.rows import Rows
from isthmus.train.step import Behind
from oracles import ours, picture, random_state, relative_error, small
from small_runs import SPEC, Recorder, network

FLIPS = Augment(crop_scale=(), vflip=True)
LAST = HeadSpec()
TAPS = HeadSpec(taps=("stem", "layer1", "last"), pools=("max", "avg"), norm=True)


def random_net(name: str, head: HeadSpec = LAST, size: int = 48) -> ResNet:
    spec = replace(small(variant(name)), head=head, num_classes=5)
    net = ours(spec, size, random_state(ResNet(plan(spec, size)))).train()
    return net.requires_grad_()


@pytest.mark.parametrize("head", [LAST, TAPS], ids=["last", "taps"])
@pytest.mark.parametrize("name", ["resnet26d", "resnetrs50", "resnetv2_50", "resnet50_gn"])
def test_prefix_and_rest_are_the_network(name, head, here):
    """In double precision: the logits, and the gradients of all that still trains."""
    x = picture(2, 3, 48, 48)
    for until in ("none", "stem", "layer2", "layer4", "trunk"):
        net = random_net(name, head)
        freeze(net, until)
        given = Prefix(net, until, here, "fp32")(x)
        found = Behind(net)(*given)
        mine = torch.autograd.grad(found.square().sum(), [p for p in net.parameters() if p.requires_grad])
        wanted = net(x)
        theirs = torch.autograd.grad(wanted.square().sum(), [p for p in net.parameters() if p.requires_grad])
        assert relative_error(found, wanted) <= 1e-10
        assert all(relative_error(a, b) <= 1e-10 for a, b in zip(mine, theirs, strict=True))
        assert not given.images.requires_grad
        assert set(given.known) == {tap for tap in head.taps if inside(net, tap, until)}
        assert given.images.numel() > 0 or set(given.known) == set(head.taps)


def inside(net: ResNet, tap: str, until: str) -> bool:
    points = ["none", "stem", *net.stages, "trunk"]
    end = points.index("trunk") if tap == "last" and net.spec.preact else points.index("layer4")
    return points.index(until) >= (end if tap == "last" else points.index(tap))


def test_a_prefix_in_low_precision_is_close(here):
    net = random_net("resnet26d", TAPS).float()
    x = picture(3, 3, 64, 64).float()
    given = Prefix(net, "layer2", here, "bf16")(x)
    assert given.images.dtype == torch.bfloat16
    assert {value.dtype for value in given.known.values()} == {torch.float32}
    maps = net.eval().features(x)
    assert relative_error(given.images.float(), maps["layer2"]) < 0.03
    assert relative_error(given.known["layer1"], net.pool(maps["layer1"])) < 0.03


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"freeze": "layer2"}, ["layer2"] * 5),
        ({"freeze": "trunk", "unfreeze_epochs": 1}, ["trunk", "layer2", "layer1", "stem", "none", "none"]),
        ({"freeze": "layer2", "unfreeze_epochs": 2}, ["layer2"] * 2 + ["layer1"] * 2 + ["stem"] * 2 + ["none"] * 2),
        ({"freeze": "layer1", "unfreeze_epochs": 0.5}, ["layer1", "none", "none"]),
        ({"freeze": "none"}, ["none"] * 3),
        ({"freeze": "layer1", "unfreeze_epochs": 1.5}, ["layer1", "layer1", "stem", "none"]),
    ],
)
def test_what_is_frozen_in_an_epoch(settings, wanted):
    recipe = Recipe(data="pictures", weights="w", **settings)
    stages = ("layer1", "layer2", "layer3")
    assert [frozen_at(recipe, stages, epoch) for epoch in range(len(wanted))] == wanted


def test_what_moves_is_named():
    net = random_net("resnet18")
    freeze(net, "layer1")
    before = frozen_sums(net)
    assert set(before) == {name for name in net.state_dict() if name.startswith(("conv1.", "bn1.", "layer1."))}
    net(picture(2, 3, 64, 64)).sum().backward()
    torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0, weight_decay=1.0).step()
    require_unmoved(before, net)
    for name in ("layer1.0.bn1.running_mean", "conv1.weight"):
        value = net.state_dict()[name]
        last = value.view(-1)[-1].clone()
        value.view(-1)[-1] = torch.nextafter(last, last + 1)
        with pytest.raises(RunError, match=f"yet changed: {name};"):
            require_unmoved(before, net)
        value.view(-1)[-1] = last
    net.conv1.weight.data += 1
    freeze(net, "none")  # it may move from now on
    require_unmoved(before, net)


@pytest.mark.parametrize("flips", list(itertools.product((False, True), repeat=3)))
def test_every_turn_that_training_sees(flips):
    augment = Augment(crop_scale=(), **dict(zip(("hflip", "vflip", "rotate90"), flips, strict=True)))
    corners, record = np.arange(4, dtype=np.uint8).reshape(2, 2, 1), network().preprocess
    seen = set()
    for index in range(200):
        random = module.sample_generator(0, 0, index)
        seen.add(module.turn_of(module.altered(corners, augment, record, random)))
    assert turns_of(augment) == tuple(sorted(seen))


@pytest.mark.parametrize(
    "more",
    [{"crop_scale": (0.5, 1.0)}, {"pad": 4}, {"policy": "rand"}, {"erasing": 0.1}, {"mixup": 0.1}, {"cutmix": 1.0}],
)
def test_what_has_too_many_looks(more):
    assert turns_of(Augment(**({"crop_scale": ()} | more))) == ()
    assert turns_of(Augment(crop_scale=(), repeats=3)) == turns_of(Augment(crop_scale=()))


@pytest.fixture
def net():
    net = network(replace(isthmus.variant("resnet10t"), head=TAPS, num_classes=2))
    freeze(net, "layer2")
    return net.train()


def loader(data, net, augment=FLIPS, **options):
    made = {"batch_size": 6, "seed": 3} | options
    return Loader(pictures=data.train, record=net.preprocess, train=True, augment=augment, **made)


def outputs(data, net, here, augment=FLIPS, reporter=None, until="layer2", precision="fp32"):
    prefix = Prefix(net, until, here, precision)
    return PrefixOutputs(net, prefix, data.train, net.preprocess, turns_of(augment), reporter or Reporter())


@pytest.fixture
def counted(monkeypatch):
    seen, run = [], PrefixOutputs._run
    monkeypatch.setattr(PrefixOutputs, "_run", lambda self, images: seen.append(len(images)) or run(self, images))
    return seen


OPTIONS = [{}, {"micro_batch": 2}, {"rank": 1, "ranks": 2}, {"balanced": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("augment", [FLIPS, replace(FLIPS, rotate90=True, repeats=2)], ids=["flips", "turns"])
def test_the_batches_of_the_loader(data, net, here, options, augment):
    """Against the loader's own pictures, run through the network itself."""
    made, source = loader(data, net, augment, **options), outputs(data, net, here, augment)
    for epoch in range(2):
        pairs = zip(made.epoch(epoch, 1), source.batches(made, epoch, 1), strict=True)
        for wanted, found in pairs:
            assert (found.step, found.part, found.parts) == (wanted.step, wanted.part, wanted.parts)
            assert torch.equal(found.indices, wanted.indices)
            assert torch.equal(found.labels, wanted.labels)
            with torch.no_grad():
                maps = net.features(normalise(wanted.images, net.preprocess), ("stem", "layer1", "layer2"))
            assert relative_error(found.given.images, maps["layer2"]) <= 1e-5
            assert found.given.images.is_contiguous(memory_format=torch.channels_last)
            assert set(found.given.known) == {"stem", "layer1"}
            for tap, value in found.given.known.items():
                assert relative_error(value, net.pool(maps[tap])) <= 1e-5


def taken(source, made, epochs=(0, 1, 2)):
    return [
        torch.cat([batch.given.images.flatten(1), *batch.given.known.values()], 1).clone()
        for epoch in epochs
        for batch in source.batches(made, epoch)
    ]


def equal(one, other) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_complete_outputs_need_no_pictures(data, net, here, counted, monkeypatch):
    made = loader(data, net)
    source = outputs(data, net, here)
    assert sum(len(values) for _, values in source.all()) == 4 * len(data.train)
    assert sum(counted) == 4 * len(data.train)
    counted.clear()
    monkeypatch.setattr(module, "Loader", lambda **_: pytest.fail("pictures were read"))
    found = taken(outputs(data, net, here), made)
    assert not counted
    monkeypatch.undo()
    assert equal(found, taken(source, made))


@pytest.mark.parametrize("room", ["none", "a part", "all"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_bits_wherever_they_come_from(data, net, here, monkeypatch, room, precision):
    """Begun anew in the middle, so that rows were computed in other company; and with less room on the disk."""
    monkeypatch.setattr(module, "CHUNK", 5)
    made = loader(data, net)
    first = outputs(data, net, here, precision=precision)
    wanted = taken(first, made)
    width, recorder = first.rows.width, Recorder()
    for path in cache_folder("features").glob("*.rows"):
        path.unlink()
    monkeypatch.setenv("ISTHMUS_CACHE_GB", str({"none": 0, "a part": (4096 + 20.5 * width) / 1e9, "all": 1}[room]))
    source = outputs(data, net, here, reporter=recorder, precision=precision)
    assert equal(taken(source, made, (2,)), wanted[2 * made.steps :])
    assert equal(taken(outputs(data, net, here, precision=precision), made), wanted)
    assert [line.split("room for ")[1].split(" ")[0] for line in recorder.lines] == {
        "none": ["0%"], "a part": ["25%"], "all": []
    }[room]  # fmt: skip


@pytest.mark.parametrize("ahead", [1, 12, 4096])
@pytest.mark.parametrize(("repeats", "options"), [(1, {}), (1, {"balanced": True}), (3, {})], ids=str)
def test_without_room_few_rows_wait_in_memory(data, net, here, monkeypatch, repeats, options, ahead):
    """Though some come again, when what came with them the first time is gone."""
    monkeypatch.setenv("ISTHMUS_CACHE_GB", "0")
    monkeypatch.setattr(module, "CHUNK", 3)
    monkeypatch.setattr(module, "AHEAD", ahead)
    augment = Augment(crop_scale=(), hflip=False, repeats=repeats)
    made, run = [], PrefixOutputs._run

    def noted(self, images):
        values = run(self, images)
        made.append(weakref.ref(values))
        return values

    monkeypatch.setattr(PrefixOutputs, "_run", noted)
    batches = loader(data, net, augment, batch_size=2, **options)
    found, alive = [], []
    for batch in outputs(data, net, here, augment).batches(batches, 0):
        found.append(batch.given.images)
        alive.append(sum(values() is not None for values in made))
    assert max(alive) <= 2
    assert len(made) >= 4
    monkeypatch.setenv("ISTHMUS_CACHE_GB", "1")
    again = outputs(data, net, here, augment).batches(batches, 0)
    assert equal(found, [batch.given.images for batch in again])


def test_a_first_batch_does_not_look_for_all_rows(data, net, here, monkeypatch):
    list(outputs(data, net, here).all())
    monkeypatch.setattr(module, "AHEAD", 6)
    source, looked = outputs(data, net, here), []
    monkeypatch.setattr(module, "sample_generator", lambda *args: looked.append(args) or sample_generator(*args))
    next(source.batches(loader(data, net), 0))
    assert len(looked) == source.rows.known.sum() == 6
    assert max(len(rows) for rows, _ in source.all()) == 6


def key(net, data, here, until="layer2"):
    return module.fingerprint(net, Prefix(net, until, here, "fp32"), data.train, net.preprocess, (0,))


class Twice(BottleneckBlock):
    def forward(self, x):
        return 2 * super().forward(x)


def become_twice(net):
    net.layer1[0].__class__ = Twice


CHANGES = {
    "no pool": lambda net: net.add_module("maxpool", nn.Identity()),
    "another pool": lambda net: net.add_module("maxpool", nn.MaxPool2d(2)),
    "another first activation": lambda net: net.add_module("act1", nn.SiLU()),
    "another activation": lambda net: net.layer1[0].add_module("act1", nn.SiLU()),
    "no activation": lambda net: net.layer1[0].add_module("act1", nn.Identity()),
    "an own subclass": become_twice,
    "eps": lambda net: setattr(net.layer1[0].bn1, "eps", 0.5),
    "dilation": lambda net: setattr(net.layer1[0].conv2, "dilation", (2, 2)),
    "no shortcut": lambda net: setattr(net.layer1[0], "adds", False),
}


def test_other_layers_make_another_key(data, here):
    keys = {"usual": key(network(), data, here)}
    for name, change in CHANGES.items():
        net = network()
        change(net)
        keys[name] = key(net, data, here)
    assert len(set(keys.values())) == len(keys) == 10, keys


@pytest.mark.parametrize(
    "change",
    [
        work_in_place,
        freeze_batchnorm,
        synchronise_batchnorm,
        lambda net: save_memory(net, "checkpoint"),
        lambda net: save_memory(net, "recompute"),
        lambda net: net.train(),
        lambda net: setattr(net.layer3[0].bn1, "eps", 0.5),
    ],
)
def test_what_layers_do_in_training_makes_no_other_key(data, here, change):
    net = random_net("resnet26d").float()
    before = key(net, data, here)
    change(net)
    assert key(net, data, here) == before


OWN = """
from isthmus.nn.block import BottleneckBlock

def scaled(x):
    return {scale} * x

class Own(BottleneckBlock):
    def forward(self, x):
        return scaled(super().forward(x))
"""


def with_own_blocks(own):
    spec = replace(SPEC, num_classes=2, stages=tuple(replace(stage, block="own") for stage in SPEC.stages))
    net = isthmus.create(spec, blocks={"own": own})
    net.load_state_dict(random_state(net, 0))
    net.preprocess = network().preprocess
    freeze(net.float(), "layer1")
    return net.train()


def test_an_own_block_whose_code_changes_is_computed_anew(data, here, counted, tmp_path, monkeypatch):
    """In its file, which another function stands in; and by a number that it holds."""
    monkeypatch.syspath_prepend(tmp_path)
    for number, scale in enumerate((1.0, 3.0, 3.0)):
        (tmp_path / "own_blocks.py").write_text(OWN.format(scale=scale))
        importlib.invalidate_caches()
        sys.modules.pop("own_blocks", None)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)  # which goes by seconds and sizes
        net = with_own_blocks(importlib.import_module("own_blocks").Own)
        counted.clear()
        source, made = outputs(data, net, here, until="layer1"), loader(data, net)
        for found, wanted in zip(source.batches(made, 0), made.epoch(0), strict=True):
            with torch.no_grad():
                maps = net.features(normalise(wanted.images, net.preprocess), ("layer1",))
            assert relative_error(found.given.images, maps["layer1"]) <= 1e-5
        assert bool(counted) == (number < 2)
    net.layer1[0].times = 3
    assert outputs(data, net, here, until="layer1").rows.path != source.rows.path
    sys.modules.pop("own_blocks")


def typed_in():
    namespace = {"__name__": "__main__"}
    exec(OWN.format(scale=2.0), namespace)
    return namespace["Own"]


def made_with(scale):
    class Own(BottleneckBlock):
        def forward(self, x):
            return scale * super().forward(x)

    return Own


@pytest.mark.parametrize("own", [typed_in(), made_with(2.0)], ids=["typed in", "made in a function"])
def test_nothing_is_kept_where_code_is_unknown(data, here, own):
    net = with_own_blocks(own)
    assert key(net, data, here, "layer1") is None
    prefix = Prefix(net, "layer1", here, "fp32")
    assert PrefixOutputs.where_possible(net, prefix, loader(data, net), Reporter()) is None
    recorder = Recorder()
    found = extract(net, data.train, here, "fp32", recorder)
    assert "a class of your own in the network" in recorder.lines[0]
    pictures = Loader(pictures=data.train, record=net.preprocess, train=False, batch_size=len(data.train)).epoch(0)
    with torch.no_grad():
        maps = net.eval().features(normalise(next(pictures).images, net.preprocess), ("last",))
    assert relative_error(found[0], net.pool(maps["last"])) <= 1e-5
    assert not list(cache_folder("features").glob("*.rows"))


def test_a_prefix_that_pools_everything_keeps_no_maps(data, here):
    net = with_head(network(), HeadSpec(taps=("layer1", "last")), 2)
    source = outputs(data, net, here, until="trunk")
    assert source.rows.width == 4 * (16 + 32)
    batch = next(source.batches(loader(data, net), 0))
    assert Behind(net)(*batch.given).shape == (6, 2)


def test_rows_that_two_processes_share(tmp_path, cache):
    reporter, path = Reporter(), tmp_path / "cache" / "features" / "key.rows"
    one, other = (Rows(path, 10, 7, "rows", reporter) for _ in range(2))
    values = np.arange(7, dtype=np.uint8)
    one.write(3, values)
    other.write(4, values + 1)
    rows = np.array([2, 3, 4, 3])
    for each in (one, other):
        assert each.have(rows).tolist() == [False, True, True, True]
        assert each.read(rows[1:]).tolist() == [values.tolist(), (values + 1).tolist(), values.tolist()]


def test_a_file_that_is_evicted_goes_on_for_those_who_have_it(tmp_path, cache):
    path = tmp_path / "cache" / "features" / "key.rows"
    rows = Rows(path, 10, 7, "rows", Reporter())
    path.unlink()
    rows.write(1, np.ones(7, np.uint8))
    assert rows.have(np.array([1])).all()
    assert rows.read(np.array([1])).tolist() == [[1] * 7]


def kept(rows: Rows, count: int = 10) -> list[bool]:
    return Rows(rows.path, count, rows.width, "rows", Reporter()).have(np.arange(count)).tolist()


def gigabytes(count: int, width: int, more: int = 0) -> str:
    """Room for so many rows, and `more` bytes."""
    return str((4096 + count * width + more) / 1e9)


def test_what_was_used_longest_ago_goes_first(tmp_path, cache, monkeypatch):
    folder = tmp_path / "cache" / "features"
    used, old, new, fourth = (folder / f"{number:032x}.rows" for number in range(4))
    for number, path in enumerate((used, old, new)):
        Rows(path, 10, 1000, "rows", Reporter())
        os.utime(path, (number, number))
    monkeypatch.setenv("ISTHMUS_CACHE_GB", str(45_000 / 1e9))
    Rows(used, 10, 1000, "rows", Reporter())
    Rows(fourth, 10, 1000, "rows", Reporter())
    assert set(folder.glob("*.rows")) == {used, new, fourth}


def test_a_file_that_grows_is_not_what_goes(tmp_path, cache, monkeypatch):
    """Though it was used longer ago than the other, when there is room for one of them alone."""
    folder = tmp_path / "cache" / "features"
    mine, other = (folder / f"{number:032x}.rows" for number in range(2))
    monkeypatch.setenv("ISTHMUS_CACHE_GB", gigabytes(50, 5000))
    rows = Rows(mine, 100, 5000, "rows", Reporter())
    rows.write(3, np.ones(5000, np.uint8))
    monkeypatch.setenv("ISTHMUS_CACHE_GB", "1")
    Rows(other, 10, 40_000, "rows", Reporter())
    os.utime(mine, (1, 1))
    monkeypatch.setenv("ISTHMUS_CACHE_GB", gigabytes(100, 5000, 5000))
    assert sum(kept(rows, 100)) == 1
    assert mine.stat().st_size == 4096 + 100 * 5000
    assert not other.exists()


@pytest.mark.parametrize("room", [0, 1, 4], ids="room for {} rows".format)
def test_what_is_kept_counts_under_a_smaller_budget(tmp_path, cache, monkeypatch, room):
    rows = Rows(tmp_path / "cache" / "features" / f"{0:032x}.rows", 10, 1000, "rows", Reporter())
    for row in range(10):
        rows.write(row, np.full(1000, row, np.uint8))
    monkeypatch.setenv("ISTHMUS_CACHE_GB", gigabytes(room, 1000, -1))
    recorder = Recorder()
    again = Rows(rows.path, 10, 1000, "rows", recorder)
    assert again.have(np.arange(10)).all()
    assert (again.read(np.arange(10)) == np.arange(10)[:, None]).all()
    assert not recorder.lines
    assert list(rows.path.parent.glob("*.rows")) == [rows.path]


def test_no_room_makes_no_file(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("ISTHMUS_CACHE_GB", "0")
    rows = Rows(tmp_path / "cache" / "features" / f"{0:032x}.rows", 10, 1000, "rows", Reporter())
    rows.write(0, np.ones(1000, np.uint8))
    assert not rows.have(np.arange(10)).any()
    assert not rows.path.exists()


def test_a_row_of_another_width_is_refused(tmp_path, cache):
    rows = Rows(tmp_path / "cache" / "features" / "key.rows", 10, 8, "rows", Reporter())
    for width in (7, 9, 16):
        with pytest.raises(ValueError, match=f"a row of {width} bytes among rows of 8"):
            rows.write(0, np.ones(width, np.uint8))
    assert not any(kept(rows))


def test_a_process_with_less_room_does_not_shrink_the_file(tmp_path, cache, monkeypatch):
    """Another, with room for all rows, comes between this one's look at the file and its growing, and is kept out."""
    path = tmp_path / "cache" / "features" / f"{0:032x}.rows"
    values, recorder, others = np.ones(5000, np.uint8), Recorder(), []

    def other():
        with monkeypatch.context() as patch:
            patch.setenv("ISTHMUS_CACHE_GB", gigabytes(100, 5000))
            others.append(Rows(path, 100, 5000, "rows", recorder))
        others[-1].write(90, values)
        return others[-1].have(np.array([90])).tolist()

    def meanwhile(size):
        monkeypatch.setattr(rows_module, "make_room", make_room)
        other()
        return make_room(size)

    monkeypatch.setattr(rows_module, "make_room", meanwhile)
    monkeypatch.setattr(rows_module, "FileLock", partial(FileLock, timeout=0), raising=False)  # it would wait for ever
    monkeypatch.setenv("ISTHMUS_CACHE_GB", gigabytes(50, 5000))
    rows = Rows(path, 100, 5000, "rows", Reporter())
    assert path.stat().st_size == 4096 + 50 * 5000
    assert others[0].held == 0
    assert "not kept" in recorder.lines[0]
    assert other() == [True]
    assert kept(rows, 100)[90]


FULL = """
import resource, signal, sys
import numpy as np
from pathlib import Path
from isthmus.train.rows import Rows
from isthmus.train.reporter import Reporter
class Recorder(Reporter):
    lines = []
    say = lines.append
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
recorder = Recorder()
rows = Rows(Path(sys.argv[1]), 10, 5000, "rows", recorder)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096 + 12000, resource.RLIM_INFINITY))
for row in range(5):
    rows.write(row, np.full(5000, row, np.uint8))
assert rows.have(np.arange(5)).tolist() == [True, True, False, False, False], rows.known
assert rows.read(np.array([1])).max() == 1
assert len(recorder.lines) == 1 and "not kept" in recorder.lines[0], recorder.lines
"""


def test_a_disk_that_fills_up_is_said_once(tmp_path, cache):
    """A limit on the size of files stands for the disk: the third row is cut off in its middle."""
    path = tmp_path / "cache" / "features" / "key.rows"
    subprocess.run([sys.executable, "-c", FULL, str(path)], check=True)
    assert Rows(path, 10, 5000, "rows", Reporter()).have(np.arange(5)).tolist() == [True, True, False, False, False]


KILLED = """
import itertools, sys
import numpy as np
from pathlib import Path
from isthmus.train.reporter import Reporter
from isthmus.train.rows import Rows
rows = Rows(Path(sys.argv[1]), 200, 100_000, "rows", Reporter())
print("ready", flush=True)
for row in itertools.cycle(range(200)):
    rows.write(row, np.full(100_000, row + 1, np.uint8))
    print(row, flush=True)
"""


def test_a_killed_process_leaves_whole_rows(tmp_path, cache):
    path = tmp_path / "cache" / "features" / "key.rows"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.strip() == "37":
                process.send_signal(signal.SIGKILL)
                break
    rows = Rows(path, 200, 100_000, "rows", Reporter())
    there = np.flatnonzero(rows.have(np.arange(200)))
    assert set(range(38)) <= set(there.tolist())
    assert all((rows.read(np.array([row])) == row + 1).all() for row in there)


def test_turning_is_what_the_loader_does():
    x = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    looks = {tuple(turned(x, turn).flatten().tolist()) for turn in range(8)}
    assert len(looks) == 8
    assert torch.equal(turned(x, 0), x)
    assert torch.equal(turned(x, 4), x.flip(-1))
