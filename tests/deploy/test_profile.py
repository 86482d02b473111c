"""Where engines spend their time: each node's layers, in every engine, and sums that leave nothing out."""

from dataclasses import replace

import pytest

from isthmus.arch.plan import plan
from isthmus.arch.roofline import Bandwidth, Limits, roofline
from isthmus.arch.spec import NetSpec, StageSpec, StemSpec
from isthmus.deploy import predictor
from isthmus.deploy import profile as subject
from isthmus.deploy.engines import ENGINES, Model
from isthmus.deploy.profile import PROFILERS, Node, Profile, layer_times, profile, profiled_plan
from isthmus.deploy.quantize import to_be_timed
from isthmus.errors import EngineError
from isthmus.runtime import machine
from small_runs import network

LIMITS = Limits(
    machine="desk", threads=1, lanes=16, fp32=1e11, bf16=2e11, int8=4e11, bandwidth=(Bandwidth(size=2**20, rate=1e10),)
)
BASE = NetSpec(
    stem=StemSpec(widths=(16, 16, 32), kernel=3),
    stages=(StageSpec(depth=2, mid=16, out=64), StageSpec(depth=2, mid=32, out=96, stride=2, groups=2)),
    shortcut="avg",
    num_classes=7,
)
SPECS = {
    "squeezed and blurred": replace(BASE, attention="se", anti_alias="blur"),
    "pre-activation": replace(
        BASE,
        shortcut="conv1",
        attention="eca",
        stages=tuple(replace(stage, block="preact_bottleneck") for stage in BASE.stages),
    ),
    "group norm": replace(BASE, norm="group", stem=StemSpec(widths=(32,)), stages=BASE.stages[1:]),
    "plain": replace(BASE, stages=BASE.stages[:1]),
}
QUICK = [name for name in SPECS if name != "group norm"]
PAIRS = [(name, precision) for name in PROFILERS for precision in ENGINES[name].precisions if precision != "int8"]


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subject, "SECONDS", 0.02)


@pytest.fixture(scope="module")
def models():
    """Each network once, with its translation."""
    made = {}

    def model(name):
        if name not in made:
            made[name] = Model(network(SPECS[name]))
        return made[name]

    return model


def laid_out(model):
    """The plan for the pictures that the profile is taken with."""
    return plan(model.net.spec, model.net.preprocess.crop)


def check(model, found, *, merges=False):
    """Every layer has a row, one of its own unless an engine merges, and the rows are all of the call."""
    floors = roofline(laid_out(model), LIMITS, batch=2)
    times = layer_times(found, floors)
    weighed = {floor.name for floor in floors if floor.kind in ("conv", "linear")}
    covered = [name for node in found.nodes for name in subject.layers_of(node, {each.name: each for each in floors})]
    assert set(covered) == {floor.name for floor in floors}
    rows = [name for row in times if row.floor for name in row.name.split(" + ")]
    assert sorted(rows) == sorted(floor.name for floor in floors)
    if not merges:
        assert not any(" + " in row.name for row in times)
        alone = [name for name in covered if name in weighed]
        assert len(alone) == len(set(alone))
    inside = sum(node.seconds for node in found.nodes)
    assert sum(row.seconds for row in times) == pytest.approx(max(found.seconds, inside))
    assert inside <= found.seconds * 1.001
    blocks = list(dict.fromkeys(row.block for row in times))
    assert blocks == [*dict.fromkeys(floor.block for floor in floors), *(["engine"] if "engine" in blocks else [])]


@pytest.mark.parametrize("name", [*QUICK, pytest.param("group norm", marks=pytest.mark.long)])
@pytest.mark.parametrize(("engine", "precision"), PAIRS)
def test_every_layer_is_found(models, engine, precision, name):
    if precision == "bf16" and machine("cpu").precision != "bf16":
        pytest.skip("this CPU has no bf16")
    model = models(name)
    found = profile(model, engine, precision=precision, batch=2)
    assert (found.engine, found.precision, found.batch) == (engine, precision, 2)
    assert found.calls >= subject.LEAST
    check(model, found, merges=engine == "torch" or name == "group norm")


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_every_layer_is_found_in_int8(models, engine):
    model = Model(models("plain").net)
    model.int8 = to_be_timed(model)
    check(model, profile(model, engine, precision="int8", batch=2))


