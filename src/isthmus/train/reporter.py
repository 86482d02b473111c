"""What a long job tells while it works; this one keeps quiet."""

from collections.abc import Mapping

__all__ = ["Reporter"]


class Reporter:
    """Hears of milestones and of progress; the terminal's version shows them."""

    def say(self, line: str) -> None:
        """One line worth keeping."""

    def progress(self, task: str, done: int, total: int, facts: Mapping[str, float] | None = None) -> None:
        """`task` has done so many of `total` pictures (or picture views); a task ends when all are done.

        `facts` are worth watching beside it: `loss`, `lr`, `memory` in bytes, the part of the time `waited` for
        pictures.
        """
