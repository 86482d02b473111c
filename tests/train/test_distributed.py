"""Many processes compute what one does, and tell who is missing."""

import re
import socket
from pathlib import Path

import pytest
import torch

import rank_checks
import rank_faults
from isthmus.errors import RunError
from isthmus.train.distributed import World, joined, parallel
from oracles import relative_error
from processes import Processes
from small_runs import network

HOST = re.escape(socket.gethostname())
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.long)])
def found(request, tmp_path_factory):
    """What several processes found, from one start of them for all checks."""
    path = tmp_path_factory.mktemp("ranks") / "found.pt"
    for status, _, error in Processes(Path(rank_checks.__file__), str(path), ranks=request.param).wait():
        assert status == 0, error
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("run", rank_checks.RUNS)
def test_steps_of_many_processes_are_those_of_one(found, run):
    assert (found[run] - rank_checks.RUNS[run](World())).abs().max() <= 1e-10


def test_wrapping_anew_changes_no_bit(found):
    """As after a restart; with three processes and more, sums in another order would have other bits."""
    assert torch.equal(found["wrapped anew"], found["pre-activation"])


def test_plain_norms_see_their_own_pictures_only(found):
    """Otherwise the equality above would say nothing about synchronised norms."""
    assert (found["plain norms"] - rank_checks.CHECKS["plain norms"](World())).abs().max() > 1e-3


def test_synchronised_norms_of_every_kind(found):
    wanted = rank_checks.norms(World())
    assert found["norms"].keys() == wanted.keys()
    for name, value in wanted.items():
        precision = next(dtype for dtype in TOLERANCE if str(dtype) in name)
        assert relative_error(found["norms"][name].double(), value.double()) <= TOLERANCE[precision], name


def test_half_precision(found):
    assert relative_error(found["half precision"], rank_checks.half_precision(World())) <= 2e-2


def near(values, rel):
    """Plain values whose numbers may be off by that."""
    if isinstance(values, dict):
        return {name: near(value, rel) for name, value in values.items()}
    if isinstance(values, list):
        return [near(value, rel) for value in values]
    return pytest.approx(values, rel=rel) if isinstance(values, float) else values


@pytest.mark.parametrize(("check", "rel"), [("scores", 1e-12), ("evaluated", 1e-6)])
def test_scores_over_uneven_shares(found, check, rel):
    """Those of a network are of batches of other sizes, which are summed in another order."""
    assert found[check] == near(rank_checks.CHECKS[check](World()), rel)


def test_sums_votes_and_gatherings(found):
    assert found["words"] == rank_checks.words(World())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("killed", rf"rank 1 on {HOST} gave no more sign of life; "),
        pytest.param("hanging", rf"rank 1 on {HOST} hangs after the first step; ", marks=pytest.mark.long),
        pytest.param("user_error", r"picture 7 cannot be read$", marks=pytest.mark.long),
        pytest.param("same_error", r"there is no such folder$", marks=pytest.mark.long),
        pytest.param("bug", rf"rank 1 on {HOST} stopped: KeyError: 'a name'; ", marks=pytest.mark.long),
        pytest.param("leaving", rf"rank 1 on {HOST} left after the first step; ", marks=pytest.mark.long),
    ],
)
def test_who_is_missing_is_said_once(fault, message):
    processes = Processes(Path(rank_faults.__file__), fault, timeout=3 if fault == "hanging" else 300)
    if fault == "hanging":
        processes.ranks[0].wait()
        processes.ranks[1].kill()
    ends = processes.wait()
    lines = [line for _, _, error in ends for line in error.splitlines() if line.startswith("isthmus: ")]
    assert len(lines) == 1
    assert re.match(f"isthmus: {message}", lines[0])
    assert ends[0][0] == 2
    assert {"killed": -9, "bug": 1, "leaving": 0, "hanging": -9}.get(fault, 2) == ends[1][0]


def test_ranks_that_never_join_are_named(monkeypatch):
    """What ranks of an earlier start wrote into the store is not taken for them."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("hello 1", "of another time")
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "3",
        "RANK": "0",
        "ISTHMUS_TIMEOUT": "0.1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match="these ranks have not joined: 1, 2; ISTHMUS_TIMEOUT allows more"), joined("cpu"):
        pass


def test_alone_everything_is_itself(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    net = network()
    with joined("cpu") as world:
        assert world == World(device="cpu")
        assert world.main
        assert parallel(net, world) is net
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("count", "restarted"), [("0", False), ("2", True)])
def test_restarts_are_known(monkeypatch, count, restarted):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    with joined() as world:
        assert world.restarted is restarted


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan", ""])
def test_timeouts_are_seconds(monkeypatch, text):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ISTHMUS_TIMEOUT", text)
    with pytest.raises(RunError, match=f"ISTHMUS_TIMEOUT is {text!r}; it must be seconds above 0"), joined():
        pass


def test_processes_that_cannot_meet(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    message = "WORLD_SIZE is 2, but .* RANK expected, but not set; start them with torchrun"
    with pytest.raises(RunError, match=message), joined():
        pass
