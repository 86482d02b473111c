"""What a long job looks like in a terminal: lines that stay, and a bar with pictures a second and the time left.

All of it goes to standard error, so that standard output holds results alone. Where that is a file, a line now and
then takes the place of the bar.
"""

import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from isthmus.train.reporter import Reporter

__all__ = ["TerminalReporter"]

EVERY = 30.0  # seconds between two lines in a file
FACTS: dict[str, Callable[[float], str]] = {
    "epoch": lambda value: f"epoch {value:.0f}",
    "loss": lambda value: f"loss {value:.3f}",
    "lr": lambda value: f"lr {value:.2g}",
    "waited": lambda value: f"reading binds: the network waits {value:.0%}" if value > 0.5 else "the network binds",
    "memory": lambda value: f"{value / 2**30:.1f} GiB",
}


def told(task: Task) -> str:
    """The state of a task in words; its speed is that of the last two minutes."""
    parts, facts = [], task.fields["facts"]
    if task.speed:
        left = lasting(round(((task.total or 0) - task.completed) / task.speed))
        parts += [f"{task.speed:.{1 if task.speed < 10 else 0}f} pictures/s", f"{left} left"]
    return ", ".join(parts + [words(facts[name]) for name, words in FACTS.items() if name in facts])


def lasting(seconds: int) -> str:
    """A time in words that are short however long it is."""
    if seconds >= 86_400:
        return f"{seconds // 86_400} d {seconds % 86_400 // 3600} h"
    return str(timedelta(seconds=seconds)).removeprefix("0:")


class Told(ProgressColumn):
    """The words beside a bar."""

    def render(self, task: Task) -> Text:
        return Text(told(task))


class TerminalReporter(Reporter):
    """A context: prints lines, and one bar a task while it runs; under torchrun, from the first process alone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        console = Console(stderr=True, highlight=False, markup=False, quiet=os.environ.get("RANK", "0") != "0")
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=5)),
            Told(Column(no_wrap=True, overflow="ellipsis")),
            console=console,
            transient=True,
            expand=True,
            disable=not console.is_terminal,
            speed_estimate_period=120.0,
            get_time=clock,
        )
        self.tasks: dict[str, TaskID] = {}
        self.clock, self.last = clock, clock()

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def say(self, line: str) -> None:
        self.bar.console.print(line, soft_wrap=True)

    def progress(self, task: str, done: int, total: int, facts: Mapping[str, float] | None = None) -> None:
        if task not in self.tasks:
            self.tasks[task] = self.bar.add_task(task, total=total, facts={})
        self.bar.update(self.tasks[task], completed=done, facts=facts or {})
        if self.bar.disable and done < total and self.clock() - self.last >= EVERY:
            self.last = self.clock()
            now = next(each for each in self.bar.tasks if each.id == self.tasks[task])
            self.say(f"{task}: " + ", ".join(filter(None, (f"{now.percentage:.0f} %", told(now)))))
        if done >= total:
            self.bar.remove_task(self.tasks.pop(task))
