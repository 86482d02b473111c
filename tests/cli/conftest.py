"""The command line, called in this process on a terminal of 100 columns."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from isthmus.cli.main import main
from isthmus.report.tables import console


class Result(NamedTuple):
    """What a command left: its exit status and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def isthmus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs a command given as its words, such as "plan", "resnet50", and gives back what it left."""
    monkeypatch.setattr(console, "width", 100)
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["isthmus", *arguments])
        status: object = 0
        try:
            main()
        except SystemExit as ended:
            status = ended.code
        printed = capsys.readouterr()
        return Result(status if isinstance(status, int) else 0, printed.out, printed.err)

    return call
