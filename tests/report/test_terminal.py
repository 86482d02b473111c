"""What a long job shows: a bar in a terminal, a line now and then in a file, nothing from any process but the first."""

import contextlib
import os
import re
import sys

import pytest

from isthmus.report.terminal import TerminalReporter

FACTS = {"loss": 1.23456, "lr": 0.0123, "memory": 3.2e9}


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def trained(reporter: TerminalReporter, clock: Clock, steps: int = 60) -> None:
    """An epoch of 1,920 pictures, 8 a second, gone on with in its middle where there are fewer steps."""
    for step in range(60 - steps, 60):
        clock.now += 4
        reporter.progress("epoch 3/90", (step + 1) * 32, 1920, FACTS)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


def test_a_file_gets_a_line_now_and_then(capsys):
    clock = Clock()
    with TerminalReporter(clock) as reporter:
        trained(reporter, clock)
        reporter.say("epoch 3/90: validation 87.1%")
    *lines, last = capsys.readouterr().err.splitlines()
    assert last == "epoch 3/90: validation 87.1%"
    assert len(lines) == 60 * 4 // 32  # steps end every 4 s, so a line comes every 32 s
    for number, line in enumerate(lines, 1):
        done = 8 * number  # steps
        left = f"{(60 - done) * 4 // 60}:{(60 - done) * 4 % 60:02}"
        expected = f"epoch 3/90: {done / 60 * 100:.0f} %, 8.0 pictures/s, 0{left} left, loss 1.235, lr 0.012, 3.0 GiB"
        assert line == expected


def test_a_short_job_leaves_its_milestones_alone(capsys):
    clock = Clock()
    with TerminalReporter(clock) as reporter:
        trained(reporter, clock, steps=5)
        reporter.say("done")
    assert capsys.readouterr().err == "done\n"


def test_pictures_of_before_a_resume_are_no_speed(capsys):
    clock = Clock()
    with TerminalReporter(clock) as reporter:
        trained(reporter, clock, steps=30)
    assert [re.search(r"\d+ %, [\d.]+ pictures/s", line)[0] for line in capsys.readouterr().err.splitlines()] == [
        f"{percent} %, 8.0 pictures/s" for percent in (63, 77, 90)
    ]


def test_a_task_may_come_again(capsys):
    clock = Clock()
    with TerminalReporter(clock) as reporter:
        for _ in range(2):
            for done in (50, 100, 150, 200):
                clock.now += 20
                reporter.progress("evaluating", done, 200)
        assert not reporter.bar.tasks
    assert capsys.readouterr().err.splitlines() == [
        "evaluating: 50 %, 2.5 pictures/s, 00:40 left",
        "evaluating: 25 %",
        "evaluating: 75 %, 2.5 pictures/s, 00:20 left",
    ]


def test_only_the_first_process_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    clock = Clock()
    with TerminalReporter(clock) as reporter:
        trained(reporter, clock)
        reporter.say("done")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "left"),
    [(120, "02:00"), (86_399, "23:59:59"), (86_400, "1 d 0 h"), (7 * 86_400 + 23 * 3600 + 754, "7 d 23 h")],
)
def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch, seconds, left):
    """Through a real pseudo-terminal of 80 columns."""
    ours, theirs = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    with os.fdopen(theirs, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        clock = Clock()
        with TerminalReporter(clock) as reporter:
            for step in range(30):
                clock.now += 4
                reporter.progress("epoch 3/90", (step + 1) * 32, 960 + 8 * seconds, FACTS)
            reporter.bar.refresh()
            reporter.say("a milestone")
    written = bytearray()
    with contextlib.suppress(OSError):  # once all is read from a terminal that nobody writes to
        while True:
            written += os.read(ours, 4096)
    os.close(ours)
    shown = written.decode()
    assert shown.endswith("\x1b[?25h\r\x1b[1A\x1b[2K")  # the cursor is back, and the bar's line is empty
    plain = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", shown)
    bar = next(line for line in plain.splitlines() if f"{left} left" in line).split("\r")[-1]
    assert re.fullmatch(rf"epoch 3/90 \S+ 8.0 pictures/s, {left} left, loss 1.235, lr 0.012, 3.0 GiB", bar)
    assert "a milestone" in plain
