"""What messages are put together from: the first few of many names, the first line of another library's error."""

from collections.abc import Iterable

__all__ = ["first_line", "listed", "printable"]


def first_line(error: BaseException) -> str:
    """What an error says first, or its type where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def listed(names: Iterable[str], count: int = 4, separator: str = ", ") -> str:
    """The first few of many names, and how many more there are."""
    every = list(names)
    rest = f" and {len(every) - count} more" if len(every) > count else ""
    return separator.join(every[:count]) + rest


def printable(name: str) -> str:
    r"""The name of a file as any text may hold it: bytes that are no UTF-8 as \xff."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
