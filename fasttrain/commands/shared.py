"""What every command shares: its exit codes and how it prints. It needs no torch, so that a command may start light."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any, Protocol

from fasttrain.errors import ConfigError
from fasttrain.json_text import json_text
from fasttrain.printable import is_utf8

__all__ = [
    "EXIT_BAD_INPUT",
    "EXIT_INTERRUPTED",
    "Runnable",
    "drop_output",
    "print_json",
    "print_line",
    "recorded_command",
]

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
    """One line on stdout, if its reader is still there: a command goes on without, to its files and its exit code."""
    try:
        print(line)  # noqa: T201
    except BrokenPipeError:
        drop_output()


def drop_output() -> None:
    """Has what is still to go to stdout, what is buffered too, go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def recorded_command(arguments: Sequence[str]) -> str:
    """The command line, as a record keeps it.

    Raises:
        ConfigError: UTF-8 cannot hold it, because a file has such a name.
    """
    for argument in arguments:
        if not is_utf8(argument):
            raise ConfigError(f"{argument!r}: the command is recorded; use names in UTF-8")
    return shlex.join(["python", "-m", "fasttrain", *arguments])
