"""What every command shares: its exit codes and how it prints. It needs no torch, so that a command may start light."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Protocol, TextIO

from fasttrain.errors import ConfigError, FasttrainError
from fasttrain.json_text import json_text
from fasttrain.printable import is_utf8

__all__ = [
    "EXIT_BAD_INPUT",
    "EXIT_INTERRUPTED",
    "OutputError",
    "Runnable",
    "drop_output",
    "flush_streams",
    "interrupts_end_at_once",
    "open_closed_streams",
    "print_error",
    "print_json",
    "print_line",
    "recorded_command",
]

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class OutputError(FasttrainError):
    """Stdout cannot be written."""


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
    """One line on stdout, if its reader is still there: a command goes on without, to its files and its exit code.

    Raises:
        OutputError: stdout cannot be written for another reason, such as a full disk.
    """
    with _output_failures():
        print(line)  # noqa: T201


def print_error(line: str) -> None:
    """One line on stderr, where that is possible."""
    try:
        print(line, file=sys.stderr)  # noqa: T201
    except OSError:
        _drop(sys.stderr)


def flush_streams() -> None:
    """Writes what is buffered for stdout and stderr. Python would do so at its end, and exit with 120 if it fails.

    Raises:
        OutputError: as `print_line`.
    """
    try:
        sys.stderr.flush()
    except OSError:
        _drop(sys.stderr)
    with _output_failures():
        sys.stdout.flush()


def drop_output() -> None:
    """Discards what is still to be written to stdout, including what is buffered."""
    _drop(sys.stdout)


def _drop(stream: TextIO) -> None:
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


@contextmanager
def _output_failures() -> Generator[None]:
    try:
        yield
    except BrokenPipeError:
        drop_output()
    except OSError as error:
        drop_output()
        raise OutputError(f"stdout cannot be written: {error.strerror or error}") from error


def open_closed_streams() -> None:
    """Connects standard streams that are closed to /dev/null.

    Otherwise the next files that are opened get their numbers, and print writes to stdout what is meant for stderr.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number: this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))


@contextmanager
def interrupts_end_at_once() -> Generator[None]:
    """Ends the process at Ctrl-C while modules are imported, where a KeyboardInterrupt could come up anywhere."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _end_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_at_once(_signal: int, _frame: FrameType | None) -> None:
    with suppress(OSError):
        os.write(2, b"fasttrain: interrupted\n")
    os._exit(EXIT_INTERRUPTED)


def recorded_command(arguments: Sequence[str]) -> str:
    """The command line, as a record keeps it.

    Raises:
        ConfigError: UTF-8 cannot hold it, because a file has such a name.
    """
    for argument in arguments:
        if not is_utf8(argument):
            raise ConfigError(f"{argument!r}: the command is recorded; use names in UTF-8")
    return shlex.join(["python", "-m", "fasttrain", *arguments])
