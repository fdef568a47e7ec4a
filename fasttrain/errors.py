"""Every error that fasttrain raises on purpose.

    FasttrainError
    ├── DataError      a table, a text or a batch is not what it must be; names the file, row and column
    ├── ConfigError    an option, or a combination of options, that cannot work
    ├── DeviceError    the machine lacks what was asked for
    ├── EngineError    an engine was requested by name and cannot run this step
    └── RunError       a run folder cannot be made, read or written

A message says what was given, what is allowed and what to do. The command line prints it without a traceback and
exits with 2.
"""

from __future__ import annotations

__all__ = ["ConfigError", "DataError", "DeviceError", "EngineError", "FasttrainError", "RunError", "first_line"]


class FasttrainError(Exception):
    """The parent of all errors that fasttrain raises on purpose."""


class DataError(FasttrainError):
    """A table, a text or a batch is not what it must be.

    Args:
        problem: what was found, and what to do about it.
        file: the file (or "DataFrame") it was found in, or None where there is none.
        row: row counted as a spreadsheet does (the header is row 1), or None.
        column: the column's name, or None.
    """

    def __init__(
        self, problem: str, *, file: str | None = None, row: int | None = None, column: str | None = None
    ) -> None:
        self.problem = problem
        self.file = file
        self.row = row
        self.column = column
        place = [part for part in (file, row and f"row {row}", column and f"column '{column}'") if part]
        super().__init__(f"{', '.join(place)}: {problem}" if place else problem)


class ConfigError(FasttrainError):
    """An option, or a combination of options, that cannot work."""


class DeviceError(FasttrainError):
    """The machine lacks what was asked for."""


class EngineError(FasttrainError):
    """An engine was requested by name and cannot run this step."""


class RunError(FasttrainError):
    """A run folder cannot be made, read or written."""


def first_line(error: Exception) -> str:
    """An error's kind and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
