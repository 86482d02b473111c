"""One predictor over four engines: their numbers, the choice between them, and what is refused."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import isthmus
from isthmus.deploy import engines, predictor
from isthmus.deploy.engines import ENGINES, Model
from isthmus.deploy.predictor import HINTS, Predictor, choose
from isthmus.deploy.quantize import to_be_timed
from isthmus.errors import EngineError, MissingExtraError, PrecisionError, SpecError
from isthmus.runtime import machine
from oracles import picture, relative_error
from small_runs import SPEC, network, weights

LOW = [
    pytest.param(name, precision, marks=pytest.mark.long if name == "inductor" else ())
    for name, engine in ENGINES.items()
    for precision in engine.precisions
    if precision != "int8"
]
pytestmark = pytest.mark.usefixtures("exported_once")
RATES = {"torch": 10.0, "inductor": 20.0, "onnxruntime": 30.0, "openvino": 25.0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def rated(monkeypatch):
    """Engines measured as RATES says, in bf16 twice and in int8 three times that; Inductor is left out of the table."""
    calls = []

    def measured(opened, images):
        calls.append(list(opened))
        return {(name, low): RATES[name] * {"fp32": 1, "bf16": 2, "int8": 3}[low] for name, low in opened}

    monkeypatch.setattr(predictor, "measured", measured)
    monkeypatch.delitem(ENGINES, "inductor")
    return calls


@pytest.mark.parametrize("hint", HINTS)
@pytest.mark.parametrize(("name", "precision"), LOW)
def test_every_engine_computes_what_the_network_does(name, precision, hint):
    if precision == "bf16" and machine("cpu").precision != "bf16":
        pytest.skip("this CPU has no bf16")
    net = network()
    run = Predictor(net, engine=name, precision=precision, hint=hint, batch_size=2)
    assert run.choice.rows[0].engine == name
    allowed = 1e-5 if precision == "fp32" else 0.05
    batches = [picture(count, 3, *size, seed=count) for count, size in ((1, (32, 32)), (5, (47, 61)), (2, (32, 32)))]
    with torch.no_grad():
        for found, batch in zip([*run.stream(batches), *map(run, batches)], [*batches, *batches], strict=True):
            assert relative_error(found, net(batch.float())) <= allowed


def test_two_calls_at_once_give_what_one_gives(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    net, batches = network(), [picture(2, 3, 32, 32, seed=seed).float() for seed in range(9)]
    for name in ("onnxruntime", "openvino"):
        run = Predictor(net, engine=name, precision="fp32", batch_size=2)
        assert run.opened.jobs == 3
        with torch.no_grad():
            for found, batch in zip(run.stream(iter(batches)), batches, strict=True):
                assert relative_error(found, net(batch)) <= 1e-5
            assert relative_error(run(torch.cat(batches)), net(torch.cat(batches))) <= 1e-5


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch"])
def test_no_more_batches_wait_than_are_in_work(name, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    run, taken, most = Predictor(network(), engine=name, precision="fp32", batch_size=1), [], []

    def batches():
        for number in range(20):
            taken.append(number)
            yield picture(1, 3, 32, 32).float()

    for place, _ in enumerate(run.stream(batches())):
        most.append(len(taken) - place)
    assert len(most) == 20
    assert max(most) <= 2 * 2 + 1  # in work, as many that wait, and the one that is handed over


def test_the_fastest_is_chosen_and_kept(rated, tmp_path):
    choice, _ = choose(Model(network()), precision="fp32")
    assert [row.engine for row in choice.rows] == ["onnxruntime", "openvino", "torch"]
    assert "ONNX Runtime in fp32: 30.0 pictures/s, 16 at once, for throughput, the fastest of" in str(choice)
    assert choose(Model(network(seed=1)), precision="fp32")[0] == choice  # other weights are no other speed
    assert len(rated) == 1
    for other in ({"batch_size": 1}, {"hint": "latency"}, {"engine": "torch"}):
        choose(Model(network()), precision="fp32", **other)
    choose(Model(network(replace(SPEC, num_classes=3))), precision="fp32")
    assert len(rated) == 5
    choose(Model(network()), precision="fp32", again=True)
    assert len(rated) == 6


@pytest.mark.parametrize("damaged", ["{", '{"rows": 3}', '{"hint": "latency", "batch_size": 16, "rows": []}'])
def test_a_damaged_cache_is_measured_anew(rated, tmp_path, damaged):
    first, _ = choose(Model(network()), precision="fp32")
    (kept,) = (tmp_path / "cache" / "engines").iterdir()
    kept.write_text(damaged)
    assert choose(Model(network()), precision="fp32")[0] == first
    assert len(rated) == 2


def wrong(engine):
    """The same engine, brighter by a hundredth."""

    def opened(*how):
        run = engine.open(*how)
        return lambda batch: run(batch * np.float32(1.01))

    return replace(engine, open=opened)


def test_an_engine_with_wrong_numbers_is_out(rated, monkeypatch):
    monkeypatch.setitem(ENGINES, "onnxruntime", wrong(ENGINES["onnxruntime"]))
    choice, _ = choose(Model(network()), precision="fp32")
    assert [row.engine for row in choice.rows] == ["openvino", "torch", "onnxruntime"]
    assert "gives wrong numbers: logits differ by" in choice.rows[-1].refused
    with pytest.raises(
        EngineError, match="no engine can run this network here: ONNX Runtime fp32: gives wrong numbers"
    ):
        Predictor(network(), engine="onnxruntime", precision="fp32")


def test_a_kept_choice_is_compared_again(rated, monkeypatch):
    choose(Model(network()), precision="fp32")
    monkeypatch.setitem(ENGINES, "onnxruntime", wrong(ENGINES["onnxruntime"]))
    choice, opened = choose(Model(network()), precision="fp32")
    assert choice.rows[0].engine == "openvino"
    assert (
        relative_error(
            torch.from_numpy(opened.one(picture(1, 3, 32, 32).float().numpy())),
            network()(picture(1, 3, 32, 32).float()),
        )
        <= 1e-5
    )


def test_an_engine_that_fails_is_out_with_its_reason(rated, monkeypatch):
    def broken(*how):
        raise RuntimeError("no such kernel\nand a long story")

    monkeypatch.setitem(ENGINES, "torch", replace(ENGINES["torch"], open=broken))
    choice, _ = choose(Model(network()), precision="fp32")
    assert choice.rows[-1].refused == "cannot run this network: no such kernel"


def test_an_engine_that_is_not_installed(rated, monkeypatch):
    monkeypatch.setitem(ENGINES, "openvino", replace(ENGINES["openvino"], libraries=("no_such_library",)))
    choice, _ = choose(Model(network()), precision="fp32")
    assert choice.rows[-1].refused == "not installed"
    with pytest.raises(MissingExtraError, match=r'pip install "isthmus\[openvino\]"'):
        choose(Model(network()), engine="openvino")


def test_bf16_only_where_the_cpu_has_it(rated, monkeypatch):
    monkeypatch.setattr(predictor, "native_bf16", lambda: False)
    assert {row.precision for row in choose(Model(network()))[0].rows} == {"fp32"}
    with pytest.raises(EngineError, match="this CPU does not multiply bf16 itself"):
        Predictor(network(), precision="bf16")


def test_int8_that_saves_no_time_is_refused(rated, monkeypatch):
    net = network()
    timed = to_be_timed(Model(net))
    fake = replace(timed, onnx=Model(net).onnx, engines=("openvino",))  # as good as fp32, and as slow
    with pytest.raises(EngineError, match="int8 needs pictures"):
        Predictor(net, precision="int8")
    assert Predictor(net, precision="int8", int8=fake).choice.rows[0].precision == "int8"
    monkeypatch.setitem(RATES, "torch", 50.0)
    with pytest.raises(
        PrecisionError, match=r"int8 saves no time here \(torch, fused bf16 100.0; .*OpenVINO int8 75.0"
    ):
        choose(Model(net, fake), precision="int8", again=True)
    assert choose(Model(net, fake), again=True)[0].rows[0].engine == "torch"


@pytest.mark.parametrize(
    ("asked", "error", "reason"),
    [
        ({"engine": "onnxruntime", "precision": "bf16"}, EngineError, "onnxruntime does not compute in bf16 here"),
        ({"engine": "tensorrt"}, EngineError, "there is no engine 'tensorrt'; known: auto, torch,"),
        ({"precision": "fp8"}, EngineError, "there is no precision 'fp8'; known: auto, fp32, bf16, int8"),
        ({"batch_size": 0}, EngineError, "batch_size is 0; it must be 1 or more"),
    ],
)
def test_what_cannot_be_had(asked, error, reason):
    with pytest.raises(error, match=reason):
        Predictor(network(), **asked)


def test_a_weight_file_and_a_network_in_training_mode(tmp_path):
    net = network()
    run = isthmus.Predictor(weights(tmp_path / "net.safetensors", net), engine="torch", precision="fp32")
    x = picture(2, 3, 32, 32).float()
    with torch.no_grad():
        assert relative_error(run(x), net(x)) <= 1e-5
    assert relative_error(run(x.double()), run(x)) <= 1e-6
    with pytest.raises(EngineError, match=r"images are torch.uint8; normalise them first"):
        run(x.to(torch.uint8))
    with pytest.raises(SpecError, match="training mode"):
        Predictor(net.train())


@pytest.mark.parametrize(
    ("threads", "jobs", "each"), [(1, 1, 1), (2, 2, 1), (8, 8, 1), (12, 6, 2), (13, 6, 2), (64, 8, 8)]
)
def test_cores_are_shared_without_rest(threads, jobs, each, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert predictor.shared_work("throughput") == engines.Work(threads=each, jobs=jobs)
    assert predictor.shared_work("latency") == engines.Work(threads=threads, jobs=1)


def test_a_refusal_of_some_weights_is_not_kept_for_others(rated, monkeypatch):
    """What is kept is for all networks of a shape."""
    with monkeypatch.context() as patch:
        patch.setitem(ENGINES, "onnxruntime", wrong(ENGINES["onnxruntime"]))
        choose(Model(network()), precision="fp32")
    choice, _ = choose(Model(network()), precision="fp32")
    assert not any(row.refused for row in choice.rows)


def test_a_table_with_int8_serves_predictors_without(rated):
    """What `isthmus bench` found out is not measured again."""
    net = network()
    model = Model(net, to_be_timed(Model(net)))
    table, _ = choose(model, again=True)
    assert any(row.precision == "int8" for row in table.rows)
    assert Predictor(net).choice.rows == tuple(row for row in table.rows if row.precision != "int8")
    assert len(rated) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_in_half_precision_is_folded_in_single(rated, dtype):
    """Folding in its own would round every weight once more, and no engine would agree."""
    net = network().to(dtype)
    found = Predictor(net, precision="fp32")
    assert not any(row.refused for row in found.choice.rows)
    images = picture(2, 3, 32, 32, seed=0).float()
    with torch.no_grad():
        assert relative_error(found(images), copy.deepcopy(net).float()(images)) < 1e-5


def test_threads_of_the_process_stay_what_they_are():
    before = torch.get_num_threads()
    run = Predictor(network(), engine="torch", precision="fp32")
    try:
        torch.set_num_threads(before + 1)
        run(picture(2, 3, 32, 32, seed=0))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("engine", ["torch", "onnxruntime", "openvino"])
def test_what_is_no_batch_of_images(engine):
    run = Predictor(network(), engine=engine, precision="fp32", batch_size=2)
    for images, message in (
        (torch.zeros(3, 32, 32), r"\(3, 32, 32\); they must be \(N, 3, height, width\)"),
        (torch.zeros(2, 1, 32, 32), r"\(2, 1, 32, 32\); they must be \(N, 3, height, width\)"),
        (np.zeros((2, 3, 32, 32), np.float32), "images are ndarray; give a torch.Tensor"),
    ):
        with pytest.raises(EngineError, match=message):
            run(images)
    assert run(torch.zeros(0, 3, 32, 32)).shape == (0, 7)


def test_a_part_in_training_mode_is_named():
    net = network()
    net.layer2.train()
    with pytest.raises(SpecError, match="its layer2 is in training mode"):
        Predictor(net)
