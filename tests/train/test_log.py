"""The log: rewound to the state a run goes on from, readable after a kill, and the same in TensorBoard."""

import json
import subprocess
import sys
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from isthmus.errors import MissingExtraError, RunError
from isthmus.train.log import Log, read_log, write_tensorboard
from small_runs import Recorder

# TensorBoard's switch for doing without TensorFlow, which would take seconds to import where it is installed.
sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))


def step(number: int) -> dict:
    return {"epoch": 1 + number // 3, "step": number, "loss": 1 / (number + 1), "lr": 0.1, "memory": 2**33 + number}


def epoch(number: int) -> dict:
    return {"epoch": number, "loss": 0.5, "val_accuracy": number / 10}


def timeless(rows) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


def test_rows_come_back_in_order(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    rows = [step(0), step(1), epoch(1)]
    for row in rows:
        log.add(row)
    assert timeless(log.rows) == rows
    assert read_log(log.path) == log.rows == [json.loads(line) for line in log.path.read_text().splitlines()]
    times = [row["time"] for row in log.rows]
    assert times == sorted(times)
    assert times[0] > 1.7e9


def test_it_is_rewound_to_where_the_state_was_saved(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.add(step(0))
    length = log.length()
    assert length == log.path.stat().st_size
    log.add(step(1))
    log.add(epoch(1))
    reporter = Recorder()
    again = Log(log.path, length, reporter)
    assert timeless(again.rows) == [step(0)]
    again.add(step(7))
    assert timeless(read_log(log.path)) == [step(0), step(7)]
    assert reporter.lines == []


def test_a_new_run_begins_an_empty_log(tmp_path):
    path = tmp_path / "log.jsonl"
    Log(path).add(step(0))
    assert Log(path).rows == []
    assert path.read_bytes() == b""


KILLED = """
import os, signal, sys
from pathlib import Path
from isthmus.train.log import Log

log = Log(Path(sys.argv[1]))
for number in range(3):
    log.add({"step": number})
os.write(os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND), b'{"step": 3, "lo')
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_line_that_a_killed_process_began_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False).returncode == -9
    assert timeless(read_log(path)) == [{"step": number} for number in range(3)]
    torn, reporter = path.stat().st_size, Recorder()
    log = Log(path, torn, reporter)  # as if the state had counted on the whole of it
    log.add({"step": 3})
    assert timeless(read_log(path)) == [{"step": number} for number in range(4)]
    assert f"has lost 15 of the {torn} bytes" in reporter.lines[0]


def test_numbers_that_are_not_finite_stay_json(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.add({"step": 0, "grad_norm": float("inf"), "loss": float("nan")})
    assert timeless(json.loads(line) for line in log.path.read_text().splitlines()) == [
        {"step": 0, "grad_norm": None, "loss": None}
    ]
    write_tensorboard(log.rows, tmp_path / "tensorboard")


@pytest.mark.parametrize(("line", "reason"), [("{", "no JSON"), ("3", "no table"), ("\x00", "no JSON")])
def test_a_damaged_line_is_named(tmp_path, line, reason):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(RunError, match=rf"line 2 of .*log\.jsonl is {reason}.*remove that line"):
        read_log(path)


def test_places_that_cannot_be_written_are_named(tmp_path):
    with pytest.raises(RunError, match=r"gone/log\.jsonl: No such file or directory"):
        Log(tmp_path / "gone" / "log.jsonl")
    with pytest.raises(RunError, match=r"gone/log\.jsonl cannot be read: No such file or directory"):
        read_log(tmp_path / "gone" / "log.jsonl")
    with pytest.raises(RunError, match=r"cannot write .*events.*: No such file or directory"):
        write_tensorboard([], tmp_path / "gone" / "tensorboard")


def read_back(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader finds."""
    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_reads_the_same_numbers(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    for row in [{"taps": ["last"], "accuracy": 0.5}, step(0), step(1), epoch(1), step(2), epoch(2)]:
        log.add(row)
    write_tensorboard(log.rows, tmp_path / "tensorboard")
    found = read_back(tmp_path / "tensorboard")
    wanted = {f"step/{name}": [(n, step(n)[name]) for n in range(3)] for name in ("loss", "lr", "memory")}
    wanted |= {f"epoch/{name}": [(n, epoch(n)[name]) for n in (1, 2)] for name in ("loss", "val_accuracy")}
    assert found.keys() == wanted.keys()
    for tag, values in wanted.items():
        assert [number for number, _ in found[tag]] == [number for number, _ in values], tag
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in values]), tag


def test_an_open_tensorboard_sees_new_rows_and_a_rewound_run_begins_anew(tmp_path):
    log, folder = Log(tmp_path / "log.jsonl"), tmp_path / "tensorboard"
    log.add(step(0))
    length = log.length()
    path = write_tensorboard(log.rows, folder)
    node, reader = path.stat().st_ino, EventAccumulator(str(folder)).Reload()
    log.add(step(1))
    write_tensorboard(log.rows, folder)
    assert path.stat().st_ino == node
    assert [each.step for each in reader.Reload().Scalars("step/loss")] == [0, 1]
    again = Log(log.path, length)
    again.add(step(5))
    write_tensorboard(again.rows, folder)
    assert [number for number, _ in read_back(folder)["step/loss"]] == [0, 5]
    assert [file.name for file in folder.iterdir()] == [path.name]


def test_without_tensorboard_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with pytest.raises(MissingExtraError, match=r'pip install "isthmus\[tensorboard\]"'):
        write_tensorboard([], tmp_path)
