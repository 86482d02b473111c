"""The command bench: what it measures, for people and for scripts."""

import json
import threading
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from isthmus import records
from isthmus.arch.cost import cost
from isthmus.arch.roofline import Bandwidth, Limits
from isthmus.deploy import limits
from isthmus.deploy.engines import ENGINES
from small_runs import class_folders, network, weights


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    return class_folders(tmp_path / "set", {"flower": 5, "temple": 4})


def bench(isthmus, folder, *more):
    options = ("--arch", "resnet10t", "--batch-size", "4", "--image-size", "32", "--seconds", "0.05", "--device", "cpu")
    return isthmus("bench", "data", str(folder), *options, *more)


def test_data_json(isthmus, folder):
    found = json.loads(bench(isthmus, folder, "--json").out)
    assert (found["unit"], found["arch"], found["device"]) == ("pictures/s", "resnet10t", "cpu")
    assert [row["loader"] for row in found["rows"]] == [
        "uint8 batches",
        "normalised batches",
        "normalised, from resized pictures",
    ]
    for row in found["rows"]:
        assert row["binds"] == ("loader" if row["loader_alone"] < row["step_alone"] else "step")
        together = 1 / row["loader_alone"] + 1 / row["step_alone"]  # one after the other, as they share the cores
        assert row["together"] == pytest.approx(1 / together)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("isthmus-decode")]


def test_data_table(isthmus, folder):
    (folder / "flower" / "0.jpg").write_bytes(b"no picture")
    result = bench(isthmus, folder)
    assert (result.status, result.err) == (0, "")
    assert "resnet10t at 32 px, 4 a step" in result.out
    assert "pictures that could not be read: 1" in result.out


def test_data_without_pictures(isthmus, tmp_path):
    result = bench(isthmus, tmp_path / "none")
    assert result.status == 2
    assert "does not exist" in result.err


RATES = {("torch", "fp32"): 20.0, ("onnxruntime", "fp32"): 25.0, ("openvino", "fp32"): 30.0, ("openvino", "int8"): 90.0}


@pytest.fixture
def canned(monkeypatch, tmp_path):
    """Engines that reach RATES on a machine whose kept limit is 10 GOP/s in each precision; OpenVINO has no bf16."""

    def failing(model, precision, work):
        if precision == "bf16":
            raise RuntimeError("no kernel")
        return engine.open(model, precision, work)

    engine = ENGINES["openvino"]
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delitem(ENGINES, "inductor")
    monkeypatch.setitem(ENGINES, "torch", replace(ENGINES["torch"], precisions=("fp32",)))
    monkeypatch.setitem(ENGINES, "openvino", replace(engine, open=failing))
    monkeypatch.setattr("isthmus.deploy.predictor.native_bf16", lambda: True)
    monkeypatch.setattr(
        "isthmus.deploy.predictor.measured", lambda opened, _: {pair: RATES.get(pair, 1) for pair in opened}
    )
    kept = Limits(
        machine="desk",
        threads=torch.get_num_threads(),
        lanes=16,
        **dict.fromkeys(("fp32", "bf16", "int8"), 10e9),
        bandwidth=(Bandwidth(size=1, rate=1.0),),
    )
    limits.place().parent.mkdir(parents=True)
    limits.place().write_text(json.dumps(records.to_dict(kept)), encoding="utf-8")
    monkeypatch.setattr("isthmus.deploy.pace.limit", lambda _: pytest.fail("measured anew"))


def test_engines_json(isthmus, canned, tmp_path):
    net = weights(tmp_path / "net.safetensors")
    said = json.loads(isthmus("bench", str(net), "--image-size", "64", "--batch-sizes", "1", "2", "--json").out)
    flops = FlopCounterMode(display=False)
    with flops:
        network()(torch.zeros(1, 3, 64, 64))
    assert said["limits"]["int8"] == pytest.approx(10e9 / flops.get_total_flops(), rel=0.01)
    rows = {(row["engine"], row["precision"], row["batch_size"], row["hint"]): row for row in said["rows"]}
    assert len(rows) == 6 * 4  # ONNX Runtime in int8 too
    assert rows["openvino", "int8", 2, "latency"]["rate"] == 90.0
    assert rows["openvino", "bf16", 1, "throughput"]["refused"] == "cannot run this network: no kernel"


def test_engines_table(isthmus, canned):
    result = isthmus("bench", "resnet10t", "--image-size", "64", "--batch-sizes", "1")
    assert result.status == 0
    assert "resnet10t at 64×64" in result.out
    macs = cost("resnet10t", 64).macs
    assert f"90.0 ({90 * 2 * macs / 10e9:.2f})" in result.out
    assert "OpenVINO bf16: cannot run this network: no kernel" in result.out
    assert "int8 was calibrated on made-up pictures" in result.out
    assert "timing 1 at once for throughput" in result.err


def test_engines_of_what_is_not_there(isthmus):
    result = isthmus("bench", "resnet51")
    assert (result.status, result.out) == (2, "")
    assert "resnet51" in result.err
