"""What a long job tells while it works; this one keeps quiet."""

__all__ = ["Reporter"]


class Reporter:
    """Hears of milestones and of progress; the terminal's version shows them."""

    def say(self, line: str) -> None:
        """One line worth keeping."""

    def progress(self, task: str, done: int, total: int) -> None:
        """`task` has done so many of `total` pictures (or picture views); a task ends when all are done."""