def test_a_projection_that_is_computed_with_the_expansion(models):
    model = models("plain")
    floors = roofline(laid_out(model), LIMITS, batch=2)
    times = {row.name: row for row in layer_times(profile(model, "torch", batch=2), floors)}
    both = times["layer1.0.conv3 + layer1.0.downsample.1"].floor
    parts = [floor for floor in floors if floor.name in ("layer1.0.conv3", "layer1.0.downsample.1")]
    assert both.operations == sum(floor.operations for floor in parts)


def profiled(*nodes, seconds=1.0):
    return Profile(engine="torch", precision="fp32", batch=1, calls=1, seconds=seconds, nodes=nodes)


def node(seconds, *modules, kind="Kind"):
    return Node(name="", kind=kind, modules=modules, seconds=seconds)


def rows_of(*nodes, seconds=1.0):
    floors = roofline(plan(BASE, 32), LIMITS)
    times = layer_times(profiled(*nodes, seconds=seconds), floors)
    return {row.name: (row.block, row.seconds) for row in times if row.seconds}


def test_what_is_fused_into_a_convolution_counts_to_it():
    found = rows_of(node(0.25, "layer1.0.conv3", "layer1.0", "layer1.0.act"), node(0.75, "layer1.0.act1"))
    assert found == {"layer1.0.conv3": ("layer1.0", 0.25), "layer1.0.act1": ("layer1.0", 0.75)}


def test_nodes_of_no_layer_and_the_time_between_have_rows():
    found = rows_of(node(0.125, kind="Reorder"), node(0.125, kind="Reorder"), node(0.25, ""), node(0.0, "act1"))
    assert found == {
        "pool": ("head", 0.25),
        "Reorder ×2": ("engine", 0.25),
        "between the nodes": ("engine", 0.5),
    }


def test_several_nodes_of_a_layer_and_layers_of_one_node():
    found = rows_of(
        node(0.25, "layer1.0.conv1"),
        node(0.25, "layer1.0.conv1", "layer1.0.conv2"),
        node(0.5, "layer1.0.conv2"),
    )
    assert found == {"layer1.0.conv1 + layer1.0.conv2": ("layer1.0", 1.0)}


@pytest.mark.parametrize(("module", "block"), [("bn1", "stem"), ("norm", "head"), ("layer2.1.bn1", "layer2.1")])
def test_the_block_of_what_is_no_layer(module, block):
    assert rows_of(node(1.0, module)) == {module: (block, 1.0)}


RATES = {"torch": 10.0, "inductor": 40.0, "onnxruntime": 30.0, "openvino": 20.0}


@pytest.fixture
def rated(monkeypatch):
    monkeypatch.setattr(predictor, "measured", lambda opened, _: {pair: RATES[pair[0]] for pair in opened})


def test_the_fastest_engine_that_tells_is_profiled(rated, monkeypatch):
    said = []
    monkeypatch.setitem(ENGINES, "inductor", replace(ENGINES["torch"], title="torch, compiled"))
    found = profiled_plan(plan(BASE, 32), batch=2, say=said.append)
    assert (found.engine, found.faster) == ("onnxruntime", ("torch, compiled",))
    assert str(found) == "ONNX Runtime in fp32 (torch, compiled, faster here, tells nothing of its layers)"
    assert said == ["looking for the fastest engine", "measuring ONNX Runtime"]


def test_no_engine_that_tells(rated, monkeypatch):
    for name in PROFILERS:
        monkeypatch.delitem(ENGINES, name)
    monkeypatch.setitem(ENGINES, "inductor", replace(subject.ENGINES["inductor"], open=open_plainly))
    with pytest.raises(EngineError, match="none of the engines that run this network here tells of its nodes"):
        profiled_plan(plan(BASE, 32))


def open_plainly(model, precision, work):
    """The network itself."""
    return subject.of_torch(model.reference, work)
