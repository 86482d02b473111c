"""What can go wrong for a user, as a tree; every message says what was found, what was wanted and what to do.

IsthmusError
├── SpecError            a network or block on paper that cannot be built
│   └── ShortcutError    main path and shortcut of a residual block disagree in shape
├── WeightsError         a weight file that cannot be read, or does not fit the network
├── DataError            pictures, labels or folders that cannot be used
├── RecipeError          a training recipe with an unknown or impossible setting
├── ExportError          an exported file that does not compute what its network does
├── EngineError          no engine here computes what the network does, in the precision asked for
├── PrecisionError       a lower precision that changes more predictions than allowed, or saves no time
├── RunError             a run folder that is missing, unfinished or cannot be written
└── MissingExtraError    an optional library is not installed
"""

__all__ = [
    "DataError",
    "EngineError",
    "ExportError",
    "IsthmusError",
    "MissingExtraError",
    "PrecisionError",
    "RecipeError",
    "RunError",
    "ShortcutError",
    "SpecError",
    "WeightsError",
]


class IsthmusError(Exception):
    """Base of every error a user can mend; the command line prints it on one line and exits with 2."""


class SpecError(IsthmusError):
    """A network or block on paper that cannot be built."""


class ShortcutError(SpecError):
    """Main path and shortcut of a residual block disagree in shape."""


class WeightsError(IsthmusError):
    """A weight file that cannot be read, or does not fit the network."""


class DataError(IsthmusError):
    """Pictures, labels or folders that cannot be used."""


class RecipeError(IsthmusError):
    """A training recipe with an unknown or impossible setting."""


class ExportError(IsthmusError):
    """An exported file that does not compute what its network does."""


class EngineError(IsthmusError):
    """No engine here computes what the network does, in the precision asked for."""


class PrecisionError(IsthmusError):
    """A lower precision that changes more predictions than allowed, or saves no time; `tried` are the measurements."""

    def __init__(self, message: str, tried: tuple[object, ...] = ()) -> None:
        super().__init__(message)
        self.tried = tried


class RunError(IsthmusError):
    """A run folder that is missing, unfinished or cannot be written."""


class MissingExtraError(IsthmusError):
    """An optional library is not installed."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f'{library} is needed here and not installed: pip install "isthmus[{extra}]"')
        self.library, self.extra = library, extra

    def __reduce__(self) -> tuple[type["MissingExtraError"], tuple[str, str]]:
        """So that it comes home from another process."""
        return type(self), (self.library, self.extra)
