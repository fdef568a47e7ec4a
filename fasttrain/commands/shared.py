"""What every command shares: its exit codes and how it prints. It needs no torch, so that a command may start light."""

from __future__ import annotations

from typing import Any, Protocol

from fasttrain.json_text import json_text

__all__ = ["EXIT_BAD_INPUT", "EXIT_INTERRUPTED", "Runnable", "print_json", "print_line"]

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class Runnable(Protocol):
    """The options of a command, as they were given."""

    def execute(self, arguments: list[str], /) -> int:
        """Carries the command out.

        Args:
            arguments: the command line, for a command that repeats or records it.

        Returns:
            The exit code.
        """
        ...


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    print_line(json_text(document))


def print_line(line: str) -> None:
    """One line on stdout."""
    print(line)  # noqa: T201
