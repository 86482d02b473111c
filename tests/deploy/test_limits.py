"""The limits of this machine: what is measured, and when what was kept counts."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from isthmus import records
from isthmus.arch.roofline import Bandwidth, Limits
from isthmus.deploy import limits as subject
from isthmus.deploy import pace
from isthmus.deploy.limits import bandwidth, kept_limits, limits, measured_limits

measure = pace.limit  # before a fixture replaces it


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    """Two small working sets, and rates that take no time."""
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subject, "SIZES", (2**15, 2**17))
    monkeypatch.setattr(subject, "LEAST", 1e-3)
    monkeypatch.setattr("isthmus.deploy.pace.limit", {"fp32": 1e9, "bf16": 2e9, "int8": None}.get)


@pytest.fixture
def measured(monkeypatch):
    """How often the machine was measured."""
    calls = []

    def counted(**how):
        calls.append(1)
        return measured_limits(**how)

    monkeypatch.setattr(subject, "measured_limits", counted)
    return calls


def test_what_is_measured(monkeypatch):
    monkeypatch.setattr("isthmus.deploy.engines.native_bf16", lambda: True)
    found = measured_limits()
    assert (found.threads, found.fp32, found.bf16, found.int8) == (torch.get_num_threads(), 1e9, 2e9, None)
    assert [each.size for each in found.bandwidth] == [2**15, 2**17]


@pytest.mark.parametrize(("capability", "lanes"), [("AVX512", 16), ("AVX2", 8), ("DEFAULT", 4)])
def test_sums_in_a_vector(monkeypatch, capability, lanes):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert measured_limits().lanes == lanes


def test_bf16_that_the_cpu_has_not_is_no_limit(monkeypatch):
    monkeypatch.setattr("isthmus.deploy.engines.native_bf16", lambda: False)
    assert measured_limits().bf16 is None


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ([0.3, 0.2, 0.25, *[0.3] * 20], 0.2),
        ([9.0], 9.0),  # a CPU that has no good way to do it is asked once
    ],
)
def test_the_best_of_several_tries_counts(monkeypatch, times, best):
    taken = iter(times)
    monkeypatch.setitem(pace.CONVOLUTIONS, "fp32", lambda: lambda: None)
    monkeypatch.setattr(pace, "seconds", lambda *_: next(taken))
    assert measure("fp32") == pytest.approx(2 * cost_of_convolution() / best)


def cost_of_convolution() -> int:
    """Its multiply-adds by PyTorch's own count of the operation."""
    with FlopCounterMode(display=False) as counter:
        pace.floating(torch.float32)()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("threads", [1, 3])
def test_no_larger_working_set_is_faster(threads):
    found = bandwidth(threads)
    assert found[0].rate >= found[1].rate > 0


@pytest.mark.parametrize("way", [subject.reads, subject.updates])
def test_a_pass_goes_over_its_part_so_often(way):
    """Updating adds ones to zeros; reading gives a maximum a pass."""
    call, moved = way(2**12)
    assert moved == {subject.reads: 2**12, subject.updates: 2**12 * 3 // 2}[way]
    found = call(5)
    if way is subject.updates:
        assert (found == 5).all()
    else:
        assert found.tolist() == [1.0] * 5


def test_limits_are_measured_once(measured):
    said = []
    first = limits(say=said.append)
    assert limits(say=said.append) == first == kept_limits()
    assert (len(measured), said[0]) == (1, "measuring this machine's limits, once")
    measured_limits()  # anew, whatever was kept
    assert kept_limits() is not None


@pytest.mark.parametrize("damaged", ["{", "[]", '{"machine": "desk"}', '{"fp32": -1}'])
def test_a_damaged_file_is_measured_again(measured, damaged):
    limits()
    subject.place().write_text(damaged, encoding="utf-8")
    assert limits() == kept_limits()
    assert len(measured) == 2


def test_other_threads_are_another_machine(measured):
    limits()
    kept = json.loads(subject.place().read_text(encoding="utf-8"))
    subject.place().write_text(json.dumps(kept | {"threads": kept["threads"] + 1}), encoding="utf-8")
    assert kept_limits() is None
    assert limits().threads == torch.get_num_threads()
    assert len(measured) == 2


def test_the_place_says_what_limits_depend_on(monkeypatch):
    before = subject.place()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert subject.place() != before


def test_a_busy_machine_is_told(monkeypatch):
    said = []
    monkeypatch.setattr(subject, "cores", lambda: 4)
    monkeypatch.setattr(subject.os, "getloadavg", lambda: (2.9, 0, 0))
    measured_limits(say=said.append)
    assert said == []
    monkeypatch.setattr(subject.os, "getloadavg", lambda: (3.1, 0, 0))
    measured_limits(say=said.append)
    assert said[0].startswith("this machine is busy (load 3.1 on 4 cores)")


def test_a_cache_that_takes_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "file"))
    assert measured_limits().fp32 == 1e9
    assert kept_limits() is None


def test_limits_survive_their_file():
    found = Limits(machine="desk", threads=2, lanes=4, fp32=1e9, bandwidth=(Bandwidth(size=1, rate=2.0),))
    assert records.from_dict(Limits, json.loads(json.dumps(records.to_dict(found)))) == found
